"""What a relay believes: session tokens (who may connect) and grants (what may be bound), signed by the control plane.

Pure: the caller passes the keys and the time. Every claim is checked for type and size before it is used, also behind a
valid signature, so that a fault of the control plane is a refusal here and not a crash in the relay.

A token's life is ``[nbf, exp]``. ``leeway`` forgives clocks that differ, on both sides; ``grace`` accepts a token that
expired for less than that, and is given only while the relay itself cannot reach the control plane.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

from portico.errors import Problem
from portico.kit import jwt
from portico.kit.jwt import KeySet

__all__ = [
    "GrantClaims",
    "GrantHost",
    "KeySet",
    "SessionClaims",
    "grant_claims",
    "session_claims",
    "verify_grant",
    "verify_session",
]

ISSUER: Final = "portico"
AUDIENCE: Final = "relay"
SESSION_TYP: Final = "portico-session+jwt"
GRANT_TYP: Final = "portico-grant+jwt"
MAX_GRANT_BYTES: Final = 16_000  # with a policy of the largest size; it has to fit one BIND frame
DEFAULT_LEEWAY_SECONDS: Final = 60.0

MAX_ID_CHARS: Final = 64
MAX_NAME_CHARS: Final = 128
MAX_URL_CHARS: Final = 300
MAX_HOSTS: Final = 16
MAX_LIMITS: Final = 32
MAX_GENERATION: Final = 2**53 - 1  # what JSON carries exactly everywhere
MAX_TIME: Final = 2**40  # seconds; beyond any date, small enough for exact arithmetic

Protocol = Literal["http", "tcp", "tls"]
TlsMode = Literal["terminate", "passthrough"]
_PROTOCOLS: Final = frozenset(("http", "tcp", "tls"))
_TLS_MODES: Final = frozenset(("terminate", "passthrough"))
_HOST = re.compile(r"(?=.{1,253}\Z)(\*|[a-z0-9_][a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*\Z")


class _Malformed(ValueError):
    """One claim is missing or not what it must be; becomes the token's own problem code."""


def _text(claims: Mapping[str, Any], name: str, limit: int = MAX_ID_CHARS) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= limit:
        raise _Malformed(f"claim {name} is not a text of 1 to {limit} characters")
    return value


def _whole(claims: Mapping[str, Any], name: str, limit: int = MAX_GENERATION) -> int:
    value = claims.get(name)
    if type(value) is not int or not 0 <= value <= limit:  # bool is an int to isinstance
        raise _Malformed(f"claim {name} is not a whole number from 0 to {limit}")
    return value


