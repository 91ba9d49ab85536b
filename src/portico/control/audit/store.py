"""The audit tables, and the one way into them: at the end of a chain."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from portico.control.audit import chain as chains
from portico.kit import columns, scrub
from portico.kit.canonical import MAX_INTEGER
from portico.kit.db import CHAINS, Database, HasConnection, Reader, Tx, metadata
from portico.kit.ids import first_id

audit_events = sa.Table(
    "audit_events",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    # Null: an act outside every organization (a failed sign-in to an unknown account, the installation itself).
    sa.Column("organization_id", sa.Text),
    sa.Column("at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("actor_kind", sa.Text, nullable=False),
    sa.Column("actor_id", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("target", sa.Text),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("details", JSONB, nullable=False),
    sa.Column("request_id", sa.Text),
    sa.Column("address", sa.Text),
    # The place in the chain. Null in rows of frequent acts, and of code older than the chain, until the next writer takes
    # them in.
    sa.Column("chain", sa.Text),
    sa.Column("seq", sa.BigInteger),
    sa.Column("hash", sa.LargeBinary),
    sa.Column("commitments", JSONB),
    # Erasable, as `address` is: the personal members of the details, and the salt of the commitments.
    sa.Column("personal", JSONB),
    sa.Column("salt", sa.LargeBinary),
    columns.time("erased_at"),
    sa.CheckConstraint("outcome IN ('success', 'refused')", name="outcome"),
    sa.UniqueConstraint("chain", "seq", name="audit_events_chain_seq_key"),
    sa.Index("audit_events_organization_id_id_ix", "organization_id", "id"),
    sa.Index(
        "audit_events_unchained_ix",
        sa.text("coalesce(organization_id, 'installation')"),
        "id",
        postgresql_where=sa.text("seq IS NULL"),
    ),
)
audit_chains = sa.Table(
    "audit_chains",
    metadata,
    sa.Column("chain", sa.Text, primary_key=True),  # an organization, or `installation`
    sa.Column("seq", sa.BigInteger, nullable=False),  # of the newest row; 0: none yet
    sa.Column("hash", sa.LargeBinary, nullable=False),
    # Of the newest row that retention deleted; 0: none.
    sa.Column("anchor_seq", sa.BigInteger, nullable=False),
    sa.Column("anchor_hash", sa.LargeBinary, nullable=False),
    # The signed statement that it was retention, and the key that signed.
    sa.Column("anchor_token", sa.Text),
    sa.Column("anchor_kid", sa.Text),
)
audit_checkpoints = sa.Table(
    "audit_checkpoints",
    metadata,
    sa.Column("chain", sa.Text, primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True),
    columns.created(),
    sa.Column("kid", sa.Text, nullable=False),
    sa.Column("token", sa.Text, nullable=False),
    # When it was written where this platform keeps copies outside the database.
    columns.time("stored_at"),
    sa.Index("audit_checkpoints_unstored_ix", "created_at", postgresql_where=sa.text("stored_at IS NULL")),
)
# The public halves of the keys that signed checkpoints: kept when the key itself is long gone.
audit_checkpoint_keys = sa.Table(
    "audit_checkpoint_keys",
    metadata,
    sa.Column("kid", sa.Text, primary_key=True),
    sa.Column("public_x", sa.LargeBinary, nullable=False),
    columns.created(),
)

#: Rows without a number that one writer takes into the chain before its own; the worker takes the rest.
CATCH_UP: Final = 100

# Raw: it is part of every write, and a prepared statement costs a third of a compiled one.
_HEAD = """
SELECT seq, hash, date_trunc('milliseconds', clock_timestamp()) AS at, EXISTS (
    SELECT FROM audit_events WHERE seq IS NULL AND coalesce(organization_id, 'installation') = $1
) AS behind
FROM audit_chains WHERE chain = $1 FOR UPDATE
"""
BEGIN = """
INSERT INTO audit_chains (chain, seq, hash, anchor_seq, anchor_hash) VALUES ($1, 0, $2, 0, $2) ON CONFLICT DO NOTHING
"""
ADVANCE = "UPDATE audit_chains SET seq = $2, hash = $3 WHERE chain = $1"
_INSERT = """
WITH head AS (UPDATE audit_chains SET seq = $2, hash = $3 WHERE chain = $1)
INSERT INTO audit_events
    (chain, seq, hash, commitments, personal, salt, address, details,
     id, organization_id, at, actor_kind, actor_id, action, target, outcome, request_id)
