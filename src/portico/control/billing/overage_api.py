"""Routes of charges for use beyond plans: /billing/overage-charges for who pays, /admin/overage-charges for operators."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query
from pydantic import BaseModel

from portico.control.access import Caller, InTx, Paging, Reading, require, require_operator
from portico.control.billing import overage_store as store
from portico.control.billing.billing_api import Service
from portico.control.billing.dunning_api import ReasonBody
from portico.control.requests import UnitOfWork
from portico.kit import pages
from portico.kit.pages import Page

router = APIRouter(prefix="/billing/overage-charges", tags=["billing"], route_class=UnitOfWork)
of_operators = APIRouter(prefix="/admin/overage-charges", tags=["admin"], route_class=UnitOfWork)

Reads = Annotated[Caller, Depends(require("billing:read"))]
Operator = Annotated[Caller, Depends(require_operator())]
Id = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
State = Literal["priced", "charged", "waived", "failed"]
Wanted = Annotated[State | None, Query(description="In this state alone")]


class OverageCharge(BaseModel):
    """What use beyond the plan of a `month` costs, without tax: `quantity` units at `unit_minor`.

    `billed_month`: later than `month` for what was reported late. `priced`: the provider is about to be asked; `charged`: it is
    on the provider's next invoice, or on `invoice`, which nobody collects by itself; `failed`: an operator decides (`reason`).
    """

    id: str
    subscription: str
    month: str
    billed_month: str
    metric: str
    description: str
    used: int
    allowed: int
    quantity: int
    unit_minor: int
    amount_minor: int
    currency: str
    state: State
    reason: str | None
    invoice: str | None
    created_at: datetime
    settled_at: datetime | None


class AnyCharge(OverageCharge):
    """The same with whose it is, and what the provider calls it."""

    organization: str
    provider: str
    provider_ref: str | None


@router.get("", response_model=Page[OverageCharge])
async def list_overage_charges(reader: Reading, who: Reads, page: Paging, state: Wanted = None) -> Any:
    """What the organization is charged for use beyond its plan, newest first."""
    return await _listing(reader, page, organization=who.org, state=state)


@of_operators.get("", response_model=Page[AnyCharge])
async def list_every_overage_charge(
    reader: Reading,
    who: Operator,
    page: Paging,
    state: Wanted = None,
    organization: Annotated[str | None, Query(max_length=64, description="Of this organization alone")] = None,
) -> Any:
    """Everybody's charges for use, newest first."""
    return await _listing(reader, page, organization=organization, state=state)


@of_operators.post("/{overage_charge}/waive", response_model=AnyCharge)
async def waive_overage_charge(
    overage_charge: Id,
    body: ReasonBody,
    tx: InTx,
    billing: Service,
    who: Annotated[Caller, Depends(require_operator(step_up=True, act="overage.waive"))],
) -> Any:
    """Let nobody pay a charge that the provider was not asked for yet, or that failed."""
    return _shown(await billing.overage_billing.waive(tx, who, overage_charge, body.reason))


@of_operators.post("/{overage_charge}/retry", response_model=AnyCharge)
async def retry_overage_charge(
    overage_charge: Id,
    tx: InTx,
    billing: Service,
    who: Annotated[Caller, Depends(require_operator(step_up=True, act="overage.retry"))],
) -> Any:
    """Have a charge that failed, or waits for review, charged."""
    return _shown(await billing.overage_billing.retry(tx, who, overage_charge))


async def _listing(reader: Any, page: pages.PageRequest, **wanted: Any) -> Any:
    before = page.after[0] if page.after else None
    rows = await store.listing(reader, page.limit + 1, before, **wanted)
    return pages.listing(rows, page.limit, lambda row: (row.id,), _shown)


def _shown(row: Any) -> dict[str, Any]:
    return {
        "id": row.id, "organization": row.organization_id, "subscription": row.subscription_id, "provider": row.provider,
        "month": row.month.isoformat()[:7], "billed_month": row.billed_month.isoformat()[:7], "metric": row.metric,
        "description": row.description, "used": row.used, "allowed": row.allowed, "quantity": row.quantity,
        "unit_minor": row.unit_minor, "amount_minor": row.amount_minor, "currency": row.currency, "state": row.state,
        "reason": row.reason, "invoice": row.invoice_id, "provider_ref": row.provider_ref, "created_at": row.created_at,
        "settled_at": row.settled_at,
    }  # fmt: skip
