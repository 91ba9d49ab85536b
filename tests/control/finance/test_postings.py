"""Postings: every kind in figures, and histories in any order with any duplicates."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portico.control.finance import balances, postings
from portico.control.finance.events import FinanceEvent
from portico.errors import Problem
from portico.kit.db import Database
from tests.control.finance.making import account, apply, event, organization


async def books(db: Database, org: str) -> dict[str, int]:
    """What every account of an organization holds; the sum of each currency must be zero."""
    async with db.read() as reader:
        found = await balances.trial(reader, organization=org)
    by_currency: dict[str, int] = {}
    for each in found:
        by_currency[each.currency] = by_currency.get(each.currency, 0) + each.balance_minor
    assert not any(by_currency.values())
    return {each.account: each.balance_minor for each in found if each.balance_minor}


class History:
    """Events of one organization in an account of its own."""

    def __init__(self) -> None:
        self.org, self.account = organization(), account()

    def __call__(self, kind: str, **more: Any) -> FinanceEvent:
        return event(kind, account=self.account, organization_id=self.org, **more)

    def invoice(self, ref: str = "in_1", gross: int = 1190, tax: int = 190) -> FinanceEvent:
        return self("invoice.issued", invoice_ref=ref, amount_minor=gross, tax_minor=tax)

    def payment(
        self, invoice: str | None = "in_1", ref: str = "pi_1", gross: int = 1190, fee: int | None = 31
    ) -> FinanceEvent:
        return self("payment.succeeded", invoice_ref=invoice, payment_ref=ref, amount_minor=gross, fee_minor=fee)

    def refund(self, ref: str, gross: int, payment: str = "pi_1") -> FinanceEvent:
        return self("refund.succeeded", refund_ref=ref, payment_ref=payment, amount_minor=gross)


class TestKinds:
    async def test_an_invoice_and_its_payment(self, db: Database) -> None:
        history = History()
        await apply(db, history.invoice())
        assert await books(db, history.org) == {
            "accounts_receivable": 1190,
            "deferred_revenue": -1000,
            "tax_payable": -190,
        }
        await apply(db, history.payment())
        assert await books(db, history.org) == {
            "provider_clearing": 1159, "payment_fees": 31, "deferred_revenue": -1000, "tax_payable": -190,
        }  # fmt: skip

    async def test_a_fee_is_what_is_between_gross_and_net(self, db: Database) -> None:
        history = History()
        await apply(db, history("payment.succeeded", payment_ref="pi_1", amount_minor=1000, net_minor=971))
        assert (await books(db, history.org))["payment_fees"] == 29
        later = History()
        await apply(db, later.payment(fee=None))
        await apply(db, later("fee.charged", payment_ref="pi_1", fee_minor=31, amount_minor=None, currency="EUR"))
        assert (await books(db, later.org))["payment_fees"] == 31

    async def test_small_refunds_take_back_as_much_tax_as_one(self, db: Database) -> None:
        history = History()
        for one in (history.invoice(), history.payment(), *(history.refund(f"re_{n}", 119) for n in range(10))):
            await apply(db, one)
        assert await books(db, history.org) == {
            "provider_clearing": -31, "payment_fees": 31, "deferred_revenue": -1000, "contra_revenue": 1000,
        }  # fmt: skip

    async def test_a_dispute_that_is_lost_and_one_that_is_won(self, db: Database) -> None:
        lost, won = History(), History()
        for history, end in ((lost, "lost"), (won, "won")):
            for status, kind in (("open", "dispute.created"), (end, "dispute.closed")):
                fee = 15 if status == "open" else None
                await apply(db, history(kind, dispute_ref="dp_1", status=status, amount_minor=1190, fee_minor=fee))
        assert await books(db, lost.org) == {"provider_clearing": -1205, "dispute_loss": 1190, "payment_fees": 15}
        assert await books(db, won.org) == {"provider_clearing": -15, "payment_fees": 15}

    async def test_a_payout_reaches_the_bank_unless_it_failed(self, db: Database) -> None:
        history = History()
        paid = history("payout.paid", payout_ref="po_1", amount_minor=1000)
        await apply(db, paid)
        assert await books(db, history.org) == {"bank": 1000, "provider_clearing": -1000}
        await apply(db, history("payout.failed", payout_ref="po_1"))
        assert await books(db, history.org) == {}

    async def test_bad_debt_is_what_is_open_and_comes_back_with_a_payment(self, db: Database) -> None:
        history = History()
        for one in (
            history.invoice(),
            history.payment(gross=190, fee=0),
            history("invoice.uncollectible", invoice_ref="in_1"),
        ):
            await apply(db, one)
        assert (await books(db, history.org))["bad_debt"] == 1000
        await apply(db, history.payment(ref="pi_2", gross=1000, fee=0))
        assert await books(db, history.org) == {
            "provider_clearing": 1190,
            "deferred_revenue": -1000,
            "tax_payable": -190,
        }

    async def test_an_invoice_of_nothing_is_no_transaction(self, db: Database) -> None:
        history = History()
        async with db.transaction() as tx:
            assert await postings.post(tx, history.invoice(gross=0, tax=0)) == []
            assert await postings.post(tx, history("subscription.updated", subscription_ref="sub_1")) == []

    @pytest.mark.parametrize(
        ("kind", "more"),
        [
            ("invoice.issued", {"invoice_ref": "in_1"}),
            ("payment.succeeded", {"amount_minor": 5}),
            ("payment.succeeded", {"amount_minor": -5, "payment_ref": "pi_1"}),
            ("refund.succeeded", {"amount_minor": 5}),
            ("payout.paid", {"payout_ref": "po_1"}),
        ],
    )
    async def test_money_without_its_facts_is_refused(self, db: Database, kind: str, more: dict[str, Any]) -> None:
        async with db.transaction() as tx:
            with pytest.raises(Problem) as refused:
                await postings.post(tx, event(kind, account=account(), **more))
        assert refused.value.code == "ledger.event_incomplete"


def _everything(history: History) -> list[FinanceEvent]:
    """A history in which every rule about two events has its turn."""
    return [
        history.invoice(), history.payment(), history.refund("re_1", 333), history.refund("re_2", 334),
        history.refund("re_3", 100), history("refund.updated", refund_ref="re_3", payment_ref="pi_1", status="failed"),
        history.invoice("in_2", 2500, 399), history("invoice.voided", invoice_ref="in_2"),
        history.invoice("in_3", 700, 0), history("invoice.uncollectible", invoice_ref="in_3"),
        history.payment("in_3", "pi_3", 200, None),
        history("dispute.opened", dispute_ref="dp_1", amount_minor=500, fee_minor=15),
        history("dispute.won", dispute_ref="dp_1", amount_minor=500),
        history("payout.paid", payout_ref="po_1", amount_minor=600),
        history("payout.failed", payout_ref="po_1"),
        history("payout.paid", payout_ref="po_2", amount_minor=601),
        history("invoice.credited", invoice_ref="in_4", amount_minor=595, tax_minor=-95), history.invoice("in_5", 595, 95),
        history("credit.applied", invoice_ref="in_5", amount_minor=595),
        history("payout.debit_paid", payout_ref="po_3", amount_minor=40),
        history("payout.debit_paid", payout_ref="po_4", amount_minor=7),
        history("payout.debit_failed", payout_ref="po_4"),
    ]  # fmt: skip


class TestAnyOrder:
    async def _run(self, db: Database, history: History, order: Sequence[FinanceEvent]) -> dict[str, int]:
        for one in order:
            await apply(db, one)
            await books(db, history.org)  # zero after every prefix
        return await books(db, history.org)

    async def test_every_permutation_and_duplication_ends_in_the_same_books(self, database_url: str) -> None:
        """Each example has an organization and an account of its own, so that they share a database."""
        orders = st.lists(st.integers(0, 21), max_size=8).flatmap(lambda again: st.permutations([*range(22), *again]))
        loop = asyncio.get_running_loop()

        async def one(order: list[int]) -> dict[str, int]:
            db = Database(database_url)
            try:
                history = History()
                known = _everything(history)
                return await self._run(db, history, [known[at] for at in order])
            finally:
                await db.close()

        wanted = await one(list(range(22)))
        assert wanted == {
            "provider_clearing": 1159 - 667 + 200 - 15 - 601 + 40, "payment_fees": 31 + 15, "bank": 601 - 40,
            "deferred_revenue": -1700, "bad_debt": 500, "contra_revenue": 667 - 106, "tax_payable": -190 + 106,
        }  # fmt: skip

        @settings(max_examples=15)
        @given(orders)
        def check(order: list[int]) -> None:
            assert asyncio.run_coroutine_threadsafe(one(order), loop).result(120) == wanted

        await asyncio.to_thread(check)

    async def test_two_workers_at_once(self, db: Database) -> None:
        history = History()
        known = _everything(history) * 2
        random.Random(7).shuffle(known)
        half = len(known) // 2

        async def work(some: list[FinanceEvent]) -> None:
            for one in some:
                await apply(db, one)

        await asyncio.gather(work(known[:half]), work(known[half:]))
        other = History()
        assert await books(db, history.org) == await self._run(db, other, _everything(other))
