"""The tables of providers' webhooks, and every query on them.

billing_webhook_events          every event that a provider told us of; the queue of the worker that applies them
billing_webhook_certificates    PayPal's certificates, once they were fetched and found good
billing_webhook_health          by provider: how the queue was when it was last looked at, and the last automatic replay
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as pg_insert

from portico.kit import queue
from portico.kit.batches import ROWS
from portico.kit.db import JOBS, Reader, Tx, metadata
from portico.kit.queue import Kind

#: status: what has become of an event. Beside it, its row in the queue may be dead, or be tried again (`failed`).
STATUSES: Final = ("received", "verified", "applied", "ignored")
#: How an event came here: the provider posted it, or its list had it and nobody had posted it.
ORIGINS: Final = ("webhook", "reconcile")
#: Why an event is dead that waited for its base: no fault of ours or of the provider's, as others are.
WAITED: Final = "waited"


def _required(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, nullable=False)


def _time(name: str, *, nullable: bool = True) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _one_of(column: str, values: Sequence[str]) -> sa.CheckConstraint:
    return sa.CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=column)


_PROVEN: Final = sa.text("proven")

events = sa.Table(
    "billing_webhook_events",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _required("provider"),
    _required("account"),
    sa.Column("livemode", sa.Boolean, nullable=False),
    # The provider's id of the event, its type, and when it says that it happened.
    _required("event_id"),
    _required("event_type"),
    sa.Column("api_version", sa.Text),
    _time("occurred_at", nullable=False),
    sa.Column("received_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.Column("origin", sa.Text, nullable=False, server_default="webhook"),
    # SHA-256 of the body as it came; the body itself, sealed, until it is deleted.
    sa.Column("raw_sha256", sa.LargeBinary, nullable=False),
    sa.Column("sealed_body", sa.LargeBinary),
    # Whether a signature (or the provider's own list) vouches for it. What nothing vouches for holds nobody's id.
    sa.Column("proven", sa.Boolean, nullable=False),
    # PayPal: its delivery, and the headers that its signature is checked by while its certificate is fetched.
    sa.Column("transmission_id", sa.Text),
    sa.Column("transmission", JSONB(none_as_null=True)),
    # The network that it came from, while nothing vouches for it.
    sa.Column("source", sa.Text),
    # What vouches for it: `current` or `old` secret, a certificate, the provider's `list`.
    sa.Column("proof", sa.Text),
    sa.Column("status", sa.Text, nullable=False),
    # Why it was ignored.
    sa.Column("reason", sa.Text),
    # Whose turn it is applied in: a provider that does not answer, or what nothing vouches for, holds up itself alone.
    sa.Column("lane", sa.Text(collation="C"), nullable=False),
    # How many effects it had.
    sa.Column("effects", sa.Integer, nullable=False, server_default="0"),
    sa.Column("replays", sa.Integer, nullable=False, server_default="0"),
    sa.Column("automatic_replays", sa.Integer, nullable=False, server_default="0"),
    sa.Column("replay_id", sa.Text),
    _time("replayed_at"),
    *queue.columns(),
    *queue.rules("billing_webhook_events"),
    queue.turns("billing_webhook_events", "lane"),
    _one_of("provider", ("stripe", "razorpay", "paypal")),
    _one_of("status", STATUSES),
    _one_of("origin", ORIGINS),
    # Of one event, of one body and of one delivery there is one row.
    sa.Index("billing_webhook_events_event_ix", "provider", "account", "livemode", "event_id", unique=True,
             postgresql_where=_PROVEN),
    sa.Index("billing_webhook_events_body_ix", "raw_sha256", unique=True, postgresql_where=_PROVEN),
    sa.Index("billing_webhook_events_transmission_ix", "provider", "transmission_id", unique=True,
             postgresql_where=_PROVEN),
    sa.Index("billing_webhook_events_unproven_ix", "source", postgresql_where=sa.text("NOT proven AND status = 'received'")),
    sa.Index("billing_webhook_events_provider_received_at_ix", "provider", "received_at"),
    sa.Index("billing_webhook_events_provider_finished_at_ix", "provider", "finished_at"),
    sa.Index("billing_webhook_events_received_at_ix", "received_at"),
)  # fmt: skip

certificates = sa.Table(
    "billing_webhook_certificates",
    metadata,
    sa.Column("url", sa.Text, primary_key=True),
    _required("pem"),
    _time("not_after", nullable=False),
    sa.Column("fetched_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
)

health = sa.Table(
    "billing_webhook_health",
    metadata,
    sa.Column("provider", sa.Text, primary_key=True),
    _time("measured_at", nullable=False),
    # Of the window: events that were given up or failed; that wait for too long; seconds from receipt to effect.
    sa.Column("failed", sa.Integer, nullable=False),
    sa.Column("stale", sa.Integer, nullable=False),
    sa.Column("p95_seconds", sa.Float),
    sa.Column("applied", sa.Integer, nullable=False),
    # Since when the objective is broken; null while it is met.
    _time("broken_since"),
    sa.Column("broken_by", sa.Text),
    # The last replay that was started by itself.
    _time("replayed_at"),
    sa.Column("replays", sa.Integer, nullable=False, server_default="0"),
)

KIND: Final = Kind("billing.webhooks", events, lane="lane")

# -- taking events in ----------------------------------------------------------------------------------------------------

_COLUMNS: Final = {
    "id": "text", "provider": "text", "account": "text", "livemode": "boolean", "event_id": "text", "event_type": "text",
    "api_version": "text", "occurred_at": "timestamptz", "received_at": "timestamptz", "origin": "text",
    "raw_sha256": "bytea", "sealed_body": "bytea", "proven": "boolean", "transmission_id": "text", "transmission": "text",
    "source": "text", "proof": "text", "status": "text", "reason": "text", "lane": "text",
    "queue_state": "text",
}  # fmt: skip
# Rows in one order, in every transaction: two groups with the same events wait for each other, never in a circle.
_INSERT: Final = f"""
INSERT INTO billing_webhook_events ({", ".join(_COLUMNS)}, finished_at)
SELECT {", ".join(f"r.{name}" + ("::jsonb" if name == "transmission" else "") for name in _COLUMNS)},
    CASE WHEN r.queue_state = 'done' THEN now() END
