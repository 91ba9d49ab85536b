"""Revenue by day against the ledger, and movements of MRR that sum to its change."""

from __future__ import annotations

import asyncio
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.control.finance import recognition, revenue
from portico.kit.db import Database
from tests.control.finance.making import AT, account, apply, event, organization


class TestDaily:
    async def test_days_are_what_the_ledger_says(self, db: Database) -> None:
        org, mine = organization(), account()
        common = {"account": mine, "organization_id": org, "plan_ref": "price_pro"}
        period = {"period_start": AT, "period_end": AT + timedelta(days=10)}
        await apply(
            db, event("invoice.issued", invoice_ref="in_1", amount_minor=1190, tax_minor=190, **period, **common)
        )
        paid = event(
            "payment.succeeded", invoice_ref="in_1", payment_ref="pi_1", amount_minor=1190, fee_minor=31, **common
        )
        await apply(db, paid)
        assert await revenue.refresh(db) == 1
        await apply(db, event("refund.succeeded", refund_ref="re_1", payment_ref="pi_1", amount_minor=119, **common))
        await recognition.advance(db, date(2026, 11, 12), 10)
        assert sum(await asyncio.gather(*(revenue.refresh(db) for _ in range(3)))) == 2
        assert await revenue.refresh(db) == 0
        async with db.read() as reader:
            first, second = await revenue.daily(reader, date(2026, 11, 10), date(2026, 11, 13), org)
        assert (first.day, first.plan_ref, first.currency) == (date(2026, 11, 10), "price_pro", "EUR")
        assert (first.gross_minor, first.refund_minor, first.tax_minor, first.fee_minor) == (1190, 119, 171, 31)
        assert (first.net_minor, first.deferred_minor) == (1190 - 119 - 171 - 31, 1000)
        assert (first.recognized_minor, second.recognized_minor, second.gross_minor) == (60, 100, 0)


class TestMrr:
    async def test_movements_sum_to_the_change(self, db: Database) -> None:
        org = organization()
        steps = [
            ("sub_1", 1000),
            ("sub_1", 3000),
            ("sub_2", 500),
            ("sub_1", 0),
            ("sub_2", 0),
            ("sub_3", 700),
            ("sub_3", 700),
        ]
        async with db.read() as reader:
            before = (await revenue.mrr(reader)).get("EUR", 0)
        for at, (subscription, amount) in enumerate(steps):
            async with db.transaction() as tx:
                await revenue.moved(
                    tx, org, f"{org}:{subscription}", "EUR", amount, AT + timedelta(days=at), f"evt_{at}", "pro"
                )
        async with db.read() as reader:
            rows = await revenue.movement_totals(reader, AT.date(), AT.date() + timedelta(days=9))
            assert {row.kind: int(row.delta_minor) for row in rows} == {
                "new": 1000, "expansion": 2500, "contraction": -3000, "churn": -500, "reactivation": 700,
            }  # fmt: skip
            assert await revenue.mrr(reader, AT.date() + timedelta(days=2)) == {"EUR": before + 3000}
            assert await revenue.mrr(reader) == {"EUR": before + 700}

    async def test_a_cause_moves_once_and_movements_take_turns(self, db: Database) -> None:
        org = organization()

        async def move(n: int) -> int:
            async with db.transaction() as tx:
                return await revenue.moved(tx, org, f"{org}:{n % 2}", "CHF", 100, AT, "the same", None)

        assert sorted(await asyncio.gather(*(move(n) for n in range(8)))) == [0] * 6 + [100, 100]

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
    def test_every_path_has_a_name(self, path: list[int]) -> None:
        total, known, sums = 0, False, 0
        for after in path:
            if after != total:
                kind = revenue.kind_of(total, after, known)
                assert (kind in ("new", "expansion", "reactivation")) == (after > total)
                assert (kind == "churn") == (after == 0)
                sums, known = sums + after - total, True
            total = after
        assert sums == path[-1]

    @pytest.mark.parametrize(
        ("amount", "interval", "count", "month"),
        [
            (1200, "year", 1, 100),
            (1000, "month", 3, 333),
            (700, "week", 1, 3042),
            (100, "day", 1, 3042),
            (1, "year", 1, 0),
            (6, "year", 1, 1),
        ],
    )
    def test_a_month_of_every_interval(self, amount: int, interval: revenue.Interval, count: int, month: int) -> None:
        assert revenue.monthly(amount, interval, count) == month
