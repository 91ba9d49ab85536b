"""Plans: what an organization may have, as one declared table, and what holds for an organization now.

    PLAN_TABLE ──migration──► plans (id, version) ◄── organizations.plan, plan_version
                                                   + plan_overrides ──► Entitlements

A row of ``plans`` never changes: another limit is another version. An organization stays on the version that it was given
(so what it signed up for) until an operator or a payment moves it. ``None`` is no limit. docs/reference/plans.md is made
from the tables here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from portico.control.identity import tables
from portico.errors import Problem
from portico.kit.db import Reader, Tx


@dataclass(frozen=True, slots=True)
class Limit:
    """What a limit counts. ``noun``: in words, for whoever meets it."""

    noun: str
    about: str


GIB: Final = 1 << 30

# Every limit that a plan has. Never rename one.
LIMIT_TABLE: Final[Mapping[str, Limit]] = {
    "tunnels": Limit("tunnels", "Tunnels that may exist, on line or not."),
    "tunnels_online": Limit("tunnels on line", "Tunnels that may be on line at once."),
    "reserved_names": Limit("reserved names", "Names that are kept with or without a tunnel."),
    "custom_domains": Limit("custom domains", "Domains of one's own."),
    "concurrency": Limit("requests at once", "Requests in flight of one HTTP tunnel."),
    "connections": Limit("connections at once", "Open connections of one TCP or TLS tunnel."),
    "requests_per_second": Limit("requests a second", "Requests and connections a second of all tunnels together."),
    "requests_per_month": Limit("requests this month", "Requests and connections in a calendar month (UTC)."),
    "bytes_per_month": Limit("bytes this month", "Bytes in both directions in a calendar month (UTC)."),
    "members": Limit("members", "People in the organization, open invitations among them."),
    "api_keys": Limit("keys", "Live agent keys and API keys."),
    "roles": Limit("custom roles", "Roles of the organization's own."),
    "events_days": Limit("days of events", "Days that what happened to tunnels is kept."),
    "audit_days": Limit("days of audit log", "Days that the audit log is kept."),
    "inspection_days": Limit("days of inspection", "Days that captured requests are kept."),
}

# What a plan has or has not.
FEATURE_TABLE: Final[Mapping[str, str]] = {
    "tcp": "TCP tunnels",
    "tls": "TLS tunnels (passthrough)",
    "mtls": "client certificates at the edge",
    "ip_rules": "address rules at the edge",
    "custom_roles": "custom roles",
    "audit_export": "export of the audit log",
}

# The limits of a month, with the totals of usage that count towards each.
MONTHLY: Final[Mapping[str, tuple[str, ...]]] = {
    "requests_per_month": ("requests", "connections"),
    "bytes_per_month": ("bytes_in", "bytes_out"),
}

Limits = Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class Plan:
    """One version of a plan. ``hard_cap``: whether traffic stops at the limits of a month. ``listed``: offered to all."""

    id: str
    version: int
    name: str
    position: int
    listed: bool
    hard_cap: bool
    limits: Limits
    features: frozenset[str]


def _limits(*values: int | None) -> Limits:
    return dict(zip(LIMIT_TABLE, values, strict=True))


# The plans that every installation has, each version ever declared. Another version is another row, and a migration that
# calls ``seed`` again.
PLAN_TABLE: Final[tuple[Plan, ...]] = (
    Plan("free", 1, "Free", 10, True, True,
         _limits(5, 3, 3, 0, 20, 20, 20, 100_000, 5 * GIB, 3, 10, 0, 3, 7, 1),
         frozenset()),
    Plan("pro", 1, "Pro", 20, True, False,
         _limits(50, 25, 25, 10, 50, 200, 200, 5_000_000, 100 * GIB, 10, 100, 0, 30, 90, 7),
         frozenset({"tcp", "tls", "ip_rules"})),
    Plan("team", 1, "Team", 30, True, False,
         _limits(500, 250, 250, 100, 100, 1000, 1000, 50_000_000, 1024 * GIB, 100, 1000, 50, 90, 400, 30),
         frozenset(FEATURE_TABLE)),
    Plan("unlimited", 1, "Unlimited", 100, False, False, _limits(*[None] * len(LIMIT_TABLE)), frozenset(FEATURE_TABLE)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entitlements:
    """What holds for an organization now: its plan's limits, with what an operator set differently.

    ``revision`` rises with every change that relays have to know. ``overridden``: the names that are not the plan's.
    """

    organization: str
    plan: str
    version: int
    name: str
    hard_cap: bool
    limits: Limits
    features: frozenset[str]
    revision: int
    overridden: frozenset[str] = frozenset()

    def limit(self, name: str) -> int | None:
        """The limit of this name; ``None`` is none. A version older than a limit does not have it."""
        return self.limits.get(name)


# Columns that make an Entitlements, for queries that have the organization as ``o``; ``$now`` is theirs to number.
COLUMNS: Final = """
o.id AS organization, o.plan, o.plan_version, p.name AS plan_name, p.hard_cap, p.limits::text AS plan_limits,
p.features AS plan_features, o.edge_version,
(SELECT json_object_agg(v.name, v.value ORDER BY v.source DESC)::text FROM plan_overrides v
 WHERE v.organization_id = o.id AND (v.expires_at IS NULL OR v.expires_at > now())) AS overrides
