"""Recognition: days that sum exactly, workers beside each other, voids, and periods that were sealed meanwhile."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.control.finance import accounts, balances, postings, recognition, seals
from portico.control.finance.events import Line
from portico.kit.db import Database
from tests.control.finance.making import account, apply, event, organization

START = datetime(2026, 9, 10, 15, 30, tzinfo=UTC)
END = datetime(2026, 10, 10, 15, 30, tzinfo=UTC)
instants = st.datetimes(datetime(2024, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC))


class TestDaily:
    @given(st.integers(-(10**12), 10**12), instants, st.timedeltas(timedelta(0), timedelta(days=800)))
    def test_days_sum_exactly_and_none_is_far_from_its_share(
        self, total: int, start: datetime, length: timedelta
    ) -> None:
        days = recognition.daily(total, start, start + length)
        assert sum(amount for _, amount in days) == total
        assert [day for day, _ in days] == [start.date() + timedelta(days=n) for n in range(len(days))]
        whole = [amount for _, amount in days[1:-1]]
        assert not whole or max(whole) - min(whole) <= 1

    def test_a_day_has_the_share_of_its_seconds(self) -> None:
        days = recognition.daily(30_00, START, END)
        assert len(days) == 31
        assert days[0] == (date(2026, 9, 10), 35)  # 8.5 of 24 hours
        assert days[1] == (date(2026, 9, 11), 100)
        assert days[-1] == (date(2026, 10, 10), 65)

    def test_no_period_is_the_day_itself(self) -> None:
        assert recognition.daily(5, START, START) == [(date(2026, 9, 10), 5)]
        assert recognition.daily(5, END, START) == [(date(2026, 10, 10), 5)]


async def invoice(db: Database, org: str, mine: str, ref: str = "in_1") -> None:
    """3,000 over a month, 100 for the rest of the month before, 57 used already; 19 % tax."""
    lines = (
        Line("Pro", 1, 3000, 3000, 570, 1900, START, END),
        Line("Rest of Pro", 1, -100, -100, -19, 1900, START - timedelta(days=3), START, "proration"),
        Line("Gibibytes", 57, 1, 57, 11, 1900, START - timedelta(days=30), START, "overage"),
    )
    await apply(db, event(
        "invoice.issued", account=mine, organization_id=org, invoice_ref=ref, amount_minor=2957 + 562, tax_minor=562,
        occurred_at=START, lines=lines,
    ))  # fmt: skip


async def of(db: Database, account_name: str, org: str) -> int:
    async with db.read() as reader:
        return await balances.of(reader, account_name, "EUR", organization=org)


class TestAdvance:
    async def test_what_is_over_is_recognized_once_by_any_number_of_workers(self, db: Database) -> None:
        org, mine = organization(), account()
        await invoice(db, org, mine)
        assert await of(db, accounts.DEFERRED, org) == -2957
        await asyncio.gather(*(recognition.advance(db, date(2026, 9, 12), 10) for _ in range(3)))
        await recognition.advance(db, date(2026, 9, 12), 10)
        # Overage at once, the credit whole, 8.5 hours and a day of the month.
        assert await of(db, accounts.REVENUE, org) == -(57 - 100 + 35 + 100)
        for day in range(13, 45):
            await recognition.advance(db, date(2026, 9, 1) + timedelta(days=day), 10)
        assert await of(db, accounts.REVENUE, org) == -2957
        assert await of(db, accounts.DEFERRED, org) == 0
        assert await recognition.advance(db, date(2027, 9, 1), 10) == 0
        async with db.read() as reader:
            assert await recognition.behind(reader, date(2027, 9, 1)) == 0

    async def test_a_void_gives_back_what_was_recognized(self, db: Database) -> None:
        org, mine = organization(), account()
        await invoice(db, org, mine)
        await recognition.advance(db, date(2026, 9, 20), 10)
        assert await of(db, accounts.REVENUE, org) < 0
        await apply(db, event("invoice.voided", account=mine, organization_id=org, invoice_ref="in_1"))
        await recognition.advance(db, date(2027, 9, 20), 10)
        for name in (accounts.REVENUE, accounts.DEFERRED, accounts.TAX, accounts.RECEIVABLE):
            assert await of(db, name, org) == 0

    async def test_a_void_that_comes_first_leaves_nothing_to_recognize(self, db: Database) -> None:
        org, mine = organization(), account()
        await apply(db, event("invoice.voided", account=mine, organization_id=org, invoice_ref="in_1"))
        await invoice(db, org, mine)
        await recognition.advance(db, date(2027, 9, 20), 10)
        for name in (accounts.REVENUE, accounts.DEFERRED, accounts.TAX, accounts.RECEIVABLE):
            assert await of(db, name, org) == 0

    async def test_one_that_cannot_be_recognized_holds_up_no_other(self, db: Database) -> None:
        org, mine = organization(), account()
        statement = """
            INSERT INTO ledger_recognition (id, source, invoice_ref, line, organization_id, provider, currency, total_minor,
                starts_at, ends_at, next_on, recognized_minor, done)
            VALUES ($1, $1, 'in_1', 0, $1, 'stripe', 'EUR', $2, $3, $3, $4, 0, false)
        """
        async with db.transaction() as tx:  # more than any posting may be, and the oldest of all
            await tx.raw.execute(statement, org, 2**60, START - timedelta(days=99), (START - timedelta(days=99)).date())
        try:
            await invoice(db, org, mine)
            with pytest.raises(ValueError, match="no amount in minor units"):
                await recognition.advance(db, date(2026, 9, 12), 10)
            assert await of(db, accounts.REVENUE, org) == -(57 - 100 + 35 + 100)
        finally:
            async with db.transaction() as tx:
                await tx.raw.execute("SET LOCAL session_replication_role = replica")
                await tx.raw.execute("DELETE FROM ledger_recognition WHERE id = $1", org)

    async def test_what_lines_leave_out_is_recognized_too(self) -> None:
        """A discount that is no line."""
        one = event(
            "invoice.issued", invoice_ref="in_1", amount_minor=900, tax_minor=0, period_start=START, period_end=END,
            lines=(Line("Pro", 1, 1000, 1000, 0, None, START, END),),
        )  # fmt: skip
        assert [(each.line, each.total_minor) for each in postings.schedules(one)] == [(0, 1000), (1, -100)]


async def test_a_sealed_month_takes_nothing_and_late_news_count_for_the_next(db: Database) -> None:
    org, mine = organization(), account()
    await invoice(db, org, mine)
    await recognition.advance(db, date(2026, 12, 1), 100)
    now = datetime(2026, 12, 1, tzinfo=UTC)
    async with db.transaction() as tx:
        await seals.seal(tx, date(2026, 12, 1), "usr_1", now)
    other = organization()
    await invoice(db, other, mine, "in_2")
    await recognition.advance(db, date(2026, 12, 2), 100)
    async with db.read() as reader:
        before = await balances.trial(reader, until=date(2026, 12, 1), organization=other)
        assert before == []
        assert await balances.of(reader, accounts.REVENUE, "EUR", organization=other) == -2957
