"""Connections by proxies that say first, in a PROXY header, who they speak for; and who serves a connection.

    accept ─► Introduction ─┬─ from anybody else ──────────────────► the protocol of the port, with the socket's own address
                            └─ from ``proxy_protocol_from`` ─► header ─► the same, with the address that the header names

From such a proxy the header is required: without one its visitors would all be one client. From anybody else it has no meaning,
and is what its bytes are to the port (on the HTTP port 400). Only where one of the settings is used does a connection come
by here. The TLS port reads the header itself, in front of the ClientHello (``tls_port.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, cast

from portico.kit import proxy_protocol
from portico.kit.gone import GONE
from portico.kit.proxy_protocol import Found
from portico.relay.http1 import plain_address

if TYPE_CHECKING:
    from portico.relay.door import Door
    from portico.relay.listeners import PublicServer

#: What a connection that did not introduce itself as it must is counted and logged as.
INVALID: Final = "edge.proxy_header_invalid"
#: Bytes that one read takes: what comes behind the header has to wait for its reader.
READ_SIZE: Final = 4096

Make = Callable[["Door"], asyncio.BufferedProtocol]


def introduced(door: Door, found: Found) -> Door:
    """The door of a connection behind a proxy's header: with the ends that the header names, where it names any."""
    if found.source is None or found.destination is None:
        return door
    return replace(door, client=found.source, local=found.destination, port=found.destination[1] or door.port)


class Introduction(asyncio.BufferedProtocol):
    """A connection until it is known who it is from; then ``make(door)`` serves it. A guest of ``PublicServer`` meanwhile."""

    def __init__(self, server: PublicServer, door: Door, make: Make) -> None:
        self.server, self.door, self._make = server, door, make
        self.transport: asyncio.Transport = GONE
        self.address = ""
        self.deadline = 0.0
        self.draining = False
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.address = plain_address(peer)
        if isinstance(peer, tuple):
            self.door = replace(self.door, client=peer[:2])
        if self.address not in self.server.introducing:
            self._hand_over(self.door, b"")
            return
        self.deadline = self.server.now + self.server.settings.head_timeout_seconds
        if not self.server.admit(self):
            self.transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.server.buffer[:READ_SIZE]

    def buffer_updated(self, nbytes: int) -> None:
        self._received += self.server.buffer[:nbytes]
        try:
            found = proxy_protocol.read(self._received, self.server.settings.proxy_header_max_bytes)
        except ValueError as err:
            self._refuse(str(err))
            return
        if found is not None:
            self.server.leave(self)
            self._hand_over(introduced(self.door, found), self._received[found.length :])

    def _hand_over(self, door: Door, rest: bytes) -> None:
        transport, self.transport = self.transport, GONE
        protocol = self._make(door)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        while rest and not transport.is_closing():
            room = cast(memoryview, protocol.get_buffer(-1))
            size = min(len(room), len(rest))
            room[:size] = rest[:size]
            rest = rest[size:]
            protocol.buffer_updated(size)

    def _refuse(self, why: str) -> None:
        """Close without a byte: whoever it is, it does not speak for a visitor."""
        self.server.refuse_proxy(self.address, why)
        self.transport.abort()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.leave(self)
        self.transport = GONE

    # ── as a guest of the server ──────────────────────────────────────────────────────────────────────────────────
    def expire(self) -> None:
        """The deadline passed (called by the server's sweep)."""
        self._refuse("no whole PROXY header in time")

    def drain(self) -> None:
        """A visitor that is about to ask is answered."""

    def close_idle(self) -> None:
        """By now it would have."""
        self.transport.abort()

    cut_off = close_idle
