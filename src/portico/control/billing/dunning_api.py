"""Routes of dunning: /billing/dunning for who pays, /admin/dunning for operators, who pause, resume and close cases."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

from portico.control.access import Caller, InTx, Paging, Reading, require, require_operator
from portico.control.billing import billing_store, dunning_store
from portico.control.billing.billing_api import Service
from portico.control.billing.service import Billing
from portico.control.identity import plans
from portico.control.requests import UnitOfWork, shown
from portico.errors import Problem
from portico.kit import pages
from portico.kit.db import Tx
from portico.kit.pages import Page

router = APIRouter(prefix="/billing/dunning", tags=["billing"], route_class=UnitOfWork)
of_operators = APIRouter(prefix="/admin/dunning", tags=["admin"], route_class=UnitOfWork)

Reads = Annotated[Caller, Depends(require("billing:read"))]
Operator = Annotated[Caller, Depends(require_operator())]
Id = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Reason = Annotated[str, StringConstraints(min_length=1, max_length=500, strip_whitespace=True), AfterValidator(shown)]
State = Literal[
    "grace", "notified", "retrying", "restricted", "suspended", "written_off", "paused", "recovered", "canceled"
]
Wanted = Annotated[State | None, Query(description="In this state alone")]
Unfinished = Annotated[bool, Query(description="Those alone that are not over")]


def _acts(act: str) -> Any:
    return Depends(require_operator(step_up=True, act=act))


class ReasonBody(BaseModel):
    """Why; for the audit log, where the organization reads it, too."""

    model_config = ConfigDict(extra="forbid")

    reason: Reason


class DunningCase(BaseModel):
    """What is done about payments that failed. `stage`: the day of the schedule that was reached (`D3`); `next_attempt_at`: when
    the provider tries again by itself."""

    id: str
    subscription: str
    state: State
    stage: str | None
    amount_minor: int
    currency: str
    attempts: int
    failure_code: str | None
    next_attempt_at: datetime | None
    opened_at: datetime
    due_at: datetime | None
    closed_at: datetime | None
    reason: str | None


class AnyCase(DunningCase):
    """The same with whose it is."""

    organization: str


@router.get("", response_model=Page[DunningCase])
async def list_cases(
    reader: Reading, who: Reads, page: Paging, state: Wanted = None, unfinished: Unfinished = False
) -> Any:
    """The organization's cases, newest first."""
    return await _listing(reader, page, organization=who.org, state=state, open_only=unfinished)


@of_operators.get("", response_model=Page[AnyCase])
async def list_every_case(
    reader: Reading,
    who: Operator,
    page: Paging,
    state: Wanted = None,
    unfinished: Unfinished = False,
    organization: Annotated[str | None, Query(max_length=64, description="Of this organization alone")] = None,
) -> Any:
    """Everybody's cases, newest first."""
    return await _listing(reader, page, organization=organization, state=state, open_only=unfinished)


@of_operators.post("/{dunning_case}/pause", response_model=AnyCase)
async def pause(
    dunning_case: Id, body: ReasonBody, tx: InTx, billing: Service, who: Annotated[Caller, _acts("dunning.pause")]
) -> Any:
    """Stop a case and give back what it took away, until it is resumed; its days stand still meanwhile."""
    case, subscription = await _held(tx, dunning_case)
    row = await billing.applier.dunning.pause(tx, who, case, body.reason)
    await _settle(tx, billing, subscription, "dunning.pause")
    return _shown(row)


@of_operators.post("/{dunning_case}/resume", response_model=AnyCase)
async def resume(dunning_case: Id, tx: InTx, billing: Service, who: Annotated[Caller, _acts("dunning.resume")]) -> Any:
    """Go on with a case where it was paused."""
    case, subscription = await _held(tx, dunning_case)
    await billing.applier.dunning.resume(tx, who, case, subscription)
    # All of it, as by the clock: the day that has come meanwhile may be the last one.
    known = await plans.hold(tx, subscription.organization_id) is not None
    await billing.applier.settle(tx, subscription, known=known, reason="dunning.resume")
    return _shown(await dunning_store.one(tx, dunning_case))


@of_operators.post("/{dunning_case}/close", response_model=AnyCase)
async def close(
    dunning_case: Id, body: ReasonBody, tx: InTx, billing: Service, who: Annotated[Caller, _acts("dunning.close")]
) -> Any:
    """End a case for good. What failed until now opens none again; a later failure does. The receivable stays in the ledger."""
    case, subscription = await _held(tx, dunning_case)
    row = await billing.applier.dunning.close(tx, who, case, body.reason)
    await _settle(tx, billing, subscription, "dunning.close")
    return _shown(row)


async def _held(tx: Tx, case_id: str) -> tuple[Any, Any]:
    """A case, with its organization held as whoever applies an event holds it. Raises ``dunning.not_found``."""
    case = await dunning_store.one(tx, case_id)
    if case is None:
        raise Problem("dunning.not_found")
    await plans.hold(tx, case.organization_id)
    return await dunning_store.one(tx, case_id), await billing_store.subscription_by_id(tx, case.subscription_id)


async def _settle(tx: Tx, billing: Billing, subscription: Any, reason: str) -> None:
    if await plans.hold(tx, subscription.organization_id) is not None:
        await billing.applier.entitlement.settle(tx, subscription.organization_id, reason)


async def _listing(reader: Any, page: pages.PageRequest, **wanted: Any) -> Any:
    before = page.after[0] if page.after else None
    rows = await dunning_store.listing(reader, page.limit + 1, before, **wanted)
    return pages.listing(rows, page.limit, lambda row: (row.id,), _shown)


def _shown(row: Any) -> dict[str, Any]:
    return {
        "id": row.id, "organization": row.organization_id, "subscription": row.subscription_id, "state": row.state,
        "stage": row.stage, "amount_minor": row.amount_minor, "currency": row.currency, "attempts": row.attempts,
        "failure_code": row.failure_code, "next_attempt_at": row.next_attempt_at, "opened_at": row.opened_at,
        "due_at": row.due_at, "closed_at": row.closed_at, "reason": row.reason,
    }  # fmt: skip
