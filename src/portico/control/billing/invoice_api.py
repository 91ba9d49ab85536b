"""Routes of invoices: /billing/invoices and /billing/profile for who pays, /admin/invoices and who sells for operators."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from portico.control.access import Caller, Db, Instant, InTx, Paging, Reading, require, require_operator
from portico.control.audit import service as audit
from portico.control.billing import invoice_csv, tax_ids
from portico.control.billing import invoice_store as store
from portico.control.requests import JsonRoute, UnitOfWork, shown
from portico.errors import Problem
from portico.kit import pages
from portico.kit.pages import Page

router = APIRouter(prefix="/billing", tags=["billing"], route_class=UnitOfWork)
admin = APIRouter(prefix="/admin", tags=["admin"], route_class=UnitOfWork)
#: Routes that take connections themselves: none is held while a PDF is made, or a client is slow.
files = APIRouter(prefix="/billing", tags=["billing"], route_class=JsonRoute)
routers = (files, router, admin)

Payer = Annotated[Caller, Depends(require("billing:read"))]
Operator = Annotated[Caller, Depends(require_operator())]
Id = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Status = Literal["open", "paid", "void", "uncollectible"]
_LINE = StringConstraints(max_length=200, strip_whitespace=True)
Name = Annotated[str, _LINE, AfterValidator(shown)]
Country = Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}$")]
Email = Annotated[
    str, StringConstraints(max_length=254, pattern=r"^[^@\s\x00-\x1f]+@[^@\s\x00-\x1f]+$"), AfterValidator(shown)
]
TaxText = Annotated[str, StringConstraints(min_length=2, max_length=32, pattern=r"^[A-Za-z0-9 ./-]+$")]


def _block(text: str) -> str:
    """Text of several lines, none of which shows as something else than it says."""
    lines = [shown(line.strip()) for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(line for line in lines if line)


Block = Annotated[str, StringConstraints(max_length=1000), AfterValidator(_block)]


class InvoiceLine(BaseModel):
    """A line, in minor units of the invoice's currency."""

    description: str
    quantity: int
    unit_minor: int
    net_minor: int
    tax_minor: int
    tax_rate_bp: int | None
    period_start: datetime | None
    period_end: datetime | None
    kind: Literal["plan", "proration", "overage"]


class TaxRecord(BaseModel):
    """How a line is taxed: whose tax, why, and what was charged beyond what the seller's rate says."""

    line: int
    jurisdiction: str
    treatment: Literal["standard", "reverse_charge", "exempt", "zero", "out_of_scope"]
    rate_bp: int
    base_minor: int
    tax_minor: int
    difference_minor: int
    customer_tax_id: str | None
    credit_note_id: str | None


class CreditNote(BaseModel):
    """A refund of an invoice. Amounts are what was given back, not negative."""

    id: str
    number: str
    status: Literal["issued", "void"]
    net_minor: int
    tax_minor: int
    gross_minor: int
    issued_at: datetime
    voided_at: datetime | None


class InvoiceFacts(BaseModel):
    """An invoice. Amounts are minor units of `currency`; `credited_minor`: what credit notes gave back."""

    id: str
    number: str
    status: Status
    currency: str
    net_minor: int
    tax_minor: int
    gross_minor: int
    paid_minor: int
    credited_minor: int
    provider: str
    provider_ref: str
    provider_number: str | None
    period_start: datetime | None
    period_end: datetime | None
    issued_at: datetime
    paid_at: datetime | None
    voided_at: datetime | None


class AdminInvoice(InvoiceFacts):
    """The same, with whose it is."""

    organization_id: str
    account: str
    livemode: bool


class Party(BaseModel):
    """Seller or customer as the invoice names them."""

    name: str
    address: str
    country: str | None
    email: str | None
    tax_ids: list[str]


class InvoiceDetail(InvoiceFacts):
    """One invoice with everything on it."""

    seller: Party
    customer: Party
    lines: list[InvoiceLine]
    tax: list[TaxRecord]
    credit_notes: list[CreditNote]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TaxIdBody(_Body):
    """A tax id and the country that gave it."""

    country: Country
    value: TaxText


class ProfileBody(_Body):
    """Whom invoices are made out to. Invoices of before keep what they say."""

    name: Name
    address: Block = ""
    country: Country | None = None
    email: Email | None = None
    tax_ids: Annotated[list[TaxIdBody], Field(max_length=5)] = []


class TaxIdFacts(BaseModel):
    """A tax id; `how`: by what it was checked (`format`: it follows its country's rules, the register was not asked)."""

    country: str
    value: str
    valid: bool
    how: str
    checked_at: datetime


