"""Invoices: numbers without gaps, histories in any order, what may not change, tax records, CSV and PDF."""

from __future__ import annotations

import asyncio
import csv
import io
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.billing import invoice_pdf, invoice_store, invoices, tax_ids
from portico.control.finance import balances, events, postings
from portico.control.finance.events import FinanceEvent, Line
from portico.control.identity.keys import issue
from portico.errors import Problem
from portico.kit.db import Database
from tests.control.conftest import Account
from tests.control.finance.making import AT, account, event, organization

_years = itertools.count(2031)


async def apply(db: Database, one: FinanceEvent) -> None:
    """As the applier does."""
    async with db.transaction() as tx:
        if not await events.record(tx, one):
            return
        await postings.post(tx, one)
        await invoices.follow(tx, one)


class Story:
    """Events of one organization at one provider account, on a day of one year."""

    def __init__(self, org: str | None = None, at: datetime = AT) -> None:
        self.org, self.account, self.at = org or organization(), account(), at

    def __call__(self, kind: str, ref: str = "in_1", **more: Any) -> FinanceEvent:
        common = {"account": self.account, "organization_id": self.org, "invoice_ref": ref, "occurred_at": self.at}
        return event(kind, **{**common, **more})

    def issued(self, ref: str = "in_1", gross: int = 1190, tax: int = 190, **more: Any) -> FinanceEvent:
        return self("invoice.issued", ref, amount_minor=gross, tax_minor=tax, **more)

    def paid(self, ref: str = "in_1", gross: int = 1190) -> FinanceEvent:
        return self("payment.succeeded", ref, payment_ref=f"pi_{ref}", amount_minor=gross)

    def refunded(self, name: str, gross: int, ref: str = "in_1") -> FinanceEvent:
        return self("refund.succeeded", ref, refund_ref=name, payment_ref=f"pi_{ref}", amount_minor=gross)


async def all_of(db: Database, org: str) -> list[Any]:
    async with db.read() as reader:
        return list(reversed(await invoice_store.listing(reader, org, {}, 100, None)))


async def notes_of(db: Database, invoice: str) -> list[Any]:
    async with db.read() as reader:
        return (await invoice_store.credits_of(reader, [invoice]))[invoice]


