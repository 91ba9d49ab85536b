"""Seals: what they refuse, what they say, and damage by somebody who can switch the triggers off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from typing import Any

import pytest
import sqlalchemy as sa

from portico.control.finance import ledger, recognition, seals
from portico.errors import Problem
from portico.kit.db import Database
from tests.control.finance.making import AT, account, apply, event, organization
from tests.control.finance.test_ledger import entry, post

NOW = datetime(2026, 12, 11, tzinfo=UTC)
TABLES = (
    "ledger_seals", "ledger_postings", "ledger_transactions", "ledger_chains", "billing_finance_events", "ledger_recognition",
)  # fmt: skip


@pytest.fixture(autouse=True)
async def empty(db: Database) -> AsyncIterator[None]:
    """A ledger of each test's own: seals are about everybody's transactions."""
    async with db.transaction() as tx:
        await tx.raw.execute("SET LOCAL session_replication_role = replica")
        for table in TABLES:
            await tx.raw.execute(f"DELETE FROM {table}")
    yield


async def seal(db: Database, ends_on: date, now: datetime = NOW) -> Any:
    async with db.transaction() as tx:
        return await seals.seal(tx, ends_on, "usr_1", now)


async def fault(db: Database) -> seals.Fault | None:
    async with db.read(snapshot=True) as reader:
        return await seals.verify_seals(reader)


class TestSeal:
    async def test_a_seal_says_what_was_in_the_period(self, db: Database) -> None:
        org = organization()
        await post(db, entry(org, f"{org}:1", 100))
        november = await seal(db, date(2026, 12, 1))
        assert (november.starts_on, november.transactions) == (date(2026, 11, 10), 1)
        assert november.totals == [
            ["accounts_receivable", "EUR", -100, -100], ["provider_clearing", "EUR", 100, 100],
        ]  # fmt: skip
        await post(db, entry(org, f"{org}:2", 11, occurred_at=NOW))
        december = await seal(db, date(2027, 1, 1), datetime(2027, 1, 1, tzinfo=UTC))
        assert december.previous == november.hash
        assert december.totals[1] == ["provider_clearing", "EUR", 11, 111]
        assert await fault(db) is None

    async def test_what_is_not_over_or_not_recognized_stays_open(self, db: Database) -> None:
        org = organization()
        await apply(
            db, event("invoice.issued", account=account(), organization_id=org, invoice_ref="in_1", amount_minor=100)
        )
        with pytest.raises(Problem) as early:
            await seal(db, date(2026, 12, 12))
        assert early.value.code == "ledger.period_open"
        with pytest.raises(Problem) as waiting:
            await seal(db, date(2026, 12, 1))
        assert waiting.value.code == "ledger.period_open"
        await recognition.advance(db, date(2026, 12, 1), 10)
        await seal(db, date(2026, 12, 1))
        with pytest.raises(Problem) as again:
            await seal(db, date(2026, 12, 1))
        assert again.value.code == "ledger.period_sealed"

    async def test_the_database_takes_nothing_into_a_sealed_period(self, db: Database) -> None:
        org = organization()
        await post(db, entry(org, f"{org}:1"))
        await seal(db, date(2026, 12, 1))
        with pytest.raises(Exception, match="is sealed"):
            async with db.transaction() as tx:
                await tx.raw.execute(
                    "INSERT INTO ledger_transactions (id, chain, seq, hash, key, kind, booked_on, occurred_at, recorded_at,"
                    " posting_count) VALUES ($1, $1, 9, '', $1, 'x', '2026-11-30', now(), now(), 2)", org,
                )  # fmt: skip
        made = await post(db, entry(org, f"{org}:2"))
        async with db.read() as reader:
            row = await ledger.transaction_row(reader, made or "")
            assert row is not None and (row.booked_on, row.occurred_at) == (date(2026, 12, 1), AT)

    async def test_who_posts_beside_a_seal_is_in_it_or_behind_it(self, db: Database) -> None:
        org = organization()
        await post(db, entry(org, f"{org}:0"))
        async with db.transaction() as tx:
            await ledger.post(tx, entry(org, f"{org}:slow"))
            sealing = asyncio.create_task(seal(db, date(2026, 12, 1)))
            await asyncio.wait({sealing}, timeout=0.3)
            assert not sealing.done()
        assert (await sealing).transactions == 2
        assert await fault(db) is None

    async def test_the_month_is_sealed_by_itself_some_days_after_its_end(self, db: Database) -> None:
        assert await seals.seal_month(db, NOW, 10) is None  # nothing is there
        org = organization()
        await post(db, entry(org, f"{org}:1"))
        assert await seals.seal_month(db, datetime(2026, 12, 10, tzinfo=UTC), 10) is None
        assert await seals.seal_month(db, NOW, 10) == date(2026, 12, 1)
        assert await seals.seal_month(db, NOW, 10) is None


class TestDamage:
    @pytest.mark.parametrize(
        ("damage", "word"),
        [
            ("UPDATE ledger_postings SET amount_minor = amount_minor * 2", "postings are not"),
            ("DELETE FROM ledger_transactions WHERE seq = 2", "2 transactions were sealed, 1"),
            ("UPDATE ledger_transactions SET hash = sha256(hash) WHERE seq = 1", "not the one that was sealed"),
            ("UPDATE ledger_seals SET totals = '[]'", "the seal itself"),
            ("UPDATE ledger_seals SET hash = sha256(hash)", "the seal itself"),
        ],
    )
    async def test_it_is_found(self, db: Database, damage: str, word: str) -> None:
        org = organization()
        for n in range(2):
            await post(db, entry(org, f"{org}:{n}"))
        await seal(db, date(2026, 12, 1))
        assert await fault(db) is None
        async with db.transaction() as tx:
            await tx.raw.execute("SET LOCAL session_replication_role = replica")
            await tx.raw.execute(damage)
        found = await fault(db)
        assert found is not None and word in found.detail

    async def test_a_seal_that_was_removed_is_missed(self, db: Database) -> None:
        org = organization()
        await post(db, entry(org, f"{org}:1"))
        await seal(db, date(2026, 12, 1))
        await post(db, entry(org, f"{org}:2", occurred_at=NOW))
        await seal(db, date(2026, 12, 11))
        async with db.transaction() as tx:
            await tx.raw.execute("SET LOCAL session_replication_role = replica")
            await tx.raw.execute("DELETE FROM ledger_seals WHERE ends_on = '2026-12-01'")
        found = await fault(db)
        assert found is not None and "does not follow" in found.detail

    async def test_seals_themselves_are_written_once(self, db: Database) -> None:
        org = organization()
        await post(db, entry(org, f"{org}:1"))
        await seal(db, date(2026, 12, 1))
        for statement in ("UPDATE ledger_seals SET hash = ''", "DELETE FROM ledger_seals"):
            with pytest.raises(Exception, match="written once"):
                async with db.transaction() as tx:
                    await tx.execute(sa.text(statement))
