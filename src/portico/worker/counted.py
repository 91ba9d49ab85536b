"""Figures of the whole installation that a process counts every so often, and shows to Prometheus until it counts again."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator

from portico.kit.db import Database
from portico.kit.metrics import Sample
from portico.kit.queue_runner import FAILURES

log = logging.getLogger(__name__)


class Counted(ABC):
    """One per process. ``what`` they are is said when they cannot be counted."""

    what: str

    def __init__(self, db: Database, every_seconds: float) -> None:
        self.db, self._every = db, every_seconds
        self._at: float | None = None

    async def run(self) -> None:
        """Count until it is cancelled."""
        while True:
            try:
                await self.count()
            except FAILURES as err:
                fields = {"error": f"{type(err).__name__}: {err}"[:200]}
                log.warning(f"{self.what} cannot be counted", extra={"f": fields})
            await asyncio.sleep(self._every)

    async def count(self) -> None:
        """Look at the database now."""
        await self.look()
        self._at = asyncio.get_running_loop().time()

    def read(self) -> Iterator[Sample]:
        """What was counted last; nothing before the first count."""
        if self._at is not None:
            yield from self.samples(asyncio.get_running_loop().time() - self._at)

    @abstractmethod
    async def look(self) -> None:
        """Keep what the database has now."""

    @abstractmethod
    def samples(self, age_seconds: float) -> Iterator[Sample]:
        """What was kept, so long ago."""
