"""Routes of what an organization pays: /billing/subscription, /billing/checkout-sessions, /billing/payments, /billing/refunds.

Those that ask a provider for something write it down in one transaction, ask with none open, and answer from what was recorded;
an ``Idempotency-Key`` makes them the same act however often they are sent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import date, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from portico.control.access import Caller, Db, Paging, Reading, require, require_operator
from portico.control.billing import billing_store, checkout_store
from portico.control.billing.checkout import Checkouts, Purchase, current
from portico.control.billing.service import Billing
from portico.control.requests import Repeatable, UnitOfWork, shown, writing
from portico.control.tunnels.standing import month_of
from portico.errors import Problem
from portico.kit import pages
from portico.kit.db import Reader, Tx
from portico.kit.pages import Page

router = APIRouter(prefix="/billing", tags=["billing"], route_class=UnitOfWork)
asking = APIRouter(prefix="/billing", tags=["billing"], route_class=Repeatable)
of_operators = APIRouter(prefix="/admin/refunds", tags=["admin"], route_class=Repeatable)


async def service(request: Request) -> Billing:
    """Dependency: the process's billing."""
    found: Billing = request.app.state.billing
    return found


Service = Annotated[Billing, Depends(service)]
Reads = Annotated[Caller, Depends(require("billing:read"))]
Writes = Annotated[Caller, Depends(require("billing:write", act="subscription.write"))]
Refunder = Annotated[Caller, Depends(require("billing:write", act="refund.create"))]
Operator = Annotated[Caller, Depends(require_operator(step_up=True, act="refund.create"))]
PlanId = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
ProviderName = Literal["stripe", "razorpay", "paypal"]
Url = Annotated[str, StringConstraints(min_length=1, max_length=2048), Field(json_schema_extra={"format": "uri"})]
Reason = Annotated[str, StringConstraints(min_length=1, max_length=500, strip_whitespace=True), AfterValidator(shown)]
PaymentId = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Minor = Annotated[int, Field(gt=0, le=2**53 - 1, strict=True)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CheckoutBody(_Body):
    """What to buy, of whom, and where the provider's page leads afterwards (https, or this machine)."""

    plan: PlanId
    provider: ProviderName
    success_url: Url
    cancel_url: Url


class CancelBody(_Body):
    """When to end, and why if you like."""

    at_period_end: bool = True
    reason: Reason | None = None


class ChangeBody(_Body):
    """Another plan, at once with proration or from the next period on; left out, at once where the provider can.

    `return_url`: where the provider's page leads afterwards when the customer has to agree there.
    """

    plan: PlanId
    when: Literal["now", "period_end"] | None = None
    return_url: Url | None = None


class RefundBody(_Body):
    """A payment to be given back: all that is left of it, or `amount_minor` in minor units of its currency."""

    payment: PaymentId
    amount_minor: Minor | None = None
    reason: Reason


class CheckoutSession(BaseModel):
    """A page of the provider on which the plan is paid. `returns` false: it leads to neither of the addresses afterwards, so
    whoever paid comes back by themselves."""

    id: str
    url: str
    plan: str
    provider: ProviderName
    expires_at: datetime | None
    returns: bool


class Owing(BaseModel):
    """A dunning case of the subscription that is not over."""

    id: str
    state: str
    amount_minor: int
    currency: str


class SubscriptionFacts(BaseModel):
    """A subscription. `plan` null: the provider's price is none of our plans."""

    id: str
    provider: ProviderName
    status: Literal[
        "pending", "trialing", "active", "past_due", "suspended", "paused", "canceled", "completed", "expired"
    ]
    plan: str | None
    cancel_at_period_end: bool
    period_start: datetime | None
    period_end: datetime | None
    owing: list[Owing]


class BillingState(BaseModel):
    """What the organization has by paying, if anything."""

    subscription: SubscriptionFacts | None


class ChangeState(BillingState):
    """The same after a request. `request`: `done` at the provider, `scheduled`, waiting for the customer's consent at `url`, or
    still to be made. The subscription follows when the provider tells of it, within seconds as a rule."""

    request: Literal["done", "scheduled", "needs_consent", "requested"]
    url: str | None


class Payment(BaseModel):
    """Money that came. `refunded_minor`: what was given back of it, or is about to be."""

    id: str
    provider: ProviderName
    invoice: str | None
    amount_minor: int
    tax_minor: int
    currency: str
    refunded_minor: int
    paid_at: datetime


class RefundFacts(BaseModel):
    """Money that goes back."""

    id: str
    payment: str
    state: Literal["requested", "pending", "succeeded", "failed"]
    amount_minor: int
    currency: str
    reason: str | None
    created_at: datetime


class OverageLine(BaseModel):
    """Use of one kind beyond the plan: `quantity` units at `unit_minor`."""

    description: str
    quantity: int
    unit_minor: int
    amount_minor: int


class LimitUse(BaseModel):
    """What was used of a limit of a month; `allowed` null: there is none."""

    limit: str
    used: int
    allowed: int | None
    beyond: int


class OverageFacts(BaseModel):
    """What a month's use beyond the plan costs so far, by the plan that holds now, without tax. `currency` null: it costs
    nothing. It is charged when the month is over: /v1/billing/overage-charges."""

    month: str
    plan: str
    currency: str | None
    use: list[LimitUse]
    lines: list[OverageLine]
    total_minor: int


# -- looking


@router.get("/subscription", response_model=BillingState)
async def get_subscription(reader: Reading, who: Reads, billing: Service) -> Any:
    """The organization's subscription, and what is owed on it."""
    return await state_of(reader, billing, who.org)


@router.get("/payments", response_model=Page[Payment])
async def list_payments(reader: Reading, who: Reads, page: Paging) -> Any:
    """The organization's payments, newest first."""
    rows = await billing_store.payments_of(reader, who.org, page.limit + 1, page.after[0] if page.after else None)
    back = {row.id: await checkout_store.refunded(reader, row.id) for row in rows[: page.limit]}
    return pages.listing(rows, page.limit, lambda row: (row.id,), lambda row: _payment(row, back[row.id]))


@router.get("/refunds", response_model=Page[RefundFacts])
async def list_refunds(reader: Reading, who: Reads, page: Paging) -> Any:
    """The organization's refunds, newest first."""
    rows = await checkout_store.refunds_of(reader, who.org, page.limit + 1, page.after[0] if page.after else None)
    return pages.listing(rows, page.limit, lambda row: (row.id,), _refund)


@router.get("/overage", response_model=OverageFacts)
async def get_overage(
    reader: Reading,
    who: Reads,
    billing: Service,
    month: Annotated[
        str | None, Query(pattern=r"^[0-9]{4}-(0[1-9]|1[0-2])$", description="Left out: this month (UTC)")
    ] = None,
) -> Any:
    """What the month's use beyond the plan costs so far."""
    wanted = month_of(billing.clock.wall())
    if month is not None:
        if month.startswith("0000") or month == "9999-12":
            raise Problem("usage.range_invalid", f"{month} is too far away")
        wanted = date.fromisoformat(f"{month}-01")
    return await billing.overage.of(reader, who.org, wanted)


# -- asking


@asking.post("/checkout-sessions", response_model=CheckoutSession, status_code=201)
async def buy(request: Request, who: Writes, billing: Service, db: Db, body: CheckoutBody) -> Response:
    """A page on which to pay for a plan. The plan is there when the provider says that it is paid."""
    async with db.transaction() as tx:
        made, call = await billing.checkouts.buy(tx, who, Purchase(**body.model_dump()), _key(request))
    await billing.calls.now(call)

    async def answer(tx: Tx, who: Caller) -> Response:
        row = await checkout_store.checkout(tx, made)
        if row is None or row.url is None:  # it went with its organization, or nobody could open it
            raise Problem("billing.call_running", headers={"Retry-After": "2"})
        can = billing.providers.of(row.provider).can
        return _json(CheckoutSession(
            id=made, url=row.url, plan=row.plan, provider=row.provider, expires_at=row.expires_at, returns="returns" in can
        ), 201)  # fmt: skip

    return await _answer(request, answer)


@asking.post("/subscription/cancel", response_model=ChangeState)
async def cancel(request: Request, who: Writes, billing: Service, db: Db, body: CancelBody | None = None) -> Response:
    """End the subscription: with the period that is paid, or at once. Nothing is given back by this alone."""
    asked = body or CancelBody()
    async with db.transaction() as tx:
        call = await billing.checkouts.cancel(
            tx, who, at_period_end=asked.at_period_end, reason=asked.reason or "asked for by the customer",
            given_key=_key(request),
        )  # fmt: skip
    return await _asked(request, billing, call, "scheduled")


@asking.post("/subscription/resume", response_model=ChangeState)
async def resume(request: Request, who: Writes, billing: Service, db: Db) -> Response:
    """Take back a cancellation at the end of the period, or go on with a subscription that is paused or suspended."""
    async with db.transaction() as tx:
        call = await billing.checkouts.resume(tx, who, _key(request))
    return await _asked(request, billing, call, "done")


@asking.post("/subscription/change", response_model=ChangeState)
async def change(request: Request, who: Writes, billing: Service, db: Db, body: ChangeBody) -> Response:
    """Another plan for the subscription."""
    async with db.transaction() as tx:
        call = await billing.checkouts.change(
            tx, who, body.plan, when=body.when, return_url=body.return_url or "", given_key=_key(request)
        )
    return await _asked(request, billing, call, "done")


@asking.post("/refunds", response_model=RefundFacts, status_code=201)
async def refund(request: Request, who: Refunder, billing: Service, db: Db, body: RefundBody) -> Response:
    """Have a payment of the last days given back, all that is left of it or a part."""
    made = await _give_back(request, billing.checkouts, billing, db, who, body, by_operator=False)

    async def answer(tx: Tx, who: Caller) -> Response:
        return _json(RefundFacts(**_refund(await checkout_store.refund(tx, made))), 201)

    return await _answer(request, answer)


@of_operators.post("", response_model=RefundFacts, status_code=201)
async def refund_anybody(request: Request, who: Operator, billing: Service, db: Db, body: RefundBody) -> Response:
    """Give a payment of an organization back, however long ago it was."""
    made = await _give_back(request, billing.checkouts, billing, db, who, body, by_operator=True)
    async with db.read() as reader:
        return _json(RefundFacts(**_refund(await checkout_store.refund(reader, made))), 201)


async def _give_back(
    request: Request,
    checkouts: Checkouts,
    billing: Billing,
    db: Any,
    who: Caller,
    body: RefundBody,
    *,
    by_operator: bool,
) -> str:
    async with db.transaction() as tx:
        made, call = await checkouts.refund(
            tx, who, body.payment, body.amount_minor, body.reason, _key(request), by_operator=by_operator
        )
    await billing.calls.now(call)
    return made


async def _asked(request: Request, billing: Billing, call: str | None, without: str) -> Response:
    """The answer after a call; ``without``: how the request stands when there was none to make."""
    facts: dict[str, Any] = {"request": without, "url": None}
    if call is not None:
        row = await billing.calls.now(call)
        result = row.result or {"status": "scheduled" if row.attempts == 0 else "requested"}
        facts = {"request": result["status"], "url": result.get("url")}

    async def answer(tx: Tx, who: Caller) -> Response:
        return _json(ChangeState(**await state_of(tx, billing, who.org), **facts))

    return await _answer(request, answer)


async def _answer(request: Request, run: Callable[[Tx, Caller], Awaitable[Response]]) -> Response:
    request.state.caller = None  # asking took its time: the credential may be revoked by now
    return await writing(request, "billing:write", run)


def _key(request: Request) -> str | None:
    return request.headers.get("idempotency-key")


def _json(model: BaseModel, status: int = 200) -> Response:
    return Response(model.model_dump_json(), status, media_type="application/json")


# -- showing


async def state_of(reader: Reader, billing: Billing, organization: str) -> dict[str, Any]:
    """What an organization has by paying; the last one that it had when all are over."""
    row = await current(reader, organization)
    if row is None:
        rows = [row for row in await billing_store.subscriptions_of(reader, organization) if row.beside is None]
        row = rows[-1] if rows else None
    if row is None:
        return {"subscription": None}
    return {"subscription": await _subscription(reader, billing, row)}


async def _subscription(reader: Reader, billing: Billing, row: Any) -> dict[str, Any]:
    cases = await billing.dunning_cases(reader, row.id)
    return {
        "id": row.id,
        "provider": row.provider,
        "status": row.status,
        "plan": billing.applier.entitlement.plan(row)[0],
        "cancel_at_period_end": row.cancel_at_period_end or await checkout_store.ending(reader, row.id),
        "period_start": row.period_start,
        "period_end": row.period_end,
        "owing": [
            {"id": case.id, "state": case.state, "amount_minor": case.amount_minor, "currency": case.currency}
            for case in cases
        ],
    }


def _payment(row: Any, refunded: int) -> dict[str, Any]:
    return {
        "id": row.id, "provider": row.provider, "invoice": row.invoice_id, "amount_minor": row.amount_minor,
        "tax_minor": row.tax_minor, "currency": row.currency, "refunded_minor": refunded, "paid_at": row.paid_at,
    }  # fmt: skip


def _refund(row: Any) -> dict[str, Any]:
    return {
        "id": row.id, "payment": row.payment_id, "state": row.state, "amount_minor": row.amount_minor,
        "currency": row.currency, "reason": row.reason, "created_at": row.created_at,
    }  # fmt: skip
