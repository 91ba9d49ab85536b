"""Finance events: recorded once by effect, whoever tells them, and chained."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from portico.control.finance import events, store, verification
from portico.control.finance.events import Line
from portico.kit.db import Database
from portico.kit.pages import PageRequest
from tests.control.finance.making import AT, account, event, organization


async def record(db: Database, one: events.FinanceEvent) -> bool:
    async with db.transaction() as tx:
        return await events.record(tx, one)


class TestRecord:
    async def test_an_effect_is_recorded_once(self, db: Database) -> None:
        one = event(
            "payment.succeeded", account=account(), organization_id=organization(), payment_ref="pi_1", amount_minor=5
        )
        assert await record(db, one)
        assert not await record(db, one)
        # A captured body that comes again under another id has no effect either.
        assert not await record(db, replace(one, event_id="evt_other", received_at=AT + timedelta(hours=1)))
        # The other mode, another account and another provider are other effects.
        assert await record(db, replace(one, livemode=True))
        assert await record(db, replace(one, account=account()))
        assert await record(db, replace(one, provider="paypal"))

    async def test_many_tell_the_same_at_once(self, db: Database) -> None:
        one = event(
            "payment.succeeded", account=account(), organization_id=organization(), payment_ref="pi_1", amount_minor=5
        )
        assert sorted(await asyncio.gather(*(record(db, one) for _ in range(8)))) == [False] * 7 + [True]

    async def test_an_event_comes_back_as_it_went_in(self, db: Database) -> None:
        east = timezone(timedelta(hours=5, minutes=30))
        line = Line("Pro", 2, 1000, 2000, 380, 1900, AT, AT.astimezone(east), "proration")
        one = event(
            "invoice.issued", account=account(), organization_id=organization(), invoice_ref="in_1", amount_minor=2380,
            tax_minor=380, lines=(line,), is_final_attempt=False, occurred_at=datetime(2026, 11, 10, 1, 2, 3, 4, UTC),
        )  # fmt: skip
        assert await record(db, one)
        async with db.read() as reader:
            rows = await store.events_stretch(reader, one.organization_id or "", 1, 10)
        assert [events.of_row(row._mapping) for row in rows] == [one]

    @pytest.mark.parametrize(
        "change",
        [
            {"provider": "square"},
            {"effect_key": ""},
            {"raw_sha256": b"short"},
            {"occurred_at": AT.replace(tzinfo=None)},
            {"amount_minor": 2**53},
            {"amount_minor": True},
            {"currency": "eur"},
            {"lines": (events.Line("x", 1, 5, 2**53, 0, None, None, None),)},
            {"lines": (events.Line("x", 1, 5, 5, 0.5, None, None, None),)},  # type: ignore[arg-type]
            {"currency": None},
        ],
    )
    async def test_what_is_no_event(self, change: dict[str, Any]) -> None:
        one = event("payment.succeeded", payment_ref="pi_1", amount_minor=5)
        events.check(one)
        with pytest.raises(ValueError):
            events.check(replace(one, **change))

    async def test_kinds_of_what_is_known(self, db: Database) -> None:
        mine = account()
        one = event("refund.updated", account=mine, organization_id=organization(), refund_ref="re_1", status="failed")
        await record(db, one)
        async with db.read() as reader:
            assert await events.kinds(reader, one, refund_ref="re_1") == [("refund.updated", "failed")]
            assert await events.kinds(reader, replace(one, livemode=True), refund_ref="re_1") == []
            with pytest.raises(ValueError):
                await events.kinds(reader, one, plan_ref="x")


class TestChain:
    @pytest.mark.parametrize(
        ("damage", "word"),
        [
            (
                "UPDATE billing_finance_events SET amount_minor = 1 WHERE chain = $1 AND seq = 2",
                "is not what was written",
            ),
            ("DELETE FROM billing_finance_events WHERE chain = $1 AND seq = 2", "is missing"),
            ("DELETE FROM billing_finance_events WHERE chain = $1 AND seq = 3", "its head says 3"),
            ("UPDATE billing_finance_events SET seq = seq + 10 WHERE chain = $1 AND seq = 3", "is missing"),
        ],
    )
    async def test_damage_by_who_can_switch_the_triggers_off_is_found(
        self, db: Database, damage: str, word: str
    ) -> None:
        org, mine = organization(), account()
        for n in range(3):
            await record(
                db,
                event("payment.failed", account=mine, organization_id=org, invoice_ref=f"in_{n}", amount_minor=n + 5),
            )
        async with db.read(snapshot=True) as reader:
            assert (await verification.verify(reader, org, store.EVENTS)).fault is None
        async with db.transaction() as tx:
            await tx.raw.execute("SET LOCAL session_replication_role = replica")  # what only a superuser may
            await tx.raw.execute(damage, org)
        async with db.read(snapshot=True) as reader:
            fault = (await verification.verify(reader, org, store.EVENTS)).fault
            assert fault is not None and word in fault.detail
            assert await verification.verify_all(reader) is not None
        async with db.transaction() as tx:
            await tx.raw.execute("SET LOCAL session_replication_role = replica")
            await tx.raw.execute("DELETE FROM billing_finance_events WHERE chain = $1", org)
            await tx.raw.execute("DELETE FROM ledger_chains WHERE chain = $1", org)


class TestListing:
    async def test_pages_and_filters(self, db: Database) -> None:
        org, mine = organization(), account()
        for n in range(3):
            at = AT + timedelta(days=n)
            await record(
                db, event("payment.failed", account=mine, organization_id=org, invoice_ref=f"in_{n}", occurred_at=at)
            )
        async with db.read() as reader:
            first, cursor = await events.listing(reader, org, PageRequest(2), {})
            assert [row["invoice_ref"] for row in first] == ["in_2", "in_1"]
            assert cursor is not None
            late, _ = await events.listing(
                reader, org, PageRequest(), {"since": AT + timedelta(days=1), "until": AT + timedelta(days=2)}
            )
            assert [row["invoice_ref"] for row in late] == ["in_1"]
            none, _ = await events.listing(reader, org, PageRequest(), {"kind": "payment.succeeded"})
            assert none == []
