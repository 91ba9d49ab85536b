"""Uses of keys from outside their networks: refused, and worth a row of the audit log, as nobody but a thief need do that.

The refusal comes before there is a caller, in the midst of a request that may hold a connection. So the row is written by a
task of its own, and once in ``REPEAT_SECONDS`` for a key and a network: a client that is merely wrong asks for hours.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any, Final

from portico.control.access import Caller, CallerKind
from portico.control.audit import service as audit
from portico.kit import networks
from portico.kit.clock import Clock
from portico.kit.db import Database

log = logging.getLogger(__name__)

REPEAT_SECONDS: Final = 600.0
# Pairs of key and network that are remembered; beyond it rows may repeat.
_MAX_REMEMBERED: Final = 10_000
# Rows on their way at most; a flood from ever new networks is not written down whole.
_MAX_TASKS: Final = 4


class Elsewhere:
    """What was refused for its address. One per process; ``close`` waits for rows that are on their way."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self._until: dict[tuple[str, str], float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def note(self, key: Any, address: str | None) -> None:
        """``key`` (a row with id, kind and organization_id) was used from ``address``, where it may not be."""
        mark, now = (key["id"], networks.network(address)), self._clock.monotonic()
        if self._until.get(mark, 0.0) > now or len(self._tasks) >= _MAX_TASKS:
            return
        if len(self._until) >= _MAX_REMEMBERED:
            self._until.clear()
        self._until[mark] = now + REPEAT_SECONDS
        kind: CallerKind = "agent_key" if key["kind"] == "agent" else "api_key"
        caller = Caller(kind, key["id"], key["organization_id"], address=address)
        task = asyncio.get_running_loop().create_task(self._write(caller))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self, caller: Caller) -> None:
        try:
            await audit.refused(self._db, caller, "key.use", caller.id, {"code": "auth.address_denied"})
        except Exception as err:
            log.warning("a refused use was not recorded", extra={"f": {"key": caller.id, "error": type(err).__name__}})

    async def close(self) -> None:
        """Wait for what is being written."""
        for task in list(self._tasks):
            with suppress(Exception):
                await task
