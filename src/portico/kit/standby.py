"""A process that has read in everything and waits for its turn (the setting ``standby_fd``).

Half of the start of an API is reading modules. The supervisor therefore keeps a second one that has done that; should the first
one die, the second is told to go on, and callers wait for tenths of a second instead of seconds.

``ps`` and ``top`` show who is who: the name of a process that waits is ``portico-standby``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

GO = b"GO\n"
NAME = "portico-standby"


def wait(standby_fd: int | None, name: str) -> bool:
    """Until the supervisor writes :data:`GO` to its end of the pipe ``standby_fd``; then the process is called ``name``.

    True when it waited; without a descriptor it returns false at once. A supervisor that is gone has closed its end: the
    process exits with 0.
    """
    if standby_fd is None:
        return False
    _call_ourselves(NAME)
    said = os.read(standby_fd, len(GO))
    os.close(standby_fd)
    if not said:
        sys.exit(0)
    _call_ourselves(name)
    return True


def _call_ourselves(name: str) -> None:
    with contextlib.suppress(OSError):  # not Linux, or no /proc: the name is for people
        Path("/proc/self/comm").write_text(name, encoding="ascii")
