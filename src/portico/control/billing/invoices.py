"""Invoices: what the platform says that a customer owes, made from what the payment provider charged.

    pending ─issue─► open ─pay─► paid          void and uncollectible from any of them; void is the last word

The applier calls these once for each finance event that it has recorded. They may come in any order: a payment, a void or a
refund that is known before its invoice makes a ``pending`` one, which nobody is shown, and the issue settles it. An invoice gets
its number when it is issued, with the seller, the customer and the tax of that moment; none of that changes afterwards.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any, Final

from portico.control.billing import credit_notes, invoice_numbers, tax, tax_ids
from portico.control.billing import invoice_store as store
from portico.control.finance import events, postings
from portico.control.finance.events import FinanceEvent, Line
from portico.kit.db import Tx
from portico.kit.ids import new_id


async def issue(tx: Tx, event: FinanceEvent) -> str | None:
    """Give the invoice of ``event`` its number and contents; its id, or ``None`` when it was issued before, or is nobody's."""
    held = await hold(tx, event)
    if held is None or held.number is not None:
        return None
    event = postings.as_issued(event)
    seller, profile = await store.entity(tx), await store.profile(tx, held.organization_id)
    gross, charged = event.amount_minor or 0, event.tax_minor or 0
    lines = _lines(event, gross - charged, charged)
    number = await invoice_numbers.draw(tx, seller, "invoice", event.occurred_at)
    row = await store.change(
        tx, held.id, **number.columns, currency=event.currency, gross_minor=gross, tax_minor=charged,
        net_minor=gross - charged, lines=[_plain(line) for line in lines], seller=_seller(seller),
        customer=_customer(profile), period_start=event.period_start, period_end=event.period_end,
        issued_at=event.occurred_at, provider_number=event.invoice_number,
        subscription_ref=event.subscription_ref or held.subscription_ref, plan_ref=event.plan_ref or held.plan_ref,
    )  # fmt: skip
    await _record_tax(tx, row, seller, profile, lines)
    await _settle(tx, row)
    await credit_notes.settle(tx, row.id)
    return str(row.id)


async def pay(tx: Tx, event: FinanceEvent) -> None:
    """Count a payment, or what the customer had to its credit."""
    if (row := await hold(tx, event)) is not None:
        paid_at = event.occurred_at if row.paid_at is None else max(row.paid_at, event.occurred_at)
        row = await store.change(tx, row.id, paid_minor=row.paid_minor + (event.amount_minor or 0), paid_at=paid_at)
        await _settle(tx, row)


async def void(tx: Tx, event: FinanceEvent) -> None:
    """Take it back. It keeps its number, or gets one if it is issued later."""
    if (row := await hold(tx, event)) is not None and row.voided_at is None:
        await _settle(tx, await store.change(tx, row.id, voided_at=event.occurred_at))


async def uncollectible(tx: Tx, event: FinanceEvent) -> None:
    """Say that nobody expects it to be paid; a payment is counted all the same."""
    if (row := await hold(tx, event)) is not None and row.uncollectible_at is None:
        await _settle(tx, await store.change(tx, row.id, uncollectible_at=event.occurred_at))


async def credit(tx: Tx, event: FinanceEvent) -> str | None:
    """Make the credit note of a refund, or void it when the refund failed; its id once it has a number."""
    row = await hold(tx, event)
    return None if row is None else await credit_notes.of_refund(tx, row, event)


async def follow(tx: Tx, event: FinanceEvent) -> None:
    """Whatever ``event``, which is recorded and posted, means for invoices; nothing for most."""
    verb = _VERBS.get(postings.kind_of(event))
    if verb is not None:
        await verb(tx, event)


_VERBS: Final[Mapping[str, Callable[[Tx, FinanceEvent], Awaitable[Any]]]] = {
    "invoice.issued": issue,
    "invoice.credited": issue,
    "credit.applied": pay,
    "invoice.voided": void,
    "invoice.uncollectible": uncollectible,
    "payment.succeeded": pay,
    "refund.succeeded": credit,
    "refund.failed": credit,
}


