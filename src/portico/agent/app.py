"""One run of the agent: forwarders, session and screen wired together, until a signal or the platform ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from portico.agent.api import Api
from portico.agent.client import Agent
from portico.agent.credentials import Credentials
from portico.agent.files import FileServer
from portico.agent.forward import Forwarder
from portico.agent.stats import Stats
from portico.agent.status import Display, make_display
from portico.agent.target import Target
from portico.kit import telemetry
from portico.settings import AgentSettings

log = logging.getLogger("portico.agent")

#: Exit code after Ctrl-C, as shells have it.
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class TunnelOptions:
    """One tunnel as asked for on the command line. ``spec`` goes to the API."""

    target: Target
    spec: dict[str, Any]
    host_header: str = "preserve"
    tls_verify: bool | None = None


async def serve(
    settings: AgentSettings,
    credentials: Credentials,
    tunnels: Sequence[TunnelOptions],
    mode: str,
    *,
    color: bool = False,
) -> int:
    """Serve ``tunnels``; ``mode`` is ``screen``, ``lines`` or ``json``. Returns the exit code; raises what ended it."""
    telemetry.configure("agent", settings.log_level if mode != "screen" else "WARNING")
    _raise_open_files()
    stats = Stats()
    forwarders = [_forwarder(options, settings, stats) for options in tunnels]
    display = make_display(mode, settings, stats, color=color)
    api = Api(credentials.server, credentials.agent_key, settings)
    pairs = [(o.spec, f, o.target.url) for o, f in zip(tunnels, forwarders, strict=True)]
    agent = Agent(settings, api, pairs, display)
    display.agent = agent
    stopped_by: list[int] = []
    with _signals(agent, stopped_by):
        watching = asyncio.create_task(_warn_of_dead_targets(agent, forwarders, display))
        drawing = asyncio.create_task(display.run())
        try:
            await agent.run()
        finally:
            watching.cancel()
            drawing.cancel()
            await asyncio.gather(watching, drawing, return_exceptions=True)
            display.close()
            for forwarder in forwarders:
                await forwarder.abort()
            await api.aclose()
    return INTERRUPTED if stopped_by[:1] == [signal.SIGINT] else 0


def _forwarder(options: TunnelOptions, settings: AgentSettings, stats: Stats) -> Forwarder | FileServer:
    if options.target.kind == "file":
        return FileServer(options.target, settings, stats)
    return Forwarder(options.target, settings, stats, host_header=options.host_header, tls_verify=options.tls_verify)


async def _warn_of_dead_targets(agent: Agent, forwarders: Sequence[Forwarder | FileServer], display: Display) -> None:
    """Say at the start that a target is not there: the tunnel is online all the same."""
    await agent.started.wait()
    for forwarder in forwarders:
        why = await forwarder.probe()
        if why is not None:
            display.warning(f"{why} yet; visitors get 502 until the app answers there")


@contextlib.contextmanager
def _signals(agent: Agent, got: list[int]) -> Any:
    """SIGINT and SIGTERM end the agent cleanly; a second one at once. Where loops have no signals, Ctrl-C raises."""
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        got.append(number)
        if len(got) > 1:
            raise KeyboardInterrupt
        agent.stop()

    numbers: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
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
