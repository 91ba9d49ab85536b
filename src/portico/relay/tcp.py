"""TCP tunnels: a public port for each one that is live here, and the connections of its visitors.

    visitor ─► port ─► TcpPorts ─► TcpVisitor ──OPEN──► wire.Stream ─► agent ─► target
                                       ◄── bytes, END, RESET ──

A port is open exactly while its tunnel is live on this relay, and this relay alone has it (no SO_REUSEPORT): a port that
two processes held could take visitors to two tunnels. Both ends' half-close and reset are kept. A refused connection is
closed without a byte, with its reason in the log (``raw.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from portico.errors import Problem
from portico.kit.sockets import bind_tcp
from portico.relay.door import Door
from portico.relay.raw import RawServer, RawVisitor

if TYPE_CHECKING:
    from portico.relay.agent_connection import LiveTunnel
    from portico.relay.sessions import Agents

log = logging.getLogger("portico.relay.tcp")

#: Seconds between two tries to open a port that somebody still has.
RETRY_SECONDS: Final = 0.01


class Port:
    """One open port and the tunnel behind it; ``live`` is ``None`` for the moment in which a connection of its agent takes
    over from another, and once the port is closed. ``last`` then serves who came before that, if its agent gave it back."""

    __slots__ = ("last", "live", "number", "server", "sock", "tunnel")

    def __init__(self, number: int, live: LiveTunnel, sock: socket.socket) -> None:
        self.number = number
        self.tunnel = live.grant.tun
        self.live: LiveTunnel | None = live
        self.last: LiveTunnel | None = None
        self.sock = sock
        self.server: asyncio.Server | None = None


class TcpPorts:
    """The open ports of this relay. All methods run on the loop.

    While the relay drains (``draining``) a port stays open until its agent gives it back, which it does when it has another
    connection, or until :meth:`close`; none is opened any more.
    """

    def __init__(self, raw: RawServer, agents: Agents) -> None:
        self.raw = raw
        self.agents = agents
        self.settings = agents.settings
        self.loop = raw.loop
        self.open: dict[int, Port] = {}
        self._starting: set[asyncio.Task[None]] = set()
        self._adopting: set[asyncio.Task[None]] = set()
        self.draining = False
        agents.listen = self.listen
        agents.on_dropped.append(self._dropped)

    # ── ports ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def listen(self, live: LiveTunnel) -> bool:
        """Open the port of a tunnel that was just bound. ``False``: not yet; ``Agents`` hears once it is open, or will not
        be."""
        number = live.grant.port
        if (
            number is None or self.draining
        ):  # a grant that is renewed now: an open port stays, a closed one is another's
            return True
        for port in [p for p in self.open.values() if p.tunnel == live.grant.tun and p.number != number]:
            self._close(port)
        refusal = self._open(number, live)
        if refusal is not None:
            self._retry(number, live, self.loop.time() + self.settings.tcp_bind_seconds, refusal)
        return refusal is None

    def _retry(self, number: int, live: LiveTunnel, deadline: float, refusal: Problem) -> None:
        """Whoever has the port (a relay that just died or drains) may be letting it go: try until ``deadline``."""
        passing = refusal.code == "up.port_taken" and self.loop.time() < deadline and not self.draining
        self.loop.call_later(RETRY_SECONDS if passing else 0, self._again, number, live, deadline, passing, refusal)

    def _again(self, number: int, live: LiveTunnel, deadline: float, passing: bool, refusal: Problem) -> None:
        if self.agents.by_tunnel.get(live.grant.tun) is not live or live.grant.port != number:
            return
        found = self._open(number, live) if passing else refusal
        if found is None:
            self.agents.announce(live)
        elif passing:
            self._retry(number, live, deadline, found)
        else:
            detail = f"the relay cannot open the tunnel's port: {found.detail}"
            self.agents.refuse(live, Problem("tunnel.port_unavailable", detail))

    def _open(self, number: int, live: LiveTunnel) -> Problem | None:
        """Listen: from now on visitors queue, and are taken in when the loop gets to it. The reason if that is not possible."""
        port = self.open.get(number)
        if port is not None and port.tunnel == live.grant.tun:
            port.live, port.last = live, None
            return None
        if port is not None:
            return Problem("up.port_taken", f"port {number} is still open for another tunnel")
        limits = self.settings
        try:
            sock = bind_tcp(limits.tcp_host, number, what="TCP tunnel", backlog=limits.listen_backlog)
        except Problem as problem:
            return problem
        port = self.open[number] = Port(number, live, sock)
        task = self.loop.create_task(self._serve(port))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)
        return None

    async def _serve(self, port: Port) -> None:
        server = await self.loop.create_server(
            self._factory(port), sock=port.sock, backlog=self.settings.listen_backlog
        )
        if self.open.get(port.number) is port:
            port.server = server
        else:  # closed meanwhile
            server.close()

    def _dropped(self, live: LiveTunnel) -> None:
        """The tunnel is not live here any more. The port closes at the end of this tick, unless the same tunnel was bound
        again meanwhile: a newer connection of its agent takes the port over with what waits in its queue."""
        port = self.open.get(live.grant.port or 0)
        if port is not None and port.live is live:
            port.live, port.last = None, live if live.given_back else None
            self.loop.call_soon(self._reap, port)

    def _reap(self, port: Port) -> None:
        if port.live is None and self.open.get(port.number) is port:
            self._take_in(port)
            self._close(port)

    def _take_in(self, port: Port) -> None:
        """Who waits in the queue of a port that its agent gave back came in time: its agent answers what crosses that."""
        live = port.last
        if live is None or live.session.closed:
            return
        factory = self._factory(port)
        with contextlib.suppress(OSError):  # BlockingIOError: nobody else waits
            for _ in range(self.settings.listen_backlog):
                sock, _ = port.sock.accept()
                sock.setblocking(False)
                task = self.loop.create_task(self._adopt(factory(), sock))
                self._adopting.add(task)
                task.add_done_callback(self._adopting.discard)

    async def _adopt(self, visitor: asyncio.BufferedProtocol, sock: socket.socket) -> None:
        try:
            await self.loop.connect_accepted_socket(lambda: visitor, sock)
        except OSError as err:  # it is gone already
            log.debug("a connection ended before it was taken in: %s", err)
            sock.close()

    def _factory(self, port: Port) -> Callable[[], asyncio.BufferedProtocol]:
        """What serves the port's connections."""
        return self.raw.public.protocol(Door(b"tcp", port.number), lambda door: TcpVisitor(self, port, door))

    def _close(self, port: Port) -> None:
        """Close the port. What waits in its queue is reset; connections that were taken in go on."""
        if self.open.get(port.number) is port:
            del self.open[port.number]
            port.live = None
            if port.server is not None:
                port.server.close()

    def close(self) -> None:
        """The relay stops: no port is open any more."""
        for port in list(self.open.values()):
            self._close(port)


class TcpVisitor(RawVisitor):
    """A connection to a tunnel's port. Refused, it is closed without a byte."""

    __slots__ = ("port",)

    def __init__(self, ports: TcpPorts, port: Port, door: Door) -> None:
        super().__init__(ports.raw, door, port.live or port.last)
        self.port = port

    def place(self) -> dict[str, Any]:
        return {"tunnel": self.port.tunnel, "port": self.port.number}
