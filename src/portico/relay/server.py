"""One relay process: wires the parts, serves, and leaves in order.

    control plane ──edge stream──► ControlLink ─► Snapshot ─► Agents ◄── agents (control port)
                  ◄──usage──────── Meter ◄─ counters ─┘  ├─► PublicServer ◄── visitors (public ports)
                                                         └─► TcpPorts ◄────── visitors (a port per TCP tunnel)

Start order: the kept edge state first (a relay may start while the control plane is away), then the agents' port, then the
public ports; ready when all accept. Stop order: agents are asked to leave, public requests in flight finish, usage is sent.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import time
from collections.abc import Coroutine, Mapping
from typing import Any

from portico.kit import notify, sockets
from portico.relay import control_link, listeners, tls
from portico.relay.control_link import ControlLink
from portico.relay.listeners import PublicServer
from portico.relay.meter import Meter
from portico.relay.peers import Peers
from portico.relay.sessions import Agents
from portico.relay.snapshot import Snapshot, SnapshotStore
from portico.relay.tcp import TcpPorts
from portico.settings import RelaySettings

log = logging.getLogger("portico.relay")

SWEEP_SECONDS = 1.0
PRUNE_SECONDS = 60.0


class Relay:
    """A running relay; :meth:`start` and :meth:`stop` are what tests and :func:`serve` use."""

    def __init__(self, settings: RelaySettings, given: Mapping[str, socket.socket] | None = None) -> None:
        self.settings = settings
        self._given = dict(given or {})
        self.snapshot = Snapshot()
        self.http = control_link.client(settings)
        self.meter = Meter(settings, http=self.http)
        self.agents = Agents(settings, self.snapshot, self.meter)
        self.link = ControlLink(
            settings, self.snapshot, load=self.load, bound=self.agents.bound, http=self.http, left=self.agents.left
        )
        self.agents.link = self.link
        self.link.on_connected.append(self.agents.stream_connected)
        self.store = SnapshotStore(
            self.snapshot, settings.state_dir, source=settings.api_url, delay=settings.snapshot_save_delay_seconds
        )
        self.peers = Peers(settings, self.agents)
        self.public = PublicServer(settings, self.snapshot, self.agents, self.peers)
        self.ports = TcpPorts(self.public, self.agents)
        self.servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False
        self._cpu = (time.process_time(), time.monotonic())

    def load(self) -> dict[str, float]:
        """For heartbeats: what this process carries, and the share of a core it used since the last call."""
        spent, at = time.process_time(), time.monotonic()
        cpu = (spent - self._cpu[0]) / max(at - self._cpu[1], 0.001)
        self._cpu = (spent, at)
        agents = self.agents
        return {
            "sessions": len(agents.connections),
            "tunnels": len(agents.by_tunnel),
            "streams": agents.streams(),
            "cpu": round(cpu, 3),
        }

    def _listen(self, name: str, host: str, port: int) -> socket.socket:
        given = self._given.pop(name, None)
        return (
            given
            if given is not None
            else sockets.bind_tcp(host, port, what=name, backlog=self.settings.listen_backlog)
        )

    async def start(self) -> None:
        """Raises ``Problem`` (a port is taken) or ``OSError`` (the state folder cannot be written)."""
        limits, backlog = self.settings, self.settings.listen_backlog
        limits.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        certificate = tls.development_certificate(limits.state_dir, limits.base_domain)
        self.store.load()
        control = self._listen("control", limits.control_host, limits.control_port)
        public = self._listen("public", limits.public_host, limits.public_port)
        https = self._listen("https", limits.https_host, limits.https_port)
        self.servers.append(await listeners.serve_control(self.agents, self.peers, control, None, backlog))
        self.servers.append(await listeners.serve_public(self.public, public, None, backlog))
        self.servers.append(await listeners.serve_public(self.public, https, tls.server_context(certificate), backlog))
        for work in (self.link.run(), self.meter.run(), self.store.run(), self.peers.run(), self._sweep()):
            self._spawn(work)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a part of the relay ended", exc_info=error)

    async def _sweep(self) -> None:
        pruned = time.monotonic()
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.agents.sweep()
            if time.monotonic() - pruned > PRUNE_SECONDS:
                pruned = time.monotonic()
                self.snapshot.prune()

    async def stop(self) -> None:
        """Drain: no new connections, agents leave, requests in flight finish up to ``drain_seconds``, usage is kept."""
        if self._stopped:
            return
        self._stopped = True
        for server in self.servers:
            server.close()
        self.ports.close()
        self.link.draining = True
        self.agents.go_away()
        self.link.poke()
        cut = await self.public.drain(self.settings.drain_seconds)
        if cut:
            log.warning("connections cut at the drain limit", extra={"f": {"connections": cut}})
        await self.agents.close()
        self.peers.close()
        await self.meter.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.store.close()
        await self.http.aclose()


async def serve(settings: RelaySettings, given: Mapping[str, socket.socket] | None = None) -> None:
    """Run a relay until SIGTERM or SIGINT, then drain."""
    _raise_file_limit()
    relay = Relay(settings, given)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await relay.start()
    log.info("relay ready", extra={"f": {"public": settings.public_url, "connect": settings.connect_url}})
    notify.ready(settings.notify_fd)
    await stopping.wait()
    log.info("relay stopping")
    await relay.stop()


def _raise_file_limit() -> None:
    """Each connection is a descriptor: take all that the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
