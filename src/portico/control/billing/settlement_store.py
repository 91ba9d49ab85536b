"""The tables of settlement, and every query on them.

billing_settlement_sinks      who may send receipts and is sent reports, with its keys and tolerances
billing_settlement_receipts   every receipt, each version of a batch a row; the queue of what is to be reconciled
billing_settlement_runs       what each comparison came to that came to something new; never changed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from portico.control.billing.report_states import SETTLEMENT, IllegalTransition
from portico.kit import queue
from portico.kit.db import Reader, Tx, metadata
from portico.kit.queue import Kind


def _time(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True))


def _now(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now())


def _required(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, nullable=False)


sinks = sa.Table(
    "billing_settlement_sinks",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    # Where reports are sent; null: it only sends receipts.
    sa.Column("url", sa.Text),
    # JSON: a list of {"secret", "until"}, the newest first, which has no end.
    sa.Column("sealed_secrets", sa.LargeBinary, nullable=False),
    # Minor units by currency that amounts may differ by; 0 where none is named.
    sa.Column("tolerances", JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")),
    sa.Column("state", sa.Text, nullable=False, server_default="active"),
    _required("created_by"),
    _now("created_at"),
    _now("updated_at"),
    sa.CheckConstraint("state IN ('active', 'disabled')", name="state"),
)

receipts = sa.Table(
    "billing_settlement_receipts",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    # Null: imported by an operator.
    sa.Column("sink_id", sa.Text, sa.ForeignKey("billing_settlement_sinks.id")),
    # The same for both: `sink:…` or `import:PROVIDER:ACCOUNT`; batches are unique in it.
    _required("origin"),
    _required("message_id"),
    _required("batch_id"),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("issued_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("body_digest", sa.LargeBinary, nullable=False),
    sa.Column("sealed_body", sa.LargeBinary, nullable=False),
    _required("provider"),
    _required("account"),
    sa.Column("livemode", sa.Boolean, nullable=False),
    sa.Column("period_start", sa.DateTime(timezone=True), nullable=False),
    sa.Column("period_end", sa.DateTime(timezone=True), nullable=False),
    sa.Column("export_id", sa.Text),
    _required("state"),
    sa.Column("reason", sa.Text),
    sa.Column("resolution", sa.Text),
    sa.Column("superseded_by", sa.Text),
    # Net that accepted entries have adjusted so far, minor units by currency.
    sa.Column("adjusted", JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")),
    # SHA-256 of what the report said that was accepted: the same again is settled.
    sa.Column("accepted", sa.LargeBinary),
    # How many events of ours the last comparison saw; there are never fewer, so more means that some came late.
    sa.Column("recorded", sa.BigInteger),
    # By currency: {"delta_minor", "delta_bps"} of the last comparison, less what was adjusted.
    sa.Column("deltas", JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")),
    sa.Column("findings", JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")),
    sa.Column("runs", sa.Integer, nullable=False, server_default="0"),
    sa.Column("cause", sa.Text, nullable=False, server_default="received"),
    _now("received_at"),
    _time("reconciled_at"),
    _time("checked_at"),
    *queue.columns(),
    *queue.rules("billing_settlement_receipts"),
    sa.UniqueConstraint("origin", "message_id", name="billing_settlement_receipts_origin_key"),
    sa.UniqueConstraint("origin", "batch_id", "revision", name="billing_settlement_receipts_batch_key"),
    sa.CheckConstraint(
        "state IN ('received', 'verified', 'matched', 'delta', 'failed', 'resolved')", name="state"
    ),
    sa.CheckConstraint("resolution IN ('accepted', 'disputed', 'superseded')", name="resolution"),
    sa.Index("billing_settlement_receipts_state_id_ix", "state", "id"),
    sa.Index("billing_settlement_receipts_period_ix", "provider", "account", "livemode", "period_start"),
)  # fmt: skip

runs = sa.Table(
    "billing_settlement_runs",
    metadata,
    sa.Column("receipt_id", sa.Text, sa.ForeignKey("billing_settlement_receipts.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    _required("verdict"),
    _required("cause"),
    sa.Column("recorded", sa.BigInteger, nullable=False),
    # SHA-256 of the report: a run that comes to the same adds no row.
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("report", JSONB, nullable=False),
    _now("at"),
)

KIND: Final = Kind("billing.settlements", receipts)
R = receipts.c
S = sinks.c
OPEN: Final = ("matched", "delta", "resolved")


# -- sinks ---------------------------------------------------------------------------------------------------------------


async def sink(reader: Reader, sink_id: str, *, lock: bool = False) -> Any | None:
    """One of them."""
    query = sa.select(sinks).where(S.id == sink_id)
    return await reader.fetch_one(query.with_for_update() if lock else query)


async def sink_listing(reader: Reader, limit: int, after: str | None) -> Sequence[Any]:
    """Sinks, the oldest first."""
    query = sa.select(sinks)
    if after is not None:
        query = query.where(S.id > after)
    return await reader.fetch_all(query.order_by(S.id).limit(limit))


async def change_sink(tx: Tx, sink_id: str, **values: Any) -> Any:
    """Change it; the row."""
    statement = sa.update(sinks).where(S.id == sink_id).values(updated_at=sa.func.now(), **values)
    return (await tx.execute(statement.returning(sinks))).one()


# -- receipts ------------------------------------------------------------------------------------------------------------


async def take_turns(tx: Tx, origin: str) -> None:
    """Receipts of one origin are taken in one at a time: which is the newest of a batch is decided here."""
    await tx.raw.execute("SELECT pg_advisory_xact_lock(hashtextextended('settlement ' || $1, 0))", origin)


#: All but its body, which is large and which only a comparison reads.
_PLAIN: Final = [column for column in receipts.c if column.name != "sealed_body"]


async def one(reader: Reader, receipt: str, *, lock: bool = False) -> Any | None:
    """One of them."""
    query = sa.select(*_PLAIN).where(R.id == receipt)
    return await reader.fetch_one(query.with_for_update() if lock else query)


async def by_message(reader: Reader, origin: str, message: str) -> Any | None:
    """The receipt that a message brought."""
    return await reader.fetch_one(sa.select(*_PLAIN).where(R.origin == origin, R.message_id == message))


async def batch(tx: Tx, origin: str, batch_id: str) -> Sequence[Any]:
    """Every version of a batch, the first first, held until ``tx`` ends: nobody accepts one that is about to be replaced."""
    query = sa.select(*_PLAIN).where(R.origin == origin, R.batch_id == batch_id).order_by(R.revision)
    return await tx.fetch_all(query.with_for_update())


async def add(tx: Tx, row: Mapping[str, Any]) -> None:
    """Write a receipt, and wake who reconciles it."""
    await tx.execute(sa.insert(receipts).values(**row))
    await queue.wake(tx, KIND)


async def move(tx: Tx, receipt: str, to: str, **values: Any) -> Any:
    """Into a state, from one that leads there; raises ``IllegalTransition`` when it is in none of those."""
    sources = SETTLEMENT.sources(to)
    statement = sa.update(receipts).where(R.id == receipt, R.state.in_(sources)).values(state=to, **values)
    row = (await tx.execute(statement.returning(receipts))).first()
    if row is None:
        raise IllegalTransition(f"settlement {receipt}: not in a state that leads to {to}")
    return row


async def supersede(tx: Tx, row: Any, by: str, now: Any) -> None:
    """Let a receipt be replaced, wherever it is; whoever has it in hand has lost it."""
    values = {"resolution": "superseded", "superseded_by": by, "queue_state": "done", "lease_token": None}
    if row.state == "resolved":
        await tx.execute(sa.update(receipts).where(R.id == row.id).values(**values, finished_at=now))
    else:
        await move(tx, row.id, "resolved", **values, finished_at=now)


#: What puts a receipt into the queue again.
AGAIN: Final[Mapping[str, Any]] = {
    "queue_state": "pending", "attempts": 0, "available_at": sa.func.now(), "moved_at": sa.func.now(),
    "finished_at": None, "last_error": None, "lease_token": None,
}  # fmt: skip


async def listing(reader: Reader, filters: Mapping[str, Any], limit: int, before: str | None) -> Sequence[Any]:
    """Receipts that fit, the newest first; never their bodies. ``filters``: ``state``, ``sink``, ``provider``, ``batch``."""
    columns = {"state": R.state, "sink": R.sink_id, "provider": R.provider, "batch": R.batch_id}
    query = sa.select(*_PLAIN)
    query = query.where(*(columns[name] == value for name, value in filters.items() if value is not None))
    if before is not None:
        query = query.where(R.id < before)
    return await reader.fetch_all(query.order_by(R.id.desc()).limit(limit))


async def history(reader: Reader, receipt: str, limit: int, before: int | None) -> Sequence[Any]:
    """What its comparisons came to, the newest first."""
    query = sa.select(runs).where(runs.c.receipt_id == receipt)
    if before is not None:
        query = query.where(runs.c.number < before)
    return await reader.fetch_all(query.order_by(runs.c.number.desc()).limit(limit))


async def last_run(reader: Reader, receipt: str) -> Any | None:
    """The latest of them."""
    found = await history(reader, receipt, 1, None)
    return found[0] if found else None


async def add_run(tx: Tx, row: Mapping[str, Any]) -> None:
    """Keep what a comparison came to."""
    await tx.execute(sa.insert(runs).values(**row))


async def watched(reader: Reader, since: Any, limit: int, after: str) -> Sequence[Any]:
    """Receipts that were compared (not those that were replaced), whose period is not too old; those that failed, too: what
    they lacked may have come."""
    holds = (
        R.state.in_((*OPEN, "failed"))
        & (sa.func.coalesce(R.resolution, "") != "superseded")
        & (R.queue_state == "done")
    )
    query = sa.select(R.id, R.provider, R.account, R.livemode, R.period_start, R.period_end, R.recorded, R.checked_at)
    return await reader.fetch_all(query.where(holds, R.period_end > since, R.id > after).order_by(R.id).limit(limit))


_FIGURES: Final = """
SELECT d.key AS currency, sum((d.value->>'delta_minor')::numeric)::float8 AS delta_minor,
    max(abs((d.value->>'delta_bps')::numeric))::float8 AS delta_bps
FROM billing_settlement_receipts AS r, jsonb_each(r.deltas) AS d
WHERE r.state = 'delta' GROUP BY d.key ORDER BY d.key
"""
_FOUND: Final = """
SELECT f.key AS found, sum(f.value::text::bigint)::bigint AS count
FROM billing_settlement_receipts AS r, jsonb_each(r.findings) AS f
WHERE r.state = 'delta' GROUP BY f.key ORDER BY f.key
"""


async def figures(reader: Reader) -> tuple[dict[str, int], list[tuple[str, float, float]], dict[str, int]]:
    """Receipts by state; of open deltas, by currency, their sum and the greatest in basis points; their findings by class."""
    counted = await reader.raw.fetch("SELECT state, count(*) AS n FROM billing_settlement_receipts GROUP BY state")
    deltas = await reader.raw.fetch(_FIGURES)
    found = await reader.raw.fetch(_FOUND)
    off = [(row["currency"], row["delta_minor"], row["delta_bps"] or 0.0) for row in deltas]
    return {row["state"]: row["n"] for row in counted}, off, {row["found"]: row["count"] for row in found}
