"""The relay's metrics: their declarations, and where each value is read from. Nothing here runs but when Prometheus asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from portico.kit.metrics import Metric, Sample
from portico.relay.tls_port import TlsPort

if TYPE_CHECKING:
    from portico.relay.server import Relay

REQUESTS = Metric(
    "portico_relay_requests_total",
    "counter",
    "Requests that ended, refused ones too, by class of the status; `none`: the visitor left before an answer.",
    ("protocol", "status"),
)
HEAD_SECONDS = Metric(
    "portico_relay_response_head_seconds", "histogram", "From a request's head to the head of its final answer."
)
WHOLE_SECONDS = Metric(
    "portico_relay_request_seconds",
    "histogram",
    "From a request's head to the end of request and answer, as far as the target sent it; upgraded connections left out.",
)
REFUSALS = Metric("portico_relay_refusals_total", "counter", "Visitors refused, by error code.", ("code",))
SHORT_FAULTS = Metric(
    "portico_relay_short_way_faults_total",
    "counter",
    "Repeated requests that met a fault of the relay on their short way and took the ordinary one; the log has the first.",
)
BYTES = Metric(
    "portico_relay_visitor_bytes_total",
    "counter",
    "Bytes of requests and connections from visitors (in), of answers and connections to them (out), of tunnels bound here.",
    ("direction",),
)
FAILURES = Metric(
    "portico_relay_target_failures_total",
    "counter",
    "Requests and connections that agent or target failed, of tunnels bound here.",
)
CONNECTIONS = Metric("portico_relay_connections", "gauge", "Open connections of visitors.", ("kind",))
ACCEPTED = Metric(
    "portico_relay_connections_total",
    "counter",
    "Connections of visitors that were taken in; those over a limit are refusals.",
    ("kind",),
)
RAW = Metric(
    "portico_relay_raw_connections_total",
    "counter",
    "Connections of TCP tunnels and of TLS passthrough that ended.",
    ("protocol", "end"),
)
ACCESS_LINES = Metric(
    "portico_relay_access_log_lines_total",
    "counter",
    "Lines of the access log that were written, and those that are missing: left out by the cap on errors, or dropped.",
    ("outcome",),
)
HANDSHAKES = Metric(
    "portico_relay_tls_handshakes_total", "counter", "TLS handshakes of visitors that succeeded here.", ("version",)
)
RESUMED = Metric("portico_relay_tls_resumed_total", "counter", "Of these, those that resumed a session.")
TLS_FAILURES = Metric(
    "portico_relay_tls_failures_total", "counter", "Connections to the TLS port that came to no handshake.", ("kind",)
)
SHARED_LEASES = Metric(
    "portico_relay_rate_leases", "gauge", "Organizations whose rate is shared with other relays right now."
)
SHARED_UP = Metric("portico_relay_rate_store_up", "gauge", "1 when Redis, where rates are shared, answered last.")
SESSIONS = Metric("portico_relay_sessions", "gauge", "Agent sessions that are connected.")
TUNNELS = Metric("portico_relay_tunnels", "gauge", "Tunnels that are bound here.", ("protocol",))
STREAMS = Metric(
    "portico_relay_streams", "gauge", "Streams open on agent sessions: requests and connections under way."
)
AGENT_REFUSALS = Metric(
    "portico_relay_agent_refusals_total", "counter", "Agents and peers refused at the control port.", ("code",)
)
PEERS = Metric("portico_relay_peers", "gauge", "Links of other relays that are up, by who opened them.", ("opened",))
HOPS = Metric("portico_relay_peer_streams", "gauge", "Requests of other relays under way through this one.")
HELD = Metric(
    "portico_relay_held_requests",
    "gauge",
    "Requests that wait for a tunnel that is coming back, or for a place in theirs.",
)
PASSWORDS = Metric(
    "portico_relay_passwords_total",
    "counter",
    "Passwords of visitors that were verified, by what came of it; remembered ones are not verified.",
    ("result",),
)
PASSWORDS_WAITING = Metric(
    "portico_relay_passwords_waiting", "gauge", "Requests that wait for a password to be verified."
)
USAGE_BATCHES = Metric("portico_relay_usage_waiting_batches", "gauge", "Batches of usage not yet acknowledged.")
USAGE_BYTES = Metric("portico_relay_usage_waiting_bytes", "gauge", "Bytes of these.")
EDGE_UP = Metric("portico_relay_edge_stream_up", "gauge", "1 while the edge stream of the control plane is up.")
EDGE_VERSION = Metric("portico_relay_edge_version", "gauge", "Version of the edge state that is served from.")
EDGE_BEHIND = Metric(
    "portico_relay_edge_versions_behind", "gauge", "Versions between that and the last one that the edge stream named."
)
EDGE_TUNNELS = Metric("portico_relay_edge_tunnels", "gauge", "Tunnels in the edge state.")
EDGE_RESYNCS = Metric(
    "portico_relay_edge_resyncs_total", "counter", "Whole snapshots asked for because a line did not fit."
)
CERTIFICATES = Metric(
    "portico_relay_certificates",
    "gauge",
    "Custom domains by certificate: served, staged (ready for the switch), refused (versions that cannot be used here), behind "
    "(something newer should serve).",
    ("state",),
)

DECLARED: tuple[Metric, ...] = (
    REQUESTS, HEAD_SECONDS, WHOLE_SECONDS, REFUSALS, SHORT_FAULTS, BYTES, FAILURES, CONNECTIONS, ACCEPTED, RAW, ACCESS_LINES,
    HANDSHAKES, RESUMED, TLS_FAILURES, SHARED_LEASES, SHARED_UP, SESSIONS, TUNNELS,
    STREAMS, AGENT_REFUSALS, PEERS, HOPS, HELD, PASSWORDS, PASSWORDS_WAITING, USAGE_BATCHES, USAGE_BYTES, EDGE_UP,
    EDGE_VERSION, EDGE_BEHIND, EDGE_TUNNELS, EDGE_RESYNCS, CERTIFICATES,
)  # fmt: skip


def read(relay: Relay) -> Iterator[Sample]:
    """The values of this moment."""
    yield from _visitors(relay)
    yield from _edge(relay)
    yield from _agents(relay)
    yield from _control_plane(relay)


def _visitors(relay: Relay) -> Iterator[Sample]:
    public, tally = relay.public, relay.public.tally
    for (protocol, status), count in tally.counts().items():
        yield REQUESTS, (protocol.decode(), status), count
    head, whole = tally.seconds(public.seconds)
    yield HEAD_SECONDS, (), head
    yield WHOLE_SECONDS, (), whole
    for code, count in sorted(public.refusals.items()):
        yield REFUSALS, (code,), count
    yield SHORT_FAULTS, (), tally.short_faults
    open_now: Counter[bytes] = Counter(guest.door.scheme for guest in public.connections)
    for kind in (b"http", b"https", b"tcp", b"tls"):
        yield CONNECTIONS, (kind.decode(),), open_now[kind]
        yield ACCEPTED, (kind.decode(),), tally.accepted[kind]
    for protocol, (served, refused) in tally.connections.items():
        yield RAW, (protocol.decode(), "served"), served
        yield RAW, (protocol.decode(), "refused"), refused
    yield HELD, (), public.holding.count
    credentials = public.credentials
    yield PASSWORDS, ("right",), credentials.verified - credentials.wrong
    yield PASSWORDS, ("wrong",), credentials.wrong
    yield PASSWORDS_WAITING, (), credentials.waiting


def _edge(relay: Relay) -> Iterator[Sample]:
    access = relay.public.access
    yield ACCESS_LINES, ("written",), access.writer.written if access is not None else 0
    yield ACCESS_LINES, ("missing",), access.dropped() if access is not None else 0
    ports = [server.stats for server in relay.servers if isinstance(server, TlsPort)]
    versions, failures = Counter[str](), Counter[str]()
    for stats in ports:
        versions.update(stats.versions)
        failures.update(stats.failures)
    for version, count in versions.items():
        yield HANDSHAKES, (version,), count
    yield RESUMED, (), sum(stats.resumed for stats in ports)
    for kind, count in failures.items():
        yield TLS_FAILURES, (kind,), count
    shared = relay.shared_rates
    yield SHARED_LEASES, (), len(shared.active) if shared is not None else 0
    yield SHARED_UP, (), float(shared is not None and shared.connected)


def _agents(relay: Relay) -> Iterator[Sample]:
    totals, agents = relay.meter.totals(), relay.agents
    yield BYTES, ("in",), totals["bytes_in"]
    yield BYTES, ("out",), totals["bytes_out"]
    yield FAILURES, (), totals["errors"]
    yield SESSIONS, (), len(agents.connections)
    bound = Counter(live.grant.proto for live in agents.by_tunnel.values())
    for protocol in ("http", "tcp", "tls"):
        yield TUNNELS, (protocol,), bound[protocol]
    yield STREAMS, (), agents.streams()
    for code, count in sorted(relay.control.refusals.items()):
        yield AGENT_REFUSALS, (code,), count
    yield PEERS, ("here",), len(relay.peers.outbound)
    yield PEERS, ("there",), len(relay.peers.inbound)
    yield HOPS, (), relay.peers.hops()


def _control_plane(relay: Relay) -> Iterator[Sample]:
    batches, size = relay.meter.waiting()
    yield USAGE_BATCHES, (), batches
    yield USAGE_BYTES, (), size
    link, held = relay.link, relay.snapshot.version or 0
    yield EDGE_UP, (), float(link.connected)
    yield EDGE_VERSION, (), held
    yield EDGE_BEHIND, (), max(0, link.heard_version - held)
    yield EDGE_TUNNELS, (), len(relay.snapshot)
    yield EDGE_RESYNCS, (), link.resyncs
    for state, count in relay.vault.counts().items():
        yield CERTIFICATES, (state,), count
