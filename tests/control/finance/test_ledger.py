"""The ledger: what the database itself refuses, two writers at once, reversal, cut-offs."""

from __future__ import annotations

import asyncio
from datetime import date, timedelta
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa

from portico.control import migrations
from portico.control.finance import accounts, balances, ledger, store, verification
from portico.control.finance.ledger import Entry, credit, debit
from portico.errors import Problem
from portico.kit.db import Database, PoolLimits
from tests.control.finance.making import AT, apply, event, organization


def entry(org: str | None, key: str, amount: int = 1190, **more: Any) -> Entry:
    """A payment without a fee."""
    parts = (debit(accounts.CLEARING, "EUR", amount), credit(accounts.RECEIVABLE, "EUR", amount))
    return Entry(key, "payment.succeeded", org, **{"occurred_at": AT, "postings": parts, **more})


async def post(db: Database, one: Entry) -> str | None:
    async with db.transaction() as tx:
        return await ledger.post(tx, one)


async def raw(db: Database, statement: str, *values: Any) -> None:
    async with db.transaction() as tx:
        await tx.raw.execute(statement, *values)


class TestPost:
    async def test_a_key_is_posted_once(self, db: Database) -> None:
        org = organization()
        assert await post(db, entry(org, f"{org}:1")) is not None
        assert await post(db, entry(org, f"{org}:1", 5)) is None
        async with db.read() as reader:
            assert await balances.of(reader, accounts.CLEARING, "EUR", organization=org) == 1190

    async def test_two_writers_at_once_take_turns(self, db: Database) -> None:
        org = organization()
        ids = await asyncio.gather(*(post(db, entry(org, f"{org}:{n // 2}", n + 1)) for n in range(40)))
        assert len([made for made in ids if made]) == 20
        async with db.read(snapshot=True) as reader:
            walk = await verification.verify(reader, org, store.LEDGER)
            assert (walk.fault, walk.seq) == (None, 20)

    async def test_what_no_ledger_takes(self) -> None:
        one = entry("org_1", "k")
        wrong = [
            {"postings": (debit(accounts.CLEARING, "EUR", 5), credit(accounts.BANK, "EUR", 4))},
            {"postings": (debit(accounts.CLEARING, "EUR", 5), credit(accounts.BANK, "USD", 5))},
            {"postings": (debit("petty_cash", "EUR", 5), credit(accounts.BANK, "EUR", 5))},
            {"postings": (debit(accounts.CLEARING, "eur", 5), credit(accounts.BANK, "eur", 5))},
            {"postings": (debit(accounts.CLEARING, "EUR", 0), credit(accounts.BANK, "EUR", 0))},
            {"postings": (debit(accounts.CLEARING, "EUR", 2**53), credit(accounts.BANK, "EUR", 2**53))},
            {"postings": (debit(accounts.CLEARING, "EUR", 5),)},
            {"occurred_at": AT.replace(tzinfo=None)},
            {"key": ""},
        ]
        for change in wrong:
            with pytest.raises(ValueError):
                ledger.check(Entry(**{**{name: getattr(one, name) for name in one.__slots__}, **change}))
        ledger.check(one)

    async def test_a_rolled_back_posting_leaves_no_gap(self, db: Database) -> None:
        org = organization()
        await post(db, entry(org, f"{org}:1"))
        with pytest.raises(RuntimeError):
            async with db.transaction() as tx:
                await ledger.post(tx, entry(org, f"{org}:2"))
                raise RuntimeError("a crash between two lines")
        await post(db, entry(org, f"{org}:2"))
        async with db.read(snapshot=True) as reader:
            walk = await verification.verify(reader, org, store.LEDGER)
            assert (walk.fault, walk.seq) == (None, 2)


