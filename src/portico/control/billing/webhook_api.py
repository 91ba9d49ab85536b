"""Routes of providers' webhooks: POST /billing/webhooks/{stripe|razorpay|paypal}, and /admin/billing-webhooks for operators."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from portico.control.access import Caller, Instant, InTx, Paging, Reading, anonymous, require_operator
from portico.control.billing import billing_store, reconcile, reconcile_store, webhook_replay
from portico.control.billing import webhook_store as store
from portico.control.billing.provider import NAMES, Name
from portico.control.billing.webhooks import Received, Webhooks
from portico.control.domains.lifecycle_api import ReplayBody, Replayed
from portico.control.domains.source_api import Reason, dangerous
from portico.control.requests import UnitOfWork
from portico.errors import Problem
from portico.kit import pages
from portico.kit.pages import Page

router = APIRouter(prefix="/billing/webhooks", tags=["billing"])
admin = APIRouter(prefix="/admin/billing-webhooks", tags=["admin"], route_class=UnitOfWork)

Operator = Annotated[Caller, Depends(require_operator())]
Id = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Word = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[\x20-\x7e]+$")]
State = Literal["received", "verified", "failed", "dead", "applied", "ignored"]
Asked = Annotated[Word | None, Query()]


# -- what providers call -------------------------------------------------------------------------------------------------


class WebhookTaken(BaseModel):
    """What became of the event. `duplicate`: it was here before; `ignored`: it is about another account or mode."""

    event: str
    status: Literal["accepted", "duplicate", "ignored"]


def _header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": {"type": "string"}}


_HEADERS: Final[dict[Name, list[dict[str, Any]]]] = {
    "stripe": [_header("Stripe-Signature", "`t=…,v1=…`: HMAC-SHA256 over time and body.")],
    "razorpay": [
        _header("X-Razorpay-Signature", "HMAC-SHA256 over the body, in hex."),
        _header("X-Razorpay-Event-Id", "The event's id, the same in every attempt."),
    ],
    "paypal": [
        _header("PayPal-Transmission-Id", "The delivery."),
        _header("PayPal-Transmission-Time", "When it was made."),
        _header("PayPal-Transmission-Sig", "RSA-SHA256 over id, time, webhook and CRC-32 of the body, in base64."),
        _header("PayPal-Cert-Url", "The certificate to check it by, at PayPal."),
        _header("PayPal-Auth-Algo", "`SHA256withRSA`."),
    ],
}


def _receiver(provider: Name) -> Callable[[Request], Awaitable[Response]]:
    # Without the usual ceremony, as this is asked a thousand times a second: nothing is solved, and the answer is not validated.
    async def receive(request: Request) -> Response:
        webhooks: Webhooks = request.app.state.billing_webhooks
        who = anonymous(request)
        fields: dict[str, str] = {}
        repeated = set()
        for raw, value in request.scope["headers"]:
            name = raw.decode("latin-1")
            if name in fields:
                repeated.add(name)
            fields[name] = value.decode("latin-1")
        received = Received(provider, fields, frozenset(repeated), await request.body(), who.address)
        taken = await webhooks.receive(who, received)
        document = json.dumps({"event": taken.event, "status": taken.status})
        return Response(document, 200 if taken.status == "duplicate" else 202, media_type="application/json")

    receive.__name__ = f"receive_{provider}"
    receive.__doc__ = "Take an event in. `202`: it is stored, and applied in a moment; `200`: it was stored before."
    return receive


for _name in NAMES:
    # The body is signed as it is: it is read there, and nothing parses it before its signature was checked.
    router.add_api_route(
        f"/{_name}",
        _receiver(_name),
        methods=["POST"],
        response_model=WebhookTaken,
        status_code=202,
        responses={200: {"model": WebhookTaken}},
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}},
            "parameters": _HEADERS[_name],
            "x-callers": ["anonymous"],
        },
    )


# -- what operators see and do -------------------------------------------------------------------------------------------


class BillingWebhook(BaseModel):
    """An event of a provider, and what has become of it. `failed`: it will be tried again at `next_attempt_at`."""

    id: str
    provider: Name
    account: str
    livemode: bool
    event_id: str
    type: str
    api_version: str | None
    occurred_at: datetime
    received_at: datetime
    origin: Literal["webhook", "reconcile"]
    proof: str | None
    sha256: str
    state: State
    reason: str | None
    effects: int
    attempts: int
    last_error: str | None
    next_attempt_at: datetime | None
    finished_at: datetime | None
    replays: int
    replayed_at: datetime | None


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WebhookFilter(_Body):
    """Which events; by default dead ones. A `type` that ends with `*` is a class of types: `invoice.*`."""

    provider: Name | None = None
    type: Word | None = None
    event_id: Word | None = None
    state: Literal["dead", "applied", "ignored"] | None = "dead"
    reason: Word | None = None
    error: Text | None = None
    since: Instant | None = None
    until: Instant | None = None


class ReplayWebhooksBody(_Body):
    """Apply again what fits `filter`, the oldest first; with `dry_run` nothing is applied, only counted."""

    filter: WebhookFilter = WebhookFilter()
    reason: Reason
    dry_run: bool = True
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class WebhookReconcileBody(_Body):
    """Compare with the provider's own list since a time (that of the last run, by default), and take in what is missing; with
    `dry_run` it is only counted."""

    provider: Name
    since: Instant | None = None
    reason: Reason
    dry_run: bool = True


class WebhookReconcileRun(BaseModel):
    """A run: what the provider's list had, what of it was `missing` here and was `added`; `foreign` is another account's."""

    id: str
    provider: Name
    since: datetime
    until: datetime
    dry_run: bool
    reason: str
    requested_by: str
    scheduled: bool
    state: Literal["queued", "done", "dead"]
    listed: int | None
    missing: int | None
    added: int | None
    foreign: int | None
    unreadable: int | None
    missing_events: list[str]
    last_error: str | None
    created_at: datetime
    finished_at: datetime | None


class WaitingEffect(BaseModel):
    """Something that an event told of and that cannot be applied yet. `needs`: any of these brings it, `customer:…` for
    example. At `gives_up_at` its event is `dead`."""

    effect: str
    provider: Name
    event_id: str
    kind: str
    needs: list[str]
    occurred_at: datetime
    waits_since: datetime
    gives_up_at: datetime


class WebhookHealth(BaseModel):
    """How a provider's events fared in the window that was looked at last. `broken_by` names what of the objective is broken."""

    provider: Name
    measured_at: datetime
    failed: int
    stale: int
    applied: int
    p95_seconds: float | None
    broken_by: Literal["failures", "staleness", "latency"] | None
    broken_since: datetime | None
    replayed_at: datetime | None
    replays: int


