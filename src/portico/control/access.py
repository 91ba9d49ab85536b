"""Who is calling, and what they may do.

    GET /tunnels   who: Annotated[Caller, Depends(require("tunnels:read"))]

A caller is a person (access token of a sign-in session), a key (agent or API key) or the installation's operator key.
Permissions are ``resource:action`` strings; deny is the default. One table declares them and the built-in roles, and
docs/reference/roles.md is made from it. Who stands behind a credential is identity's knowledge: ``app.py`` puts its
``Authenticator`` on the app, this module only asks it, once per request.

Every route says who may call it in a form that can be read back (``Access``): OpenAPI shows it as ``x-callers`` and
``x-permission``, and tests/control/test_access_matrix.py holds every route to it.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, Protocol, TypeVar

from fastapi import Depends, Query, Request
from fastapi.security import HTTPBearer
from pydantic import AfterValidator, AwareDatetime

from portico.errors import Problem
from portico.kit import pages
from portico.kit.db import Database, Reader, Tx
from portico.kit.networks import ADDRESS_CHARS, plain

# Every permission inside an organization, with what it allows. Scopes of API keys and custom roles are chosen from these;
# never rename one.
PERMISSION_TABLE: Final[Mapping[str, str]] = {
    "agent:connect": "Serve tunnels with a key: open agent sessions, keep them and add tunnels to them.",
    "audit:read": "Read the organization's audit log.",
    "billing:read": "See the subscription, invoices, and what happened to the organization's money.",
    "billing:write": "Buy, change and cancel the subscription, ask for refunds, and change the billing details.",
    "billing:export": "Have reports of the organization's money and usage made, sent and downloaded.",
    "domains:read": "See domains, the DNS records that they need, and how their certificates are.",
    "domains:write": "Add, verify, change, route and remove domains.",
    "keys:own": "Make agent keys and API keys, and list, rotate and revoke one's own.",
    "keys:read": "List every key of the organization (never its text).",
    "keys:write": "Make keys, and rotate and revoke every key of the organization.",
    "members:read": "See who belongs to the organization, and in which role.",
    "members:write": "Invite people, give members other roles, and remove them.",
    "organization:delete": "Delete the organization, and take that back within the days of grace.",
    "organization:export": "Export everything that the organization has, its audit log included.",
    "notifications:read": "See notification channels, what they want and what was sent to them; never their secrets.",
    "notifications:write": "Make, change, test and remove notification channels, replace their secrets, send again.",
    "organization:read": "See the organization's name and plan.",
    "organization:write": "Change the organization's name.",
    "owners:write": "Make owners, change their role and remove them, and hand ownership on.",
    "roles:read": "See the roles of the organization and what they allow.",
    "roles:write": "Make, change and delete custom roles.",
    "tunnels:read": "See tunnels and what happened to them.",
    "tunnels:write": "Make, change, stop and delete tunnels, with their names, addresses and policies.",
    "usage:read": "See how much traffic the organization and its tunnels had, against the limits of the month.",
}
PERMISSIONS: Final = frozenset(PERMISSION_TABLE)

# What no custom role can hold: only owners make owners, and end what is theirs.
OWNERS_ONLY: Final = frozenset({"organization:delete", "owners:write"})


# A role that holds one of these can give itself and others more: giving it needs a person with a recent proof.
GIVING: Final = frozenset({"members:write", "owners:write", "roles:write", "keys:write"})


@dataclass(frozen=True, slots=True)
class Role:
    """A built-in role: whom it is for, and what it allows."""

    about: str
    permissions: frozenset[str]


_SEES: Final = frozenset({"members:read", "organization:read", "roles:read"})

ROLE_TABLE: Final[Mapping[str, Role]] = {
    "owner": Role("Everything. An organization always has one at least.", PERMISSIONS),
    "admin": Role(
        "Everything but deleting the organization, and making, changing and removing owners.", PERMISSIONS - OWNERS_ONLY
    ),
    "developer": Role(
        "Runs tunnels and domains: makes and changes them, and has agent keys and API keys of their own.",
        _SEES
        | {"agent:connect", "keys:own", "usage:read"}
        | {"domains:read", "domains:write", "tunnels:read", "tunnels:write"},
    ),
    "viewer": Role(
        "Looks at tunnels, domains and what happened to them; changes nothing.",
        _SEES | {"domains:read", "tunnels:read", "usage:read"},
    ),
    "billing": Role(
        "Looks after what the organization pays: subscription, invoices, plan and usage, no tunnel and no person.",
        frozenset({"billing:export", "billing:read", "billing:write", "organization:read", "usage:read"}),
    ),
    "auditor": Role("Reads the audit log and who may do what; no tunnels, no keys.", _SEES | {"audit:read"}),
}
ROLES: Final[Mapping[str, frozenset[str]]] = {name: role.permissions for name, role in ROLE_TABLE.items()}

# What an agent key may do: serve tunnels and manage them and domains from the command line; never mint keys or read the audit
# log.
AGENT_KEY_PERMISSIONS: Final = frozenset(
    {"agent:connect", "organization:read", "usage:read"}
    | {"domains:read", "domains:write", "tunnels:read", "tunnels:write"}
)

# What is left of any role while the person's e-mail address must be verified and is not (setting require_verified_email).
UNVERIFIED_PERMISSIONS: Final = frozenset({"members:read", "organization:read", "roles:read", "tunnels:read"})


def role_permissions(role: str | None, custom: Iterable[str] | None = None) -> frozenset[str]:
    """What a member with ``role`` may do; ``custom`` are the permissions of a custom role. Nothing when there is no such."""
    if role is not None and role in ROLES:
        return ROLES[role]
    return (frozenset(custom) & PERMISSIONS) - OWNERS_ONLY if custom is not None else frozenset()


# How an organization stands when not well: the operator suspended it, or its owner asked for its deletion.
Standing = Literal["suspended", "deleting"]
_READS: Final = frozenset(name for name in PERMISSIONS if name.endswith(":read"))
_LEFT: Final[Mapping[Standing, frozenset[str]]] = {
    "suspended": _READS | {"organization:export"},
    "deleting": _READS | {"organization:delete", "organization:export"},
}


def in_standing(held: frozenset[str], standing: Standing | None) -> frozenset[str]:
    """What is left of ``held`` in an organization that stands so: looking, and what leads out of it."""
    return held if standing is None else held & _LEFT[standing]


# What an operator may do inside an organization whose owner let them in: look, or change tunnels, too. No audit log, no keys, no
# members, no money, and nothing that is added later unless it is added here.
SUPPORT_PERMISSIONS: Final[Mapping[str, frozenset[str]]] = {
    "read": ROLES["viewer"],
    "write": ROLES["viewer"] | {"tunnels:write"},
}

CallerKind = Literal["person", "agent_key", "api_key", "support", "operator", "relay", "anonymous"]


# Who has a credential of an organization; ``support`` is an operator whom an owner let in for a while.
MEMBERS: Final[tuple[CallerKind, ...]] = ("person", "agent_key", "api_key", "support")
KEYS: Final[tuple[CallerKind, ...]] = ("agent_key", "api_key")


@dataclass(frozen=True, slots=True)
class Access:
    """Who may call a route: these kinds of callers, with one of these permissions (any, when none is named).

    ``act`` is the audit action under which a refusal is recorded, for routes where trying is worth knowing. ``step_up``: a
    person must have proved a moment ago who they are.
    """

    kinds: tuple[CallerKind, ...]
    permissions: tuple[str, ...] = ()
    act: str | None = None
    step_up: bool = False

    def openapi(self) -> dict[str, Any]:
        """As extensions of an OpenAPI operation."""
        found: dict[str, Any] = {"x-callers": list(self.kinds)}
        if self.permissions:
            found["x-permission"] = list(self.permissions)
        return {**found, "x-step-up": True} if self.step_up else found


# Proofs that are more than a password; a passkey is both factors in one.
SECOND_FACTORS: Final = frozenset({"otp", "passkey", "recovery"})

PUBLIC: Final = Access(("anonymous",))
RELAYS: Final = Access(("relay",))


@dataclass(frozen=True, slots=True)
class Caller:
    """The authenticated origin of one request, with the facts that an audit row needs."""

    kind: CallerKind
    id: str  # usr_… of a person, key_… of a key; what audit rows name as the actor
    organization: str | None
    permissions: frozenset[str] = frozenset()
    user_id: str | None = None  # the person behind the credential, if one is
    session_id: str | None = None  # the sign-in session of a person
    authenticated_at: datetime | None = None  # when that person last proved who they are; keys never do
    methods: tuple[str, ...] = ()  # by what, in order: pwd, otp, recovery, passkey
    unverified: bool = False  # the person's address must be verified before they may do more than look around
    second_factor: bool = False  # whether the person has one that they must use, used this time or not
    platform_operator: bool = False
    acting_operator: str | None = None  # the operator (usr_…) whose support session, ``id``, this is
    standing: Standing | None = None  # of the organization; `permissions` are what it leaves
    standing_reason: str | None = None  # what people are told about that
    expires_at: datetime | None = None  # of a key; what it makes does not outlive it
    cidrs: tuple[
        str, ...
    ] = ()  # of a key: the networks that it may be used from; what it makes may not be used elsewhere
    request_id: str | None = None
    address: str | None = None

    def may(self, permission: str) -> bool:
        """Whether the caller holds ``permission`` in its organization."""
        return permission in self.permissions

    def check(self, permission: str) -> None:
        """Raises ``auth.forbidden`` unless the caller holds ``permission``."""
        if permission not in self.permissions:
            if self.unverified and permission not in UNVERIFIED_PERMISSIONS:
                raise Problem("auth.email_unverified", permission=permission)
            if self.standing is not None and permission not in _LEFT[self.standing]:
                raise Problem(f"organization.{self.standing}", self.standing_reason)
            raise Problem("auth.forbidden", f"this credential lacks {permission}", permission=permission)

    def check_any(self, permissions: Sequence[str]) -> None:
        """Raises ``auth.forbidden`` unless the caller holds one of ``permissions``."""
        if self.permissions.isdisjoint(permissions):
            self.check(permissions[-1])

    @property
    def org(self) -> str:
        """The organization, for callers that act inside one; raises ``auth.forbidden`` for those outside any."""
        if self.organization is None:
            raise Problem("auth.forbidden", "this credential belongs to no organization", permission="organization")
        return self.organization


class Authenticator(Protocol):
    """Identity's side: the caller behind a bearer credential that came from ``address``, or a 401 or 403 ``Problem``."""

    async def __call__(self, reader: Reader, credential: str, address: str | None = None) -> Caller: ...


