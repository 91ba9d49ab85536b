"""When a domain's next certificate is due: after an issue, after a failure, and by what its authority (CA) suggests.

Everything is a moment in PostgreSQL (``certificate_schedules.next_at``), spread at random, so that a fleet of workers that starts
finds what is due and no more than that. The sweep turns due moments into orders: few at once, organizations in turn.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from portico.control import changes
from portico.control.domains import acme_store, lifecycle
from portico.control.domains.acme_cas import DNS, Ca
from portico.control.domains.acme_client import Window, certificate_id
from portico.control.domains.acme_errors import OF_THE_CA, AcmeError
from portico.control.domains.acme_preflight import UNREADY
from portico.control.domains.lifecycle import NewEvent
from portico.control.domains.store import custom_domains
from portico.kit import queue
from portico.kit.db import Database, Tx
from portico.kit.ids import new_id
from portico.settings import ApiSettings

#: What is drawn at random of a pause, up and down.
_SPREAD: Final = 0.1
#: Share of a lifetime before its end at which no suggestion counts any more.
_EMERGENCY: Final = 0.05
#: Seconds until a CA is first asked when to renew what it has just issued; drawn up to ten times as much.
_FIRST_ARI: Final = 60.0
_SHORTEST: Final = 30.0
_ABANDONED: Final = AcmeError("abandoned", "every attempt at the order ended without a word")


def spread(seconds: float) -> float:
    """About so many seconds."""
    return seconds * random.uniform(1 - _SPREAD, 1 + _SPREAD)  # noqa: S311 - jitter, no secret


# -- with whom -----------------------------------------------------------------------------------------------------------

#: A CA wants to be left alone for longer than is waited for, and another one may be asked.
PAUSED: Final = "ca_paused"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a certificate is ordered: the position of a CA among those of the settings, and the directory that is asked."""

    position: int
    directory: str
    staging: bool


def place(
    settings: ApiSettings, cas: Sequence[Ca], wanted: int, pauses: Mapping[str, float], *, staging_first: bool
) -> Place:
    """Who is asked: the wanted CA, or the next one in turn that is not to be left alone for long (`acme_wait_seconds`); when all
    of them are, the wanted one."""
    first = wanted if wanted < len(cas) else 0
    places = [_place(cas, (first + step) % len(cas), staging_first) for step in range(len(cas))]
    soon = (each for each in places if pauses.get(each.directory, 0.0) <= settings.acme_wait_seconds)
    return next(soon, places[0])


def _place(cas: Sequence[Ca], position: int, staging_first: bool) -> Place:
    ca = cas[position]
    if staging_first and ca.staging:
        return Place(position, ca.staging, staging=True)
    return Place(position, ca.directory, staging=False)


# -- what follows from orders --------------------------------------------------------------------------------------------


def by_lifetime(settings: ApiSettings, not_before: datetime, not_after: datetime) -> datetime:
    """When a certificate is renewed whose CA says nothing: with a third of its life left, or half of a short one."""
    lifetime = not_after - not_before
    short = lifetime < timedelta(days=settings.acme_short_days)
    share = settings.acme_renew_share_short if short else settings.acme_renew_share
    return not_after - lifetime * (share * random.uniform(1, 1 + _SPREAD / 2))  # noqa: S311 - jitter, no secret


def by_window(window: Window, now: datetime, not_before: datetime, not_after: datetime) -> datetime:
    """A moment of the window that a CA suggests, drawn at random (RFC 9773, 4.2); now, when it is over. Never so late that the
    certificate is about to end."""
    latest = not_after - (not_after - not_before) * _EMERGENCY
    length = (window.end - window.start).total_seconds()
    drawn = window.start + timedelta(seconds=random.uniform(0, length))  # noqa: S311 - spreads load, no secret
    return max(now, min(drawn, latest))


async def issued(tx: Tx, settings: ApiSettings, order: Any, leaf: x509.Certificate) -> datetime:
    """A certificate is there; when it is due again."""
    renews = by_lifetime(settings, leaf.not_valid_before_utc, leaf.not_valid_after_utc)
    try:
        named: str | None = certificate_id(leaf)
    except AcmeError:
        named = None
    first = datetime.now(UTC) + timedelta(seconds=_FIRST_ARI * random.uniform(1, 10))  # noqa: S311 - jitter, no secret
    await acme_store.set_schedule(
        tx, order.domain_id, next_at=renews, failures=0, ca_failures=0, staging_first=False, error_code=None,
        directory=order.directory, certificate=named, fingerprint=leaf.fingerprint(hashes.SHA256()).hex(),
        not_before=leaf.not_valid_before_utc, not_after=leaf.not_valid_after_utc,
        ari_next_at=first if named else None, ari_start=None, ari_end=None, ari_explanation=None, ca=0,
    )  # fmt: skip
    return renews


