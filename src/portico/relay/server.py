"""One relay process: wires the parts, serves, and leaves in order.

    control plane ──edge stream──► ControlLink ─► Snapshot ─► Agents ◄── agents (control port)
                  ◄──usage──────── Meter ◄─ counters ─┘  ├─► PublicServer ◄── visitors (public ports)
                                                         └─► TcpPorts ◄────── visitors (a port per TCP tunnel)

Start order: the kept edge state first (a relay may start while the control plane is away), then the agents' port, then the
public ports; ready when all accept. Stop order: nothing new is accepted (a supervisor starts the successor on the same sockets),
agents and peers are asked to go elsewhere and are served until they have, public requests in flight finish, usage is sent.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from portico.kit import metrics, notify, sockets
from portico.relay import control_link, listeners
from portico.relay import metrics as figures
from portico.relay.access_log import OFF, AccessLog
from portico.relay.certificate_sources import Certificates
from portico.relay.control_link import ControlLink
from portico.relay.door import Door
from portico.relay.listeners import PublicServer
from portico.relay.meter import Meter
from portico.relay.passthrough import Passthrough
from portico.relay.peers import Peers
from portico.relay.rates import Rates
from portico.relay.raw import RawServer
from portico.relay.sessions import Agents
from portico.relay.shared_rates import SharedRates
from portico.relay.snapshot import Snapshot
from portico.relay.snapshot_store import SnapshotStore
from portico.relay.tcp import TcpPorts
from portico.relay.telling import Teller
from portico.relay.tls_port import TlsPort
from portico.relay.vault import Vault
from portico.settings import RelaySettings

log = logging.getLogger("portico.relay")

SWEEP_SECONDS = 1.0
PRUNE_SECONDS = 60.0
#: Seconds between two looks at whether a drain is over.
DRAIN_POLL_SECONDS = 0.02
#: Seconds that a start waits for links of its peers.
PEERS_SECONDS = 1.0
#: Seconds for the last bytes and closes to leave.
PARTING_SECONDS = 0.1


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
        clock = asyncio.get_running_loop().time
        self.shared_rates = SharedRates.connect(settings, clock)
        self.rates = Rates(settings, clock, self.shared_rates)
        self.agents.rates_of = self.peers.rates_of = self.rates.of
        self.public = PublicServer(settings, self.snapshot, self.agents, self.peers)
        self.raw = RawServer(self.public, self.agents)
        self.ports = TcpPorts(self.raw, self.agents)
        self.teller = Teller(self.agents, self.peers)
        self.control = listeners.ControlListener(self.agents, self.peers)
        self.metrics: metrics.Listener | None = None
        self.certificates = Certificates(settings, self.public.knows)
        self.vault = Vault(settings, self.snapshot, self.certificates.store, http=self.http)
        self.link.on_connected.append(self.vault.tell_again)
        self.control.caught_up = self.vault.ready
        self.servers: list[asyncio.Server | TlsPort] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = self._cut = False
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
        self.certificates.fill()
        self.store.load()
        await self.vault.load()
        control = self._listen("control", limits.control_host, limits.control_port)
        public = self._listen("public", limits.public_host, limits.public_port)
        https = self._listen("https", limits.https_host, limits.https_port)
        self.servers.append(
            await listeners.serve_control(self.control, control, self.certificates.control_context, backlog)
        )
        self._spawn(self.peers.run())
        if limits.peers and limits.peer_key is not None:
            # Visitors wait in the listening queue meanwhile: what the others hold is better known before the first of them.
            await self._until(lambda: len(self.peers.inbound) >= len(limits.peers), PEERS_SECONDS)
        self.servers.append(await listeners.serve_public(self.public, public, backlog))
        if limits.access_log != OFF:
            self.public.access = AccessLog(limits)
        await self._start_metrics()
        for work in (
            self.link.run(),
            self.vault.run(),
            self.meter.run(),
            self.store.run(),
            self.teller.run(),
            self._sweep(),
        ):
            self._spawn(work)
        # Who connects meanwhile waits in the listening queue, or is another relay's: a certificate that was switched to while
        # this one was away is here before the first of them.
        await self.vault.caught_up(lambda: self.link.connected, lambda: self.link.failed)
        self.servers.append(
            TlsPort(
                self.public,
                https,
                self.certificates.store,
                self._terminated,
                client_ca=self.public.client_ca,
                passthrough=Passthrough(self.raw, https.getsockname()[1]),
            )
        )
        self._spawn(self.certificates.run())
        if self.shared_rates is not None:
            self._spawn(self.shared_rates.run())

    async def _start_metrics(self) -> None:
        """The figures on a listener of their own, when one was given or its port is set."""
        self.metrics = await metrics.serve(
            figures.DECLARED,
            lambda: figures.read(self),
            self.control.ready,
            self.settings,
            self._given.pop("metrics", None),
        )

    async def _stop_metrics(self) -> None:
        if self.metrics is not None:
            await self.metrics.close()

    def _terminated(self, door: Door) -> asyncio.BaseProtocol:
        """Who serves a connection whose TLS ends here."""
        return self.public.visitor(door)

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
                self.rates.prune()

    async def stop(self, *, moving: bool = False) -> None:
        """Drain: no new connections, requests in flight finish up to ``drain_seconds``, usage is kept.

        ``moving``: agents find another relay, or this one's successor; they too have until then to do so. A call to
        :meth:`cut` ends the patience.
        """
        if self._stopped:
            return
        self._stopped = True
        for server in self.servers:
            server.close()
        if self.settings.notify_fd is not None:  # else the drain is watched to its end
            await self._stop_metrics()
        self.ports.draining = True
        self.agents.go_away()
        self.peers.go_away()
        self.link.leave(successor=moving and self.settings.notify_fd is not None)
        notify.stopping(self.settings.notify_fd)
        await self._drain(moving)
        self.ports.close()
        self.peers.withdraw_all()
        await self._until(lambda: not self.peers.hops(), PARTING_SECONDS)
        if cut := self.public.close():
            log.warning("connections cut at the drain limit", extra={"f": {"connections": cut}})
        await self._until(lambda: not self.public.connections, PARTING_SECONDS)
        await self.agents.close()
        self.peers.close()
        await self.meter.close()
        if self.public.access is not None:
            self.public.access.close()
        await self._stop_metrics()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.shared_rates is not None:
            await self.shared_rates.close()
        await self.store.close()
        await self.http.aclose()

    def reload(self) -> None:
        """Look for files that were replaced: certificates, and the access log."""
        self.certificates.reload()
        if self.public.access is not None:
            self.public.access.reopen()

    def cut(self) -> None:
        """Wait for nothing more in :meth:`stop`."""
        self._cut = True

    async def _drain(self, moving: bool) -> None:
        """Until visitors and peers have their answers and agents are elsewhere, or the time is up."""
        began = time.monotonic()
        self.public.drain()
        await self._until(self._visitors_gone, self.settings.drain_idle_seconds)
        self.public.close_idle()

        def over() -> bool:
            return self._visitors_gone() and not self.peers.hops() and not (moving and self.agents.staying())

        await self._until(over, began + self.settings.drain_seconds - time.monotonic())

    def _visitors_gone(self) -> bool:
        return not self.public.connections

    async def _until(self, over: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not (self._cut or over()) and time.monotonic() < deadline:  # noqa: ASYNC110 - the hot path sets no event
            await asyncio.sleep(DRAIN_POLL_SECONDS)


async def serve(settings: RelaySettings, given: Mapping[str, socket.socket] | None = None) -> None:
    """Run a relay until a signal, then drain; a second signal cuts what is left.

    SIGTERM also waits until the agents are elsewhere (another relay, or the one that follows on the same sockets); SIGINT is
    the end of everything, where there is no elsewhere. SIGHUP: certificate files are read again.
    """
    _raise_file_limit()
    relay = Relay(settings, given)
    stopping: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_signal(number: int) -> None:
        if stopping.done():
            relay.cut()
        else:
            stopping.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, relay.reload)
    await relay.start()
    log.info("relay ready", extra={"f": {"public": settings.public_url, "connect": settings.connect_url}})
    notify.ready(settings.notify_fd)
    moving = await stopping == signal.SIGTERM
    began = time.monotonic()
    log.info("relay stopping", extra={"f": {"sessions": len(relay.agents.connections), "moving": moving}})
    await relay.stop(moving=moving)
    log.info("relay stopped", extra={"f": {"after_seconds": round(time.monotonic() - began, 1)}})


def _raise_file_limit() -> None:
    """Each connection is a descriptor: take all that the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