class TestNumbers:
    async def test_fifty_at_once_leave_no_gap(self, database_url: str) -> None:
        """Some of them fail between number and commit: their numbers go to the next."""
        db, year = Database(database_url), next(_years)
        at = datetime(year, 3, 1, tzinfo=UTC)

        async def finalize(n: int) -> None:
            story = Story(at=at)
            try:
                async with db.transaction() as tx:
                    one = story.issued()
                    await events.record(tx, one)
                    await invoices.issue(tx, one)
                    if n % 4 == 0:
                        raise RuntimeError("a crash between two lines")
            except RuntimeError:
                await apply(db, story.issued())

        try:
            await asyncio.gather(*(finalize(n) for n in range(50)))
            async with db.read() as reader:
                table = invoice_store.invoices
                rows = await reader.fetch_all(sa.select(table).where(table.c.year == year).order_by(table.c.sequence))
            assert [row.number for row in rows] == [f"INV-{year}-{n:06d}" for n in range(1, 51)]
        finally:
            await db.close()

    async def test_what_is_void_keeps_its_number_and_credit_notes_have_their_own(self, db: Database) -> None:
        story = Story(at=datetime(next(_years), 3, 1, tzinfo=UTC))
        for one in (
            story.issued(), story("invoice.voided"), story.issued("in_2"), story.paid("in_2"),
            story.refunded("re_1", 119, "in_2"), story("refund.updated", "in_2", refund_ref="re_1", status="failed"),
            story.refunded("re_2", 1190, "in_2"),
        ):  # fmt: skip
            await apply(db, one)
        first, second = await all_of(db, story.org)
        assert [(row.status, row.sequence) for row in (first, second)] == [("void", 1), ("paid", 2)]
        notes = await notes_of(db, second.id)
        assert [(n.status, n.number[:3], n.sequence, n.tax_minor) for n in notes] == [
            ("void", "CRN", 1, 19),
            ("issued", "CRN", 2, 190),
        ]
        assert (second.credited_minor, second.credited_tax_minor) == (1190, 190)

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE billing_invoices SET gross_minor = 1, net_minor = 1, tax_minor = 0 WHERE number IS NOT NULL",
            "UPDATE billing_invoices SET number = 'INV-1' WHERE number IS NOT NULL",
            "UPDATE billing_invoices SET customer = '{}' WHERE number IS NOT NULL",
            "DELETE FROM billing_invoices WHERE number IS NOT NULL",
            "UPDATE billing_number_series SET last = last + 2",
            "UPDATE billing_number_series SET last = last - 1",
            "DELETE FROM billing_number_series",
            "UPDATE billing_tax_records SET rate_bp = 0",
            "DELETE FROM billing_tax_records",
            "TRUNCATE billing_invoices",
        ],
    )
    async def test_what_has_a_number_does_not_change(self, db: Database, statement: str) -> None:
        await apply(db, Story(at=datetime(next(_years), 1, 1, tzinfo=UTC)).issued())
        with pytest.raises(Exception, match=r"does not change|no gaps|written once"):
            async with db.transaction() as tx:
                await tx.execute(sa.text(statement))

    @pytest.mark.parametrize(
        ("statement", "word"),
        [
            ("UPDATE billing_number_series SET last = last + 1 WHERE year = $1", "nothing has number 2"),
            ("INSERT INTO billing_number_series VALUES ('other', 'invoice', $1, 1)", "nothing has number 1"),
            (
                "INSERT INTO billing_invoices (id, organization_id, provider, account, livemode, provider_ref, status, entity_id,"
                " year, sequence, number, issued_at) VALUES ('x', 'x', 'x', 'x', true, 'x', 'open', 'default', $1, 7, 'INV-7',"
                " now())", "number INV-7 was not drawn",
            ),
        ],
    )  # fmt: skip
    async def test_a_number_is_that_of_a_document(self, db: Database, statement: str, word: str) -> None:
        """Whoever draws one and issues nothing, or issues without drawing, is refused at the commit."""
        year = next(_years)
        await apply(db, Story(at=datetime(year, 1, 1, tzinfo=UTC)).issued())
        with pytest.raises(Exception, match=word):
            async with db.transaction() as tx:
                await tx.raw.execute(statement, year)

    async def test_a_credit_is_an_invoice_below_zero_that_pays_the_next(self, db: Database) -> None:
        story = Story(at=datetime(next(_years), 3, 1, tzinfo=UTC))
        steps = [
            story("invoice.credited", "in_1", amount_minor=1190, tax_minor=-190), story.issued("in_2", 2380, 380),
            story("credit.applied", "in_2", amount_minor=1190, effect_key="credit.applied:stripe:in_2"),
            story.paid("in_2", 1190),
        ]  # fmt: skip
        for one in steps:
            await apply(db, one)
        first, second = await all_of(db, story.org)
        assert (first.status, first.gross_minor, first.tax_minor, first.net_minor) == ("paid", -1190, -190, -1000)
        assert (second.status, second.gross_minor, second.paid_minor) == ("paid", 2380, 2380)
        async with db.read() as reader:
            records = await invoice_store.tax_of(reader, first.id)
            for name in ("accounts_receivable", "customer_credit"):
                assert await balances.of(reader, name, "EUR", organization=story.org) == 0
        assert [(each.base_minor, each.tax_minor) for each in records] == [(-1000, -190)]
        assert invoice_pdf.invoice(first, records).startswith(b"%PDF-")


