"""``GET /v1/edge/stream`` as an ASGI response: catch up by version or by snapshot, then follow the hub.

Written as a response of its own, since a generator under Starlette's cannot be ended while it waits for a slow client.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from portico.control import changes
from portico.control.edge.hub import ANY_VERSION, Hub, Line, Subscription, delta_line, heartbeat_line
from portico.control.edge.state import StateReader
from portico.errors import Problem
from portico.kit.db import Database
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

_PIECE_BYTES: Final = 65536


class _Slow(Exception):
    """The relay took nothing for ``edge_send_seconds``."""


class EdgeStream(Response):
    """The stream of one relay, from ``version`` (None: from a snapshot) until either side ends it."""

    media_type = "application/x-ndjson"

    def __init__(
        self,
        settings: ApiSettings,
        db: Database,
        hub: Hub,
        states: StateReader,
        key_id: str,
        version: int | None,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._settings, self._db, self._hub, self._states = settings, db, hub, states
        self._key_id, self._version, self._wall = key_id, version, wall
        self._sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._hub.subscription(self._key_id) as lines:
            first = await self._catch_up()
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            watcher = asyncio.create_task(_watch(receive, lines))
            try:
                await self._follow(first, lines, send)
                await self._send(b"", send, more=False)
            except _Slow:
                log.warning("edge stream cut: the relay reads nothing", extra={"f": {"key": self._key_id}})
            finally:
                watcher.cancel()
                with suppress(asyncio.CancelledError):
                    await watcher
            log.info(
                "edge stream ended", extra={"f": {"key": self._key_id, "why": lines.closed, "version": self._sent}}
            )

    async def _catch_up(self) -> list[bytes]:
        """The lines up to now: what came after the relay's version if that is still known, else a snapshot."""
        if self._version:  # version 0 is what a relay without any state has
            missed = await self._missed(self._version)
            if missed is not None:
                # At once, so that a relay knows that it is connected and up to date.
                return [*missed, heartbeat_line(self._sent, self._wall()).text]
        self._sent, line = await self._states.line()
        return [line]

    async def _missed(self, version: int) -> list[bytes] | None:
        self._sent = version
        limit = self._settings.edge_batch_rows
        lines: list[bytes] = []
        size = 0
        async with self._db.read() as reader:
            while True:
                entries = await changes.after(reader, self._sent, limit)
                if entries is None:
                    return None
                for entry in entries:
                    lines.append(delta_line(entry).text)
                    size += len(lines[-1])
                    self._sent = entry.version
                if len(entries) < limit:
                    return lines
                if size > self._settings.edge_queue_bytes:
                    return None  # more than a snapshot would be

    async def _follow(self, first: list[bytes], lines: Subscription, send: Send) -> None:
        await self._send(b"".join(first), send)
        first.clear()
        while (line := await lines.get()) is not None:
            if self._new(line):
                await self._send(line.text, send)

    def _new(self, line: Line) -> bool:
        """Whether the relay has not been told; what it was told in catching up may come again from the hub."""
        if line.delta and line.version > self._sent:
            self._sent = line.version
            return True
        return not line.delta and line.version in (self._sent, ANY_VERSION)

    async def _send(self, text: bytes, send: Send, *, more: bool = True) -> None:
        """In pieces, each with a deadline: a large snapshot over a slow line is progress, a relay that reads nothing not."""
        for start in range(0, max(len(text), 1), _PIECE_BYTES):
            body = text[start : start + _PIECE_BYTES]
            try:
                async with asyncio.timeout(self._settings.edge_send_seconds):
                    await send({"type": "http.response.body", "body": body, "more_body": more})
            except TimeoutError:
                raise _Slow from None


async def _watch(receive: Receive, lines: Subscription) -> None:
    """End the subscription when the relay is gone."""
    with suppress(Problem):
        while (await receive())["type"] != "http.disconnect":
            pass
    lines.close("the relay disconnected")
