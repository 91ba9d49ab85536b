"""The table of domains, and every query of it.

A name is *held* by one organization at a time, the one that proved that it is its own (``HELD``); any number may have a claim
that is not proved yet. The columns ``cert_*`` are written by ``certificate_state.py`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, insert

from portico.kit.db import Reader, Tx, metadata

#: hostname_status: what is known of a name.
STATES: Final = ("pending", "verified", "active", "moved", "blocked", "deleted")
#: Those in which no other organization can have the name, and those in which it is served.
HELD: Final = ("verified", "active", "moved", "blocked")
SERVED: Final = ("verified", "active", "moved")
CERT_STATES: Final = (
    "none", "pending_validation", "pending_issuance", "pending_deployment", "active", "renewing", "expired", "revoked",
    "validation_timed_out", "issuance_timed_out", "deployment_timed_out",
)  # fmt: skip


def _time(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True))


def _text(name: str, default: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, nullable=False, server_default=default)


def _whole(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Integer, nullable=False, server_default="0")


def _one_of(column: str, values: Sequence[str]) -> sa.CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=column)


custom_domains = sa.Table(
    "custom_domains",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, sa.ForeignKey("organizations.id", ondelete="CASCADE"), nullable=False),
    # A-labels in lower case; `*.example.com` for every name one label below.
    sa.Column("name", sa.Text, nullable=False),
    _text("hostname_status", "pending"),
    _text("tls_mode", "terminate"),
    _text("failure_policy", "standard"),
    # What it is routed to.
    sa.Column("tunnel_id", sa.Text, sa.ForeignKey("tunnels.id", ondelete="SET NULL"), index=True),
    # What the TXT record of this claim says; another claim of the same name has another.
    sa.Column("verification_token", sa.Text, nullable=False),
    # The label under which its `_acme-challenge` may be delegated to us.
    sa.Column("challenge_delegation", sa.Text),
    _time("verified_at"),
    _time("checked_at"),
    # When the worker looks again; null: it does not.
    _time("next_check_at"),
    # Looks since the last one that found everything right.
    _whole("check_attempts"),
    # Since when they have failed.
    _time("failing_since"),
    # Why the last look failed: a word for programs, and what each record said (dns.py).
    sa.Column("dns_error", sa.Text),
    sa.Column("dns_findings", JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")),
    _text("cert_status", "none"),
    sa.Column("cert_serial", sa.Text),
    sa.Column("cert_fingerprint", sa.Text),
    sa.Column("cert_issuer", sa.Text),
    _time("cert_not_before"),
    _time("cert_not_after"),
    _time("cert_renews_at"),
    sa.Column("cert_error_code", sa.Text),
    sa.Column("cert_error_detail", sa.Text),
    _whole("cert_failures"),
    _time("cert_retry_at"),
    sa.Column("cert_source", sa.Text),
    sa.Column("cert_applied", JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")),
    _whole("cert_regions_active"),
    _whole("cert_regions_total"),
    # Since when nothing is tried for it by itself, after a failure under the policy `hold` (failure_policy.py).
    _time("cert_held_at"),
    # The limit of the plan for want of which it is served to nobody (frozen.py).
    sa.Column("frozen", sa.Text),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    _one_of("hostname_status", STATES),
    _one_of("tls_mode", ("terminate", "passthrough")),
    _one_of("failure_policy", ("standard", "strict", "hold")),
    _one_of("cert_status", CERT_STATES),
    sa.Index("custom_domains_organization_id_id_ix", "organization_id", "id"),
    sa.Index(
        "custom_domains_claim_ix", "organization_id", "name", unique=True,
        postgresql_where=sa.text("hostname_status <> 'deleted'"),
    ),
    sa.Index(
        "custom_domains_held_ix", "name", unique=True,
        postgresql_where=sa.text("hostname_status IN ('verified', 'active', 'moved', 'blocked')"),
    ),
    sa.Index("custom_domains_next_check_at_ix", "next_check_at", postgresql_where=sa.text("next_check_at IS NOT NULL")),
)  # fmt: skip

_C = custom_domains.c
_ALIVE = _C.hostname_status != "deleted"


async def count(reader: Reader, organization: str) -> int:
    """How many domains the organization has."""
    query = "SELECT count(*) FROM custom_domains WHERE organization_id = $1 AND hostname_status <> 'deleted'"
    return int(await reader.raw.fetchval(query, organization))


async def add(tx: Tx, row: dict[str, Any]) -> sa.Row[Any] | None:
    """The new row; ``None`` when the organization has that name already."""
    return (
        await tx.execute(insert(custom_domains).values(**row).on_conflict_do_nothing().returning(custom_domains))
    ).first()


async def one(reader: Reader, organization: str, domain: str, *, lock: bool = False) -> sa.Row[Any] | None:
    """A domain of the organization; ``lock`` until the transaction ends."""
    query = sa.select(custom_domains).where(_C.organization_id == organization, _C.id == domain)
    return await reader.fetch_one(query.with_for_update() if lock else query)


async def named(reader: Reader, organization: str, name: str) -> sa.Row[Any] | None:
    """The organization's claim of a name, if it has one."""
    return await reader.fetch_one(
        sa.select(custom_domains).where(_C.organization_id == organization, _C.name == name, _ALIVE)
    )