class TestAnyOrder:
    async def test_a_history_ends_in_the_same_invoices_in_any_order(self, db: Database) -> None:
        def history(story: Story) -> list[FinanceEvent]:
            return [
                story.issued(), story.paid(), story.refunded("re_1", 333), story.refunded("re_2", 334),
                story.refunded("re_3", 10), story("refund.failed", refund_ref="re_3", payment_ref="pi_in_1"),
                story.issued("in_2"), story("invoice.voided", "in_2"), story.issued("in_3", 500, 0),
                story("invoice.uncollectible", "in_3"), story.issued("in_4", 500, 80), story.paid("in_4", 200),
            ]  # fmt: skip

        async def outcome(order: list[int]) -> Any:
            story = Story()
            known = history(story)
            for at in order:
                await apply(db, known[at])
            rows = {row.provider_ref: row for row in await all_of(db, story.org)}
            notes = [note for note in await notes_of(db, rows["in_1"].id) if note.status == "issued"]
            async with db.read() as reader:
                owed = await balances.of(reader, "tax_payable", "EUR", organization=story.org)
            # The tax that invoices say, less what credit notes took back, is what the ledger owes.
            assert -owed == sum(r.tax_minor - r.credited_tax_minor for r in rows.values() if r.status != "void")
            states = {ref: (r.status, r.paid_minor, r.credited_minor, r.credited_tax_minor) for ref, r in rows.items()}
            return states, sorted(note.gross_minor for note in notes), sum(note.tax_minor for note in notes)

        wanted = await outcome(list(range(12)))
        assert wanted[0] == {
            "in_1": ("paid", 1190, 667, 106), "in_2": ("void", 0, 0, 0), "in_3": ("uncollectible", 0, 0, 0),
            "in_4": ("open", 200, 0, 0),
        }  # fmt: skip
        shuffled = random.Random(11)
        for _ in range(10):
            order = [*range(12), *shuffled.choices(range(12), k=4)]
            shuffled.shuffle(order)
            assert await outcome(order) == wanted

    async def test_what_nobody_issued_is_not_shown(self, db: Database) -> None:
        story = Story()
        await apply(db, story.paid())
        assert await all_of(db, story.org) == []


class TestTax:
    async def test_a_business_elsewhere_in_the_eu_owes_the_tax_itself(self, db: Database) -> None:
        story = Story()
        async with db.transaction() as tx:
            seller = {"name": "Portico", "country": "DE", "rates": {"DE": 1900, "FR": 2000}}
            await invoice_store.put_entity(tx, seller)
            found = tax_ids.check("AT", "u 1358 5627", AT)
            await invoice_store.put_profile(tx, story.org, {
                "name": "Test", "address": "", "country": "AT", "email": None, "tax_ids": [found],
            })  # fmt: skip
        try:
            await apply(db, story.issued(gross=1000, tax=0))
            (row,) = await all_of(db, story.org)
            async with db.read() as reader:
                (record,) = await invoice_store.tax_of(reader, row.id)
            assert (record.treatment, record.jurisdiction, record.base_minor, record.difference_minor) == (
                "reverse_charge",
                "AT",
                1000,
                0,
            )
            assert (record.customer_tax_id, record.evidence["how"]) == ("ATU13585627", "format")
            assert b"ATU13585627" in _text(invoice_pdf.invoice(row, [record]))
        finally:
            async with db.transaction() as tx:
                await invoice_store.put_entity(tx, {"country": None, "rates": {}})

    @pytest.mark.parametrize(("country", "value"), [("AT", "U13585626"), ("AT", "x"), ("DE", ""), ("ZZ", "123")])
    async def test_an_id_that_cannot_be_right_is_refused(self, country: str, value: str) -> None:
        with pytest.raises(Problem) as refused:
            tax_ids.check(country, value, AT)
        assert refused.value.code == "billing.tax_id_invalid"


def _text(pdf: bytes) -> bytes:
    """What a PDF says, roughly: its streams, unpacked."""
    import re
    import zlib

    found = b""
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.S):
        try:
            found += zlib.decompress(stream)
        except zlib.error:
            found += stream
    return found


