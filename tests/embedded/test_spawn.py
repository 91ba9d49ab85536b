"""Children that end with us, and the ones that were left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from portico.embedded.lock import OwnerLock
from portico.embedded.roster import started_at
from portico.embedded.secretfiles import master_key, read_credentials, write_credentials, write_private
from portico.embedded.spawn import SERVER_ENV, end_orphans, living_in, spawn
from portico.errors import Problem

PARENT = textwrap.dedent("""
    import sys, time
    from portico.embedded.spawn import spawn
    child = spawn(["/bin/sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
""")


def gone(pid: int, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while started_at(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    return started_at(pid) is None


class TestSpawn:
    def test_a_child_ends_with_a_killed_parent(self) -> None:
        parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        assert gone(pid)

    def test_nothing_of_our_environment_or_terminal_reaches_a_server(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGPASSWORD", "hidden")
        read_end, write_end = os.pipe()
        child = spawn(
            [sys.executable, "-S", "-c", "import os; print(sorted(os.environ), os.getsid(0) == os.getpid())"],
            output=write_end,
        )
        os.close(write_end)
        child.wait()
        said = os.read(read_end, 4096).decode()
        os.close(read_end)
        assert "PGPASSWORD" not in said and "True" in said
        assert set(SERVER_ENV) == {"PATH", "LC_ALL", "TZ"}


class TestOrphans:
    def test_signals_in_turn(self, tmp_path: Path) -> None:
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-S", "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        assert living_in(tmp_path) == [child.pid]
        end_orphans(tmp_path, "test", [(signal.SIGTERM, 0.1), (signal.SIGKILL, 5)])
        assert child.wait(5) == -signal.SIGKILL

    def test_one_that_survives_is_named(self, tmp_path: Path) -> None:
        child = subprocess.Popen(["/bin/sleep", "60"], cwd=tmp_path)
        try:
            with pytest.raises(Problem) as caught:
                end_orphans(tmp_path, "PostgreSQL", [])
            assert caught.value.code == "up.orphans" and str(child.pid) in caught.value.detail
        finally:
            child.kill()
            child.wait()


class TestOwnerLock:
    def test_excludes_and_is_removed(self, tmp_path: Path) -> None:
        first, second = OwnerLock(tmp_path / "lock"), OwnerLock(tmp_path / "lock")
        assert first.acquire() and first.acquire()
        assert not second.acquire()
        assert second.holder() == os.getpid()
        first.release()
        assert not (tmp_path / "lock").exists()
        assert second.acquire()
        second.release()

    def test_a_removed_file_is_not_a_lock(self, tmp_path: Path) -> None:
        """The loser of a race may hold the file that the winner removed."""
        first, second = OwnerLock(tmp_path / "lock"), OwnerLock(tmp_path / "lock")
        assert first.acquire()
        (tmp_path / "lock").unlink()
        assert second.acquire(), "a new file is a new lock"
        assert not OwnerLock(tmp_path / "lock").acquire()
        second.release()


class TestSecretFiles:
    def test_are_private_from_the_first_byte_and_whole(self, tmp_path: Path) -> None:
        old = os.umask(0)
        try:
            write_private(tmp_path / "x", "one")
            write_private(tmp_path / "x", "two")
        finally:
            os.umask(old)
        assert (tmp_path / "x").read_text() == "two"
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    def test_the_master_key_is_made_once(self, tmp_path: Path) -> None:
        first = master_key(tmp_path)
        assert master_key(tmp_path) == first and len(first) == 44

    def test_damaged_credentials_count_as_none(self, tmp_path: Path) -> None:
        path = write_credentials(tmp_path, {"agent_key": "x"})
        assert read_credentials(tmp_path) == {"agent_key": "x"}
        path.write_text("{")
        assert read_credentials(tmp_path) == {}
