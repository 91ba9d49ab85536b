"""Time, injected: wall time for what people and tokens see, monotonic time for deadlines."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


def utcnow() -> datetime:
    """The wall clock as an aware UTC datetime."""
    return datetime.now(UTC)


class Clock(Protocol):
    """What code that measures or stamps time asks for, so that a test can move it."""

    def wall(self) -> datetime: ...

    def monotonic(self) -> float: ...


class SystemClock:
    """The machine's clocks."""

    def wall(self) -> datetime:
        return utcnow()

    def monotonic(self) -> float:
        return time.monotonic()


def uptime() -> float:
    """Seconds on a clock that never jumps and goes on while the machine sleeps (where the system has one)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