_Dependency = TypeVar("_Dependency", bound=Callable[..., Any])

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
    """The client's address: the connection's, or the last one in X-Forwarded-For that no trusted proxy added.

    All lines of the header are one list (RFC 9110, 5.3): some proxies add a line of their own below the client's.
    """
    known: str | None = request.scope.get("state", {}).get("client_address")  # worked out once for a request
    if known is not None:
        return known
    peer = plain(request.client.host) if request.client else ""
    trusted: tuple[Any, ...] = request.app.state.trusted_proxies
    if _inside(peer, trusted):
        hops = [h.strip() for h in ",".join(request.headers.getlist("x-forwarded-for")).split(",") if h.strip()]
        while hops and _inside(peer, trusted):
            peer = plain(hops.pop())
    found = peer if _address(peer) else "unknown"
    request.scope.setdefault("state", {})["client_address"] = found
    return found


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    return None if len(text) > ADDRESS_CHARS else _parsed(text)


@functools.lru_cache(4096)
def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
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
    credential, address = credential_of(request), client_address(request)
    reader: Reader | None = getattr(request.state, "reader", None)
    if reader is not None:
        found = await authenticate(reader, credential, address)
    else:
        async with request.app.state.db.read() as own:
            found = await authenticate(own, credential, address)
    found = replace(found, request_id=request_id(request), address=address)
    if found.kind == "support":
        await request.app.state.note_support(found, request.method, request.url.path)
    request.state.caller = found
    return found


