"""Events that are applied again because somebody asked for it: one, or those that fit a filter.

Whether that is harmless is for each kind of events to see to. What is the same for all of them: every replay has an id, a reason
and a row in the installation's log, which names what was asked for and what was done, a dry run's too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import sqlalchemy as sa

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.kit.db import Reader, Tx
from portico.kit.ids import new_id

#: Ids that an answer and an audit row name.
NAMED: Final = 20
Condition = sa.ColumnElement[bool]


class PutBack(Protocol):
    """Puts events that fit, and are not on their way, into their queue again, the oldest first; their ids."""

    async def __call__(
        self, tx: Tx, conditions: Sequence[Condition], replay_id: str, limit: int, *, automatic: bool = False
    ) -> list[str]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Replays:
    """Replays of one kind of events. ``act`` begins the names of its acts (``cert_event``: ``cert_event.replay``);
    ``replayable``: which events can be replayed at all; ``matching``: the conditions of a filter."""

    act: str
    events: sa.Table
    replayable: Condition
    matching: Callable[[Mapping[str, Any]], list[Condition]]
    put_back: PutBack

    async def one(
        self, tx: Tx, caller: Caller, event: str, reason: str, facts: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Apply one event again; ``None`` when it cannot be. ``facts`` are told to the log."""
        replay_id = new_id("rpl")
        if not await self.put_back(tx, [self.events.c.id == event], replay_id, 1):
            return None
        details = {"reason": reason, "replay": replay_id, **facts}
        await audit.record(tx, caller, f"{self.act}.replay", event, details=details, organization=audit.INSTALLATION)
        return {"replay": replay_id, "matched": 1, "replayed": 1, "events": [event], "dry_run": False}

    async def many(
        self, tx: Tx, caller: Caller, filters: Mapping[str, Any], reason: str, limit: int, *, dry_run: bool
    ) -> dict[str, Any]:
        """Apply events again that fit a filter, the oldest first, ``limit`` at most; or say which they would be."""
        conditions = [self.replayable, *self.matching(filters)]
        matched = int(await tx.scalar(sa.select(sa.func.count()).select_from(self.events).where(*conditions)))
        replay_id: str | None = None
        if dry_run:
            ids, replayed = await self.first(tx, conditions, min(limit, NAMED)), 0
        else:
            replay_id = new_id("rpl")
            ids = await self.put_back(tx, conditions, replay_id, limit)
            replayed = len(ids)
        shown = {name: str(value) for name, value in filters.items() if value is not None}
        answer = {
            "replay": replay_id,
            "matched": matched,
            "replayed": replayed,
            "events": ids[:NAMED],
            "dry_run": dry_run,
        }
        details = {"reason": reason, "filter": shown, **answer}
        await audit.record(
            tx, caller, f"{self.act}.replay_many", None, details=details, organization=audit.INSTALLATION
        )
        return answer

    async def first(self, reader: Reader, conditions: Sequence[Condition], limit: int) -> list[str]:
        """The ids of the oldest events that fit."""
        column = self.events.c.id
        rows = await reader.fetch_all(sa.select(column).where(*conditions).order_by(column).limit(limit))
        return [row.id for row in rows]
