"""Route of usage: what the organization, or one of its tunnels, used by day or month; and how the month stands."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field

from portico.control.access import Caller, Reading, require
from portico.control.requests import UnitOfWork
from portico.control.tunnels.standing import Standing

router = APIRouter(prefix="/usage", tags=["usage"], route_class=UnitOfWork)


async def standing(request: Request) -> Standing:
    """Dependency: the process's service of usage and standing."""
    found: Standing = request.app.state.standing
    return found


class Period(BaseModel):
    """What was used in one day (`2026-02-28`) or month (`2026-02`) of UTC. Of periods without use there is no row."""

    period: str
    requests: int
    connections: int
    bytes_in: int
    bytes_out: int
    errors: int


class MonthlyLimit(BaseModel):
    """A limit of the month: `allowed` null is none. `percent` is of what is allowed, rounded down."""

    name: str
    used: int
    allowed: int | None
    percent: int | None


class Month(BaseModel):
    """The current month against the plan. `refused`: its traffic is refused at the edge until `resets_at`, or until the plan
    allows more."""

    month: str
    resets_at: datetime
    hard_cap: bool
    refused: bool
    limits: list[MonthlyLimit]


class Usage(BaseModel):
    """Whole periods of UTC. Relays report every few seconds; one that was out of reach reports later what it counted, for up to
    31 days, so that a past period may still rise, and never falls."""

    since: Annotated[date, Field(alias="from")]
    until: Annotated[date, Field(alias="to")]
    by: Literal["day", "month"]
    tunnel: str | None
    data: list[Period]
    next_cursor: None = None
    month: Month


@router.get("", response_model=Usage)
async def get_usage(
    reader: Reading,
    service: Annotated[Standing, Depends(standing)],
    who: Annotated[Caller, Depends(require("usage:read"))],
    since: Annotated[date | None, Query(alias="from", description="First day; left out: that of this month")] = None,
    until: Annotated[date | None, Query(alias="to", description="Last day, inclusive; left out: today")] = None,
    by: Literal["day", "month"] = "day",
    tunnel: Annotated[str | None, Query(max_length=64, description="Of this tunnel alone, deleted or not")] = None,
) -> Any:
    """What was used, by day or month of UTC, and how this month stands against the plan."""
    return await service.usage(reader, who.org, since=since, until=until, by=by, tunnel=tunnel)
