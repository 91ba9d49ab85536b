"""The ledger: what the database itself refuses, two writers at once, reversal, cut-offs."""

from __future__ import annotations

import asyncio
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa

from portico.control import migrations
from portico.control.finance import accounts, balances, ledger, store, verification
from portico.control.finance.ledger import Entry, credit, debit
from portico.errors import Problem
from portico.kit.db import Database, PoolLimits, Tx
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


DAY = date(2026, 11, 10)


async def posting(tx: Tx, transaction: str, org: str, at: int, part: tuple[str, int], day: date = DAY) -> None:
    """A row of `ledger_postings` by SQL of one's own."""
    await tx.raw.execute(
        "INSERT INTO ledger_postings (transaction_id, position, organization_id, account, currency, amount_minor, booked_on)"
        " VALUES ($1, $2, $3, 'bank', $4, $5, $6)", transaction, at, org, *part, day,
    )  # fmt: skip


async def whole(
    tx: Tx, org: str, parts: list[tuple[str, int]], *, chain: str | None = None, seq: int = 1, head: bool = True,
    advance: bool = True, **of_postings: Any,
) -> None:  # fmt: skip
    """A transaction of a new chain by SQL of one's own, as far as the database lets one; ``whose`` and ``day`` of its postings
    may be others than its own, ``booked`` is its day."""
    if head:
        begin = "INSERT INTO ledger_chains (chain, log, seq, hash) VALUES ($1, 'ledger', 0, $2) ON CONFLICT DO NOTHING"
        await tx.raw.execute(begin, chain or org, store.ZERO)
    await tx.raw.execute(
        "INSERT INTO ledger_transactions (id, chain, seq, hash, key, kind, organization_id, booked_on, occurred_at,"
        " recorded_at, posting_count) VALUES ($1, $2, $3, 'x', $1, 'x', $1, $5, now(), now(), $4)",
        org, chain or org, seq, max(2, len(parts)), of_postings.get("booked", DAY),
    )  # fmt: skip
    for at, part in enumerate(parts):
        await posting(tx, org, of_postings.get("whose", org), at, part, of_postings.get("day", DAY))
    if advance:
        await tx.raw.execute("UPDATE ledger_chains SET seq = 1, hash = 'x' WHERE chain = $1 AND log = 'ledger'", org)


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
                        await posting(tx, made or "", org, at, ("EUR", amount))

    async def test_copy_is_no_way_around(self, db: Database) -> None:
        org = organization()
        made = await post(db, entry(org, f"{org}:1"))
        columns = ["transaction_id", "position", "account", "currency", "amount_minor", "booked_on"]
        with pytest.raises(sa.exc.DBAPIError, match="postings, not"):
            async with db.transaction() as tx:
                await tx.raw.copy_records_to_table(
                    "ledger_postings", columns=columns, records=[(made, 2, "bank", "EUR", 7, DAY)]
                )

    @pytest.mark.parametrize("amounts", [(), (5,), (5, -4), (5, -5, 1)])
    async def test_a_transaction_that_is_not_whole_is_refused(self, db: Database, amounts: tuple[int, ...]) -> None:
        org = organization()
        with pytest.raises(Exception, match=r"postings, not|is off by"):
            async with db.transaction() as tx:
                await whole(tx, org, [("EUR", amount) for amount in amounts])

    async def test_one_currency_does_not_balance_another(self, db: Database) -> None:
        org = organization()
        with pytest.raises(Exception, match="is off by"):
            async with db.transaction() as tx:
                await whole(tx, org, [("EUR", 5), ("USD", -5)])

    @pytest.mark.parametrize("change", [{"day": date(2026, 11, 11)}, {"whose": "org_other"}])
    async def test_a_posting_counts_where_its_transaction_does(self, db: Database, change: dict[str, Any]) -> None:
        """Trial balances read postings alone: one of another day or organization would move money there."""
        org = organization()
        with pytest.raises(Exception, match="of another day or organization"):
            async with db.transaction() as tx:
                await whole(tx, org, [("EUR", 5), ("EUR", -5)], **change)
        async with db.transaction() as tx:
            await whole(tx, org, [("EUR", 5), ("EUR", -5)])

    @pytest.mark.parametrize(
        ("chain", "seq", "head"), [("", 2, True), ("", 7, True), ("org_other", 1, True), ("", 1, False)]
    )
    async def test_nothing_stands_beside_its_chain(self, db: Database, chain: str, seq: int, head: bool) -> None:
        org = organization()
        with pytest.raises(Exception, match="does not follow the end of chain"):
            async with db.transaction() as tx:
                await whole(tx, org, [("EUR", 5), ("EUR", -5)], chain=chain or org, seq=seq, head=head)

    async def test_a_chain_ends_at_its_last_row(self, db: Database) -> None:
        org = organization()
        with pytest.raises(Exception, match="ends before its number 1"):
            async with db.transaction() as tx:
                await whole(tx, org, [("EUR", 5), ("EUR", -5)], advance=False)
        await post(db, entry(org, f"{org}:1"))
        for change in ("seq = seq + 1", "seq = seq + 1, hash = sha256(hash)"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="only moves on"):
                await raw(db, f"UPDATE ledger_chains SET {change} WHERE chain = $1", org)

    async def test_an_event_stands_in_its_chain_too(self, db: Database) -> None:
        org = organization()
        await apply(db, event("payment.failed", organization_id=org, invoice_ref=org))
        copy = """
            INSERT INTO billing_finance_events SELECT (e).* FROM (
                SELECT jsonb_populate_record(NULL::billing_finance_events, to_jsonb(f) || jsonb_build_object(
                    'id', f.id || 'x', 'effect_key', f.effect_key || 'x', 'seq', f.seq + $2)) AS e
                FROM billing_finance_events f WHERE f.chain = $1 AND f.seq = 1) AS copied
        """
        for step, word in ((2, "does not follow"), (1, "ends before its number 2")):
            with pytest.raises(Exception, match=word):
                await raw(db, copy, org, step)

    async def test_a_schedule_stays_what_was_invoiced(self, db: Database) -> None:
        org = organization()
        await apply(db, event("invoice.issued", account=org, organization_id=org, invoice_ref="in_1", amount_minor=100))
        for statement in (
            "UPDATE ledger_recognition SET total_minor = 1 WHERE organization_id = $1",
            "UPDATE ledger_recognition SET next_on = next_on - 1 WHERE organization_id = $1",
            "DELETE FROM ledger_recognition WHERE organization_id = $1",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="does not change"):
                await raw(db, statement, org)

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
            assert (await verification.everything(own)).fault is None
            await self._owns_nothing(admin, empty_database_url, f"app_of_{name}")
            await raw(own, "ALTER TABLE ledger_postings DISABLE TRIGGER written_once")
            found = (await verification.everything(own)).fault
            assert found is not None and "its trigger written_once is switched off" in found.detail
            await raw(own, "ALTER TABLE ledger_postings ENABLE TRIGGER written_once")
            body = await admin.fetchval("SELECT prosrc FROM pg_proc WHERE proname = 'finance_written_once'")
            function = "CREATE OR REPLACE FUNCTION finance_written_once() RETURNS trigger LANGUAGE plpgsql AS $x${}$x$"
            await raw(own, function.format("BEGIN RETURN NEW; END"))
            found = (await verification.everything(own)).fault
            assert found is not None and found.place == "function finance_written_once"
            await raw(own, function.format(body))
            assert (await verification.everything(own)).fault is None
            await raw(own, "DROP TRIGGER written_once ON ledger_seals")
            again = "CREATE TRIGGER written_once BEFORE {} ON ledger_seals FOR EACH ROW {}"
            again += " EXECUTE FUNCTION finance_written_once()"
            for events, condition in (("DELETE", ""), ("UPDATE OR DELETE", "WHEN (false)")):
                await raw(own, again.format(events, condition))
                found = (await verification.everything(own)).fault
                assert found is not None and found.place == "ledger_seals"
                await raw(own, "DROP TRIGGER written_once ON ledger_seals")
            await raw(own, again.format("UPDATE OR DELETE", ""))
            assert (await verification.everything(own)).fault is None
            await raw(own, f"GRANT UPDATE ON ledger_postings TO {owner}")
            found = (await verification.everything(own)).fault
            assert found is not None and "has the privilege to change" in found.detail
        finally:
            await own.close()
            await admin.execute(f"DROP OWNED BY {owner} CASCADE")
            await admin.execute(f"DROP ROLE {owner}")
            await admin.close()

    @staticmethod
    async def _owns_nothing(admin: asyncpg.Connection, url: str, name: str) -> None:
        """The role of docs/how-to/production.md: it posts, and cannot switch off what keeps the books right."""
        page = (Path(__file__).parents[3] / "docs/how-to/production.md").read_text(encoding="utf-8")
        script = page.partition("### A role that owns nothing")[2].partition("```sql\n")[2].partition("```")[0]
        await admin.execute(script.replace("portico_app", name))
        app = Database(f"{url}&role={name}", PoolLimits(size=2))
        try:
            org = organization()
            await post(app, entry(org, f"{org}:1"))
            assert (await verification.everything(app)).fault is None
            await raw(app, f"GRANT UPDATE ON ledger_postings TO {name}")  # a warning: it is not this role's to give
            for statement in (
                "ALTER TABLE ledger_postings DISABLE TRIGGER written_once",
                "CREATE OR REPLACE FUNCTION finance_written_once() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
                "UPDATE ledger_postings SET amount_minor = 1",
                "DELETE FROM ledger_chains",
                "SET session_replication_role = replica",
            ):
                with pytest.raises(asyncpg.PostgresError, match=r"must be owner|permission denied"):
                    await raw(app, statement)
        finally:
            await app.close()
            await admin.execute(f"DROP OWNED BY {name} CASCADE")
            await admin.execute(f"DROP ROLE {name}")


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
