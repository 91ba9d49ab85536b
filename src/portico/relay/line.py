"""Requests that wait, in order and for a moment, for a place in a tunnel that is at its concurrency (``queue`` in its policy).

    decide: no room ─► Line.join ─┬─ a place is free ──► the first goes on: it is decided on anew
                                  ├─ its time is up ───► so is it, and is refused if there still is no room
                                  └─ its visitor left ─► it is let go

While somebody waits, nobody who comes later gets a place: the line is *closed*, and has_room (``decide.py``) sends them to its
end. Nothing of a waiting request was forwarded, and no more is read of it than one read; how many wait in all tunnels of a
process is bounded together with those of ``holding.py``. Without the rule a tunnel has no line.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from portico.relay.exchange import Exchange
    from portico.relay.holding import Holding
    from portico.relay.policy import Governed
    from portico.wire.policy import Queue


class Line:
    """The line of one tunnel."""

    __slots__ = ("_calling", "_timer", "_tunnel", "_waiting", "closed", "rule")

    def __init__(self, tunnel: Governed, rule: Queue) -> None:
        self._tunnel = tunnel
        self.rule = rule
        #: Whether a request that just came would overtake others if it were let in.
        self.closed = False
        self._waiting: deque[tuple[Exchange, float]] = deque()
        self._calling = False
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, exchange: Exchange) -> bool:
        """Whether the request waits now; it hears :meth:`Exchange.go_on` when there is a place or its time is up."""
        server = exchange.conn.server
        if len(self._waiting) >= self.rule.requests or server.holding.full:
            return False
        server.holding.count += 1
        self._waiting.append((exchange, server.loop.time() + self.rule.seconds))
        self.closed = True
        if self._timer is None:
            self._arm(server.loop)
        return True

    def leave(self, exchange: Exchange) -> None:
        """Its visitor is gone."""
        for at, (waiting, _) in enumerate(self._waiting):
            if waiting is exchange:
                del self._waiting[at]
                self._left(exchange.conn.server.holding)
                return

    def freed(self) -> None:
        """A place may be free: the first in line are called, in this loop tick but not from here."""
        if self._waiting and not self._calling:
            self._calling = True
            self._waiting[0][0].conn.server.loop.call_soon(self._call)

    def dissolve(self) -> None:
        """The tunnel is gone, or its policy has no line any more: all are decided on anew, now."""
        if self._waiting:
            self._waiting[0][0].conn.server.loop.call_soon(self._call_all)

    def _call(self) -> None:
        self._calling = False
        tunnel = self._tunnel
        while self._waiting and tunnel.inflight < tunnel.concurrency:
            self._next()

    def _call_all(self) -> None:
        for _ in range(len(self._waiting)):
            if self._waiting:
                self._next()

    def _expire(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        now = loop_of(self._waiting).time()
        while self._waiting and self._waiting[0][1] <= now:
            self._next()
        if self._waiting and self._timer is None:
            self._arm(loop_of(self._waiting))

    def _next(self) -> None:
        """The first goes on, past the others."""
        exchange, _ = self._waiting.popleft()
        exchange.line = None
        self.closed = False
        try:
            exchange.go_on()
        finally:
            self._left(exchange.conn.server.holding)

    def _left(self, holding: Holding) -> None:
        holding.count -= 1
        self.closed = bool(self._waiting)
        if not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_at(self._waiting[0][1], self._expire)


def loop_of(waiting: deque[tuple[Exchange, float]]) -> asyncio.AbstractEventLoop:
    """The loop on which they wait."""
    return waiting[0][0].conn.server.loop
