"""Parts of one running platform die, freeze and drain under 200 requests a second; each drill leaves everything as it was."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tests.drills.drill import IN_FLIGHT, REPEATS, Allowed, run
from tests.drills.load import Load
from tests.drills.stage import PING_DEADLINE, Stage, stage
from tests.system.platform import signal_all, tree

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

again = pytest.mark.parametrize("run_number", range(1, REPEATS + 1))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with stage("drill", tmp_path_factory.mktemp("drill")) as made:
        yield made


def in_flight(most: int, why: str, until: float = 0.1) -> Allowed:
    """Requests that were in flight in what was killed: few, and none that began later."""
    return Allowed(IN_FLIGHT, until, most, why)


async def settled(platform: Stage) -> None:
    """A process that served for a while is started again at once when it dies: the pause between starts is small again."""
    await asyncio.sleep(1.0)


def running(supervisor: int, command: bytes) -> set[int]:
    """The processes of a kind below a supervisor."""
    found = set()
    for pid in tree(supervisor):
        try:
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if argv[1:5] == [b"-P", b"-m", b"portico.cli", command]:
            found.add(pid)
    return found


def killer(name: str, signum: int = signal.SIGKILL) -> Callable[[Stage, Load], object]:
    async def act(platform: Stage, load: Load) -> None:
        pid = platform.pids()[name]
        os.kill(pid, signum)
        await replaced(platform, name, pid)

    return act


async def replaced(platform: Stage, name: str, pid: int) -> None:
    """Until another process than ``pid`` plays the part."""

    def other() -> bool:
        try:
            return platform.pids()[name] != pid
        except (OSError, IndexError, ValueError):
            return False

    await until(other, 20)


async def until(what: Callable[[], bool], limit: float) -> None:
    deadline = time.monotonic() + limit
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)


# ── kill -9 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@again
@pytest.mark.parametrize(
    ("part", "allowed", "usage_lost"),
    [
        ("relay-1", in_flight(30, "requests in flight in the relay"), 1.5),
        ("agent", in_flight(30, "requests in flight in the agent"), 0.0),
        ("api", Allowed(), 0.0),
        ("postgres", Allowed(), 0.0),
        ("valkey", Allowed(), 0.0),
        ("worker", Allowed(), 0.0),
    ],
)
async def test_kill(platform: Stage, part: str, allowed: Allowed, usage_lost: float, run_number: int) -> None:
    await settled(platform)
    await run(f"kill -9 {part.split('-')[0]}", platform, killer(part), allowed, usage_lost=usage_lost)  # type: ignore[arg-type]


# ── SIGTERM ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@again
@pytest.mark.parametrize("part", ["relay-1", "api", "worker"])
async def test_restart_in_order(platform: Stage, part: str, run_number: int) -> None:
    """One relay, too: its successor takes the listening sockets over while it drains."""
    await settled(platform)
    await run(f"SIGTERM {part.split('-')[0]}", platform, killer(part, signal.SIGTERM))  # type: ignore[arg-type]


# ── SIGSTOP ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@again
async def test_a_relay_that_stands_still(platform: Stage, run_number: int) -> None:
    """Longer than the ping deadline: the agent gives it up, and is back once it goes on."""

    async def act(platform: Stage, load: Load) -> float:
        pid = platform.pids()["relay-1"]
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(PING_DEADLINE + 1)
        os.kill(pid, signal.SIGCONT)
        return time.monotonic()

    allowed = in_flight(60, "requests in flight in the relay: the agent gave up what did not answer", 0.2)
    await run("SIGSTOP relay", platform, act, allowed)


@again
async def test_an_agent_that_stands_still(platform: Stage, run_number: int) -> None:
    async def act(platform: Stage, load: Load) -> float:
        pid = platform.pids()["agent"]
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(PING_DEADLINE + 1)
        os.kill(pid, signal.SIGCONT)
        return time.monotonic()

    # Nothing says that it is frozen but its silence: what is sent to it until the deadline is in flight in it, and the
    # tunnel's limit of requests at once (100) is soon reached.
    causes = IN_FLIGHT | {"edge.concurrency_exceeded"}
    allowed = Allowed(
        causes, PING_DEADLINE + 1.2, 1200, "in flight in the agent until its ping deadline; more than 100 at once"
    )
    await run("SIGSTOP agent", platform, act, allowed)


# ── a full disk ───────────────────────────────────────────────────────────────────────────────────────────────────────


@again
@pytest.mark.parametrize("part", ["relay-1", "up"])
async def test_a_full_disk(platform: Stage, part: str, run_number: int) -> None:
    """No byte can be written to a file, by the relay (usage spool, edge state) or by the supervisor (the log of everything);
    then again. Nothing that visitors see changes, and usage is counted."""

    async def act(platform: Stage, load: Load) -> None:
        pid = platform.pids()[part]
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        try:
            await asyncio.sleep(5)
            if (
                part == "up"
            ):  # something to say, and a child to start, meanwhile; its list of children is on the disk, too
                old = running(pid, b"worker")
                signal_all(old, signal.SIGKILL)
                await until(lambda: bool(running(pid, b"worker") - old), 20)
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))

    what = "log" if part == "up" else "usage spool"
    await run(f"full disk: {what}", platform, act)
    if part != "up":
        assert "usage cannot be saved; it waits in memory" in platform.up.child.err


# ── everything at once ────────────────────────────────────────────────────────────────────────────────────────────────


@again
@pytest.mark.parametrize("what", ["supervisor", "all at once"])
async def test_the_supervisor_dies(platform: Stage, what: str, run_number: int) -> None:
    """Its children end with it; `portico up` on the same data and ports, started as a service manager would, brings all back."""

    async def act(platform: Stage, load: Load) -> float:
        old = tree(platform.up.child.pid)
        signal_all(old if what == "all at once" else old[:1], signal.SIGKILL)
        if what == "all at once":
            platform.agent.agent.kill(signal.SIGKILL)
        platform.up.child.process.wait()
        began = time.monotonic()
        await platform.start_up()
        left = [pid for pid in old if alive(pid)]
        assert not left, f"processes of the killed run are left: {left}"
        return began

    allowed = Allowed(
        IN_FLIGHT | {"ConnectionRefusedError", "TimeoutError"}, 12.0, 4000, "nobody listens until `portico up` is back"
    )
    back = max(3.0, 1.5 * platform.up_start)
    await run(f"kill -9 {what}", platform, act, allowed, back=back, usage_lost=2.5)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"
