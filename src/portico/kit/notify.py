"""Tell the supervisor that this process is ready: one line on an inherited descriptor (the setting ``notify_fd``).

Started by hand there is no such descriptor, and nothing happens. HTTP servers need not call this: the supervisor asks
their health endpoint instead.
"""

from __future__ import annotations

import contextlib
import os

READY = b"READY=1\n"


def ready(notify_fd: int | None) -> None:
    """Report readiness once, and close the descriptor. A supervisor that is gone does not matter here."""
    if notify_fd is not None:
        with contextlib.suppress(OSError):
            os.write(notify_fd, READY)
        with contextlib.suppress(OSError):
            os.close(notify_fd)
