"""Tell the supervisor how this process is, by lines on an inherited descriptor (the setting ``notify_fd``).

    READY=1       it serves; HTTP servers need not say it: the supervisor asks their health endpoint instead
    STOPPING=1    it takes nothing new and finishes what it has: a successor may start now, beside it

Started by hand there is no such descriptor, and nothing happens. A supervisor that is gone does not matter here.
"""

from __future__ import annotations

import contextlib
import os

READY = b"READY=1\n"
STOPPING = b"STOPPING=1\n"


def ready(notify_fd: int | None) -> None:
    """Report readiness."""
    _say(notify_fd, READY)


def stopping(notify_fd: int | None) -> None:
    """Report that this process drains, as the last thing that it says: the descriptor is closed."""
    _say(notify_fd, STOPPING)
    if notify_fd is not None:
        with contextlib.suppress(OSError):
            os.close(notify_fd)


def _say(notify_fd: int | None, line: bytes) -> None:
    if notify_fd is not None:
        with contextlib.suppress(OSError):  # SIGPIPE is ignored by Python
            os.write(notify_fd, line)