"""
JOIN: Final = "JOIN plans p ON p.id = o.plan AND p.version = o.plan_version"


def entitlements_in(row: Any) -> Entitlements:
    """What the ``COLUMNS`` of a row say."""
    limits, features = _limits_in(row["plan_limits"]), set(row["plan_features"])
    hard_cap, changed = row["hard_cap"], json.loads(row["overrides"]) if row["overrides"] else {}
    if changed:
        limits = dict(limits)
    for name, value in changed.items():
        if name in LIMIT_TABLE:
            limits[name] = value
        elif name == "hard_cap":
            hard_cap = bool(value)
        else:
            (features.add if value else features.discard)(name)
    return Entitlements(
        row["organization"],
        row["plan"],
        row["plan_version"],
        row["plan_name"],
        hard_cap,
        limits,
        frozenset(features),
        row["edge_version"],
        frozenset(changed),
    )


# Every session of every agent asks, and installations have few plans. Nobody changes what comes back.
@functools.lru_cache(256)
def _limits_in(text: str) -> dict[str, int | None]:
    found: dict[str, int | None] = json.loads(text)
    return found


_OF = f"SELECT {COLUMNS} FROM organizations o {JOIN} WHERE o.id = ANY($1)"  # noqa: S608 - our own names


async def entitlements(reader: Reader, organization: str) -> Entitlements:
    """What holds for an organization now. Raises ``request.not_found``."""
    found = await entitlements_of(reader, [organization])
    if not found:
        raise Problem("request.not_found", "there is no such organization")
    return found[organization]


async def entitlements_of(reader: Reader, organizations: list[str]) -> dict[str, Entitlements]:
    """The same of several, of those that exist."""
    rows = await reader.raw.fetch(_OF, organizations)
    return {row["organization"]: entitlements_in(row) for row in rows}


# -- plans --------------------------------------------------------------------------------------------------------------

_CURRENT = """
SELECT DISTINCT ON (id) id, version, name, position, listed, hard_cap, limits::text, features, created_at
FROM plans ORDER BY id, version DESC
"""
_ONE = """
SELECT id, version, name, position, listed, hard_cap, limits::text, features, created_at FROM plans
WHERE id = $1 AND ($2::int IS NULL OR version = $2) ORDER BY version DESC LIMIT 1
"""
_VERSIONS = """
SELECT p.id, p.version, p.name, p.position, p.listed, p.hard_cap, p.limits::text, p.features, p.created_at,
       (SELECT count(*) FROM organizations o WHERE o.plan = p.id AND o.plan_version = p.version) AS organizations
