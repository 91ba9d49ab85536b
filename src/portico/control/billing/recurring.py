"""What a subscription brings in a month (MRR), from what its provider charged, and how that moves.

Nobody tells it as a figure: the lines of invoices do. A line of a plan is its price, net and after discounts, for a period whose
length says how often it comes. A change in the middle of a period is charged in parts (proration); such a line counts when its
unit price, for that part of the period, is what was charged. What cannot be read moves nothing until the next invoice.

A subscription that is tried, paused, suspended or over brings nothing; one that is paid late does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from portico.control.finance import events, revenue
from portico.control.finance.events import FinanceEvent, Line
from portico.control.finance.revenue import Interval
from portico.kit.db import Tx

#: Kinds after which it may be another.
MOVING: Final = ("subscription.", "invoice.")
_PAYING: Final = frozenset({"active", "past_due"})
_DAY: Final = 86_400
# Of the Gregorian calendar; February has 2.44 days less.
_MONTH_SECONDS: Final = 31_556_952 // 12
_MONTH_SLACK_SECONDS: Final = 26 * _DAY // 10


async def follow(tx: Tx, subscription: Any, event: FinanceEvent, plan: str | None) -> None:
    """Write down how the MRR of a subscription moved with ``event``, which is recorded; nothing when it did not."""
    if not event.kind.startswith(MOVING):
        return
    now = await _now(tx, subscription)
    held = await revenue.held(tx, subscription.id)
    for currency in sorted({*now, *held}):
        if (amount := now.get(currency, 0)) != held.get(currency, 0):
            cause = f"{event.source} {event.effect_key}"
            await revenue.moved(
                tx, subscription.organization_id, subscription.id, currency, amount, event.occurred_at, cause, plan
            )


async def _now(tx: Tx, subscription: Any) -> Mapping[str, int]:
    if subscription.status not in _PAYING:
        return {}
    source = (subscription.provider, subscription.account, subscription.livemode)
    return monthly(await events.invoiced(tx, *source, subscription.ref))


def monthly(invoices: Sequence[tuple[str, Sequence[Line]]]) -> dict[str, int]:
    """What invoices (currency and lines, the oldest first) say that a month brings, by currency; empty: nothing yet."""
    found: tuple[str, int] | None = None
    rhythm: tuple[Interval, int] | None = None
    period = 0
    for currency, lines in invoices:
        whole = [line for line in lines if line.kind == "plan" and _seconds(line) > 0]
        if whole:
            period = _seconds(whole[0])
            rhythm = interval(period)
            found = currency, sum(revenue.monthly(line.net_minor, *interval(_seconds(line))) for line in whole)
        elif rhythm is not None and (
            parts := [line for line in lines if line.kind == "proration" and line.net_minor > 0]
        ):
            prices = [_full_price(line, period) for line in parts]
            if None not in prices:
                found = currency, revenue.monthly(sum(price or 0 for price in prices), *rhythm)
    return {} if found is None else dict([found])


def _seconds(line: Line) -> int:
    if line.period_start is None or line.period_end is None:
        return 0
    return int((line.period_end - line.period_start).total_seconds())


def _full_price(line: Line, period_seconds: int) -> int | None:
    """The price of a whole period, if what was charged for a part of it is its share."""
    whole = line.unit_minor * line.quantity
    share, charged = whole * _seconds(line), line.net_minor * period_seconds
    # A rounding; and months differ in length: the part may be of a longer or a shorter one than the period before.
    slack = max(period_seconds, share * _MONTH_SLACK_SECONDS // period_seconds)
    return whole if abs(share - charged) <= slack else None


def interval(seconds: int) -> tuple[Interval, int]:
    """How often a period of this length comes, as providers count: ``("month", 3)``."""
    months = (seconds + _MONTH_SECONDS // 2) // _MONTH_SECONDS
    if months and abs(seconds - months * _MONTH_SECONDS) <= _MONTH_SLACK_SECONDS:
        return "month", months
    days = max(1, (seconds + _DAY // 2) // _DAY)
    return ("week", days // 7) if days % 7 == 0 else ("day", days)