VALUES ($1, $2, $3, $4::text::jsonb, $5::text::jsonb, $6, $7, $8::text::jsonb, $9, $10, $11, $12, $13, $14, $15, $16, $17)
"""
_UNNUMBERED = "id, organization_id, address, details, actor_kind, actor_id, action, target, outcome, request_id"
#: How many values ``unnumbered`` gives.
UNNUMBERED_VALUES: Final = 10
_UNCHAINED = """
SELECT id, organization_id, date_trunc('milliseconds', at) AS at, actor_kind, actor_id, action, target, outcome,
       details::text AS details, request_id, address
FROM audit_events WHERE seq IS NULL AND coalesce(organization_id, 'installation') = $1
ORDER BY id LIMIT $2 FOR UPDATE
"""
TAKE_IN = """
UPDATE audit_events
SET chain = $1, seq = $2, hash = $3, commitments = $4::text::jsonb, personal = $5::text::jsonb, salt = $6, address = $7,
    details = $8::text::jsonb, at = $10
WHERE id = $9
"""
_BEHIND = """
SELECT DISTINCT coalesce(organization_id, 'installation') AS chain FROM audit_events WHERE seq IS NULL ORDER BY 1 LIMIT $1
"""
_FACTS = ("actor_kind", "actor_id", "action", "target", "outcome", "request_id")
_BUFFER: Final = object()
# What clocks of several machines may differ by.
_CLOCKS_SECONDS: Final = 60.0

# -- writing -----------------------------------------------------------------------------------------------------------


async def count_lately(reader: Reader, organization: str, action: str, seconds: float) -> int:
    """How many rows of an organization's say that this was done in the last ``seconds``."""
    query = """
        SELECT count(*) FROM audit_events
        WHERE organization_id = $1 AND id >= $2 AND action = $3 AND outcome = 'success'
          AND at > clock_timestamp() - make_interval(secs => $4)
    """
    # Ids sort by time, by the clocks of those who made them: what is older need not be read.
    first = first_id("aud", time.time() - seconds - _CLOCKS_SECONDS)
    return int(await reader.raw.fetchval(query, organization, first, action, float(seconds)))


def append(tx: Tx, row: dict[str, Any]) -> None:
    """Write ``row`` as one of the last statements of ``tx``: the head of its chain is locked for a moment only."""
    buffer: list[dict[str, Any]] | None = tx.state.get(_BUFFER)
    if buffer is None:
        buffer = tx.state[_BUFFER] = []
        tx.before_commit(lambda: _flush(tx), order=CHAINS)
    buffer.append(row)


def insert_unnumbered_sql(first: int = 1, condition: str = "true") -> str:
    """The statement that writes a row without a place in its chain; its values (``unnumbered``) are ``$first`` and following."""
    types = {"details": "::text::jsonb"}
    names = _UNNUMBERED.split(", ")
    values = ", ".join(f"${first + at}{types.get(name, '::text')}" for at, name in enumerate(names))
    return f"INSERT INTO audit_events ({_UNNUMBERED}) SELECT {values} WHERE {condition}"


_INSERT_UNNUMBERED = insert_unnumbered_sql()


def unnumbered(row: dict[str, Any]) -> tuple[Any, ...]:
    """The values of such a row."""
    details = json.dumps(plain(scrub.value(row["details"])))
    return (row["id"], row["organization_id"], row["address"], details, *(row[name] for name in _FACTS))


async def insert_unnumbered(tx: Tx, row: dict[str, Any]) -> None:
    """Write ``row`` without a place in its chain: whoever extends the chain next gives it one."""
    await tx.raw.execute(_INSERT_UNNUMBERED, *unnumbered(row))


async def _flush(tx: Tx) -> None:
    by_chain: dict[str, list[dict[str, Any]]] = {}
    for row in tx.state[_BUFFER]:
        by_chain.setdefault(row["organization_id"] or chains.INSTALLATION, []).append(row)
    for chain in sorted(by_chain):  # one order for all, so that two writers never wait for each other
        await _extend(tx, chain, by_chain[chain])


async def _extend(tx: Tx, chain: str, rows: Iterable[dict[str, Any]]) -> None:
    head = await _lock(tx, chain)
    seq, previous = head["seq"], head["hash"]
    if head["behind"]:
        seq, previous, _ = await _take_in(tx, chain, seq, previous, CATCH_UP)
    for row in rows:
        seq += 1
        values = chained(chain, seq, previous, {**row, "at": head["at"]})
        previous = values[2]
        facts = (row[name] for name in _FACTS)
        await tx.raw.execute(_INSERT, *values, row["id"], row["organization_id"], head["at"], *facts)