FROM unnest({", ".join(f"${at}::{kind}[]" for at, kind in enumerate(_COLUMNS.values(), 1))}) AS r({", ".join(_COLUMNS)})
ORDER BY r.provider, r.account, r.livemode, r.event_id, r.raw_sha256
ON CONFLICT DO NOTHING RETURNING id
"""  # noqa: S608 - our own names
# Three looks, an index for each: one condition with OR would be a look through all events.
_RIVALS: Final = """
WITH asked AS (
    SELECT * FROM unnest($1::int[], $2::text[], $3::text[], $4::boolean[], $5::text[], $6::bytea[], $7::text[])
    AS asked(place, provider, account, livemode, event_id, raw_sha256, transmission_id)
)
SELECT place, e.id, e.raw_sha256, e.origin FROM asked
JOIN billing_webhook_events AS e USING (provider, account, livemode, event_id) WHERE e.proven
UNION
SELECT place, e.id, e.raw_sha256, e.origin FROM asked
JOIN billing_webhook_events AS e ON e.raw_sha256 = asked.raw_sha256 WHERE e.proven
UNION
SELECT place, e.id, e.raw_sha256, e.origin FROM asked
JOIN billing_webhook_events AS e ON e.provider = asked.provider AND e.transmission_id = asked.transmission_id WHERE e.proven
"""
#: Any number that no other advisory lock of the project uses.
_UNPROVEN_LOCK: Final = 0x7765_6268_6F6F_6B73


_UNPROVEN: Final = """
SELECT source, count(*) AS count FROM billing_webhook_events WHERE NOT proven AND status = 'received' GROUP BY source
"""


async def insert(tx: Tx, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Write events; the ids of those that are new."""
    columns = [[row[name] for row in rows] for name in _COLUMNS]
    return {row["id"] for row in await tx.raw.fetch(_INSERT, *columns)}


async def rivals(reader: Reader, rows: Sequence[Mapping[str, Any]]) -> dict[int, list[tuple[str, bytes, str]]]:
    """By place in ``rows``: id, digest and origin of stored events that have the same id, body or delivery."""
    names = ("provider", "account", "livemode", "event_id", "raw_sha256", "transmission_id")
    columns = [[row[name] for row in rows] for name in names]
    found: dict[int, list[tuple[str, bytes, str]]] = {}
    for row in await reader.raw.fetch(_RIVALS, list(range(len(rows))), *columns):
        found.setdefault(row["place"], []).append((row["id"], bytes(row["raw_sha256"]), row["origin"]))
    return found


