"""An embedded PostgreSQL: one cluster in a home folder, one owner at a time, no password, no network.

    server = EmbeddedPostgres(home)
    owner = server.start()      # False: another process on this machine owns it; use its ``uri`` all the same
    ...                         # connect to server.uri
    server.stop()

Guarantees: a cluster exists whole or not at all; two owners are impossible (``flock``); the server ends when its owner
does, even by ``kill -9``; a server that an earlier owner left behind is ended before the next one starts; what was
committed is on disk (unless ``durable=False``, for tests). Only our own operating-system user may connect.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

from portico.embedded.accounts import own_name
from portico.embedded.folders import server_folder
from portico.embedded.pg_install import PgInstall, find_install, reachable_bin
from portico.embedded.server import EmbeddedServer
from portico.embedded.spawn import describe_exit, end_orphans, run_tool
from portico.errors import Problem

INIT_TIMEOUT_SECONDS = 120.0
LOG_LIMIT_BYTES = 8 * 1024 * 1024
_SOCKET_FILE = ".s.PGSQL.5432"


class EmbeddedPostgres(EmbeddedServer):
    """See the module. ``log`` is a file descriptor for the server's log; without it, ``HOME/logs/postgres.log``."""

    TITLE = "PostgreSQL"
    FAILED = "up.postgres_failed"
    NAME = "postgres"
    # Fast ("open transactions roll back"); past the limit immediate (recovers from its log at the next start); then the kernel.
    STOP_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)
    #: Crash recovery of a busy cluster may take this long before a start is given up on.
    START_SECONDS = 60.0
    STOP_SECONDS = 10.0
    POLL_SECONDS = 0.01

    def __init__(
        self,
        home: str | Path,
        *,
        pg_bin: Path | None = None,
        durable: bool = True,
        max_connections: int = 100,
        log: int | None = None,
    ) -> None:
        super().__init__(home, "pg", _SOCKET_FILE, log)
        self.install: PgInstall | None = None
        self._pg_bin, self._durable, self._max_connections = pg_bin, durable, max_connections
        self._data = self.home / "pg" / "data"
        self._programs = Path()

    @property
    def uri(self) -> str:
        """The server's address for any PostgreSQL client that accepts a Unix socket."""
        return self.uri_for("postgres")

    def uri_for(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self._socket.path}"

    # -- the steps -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Programs, leftovers of an earlier run, a new cluster: all before the server itself. May run in a thread."""
        server_folder(self.home / "pg", self._account)
        self.install = find_install(self._pg_bin, cluster_major=self._cluster_major())
        self._programs = reachable_bin(self.install, self.home, self._account)
        if not (self._data / "PG_VERSION").exists():
            self._make_cluster()
        self._write_access_rules()
        self._clear_leftovers()

    def _command(self, socket_folder: Path) -> tuple[list[str | Path], Path, signal.Signals]:
        return [self._programs / "postgres", "-D", self._data, *self._options(socket_folder)], Path("/"), signal.SIGINT

    def _answers(self) -> bool:
        pid, status = self._pid_file()
        return status == "ready" and (self.process is None or pid == self.process.pid)

    # -- details ---------------------------------------------------------------------------------------------------

    def _cluster_major(self) -> int | None:
        try:
            return int((self._data / "PG_VERSION").read_text(encoding="ascii").strip().split(".")[0])
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as err:
            raise Problem("up.data_unusable", f"{self._data / 'PG_VERSION'} cannot be read: {err}") from None

    def _make_cluster(self) -> None:
        """``initdb`` beside the final place, then a rename: a crash in between leaves no half-made cluster."""
        partial = self._data.with_name("data.partial")
        shutil.rmtree(partial, ignore_errors=True)
        assert self.install is not None
        provider = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if self.install.major >= 17 else []
        argv = [
            *(self._programs / "initdb", "-D", partial, "-U", "postgres", "-E", "UTF8", "--locale=C", *provider),
            *("--auth-local=peer", "--auth-host=reject", "--data-checksums", "--no-instructions"),
            *(() if self._durable else ("--no-sync",)),
        ]
        try:
            result = run_tool(argv, self._account, INIT_TIMEOUT_SECONDS)
        except (OSError, subprocess.SubprocessError) as err:
            raise Problem("up.postgres_failed", f"initdb could not run: {err}") from None
        if result.returncode != 0:
            shutil.rmtree(partial, ignore_errors=True)
            words = " ".join((result.stderr or result.stdout).split())[-400:]
            raise Problem("up.postgres_failed", f"initdb failed ({describe_exit(result.returncode)}): {words}")
        partial.rename(self._data)
        if self._durable:
            fsync_folder(self._data.parent)

    def _write_access_rules(self) -> None:
        """Who may connect: our own operating-system user, over the socket, and nobody else; not even the account that
        the server runs as (as ``nobody``, every process of ``nobody`` would be superuser)."""
        conf = self.home / "conf"
        own = own_name().replace('"', '""')
        for name, text in (
            ("pg_hba.conf", "local all all peer map=portico\n"),
            ("pg_ident.conf", f'portico "{own}" postgres\n'),
        ):
            (conf / name).write_text(text, encoding="utf-8")
            (conf / name).chmod(0o644)

    def _clear_leftovers(self) -> None:
        """We hold the lock, so whatever still lives in the data folder has lost its owner. Its files are removed only
        once no process is left: the pid in them may belong to somebody else by now."""
        pid, _ = self._pid_file()
        patience = self.STOP_SECONDS
        end_orphans(
            self._data,
            "PostgreSQL",
            [(signal.SIGINT, patience), (signal.SIGQUIT, patience), (signal.SIGKILL, 5)],
            pid=pid,
        )
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        for leftover in (_SOCKET_FILE, f"{_SOCKET_FILE}.lock"):
            (self._socket.path / leftover).unlink(missing_ok=True)

    def _options(self, socket_folder: Path) -> list[str]:
        conf = self.home / "conf"
        values: dict[str, object] = {
            "hba_file": conf / "pg_hba.conf",
            "ident_file": conf / "pg_ident.conf",
            "listen_addresses": "",
            "port": 5432,
            "unix_socket_directories": socket_folder,
            "unix_socket_permissions": "0700",
            "max_connections": self._max_connections,
            "shared_buffers": "64MB",
            "max_wal_size": "512MB",
            "jit": "off",  # compiling costs more than our short queries take
            "idle_in_transaction_session_timeout": "60s",  # no transaction is open during a network call
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_line_prefix": "%m [%p] ",
            "log_lock_waits": "on",
            "log_checkpoints": "off",
        }
        if not self._durable:
            values |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        return [part for key, value in values.items() for part in ("-c", f"{key}={value}")]

    def _open_log(self) -> int:
        with contextlib.suppress(OSError):
            if self.log_path.stat().st_size > LOG_LIMIT_BYTES:
                self.log_path.replace(self.log_path.with_suffix(".log.1"))
        return super()._open_log()

    def _pid_file(self) -> tuple[int | None, str]:
        """The server's pid and state, as it writes them: lines 1 and 8 of ``postmaster.pid``."""
        try:
            lines = (self._data / "postmaster.pid").read_text(encoding="utf-8", errors="replace").splitlines()
            return int(lines[0]), lines[7].strip() if len(lines) > 7 else "starting"
        except (OSError, ValueError, IndexError):
            return None, ""

    def _last_words(self) -> str:
        if self._log is not None:
            return "; its log is above"
        with contextlib.suppress(OSError):
            lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-6:]
            return f": {' | '.join(lines)[-600:]}; see {self.log_path}"
        return ""


def fsync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
