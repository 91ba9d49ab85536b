"""Keep-alive connections to one target: taken newest first, dialled when none is idle, swept by one timer.

A request never waits while the pool may still dial; above ``target_connections_max`` requests wait in order.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING, Any

from portico.agent.connection import RECEIVE_BYTES, TargetConnection
from portico.agent.target import Target, dial, why_unreachable
from portico.settings import AgentSettings
from portico.wire import frames as f

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from portico.agent.forward import Exchange


class Pool:
    """See the module. All methods run on the loop that made it."""

    def __init__(self, target: Target, context: ssl.SSLContext | None, settings: AgentSettings) -> None:
        self.target = target
        self.context = context
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self._view: memoryview | None = None
        self.idle: list[TargetConnection] = []
        self.open: set[TargetConnection] = set()
        self.active: dict[Exchange, None] = {}
        self.waiting: deque[Exchange] = deque()
        self.dialling = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        #: Idle connections that are kept; none once no new requests are expected.
        self.idle_max = settings.target_idle_max

    @property
    def view(self) -> memoryview:
        """The receive buffer of all connections, while there are any: a thousand idle tunnels should not hold one each."""
        if self._view is None:
            self._view = memoryview(bytearray(RECEIVE_BYTES))
        return self._view

    # ── taking and giving back ────────────────────────────────────────────────────────────────────────────────────
    def take(self, careful: bool) -> TargetConnection | None:
        """An idle connection. ``careful``: one whose socket is certainly quiet, for a request that must not go twice."""
        while self.idle:
            connection = self.idle.pop()
            if connection.transport.is_closing() or (careful and _readable(connection)):
                connection.abort()
                continue
            return connection
        return None

    def enqueue(self, exchange: Exchange) -> None:
        """Give ``exchange`` a connection as soon as there is one."""
        self.waiting.append(exchange)
        if len(self.open) + self.dialling < self.settings.target_connections_max:
            self._start_dial(None)

    def dial_for(self, exchange: Exchange) -> None:
        """Give ``exchange`` a connection of its own that nobody used before."""
        self._start_dial(exchange)

    def release(self, connection: TargetConnection, now: float) -> None:
        """A connection whose response ended well: to the first one waiting, else idle. ``now``: of ``perf_counter``."""
        while self.waiting:
            exchange = self.waiting.popleft()
            if not exchange.over:
                exchange.attach(connection)
                return
        if len(self.idle) >= self.idle_max:
            connection.abort()
            return
        connection.idle_since = now
        self.idle.append(connection)
        if self._timer is None:
            self._arm()

    def forget(self, connection: TargetConnection) -> None:
        """The connection is closed, or has become something else than HTTP."""
        if connection in self.open:
            self.open.discard(connection)
            if connection in self.idle:
                self.idle.remove(connection)
            self._refill()

    def _refill(self) -> None:
        """Dial for those who wait, now that there is room."""
        while self.waiting and self.waiting[0].over:
            self.waiting.popleft()
        wanted = min(len(self.waiting), self.settings.target_connections_max - len(self.open))
        if self.dialling < wanted and not self._closed:
            self._start_dial(None)

    # ── dialling ──────────────────────────────────────────────────────────────────────────────────────────────────
    def _start_dial(self, exchange: Exchange | None) -> None:
        self.dialling += 1
        self.keep(self._dial(exchange))

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a dial as a task of this pool."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dial(self, exchange: Exchange | None) -> None:
        try:
            connection = await self.connect(lambda: TargetConnection(self))
        except OSError as err:
            self.dialling -= 1
            failed = exchange or next((w for w in self._drain_waiting() if not w.over), None)
            if failed is not None:
                failed.fail(f.TARGET_REFUSED, self.why(err))
            self._refill()
            return
        self.dialling -= 1
        self.open.add(connection)
        if exchange is None or exchange.over:
            self.release(connection, perf_counter())
        else:
            exchange.attach(connection)

    def _drain_waiting(self) -> Iterator[Exchange]:
        while self.waiting:
            yield self.waiting.popleft()

    async def connect(self, factory: Callable[[], TargetConnection]) -> TargetConnection:
        """A connection outside of the pool's count; raises ``OSError``."""
        made: TargetConnection = await dial(
            self.target, factory, self.context, self.settings.target_connect_timeout_seconds
        )
        return made

    async def probe(self) -> str | None:
        """Why the target cannot be reached now, or ``None``."""
        try:
            await dial(self.target, _Knock, self.context, self.settings.target_connect_timeout_seconds)
        except OSError as err:
            return self.why(err)
        return None

    def why(self, err: BaseException) -> str:
        """The sentence for a failed :meth:`connect`."""
        return why_unreachable(self.target, err, self.settings.target_connect_timeout_seconds)

    # ── time ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def watch(self, exchange: Exchange) -> None:
        """Include ``exchange`` in the first-byte limit."""
        self.active[exchange] = None
        if self._timer is None:
            self._arm()

    def _arm(self) -> None:
        if self._timer is None and not self._closed:
            limit = self.settings.first_byte_timeout_seconds
            self._timer = self.loop.call_later(min(1.0, limit / 4) if limit > 0 else 1.0, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        now = perf_counter()
        limit = self.settings.first_byte_timeout_seconds
        for connection in list(self.open) if limit > 0 else ():
            if connection.asked is not None and now - connection.asked[6] >= limit:
                connection.materialise()
        for exchange in list(self.active) if limit > 0 else ():
            if exchange.silent_since(now) >= limit:
                exchange.fail(f.TARGET_TIMEOUT, f"{self.target.place} sent nothing for {limit:g} s")
        oldest = now - self.settings.target_idle_seconds
        for connection in [c for c in self.idle if c.idle_since <= oldest]:
            self.idle.remove(connection)
            connection.abort()
        if self.active or self.open:
            self._arm()
        elif not self.dialling:
            self._view = None

    def close(self) -> None:
        """Close idle connections now; those in use close when they are done."""
        self._closed = True
        self.idle_max = 0
        for connection in list(self.idle):
            connection.abort()
        self.idle.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def busy(self) -> bool:
        """Whether requests are being served, or wait to be."""
        return bool(self.open or self.dialling or self.waiting)

    def retire(self) -> None:
        """No new requests are expected: keep no connection longer than its request."""
        self.idle_max = 0
        for connection in list(self.idle):
            connection.abort()

    async def abort(self) -> None:
        """Close everything, dials in progress included."""
        self.close()
        for connection in list(self.open):
            connection.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class _Knock(asyncio.Protocol):
    """A connection that is only opened."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _readable(connection: TargetConnection) -> bool:
    """Whether the idle connection's socket has something to read: its end, or bytes that nobody asked for."""
    sock = connection.transport.get_extra_info("socket")
    if sock is None:
        return False
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([sock], [], [], 0)[0])
