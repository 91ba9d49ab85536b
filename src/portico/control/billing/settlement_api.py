"""Routes of settlement: ``POST /v1/billing/settlement-receipts`` for sinks, /admin/settlements and their sinks for operators."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from portico.control.access import Caller, Instant, InTx, Paging, Reading, anonymous, require_operator
from portico.control.billing import settlement as settlements
from portico.control.billing.settlement import KEY_ID, Settlements
from portico.control.billing.settlement_body import Currency, Ref
from portico.control.requests import JsonRoute, UnitOfWork, shown
from portico.kit import signing
from portico.kit.pages import Page

router = APIRouter(prefix="/billing", tags=["billing"])
admin = APIRouter(prefix="/admin/settlements", tags=["admin"], route_class=UnitOfWork)
#: It opens its transactions itself: reading what was imported takes longer than one may be open.
importing = APIRouter(prefix="/admin/settlements", tags=["admin"], route_class=JsonRoute)
sinks = APIRouter(prefix="/admin/settlement-sinks", tags=["admin"], route_class=UnitOfWork)
routers = (router, importing, admin, sinks)


async def service(request: Request) -> Settlements:
    """Dependency: the process's settlements."""
    found: Settlements = request.app.state.settlements
    return found


Service = Annotated[Settlements, Depends(service)]
Operator = Annotated[Caller, Depends(require_operator())]
Id = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=80, strip_whitespace=True), AfterValidator(shown)]
Reason = Annotated[str, StringConstraints(min_length=1, max_length=500, strip_whitespace=True), AfterValidator(shown)]
Url = Annotated[str, StringConstraints(min_length=1, max_length=2048, pattern=r"^https?://\S+$")]
State = Literal["received", "verified", "matched", "delta", "failed", "resolved"]
ProviderName = Literal["stripe", "razorpay", "paypal", "platform"]


def _dangerous(act: str) -> Any:
    return Depends(require_operator(step_up=True, act=act))


# -- sinks send ----------------------------------------------------------------------------------------------------------


class ReceiptTaken(BaseModel):
    """What became of a receipt. `duplicate`: it was here before; `superseded`: a later version of its batch was."""

    receipt: str
    status: Literal["accepted", "duplicate", "superseded"]


def _header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": {"type": "string"}}


# The body is signed as it is: it is read here, and nothing parses it before its signature was checked.
_SHAPE: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object", "description": "See docs/reference/settlement.md."}}},
    },
    "parameters": [
        _header("Webhook-Key-Id", "The sink, `snk_…`."),
        _header("Webhook-Id", "The message's id, the same in every attempt."),
        _header("Webhook-Timestamp", "Seconds since 1970 of this attempt."),
        _header("Webhook-Signature", "`v1,` and base64 of HMAC-SHA256 over `id.timestamp.body`."),
    ],
    "x-callers": ["anonymous"],
}  # fmt: skip


@router.post(
    "/settlement-receipts", response_model=ReceiptTaken, status_code=202, openapi_extra=_SHAPE,
    responses={200: {"model": ReceiptTaken}},
)  # fmt: skip
async def receive_receipt(request: Request) -> Response:
    """Take a receipt in, signed by its sink (Standard Webhooks). `202`: it is stored, and compared in a moment; `200`: it was
    stored before."""
    taking: Settlements = request.app.state.settlements
    names = (KEY_ID, signing.ID, signing.TIMESTAMP, signing.SIGNATURE)
    # Of a field that is there twice two programs could believe different ones: neither is read.
    fields = {name: found[0] for name in names if len(found := request.headers.getlist(name)) == 1}
    taken = await taking.receive(anonymous(request), fields, await request.body())
    document = json.dumps({"receipt": taken.receipt, "status": taken.status})
    return Response(document, 202 if taken.status == "accepted" else 200, media_type="application/json")


# -- operators -----------------------------------------------------------------------------------------------------------


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ReasonBody(_Body):
    """Why; it is kept in the audit log."""

    reason: Reason


