"""Settings of everything on one machine (`portico up`, `portico demo`) and of what it starts beside the servers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from portico.settings.secrets import Secret


@dataclasses.dataclass(frozen=True, slots=True)
class PlatformSettings:
    """The supervisor behind `portico up`: what it starts, where, and how patiently."""

    # == Place
    # Folder of everything that outlives a restart; empty: the user's data folder, or /var/lib/portico as root.
    data_dir: Path | None = None
    # Address that the public, control and API listeners open; 0.0.0.0 for all of IPv4, :: for all of both families.
    host: str = "127.0.0.1"
    # Tunnels without a domain of their own are names directly below this one.
    base_domain: str = "localhost"
    # TCP port of the public HTTP listener; 0 takes a free one (here and below).
    http_port: int = 7080
    # TCP port of the public HTTPS listener.
    https_port: int = 7443
    # TCP port that agents connect to.
    control_port: int = 7081
    # TCP port of the API and console.
    api_port: int = 7000
    # Public ports of TCP tunnels, first-last; each is opened while a tunnel that has it is online.
    tcp_ports: str = "7100-7199"
    # Relay processes; all accept visitors on the ports above, and agents each on a port of its own.
    relays: int = 1
    # Control ports of the further relays, the second's first; empty takes free ones.
    relay_ports: tuple[int, ...] = ()
    # Whether simulators of the payment providers run too, and plans can be bought from them; no money moves.
    demo_billing: bool = False
    # Ports of these simulators on 127.0.0.1: Stripe's, Razorpay's, PayPal's; 0 takes a free one.
    simulator_ports: tuple[int, ...] = (7090, 7091, 7092)
    # Whether a second API process waits, with everything read in, to take over when the first one dies: callers then wait tenths
    # of a second, not seconds. It holds some 150 MiB.
    standby: bool = True
    # Lowest level of log records that are written, by every process.
    log_level: str = "INFO"

    # == PostgreSQL and Valkey
    # An external PostgreSQL instead of the embedded one.
    database_url: Secret | None = None
    # An external Redis or Valkey instead of the embedded one.
    redis_url: Secret | None = None
    # Folder of PostgreSQL's programs (postgres, initdb); empty: the wheel's, then the system's.
    pg_bin: Path | None = None
    # The Valkey server program; empty: the wheel's, then the system's.
    valkey_program: Path | None = None
    # Connections that the embedded PostgreSQL allows.
    postgres_max_connections: int = 100
    # MiB that the embedded Valkey may hold; past it the leases that end soonest go first.
    valkey_max_memory_mib: int = 256

    # == Times
    # Seconds for one process to become ready.
    start_seconds: float = 60.0
    # Shortest pause in seconds before a process that died is started again; doubles each time.
    restart_min_seconds: float = 0.2
    # Longest pause in seconds before a process that died is started again.
    restart_max_seconds: float = 5.0
    # Seconds after which a process counts as healthy and the pause starts small again.
    healthy_after_seconds: float = 2.0
    # Seconds for everything to end on Ctrl-C.
    stop_seconds: float = 10.0
    # Seconds for each process to end on a second Ctrl-C.
    hurry_seconds: float = 1.0
    # Seconds that a process which drains may live beside its successor.
    leave_seconds: float = 30.0
    # Seconds that an API serves before the one that waits to take over is started.
    standby_after_seconds: float = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class MigrateSettings:
    """Bringing the database's schema up to date."""

    # PostgreSQL, as for the API.
    database_url: Secret
    # Lowest level of log records that are written.
    log_level: str = "INFO"


@dataclasses.dataclass(frozen=True, slots=True)
class SimulatorSettings:
    """The process of the simulated payment providers; `portico up` starts it."""

    # Lowest level of log records that are written.
    log_level: str = "INFO"
    # Inherited sockets as name=fd,name=fd: stripe, razorpay, paypal; what is missing listens on a free port.
    listen_fds: str = ""
    # Descriptor on which the supervisor waits for READY=1.
    notify_fd: int | None = None
