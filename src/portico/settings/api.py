"""Settings of the API and console (`portico api`), which workers read too. Its subjects have files of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from portico.settings.billing import BillingSettings
from portico.settings.domains import DomainSettings
from portico.settings.identity import IdentitySettings
from portico.settings.notifications import NotificationSettings
from portico.settings.process import ProcessSettings
from portico.settings.secrets import Secret
from portico.settings.tunnels import TunnelSettings


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class ApiPlace:
    """Where the process is, what it stands on, and what it takes from everybody."""

    __slots__ = ()

    # PostgreSQL, as postgresql://user:password@host/database or postgresql://user@/database?host=/socket/dir.
    database_url: Secret
    # 32 random bytes in base64url: encrypts signing keys and other stored secrets. Losing it loses them.
    master_key: Secret
    # Redis or Valkey for presence; without it every relay counts as present while its heartbeat in PostgreSQL is fresh.
    redis_url: Secret | None = None

    # == Addresses
    # Address that the API and console listen on.
    api_host: str = "127.0.0.1"
    # TCP port of the API and console.
    api_port: int = 7000
    # The API and console as people and agents reach them.
    api_url: str = "http://127.0.0.1:7000"
    # Certificate chain (PEM) with which the API speaks https; empty: plain HTTP, for a proxy in front. SIGHUP reads it again.
    api_tls_cert_file: Path | None = None
    # Private key (PEM, without a password) of that certificate.
    api_tls_key_file: Path | None = None
    # Public tunnel names live under this domain.
    base_domain: str = "localhost"
    # How a public URL is written: scheme and port that visitors use (http://web.localhost:7080).
    public_url: str = "http://localhost:7080"
    # TCP port of https as visitors reach it, in the URLs of TLS tunnels; 0: that of public_url if it is https, else 7443.
    public_https_port: int = 0
    # Public ports of TCP tunnels, first-last, all of them open to visitors on the relays; empty: no TCP tunnels.
    tcp_ports: str = "7100-7199"
    # Host in the URLs of TCP tunnels; empty: the base domain.
    tcp_url_host: str = ""
    # Descriptor from which a process that is ready to serve waits to be told to; set by `portico up`.
    standby_fd: int | None = None
    # Proxies whose X-Forwarded-For is believed, as addresses or networks; empty: nobody's.
    trusted_proxies: tuple[str, ...] = ()

    # == Database
    # Connections of the pool that one API process holds at most.
    database_pool_size: int = 12
    # Connections that it keeps beside the pool for single statements of its busiest routes.
    database_direct_connections: int = 6
    # Seconds that a request waits for a free connection.
    database_acquire_timeout_seconds: float = 10.0
    # Seconds for one statement.
    database_statement_timeout_seconds: float = 15.0
    # Seconds that a statement waits for a lock.
    database_lock_timeout_seconds: float = 5.0

    # == Requests
    # Bytes of a request head: address, names and values; a token has at most 4 kB.
    request_head_max_bytes: int = 32_768
    # Seconds from a connection, or a request's first byte, to the end of its head.
    request_head_timeout_seconds: float = 10.0
    # Bytes of a request body.
    request_body_max_bytes: int = 1_048_576
    # Bytes of a request body that a relay sends.
    edge_body_max_bytes: int = 4_194_304
    # Seconds for a request body to arrive whole.
    request_body_timeout_seconds: float = 30.0
    # Seconds that an Idempotency-Key is remembered.
    idempotency_seconds: int = 86_400
    # Seconds for requests in flight to end when the process stops; open event streams are ended at once.
    shutdown_seconds: float = 8.0
    # Requests served at once; more are answered 503 by the server.
    max_concurrency: int = 2000
    # Seconds between two rounds of housekeeping: key uses are written, what has expired is deleted.
    housekeeping_seconds: float = 300.0

    # == Rates of the API: requests in one minute, in each class of route; 0: no limit
    # Sign-in and other routes without a credential, from one network (an address, or a /64 of IPv6).
    rate_auth_per_minute: int = 1200
    # Reads by one person or key.
    rate_read_per_minute: int = 3000
    # Writes by one person or key.
    rate_write_per_minute: int = 1200
    # Exports by one person or key.
    rate_export_per_minute: int = 60
    # Agent sessions opened, refreshed and changed with one key; a whole fleet may share it. Counted by each process alone.
    rate_agent_per_minute: int = 60_000
    # Certificate events, and those of payment providers, from one network, good ones or not. Counted by each process alone.
    rate_events_per_minute: int = 300_000
    # Requests of the console's pages from one network.
    rate_page_per_minute: int = 1200
    # Requests from one network whose credential does not prove good. Those on their way count until they do.
    rate_unknown_per_minute: int = 3000


@dataclasses.dataclass(frozen=True, slots=True)
class ApiSettings(
    ProcessSettings,
    BillingSettings,
    DomainSettings,
    TunnelSettings,
    NotificationSettings,
    IdentitySettings,
    ApiPlace,
):
    """The control plane's API and console process."""
