"""One reader of the change table per process, and its fan-out to all edge streams.

The hub owns one connection outside the pool: it LISTENs on it and reads on it, so neither a busy pool nor a lost notification
delays a revocation: a notification wakes, and without one the table is looked at every ``edge_poll_seconds``.

    a change      read in order → one line → the queue of every stream
    a slow relay  its queue is full → its stream ends, and it resumes by version
    no database   no heartbeats; after ``edge_outage_seconds`` every stream ends, since nobody could tell it of changes
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import asyncpg

from portico.control import changes
from portico.control.edge.state import StateReader
from portico.control.tunnels import relays
from portico.errors import Problem
from portico.kit.db import Database
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 0.2
#: The version of a line that speaks of none.
ANY_VERSION: Final = -1
#: Relays a second that are asked to come back to whoever serves then.
_RETURNS_PER_SECOND: Final = 100
_FAILURES = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, Problem)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the stream. A delta leads to ``version``; a heartbeat speaks of it."""

    version: int
    text: bytes
    delta: bool


@dataclass(frozen=True, slots=True)
class Link:
    """The hub's own connection, as what ``changes`` and ``relays`` read from."""

    raw: asyncpg.Connection


class Subscription:
    """The queue of one stream. ``get`` returns ``None`` once the stream is to end, for the reason in ``closed``."""

    def __init__(self, key_id: str, max_lines: int, max_bytes: int) -> None:
        self.key_id = key_id
        self.closed: str | None = None
        self._lines: deque[Line] = deque()
        self._bytes = 0
        self._max_lines, self._max_bytes = max_lines, max_bytes
        self._ready = asyncio.Event()

    def put(self, line: Line) -> None:
        """Add a line; a stream that does not keep up is ended."""
        if self.closed is not None:
            return
        self._bytes += len(line.text)
        if len(self._lines) >= self._max_lines or self._bytes > self._max_bytes:
            self.close("the relay reads too slowly")
            return
        self._lines.append(line)
        self._ready.set()

    def close(self, reason: str, last: Line | None = None) -> None:
        """End the stream, after the line ``last``; what waits is dropped, the relay resumes by version."""
        if self.closed is None:
            self._lines.clear()
            if last is not None:
                self._lines.append(last)
        self.closed = self.closed or reason
        self._ready.set()

    async def get(self) -> Line | None:
        """The next line, or ``None`` at the end."""
        while not self._lines:
            if self.closed is not None:
                return None
            self._ready.clear()
            await self._ready.wait()
        line = self._lines.popleft()
        self._bytes -= len(line.text)
        return line


def heartbeat_line(version: int, now: float, digest: str | None = None, organizations: str | None = None) -> Line:
    """What a stream says when nothing changes; with the hashes of the state at ``version`` and ``now``, if given."""
    message: dict[str, Any] = {"type": "heartbeat", "version": version, "time": round(now, 3)}
    if digest is not None:
        message["hash"] = digest
    if organizations is not None:
        message["organizations_hash"] = organizations
    return Line(version, json.dumps(message, separators=(",", ":")).encode() + b"\n", False)


def goodbye_line(retry_after: float) -> Line:
    """The last line of a process that stops: open the stream anew, no sooner than in ``retry_after`` seconds."""
    return Line(ANY_VERSION, b'{"type":"goodbye","retry_after_ms":%d}\n' % min(int(retry_after * 1000), 5000), False)


def delta_line(entry: changes.Entry) -> Line:
    """One transaction's changes."""
    text = b'{"type":"delta","version":%d,"changes":%b}\n' % (entry.version, entry.changes.encode())
    return Line(entry.version, text, True)


