"""The edge change table: everything that relays must hear, in one order, written with the change itself.

    changes.append(tx, changes.session_ended("ses_…", "session.revoked", until))

An append is buffered and written as the last statements before the commit, under one transaction advisory lock. So the
number of a row is drawn while nobody else can draw one, and the row is visible before the lock is free: **versions
become visible in order**. Without the lock a reader that has seen version 8 may never see 7, committed a moment later,
and a revocation would be lost for good. NOTIFY only wakes readers; they find changes by version, by polling if need be.

One row holds the changes of one transaction. Row 0, made by the migration, stands for "nothing yet"; the newest row is
never trimmed, so a version is known exactly as long as its row exists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from portico.kit import columns
from portico.kit.db import HasConnection, Tx, metadata

CHANNEL: Final = "portico_edge"
# Changes in one row at most, so that no line of the stream grows without bound.
ROW_CHANGES: Final = 500
# Any number that no other advisory lock of the project uses.
_APPEND_LOCK: Final = 0x706F_7274_6564_6765

Change = dict[str, Any]

edge_changes = sa.Table(
    "edge_changes",
    metadata,
    sa.Column("version", sa.BigInteger, sa.Identity(always=False, start=1, minvalue=0), primary_key=True),
    sa.Column("payload", JSONB, nullable=False),
    columns.created(),
    sa.Index(None, "created_at"),
)

_ADD = """
WITH added AS (INSERT INTO edge_changes (payload) SELECT unnest($1::text[])::jsonb RETURNING version)
SELECT pg_notify($2, max(version)::text) FROM added
"""
_AFTER = "SELECT version, payload::text FROM edge_changes WHERE version >= $1 ORDER BY version LIMIT $2"
_TRIM = """
DELETE FROM edge_changes
WHERE version < (SELECT max(version) FROM edge_changes)
  AND (created_at < now() - make_interval(secs => $1) OR version <= (SELECT max(version) FROM edge_changes) - $2)
"""
_BUFFER: Final = object()


@dataclass(frozen=True, slots=True)
class Entry:
    """One row: its version and its changes, as the JSON text of a list."""

    version: int
    changes: str


# -- the kinds of change (contracts/edge-stream.schema.json) -------------------------------------------------------------


def tunnel(row: Mapping[str, Any]) -> Change:
    """A tunnel appeared or changed; ``row`` is its whole edge state."""
    return {"kind": "tunnel", "tunnel": dict(row)}


def tunnel_removed(tunnel_id: str, code: str) -> Change:
    """A tunnel is gone; ``code`` is what its live sessions are told."""
    return {"kind": "tunnel_removed", "id": tunnel_id, "code": code}


def session_ended(session: str, code: str, until: int) -> Change:
    """Tokens of ``session`` are refused from now on; after ``until`` (unix seconds) none can be alive."""
    return {"kind": "session_ended", "session": session, "code": code, "until": until}


def organization(row: Mapping[str, Any]) -> Change:
    """What holds for an organization's tunnels changed; ``row`` is all of it."""
    return {"kind": "organization", "organization": dict(row)}


def domain(row: Mapping[str, Any]) -> Change:
    """A domain leads to a tunnel, or leads to it otherwise; ``row`` is all of it."""
    return {"kind": "domain", "domain": dict(row)}


def domain_removed(domain_id: str) -> Change:
    """A domain leads nowhere any more."""
    return {"kind": "domain_removed", "id": domain_id}


def domain_closed(row: Mapping[str, Any]) -> Change:
    """A domain is served to nobody; ``row`` says which, and what its visitors are told."""
    return {"kind": "domain_closed", "domain": dict(row)}


def keys(jwks: Sequence[Mapping[str, Any]]) -> Change:
    """The whole set of public keys that tokens may be signed with."""
    return {"kind": "keys", "keys": [dict(key) for key in jwks]}


def challenge(row: Mapping[str, Any]) -> Change:
    """A certificate authority is about to ask about a name; ``row`` is how to answer."""
    return {"kind": "challenge", "challenge": dict(row)}


def challenge_removed(challenge_id: str) -> Change:
    """A challenge is over."""
    return {"kind": "challenge_removed", "id": challenge_id}


def certificate(row: Mapping[str, Any]) -> Change:
    """Which versions of a domain's certificate serve and are to be staged; ``row`` is all of it."""
    return {"kind": "certificate", "certificate": dict(row)}


def certificate_removed(domain_id: str) -> Change:
    """A domain has no certificate any more: relays forget its keys."""
    return {"kind": "certificate_removed", "domain": domain_id}


# -- writing -----------------------------------------------------------------------------------------------------------


def append(tx: Tx, *changes: Change) -> None:
    """Tell the relays, when and only when ``tx`` commits. The order within the transaction is kept."""
    buffer: list[Change] | None = tx.state.get(_BUFFER)
    if buffer is None:
        buffer = tx.state[_BUFFER] = []
        tx.before_commit(lambda: _flush(tx))
    buffer.extend(changes)


async def _flush(tx: Tx) -> None:
    pending: list[Change] = tx.state[_BUFFER]
    if not pending:
        return
    rows = [
        json.dumps(pending[start : start + ROW_CHANGES], separators=(",", ":"))
        for start in range(0, len(pending), ROW_CHANGES)
    ]
    # Two statements: the number must be drawn after the lock is held, whatever a planner makes of one.
    await tx.raw.execute("SELECT pg_advisory_xact_lock($1)", _APPEND_LOCK)
    await tx.raw.fetchval(_ADD, rows, CHANNEL)


async def trim(tx: Tx, *, keep_seconds: float, keep_rows: int) -> int:
    """Delete rows that are older than ``keep_seconds`` or beyond the newest ``keep_rows``; returns how many.

    A relay that resumes from a deleted version gets a snapshot.
    """
    status: str = await tx.raw.execute(_TRIM, float(keep_seconds), int(keep_rows))
    return int(status.rpartition(" ")[2])


# -- reading -----------------------------------------------------------------------------------------------------------


async def newest(reader: HasConnection) -> int:
    """The highest visible version."""
    return int(await reader.raw.fetchval("SELECT max(version) FROM edge_changes"))


async def after(reader: HasConnection, version: int, limit: int) -> list[Entry] | None:
    """Up to ``limit`` rows after ``version``, in order; ``None`` when ``version`` is not known (trimmed, or never was).

    One statement decides both, so that trimming cannot slip between the check and the read.
    """
    rows = await reader.raw.fetch(_AFTER, version, limit + 1)
    if not rows or rows[0]["version"] != version:
        return None
    return [Entry(row["version"], row["payload"]) for row in rows[1:]]
