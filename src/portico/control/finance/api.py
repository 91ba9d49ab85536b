"""Routes of finance: /billing/finance-events for who pays; for operators /admin/finance-events, /admin/ledger, /admin/revenue."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict

from portico.control.access import Caller, Db, Instant, InTx, Paging, Reading, require, require_operator
from portico.control.audit import service as audit
from portico.control.finance import accounts, balances, events, ledger, revenue, seals, verification
from portico.control.requests import JsonRoute, UnitOfWork
from portico.errors import Problem
from portico.kit import pages
from portico.kit.pages import Page
from portico.settings import ApiSettings

billing = APIRouter(prefix="/billing", tags=["billing"], route_class=UnitOfWork)
admin = APIRouter(prefix="/admin", tags=["admin"], route_class=UnitOfWork)
#: Routes that open a snapshot themselves.
looking = APIRouter(prefix="/admin", tags=["admin"], route_class=JsonRoute)
routers = (billing, admin, looking)

Operator = Annotated[Caller, Depends(require_operator())]
_ID = r"^[A-Za-z0-9_.:-]+$"
Organization = Annotated[str | None, Query(max_length=64, pattern=_ID, description="Only of this organization")]
Kind = Annotated[str | None, Query(max_length=64, pattern=r"^[a-z_]+\.[a-z_]+$")]
ProviderName = Literal["stripe", "razorpay", "paypal", "platform"]


class FinanceLine(BaseModel):
    """A line of an invoice, in minor units of the event's currency."""

    description: str
    quantity: int
    unit_minor: int
    net_minor: int
    tax_minor: int
    tax_rate_bp: int | None
    period_start: datetime | None
    period_end: datetime | None
    kind: Literal["plan", "proration", "overage"]


class OwnFinanceEvent(BaseModel):
    """What happened to money or to the subscription, as the provider told it. Amounts are minor units; `_ref`: the
    provider's ids."""

    id: str
    provider: ProviderName
    livemode: bool
    kind: str
    occurred_at: datetime
    recorded_at: datetime
    subscription_ref: str | None
    invoice_ref: str | None
    payment_ref: str | None
    refund_ref: str | None
    dispute_ref: str | None
    status: str | None
    plan_ref: str | None
    amount_minor: int | None
    tax_minor: int | None
    currency: str | None
    period_start: datetime | None
    period_end: datetime | None
    failure_code: str | None
    invoice_number: str | None
    lines: list[FinanceLine]


class FinanceEventFacts(OwnFinanceEvent):
    """The same as operators see it: with what the provider kept, where it came from, and its place in the hash chain."""

    organization_id: str | None
    account: str
    event_id: str
    event_type: str
    api_version: str | None
    effect_key: str
    customer_ref: str | None
    payout_ref: str | None
    checkout_ref: str | None
    cancel_at_period_end: bool | None
    fee_minor: int | None
    net_minor: int | None
    attempt: int | None
    next_attempt_at: datetime | None
    is_final_attempt: bool | None
    object_version: int
    received_at: datetime
    raw_sha256: str
    chain: str
    seq: int
    hash: str


async def filters(
    kind: Kind = None,
    provider: Annotated[ProviderName | None, Query()] = None,
    since: Annotated[Instant | None, Query()] = None,
    until: Annotated[Instant | None, Query()] = None,
) -> dict[str, Any]:
    """Dependency: which events a list shows; times are those at which something happened."""
    return {"kind": kind, "provider": provider, "since": since, "until": until}


Filters = Annotated[dict[str, Any], Depends(filters)]


def _event(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "raw_sha256": row["raw_sha256"].hex(), "hash": row["hash"].hex()}


@billing.get("/finance-events", response_model=Page[OwnFinanceEvent])
async def list_own_finance_events(
    reader: Reading, who: Annotated[Caller, Depends(require("billing:read"))], page: Paging, filters: Filters
) -> Any:
    """What happened to the organization's money and subscription, the newest first."""
    rows, cursor = await events.listing(reader, who.org, page, filters)
    return {"data": [_event(row) for row in rows], "next_cursor": cursor}


@admin.get("/finance-events", response_model=Page[FinanceEventFacts])
async def list_finance_events(
    reader: Reading, who: Operator, page: Paging, filters: Filters, organization: Organization = None
) -> Any:
    """Finance events of all organizations, the newest first."""
    rows, cursor = await events.listing(reader, organization, page, filters)
    return {"data": [_event(row) for row in rows], "next_cursor": cursor}


# -- the ledger ----------------------------------------------------------------------------------------------------------


class PostingFacts(BaseModel):
    """One side of a transaction: a debit is positive, a credit negative."""

    account: str
    currency: str
    amount_minor: int
    provider: str | None
    invoice_ref: str | None