class TestFiles:
    async def test_the_csv_has_no_formulas(self, db: Database, owner: Account) -> None:
        body = {"name": '=HYPERLINK("http://evil.example","x")', "country": "DE"}
        assert (await owner.client.put("/v1/billing/profile", json=body)).status_code == 200
        story = Story(owner.organization)
        await apply(db, story.issued("@in"))
        await apply(db, story.issued("in_2", -500, -80))
        answer = await owner.client.get("/v1/billing/invoices.csv")
        assert answer.headers["content-type"].startswith("text/csv")
        rows = list(csv.DictReader(io.StringIO(answer.text)))
        assert [(row["provider_ref"], row["gross_minor"]) for row in rows] == [("in_2", "-500"), ("'@in", "1190")]
        assert rows[0]["customer"] == '\'=HYPERLINK("http://evil.example","x")'

    async def test_a_name_in_a_pdf_is_only_a_name(self, db: Database) -> None:
        """Neither the mark that stands for the number of pages, nor characters that turn text around or end a string."""
        story = Story()
        name = "Evil {nb} \u202egpj.exe\x00 (a) Tj ET \\) {n{nb}b}"
        async with db.transaction() as tx:
            await invoice_store.put_profile(tx, story.org, {
                "name": name.replace("\x00", ""), "address": "A\u2066B", "country": None, "email": None, "tax_ids": [],
            })  # fmt: skip
        lines = (Line(name, 1, 1000, 1000, 190, None, None, None),)
        await apply(
            db, story.issued(lines=tuple(replace(each, description=name.replace("\x00", "")) for each in lines))
        )
        (row,) = await all_of(db, story.org)
        text = _text(invoice_pdf.invoice(row, []))
        assert b"{ nb}" in text and b"Evil 1 " not in text and b"{nb}" not in text
        assert "\u202e" not in invoice_pdf.without_controls(name) and "\x00" not in invoice_pdf.without_controls(name)
        sheet = invoice_pdf.Sheet("t", AT, "", None)
        sheet._own = True  # a font that knows every letter is given no control characters either
        assert sheet.words(name) == "Evil { nb} gpj.exe (a) Tj ET \\) {n{ nb}b}"

    async def test_a_pdf_of_many_lines_in_many_letters(self, db: Database) -> None:
        story = Story()
        lines = tuple(
            Line(f"Plan {n} – Größe, Łódź, 東京", 1, 10, 10, 1, 1900, AT, AT + timedelta(days=30)) for n in range(70)
        )
        await apply(db, story.issued(gross=770, tax=70, lines=lines))
        await apply(db, story.paid(gross=770))
        await apply(db, story.refunded("re_1", 77))
        (row,) = await all_of(db, story.org)
        async with db.read() as reader:
            records = await invoice_store.tax_of(reader, row.id)
        made = invoice_pdf.invoice(row, records)
        assert made.startswith(b"%PDF-") and made.rstrip().endswith(b"%%EOF")
        assert made.count(b"/Type /Page\n") >= 2
        (note,) = await notes_of(db, row.id)
        assert note.number.encode() in _text(invoice_pdf.credit_note(note, row, records))
        with pytest.raises(Problem) as refused:
            invoice_pdf.invoice(row, records, Path(__file__))
        assert refused.value.code == "config.invalid"


