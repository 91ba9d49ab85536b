"""Seals: what they refuse, what they say, and damage by somebody who can switch the triggers off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from typing import Any

import pytest
import sqlalchemy as sa

from portico.control.finance import ledger, recognition, seals, store, verification
from portico.errors import Problem
from portico.kit.db import Database
from tests.control.finance.making import AT, account, apply, event, organization
from tests.control.finance.test_ledger import entry, post, whole

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
                await whole(tx, organization(), [("EUR", 5), ("EUR", -5)])
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

    async def test_who_writes_around_the_code_waits_for_the_seal(self, db: Database) -> None:
        org, other = organization(), organization()
        await post(db, entry(org, f"{org}:1"))

        async def around() -> None:
            async with db.transaction() as tx:
                await whole(tx, other, [("EUR", 5), ("EUR", -5)])

        async with db.transaction() as tx:
            await seals.seal(tx, date(2026, 12, 1), "usr_1", NOW)
            writing = asyncio.create_task(around())
            await asyncio.wait({writing}, timeout=0.3)
            assert not writing.done()
        with pytest.raises(Exception, match="is sealed"):
            await writing
        assert await fault(db) is None

    @pytest.mark.parametrize(
        ("starts", "ends", "previous"),
        [
            ("2026-12-01", "9999-12-31", "hash"),  # nothing would ever be booked again but then
            ("2026-12-02", "2026-12-05", "hash"),
            ("2026-12-01", "2026-12-05", "sha256(hash)"),
        ],
    )
    async def test_a_seal_of_somebody_elses_is_refused(
        self, db: Database, starts: str, ends: str, previous: str
    ) -> None:
        org = organization()
        await post(db, entry(org, f"{org}:1"))
        await seal(db, date(2026, 12, 1))
        with pytest.raises(Exception, match="a seal follows the last"):
            async with db.transaction() as tx:
                await tx.raw.execute(
                    f"INSERT INTO ledger_seals SELECT '{ends}', '{starts}', 0, digest, '[]', {previous}, hash, 'x', sealed_at"
                    " FROM ledger_seals"
                )

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

    @pytest.mark.parametrize(
        ("damage", "word"),
        [
            ("UPDATE ledger_postings SET booked_on = booked_on + 1 WHERE position = 0", "another day or organization"),
            ("UPDATE ledger_postings SET organization_id = 'org_x' WHERE position = 0", "another day or organization"),
            ("DELETE FROM ledger_chains", "ends at 2, its head says 0"),
            ("UPDATE ledger_transactions SET number = 3 - number", "has number 1, behind 2"),
        ],
    )
    async def test_what_no_hash_covers_is_found(self, db: Database, damage: str, word: str) -> None:
        org = organization()
        for n in range(2):
            await post(db, entry(org, f"{org}:{n}"))
        async with db.transaction() as tx:
            await tx.raw.execute("SET LOCAL session_replication_role = replica")
            if "number" in damage:
                await tx.raw.execute("ALTER TABLE ledger_transactions ALTER number DROP IDENTITY")
                damage = (
                    "UPDATE ledger_transactions SET number = -number; UPDATE ledger_transactions SET number = 3 - seq"
                )
            await tx.raw.execute(damage)
        try:
            found = (await verification.everything(db)).fault
            assert found is not None and word in found.detail
        finally:
            if "number" in damage:
                async with db.transaction() as tx:
                    await tx.raw.execute(
                        "ALTER TABLE ledger_transactions ALTER number ADD GENERATED ALWAYS AS IDENTITY (START WITH 1000)"
                    )

    async def test_something_booked_before_the_books_begin_is_found(self, db: Database) -> None:
        org = organization()
        await post(db, entry(org, f"{org}:1"))
        await seal(db, date(2026, 12, 1))
        async with db.transaction() as tx:
            await tx.raw.execute("SET LOCAL session_replication_role = replica")
            early = date(2026, 1, 1)
            await whole(tx, organization(), [("EUR", 5), ("EUR", -5)], day=early, booked=early)
        found = await fault(db)
        assert found is not None and "is booked before 2026-11-10" in found.detail

    async def test_who_hashes_everything_anew_is_found_by_a_seal_that_was_kept(self, db: Database) -> None:
        """With every right there is, and the code: chains and seals fit again, but they are others."""
        org = organization()
        for n in range(3):
            await post(db, entry(org, f"{org}:{n}"))
        kept = (await seal(db, date(2026, 12, 1))).hash.hex()
        async with db.transaction() as tx:
            await tx.raw.execute("SET LOCAL session_replication_role = replica")
            await tx.raw.execute("UPDATE ledger_postings SET amount_minor = amount_minor * 2")
            previous = store.ZERO
            rows = await tx.fetch_all(sa.select(store.transactions).order_by(store.transactions.c.seq))
            for row in rows:
                posted = (await ledger.postings_of(tx, [row.id]))[row.id]
                parts = [{name: getattr(each, name) for name in ledger.POSTED} for each in posted]
                previous = store.link(previous, ledger.content(row._asdict(), parts))
                await tx.raw.execute("UPDATE ledger_transactions SET hash = $2 WHERE id = $1", row.id, previous)
            await tx.raw.execute("UPDATE ledger_chains SET hash = $1 WHERE log = 'ledger'", previous)
            found = await seals.content(tx, date(2026, 11, 10), date(2026, 12, 1), {})
            await tx.raw.execute(
                "UPDATE ledger_seals SET digest = $1, totals = $2::text::jsonb, hash = $3",
                bytes.fromhex(found["digest"]), json.dumps(found["totals"]), store.link(store.ZERO, found),
            )  # fmt: skip
        assert (await verification.everything(db)).fault is None
        lost = (await verification.everything(db, kept=[kept])).fault
        assert lost is not None and "was kept outside" in lost.detail

    async def test_a_seal_that_was_kept_is_found_again(self, db: Database) -> None:
        org = organization()
        await post(db, entry(org, f"{org}:1"))
        kept = (await seal(db, date(2026, 12, 1))).hash.hex()
        outcome = await verification.everything(db, kept=[kept.upper()])
        assert (outcome.fault, outcome.transactions, outcome.seals) == (None, 1, 1)
        assert outcome.newest_seal == {"ends_on": "2026-12-01", "hash": kept}

    async def test_seals_themselves_are_written_once(self, db: Database) -> None:
        org = organization()
        await post(db, entry(org, f"{org}:1"))
        await seal(db, date(2026, 12, 1))
        for statement in ("UPDATE ledger_seals SET hash = ''", "DELETE FROM ledger_seals"):
            with pytest.raises(Exception, match="written once"):
                async with db.transaction() as tx:
                    await tx.execute(sa.text(statement))