async def unproven(tx: Tx, sources: Sequence[str]) -> tuple[dict[str, int], int]:
    """How many events wait that nothing vouches for yet: by source, and in all. Nobody adds any until ``tx`` ends."""
    await tx.raw.execute("SELECT pg_advisory_xact_lock($1)", _UNPROVEN_LOCK)
    rows = {row["source"]: row["count"] for row in await tx.raw.fetch(_UNPROVEN)}
    return {source: rows.get(source, 0) for source in sources}, sum(rows.values())


# -- what becomes of them ------------------------------------------------------------------------------------------------

_E = events.c


async def prove(tx: Tx, event: str, proof: str, transmission_id: str) -> bool:
    """A signature vouches for ``event``: it holds its id from now on. False: another row does."""
    try:
        async with tx.savepoint():
            values = {"proven": True, "proof": proof, "transmission_id": transmission_id, "source": None}
            await tx.execute(sa.update(events).where(_E.id == event).values(**values))
    except sa.exc.IntegrityError:
        return False
    return True


async def settled(tx: Tx, event: str, status: str, reason: str | None, effects: int = 0) -> None:
    """What has become of an event."""
    values = {"status": status, "reason": reason, "effects": effects, "transmission": None}
    await tx.execute(sa.update(events).where(_E.id == event).values(**values))


_CAME = """
UPDATE billing_webhook_events SET status = 'applied', reason = NULL, effects = effects + 1
WHERE provider = $1 AND account = $2 AND livemode = $3 AND event_id = $4 AND proven AND queue_state = 'done'
"""
_GIVEN_UP = """
UPDATE billing_webhook_events SET queue_state = 'dead', reason = $5, last_error = $6, finished_at = now()
WHERE provider = $1 AND account = $2 AND livemode = $3 AND event_id = $4 AND proven AND queue_state = 'done'
"""


def came(tx: Tx, provider: str, account: str, livemode: bool, event_id: str) -> None:
    """What an event had waited for is there, and it is applied in ``tx``."""

    async def step() -> None:
        await tx.raw.execute(_CAME, provider, account, livemode, event_id)

    tx.before_commit(step, order=JOBS)


async def given_up(tx: Tx, row: Mapping[str, Any], why: str) -> None:
    """An event (``provider, account, livemode, event_id``) has waited for too long. It is dead, until it is replayed."""
    await tx.raw.execute(
        _GIVEN_UP, row["provider"], row["account"], row["livemode"], row["event_id"], WAITED, why[: queue.ERROR_CHARS]
    )


async def verified(tx: Tx, event: str) -> None:
    """It is known to be the provider's, and its objects were fetched."""
    await tx.execute(sa.update(events).where(_E.id == event).values(status="verified"))


async def disown(tx: Tx, event: str, reason: str) -> None:
    """It was not the provider's after all: it holds no id, and its body is nothing to keep."""
    values = {
        "status": "ignored",
        "reason": reason,
        "proven": False,
        "sealed_body": None,
        "transmission": None,
        "source": None,
    }
    await tx.execute(sa.update(events).where(_E.id == event).values(**values))


# -- reading them --------------------------------------------------------------------------------------------------------


def matching(filters: Mapping[str, Any]) -> list[sa.ColumnElement[bool]]:
    """The conditions of a filter: ``provider``, ``event_type`` (``PREFIX*`` for a class), ``event_id``, ``state``, ``reason``,
    ``error``, ``since``, ``until``. What is ``None`` is not asked for."""
    given = {name: value for name, value in filters.items() if value is not None}
    columns = {"provider": _E.provider, "event_id": _E.event_id, "reason": _E.reason}
    found: list[sa.ColumnElement[bool]] = [columns[name] == value for name, value in given.items() if name in columns]
    if "event_type" in given:
        wanted: str = given["event_type"]
        prefix = _E.event_type.startswith(wanted[:-1], autoescape=True)
        found.append(prefix if wanted.endswith("*") else _E.event_type == wanted)
    if "error" in given:
        found.append(_E.last_error.contains(given["error"], autoescape=True))
    if "since" in given:
        found.append(_E.received_at >= given["since"])
    if "until" in given:
        found.append(_E.received_at < given["until"])
    match given.get("state"):
        case "dead":
            found.append(_E.queue_state == "dead")
        case "failed":
            found.append((_E.queue_state == "pending") & _E.last_error.is_not(None))
        case "received" | "verified" as status:
            found.append((_E.status == status) & (_E.queue_state == "pending") & _E.last_error.is_(None))
        case str(status):
            found.append((_E.status == status) & (_E.queue_state == "done"))
    return found


