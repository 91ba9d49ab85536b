"""The example of docs/explanation/money-flow.md, posted and compared; and its chart of accounts."""

from __future__ import annotations

import random
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from portico.control.finance import balances, ledger, recognition
from portico.control.finance.accounts import CHART
from portico.control.finance.events import Line
from portico.kit.db import Database
from tests.control.finance.making import AT, account, apply, event, organization

PAGE = (Path(__file__).parents[3] / "docs/explanation/money-flow.md").read_text(encoding="utf-8")


def test_the_page_has_every_account() -> None:
    for name, each in CHART.items():
        assert f"| {each.number} | `{name}` | {each.type} | {each.about} |" in PAGE


async def test_the_example(db: Database) -> None:
    org, mine = organization(), account()
    common = {"account": mine, "organization_id": org, "invoice_ref": "in_1"}
    period = {"period_start": AT, "period_end": AT + timedelta(days=30)}
    await apply(db, event("invoice.issued", amount_minor=1190, tax_minor=190, **period, **common))
    await apply(db, event("payment.succeeded", payment_ref="pi_1", amount_minor=1190, fee_minor=31, **common))
    refunded = AT + timedelta(days=12)
    await apply(
        db,
        event(
            "refund.succeeded", refund_ref="re_1", payment_ref="pi_1", amount_minor=119, occurred_at=refunded, **common
        ),
    )
    await apply(db, event("payout.paid", account=mine, organization_id=org, payout_ref="po_1", amount_minor=1040))
    await recognition.advance(db, date(2027, 1, 1), 10)
    async with db.read() as reader:
        found = {each.account: each.balance_minor for each in await balances.trial(reader, organization=org)}
        days = [row for row in await ledger.listing(reader, org, 100, None, {}) if row.kind == "recognition"]
        posted = await ledger.postings_of(reader, [row.id for row in days])
        clearing = await balances.of(reader, "provider_clearing", "EUR", organization=org)
    assert found == {
        "bank": 1040, "provider_clearing": 0, "accounts_receivable": 0, "deferred_revenue": 0, "tax_payable": -171,
        "revenue": -1000, "contra_revenue": 100, "payment_fees": 31,
    }  # fmt: skip
    assert clearing == 0
    by_day = {row.booked_on: posted[row.id][0].amount_minor for row in days}
    assert (by_day[date(2026, 11, 10)], by_day[date(2026, 12, 10)]) == (20, 13)
    whole = [amount for day, amount in by_day.items() if date(2026, 11, 10) < day < date(2026, 12, 10)]
    assert (len(whole), sum(whole), set(whole)) == (29, 967, {33, 34})


async def test_the_example_of_a_smaller_plan(db: Database) -> None:
    org, mine = organization(), account()
    november, middle, december, january = (
        datetime(year, month, day, tzinfo=UTC) for year, month, day in
        ((2026, 11, 1), (2026, 11, 16), (2026, 12, 1), (2027, 1, 1))
    )  # fmt: skip
    common = {"account": mine, "organization_id": org}

    def line(net: int, start: datetime, end: datetime, kind: str) -> Line:
        return Line("Plan", 1, net, net, net * 19 // 100, 1900, start, end, kind)  # type: ignore[arg-type]

    steps = [
        event("invoice.issued", invoice_ref="in_1", amount_minor=3570, tax_minor=570, occurred_at=november,
              lines=(line(3000, november, december, "plan"),), **common),
        event("payment.succeeded", invoice_ref="in_1", payment_ref="pi_1", amount_minor=3570, fee_minor=78,
              occurred_at=november, **common),
        event("invoice.credited", invoice_ref="in_2", amount_minor=1190, tax_minor=-190, occurred_at=middle,
              lines=(line(-1500, middle, december, "proration"), line(500, middle, december, "proration")), **common),
        event("invoice.issued", invoice_ref="in_3", amount_minor=1190, tax_minor=190, occurred_at=december,
              lines=(line(1000, december, january, "plan"),), **common),
        event("credit.applied", invoice_ref="in_3", amount_minor=1190, occurred_at=december, **common),
    ]  # fmt: skip
    for one in steps:
        await apply(db, one)

    async def held(until: date) -> dict[str, int]:
        async with db.read() as reader:
            return {
                each.account: each.balance_minor for each in await balances.trial(reader, until=until, organization=org)
            }

    await recognition.advance(db, december.date(), 10)
    assert await held(december.date()) == {
        "accounts_receivable": 0, "provider_clearing": 3492, "payment_fees": 78, "deferred_revenue": 0, "tax_payable": -380,
        "customer_credit": -1190, "revenue": -2000,
    }  # fmt: skip
    await recognition.advance(db, january.date(), 10)
    assert await held(january.date()) == {
        "accounts_receivable": 0, "provider_clearing": 3492, "payment_fees": 78, "deferred_revenue": 0, "tax_payable": -570,
        "customer_credit": 0, "revenue": -3000,
    }  # fmt: skip
    async with db.read() as reader:
        rows = [row for row in await ledger.listing(reader, org, 200, None, {}) if row.kind == "recognition"]
        posted = await ledger.postings_of(reader, [row.id for row in rows])
        for ref in ("in_1", "in_2", "in_3"):
            assert await balances.receivable(reader, "stripe", ref, "EUR", mine) == 0
    days: dict[date, int] = {}
    for row in rows:
        days[row.booked_on] = days.get(row.booked_on, 0) + posted[row.id][0].amount_minor
    assert {amount for day, amount in days.items() if day < middle.date()} == {100}
    assert {amount for day, amount in days.items() if middle.date() <= day < december.date()} == {33, 34}


async def test_any_order_of_a_credit_ends_the_same(db: Database) -> None:
    """A void of what it paid among it: it is to the customer's credit again."""
    shuffled = random.Random(3)
    for _ in range(8):
        org = organization()
        common = {"account": account(), "organization_id": org}
        steps = [
            event("invoice.credited", invoice_ref="in_1", amount_minor=1190, tax_minor=-190, **common),
            event("invoice.issued", invoice_ref="in_2", amount_minor=2380, tax_minor=380, **common),
            event("credit.applied", invoice_ref="in_2", amount_minor=1190, **common),
            event("invoice.voided", invoice_ref="in_2", **common),
            event("invoice.credited", invoice_ref="in_3", amount_minor=595, tax_minor=-95, **common),
            event("invoice.voided", invoice_ref="in_3", **common),
        ]
        shuffled.shuffle(steps)
        for one in steps:
            await apply(db, one)
        async with db.read() as reader:
            found = {each.account: each.balance_minor for each in await balances.trial(reader, organization=org)}
        assert {name: amount for name, amount in found.items() if amount} == {
            "customer_credit": -1190, "deferred_revenue": 1000, "tax_payable": 190,
        }  # fmt: skip