async def caller(request: Request, _: Annotated[Any, Depends(_bearer)] = None) -> Caller:
    """Dependency: any authenticated caller."""
    return await identify(request)


def declare(access: Access) -> Callable[[_Dependency], _Dependency]:
    """Decorator of a dependency: routes that depend on it admit whom ``access`` says (``declared`` reads it back)."""

    def mark(dependency: _Dependency) -> _Dependency:
        dependency.access = access  # type: ignore[attr-defined]
        return dependency

    return mark


def again(dependency: object) -> tuple[Callable[[Request, Caller], Any], ...]:
    """What a dependency checks of a caller, to be checked again for a request that it was not asked for."""
    found: tuple[Callable[[Request, Caller], Any], ...] = getattr(dependency, "again", ())
    return found


def declared(dependency: object) -> Access | None:
    """What a dependency says about who may call."""
    found = getattr(dependency, "access", None)
    return found if isinstance(found, Access) else None


declare(PUBLIC)(anonymous)
declare(Access((*MEMBERS, "operator")))(caller)


def require(*permissions: str, kinds: tuple[CallerKind, ...] = MEMBERS, act: str | None = None) -> Callable[..., Any]:
    """Dependency: a caller of one of ``kinds`` inside an organization that holds one of ``permissions``; else 401 or 403.

    ``act`` names the audit action under which refusals of the route, from here or from its service, are recorded.
    """
    if unknown := [name for name in permissions if name not in PERMISSIONS]:
        raise ValueError(f"unknown permission {unknown[0]!r}")

    @declare(Access(kinds, permissions, act))
    async def check(request: Request, who: Annotated[Caller, Depends(caller)]) -> Caller:
        request.state.act = act
        if permissions:
            who.check_any(permissions)
        # A person may belong to no organization, and still has sessions to end and invitations to accept.
        if (who.organization is None and who.kind != "person") or who.kind not in kinds:
            allowed = " or ".join(kind.replace("_", " ") for kind in kinds)
            raise Problem(
                "auth.forbidden", f"this is for a {allowed}", permission=permissions[-1] if permissions else None
            )
        return who

    check.again = (check,)  # type: ignore[attr-defined]
    return check