class ReconcileBody(_Body):
    """Which receipts are compared again, and why."""

    reason: Reason
    state: State | None = None
    sink: Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    provider: ProviderName | None = None
    batch: Ref | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class ResolveBody(_Body):
    """How a delta is closed. `accepted`: what is left of it is written into the ledger as an adjusting entry. `disputed`:
    with the sink, and nothing is written."""

    resolution: Literal["accepted", "disputed"]
    reason: Reason


class ImportBody(_Body):
    """Rows of a provider's own: balance transactions of Stripe, settlement recon rows of Razorpay, as its API gives them."""

    provider: Literal["stripe", "razorpay"]
    account: Ref
    livemode: bool
    batch_id: Ref
    period_start: Instant
    period_end: Instant
    rows: Annotated[list[dict[str, Any]], Field(max_length=1_000_000)]


class SinkBody(_Body):
    """A sink to make. `url`: where reports for it are sent, if any are."""

    name: Label
    url: Url | None = None


class SinkChange(_Body):
    """What to change. `tolerances`: minor units by currency that amounts may differ by without that being a delta."""

    url: Url | None = None
    tolerances: dict[Currency, Annotated[int, Field(ge=0, le=1_000_000_000)]] | None = None


class RotateSinkBody(_Body):
    """How many seconds the secrets before are good for; 0 when one of them is known to others."""

    overlap_seconds: Annotated[int, Field(ge=0, le=2_592_000)] | None = None


class Sink(BaseModel):
    """A finance system outside: it is sent reports, and says what was settled."""

    id: str
    name: str
    url: str | None
    state: Literal["active", "disabled"]
    tolerances: dict[str, int]
    created_by: str
    created_at: datetime
    updated_at: datetime


class SinkWithSecret(Sink):
    """A sink and its new secret, which is shown this once."""

    secret: str


class Settlement(BaseModel):
    """A receipt. `deltas`: by currency, theirs less ours in minor units and in basis points of our net, less what was adjusted;
    `findings`: how many lines are `missing`, `extra`, or off in `amount`, `fee`, `currency` or `fx`."""

    id: str
    sink: str | None
    batch_id: str
    revision: int
    state: State
    reason: str | None
    resolution: Literal["accepted", "disputed", "superseded"] | None
    superseded_by: str | None
    provider: str
    account: str
    livemode: bool
    period_start: datetime
    period_end: datetime
    export_id: str | None
    issued_at: datetime
    received_at: datetime
    reconciled_at: datetime | None
    checked_at: datetime | None
    runs: int
    sha256: str
    deltas: dict[str, dict[str, int | None]]
    findings: dict[str, int]
    adjusted: dict[str, int]
    pending: bool
    error: str | None


class SettlementReport(Settlement):
    """A receipt with what its latest comparison came to."""

    report: dict[str, Any] | None


class SettlementRun(BaseModel):
    """What a comparison came to that came to something new."""

    number: int
    verdict: Literal["matched", "delta", "failed"]
    cause: str
    recorded: int
    at: datetime
    sha256: str
    report: dict[str, Any]


class Requeued(BaseModel):
    """Which receipts are compared again."""

    receipts: list[str]


