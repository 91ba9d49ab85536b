"""Settings of the agent (`portico http` and the other developer commands), and where each came from."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portico.settings.loading import load, read_table
from portico.settings.secrets import Secret, environment_secret, is_secret


@dataclasses.dataclass(frozen=True, slots=True)
class AgentSettings:
    """The developer's machine: account, connection to the platform, forwarding to the local target."""

    # == Account
    # Base URL of the API, without /v1; empty: the one of `portico login`, else http://127.0.0.1:7000.
    server: str = ""
    # Agent key (`tnl_agt_…`); stands in for `portico login`.
    agent_key: Secret | None = None
    # Folder of the CLI's own files: credentials.json and portico.toml.
    config_dir: Path = Path("~/.config/portico")
    # CA bundle for an https API or wss relay with a private CA; empty means the public ones.
    ca_file: Path | None = None
    # Preferred region; empty lets the platform choose.
    region: str = ""
    # Users whom visitors of `portico http` must be, as NAME:PASSWORD, one a line: --basic-auth that ps does not show.
    basic_auth: Secret | None = None
    # Proxy to relays and API: http://, socks5:// or socks5h://[user:password@]host:port; none: not even the environment's.
    proxy_url: Secret | None = None

    # == Connection to the platform
    # Seconds for one API call to be answered; the API answers in milliseconds, a proxy in front may queue.
    api_timeout_seconds: float = 10.0
    # Seconds for the API to answer before a reconnect goes on with the tokens that it has; relays take old ones in an outage.
    renew_timeout_seconds: float = 2.0
    # Longest wait in seconds before a failed refresh is tried again; well below the relays' grant_refresh_grace_seconds.
    refresh_retry_max_seconds: float = 15.0
    # Seconds that an agent which starts waits for the API to know of a relay, as a platform that has just started may not yet.
    first_relay_seconds: float = 15.0
    # Seconds to connect to a relay: TCP, TLS, upgrade and hello together.
    connect_timeout_seconds: float = 10.0
    # Seconds for a proxy to open one connection; below connect_timeout_seconds, so that the proxy is named as the one that hangs.
    proxy_timeout_seconds: float = 8.0
    # Seconds for a relay to answer a BIND, then another is tried; longer than a take-over probe.
    bind_timeout_seconds: float = 15.0
    # Longest first wait in seconds before a lost connection is tried again (the wait is random below it).
    reconnect_first_seconds: float = 0.2
    # Longest wait in seconds before a lost connection is tried again; it doubles from the first one up to this.
    reconnect_max_seconds: float = 30.0
    # Seconds between pings until the relay's HELLO says its own.
    ping_interval_seconds: float = 5.0
    # Seconds for a pong until the relay's HELLO says its own, then the connection is dead.
    ping_timeout_seconds: float = 5.0
    # Bytes of one WebSocket message from a relay; twice what the protocol allows, so that its own check answers.
    websocket_message_max_bytes: int = 2097152
    # Seconds for requests in flight to end when the agent stops, or when a relay asked to be left.
    drain_seconds: float = 10.0
    # Seconds of these for WebSockets and TCP connections when the agent stops: they have no end of their own.
    drain_upgraded_seconds: float = 1.0
    # Seconds for the last call to the API (the session's end) when the agent stops.
    goodbye_timeout_seconds: float = 2.0

    # == Streams
    # Streams open at once on one session; above it new ones are reset.
    max_streams: int = 4096
    # Bytes of credit that a request body's window can grow to while the target keeps up.
    stream_window_max_bytes: int = 1048576
    # Bytes that all windows of the session together may grow.
    window_growth_budget_bytes: int = 16777216

    # == Local target
    # Seconds to connect to the target (TLS included).
    target_connect_timeout_seconds: float = 10.0
    # Seconds for a visitor's TLS handshake where the agent ends TLS (`portico tls --tls-cert`).
    tls_handshake_timeout_seconds: float = 10.0
    # Seconds of silence of the target after a request was sent whole, then 504; 0 is no limit.
    first_byte_timeout_seconds: float = 300.0
    # Open connections to one target; requests above it wait for a free one. Upgraded connections do not count.
    target_connections_max: int = 512
    # Idle keep-alive connections kept to one target.
    target_idle_max: int = 64
    # Seconds that a keep-alive connection to the target may be idle; many servers close theirs after 5 s.
    target_idle_seconds: float = 4.0
    # Bytes of a target's response head; with names and values it must fit into one frame of 64 KiB.
    target_head_max_bytes: int = 61440
    # Bytes waiting to be written to the target before a request body's sender is held.
    target_write_buffer_bytes: int = 262144
    # Bytes of a request that are kept so that it can be sent again when a pooled connection turns out to be dead.
    retry_body_max_bytes: int = 65536
    # Entries of a folder that its listing shows.
    listing_max_entries: int = 10000

    # == portico.yml
    # Bytes of one file; beyond it the file is refused.
    config_max_bytes: int = 1048576
    # Seconds between two looks at whether a file changed; it is read when it is the same for two looks.
    config_poll_seconds: float = 0.5

    # == Diagnosis (`portico diagnose`)
    # Seconds for each step of the diagnosis to be answered.
    diagnose_step_seconds: float = 3.0
    # Seconds for the whole diagnosis; steps become shorter towards its end.
    diagnose_seconds: float = 15.0

    # == Logs (`portico logs`)
    # Seconds between two questions for new events while they are followed.
    logs_poll_seconds: float = 1.0
    # Longest wait in seconds before the API is asked again after it failed; it doubles from logs_poll_seconds up to this.
    logs_retry_max_seconds: float = 15.0
    # Seconds before the newest known event that are asked for again: an event whose transaction took long comes late.
    logs_overlap_seconds: float = 30.0

    # == Inspector (the local page)
    # Keep requests and show them at web_addr; `--no-inspect` is the same for one run.
    inspect: bool = True
    # Bytes of memory for the requests that are kept; the oldest make room.
    inspect_max_bytes: int = 52428800
    # Bytes of each body that are kept; above it a body is shown cut off and its request cannot be replayed unchanged.
    inspect_body_max_bytes: int = 65536
    # Address of the local page, HOST:PORT; when the port is taken the next free one is used. `false` switches it off.
    web_addr: str = "127.0.0.1:4040"
    # Ports tried, counting up from the one of web_addr.
    web_ports_tried: int = 20
    # Names besides localhost that a browser may use for the local page (`NAME` or `NAME:PORT`); other Hosts are refused.
    web_allow_hosts: tuple[str, ...] = ()
    # Let web_addr be an address that other machines can reach. They see every request with its secrets, and may replay.
    web_allow_remote: bool = False
    # Connections to the local page at once.
    web_connections_max: int = 64
    # Live pages (event streams) at once.
    web_streams_max: int = 16
    # Bytes of a request head to the local page; cookies of all local apps arrive with it.
    web_head_max_bytes: int = 65536
    # Bytes of a request body to the local page: an edited request.
    web_body_max_bytes: int = 2097152
    # Seconds for a request to the local page to arrive whole, and for an answer to be taken.
    web_timeout_seconds: float = 15.0
    # Seconds that a keep-alive connection to the local page may wait between requests.
    web_idle_timeout_seconds: float = 75.0
    # Seconds between two looks for news that live pages are told of.
    web_refresh_seconds: float = 0.25
    # Requests in one list of the local page or its API.
    web_list_max: int = 500
    # Bytes that a compressed body may unpack to for showing.
    web_decoded_max_bytes: int = 1048576
    # Seconds that a replay may take; then it is cut off, as by a visitor who leaves.
    replay_timeout_seconds: float = 30.0
    # Replays running at once.
    replays_max: int = 16

    # == Screen and log
    # Lowest level of log records that are written.
    log_level: str = "INFO"
    # Requests that the screen shows.
    screen_requests: int = 10
    # Times a second that the screen is drawn at most.
    screen_redraws: float = 4.0
    # Requests a second that are written as lines (plain and --json); the rest are counted in one line.
    request_lines_per_second: int = 100


