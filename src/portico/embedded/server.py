"""What PostgreSQL and Valkey have in common as children: one owner, a socket folder, a log, an orderly start and end.

acquire → prepare → launch → ready …        for a supervisor, which may not block
start() does all of that and waits; stop() ends the server if it is ours and gives up ownership
"""

from __future__ import annotations

import abc
import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import ClassVar, Self

from portico.embedded.accounts import Account, server_account
from portico.embedded.folders import SocketFolder, make_home
from portico.embedded.lock import OwnerLock
from portico.embedded.spawn import describe_exit, spawn
from portico.errors import Problem


class EmbeddedServer(abc.ABC):
    """One server program below ``home``. Subclasses say how it is prepared, what its command is and when it is ready."""

    #: As people call it; the error code of a start that failed; ``NAME.lock``, ``NAME.log``.
    TITLE: ClassVar[str]
    FAILED: ClassVar[str]
    NAME: ClassVar[str]
    #: Ask, insist, make: each gets the stop time-out.
    STOP_SIGNALS: ClassVar[tuple[signal.Signals, ...]]
    START_SECONDS: ClassVar[float]
    STOP_SECONDS: ClassVar[float]
    POLL_SECONDS: ClassVar[float]
    LOG_FLAGS: ClassVar[int] = os.O_APPEND

    def __init__(self, home: str | Path, socket_folder: str, socket_file: str, log: int | None) -> None:
        self.home = Path(home).resolve()
        self.process: subprocess.Popen[bytes] | None = None
        self._log = log
        self._lock = OwnerLock(self.home / "run" / f"{self.NAME}.lock")
        self._socket = SocketFolder(self.home, socket_folder, socket_file)
        self._account: Account | None = None

    # -- what differs ----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def prepare(self) -> None:
        """Programs, folders and the leftovers of an earlier run: all before the server itself. May run in a thread."""

    @abc.abstractmethod
    def _command(self, socket_folder: Path) -> tuple[list[str | Path], Path, signal.Signals]:
        """Program and arguments, working folder, and the signal that ends it when its parent dies."""

    @abc.abstractmethod
    def _answers(self) -> bool:
        """Whether the server takes clients now."""

    def _last_words(self) -> str:
        """What its log said at the end, for the error of a start that failed."""
        return "; see its log"

    # -- the whole -------------------------------------------------------------------------------------------------

    def log_to(self, log: int | None) -> None:
        """Where the next launch sends the server's log."""
        self._log = log

    @property
    def log_path(self) -> Path:
        return self.home / "logs" / f"{self.NAME}.log"

    def start(self, timeout: float | None = None) -> bool:
        """Start, or find, the server and wait until it accepts. True when we own it.

        Raises ``up.data_unusable``, ``up.no_account``, ``up.orphans``, the code of a missing program or of a failed start.
        """
        patience = self.START_SECONDS if timeout is None else timeout
        deadline = time.monotonic() + patience
        owner = self.acquire()
        try:
            if owner and self.process is None:
                self.prepare()
                self.launch()
            while not self.ready():
                if time.monotonic() > deadline:
                    raise Problem(
                        self.FAILED, f"{self.TITLE} was not ready within {patience:.0f} s; see {self.log_path}"
                    )
                time.sleep(self.POLL_SECONDS)
        except BaseException:
            self.stop()
            raise
        return owner

    def stop(self, timeout: float | None = None) -> None:
        """End the server if we own it, and give up ownership."""
        if self.process is not None:
            for signum in self.STOP_SIGNALS:
                with contextlib.suppress(ProcessLookupError):
                    self.process.send_signal(signum)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(self.STOP_SECONDS if timeout is None else timeout)
                    break
            self.process = None
        if self._lock.held:
            self._socket.remove()
            self._lock.release()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- the steps -------------------------------------------------------------------------------------------------

    def acquire(self) -> bool:
        """Make the home folder and try to own the server."""
        # One account for all servers of a home: the one that an existing cluster has fixed.
        self._account = server_account(self.home / "pg" / "data")
        make_home(self.home, self._account)
        return self._lock.acquire()

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the server process (main thread only). It is usable when :meth:`ready` says so."""
        argv, folder, death_signal = self._command(self._socket.make(self._account))
        log = self._log if self._log is not None else self._open_log()
        try:
            self.process = spawn(argv, account=self._account, output=log, death_signal=death_signal, cwd=folder)
        except (OSError, subprocess.SubprocessError) as err:
            raise Problem(self.FAILED, f"{self.TITLE} could not be started: {err}") from None
        finally:
            if self._log is None:
                os.close(log)
        return self.process

    def ready(self) -> bool:
        """Whether the server accepts clients. Raises the code of a failed start when ours has ended."""
        if self.process is not None and self.process.poll() is not None:
            code, self.process = self.process.returncode, None
            raise Problem(self.FAILED, f"{self.TITLE} ended at once ({describe_exit(code)}){self._last_words()}")
        return self._answers()

    def _open_log(self) -> int:
        return os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | self.LOG_FLAGS, 0o600)