class ProfileFacts(BaseModel):
    """Whom invoices are made out to. `exempt`: an operator has seen a certificate."""

    name: str
    address: str
    country: str | None
    email: str | None
    tax_ids: list[TaxIdFacts]
    exempt: bool
    updated_at: datetime | None


class ExemptionBody(_Body):
    """Whether the organization is exempt from tax, and what was seen."""

    exempt: bool
    reason: Annotated[
        str, StringConstraints(min_length=1, max_length=500, strip_whitespace=True), AfterValidator(shown)
    ]


class SellerBody(_Body):
    """Who sells: what invoices say from now on. `rates`: basis points by country."""

    name: Annotated[Name, Field(min_length=1)]
    address: Block
    country: Country | None
    tax_id: TaxText | None
    email: Email | None
    footer: Block = ""
    invoice_prefix: Annotated[str, StringConstraints(pattern=r"^[A-Z0-9]{1,12}$")] = "INV"
    credit_note_prefix: Annotated[str, StringConstraints(pattern=r"^[A-Z0-9]{1,12}$")] = "CRN"
    rounding: Literal["half_up", "half_even", "down"] = "half_up"
    rates: Annotated[dict[Country, Annotated[int, Field(ge=0, le=10_000)]], Field(max_length=250)] = {}


class SellerFacts(BaseModel):
    """Who sells: what the next invoice says."""

    name: str
    address: str
    country: str | None
    tax_id: str | None
    email: str | None
    footer: str
    invoice_prefix: str
    credit_note_prefix: str
    rounding: Literal["half_up", "half_even", "down"]
    rates: dict[str, int]
    updated_at: datetime


# -- invoices ------------------------------------------------------------------------------------------------------------


async def filters(
    status: Annotated[Status | None, Query()] = None,
    since: Annotated[Instant | None, Query(description="Issued at this time or later")] = None,
    until: Annotated[Instant | None, Query(description="Issued before this time")] = None,
) -> dict[str, Any]:
    """Dependency: which invoices a list shows."""
    return {"status": status, "since": since, "until": until}


Filters = Annotated[dict[str, Any], Depends(filters)]


@files.get(
    "/invoices.csv",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
)
async def export_invoices(db: Db, who: Payer, filters: Filters) -> StreamingResponse:
    """The organization's invoices as CSV, the newest first. Text that a spreadsheet would take for a formula begins with `'`."""
    head = {"Content-Disposition": 'attachment; filename="invoices.csv"'}
    return StreamingResponse(invoice_csv.stream(db, who.org, filters), media_type="text/csv", headers=head)


_PDF: dict[int | str, dict[str, Any]] = {200: {"content": {"application/pdf": {"schema": {"type": "string"}}}}}


@files.get("/invoices/{invoice}/pdf", response_class=Response, responses=_PDF)
async def invoice_as_pdf(invoice: Id, request: Request, db: Db, who: Payer) -> Response:
    """An invoice as PDF."""
    async with db.read() as reader:
        row = await _invoice(reader, invoice, who.org)
        records = await store.tax_of(reader, invoice)
    font = request.app.state.settings.invoice_font_file
    return _pdf(row.number, await asyncio.to_thread(_draw, "invoice", row, records, font))


@files.get("/credit-notes/{credit_note}/pdf", response_class=Response, responses=_PDF)
async def credit_note_as_pdf(credit_note: Id, request: Request, db: Db, who: Payer) -> Response:
    """A credit note as PDF."""
    async with db.read() as reader:
        note = await store.credit_note(reader, credit_note, who.org)
        if note is None:
            raise Problem("billing.invoice_not_found")
        row = await _invoice(reader, note.invoice_id, who.org)
        records = await store.tax_of(reader, row.id)
    font = request.app.state.settings.invoice_font_file
    return _pdf(note.number, await asyncio.to_thread(_draw, "credit note", note, row, records, font))


def _draw(what: Literal["invoice", "credit note"], *facts: Any) -> bytes:
    """In a thread: reading in what draws is a tenth of an API's start, for a file that is asked for now and then."""
    from portico.control.billing import invoice_pdf

    draw: dict[str, Callable[..., bytes]] = {"invoice": invoice_pdf.invoice, "credit note": invoice_pdf.credit_note}
    return draw[what](*facts)


def _pdf(number: str, content: bytes) -> Response:
    head = {"Content-Disposition": f'attachment; filename="{number}.pdf"', "Cache-Control": "no-store"}
    return Response(content, media_type="application/pdf", headers=head)


@router.get("/invoices", response_model=Page[InvoiceFacts])
async def list_invoices(reader: Reading, who: Payer, page: Paging, filters: Filters) -> Any:
    """The organization's invoices, the newest first."""
    rows = await store.listing(reader, who.org, filters, page.limit + 1, page.after[0] if page.after else None)
    return pages.listing(rows, page.limit, lambda row: (row.id,), _facts)