async def find(reader: Reader, domain: str, *, lock: bool = False) -> sa.Row[Any] | None:
    """A domain by its id, whosever it is."""
    query = sa.select(custom_domains).where(_C.id == domain)
    return await reader.fetch_one(query.with_for_update() if lock else query)


async def names_of(reader: Reader, domains: Sequence[str]) -> dict[str, str]:
    """The names of some domains, by id, whosever they are."""
    query = "SELECT id, name FROM custom_domains WHERE id = ANY($1)"
    return {row["id"]: row["name"] for row in await reader.raw.fetch(query, list(domains))}


async def holder(reader: Reader, names: Sequence[str], *, lock: bool = False) -> Sequence[sa.Row[Any]]:
    """The rows that hold some names."""
    query = sa.select(custom_domains).where(_C.name.in_(names), _C.hostname_status.in_(HELD)).order_by(_C.id)
    return await reader.fetch_all(query.with_for_update() if lock else query)


async def listing(reader: Reader, organization: str, limit: int, after: str | None) -> Sequence[sa.Row[Any]]:
    """Domains of the organization, the oldest first; those that are deleted (and still explained) among them."""
    query = sa.select(custom_domains).where(_C.organization_id == organization)
    if after is not None:
        query = query.where(_C.id > after)
    return await reader.fetch_all(query.order_by(_C.id).limit(limit))


async def everybodys(
    reader: Reader, name: str | None, status: str | None, limit: int, after: str | None
) -> Sequence[sa.Row[Any]]:
    """Domains of all organizations, the oldest first: of a name, in a state."""
    query = sa.select(custom_domains)
    for column, value in ((_C.name, name), (_C.hostname_status, status)):
        if value is not None:
            query = query.where(column == value)
    if after is not None:
        query = query.where(_C.id > after)
    return await reader.fetch_all(query.order_by(_C.id).limit(limit))


async def update(tx: Tx, domain: str, **values: Any) -> sa.Row[Any]:
    """Change columns of a domain that the transaction holds; the row after it."""
    statement = sa.update(custom_domains).where(_C.id == domain).values(updated_at=sa.func.now(), **values)
    return (await tx.execute(statement.returning(custom_domains))).one()


async def look_by(tx: Tx, domain: str, at: datetime) -> None:
    """Let a domain with which something is wrong be looked at by then, and often for a while."""
    query = """
        UPDATE custom_domains SET next_check_at = $2, check_attempts = 0
        WHERE id = $1 AND next_check_at > $2 AND dns_error IS NOT NULL
            AND hostname_status IN ('pending', 'verified', 'active', 'moved')
    """
    await tx.raw.execute(query, domain, at)


async def delete(tx: Tx, domain: str) -> None:
    """Delete a domain."""
    await tx.execute(sa.delete(custom_domains).where(_C.id == domain))


async def lock_claims(tx: Tx, name: str) -> Sequence[sa.Row[Any]]:
    """Every claim of a name, held until the transaction ends: whoever decides about it takes all, in one order."""
    query = sa.select(custom_domains).where(_C.name == name, _ALIVE).order_by(_C.id)
    return await tx.fetch_all(query.with_for_update())


