"""A circuit breaker: whoever fails again and again is left alone for a while, then asked once.

    closed ──failures in a row──► open ──seconds──► half open ──one call──► closed, or open again

Only calls without an answer count, and answers that say that the provider itself is in trouble: a refusal proves that it works.
Each process has its own; it is there so that requests fail at once instead of piling up.
"""

from __future__ import annotations

from typing import Literal

from portico.kit.clock import Clock, SystemClock

State = Literal["closed", "open", "half_open"]


class Circuit:
    """One provider's breaker, for one event loop."""

    def __init__(self, failures: int, seconds: float, clock: Clock | None = None) -> None:
        self._most, self._seconds, self._clock = failures, seconds, clock or SystemClock()
        self._failed = 0
        self._opened: float | None = None
        self._probing = False

    @property
    def state(self) -> State:
        """What the next call meets."""
        if self._opened is None:
            return "closed"
        return "open" if self.wait > 0 or self._probing else "half_open"

    @property
    def wait(self) -> float:
        """Seconds until a call is let through to try."""
        if self._opened is None:
            return 0.0
        return max(0.0, self._opened + self._seconds - self._clock.monotonic())

    def enter(self) -> bool:
        """Whether a call may be made; whoever is told so says later how it went, by one of the next three."""
        if self._opened is None:
            return True
        if self.wait > 0 or self._probing:
            return False
        self._probing = True
        return True

    def good(self) -> None:
        """An answer came."""
        self._failed, self._opened, self._probing = 0, None, False

    def bad(self) -> None:
        """None came, or one of a provider in trouble."""
        self._failed += 1
        if self._probing or self._failed >= self._most:
            self._opened = self._clock.monotonic()
        self._probing = False

    def gone(self) -> None:
        """The call was given up before it said anything about the provider."""
        self._probing = False
