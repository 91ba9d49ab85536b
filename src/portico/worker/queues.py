"""What an operator sees of the queues, and does with dead jobs. `portico admin queues` is the front of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.errors import Problem
from portico.kit import queue
from portico.kit.db import Database
from portico.kit.queue import Counts, Kind
from portico.settings import Secret, WorkerSettings
from portico.worker.runner import WORKERS

#: Who an audit row names: whoever may run programs with the database's address.
_OPERATOR = Caller("operator", "installation", None, platform_operator=True)
#: Dead jobs that one call shows or replays.
MAX_JOBS = 1000


@dataclass(frozen=True, slots=True)
class DeadJob:
    """A job that nobody will try again unless it is replayed."""

    id: str
    attempts: int
    died_at: datetime
    error: str


def kinds() -> dict[str, tuple[str, Kind]]:
    """Every kind by name, with the worker that runs it."""
    settings = WorkerSettings(database_url=Secret("unused"))
    return {job.kind.name: (worker, job.kind) for worker, make in WORKERS.items() for job in make(settings)}


def named(name: str) -> Kind:
    """The kind called so; raises ``config.invalid``."""
    known = kinds()
    if name not in known:
        raise Problem("config.invalid", f"no kind of jobs is called {name}; there are: {', '.join(known)}")
    return known[name][1]


async def listing(db: Database) -> list[tuple[str, str, Counts]]:
    """Of each kind: its name, its worker, and how many jobs there are."""
    async with db.read() as reader:
        return [(name, worker, await queue.count(reader, kind)) for name, (worker, kind) in kinds().items()]


async def dead(db: Database, kind: Kind, ids: Sequence[str] | None, error: str | None) -> list[DeadJob]:
    """The dead jobs of a kind, the longest dead first: those with these ids, whose error contains ``error``."""
    async with db.read() as reader:
        rows = await queue.dead(reader, kind, ids=_ids(kind, ids), error=error, limit=MAX_JOBS)
    return [DeadJob(str(row["id"]), row["attempts"], row["finished_at"], row["last_error"] or "") for row in rows]


async def replay(db: Database, kind: Kind, ids: Sequence[str]) -> int:
    """Let dead jobs be tried again, and record who did it; returns how many were dead."""
    async with db.transaction() as tx:
        replayed = await queue.replay(tx, kind, _ids(kind, ids) or ())
        if replayed:
            details = {"jobs": [str(each) for each in replayed]}
            await audit.record(tx, _OPERATOR, "queue.replayed", kind.name, details=details)
    return len(replayed)


def _ids(kind: Kind, ids: Sequence[str] | None) -> list[str | int] | None:
    """As the table has them; raises ``config.invalid``."""
    if ids is None or kind.table.c[kind.id_column].type.python_type is str:
        return None if ids is None else list(ids)
    try:
        return [int(each) for each in ids]
    except ValueError:
        raise Problem("config.invalid", f"jobs of {kind.name} are numbered") from None
