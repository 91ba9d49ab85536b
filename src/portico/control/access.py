"""Who is calling, and what they may do.

    GET /tunnels   who: Annotated[Caller, Depends(require("tunnels:read"))]

A caller is a person (access token of a sign-in session), a key (agent or API key) or the installation's operator key.
Permissions are ``resource:action`` strings; deny is the default. Who stands behind a credential is identity's
knowledge: ``app.py`` puts its ``Authenticator`` on the app, this module only asks it, once per request.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any, Literal, Protocol

from fastapi import Depends, Query, Request
from fastapi.security import HTTPBearer

from portico.errors import Problem
from portico.kit import pages
from portico.kit.db import Database, Reader, Tx
from portico.kit.networks import plain

# Every permission inside an organization. Scopes of API keys are chosen from these; never rename one.
PERMISSIONS = frozenset(
    {
        "agent:connect",
        "audit:read",
        "keys:read",
        "keys:write",
        "organization:read",
        "tunnels:read",
        "tunnels:write",
    }
)

ROLES: dict[str, frozenset[str]] = {"owner": PERMISSIONS}

# What an agent key may do: serve tunnels and manage them from the command line; never mint keys or read the audit log.
AGENT_KEY_PERMISSIONS = frozenset({"agent:connect", "organization:read", "tunnels:read", "tunnels:write"})

CallerKind = Literal["person", "agent_key", "api_key", "operator", "relay", "anonymous"]


@dataclass(frozen=True, slots=True)
class Caller:
    """The authenticated origin of one request, with the facts that an audit row needs."""

    kind: CallerKind
    id: str  # usr_… of a person, key_… of a key; what audit rows name as the actor
    organization: str | None
    permissions: frozenset[str] = frozenset()
    user_id: str | None = None  # the person behind the credential, if one is
    session_id: str | None = None  # the sign-in session of a person
    platform_operator: bool = False
    expires_at: datetime | None = None  # of a key; what it makes does not outlive it
    request_id: str | None = None
    address: str | None = None

    def may(self, permission: str) -> bool:
        """Whether the caller holds ``permission`` in its organization."""
        return permission in self.permissions

    def check(self, permission: str) -> None:
        """Raises ``auth.forbidden`` unless the caller holds ``permission``."""
        if permission not in self.permissions:
            raise Problem("auth.forbidden", f"this credential lacks {permission}", permission=permission)

    @property
    def org(self) -> str:
        """The organization, for callers that act inside one; raises ``auth.forbidden`` for those outside any."""
        if self.organization is None:
            raise Problem("auth.forbidden", "this credential belongs to no organization", permission="organization")
        return self.organization


class Authenticator(Protocol):
    """Identity's side: the caller behind a bearer credential, or a 401 ``Problem``."""

    async def __call__(self, reader: Reader, credential: str) -> Caller: ...


_bearer = HTTPBearer(auto_error=False, bearerFormat="access token, agent key or API key", scheme_name="bearer")


def credential_of(request: Request) -> str:
    """The bearer credential of the request; raises ``auth.required``."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    value = value.strip()
    if scheme.lower() != "bearer" or not value:
        raise Problem("auth.required", headers={"WWW-Authenticate": "Bearer"})
    return value


def request_id(request: Request) -> str:
    """The id that this request has in answers, logs and audit rows."""
    return str(request.scope["state"]["request_id"])


def client_address(request: Request) -> str:
    """The client's address: the connection's, or the last one in X-Forwarded-For that no trusted proxy added."""
    peer = plain(request.client.host) if request.client else ""
    trusted: tuple[Any, ...] = request.app.state.trusted_proxies
    hops = [h.strip() for h in request.headers.get("x-forwarded-for", "").split(",") if h.strip()]
    while hops and _inside(peer, trusted):
        peer = plain(hops.pop())
    return peer if _address(peer) else "unknown"


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _inside(text: str, networks: tuple[Any, ...]) -> bool:
    address = _address(text)
    return address is not None and any(address in network for network in networks)


def anonymous(request: Request) -> Caller:
    """The caller of a route that needs no credential (sign-in itself), for throttles and audit rows."""
    return Caller("anonymous", "anonymous", None, request_id=request_id(request), address=client_address(request))


async def database(request: Request) -> Database:
    """The process's database, for services that open their own transactions."""
    db: Database = request.app.state.db
    return db


async def identify(request: Request) -> Caller:
    """The caller, authenticated at most once per request, on the request's own connection where it has one."""
    known: Caller | None = getattr(request.state, "caller", None)
    if known is not None:
        return known
    authenticate: Authenticator = request.app.state.authenticate
    credential = credential_of(request)
    reader: Reader | None = getattr(request.state, "reader", None)
    if reader is not None:
        found = await authenticate(reader, credential)
    else:
        async with request.app.state.db.read() as own:
            found = await authenticate(own, credential)
    found = replace(found, request_id=request_id(request), address=client_address(request))
    request.state.caller = found
    return found


async def caller(request: Request, _: Annotated[Any, Depends(_bearer)] = None) -> Caller:
    """Dependency: any authenticated caller."""
    return await identify(request)


def require(permission: str) -> Callable[..., Awaitable[Caller]]:
    """Dependency: an authenticated caller inside an organization that holds ``permission``; else 401 or 403."""
    if permission not in PERMISSIONS:
        raise ValueError(f"unknown permission {permission!r}")

    async def check(who: Annotated[Caller, Depends(caller)]) -> Caller:
        who.check(permission)
        if who.organization is None:
            raise Problem("auth.forbidden", permission=permission)
        return who

    return check


async def require_operator(who: Annotated[Caller, Depends(caller)]) -> Caller:
    """Dependency: a platform operator; else ``auth.operator_required``."""
    if not who.platform_operator:
        raise Problem("auth.operator_required")
    return who


async def transaction(request: Request) -> Tx:
    """Dependency: the request's transaction (``requests.UnitOfWork`` commits it before the answer leaves)."""
    tx: Tx = request.state.reader
    assert isinstance(tx, Tx), "reads have no transaction: depend on Reading"
    return tx


async def reader(request: Request) -> Reader:
    """Dependency: the request's connection for reading (routers of ``requests.UnitOfWork``)."""
    found: Reader = request.state.reader
    return found


async def paging(
    limit: Annotated[int, Query(ge=1, le=pages.MAX_LIMIT)] = pages.DEFAULT_LIMIT,
    cursor: Annotated[str | None, Query(max_length=512, description="next_cursor of the page before")] = None,
) -> pages.PageRequest:
    """Dependency: which page of a list is asked for."""
    return pages.PageRequest(limit, pages.decode(cursor) if cursor else None)


InTx = Annotated[Tx, Depends(transaction)]
Reading = Annotated[Reader, Depends(reader)]
Paging = Annotated[pages.PageRequest, Depends(paging)]
Db = Annotated[Database, Depends(database)]
