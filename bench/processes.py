"""Child processes of a run: on free ports of 127.0.0.1, output in files, ended by pid whatever happens."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from portico.embedded.spawn import describe_exit, spawn

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.005
T = TypeVar("T")


class NotStarted(Exception):
    """A program did not come up; the text says why, with the end of its output."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listener() -> socket.socket:
    """A listening socket on a free port, to hand to a child."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(1024)
    return sock


def accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def environment(**settings: object) -> dict[str, str]:
    """Our environment without Portico's own settings, and ``settings`` as ``PORTICO_…``.

    Programs start from bytecode, as they do where they are installed, also where this shell keeps Python from writing any.
    """
    kept_out = ("PORTICO_", "PYTHONDONTWRITEBYTECODE")
    env = {key: value for key, value in os.environ.items() if not key.startswith(kept_out)}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    return env | {f"PORTICO_{key.upper()}": str(value) for key, value in settings.items()}


class Child:
    """One child process. ``out`` and ``err`` are what it wrote."""

    def __init__(
        self, name: str, argv: Sequence[str | Path], folder: Path, env: Mapping[str, str], pass_fds: Sequence[int] = ()
    ) -> None:
        self.name = name
        serial = len(list(folder.glob("*.err")))
        self._out, self._err = folder / f"{serial:03}-{name}.out", folder / f"{serial:03}-{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process: subprocess.Popen[bytes] = spawn(
                argv, env=dict(env), cwd=ROOT, output=err.fileno(), stdout=out.fileno(), pass_fds=pass_fds
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, what: Callable[[], T], limit: float, why: str) -> T:
        """Until ``what()`` is true (returned); raises :class:`NotStarted` when the process ends or the time is up."""
        deadline = time.monotonic() + limit
        while not (found := what()):
            code = self.process.poll()
            if code is not None or time.monotonic() > deadline:
                state = f"ended ({describe_exit(code)})" if code is not None else f"took more than {limit:g} s"
                said = " | ".join((self.out + self.err).strip().splitlines()[-4:])
                raise NotStarted(f"{self.name} {state} before {why}: {said}")
            time.sleep(POLL_SECONDS)
        return found

    def end(self, limit: float = 20.0) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(limit)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Run:
    """The processes and the temporary folder of one run of the benchmark; ``with Run() as run:``."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="pbench-"))
        self.folder.chmod(0o711)
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)

    def __enter__(self) -> Run:
        # Whatever asks us to end raises as Ctrl-C does, also where a shell has started us with SIGINT ignored.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(
        self, name: str, argv: Sequence[str | Path], pass_fds: Sequence[int] = (), env: Mapping[str, str] | None = None
    ) -> Child:
        """Start a child that ends with the run."""
        child = Child(name, argv, self.folder, env or environment(), pass_fds)
        self._stack.callback(child.end)
        return child

    def home(self, name: str) -> Path:
        """A folder of its own for one candidate."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))
        folder.chmod(0o711)  # the account that PostgreSQL runs as for root passes through
        return folder


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