def check_recent(who: Caller, now: datetime, seconds: float) -> None:
    """Raises ``auth.step_up_required`` unless the person behind ``who`` proved who they are within ``seconds`` before ``now``.

    A key has no person in front of it: it never passes.
    """
    if who.authenticated_at is None or (now - who.authenticated_at).total_seconds() > seconds:
        raise Problem("auth.step_up_required", max_age=int(seconds))


def require_recent(*permissions: str, seconds: float | None = None, act: str | None = None) -> Callable[..., Any]:
    """Dependency: a person with one of ``permissions`` (any, when none is named) who proved who they are a short time ago.

    ``seconds``: that time; by default the setting ``step_up_seconds``. Else as ``require``, and ``auth.step_up_required``.
    """
    people: tuple[CallerKind, ...] = ("person",)
    required = require(*permissions, kinds=people, act=act)
    admitted = Depends(required)

    @declare(Access(people, permissions, act, step_up=True))
    async def check(request: Request, who: Caller = admitted) -> Caller:
        state: Any = request.app.state
        check_step_up(who, state.clock.wall(), state.settings.step_up_seconds if seconds is None else seconds)
        return who

    check.again = (*again(required), check)  # type: ignore[attr-defined]
    return check


def check_step_up(who: Caller, now: datetime, seconds: float) -> None:
    """As ``check_recent``; and who has a second factor must have used it: a session from before it was set up has not."""
    check_recent(who, now, seconds)
    if who.second_factor and SECOND_FACTORS.isdisjoint(who.methods):
        raise Problem("auth.step_up_required", "this needs your second factor", max_age=int(seconds))


def require_operator(*, step_up: bool = False, act: str | None = None) -> Callable[..., Any]:
    """Dependency: a platform operator, which is a person with a grant or the operator key; else ``auth.operator_required``.

    ``step_up`` is for dangerous acts: a person must have signed in, or proved again who they are, within
    ``operator_step_up_seconds``, with a second factor if they have one; else ``auth.step_up_required``. ``act`` names the
    audit action under which refusals are recorded, in the log of the installation.
    """

    @declare(Access(("operator",), act=act, step_up=step_up))
    async def check(request: Request, who: Annotated[Caller, Depends(caller)]) -> Caller:
        request.state.act, request.state.act_of_installation = act, True
        if not who.platform_operator:
            raise Problem("auth.operator_required")
        if step_up and who.kind == "person":
            state = request.app.state
            check_step_up(who, state.clock.wall(), state.settings.operator_step_up_seconds)
        return who

    check.again = (check,)  # type: ignore[attr-defined]
    return check


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


def _instant(value: datetime) -> datetime:
    """In UTC; the first and last hours of the calendar have none in other zones."""
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("is not a time in UTC") from None


#: A time that a caller names: with its zone, and one that the database can hold.
Instant = Annotated[AwareDatetime, AfterValidator(_instant)]
InTx = Annotated[Tx, Depends(transaction)]
Reading = Annotated[Reader, Depends(reader)]
Paging = Annotated[pages.PageRequest, Depends(paging)]
Db = Annotated[Database, Depends(database)]
