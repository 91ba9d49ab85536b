"""Time in tests, on a machine that may have other things to do.

What must happen is awaited with ``PATIENCE_SECONDS``, which measures nothing. What must not be waited for (a hold, a back-off, a
limit) is measured by :class:`Since` within a process, which leaves out what the machine added, and by :func:`allowed` over
several.
"""

from __future__ import annotations

import asyncio
import bisect
import threading
import time
from functools import cache

#: Ceiling of everything that is awaited: beyond it something does not happen at all.
PATIENCE_SECONDS = 30.0
_STEP_SECONDS = 0.005
#: Processes that follow on each other until a visitor sees what was done.
_CHAIN = 5


class Since:
    """Seconds that the running loop stood waiting since this was made.

    Its time less that for which a task that sleeps 5 ms at a time was late: the loop was at work then, or the machine gave the
    process no turn. A sleep, a timer or a lock that something waits for counts in full, so a limit holds on any machine.
    """

    def __init__(self) -> None:
        self._began = self._asleep_since = time.monotonic()
        self._late = 0.0
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            self._asleep_since = time.monotonic()
            await asyncio.sleep(_STEP_SECONDS)
            self._late += max(0.0, time.monotonic() - self._asleep_since - _STEP_SECONDS)

    def waited(self) -> float:
        """So far; it ends with the test."""
        now = time.monotonic()
        return now - self._began - self._late - max(0.0, now - self._asleep_since - _STEP_SECONDS)


class _Machine:
    """How late a thread that sleeps 20 ms at a time is, summed up: what this machine makes a process wait for its turn."""

    STEP_SECONDS = 0.02

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._sums: list[tuple[float, float]] = [(self._began, 0.0)]
        threading.Thread(target=self._watch, name="lateness", daemon=True).start()

    def _watch(self) -> None:
        late = 0.0
        while True:
            before = time.monotonic()
            time.sleep(self.STEP_SECONDS)
            now = time.monotonic()
            late += max(0.0, now - before - self.STEP_SECONDS)
            if now - self._sums[-1][0] >= 0.1:
                self._sums.append((now, late))
                del self._sums[:-6000]

    def late(self, since: float) -> float:
        """Seconds since a moment of the monotonic clock."""
        at = bisect.bisect_right(self._sums, (since, 0.0)) - 1
        return self._sums[-1][1] - self._sums[max(0, at)][1]


@cache
def _machine() -> _Machine:
    return _Machine()


def allowed(limit: float, since: float) -> float:
    """Seconds that something which should take ``limit`` may take, on a machine as it is since ``since``.

    It is done by a chain of processes (visitor, relay, agent, control plane and its database), each of which waits for its turn
    as this one does. On a machine with nothing else to do that is nothing.
    """
    return limit + _CHAIN * _machine().late(since)
