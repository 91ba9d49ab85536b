"""Routes of plans: /plans for everybody, /org/plan for members, /admin/plans and an organization's plan for operators."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path
from pydantic import BaseModel, Field, StringConstraints

from portico.control.access import PUBLIC, Caller, Instant, InTx, Reading, require, require_operator
from portico.control.identity.api import Body, Name, Service
from portico.control.identity.plan_service import Move, Override
from portico.control.requests import UnitOfWork
from portico.kit.pages import Page

router = APIRouter(tags=["plans"], route_class=UnitOfWork)

_PLAN = r"^[a-z][a-z0-9-]{0,31}$"
PlanId = Annotated[str, Path(pattern=_PLAN, description="Name of a plan")]
OrganizationId = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Operator = Annotated[Caller, Depends(require_operator())]
Writer = Annotated[Caller, Depends(require_operator(step_up=True, act="plan.write"))]
Mover = Annotated[Caller, Depends(require_operator(step_up=True, act="organization.plan"))]
Most = Annotated[int, Field(ge=0, le=2**53 - 1, strict=True)]
Key = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[a-z_]+$")]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class PlanFacts(BaseModel):
    """A version of a plan. A limit that is null is none; `hard_cap`: traffic stops at the limits of a month."""

    id: str
    version: int
    name: str
    hard_cap: bool
    limits: dict[str, int | None]
    features: list[str]


class WrittenPlan(PlanFacts):
    """A version of a plan as operators see it. `listed`: offered to everybody; cheaper ones have a lower `position`."""

    listed: bool
    position: int


class PlanVersion(WrittenPlan):
    """With how many organizations are on it."""

    created_at: datetime
    organizations: int


class PlanRef(BaseModel):
    """The version of a plan that an organization is on."""

    id: str
    version: int
    name: str


class LimitFacts(BaseModel):
    """One limit: what is `allowed` (null: no limit) and `used` (null: not counted here; of a month see GET /v1/usage)."""

    name: str
    about: str
    allowed: int | None
    used: int | None
    monthly: bool


class FeatureFacts(BaseModel):
    """One feature, and whether the organization has it."""

    name: str
    about: str
    has: bool


class OverrideFacts(BaseModel):
    """What the organization has differently from its plan."""

    name: str
    value: int | None
    expires_at: datetime | None


class OrganizationPlan(BaseModel):
    """What an organization may have, and has."""

    plan: PlanRef
    hard_cap: bool
    limits: list[LimitFacts]
    features: list[FeatureFacts]
    overrides: list[OverrideFacts]


class OverrideBody(Body):
    """A limit (`value` null: none), a feature or `hard_cap` (0 or 1) that differs, until `expires_at`."""

    name: Key
    value: Most | None
    expires_at: Instant | None = None


class MoveBody(Body):
    """The plan, the version (left out: the one that the organization is on, or else the newest) and all its overrides."""

    plan: Annotated[str, StringConstraints(pattern=_PLAN)]
    version: Count | None = None
    overrides: Annotated[list[OverrideBody], Field(max_length=32, default_factory=list)]
    reason: Annotated[Name, Field(description="Why; for the audit log")]


class PlanBody(Body):
    """What differs from the version before."""

    name: Name | None = None
    limits: Annotated[dict[Key, Most | None], Field(max_length=32, default_factory=dict)]
    features: Annotated[list[Key], Field(max_length=32)] | None = None
    hard_cap: bool | None = None
    listed: bool | None = None
    position: Annotated[int, Field(ge=0, le=1_000_000)] | None = None


@router.get("/plans", response_model=Page[PlanFacts], openapi_extra=PUBLIC.openapi())
async def list_plans(reader: Reading, service: Service) -> Any:
    """The plans that anybody may have, cheapest first."""
    return await service.plans.offered(reader)


@router.get("/org/plan", response_model=OrganizationPlan)
async def get_plan(
    reader: Reading, service: Service, who: Annotated[Caller, Depends(require("organization:read"))]
) -> Any:
    """The organization's plan: each limit with what is used of it, and the features."""
    return await service.plans.of(reader, who.org)


@router.get("/admin/plans", response_model=Page[PlanVersion])
async def list_versions(reader: Reading, service: Service, who: Operator) -> Any:
    """Every version of every plan, with how many organizations are on it."""
    return await service.plans.all(reader)


@router.put("/admin/plans/{plan}", response_model=WrittenPlan)
async def write_plan(plan: PlanId, body: PlanBody, tx: InTx, service: Service, who: Writer) -> Any:
    """Another version of a plan, or a new plan. Organizations keep the version that they are on until they are moved."""
    return await service.plans.write(tx, who, plan, **body.model_dump())


@router.get("/admin/organizations/{organization}/plan", response_model=OrganizationPlan)
async def get_organization_plan(organization: OrganizationId, reader: Reading, service: Service, who: Operator) -> Any:
    """An organization's plan, with what is used of it."""
    return await service.plans.of(reader, organization)


@router.put("/admin/organizations/{organization}/plan", response_model=OrganizationPlan)
async def move_organization(
    organization: OrganizationId, body: MoveBody, tx: InTx, service: Service, who: Mover
) -> Any:
    """Put an organization on a plan, with exactly these overrides. In force at once; for live tunnels within 2 s."""
    overrides = [Override(o.name, o.value, o.expires_at) for o in body.overrides]
    return await service.plans.move(tx, who, organization, Move(body.plan, body.version, overrides, body.reason))
