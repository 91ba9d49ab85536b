"""The tables of ACME, and every query on them.

    acme_accounts            one a CA: its sealed key, its URL
    certificate_schedules    one a domain: when something is due, what it has, what failed last
    certificate_orders       one an attempt, and the queue of them: each column is what a step has recorded
    acme_challenges          what relays answer now
    acme_budget              what is left of CAs' limits (acme_budget.py)

A name has one open order at most, whoever asks (a unique index); the steps of an order are written by the holder of its lease.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, insert

from portico.control.domains.acme_client import Window
from portico.kit import queue
from portico.kit.db import HasConnection, Reader, Tx, metadata

#: Steps of an order, in their order, and how it may end.
OPEN: Final = (
    "new",
    "probing",
    "ordering",
    "authorizing",
    "publishing",
    "validating",
    "ready",
    "finalizing",
    "downloading",
)
ENDS: Final = ("issued", "failed", "canceled")


def _time(name: str, *, default: bool = False) -> sa.Column[Any]:
    kind = sa.DateTime(timezone=True)
    return sa.Column(name, kind, nullable=not default, server_default=sa.func.now() if default else None)


def _whole(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Integer, nullable=False, server_default="0")


def _flag(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Boolean, nullable=False, server_default=sa.false())


def _domain(**more: Any) -> sa.Column[Any]:
    return sa.Column("domain_id", sa.Text, sa.ForeignKey("custom_domains.id", ondelete="CASCADE"), **more)


accounts = sa.Table(
    "acme_accounts",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("directory", sa.Text, nullable=False, unique=True),
    # The account's key, sealed by the master key: it signs requests, and no visitor's traffic.
    sa.Column("sealed_key", sa.LargeBinary, nullable=False),
    sa.Column("url", sa.Text),
    sa.Column("orders_url", sa.Text),
    # Until when the CA wants to be left alone (its Retry-After, for everybody).
    _time("paused_until"),
    _time("created_at", default=True),
)

schedules = sa.Table(
    "certificate_schedules",
    metadata,
    _domain(primary_key=True),
    sa.Column("organization_id", sa.Text, nullable=False),
    # When an order is due; null: not before something changes.
    _time("next_at"),
    # Asked for by a person: neither a pause nor the policy `hold` stands against it.
    _flag("forced"),
    # Which CA is next (0: the first of the settings), and whether its staging is tried first.
    _whole("ca"),
    _flag("staging_first"),
    # Failures in a row, of all and of this CA, and the code of the last one.
    _whole("failures"),
    _whole("ca_failures"),
    sa.Column("error_code", sa.Text),
    _time("ordered_at"),
    # The certificate that it has: who issued it, its RFC 9773 name, its time.
    sa.Column("directory", sa.Text),
    sa.Column("certificate", sa.Text),
    sa.Column("fingerprint", sa.Text),
    _time("not_before"),
    _time("not_after"),
    # What the CA said about its renewal, and when it is asked again.
    _time("ari_next_at"),
    _time("ari_start"),
    _time("ari_end"),
    sa.Column("ari_explanation", sa.Text),
    sa.Index("certificate_schedules_next_at_ix", "next_at", postgresql_where=sa.text("next_at IS NOT NULL")),
    sa.Index(
        "certificate_schedules_ari_next_at_ix", "ari_next_at", postgresql_where=sa.text("ari_next_at IS NOT NULL")
    ),
)

orders = sa.Table(
    "certificate_orders",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _domain(nullable=False, index=True),
    # Whose turn it is: organizations take turns.
    sa.Column("organization_id", sa.Text(collation="C"), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, server_default="new"),
    # Which certificate of the domain it is to become (the vault's version).
    sa.Column("revision", sa.BigInteger, nullable=False),
    # The position of the CA among those of the settings, its directory, and whether that is a staging.
    _whole("ca"),
    sa.Column("directory", sa.Text, nullable=False),
    _flag("staging"),
    # Whether a certificate is there already; and which one this replaces (RFC 9773), inside of the CA's window.
    _flag("renewal"),
    sa.Column("replaces", sa.Text),
    sa.Column("challenge", sa.Text),
    # Set before the CA is asked for an order: whoever goes on looks for it first.
    _whole("asked"),
    sa.Column("order_url", sa.Text),
    # Of each name that is to be proved: authorization, challenge, token, where a TXT record is.
    sa.Column("proofs", JSONB, nullable=False, server_default=sa.text("'[]'::jsonb")),
    # The private key on its way, sealed for certificate workers alone; gone when the vault has it.
    sa.Column("sealed_key", sa.LargeBinary),
    sa.Column("wrapped_key", sa.LargeBinary),
    sa.Column("wrap_id", sa.Text),
    sa.Column("csr", sa.LargeBinary),
    sa.Column("certificate_url", sa.Text),
    sa.Column("error_code", sa.Text),
    sa.Column("error_detail", sa.Text),
    _time("created_at", default=True),
    *queue.columns(),
    sa.CheckConstraint(f"state IN ({', '.join(repr(state) for state in (*OPEN, *ENDS))})", name="state"),
    *queue.rules("certificate_orders"),
    queue.turns("certificate_orders", "organization_id"),
    sa.Index(
        "certificate_orders_open_ix", "name", unique=True,
        postgresql_where=sa.text("state NOT IN ('issued', 'failed', 'canceled')"),
    ),
)  # fmt: skip

challenges = sa.Table(
    "acme_challenges",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column(
        "order_id", sa.Text, sa.ForeignKey("certificate_orders.id", ondelete="CASCADE"), nullable=False, index=True
    ),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("token", sa.Text, nullable=False),
    sa.Column("key_authorization", sa.Text, nullable=False),
    sa.Column("until", sa.DateTime(timezone=True), nullable=False),
)

ORDER: Final = queue.Kind("certificates.order", orders, lane="organization_id")

# -- accounts ------------------------------------------------------------------------------------------------------------


async def account(reader: Reader, directory: str) -> sa.Row[Any] | None:
    """The account at a CA."""
    return await reader.fetch_one(sa.select(accounts).where(accounts.c.directory == directory))


async def add_account(tx: Tx, row: Mapping[str, Any]) -> None:
    """The key of an account, before the CA hears of it; somebody else's stays."""
    await tx.execute(insert(accounts).values(**row).on_conflict_do_nothing())