def _mapping(claims: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = claims.get(name)
    if not isinstance(value, dict):
        raise _Malformed(f"claim {name} is not an object")
    return value


def _constant(claims: Mapping[str, Any], name: str, expected: str) -> None:
    if claims.get(name) != expected:
        raise _Malformed(f"claim {name} is not {expected}")


@dataclass(frozen=True, slots=True)
class SessionClaims:
    """Who may connect: one agent instance (``agent``) of one agent key (``sub``), at one generation."""

    sub: str
    sid: str
    org: str
    agent: str
    region: str | None
    gen: int
    iat: int
    nbf: int
    exp: int

    @classmethod
    def parse(cls, claims: Mapping[str, Any]) -> SessionClaims:
        """Raises ``session.token_invalid`` when a claim is missing or malformed."""
        try:
            _constant(claims, "iss", ISSUER)
            _constant(claims, "aud", AUDIENCE)
            return cls(
                sub=_text(claims, "sub"),
                sid=_text(claims, "sid"),
                org=_text(claims, "org"),
                agent=_text(claims, "agent"),
                region=None if claims.get("region") is None else _text(claims, "region"),
                gen=_whole(claims, "gen"),
                iat=_whole(claims, "iat", MAX_TIME),
                nbf=_whole(claims, "nbf", MAX_TIME),
                exp=_whole(claims, "exp", MAX_TIME),
            )
        except _Malformed as err:
            raise Problem("session.token_invalid", f"the session token is not valid: {err}") from None


@dataclass(frozen=True, slots=True)
class GrantHost:
    """One public host of a tunnel: lower-case, without port, and who ends TLS for it."""

    host: str
    tls: TlsMode


@dataclass(frozen=True, slots=True)
class GrantClaims:
    """What may be bound: one tunnel, by the session ``sid``, with its hosts, limits and policy."""

    sid: str
    org: str
    tun: str
    name: str
    proto: Protocol
    hosts: tuple[GrantHost, ...]
    limits: Mapping[str, int]
    gen: int
    policy_hash: str
    url: str
    iat: int
    nbf: int
    exp: int
    policy: Mapping[str, Any] = field(default_factory=dict)
    policy_version: int = 0  # order among policies of this tunnel; of a grant without it: before all others
    port: int | None = None  # public port, of a tcp tunnel alone

    @classmethod
    def parse(cls, claims: Mapping[str, Any]) -> GrantClaims:
        """Raises ``tunnel.grant_invalid`` when a claim is missing or malformed."""
        try:
            _constant(claims, "iss", ISSUER)
            _constant(claims, "aud", AUDIENCE)
            return cls(
                sid=_text(claims, "sid"),
                org=_text(claims, "org"),
                tun=_text(claims, "tun"),
                name=_text(claims, "name", MAX_NAME_CHARS),
                proto=_protocol(claims),
                hosts=_hosts(claims),
                limits=_limits(claims),
                gen=_whole(claims, "gen"),
                policy_hash=_text(claims, "policy_hash", MAX_NAME_CHARS),
                url=_text(claims, "url", MAX_URL_CHARS),
                iat=_whole(claims, "iat", MAX_TIME),
                nbf=_whole(claims, "nbf", MAX_TIME),
                exp=_whole(claims, "exp", MAX_TIME),
                policy=_mapping(claims, "policy"),
                policy_version=_whole(claims, "policy_version") if "policy_version" in claims else 0,
                port=_port(claims),
            )
        except _Malformed as err:
            raise Problem("tunnel.grant_invalid", f"the grant is not valid: {err}") from None


def _protocol(claims: Mapping[str, Any]) -> Protocol:
    value = claims.get("proto")
    if not isinstance(value, str) or value not in _PROTOCOLS:
        raise _Malformed("claim proto is not http, tcp or tls")
    return cast(Protocol, value)


def _hosts(claims: Mapping[str, Any]) -> tuple[GrantHost, ...]:
    rows = claims.get("hosts")
    if not isinstance(rows, list) or len(rows) > MAX_HOSTS:
        raise _Malformed(f"claim hosts is not a list of at most {MAX_HOSTS}")
    return tuple(_host(row) for row in rows)


def _host(row: Any) -> GrantHost:
    if not isinstance(row, dict):
        raise _Malformed("claim hosts holds something that is not an object")
    host, tls = row.get("host"), row.get("tls")
    if not isinstance(host, str) or not _HOST.match(host):
        raise _Malformed("claim hosts holds a name that is not a lower-case host without port")
    if not isinstance(tls, str) or tls not in _TLS_MODES:
        raise _Malformed("claim hosts holds a TLS mode that is not terminate or passthrough")
    return GrantHost(host, cast(TlsMode, tls))


def _port(claims: Mapping[str, Any]) -> int | None:
    if claims.get("proto") != "tcp":
        return None
    port = _whole(claims, "port", 65_535)
    if not port:
        raise _Malformed("claim port is 0")
    return port


def _limits(claims: Mapping[str, Any]) -> dict[str, int]:
    limits = _mapping(claims, "limits")
    if len(limits) > MAX_LIMITS:
        raise _Malformed(f"claim limits holds more than {MAX_LIMITS}")
    return {name: _whole(limits, name) for name in limits}


def session_claims(
    *, key: str, session: str, organization: str, agent: str, region: str | None, generation: int, now: int, life: int
) -> dict[str, Any]:
    """The claims that the control plane signs as ``SESSION_TYP``."""
    return {
        "iss": ISSUER, "aud": AUDIENCE, "sub": key, "sid": session, "org": organization, "agent": agent,
        "region": region, "gen": generation, "iat": now, "nbf": now, "exp": now + life,
    }  # fmt: skip


def grant_claims(
    *,
    session: str,
    organization: str,
    tunnel: str,
    name: str,
    protocol: str,
    hosts: list[dict[str, str]],
    limits: Mapping[str, int],
    generation: int,
    policy_hash: str,
    policy: Mapping[str, Any],
    url: str,
    now: int,
    life: int,
    policy_version: int = 0,
    port: int | None = None,
) -> dict[str, Any]:
    """The claims that the control plane signs as ``GRANT_TYP``; ``port`` is there for a tcp tunnel alone."""
    claims: dict[str, Any] = {
        "iss": ISSUER, "aud": AUDIENCE, "sid": session, "org": organization, "tun": tunnel, "name": name,
        "proto": protocol, "hosts": hosts, "limits": dict(limits), "gen": generation, "policy_hash": policy_hash,
        "policy": dict(policy), "policy_version": policy_version, "url": url, "iat": now, "nbf": now, "exp": now + life,
    }  # fmt: skip
    return claims if port is None else claims | {"port": port}


def _check_times(
    what: str, codes: tuple[str, str], claims: SessionClaims | GrantClaims, now: float, leeway: float, grace: float
) -> None:
    """Refuses with ``codes`` = (invalid, expired). From the future is invalid: waiting is no cure the holder has."""
    invalid, expired = codes
    if claims.exp <= claims.nbf:
        raise Problem(invalid, f"the {what} ends before it begins")
    if max(claims.nbf, claims.iat) > now + leeway:
        raise Problem(invalid, f"the {what} is not valid yet; the clocks of relay and control plane differ")
    if now > claims.exp + leeway + grace:
        raise Problem(expired, f"the {what} expired {int(now - claims.exp)} s ago")


def verify_session(
    token: str, keys: KeySet, now: float, *, leeway: float = DEFAULT_LEEWAY_SECONDS, grace: float = 0.0
) -> SessionClaims:
    """The claims of a session token that is valid at ``now`` (unix seconds).

    Raises ``session.token_invalid`` or, for a good token that is too old, ``session.token_expired``.
    """
    try:
        raw = jwt.verify(token, keys, typ=SESSION_TYP)
    except jwt.InvalidToken as err:
        raise Problem("session.token_invalid", f"the session token is not valid: {err}") from None
    claims = SessionClaims.parse(raw)
    _check_times("session token", ("session.token_invalid", "session.token_expired"), claims, now, leeway, grace)
    return claims


def verify_grant(
    token: str,
    keys: KeySet,
    now: float,
    *,
    session: SessionClaims | None = None,
    leeway: float = DEFAULT_LEEWAY_SECONDS,
    grace: float = 0.0,
) -> GrantClaims:
    """The claims of a grant that is valid at ``now``, and bound to ``session`` when one is given.

    Raises ``tunnel.grant_invalid`` (another session's or organization's grant too) or ``tunnel.grant_expired``.
    """
    try:
        raw = jwt.verify(token, keys, typ=GRANT_TYP, limit=MAX_GRANT_BYTES)
    except jwt.InvalidToken as err:
        raise Problem("tunnel.grant_invalid", f"the grant is not valid: {err}") from None
    claims = GrantClaims.parse(raw)
    if session is not None and (claims.sid != session.sid or claims.org != session.org):
        raise Problem("tunnel.grant_invalid", "the grant belongs to another session")
    _check_times("grant", ("tunnel.grant_invalid", "tunnel.grant_expired"), claims, now, leeway, grace)
    return claims
