"""The supervisor on real processes: order, readiness, restarts, drain."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from portico.embedded.logs import LogStream
from portico.embedded.roster import Roster, started_at
from portico.embedded.spawn import SERVER_ENV, spawn
from portico.embedded.supervisor import Supervisor, SupervisorLimits, wait_exit
from portico.errors import Problem
from tests.timing import Since

LIMITS = SupervisorLimits(
    start_seconds=30,
    restart_min_seconds=0.05,
    restart_max_seconds=0.4,
    healthy_after_seconds=30,
    stop_seconds=3,
    hurry_seconds=0.3,
)
READY = "import sys, os, signal, time\nopen(os.environ['READY'], 'a').write('x')\n"
SLEEP = READY + "time.sleep(60)\n"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP


class Script:
    """A unit that runs Python code, ready once it has written to its file."""

    signals: Sequence[int] = (signal.SIGTERM, signal.SIGKILL)

    def __init__(self, name: str, folder: Path, code: str, log: list[str]) -> None:
        self.name, self._code, self._log = name, code, log
        self._mark = folder / f"{name}.ready"
        self.starts = 0

    async def launch(self, output: int, leaving: Callable[[], None]) -> subprocess.Popen[bytes]:
        self.leaving = leaving
        self.starts += 1
        self._log.append(f"start {self.name}")
        self._mark.unlink(missing_ok=True)
        env = SERVER_ENV | {"READY": str(self._mark)}
        return spawn([sys.executable, "-S", "-c", self._code], env=env, output=output)

    async def ready(self) -> bool:
        return self._mark.exists()

    def ended(self) -> None:
        self._log.append(f"end {self.name}")

    def release(self) -> None:
        self._log.append(f"release {self.name}")


class Bench:
    """A supervisor whose log is a file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.events = folder, list[str]()
        self._file = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        self.logs = LogStream(self._file)
        self.roster = Roster(folder / "children")
        self.supervisor = Supervisor(self.logs, self.roster, LIMITS)

    def unit(self, name: str, code: str = SLEEP) -> Script:
        return Script(name, self.folder, code, self.events)

    def said(self) -> str:
        self.logs.flush()
        return (self.folder / "log").read_text()

    def close(self) -> None:
        self.logs.close()
        os.close(self._file)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.supervisor.hurry()
    await made.supervisor.stop()
    made.close()


async def until(what: object, seconds: float = 30.0) -> None:
    """Wait for a condition (a function without arguments)."""
    deadline = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


class TestStart:
    async def test_in_order_and_back_in_reverse(self, bench: Bench) -> None:
        await bench.supervisor.start(bench.unit("one"), bench.unit("two"))
        assert {bench.supervisor.pid("one"), bench.supervisor.pid("two")} & {None} == set()
        await bench.supervisor.start(bench.unit("three"))
        await bench.supervisor.stop()
        events = bench.events
        assert events.index("start three") > max(events.index("start one"), events.index("start two"))
        assert events.index("release three") < min(events.index("end one"), events.index("end two"))
        assert not (bench.folder / "children").exists()

    async def test_one_that_ends_early_fails_with_its_last_words(self, bench: Bench) -> None:
        unit = bench.unit("bad", "import sys, time\nprint('no such file: x.toml'); sys.exit(3)")
        with pytest.raises(Problem) as caught:
            await bench.supervisor.start(bench.unit("good"), unit)
        assert caught.value.code == "up.child_failed"
        assert "exit 3" in caught.value.detail and "no such file: x.toml" in caught.value.detail
        assert unit.starts == 1, "a child that never was ready is not tried again"

    async def test_one_that_is_never_ready_is_ended(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path)
        bench.supervisor = Supervisor(bench.logs, bench.roster, SupervisorLimits(start_seconds=0.2, hurry_seconds=0.2))
        try:
            with pytest.raises(Problem) as caught:
                await bench.supervisor.start(bench.unit("slow", "import time\ntime.sleep(60)"))
            assert "not ready" in caught.value.detail
            assert "end slow" in bench.events
        finally:
            await bench.supervisor.stop()
            bench.close()

    async def test_stop_during_a_start(self, bench: Bench) -> None:
        start = asyncio.create_task(bench.supervisor.start(bench.unit("slow", "import time\ntime.sleep(60)")))
        await until(lambda: bench.supervisor.pid("slow"))
        pid = bench.supervisor.pid("slow")
        await bench.supervisor.stop()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert pid is not None and started_at(pid) is None


#: Says that it drains on SIGTERM, goes on for a moment, and ends; as `portico relay` does.
DRAINS = """
import os, signal, sys, time
def drain(*_):
    open(os.environ["READY"] + ".drains", "w").close()
    time.sleep(float(os.environ.get("LASTS", "0.6")))
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
open(os.environ["READY"], "a").write("x")
time.sleep(60)
"""


