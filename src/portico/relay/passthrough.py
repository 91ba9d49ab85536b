"""TLS that is passed through: the name in the ClientHello says whose it is, and nothing of it is read beyond that.

    TlsPort ─(socket, hello unread)─► Passthrough ─► PassVisitor ──OPEN──► wire.Stream ─► agent ─► the target's own TLS

Each connection goes through the decision's steps, without credentials. A refused one hears a TLS alert, as long as the
target has not spoken (RFC 8446, 6.2): a browser then says more than that the connection was closed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Any, Final

from portico.kit.sockets import end_output
from portico.relay.door import Door
from portico.relay.exchange import MAY_WAIT
from portico.relay.hello import INTERNAL_ERROR, UNRECOGNIZED_NAME, Hello, alert
from portico.relay.http1 import LINGER_SECONDS
from portico.relay.raw import RawServer, RawVisitor

if TYPE_CHECKING:
    from portico.relay.agent_connection import LiveTunnel
    from portico.relay.peers import RemoteTunnel

log = logging.getLogger("portico.relay.passthrough")

#: RFC 8446, 6.2.
ACCESS_DENIED: Final = 49
#: What a refusal says to the visitor's TLS; any other is an internal error.
ALERTS: Final = {
    "edge.host_unassigned": UNRECOGNIZED_NAME,
    "edge.tunnel_offline": UNRECOGNIZED_NAME,
    "edge.ip_denied": ACCESS_DENIED,
    "edge.account_suspended": ACCESS_DENIED,
}


class Passthrough:
    """Takes connections over from the TLS port whose name is that of a TLS tunnel, live or not."""

    def __init__(self, raw: RawServer, port: int) -> None:
        self.raw = raw
        self.port = port
        self._adopting: set[asyncio.Task[None]] = set()

    def __call__(self, sock: socket.socket, hello: Hello, peer: Any, local: tuple[str, int] | None = None) -> bool:
        """Whether the connection is passed through; ``peer`` is the visitor's address, ``local`` where it connected to if that
        is not the socket's own. From ``True`` on the socket is ours."""
        host = hello.sni
        if host is None:
            return False
        public = self.raw.public
        tunnel = public.find(host)
        if tunnel is None:
            row = public.snapshot.tunnel_for_host(host.decode())
            if row is None or row.protocol != "tls":
                return False
        elif not tunnel.passthrough:
            return False
        visitor = PassVisitor(self.raw, Door(b"tls", self.port, host, local=local), host, tunnel, peer)
        task = self.raw.loop.create_task(self._adopt(visitor, sock))
        self._adopting.add(task)
        task.add_done_callback(self._adopting.discard)
        return True

    async def _adopt(self, visitor: PassVisitor, sock: socket.socket) -> None:
        try:
            await self.raw.loop.connect_accepted_socket(lambda: visitor, sock)
        except OSError as err:  # it is gone already
            log.debug("a connection ended before it was passed through: %s", err)
            sock.close()


class PassVisitor(RawVisitor):
    """One connection that is passed through by ``host``. The hello is the first that is read of it."""

    __slots__ = ("held", "host", "visitor")

    def __init__(
        self, raw: RawServer, door: Door, host: bytes, tunnel: LiveTunnel | RemoteTunnel | None, peer: Any
    ) -> None:
        super().__init__(raw, door, tunnel)
        self.host = host
        self.visitor = peer
        self.held = False

    def peer(self) -> Any:
        return self.visitor

    def place(self) -> dict[str, Any]:
        host = self.host.decode()
        tunnel = self.tunnel.tunnel if self.tunnel is not None else ""
        if not tunnel and (row := self.server.snapshot.tunnel_for_host(host)) is not None:
            tunnel = row.id
        return {"tunnel": tunnel, "host": host}

    @property
    def standing(self) -> str | None:
        return self.server.standing(self.host)

    # ── waiting for a tunnel that comes back ──────────────────────────────────────────────────────────────────────
    def refuse(self, code: str, detail: str = "") -> None:
        """Wait if that may help, as long as nothing was sent on; else the visitor hears an alert. What it sent is read first,
        since a close with unread bytes is a reset, which takes the alert away."""
        if code in MAY_WAIT and not self.held and not self.heard and self.server.holding.take(self, code):
            self.held = True
            return
        self.raw.say(self, code, detail)
        self.let_go()
        if self.closed or self.closing:
            return
        self.closing = True
        self.deadline = self.server.now + LINGER_SECONDS
        self.transport.write(alert(ALERTS.get(code, INTERNAL_ERROR)))
        # One that was not admitted nobody would end later.
        if self.eof or self not in self.server.connections:
            self.transport.close()
            return
        end_output(self.transport)
        self.resume()

    def go_on(self) -> None:
        """The wait is over, one way or the other."""
        if self.closed or self.closing:
            return
        tunnel = self.server.find(self.host)
        self.tunnel = tunnel if tunnel is not None and tunnel.passthrough else None
        self.deadline = self.server.now + self.server.settings.tcp_open_timeout_seconds
        self.begin()
        if self.stream is not None and self.tunnel is not None:
            self.pump(self.stream, self.tunnel)
