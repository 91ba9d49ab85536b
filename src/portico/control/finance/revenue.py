"""Revenue by day, worked out from the ledger, and how monthly recurring revenue (MRR) moved.

``revenue_daily`` is a summary that can be made again at any time: whoever refreshes it works out anew every day that the ledger
got transactions for since the last time. Movements of MRR are written once; of an organization and currency they sum to its MRR.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any, Final, Literal

import sqlalchemy as sa

from portico.control.finance import ledger, store
from portico.control.finance.store import movements, revenue_daily
from portico.kit.db import Database, HasConnection, Reader, Tx
from portico.kit.ids import new_id

Interval = Literal["day", "week", "month", "year"]

# How many months an interval has, as a fraction. A year has 365 days here.
_MONTHS: Final = {"day": (12, 365), "week": (84, 365), "month": (1, 1), "year": (12, 1)}
_M = movements.c

_DAYS: Final = """
SELECT DISTINCT booked_on FROM ledger_transactions WHERE number > $1 AND number <= $2 ORDER BY booked_on
"""
_WORK_OUT: Final = """
INSERT INTO revenue_daily
    (day, organization_id, plan_ref, currency, gross_minor, refund_minor, tax_minor, fee_minor, net_minor, recognized_minor,
     deferred_minor)
SELECT booked_on, organization_id, plan_ref, currency, gross, refund, tax, fee, gross - refund - tax - fee, recognized, deferred
FROM (
    SELECT t.booked_on, coalesce(t.organization_id, '') AS organization_id, coalesce(t.plan_ref, '') AS plan_ref, p.currency,
           coalesce(sum(p.amount_minor) FILTER (
               WHERE t.kind IN ('invoice.issued', 'invoice.voided')
                   AND p.account IN ('accounts_receivable', 'customer_credit')), 0) AS gross,
           coalesce(-sum(p.amount_minor) FILTER (
               WHERE t.kind IN ('refund.succeeded', 'refund.failed') AND p.account = 'provider_clearing'), 0) AS refund,
           coalesce(-sum(p.amount_minor) FILTER (WHERE p.account = 'tax_payable'), 0) AS tax,
           coalesce(sum(p.amount_minor) FILTER (WHERE p.account = 'payment_fees'), 0) AS fee,
           coalesce(-sum(p.amount_minor) FILTER (WHERE p.account = 'revenue'), 0) AS recognized,
           coalesce(-sum(p.amount_minor) FILTER (
               WHERE t.kind IN ('invoice.issued', 'invoice.voided') AND p.account = 'deferred_revenue'), 0) AS deferred
    FROM ledger_transactions t JOIN ledger_postings p ON p.transaction_id = t.id
    WHERE t.booked_on = ANY($1)
    GROUP BY 1, 2, 3, 4
) totals
"""


async def refresh(db: Database) -> int:
    """Work out the days that changed; how many. Two who refresh take turns."""
    until = await ledger.cut_off(db)
    async with db.transaction() as tx:
        since = await tx.raw.fetchval("SELECT number FROM revenue_progress WHERE id = 1 FOR UPDATE")
        days: Sequence[date] = [row["booked_on"] for row in await tx.raw.fetch(_DAYS, since, until)]
        if days:
            await tx.raw.execute("DELETE FROM revenue_daily WHERE day = ANY($1)", days)
            await tx.raw.execute(_WORK_OUT, days)
        if until > since:
            await tx.raw.execute("UPDATE revenue_progress SET number = $1 WHERE id = 1", until)
    return len(days)


async def daily(reader: Reader, since: date, until: date, organization: str | None = None) -> Sequence[sa.Row[Any]]:
    """Days from ``since`` up to, not including, ``until``: of an organization, or of everybody together by plan and currency."""
    columns = revenue_daily.c
    amounts = [column for column in columns if column.name.endswith("_minor")]
    query = (
        sa.select(
            columns.day, columns.plan_ref, columns.currency, *(sa.func.sum(each).label(each.name) for each in amounts)
        )
        .where(columns.day >= since, columns.day < until)
        .group_by(columns.day, columns.plan_ref, columns.currency)
    )
    if organization is not None:
        query = query.where(columns.organization_id == organization)
    return await reader.fetch_all(query.order_by(columns.day, columns.currency, columns.plan_ref))


# -- monthly recurring revenue -------------------------------------------------------------------------------------------


def monthly(amount_minor: int, interval: Interval, count: int = 1) -> int:
    """What ``amount_minor`` every ``count`` intervals is in a month, halves up."""
    numerator, denominator = _MONTHS[interval]
    divisor = numerator * count
    return (2 * amount_minor * denominator + divisor) // (2 * divisor)


def kind_of(before: int, after: int, known: bool) -> str:
    """What a movement of an organization's MRR is called; ``known``: it had some once."""
    if before <= 0 < after:
        return "reactivation" if known else "new"
    if after <= 0:
        return "churn"
    return "expansion" if after > before else "contraction"


