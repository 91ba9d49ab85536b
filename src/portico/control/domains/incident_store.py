"""The tables of incidents, and every query on them. Whoever changes incidents of a domain holds the row of the domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, distinct_on

from portico.control.domains.certificate_state import FAILURES
from portico.control.domains.store import custom_domains
from portico.kit.db import Reader, Tx, metadata

STATUSES: Final = ("open", "acknowledged", "resolved")
CLASSES: Final = tuple(FAILURES)


def _time(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True))


def _one_of(column: str, values: Sequence[str]) -> sa.CheckConstraint:
    return sa.CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=column)


incidents = sa.Table(
    "certificate_incidents",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("domain_id", sa.Text, sa.ForeignKey("custom_domains.id", ondelete="CASCADE"), nullable=False),
    sa.Column("organization_id", sa.Text, nullable=False),
    sa.Column("hostname", sa.Text, nullable=False),
    sa.Column("incident_class", sa.Text, nullable=False),
    # 1 is the worst. The worst that it was since it was opened.
    sa.Column("tier", sa.SmallInteger, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    # By origin (state, sla, probe, key_material): {"tier", "code", "detail", "mark"}. Resolved: what there was at its end.
    sa.Column("conditions", JSONB, nullable=False),
    sa.Column("opened_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
    _time("escalated_at"),
    _time("acknowledged_at"),
    sa.Column("acknowledged_by", sa.Text),
    _time("resolved_at"),
    # An event (cev_…), or the operator who did.
    sa.Column("resolved_by", sa.Text),
    sa.Column("by_hand", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("reopened", sa.Integer, nullable=False, server_default="0"),
    # When people were told of it last, at which tier, and whether they were since it was last opened.
    _time("told_at"),
    sa.Column("told_tier", sa.SmallInteger),
    sa.Column("told", sa.Boolean, nullable=False, server_default=sa.false()),
    # Tells notices of it apart.
    sa.Column("notices", sa.Integer, nullable=False, server_default="0"),
    _one_of("status", STATUSES),
    _one_of("incident_class", CLASSES),
    sa.CheckConstraint("tier BETWEEN 1 AND 3", name="tier"),
    sa.Index(
        "certificate_incidents_open_ix", "domain_id", "incident_class", unique=True,
        postgresql_where=sa.text("status <> 'resolved'"),
    ),
    sa.Index("certificate_incidents_domain_id_id_ix", "domain_id", "id"),
    sa.Index("certificate_incidents_status_id_ix", "status", "id"),
)  # fmt: skip

notes = sa.Table(
    "certificate_incident_notes",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column(
        "incident_id",
        sa.Text,
        sa.ForeignKey("certificate_incidents.id", ondelete="CASCADE"),
        nullable=False,
        index=True,
    ),
    sa.Column("author", sa.Text, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
)

_I = incidents.c
_ENDING: Final = """
(cert_not_after - (cert_not_after - cert_not_before) / 3 < :now OR cert_renews_at < :now)
"""


async def one(reader: Reader, incident: str) -> sa.Row[Any] | None:
    """One incident."""
    return await reader.fetch_one(sa.select(incidents).where(_I.id == incident))


async def of_domain(reader: Reader, domain: str) -> dict[str, sa.Row[Any]]:
    """The latest incident of each class of a domain."""
    query = sa.select(incidents).where(_I.domain_id == domain).ext(distinct_on(_I.incident_class))
    rows = await reader.fetch_all(query.order_by(_I.incident_class, _I.id.desc()))
    return {row.incident_class: row for row in rows}


async def unresolved(reader: Reader, domains: Sequence[str]) -> dict[str, dict[str, sa.Row[Any]]]:
    """Those of some domains that are not resolved: by domain and class."""
    rows = await reader.fetch_all(sa.select(incidents).where(_I.domain_id.in_(domains), _I.status != "resolved"))
    found: dict[str, dict[str, sa.Row[Any]]] = {}
    for row in rows:
        found.setdefault(row.domain_id, {})[row.incident_class] = row
    return found


async def add(tx: Tx, row: Mapping[str, Any]) -> sa.Row[Any]:
    """A new one."""
    return (await tx.execute(sa.insert(incidents).values(**row).returning(incidents))).one()


async def change(tx: Tx, incident: str, **values: Any) -> sa.Row[Any]:
    """Change one."""
    statement = sa.update(incidents).where(_I.id == incident).values(**values).returning(incidents)
    return (await tx.execute(statement)).one()


async def listing(reader: Reader, filters: Mapping[str, Any], limit: int, before: str | None) -> Sequence[sa.Row[Any]]:
    """Those that fit (``status``, ``incident_class``, ``tier``, ``domain``), the newest first."""
    columns = {"status": _I.status, "incident_class": _I.incident_class, "tier": _I.tier, "domain": _I.domain_id}
    query = sa.select(incidents).where(
        *(columns[name] == value for name, value in filters.items() if value is not None)
    )
    if before is not None:
        query = query.where(_I.id < before)
    return await reader.fetch_all(query.order_by(_I.id.desc()).limit(limit))


async def notes_of(reader: Reader, ids: Sequence[str]) -> Sequence[sa.Row[Any]]:
    """Notes on some incidents, the oldest first."""
    return await reader.fetch_all(sa.select(notes).where(notes.c.incident_id.in_(ids)).order_by(notes.c.id))


async def add_note(tx: Tx, row: Mapping[str, Any]) -> None:
    """One more note."""
    await tx.execute(sa.insert(notes).values(**row))


async def watched(reader: Reader, now: datetime, after: str, limit: int) -> Sequence[sa.Row[Any]]:
    """Domains whose incidents may change by time alone, in the order of ids: what is left of a certificate's life is little, its
    renewal is due, or something is not resolved."""
    c = custom_domains.c
    ending = sa.text(_ENDING).bindparams(sa.bindparam("now", now, sa.DateTime(timezone=True)))
    troubled = sa.exists().where(_I.domain_id == c.id, _I.status != "resolved")
    held = c.hostname_status != "deleted"
    query = sa.select(custom_domains).where(c.id > after, sa.or_(held & ending, troubled))
    return await reader.fetch_all(query.order_by(c.id).limit(limit))


async def counts(reader: Reader) -> dict[tuple[str, int, str], int]:
    """``(class, tier, status)`` → how many incidents are not resolved; for metrics."""
    rows = await reader.raw.fetch(
        """SELECT incident_class, tier, status, count(*)::int AS n FROM certificate_incidents
           WHERE status <> 'resolved' GROUP BY 1, 2, 3"""
    )
    return {(row["incident_class"], row["tier"], row["status"]): row["n"] for row in rows}
