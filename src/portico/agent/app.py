"""One run of the agent: forwarders, session and screen wired together, until a signal or the platform ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from portico.agent.api import Api
from portico.agent.client import Agent
from portico.agent.credentials import Credentials
from portico.agent.files import FileServer
from portico.agent.fleet import Fleet, Served
from portico.agent.forward import Forwarder
from portico.agent.inspector import Inspector, listening_address
from portico.agent.stats import CONNECTION, TLS_CONNECTION, Stats
from portico.agent.status import make_display
from portico.agent.target import Target
from portico.agent.tcp import TcpForwarder
from portico.agent.tls_files import TlsFiles, TlsIdentity
from portico.kit import telemetry
from portico.settings import AgentSettings

if TYPE_CHECKING:
    from portico.agent.follow import FileSource, Follower
    from portico.agent.tunnel_file import Config

log = logging.getLogger("portico.agent")

#: Exit code after Ctrl-C, as shells have it.
INTERRUPTED = 130
#: SIGHUP; 0 where the system has none.
HANG_UP = int(getattr(signal, "SIGHUP", 0))


@dataclass(frozen=True, slots=True)
class TunnelOptions:
    """One tunnel as asked for on the command line. ``spec`` goes to the API."""

    target: Target
    spec: dict[str, Any]
    tls_verify: bool | None = None
    #: Seconds after which the tunnel ends itself.
    ttl: float | None = None
    #: Version of the PROXY protocol header that the target of a TCP or TLS tunnel gets; 0: none.
    proxy_protocol: int = 0
    #: With which the agent ends the TLS of a TLS tunnel's visitors; ``None``: it passes through.
    tls: TlsFiles | None = None
    #: Whether its requests are kept for the local page.
    inspect: bool = True


async def serve(
    settings: AgentSettings,
    credentials: Credentials,
    tunnels: Sequence[TunnelOptions],
    mode: str,
    *,
    color: bool = False,
    qr: bool = False,
    source: tuple[FileSource, Config] | None = None,
) -> int:
    """Serve ``tunnels``; ``mode`` is ``screen``, ``lines`` or ``json``. Returns the exit code; raises what ended it.

    With a ``source`` (and what was read of it) they are its tunnels, and follow it while it changes.
    """
    telemetry.configure("agent", settings.log_level if mode != "screen" else "WARNING")
    _raise_open_files()
    stats = Stats()
    inspector = await _inspector(settings, stats, tunnels, following=source is not None)
    display = make_display(mode, settings, stats, color=color)
    display.qr = qr
    api = Api(credentials.server, credentials.agent_key, settings)
    if api.proxy is not None:
        log.info("the platform is reached through %s", api.proxy)
    fleet = Fleet(lambda options: _forwarder(options, settings, stats, inspector), display)
    agent = Agent(settings, api, fleet.begin(tunnels), display)
    fleet.agent = display.agent = agent
    follower = _follower(source, fleet, settings) if source is not None else None
    if inspector is not None:
        inspector.agent = agent
        display.inspector = inspector.url
    stopped_by: list[int] = []
    with _signals(agent, stopped_by, follower.hang_up if follower is not None else None):
        beside = [asyncio.create_task(work) for work in (fleet.run(), display.run())]
        if follower is not None:
            beside.append(asyncio.create_task(follower.run()))
        for task in beside:
            task.add_done_callback(_say_fault)
        try:
            await agent.run()
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            display.close()
            await fleet.abort()
            await api.aclose()
            if inspector is not None:
                await inspector.close()
    return INTERRUPTED if stopped_by[:1] == [signal.SIGINT] else 0


def _say_fault(task: asyncio.Task[None]) -> None:
    """What runs beside the tunnels ends with them; a fault in it ends nothing, and is not kept quiet."""
    if not task.cancelled() and (fault := task.exception()) is not None:
        log.error("a part of the agent ended by a fault; the tunnels go on", exc_info=fault)


def _follower(source: tuple[FileSource, Config], fleet: Fleet, settings: AgentSettings) -> Follower:
    from portico.agent.follow import Follower  # and with it the YAML parser, which `portico http` does without

    return Follower(*source, fleet, settings)


async def _inspector(
    settings: AgentSettings, stats: Stats, tunnels: Sequence[TunnelOptions], following: bool
) -> Inspector | None:
    """The local page, listening; ``None`` when it is not wanted or finds no port: tunnels work without it."""
    if not (settings.inspect and (following or any(options.inspect for options in tunnels))):
        return None
    inspector = Inspector(settings, stats)
    if await inspector.start():
        return inspector
    if listening_address(settings) is not None:
        log.warning("no free port for the local page (web_addr %s and the ports above it)", settings.web_addr)
    return None


def _forwarder(options: TunnelOptions, settings: AgentSettings, stats: Stats, inspector: Inspector | None) -> Served:
    if options.spec.get("protocol") in ("tcp", "tls"):
        identity = TlsIdentity(options.tls) if options.tls is not None else None
        kind = CONNECTION if options.spec["protocol"] == "tcp" else TLS_CONNECTION
        version = options.proxy_protocol
        return TcpForwarder(options.target, settings, stats, proxy_protocol=version, identity=identity, kind=kind)
    made: Forwarder | FileServer
    if options.target.kind == "file":
        made = FileServer(options.target, settings, stats)
    else:
        verify = options.tls_verify
        made = Forwarder(options.target, settings, stats, tls_verify=verify)
    if inspector is not None and options.inspect:
        made.tap = inspector.recorder.tap(made, options.target.url, str(options.spec.get("name") or ""))
    return made


@contextlib.contextmanager
def _signals(agent: Agent, got: list[int], hang_up: Callable[[], bool] | None) -> Any:
    """SIGINT and SIGTERM end the agent cleanly; a second one at once. Where loops have no signals, Ctrl-C raises.

    SIGHUP goes to ``hang_up``, where there is one; what it does not take ends the agent like the others.
    """
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        if number == HANG_UP and hang_up is not None and hang_up():
            return
        got.append(number)
        if len(got) > 1:
            raise KeyboardInterrupt
        agent.stop()

    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM) + ((HANG_UP,) if hang_up is not None and HANG_UP else ())
    try:
        for number in numbers:
            loop.add_signal_handler(number, stop, number)
    except (NotImplementedError, RuntimeError):
        numbers = ()
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _raise_open_files() -> None:
    """Every stream may need a descriptor; the usual soft limit of 1,024 is below the stream limit."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 16_384 if hard == resource.RLIM_INFINITY else min(16_384, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