async def moved(
    tx: Tx,
    organization: str,
    subscription: str,
    currency: str,
    mrr_minor: int,
    at: datetime,
    cause: str,
    plan: str | None = None,
) -> int:
    """Say what the MRR of a subscription is now; what it changed by, 0 when it is that already or ``cause`` moved it before.

    An organization's movements take turns on its chain.
    """
    head = await store.lock_head(tx, organization, store.LEDGER)
    told = sa.select(_M.id).where(_M.subscription_id == subscription, _M.currency == currency, _M.cause == cause)
    if await tx.fetch_one(told) is not None:
        return 0
    sum_ = sa.func.coalesce(sa.func.sum(_M.delta_minor), 0)
    of_currency = sa.and_(_M.organization_id == organization, _M.currency == currency)
    own = int(await tx.scalar(sa.select(sum_).where(of_currency, _M.subscription_id == subscription)))
    total = int(await tx.scalar(sa.select(sum_).where(of_currency)))
    rows = int(await tx.scalar(sa.select(sa.func.count()).select_from(movements).where(of_currency)))
    delta = mrr_minor - own
    if delta:
        after = total + delta
        row = {
            "id": new_id("mrr"), "organization_id": organization, "subscription_id": subscription, "currency": currency,
            "moved_on": at.astimezone(UTC).date(), "kind": kind_of(total, after, rows > 0), "delta_minor": delta,
            "total_minor": after, "plan": plan, "cause": cause, "recorded_at": head.at,
        }  # fmt: skip
        await tx.execute(sa.insert(movements).values(**row))
    return delta


async def held(reader: HasConnection, subscription: str) -> dict[str, int]:
    """The MRR of a subscription by currency: what its movements come to."""
    query = """
        SELECT currency, sum(delta_minor)::bigint AS mrr FROM mrr_movements WHERE subscription_id = $1 GROUP BY currency
    """
    return {row["currency"]: row["mrr"] for row in await reader.raw.fetch(query, subscription) if row["mrr"]}


async def mrr(reader: Reader, until: date | None = None) -> dict[str, int]:
    """MRR by currency, of everybody: the sum of all movements (before ``until``)."""
    query = sa.select(_M.currency, sa.func.sum(_M.delta_minor).label("mrr")).group_by(_M.currency).order_by(_M.currency)
    if until is not None:
        query = query.where(_M.moved_on < until)
    return {row.currency: int(row.mrr) for row in await reader.fetch_all(query)}


async def movement_totals(reader: Reader, since: date, until: date) -> Sequence[sa.Row[Any]]:
    """Movements of a time by currency and kind: ``currency, kind, delta_minor, movements``."""
    return await reader.fetch_all(
        sa.select(
            _M.currency, _M.kind, sa.func.sum(_M.delta_minor).label("delta_minor"), sa.func.count().label("movements")
        )
        .where(_M.moved_on >= since, _M.moved_on < until)
        .group_by(_M.currency, _M.kind)
        .order_by(_M.currency, _M.kind)
    )