class TestApi:
    async def test_who_pays_sees_its_own(
        self, db: Database, owner: Account, stranger: Account, connect: Callable[..., httpx.AsyncClient], app: Any
    ) -> None:
        story = Story(owner.organization)
        lines = (Line("Pro", 1, 1000, 1000, 190, 1900, AT, AT + timedelta(days=30)),)
        for one in (story.issued(lines=lines), story.paid(), story.refunded("re_1", 119)):
            await apply(db, one)
        client = owner.client
        (row,) = (await client.get("/v1/billing/invoices", params={"status": "paid"})).json()["data"]
        detail = (await client.get(f"/v1/billing/invoices/{row['id']}")).json()
        assert [line["description"] for line in detail["lines"]] == ["Pro"]
        assert [(each["treatment"], each["rate_bp"], each["tax_minor"]) for each in detail["tax"]] == [
            ("standard", 1900, 190), ("standard", 1900, -19),
        ]  # fmt: skip
        note = detail["credit_notes"][0]
        for path in (f"invoices/{row['id']}/pdf", f"credit-notes/{note['id']}/pdf"):
            pdf = await client.get(f"/v1/billing/{path}")
            assert (pdf.status_code, pdf.headers["content-type"], pdf.content[:5]) == (200, "application/pdf", b"%PDF-")
            other = await stranger.client.get(f"/v1/billing/{path}")
            assert (other.status_code, other.json()["code"]) == (404, "billing.invoice_not_found")
        async with app.state.db.transaction() as tx:
            made = await issue(tx, app.state.clock.wall(), None, None, "operator", "test", [])
        operator = connect(made.key)
        listed = (await operator.get("/v1/admin/invoices", params={"organization": owner.organization})).json()["data"]
        assert [each["number"] for each in listed] == [row["number"]]
        none = await operator.put(
            f"/v1/admin/billing-profiles/{stranger.organization}/exemption", json={"exempt": True, "reason": "seen"}
        )
        assert (none.status_code, none.json()["code"]) == (404, "billing.profile_not_found")

    async def test_a_profile_and_an_exemption(
        self, db: Database, owner: Account, connect: Callable[..., httpx.AsyncClient], app: Any
    ) -> None:
        empty = (await owner.client.get("/v1/billing/profile")).json()
        assert (empty["name"], empty["exempt"]) == ("", False)
        bad = await owner.client.put(
            "/v1/billing/profile",
            json={"name": "X", "country": "AT", "tax_ids": [{"country": "AT", "value": "U13585626"}]},
        )
        assert (bad.status_code, bad.json()["code"]) == (400, "billing.tax_id_invalid")
        hidden = await owner.client.put("/v1/billing/profile", json={"name": "X\u202egpj"})
        assert hidden.status_code == 422
        assert (await owner.client.put("/v1/billing/profile", json={"name": "X", "address": "A\r\nB"})).json()[
            "address"
        ] == "A\nB"
        async with app.state.db.transaction() as tx:
            made = await issue(tx, app.state.clock.wall(), None, None, "operator", "test", [])
        operator = connect(made.key)
        path = f"/v1/admin/billing-profiles/{owner.organization}/exemption"
        assert (await operator.put(path, json={"exempt": True, "reason": "certificate seen"})).json()["exempt"] is True
        # The customer itself cannot say so, and what it says does not take it back.
        assert (await owner.client.put("/v1/billing/profile", json={"name": "Y", "exempt": True})).status_code == 422
        assert (await owner.client.put("/v1/billing/profile", json={"name": "Y"})).json()["exempt"] is True
        story = Story(owner.organization)
        await apply(db, story.issued(gross=1000, tax=0))
        (row,) = (await owner.client.get("/v1/billing/invoices")).json()["data"]
        detail = (await owner.client.get(f"/v1/billing/invoices/{row['id']}")).json()
        assert [each["treatment"] for each in detail["tax"]] == ["exempt"]
        assert detail["customer"]["name"] == "Y"
        seller = (await operator.get("/v1/admin/billing-seller")).json()
        body = {"name": "Seller", "address": "Street 1", "country": "DE", "tax_id": "DE136695976", "email": None}
        changed = (await operator.put("/v1/admin/billing-seller", json={**body, "rates": {"DE": 1900}})).json()
        assert (seller["name"], changed["name"], changed["rates"]) == ("Portico", "Seller", {"DE": 1900})
