"""A steady stream of visitors that counts every failure by its cause and time.

Half of the requests go over keep-alive connections, half over connections of their own. The rate is open-loop: a request that is
slow delays none of those after it, until ``MAX_OPEN`` are under way; then the next one comes when one of them is over. A request
on a kept connection that the server ended before a byte of the answer is sent again on a new one, once, as browsers and HTTP
libraries do (RFC 9112, 9.3.1); such repeats are counted apart.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tests.system.visitor import READ_LIMIT, Answer, Wire, request

#: Seconds for one request, the wait for a tunnel that is on its way included.
LIMIT_SECONDS = 60.0
#: Requests under way at once: less than a tunnel of a drill takes, so that how long a busy machine needs for a start does not
#: decide whether a visitor is refused.
MAX_OPEN = 350


@dataclass(slots=True)
class Visit:
    """One request: when it began and was over (monotonic), its status (0: no answer), and what came of it."""

    began: float
    ended: float
    status: int
    what: str
    kept: bool

    @property
    def good(self) -> bool:
        return self.status == 200


class Load:
    """``async with Load(port, host, rate) as load:``; :attr:`visits` grows meanwhile."""

    def __init__(
        self,
        port: int,
        host: str,
        rate: float = 200.0,
        path: str = "/",
        kept: float = 0.5,
        fields: Sequence[str] = (),
    ) -> None:
        self._port, self._host, self._rate, self._path, self._kept_share = port, host, rate, path, kept
        self._fields = list(fields)
        self.visits: list[Visit] = []
        self.repeats = 0
        self._idle: deque[Wire] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._driver: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Load:
        self._driver = asyncio.create_task(self._drive())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Send nothing more, and wait for the answers to what was sent."""
        if self._driver is not None:
            self._driver.cancel()
            await asyncio.gather(self._driver, return_exceptions=True)
            self._driver = None
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LIMIT_SECONDS + 1)
        while self._idle:
            self._idle.popleft().close()

    # -- what came of it ---------------------------------------------------------------------------------------------

    def since(self, at: float, until: float = float("inf")) -> list[Visit]:
        return [visit for visit in self.visits if at <= visit.began < until]

    def failed(self, since: float = 0.0) -> list[Visit]:
        return [visit for visit in self.visits if visit.began >= since and not visit.good]

    def causes(self, since: float = 0.0) -> Counter[str]:
        """Failed requests by cause."""
        return Counter(visit.what for visit in self.failed(since))

    async def until_good(self, since: float, limit: float, count: int = 5) -> float:
        """Seconds from ``since`` until ``count`` requests in a row that began after it had been answered well."""
        while True:
            good: list[Visit] = []
            for visit in sorted(self.since(since), key=lambda visit: visit.ended):
                good = [*good, visit] if visit.good else []
                if len(good) >= count:
                    return good[0].ended - since
            assert time.monotonic() - since < limit, f"not back in {limit:g} s: {self.causes(since)}"
            await asyncio.sleep(0.02)

    def silence(self, since: float) -> float:
        """The longest time after ``since`` in which no request was answered well."""
        answered = sorted(visit.ended for visit in self.visits if visit.good and visit.ended >= since)
        return max((b - a for a, b in itertools.pairwise([since, *answered])), default=0.0)

    # -- requests ----------------------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        due = time.monotonic()
        number = 0
        while True:
            number += 1
            if len(self._tasks) >= MAX_OPEN:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            kept = (number * self._kept_share) % 1 < self._kept_share
            task = asyncio.create_task(self._visit(kept))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            due = max(due + 1 / self._rate, time.monotonic() - 0.5)
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _visit(self, kept: bool) -> None:
        began = time.monotonic()
        status, what = 0, ""
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                answer = await (self._on_kept() if kept else self._on_new())
            status, what = answer.status, answer.error or answer.body[:60].decode("latin-1")
        except asyncio.IncompleteReadError as err:
            what = "cut in the body" if err.partial else "closed before an answer"
        except (OSError, EOFError, TimeoutError, ValueError) as err:
            what = type(err).__name__
        self.visits.append(Visit(began, time.monotonic(), status, what, kept))

    async def _on_new(self) -> Answer:
        wire = await self._connect()
        try:
            await wire.send(request(self._host, self._path, fields=[*self._fields, "Connection: close"]))
            return await wire.answer()
        finally:
            wire.close()

    async def _on_kept(self) -> Answer:
        while self._idle:
            wire = self._idle.popleft()
            if wire.reader.at_eof():  # the server said that it closes: nobody would send on it
                wire.close()
                continue
            try:
                return await self._ask(wire)
            except (asyncio.IncompleteReadError, ConnectionError) as err:
                if getattr(err, "partial", b""):
                    raise
                self.repeats += 1
                break
        return await self._ask(await self._connect())

    async def _ask(self, wire: Wire) -> Answer:
        done = False
        try:
            await wire.send(request(self._host, self._path, fields=self._fields))
            answer = await wire.answer()
            done = answer.get("Connection").lower() != "close"
            return answer
        finally:
            if done:
                self._idle.append(wire)
            else:
                wire.close()

    async def _connect(self) -> Wire:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=READ_LIMIT)
        return Wire(reader, writer)


def summary(load: Load, since: float) -> dict[str, Any]:
    """Figures of the requests that began after ``since``."""
    visits = load.since(since)
    return {
        "requests": len(visits),
        "failed": dict(load.causes(since)),
        "repeats": load.repeats,
        "slowest": round(max((visit.ended - visit.began for visit in visits), default=0.0), 2),
    }