def agent_sources(
    overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Where the agent's settings came from, of those that somebody set: command line, variable or file, by key."""
    environ = os.environ if environ is None else environ
    file = agent_settings(overrides).config_dir / "portico.toml"
    table = read_table(file, "agent") if file.is_file() else {}
    found: dict[str, str] = {}
    secret = {key for key, kind in typing.get_type_hints(AgentSettings).items() if is_secret(kind)}
    for key in (field.name for field in dataclasses.fields(AgentSettings)):
        name = f"PORTICO_{key.upper()}"
        if (overrides or {}).get(key) is not None:
            found[key] = "command line"
        elif name in environ:
            found[key] = name
        elif key in secret and environment_secret(key, environ) is not None:
            found[key] = f"{name}_FILE" if f"{name}_FILE" in environ else f"the credential {key}"
        elif key in table or (key in secret and f"{key}_file" in table):
            found[key] = str(file)
    return found


def agent_settings(
    overrides: Mapping[str, Any] | None = None, below_environment: Mapping[str, Any] | None = None
) -> AgentSettings:
    """The agent's settings; its file is `portico.toml` in the config folder, table `[agent]`, when there is one.

    ``below_environment``: values that go before that file, but not before the environment.
    """
    folder = load(AgentSettings, overrides=overrides).config_dir.expanduser()
    path = folder / "portico.toml"
    unset = {k: v for k, v in (below_environment or {}).items() if f"PORTICO_{k.upper()}" not in os.environ}
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    own = {**unset, **given, "config_dir": folder}
    file = path if path.is_file() else None
    return load(AgentSettings, table="agent" if file else None, file=file, overrides=own)


def agent_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The agent's variables that are set, without secrets: what another process of it needs to find itself as this one."""
    environ = os.environ if environ is None else environ
    names = [
        f"PORTICO_{key.upper()}" for key, kind in typing.get_type_hints(AgentSettings).items() if not is_secret(kind)
    ]
    return {name: environ[name] for name in names if name in environ}
