"""Refusals on their way to the audit log: a row for each second, target and reason, however many there were.

Whoever is refused costs no transaction: they could otherwise have as many as they like.
"""

from __future__ import annotations

from typing import Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.kit.clock import Clock
from portico.kit.db import Tx

#: By target and reason: how many there were, and who the first was.
Taken = dict[tuple[str | None, str], tuple[int, Caller]]
#: Targets and reasons that are told apart between two records; the rest are counted together.
_KEPT: Final = 1000


class Refusals:
    """Those of one act of the installation."""

    def __init__(self, action: str) -> None:
        self._action = action
        self._found: Taken = {}

    def add(self, caller: Caller, target: str | None, reason: str) -> None:
        """Count one."""
        if len(self._found) >= _KEPT and (target, reason) not in self._found:
            target = None
        count, first = self._found.get((target, reason), (0, caller))
        self._found[target, reason] = (count + 1, first)

    def __bool__(self) -> bool:
        return bool(self._found)

    def take(self) -> Taken:
        """What was counted; it is to be written, or given back."""
        taken, self._found = self._found, {}
        return taken

    def give_back(self, taken: Taken) -> None:
        """It could not be written."""
        for key, (count, caller) in taken.items():
            self._found[key] = (count + self._found.get(key, (0, caller))[0], caller)

    async def write(self, tx: Tx, taken: Taken) -> None:
        """Add the rows."""
        for (target, reason), (count, caller) in taken.items():
            details = {"code": reason, "count": count}
            await audit.record(tx, caller, self._action, target, "refused", details, organization=audit.INSTALLATION)


class Seldom:
    """Refusals that get their row at once, but seldom: the first of a kind, then one in ``seconds`` with how many had none."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds
        self._seen: dict[str, tuple[float, int]] = {}

    def due(self, kind: str) -> int | None:
        """How many of ``kind`` had no row since its last one, when this one is to have one; else ``None``."""
        now = self._clock.monotonic()
        at, count = self._seen.get(kind, (float("-inf"), 0))
        if 0 <= now - at < self._seconds:
            self._seen[kind] = (at, count + 1)
            return None
        if len(self._seen) >= _KEPT:  # it begins anew, and some have a row too many
            self._seen.clear()
        self._seen[kind] = (now, 0)
        return count