FROM plans p ORDER BY p.position, p.id, p.version
"""
_ADD = """
INSERT INTO plans (id, version, name, position, listed, hard_cap, limits, features)
VALUES ($1, $2, $3, $4, $5, $6, $7::text::jsonb, $8)
"""


def plan_in(row: Any) -> Plan:
    """A row of ``plans``."""
    return Plan(
        row["id"],
        row["version"],
        row["name"],
        row["position"],
        row["listed"],
        row["hard_cap"],
        json.loads(row["limits"]),
        frozenset(row["features"]),
    )


async def current(reader: Reader) -> list[Plan]:
    """The newest version of every plan, cheapest first."""
    return sorted(map(plan_in, await reader.raw.fetch(_CURRENT)), key=lambda plan: (plan.position, plan.id))


async def one(reader: Reader, plan: str, version: int | None) -> Plan | None:
    """A version of a plan, the newest if ``None``."""
    row = await reader.raw.fetchrow(_ONE, plan, version)
    return None if row is None else plan_in(row)


async def versions(reader: Reader) -> list[tuple[Plan, datetime, int]]:
    """Every version of every plan, with when it was made and how many organizations are on it."""
    rows = await reader.raw.fetch(_VERSIONS)
    return [(plan_in(row), row["created_at"], row["organizations"]) for row in rows]


async def add_version(tx: Tx, plan: Plan) -> None:
    """Insert a version that is not there yet."""
    features, limits = sorted(plan.features), json.dumps(dict(plan.limits))
    await tx.raw.execute(
        _ADD, plan.id, plan.version, plan.name, plan.position, plan.listed, plan.hard_cap, limits, features
    )


def lifts(found: list[Plan], name: str, needed: int) -> str | None:
    """The first listed plan that allows ``needed`` of a limit."""
    return next((p.id for p in found if p.listed and ((most := p.limits.get(name)) is None or most >= needed)), None)


def brings(found: list[Plan], feature: str) -> str | None:
    """The first listed plan that has a feature."""
    return next((plan.id for plan in found if plan.listed and feature in plan.features), None)


def starting(default_plan: str) -> dict[str, Any]:
    """The columns ``plan`` and ``plan_version`` of a new organization: the newest version of the installation's default."""
    versions = tables.plans.c
    newest = sa.select(sa.func.max(versions.version)).where(versions.id == default_plan).scalar_subquery()
    return {"plan": default_plan, "plan_version": newest}


# -- who is on which ------------------------------------------------------------------------------------------------------

_LOCK: Final = 0x706C616E73  # "plans" as a number
_PUT = """
UPDATE organizations o SET plan = p.id, plan_version = p.version
FROM (SELECT id, version FROM plans WHERE id = $2 AND ($3::int IS NULL OR version = $3) ORDER BY version DESC LIMIT 1) p
WHERE o.id = $1
"""
_OVERRIDES = """
SELECT name, value, expires_at FROM plan_overrides
WHERE organization_id = $1 AND (expires_at IS NULL OR expires_at > now()) ORDER BY name, source
"""
_RESTRICTED = "SELECT name, value FROM plan_overrides WHERE organization_id = $1 AND source = 'dunning'"
_EXPIRED = """
SELECT DISTINCT organization_id FROM plan_overrides WHERE expires_at <= now() ORDER BY organization_id LIMIT $1
"""


_HOLD = f"""
SELECT {COLUMNS}, o.edge_state::text FROM organizations o {JOIN} WHERE o.id = $1 FOR NO KEY UPDATE OF o
"""  # noqa: S608 - our own names
_TELL = """
UPDATE organizations SET edge_version = edge_version + 1, edge_state = $2::text::jsonb WHERE id = $1 RETURNING edge_version
"""
_TOLD = "SELECT id, edge_version, edge_state::text FROM organizations WHERE edge_version > 0 AND edge_state IS NOT NULL"


async def hold(tx: Tx, organization: str) -> tuple[Entitlements, dict[str, Any] | None] | None:
    """What holds for an organization, held until the transaction ends, and what relays were last told of it."""
    row = await tx.raw.fetchrow(_HOLD, organization)
    if row is None:
        return None
    return entitlements_in(row), json.loads(row["edge_state"]) if row["edge_state"] is not None else None


async def tell(tx: Tx, organization: str, state: dict[str, Any]) -> int:
    """Note what relays are told of an organization that the caller holds; the version of it."""
    return int(await tx.raw.fetchval(_TELL, organization, json.dumps(state)))


async def told(reader: Reader) -> list[dict[str, Any]]:
    """What relays were told of every organization that they were told something of."""
    rows = await reader.raw.fetch(_TOLD)
    return [{"id": row["id"], "version": row["edge_version"], **json.loads(row["edge_state"])} for row in rows]


async def lock(tx: Tx) -> None:
    """Until the transaction ends nobody else writes a version of a plan."""
    await tx.raw.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)


