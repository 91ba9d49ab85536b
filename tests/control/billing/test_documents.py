"""Documents against the ledger: what somebody changed in an invoice, a credit note or a series beside the code is found."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from portico.control.billing import books
from portico.kit.db import Database
from tests.control.billing.test_invoices import Story, apply

AT = datetime(2041, 3, 1, tzinfo=UTC)


async def history(db: Database) -> None:
    """An invoice that a credit and a card pay, and of which something is given back; one that is void; one of nothing."""
    story = Story(at=AT)
    for one in (
        story("invoice.credited", "in_0", amount_minor=119, tax_minor=-19), story.issued(),
        story("credit.applied", amount_minor=119, effect_key="credit.applied:stripe:in_1"), story.paid(gross=1071),
        story.refunded("re_1", 333), story.refunded("re_2", 334),
        story("refund.failed", refund_ref="re_2", payment_ref="pi_in_1"),
        story.issued("in_2", 500, 80), story("invoice.voided", "in_2"), story.issued("in_3", 0, 0), story.issued("in_4", 700, 0),
        story("invoice.uncollectible", "in_4"),
    ):  # fmt: skip
        await apply(db, one)


async def fault(db: Database) -> Any:
    return (await books.look(db)).fault


@pytest.mark.parametrize(
    ("damage", "place", "word"),
    [
        ("UPDATE billing_invoices SET status = 'paid' WHERE provider_ref = 'in_4'", "invoice", "its status does not follow"),
        ("UPDATE billing_invoices SET paid_minor = 700 WHERE provider_ref = 'in_4'", "invoice", "700 was paid, the ledger 0"),
        ("UPDATE billing_invoices SET status = 'void' WHERE provider_ref = 'in_1'", "invoice", "its status does not follow"),
        ("UPDATE billing_invoices SET credited_minor = 0 WHERE provider_ref = 'in_1'", "invoice", "was not credited"),
        (
            "UPDATE billing_invoices SET gross_minor = gross_minor + 1, net_minor = net_minor + 1 WHERE provider_ref = 'in_1'",
            "invoice", "is not of the amount",
        ),
        ("DELETE FROM billing_invoices WHERE provider_ref = 'in_2'", "series invoice 2041", "has 4 of 5 numbers"),
        ("DELETE FROM billing_credit_notes WHERE refund_ref = 're_2'", "series credit_note 2041", "has 1 of 2 numbers"),
    ],
)  # fmt: skip
async def test_it_is_found(db: Database, damage: str, place: str, word: str) -> None:
    async with db.transaction() as tx:
        await tx.raw.execute("SET LOCAL session_replication_role = replica")
        for table in ("billing_invoices", "billing_credit_notes", "billing_number_series"):
            await tx.raw.execute(f"DELETE FROM {table}")
    await history(db)
    assert await fault(db) is None
    async with db.transaction() as tx:
        await tx.raw.execute("SET LOCAL session_replication_role = replica")
        await tx.raw.execute(damage)
    found = await fault(db)
    assert found is not None and found.place.startswith(place) and word in found.detail