@admin.get("", response_model=Page[Settlement])
async def list_settlements(
    reader: Reading,
    service: Service,
    who: Operator,
    page: Paging,
    state: Annotated[State | None, Query()] = None,
    sink: Annotated[str | None, Query(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")] = None,
    provider: Annotated[ProviderName | None, Query()] = None,
    batch: Annotated[str | None, Query(max_length=128, pattern=r"^[\x21-\x7e]+$")] = None,
) -> Any:
    """Receipts, the newest first."""
    return await service.listing(reader, {"state": state, "sink": sink, "provider": provider, "batch": batch}, page)


@admin.post("/reconcile", status_code=202, response_model=Requeued)
async def reconcile_settlements(
    body: ReconcileBody, tx: InTx, service: Service,
    who: Annotated[Caller, Depends(require_operator(act="settlement.reconcile_many"))],
) -> Any:  # fmt: skip
    """Compare receipts again that fit."""
    filters = {"state": body.state, "sink": body.sink, "provider": body.provider, "batch": body.batch}
    return {"receipts": await service.again_many(tx, who, filters, body.reason, body.limit)}


@importing.post("/import", status_code=202, response_model=ReceiptTaken)
async def import_settlement(
    body: ImportBody, service: Service, who: Annotated[Caller, _dangerous("settlement.receive")]
) -> Any:
    """Take rows of a provider as a receipt."""
    taken = await service.imported(
        who, body.provider, body.rows, batch_id=body.batch_id, account=body.account, livemode=body.livemode,
        period_start=body.period_start, period_end=body.period_end,
    )  # fmt: skip
    return {"receipt": taken.receipt, "status": taken.status}


@admin.get("/{settlement}", response_model=SettlementReport)
async def get_settlement(settlement: Id, reader: Reading, who: Operator) -> Any:
    """One receipt with its latest report."""
    return await settlements.document(reader, settlement)


@admin.get("/{settlement}/runs", response_model=Page[SettlementRun])
async def list_settlement_runs(settlement: Id, reader: Reading, service: Service, who: Operator, page: Paging) -> Any:
    """What its comparisons came to, the newest first."""
    return await service.history(reader, settlement, page)


@admin.post("/{settlement}/reconcile", status_code=202, response_model=Settlement)
async def reconcile_settlement(
    settlement: Id, body: ReasonBody, tx: InTx, service: Service,
    who: Annotated[Caller, Depends(require_operator(act="settlement.reconcile"))],
) -> Any:  # fmt: skip
    """Compare a receipt again."""
    return await service.again(tx, who, settlement, body.reason)


@admin.post("/{settlement}/resolve", response_model=Settlement)
async def resolve_settlement(
    settlement: Id, body: ResolveBody, tx: InTx, service: Service,
    who: Annotated[Caller, _dangerous("settlement.resolve")],
) -> Any:  # fmt: skip
    """Close a delta."""
    return await service.resolve(tx, who, settlement, body.resolution, body.reason)


@sinks.get("", response_model=Page[Sink])
async def list_sinks(reader: Reading, service: Service, who: Operator, page: Paging) -> Any:
    """Sinks, the oldest first."""
    return await service.sinks.listing(reader, page)


@sinks.post("", status_code=201, response_model=SinkWithSecret)
async def create_sink(
    body: SinkBody, tx: InTx, service: Service, who: Annotated[Caller, _dangerous("settlement_sink.create")]
) -> Any:
    """Let a system send receipts."""
    return await service.sinks.create(tx, who, body.name, body.url)


@sinks.patch("/{settlement_sink}", response_model=Sink)
async def change_sink(
    settlement_sink: Id, body: SinkChange, tx: InTx, service: Service,
    who: Annotated[Caller, _dangerous("settlement_sink.change")],
) -> Any:  # fmt: skip
    """Change where its reports go, and what it may differ by."""
    return await service.sinks.change(tx, who, settlement_sink, url=body.url, tolerances=body.tolerances)


@sinks.post("/{settlement_sink}/rotate", response_model=SinkWithSecret)
async def rotate_sink(
    settlement_sink: Id, body: RotateSinkBody, tx: InTx, service: Service,
    who: Annotated[Caller, _dangerous("settlement_sink.rotate")],
) -> Any:  # fmt: skip
    """A new secret. Those before it are good until their overlap ends."""
    return await service.sinks.rotate(tx, who, settlement_sink, body.overlap_seconds)


@sinks.post("/{settlement_sink}/disable", response_model=Sink)
async def disable_sink(
    settlement_sink: Id, body: ReasonBody, tx: InTx, service: Service,
    who: Annotated[Caller, _dangerous("settlement_sink.disable")],
) -> Any:  # fmt: skip
    """Believe nothing from it any more."""
    return await service.sinks.set_state(tx, who, settlement_sink, "disabled", body.reason)


@sinks.post("/{settlement_sink}/enable", response_model=Sink)
async def enable_sink(
    settlement_sink: Id, body: ReasonBody, tx: InTx, service: Service,
    who: Annotated[Caller, _dangerous("settlement_sink.enable")],
) -> Any:  # fmt: skip
    """Believe it again."""
    return await service.sinks.set_state(tx, who, settlement_sink, "active", body.reason)
