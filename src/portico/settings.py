"""Settings: frozen values per process, from the command line over the environment over a file over defaults.

A settings class is a frozen dataclass; its field names are the keys of its table in ``portico.toml`` and, upper-cased
behind ``PORTICO_``, its environment variables. An unknown key in the file, or a value of the wrong type, refuses
with the key's name. No module but this one reads the environment.

A secret NAME can come from a file of its own: ``PORTICO_NAME_FILE`` in the environment, ``name_file`` in ``portico.toml``,
or a systemd credential called ``name``. Two sources of one layer are refused, and so is a file that others may read.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from portico.errors import Problem

T = TypeVar("T")


class Secret:
    """A value that prints masked. ``reveal()`` is the only way to the text."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


def _refuse(key: str, what: str) -> Problem:
    return Problem("config.invalid", f"setting {key}: {what}", key=key)


def _convert(key: str, raw: Any, kind: Any) -> Any:
    """``raw`` (a string from the environment, or a TOML value) as ``kind``; raises ``config.invalid``."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        options = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if raw is None or raw == "" else _convert(key, raw, options[0])
    if origin is tuple:
        items = [part.strip() for part in raw.split(",") if part.strip()] if isinstance(raw, str) else list(raw)
        return tuple(_convert(key, item, typing.get_args(kind)[0]) for item in items)
    if kind is Secret:
        if not raw:
            raise _refuse(key, "is empty")
        return raw if isinstance(raw, Secret) else Secret(str(raw))
    if kind is Path:
        return Path(raw).expanduser()
    if kind is bool:
        if isinstance(raw, bool):
            return raw
        if isinstance(raw, str) and raw.lower() in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            return raw.lower() in ("1", "true", "yes", "on")
        raise _refuse(key, f"{raw!r} is not true or false")
    if kind in (int, float):
        if isinstance(raw, bool):
            raise _refuse(key, f"{raw!r} is not a number")
        try:
            return kind(raw)
        except (TypeError, ValueError):
            raise _refuse(key, f"{raw!r} is not a number") from None
    if kind is str:
        return str(raw)
    raise TypeError(f"setting {key} has an unsupported type {kind!r}")


def read_table(path: Path, table: str) -> dict[str, Any]:
    """One table of a ``portico.toml``; raises ``config.invalid`` with the parser's line when it is not TOML."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem("config.invalid", f"settings file {path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise Problem("config.invalid", f"settings file {path}: {err}") from None
    found = document.get(table, {})
    if not isinstance(found, dict):
        raise Problem("config.invalid", f"settings file {path}: [{table}] is not a table")
    return found


# --- secrets in files -------------------------------------------------------------------------------------------------

#: Bytes of a file that holds one secret; a private key of any kind fits.
SECRET_FILE_MAX_BYTES = 65_536
#: Where container engines mount secrets: its modes are theirs, and nobody else is in there.
_CONTAINER_SECRETS = Path("/run/secrets")


def is_secret(kind: Any) -> bool:
    """Whether a setting of this type (`Secret`, `Secret | None`) can come from a file."""
    return kind is Secret or Secret in typing.get_args(kind)