class TransactionFacts(BaseModel):
    """A transaction of the ledger. `booked_on`: the day that it counts for. `number`: over all organizations."""

    id: str
    number: int
    key: str
    kind: str
    organization_id: str | None
    booked_on: date
    occurred_at: datetime
    recorded_at: datetime
    provider: str | None
    subscription_ref: str | None
    invoice_ref: str | None
    payment_ref: str | None
    plan_ref: str | None
    source: str | None
    reverses: str | None
    note: str | None
    seq: int
    hash: str
    postings: list[PostingFacts]


@admin.get("/ledger/transactions", response_model=Page[TransactionFacts])
async def list_ledger_transactions(
    reader: Reading,
    who: Operator,
    page: Paging,
    organization: Organization = None,
    kind: Kind = None,
    invoice: Annotated[str | None, Query(max_length=255, pattern=_ID, description="The provider's id of it")] = None,
) -> Any:
    """Transactions of the ledger with their postings, the newest first."""
    before = None
    if page.after:
        if not (page.after[0].isascii() and page.after[0].isdigit() and len(page.after[0]) < 16):
            raise Problem("request.cursor_invalid")
        before = int(page.after[0])
    rows = await ledger.listing(reader, organization, page.limit + 1, before, {"kind": kind, "invoice": invoice})
    kept, cursor = pages.page(rows, page.limit, lambda row: (str(row.number),))
    posted = await ledger.postings_of(reader, [row.id for row in kept])
    data = [
        {
            **row._mapping,
            "hash": row.hash.hex(),
            "postings": [{name: getattr(each, name) for name in ledger.POSTED} for each in posted[row.id]],
        }
        for row in kept
    ]
    return {"data": data, "next_cursor": cursor}


class AccountBalance(BaseModel):
    """An account in a currency. `balance_minor` is debits less credits, `natural_minor` the same with the account's own sign."""

    account: str
    number: int
    title: str
    type: str
    currency: str
    debit_minor: int
    credit_minor: int
    balance_minor: int
    natural_minor: int


class TrialBalance(BaseModel):
    """Every account that has postings. The balances of a currency sum to zero."""

    data: list[AccountBalance]


@admin.get("/ledger/trial-balance", response_model=TrialBalance)
async def trial_balance(
    reader: Reading,
    who: Operator,
    organization: Organization = None,
    since: Annotated[date | None, Query(description="Booked on this day or later")] = None,
    until: Annotated[date | None, Query(description="Booked before this day")] = None,
) -> Any:
    """The trial balance, of all organizations or of one."""
    found = await balances.trial(reader, until=until, since=since, organization=organization)
    return {"data": [_balance(each) for each in found]}


def _balance(each: balances.Balance) -> dict[str, Any]:
    account = accounts.known(each.account)
    return {
        "account": each.account, "number": account.number, "title": account.title, "type": account.type,
        "currency": each.currency, "debit_minor": each.debit_minor, "credit_minor": each.credit_minor,
        "balance_minor": each.balance_minor,
        "natural_minor": each.balance_minor if account.debit else -each.balance_minor,
    }  # fmt: skip


class LedgerFault(BaseModel):
    """The first thing that is not as it was written: where, and what."""

    place: str
    detail: str


class ChainVerification(BaseModel):
    """What checking a stretch of a chain found. `next` is where to go on; null at its end, or at a fault."""

    chain: str
    log: Literal["events", "ledger"]
    valid: bool
    last: int
    next: int | None
    fault: LedgerFault | None


@looking.get("/ledger/verify", response_model=ChainVerification)
async def verify_ledger(
    request: Request,
    db: Db,
    who: Operator,
    chain: Annotated[
        str, Query(max_length=64, pattern=_ID, description="An organization, or `platform`")
    ] = events.PLATFORM,
    log: Annotated[Literal["events", "ledger"], Query()] = "ledger",
    first: Annotated[int, Query(ge=1, le=2**53 - 1, alias="from")] = 1,
) -> Any:
    """Check a stretch of the hash chain of an organization's transactions, or of its finance events.

    The answer is 200 for a broken chain, too: `valid` and `fault` say what is wrong.
    """
    settings: ApiSettings = request.app.state.settings
    async with db.read(snapshot=True) as reader:
        walk, ended = await verification.stretch(reader, chain, log, first, settings.ledger_verify_rows)
    fault = walk.fault and {"place": walk.fault.place, "detail": walk.fault.detail}
    following = None if ended or fault else walk.seq + 1
    return {"chain": chain, "log": log, "valid": not fault, "last": walk.seq, "next": following, "fault": fault}


# -- seals ---------------------------------------------------------------------------------------------------------------


