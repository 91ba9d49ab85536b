"""The states of report exports and of settlement receipts, and the only ways between them.

    export       queued → generating → ready → delivering → delivered → acked
                 generating → failed;  delivering → failed → delivering;  ready, delivered, failed → expired
    settlement   received → verified → matched | delta | failed
                 delta → resolved;  failed → received;  a late event: matched, delta, resolved → verified
                 a batch that says something else now: all of them → resolved (superseded)

A state is only ever written by a conditional UPDATE from the states that lead to it (``sources``), so that two workers at once
cannot both go the same way; ``move`` raises for a way that there is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


class IllegalTransition(Exception):
    """There is no such way."""


@dataclass(frozen=True, slots=True, eq=False)
class Machine:
    """States, and where each leads."""

    name: str
    ways: Mapping[str, frozenset[str]]

    @property
    def states(self) -> tuple[str, ...]:
        return tuple(self.ways)

    def sources(self, to: str) -> list[str]:
        """The states that lead to ``to``."""
        return [state for state, leads in self.ways.items() if to in leads]

    def move(self, at: str, to: str) -> str:
        """``to``; raises :class:`IllegalTransition`."""
        if to not in self.ways.get(at, frozenset()):
            raise IllegalTransition(f"{self.name}: {at} does not lead to {to}")
        return to


def _machine(name: str, ways: Mapping[str, str]) -> Machine:
    return Machine(name, {state: frozenset(leads.split()) for state, leads in ways.items()})


EXPORT: Final = _machine("report export", {
    "queued": "generating failed",
    "generating": "ready failed",
    "ready": "delivering expired",
    "delivering": "delivered failed",
    "delivered": "acked delivering expired",
    "acked": "delivering",
    "failed": "delivering expired",
    "expired": "",
})  # fmt: skip

SETTLEMENT: Final = _machine("settlement receipt", {
    "received": "verified failed resolved",
    "verified": "matched delta failed resolved",
    "matched": "verified resolved",
    "delta": "verified resolved",
    "failed": "received resolved",
    "resolved": "verified",
})  # fmt: skip