async def registered(tx: Tx, directory: str, url: str, orders_url: str | None) -> None:
    """The CA has it."""
    await tx.execute(
        sa.update(accounts).where(accounts.c.directory == directory).values(url=url, orders_url=orders_url)
    )


async def forget_account(tx: Tx, directory: str) -> None:
    """The CA does not know it any more: it is registered again."""
    await tx.execute(sa.update(accounts).where(accounts.c.directory == directory).values(url=None, orders_url=None))


async def pause(tx: Tx, directory: str, seconds: float) -> None:
    """Leave a CA alone for so long."""
    await tx.raw.execute(
        "UPDATE acme_accounts SET paused_until = greatest(paused_until, now() + make_interval(secs => $2)) WHERE directory = $1",
        directory, seconds,
    )  # fmt: skip


async def paused(reader: HasConnection, directory: str) -> float:
    """Seconds for which a CA is left alone."""
    text = "SELECT extract(epoch FROM paused_until - now())::float8 FROM acme_accounts WHERE directory = $1"
    return max(0.0, await reader.raw.fetchval(text, directory) or 0.0)


async def pauses(reader: HasConnection) -> dict[str, float]:
    """Seconds for which CAs are left alone, by directory; those that are not are not there."""
    text = """
    SELECT directory, extract(epoch FROM paused_until - now())::float8 AS seconds FROM acme_accounts WHERE paused_until > now()
    """
    return {row["directory"]: row["seconds"] for row in await reader.raw.fetch(text)}


# -- orders --------------------------------------------------------------------------------------------------------------


async def order(reader: Reader, order_id: str) -> sa.Row[Any] | None:
    """An order."""
    return await reader.fetch_one(sa.select(orders).where(orders.c.id == order_id))


async def open_order(reader: Reader, domain_id: str) -> sa.Row[Any] | None:
    """The order that is open for a domain."""
    query = sa.select(orders).where(orders.c.domain_id == domain_id, orders.c.state.not_in(ENDS))
    return await reader.fetch_one(query)