async def ensure(tx: Tx, domain: Any) -> None:
    """A schedule for a domain that the sweep has not seen yet."""
    await tx.raw.execute(
        "INSERT INTO certificate_schedules (domain_id, organization_id) VALUES ($1, $2) ON CONFLICT DO NOTHING",
        domain.id, domain.organization_id,
    )  # fmt: skip


async def ready(tx: Tx, domain_id: str) -> None:
    """The name leads here, or delegates, since now: it need not wait for the pause of when it did not."""
    await acme_store.hasten(tx, domain_id, tuple(UNREADY))


async def rehearsed(tx: Tx, order: Any) -> None:
    """A staging issued: now in earnest."""
    await acme_store.set_schedule(tx, order.domain_id, next_at=datetime.now(UTC), staging_first=False)


async def rest(tx: Tx, domain_id: str) -> None:
    """Nothing is due until the sweep finds the name wanted again."""
    await acme_store.set_schedule(tx, domain_id, next_at=None, forced=False)


async def failed(tx: Tx, settings: ApiSettings, cas: Sequence[Ca], order: Any, err: AcmeError) -> datetime:
    """An order ended without a certificate; when there may be another one, and with whom."""
    row = await acme_store.schedule(tx, order.domain_id, lock=True)
    now = datetime.now(UTC)
    values: dict[str, Any]
    if row is None:
        return now
    if err.code == "budget_spent":
        at = now + timedelta(seconds=max(_SHORTEST, err.retry_after or 0.0) * random.uniform(1, 1 + _SPREAD))  # noqa: S311
        await acme_store.set_schedule(tx, order.domain_id, next_at=at, error_code=err.code)
        return at
    if (
        err.code == PAUSED
    ):  # nobody failed: it goes on at once, with whom `place` finds, also where a person has asked for it
        held = sa.select(custom_domains.c.cert_held_at.is_not(None)).where(custom_domains.c.id == order.domain_id)
        values = {"next_at": now, "error_code": err.code, "forced": held.scalar_subquery()}
        await acme_store.set_schedule(tx, order.domain_id, **values)
        return now
    unready = err.code in UNREADY
    ladder = settings.acme_unready_seconds if unready else settings.acme_retry_seconds
    seconds = spread(ladder[min(row.failures, len(ladder) - 1)])
    if row.not_after is not None:  # what is about to end is tried more often
        seconds = min(seconds, max(_SHORTEST, (row.not_after - now).total_seconds() / 8))
    values = {"failures": row.failures + 1, "error_code": err.code}
    of_ca = err.code in OF_THE_CA or err.code == "caa_forbids"
    values["ca_failures"] = row.ca_failures + 1 if of_ca else 0
    for_long = err.code == "rate_limited" and (err.retry_after or 0.0) > settings.acme_wait_seconds
    once = for_long or err.code in ("caa_forbids", "rejected_identifier")
    enough = 1 if once else settings.acme_fallback_after
    if of_ca and len(cas) > 1 and values["ca_failures"] >= enough:
        values |= {"ca": (order.ca + 1) % len(cas), "ca_failures": 0, "staging_first": False}
        seconds = spread(_SHORTEST) if values["ca"] else seconds
    else:
        if not (of_ca or unready):
            values["staging_first"] = bool(order.ca < len(cas) and cas[order.ca].staging)
        seconds = max(seconds, err.retry_after or 0.0)
    at = now + timedelta(seconds=seconds)
    await acme_store.set_schedule(tx, order.domain_id, next_at=at, **values)
    return at


# -- the sweep -----------------------------------------------------------------------------------------------------------