def mounted_secret(path: Path, environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``path`` lies where a container engine or systemd mounts secrets: its mode is theirs to choose."""
    environ = os.environ if environ is None else environ
    folders = [_CONTAINER_SECRETS, *(Path(text) for text in [environ.get("CREDENTIALS_DIRECTORY")] if text)]
    return any(folder in path.absolute().parents for folder in folders)


def check_private(what: str, path: Path, mode: int, environ: Mapping[str, str] | None = None) -> None:
    """Raise ``config.invalid`` when others than owner and group may read or write ``path`` (a group is set on purpose)."""
    environ = os.environ if environ is None else environ
    if not hasattr(os, "geteuid"):  # elsewhere modes say nothing
        return
    if mode & 0o006 and not mounted_secret(path, environ):
        kind = "read" if mode & 0o004 else "written"
        advice = f"Run: chmod 600 {path} (or 640, for a group). If others had access, replace the secret too."
        raise Problem("config.invalid", f"{what}: {path} can be {kind} by every user", hint=advice)


def secret_in_file(what: str, path: Path, environ: Mapping[str, str] | None = None) -> Secret:
    """The secret that ``path`` holds alone, without the newline at its end; ``what`` names the setting in refusals.

    Raises ``config.invalid`` when it cannot be read, is empty, is too long, or can be read by every user of the machine.
    """
    path = path.expanduser()
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(SECRET_FILE_MAX_BYTES + 1)
        text = data.decode().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as err:
        why = getattr(err, "strerror", None) or "it is not text"
        raise Problem("config.invalid", f"{what}: {path} cannot be read: {why}") from None
    check_private(what, path, mode, environ)
    if not text.strip() or "\0" in text:
        raise Problem("config.invalid", f"{what}: {path} is empty")
    if len(data) > SECRET_FILE_MAX_BYTES:
        raise Problem("config.invalid", f"{what}: {path} is longer than {SECRET_FILE_MAX_BYTES} bytes")
    return Secret(text)


def secret_file_variables(*classes: type) -> set[str]:
    """The variables that name files of secrets of these settings classes."""
    return {
        f"PORTICO_{key.upper()}_FILE"
        for cls in classes
        for key, kind in typing.get_type_hints(cls).items()
        if is_secret(kind)
    }


def _secret_from(sources: Mapping[str, Any], environ: Mapping[str, str]) -> Any:
    """The secret of the only source that is given (a text, or a path to it); ``None`` without one."""
    given = {name: value for name, value in sources.items() if value not in (None, "")}
    if len(given) > 1:
        raise _refuse(next(iter(given)), f"is given twice: {' and '.join(given)}; keep one")
    for name, value in given.items():
        return secret_in_file(f"setting {name}", value, environ) if isinstance(value, Path) else value
    return "" if "" in sources.values() else None


def _environment_secret(key: str, environ: Mapping[str, str]) -> Any:
    name = f"PORTICO_{key.upper()}"
    sources: dict[str, Any] = {name: environ.get(name)}
    if file := environ.get(f"{name}_FILE"):
        sources[f"{name}_FILE"] = Path(file)
    if folder := environ.get("CREDENTIALS_DIRECTORY"):
        credential = Path(folder) / key
        sources[f"the credential {key}"] = credential if credential.is_file() else None
    return _secret_from(sources, environ)


def _holds_secret(text: str) -> bool:
    """Whether a value that may be secret is one: a URL without a password is not."""
    try:
        url = urlsplit(text)
        return not (url.scheme and (url.netloc or url.path.startswith("/"))) or url.password is not None
    except ValueError:
        return True


def _table_values(
    cls: type, hints: Mapping[str, Any], file: Path, table: str, environ: Mapping[str, str]
) -> dict[str, Any]:
    """The converted values of one table; raises ``config.invalid``."""
    keys = {f.name for f in dataclasses.fields(cls)}
    secret = {key for key in keys if is_secret(hints[key])}
    found = read_table(file, table)
    for key in found:
        if key not in keys and not (key.endswith("_file") and key.removesuffix("_file") in secret):
            raise _refuse(key, f"unknown key in [{table}] of {file}; known keys: {', '.join(sorted(keys))}")
    values = {key: _convert(key, raw, hints[key]) for key, raw in found.items() if key in keys}
    for key in secret & found.keys():
        if _holds_secret(str(found[key])):
            check_private(f"setting {key}", file, stat.S_IMODE(file.stat().st_mode), environ)
    for key in secret:
        if named := found.get(f"{key}_file"):
            sources = {key: found.get(key), f"{key}_file": file.parent / Path(str(named)).expanduser()}
            values[key] = _secret_from(sources, environ)
    return values


def load(
    cls: type[T],
    *,
    table: str | None = None,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> T:
    """An instance of the frozen dataclass ``cls``: overrides that are not ``None``, then environment, file, defaults.

    Raises ``config.invalid`` for an unknown key, a wrong type, or a missing value without default.
    """
    environ = os.environ if environ is None else environ
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    if file is not None and table is not None:
        values = _table_values(cls, hints, file, table, environ)
    for key in fields:
        name = f"PORTICO_{key.upper()}"
        raw = _environment_secret(key, environ) if is_secret(hints[key]) else environ.get(name)
        if raw is not None:
            values[key] = _convert(name, raw, hints[key])
    for key, raw in (overrides or {}).items():
        if key not in fields:
            raise TypeError(f"{cls.__name__} has no setting {key!r}")
        if raw is not None:
            values[key] = _convert(key, raw, hints[key])
    missing = [
        key
        for key, f in fields.items()
        if key not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        name = f"PORTICO_{missing[0].upper()}"
        more = f", or {name}_FILE to a file that holds it" if is_secret(hints[missing[0]]) else ""
        raise _refuse(missing[0], f"is required; set {name}{more}")
    return cls(**values)


# --- relay ------------------------------------------------------------------------------------------------------------
# The comment above a field is its row in docs/reference/limits.md (written by tools/reference.py): unit and reason.


@dataclasses.dataclass(frozen=True, slots=True)
class RelaySettings:
    """One relay process. The key has no default: a relay without credentials refuses to start."""

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
    # Lowest level of log records that are written.
    log_level: str = "INFO"

    # == Listeners
    # Sockets inherited from a supervisor (`public=5,https=6,control=7`); a name that is absent is bound as below.
    listen_fds: str = ""
    # Descriptor on which readiness is reported to a supervisor; none when started by hand.
    notify_fd: int | None = None
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
    # Address of the listener for metrics and health; never a public one: they are about all tenants.
    metrics_host: str = "127.0.0.1"
    # TCP port of that listener (`/metrics` for Prometheus, `/healthz`, `/readyz`); none: there is no such listener.
    metrics_port: int | None = None
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


# --- API process (`portico api`) --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class ApiSettings:
    """The control plane's API and console process."""

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
    # Address of the listener for metrics and health; never a public one: they are about all tenants.
    metrics_host: str = "127.0.0.1"
    # TCP port of that listener (`/metrics` for Prometheus, `/healthz`, `/readyz`); none: there is no such listener.
    metrics_port: int | None = None
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
    # Listening sockets inherited from the parent, as name=fd,…; set by `portico up`.
    listen_fds: str = ""
    # Descriptor on which the process tells a supervisor that it drains; set by `portico up`.
    notify_fd: int | None = None
    # Descriptor from which a process that is ready to serve waits to be told to; set by `portico up`.
    standby_fd: int | None = None
    # Proxies whose X-Forwarded-For is believed, as addresses or networks; empty: nobody's.
    trusted_proxies: tuple[str, ...] = ()
    # Lowest level of log records that are written.
    log_level: str = "INFO"

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

    # == Identity
    # Whether anybody may register; an operator can always make accounts.
    registration_open: bool = True
    # Whether people must verify their e-mail address before they may do more than look around: no keys, so no tunnels.
    require_verified_email: bool = False
    # Whom people of a suspended organization are told to ask: an address or a link. Empty: nobody is named.
    operator_contact: str = ""
    # Seconds after a platform operator's last proof of who they are in which they may do what is dangerous.
    operator_step_up_seconds: int = 900
    # Minutes for which an owner can let operators into the organization at most, with one consent.
    support_access_max_minutes: int = 10_080
    # Live consents to support access that one organization has at most.
    support_consents_per_organization: int = 10
    # Seconds that a token of support access lives at most; never longer than the consent.
    support_session_seconds: int = 3600
    # Seconds in which a first code confirms an authenticator app's key; a key that was shown before is made anew.
    totp_setup_seconds: int = 1800
    # Seconds in which a second operator confirms that a person's second factors are taken away.
    mfa_reset_seconds: int = 86_400
    # What this installation is called in authenticator apps and passkey prompts.
    service_name: str = "Portico"
    # Life of the link in a mail that verifies an address.
    email_verification_seconds: int = 259_200
    # Life of the link in a mail that sets a new password.
    password_reset_seconds: int = 3600
    # Mails of one kind (verification, reset, change of address) that one account or address gets in one window.
    account_mails_per_window: int = 5
    # Seconds of that window.
    account_mail_window_seconds: int = 3600
    # Forgotten passwords that one network may ask about in one window of sign-ins.
    resets_per_address: int = 30
    # Seconds between the password and the second step of a sign-in.
    second_step_seconds: int = 300
    # Wrong codes of one person's authenticator app from one network, in one window of sign-ins.
    code_failures_per_pair: int = 5
    # Wrong codes of one person's authenticator app in a day, from all networks that are new to the account, and from each other.
    code_failures_per_day: int = 30
    # Seconds for an authenticator to answer.
    passkey_challenge_seconds: int = 300
    # Passkeys that a person may have.
    passkeys_per_person: int = 20
    # Life of an access token in seconds.
    access_token_seconds: int = 900
    # Seconds that an unused refresh token lives; each use starts it anew.
    refresh_token_seconds: int = 2_592_000
    # Seconds after which a sign-in session ends however often it was refreshed.
    sign_in_max_seconds: int = 7_776_000
    # Seconds without a page after which a browser is signed out; each page starts them anew.
    browser_idle_seconds: int = 604_800
    # Seconds after which a browser is signed out however often it was used.
    browser_max_seconds: int = 2_592_000
    # Seconds between two writes of when a browser session was last used.
    browser_touch_seconds: int = 60
    # Seconds of clock difference tolerated in tokens, both ways.
    token_leeway_seconds: float = 60.0
    # Characters of the shortest password.
    password_min_length: int = 10
    # Characters of the longest password: a hash of megabytes would cost what a hundred cost.
    password_max_length: int = 256
    # Password hashes computed at once; each takes a core and 19 MiB for a moment.
    password_hash_concurrency: int = 2
    # Password hashes that may wait for their turn; more are refused.
    password_hash_waiting: int = 64
    # Failed sign-ins to one account from one address, in one window.
    sign_in_failures_per_pair: int = 10
    # Failed sign-ins to one account from anywhere, in one window.
    sign_in_failures_per_account: int = 100
    # Failed sign-ins from one address to any account, in one window.
    sign_in_failures_per_address: int = 100
    # Seconds of that window.
    sign_in_failure_window_seconds: int = 900
    # Seconds after a proof of who somebody is in which it counts as recent, for acts that ask for one.
    step_up_seconds: int = 900
    # Wrong passwords in one session, when it asks for a proof or changes the password, in one window of sign-ins.
    step_up_failures: int = 10
    # Accounts registered from one address in one window.
    registrations_per_address: int = 100
    # Life of a device code in seconds; also the window of the two limits below.
    device_code_seconds: int = 600
    # Seconds between two polls of a waiting device.
    device_poll_seconds: int = 5
    # Wrong user codes that one person may enter in one window.
    device_code_guesses: int = 10
    # Device codes that one address may have open in one window.
    device_codes_per_address: int = 60
    # Plan of a new organization, of those that GET /v1/admin/plans has; `unlimited` leaves the ceilings of these settings alone.
    default_plan: str = "unlimited"
    # Keys that an organization may have at once, whatever its plan.
    max_keys_per_organization: int = 1000
    # Networks that one key may be limited to.
    key_max_cidrs: int = 64
    # Days that an invitation to an organization is good.
    invitation_days: float = 7.0
    # Invitations that an organization may have open at once.
    max_open_invitations_per_organization: int = 200
    # Invitations that an organization may mail in an hour.
    invitations_per_organization: int = 100
    # Invitations that an organization may mail to one address in a day; all organizations together, four times as many.
    invitation_mails_per_address: int = 5
    # Days that invitations are kept after they were accepted, revoked or expired.
    invitation_keep_days: float = 90.0
    # Folder of files that are made for people (exports of organizations), the same for API and workers; none: there are none.
    objects_dir: Path | None = None
    # Exports that an organization may make in a day.
    exports_per_day: int = 5
    # Days that an export can be downloaded.
    export_days: float = 3.0
    # Bytes of lines in one export.
    export_max_bytes: int = 4_294_967_296
    # Organizations that one person may own.
    organizations_per_person: int = 10
    # Days of grace between asking for an organization's deletion and the deletion, in which it can be taken back.
    organization_deletion_days: float = 14.0
    # Roles of its own that an organization may have, whatever its plan.
    max_roles_per_organization: int = 50
    # Public keys of a secret scanner with GitHub's partner protocol, whose reports revoke leaked keys, as an address such as
    # https://api.github.com/meta/public_keys/secret_scanning; empty: only keys of the file below are believed.
    secret_scanning_keys_url: str = ""
    # The same document as a file, for installations that cannot fetch it; read at the start.
    secret_scanning_keys_file: Path | None = None
    # Seconds that fetched keys are used before they are fetched again; during an outage of that address they are for a day.
    secret_scanning_keys_seconds: int = 3600
    # Matches in one report.
    secret_scanning_max_matches: int = 1000
    # Seconds that a signing key signs before the next takes over.
    signing_key_seconds: int = 2_592_000
    # Seconds that a new key is published before it may sign.
    signing_key_publish_seconds: int = 3600
    # Seconds that a retired key stays published; must exceed the longest token life plus the relays' outage grace.
    signing_key_retired_seconds: int = 180_000
    # Seconds that a process trusts its copy of the signing keys.
    signing_key_cache_seconds: float = 15.0

    # == Mail
    # Where mail is handed over: smtp://host[:port] (587, STARTTLS) or smtps://host[:port] (465, TLS from the start); empty: mail
    # is written to the worker's outbox_dir, for development.
    smtp_url: str = ""
    # Sender of every mail, as `Portico <no-reply@example.com>`; its domain is also the name that we give in EHLO.
    smtp_from: str = "Portico <no-reply@localhost>"
    # Name for that server, if it asks for one.
    smtp_username: str | None = None
    # Password that goes with it.
    smtp_password: Secret | None = None
    # Whether STARTTLS is `required`, used where `offered`, or `never` (a server on this machine); a password asks for `required`.
    smtp_starttls: str = "required"
    # Certificate authorities (PEM) that vouch for that server; empty: those of the system.
    smtp_ca_file: Path | None = None
    # Seconds for one mail to be handed over.
    smtp_timeout_seconds: float = 30.0

    # == Notifications
    # Channels that an organization may have.
    channels_per_organization: int = 20
    # Tests of one channel, and codes to it, in one window.
    channel_tests_per_window: int = 5
    # The same of all channels of an organization, those that were removed meanwhile among them.
    channel_tests_per_organization: int = 30
    # Deliveries that an organization has sent again in one window.
    channel_resends_per_organization: int = 60
    # Seconds of that window.
    channel_test_window_seconds: float = 300.0
    # Seconds that a code to an address is good for.
    channel_code_seconds: int = 86_400
    # Tries of one code.
    channel_code_tries: int = 5
    # Codes that an organization has mailed at most while one is good: readers who never asked for it get no more.
    channel_codes_per_organization: int = 40
    # Seconds that a webhook's secret is still signed with after it was replaced, unless the call says otherwise.
    webhook_secret_overlap_seconds: int = 86_400
    # Seconds for which every attempt at a channel fails before it is switched off.
    channel_patience_seconds: float = 432_000.0
    # Hosts that incoming webhooks of Slack, and of what speaks its format, may have.
    slack_hosts: tuple[str, ...] = ("hooks.slack.com", "hooks.slack-gov.com")
    # TCP ports of customers' addresses that are called (webhooks, Slack).
    outbound_ports: tuple[int, ...] = (443, 8443)
    # Networks that may be called although they are not public, as 10.1.0.0/16; empty: none.
    outbound_allow: tuple[str, ...] = ()
    # Whether http:// is called, too; for development.
    outbound_http: bool = False
    # Certificate authorities (PEM) that vouch for customers' addresses; empty: those of the system.
    outbound_ca_file: Path | None = None
    # Seconds for one call, from the look at the name to the answer.
    outbound_timeout_seconds: float = 15.0

    # == Reports and settlement
    # Reports of money that an organization, and the installation itself, may ask for in a day; schedules come on top.
    reports_per_day: int = 50
    # Schedules of reports that an organization, and the installation itself, may have.
    report_schedules_max: int = 20
    # Days that a report is kept.
    report_days: float = 7.0
    # Bytes of one report.
    report_max_bytes: int = 4_294_967_296
    # Seconds for one report to be read.
    report_seconds: float = 600.0
    # Bytes of a report up to which a webhook brings it itself; of a larger one it brings the link alone.
    report_inline_max_bytes: int = 1_048_576
    # Object store that operators' reports can go to, as s3://BUCKET/PREFIX; empty: none.
    report_store_url: str = ""
    # Its endpoint, where that is not Amazon's.
    report_store_endpoint: str = ""
    # Its region.
    report_store_region: str = "us-east-1"
    # Id of the access key for it; none: what the machine has.
    report_store_key: str | None = None
    # Secret that goes with it.
    report_store_secret: Secret | None = None
    # Seconds for one report to be stored there.
    report_store_timeout_seconds: float = 120.0
    # Seconds by which the timestamp of a settlement receipt may be off, both ways.
    settlement_tolerance_seconds: int = 300
    # Bytes of one settlement receipt, and of one import.
    settlement_receipt_max_bytes: int = 33_554_432
    # Seconds for which refusals of one sink and reason share a row of the audit log.
    settlement_refusal_audit_seconds: float = 60.0
    # Days after the end of its period in which an event that comes late opens a settlement again.
    settlement_watch_days: float = 120.0

    # == Audit
    # Days that audit rows are kept; 0: for ever. The hash of the last row deleted is kept as anchor.
    audit_retention_days: int = 400
    # Rows that one call of GET /v1/audit/verify checks at most; it tells where to go on.
    audit_verify_rows: int = 5000
    # Rows that GET /v1/audit/export reads at a time.
    audit_export_rows: int = 500

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

    # == Domains
    # Domains that an organization may have, whatever its plan.
    domains_per_organization: int = 1000
    # Domains that may lead to one tunnel.
    domains_per_tunnel: int = 100
    # Name of the public edge that customers' CNAME records point to; empty: `edge` below base_domain. It must resolve to relays.
    domain_cname: str = ""
    # Addresses of the public edge, for domains at which no CNAME may stand; empty: those that domain_cname resolves to.
    domain_addresses: tuple[str, ...] = ()
    # Zone in which DNS-01 challenges are answered for domains that delegate `_acme-challenge`; empty: delegation is not offered.
    challenge_zone: str = ""
    # Resolvers that are asked whether a domain is its owner's, and points here: addresses, ADDRESS:PORT, or `system` for those of
    # the machine. More than half of them must agree, so that one that lies or is slow decides nothing.
    dns_resolvers: tuple[str, ...] = ("1.1.1.1", "8.8.8.8", "9.9.9.9")
    # Seconds for one resolver to answer one question, with all aliases.
    dns_timeout_seconds: float = 4.0
    # Questions that one process has on their way at once.
    dns_concurrency: int = 128
    # Seconds between two looks at the DNS of a domain with which everything is right.
    domain_recheck_seconds: float = 21_600.0
    # Seconds within which a second `verify` of a domain gets the answer of the first.
    domain_verify_pause_seconds: float = 5.0
    # Days of failing looks after which a domain is given up: a claim is looked at no longer, a domain in use has `moved`.
    domain_failing_days: float = 7.0
    # Days that a domain which has moved is kept, in case that it comes back; then it is deleted.
    domain_moved_days: float = 7.0
    # Days that a domain which was lost is shown to who had it.
    domain_deleted_days: float = 30.0
    # A list of public suffixes (publicsuffix.org) instead of the one that is installed with the server.
    public_suffix_file: Path | None = None

    # == Webhooks of payment providers
    # Bytes of one event.
    billing_webhook_max_bytes: int = 262_144
    # Seconds by which the time of an event may be ahead of ours, and that of Stripe's signature behind it.
    billing_webhook_tolerance_seconds: float = 300.0
    # Seconds for which PayPal may go on with a delivery: it tries for three days.
    paypal_webhook_age_seconds: float = 345_600.0
    # Seconds after which an event of Razorpay's is too old: it tries for a day, and people send events again for seven.
    razorpay_webhook_age_seconds: float = 691_200.0
    # Events that one transaction stores at most; while it commits, the next ones gather.
    billing_webhook_group: int = 256
    # Events that wait in one process for their transaction; more are refused for a moment.
    billing_webhook_backlog: int = 4096
    # Events from one network that wait for PayPal's certificate; more are refused for a minute.
    billing_webhook_unproven_per_network: int = 100
    # The same of all networks together.
    billing_webhook_unproven: int = 5000
    # Seconds between two looks of a process for certificates that another one has fetched.
    billing_webhook_certificate_refresh_seconds: float = 1.0
    # Seconds between two records of what was refused why.
    billing_webhook_activity_seconds: float = 1.0
    # Events that one call replays, or says that it would.
    billing_webhook_replay_max: int = 1000
    # Seconds that events are kept; what they led to stays.
    billing_webhook_keep_seconds: int = 34_560_000
    # Seconds that their bodies are kept, sealed; an event without its body cannot be replayed.
    billing_webhook_body_keep_seconds: int = 7_776_000
    # Seconds that it is shown what was stored and turned out to be nobody's.
    billing_webhook_disowned_keep_seconds: int = 86_400
    # Seconds before now at which a scheduled comparison with a provider's list ends: what is younger may be on its way.
    billing_reconcile_grace_seconds: float = 300.0
    # Seconds by which it begins before the end of the last one.
    billing_reconcile_overlap_seconds: float = 3600.0
    # Seconds that the first one looks back.
    billing_reconcile_first_seconds: float = 259_200.0

    # == Certificate events
    # Bytes of one event.
    cert_event_max_bytes: int = 65_536
    # Seconds by which an event's time may be off, both ways.
    cert_event_tolerance_seconds: float = 300.0
    # Seconds after which every event is refused that is not known to be from its source, whatever was wrong with it.
    cert_refusal_seconds: float = 0.05
    # Events that one transaction stores at most; while it commits, the next ones gather.
    cert_event_group: int = 256
    # Events that wait in one process for their transaction; more are refused for a moment.
    cert_event_backlog: int = 4096
    # Seconds between two records of what was counted of each source: what came, and what was refused why.
    cert_activity_seconds: float = 1.0
    # Sources of certificate events in all.
    cert_sources_max: int = 500
    # Seconds for which a process trusts its list of sources where it refuses; what it stores is checked anew.
    cert_source_refresh_seconds: float = 1.0
    # Seconds for which the keys of a source before a new one are good, when nobody says otherwise.
    cert_source_grace_seconds: int = 86_400
    # Seconds that events are kept; what they led to stays.
    cert_event_keep_seconds: int = 34_560_000
    # Events that one call replays, or says that it would.
    cert_replay_max: int = 1000
    # Seconds after its end in which a certificate incident that comes back is the same one.
    cert_incident_reopen_seconds: float = 86_400.0
    # Seconds in which people are not told again of an incident that comes back, unless it is worse.
    cert_incident_cooldown_seconds: float = 1800.0
    # Share of a certificate's life by which its renewal may be late before that is a warning.
    cert_sla_warning_share: float = 0.05
    # Share of a certificate's life by which its renewal may be late before the objective is missed.
    cert_sla_breach_share: float = 0.10
    # Address of the operator's automation, which is told of certificate incidents; empty: none is.
    cert_runbook_url: str | None = None
    # Secret (`whsec_` and base64 of 24 to 64 bytes) with which what it is told is signed.
    cert_runbook_secret: Secret | None = None

    # == Finance
    # Rows of a hash chain that one request of GET /v1/admin/ledger/verify checks (rounded up to whole batches).
    ledger_verify_rows: int = 10_000
    # Days that one request for revenue covers at most.
    revenue_days: int = 366
    # TrueType font for invoices as PDF, which is embedded; empty: one that knows the letters of Western Europe alone.
    invoice_font_file: Path | None = None

    # == Certificates by ACME
    # Whether the terms of the certificate authority (CA) are agreed to: no certificate is ordered before.
    acme_agree_terms: bool = False
    # Directory of the CA that certificates come from.
    acme_directory: str = "https://acme-v02.api.letsencrypt.org/directory"
    # Directory of that CA's staging, where a name is tried again after a failure before the CA's limits are spent on it; empty:
    # there is none, but for Let's Encrypt, whose own is used.
    acme_staging_directory: str = ""
    # Directories of CAs that are asked, in this order, when the one before them cannot or will not issue.
    acme_fallback_directories: tuple[str, ...] = ()
    # Mail addresses that CAs may write to.
    acme_contacts: tuple[str, ...] = ()
    # External accounts that CAs demand: HOST=KEY_ID:HMAC_KEY, comma separated; HOST is that of the directory.
    acme_external_accounts: Secret | None = None
    # Certificate profiles: HOST=PROFILE, comma separated; a CA that is not named gives its default one.
    acme_profiles: tuple[str, ...] = ()
    # Authorities that a CA's own address is trusted by; empty: the system's.
    acme_ca_file: Path | None = None
    # How names are proved, best first: http-01, tls-alpn-01, dns-01. Wildcards are always proved by dns-01.
    acme_challenges: tuple[str, ...] = ("http-01", "tls-alpn-01", "dns-01")
    # Port on which CAs look for http-01; another one than 80 only with a CA of one's own.
    acme_http_port: int = 80
    # Port on which CAs look for tls-alpn-01; another one than 443 only with a CA of one's own.
    acme_tls_port: int = 443
    # Seconds for a CA to answer a request.
    acme_timeout_seconds: float = 30.0
    # Bytes of an answer of a CA.
    acme_answer_max_bytes: int = 1_048_576
    # Times that a request is made anew, since its nonce was refused.
    acme_nonce_retries: int = 10
    # Seconds between two looks at how a validation or an order stands, when the CA does not say.
    acme_poll_seconds: float = 1.0
    # Seconds between two such looks at most, whatever the CA says.
    acme_poll_max_seconds: float = 20.0
    # Seconds for a CA to validate a name, or to issue.
    acme_patience_seconds: float = 180.0
    # Seconds for every healthy relay to have a challenge before an attempt is given back.
    acme_relays_seconds: float = 30.0
    # Seconds that relays answer a challenge at most.
    acme_challenge_seconds: float = 3600.0
    # Seconds of one look, before an order, whether a challenge can be reached.
    acme_reach_seconds: float = 10.0
    # Certificates that are being ordered at once, by all workers; organizations take turns.
    acme_open_orders: int = 200
    # Names of one look for what is due.
    acme_sweep_names: int = 1000
    # Seconds between two questions when to renew a certificate (ARI), a tenth more or less.
    acme_ari_seconds: float = 36_000.0
    # Such questions of one round.
    acme_ari_names: int = 500
    # Share of its lifetime that a certificate has left when it is renewed, where its CA does not say when.
    acme_renew_share: float = 0.3333
    # The same share of a certificate that lives for less than acme_short_days.
    acme_renew_share_short: float = 0.5
    # Days of life below which a certificate is a short one.
    acme_short_days: float = 10.0
    # Pauses in seconds after the first, the second… failure in a row, a tenth more or less; the last one holds for all later.
    acme_retry_seconds: tuple[float, ...] = (60, 600, 6000, 86_400)
    # The same where nothing was asked of a CA, since the name does not lead here.
    acme_unready_seconds: tuple[float, ...] = (60, 120, 300, 600, 1800, 3600)
    # Seconds between two orders of a name that people ask for by `retry`.
    acme_retry_pause_seconds: float = 60.0
    # Failures of a CA in a row after which the next one is asked.
    acme_fallback_after: int = 2
    # Orders of an account that a CA allows in 3 hours: a bucket that fills evenly, as the next three; all are Let's Encrypt's.
    acme_budget_orders: int = 300
    # Certificates of a registered domain that a CA allows in 7 days.
    acme_budget_domain: int = 50
    # Certificates of the same names that a CA allows in 7 days.
    acme_budget_names: int = 5
    # Failed validations of a name that a CA allows in an hour.
    acme_budget_failures: int = 5
    # Days that orders which are over are kept.
    acme_keep_days: int = 90
    # Who writes TXT records for dns-01: rfc2136, exec; empty: nobody, and dns-01 is not used.
    acme_dns: str = ""
    # Zones besides challenge_zone in which that may write, for names of one's own that delegate nothing.
    acme_dns_zones: tuple[str, ...] = ()
    # Server of the zone that takes updates by RFC 2136: ADDRESS or ADDRESS:PORT.
    acme_dns_server: str = ""
    # Name of the key that signs updates (TSIG).
    acme_dns_key_name: str = ""
    # That key, in base64; none: updates are not signed.
    acme_dns_key: Secret | None = None
    # Its algorithm.
    acme_dns_key_algorithm: str = "hmac-sha256"
    # Program that is run for exec, without a shell, as: PROGRAM present|cleanup NAME VALUE.
    acme_dns_program: Path | None = None
    # Seconds that the server or the program may take.
    acme_dns_seconds: float = 60.0
    # Seconds until resolvers must see a record that was written.
    acme_dns_seen_seconds: float = 120.0
    # Seconds that resolvers may keep a TXT record.
    acme_dns_ttl: int = 60

    # == Payment providers
    # Whether real money moves: keys and addresses for tests are refused then, and live ones otherwise.
    billing_livemode: bool = False
    # Stripe's secret key (`sk_…`, or a restricted one, `rk_…`); without it Stripe is not used.
    stripe_secret_key: Secret | None = None
    # Secret with which Stripe signs what it sends to us (`whsec_…`, taken as it is).
    stripe_webhook_secret: Secret | None = None
    # The one before, while what was signed with it may still come.
    stripe_webhook_secret_old: Secret | None = None
    # Our account at Stripe (`acct_…`).
    stripe_account: str = ""
    # Prices at Stripe: PLAN=price_…, comma separated.
    stripe_prices: tuple[str, ...] = ()
    # Where Stripe's API is.
    stripe_api_url: str = "https://api.stripe.com"
    # Razorpay's key id (`rzp_…`); without it Razorpay is not used.
    razorpay_key_id: str = ""
    # Secret that goes with it.
    razorpay_key_secret: Secret | None = None
    # Secret with which Razorpay signs what it sends to us; another one than the key's.
    razorpay_webhook_secret: Secret | None = None
    # The one before: Razorpay goes on with it for what it sends again.
    razorpay_webhook_secret_old: Secret | None = None
    # Our account at Razorpay (`acc_…`), as its events name it.
    razorpay_account: str = ""
    # Plans at Razorpay: PLAN=plan_…, comma separated.
    razorpay_plans: tuple[str, ...] = ()
    # Periods after which a subscription at Razorpay ends by itself: it has none without end.
    razorpay_periods: int = 120
    # Seconds for which a page to pay at Razorpay is good.
    razorpay_checkout_seconds: int = 86_400
    # Where Razorpay's API is.
    razorpay_api_url: str = "https://api.razorpay.com"
    # PayPal's client id; without it PayPal is not used.
    paypal_client_id: str = ""
    # Secret that goes with it.
    paypal_client_secret: Secret | None = None
    # Id of our webhook at PayPal, which is part of what PayPal signs.
    paypal_webhook_id: str = ""
    # Our account at PayPal (the merchant id).
    paypal_account: str = ""
    # Plans at PayPal: PLAN=P-…, comma separated.
    paypal_plans: tuple[str, ...] = ()
    # Where PayPal's API is; https://api-m.sandbox.paypal.com is the one for tests.
    paypal_api_url: str = "https://api-m.paypal.com"
    # Hosts from which certificates of PayPal's signatures are fetched, and nowhere else.
    paypal_cert_hosts: tuple[str, ...] = ("api.paypal.com", "api.sandbox.paypal.com")
    # Certificate authorities (PEM) that vouch for those certificates; empty: those of the system.
    paypal_cert_ca_file: Path | None = None
    # Certificate authorities (PEM) that vouch for providers' APIs; empty: those of the system.
    billing_ca_file: Path | None = None
    # Seconds for a provider to accept a connection.
    billing_connect_seconds: float = 5.0
    # Seconds for a provider to answer one request.
    billing_timeout_seconds: float = 20.0
    # Seconds for one call, requests that are made again included; below the lease of a job.
    billing_call_seconds: float = 25.0
    # Times that a request is made again which got no answer, or one that says "later"; under the same idempotency key.
    billing_retries: int = 3
    # Seconds below which the pause before the first of them is drawn; the bound doubles with each.
    billing_retry_min_seconds: float = 0.5
    # The greatest such bound in seconds, and the longest Retry-After that is waited for within a call.
    billing_retry_max_seconds: float = 5.0
    # Bytes of an answer of a provider.
    billing_answer_max_bytes: int = 8_388_608
    # Connections to one provider that a process keeps at most.
    billing_connections: int = 16
    # Calls in a row without an answer after which a provider is left alone.
    billing_circuit_failures: int = 5
    # Seconds for which it is, before one call tries again.
    billing_circuit_seconds: float = 30.0
    # Objects of a page of a provider's list.
    billing_list_page: int = 100
    # Pages of one list that are read at most; a longer one is an error, so that nothing is left out in silence.
    billing_list_pages: int = 1000

    # == Subscriptions and dunning
    # What use beyond a plan costs: PLAN:LIMIT=CURRENCY:MINOR:PER, as pro:bytes_per_month=EUR:50:1073741824; comma separated.
    overage_prices: tuple[str, ...] = ()
    # Days after a first failed payment on which a notice is sent: the first one of all, then one with each attempt.
    dunning_notice_days: tuple[float, ...] = (0.0, 1.0, 3.0, 7.0)
    # Days after it from which an organization gets no more tunnels, and a slow pace.
    dunning_restrict_days: float = 10.0
    # That pace, in requests a second of all its tunnels together.
    dunning_requests_per_second: int = 5
    # Days after it from which it is on the default plan.
    dunning_suspend_days: float = 14.0
    # Days after it after which what is owed is written off.
    dunning_write_off_days: float = 30.0
    # Days for which a provider's own attempts are waited for before anything is taken away.
    dunning_patience_days: float = 21.0
    # Days after a payment for which members can have it given back; operators always can.
    refund_days: float = 14.0
    # Seconds before the end of a period at which we end a subscription whose provider cannot end it with the period.
    billing_cancel_lead_seconds: float = 3600.0

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


# --- everything on one machine (`portico up`, `portico demo`) ---------------------------------------------------------


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


# --- migrations (`portico migrate`) -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class MigrateSettings:
    """Bringing the database's schema up to date."""

    # PostgreSQL, as for the API.
    database_url: Secret
    # Lowest level of log records that are written.
    log_level: str = "INFO"


# --- simulated payment providers (`portico up --demo-billing`) --------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class SimulatorSettings:
    """The process of the simulated payment providers; `portico up` starts it."""

    # Lowest level of log records that are written.
    log_level: str = "INFO"
    # Inherited sockets as name=fd,name=fd: stripe, razorpay, paypal; what is missing listens on a free port.
    listen_fds: str = ""
    # Descriptor on which the supervisor waits for READY=1.
    notify_fd: int | None = None


# --- workers (`portico worker`) ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerSettings:
    """One process of background work."""

    # PostgreSQL, as for the API.
    database_url: Secret
    # Lowest level of log records that are written.
    log_level: str = "INFO"
    # Address of the listener for metrics and health; never a public one: they are about all tenants.
    metrics_host: str = "127.0.0.1"
    # TCP port of that listener (`/metrics` for Prometheus, `/healthz`, `/readyz`); none: there is no such listener.
    metrics_port: int | None = None
    # Listening sockets inherited from the parent, as name=fd,…; set by `portico up`.
    listen_fds: str = ""
    # Descriptor on which readiness is reported; set by `portico up`.
    notify_fd: int | None = None
    # Connections that one worker process holds at most, beside the one on which it is told of new jobs.
    database_pool_size: int = 8
    # Seconds for jobs at work to end when the process stops; then they are cancelled and left to another process.
    shutdown_seconds: float = 5.0

    # == Queues
    # Seconds between two looks for jobs of a kind when nobody tells of new ones.
    tick_seconds: float = 1.0
    # Jobs of one kind that one process works on at once.
    queue_concurrency: int = 4
    # Seconds that a job belongs to a process without being renewed: how long the job of a process that died
    # waits. The same in every worker process.
    queue_lease_seconds: float = 30.0
    # Seconds that one attempt at a job may take; then it is cancelled and counts as failed.
    queue_timeout_seconds: float = 300.0
    # Attempts at a job, the first included; after the last that fails it is dead.
    queue_max_attempts: int = 10
    # Seconds below which the pause after a first failure is drawn; the bound doubles with each.
    retry_min_seconds: float = 1.0
    # Longest pause in seconds between two attempts at a job.
    retry_max_seconds: float = 300.0
    # Seconds between two counts of every queue, for the metrics.
    queue_count_seconds: float = 15.0

    # == What it does
    # Folder that mail is written to while there is no smtp_url, for development; none: such mail is dead.
    outbox_dir: Path | None = None
    # Pauses in seconds after the first, the second… failed attempt at a message of the outbox; up to a tenth is added. After one
    # attempt more than there are pauses it is dead. These are those of Standard Webhooks: 75 hours and a half in all.
    delivery_retry_seconds: tuple[float, ...] = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
    # Messages that one process delivers at once, of each way out (mail, webhooks, Slack); at most half are one organization's.
    delivery_concurrency: int = 16
    # Messages that one process delivers to one receiver at once.
    destination_concurrency: int = 4
    # Seconds that a message is remembered that was delivered or is dead, and its idempotency key with it.
    outbox_keep_seconds: float = 2_592_000.0
    # Seconds between two removals of such messages.
    clear_outbox_seconds: float = 3600.0
    # Seconds between two removals of ended sessions, old history and old rows of the edge change table.
    clear_tunnels_seconds: float = 60.0
    # Seconds between two removals of remembered answers of idempotent requests.
    expire_requests_seconds: float = 300.0
    # Seconds between two looks for audit rows that were written without a place in their chain (`agent_session.open`).
    chain_audit_seconds: float = 5.0
    # Seconds between two signed checkpoints of the audit chains that have grown.
    checkpoint_audit_seconds: float = 3600.0
    # Folder that signed checkpoints of the audit chains are written to as well, one file each, never written again: better
    # one where this platform cannot change files (a mount that only takes new ones). Empty: none.
    checkpoint_folder: Path | None = None
    # Seconds between two looks for checkpoints that are not in that folder yet.
    store_checkpoints_seconds: float = 60.0
    # Seconds between two looks for organizations whose days of grace are over.
    delete_organizations_seconds: float = 300.0
    # Seconds between two removals of exports that are over.
    sweep_exports_seconds: float = 3600.0
    # Attempts at making a report.
    report_attempts: int = 5
    # Seconds that one of them may take.
    report_timeout_seconds: float = 900.0
    # Seconds between two looks for schedules of reports whose period has ended.
    report_schedules_seconds: float = 60.0
    # Seconds between two removals of reports that have expired.
    sweep_reports_seconds: float = 300.0
    # Attempts at comparing a settlement receipt.
    settlement_attempts: int = 8
    # Seconds between two looks for events that came late to a settlement.
    watch_settlements_seconds: float = 300.0
    # Keys of the certificate worker (PEM, one Ed25519 and one X25519, mode 0600): by them private keys are sealed for relays, and
    # for nobody else. The same file for every process of this worker; without one certificates of custom domains are not stored.
    certificate_key_file: Path | None = None
    # Ids of the regions' keys (`rk_…`) that it wraps for, whatever else is registered; empty: all that are.
    certificate_region_keys: tuple[str, ...] = ()
    # Where visitors of each region arrive, as REGION=HOST:PORT: what is served there for custom domains is looked at by TLS;
    # empty: nothing is.
    certificate_probe_targets: tuple[str, ...] = ()
    # CA bundle that visitors are taken to trust, for certificates of a private CA; empty means the public ones.
    certificate_probe_ca_file: Path | None = None
    # Seconds between two such looks at everything.
    certificate_probe_seconds: float = 300.0
    # Seconds for one handshake of it.
    certificate_probe_timeout_seconds: float = 10.0
    # Handshakes of it at once.
    certificate_probe_concurrency: int = 16
    # Domains of it whose results are written together.
    certificate_probe_batch: int = 200
    # Seconds after a switch before a domain is looked at.
    certificate_probe_settled_seconds: float = 60.0
    # Seconds between two looks at whether regions have all certificates; relays' acknowledgements are acted on at once.
    settle_certificates_seconds: float = 3.0
    # Seconds between two looks for certificates that are not wrapped for a key of a region yet.
    rewrap_certificates_seconds: float = 15.0
    # Orders of certificates that one process has in hand at once; at most half are one organization's.
    order_concurrency: int = 16
    # Attempts at an order of a certificate.
    order_max_attempts: int = 12
    # Seconds that one of them may take.
    order_timeout_seconds: float = 900.0
    # Seconds below which the pause after a first failed attempt is drawn; the bound doubles with each.
    order_retry_seconds: float = 2.0
    # The greatest such bound in seconds; and the longest that an order waits for a CA in one go.
    order_retry_max_seconds: float = 3600.0
    # Seconds between two looks for domains whose certificate is due.
    sweep_certificates_seconds: float = 10.0
    # Seconds between two rounds of questions when to renew certificates (each is asked about every acme_ari_seconds).
    ask_renewals_seconds: float = 30.0
    # Seconds between two removals of old orders.
    tidy_certificates_seconds: float = 3600.0
    # Seconds between two removals of audit rows past their retention.
    trim_audit_seconds: float = 3600.0
    # Seconds between two looks for deferred revenue of days that are over.
    recognize_revenue_seconds: float = 300.0
    # Schedules of deferred revenue that are read at once.
    recognize_revenue_batch: int = 500
    # Seconds between two sums of revenue by day.
    sum_up_revenue_seconds: float = 300.0
    # Seconds between two looks whether the ledger's last month can be sealed.
    seal_ledger_seconds: float = 3600.0
    # Days after a month's end on which it is sealed; what is heard of it later is booked in the next.
    seal_ledger_after_days: int = 10
    # Seconds between two looks for domains whose DNS is to be looked at; how often each is, docs/how-to/custom-domains.md says.
    check_domains_seconds: float = 5.0
    # Seconds between two removals of domains that were lost long ago.
    purge_domains_seconds: float = 3600.0
    # Events of payment providers that one process applies at once; of one provider half as many.
    billing_webhook_concurrency: int = 8
    # Attempts at such an event, the first included; after the last that fails it is dead, until it is replayed.
    billing_webhook_attempts: int = 8
    # Seconds below which the pause after a first failure is drawn; the bound doubles with each.
    billing_webhook_retry_seconds: float = 5.0
    # The greatest such bound in seconds.
    billing_webhook_retry_max_seconds: float = 900.0
    # Seconds between two looks at how fast and how surely events become effects.
    billing_webhook_watch_seconds: float = 60.0
    # Seconds that such a look goes back.
    billing_webhook_slo_window_seconds: float = 3600.0
    # Failed and dead events of a provider with which its objective is broken.
    billing_webhook_slo_failures: int = 10
    # Seconds after which an event that still waits breaks it.
    billing_webhook_slo_stale_seconds: float = 300.0
    # Seconds from receipt to effect, of 95 in 100 events, above which it is broken.
    billing_webhook_slo_p95_seconds: float = 60.0
    # Events that are replayed by themselves when it is broken; 0: none are.
    billing_webhook_auto_replay_limit: int = 50
    # Seconds between two such replays of one provider's events.
    billing_webhook_auto_replay_cooldown_seconds: float = 300.0
    # Times that one event is replayed by itself.
    billing_webhook_auto_replay_times: int = 3
    # Seconds after which an event is too old for that.
    billing_webhook_auto_replay_age_seconds: float = 604_800.0
    # Seconds between two comparisons with the list of each payment provider.
    billing_reconcile_seconds: float = 900.0
    # Seconds between two removals of providers' events and bodies past their time.
    clear_billing_webhooks_seconds: float = 3600.0
    # Attempts at a certificate event, the first included; after the last that fails it is dead, until it is replayed.
    cert_event_attempts: int = 8
    # Seconds below which the pause after a first failure is drawn; the bound doubles with each.
    cert_event_retry_seconds: float = 5.0
    # The greatest such bound in seconds.
    cert_event_retry_max_seconds: float = 900.0
    # Seconds between two removals of certificate events past their time.
    clear_cert_events_seconds: float = 3600.0
    # Seconds between two looks for dead certificate events that are replayed by themselves.
    cert_auto_replay_seconds: float = 60.0
    # Events that one such look replays at most; 0: none are.
    cert_auto_replay_limit: int = 50
    # Seconds for which an event lies dead before that.
    cert_auto_replay_cooldown_seconds: float = 900.0
    # Times that one event is replayed by itself.
    cert_auto_replay_times: int = 3
    # Seconds after which an event is too old for that.
    cert_auto_replay_age_seconds: float = 604_800.0
    # Seconds between two looks for certificate incidents that only the clock changes.
    cert_watch_seconds: float = 60.0
    # Seconds between two looks for dunning cases whose next day has come.
    dunning_seconds: float = 60.0


# --- where things are -------------------------------------------------------------------------------------------------


def _user_folder(variable: str, default: str, name: str, environ: Mapping[str, str] | None) -> Path:
    environ = os.environ if environ is None else environ
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib") / name
    base = environ.get(variable, "")
    return (Path(base) if base.startswith("/") else Path.home() / default) / name


def default_data_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The data folder of `portico up` when none is named."""
    return _user_folder("XDG_DATA_HOME", ".local/share", "portico", environ)


def default_demo_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The data folder of `portico demo` when none is named."""
    return _user_folder("XDG_STATE_HOME", ".local/state", "portico-demo", environ)


def default_state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Where the command line keeps what it writes about its own faults."""
    base = (os.environ if environ is None else environ).get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "portico"


def color_wanted(stream: typing.IO[str], environ: Mapping[str, str] | None = None) -> bool:
    """Colours only on a terminal that can, for people who have not said no (https://no-color.org).

    FORCE_COLOR and CLICOLOR_FORCE ask for them elsewhere too, in a CI log for instance; NO_COLOR is stronger than both.
    """
    environ = os.environ if environ is None else environ
    if environ.get("NO_COLOR"):
        return False
    if any(environ.get(name, "0") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return stream.isatty() and environ.get("TERM") != "dumb" and environ.get("CLICOLOR") != "0"


def screen_wanted(*streams: typing.IO[str], environ: Mapping[str, str] | None = None) -> bool:
    """A screen that redraws itself: only where all streams are a terminal that can move its cursor."""
    environ = os.environ if environ is None else environ
    return all(stream.isatty() for stream in streams) and environ.get("TERM", "dumb") != "dumb"


def proxy_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that programs share about proxies, by lower-case name; the lower-case spelling wins, as in curl.

    HTTP_PROXY in capitals is left out where a web server could have set it from a visitor's header (CGI).
    """
    environ = os.environ if environ is None else environ
    found: dict[str, str] = {}
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        value = environ.get(name) or environ.get(name.upper(), "")
        if name == "http_proxy" and "REQUEST_METHOD" in environ:
            value = environ.get(name, "")
        if value:
            found[name] = value
    return found


def activated_sockets(environ: Mapping[str, str] | None = None, pid: int | None = None) -> str:
    """The sockets that systemd holds for this process (sd_listen_fds(3)), as ``listen_fds`` names them; empty without any.

    Raises ``config.invalid`` when they have no names (``FileDescriptorName=`` in the socket unit).
    """
    environ = os.environ if environ is None else environ
    if environ.get("LISTEN_PID") != str(os.getpid() if pid is None else pid):
        return ""  # they were for a parent of ours
    count = int(environ.get("LISTEN_FDS", "0"))
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    if len(names) != count or not all(names) or "unknown" in names:
        detail = "the sockets of systemd have no names: FileDescriptorName= is public, https, control or api"
        raise Problem("config.invalid", detail)
    return ",".join(f"{name}={number}" for number, name in enumerate(names, 3))


def debug_enabled(environ: Mapping[str, str] | None = None) -> bool:
    """PORTICO_DEBUG=1: an unexpected error shows its traceback."""
    return (os.environ if environ is None else environ).get("PORTICO_DEBUG", "") not in ("", "0")


# --- agent (`portico http` and the other developer commands) ----------------------------------------------------------


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
        elif key in secret and _environment_secret(key, environ) is not None:
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


def secret_from_environment(name: str) -> Secret:
    """The secret in a variable that a person named; raises ``config.invalid`` when it is not set."""
    if value := os.environ.get(name, "").strip():
        return Secret(value)
    raise Problem("config.invalid", f"the environment variable {name} is not set")