async def known_orders(reader: HasConnection, domain_id: str) -> list[str]:
    """URLs of orders at CAs that were recorded for a domain."""
    rows = await reader.raw.fetch(
        "SELECT order_url FROM certificate_orders WHERE domain_id = $1 AND order_url IS NOT NULL", domain_id
    )
    return [row["order_url"] for row in rows]


async def update(tx: Tx, order_id: str, **values: Any) -> None:
    """Record what a step found; the lease is checked when its transaction ends."""
    await tx.execute(sa.update(orders).where(orders.c.id == order_id).values(**values))


async def end(tx: Tx, order_id: str, state: str, **values: Any) -> None:
    """Its last state; nothing of its key stays."""
    await update(tx, order_id, state=state, sealed_key=None, wrapped_key=None, wrap_id=None, **values)


# -- challenges ----------------------------------------------------------------------------------------------------------


async def add_challenges(tx: Tx, rows: Sequence[Mapping[str, Any]]) -> None:
    """What relays answer from now on."""
    if rows:
        await tx.execute(insert(challenges).values(list(rows)).on_conflict_do_nothing())


async def take_challenges(tx: Tx, order_id: str) -> list[str]:
    """What relays answer no longer; the ids."""
    rows = await tx.raw.fetch("DELETE FROM acme_challenges WHERE order_id = $1 RETURNING id", order_id)
    return [row["id"] for row in rows]


def edge_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A challenge as relays hear of it."""
    found = {name: row[name] for name in ("id", "type", "host", "token")}
    return found | {"authorization": row["key_authorization"], "until": int(row["until"].timestamp())}


async def open_challenges(reader: HasConnection) -> list[dict[str, Any]]:
    """What relays answer now, as the edge stream has it."""
    rows = await reader.raw.fetch(
        "SELECT id, type, host, token, key_authorization, until FROM acme_challenges WHERE until > now() ORDER BY id"
    )
    return [edge_row(row) for row in rows]


# -- schedules -----------------------------------------------------------------------------------------------------------


async def schedule(reader: Reader, domain_id: str, *, lock: bool = False) -> sa.Row[Any] | None:
    """What is due for a domain."""
    query = sa.select(schedules).where(schedules.c.domain_id == domain_id)
    return await reader.fetch_one(query.with_for_update() if lock else query)


async def set_schedule(tx: Tx, domain_id: str, **values: Any) -> None:
    """Change what is due for a domain."""
    await tx.execute(sa.update(schedules).where(schedules.c.domain_id == domain_id).values(**values))


async def hasten(tx: Tx, domain_id: str, codes: Sequence[str]) -> None:
    """Let a domain's next order be due now, if it waits since its last one ended with one of these codes."""
    statement = """
    UPDATE certificate_schedules SET next_at = now() WHERE domain_id = $1 AND next_at > now() AND error_code = ANY($2)
    """
    await tx.raw.execute(statement, domain_id, list(codes))


_MOVE: Final = """
UPDATE certificate_schedules AS s SET ari_start = n.start, ari_end = n.until, ari_explanation = n.explanation,
    next_at = CASE WHEN s.next_at IS NULL OR s.failures > 0 THEN s.next_at ELSE n.at END
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[], $5::timestamptz[], $6::text[])
    AS n(domain_id, certificate, at, start, until, explanation)
LEFT JOIN certificate_heads AS h ON h.domain_id = n.domain_id
WHERE s.domain_id = n.domain_id AND s.certificate = n.certificate
RETURNING s.domain_id, coalesce(h.last_version, 0) AS revision
"""


async def move_renewals(tx: Tx, moves: Sequence[tuple[str, str, datetime, Window]]) -> dict[str, int]:
    """Renew certificates (domain, name of RFC 9773) at another moment, if they are what is meant still. What is being renewed is
    left alone. Of each domain that it holds for: its newest certificate, as the vault counts them; 0 before the first."""
    columns = zip(*((*move[:3], move[3].start, move[3].end, move[3].explanation) for move in moves), strict=True)
    rows = await tx.raw.fetch(_MOVE, *(list(column) for column in columns)) if moves else []
    return {row["domain_id"]: row["revision"] for row in rows}
