"""Settings of tunnels, and of what relays hear of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class TunnelSettings:
    """What tunnels may have, and the streams by which relays follow."""

    __slots__ = ()

    # == Tunnels
    # Life of a session token in seconds.
    session_token_seconds: int = 900
    # Life of a grant in seconds.
    grant_life_seconds: int = 900
    # Seconds that relays may go on with expired grants while they cannot reach the control plane.
    grant_outage_grace_seconds: int = 86_400
    # Tunnels that an organization may have, whatever its plan.
    tunnels_per_organization: int = 1000
    # Tunnels that one agent session may name.
    session_max_tunnels: int = 1000
    # Requests in flight that one tunnel may have; plan and policy can lower it.
    tunnel_concurrency: int = 100
    # Connections that one TCP or TLS tunnel may have open; its policy can lower it (`concurrency`), and its plan.
    tunnel_connections: int = 1000
    # Requests a second that all tunnels of an organization may have together, across relays, whatever its plan; 0: no limit.
    organization_requests_per_second: int = 0
    # Requests that they may have at once beyond that rate; 0, or the rate is the plan's: those of two seconds.
    organization_requests_burst: int = 0
    # Visitors' passwords that one request may set anew; each costs some milliseconds of a core.
    visitor_passwords_per_request: int = 100
    # Visitors' passwords that may wait to be hashed; more requests are refused.
    visitor_passwords_waiting: int = 64
    # Digests of visitors' passwords that a process remembers, so that an agent's reconnect costs no hash.
    visitor_password_cache: int = 10_000
    # Bytes that the policies of an organization's tunnels may have together; those of up to 512 bytes are always let in.
    policy_bytes_per_organization: int = 1_048_576
    # Seconds after a deletion in which its port goes to no other organization: who still connects must not reach a stranger.
    tcp_port_quarantine_seconds: int = 600
    # Seconds after a tunnel lost its subdomain, or an organization its reservation, in which no other organization gets the name.
    name_cooldown_seconds: int = 604_800
    # Such names of one organization: the newest; older ones are free for all.
    cooling_names_per_organization: int = 1000
    # Names that an organization may keep without a tunnel, whatever its plan.
    reserved_names_per_organization: int = 100
    # More words that names may not be, and exceptions, in the form of reserved_names.toml; read at the start.
    reserved_names_file: Path | None = None
    # Seconds that events of a tunnel, and the numbers of counted usage batches, are kept.
    tunnel_history_seconds: int = 2_592_000

    # == Edge
    # Seconds after its last heartbeat for which a relay counts as live.
    relay_lease_seconds: float = 15.0
    # Share of a region's healthy relays that must have staged a certificate before it serves; below 1 the others are waited for
    # as long as the next setting says, and serve with it when they have it.
    certificate_switch_share: float = 1.0
    # Seconds after which that share is enough.
    certificate_switch_wait_seconds: float = 60.0
    # Seconds after a switch in which every relay of a region must serve with the certificate; then the region is stale.
    certificate_stale_seconds: float = 30.0
    # Seconds for which a process trusts its list of live relays.
    relay_cache_seconds: float = 1.0
    # Relays in one edge assignment at most.
    edge_assignment_size: int = 3
    # Seconds between two heartbeats of an edge stream, at most 5.
    edge_heartbeat_seconds: float = 3.0
    # Seconds between two hashes of the state on an edge stream.
    edge_hash_seconds: float = 60.0
    # Seconds between two looks at the change table when no notification came.
    edge_poll_seconds: float = 1.0
    # Seconds without the database after which streams are ended, so that relays know that nobody tells them of changes.
    edge_outage_seconds: float = 4.0
    # Changes read at once.
    edge_batch_rows: int = 500
    # Edge streams of one process.
    edge_max_streams: int = 200
    # Lines that may wait in one edge stream.
    edge_queue_lines: int = 1000
    # Bytes that may wait in one edge stream.
    edge_queue_bytes: int = 16_777_216
    # Seconds for a relay to take some of what waits, then its stream is ended.
    edge_send_seconds: float = 10.0
    # Seconds that changes are kept; a relay that was away for longer gets a snapshot.
    edge_changes_keep_seconds: int = 86_400
    # Changes that are kept at most.
    edge_changes_keep_rows: int = 100_000
    # Seconds that a request waits for Redis, then it goes on without.
    redis_timeout_seconds: float = 0.05
    # Seconds that a relay's heartbeat waits for Redis.
    redis_heartbeat_timeout_seconds: float = 0.5
    # Seconds that Redis is left alone after a failure.
    redis_pause_seconds: float = 1.0
