"""The example of docs/explanation/money-flow.md, posted and compared; and its chart of accounts."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

from portico.control.finance import balances, ledger, recognition
from portico.control.finance.accounts import CHART
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