@router.get("/invoices/{invoice}", response_model=InvoiceDetail)
async def get_invoice(invoice: Id, reader: Reading, who: Payer) -> Any:
    """One invoice with its lines, its tax and its credit notes."""
    row = await _invoice(reader, invoice, who.org)
    notes = (await store.credits_of(reader, [invoice]))[invoice]
    return {
        **_facts(row), "seller": _party(row.seller), "customer": _party(row.customer), "lines": row.lines,
        "tax": [each._asdict() for each in await store.tax_of(reader, invoice)],
        "credit_notes": [each._asdict() for each in notes],
    }  # fmt: skip


@admin.get("/invoices", response_model=Page[AdminInvoice])
async def list_all_invoices(
    reader: Reading,
    who: Operator,
    page: Paging,
    filters: Filters,
    organization: Annotated[str | None, Query(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")] = None,
) -> Any:
    """Invoices of all organizations, the newest first."""
    wanted = {**filters, "organization": organization}
    rows = await store.listing(reader, None, wanted, page.limit + 1, page.after[0] if page.after else None)
    return pages.listing(rows, page.limit, lambda row: (row.id,), _facts)


async def _invoice(reader: Any, invoice: str, organization: str) -> Any:
    row = await store.one(reader, invoice, organization)
    if row is None:
        raise Problem("billing.invoice_not_found")
    return row


def _facts(row: Any) -> dict[str, Any]:
    return dict(row._mapping)


def _party(stored: dict[str, Any]) -> dict[str, Any]:
    ids = stored.get("tax_ids") or ([stored["tax_id"]] if stored.get("tax_id") else [])
    return {**stored, "tax_ids": ids}


# -- who buys, who sells -------------------------------------------------------------------------------------------------


@router.get("/profile", response_model=ProfileFacts)
async def get_billing_profile(reader: Reading, who: Payer) -> Any:
    """Whom the organization's invoices are made out to."""
    return _profile(await store.profile(reader, who.org))


@router.put("/profile", response_model=ProfileFacts)
async def put_billing_profile(
    body: ProfileBody,
    request: Request,
    tx: InTx,
    who: Annotated[Caller, Depends(require("billing:write", act="billing_profile.change"))],
) -> Any:
    """Say whom invoices are made out to, from the next one on. Tax ids are checked by their country's rules."""
    now = request.app.state.clock.wall()
    ids = [tax_ids.check(each.country, each.value, now) for each in body.tax_ids]
    values = {**body.model_dump(exclude={"tax_ids"}), "tax_ids": ids}
    row = await store.put_profile(tx, who.org, values)
    details = {"country": body.country, "tax_ids": len(ids)}
    await audit.record(tx, who, "billing_profile.change", who.org, details=details)
    return _profile(row)


@admin.put("/billing-profiles/{organization}/exemption", response_model=ProfileFacts)
async def put_tax_exemption(
    organization: Id,
    body: ExemptionBody,
    tx: InTx,
    who: Annotated[Caller, Depends(require_operator(step_up=True, act="billing_profile.exempt"))],
) -> Any:
    """Say whether an organization is exempt from tax, from its next invoice on."""
    row = await store.put_exemption(tx, organization, body.exempt)
    if row is None:
        raise Problem("billing.profile_not_found")
    details = {"exempt": body.exempt, "reason": body.reason}
    await audit.record(tx, who, "billing_profile.exempt", organization, details=details, organization=organization)
    return _profile(row)


def _profile(row: Any) -> dict[str, Any]:
    if row is None:
        names = ("name", "address", "country", "email", "tax_ids", "exempt", "updated_at")
        return dict(zip(names, ("", "", None, None, [], False, None), strict=True))
    return dict(row._mapping)


@admin.get("/billing-seller", response_model=SellerFacts)
async def get_seller(reader: Reading, who: Operator) -> Any:
    """Who sells, as the next invoice says it."""
    return dict((await store.entity(reader))._mapping)


@admin.put("/billing-seller", response_model=SellerFacts)
async def put_seller(
    body: SellerBody,
    tx: InTx,
    who: Annotated[Caller, Depends(require_operator(step_up=True, act="billing_seller.change"))],
) -> Any:
    """Say who sells, from the next invoice on. Another prefix goes on with the same count."""
    row = await store.put_entity(tx, body.model_dump())
    details = {"country": body.country, "rates": len(body.rates)}
    await audit.record(tx, who, "billing_seller.change", None, details=details, organization=audit.INSTALLATION)
    return dict(row._mapping)
