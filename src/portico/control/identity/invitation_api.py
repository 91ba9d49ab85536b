"""Routes of invitations: /org/invitations for who invites, /auth/invitations/… for who is invited."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from portico.control.access import Caller, InTx, Paging, Reading, require
from portico.control.identity.api import (
    Anybody,
    Body,
    Email,
    OrganizationRef,
    Password,
    Person,
    Service,
    Tokens,
    TokenText,
    UserRef,
    client_of,
    tokens_of,
)
from portico.control.identity.org_api import Id, RoleId
from portico.control.requests import JsonRoute, UnitOfWork
from portico.kit.pages import Page

router = APIRouter(prefix="/org/invitations", tags=["organization"], route_class=UnitOfWork)
invited = APIRouter(prefix="/auth/invitations", tags=["auth"], route_class=JsonRoute)
accepting = APIRouter(prefix="/auth/invitations", tags=["auth"], route_class=UnitOfWork)


class InvitationBody(Body):
    """Whom to invite, and as what."""

    email: Email
    role: RoleId


class InvitedBody(Body):
    """The token of the mail."""

    token: TokenText


class JoinBody(InvitedBody):
    """The token of the mail, and the password of the new account."""

    password: Password


class Invitation(BaseModel):
    """An invitation that nobody accepted or revoked yet."""

    id: str
    email: str
    role: str
    role_name: str
    invited_by: UserRef
    created_at: datetime
    sent_at: datetime
    expires_at: datetime
    expired: bool


class Offer(BaseModel):
    """What an invitation offers, and to which address."""

    organization: OrganizationRef
    email: str
    role_name: str
    invited_by: str
    expires_at: datetime


@router.get("", response_model=Page[Invitation])
async def list_invitations(
    reader: Reading, service: Service, who: Annotated[Caller, Depends(require("members:read"))], page: Paging
) -> Any:
    """Invitations that nobody accepted or revoked yet, newest first; expired ones can be sent again."""
    return await service.invitations.listing(reader, who, page)


@router.post("", status_code=201, response_model=Invitation)
async def invite(
    body: InvitationBody,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("members:write", act="invitation.create"))],
) -> Any:
    """Invite an address, in a role that may do no more than the caller. Whether it has an account does not show."""
    return await service.invitations.create(tx, who, body.email, body.role)


@router.delete("/{invitation}", status_code=204)
async def revoke_invitation(
    invitation: Id,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("members:write", act="invitation.revoke"))],
) -> Response:
    """Take an invitation back; its link is void."""
    await service.invitations.revoke(tx, who, invitation)
    return Response(status_code=204)


@router.post("/{invitation}/resend", response_model=Invitation)
async def resend_invitation(
    invitation: Id,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("members:write", act="invitation.resend"))],
) -> Any:
    """Mail an invitation again. The link of the mail before is void, and its days begin anew."""
    return await service.invitations.resend(tx, who, invitation)


@invited.post("/look", response_model=Offer)
async def look_at_invitation(body: InvitedBody, service: Service, who: Anybody) -> Any:
    """What an invitation offers."""
    return await service.invitations.look(who, body.token)


@invited.post("/register", status_code=201, response_model=Tokens)
async def register_invited(request: Request, body: JoinBody, service: Service, who: Anybody) -> Any:
    """Make an account for the invited address, as a member of the organization, and sign in. Open also when registration is
    not: somebody who is a member asked for it."""
    return tokens_of(await service.invitations.register(who, body.token, body.password, client_of(request)))


@accepting.post("/accept", response_model=OrganizationRef)
async def accept_invitation(body: InvitedBody, tx: InTx, service: Service, who: Person) -> Any:
    """Become a member, as the person with the address that the invitation was sent to. `POST /v1/auth/switch` goes there."""
    return await service.invitations.accept(tx, who, body.token)
