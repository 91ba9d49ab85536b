"""Settings of one relay process (`portico relay`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from portico.settings.process import ProcessSettings
from portico.settings.secrets import Secret


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class RelayPlace:
    """Who a relay is, where it listens, and what it shares with others."""

    __slots__ = ()

    # == Identity and control plane
    # The relay's credential at the control plane (`tnl_rly_…`).
    relay_key: Secret
    # Name of this relay, unique in the platform; usage batches are counted once per relay name.
    relay_name: str = "relay-1"
    # Region that the relay announces, for edge choice.
    region: str = "local"
    # Base URL of the control plane's API, without /v1.
    api_url: str = "http://127.0.0.1:7000"
    # CA bundle for an https API with a private CA; empty means the public ones.
    api_ca_file: Path | None = None
    # Folder for what must outlive a restart: edge state, unsent usage; one per relay process.
    state_dir: Path = Path("portico-relay")

    # == Listeners
    # Address of the public HTTP listener.
    public_host: str = "127.0.0.1"
    # TCP port of the public HTTP listener.
    public_port: int = 7080
    # Address of the public HTTPS listener.
    https_host: str = "127.0.0.1"
    # TCP port of the public HTTPS listener.
    https_port: int = 7443
    # TCP port by which visitors reach the HTTPS listener, where it is another one (behind a balancer).
    public_https_port: int | None = None
    # Address of the listener that agents connect to.
    control_host: str = "127.0.0.1"
    # TCP port of the listener that agents connect to.
    control_port: int = 7081
    # Address on which the ports of TCP tunnels are opened, each while its tunnel is online here.
    tcp_host: str = "127.0.0.1"
    # Tunnels without a domain of their own are names directly below this one.
    base_domain: str = "localhost"
    # The public HTTP listener as visitors reach it.
    public_url: str = "http://127.0.0.1:7080"
    # The control listener as agents reach it; handed out in edge assignments.
    connect_url: str = "ws://127.0.0.1:7081/v1/connect"
    # Connections waiting in each listener's accept queue; a burst of new visitors beyond it is reset by the kernel.
    listen_backlog: int = 4096

    # == Other relays behind the same public address
    # Control ports of the others, as `ws://` or `wss://host:port/v1/peer`; a request that lands here goes one hop to its owner.
    peers: tuple[str, ...] = ()
    # CA bundle for wss peers with a private CA; empty means the public ones.
    peer_ca_file: Path | None = None
    # Key that relays of one address share; without it no peer is let in and none is called.
    peer_key: Secret | None = None
    # Redis or Valkey by which relays share the rates of organizations; without it each applies the whole rate by itself.
    redis_url: Secret | None = None
    # Seconds for Redis to answer; it is asked in the background, a slow one delays no request.
    redis_timeout_seconds: float = 0.25
    # Seconds in which Redis is not asked again after it failed; about so long after its return rates are shared again.
    redis_pause_seconds: float = 1.0
    # Seconds between two rounds in which a relay reports tokens used and leases more, for organizations with requests.
    rate_sync_seconds: float = 0.1
    # Seconds after which leased tokens that nobody used are given back.
    rate_lease_seconds: float = 1.0
    # Seconds of an organization's rate that one relay leases at most; it is twice the recent use otherwise.
    rate_batch_seconds: float = 0.5


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class RelayVisitors:
    """What visitors may do, and what is written down of it."""

    __slots__ = ()

    # == Visitors
    # Bytes of a request head (request line and headers); above it 431. Leaves room in one frame for ours.
    max_head_bytes: int = 49152
    # Seconds from a request's first byte to the end of its head, for a PROXY header, for a TLS handshake; slow ones hold no slot.
    head_timeout_seconds: float = 10.0
    # Seconds that a keep-alive connection may wait between requests; above the 60 s of common clients.
    idle_timeout_seconds: float = 75.0
    # Seconds in which a visitor must take some of a last answer's rest, else its connection is cut off.
    close_timeout_seconds: float = 30.0
    # Seconds without a byte of a request's body while the target wants more of it, then 408; 0 is no limit. Where an answer has
    # begun meanwhile there is none; a visitor that waits for 100 has at least `first_byte_timeout_seconds`.
    body_timeout_seconds: float = 60.0
    # Seconds in which a visitor that an answer waits for must take some of it, else its connection is reset; 0 is no limit. Idle
    # streams (server-sent events, WebSocket) are none of it. A visitor that took some is looked at again as long after.
    write_timeout_seconds: float = 120.0
    # Seconds without a response head after the request was forwarded, then 504; 0 is no limit. Agents have it too.
    first_byte_timeout_seconds: float = 300.0
    # Open visitor connections of one client address (of IPv6: of one /64, which is one customer); above it 429 and close.
    connections_per_address: int = 512
    # Leave loopback addresses out of connections_per_address: behind `portico up` every visitor is one.
    exempt_loopback: bool = False
    # Open visitor connections of the whole process; keeps file descriptors for agents and for the control plane.
    max_connections: int = 50000
    # Networks of proxies whose connections to the public ports begin with a PROXY header (version 1 or 2); from nobody else
    # is one taken, and without one their connections are closed.
    proxy_protocol_from: tuple[str, ...] = ()
    # Bytes of a PROXY header; what a proxy adds to it (TLVs) is skipped.
    proxy_header_max_bytes: int = 4096
    # Networks of proxies whose X-Forwarded-…, Forwarded and X-Request-Id are believed; everybody else's are replaced.
    trusted_proxies: tuple[str, ...] = ()
    # Requests in flight of one tunnel when its grant names no limit; above it 429.
    default_concurrency: int = 100
    # Client addresses (of IPv6: /64s) that one tunnel with a client rate tells apart; further ones share 256 buckets.
    rate_clients_per_tunnel: int = 8192
    # The same of all tunnels of the process together (about 200 bytes each).
    rate_clients_max: int = 131072
    # Seconds for a TCP tunnel's port to be let go by whoever has it (a relay that just died or drains), then the bind is refused.
    tcp_bind_seconds: float = 3.0
    # Seconds for the agent to reach the target of a TCP connection; longer than the agent's own limit for it.
    tcp_open_timeout_seconds: float = 20.0
    # Seconds without a byte either way after which a TCP connection is ended; 0 is no limit. Dead peers end by keep-alive.
    tcp_idle_timeout_seconds: float = 86400.0
    # Bytes waiting to be written to one visitor before its stream stops giving credit to the agent.
    visitor_write_buffer_bytes: int = 32768

    # == Passwords of visitors
    # Threads that verify passwords; each uses a core and 19 MiB while it works, and yields to everything else.
    password_verify_threads: int = 2
    # New passwords a minute that one client address may try (of IPv6: one /64); above it 429. Right ones are given back.
    password_attempts_per_address: int = 30
    # New passwords that a client address may try at once, after a minute without any.
    password_attempts_burst: int = 30
    # Requests of the whole process that wait for a password to be verified; above it 429.
    password_verify_waiting: int = 1024
    # Requests that wait so for the passwords of one policy, so that a tunnel under attack leaves room to the others.
    password_verify_waiting_per_policy: int = 256
    # Right passwords that are remembered (under a keyed hash), so that the next request costs no verification.
    password_cache_max: int = 10000
    # Seconds that a right password is remembered; one that was changed is forgotten at once.
    password_cache_seconds: float = 3600.0
    # Wrong passwords that are remembered.
    password_refusal_cache_max: int = 4096
    # Seconds that a wrong password is remembered: a browser that repeats one costs one verification.
    password_refusal_cache_seconds: float = 10.0

    # == Access log
    # Where requests and connections that ended are logged, a JSON object a line: off, stdout, or the path of a file.
    access_log: str = "off"
    # Share of the requests that went well (status below 400) that are logged, 0 to 1; refusals and failures always are.
    access_log_sample: float = 1.0
    # Refusals and failures logged in one second; those above it are counted. 0 is no limit.
    access_log_errors_per_second: int = 1000
    # Log the query of a request's address too. It may hold secrets: tokens in links, names in forms.
    access_log_query: bool = False
    # Bytes of lines that may wait to be written (a slow disk, a full one); what comes then is dropped and counted.
    access_log_queue_bytes: int = 4194304


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class RelayTls:
    """Certificates and handshakes."""

    __slots__ = ()

    # == TLS
    # Certificates of the public TLS port: each CERT:KEY, one file with both, or a folder of such pairs (certbot's, too).
    tls_certificates: tuple[str, ...] = ()
    # Passphrase of their keys that are encrypted.
    tls_key_passphrase: Secret | None = None
    # Seconds between two looks at whether a certificate file changed; SIGHUP looks at once.
    tls_poll_seconds: float = 10.0
    # Certificate chain (PEM) of the agents' listener, which then speaks TLS (`wss://` in connect_url); read again as above.
    control_tls_cert_file: Path | None = None
    # Private key (PEM, without a passphrase) of that certificate.
    control_tls_key_file: Path | None = None
    # Bytes of a TLS ClientHello; post-quantum keys and Encrypted Client Hello make some of them large.
    tls_hello_max_bytes: int = 32768
    # TLS connections whose handshake is not over, in one process; above it those that said nothing yet make room.
    max_handshakes: int = 2000
    # TLS contexts kept (one for each certificate and client CA in use); some 20 kB each, and 1 ms to make.
    tls_contexts_max: int = 2048
    # Seconds after which a context is made anew, and with it the key of its session tickets.
    tls_context_seconds: float = 43200.0
    # Private keys of this relay's region (PEM, X25519, mode 0600), more than one while they are rotated; without one no
    # certificate of a custom domain can be opened here.
    region_key_files: tuple[Path, ...] = ()
    # Public keys (Ed25519, base64url) of certificate workers whose manifests are believed; from their operator, never the API.
    certificate_signers: tuple[str, ...] = ()
    # Versions of certificates that one question to the control plane asks for (at most 50), some 6 kB each.
    certificate_fetch_rows: int = 50
    # Bytes of an answer to it.
    certificate_fetch_max_bytes: int = 8388608
    # Seconds for it to be answered.
    certificate_fetch_timeout_seconds: float = 10.0
    # Longest pause in seconds before it, or an acknowledgement, is tried again (full jitter).
    certificate_backoff_max_seconds: float = 5.0
    # Seconds that a relay which starts catches up before it serves TLS with what it has; not at all without the control plane.
    certificate_catch_up_seconds: float = 10.0
    # Folder of the development CA (`portico dev-ca`); without it and without certificates HTTPS has one that nobody trusts.
    dev_ca_dir: Path | None = None
    # What opens the key of the development CA; set by `portico up`.
    dev_ca_passphrase: Secret | None = None


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class RelaySessions:
    """Agents, the control plane, and what is counted for it."""

    __slots__ = ()

    # == Agent sessions and the wire
    # Bytes of credit that a stream can grow to while its reader keeps up.
    stream_window_max_bytes: int = 1048576
    # Bytes that all windows of one session together may grow beyond their start; bounds memory under many fast readers.
    window_growth_budget_bytes: int = 16777216
    # Streams open at once on one session.
    max_streams_per_session: int = 4096
    # Tunnels bound at once on one session.
    max_tunnels_per_session: int = 4096
    # Sessions connected at once.
    max_sessions: int = 20000
    # Seconds for a new agent connection to finish TLS, upgrade and hello.
    hello_timeout_seconds: float = 10.0
    # Seconds between pings on an idle session; also how soon a half-open connection is suspected.
    ping_interval_seconds: float = 5.0
    # Seconds for a pong, then the session is dead.
    ping_timeout_seconds: float = 5.0
    # Seconds for the holder of a tunnel to answer when another instance asks for it; then the other takes over.
    takeover_probe_seconds: float = 2.0
    # Seconds that sessions outlive their grants, and that reconnects with expired ones are taken, without the API.
    grant_outage_grace_seconds: float = 86400.0
    # Seconds to refresh an expired grant once the edge stream is back.
    grant_refresh_grace_seconds: float = 60.0
    # Seconds of clock difference tolerated in tokens, both ways.
    token_leeway_seconds: float = 60.0
    # Seconds for requests in flight to end, and for agents to have moved elsewhere, when the relay stops; then they are cut.
    drain_seconds: float = 10.0
    # Seconds that a stopping relay still answers on keep-alive connections (with `Connection: close`), then idle ones end.
    drain_idle_seconds: float = 1.0
    # Agents a second that a stopping relay asks to come elsewhere, so that they do not all come at once.
    drain_agents_per_second: int = 500
    # Seconds that a request waits for a tunnel whose agent was lost a moment ago, or that a relay just started may not
    # know yet; 0 refuses at once.
    hold_seconds: float = 3.0
    # Requests that wait at once in one process, so or by the `queue` of a policy; more are refused.
    hold_max_requests: int = 2000

    # == Link to the control plane
    # Seconds without a byte on the edge stream (heartbeats come every 5 s), then it is dead and opened anew.
    edge_silence_seconds: float = 15.0
    # Seconds to connect to the API.
    edge_connect_timeout_seconds: float = 2.0
    # Seconds from an edge request to its response head.
    edge_answer_timeout_seconds: float = 5.0
    # Seconds for one line of the edge stream to arrive whole; a large snapshot on a slow link must fit.
    edge_line_timeout_seconds: float = 60.0
    # Bytes of one line of the edge stream; a snapshot of 200,000 tunnels with policies of the usual size fits.
    edge_line_max_bytes: int = 268435456
    # Shortest wait in seconds before the link is tried again.
    edge_backoff_min_seconds: float = 0.1
    # Longest wait in seconds before the link is tried again (full jitter); revocations apply ≤ 2 s after the outage.
    edge_backoff_max_seconds: float = 1.0
    # Seconds before the link is tried again after the API refused the relay's key.
    edge_refused_seconds: float = 5.0
    # Seconds between heartbeats; with the timeout below they stay at most 5 s apart, presence has a lease of 15 s.
    heartbeat_interval_seconds: float = 2.5
    # Seconds for one heartbeat to be answered.
    heartbeat_timeout_seconds: float = 2.0
    # Seconds that a change of the bound tunnels waits for more of them before a heartbeat reports it.
    heartbeat_debounce_seconds: float = 0.02
    # Seconds from a change of the edge state to its copy on disk.
    snapshot_save_delay_seconds: float = 0.5

    # == Usage
    # Seconds of usage in one batch; a `kill -9` loses at most this much.
    usage_interval_seconds: float = 2.0
    # Bytes of unsent usage on disk; above it waiting batches are merged into one, so that totals are kept.
    usage_spool_max_bytes: int = 8388608
    # Batches in one report to the control plane.
    usage_post_max_batches: int = 20
    # Bytes of batches in one report to the control plane (a single larger batch goes alone).
    usage_post_max_bytes: int = 1048576
    # Seconds for one usage report to be answered.
    usage_post_timeout_seconds: float = 10.0
    # Longest wait in seconds before an unanswered usage report is sent again (full jitter).
    usage_backoff_max_seconds: float = 5.0
    # Seconds without usage after which a released tunnel's counters are forgotten.
    usage_forget_seconds: float = 3600.0


@dataclasses.dataclass(frozen=True, slots=True)
class RelaySettings(ProcessSettings, RelaySessions, RelayTls, RelayVisitors, RelayPlace):
    """One relay process. The key has no default: a relay without credentials refuses to start."""