_SHOWN: Final = [column for column in events.c if column.name not in ("sealed_body", "transmission")]


async def listing(reader: Reader, filters: Mapping[str, Any], limit: int, before: str | None) -> Sequence[sa.Row[Any]]:
    """Events that fit, the newest first, without their bodies."""
    query = sa.select(*_SHOWN).where(*matching(filters))
    if before is not None:
        query = query.where(_E.id < before)
    return await reader.fetch_all(query.order_by(_E.id.desc()).limit(limit))


async def one(reader: Reader, event: str, *, lock: bool = False) -> sa.Row[Any] | None:
    """One event, without its body."""
    query = sa.select(*_SHOWN).where(_E.id == event)
    return await reader.fetch_one(query.with_for_update() if lock else query)


async def sealed(reader: Reader, event: str) -> bytes | None:
    """The body of an event, while it is kept."""
    found = await reader.scalar(sa.select(_E.sealed_body).where(_E.id == event))
    return None if found is None else bytes(found)


#: What can be applied again: whose body is still here, unless it was found to be nobody's.
REPLAYABLE: Final = (
    (_E.queue_state != "pending") & _E.sealed_body.is_not(None) & (_E.proven | (_E.status == "received"))
)


async def replay(
    tx: Tx, conditions: Sequence[sa.ColumnElement[bool]], replay_id: str, limit: int, *, automatic: bool = False
) -> list[str]:
    """Put events that fit, and are not on their way, into the queue again, the oldest first; their ids."""
    chosen = (
        sa.select(_E.id).where(REPLAYABLE, *conditions).order_by(_E.id).limit(limit).with_for_update(skip_locked=True)
        .scalar_subquery()
    )  # fmt: skip
    values = {
        "queue_state": "pending", "status": sa.case((_E.proven, "verified"), else_="received"), "reason": None,
        "attempts": 0, "available_at": sa.func.now(),
        "moved_at": sa.func.now(), "queued_at": sa.func.now(), "finished_at": None, "last_error": None, "lease_token": None,
        "replay_id": replay_id, "replayed_at": sa.func.now(), "replays": _E.replays + 1,
        "automatic_replays": _E.automatic_replays + (1 if automatic else 0),
    }  # fmt: skip
    picked = sa.any_(sa.func.array(chosen))
    rows = await tx.execute(sa.update(events).where(_E.id == picked).values(**values).returning(_E.id))
    ids = sorted(row.id for row in rows)
    if ids:
        await queue.wake(tx, KIND)
    return ids


async def hurry(tx: Tx, provider: str, limit: int) -> int:
    """Let events that failed be tried now instead of after their pause; how many they were."""
    late = (
        sa.select(_E.id)
        .where(
            _E.provider == provider, _E.queue_state == "pending", _E.last_error.is_not(None), _E.lease_token.is_(None),
            _E.available_at > sa.func.now(),
        )
        .order_by(_E.id).limit(limit).with_for_update(skip_locked=True).scalar_subquery()
    )  # fmt: skip
    values = {"available_at": sa.func.now(), "moved_at": sa.func.now()}
    result = await tx.execute(sa.update(events).where(_E.id == sa.any_(sa.func.array(late))).values(**values))
    if result.rowcount:
        await queue.wake(tx, KIND)
    return int(result.rowcount)


# -- PayPal's certificates -----------------------------------------------------------------------------------------------


async def known_certificates(reader: Reader) -> Sequence[sa.Row[Any]]:
    """Every certificate that was fetched."""
    return await reader.fetch_all(sa.select(certificates))


async def keep_certificate(tx: Tx, url: str, pem: str, not_after: datetime) -> None:
    """Remember a certificate; at one address there is one for ever."""
    statement = pg_insert(certificates).values(url=url, pem=pem, not_after=not_after)
    values = {"pem": pem, "not_after": not_after, "fetched_at": sa.func.now()}
    await tx.execute(statement.on_conflict_do_update(index_elements=["url"], set_=values))


# -- how it goes ---------------------------------------------------------------------------------------------------------