async def _lock(tx: HasConnection, chain: str) -> Any:
    """The head of the chain, locked until the end of the transaction; made if there is none."""
    head = await tx.raw.fetchrow(_HEAD, chain)
    if head is None:
        await tx.raw.execute(BEGIN, chain, chains.ZERO)
        head = await tx.raw.fetchrow(_HEAD, chain)
    return head


async def _take_in(tx: Tx, chain: str, seq: int, previous: bytes, limit: int) -> tuple[int, bytes, int]:
    """Chain up to ``limit`` rows that have no number; the new head, and how many they were."""
    rows = await tx.raw.fetch(_UNCHAINED, chain, limit)
    for row in rows:
        seq += 1
        values = chained(chain, seq, previous, {**dict(row), "details": json.loads(row["details"])})
        previous = values[2]
        await tx.raw.execute(TAKE_IN, *values, row["id"], row["at"])
    if rows:
        await tx.raw.execute(ADVANCE, chain, seq, previous)
    return seq, previous, len(rows)


async def behind(reader: HasConnection, limit: int) -> list[str]:
    """Chains with rows that have no number yet."""
    return [row["chain"] for row in await reader.raw.fetch(_BEHIND, limit)]


async def catch_up(tx: Tx, chain: str, limit: int) -> int:
    """Take up to ``limit`` rows without a number into the chain; returns how many."""
    head = await _lock(tx, chain)
    return (await _take_in(tx, chain, head["seq"], head["hash"], limit))[2]


def chained(chain: str, seq: int, previous: bytes, row: dict[str, Any]) -> tuple[Any, ...]:
    """``(chain, seq, hash, commitments, personal, salt, address, details)`` of a row, JSON as text."""
    details = plain(scrub.value(row["details"]))
    personal = {f"details.{name}": details.pop(name) for name in sorted(chains.PERSONAL & details.keys())}
    told = {"actor.address": row["address"], **personal} if row["address"] is not None else personal
    salt = secrets.token_bytes(chains.SALT_BYTES)
    commitments = {name: chains.commitment(salt, name, value) for name, value in told.items()}
    entry = {
        **row, "chain": chain, "seq": seq, "details": details, "commitments": commitments,
        "ts": chains.instant(row["at"]), "actor": {"kind": row["actor_kind"], "id": row["actor_id"]},
    }  # fmt: skip
    hashed = chains.link(previous, chains.record_of(entry))
    texts = (json.dumps(commitments), json.dumps(personal) if personal else None)
    return (chain, seq, hashed, *texts, salt if told else None, row["address"], json.dumps(details))


def plain(value: Any) -> Any:
    """A value that comes back from PostgreSQL and from JSON as it went in: numbers beyond 53 bits become text."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, int | float) and not abs(value) <= MAX_INTEGER:
        return str(value)
    return value


# -- reading -----------------------------------------------------------------------------------------------------------


async def listing(
    reader: Reader, chain: str, limit: int, before: str | None, filters: dict[str, Any]
) -> Sequence[sa.Row[Any]]:
    """Newest first: up to ``limit`` rows of one chain with ids below ``before``; ``filters`` as in the API."""
    row = audit_events.c
    tenant = row.organization_id
    query = sa.select(audit_events).where(tenant.is_(None) if chain == chains.INSTALLATION else tenant == chain)
    if before is not None:
        query = query.where(row.id < before)
    for name in ("action", "target", "outcome"):
        if (wanted := filters.get(name)) is not None:
            query = query.where(row[name] == wanted)
    if (actor := filters.get("actor")) is not None:
        query = query.where(row.actor_id == actor)
    if (since := filters.get("since")) is not None:
        query = query.where(row.at >= since)
    if (until := filters.get("until")) is not None:
        query = query.where(row.at < until)
    return await reader.fetch_all(query.order_by(row.id.desc()).limit(limit))


# Head and rows in one statement: one snapshot, so that a writer in between is no fault.
_STRETCH = """
SELECT h.seq AS head_seq, h.hash AS head_hash, h.anchor_seq, h.anchor_hash, e.chain, e.seq, e.hash, e.id,
       e.organization_id, e.at, e.actor_kind, e.actor_id, e.action, e.target, e.outcome, e.details::text AS details,
       e.request_id, e.address, e.commitments::text AS commitments, e.personal::text AS personal, e.salt