async def hold(tx: Tx, event: FinanceEvent) -> Any:
    """The invoice that ``event`` is about, locked; ``None`` when it is about none, or nobody's."""
    reference = event.invoice_ref or event.payment_ref
    if reference is None or event.organization_id is None:
        return None
    key = {"provider": event.provider, "account": event.account, "livemode": event.livemode, "provider_ref": reference}
    new = {
        "id": new_id("inv"), "organization_id": event.organization_id, "status": "pending",
        "subscription_ref": event.subscription_ref, "plan_ref": event.plan_ref,
    }  # fmt: skip
    return await store.hold(tx, key, new)


async def _settle(tx: Tx, row: Any) -> None:
    """Bring the status to what is known."""
    status = status_of(row)
    if status != row.status:
        await store.change(tx, row.id, status=status)


def status_of(row: Any) -> str:
    """The status that follows from everything that is known of an invoice, in whatever order it became known."""
    if row.number is None:
        return "pending"
    if row.voided_at is not None:
        return "void"
    if row.paid_minor >= row.gross_minor:
        return "paid"
    return "uncollectible" if row.uncollectible_at is not None else "open"


# -- contents ------------------------------------------------------------------------------------------------------------


def _lines(event: FinanceEvent, net: int, charged: int) -> list[Line]:
    """The lines, which sum to the invoice: one for the whole where the provider names none, one more for what is left."""
    lines = list(event.lines)
    left_net = net - sum(line.net_minor for line in lines)
    left_tax = charged - sum(line.tax_minor for line in lines)
    if left_net or left_tax or not lines:
        about = "Adjustment" if lines else "Subscription"
        period = event.period_start, event.period_end
        lines.append(Line(about, 1, left_net, left_net, left_tax, None, *period, kind="plan"))
    return lines


def _plain(line: Line) -> dict[str, Any]:
    return {name: events.plain(value) for name, value in asdict(line).items()}


def _seller(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("name", "address", "country", "tax_id", "email", "footer")}


def _customer(row: Any) -> dict[str, Any]:
    if row is None:
        return {"name": "", "address": "", "country": None, "email": None, "tax_ids": []}
    return {
        "name": row.name, "address": row.address, "country": row.country, "email": row.email,
        "tax_ids": [each["value"] for each in row.tax_ids],
    }  # fmt: skip


async def _record_tax(tx: Tx, row: Any, seller: Any, profile: Any, lines: list[Line]) -> None:
    """A record of each line."""
    found = tax_ids.best(profile)
    customer = tax.Customer()
    if profile is not None:
        customer = tax.Customer(profile.country, found["value"] if found else None, profile.exempt)
    wanted = tax.assess(seller.country, seller.rates, customer)
    records = []
    for at, line in enumerate(lines):
        taxed = tax.record(at, line.net_minor, line.tax_minor, line.tax_rate_bp, wanted, seller.rounding)
        records.append(row_of(taxed, row, None, found, seller.rounding))
    await store.add_tax(tx, records)


def row_of(taxed: tax.TaxedLine, invoice: Any, note: str | None, evidence: Any, rounding: str) -> dict[str, Any]:
    """A row of ``billing_tax_records``."""
    return {
        "id": new_id("tax"), "organization_id": invoice.organization_id, "invoice_id": invoice.id, "credit_note_id": note,
        "line": taxed.line, "jurisdiction": taxed.assessment.jurisdiction, "treatment": taxed.assessment.treatment,
        "rate_bp": taxed.assessment.rate_bp, "currency": invoice.currency, "base_minor": taxed.base_minor,
        "tax_minor": taxed.tax_minor, "difference_minor": taxed.difference_minor,
        "customer_tax_id": evidence["value"] if evidence else None, "evidence": evidence or {}, "rounding": rounding,
    }  # fmt: skip