_MEASURE: Final = """
SELECT
    count(*) FILTER (WHERE (queue_state = 'dead' AND finished_at > now() - make_interval(secs => $2)
            AND reason IS DISTINCT FROM 'waited')
        OR (queue_state = 'pending' AND last_error IS NOT NULL)) AS failed,
    count(*) FILTER (WHERE queue_state = 'pending' AND queued_at < now() - make_interval(secs => $3)) AS stale,
    count(*) FILTER (WHERE queue_state = 'done' AND finished_at > now() - make_interval(secs => $2)) AS applied,
    percentile_cont(0.95) WITHIN GROUP (ORDER BY extract(epoch FROM finished_at - queued_at)::float8)
        FILTER (WHERE queue_state = 'done' AND status = 'applied' AND finished_at > now() - make_interval(secs => $2)) AS p95
FROM billing_webhook_events
WHERE provider = $1 AND (queue_state <> 'done' OR finished_at > now() - make_interval(secs => $2))
"""


async def measure(reader: Reader, provider: str, window: float, stale: float) -> Mapping[str, Any]:
    """How the events of a provider fare: ``failed``, ``stale``, ``applied`` and ``p95`` (seconds, or ``None``)."""
    found: Mapping[str, Any] = await reader.raw.fetchrow(_MEASURE, provider, window, stale)
    return found


async def health_of(reader: Reader, provider: str) -> sa.Row[Any] | None:
    """How a provider's events were when they were last looked at."""
    return await reader.fetch_one(sa.select(health).where(health.c.provider == provider))


async def all_health(reader: Reader) -> Sequence[sa.Row[Any]]:
    """The same of every provider."""
    return await reader.fetch_all(sa.select(health).order_by(health.c.provider))


_STANDING: Final = """
SELECT h.provider, h.failed, h.stale, h.p95_seconds,
    CASE WHEN h.broken_since IS NULL THEN 0
        ELSE greatest(0, extract(epoch FROM clock_timestamp() - h.broken_since)) END::float8 AS broken_seconds,
    greatest(0, extract(epoch FROM clock_timestamp() - h.measured_at))::float8 AS age_seconds,
    (SELECT count(*) FROM billing_webhook_events AS e WHERE e.provider = h.provider AND e.queue_state = 'dead'
        AND e.reason IS DISTINCT FROM 'waited') AS dead
FROM billing_webhook_health AS h ORDER BY h.provider
"""


async def standing(reader: Reader) -> Sequence[Mapping[str, Any]]:
    """How the events of every provider were when they were last looked at, how long ago that was, and how many are dead now."""
    found: Sequence[Mapping[str, Any]] = await reader.raw.fetch(_STANDING)
    return found


async def note_health(tx: Tx, row: Mapping[str, Any]) -> sa.Row[Any]:
    """Write down how a provider's events fare; its row, which is locked until ``tx`` ends."""
    statement = pg_insert(health).values(**row)
    values = {name: value for name, value in row.items() if name not in ("provider", "broken_since")}
    # Broken since it was first seen so, until it is not.
    values["broken_since"] = sa.case(
        (statement.excluded.broken_since.is_(None), sa.null()),
        else_=sa.func.coalesce(health.c.broken_since, statement.excluded.broken_since),
    )
    upsert = statement.on_conflict_do_update(index_elements=["provider"], set_=values)
    return (await tx.execute(upsert.returning(health))).one()


async def note_replay(tx: Tx, provider: str, now: datetime) -> None:
    """An automatic replay was started."""
    values = {"replayed_at": now, "replays": health.c.replays + 1}
    await tx.execute(sa.update(health).where(health.c.provider == provider).values(**values))


def old(before: datetime) -> sa.ColumnElement[bool]:
    """Events from before a time that are not on their way."""
    return (_E.received_at < before) & (_E.queue_state != "pending")


async def clear_bodies(tx: Tx, before: datetime) -> int:
    """Delete some bodies of events from before a time that nothing waits for; how many."""
    chosen = (
        sa.select(_E.id).where(old(before), _E.sealed_body.is_not(None)).limit(ROWS).with_for_update(skip_locked=True)
        .scalar_subquery()
    )  # fmt: skip
    picked = sa.any_(sa.func.array(chosen))
    return int((await tx.execute(sa.update(events).where(_E.id == picked).values(sealed_body=None))).rowcount)