# Names that are wanted and have no schedule, or one that rests since they were not.
_ADD: Final = """
INSERT INTO certificate_schedules AS s (domain_id, organization_id, next_at)
SELECT d.id, d.organization_id, now() FROM custom_domains AS d
WHERE d.hostname_status IN ('verified', 'active') AND d.tls_mode = 'terminate' AND d.frozen IS NULL
    AND NOT EXISTS (SELECT FROM certificate_schedules AS known WHERE known.domain_id = d.id) LIMIT $1
ON CONFLICT (domain_id) DO NOTHING
"""
_RESUME: Final = """
UPDATE certificate_schedules AS s SET next_at = now() FROM custom_domains AS d
WHERE d.id = s.domain_id AND s.next_at IS NULL AND d.hostname_status IN ('verified', 'active') AND d.tls_mode = 'terminate'
    AND d.frozen IS NULL AND NOT EXISTS (SELECT FROM certificate_orders AS o WHERE o.domain_id = s.domain_id
        AND o.state NOT IN ('issued', 'failed', 'canceled'))
"""
# A certificate that was revoked is replaced at once, the first time; after a failure the pauses hold.
_REVOKED: Final = """
UPDATE certificate_schedules AS s SET next_at = now() FROM custom_domains AS d
WHERE d.id = s.domain_id AND d.cert_status = 'revoked' AND s.fingerprint = d.cert_fingerprint AND s.failures = 0
    AND s.next_at > now()
"""
_ROOM: Final = """
SELECT $1 - count(*) FROM certificate_orders WHERE state NOT IN ('issued', 'failed', 'canceled')
"""
# A name that does not lead here yet can be proved by DNS-01 alone; it waits for what makes one of the ways possible.
_DUE: Final = """
WITH due AS (
    SELECT s.domain_id, s.organization_id, d.name, s.ca, s.staging_first, s.fingerprint, s.directory, s.certificate,
        s.ari_start <= now() AND now() < s.ari_end AS suggested, s.next_at, coalesce(h.last_version, 0) + 1 AS revision,
        row_number() OVER (PARTITION BY s.organization_id ORDER BY s.next_at) AS turn
    FROM certificate_schedules AS s JOIN custom_domains AS d ON d.id = s.domain_id
    LEFT JOIN certificate_heads AS h ON h.domain_id = s.domain_id
    WHERE s.next_at <= now() AND d.hostname_status IN ('verified', 'active') AND d.tls_mode = 'terminate'
        AND d.frozen IS NULL AND (d.cert_held_at IS NULL OR s.forced)
        AND (d.hostname_status = 'active' OR d.name LIKE '*.%' OR ($2 AND (
            d.dns_findings #>> '{delegation,state}' = 'ok'
            OR EXISTS (SELECT FROM unnest($3::text[]) AS zone
                WHERE d.name = zone OR right(d.name, length(zone) + 1) = '.' || zone))))
)
SELECT * FROM due ORDER BY turn, next_at LIMIT $1
"""
_OPEN: Final = """
WITH wanted AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::int[], $7::text[], $8::bool[],
        $9::bool[], $10::text[]) AS w(id, domain_id, organization_id, name, revision, ca, directory, staging, renewal, replaces)
), made AS (
    INSERT INTO certificate_orders (id, domain_id, organization_id, name, revision, ca, directory, staging, renewal, replaces)
    SELECT * FROM wanted ON CONFLICT DO NOTHING RETURNING domain_id
)
UPDATE certificate_schedules AS s SET next_at = NULL, forced = false, ordered_at = now() FROM made
WHERE s.domain_id = made.domain_id
"""
_DEAD: Final = (
    "SELECT id FROM certificate_orders WHERE queue_state = 'dead' AND state NOT IN ('issued', 'failed', 'canceled')"
)


async def sweep(db: Database, settings: ApiSettings, cas: Sequence[Ca]) -> int:
    """Make orders of what is due, as many as there is room for; returns how many."""
    if not cas:
        return 0
    async with db.transaction() as tx:
        await tx.raw.execute(_ADD, settings.acme_sweep_names)
        await tx.raw.execute(_RESUME)
        await tx.raw.execute(_REVOKED)
        await _abandon(tx, settings, cas)
        room = min(await tx.raw.fetchval(_ROOM, settings.acme_open_orders), settings.acme_sweep_names)
        if room <= 0:
            return 0
        by_dns = bool(settings.acme_dns) and DNS in settings.acme_challenges
        rows = await tx.raw.fetch(_DUE, room, by_dns, [zone.lower().strip(".") for zone in settings.acme_dns_zones])
        if not rows:
            return 0
        pauses = await acme_store.pauses(tx)
        opened = [_opened(settings, row, cas, pauses) for row in rows]
        status: str = await tx.raw.execute(_OPEN, *(list(column) for column in zip(*opened, strict=True)))
        await queue.wake(tx, acme_store.ORDER)
    return int(status.rpartition(" ")[2])


def _opened(settings: ApiSettings, row: Any, cas: Sequence[Ca], pauses: Mapping[str, float]) -> tuple[Any, ...]:
    found = place(settings, cas, row["ca"], pauses, staging_first=row["staging_first"])
    replaces = row["certificate"] if row["suggested"] and row["directory"] == found.directory else None
    return (
        new_id("ord"), row["domain_id"], row["organization_id"], row["name"], row["revision"], found.position,
        found.directory, found.staging, row["fingerprint"] is not None, replaces,
    )  # fmt: skip


async def _abandon(tx: Tx, settings: ApiSettings, cas: Sequence[Ca]) -> None:
    """Orders that took their workers with them are over, so that their names get others."""
    for dead in await tx.raw.fetch(_DEAD):
        order = await acme_store.order(tx, dead["id"])
        assert order is not None
        await acme_store.end(tx, order.id, "failed", error_code=_ABANDONED.code, error_detail=_ABANDONED.detail)
        gone = await acme_store.take_challenges(tx, order.id)
        changes.append(tx, *(changes.challenge_removed(each) for each in gone))
        retry_at = await failed(tx, settings, cas, order, _ABANDONED)
        kind = "renewal" if order.renewal else "issuance"
        event = NewEvent(
            order.domain_id, kind, "failed", revision=order.revision, object=order.id, key=f"{order.id}.{kind}.failed",
            error_code=_ABANDONED.code, error_detail=_ABANDONED.detail, retry_at=retry_at,
            provenance={"acmeDirectory": order.directory},
        )  # fmt: skip
        await lifecycle.record(tx, event)
