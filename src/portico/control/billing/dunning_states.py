"""The state machine of a dunning case, and which stage a case is in by what failed and by the clock.

    grace → notified → retrying → restricted → suspended → written_off
    any of these → recovered | canceled | paused        paused → the stage that the clock says | recovered | canceled

Days since the first failed attempt decide (``Schedule``). While the provider tries again by itself, its attempts decide instead,
and nothing is taken away: an attempt that is to come may succeed. That holds for so many days at most; a provider that forgets
is no reason to serve for nothing for ever. A case never goes back by itself: it is over when everything is paid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

#: In order; later ones are worse.
LADDER: Final = ("grace", "notified", "retrying", "restricted", "suspended", "written_off")
ENDED: Final = frozenset({"recovered", "canceled"})
STATES: Final = (*LADDER, "paused", "recovered", "canceled")

TRANSITIONS: Final[Mapping[str, frozenset[str]]] = {
    **{state: frozenset(LADDER[at + 1 :]) | ENDED | {"paused"} for at, state in enumerate(LADDER)},
    "paused": frozenset(LADDER) | ENDED,
    "recovered": frozenset(),
    "canceled": frozenset(),
}
#: What a case takes away.
RESTRICTS: Final = frozenset({"restricted"})
SUSPENDS: Final = frozenset({"suspended", "written_off"})


class IllegalStep(ValueError):
    """A case does not go from one state to the other."""


def step(before: str, after: str) -> str:
    """``after``, if a case may go there; raises :class:`IllegalStep`. Stages may be skipped, never repeated."""
    if after not in TRANSITIONS[before]:
        raise IllegalStep(f"a case does not go from {before} to {after}")
    return after


@dataclass(frozen=True, slots=True)
class Stage:
    """A point of the schedule: ``D3`` is three days after the first failed attempt."""

    name: str
    days: float
    state: str


@dataclass(frozen=True, slots=True)
class Schedule:
    """When what happens. ``stages`` in order of days; ``patience_days``: how long a provider's own attempts are waited for."""

    stages: tuple[Stage, ...]
    patience_days: float

    @classmethod
    def of(cls, settings: Any) -> Schedule:
        """From the settings ``dunning_*_days``."""
        notice, *retries = settings.dunning_notice_days
        stages = [Stage(_name(notice), notice, "notified"), *(Stage(_name(day), day, "retrying") for day in retries)]
        stages += [
            Stage(_name(settings.dunning_restrict_days), settings.dunning_restrict_days, "restricted"),
            Stage(_name(settings.dunning_suspend_days), settings.dunning_suspend_days, "suspended"),
            Stage(_name(settings.dunning_write_off_days), settings.dunning_write_off_days, "written_off"),
        ]
        return cls(tuple(sorted(stages, key=lambda stage: stage.days)), settings.dunning_patience_days)

    def at(self, owed: Owed, now: datetime) -> Stage | None:
        """The stage of what is owed at a moment; ``None``: still in grace."""
        elapsed = (now - owed.since).total_seconds() / 86_400 - owed.paused_days
        due = [stage for stage in self.stages if stage.days <= elapsed]
        if self.waits(owed, now):
            soft = [stage for stage in self.stages if LADDER.index(stage.state) < LADDER.index("restricted")]
            return soft[min(max(owed.attempts, 1), len(soft)) - 1] if soft else None
        return due[-1] if due else None

    def next_at(self, owed: Owed, now: datetime) -> datetime | None:
        """When the clock next brings something; ``None``: never."""
        times = [owed.since + timedelta(days=stage.days + owed.paused_days) for stage in self.stages]
        if owed.next_attempt_at is not None:
            times.append(owed.next_attempt_at + _LATE)
        return min((at for at in times if at > now), default=None)

    def waits(self, owed: Owed, now: datetime) -> bool:
        """Whether the provider is still to try by itself, and is waited for."""
        if owed.is_final or owed.next_attempt_at is None or owed.next_attempt_at + _LATE <= now:
            return False
        return now - owed.since < timedelta(days=self.patience_days)


#: What a provider's attempt may be late by before it counts as given up.
_LATE: Final = timedelta(days=1)


def _name(days: float) -> str:
    return f"D{days:g}"


@dataclass(frozen=True, slots=True)
class Owed:
    """What is owed in one currency of one subscription: since when, how often it was tried, when it is tried next."""

    since: datetime
    amount_minor: int
    attempts: int
    next_attempt_at: datetime | None
    is_final: bool
    failure_code: str | None = None
    paused_days: float = 0.0

    @classmethod
    def together(cls, rows: Sequence[Any], paused_days: float = 0.0) -> Owed:
        """Several unpaid invoices as one: the oldest decides since when, all of them how much."""
        times = [row["next_attempt_at"] for row in rows if row["next_attempt_at"] is not None]
        last = max(rows, key=lambda row: (row["attempts"], row["since"], row["invoice_ref"]))
        return cls(
            since=min(row["since"] for row in rows),
            amount_minor=sum(row["amount"] for row in rows),
            attempts=max(row["attempts"] for row in rows),
            next_attempt_at=max(times, default=None),
            is_final=all(row["is_final"] for row in rows),
            failure_code=last["failure_code"],
            paused_days=paused_days,
        )
