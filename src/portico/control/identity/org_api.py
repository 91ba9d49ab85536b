"""Routes of the caller's organization: /org, /org/members, /org/roles."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Response
from pydantic import BaseModel, Field, StringConstraints

from portico.control.access import Caller, InTx, Paging, Reading, require
from portico.control.identity.api import Body, Name, OrganizationFacts, Service, UserRef
from portico.control.requests import UnitOfWork
from portico.kit.pages import Page

router = APIRouter(prefix="/org", tags=["organization"], route_class=UnitOfWork)

Id = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
RoleId = Annotated[
    str,
    StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$"),
    Field(description="Name of a built-in role, or id of one of the organization's own"),
]
Permissions = Annotated[
    list[Annotated[str, StringConstraints(max_length=64)]],
    Field(max_length=64, description="Of docs/reference/roles.md"),
]


class MemberPatch(Body):
    """Another role for a member."""

    role: RoleId


class RoleBody(Body):
    """A new role of the organization's own."""

    name: Name
    permissions: Permissions


class RolePatch(Body):
    """What to change; members left out stay."""

    name: Name | None = None
    permissions: Permissions | None = None


class Member(BaseModel):
    """A person in the organization. `role` is the name of a built-in role or the id of one of the organization's own."""

    user: UserRef
    role: str
    role_name: str
    joined_at: datetime


class Role(BaseModel):
    """A role and what it allows. The `id` of a built-in role is its name."""

    id: str
    name: str
    built_in: bool
    about: str | None
    permissions: list[str]


@router.get("", response_model=OrganizationFacts)
async def get_organization(
    reader: Reading, service: Service, who: Annotated[Caller, Depends(require("organization:read"))]
) -> Any:
    """The caller's organization."""
    return (await service.whoami(reader, who))["organization"]


@router.get("/members", response_model=Page[Member])
async def list_members(
    reader: Reading, service: Service, who: Annotated[Caller, Depends(require("members:read"))], page: Paging
) -> Any:
    """Who belongs to the organization, and in which role."""
    return await service.members.listing(reader, who, page)


@router.patch("/members/{user}", response_model=Member)
async def change_member(
    user: Id,
    body: MemberPatch,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("members:write", act="member.change"))],
) -> Any:
    """Give a member another role; in force at the member's next request, and for live tunnels within 2 s."""
    return await service.members.change(tx, who, user, body.role)


@router.delete("/members/{user}", status_code=204)
async def remove_member(
    user: Id,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("members:write", act="member.remove"))],
) -> Response:
    """Remove a member; the person's sessions and keys of this organization end, and live tunnels within 2 s."""
    await service.members.remove(tx, who, user)
    return Response(status_code=204)


@router.get("/roles", response_model=Page[Role])
async def list_roles(reader: Reading, service: Service, who: Annotated[Caller, Depends(require("roles:read"))]) -> Any:
    """The roles of the organization, the built-in ones first."""
    return await service.roles.listing(reader, who)


@router.post("/roles", status_code=201, response_model=Role)
async def create_role(
    body: RoleBody,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("roles:write", act="role.create"))],
) -> Any:
    """Make a role that holds nothing that the caller does not hold."""
    return await service.roles.create(tx, who, body.name, body.permissions)


@router.patch("/roles/{role}", response_model=Role)
async def change_role(
    role: Id,
    body: RolePatch,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("roles:write", act="role.change"))],
) -> Any:
    """Change a role; in force at the next request of everybody who has it, and for live tunnels within 2 s."""
    return await service.roles.change(tx, who, role, body.name, body.permissions)


@router.delete("/roles/{role}", status_code=204)
async def delete_role(
    role: Id,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("roles:write", act="role.delete"))],
) -> Response:
    """Delete a role that no member has."""
    await service.roles.delete(tx, who, role)
    return Response(status_code=204)