class TestSuccessor:
    async def test_it_starts_while_the_old_one_drains(self, bench: Bench) -> None:
        unit = bench.unit("relay", DRAINS)
        await bench.supervisor.start(unit)
        old = bench.supervisor.pid("relay")
        assert old is not None
        os.kill(old, signal.SIGTERM)
        await until(lambda: (bench.folder / "relay.ready.drains").exists())
        unit.leaving()
        await until(lambda: bench.supervisor.pid("relay") not in (old, None), 0.5)
        assert started_at(old) is not None, "the old one still drains"
        await until(lambda: "relay is back" in bench.said(), 0.5)
        await until(lambda: "the old relay ended (exit 0)" in bench.said())
        assert "restart in" not in bench.said(), "the end of the old one is no reason for another start"
        assert unit.starts == 2

    async def test_an_old_one_that_does_not_end_is_ended(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path)
        bench.supervisor = Supervisor(bench.logs, bench.roster, SupervisorLimits(leave_seconds=0.2))
        try:
            unit = bench.unit("relay", STUBBORN)
            await bench.supervisor.start(unit)
            old = bench.supervisor.pid("relay")
            assert old is not None
            unit.leaving()
            await until(lambda: "did not end in 0 s" in bench.said())
            await until(lambda: started_at(old) is None)
        finally:
            bench.supervisor.hurry()
            await bench.supervisor.stop()
            bench.close()

    async def test_stop_ends_both(self, bench: Bench) -> None:
        unit = bench.unit("relay", STUBBORN)
        await bench.supervisor.start(unit)
        old = bench.supervisor.pid("relay")
        unit.leaving()
        await until(lambda: bench.supervisor.pid("relay") not in (old, None))
        new = bench.supervisor.pid("relay")
        bench.supervisor.hurry()
        await bench.supervisor.stop()
        assert old is not None and new is not None
        assert started_at(old) is None and started_at(new) is None


class TestRestart:
    async def test_a_killed_child_comes_back(self, bench: Bench) -> None:
        await bench.supervisor.start(bench.unit("api"))
        first = bench.supervisor.pid("api")
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: bench.supervisor.pid("api") not in (first, None))
        await until(lambda: "api is back" in bench.said())
        assert "api ended (SIGKILL); restart in 0.1 s" in bench.said()

    async def test_the_pause_grows_to_its_limit(self, bench: Bench) -> None:
        unit = bench.unit("flaky", READY + "time.sleep(0.03)\n")
        await bench.supervisor.start(unit)
        await until(lambda: unit.starts >= 6, 10)
        pauses = [
            float(line.split("restart in ")[1].split()[0]) for line in bench.said().splitlines() if "restart in" in line
        ]
        assert pauses[:5] == [0.1, 0.1, 0.2, 0.4, 0.4]

    async def test_the_pause_starts_small_again_after_health(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path)
        limits = SupervisorLimits(restart_min_seconds=0.05, restart_max_seconds=5, healthy_after_seconds=0.1)
        bench.supervisor = Supervisor(bench.logs, bench.roster, limits)
        unit = bench.unit("healthy", READY + "time.sleep(0.15)\n")
        try:
            await bench.supervisor.start(unit)
            await until(lambda: unit.starts >= 5)
        finally:
            await bench.supervisor.stop()
            bench.close()

    async def test_a_restart_that_fails_is_tried_again(self, bench: Bench) -> None:
        code = "import os, sys\nif os.path.exists(os.environ['READY'] + '.broken'): sys.exit('broken')\n" + SLEEP
        unit = bench.unit("db", code)
        await bench.supervisor.start(unit)
        broken = bench.folder / "db.ready.broken"
        broken.touch()
        os.kill(bench.supervisor.pid("db") or 0, signal.SIGKILL)
        await until(lambda: "db did not restart" in bench.said())
        broken.unlink()
        await until(lambda: "db is back" in bench.said())


class TestStop:
    async def test_a_stubborn_child_is_killed_within_the_limit(self, bench: Bench) -> None:
        await bench.supervisor.start(bench.unit("stubborn", STUBBORN))
        pid = bench.supervisor.pid("stubborn")
        since = Since()
        await bench.supervisor.stop()
        assert since.waited() < LIMITS.stop_seconds + 0.5
        assert pid is not None and started_at(pid) is None
        assert "stubborn did not end on SIGTERM" in bench.said()

    async def test_hurry_cuts_the_patience(self, bench: Bench) -> None:
        await bench.supervisor.start(bench.unit("stubborn", STUBBORN))
        since = Since()
        stop = asyncio.create_task(bench.supervisor.stop())
        await asyncio.sleep(0.1)
        bench.supervisor.hurry()
        await stop
        assert since.waited() < 1.0

    async def test_nothing_is_restarted_while_stopping(self, bench: Bench) -> None:
        unit = bench.unit("flaky", READY + "time.sleep(0.02)\n")
        await bench.supervisor.start(unit)
        await bench.supervisor.stop()
        starts = unit.starts
        await asyncio.sleep(0.3)
        assert unit.starts == starts


class TestRoster:
    def test_ends_what_a_killed_run_left(self, tmp_path: Path) -> None:
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        Roster(tmp_path / "children").add("api", child.pid)
        assert Roster(tmp_path / "children").end_leftovers() == ["api"]
        assert child.wait(1) == -signal.SIGTERM

    def test_a_reused_pid_is_left_alone(self, tmp_path: Path) -> None:
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        try:
            (tmp_path / "children").write_text(f'[{{"name": "api", "pid": {child.pid}, "started": 1}}]')
            assert Roster(tmp_path / "children").end_leftovers() == []
            assert child.poll() is None
        finally:
            child.kill()
            child.wait()

    def test_a_damaged_file_is_no_obstacle(self, tmp_path: Path) -> None:
        (tmp_path / "children").write_text("[{]")
        assert Roster(tmp_path / "children").end_leftovers() == []


async def test_wait_exit_gives_the_code() -> None:
    assert await wait_exit(subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(7)"])) == 7
