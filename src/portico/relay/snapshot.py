"""What the relay knows about the world: tunnels by id and by host, ended sessions, verification keys.

The control plane streams it (``control_link``): one snapshot, then deltas, each with the version that it leads to. All
look-ups are one dictionary access. A message is checked whole (``edge_rows``) before any of it is applied, so a malformed one
changes nothing; the caller then asks for a new snapshot. Whoever must act at once on a change (the session table unbinds
tunnels) listens with ``on_change``. ``snapshot_store`` keeps a copy on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from portico.relay import edge_rows
from portico.relay.edge_rows import (
    REMOVED_FALLBACK,
    CertificateRow,
    Challenge,
    Closed,
    Domain,
    Ended,
    Organization,
    SnapshotInvalid,
    TunnelRow,
    canonical,
)
from portico.wire.grants import KeySet

log = logging.getLogger(__name__)

CHUNK_ROWS = 500  # checked between two turns of the loop: some milliseconds
PRUNE_MARGIN_SECONDS = 300.0  # an ended session is kept this much longer: the clocks of relay and API may differ

Kind = Literal[
    "tunnel", "tunnel_removed", "session_ended", "keys", "organization", "challenge", "certificate", "domain"
]  # fmt: skip


class OutOfOrder(SnapshotInvalid):
    """A delta that does not follow the state held; only a new snapshot helps."""


_NONE: Mapping[str, Any] = {}


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
    closed: Mapping[str, Closed] = field(default_factory=dict)

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
            told = canonical([edge_rows.told_organization(row) for row in self.organizations.values()])
            more = b'"certificates":[%b],"organizations":%b,' % (certificates, told)
            more += b'"domains":%b,' % canonical([edge_rows.told_domain(row) for row in self.domains.values()])
            more += b'"closed_domains":%b,' % canonical([asdict(row) for row in self.closed.values()])
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
        self._closed: dict[str, Closed] = {}
        self._closed_hosts: dict[str, Closed] = {}
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
        if found is None and self.wildcards and host not in self._closed_hosts:
            found = self._domain_hosts.get(f"*.{host.partition('.')[2]}")
        return found

    def closed(self, host: str) -> str | None:
        """What visitors of a host are told that no tunnel has, when it is a domain that is served to nobody."""
        if not self._closed_hosts:
            return None
        found = self._closed_hosts.get(host) or self._closed_hosts.get(f"*.{host.partition('.')[2]}")
        return None if found is None else found.code

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
            rows += edge_rows.tunnels(tunnels[start : start + CHUNK_ROWS])
            await asyncio.sleep(0)
        return self.apply({**message, "state": {**state, "tunnels": rows}})

    def apply(self, message: Any) -> None:
        """One ``snapshot`` or ``delta``. Raises ``SnapshotInvalid`` or ``OutOfOrder``, with nothing applied."""
        message = edge_rows.members(message, "a message")
        version = edge_rows.whole(message.get("version"), "version")
        try:
            if message.get("type") == "snapshot":
                changes = self._apply_snapshot(edge_rows.members(message.get("state"), "state"))
            elif message.get("type") == "delta":
                changes = self._apply_delta(version, edge_rows.items(message.get("changes"), "changes"))
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
            dict(self._closed),
        )

    def digest(self, at: float = 0.0) -> str | None:
        frozen = self.frozen()
        return None if frozen is None else frozen.digest(at)

    # -- applying

    def _apply_snapshot(self, state: dict[str, Any]) -> list[Change]:
        rows = {row.id: row for row in edge_rows.tunnels(edge_rows.items(state.get("tunnels"), "tunnels"))}
        ended = {row.session: row for row in map(edge_rows.ended, edge_rows.items(state.get("ended"), "ended"))}
        jwks, keys = edge_rows.keys(state.get("keys"))
        told = edge_rows.items(state.get("organizations", []), "organizations")
        organizations = {row.id: row for row in map(edge_rows.organization, told)}
        asked = {
            row.id: row for row in map(edge_rows.challenge, edge_rows.items(state.get("challenges", []), "challenges"))
        }
        certificates = {
            row.domain: row
            for row in map(edge_rows.certificate, edge_rows.items(state.get("certificates", []), "certificates"))
        }
        domains = {row.id: row for row in map(edge_rows.domain, edge_rows.items(state.get("domains", []), "domains"))}
        closed = list(map(edge_rows.closed, edge_rows.items(state.get("closed_domains", []), "closed domains")))
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
        self._closed, self._closed_hosts = {}, {}
        changes += [self._route(row) for row in domains.values() if self._domains.get(row.id) != row]
        for shut in closed:
            self._close(shut)
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
        change = edge_rows.members(value, "a change")
        match kind := change.get("kind"):
            case "tunnel":
                row = edge_rows.tunnel(change.get("tunnel"))
                return lambda: self._put(row)
            case "tunnel_removed":
                id = edge_rows.text(change.get("id"), "id of a removed tunnel")
                code = edge_rows.known(edge_rows.text(change.get("code"), "code of a removed tunnel"), REMOVED_FALLBACK)
                return lambda: self._remove(id, code)
            case "session_ended":
                ended = edge_rows.ended(change)
                return lambda: self._end(ended)
            case "keys":
                jwks, keys = edge_rows.keys(change.get("keys"))
                return lambda: self._rekey(jwks, keys)
            case "organization":
                organization = edge_rows.organization(change.get("organization"))
                return lambda: self._entitle(organization)
            case "challenge":
                challenge = edge_rows.challenge(change.get("challenge"))
                return lambda: self._ask(challenge)
            case "challenge_removed":
                gone = edge_rows.text(change.get("id"), "id of a removed challenge")
                return lambda: self._unask(gone)
            case "certificate":
                certificate = edge_rows.certificate(change.get("certificate"))
                return lambda: self._certify(certificate)
            case "certificate_removed":
                domain = edge_rows.text(change.get("domain"), "domain of a certificate")
                return lambda: self._uncertify(domain)
            case "domain":
                leads = edge_rows.domain(change.get("domain"))
                return lambda: self._route(leads)
            case "domain_closed":
                shut = edge_rows.closed(change.get("domain"))
                return lambda: self._close(shut)
            case "domain_removed":
                over = edge_rows.text(change.get("id"), "id of a removed domain")
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

    def _close(self, row: Closed) -> Change:
        before = self._unroute(row.id)
        self._closed[row.id] = self._closed_hosts[row.host] = row
        return before

    def _unroute(self, id: str) -> Change:
        if (shut := self._closed.pop(id, None)) is not None and self._closed_hosts.get(shut.host) is shut:
            del self._closed_hosts[shut.host]
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
