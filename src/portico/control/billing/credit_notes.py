"""Credit notes: each refund of an invoice is one, with a number of a series of its own.

The tax in it is the invoice's share of what was refunded, worked out from the total of all credit notes; so many small refunds
take back exactly the invoice's tax, as in the ledger. A refund that failed after all voids its credit note, which keeps its
number; one that failed before it got a number never gets one.
"""

from __future__ import annotations

from typing import Any

from portico.control.billing import invoice_numbers
from portico.control.billing import invoice_store as store
from portico.control.finance import postings
from portico.control.finance.events import FinanceEvent
from portico.kit.db import Tx
from portico.kit.ids import new_id


async def of_refund(tx: Tx, invoice: Any, event: FinanceEvent) -> str | None:
    """Count a refund of an invoice that the caller holds, or its failure; the credit note once it has a number."""
    if event.refund_ref is None:
        return None
    key = {
        "provider": event.provider,
        "account": event.account,
        "livemode": event.livemode,
        "refund_ref": event.refund_ref,
    }
    new = {
        "id": new_id("crn"),
        "organization_id": invoice.organization_id,
        "status": "pending",
        "invoice_id": invoice.id,
    }
    row = await store.hold_credit(tx, key, new)
    if postings.kind_of(event) == "refund.failed":
        if row.status != "void":
            await store.change_credit(tx, row.id, status="void", voided_at=event.occurred_at)
            if row.status == "issued":
                await _count(tx, invoice, -row.gross_minor, -row.tax_minor)
        return None
    if row.number is None and row.status == "pending" and row.gross_minor == 0:
        amounts = {
            "gross_minor": event.amount_minor or 0,
            "net_minor": event.amount_minor or 0,
            "currency": event.currency,
        }
        await store.change_credit(tx, row.id, **amounts, created_at=event.occurred_at)
    await settle(tx, invoice.id)
    return str(row.id)


async def settle(tx: Tx, invoice_id: str) -> None:
    """Number the credit notes of an invoice that has been issued."""
    invoice = await store.held_by_id(tx, invoice_id)
    if invoice is None or invoice.number is None:
        return
    seller = await store.entity(tx, invoice.entity_id)
    for row in await store.pending_credits(tx, invoice_id):
        if not row.gross_minor:
            continue
        gross = invoice.credited_minor + row.gross_minor
        tax = postings.share(gross, invoice.tax_minor, invoice.gross_minor) - invoice.credited_tax_minor
        number = await invoice_numbers.draw(tx, seller, "credit_note", row.created_at)
        await store.change_credit(
            tx, row.id, **number.columns, status="issued", tax_minor=tax, net_minor=row.gross_minor - tax,
            currency=invoice.currency, issued_at=row.created_at,
        )  # fmt: skip
        await _record_tax(tx, invoice, row, tax)
        invoice = await _count(tx, invoice, row.gross_minor, tax)


async def _count(tx: Tx, invoice: Any, gross: int, tax: int) -> Any:
    """Keep the totals of what was credited."""
    sums = {"credited_minor": invoice.credited_minor + gross, "credited_tax_minor": invoice.credited_tax_minor + tax}
    return await store.change(tx, invoice.id, **sums)


async def _record_tax(tx: Tx, invoice: Any, row: Any, tax: int) -> None:
    """Take back what the invoice's records say, in one record: of the treatment that most of it had."""
    records = await store.tax_of(tx, invoice.id)
    own = [each for each in records if each.credit_note_id is None]
    main = max(own, key=lambda each: (abs(each.tax_minor), abs(each.base_minor)))
    await store.add_tax(tx, [{
        "id": new_id("tax"), "organization_id": invoice.organization_id, "invoice_id": invoice.id, "credit_note_id": row.id,
        "line": 0, "jurisdiction": main.jurisdiction, "treatment": main.treatment, "rate_bp": main.rate_bp,
        "currency": invoice.currency, "base_minor": -(row.gross_minor - tax), "tax_minor": -tax, "difference_minor": 0,
        "customer_tax_id": main.customer_tax_id, "evidence": main.evidence, "rounding": main.rounding,
    }])  # fmt: skip
