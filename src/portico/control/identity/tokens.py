"""Access tokens: short Ed25519 JWTs that name a person's sign-in session.

The token proves who; whether the session still stands is asked of the database on every request, so an ended session
is refused at once and not when its token expires.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portico.errors import Problem
from portico.kit import jwt

ISSUER = "portico"
AUDIENCE = "api"
TYPE = "portico-access+jwt"


@dataclass(frozen=True, slots=True)
class AccessClaims:
    """What an access token says."""

    user: str
    session: str
    organization: str | None  # none: a person who belongs to none


def issue(signer: jwt.SigningKey, claims: AccessClaims, now: float, life_seconds: int) -> str:
    """A signed access token that lives ``life_seconds`` from ``now`` (Unix time)."""
    issued = int(now)
    return signer.sign(
        TYPE,
        {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": claims.user,
            "sid": claims.session,
            "org": claims.organization,
            "iat": issued,
            "nbf": issued,
            "exp": issued + life_seconds,
        },
    )


def verify(token: str, keys: jwt.KeySet, now: float, leeway: float) -> AccessClaims:
    """The claims of a valid token; raises ``auth.token_invalid`` or ``auth.token_expired``. Both bounds have leeway."""
    try:
        claims = jwt.verify(token, keys, typ=TYPE)
    except jwt.InvalidToken as err:
        raise Problem("auth.token_invalid", f"the access token is not valid: {err}") from None
    issued, start, end = (_time(claims, name) for name in ("iat", "nbf", "exp"))
    if claims.get("iss") != ISSUER or claims.get("aud") != AUDIENCE:
        raise Problem("auth.token_invalid", "the token is not for this API")
    if max(issued, start) > now + leeway:
        raise Problem("auth.token_invalid", "the token is from the future")
    if end <= now - leeway:
        raise Problem("auth.token_expired")
    return AccessClaims(_text(claims, "sub"), _text(claims, "sid"), _organization(claims))


def _time(claims: dict[str, Any], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Problem("auth.token_invalid", f"the token has no {name}")
    return value


def _organization(claims: dict[str, Any]) -> str | None:
    return None if claims.get("org", "") is None else _text(claims, "org")


def _text(claims: dict[str, Any], name: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not value:
        raise Problem("auth.token_invalid", f"the token has no {name}")
    return value