class SealTotal(BaseModel):
    """What an account moved by in the period, and held at its end: debits less credits."""

    account: str
    currency: str
    movement_minor: int
    closing_minor: int


class SealFacts(BaseModel):
    """A sealed period: from `starts_on` up to, not including, `ends_on`. Keep `hash` where this platform cannot write."""

    starts_on: date
    ends_on: date
    transactions: int
    totals: list[SealTotal]
    digest: str
    previous: str
    hash: str
    sealed_by: str
    sealed_at: datetime


class Seals(BaseModel):
    """Every seal, the oldest first; `valid`: the ledger still is what they say, else `fault` is the first difference."""

    data: list[SealFacts]
    valid: bool
    fault: LedgerFault | None


class SealBody(BaseModel):
    """Close everything before this day."""

    model_config = ConfigDict(extra="forbid")

    ends_on: date


def _seal(row: Any) -> dict[str, Any]:
    names = ("account", "currency", "movement_minor", "closing_minor")
    return {
        "starts_on": row.starts_on, "ends_on": row.ends_on, "transactions": row.transactions,
        "totals": [dict(zip(names, each, strict=True)) for each in row.totals], "digest": row.digest.hex(),
        "previous": row.previous.hex(), "hash": row.hash.hex(), "sealed_by": row.sealed_by, "sealed_at": row.sealed_at,
    }  # fmt: skip


@looking.get("/ledger/seals", response_model=Seals)
async def list_seals(db: Db, who: Operator) -> Any:
    """Every sealed period, each compared with the ledger as it is now."""
    async with db.read(snapshot=True) as reader:
        rows = await seals.every(reader)
        found = await seals.verify_seals(reader)
    fault = found and {"place": found.place, "detail": found.detail}
    return {"data": [_seal(row) for row in rows], "valid": not fault, "fault": fault}


@admin.post("/ledger/seals", response_model=SealFacts, status_code=201)
async def seal_period(
    body: SealBody,
    request: Request,
    tx: InTx,
    who: Annotated[Caller, Depends(require_operator(step_up=True, act="ledger.seal"))],
) -> Any:
    """Close a period for good: nothing is booked before that day any more. Its days must be over and recognized."""
    row = await seals.seal(tx, body.ends_on, who.id, request.app.state.clock.wall())
    details = {"ends_on": body.ends_on.isoformat(), "hash": row.hash.hex()}
    await audit.record(tx, who, "ledger.seal", None, details=details, organization=audit.INSTALLATION)
    return _seal(row)


# -- revenue -------------------------------------------------------------------------------------------------------------


class RevenueDay(BaseModel):
    """A day by plan and currency. `net_minor`: gross less refunds, tax and fees; `deferred_minor`: newly invoiced, to be
    recognized; `recognized_minor`: delivered on that day."""

    day: date
    plan_ref: str
    currency: str
    gross_minor: int
    refund_minor: int
    tax_minor: int
    fee_minor: int
    net_minor: int
    recognized_minor: int
    deferred_minor: int


class RevenueDays(BaseModel):
    """Days in order."""

    data: list[RevenueDay]


class MrrMovement(BaseModel):
    """Movements of one kind in a currency, summed."""

    currency: str
    kind: Literal["new", "expansion", "contraction", "churn", "reactivation"]
    delta_minor: int
    movements: int


class MrrFacts(BaseModel):
    """Monthly recurring revenue at the start and end of a time; the movements between sum to the difference."""

    start: dict[str, int]
    end: dict[str, int]
    movements: list[MrrMovement]


Since = Annotated[date, Query(description="The first day")]
Until = Annotated[date, Query(description="The day after the last")]


def _check_span(since: date, until: date, most: int) -> None:
    if not 0 < (until - since).days <= most:
        raise Problem("revenue.span_invalid", f"from {since} to {until} is not 1 to {most} days", limit=most)


@admin.get("/revenue/daily", response_model=RevenueDays)
async def revenue_by_day(
    request: Request, reader: Reading, who: Operator, since: Since, until: Until, organization: Organization = None
) -> Any:
    """Revenue by day, plan and currency, as far as it was worked out (every few minutes)."""
    _check_span(since, until, request.app.state.settings.revenue_days)
    rows = await revenue.daily(reader, since, until, organization)
    return {"data": [row._asdict() for row in rows]}


@admin.get("/revenue/mrr", response_model=MrrFacts)
async def revenue_mrr(request: Request, reader: Reading, who: Operator, since: Since, until: Until) -> Any:
    """How monthly recurring revenue moved."""
    _check_span(since, until, request.app.state.settings.revenue_days)
    rows = await revenue.movement_totals(reader, since, until)
    return {
        "start": await revenue.mrr(reader, since),
        "end": await revenue.mrr(reader, until),
        "movements": [row._asdict() for row in rows],
    }
