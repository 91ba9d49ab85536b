"""The short way of requests that were seen before: no parser, no exchange, one frame each way (decision 0013).

    bytes ─► KNOWN_HEADS ─► decided on ─► one lazy stream: ``asked`` ─► the whole answer, of a known head ─► written
                                                  └──► anything else: materialise ─► the ordinary exchange

:class:`Repeats` is the part of a visitor's connection (``http1.Visitor``) that does so, and the facts of the decision on such a
request. Whatever is special about a request goes the ordinary way, and nothing that can be observed may differ.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from time import monotonic as clock
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from portico.kit.gone import GONE
from portico.kit.metrics import REQUEST_SECONDS
from portico.relay import challenges, credentials, heads
from portico.relay.exchange import IDS, Exchange
from portico.relay.heads import PLAIN_LINES
from portico.relay.policy import OPEN, Compiled

if TYPE_CHECKING:
    from collections.abc import Callable

    from portico.relay.agent_connection import LiveTunnel
    from portico.relay.decide import Chain
    from portico.relay.door import Door
    from portico.relay.http1 import Visitor
    from portico.relay.listeners import PublicServer
    from portico.relay.peers import RemoteTunnel
    from portico.wire.stream import Stream

    Asked = tuple[int, bytes, heads.KnownHead, bytes, float, LiveTunnel | RemoteTunnel]


class Repeats:
    """See the module. Defaults stand on the class: many connections bring one request and change few of them."""

    NEVER: Final = math.inf
    lazy: Literal[True] = True
    server: PublicServer
    door: Door
    plain: bool
    transport: asyncio.Transport = GONE
    address = ""
    certified = False  # a client certificate was presented, and verified against the door's authority
    deadline = 0.0
    draining = paused = False
    current: Exchange | None = None
    parsing: Exchange | None = None
    in_head = False
    fault: str | None = None
    skipped = b""  # the field that frames a body which the parser took for what follows an upgrade
    forwarded = (b"", b"")  # a host, and its forwarding fields
    resting = True  # between two requests, with nothing of the next one in the parser
    #: Stream id, method and target, head, request id, beginning (monotonic seconds) and tunnel of a request that nothing special
    #: was heard of.
    asked: Asked | None = None
    tunnel: LiveTunnel | RemoteTunnel | None = None  # of the request that is decided on, or was
    tallied: list[list[int]]  # what is counted of requests of this connection's protocol, see ``tally.py``
    tls: str | None = None  # the version of TLS, where it is logged
    noted: tuple[Any, Any, str, str] = (None, None, "", "")  # see ``AccessLog.whole``
    candidate = cast("heads.KnownHead", None)  # the known head that is decided on, and then that of :attr:`asked`
    #: A head with a password of ours: nobody remembers it but the connection that it comes by, for as long as that is open.
    own: tuple[bytes, heads.KnownHead] | None = None
    #: The head of the last request that was a known one, the chain and the policy that it fell under, and its fields with ours
    #: behind them.
    repeated: tuple[heads.KnownHead | None, Chain | None, Compiled, bytes] = (None, None, OPEN, b"")
    #: RESPONSE payload → the head of an answer, if it is known under that policy.
    answer_of: Callable[[bytes], heads.KnownAnswer | None]
    #: A tunnel's chain (each has one of its own) and the host for which all that is the same for every request of this
    #: connection was found good.
    cleared: tuple[Chain | None, bytes] = (None, b"")

    def _parse(self, data: memoryview) -> None:
        """The ordinary way."""
        raise NotImplementedError

    def _close(self) -> None:
        """End the connection after what is written."""
        raise NotImplementedError

    def forwarding(self, host: bytes) -> bytes:
        """The forwarding fields as a frame has them, up to the request's own id; computed once for a connection and host."""
        if self.forwarded[0] != host:
            self.forwarded = (host, heads.FORWARDING[self.address, self.door.scheme, host, self.door.port])
        return self.forwarded[1]

    def _ask(self, line: bytes, known: heads.KnownHead) -> bool:
        """Forward a request with known fields; nothing is kept of it but :attr:`asked`, and most need no more.

        ``False``: something about it is special, and nothing was done.
        """
        plain = PLAIN_LINES[line]
        server = self.server
        self.tunnel = tunnel = server.by_host.get(known.host) or server.find(known.host)
        if plain is None or tunnel is None or (server.challenges.open and challenges.PATH in plain):
            return False
        self.candidate = known
        policy, chain = tunnel.policy, tunnel.chain
        last_known, last_chain, last_policy, fields = self.repeated
        again = last_known is known and last_chain is chain and last_policy is policy
        if not again and not self._cleared(chain, known.host):
            return False
        for check in chain.opening:
            if check(self) is not None:
                return False
        if not again:
            fields = self._repeat(known, chain, policy)
        if last_known is not None:
            server.returning += 1
        rid = next(IDS)
        session = tunnel.session
        try:
            ident = session.open_lazy(tunnel.bind_bytes, plain, fields, rid, self)
        except OverflowError:
            return False
        began = session.began or clock()
        session.began = began  # of the first that is sent with the next message
        self.asked = (ident, plain, known, rid, began, tunnel)
        self.resting = False
        if tunnel.rates is not None:
            tunnel.rates.take(self.address, server.loop.time())
        tunnel.inflight += 1
        tunnel.counters.requests += 1
        self.deadline = server.first_byte_at
        return True

    def _cleared(self, chain: Chain, host: bytes) -> bool:
        """Whether the steps pass whose answer is the same for all requests of this connection to a host."""
        if self.cleared[0] is not chain or self.cleared[1] != host:
            for check in chain.connection:
                if check(self) is not None:
                    return False
            self.cleared = (chain, host)
        return True

    def _repeat(self, known: heads.KnownHead, chain: Chain, policy: Compiled) -> bytes:
        """Remember what is made of a known head under a policy: its fields, with ours behind them."""
        edit = policy.request
        fields = known.wire if edit is None else heads.wire_fields(edit(known.fields))
        fields += self.forwarding(known.host)
        self.repeated = (known, chain, policy, fields)
        self.answer_of = policy.answers.get
        return fields

    # The facts of a decision on a request with known fields; the host is a live one.
    standing: str | None = "active"

    @property
    def host(self) -> bytes:
        return self.candidate.host

    @property
    def valid_until(self) -> float | None:
        """Until when its host may be served, by HTTPS alone; ``None``: there is no such rule."""
        return self.server.valid_until(self.candidate.host)

    @property
    def secure(self) -> bool:
        return not self.plain

    def password(self) -> str:
        """What is known of the request's password."""
        assert self.tunnel is not None
        return self.server.password(self.tunnel, self.candidate.fields, self.address)

    def wait(self) -> float:
        """Seconds until the rates have room."""
        assert self.tunnel is not None
        assert self.tunnel.rates is not None
        return self.tunnel.rates.check(self.address, self.server.loop.time())

    def on_whole(self, response: bytes, body: bytes) -> bool:
        """The whole answer to what was asked: written at once when its head is a known one."""
        known, asked = self.answer_of(response), self.asked
        if known is None or asked is None:
            return False
        text, length, kind = known
        if length != len(body) or self.draining or self.paused:
            return False
        self.asked = None
        _, _, head, _, began, tunnel = asked
        tunnel.inflight -= 1
        if tunnel.line is not None:
            tunnel.line.freed()
        server = self.server
        if head.keep_alive:
            data = text + body
            self.resting = True
            self.deadline = server.idle_at
            self.transport.write(data)
        else:
            data = text[:-2] + b"Connection: close\r\n\r\n" + body
            self.transport.write(data)
            self._close()
        tunnel.counters.bytes_out += len(data)
        # What every request costs to be counted: two sums, a bucket, and the look for a log.
        took = tunnel.session.heard - began
        self.tallied[kind][bisect_left(REQUEST_SECONDS, took)] += 1
        server.seconds += took
        if server.access is not None:
            server.access.whole(self, tunnel, asked, known, len(data), took)
        return True

    def materialise(self) -> Stream:
        """The exchange of what was asked, since something else than a whole answer happened to it."""
        asked, self.asked = self.asked, None
        assert asked is not None
        ident, plain, known, rid, began, tunnel = asked
        method, _, target = plain.partition(b"\0")
        exchange = Exchange(cast("Visitor", self), known.host, method, target, known.fields)
        exchange.wire, exchange.id, exchange.tunnel = known.wire, rid, tunnel
        exchange.began = began
        exchange.policy = self.repeated[2]
        exchange.started = exchange.counted = exchange.received = True
        exchange.keep_alive = known.keep_alive
        self.current = exchange
        self.parsing = None
        exchange.stream = stream = tunnel.session.make(ident, exchange)
        return stream

    def _unknown(self, data: memoryview, line: bytes, section: bytes) -> None:
        """Bytes between two requests that are not one whole request with known fields; they may be known next time."""
        self._parse(data)
        exchange = self.parsing
        if exchange is not None and exchange.received and len(section) <= heads.KNOWN_HEADS.longest_bytes:
            self._learn(exchange, line, section)

    def _learn(self, exchange: Exchange, line: bytes, section: bytes) -> None:
        """Remember the fields of a request that came alone and whole, has no body and keeps its connection.

        Its line must be the first one of the read: behind empty lines, which the parser skips, ``section`` would hold the
        request line too, or be what follows the request before.
        """
        if section.find(b"\r\n\r\n") != len(section) - 4 or self.in_head or self.fault is not None or self.skipped:
            return
        if heads.PLAIN_LINES[line] != exchange.method + b"\0" + exchange.target:
            return
        if len(section) + heads.LINE_MAX > self.server.settings.max_head_bytes:
            return  # with a longer line it would be over the limit
        ordinary = not (exchange.with_body or exchange.upgrade or exchange.http10)
        if not ordinary or exchange.wire is None or exchange.te_trailers:
            return
        if not heads.KNOWN_HEADS.worth(section):
            return
        known = heads.KnownHead(exchange.host, exchange.fields, exchange.wire, exchange.keep_alive)
        if exchange.policy.users is not None and credentials.carried(exchange.fields):
            self.own = (section, known)
        else:
            heads.KNOWN_HEADS.remember(section, known)
