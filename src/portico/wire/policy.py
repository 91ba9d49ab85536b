"""A tunnel's policy: one document, its three forms, and the typed one that a relay compiles.

    written    by people: YAML or JSON, users with passwords        ──canonical──► checked, defaults left out
    stored     in the database, in grants and on the edge stream: users as argon2id digests, never a password
    Policy     what a relay works with                               ◄──parse────  stored

Pure: no I/O. What may stand in a document is in :mod:`portico.wire.policy_check`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from portico.wire import policy_check
from portico.wire.policy_check import DEFAULT_REALM, HOST_KEPT, MAX_POLICY_BYTES, Fault, PolicyInvalid

__all__ = [
    "AddressRule",
    "Addresses",
    "BasicAuth",
    "Fault",
    "HeaderRules",
    "Policy",
    "PolicyInvalid",
    "Queue",
    "Rate",
    "User",
    "canonical",
    "check_size",
    "digest",
    "parse",
]


@dataclass(frozen=True, slots=True)
class User:
    """A visitor who may sign in; ``digest`` is ``$argon2id$…``."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class BasicAuth:
    """Who may sign in, and what browsers call the place."""

    realm: str
    users: tuple[User, ...]


@dataclass(frozen=True, slots=True)
class AddressRule:
    """Lets a network in or keeps it out. IPv4-mapped IPv6 networks are IPv4 ones here."""

    allow: bool
    network: ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Addresses:
    """The first rule that matches decides, else ``otherwise`` (True: allow)."""

    rules: tuple[AddressRule, ...]
    otherwise: bool


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket: ``requests`` each ``seconds``, ``burst`` at once."""

    requests: int
    seconds: float
    burst: int


@dataclass(frozen=True, slots=True)
class Queue:
    """How many requests may wait for room, and for how long each."""

    requests: int
    seconds: float


@dataclass(frozen=True, slots=True)
class HeaderRules:
    """First ``remove`` (lower-case names), then ``add`` (name, value), in order."""

    remove: frozenset[str] = frozenset()
    add: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """What the edge enforces for one tunnel; the defaults are those of a tunnel without a policy."""

    concurrency: int | None = None
    queue: Queue | None = None
    plain_http: str = "allow"  # allow | refuse | redirect
    basic_auth: BasicAuth | None = None
    client_ca: str | None = None  # PEM
    addresses: Addresses | None = None
    tunnel_rate: Rate | None = None
    client_rate: Rate | None = None
    host: str = HOST_KEPT  # preserve | rewrite | a name
    request: HeaderRules = field(default_factory=HeaderRules)
    response: HeaderRules = field(default_factory=HeaderRules)


def canonical(document: object) -> dict[str, Any]:
    """The document in its one spelling, defaults left out; passwords and digests stay as they are.

    Idempotent. Raises :class:`PolicyInvalid` with every fault.
    """
    clean, faults = policy_check.check(document)
    if faults:
        raise PolicyInvalid(faults)
    check_size(clean)
    return clean


def check_size(clean: Mapping[str, Any]) -> None:
    """Raises :class:`PolicyInvalid` for a canonical document that does not fit a grant."""
    if (size := len(_text(clean))) > MAX_POLICY_BYTES:
        what = f"the policy has {size} bytes as JSON without its defaults; at most {MAX_POLICY_BYTES}"
        raise PolicyInvalid([Fault("", what)])


def digest(document: Mapping[str, Any]) -> str:
    """The ``policy_hash`` of a canonical document: equal documents, equal hashes."""
    return hashlib.sha256(_text(document).encode()).hexdigest()[:32]


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def parse(document: Mapping[str, Any]) -> Policy:
    """The policy that a stored document states. Raises :class:`PolicyInvalid`, for a user without a digest too."""
    clean = canonical(document)
    rates, headers = clean.get("rate_limits", {}), clean.get("headers", {})
    return Policy(
        concurrency=clean.get("concurrency"),
        queue=Queue(**clean["queue"]) if "queue" in clean else None,
        plain_http=clean.get("plain_http", "allow"),
        basic_auth=_basic_auth(clean["basic_auth"]) if "basic_auth" in clean else None,
        client_ca=clean["client_certificates"]["ca"] if "client_certificates" in clean else None,
        addresses=_addresses(clean["addresses"]) if "addresses" in clean else None,
        tunnel_rate=_rate(rates.get("tunnel")),
        client_rate=_rate(rates.get("client")),
        host=headers.get("host", HOST_KEPT),
        request=_header_rules(headers.get("request", {})),
        response=_header_rules(headers.get("response", {})),
    )


def _basic_auth(clean: Mapping[str, Any]) -> BasicAuth:
    if missing := [index for index, user in enumerate(clean["users"]) if "digest" not in user]:
        what = "needs a digest: a relay never sees a password"
        raise PolicyInvalid([Fault(f"basic_auth.users[{index}]", what) for index in missing])
    users = tuple(User(user["name"], user["digest"]) for user in clean["users"])
    return BasicAuth(clean.get("realm", DEFAULT_REALM), users)


def _addresses(clean: Mapping[str, Any]) -> Addresses:
    rules = clean.get("rules", [])
    otherwise = clean.get("otherwise", policy_check.otherwise_of(rules))
    return Addresses(tuple(_rule(rule) for rule in rules), otherwise == "allow")


def _rule(rule: Mapping[str, str]) -> AddressRule:
    ((kind, text),) = rule.items()
    return AddressRule(kind == "allow", ipaddress.ip_network(text))


def _rate(clean: Mapping[str, Any] | None) -> Rate | None:
    if clean is None:
        return None
    requests = clean["requests"]
    return Rate(requests, clean.get("seconds", 1), clean.get("burst", requests))


def _header_rules(clean: Mapping[str, Any]) -> HeaderRules:
    added = tuple((rule["name"], rule["value"]) for rule in clean.get("add", []))
    return HeaderRules(frozenset(clean.get("remove", ())), added)
