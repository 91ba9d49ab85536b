"""The children of one run, on disk: what a run that was killed left behind is ended by the next one.

A pid alone is not enough, because the kernel gives it to somebody else later; with the time at which the process started
it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from pathlib import Path

GRACE_SECONDS = 3.0
RETRY_SECONDS = 1.0
_POLL_SECONDS = 0.02


def started_at(pid: int) -> int | None:
    """When ``pid`` started, in clock ticks since boot; ``None`` when it is gone (or ended and not yet collected)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # The second field is the program's name in parentheses, which may hold spaces and parentheses.
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


class Roster:
    """The list, at ``path``; kept current by :meth:`add` and :meth:`discard`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._children: dict[int, tuple[str, int | None]] = {}
        self._again: asyncio.TimerHandle | None = None

    def add(self, name: str, pid: int) -> None:
        self._children[pid] = (name, started_at(pid))
        self._save()

    def discard(self, pid: int) -> None:
        self._children.pop(pid, None)
        self._save()

    def _save(self) -> None:
        """A disk that is full must not stop the supervisor: the list on it is then older than the truth, for a while."""
        rows = [{"name": name, "pid": pid, "started": at} for pid, (name, at) in self._children.items()]
        partial = self._path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(rows), encoding="utf-8")
            partial.replace(self._path)
        except OSError:
            self._again = asyncio.get_running_loop().call_later(RETRY_SECONDS, self._save)

    def remove(self) -> None:
        if self._again is not None:
            self._again.cancel()
        self._path.unlink(missing_ok=True)

    def end_leftovers(self) -> list[str]:
        """End the children of an earlier run that still live (its lock is ours now); returns their names.

        They were told to end when their supervisor died, so most are on their way out.
        """
        try:
            rows = json.loads(self._path.read_text(encoding="utf-8"))
            left = {int(row["pid"]): (str(row["name"]), row["started"]) for row in rows}
        except (OSError, ValueError, KeyError, TypeError):
            return []
        names = [name for pid, (name, at) in left.items() if _lives(pid, at)]
        for signum in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + GRACE_SECONDS
            for pid, (_, at) in left.items():
                if _lives(pid, at):
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signum)
            while any(_lives(pid, at) for pid, (_, at) in left.items()) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        return names


def _lives(pid: int, at: int | None) -> bool:
    return at is not None and started_at(pid) == at
