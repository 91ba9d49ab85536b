"""News for open pages: one look at the recorder a few times a second, sent to every page as server-sent events.

    requests   {"rows": […], "skipped": n}    requests that are new or have changed; of more than a page shows, the newest
    status     the document of /api/status    when it changed, at most once a second
    cleared    {}                             the list was emptied

Nothing runs while no page is open, and serving requests notifies nobody: their cost is the same with a page and without.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from time import perf_counter
from typing import Any

from portico.agent import views
from portico.agent.recorder import Entry, Recorder
from portico.errors import Problem
from portico.settings import AgentSettings

#: New requests in one event; what a page cannot show anyway is not sent.
ROWS = 100
#: Requests running at once whose progress is followed.
FOLLOWED = 500
#: Messages waiting for one page; a page that lags further behind is told to load anew.
BACKLOG = 64
#: Looks between two status events, and between two comments that keep a quiet connection alive.
STATUS_EVERY = 4
ALIVE_EVERY = 60


def event(name: str, document: Any) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(document, separators=(',', ':'))}\n\n".encode()


class Live:
    """Pages that listen. ``status`` makes the document of ``/api/status``."""

    def __init__(self, settings: AgentSettings, recorder: Recorder, status: Callable[[], dict[str, Any]]) -> None:
        self._settings = settings
        self._recorder = recorder
        self._status = status
        self._pages: set[asyncio.Queue[bytes]] = set()
        self._task: asyncio.Task[None] | None = None
        self._seen = 0
        self._clears = 0
        self._followed: dict[int, tuple[Entry, tuple[Any, ...]]] = {}
        self._last_status = b""

    def listen(self) -> AsyncIterator[bytes]:
        """The events from now on; raises ``inspect.busy``."""
        if len(self._pages) >= self._settings.web_streams_max:
            raise Problem("inspect.busy", f"{self._settings.web_streams_max} live pages are open")
        queue: asyncio.Queue[bytes] = asyncio.Queue(BACKLOG)
        self._pages.add(queue)
        if self._task is None:
            self._begin()
        return self._events(queue)

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _events(self, queue: asyncio.Queue[bytes]) -> AsyncIterator[bytes]:
        try:
            yield b"retry: 1000\n\n" + event("status", self._status())
            while queue in self._pages:
                yield await queue.get()
        finally:
            self._pages.discard(queue)

    def _begin(self) -> None:
        self._seen, self._clears = self._recorder.last, self._recorder.clears
        self._followed.clear()
        for entry in self._recorder.running()[-FOLLOWED:]:
            self._followed[entry.seq] = (entry, _mark(entry))
        self._task = asyncio.get_running_loop().create_task(self._look_again())

    async def _look_again(self) -> None:
        looks = 0
        while self._pages:
            await asyncio.sleep(self._settings.web_refresh_seconds)
            looks += 1
            self._look()
            if looks % STATUS_EVERY == 0:
                self._tell_status()
            if looks % ALIVE_EVERY == 0:
                self._send(b": alive\n\n")
        self._task = None

    def _look(self) -> None:
        recorder = self._recorder
        if recorder.clears != self._clears:
            self._clears = recorder.clears
            self._send(event("cleared", {}))
        now = perf_counter()
        rows = [views.summary(entry, now) for entry in self._changed()]
        fresh, skipped = self._fresh()
        rows += [views.summary(entry, now) for entry in fresh]
        if rows:
            self._send(event("requests", {"rows": rows, "skipped": skipped}))

    def _changed(self) -> list[Entry]:
        """Followed entries that are not what they were; those that are over are followed no longer."""
        changed = []
        for seq, (entry, before) in list(self._followed.items()):
            mark = _mark(entry)
            if mark != before:
                changed.append(entry)
                self._followed[seq] = (entry, mark)
            if entry.ended:
                del self._followed[seq]
        return changed

    def _fresh(self) -> tuple[list[Entry], int]:
        """The entries since the last look, oldest first, and how many more there were."""
        fresh: list[Entry] = []
        count = self._recorder.last - self._seen
        if not count:
            return [], 0
        for entry in self._recorder.newest():
            if entry.seq <= self._seen or len(fresh) >= ROWS:
                break
            fresh.append(entry)
            if not entry.ended and len(self._followed) < FOLLOWED:
                self._followed[entry.seq] = (entry, _mark(entry))
        self._seen = self._recorder.last
        return fresh[::-1], count - len(fresh)

    def _tell_status(self) -> None:
        message = event("status", self._status())
        if message != self._last_status:
            self._last_status = message
            self._send(message)

    def _send(self, message: bytes) -> None:
        for queue in list(self._pages):
            try:
                queue.put_nowait(message)
            except asyncio.QueueFull:
                # It reads too slowly: its stream ends, and the browser opens a new one.
                self._pages.discard(queue)


def _mark(entry: Entry) -> tuple[Any, ...]:
    """What a page can see change."""
    return entry.ended, entry.status, entry.received, entry.more.sent
