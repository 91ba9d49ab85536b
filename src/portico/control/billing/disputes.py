"""Disputes about payments of a subscription: while one is open nothing is dunned, and its days do not count.

What is known of them is the finance events, so whatever order those came in, the same days stand still.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from portico.control.finance import events, postings
from portico.kit.db import Reader

_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Dispute:
    """From when until when it was open; ``until`` ``None``: it is."""

    ref: str
    since: datetime
    until: datetime | None


async def of(reader: Reader, subscription: Any) -> list[Dispute]:
    """Every dispute that took money of a subscription, the oldest first."""
    opened, ended = dict[str, datetime](), dict[str, datetime]()
    for row in await events.disputes(reader, subscription):
        kind = postings.kind_by(row.kind, row.status)
        if kind == "dispute.opened":
            opened[row.dispute_ref] = min(row.occurred_at, opened.get(row.dispute_ref, row.occurred_at))
        elif kind in ("dispute.won", "dispute.lost"):
            ended[row.dispute_ref] = min(row.occurred_at, ended.get(row.dispute_ref, row.occurred_at))
    return sorted((Dispute(ref, at, ended.get(ref)) for ref, at in opened.items()), key=lambda each: each.since)


def open_(found: Sequence[Dispute]) -> Dispute | None:
    """The oldest one that is not decided."""
    return next((each for each in found if each.until is None), None)


def days(found: Sequence[Dispute], start: datetime, end: datetime) -> float:
    """Days between ``start`` and ``end`` in which at least one was open."""
    total, reached = 0.0, start
    for each in found:
        first, last = max(each.since, reached), min(each.until or end, end)
        if last > first:
            total += (last - first).total_seconds()
            reached = last
    return total / _DAY
