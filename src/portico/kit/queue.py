"""Queues: a domain's table is its queue. A row carries its own lease, and nothing else is needed.

    orders = sa.Table("orders", metadata, sa.Column("id", sa.Text, primary_key=True), …, *queue.columns(), *queue.rules("orders"))
    SHIP = queue.Kind("orders.ship", orders)

    await tx.execute(orders.insert()…); await queue.wake(tx, SHIP)         # the job and the change commit together

    async def ship(work: Work) -> None:                                    # run by kit/queue_runner.py
        async with work.step() as tx: …                                    # record the intent; committed when the block ends
        async with work.call() as key: …                                   # call out with that key; no transaction is open
        async with work.done() as tx: …                                    # the result and the job's end, in one commit

A row that is ``pending`` may be claimed from ``available_at`` on. A claim counts an attempt, draws a token and moves
``available_at`` to the end of the lease, by PostgreSQL's ``now()``: a worker that dies needs no sweeping up, its jobs are simply
available again. Every later statement names the token, so whoever lost the lease changes nothing (:class:`LeaseLost`), whatever
the network did to the answer of an earlier one. After the last attempt, recorded or not, a row is ``dead`` until it is replayed.

Promised: a job is done at least once; what is written through ``step`` and ``done`` is written by a holder of the lease; what
``done`` writes, once; and turns between the lanes of a kind that has them. Not promised: order.

Locks have one order, whoever takes them: rows of domains, then rows of jobs (``enqueue`` and the like in the code of a request;
the steps of ``Work`` as the first of the last statements), then the heads of audit chains, then the edge change table.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import asyncpg
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from portico.kit.db import JOBS, Database, HasConnection, Tx, metadata, refuse_in_transaction

CHANNEL: Final = "portico_queue"
STATES: Final = ("pending", "done", "dead")
_LADDER_SPREAD: Final = 1.1
#: Characters of a job's last error that are kept.
ERROR_CHARS: Final = 500


class LeaseLost(Exception):
    """Somebody else may have the job by now. Nothing was written."""


class Retry(Exception):
    """Raised by a handler: try again after ``seconds`` (at most the kind's longest pause). It counts as an attempt."""

    def __init__(self, seconds: float, why: str) -> None:
        super().__init__(why)
        self.seconds = seconds


class Hopeless(Exception):
    """Raised by a handler: another attempt cannot help; the job is dead at once."""


# -- declarations --------------------------------------------------------------------------------------------------------


def columns() -> list[sa.Column[Any]]:
    """What makes a table a queue. A domain's own states have columns of their own."""
    when = sa.DateTime(timezone=True)
    return [
        sa.Column("queue_state", sa.Text, nullable=False, server_default="pending"),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("queued_at", when, nullable=False, server_default=sa.func.now()),
        # When it may be claimed (again): the time asked for, the end of a lease, or the end of the pause after a failure.
        sa.Column("available_at", when, nullable=False, server_default=sa.func.now()),
        # When that was decided. What was decided in the future was decided by a clock that has been set back since.
        sa.Column("moved_at", when, nullable=False, server_default=sa.func.now()),
        sa.Column("lease_token", sa.Uuid),
        sa.Column("last_error", sa.Text),
        sa.Column("finished_at", when),
    ]


def rules(table: str, *leading: str) -> list[sa.schema.SchemaItem]:
    """The check and the index of a queue; ``leading`` are the columns that tell kinds of one table apart."""
    return [
        sa.CheckConstraint("queue_state IN ('pending', 'done', 'dead')", name="queue_state"),
        sa.Index(
            f"{table}_queue_ix",
            *leading,
            "queue_state",
            "available_at",
            postgresql_where=sa.text("queue_state <> 'done'"),
        ),
    ]


def turns(table: str, lane: str, *leading: str) -> sa.Index:
    """The index of a queue whose jobs take turns (``Kind.lane``)."""
    unfinished = sa.text("queue_state = 'pending'")
    return sa.Index(f"{table}_turns_ix", *leading, lane, "available_at", postgresql_where=unfinished)


@dataclass(frozen=True, slots=True)
class Limits:
    """How a kind's jobs are run. The workers' settings fill them; a kind may differ where it says so."""

    concurrency: int = 4
    # Jobs that a process may hold beside those at work: what makes tiny jobs fast, and long ones wait in the wrong process.
    prefetch: int = 0
    lease_seconds: float = 30.0
    # One attempt may take this long; then it is cancelled, and failed.
    timeout_seconds: float = 300.0
    max_attempts: int = 8
    backoff_seconds: float = 1.0
    backoff_max_seconds: float = 300.0
    # Pauses in seconds after the first, the second… failure, instead of those that double; the last one holds for all later.
    ladder: tuple[float, ...] = ()
    # Of a kind whose jobs take turns: jobs of one lane, and of one group of lanes, that a process has in hand at most.
    lane_places: int = 4
    group_places: int = 4

    @property
    def longest(self) -> float:
        """The longest pause in seconds that there is."""
        return max(self.ladder, default=self.backoff_max_seconds) * _LADDER_SPREAD

    def pause(self, attempts: int) -> float:
        """Seconds before the next attempt: full jitter below a bound that doubles with each, or a rung of the ladder and up
        to a tenth more, so that what failed together does not come back together."""
        if self.ladder:
            rung = self.ladder[min(attempts, len(self.ladder)) - 1]
            return rung * random.uniform(1, _LADDER_SPREAD)  # noqa: S311 - jitter, no secret
        bound = min(self.backoff_max_seconds, self.backoff_seconds * 2.0 ** min(attempts - 1, 60))
        return random.uniform(0, bound)  # noqa: S311 - jitter, no secret


@dataclass(frozen=True)
class Kind:
    """Jobs of one kind: the rows of ``table`` whose columns have the values ``where``. The name is shown and never changes.

    ``lane`` names a text column. Its values are lanes, ``GROUP/…`` or ``GROUP``, and lanes take turns: a claim goes from lane to
    lane, whoever has how much in one, and neither a lane nor a group holds more than its places of a process.
    """

    name: str
    table: sa.Table
    where: Mapping[str, str] = field(default_factory=dict)
    lane: str | None = None

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def id_column(self) -> str:
        """Its primary key, which is one column."""
        (column,) = self.table.primary_key.columns
        return column.name

    @cached_property
    def sql(self) -> Statements:
        return Statements.of(self)


# -- jobs that have no table of a domain ---------------------------------------------------------------------------------

jobs = sa.Table(
    "queue_jobs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True, server_default=sa.text("gen_random_uuid()::text")),
    sa.Column("kind", sa.Text, nullable=False),
    # Of one key there is one job: asking again while it waits changes nothing, and after its end runs it again.
    sa.Column("key", sa.Text, nullable=False),
    # It was asked for while it was at work: what it has read by then may be old, so it runs once more.
    sa.Column("again", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.UniqueConstraint("kind", "key"),
    *columns(),
    *rules("queue_jobs", "kind"),
)

#: When each scheduled kind runs next; see ``queue_runner.Schedules``.
schedules = sa.Table(
    "queue_schedules",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("next_at", sa.DateTime(timezone=True), nullable=False),
)

_ENQUEUE = """
INSERT INTO queue_jobs AS j (kind, key) VALUES ($1, $2)
ON CONFLICT (kind, key) DO UPDATE SET
    again = j.queue_state = 'pending',
    attempts = CASE WHEN j.queue_state = 'pending' THEN j.attempts ELSE 0 END,
    queued_at = CASE WHEN j.queue_state = 'pending' THEN j.queued_at ELSE now() END,
    available_at = CASE WHEN j.queue_state = 'pending' THEN j.available_at ELSE now() END,
    moved_at = CASE WHEN j.queue_state = 'pending' THEN j.moved_at ELSE now() END,
    finished_at = NULL,
    queue_state = 'pending'
WHERE j.queue_state <> 'pending' OR j.lease_token IS NOT NULL
"""


def plain(name: str) -> Kind:
    """A kind of ``queue_jobs``."""
    return Kind(name, jobs, {"kind": name})


async def enqueue(tx: Tx, kind: Kind, key: str = "") -> None:
    """Ask for a job of a ``plain`` kind. One that waits already counts as asked for; one that is at work runs once more after."""
    await tx.raw.execute(_ENQUEUE, kind.name, key)
    await wake(tx, kind)


async def wake(tx: Tx, kind: Kind) -> None:
    """Tell the workers, when ``tx`` commits, that there is something of ``kind``. Without it they find it by looking."""
    await tx.raw.execute("SELECT pg_notify($1, $2)", CHANNEL, kind.name)


# -- statements ----------------------------------------------------------------------------------------------------------

_DUE = """
    SELECT {id} FROM {table}
    WHERE queue_state = 'pending' AND available_at <= now() AND (lease_token IS NOT NULL) = $4 {where}
    ORDER BY available_at LIMIT $1 FOR UPDATE SKIP LOCKED
"""
# From lane to lane by the index, one probe each, however many jobs a lane has; PostgreSQL goes on only while rows are wanted.
# $5: the lane after which to begin; $6: jobs of each; $7, $8: lanes and groups that have their places already.
_DUE_BY_TURNS = """
    WITH RECURSIVE lanes AS (
        (SELECT t.{lane} AS lane FROM {table} AS t
        WHERE t.queue_state = 'pending' AND t.{lane} > $5 {where} ORDER BY t.{lane} LIMIT 1)
        UNION ALL
        SELECT (SELECT t.{lane} FROM {table} AS t
            WHERE t.queue_state = 'pending' AND t.{lane} > lanes.lane {where} ORDER BY t.{lane} LIMIT 1)
        FROM lanes WHERE lanes.lane IS NOT NULL
    )
    SELECT job.{id} FROM lanes CROSS JOIN LATERAL (
        SELECT t.{id} FROM {table} AS t
        WHERE t.queue_state = 'pending' AND t.{lane} = lanes.lane AND t.available_at <= now()
            AND (t.lease_token IS NOT NULL) = $4 {where}
        ORDER BY t.available_at LIMIT $6 FOR UPDATE SKIP LOCKED
    ) AS job
    WHERE lanes.lane <> ALL($7::text[]) AND split_part(lanes.lane, '/', 1) <> ALL($8::text[])
    LIMIT $1
"""
_CLAIM = """
WITH due AS MATERIALIZED ({due})
UPDATE {table} AS j SET
    queue_state = CASE WHEN j.attempts >= $3 THEN 'dead' ELSE 'pending' END,
    finished_at = CASE WHEN j.attempts >= $3 THEN now() END,
    last_error = CASE WHEN j.attempts >= $3 AND $4 THEN 'the worker ended during the last attempt' ELSE j.last_error END,
    lease_token = CASE WHEN j.attempts >= $3 THEN NULL ELSE gen_random_uuid() END,
    attempts = CASE WHEN j.attempts >= $3 THEN j.attempts ELSE j.attempts + 1 END,
    available_at = now() + make_interval(secs => $2), moved_at = now() {asked}
FROM due WHERE j.{id} = due.{id}
RETURNING j.*
"""
_SUSPECTS = """
SELECT EXISTS (SELECT FROM {table}
    WHERE queue_state = 'pending' AND available_at <= now() AND lease_token IS NOT NULL {where})
"""
_HOLD = """
UPDATE {table} SET available_at = clock_timestamp() + make_interval(secs => $3), moved_at = clock_timestamp()
WHERE {id} = $1 AND lease_token = $2 AND queue_state = 'pending'
"""
_DONE = """
UPDATE {table} AS j SET {done}
WHERE {id} = $1 AND lease_token = $2 AND queue_state = 'pending'
"""
_DONE_MANY = """
UPDATE {table} AS j SET {done}
FROM unnest($1::{type}[], $2::uuid[]) AS held(id, token)
WHERE j.{id} = held.id AND j.lease_token = held.token AND j.queue_state = 'pending'
RETURNING j.{id} AS id
"""
# What the end of a job sets; and of one that may have been asked for again meanwhile: that is a new one.
_ENDED = "queue_state = 'done', lease_token = NULL, last_error = NULL, finished_at = clock_timestamp()"
_ENDED_OR_ASKED = """
    queue_state = CASE WHEN j.again THEN 'pending' ELSE 'done' END,
    finished_at = CASE WHEN j.again THEN NULL ELSE clock_timestamp() END,
    attempts = CASE WHEN j.again THEN 0 ELSE j.attempts END,
    available_at = CASE WHEN j.again THEN clock_timestamp() ELSE j.available_at END,
    moved_at = clock_timestamp(), lease_token = NULL, last_error = NULL, again = false
"""
_FAIL = """
UPDATE {table} AS j SET
    queue_state = CASE WHEN $5 AND NOT {again} THEN 'dead' ELSE 'pending' END,
    finished_at = CASE WHEN $5 AND NOT {again} THEN now() END,
    attempts = CASE WHEN $5 AND {again} THEN 0 ELSE j.attempts END,
    available_at = now() + CASE WHEN $5 AND {again} THEN interval '0' ELSE make_interval(secs => $3) END,
    lease_token = NULL, last_error = $4, moved_at = now() {asked}
WHERE {id} = $1 AND lease_token = $2 AND queue_state = 'pending'
"""
_GIVE_BACK = """
UPDATE {table} AS j SET attempts = greatest(0, j.attempts - 1), lease_token = NULL, available_at = now(), moved_at = now() {asked}
FROM unnest($1::{type}[], $2::uuid[]) AS held(id, token)
WHERE j.{id} = held.id AND j.lease_token = held.token AND j.queue_state = 'pending'
"""
# A row that a step of its own holder has locked is skipped: the step prolongs the lease when it commits.
_RENEW = """
WITH mine AS MATERIALIZED (
    SELECT j.{id} FROM {table} AS j JOIN unnest($1::{type}[], $2::uuid[]) AS held(id, token)
    ON j.{id} = held.id AND j.lease_token = held.token
    WHERE j.queue_state = 'pending' FOR UPDATE OF j SKIP LOCKED
)
UPDATE {table} AS j SET available_at = now() + make_interval(secs => $3), moved_at = now() FROM mine WHERE j.{id} = mine.{id}
"""
_LOST = """
SELECT held.id FROM unnest($1::{type}[], $2::uuid[]) AS held(id, token)
WHERE NOT EXISTS (SELECT FROM {table} AS j WHERE j.{id} = held.id AND j.lease_token = held.token)
"""
# What was decided in the future was decided by PostgreSQL's clock before it was set back: the same time from now on is meant.
_MEND = """
UPDATE {table} SET available_at = now() + (available_at - moved_at), moved_at = now()
WHERE queue_state = 'pending' AND available_at > now() AND moved_at > now() + interval '1 s' {where}
"""
_COUNT = """
SELECT count(*) FILTER (WHERE queue_state = 'pending' AND lease_token IS NULL AND available_at <= now()) AS waiting,
    count(*) FILTER (WHERE queue_state = 'pending' AND lease_token IS NULL AND available_at > now()) AS later,
    count(*) FILTER (WHERE queue_state = 'pending' AND lease_token IS NOT NULL) AS leased,
    count(*) FILTER (WHERE queue_state = 'dead') AS dead,
    coalesce(extract(epoch FROM now() - min(available_at) FILTER (WHERE queue_state = 'pending')), 0)::float8 AS age
FROM {table} WHERE queue_state <> 'done' {where}
"""
_DEAD = """
SELECT {id} AS id, attempts, finished_at, last_error FROM {table}
WHERE queue_state = 'dead' {where} AND ($1::{type}[] IS NULL OR {id} = ANY($1::{type}[]))
    AND ($2::text IS NULL OR strpos(last_error, $2) > 0)
ORDER BY finished_at LIMIT $3
"""
_REPLAY = """
UPDATE {table} SET queue_state = 'pending', attempts = 0, available_at = now(), moved_at = now(), finished_at = NULL
WHERE queue_state = 'dead' AND {id} = ANY($1::{type}[]) {where} RETURNING {id} AS id
"""


@dataclass(frozen=True, slots=True)
class Statements:
    """The texts above for one kind. Names and values are the code's own, never a caller's."""

    claim: str
    suspects: str
    hold: str
    done: str
    done_many: str
    fail: str
    give_back: str
    renew: str
    lost: str
    mend: str
    count: str
    dead: str
    replay: str

    @classmethod
    def of(cls, kind: Kind) -> Statements:
        dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
        quote = dialect.identifier_preparer.quote
        plain = "again" in kind.table.c
        words = {
            "table": quote(kind.table.name),
            "id": quote(kind.id_column),
            "type": kind.table.c[kind.id_column].type.compile(dialect=dialect),
            "where": "".join(f"AND {quote(name)} = '{_word(value)}' " for name, value in kind.where.items()),
            "lane": quote(kind.lane or ""),
            "again": "j.again" if plain else "false",
            "asked": ", again = false" if plain else "",
            "done": _ENDED_OR_ASKED.strip() if plain else _ENDED,
        }
        words["due"] = (_DUE if kind.lane is None else _DUE_BY_TURNS).format(**words)
        texts = (
            _CLAIM,
            _SUSPECTS,
            _HOLD,
            _DONE,
            _DONE_MANY,
            _FAIL,
            _GIVE_BACK,
            _RENEW,
            _LOST,
            _MEND,
            _COUNT,
            _DEAD,
            _REPLAY,
        )
        return cls(*(text.format(**words) for text in texts))


def _word(value: str) -> str:
    if not all(c.isascii() and (c.isalnum() or c in "._-") for c in value):
        raise ValueError(f"{value!r} cannot tell kinds apart: letters, digits, dots, hyphens and underscores")
    return value


# -- one job in hand -----------------------------------------------------------------------------------------------------


class Work:
    """A claimed job: its row, and the three things that its handler does with it. ``attempt`` counts from 1."""

    __slots__ = ("attempt", "db", "finished", "id", "kind", "limits", "lost", "row", "token")

    def __init__(self, kind: Kind, limits: Limits, db: Database, row: asyncpg.Record) -> None:
        self.kind, self.limits, self.db = kind, limits, db
        self.row: Mapping[str, Any] = row
        self.id: Any = row[kind.id_column]
        self.token: uuid.UUID = row["lease_token"]
        self.attempt: int = row["attempts"]
        self.finished = self.lost = False

    @asynccontextmanager
    async def step(self) -> AsyncIterator[Tx]:
        """One transaction, which commits only while the lease is ours, and prolongs it. Raises :class:`LeaseLost`."""
        async with self.db.transaction() as tx:
            tx.before_commit(lambda: self._only(tx, self.kind.sql.hold, self.limits.lease_seconds), order=JOBS)
            yield tx

    @asynccontextmanager
    async def done(self) -> AsyncIterator[Tx]:
        """The last transaction: what is written in it and the end of the job become visible together, or not at all."""
        async with self.db.transaction() as tx:
            tx.before_commit(lambda: self._only(tx, self.kind.sql.done), order=JOBS)
            yield tx
        self.finished = True

    @asynccontextmanager
    async def call(self) -> AsyncIterator[str]:
        """Around a call out: yields the key under which every attempt makes it. Raises when a transaction is open."""
        refuse_in_transaction()
        yield f"{self.kind.name}:{self.id}"

    async def _only(self, tx: Tx, statement: str, *more: float) -> None:
        if await tx.raw.execute(statement, self.id, self.token, *more) != "UPDATE 1":
            raise LeaseLost(f"{self.kind.name} {self.id}")


# -- what the runner does; each is one statement, and so one transaction of its own --------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """Where a claim of a kind with lanes begins, how many jobs it takes of each, and which lanes and groups it passes over."""

    after: str = ""
    each: int = 1
    full_lanes: Sequence[str] = ()
    full_groups: Sequence[str] = ()


async def claim(
    db: Database, kind: Kind, limits: Limits, count: int, *, suspect: bool = False, turn: Turn | None = None
) -> tuple[list[Work], list[asyncpg.Record]]:
    """Up to ``count`` due jobs, leased; and those that turned out to be dead, since no attempt was left.

    A suspect is a job whose last attempt was never recorded: it may be what ended its worker.
    """
    more: tuple[Any, ...] = ()
    if kind.lane is not None:
        at = turn or Turn(each=count)
        more = (at.after, at.each, list(at.full_lanes), list(at.full_groups))
    async with db.read() as reader:
        rows = await reader.raw.fetch(kind.sql.claim, count, limits.lease_seconds, limits.max_attempts, suspect, *more)
    live = [Work(kind, limits, db, row) for row in rows if row["lease_token"] is not None]
    return live, [row for row in rows if row["lease_token"] is None]


async def suspects(db: Database, kind: Kind) -> bool:
    """Whether a suspect waits."""
    async with db.read() as reader:
        return bool(await reader.raw.fetchval(kind.sql.suspects))


async def finish(db: Database, kind: Kind, held: Sequence[Work]) -> set[Any]:
    """End jobs that wrote nothing themselves; returns the ids of those that were still ours."""
    async with db.read() as reader:
        return {row["id"] for row in await reader.raw.fetch(kind.sql.done_many, *_leases(held))}


async def fail(work: Work, error: str, pause: float, *, dead: bool) -> bool:
    """Record a failed attempt; false when the job is not ours any more, or was finished after all."""
    async with work.db.read() as reader:
        text = error.replace("\0", "\\0")[:ERROR_CHARS]
        status = await reader.raw.execute(work.kind.sql.fail, work.id, work.token, pause, text, dead)
    return bool(status == "UPDATE 1")


async def give_back(db: Database, kind: Kind, held: Sequence[Work]) -> None:
    """Let others have jobs at once, as if they had not been claimed."""
    async with db.read() as reader:
        await reader.raw.execute(kind.sql.give_back, *_leases(held))


async def renew(db: Database, kind: Kind, limits: Limits, held: Sequence[Work]) -> set[Any]:
    """Prolong leases; returns the ids of jobs that are not ours any more."""
    async with db.read() as reader:
        await reader.raw.execute(kind.sql.renew, *_leases(held), limits.lease_seconds)
        return {row["id"] for row in await reader.raw.fetch(kind.sql.lost, *_leases(held))}


async def mend(db: Database, kind: Kind) -> int:
    """Make jobs available in time that PostgreSQL's clock, set back, would hold for longer; returns how many."""
    async with db.read() as reader:
        status = await reader.raw.execute(kind.sql.mend)
    return int(status.rpartition(" ")[2])


def _leases(held: Sequence[Work]) -> tuple[list[Any], list[uuid.UUID]]:
    return [work.id for work in held], [work.token for work in held]


# -- what an operator does -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counts:
    """A kind at one moment: jobs that are due, that wait for their time, in hand, and dead; seconds that the oldest is late."""

    waiting: int
    later: int
    leased: int
    dead: int
    oldest_seconds: float


async def count(reader: HasConnection, kind: Kind) -> Counts:
    """How many jobs there are."""
    row = await reader.raw.fetchrow(kind.sql.count)
    return Counts(row["waiting"], row["later"], row["leased"], row["dead"], max(0.0, row["age"]))


async def dead(
    reader: HasConnection, kind: Kind, *, ids: Sequence[Any] | None = None, error: str | None = None, limit: int = 100
) -> list[asyncpg.Record]:
    """Dead jobs, the longest dead first: of these ``ids``, whose last error contains ``error``. What a replay would take."""
    found: list[asyncpg.Record] = await reader.raw.fetch(kind.sql.dead, ids, error, limit)
    return found


async def replay(tx: Tx, kind: Kind, ids: Sequence[Any]) -> list[Any]:
    """Give dead jobs all their attempts again; returns the ids of those that were dead. The caller writes the audit row."""
    rows = await tx.raw.fetch(kind.sql.replay, list(ids))
    if rows:
        await wake(tx, kind)
    return [row["id"] for row in rows]
