"""A tunnel's policy as the relay enforces it: parsed once when it changes, and then only looked up.

    document (grant, edge row) ──wire.policy.parse──► Policy ──► Compiled ──► decide.py (rules), exchange.py (header fields)

Equal documents share one :class:`Compiled` for as long as a tunnel has it. A document that does not parse makes none, so that
it never replaces one that did.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from portico.kit.memo import Memo
from portico.relay import decide, heads
from portico.relay.credentials import Accounts
from portico.relay.line import Line
from portico.wire import policy as documents
from portico.wire.policy import HeaderRules, PolicyInvalid

if TYPE_CHECKING:
    from portico.relay.edge_rows import Organization
    from portico.relay.rates import TunnelRates

__all__ = ["OPEN", "AddressSet", "Compiled", "Governed", "PolicyInvalid", "compiled"]

#: Answers of an address set that are remembered, per policy.
MAX_ADDRESSES: Final = 4096
#: Heads of answers that are remembered for one policy with rules for them: entries, and bytes of each.
ANSWERS_MAX, ANSWER_BYTES = 128, 2048


class AddressSet:
    """First match over allow and deny rules. An address that is none (a Unix socket's) is allowed by no rule."""

    def __init__(self, rules: documents.Addresses) -> None:
        self._rules: dict[int, list[tuple[int, int, bool]]] = {4: [], 6: []}
        for rule in rules.rules:
            net = rule.network
            self._rules[net.version].append((int(net.netmask), int(net.network_address), rule.allow))
        self._otherwise = rules.otherwise
        self._known: dict[str, bool] = {}

    def allow(self, address: str) -> bool:
        """Whether a client at ``address`` (IPv4 or IPv6 as text; an IPv4-mapped one is IPv4) may come in."""
        found = self._known.get(address)
        if found is None:
            if len(self._known) >= MAX_ADDRESSES:
                self._known.clear()
            found = self._known[address] = self._judge(address)
        return found

    def _judge(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        number = int(ip)
        for mask, network, allow in self._rules[ip.version]:
            if number & mask == network:
                return allow
        return self._otherwise


class Edits:
    """Rules for header fields: remove by name, then add."""

    def __init__(self, rules: HeaderRules, *, drop: frozenset[bytes] = frozenset(), host: bytes | None = None) -> None:
        """``drop``: lower-case names that go too. ``host``: what ``Host`` becomes, empty for none at all."""
        self._remove = frozenset(name.lower().encode() for name in rules.remove) | drop
        self._add = [part.encode("latin-1") for pair in rules.add for part in pair]
        self._host = host

    def __bool__(self) -> bool:
        return bool(self._remove or self._add or self._host is not None)

    def __call__(self, fields: list[bytes]) -> list[bytes]:
        """The flat fields after the rules, as a new list; repeated fields stay repeated and in order."""
        remove, host = self._remove, self._host
        kept: list[bytes] = []
        for at in range(0, len(fields), 2):
            name = fields[at].lower()
            if name in remove:
                continue
            if name == b"host" and host is not None:
                if host:
                    kept += (fields[at], host)
                continue
            kept += fields[at : at + 2]
        kept += self._add
        return kept

    def strip(self, fields: list[bytes]) -> list[bytes]:
        """The flat fields without those that are removed: of trailers and interim answers, to which nothing is added."""
        return heads.without(fields, self._remove) if self._remove else fields


class Compiled:
    """See the module. ``request`` and ``response`` are ``None`` where nothing is edited."""

    __slots__ = (
        "__weakref__", "addresses", "answers", "client_ca", "client_ca_pem", "client_rate", "concurrency", "plain_http", "queue",
        "realm", "request", "response", "tunnel_rate", "users",
    )  # fmt: skip

    def __init__(self, policy: documents.Policy) -> None:
        auth = policy.basic_auth
        self.concurrency = policy.concurrency
        self.queue = policy.queue
        self.plain_http = policy.plain_http
        self.users = Accounts(auth.users) if auth is not None else None
        self.realm = auth.realm if auth is not None else ""
        self.client_ca_pem = policy.client_ca
        self.client_ca = client_ca_hash(policy.client_ca) if policy.client_ca is not None else None
        self.addresses = AddressSet(policy.addresses) if policy.addresses is not None else None
        self.tunnel_rate = policy.tunnel_rate
        self.client_rate = policy.client_rate
        # Credentials of the edge are the edge's: the target never sees them.
        edge_credentials = frozenset((b"authorization",)) if auth is not None else frozenset[bytes]()
        request = Edits(policy.request, drop=edge_credentials, host=_host(policy.host))
        response = Edits(policy.response)
        self.request = request if request else None
        self.response = response if response else None
        #: RESPONSE payload → the head for an ordinary visitor; what is the same under every policy is remembered for all.
        self.answers: Memo[heads.KnownAnswer] = (
            Memo(ANSWERS_MAX, ANSWER_BYTES) if self.response is not None else heads.KNOWN_ANSWERS
        )


def client_ca_hash(pem: str) -> str:
    """What a client certificate authority is known by: connections say which one they were checked against."""
    return hashlib.sha256(pem.encode()).hexdigest()


def _host(rule: str) -> bytes | None:
    if rule == "preserve":
        return None
    return b"" if rule == "rewrite" else rule.encode()


_COMPILED: weakref.WeakValueDictionary[bytes, Compiled] = weakref.WeakValueDictionary()


def compiled(document: Mapping[str, Any]) -> Compiled:
    """The compiled form of a stored policy document. Raises ``PolicyInvalid``."""
    key = hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).digest()
    found = _COMPILED.get(key)
    if found is None:
        found = Compiled(documents.parse(document))
        _COMPILED[key] = found
    return found


#: The policy of a tunnel that declares nothing; kept, since most tunnels have it.
OPEN: Final = Compiled(documents.Policy())
_COMPILED[hashlib.sha256(b"{}").digest()] = OPEN


class Governed:
    """A tunnel as the decision sees it: its policy, the limits of its grant, and the chain that follows from both.

    ``rates`` is what ``rates_of`` made of them (``None``: no rate is set anywhere). Streams in flight keep what they began with.
    """

    __slots__ = (
        "allowance",
        "barred",
        "chain",
        "concurrency",
        "document",
        "inflight",
        "line",
        "passthrough",
        "policy",
        "policy_version",
        "rates",
        "raw",
        "strict",
    )

    def __init__(self, *, raw: bool = False, passthrough: bool = False) -> None:
        self.raw = raw or passthrough
        self.passthrough = passthrough
        self.policy = OPEN
        self.policy_version = -1
        self.document: Mapping[str, Any] = {}
        self.allowance = 0  # requests in flight by the plan
        self.barred: Organization | None = None
        self.concurrency = 0
        self.inflight = 0
        self.rates: TunnelRates | None = None
        self.line: Line | None = None
        self.strict = False  # a domain that is served by HTTPS with a good certificate alone leads to it
        self.chain = decide.chain(self, raw=self.raw)

    def govern(self, version: int, document: Mapping[str, Any]) -> bool:
        """Take a policy unless it is older than the one held; whether it was taken. Raises ``PolicyInvalid``, with nothing
        changed."""
        if version <= self.policy_version:
            return False
        self.policy = compiled(document)
        self.document = document
        self.policy_version = version
        return True

    def bar(self, organization: Organization | None) -> None:
        """Note what the standing of its organization says; :meth:`settle` is called after it."""
        self.barred = organization if organization is not None and organization.code is not None else None

    def settle(self, rates: TunnelRates | None) -> None:
        """Make what follows from policy and grant; called after either has changed."""
        own = self.policy.concurrency
        self.concurrency = self.allowance if own is None else min(own, self.allowance)
        self.rates = rates
        self._settle_line()
        self.chain = decide.chain(self, raw=self.raw)

    def _settle_line(self) -> None:
        line, rule = self.line, None if self.raw else self.policy.queue
        if line is None:
            self.line = Line(self, rule) if rule is not None else None
        elif rule is None:
            self.line = None
            line.dissolve()
        else:
            line.rule = rule
            line.freed()  # there may be more places now
