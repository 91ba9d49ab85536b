"""A tunnel's policy at the API: read what was sent, complete it from what is stored, and say every fault with its place.

    document or text ──read──► Wanted ──passwords (visitors.py)──► Wanted ──settle(stored)──► stored form and its hash

What may stand in a policy is the wire's knowledge (:mod:`portico.wire.policy_check`); whether CA certificates are
certificates is checked here, where there is a parser.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from cryptography import x509

from portico.control.identity.plans import Entitlements
from portico.errors import Problem
from portico.kit import marked
from portico.kit.marked import Marks
from portico.settings import ApiSettings
from portico.wire import policy, policy_check
from portico.wire.policy import Fault, PolicyInvalid, digest

SMALL_BYTES: Final = 512  # a few users or rules
MAX_TEXT_CHARS: Final = 65_536  # of a policy written as text, with its comments


@dataclass(frozen=True, slots=True)
class Wanted:
    """A policy that a caller wants: canonical; users have a password, a digest, or neither (the stored one is kept)."""

    document: dict[str, Any]
    marks: Marks = field(default_factory=dict)

    def passwords(self) -> list[tuple[str, str]]:
        """(user, password) of those users who are given with one."""
        return [(user["name"], user["password"]) for user in self._users() if "password" in user]

    def with_digests(self, digests: Mapping[tuple[str, str], str]) -> Wanted:
        """The same with a digest, of ``digests`` by (user, password), in the place of each password."""
        if not self.passwords():
            return self
        users = [
            {"name": user["name"], "digest": digests[user["name"], user["password"]]} if "password" in user else user
            for user in self._users()
        ]
        auth = self.document["basic_auth"] | {"users": users}
        return replace(self, document=self.document | {"basic_auth": auth})

    def settle(self, protocol: str, stored: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """The stored form and its ``policy_hash``, for a tunnel of ``protocol`` whose policy is ``stored`` so far.

        Raises ``tunnel.policy_invalid``: a key that the protocol cannot enforce, a user without a password, one byte too many.
        """
        faults = policy_check.check_protocol(self.document, protocol)
        document = self.document
        if users := self._users():
            known = {user["name"]: user["digest"] for user in stored.get("basic_auth", {}).get("users", ())}
            full = [user if "digest" in user else user | {"digest": known.get(user["name"])} for user in users]
            faults += [
                Fault(f"basic_auth.users[{index}]", "needs a password: the tunnel has none for a user of this name")
                for index, user in enumerate(full)
                if user["digest"] is None
            ]
            document = document | {"basic_auth": document["basic_auth"] | {"users": full}}
        if faults:
            raise refusal(faults, self.marks)
        try:
            policy.check_size(document)  # digests are longer than passwords; the rest was checked when it was read
        except PolicyInvalid as err:
            raise refusal(err.faults, self.marks) from None
        return document, digest(document)

    def _users(self) -> list[dict[str, Any]]:
        users: list[dict[str, Any]] = self.document.get("basic_auth", {}).get("users", [])
        return users


NONE: Final = Wanted({})


def organization_limits(settings: ApiSettings, held: Entitlements) -> dict[str, int]:
    """What relays enforce for an organization: its plan's limits, or the installation's ceilings where those are lower."""
    found = {
        "concurrency": _least(settings.tunnel_concurrency, held.limit("concurrency")),
        "connections": _least(settings.tunnel_connections, held.limit("connections")),
    }
    ceiling, plan = settings.organization_requests_per_second, held.limit("requests_per_second")
    if ceiling and (plan is None or ceiling <= plan):
        found["org_requests"] = ceiling
        found["org_burst"] = settings.organization_requests_burst or 2 * ceiling
    elif plan is not None:
        found["org_requests"], found["org_burst"] = max(plan, 1), max(2 * plan, 1)
    return found


def limits(settings: ApiSettings, protocol: str, held: Entitlements) -> dict[str, int]:
    """The limits that a grant carries. A policy lowers them at the relay, where it can change at once; so does a change of the
    plan, of which ``version`` says whether the grant knows it."""
    found = organization_limits(settings, held)
    connections = found.pop("connections")
    if protocol != "http":
        found["concurrency"] = connections
    return found | {"version": held.revision} if held.revision else found


def _least(ceiling: int, plan: int | None) -> int:
    return ceiling if plan is None else max(1, min(ceiling, plan))


def needs(protocol: str, document: Mapping[str, Any]) -> list[str]:
    """The features of a plan that a tunnel with this policy needs."""
    found = [protocol] if protocol != "http" else []
    if "client_certificates" in document:
        found.append("mtls")
    if "addresses" in document:
        found.append("ip_rules")
    return found


def read(written: Mapping[str, Any] | str) -> Wanted:
    """What the caller sent: a document, or one as YAML or JSON text. Raises ``tunnel.policy_invalid`` with every fault."""
    marks: Marks = {}
    try:
        if isinstance(written, str):
            written, marks = _text(written)
        document = policy.canonical(written)
        _check_certificates(document)
    except PolicyInvalid as err:
        raise refusal(err.faults, marks) from None
    return Wanted(document, marks)


def _text(text: str) -> tuple[Any, Marks]:
    if len(text) > MAX_TEXT_CHARS:
        raise PolicyInvalid([Fault("", f"the text has {len(text)} characters; at most {MAX_TEXT_CHARS}")])
    try:
        found = marked.load(text)
    except marked.Unreadable as err:
        raise refusal([Fault("", str(err))], {"": err.place}) from None
    if found.faults:
        raise refusal([Fault(path, message) for path, message in found.faults], found.marks)
    return found.value, found.marks


def _check_certificates(document: Mapping[str, Any]) -> None:
    if "client_certificates" not in document:
        return
    try:
        x509.load_pem_x509_certificates(document["client_certificates"]["ca"].encode())
    except ValueError:
        raise PolicyInvalid([Fault("client_certificates.ca", "holds something that is no X.509 certificate")]) from None


def refusal(faults: Sequence[Fault], marks: Marks) -> Problem:
    """``tunnel.policy_invalid`` with ``errors``: the path, the place in the text if there was one, and what is wrong.

    Each has also the ``field``, ``message`` and ``type`` that errors of every other request have.
    """
    errors = []
    for fault in faults:
        place = marked.nearest(marks, fault.path)
        where = {"line": place.line, "column": place.column} if place is not None else {}
        common = {"field": f"policy.{fault.path}".rstrip("."), "message": fault.message, "type": "policy"}
        errors.append({**common, "path": fault.path, **where, "detail": fault.message})
    first = faults[0]
    what = f"policy.{first.path}: {first.message}" if first.path else first.message
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Problem("tunnel.policy_invalid", what + more, path=first.path, errors=errors)


def weighs(document: Mapping[str, Any]) -> bool:
    """Whether a policy may count among those that have a limit together; one that is sent has users without their digests."""
    return 2 * size(document) > SMALL_BYTES


def size(document: Mapping[str, Any]) -> int:
    """Bytes of a stored policy as JSON."""
    return len(json.dumps(document)) if document else 2


def stored(text: str) -> dict[str, Any]:
    """A policy as a raw row has it, which is JSON as text."""
    document: dict[str, Any] = json.loads(text) if text != "{}" else {}
    return document


def told(document: Mapping[str, Any]) -> dict[str, Any]:
    """The policy as the audit log and histories have it: as :func:`shown`, and header fields by name alone. What is added to a
    request may be a credential of the target, and those logs are kept for long and read by others."""
    found = shown(document)
    if "headers" in found:
        found["headers"] = {part: _names(rules) for part, rules in found["headers"].items()}
    return found


def _names(rules: Any) -> Any:
    """Header rules without the values that they add; the rule for ``Host`` as it is."""
    if not isinstance(rules, dict) or "add" not in rules:
        return rules
    return {**rules, "add": [{"name": rule["name"]} for rule in rules["add"]]}


def shown(document: Mapping[str, Any]) -> dict[str, Any]:
    """The policy as callers see it: users by name alone."""
    if "basic_auth" not in document:
        return dict(document)
    users = [{"name": user["name"]} for user in document["basic_auth"]["users"]]
    return {**document, "basic_auth": {**document["basic_auth"], "users": users}}
