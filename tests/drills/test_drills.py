"""Parts of one running platform die, freeze and drain under 200 requests a second; each drill leaves everything as it was."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tests.drills.drill import IN_FLIGHT, REPEATS, Allowed, Moments, figure, run, slowness
from tests.drills.load import Load
from tests.drills.stage import CEILING_SECONDS, FAULTS, PINGS, USAGE_INTERVAL, Stage, stage
from tests.system.platform import Child, signal_all, tree

pytestmark = [
    pytest.mark.system,
    pytest.mark.realtime,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]

AGENTS = 500
#: Target in seconds: `portico up` serves again on data that a killed run left.
UP_SECONDS = 6.0
#: Target in seconds: all agents of a storm are back within interval and timeout of a relay's pings by default.
STORM_SECONDS = 10.0

#: What a relay says when its disk is full.
USAGE_WAITS = "usage cannot be saved; it waits in memory"

again = pytest.mark.parametrize("run_number", range(1, REPEATS + 1))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with stage("drill", tmp_path_factory.mktemp("drill")) as made:
        yield made


def in_flight(most: int, why: str) -> Allowed:
    """Requests that were in flight in what was killed: few, and none that began later."""
    return Allowed(IN_FLIGHT, most, why)


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


def killer(name: str, signum: int = signal.SIGKILL) -> Callable[[Stage, Load], Awaitable[Moments]]:
    """A kill is over when the process has gone, and with it its sockets; an orderly end when another has its part."""

    async def act(platform: Stage, load: Load) -> Moments:
        pid = platform.pids()[name]
        done = time.monotonic()
        os.kill(pid, signum)
        if signum == signal.SIGKILL:
            await until(lambda: not alive(pid))
        over = time.monotonic()
        await replaced(platform, name, pid)
        return Moments(done, done, over)

    return act


async def replaced(platform: Stage, name: str, pid: int) -> None:
    """Until another process than ``pid`` plays the part."""

    def other() -> bool:
        try:
            return platform.pids()[name] != pid
        except (OSError, IndexError, ValueError):
            return False

    await until(other)


async def until(what: Callable[[], bool], limit: float = CEILING_SECONDS) -> None:
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
    await run(f"kill -9 {part.split('-')[0]}", platform, killer(part), allowed, usage_lost=usage_lost)


# ── SIGTERM ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@again
@pytest.mark.parametrize("part", ["relay-1", "api", "worker"])
async def test_restart_in_order(platform: Stage, part: str, run_number: int) -> None:
    """One relay, too: its successor takes the listening sockets over while it drains."""
    await settled(platform)
    await run(f"SIGTERM {part.split('-')[0]}", platform, killer(part, signal.SIGTERM))


@again
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
async def test_calls_of_the_api_while_it_restarts(platform: Stage, signum: signal.Signals, run_number: int) -> None:
    """Its own callers: a restart in order fails no call, a kill those that were in flight."""
    await settled(platform)
    fields = [f"Authorization: Bearer {platform.account.token}"]
    calls = Load(platform.ports["api"], "localhost", 30, "/v1/tunnels", fields=fields)
    async with calls:
        await asyncio.sleep(1)
        assert not calls.failed(), calls.causes()
        act = await killer("api", signum)(platform, calls)
        took = await calls.until_good(act.done, CEILING_SECONDS)
        await asyncio.sleep(1)
    figure(f"{signum.name} api", "seconds until calls are answered", took, 3.0 * await slowness())
    allowed = in_flight(5, "calls in flight in the API") if signum == signal.SIGKILL else Allowed()
    strange = allowed.strange(calls, act)
    assert not strange, f"{strange}; {calls.causes()}"
    assert not platform.faults()


# ── SIGSTOP ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@again
async def test_a_relay_that_stands_still(platform: Stage, run_number: int) -> None:
    """Longer than the ping deadline: the agent gives it up, and is back once it goes on."""

    async def act(platform: Stage, load: Load) -> Moments:
        pid, agent = platform.pids()["relay-1"], platform.agent.agent

        def given_up() -> int:
            return sum(event["event"] == "reconnecting" for event in agent.events())

        before = given_up()
        os.kill(pid, signal.SIGSTOP)
        try:
            await until(lambda: given_up() > before)
            await asyncio.sleep(0.5)
        finally:
            os.kill(pid, signal.SIGCONT)
        return Moments(time.monotonic(), time.monotonic(), time.monotonic())

    # When it goes on, it takes up what came meanwhile before it has read that the agent gave its connection up: at most what
    # waits on connections that it knows.
    why = "requests in flight in the relay, or sent on the connection that the agent had given up"
    await run("SIGSTOP relay", platform, act, Allowed(IN_FLIGHT, 60, why, of_those_open=False))


@again
async def test_an_agent_that_stands_still(platform: Stage, run_number: int) -> None:
    async def act(platform: Stage, load: Load) -> Moments:
        pid = platform.pids()["agent"]
        done = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        try:
            # Nothing says that it is frozen but its silence: what is sent to it until the deadline is in flight in it.
            await until(lambda: bool(load.failed(done)))
            over = time.monotonic()
            await asyncio.sleep(0.5)
        finally:
            os.kill(pid, signal.SIGCONT)
        return Moments(done, time.monotonic(), over)

    await run("SIGSTOP agent", platform, act, in_flight(0, "in flight in the agent until its ping deadline"))


# ── a full disk ───────────────────────────────────────────────────────────────────────────────────────────────────────


@again
@pytest.mark.parametrize("part", ["relay-1", "up"])
async def test_a_full_disk(platform: Stage, part: str, run_number: int) -> None:
    """No byte can be written to a file, by the relay (usage spool, edge state) or by the supervisor (the log of everything);
    then again. Nothing that visitors see changes, and usage is counted."""

    async def act(platform: Stage, load: Load) -> None:
        pid = platform.pids()[part]
        said = platform.up.child.err.count(USAGE_WAITS)
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        try:
            if part == "up":
                # Something to say, and a child to start, meanwhile; its list of children is on the disk, too.
                old = running(pid, b"worker")
                signal_all(old, signal.SIGKILL)
                await until(lambda: bool(running(pid, b"worker") - old))
            else:
                await until(lambda: platform.up.child.err.count(USAGE_WAITS) > said)
            await asyncio.sleep(2 * USAGE_INTERVAL)
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))

    what = "log" if part == "up" else "usage spool"
    await run(f"full disk: {what}", platform, act)


# ── a storm of agents ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm(platform: Stage) -> AsyncIterator[Child]:
    """500 agents, all online."""
    where = platform.account
    own = {"server": where.api_url, "agent_key": where.agent_key, "config_dir": platform.folder / "swarm"} | PINGS
    argv = [sys.executable, "-m", "tests.drills.swarm", str(AGENTS)]
    child = Child("swarm", [], platform.folder, own, argv, cwd=Path.cwd())
    try:
        began = time.monotonic()
        await until(lambda: online(child) == AGENTS, 3 * CEILING_SECONDS)
        print(f"{AGENTS} agents were online after {time.monotonic() - began:.1f} s")
        yield child
    finally:
        await asyncio.to_thread(child.end)


def counts(child: Child) -> list[tuple[float, int]]:
    """When how many agents were online."""
    lines = [json.loads(line) for line in child.out.split("\n")[:-1]]
    return [(line["at"], line["online"]) for line in lines]


def online(child: Child) -> int:
    return next((count for _, count in reversed(counts(child))), 0)


@again
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
async def test_500_agents_reconnect_at_once(
    platform: Stage, swarm: Child, signum: signal.Signals, run_number: int
) -> None:
    """All of them are back by themselves, and visitors of the others notice nothing of the storm."""
    await until(lambda: online(swarm) == AGENTS, 3 * CEILING_SECONDS)
    at = 0.0

    async def act(platform: Stage, load: Load) -> Moments:
        nonlocal at
        at = time.monotonic()
        return await killer("relay-1", signum)(platform, load)

    allowed = in_flight(30, "requests in flight in the relay") if signum == signal.SIGKILL else Allowed()
    lost = 1.5 if signum == signal.SIGKILL else 0.0
    await run(f"{signum.name} relay with {AGENTS} agents", platform, act, allowed, usage_lost=lost)
    await until(lambda: online(swarm) == AGENTS, 3 * CEILING_SECONDS)
    since = [(when - at, count) for when, count in counts(swarm) if when > at]
    took, fewest = max((when for when, _ in since), default=0.0), min((count for _, count in since), default=AGENTS)
    print(f"{signum.name}: {AGENTS - fewest} agents were offline, all were back after {took:.1f} s")
    figure(f"{signum.name} relay", f"seconds until {AGENTS} agents are back", took, STORM_SECONDS * await slowness())
    assert signum == signal.SIGKILL or fewest == AGENTS, "an agent left the old relay before it had the new one"
    assert not FAULTS.search(swarm.err), swarm.err[-3000:]


# ── everything at once ────────────────────────────────────────────────────────────────────────────────────────────────


@again
@pytest.mark.parametrize("what", ["supervisor", "all at once"])
async def test_the_supervisor_dies(platform: Stage, what: str, run_number: int) -> None:
    """Its children end with it; `portico up` on the same data and ports, started as a service manager would, brings all back."""

    async def act(platform: Stage, load: Load) -> Moments:
        old = tree(platform.up.child.pid)
        done = time.monotonic()
        signal_all(old if what == "all at once" else old[:1], signal.SIGKILL)
        if what == "all at once":
            platform.agent.agent.kill(signal.SIGKILL)
        platform.up.child.process.wait()
        began = time.monotonic()
        await platform.start_up()
        left = [pid for pid in old if alive(pid)]
        assert not left, f"processes of the killed run are left: {left}"
        return Moments(done, began, time.monotonic())

    causes = IN_FLIGHT | {"ConnectionRefusedError"}
    allowed = Allowed(causes, None, "nobody listens until `portico up` is back")
    # Not the recovery of one process, but a start of all of them: PostgreSQL's recovery, migrations, API, relay, agent.
    await run(f"kill -9 {what}", platform, act, allowed, back=UP_SECONDS, usage_lost=2.5)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"
