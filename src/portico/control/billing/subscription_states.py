"""The state machine of a subscription, and its state as a function of everything that the provider has said about it.

    pending → trialing | active | expired        trialing → active | past_due | canceled
    active → past_due | paused | canceled | completed
    past_due → active | suspended | canceled     suspended → active | canceled     paused → active | canceled

Providers fold several changes into one event, and deliver events late, twice and in any order. So what is kept is the *set* of
snapshots, and the state is folded from it in the order of the provider's own versions: whichever comes first, the same set
gives the same state. Between two snapshots that were seen any number of arrows may lie (``follow``); where no path leads, the
later one is refused, whatever brought it: nothing comes back from ``canceled``, ``expired`` and ``completed``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

STATUSES: Final = (
    "pending", "trialing", "active", "past_due", "suspended", "paused", "canceled", "completed", "expired",
)  # fmt: skip

TRANSITIONS: Final[Mapping[str, frozenset[str]]] = {
    "pending": frozenset({"trialing", "active", "expired"}),
    "trialing": frozenset({"active", "past_due", "canceled"}),
    "active": frozenset({"past_due", "paused", "canceled", "completed"}),
    "past_due": frozenset({"active", "suspended", "canceled"}),
    "suspended": frozenset({"active", "canceled"}),
    "paused": frozenset({"active", "canceled"}),
    "canceled": frozenset(),
    "completed": frozenset(),
    "expired": frozenset(),
}

#: Who is in one of these comes back by a new subscription alone.
TERMINAL: Final = frozenset(status for status, after in TRANSITIONS.items() if not after)
#: Statuses in which a plan is had; dunning may still take it away.
ENTITLED: Final = frozenset({"trialing", "active", "past_due"})


class IllegalTransition(ValueError):
    """No arrow, or no path of arrows, leads from one status to the other."""

    def __init__(self, before: str, after: str) -> None:
        super().__init__(f"a subscription does not go from {before} to {after}")
        self.before, self.after = before, after


def step(before: str, after: str) -> str:
    """``after``, if one arrow leads there; raises :class:`IllegalTransition`."""
    if after not in TRANSITIONS[before]:
        raise IllegalTransition(before, after)
    return after


def _reached(start: str) -> frozenset[str]:
    found, todo = set[str](), [start]
    while todo:
        for after in TRANSITIONS[todo.pop()] - found:
            found.add(after)
            todo.append(after)
    return frozenset(found)


#: Where a status can lead in one or more arrows.
REACHABLE: Final[Mapping[str, frozenset[str]]] = {status: _reached(status) for status in STATUSES}


def follow(before: str, after: str) -> str:
    """``after``, if it is ``before`` or a path of arrows leads there; raises :class:`IllegalTransition`."""
    if after != before and after not in REACHABLE[before]:
        raise IllegalTransition(before, after)
    return after


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one event said of a subscription. ``None``: it said nothing of that."""

    effect_key: str
    event_id: str
    version: int
    occurred_at: datetime
    status: str | None = None
    plan_ref: str | None = None
    cancel_at_period_end: bool | None = None
    period_start: datetime | None = None
    period_end: datetime | None = None

    @property
    def place(self) -> tuple[int, datetime, int, str]:
        """Where it stands among the others. A version of 0 is unknown and overrides nothing that is known; at one version and
        moment the status further down the machine is the later one."""
        rank = STATUSES.index(self.status) if self.status is not None else -1
        return self.version, self.occurred_at, rank, self.effect_key


@dataclass(frozen=True, slots=True)
class State:
    """A subscription after a set of snapshots; ``status_at``: when it entered its status."""

    status: str = "pending"
    version: int = 0
    status_at: datetime | None = None
    plan_ref: str | None = None
    cancel_at_period_end: bool = False
    period_start: datetime | None = None
    period_end: datetime | None = None


def derive(snapshots: Iterable[Snapshot]) -> tuple[State, frozenset[str]]:
    """The state after all of ``snapshots``, in whatever order they are given, and the effect keys of those that were refused."""
    state, refused = State(), set[str]()
    for each in sorted(snapshots, key=lambda snapshot: snapshot.place):
        try:
            state = after(state, each)
        except IllegalTransition:
            refused.add(each.effect_key)
    return state, frozenset(refused)


def after(state: State, said: Snapshot) -> State:
    """The state after one more snapshot, which stands behind all others; raises :class:`IllegalTransition`."""
    status = state.status if said.status is None else follow(state.status, said.status)
    if state.status in TERMINAL:
        return state
    entered = said.occurred_at if status != state.status or state.status_at is None else state.status_at
    known = {
        name: value
        for name in ("plan_ref", "cancel_at_period_end", "period_start", "period_end")
        if (value := getattr(said, name)) is not None
    }
    return replace(state, status=status, version=max(state.version, said.version), status_at=entered, **known)