class Hub:
    """Starts with the first stream; ``close`` ends it. One per process."""

    def __init__(
        self,
        settings: ApiSettings,
        db: Database,
        states: StateReader,
        stopping: asyncio.Event,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._db, self._states, self._stopping = settings, db, states, stopping
        self._wall, self._monotonic = wall, monotonic
        self._streams: set[Subscription] = set()
        self._position: int | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ready = asyncio.Event()
        self._wake = asyncio.Event()
        self._healthy = 0.0
        self._next_beat = 0.0
        self._next_hash = 0.0
        self._failure = ""

    # -- for streams

    @asynccontextmanager
    async def subscription(self, key_id: str) -> AsyncIterator[Subscription]:
        """A queue that gets every line from now on. Raises ``edge.streams_exhausted`` or ``service.unavailable``."""
        if self._stopping.is_set():
            raise Problem("service.unavailable", "this process is stopping", headers={"Retry-After": "1"})
        if len(self._streams) >= self._settings.edge_max_streams:
            raise Problem("edge.streams_exhausted", headers={"Retry-After": "5"})
        found = Subscription(key_id, self._settings.edge_queue_lines, self._settings.edge_queue_bytes)
        self._streams.add(found)
        try:
            await self._started()
            yield found
        finally:
            self._streams.discard(found)

    async def _started(self) -> None:
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._end_when_stopping())]
        try:
            async with asyncio.timeout(self._settings.edge_outage_seconds):
                await self._ready.wait()
        except TimeoutError:
            raise Problem("service.unavailable", "the database does not answer", headers={"Retry-After": "1"}) from None

    @property
    def streams(self) -> int:
        """Edge streams of this process."""
        return len(self._streams)

    async def close(self) -> None:
        """End every stream and the reading."""
        self._end_all("this process is stopping")
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task

    async def _end_when_stopping(self) -> None:
        await self._stopping.wait()
        for number, stream in enumerate(self._streams):
            stream.close("this process is stopping", goodbye_line(number / _RETURNS_PER_SECOND))

    def _end_all(self, reason: str) -> None:
        for stream in self._streams:
            stream.close(reason)

    def _broadcast(self, line: Line) -> None:
        for stream in self._streams:
            stream.put(line)

    # -- reading

    async def _run(self) -> None:
        while True:
            try:
                async with self._linked() as link:
                    await self._follow(link)
            except _FAILURES as err:
                self._failed(f"{type(err).__name__}: {err}"[:200])
            except Exception:
                log.exception("fault in the edge hub")
                self._failed("fault")
            await asyncio.sleep(_RETRY_SECONDS)

    def _failed(self, why: str) -> None:
        if why != self._failure:
            self._failure = why
            log.warning("edge changes cannot be read", extra={"f": {"why": why, "streams": len(self._streams)}})
        if self._monotonic() - self._healthy > self._settings.edge_outage_seconds:
            self._ready.clear()
            self._end_all("the database does not answer")

    @asynccontextmanager
    async def _linked(self) -> AsyncIterator[Link]:
        """A connection of the hub's own that listens. Every statement on it has a deadline."""
        deadline = self._settings.edge_outage_seconds / 2
        connection = await self._db.connect("portico edge", timeout_seconds=deadline)
        try:
            connection.add_termination_listener(lambda *_: self._wake.set())
            await connection.add_listener(changes.CHANNEL, lambda *_: self._wake.set())
            yield Link(connection)
        finally:
            connection.terminate()

    async def _follow(self, link: Link) -> None:
        while True:
            self._wake.clear()
            async with asyncio.timeout(self._settings.edge_outage_seconds / 2):
                await self._drain(link)
            self._now_healthy()
            await self._beat(link)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.edge_poll_seconds):
                    await self._wake.wait()

    def _now_healthy(self) -> None:
        self._healthy = self._monotonic()
        self._ready.set()
        if self._failure:
            log.info("edge changes are read again", extra={"f": {"version": self._position}})
            self._failure = ""

    async def _drain(self, link: Link, until: int | None = None) -> None:
        """Broadcast every change after the position (no further than ``until``), in order."""
        if self._position is None:
            self._position = await changes.newest(link)
        limit = self._settings.edge_batch_rows
        while until is None or self._position < until:
            entries = await changes.after(link, self._position, limit)
            if entries is None:  # this process was away for longer than changes are kept
                log.warning("edge changes were trimmed unread", extra={"f": {"version": self._position}})
                self._end_all("changes were trimmed unread")
                self._position = await changes.newest(link)
                return
            for entry in entries:
                if until is not None and entry.version > until:
                    return
                self._broadcast(delta_line(entry))
                self._position = entry.version
            if len(entries) < limit:
                return

    async def _beat(self, link: Link) -> None:
        now = self._monotonic()
        if now < self._next_beat or self._position is None:
            return
        self._next_beat = now + self._settings.edge_heartbeat_seconds
        await self._end_revoked(link)
        if now >= self._next_hash and self._streams:
            self._next_hash = now + self._settings.edge_hash_seconds
            await self._beat_with_hash(link)
        else:
            self._broadcast(heartbeat_line(self._position, self._wall()))

    async def _beat_with_hash(self, link: Link) -> None:
        """The state's hash, at exactly the version that streams have been brought to."""
        state = await self._states.read()
        digest = await state.digest()
        await self._drain(link, state.version)
        if self._position == state.version:
            self._broadcast(heartbeat_line(state.version, state.time, digest, state.organizations_digest()))

    async def _end_revoked(self, link: Link) -> None:
        """End the streams of relay keys that were revoked meanwhile."""
        if not self._streams:
            return
        live = await relays.live_keys(link, list({stream.key_id for stream in self._streams}))
        for stream in self._streams:
            if stream.key_id not in live:
                stream.close("the relay key was revoked")
