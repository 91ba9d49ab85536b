"""The tables of certificate events and their sources, and every query on them.

certificate_sources             who may send events, what about, and their keys
certificate_source_counts       what came of what they sent, by cluster; and when each key was used last
certificate_lifecycle_events    every verified event; the queue of the worker that applies them
certificate_effects             what events tell of, once, whoever tells it however often
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from portico.kit import queue
from portico.kit.db import Reader, Tx, metadata
from portico.kit.queue import Kind

#: The source of what this installation does itself.
PLATFORM: Final = "platform"
#: status: what has become of an event. Beside it, its row in the queue may be dead, or be tried again. What is forgotten
#: (``forgetting.py``) is not replayed.
STATUSES: Final = ("queued", "applied", "superseded", "unmapped", "unmatched", "forgotten")


def _time(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True))


def _now(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now())


def _required(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, nullable=False)


def _one_of(column: str, values: Sequence[str]) -> sa.CheckConstraint:
    return sa.CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=column)


sources = sa.Table(
    "certificate_sources",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    _required("environment"),
    sa.Column("clusters", ARRAY(sa.Text), nullable=False),
    # Networks that it sends from; empty: any.
    sa.Column("cidrs", ARRAY(sa.Text), nullable=False),
    # What it may speak about: `www.example.com`, `*.example.com` (every name below), `*` (every name).
    sa.Column("hostnames", ARRAY(sa.Text), nullable=False),
    # JSON: a list of {"id", "algorithm", "material", "created_at", "until"}, the newest first, which has no end.
    sa.Column("sealed_keys", sa.LargeBinary, nullable=False),
    # Counts every change; what was checked against one version is looked at again when it is another.
    sa.Column("version", sa.BigInteger, nullable=False, server_default="1"),
    sa.Column("state", sa.Text, nullable=False, server_default="active"),
    sa.Column("disabled_reason", sa.Text),
    _required("created_by"),
    _now("created_at"),
    _now("updated_at"),
    _one_of("state", ("active", "disabled")),
)

source_counts = sa.Table(
    "certificate_source_counts",
    metadata,
    sa.Column("source_id", sa.Text, sa.ForeignKey("certificate_sources.id", ondelete="CASCADE"), primary_key=True),
    # Empty for what was refused before its cluster was known to be true.
    sa.Column("cluster", sa.Text, primary_key=True),
    # accepted, duplicate, …, a code of a refusal, or `key:ID`.
    sa.Column("outcome", sa.Text, primary_key=True),
    sa.Column("count", sa.BigInteger, nullable=False),
    sa.Column("last_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("last_event", sa.Text),
)

events = sa.Table(
    "certificate_lifecycle_events",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _required("source_id"),
    _required("event_id"),
    _required("cluster_id"),
    _required("environment"),
    # Null until the worker found the domain that holds the name.
    sa.Column("domain_id", sa.Text),
    _required("hostname"),
    _required("callback_class"),
    _required("callback_action"),
    sa.Column("event_type", sa.Text),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("sequence", sa.BigInteger, nullable=False),
    sa.Column("occurred_at", sa.DateTime(timezone=True), nullable=False),
    _now("received_at"),
    # SHA-256 of the body as it came; the body itself is not kept.
    sa.Column("body_digest", sa.LargeBinary, nullable=False),
    _required("effect_key"),
    # Another event has told of the same effect before.
    sa.Column("repeated", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("facts", JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")),
    sa.Column("provenance", JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")),
    sa.Column("key_id", sa.Text),
    sa.Column("status", sa.Text, nullable=False, server_default="queued"),
    sa.Column("replays", sa.Integer, nullable=False, server_default="0"),
    sa.Column("automatic_replays", sa.Integer, nullable=False, server_default="0"),
    sa.Column("replay_id", sa.Text),
    _time("replayed_at"),
    *queue.columns(),
    *queue.rules("certificate_lifecycle_events"),
    sa.UniqueConstraint("source_id", "event_id"),
    _one_of("status", STATUSES),
    sa.Index("certificate_lifecycle_events_domain_id_id_ix", "domain_id", "id"),
    sa.Index("certificate_lifecycle_events_source_id_id_ix", "source_id", "id"),
    sa.Index("certificate_lifecycle_events_received_at_ix", "received_at"),
)  # fmt: skip

effects = sa.Table(
    "certificate_effects",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column(
        "event_id", sa.Text, sa.ForeignKey("certificate_lifecycle_events.id", ondelete="CASCADE"), nullable=False,
        index=True,
    ),
)  # fmt: skip

#: Numbers for events of the platform, each greater than those that were given out before.
sequence = sa.Sequence("certificate_event_sequence", metadata=metadata)

KIND: Final = Kind("certificates.events", events)

# -- taking events in ----------------------------------------------------------------------------------------------------

_COLUMNS: Final = {
    "id": "text", "source_id": "text", "event_id": "text", "cluster_id": "text", "environment": "text", "domain_id": "text",
    "hostname": "text", "callback_class": "text", "callback_action": "text", "event_type": "text", "revision": "bigint",
    "sequence": "bigint", "occurred_at": "timestamptz", "effect_key": "text", "facts": "jsonb", "provenance": "jsonb",
    "key_id": "text", "status": "text", "queue_state": "text",
}  # fmt: skip
# Rows of both tables in one order, in every transaction: two groups with the same events wait for each other, never in a circle.
_INSERT: Final = f"""
INSERT INTO certificate_lifecycle_events ({", ".join(_COLUMNS)}, body_digest, finished_at)
SELECT {", ".join(f"r.{name}" for name in _COLUMNS)}, decode(r.body_digest, 'hex'),
    CASE WHEN r.queue_state = 'done' THEN now() END
