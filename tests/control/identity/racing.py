"""Races made to happen: a transaction holds what another waits for, and commits once it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import sqlalchemy as sa

from portico.kit.db import Database

_WAITING = sa.text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


async def overtaken(db: Database, *changes: sa.Executable, act: Coroutine[Any, Any, Any]) -> Any:
    """What ``act`` gives when it waits for a transaction that has done the first of ``changes``, and then does the others."""
    async with db.transaction() as tx:
        await tx.execute(changes[0])
        task = asyncio.create_task(act)
        while not task.done():
            async with db.read() as reader:
                if await reader.scalar(_WAITING):
                    break
            await asyncio.sleep(0.01)
        assert not task.done(), "it did not wait for the change"
        for change in changes[1:]:
            await tx.execute(change)
    return await task