def _state(row: Any) -> str:
    if row.queue_state == "dead":
        return "dead"
    if row.queue_state == "pending" and row.last_error is not None:
        return "failed"
    return str(row.status)


def _shown(row: Any) -> dict[str, Any]:
    waits = row.queue_state == "pending" and row.lease_token is None
    return {
        "id": row.id, "provider": row.provider, "account": row.account, "livemode": row.livemode, "event_id": row.event_id,
        "type": row.event_type, "api_version": row.api_version, "occurred_at": row.occurred_at,
        "received_at": row.received_at, "origin": row.origin, "proof": row.proof, "sha256": row.raw_sha256.hex(),
        "state": _state(row), "reason": row.reason, "effects": row.effects, "attempts": row.attempts,
        "last_error": row.last_error, "next_attempt_at": row.available_at if waits else None,
        "finished_at": row.finished_at, "replays": row.replays, "replayed_at": row.replayed_at,
    }  # fmt: skip


def _run(row: Any) -> dict[str, Any]:
    return {
        "id": row.id, "provider": row.provider, "since": row.since, "until": row.until, "dry_run": row.dry_run,
        "reason": row.reason, "requested_by": row.requested_by, "scheduled": row.scheduled,
        "state": "queued" if row.queue_state == "pending" else row.queue_state, "listed": row.listed,
        "missing": row.missing, "added": row.added, "foreign": row.foreign_events, "unreadable": row.unreadable,
        "missing_events": row.missing_events or [], "last_error": row.last_error, "created_at": row.created_at,
        "finished_at": row.finished_at,
    }  # fmt: skip