FROM jsonb_to_recordset($1::jsonb) AS r({", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())}, body_digest text)
ORDER BY r.source_id, r.event_id
ON CONFLICT (source_id, event_id) DO NOTHING RETURNING id
"""  # noqa: S608 - our own names
_KNOWN: Final = """
SELECT e.source_id, e.event_id, e.id, e.body_digest FROM certificate_lifecycle_events AS e
JOIN unnest($1::text[], $2::text[]) AS asked(source_id, event_id) USING (source_id, event_id)
"""
_EFFECTS: Final = """
INSERT INTO certificate_effects (key, event_id)
SELECT key, event_id FROM unnest($1::text[], $2::text[]) AS r(key, event_id) ORDER BY key, event_id
ON CONFLICT (key) DO NOTHING RETURNING event_id
"""


#: By (source, event): our id and the digest of the body.
Known = dict[tuple[str, str], tuple[str, str]]
# All of it at once. Only for a source that is as it was when its signature was checked, and stays so until the commit; what is
# known already tells of nothing anew. Effects come before their events, so that an event knows whether it is the first to tell
# of one.
_TAKEN: Final = {**_COLUMNS, "body_digest": "text", "source_version": "bigint"}
_AS_TEXT: Final = ("occurred_at", "facts", "provenance")  # PostgreSQL reads them
_KINDS: Final = ("text" if name in _AS_TEXT else kind for name, kind in _TAKEN.items())
_ARRAYS: Final = ", ".join(f"${number}::{kind}[]" for number, kind in enumerate(_KINDS, 1))
_WRITTEN: Final = ", ".join(f"f.{name}::{kind}" for name, kind in _COLUMNS.items())
_TAKE: Final = f"""
WITH asked AS MATERIALIZED (
    SELECT * FROM unnest({_ARRAYS}) AS r({", ".join(_TAKEN)})
), held AS MATERIALIZED (
    SELECT id, version FROM certificate_sources WHERE id IN (SELECT source_id FROM asked) AND state = 'active'
    ORDER BY id FOR SHARE
), fit AS MATERIALIZED (
    SELECT DISTINCT ON (a.source_id, a.event_id) a.* FROM asked AS a
    JOIN held AS h ON h.id = a.source_id AND h.version = a.source_version
    WHERE NOT EXISTS (SELECT FROM certificate_lifecycle_events AS e
        WHERE e.source_id = a.source_id AND e.event_id = a.event_id)
    ORDER BY a.source_id, a.event_id
), told AS (
    INSERT INTO certificate_effects (key, event_id) SELECT effect_key, id FROM fit ORDER BY effect_key, id
    ON CONFLICT (key) DO NOTHING RETURNING event_id
), put AS (
    INSERT INTO certificate_lifecycle_events ({", ".join(_COLUMNS)}, body_digest, finished_at, repeated)
    SELECT {_WRITTEN},
        decode(f.body_digest, 'hex'), CASE WHEN f.queue_state = 'done' THEN now() END,
        NOT EXISTS (SELECT FROM told AS t WHERE t.event_id = f.id)
    FROM fit AS f ORDER BY f.source_id, f.event_id
    ON CONFLICT (source_id, event_id) DO NOTHING RETURNING id, queue_state
), woken AS MATERIALIZED (
    SELECT pg_notify('{queue.CHANNEL}', '{KIND.name}')
    FROM (SELECT FROM put WHERE queue_state = 'pending' LIMIT 1) AS waits
)
SELECT a.id, h.id IS NOT NULL AS held FROM asked AS a
LEFT JOIN held AS h ON h.id = a.source_id AND h.version = a.source_version
LEFT JOIN put AS p ON p.id = a.id WHERE p.id IS NULL
UNION ALL SELECT NULL, true FROM woken
"""  # noqa: S608 - our own names


async def take(reader: Reader, rows: Sequence[tuple[Mapping[str, Any], int]]) -> dict[str, bool]:
    """Write events of sources, each with the version of its source, and what they tell of; committed when this returns.

    Of those that were not written, by id: true when the event is there already, false when its source has changed. Raises
    ``asyncpg.ForeignKeyViolationError`` when another process stored an event of the same id with another effect meanwhile.
    """
    columns: list[list[Any]] = [[row[name] for row, _ in rows] for name in _TAKEN if name != "source_version"]
    columns.append([version for _, version in rows])
    for name in ("facts", "provenance"):
        at = list(_TAKEN).index(name)
        columns[at] = [json.dumps(value) for value in columns[at]]
    found = await reader.raw.fetch(_TAKE, *columns)
    return {row["id"]: row["held"] for row in found if row["id"] is not None}


async def insert(tx: Tx, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Write events, and what they tell of; the ids of those that are new. ``body_digest`` is hexadecimal here."""
    new = {row["id"] for row in await tx.raw.fetch(_INSERT, json.dumps(rows))}
    fresh = [row for row in rows if row["id"] in new]
    if fresh:
        keys, ids = [row["effect_key"] for row in fresh], [row["id"] for row in fresh]
        first = {row["event_id"] for row in await tx.raw.fetch(_EFFECTS, keys, ids)}
        if again := [each for each in ids if each not in first]:
            await tx.raw.execute("UPDATE certificate_lifecycle_events SET repeated = true WHERE id = ANY($1)", again)
    return new


async def known(reader: Reader, pairs: Sequence[tuple[str, str]]) -> Known:
    """By (source, event): our id and the digest of the body, of those that are stored."""
    rows = await reader.raw.fetch(_KNOWN, [source for source, _ in pairs], [event for _, event in pairs])
    return {(row["source_id"], row["event_id"]): (row["id"], row["body_digest"].hex()) for row in rows}


async def versions(tx: Tx, ids: Sequence[str]) -> dict[str, int]:
    """The versions of active sources, which nobody changes until ``tx`` ends."""
    query = "SELECT id, version FROM certificate_sources WHERE id = ANY($1) AND state = 'active' ORDER BY id FOR SHARE"
    return {row["id"]: row["version"] for row in await tx.raw.fetch(query, list(ids))}


async def next_sequences(tx: Tx, count: int) -> list[int]:
    """Numbers of events of the platform, in order."""
    query = "SELECT nextval('certificate_event_sequence') AS number FROM generate_series(1, $1)"
    return sorted(row["number"] for row in await tx.raw.fetch(query, count)) if count else []


# -- reading them --------------------------------------------------------------------------------------------------------

_E = events.c


def matching(filters: Mapping[str, Any]) -> list[sa.ColumnElement[bool]]:
    """The conditions of a filter: ``source``, ``cluster``, ``callback_class``, ``state``, ``domain``, ``hostname``, ``since``,
    ``until``. What is ``None`` is not asked for."""
    given = {name: value for name, value in filters.items() if value is not None}
    columns = {
        "source": _E.source_id, "cluster": _E.cluster_id, "callback_class": _E.callback_class, "domain": _E.domain_id,
        "hostname": _E.hostname,
    }  # fmt: skip
    found: list[sa.ColumnElement[bool]] = [columns[name] == value for name, value in given.items() if name in columns]
    if "since" in given:
        found.append(_E.received_at >= given["since"])
    if "until" in given:
        found.append(_E.received_at < given["until"])
    match given.get("state"):
        case "dead":
            found.append(_E.queue_state == "dead")
        case "failed":
            found.append((_E.queue_state == "pending") & _E.last_error.is_not(None))
        case "queued":
            found.append(_E.queue_state == "pending")
        case str(status):
            found.append((_E.status == status) & (_E.queue_state == "done"))
    return found


async def listing(
    reader: Reader, filters: Mapping[str, Any], limit: int, before: str | None, *more: sa.ColumnElement[bool]
) -> Sequence[sa.Row[Any]]:
    """Events that fit, and ``more``, the newest first."""
    query = sa.select(events).where(*matching(filters), *more)
    if before is not None:
        query = query.where(_E.id < before)
    return await reader.fetch_all(query.order_by(_E.id.desc()).limit(limit))


async def one(reader: Reader, event: str) -> sa.Row[Any] | None:
    """One event."""
    return await reader.fetch_one(sa.select(events).where(_E.id == event))


async def settled(tx: Tx, event: str, status: str, domain: str | None, event_type: str | None) -> None:
    """What has become of an event."""
    values: dict[str, Any] = {"status": status, "event_type": event_type}
    if domain is not None:
        values["domain_id"] = domain
    await tx.execute(sa.update(events).where(_E.id == event).values(**values))


async def replay(
    tx: Tx, conditions: Sequence[sa.ColumnElement[bool]], replay_id: str, limit: int, *, automatic: bool = False
) -> list[str]:
    """Put events that fit, and are not on their way, into the queue again, the oldest first; their ids."""
    chosen = (
        sa.select(_E.id).where(_E.queue_state != "pending", _E.status != "forgotten", *conditions).order_by(_E.id).limit(limit)
        .with_for_update(skip_locked=True).scalar_subquery()
    )  # fmt: skip
    values = {
        "queue_state": "pending", "status": "queued", "attempts": 0, "available_at": sa.func.now(),
        "moved_at": sa.func.now(), "finished_at": None, "last_error": None, "lease_token": None, "replay_id": replay_id,
        "replayed_at": sa.func.now(), "replays": _E.replays + 1,
        "automatic_replays": _E.automatic_replays + (1 if automatic else 0),
    }  # fmt: skip
    picked = sa.any_(sa.func.array(chosen))
    rows = await tx.execute(sa.update(events).where(_E.id == picked).values(**values).returning(_E.id))
    ids = sorted(row.id for row in rows)
    if ids:
        await queue.wake(tx, KIND)
    return ids


_TROUBLES: Final = """
SELECT domain_id, revision, count(*) AS times FROM certificate_lifecycle_events
WHERE source_id = 'platform' AND domain_id = ANY($1) AND callback_class = 'replication'
    AND callback_action IN ('lagging', 'failed')
GROUP BY domain_id, revision
"""


async def troubles(reader: Reader, domains: Sequence[str]) -> dict[tuple[str, int], int]:
    """How often we told of trouble with the distribution of a certificate, by domain and revision."""
    rows = await reader.raw.fetch(_TROUBLES, list(domains)) if domains else []
    return {(row["domain_id"], row["revision"]): row["times"] for row in rows}


# -- forgetting them -----------------------------------------------------------------------------------------------------

_TOLD_OF: Final = """
SELECT id FROM custom_domains WHERE strpos(cert_applied::text, '"' || $1::text || '"') > 0 AND ($2::text IS NULL OR id = $2)
ORDER BY id LIMIT $3
"""
_OF_STATE: Final = """
SELECT * FROM certificate_lifecycle_events WHERE domain_id = $1 AND status IN ('applied', 'superseded') ORDER BY id
"""
_LAST_OF: Final = """
SELECT max(id) AS id FROM certificate_lifecycle_events WHERE domain_id = ANY($1) AND status IN ('applied', 'superseded')
GROUP BY domain_id
"""


async def heard_of(reader: Reader, source_id: str) -> bool:
    """Whether there is an event of a source."""
    return bool(await reader.scalar(sa.select(sa.exists().where(_E.source_id == source_id))))


async def told_of(reader: Reader, source_id: str, domain: str | None, limit: int) -> list[str]:
    """Ids of domains whose state knows something of a source."""
    return [row["id"] for row in await reader.raw.fetch(_TOLD_OF, source_id, domain, limit)]


async def of_state(reader: Reader, domain: str) -> Sequence[Any]:
    """Every stored event that the state of a domain is a function of."""
    rows: Sequence[Any] = await reader.raw.fetch(_OF_STATE, domain)
    return rows


async def last_of(reader: Reader, domains: Sequence[str]) -> list[str]:
    """The id of one such event of each domain that has any."""
    return [row["id"] for row in await reader.raw.fetch(_LAST_OF, list(domains))]


def chosen(source_id: str, domain: tuple[str, str] | None, from_revision: int) -> list[sa.ColumnElement[bool]]:
    """The conditions for events of a source, of one domain alone (id and name), from a revision on, that are not forgotten."""
    found = [_E.source_id == source_id, _E.revision >= from_revision, _E.status != "forgotten"]
    if domain is None:
        return found
    waits = _E.domain_id.is_(None) & (_E.hostname == domain[1])
    return [*found, (_E.domain_id == domain[0]) | waits]


async def count(reader: Reader, conditions: Sequence[sa.ColumnElement[bool]]) -> int:
    """How many events fit."""
    return int(await reader.scalar(sa.select(sa.func.count()).select_from(events).where(*conditions)))


async def forget(tx: Tx, conditions: Sequence[sa.ColumnElement[bool]]) -> int:
    """Mark events as forgotten, those that wait among them; how many. A worker that has one of them in hand loses it."""
    values = {
        "status": "forgotten", "queue_state": "done", "finished_at": sa.func.coalesce(_E.finished_at, sa.func.now()),
        "lease_token": None,
    }  # fmt: skip
    found = await tx.execute(sa.update(events).where(*conditions).values(**values).returning(_E.id))
    return len(found.all())


# -- sources -------------------------------------------------------------------------------------------------------------

_S = sources.c
_COUNT: Final = """
INSERT INTO certificate_source_counts AS c (source_id, cluster, outcome, count, last_at, last_event)
SELECT r.source_id, r.cluster, r.outcome, r.count, r.last_at, r.last_event
FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::timestamptz[], $6::text[])
    AS r(source_id, cluster, outcome, count, last_at, last_event)
WHERE EXISTS (SELECT FROM certificate_sources AS s WHERE s.id = r.source_id)
ORDER BY 1, 2, 3
ON CONFLICT (source_id, cluster, outcome) DO UPDATE SET
    count = c.count + excluded.count, last_at = greatest(c.last_at, excluded.last_at), last_event = excluded.last_event
"""


async def source(reader: Reader, source_id: str, *, lock: bool = False) -> sa.Row[Any] | None:
    """One source."""
    query = sa.select(sources).where(_S.id == source_id)
    return await reader.fetch_one(query.with_for_update() if lock else query)


async def source_listing(reader: Reader, limit: int, after: str | None) -> Sequence[sa.Row[Any]]:
    """Sources, the oldest first."""
    query = sa.select(sources)
    if after is not None:
        query = query.where(_S.id > after)
    return await reader.fetch_all(query.order_by(_S.id).limit(limit))


async def counts(reader: Reader, ids: Sequence[str]) -> Sequence[sa.Row[Any]]:
    """What came of what these sources sent."""
    t = source_counts
    query = sa.select(t).where(t.c.source_id.in_(ids)).order_by(t.c.source_id, t.c.cluster, t.c.outcome)
    return await reader.fetch_all(query)


async def add_counts(tx: Tx, rows: Sequence[tuple[str, str, str, int, datetime, str | None]]) -> None:
    """Add to the counts: source, cluster, outcome, how many more, when the last was, and which event."""
    await tx.raw.execute(_COUNT, *(list(column) for column in zip(*rows, strict=True)))


async def take_turns(tx: Tx) -> None:
    """Sources are made one at a time."""
    await tx.raw.execute("SELECT pg_advisory_xact_lock(hashtextextended('certificate sources', 0))")


async def change(tx: Tx, source_id: str, **values: Any) -> sa.Row[Any]:
    """Change a source; what was checked against it before is looked at again."""
    statement = sa.update(sources).where(_S.id == source_id)
    statement = statement.values(version=_S.version + 1, updated_at=sa.func.now(), **values)
    return (await tx.execute(statement.returning(sources))).one()
