"""A unit whose successor waits: real processes, pipes and signals; the program is small, the waiting is the real one's."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from portico.embedded import units
from portico.embedded.logs import LogStream
from portico.embedded.roster import Roster
from portico.embedded.supervisor import Supervisor, SupervisorLimits, wait_exit
from portico.embedded.units import ProcessUnit, Standby
from portico.kit import standby

#: Waits when told to, says that it is ready, and that it drains when it is asked to end.
PROGRAM = (
    "import os, signal, time; from portico.kit import notify, standby\n"
    "waiting = os.environ.get('PORTICO_STANDBY_FD'); fd = int(os.environ['PORTICO_NOTIFY_FD'])\n"
    "standby.wait(int(waiting) if waiting else None, 'portico-part')\n"
    "signal.signal(signal.SIGTERM, lambda *_: notify.stopping(fd))\n"
    "notify.ready(fd)\n"
    "while True: time.sleep(60)\n"
)
LIMITS = SupervisorLimits(restart_min_seconds=0.01, healthy_after_seconds=0.0, stop_seconds=2, leave_seconds=0.2)
CEILING_SECONDS = 60.0


@pytest_asyncio.fixture
async def logs(tmp_path: Path) -> AsyncIterator[LogStream]:
    with (tmp_path / "log").open("wb") as file:
        stream = LogStream(file.fileno(), level="INFO", color=False)
        yield stream
        stream.close()


@pytest.fixture
def make(logs: LogStream, monkeypatch: pytest.MonkeyPatch) -> Callable[[float | None], ProcessUnit]:
    monkeypatch.setattr(units, "portico_argv", lambda *_: [sys.executable, "-c", PROGRAM])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PORTICO_")}
    return lambda after: ProcessUnit("part", [], environment, standby=Standby(logs, after))


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(CEILING_SECONDS):
        while not what():
            await asyncio.sleep(0.01)


def called(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def waiting(unit: ProcessUnit) -> int:
    """The process that waits."""
    assert unit._waiting is not None
    return unit._waiting.process.pid


async def test_the_one_that_waits_is_the_one_that_is_started(make: Callable[[float | None], ProcessUnit]) -> None:
    unit = make(None)
    unit.stand_by()
    pid = waiting(unit)
    unit.stand_by()
    assert waiting(unit) == pid, "one is enough"
    await until(lambda: called(pid) == standby.NAME)
    assert not await unit.ready()
    left: list[bool] = []
    with open(os.devnull, "wb") as null:
        process = await unit.launch(null.fileno(), lambda: left.append(True))
    try:
        assert process.pid == pid
        async with asyncio.timeout(CEILING_SECONDS):
            while not await unit.ready():
                await asyncio.sleep(0.01)
        assert called(pid) == "portico-part"
        assert not left
        process.terminate()
        await until(lambda: bool(left))
    finally:
        process.kill()
        await wait_exit(process)
        unit.release()


async def test_one_that_died_waiting_is_not_missed(make: Callable[[float | None], ProcessUnit]) -> None:
    unit = make(None)
    unit.stand_by()
    dead = waiting(unit)
    os.kill(dead, signal.SIGKILL)
    with open(os.devnull, "wb") as null:
        process = await unit.launch(null.fileno(), lambda: None)
    try:
        await until(lambda: unit._said_ready or process.poll() is not None)
        if not unit._said_ready:  # it was told to go on in the moment in which it died: the supervisor starts the next
            with open(os.devnull, "wb") as null:
                process = await unit.launch(null.fileno(), lambda: None)
            await until(lambda: unit._said_ready)
        assert process.pid != dead
    finally:
        process.kill()
        await wait_exit(process)
        unit.release()


async def test_nothing_waits_after_the_end(make: Callable[[float | None], ProcessUnit]) -> None:
    unit = make(None)
    unit.stand_by()
    pid = waiting(unit)
    unit.release()
    assert not Path(f"/proc/{pid}").exists()
    unit.release()


async def test_a_killed_process_has_its_successor_waiting_and_that_one_the_next(
    make: Callable[[float | None], ProcessUnit], logs: LogStream, tmp_path: Path
) -> None:
    unit = make(0.0)
    supervisor = Supervisor(logs, Roster(tmp_path / "children"), LIMITS)
    try:
        await supervisor.start(unit)
        for signum in (signal.SIGKILL, signal.SIGTERM):
            await until(lambda: unit._waiting is not None and called(waiting(unit)) == standby.NAME)
            heir, pid = waiting(unit), supervisor.pid("part")
            assert pid is not None
            os.kill(pid, signum)
            await until(lambda heir=heir: supervisor.pid("part") == heir)  # type: ignore[misc]
            await until(lambda heir=heir: called(heir) == "portico-part")  # type: ignore[misc]
        await until(lambda: unit._waiting is not None)
        last = waiting(unit)
    finally:
        await supervisor.stop()
    assert not Path(f"/proc/{last}").exists()