@admin.get("", response_model=Page[BillingWebhook])
async def list_billing_webhooks(
    reader: Reading,
    who: Operator,
    page: Paging,
    provider: Annotated[Name | None, Query()] = None,
    event_type: Annotated[Word | None, Query(alias="type")] = None,
    event_id: Asked = None,
    state: Annotated[State | None, Query()] = None,
    reason: Asked = None,
    error: Annotated[Text | None, Query()] = None,
    since: Annotated[Instant | None, Query()] = None,
    until: Annotated[Instant | None, Query()] = None,
) -> Any:
    """Events of payment providers, the newest first."""
    filters = {
        "provider": provider, "event_type": event_type, "event_id": event_id, "state": state, "reason": reason, "error": error,
        "since": since, "until": until,
    }  # fmt: skip
    rows = await store.listing(reader, filters, page.limit + 1, page.after[0] if page.after else None)
    return pages.listing(rows, page.limit, lambda row: (row.id,), _shown)


@admin.post("/replay", response_model=Replayed)
async def replay_billing_webhooks(
    body: ReplayWebhooksBody,
    request: Request,
    tx: InTx,
    who: Annotated[Caller, dangerous("billing_webhook.replay_many")],
) -> Any:
    """Apply events again that fit a filter, or (`dry_run`, the default) say how many they are."""
    limit = min(body.limit, request.app.state.settings.billing_webhook_replay_max)
    filters = body.filter.model_dump()
    filters["event_type"] = filters.pop("type")
    return await webhook_replay.REPLAYS.many(tx, who, filters, body.reason, limit, dry_run=body.dry_run)


@admin.get("/health", response_model=list[WebhookHealth])
async def billing_webhook_health(reader: Reading, who: Operator) -> Any:
    """How the events of each provider fare, as it was last looked at."""
    return [dict(row._mapping) for row in await store.all_health(reader)]


@admin.get("/waiting", response_model=Page[WaitingEffect])
async def list_waiting_effects(
    request: Request, reader: Reading, who: Operator, page: Paging, provider: Annotated[Name | None, Query()] = None
) -> Any:
    """What waits for whose it is, or for the payment that it changes; the longest first."""
    age = timedelta(seconds=request.app.state.settings.billing_waiting_seconds)
    rows = await billing_store.waiting_listing(reader, provider, page.limit + 1, _after(page.after))

    def shown(row: Any) -> dict[str, Any]:
        return {
            "effect": row.effect_key.partition(" ")[2], "provider": row.provider, "event_id": row.event_id, "kind": row.kind,
            "needs": row.needs, "occurred_at": row.occurred_at, "waits_since": row.created_at,
            "gives_up_at": row.created_at + age,
        }  # fmt: skip

    return pages.listing(rows, page.limit, lambda row: (f"{row.created_at.isoformat()} {row.effect_key}",), shown)


def _after(cursor: tuple[str, ...] | None) -> tuple[datetime, str] | None:
    """Since when, and which; raises ``request.cursor_invalid``."""
    if cursor is None:
        return None
    text, _, effect = cursor[0].partition(" ")
    try:
        at = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise Problem("request.cursor_invalid") from None
    return at, effect


@admin.post("/reconcile", response_model=WebhookReconcileRun, status_code=202)
async def reconcile_billing_webhooks(
    body: WebhookReconcileBody,
    request: Request,
    tx: InTx,
    who: Annotated[Caller, dangerous("billing_webhook.reconcile")],
) -> Any:
    """Ask for a comparison with the provider's own list of events; a worker makes it."""
    state = request.app.state
    row = await reconcile.ask(
        tx, who, body.provider, body.since, body.reason, dry_run=body.dry_run, settings=state.settings, now=state.clock.wall()
    )  # fmt: skip
    return _run(row)


@admin.get("/reconcile", response_model=Page[WebhookReconcileRun])
async def list_reconcile_runs(reader: Reading, who: Operator, page: Paging) -> Any:
    """Comparisons with providers' lists, the newest first."""
    rows = await reconcile_store.listing(reader, page.limit + 1, page.after[0] if page.after else None)
    return pages.listing(rows, page.limit, lambda row: (row.id,), _run)


@admin.get("/{billing_webhook}", response_model=BillingWebhook)
async def get_billing_webhook(billing_webhook: Id, reader: Reading, who: Operator) -> Any:
    """One event."""
    row = await store.one(reader, billing_webhook)
    if row is None:
        raise Problem("billing.webhook_not_found")
    return _shown(row)


@admin.post("/{billing_webhook}/replay", response_model=Replayed)
async def replay_billing_webhook(
    billing_webhook: Id, body: ReplayBody, tx: InTx, who: Annotated[Caller, dangerous("billing_webhook.replay")]
) -> Any:
    """Apply one event again."""
    return await webhook_replay.one(tx, who, billing_webhook, body.reason)