async def put(tx: Tx, organization: str, plan: str, version: int | None) -> bool:
    """Put an organization that the caller holds on a version of a plan, the newest if ``None``; whether there is such."""
    status: str = await tx.raw.execute(_PUT, organization, plan, version)
    return status == "UPDATE 1"


async def overrides(reader: Reader, organization: str) -> list[tuple[str, int | None, datetime | None]]:
    """Name, value and end of what the organization has differently now."""
    return [tuple(row) for row in await reader.raw.fetch(_OVERRIDES, organization)]


async def replace_overrides(tx: Tx, organization: str, rows: list[tuple[str, int | None, datetime | None]]) -> None:
    """Make these an operator's overrides of an organization that the caller holds."""
    await tx.raw.execute("DELETE FROM plan_overrides WHERE organization_id = $1 AND source = 'operator'", organization)
    await tx.raw.executemany(
        "INSERT INTO plan_overrides (organization_id, name, value, expires_at) VALUES ($1, $2, $3, $4)",
        [(organization, *row) for row in rows],
    )


async def restrictions(reader: Reader, organization: str) -> dict[str, int]:
    """What dunning restricts of an organization."""
    return {row["name"]: row["value"] for row in await reader.raw.fetch(_RESTRICTED, organization)}


async def restrict(tx: Tx, organization: str, limits: Mapping[str, int]) -> bool:
    """Make these what dunning restricts of an organization that the caller holds; whether that is a change."""
    if await restrictions(tx, organization) == dict(limits):
        return False
    await tx.raw.execute("DELETE FROM plan_overrides WHERE organization_id = $1 AND source = 'dunning'", organization)
    await tx.raw.executemany(
        "INSERT INTO plan_overrides (organization_id, name, source, value) VALUES ($1, $2, 'dunning', $3)",
        [(organization, name, value) for name, value in sorted(limits.items())],
    )
    return True


async def expired_overrides(reader: Reader, limit: int) -> list[str]:
    """Organizations that have overrides which are over."""
    return [row["organization_id"] for row in await reader.raw.fetch(_EXPIRED, limit)]


async def expire_overrides(tx: Tx, organization: str) -> bool:
    """Delete what is over of an organization that the caller holds; whether there was something."""
    status: str = await tx.raw.execute(
        "DELETE FROM plan_overrides WHERE organization_id = $1 AND expires_at <= now()", organization
    )
    return status != "DELETE 0"


_REFUSED = "SELECT id FROM organizations WHERE edge_version > 0 AND (edge_state #>> '{refuse,until}')::float8 <= $1"


async def refused_until(reader: Reader, now: float) -> list[str]:
    """The organizations whose refusal was to end by ``now`` (unix seconds)."""
    return [row["id"] for row in await reader.raw.fetch(_REFUSED, now)]


_RETENTION = f"""
SELECT o.id, CASE WHEN v.name IS NULL THEN (p.limits->>$1)::bigint ELSE v.value END AS days
FROM organizations o {JOIN} LEFT JOIN plan_overrides v
    ON v.organization_id = o.id AND v.name = $1 AND (v.expires_at IS NULL OR v.expires_at > now())
"""  # noqa: S608 - our own names


async def retention(reader: Reader, name: str) -> dict[int, list[str]]:
    """The organizations whose plan keeps something for so many days (``events_days``, …), by the days; at least one."""
    found: dict[int, list[str]] = {}
    for row in await reader.raw.fetch(_RETENTION, name):
        if row["days"] is not None:
            found.setdefault(max(1, row["days"]), []).append(row["id"])
    return found


_METERED = f"""
SELECT {COLUMNS}, coalesce((o.edge_state #>> '{{refuse,until}}')::float8 > $2, false) AS refused
FROM organizations o {JOIN} WHERE o.id = ANY($1)
"""  # noqa: S608 - our own names


async def metered(reader: Reader, organizations: list[str], now: float) -> list[tuple[Entitlements, bool]]:
    """Those of the organizations that have a limit of a month, and whether their traffic is refused for it."""
    rows = await reader.raw.fetch(_METERED, organizations, now)
    found = [(entitlements_in(row), bool(row["refused"])) for row in rows]
    return [(held, refused) for held, refused in found if any(held.limit(name) for name in MONTHLY)]
