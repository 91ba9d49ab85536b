"""Start a child that ends when we do, and find the ones that an earlier run left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from portico.embedded.accounts import Account
from portico.errors import Problem

_PR_SET_PDEATHSIG = 1

#: What a server sees of our environment: nothing. Its locale and time zone must not depend on who started it.
SERVER_ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


def _die_with_parent(signum: int) -> Callable[[], None] | None:
    """A function for the child, between fork and exec, that makes the kernel send ``signum`` when we are gone."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork: no loader lock is taken after it
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before the request stood
            os._exit(1)

    return ask


def spawn(
    argv: Sequence[str | Path],
    *,
    account: Account | None = None,
    env: dict[str, str] | None = None,
    cwd: str | Path = "/",
    output: int = subprocess.DEVNULL,
    stdin: int = subprocess.DEVNULL,
    stdout: int | None = None,
    death_signal: int = signal.SIGTERM,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start ``argv`` in a session of its own (a terminal's Ctrl-C reaches us alone), its output on ``output``.

    The child gets ``death_signal`` when the *thread* that forks it ends, hence only from the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("start servers from the main thread: their death signal follows the thread that forked them")
    return subprocess.Popen(  # noqa: S603 - fixed programs, no shell
        [os.fspath(part) for part in argv],
        stdin=stdin,
        stdout=output if stdout is None else stdout,
        stderr=output,
        cwd=cwd,
        env=SERVER_ENV if env is None else env,
        start_new_session=True,
        pass_fds=tuple(pass_fds),
        preexec_fn=_die_with_parent(death_signal),
        **(account.popen if account else {}),
    )


def run_tool(argv: Sequence[str | Path], account: Account | None, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a short-lived server tool (``initdb``) to its end; it is killed when we are."""
    return subprocess.run(  # noqa: S603 - fixed programs, no shell
        [os.fspath(part) for part in argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        cwd="/",
        env=SERVER_ENV,
        timeout=timeout,
        check=False,
        preexec_fn=_die_with_parent(signal.SIGKILL),
        **(account.popen if account else {}),
    )


def living_in(folder: Path) -> list[int]:
    """The processes whose working directory is ``folder``: every PostgreSQL process, and Valkey, sits in its own.

    A pid in a file may have been given to somebody else since; a working directory cannot.
    """
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if str((entry / "cwd").readlink()) == str(folder):
                    found.append(int(entry.name))
    return found


def end_orphans(folder: Path, what: str, signals: Sequence[tuple[int, float]], pid: int | None = None) -> None:
    """End what still lives in ``folder``, whose lock we hold: each (signal, seconds of patience) in turn.

    With ``pid`` only that process is signalled while it lives (its children follow it). Raises ``up.orphans`` when
    something survives all of them.
    """
    live = living_in(folder)
    for signum, patience in signals:
        deadline = time.monotonic() + patience
        for target in [pid] if pid is not None and pid in live else live:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(target, signum)
        while live and time.monotonic() < deadline:
            time.sleep(0.02)
            live = living_in(folder)
    if live:
        raise Problem(
            "up.orphans", f"{what} processes of an earlier run still use {folder}: pid {', '.join(map(str, live))}"
        )


def describe_exit(code: int | None) -> str:
    """``exit 3`` or ``SIGKILL``, for messages."""
    if code is None:
        return "still running"
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit {code}"
