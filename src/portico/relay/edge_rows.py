"""What the control plane says of the edge, row by row: tunnels, domains, ended sessions, keys, organizations, certificates.

Each function checks one value of the edge stream (``contracts/edge-stream.schema.json``) and raises ``SnapshotInvalid``. Members
that are not known are passed over: the control plane may be newer than this relay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from portico.errors import catalogue
from portico.wire.grants import KeySet

MAX_ID_CHARS = 128
MAX_HOST_CHARS = 253
MAX_HOSTS = 1024  # of one tunnel
MAX_TOKEN_CHARS = 512
MAX_NUMBER = 2**53 - 1  # what JSON carries exactly everywhere; also beyond any time in seconds
ENDED_FALLBACK = "session.revoked"  # for a code that this relay's catalogue does not know yet
REMOVED_FALLBACK = "tunnel.deleted"
REFUSED_FALLBACK = "edge.account_suspended"
CLOSED_FALLBACK = "edge.domain_blocked"
JWK_MEMBERS = ("kid", "kty", "crv", "x", "alg", "use")  # all that is kept of a key


class SnapshotInvalid(ValueError):
    """A message of the edge stream that is malformed; nothing of it was applied."""


_NO_POLICY: Mapping[str, Any] = {}  # one for all: most tunnels have none


@dataclass(frozen=True, slots=True)
class TunnelRow:
    """One tunnel as the control plane sees it. ``canonical``: the row as received, for hash and copy. ``policy`` is read by
    whoever has the tunnel live: one that this relay does not understand is no fault of the stream."""

    id: str
    organization: str
    hosts: tuple[str, ...]
    state: str
    generation: int
    canonical: bytes
    protocol: str = "http"
    policy_version: int = 0
    policy: Mapping[str, Any] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        return self.state == "active"


@dataclass(frozen=True, slots=True)
class Domain:
    """A customer's name that leads to a tunnel: a host, or ``*.`` and what it stands below. ``valid_until`` (unix seconds): it is
    served by HTTPS alone, and only until then; ``None``: like any other host."""

    id: str
    host: str
    tunnel: str
    valid_until: float | None = None


@dataclass(frozen=True, slots=True)
class Closed:
    """A customer's name that is served to nobody, not by a wildcard above it either; ``code`` is what its visitors are told."""

    id: str
    host: str
    code: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A session that may not come back before ``until`` (unix seconds), by which time its tokens are worthless."""

    session: str
    code: str
    until: float


@dataclass(frozen=True, slots=True)
class Organization:
    """What holds for all tunnels of an organization whose plan has changed since grants began to carry its limits: ``limits`` as
    in grants (with ``connections``, for tunnels that are not HTTP), in force instead of those of an older ``version``; and the
    ``code`` with which traffic is refused until ``until`` (unix seconds), both absent when it is not."""

    id: str
    version: int
    limits: Mapping[str, int]
    code: str | None = None
    until: float = math.inf

    def refuses(self, now: float) -> bool:
        """Whether traffic is refused at ``now`` (unix seconds)."""
        return self.code is not None and now < self.until


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a certificate authority asks this edge about ``host``, to see whose it is; worthless after ``until`` (unix seconds).

    ``type``: http-01 or tls-alpn-01; another one is kept and not answered.
    """

    id: str
    type: str
    host: str
    token: str
    authorization: str
    until: float


@dataclass(frozen=True, slots=True)
class CertificateRef:
    """A version of a domain's certificate by name; ``fingerprint``: SHA-256 of the leaf, hex."""

    id: str
    version: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class CertificateRow:
    """Which version of a domain's certificate serves, and which is to be held ready; contents are asked for (``vault.py``)."""

    domain: str
    hostname: str
    active: CertificateRef | None
    staged: CertificateRef | None
    canonical: bytes


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode  # kept: json.dumps makes one per call


def canonical(value: Any) -> bytes:
    """The one spelling that hashes are taken over: sorted keys, no spaces, ASCII."""
    return _encode(value).encode()