FROM audit_chains h LEFT JOIN LATERAL (
    SELECT * FROM audit_events e WHERE e.chain = h.chain AND e.seq >= $2 ORDER BY e.seq LIMIT $3
) e ON true
WHERE h.chain = $1 ORDER BY e.seq
"""


async def stretch(reader: HasConnection, chain: str, first: int, limit: int) -> tuple[Any, list[chains.Entry]]:
    """The head of a chain (``None``: nothing was ever written) and up to ``limit`` entries from number ``first`` on."""
    rows = await reader.raw.fetch(_STRETCH, chain, first, limit)
    if not rows:
        return None, []
    return rows[0], [entry(row) for row in rows if row["id"] is not None]


def entry(row: Any) -> chains.Entry:
    """A row of ``stretch`` as the export writes it."""
    personal = json.loads(row["personal"]) if row["personal"] is not None else {}
    if row["address"] is not None:
        personal["actor.address"] = row["address"]
    return {
        "chain": row["organization_id"] or chains.INSTALLATION,
        "seq": row["seq"],
        "id": row["id"],
        "ts": chains.instant(row["at"]),
        "actor": {"kind": row["actor_kind"], "id": row["actor_id"]},
        "action": row["action"],
        "target": row["target"],
        "outcome": row["outcome"],
        "details": json.loads(row["details"]),
        "request_id": row["request_id"],
        "personal": personal,
        "salt": row["salt"].hex() if row["salt"] is not None else None,
        "commitments": json.loads(row["commitments"]) if row["commitments"] is not None else {},
        "hash": row["hash"].hex() if row["hash"] is not None else "",
    }


# -- erasure and retention ---------------------------------------------------------------------------------------------

_ERASE = """
WITH wanted AS (
    SELECT id FROM audit_events
    WHERE seq IS NOT NULL AND (salt IS NOT NULL OR address IS NOT NULL OR personal IS NOT NULL)
      AND (
          actor_id = ANY($1) OR target = ANY($1) OR personal->>'details.email' = $2
          OR details->>'owner' = ANY($1) OR details->>'user' = ANY($1)
      )
    LIMIT $3
), gone AS (
    UPDATE audit_events a SET address = NULL, personal = NULL, salt = NULL, erased_at = now()
    FROM wanted WHERE a.id = wanted.id RETURNING a.chain
)
SELECT chain, count(*) AS rows FROM gone GROUP BY chain ORDER BY chain
"""
_ANCHOR = """
UPDATE audit_chains c SET anchor_seq = e.seq, anchor_hash = e.hash
FROM audit_events e
WHERE c.chain = $1 AND e.chain = $1 AND e.seq = (
    SELECT max(seq) FROM (
        SELECT seq, at FROM audit_events WHERE chain = $1 AND seq > c.anchor_seq ORDER BY seq LIMIT $3
    ) oldest WHERE at < $2
)
RETURNING c.anchor_seq, c.anchor_hash
"""
_OLDER = """
SELECT c.chain FROM audit_chains c JOIN audit_events e ON e.chain = c.chain AND e.seq = c.anchor_seq + 1
WHERE e.at < $1 AND ($2::text[] IS NULL OR c.chain = ANY($2)) ORDER BY c.chain
"""


async def erase(tx: Tx, ids: Sequence[str], email: str | None, limit: int) -> dict[str, int]:
    """Erase the personal data of up to ``limit`` rows by or about ``ids``, or with ``email``; rows by chain."""
    return {row["chain"]: row["rows"] for row in await tx.raw.fetch(_ERASE, list(ids), email, limit)}


async def older(db: Database, before: datetime, chains: Sequence[str] | None = None) -> list[str]:
    """Chains (of these, where some are named) whose oldest row is from before ``before``."""
    async with db.read() as reader:
        named = None if chains is None else list(chains)
        return [row["chain"] for row in await reader.raw.fetch(_OLDER, before, named)]


async def trim(tx: Tx, chain: str, before: datetime, limit: int) -> tuple[int, int, bytes]:
    """Delete up to ``limit`` of the oldest rows, all from before ``before``: how many, and the anchor, which keeps number
    and hash of the last one."""
    await _lock(tx, chain)
    anchor = await tx.raw.fetchrow(_ANCHOR, chain, before, limit)
    if anchor is None:
        return 0, 0, chains.ZERO
    seq = anchor["anchor_seq"]
    status: str = await tx.raw.execute("DELETE FROM audit_events WHERE chain = $1 AND seq <= $2", chain, seq)
    return int(status.rpartition(" ")[2]), seq, anchor["anchor_hash"]
