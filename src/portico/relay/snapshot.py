"""What the relay knows about the world: tunnels by id and by host, ended sessions, verification keys.

The control plane streams it (``control_link``): one snapshot, then deltas, each with the version that it leads to. All
look-ups are one dictionary access. A message is checked whole before any of it is applied, so a malformed one changes
nothing; the caller then asks for a new snapshot. Whoever must act at once on a change (the session table unbinds
tunnels) listens with ``on_change``.

``SnapshotStore`` keeps a copy in the state folder, so that a relay that restarts while the control plane is out of
reach still knows keys, hosts and ended sessions, and resumes the stream at its version.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from portico.errors import catalogue
from portico.relay import statefiles
from portico.wire.grants import KeySet

log = logging.getLogger(__name__)

MAX_ID_CHARS = 128
MAX_HOST_CHARS = 253
MAX_HOSTS = 1024  # of one tunnel
MAX_TOKEN_CHARS = 512
MAX_NUMBER = 2**53 - 1  # what JSON carries exactly everywhere; also beyond any time in seconds
ENDED_FALLBACK = "session.revoked"  # for a code that this relay's catalogue does not know yet
REMOVED_FALLBACK = "tunnel.deleted"
REFUSED_FALLBACK = "edge.account_suspended"
JWK_MEMBERS = ("kid", "kty", "crv", "x", "alg", "use")  # all that is kept of a key
CHUNK_ROWS = 500  # checked between two turns of the loop: some milliseconds
PRUNE_MARGIN_SECONDS = 300.0  # an ended session is kept this much longer: the clocks of relay and API may differ

Kind = Literal[
    "tunnel", "tunnel_removed", "session_ended", "keys", "organization", "challenge", "certificate", "domain"
]  # fmt: skip


class SnapshotInvalid(ValueError):
    """A message of the edge stream that is malformed; nothing of it was applied."""


class OutOfOrder(SnapshotInvalid):
    """A delta that does not follow the state held; only a new snapshot helps."""


_NONE: Mapping[str, Any] = {}
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


@dataclass(frozen=True, slots=True)
class Change:
    """What listeners get: ``id`` of tunnel, session, organization, domain or (of a certificate) its domain, the ``row`` of a
    tunnel that exists, the ``code`` of an end, the ``tunnels`` that a domain led or leads to."""

    kind: Kind
    id: str = ""
    row: TunnelRow | None = None
    code: str = ""
    tunnels: tuple[str, ...] = ()


Listener = Callable[[Change], None]


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


def _text(value: Any, name: str, limit: int = MAX_ID_CHARS) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= limit:
        raise SnapshotInvalid(f"{name} is not a text of 1 to {limit} characters")
    return value


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:  # bool is an int to isinstance
        raise SnapshotInvalid(f"{name} is not a whole number")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SnapshotInvalid(f"{name} is not a number")
    if not (math.isfinite(value) and 0 <= value <= MAX_NUMBER):
        raise SnapshotInvalid(f"{name} is out of range")
    return float(value)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise SnapshotInvalid(f"{name} is not a list")
    return value


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SnapshotInvalid(f"{name} is not an object")
    return value


def _tunnel(value: Any) -> TunnelRow:
    row = _object(value, "a tunnel")
    hosts = _list(row.get("hosts"), "hosts of a tunnel")
    if len(hosts) > MAX_HOSTS:
        raise SnapshotInvalid(f"a tunnel has more than {MAX_HOSTS} hosts")
    return TunnelRow(
        id=_text(row.get("id"), "id of a tunnel"),
        organization=_text(row.get("organization"), "organization of a tunnel"),
        hosts=tuple(_text(host, "a host", MAX_HOST_CHARS) for host in hosts),
        state=_text(row.get("state"), "state of a tunnel"),
        generation=_whole(row.get("generation"), "generation of a tunnel"),
        canonical=canonical(row),
        protocol=_text(row.get("protocol", "http"), "protocol of a tunnel"),
        policy_version=_whole(row.get("policy_version", 0), "policy version of a tunnel"),
        policy=_object(row.get("policy", {}), "policy of a tunnel") or _NO_POLICY,
    )


def _tunnels(values: list[Any]) -> list[TunnelRow]:
    """Rows, some of which may have been checked before. Raises ``SnapshotInvalid``."""
    try:
        return [value if isinstance(value, TunnelRow) else _tunnel(value) for value in values]
    except RecursionError:
        raise SnapshotInvalid("nested too deeply") from None


def _organization(value: Any) -> Organization:
    row = _object(value, "an organization")
    limits = _object(row.get("limits", {}), "limits of an organization")
    refuse = row.get("refuse")
    if refuse is not None:
        refuse = _object(refuse, "the refusal of an organization")
    return Organization(
        id=_text(row.get("id"), "id of an organization"),
        version=_whole(row.get("version"), "version of an organization"),
        limits={_text(name, "a limit"): _whole(limit, "a limit") for name, limit in limits.items()},
        code=_known(_text(refuse.get("code"), "code of a refusal"), REFUSED_FALLBACK) if refuse is not None else None,
        until=_number(refuse["until"], "until") if refuse is not None and "until" in refuse else math.inf,
    )


def _certificate_ref(value: Any) -> CertificateRef | None:
    if value is None:
        return None
    row = _object(value, "a version of a certificate")
    return CertificateRef(
        _text(row.get("id"), "id of a certificate"),
        _whole(row.get("version"), "version of a certificate"),
        _text(row.get("fingerprint"), "fingerprint of a certificate"),
    )


def _certificate(value: Any) -> CertificateRow:
    row = _object(value, "a certificate")
    return CertificateRow(
        domain=_text(row.get("domain"), "domain of a certificate"),
        hostname=_text(row.get("hostname"), "host name of a certificate", MAX_HOST_CHARS),
        active=_certificate_ref(row.get("active")),
        staged=_certificate_ref(row.get("staged")),
        canonical=canonical(row),
    )


def _told(row: Organization) -> dict[str, Any]:
    """The row as the stream has it, for the copy on disk."""
    found: dict[str, Any] = {"id": row.id, "version": row.version, "limits": dict(row.limits)}
    if row.code is not None:
        found["refuse"] = {"code": row.code} | ({"until": row.until} if math.isfinite(row.until) else {})
    return found


def _challenge(value: Any) -> Challenge:
    row = _object(value, "a challenge")
    return Challenge(
        id=_text(row.get("id"), "id of a challenge"),
        type=_text(row.get("type"), "type of a challenge"),
        host=_text(row.get("host"), "host of a challenge", MAX_HOST_CHARS),
        token=_text(row.get("token"), "token of a challenge", MAX_TOKEN_CHARS),
        authorization=_text(row.get("authorization"), "authorization of a challenge", MAX_TOKEN_CHARS),
        until=_number(row.get("until"), "until"),
    )


def _domain(value: Any) -> Domain:
    row = _object(value, "a domain")
    return Domain(
        id=_text(row.get("id"), "id of a domain"),
        host=_text(row.get("host"), "host of a domain", MAX_HOST_CHARS),
        tunnel=_text(row.get("tunnel"), "tunnel of a domain"),
        valid_until=_number(row["valid_until"], "valid_until") if "valid_until" in row else None,
    )


def _domain_told(row: Domain) -> dict[str, Any]:
    """The row as the stream has it, for the copy on disk."""
    found: dict[str, Any] = {"id": row.id, "host": row.host, "tunnel": row.tunnel}
    return found if row.valid_until is None else {**found, "valid_until": row.valid_until}


def _known(code: str, fallback: str) -> str:
    """A control plane newer than this relay may name codes that this one cannot render."""
    return code if code in catalogue() else fallback


def _ended(value: Any) -> Ended:
    row = _object(value, "an ended session")
    code = _known(_text(row.get("code"), "code of an ended session"), ENDED_FALLBACK)
    return Ended(_text(row.get("session"), "an ended session"), code, _number(row.get("until"), "until"))


def _keys(value: Any) -> tuple[list[dict[str, Any]], KeySet]:
    rows = _list(value, "keys")
    try:
        keys = KeySet.from_jwks({"keys": rows})
    except (ValueError, TypeError) as err:
        raise SnapshotInvalid(f"keys: {err}") from None
    return [{name: row[name] for name in JWK_MEMBERS if name in row} for row in rows], keys


@dataclass(frozen=True, slots=True)
class FrozenState:
    """The state at one version, safe to hash and encode in a thread while the live one changes."""

    version: int
    jwks: tuple[dict[str, Any], ...]
    tunnels: Mapping[str, TunnelRow]
    ended: Mapping[str, Ended]
    organizations: Mapping[str, Organization] = field(default_factory=dict)
    challenges: Mapping[str, Challenge] = field(default_factory=dict)
    certificates: Mapping[str, CertificateRow] = field(default_factory=dict)
    domains: Mapping[str, Domain] = field(default_factory=dict)
    #: Whether the control plane told of organizations and domains at all: an earlier one, or an earlier relay's copy, does not.
    complete: bool = False

    def digest(self, at: float = 0.0) -> str:
        """The hash of the interface (``edge-stream.schema.json``); ``at`` leaves out what ended before that time.

        Rows keep their canonical bytes, so this joins and hashes: 100,000 tunnels take tens of milliseconds.
        """
        ended = sorted(row.session for row in self.ended.values() if row.until > at)
        kids = sorted(str(key["kid"]) for key in self.jwks)
        rows = b",".join(canonical(id) + b":" + self.tunnels[id].canonical for id in sorted(self.tunnels))
        text = b'{"ended":%b,"keys":%b,"tunnels":{%b}}' % (canonical(ended), canonical(kids), rows)
        return hashlib.sha256(text).hexdigest()

    def organizations_digest(self) -> str | None:
        """The other hash of the interface, of what holds for organizations that have tunnels; ``None`` when the control plane did
        not tell of organizations."""
        if not self.complete:
            return None
        served = {row.organization for row in self.tunnels.values()}
        told = {row.id: row.version for row in self.organizations.values() if row.id in served}
        return hashlib.sha256(canonical({"organizations": told})).hexdigest()

    def encode(self) -> bytes:
        """The state as one snapshot message, for the copy on disk."""
        ended = [{"session": e.session, "code": e.code, "until": e.until} for e in self.ended.values()]
        rows = b",".join(row.canonical for row in self.tunnels.values())
        more = b""
        if self.complete:
            certificates = b",".join(row.canonical for row in self.certificates.values())
            told = canonical([_told(row) for row in self.organizations.values()])
            more = b'"certificates":[%b],"organizations":%b,' % (certificates, told)
            more += b'"domains":%b,' % canonical([_domain_told(row) for row in self.domains.values()])
        if self.challenges:
            more += b'"challenges":%b,' % canonical([asdict(row) for row in self.challenges.values()])
        return b'{"state":{"ended":%b,"keys":%b,%b"tunnels":[%b]},"type":"snapshot","version":%d}' % (
            canonical(ended),
            canonical(list(self.jwks)),
            more,
            rows,
            self.version,
        )


class Snapshot:
    """The live state. ``version`` is ``None`` until a snapshot was applied or loaded; until then nothing is known."""

    def __init__(self, *, wall: Callable[[], float] = time.time) -> None:
        self.version: int | None = None
        self.keys = KeySet.from_jwks({"keys": []})
        self._jwks: list[dict[str, Any]] = []
        self._tunnels: dict[str, TunnelRow] = {}
        self._hosts: dict[str, TunnelRow] = {}
        self._ended: dict[str, Ended] = {}
        self._organizations: dict[str, Organization] = {}
        self._domains: dict[str, Domain] = {}
        self._domain_hosts: dict[str, Domain] = {}
        self._routed: dict[str, dict[str, Domain]] = {}
        #: How many of the domains are wildcards; none, almost everywhere.
        self.wildcards = 0
        #: By id; see ``challenges.py`` for who answers them.
        self.challenges: dict[str, Challenge] = {}
        #: By domain. Read by whoever holds the contents.
        self.certificates: dict[str, CertificateRow] = {}
        #: Whether the state that is held tells of organizations and domains; one that does not is asked for anew as a whole.
        self.complete = False
        self._wall = wall
        self._listeners: list[Listener] = []
        self._applied: list[Callable[[], None]] = []

    def tunnel_for_host(self, host: str) -> TunnelRow | None:
        """The tunnel that owns ``host`` (lower-case, without port), or that a domain of this name leads to; active or not."""
        found = self._hosts.get(host)
        if found is None and (domain := self.domain_for_host(host)) is not None:
            found = self._tunnels.get(domain.tunnel)
        return found

    def domain_for_host(self, host: str) -> Domain | None:
        """The domain of this name, else the wildcard right above it."""
        found = self._domain_hosts.get(host)
        if found is None and self.wildcards:
            found = self._domain_hosts.get(f"*.{host.partition('.')[2]}")
        return found

    def above(self, host: bytes) -> bytes | None:
        """The wildcard by which a host is somebody's that is nobody's by its own name."""
        text = host.decode("ascii", "replace")
        if not self.wildcards or text in self._hosts or (found := self.domain_for_host(text)) is None:
            return None
        return found.host.encode() if found.host.startswith("*.") else None

    def domains_of(self, tunnel: str) -> Iterable[Domain]:
        """The domains that lead to a tunnel."""
        return self._routed.get(tunnel, _NONE).values()

    def tunnel(self, id: str) -> TunnelRow | None:
        return self._tunnels.get(id)

    def organization(self, id: str) -> Organization | None:
        """What holds for an organization, where that is not what its grants say."""
        return self._organizations.get(id)

    def ended(self, session: str) -> Ended | None:
        """Why ``session`` may not connect, or ``None``."""
        return self._ended.get(session)

    def __len__(self) -> int:
        return len(self._tunnels)

    def on_change(self, listener: Listener) -> None:
        """Calls ``listener(change)`` for every change, after the whole message was applied, in the same loop step."""
        self._listeners.append(listener)

    def on_applied(self, callback: Callable[[], None]) -> None:
        """Calls ``callback()`` once per applied message, also when it changed only the version."""
        self._applied.append(callback)

    async def apply_gently(self, message: Any) -> None:
        """``apply`` for messages of any size: the rows of a large snapshot are checked a few at a time, so that traffic
        goes on (100,000 take more than a second). The caller applies nothing else meanwhile."""
        state = message.get("state") if isinstance(message, dict) else None
        tunnels = state.get("tunnels") if isinstance(state, dict) else None
        if not isinstance(state, dict) or not isinstance(tunnels, list) or len(tunnels) <= CHUNK_ROWS:
            return self.apply(message)
        rows: list[TunnelRow] = []
        for start in range(0, len(tunnels), CHUNK_ROWS):
            rows += _tunnels(tunnels[start : start + CHUNK_ROWS])
            await asyncio.sleep(0)
        return self.apply({**message, "state": {**state, "tunnels": rows}})

    def apply(self, message: Any) -> None:
        """One ``snapshot`` or ``delta``. Raises ``SnapshotInvalid`` or ``OutOfOrder``, with nothing applied."""
        message = _object(message, "a message")
        version = _whole(message.get("version"), "version")
        try:
            if message.get("type") == "snapshot":
                changes = self._apply_snapshot(_object(message.get("state"), "state"))
            elif message.get("type") == "delta":
                changes = self._apply_delta(version, _list(message.get("changes"), "changes"))
            else:
                raise SnapshotInvalid("neither a snapshot nor a delta")
        except RecursionError:  # nested deeper than the encoder follows; raised while checking, so nothing is applied
            raise SnapshotInvalid("nested too deeply") from None
        self.version = version
        self._announce(changes)

    def advance(self, version: int) -> None:
        """The same state at a later version, as a heartbeat with an equal hash shows."""
        if self.version is not None and version > self.version:
            self.version = version
            self._announce([])

    def prune(self) -> int:
        """Forgets ended sessions whose time has long passed; the number of them."""
        horizon = self._wall() - PRUNE_MARGIN_SECONDS
        over = [id for id, row in self._ended.items() if row.until <= horizon]
        for id in over:
            del self._ended[id]
        for id in [id for id, row in self.challenges.items() if row.until <= horizon]:
            del self.challenges[id]
        return len(over)

    def frozen(self) -> FrozenState | None:
        """The state for a thread to work on; ``None`` before there is one."""
        if self.version is None:
            return None
        return FrozenState(
            self.version,
            tuple(self._jwks),
            dict(self._tunnels),
            dict(self._ended),
            dict(self._organizations),
            dict(self.challenges),
            dict(self.certificates),
            dict(self._domains),
            self.complete,
        )

    def digest(self, at: float = 0.0) -> str | None:
        frozen = self.frozen()
        return None if frozen is None else frozen.digest(at)

    # -- applying

    def _apply_snapshot(self, state: dict[str, Any]) -> list[Change]:
        rows = {row.id: row for row in _tunnels(_list(state.get("tunnels"), "tunnels"))}
        ended = {row.session: row for row in map(_ended, _list(state.get("ended"), "ended"))}
        jwks, keys = _keys(state.get("keys"))
        told = _list(state.get("organizations", []), "organizations")
        organizations = {row.id: row for row in map(_organization, told)}
        asked = {row.id: row for row in map(_challenge, _list(state.get("challenges", []), "challenges"))}
        certificates = {
            row.domain: row for row in map(_certificate, _list(state.get("certificates", []), "certificates"))
        }
        domains = {row.id: row for row in map(_domain, _list(state.get("domains", []), "domains"))}
        changes = self._difference(rows, ended, jwks)
        before, self._organizations = self._organizations, organizations
        self.complete = "organizations" in state and "domains" in state
        differ = [id for id in before.keys() | organizations.keys() if before.get(id) != organizations.get(id)]
        changes += [Change("organization", id) for id in differ]
        changes += [Change("challenge", id) for id in self.challenges.keys() | asked.keys()]
        self.challenges = asked
        held, self.certificates = self.certificates, certificates
        differ = [id for id in held.keys() | certificates.keys() if held.get(id) != certificates.get(id)]
        changes += [Change("certificate", id) for id in differ]
        self._tunnels, self._ended = rows, ended
        for id in self._domains.keys() - domains.keys():
            changes.append(self._unroute(id))
        changes += [self._route(row) for row in domains.values() if self._domains.get(row.id) != row]
        self._hosts = {host: row for row in rows.values() for host in row.hosts}
        self._jwks, self.keys = jwks, keys
        self.prune()
        return changes

    def _difference(
        self, rows: dict[str, TunnelRow], ended: dict[str, Ended], jwks: list[dict[str, Any]]
    ) -> list[Change]:
        changes = [Change("tunnel_removed", id, code=REMOVED_FALLBACK) for id in self._tunnels if id not in rows]
        changes += [Change("tunnel", id, row) for id, row in rows.items() if self._tunnels.get(id) != row]
        changes += [Change("session_ended", id, code=e.code) for id, e in ended.items() if id not in self._ended]
        if jwks != self._jwks:
            changes.append(Change("keys"))
        return changes

    def _apply_delta(self, version: int, changes: list[Any]) -> list[Change]:
        if self.version is None or version <= self.version:
            raise OutOfOrder(f"delta {version} does not follow version {self.version}")
        steps = [step for step in map(self._step, changes) if step is not None]
        return [step() for step in steps]

    def _step(self, value: Any) -> Callable[[], Change] | None:
        """One change, checked now and performed when the whole delta has passed; ``None`` for a kind not known here."""
        change = _object(value, "a change")
        match kind := change.get("kind"):
            case "tunnel":
                row = _tunnel(change.get("tunnel"))
                return lambda: self._put(row)
            case "tunnel_removed":
                id = _text(change.get("id"), "id of a removed tunnel")
                code = _known(_text(change.get("code"), "code of a removed tunnel"), REMOVED_FALLBACK)
                return lambda: self._remove(id, code)
            case "session_ended":
                ended = _ended(change)
                return lambda: self._end(ended)
            case "keys":
                jwks, keys = _keys(change.get("keys"))
                return lambda: self._rekey(jwks, keys)
            case "organization":
                organization = _organization(change.get("organization"))
                return lambda: self._entitle(organization)
            case "challenge":
                challenge = _challenge(change.get("challenge"))
                return lambda: self._ask(challenge)
            case "challenge_removed":
                gone = _text(change.get("id"), "id of a removed challenge")
                return lambda: self._unask(gone)
            case "certificate":
                certificate = _certificate(change.get("certificate"))
                return lambda: self._certify(certificate)
            case "certificate_removed":
                domain = _text(change.get("domain"), "domain of a certificate")
                return lambda: self._uncertify(domain)
            case "domain":
                leads = _domain(change.get("domain"))
                return lambda: self._route(leads)
            case "domain_removed":
                over = _text(change.get("id"), "id of a removed domain")
                return lambda: self._unroute(over)
            case str():
                log.warning("edge change of an unknown kind is left out", extra={"f": {"kind": kind[:64]}})
                return None
            case _:
                raise SnapshotInvalid("a change has no kind")

    def _put(self, row: TunnelRow) -> Change:
        self._forget_hosts(row.id)
        self._tunnels[row.id] = row
        for host in row.hosts:
            self._hosts[host] = row
        return Change("tunnel", row.id, row)

    def _remove(self, id: str, code: str) -> Change:
        self._forget_hosts(id)
        self._tunnels.pop(id, None)
        return Change("tunnel_removed", id, code=code)

    def _forget_hosts(self, id: str) -> None:
        """Only hosts that still point here: a host may have moved to another tunnel before this one changes."""
        old = self._tunnels.get(id)
        for host in old.hosts if old is not None else ():
            if (holder := self._hosts.get(host)) is not None and holder.id == id:
                del self._hosts[host]

    def _end(self, ended: Ended) -> Change:
        self._ended[ended.session] = ended
        return Change("session_ended", ended.session, code=ended.code)

    def _rekey(self, jwks: list[dict[str, Any]], keys: KeySet) -> Change:
        self._jwks, self.keys = jwks, keys
        return Change("keys")

    def _entitle(self, row: Organization) -> Change:
        self._organizations[row.id] = row
        return Change("organization", row.id)

    def _ask(self, row: Challenge) -> Change:
        self.challenges[row.id] = row
        return Change("challenge", row.id)

    def _unask(self, id: str) -> Change:
        self.challenges.pop(id, None)
        return Change("challenge", id)

    def _certify(self, row: CertificateRow) -> Change:
        self.certificates[row.domain] = row
        return Change("certificate", row.domain)

    def _uncertify(self, domain: str) -> Change:
        self.certificates.pop(domain, None)
        return Change("certificate", domain)

    def _route(self, row: Domain) -> Change:
        before = self._unroute(row.id).tunnels
        self._domains[row.id] = self._domain_hosts[row.host] = row
        self._routed.setdefault(row.tunnel, {})[row.id] = row
        self.wildcards += row.host.startswith("*.")
        return Change("domain", row.id, tunnels=tuple(dict.fromkeys((*before, row.tunnel))))

    def _unroute(self, id: str) -> Change:
        row = self._domains.pop(id, None)
        if row is None:
            return Change("domain", id)
        self.wildcards -= row.host.startswith("*.")
        if (holder := self._domain_hosts.get(row.host)) is not None and holder.id == id:
            del self._domain_hosts[row.host]  # else the name has gone to another claim of it
        left = self._routed.get(row.tunnel, {})
        left.pop(id, None)
        if not left:
            self._routed.pop(row.tunnel, None)
        return Change("domain", id, tunnels=(row.tunnel,))

    def _announce(self, changes: list[Change]) -> None:
        """A listener that fails may not keep a revocation from the others."""
        for change in changes:
            for listener in self._listeners:
                try:
                    listener(change)
                except Exception:
                    log.exception("listener failed on an edge change", extra={"f": {"kind": change.kind}})
        for callback in self._applied:
            callback()


class SnapshotStore:
    """The copy on disk: loaded at start, written a moment after a change, never in the loop's own time.

    ``source`` names the control plane; a copy of another one is not used, since its versions mean nothing here.
    """

    FILE = "edge-state.json"
    FORMAT = 1
    RETRY_SECONDS = 5.0
    SHARE = 10  # a write that takes t seconds is followed by a pause of at least SHARE × t

    def __init__(self, snapshot: Snapshot, state_dir: Path, *, source: str, delay: float) -> None:
        self._snapshot = snapshot
        self._path = state_dir / self.FILE
        self._source = source
        self._delay = delay
        self._dirty = asyncio.Event()
        self._failing = False
        snapshot.on_applied(self._dirty.set)

    def load(self) -> bool:
        """Applies the copy when there is a sound one of this control plane; a damaged one is reported and left out."""
        try:
            head, _, body = self._path.read_bytes().partition(b"\n")
            if not self._sound(parse_json(head), body):
                return False
            message = parse_json(body)
            self._snapshot.apply(message)
            # Of an earlier version of this program: what the control plane said beyond it was passed over, so ask for all of it.
            self._snapshot.complete &= "certificates" in message["state"]
        except FileNotFoundError:
            return False
        except (OSError, SnapshotInvalid) as err:
            log.warning("the saved edge state cannot be used", extra={"f": {"file": self._path, "why": err}})
            return False
        self._dirty.clear()
        return True

    def _sound(self, head: Any, body: bytes) -> bool:
        head = _object(head, "the head")
        if head.get("format") != self.FORMAT or head.get("source") != self._source:
            log.info("the saved edge state is of another control plane", extra={"f": {"file": self._path}})
            return False
        if head.get("sha256") != hashlib.sha256(body).hexdigest():
            raise SnapshotInvalid("its checksum does not match")
        return True

    async def run(self) -> None:
        """Writes until cancelled. A full disk is reported once and tried again; nothing else waits for it."""
        while True:
            await self._dirty.wait()
            await asyncio.sleep(self._delay)
            started = time.monotonic()
            saved = await self.save()
            pause = self.SHARE * (time.monotonic() - started) if saved else self.RETRY_SECONDS
            await asyncio.sleep(pause)

    async def save(self) -> bool:
        """One write of the present state, in a thread; ``False`` when the disk refused it."""
        self._dirty.clear()
        if (frozen := self._snapshot.frozen()) is None:
            return True
        try:
            await statefiles.in_thread(self._write, frozen)
        except OSError as err:
            self._dirty.set()
            if not self._failing:
                log.error("the edge state cannot be saved", extra={"f": {"file": self._path, "why": err}})
            self._failing = True
            return False
        self._failing = False
        return True

    async def close(self) -> None:
        """Writes what is not written yet."""
        if self._dirty.is_set():
            await self.save()

    def _write(self, frozen: FrozenState) -> None:
        body = frozen.encode()
        head = {"format": self.FORMAT, "source": self._source, "sha256": hashlib.sha256(body).hexdigest()}
        statefiles.replace(self._path, canonical(head) + b"\n" + body)
