"""The history of tunnels as the API tells it: read once, or followed over outages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from portico.agent.api import Api
from portico.errors import Problem

PAGE = 100
#: Failures that pass: the API or the way to it is away for a while.
PASSING = frozenset(
    (
        *("api.unreachable", "service.unavailable", "internal.error", "auth.throttled"),
        *("proxy.unreachable", "proxy.timeout", "proxy.target_unreachable"),
    )
)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to one tunnel. ``details`` depends on ``kind``."""

    id: str
    at: datetime
    tunnel: str
    name: str
    kind: str
    details: dict[str, Any]

    @classmethod
    def parse(cls, row: dict[str, Any]) -> Event:
        """From a row of ``GET /v1/events``; raises ``api.unexpected``."""
        try:
            details = row["details"] if isinstance(row["details"], dict) else {}
            at = datetime.fromisoformat(row["at"])
            return cls(str(row["id"]), at, str(row["tunnel"]), str(row["name"]), str(row["kind"]), details)
        except (KeyError, TypeError, ValueError) as err:
            raise Problem("api.unexpected", f"an event lacks {err}") from None


class History:
    """Events of some tunnels (ids), or of all of the organization when none is named."""

    def __init__(self, api: Api, tunnels: list[str]) -> None:
        self._api = api
        self._tunnels = tunnels
        self._seen: dict[str, datetime] = {}
        self._newest: datetime | None = None

    async def mark(self, overlap: float) -> None:
        """What happened until now is no news to :meth:`follow`. Called before :meth:`latest`, nothing falls between the two."""
        self._note(await self._read(None, 1))
        if self._newest is not None:
            self._note(await self._read(self._newest - timedelta(seconds=overlap), None))

    async def latest(self, count: int | None, since: datetime | None) -> list[Event]:
        """The newest ``count`` events, or all, that are not older than ``since``; oldest first."""
        events = await self._read(since, count)
        self._note(events)
        return events[::-1]

    async def follow(
        self, *, poll: float, retry_max: float, overlap: float, waiting: Callable[[Problem | None], None]
    ) -> AsyncIterator[Event]:
        """What happened since :meth:`mark`, until cancelled. ``waiting`` hears of an outage (a problem) and its end (``None``).

        Events become visible in the order of their commits, not of their times: the last ``overlap`` seconds are read again each
        time, and what is known is left out. Raises what will not pass, such as ``tunnel.not_found`` after a deletion.
        """
        again = timedelta(seconds=overlap)
        failures = 0
        while True:
            await asyncio.sleep(min(retry_max, poll * 2**failures) * random.uniform(0.8, 1.0))  # noqa: S311 - jitter
            try:
                events = await self._read(self._newest - again if self._newest is not None else None, None)
            except Problem as problem:
                if problem.code not in PASSING:
                    raise
                if not failures:
                    waiting(problem)
                failures = min(failures + 1, 10)
                continue
            if failures:
                waiting(None)
            failures = 0
            fresh = [event for event in reversed(events) if event.id not in self._seen]
            self._note(events)
            self._forget(again)
            for event in fresh:
                yield event

    async def _read(self, since: datetime | None, count: int | None) -> list[Event]:
        """Newest first; ``count=None``: all."""
        found: list[Event] = []
        cursor = ""
        while count is None or len(found) < count:
            size = PAGE if count is None else min(PAGE, count - len(found))
            query = [("tunnel", tunnel) for tunnel in self._tunnels] + [("limit", str(size))]
            query += [("since", since.isoformat())] if since is not None else []
            query += [("cursor", cursor)] if cursor else []
            page = await self._api.call("GET", f"events?{urlencode(query)}")
            found += [Event.parse(row) for row in page.get("data", [])]
            cursor = page.get("next_cursor") or ""
            if not cursor:
                break
        return found

    def _note(self, events: list[Event]) -> None:
        for event in events:
            self._seen[event.id] = event.at
            if self._newest is None or event.at > self._newest:
                self._newest = event.at

    def _forget(self, again: timedelta) -> None:
        """Known ids that no later answer can hold any more."""
        if self._newest is not None and len(self._seen) > 10 * PAGE:
            oldest = self._newest - 2 * again
            self._seen = {key: at for key, at in self._seen.items() if at >= oldest}