async def routed(reader: Reader) -> Sequence[sa.Row[Any]]:
    """What relays hold."""
    return await reader.fetch_all(
        sa.select(custom_domains).where(_C.tunnel_id.is_not(None), _C.hostname_status.in_(SERVED), _C.frozen.is_(None))
    )


async def closed(reader: Reader) -> Sequence[sa.Row[Any]]:
    """What relays know to be served to nobody: blocked names, and frozen ones that lead to a tunnel."""
    frozen = _C.frozen.is_not(None) & _C.tunnel_id.is_not(None) & _C.hostname_status.in_(SERVED)
    query = sa.select(custom_domains).where((_C.hostname_status == "blocked") | frozen)
    return await reader.fetch_all(query.order_by(_C.id))


async def blocked_of(tx: Tx, organization: str, limit: int) -> Sequence[sa.Row[Any]]:
    """Blocked domains of an organization, locked."""
    query = sa.select(custom_domains).where(_C.organization_id == organization, _C.hostname_status == "blocked")
    return await tx.fetch_all(query.order_by(_C.id).limit(limit).with_for_update())


# Organizations take turns: who brings a thousand names at once holds nobody up.
_DUE = """
WITH due AS (
    SELECT id, row_number() OVER (PARTITION BY organization_id ORDER BY next_check_at) AS turn, next_check_at
    FROM custom_domains WHERE next_check_at <= $1
), chosen AS (
    SELECT d.id FROM custom_domains d JOIN due USING (id) WHERE d.next_check_at <= $1
    ORDER BY due.turn, due.next_check_at LIMIT $2 FOR UPDATE OF d SKIP LOCKED
)
UPDATE custom_domains SET next_check_at = $3 WHERE id IN (SELECT id FROM chosen) RETURNING id
"""


async def take_due(tx: Tx, now: datetime, limit: int, again: datetime) -> Sequence[sa.Row[Any]]:
    """Domains that are to be looked at, each for one worker: whoever dies over one leaves it to others from ``again`` on."""
    ids = [row["id"] for row in await tx.raw.fetch(_DUE, now, limit, again)]
    return await tx.fetch_all(sa.select(custom_domains).where(_C.id.in_(ids)))


async def purge(tx: Tx, before: datetime, limit: int) -> int:
    """Forget domains that were lost before a time; how many."""
    query = """
        DELETE FROM custom_domains WHERE id IN (
            SELECT id FROM custom_domains WHERE hostname_status = 'deleted' AND updated_at < $1 LIMIT $2
            FOR UPDATE SKIP LOCKED)
    """
    status: str = await tx.raw.execute(query, before, limit)
    return int(status.rpartition(" ")[2])


async def leading_to(reader: Reader, tunnels: Sequence[str], *, lock: bool = False) -> Sequence[sa.Row[Any]]:
    """The domains of some tunnels, by name."""
    order = _C.id if lock else _C.name
    query = sa.select(custom_domains).where(_C.tunnel_id.in_(tunnels)).order_by(order)
    return await reader.fetch_all(query.with_for_update() if lock else query)


async def lock_set(tx: Tx, organization: str) -> None:
    """Until the transaction ends nobody else freezes domains of the organization. Taken before the row of any domain is."""
    await tx.raw.execute("SELECT pg_advisory_xact_lock(hashtextextended('domains of ' || $1, 0))", organization)


async def plan_facts(reader: Reader, organization: str) -> list[tuple[str, str | None]]:
    """Id, and for want of what it is frozen, of every domain that counts, the oldest first."""
    query = sa.select(_C.id, _C.frozen).where(_C.organization_id == organization, _ALIVE).order_by(_C.id)
    return [(row.id, row.frozen) for row in await reader.fetch_all(query)]


async def organizations_with_frozen(reader: Reader, limit: int) -> list[str]:
    """Organizations that have frozen domains."""
    query = sa.select(_C.organization_id).where(_C.frozen.is_not(None)).distinct().limit(limit)
    return [row.organization_id for row in await reader.fetch_all(query)]