class TestGuards:
    """Around the code, with SQL of one's own."""

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE ledger_postings SET amount_minor = amount_minor + 1",
            "UPDATE ledger_transactions SET note = 'x'",
            "UPDATE billing_finance_events SET amount_minor = 1",
            "DELETE FROM ledger_postings",
            "DELETE FROM ledger_transactions",
            "TRUNCATE ledger_postings",
            "TRUNCATE ledger_transactions",
            "TRUNCATE billing_finance_events",
            "TRUNCATE ledger_chains",
            "DELETE FROM ledger_chains",
            "UPDATE ledger_chains SET seq = seq - 1",
            "UPDATE ledger_chains SET hash = ''",
        ],
    )
    async def test_a_superuser_changes_nothing(self, db: Database, statement: str) -> None:
        org = organization()
        await post(db, entry(org, f"{org}:1"))
        if statement.startswith("UPDATE billing"):
            await apply(db, event("payment.succeeded", organization_id=org, payment_ref=org, amount_minor=5))
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await raw(db, statement)

    async def test_a_posting_more_is_refused_at_the_commit(self, db: Database) -> None:
        org = organization()
        made = await post(db, entry(org, f"{org}:1"))
        for amounts in ((7, -7), (7,)):
            with pytest.raises(sa.exc.DBAPIError, match="postings, not"):
                async with db.transaction() as tx:
                    for at, amount in enumerate(amounts, 2):
                        await tx.raw.execute(
                            "INSERT INTO ledger_postings (transaction_id, position, account, currency, amount_minor, booked_on)"
                            " VALUES ($1, $2, 'bank', 'EUR', $3, $4)", made, at, amount, date(2026, 11, 10),
                        )  # fmt: skip

    @pytest.mark.parametrize("amounts", [(), (5,), (5, -4), (5, -5, 1)])
    async def test_a_transaction_that_is_not_whole_is_refused(self, db: Database, amounts: tuple[int, ...]) -> None:
        org = organization()
        with pytest.raises(Exception, match=r"postings, not|is off by"):
            async with db.transaction() as tx:
                await tx.raw.execute(
                    "INSERT INTO ledger_transactions (id, chain, seq, hash, key, kind, booked_on, occurred_at, recorded_at,"
                    " posting_count) VALUES ($1, $1, 1, '', $1, 'x', '2026-11-10', now(), now(), $2)",
                    org, max(2, len(amounts)),
                )  # fmt: skip
                for at, amount in enumerate(amounts):
                    await tx.raw.execute(
                        "INSERT INTO ledger_postings (transaction_id, position, account, currency, amount_minor, booked_on)"
                        " VALUES ($1, $2, 'bank', 'EUR', $3, '2026-11-10')", org, at, amount,
                    )  # fmt: skip

    async def test_one_currency_does_not_balance_another(self, db: Database) -> None:
        org = organization()
        with pytest.raises(Exception, match="is off by"):
            async with db.transaction() as tx:
                await tx.raw.execute(
                    "INSERT INTO ledger_transactions (id, chain, seq, hash, key, kind, booked_on, occurred_at, recorded_at,"
                    " posting_count) VALUES ($1, $1, 1, '', $1, 'x', '2026-11-10', now(), now(), 2)", org,
                )  # fmt: skip
                for at, (currency, amount) in enumerate((("EUR", 5), ("USD", -5))):
                    await tx.raw.execute(
                        "INSERT INTO ledger_postings (transaction_id, position, account, currency, amount_minor, booked_on)"
                        " VALUES ($1, $2, 'bank', $3, $4, '2026-11-10')", org, at, currency, amount,
                    )  # fmt: skip

    async def test_the_role_that_owns_the_tables_lacks_the_privilege(self, empty_database_url: str) -> None:
        """As in production, where that role is no superuser: it is refused before any trigger is asked."""
        name = empty_database_url.rpartition("/")[2].partition("?")[0]
        owner = f"owner_of_{name}"
        admin = await asyncpg.connect(empty_database_url)
        await admin.execute(f"CREATE ROLE {owner}")
        await admin.execute(f"ALTER SCHEMA public OWNER TO {owner}")
        plain = f"{empty_database_url}&role={owner}"
        own = Database(plain, PoolLimits(size=2))
        try:
            await migrations.upgrade(plain)
            org = organization()
            await post(own, entry(org, f"{org}:1"))
            for table in (
                "ledger_postings",
                "ledger_transactions",
                "billing_finance_events",
                "ledger_seals",
                "mrr_movements",
            ):
                for statement in (f"DELETE FROM {table}", f"TRUNCATE {table}", f"SELECT * FROM {table} FOR UPDATE"):
                    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="permission denied"):
                        await raw(own, statement)
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="permission denied"):
                await raw(own, "UPDATE ledger_postings SET amount_minor = 1")
        finally:
            await own.close()
            await admin.execute(f"DROP OWNED BY {owner} CASCADE")
            await admin.execute(f"DROP ROLE {owner}")
            await admin.close()


class TestReverse:
    async def test_a_reversal_is_the_opposite_once(self, db: Database) -> None:
        org = organization()
        made = await post(db, entry(org, f"{org}:1"))
        assert made is not None
        async with db.transaction() as tx:
            undone = await ledger.reverse(tx, made, f"{org}:undo", "correction", AT + timedelta(days=1), "typed twice")
        assert undone is not None
        async with db.transaction() as tx:
            assert await ledger.reverse(tx, made, f"{org}:again", "correction", AT) is None
        async with db.transaction() as tx:
            with pytest.raises(Problem) as refused:
                await ledger.reverse(tx, undone, f"{org}:back", "correction", AT)
            assert refused.value.code == "ledger.reversal_of_reversal"
            with pytest.raises(Problem) as unknown:
                await ledger.reverse(tx, "ltx_none", f"{org}:none", "correction", AT)
            assert unknown.value.code == "ledger.transaction_not_found"
        async with db.read() as reader:
            assert [each.balance_minor for each in await balances.trial(reader, organization=org)] == [0, 0]
            row = await ledger.transaction_row(reader, undone)
            assert row is not None and (row.reverses, row.booked_on) == (made, date(2026, 11, 11))

    async def test_two_who_reverse_at_once(self, db: Database) -> None:
        org = organization()
        made = await post(db, entry(org, f"{org}:1"))
        assert made is not None

        async def undo(n: int) -> str | None:
            async with db.transaction() as tx:
                return await ledger.reverse(tx, made or "", f"{org}:undo:{n}", "correction", AT)

        undone = await asyncio.gather(*(undo(n) for n in range(5)))
        assert len([each for each in undone if each]) == 1


class TestCutOff:
    async def test_it_waits_for_those_who_post(self, db: Database) -> None:
        """Number 2 is committed while number 1 is not: neither counts before both do."""
        slow, fast = organization(), organization()
        async with db.transaction() as tx:
            await ledger.post(tx, entry(slow, f"{slow}:1"))
            await post(db, entry(fast, f"{fast}:1"))
            asked = asyncio.create_task(ledger.cut_off(db))
            _, waiting = await asyncio.wait({asked}, timeout=0.3)
            assert waiting
        number = await asked
        async with db.read() as reader:
            for org in (slow, fast):
                rows = await ledger.listing(reader, org, 10, None, {})
                assert [row.number <= number for row in rows] == [True]