def parse_json(text: bytes) -> Any:
    """JSON without the non-finite numbers that Python would add; raises ``SnapshotInvalid``."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as err:
        raise SnapshotInvalid(f"not JSON: {err}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise SnapshotInvalid(f"{name} is not a JSON number")


def text(value: Any, name: str, limit: int = MAX_ID_CHARS) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= limit:
        raise SnapshotInvalid(f"{name} is not a text of 1 to {limit} characters")
    return value


def whole(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:  # bool is an int to isinstance
        raise SnapshotInvalid(f"{name} is not a whole number")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SnapshotInvalid(f"{name} is not a number")
    if not (math.isfinite(value) and 0 <= value <= MAX_NUMBER):
        raise SnapshotInvalid(f"{name} is out of range")
    return float(value)


def items(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise SnapshotInvalid(f"{name} is not a list")
    return value


def members(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SnapshotInvalid(f"{name} is not an object")
    return value


def tunnel(value: Any) -> TunnelRow:
    row = members(value, "a tunnel")
    hosts = items(row.get("hosts"), "hosts of a tunnel")
    if len(hosts) > MAX_HOSTS:
        raise SnapshotInvalid(f"a tunnel has more than {MAX_HOSTS} hosts")
    return TunnelRow(
        id=text(row.get("id"), "id of a tunnel"),
        organization=text(row.get("organization"), "organization of a tunnel"),
        hosts=tuple(text(host, "a host", MAX_HOST_CHARS) for host in hosts),
        state=text(row.get("state"), "state of a tunnel"),
        generation=whole(row.get("generation"), "generation of a tunnel"),
        canonical=canonical(row),
        protocol=text(row.get("protocol", "http"), "protocol of a tunnel"),
        policy_version=whole(row.get("policy_version", 0), "policy version of a tunnel"),
        policy=members(row.get("policy", {}), "policy of a tunnel") or _NO_POLICY,
    )


def tunnels(values: list[Any]) -> list[TunnelRow]:
    """Rows, some of which may have been checked before. Raises ``SnapshotInvalid``."""
    try:
        return [value if isinstance(value, TunnelRow) else tunnel(value) for value in values]
    except RecursionError:
        raise SnapshotInvalid("nested too deeply") from None


def organization(value: Any) -> Organization:
    row = members(value, "an organization")
    limits = members(row.get("limits", {}), "limits of an organization")
    refuse = row.get("refuse")
    if refuse is not None:
        refuse = members(refuse, "the refusal of an organization")
    return Organization(
        id=text(row.get("id"), "id of an organization"),
        version=whole(row.get("version"), "version of an organization"),
        limits={text(name, "a limit"): whole(limit, "a limit") for name, limit in limits.items()},
        code=known(text(refuse.get("code"), "code of a refusal"), REFUSED_FALLBACK) if refuse is not None else None,
        until=_number(refuse["until"], "until") if refuse is not None and "until" in refuse else math.inf,
    )


def _certificate_ref(value: Any) -> CertificateRef | None:
    if value is None:
        return None
    row = members(value, "a version of a certificate")
    return CertificateRef(
        text(row.get("id"), "id of a certificate"),
        whole(row.get("version"), "version of a certificate"),
        text(row.get("fingerprint"), "fingerprint of a certificate"),
    )


def certificate(value: Any) -> CertificateRow:
    row = members(value, "a certificate")
    return CertificateRow(
        domain=text(row.get("domain"), "domain of a certificate"),
        hostname=text(row.get("hostname"), "host name of a certificate", MAX_HOST_CHARS),
        active=_certificate_ref(row.get("active")),
        staged=_certificate_ref(row.get("staged")),
        canonical=canonical(row),
    )


def told_organization(row: Organization) -> dict[str, Any]:
    """The row as the stream has it, for the copy on disk."""
    found: dict[str, Any] = {"id": row.id, "version": row.version, "limits": dict(row.limits)}
    if row.code is not None:
        found["refuse"] = {"code": row.code} | ({"until": row.until} if math.isfinite(row.until) else {})
    return found


def challenge(value: Any) -> Challenge:
    row = members(value, "a challenge")
    return Challenge(
        id=text(row.get("id"), "id of a challenge"),
        type=text(row.get("type"), "type of a challenge"),
        host=text(row.get("host"), "host of a challenge", MAX_HOST_CHARS),
        token=text(row.get("token"), "token of a challenge", MAX_TOKEN_CHARS),
        authorization=text(row.get("authorization"), "authorization of a challenge", MAX_TOKEN_CHARS),
        until=_number(row.get("until"), "until"),
    )


def domain(value: Any) -> Domain:
    row = members(value, "a domain")
    return Domain(
        id=text(row.get("id"), "id of a domain"),
        host=text(row.get("host"), "host of a domain", MAX_HOST_CHARS),
        tunnel=text(row.get("tunnel"), "tunnel of a domain"),
        valid_until=_number(row["valid_until"], "valid_until") if "valid_until" in row else None,
    )


def told_domain(row: Domain) -> dict[str, Any]:
    """The row as the stream has it, for the copy on disk."""
    found: dict[str, Any] = {"id": row.id, "host": row.host, "tunnel": row.tunnel}
    return found if row.valid_until is None else {**found, "valid_until": row.valid_until}


def closed(value: Any) -> Closed:
    row = members(value, "a closed domain")
    return Closed(
        id=text(row.get("id"), "id of a closed domain"),
        host=text(row.get("host"), "host of a closed domain", MAX_HOST_CHARS),
        code=known(text(row.get("code"), "code of a closed domain"), CLOSED_FALLBACK),
    )


def known(code: str, fallback: str) -> str:
    """A control plane newer than this relay may name codes that this one cannot render."""
    return code if code in catalogue() else fallback


def ended(value: Any) -> Ended:
    row = members(value, "an ended session")
    code = known(text(row.get("code"), "code of an ended session"), ENDED_FALLBACK)
    return Ended(text(row.get("session"), "an ended session"), code, _number(row.get("until"), "until"))


def keys(value: Any) -> tuple[list[dict[str, Any]], KeySet]:
    rows = items(value, "keys")
    try:
        found = KeySet.from_jwks({"keys": rows})
    except (ValueError, TypeError) as err:
        raise SnapshotInvalid(f"keys: {err}") from None
    return [{name: row[name] for name in JWK_MEMBERS if name in row} for row in rows], found
