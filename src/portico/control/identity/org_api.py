"""Routes of organizations: /organizations are those of a person, /org/… is the caller's one, its members and its roles."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Response
from pydantic import BaseModel, Field, StringConstraints

from portico.control.access import Caller, InTx, Paging, Reading, require, require_recent
from portico.control.identity.api import Body, Name, OrganizationFacts, Person, Service, UserRef
from portico.control.requests import UnitOfWork
from portico.kit.pages import Page

router = APIRouter(prefix="/org", tags=["organization"], route_class=UnitOfWork)

many = APIRouter(prefix="/organizations", tags=["organization"], route_class=UnitOfWork)

Leaving = Annotated[Caller, Depends(require(kinds=("person",), act="member.leave"))]
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


class OrganizationBody(Body):
    """An organization's name."""

    name: Name


class TransferBody(Body):
    """Who becomes an owner in the caller's place, and what the caller becomes."""

    user: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    role: RoleId = "admin"


class Organization(OrganizationFacts):
    """An organization and how it stands. From `delete_after` on it is deleted for good."""

    standing: Literal["active", "suspended", "deleting"]
    delete_after: datetime | None


class CurrentOrganization(Organization):
    """The caller's organization; when it is suspended, why, and whom to ask."""

    suspended_reason: str | None
    operator_contact: str | None


class OwnOrganization(Organization):
    """An organization of the caller's. `current` is the one of this request's credential."""

    role: str
    role_name: str
    current: bool


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


@many.get("", response_model=Page[OwnOrganization])
async def list_organizations(reader: Reading, service: Service, who: Person, page: Paging) -> Any:
    """The organizations that the person belongs to, with the role there."""
    return await service.organizations.listing(reader, who, page)


@many.post("", status_code=201, response_model=OwnOrganization)
async def create_organization(body: OrganizationBody, tx: InTx, service: Service, who: Person) -> Any:
    """Make another organization, which the person owns. `POST /v1/auth/switch` goes there."""
    return await service.organizations.create(tx, who, body.name)


@router.get("", response_model=CurrentOrganization)
async def get_organization(
    reader: Reading, service: Service, who: Annotated[Caller, Depends(require("organization:read"))]
) -> Any:
    """The caller's organization."""
    return await service.organizations.facts(reader, who)


@router.patch("", response_model=Organization)
async def rename_organization(
    body: OrganizationBody,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("organization:write", act="organization.change"))],
) -> Any:
    """Give the organization another name."""
    return await service.organizations.rename(tx, who, body.name)


@router.post("/transfer", response_model=Member)
async def transfer(
    body: TransferBody,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require_recent("owners:write", act="organization.transfer"))],
) -> Any:
    """Make another member an owner in the caller's place, who is left with another role, in one step."""
    return await service.members.transfer(tx, who, body.user, body.role)


@router.post("/deletion", status_code=202, response_model=Organization)
async def request_deletion(
    body: OrganizationBody,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require_recent("organization:delete", act="organization.delete_request"))],
) -> Any:
    """Delete the organization: `name` is its name, as a confirmation. Its tunnels stop at once, nobody can make or change
    anything in it, and at `delete_after` it is deleted for good."""
    return await service.organizations.request_deletion(tx, who, body.name)


@router.delete("/deletion", response_model=Organization)
async def cancel_deletion(
    tx: InTx,
    service: Service,
    who: Annotated[
        Caller, Depends(require("organization:delete", kinds=("person",), act="organization.delete_cancel"))
    ],
) -> Any:
    """Take the deletion back, before `delete_after`. Agents have to connect again."""
    return await service.organizations.cancel_deletion(tx, who)


@router.delete("/members/me", status_code=204)
async def leave(tx: InTx, service: Service, who: Leaving) -> Response:
    """Leave the organization: the caller's sessions and keys in it end. Its last owner stays."""
    await service.members.leave(tx, who)
    return Response(status_code=204)


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
