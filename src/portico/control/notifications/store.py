"""The table of channels, and every query of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from portico.control.notifications import events
from portico.kit import columns
from portico.kit.db import Reader, Tx, metadata
from portico.kit.outbox import lane, messages

channels = sa.Table(
    "notification_channels",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, sa.ForeignKey("organizations.id", ondelete="CASCADE"), nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    # A Slack address is a secret as a whole, a webhook's may hold one: sealed, with a form that may be shown beside it.
    sa.Column("sealed_target", sa.LargeBinary, nullable=False),
    sa.Column("shown_target", sa.Text, nullable=False),
    sa.Column("events", ARRAY(sa.Text), nullable=False),
    # active, off (by a person), disabled (by us), unconfirmed (an address whose reader has not said yes).
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("reason", sa.Text),
    # JSON: a list of {"secret", "until"}, the newest first, which has no end.
    sa.Column("sealed_secrets", sa.LargeBinary),
    sa.Column("code_digest", sa.Text),
    columns.time("code_expires_at"),
    sa.Column("code_tries", sa.Integer, nullable=False, server_default="0"),
    columns.created(),
    columns.time("updated_at"),
    # Since when every attempt has failed; null: the last one did not.
    columns.time("failing_since"),
    columns.time("delivered_at"),
    sa.Column("last_error", sa.Text),
    sa.Index(None, "organization_id", "id"),
    sa.CheckConstraint("kind IN ('webhook', 'email', 'slack')", name="kind"),
    sa.CheckConstraint("state IN ('active', 'off', 'disabled', 'unconfirmed')", name="state"),
)


async def take_turns(tx: Tx, organization: str) -> None:
    """Changes of one organization's channels take turns until their transactions end."""
    await tx.raw.execute("SELECT pg_advisory_xact_lock(hashtextextended('channels of ' || $1, 0))", organization)


async def listing(reader: Reader, organization: str) -> Sequence[Any]:
    """Every channel of an organization, the oldest first."""
    return await reader.fetch_all(
        sa.select(channels).where(channels.c.organization_id == organization).order_by(channels.c.id)
    )


async def one(reader: Reader, organization: str, channel: str, *, lock: bool = False) -> Any | None:
    """A channel of the organization; ``lock`` until the transaction ends."""
    found = sa.select(channels).where(channels.c.id == channel, channels.c.organization_id == organization)
    return await reader.fetch_one(found.with_for_update() if lock else found)


async def wanting(reader: Reader, organization: str, event: str) -> Sequence[Any]:
    """The active channels that want ``event``."""
    wants = channels.c.events.overlap([event, events.EVERYTHING])
    active = (channels.c.organization_id == organization) & (channels.c.state == "active")
    return await reader.fetch_all(sa.select(channels).where(active, wants).order_by(channels.c.id))


async def update(tx: Tx, channel: str, **values: Any) -> None:
    """Change a channel's columns."""
    await tx.execute(sa.update(channels).where(channels.c.id == channel).values(updated_at=sa.func.now(), **values))


async def try_code(tx: Tx, organization: str, channel: str, tries: int) -> Any | None:
    """Count a try of a code that may still be tried; the row, or ``None``."""
    mine = (channels.c.id == channel) & (channels.c.organization_id == organization)
    live = (channels.c.code_tries < tries) & (channels.c.code_expires_at > sa.func.now())
    statement = sa.update(channels).where(mine, live, channels.c.state == "unconfirmed")
    return (await tx.execute(statement.values(code_tries=channels.c.code_tries + 1).returning(channels))).first()


async def delivered(tx: Tx, channel: str) -> None:
    """Note that a receiver took something; not more often than is shown."""
    seldom = channels.c.delivered_at < sa.func.now() - sa.text("interval '1 minute'")
    news = channels.c.failing_since.is_not(None) | channels.c.delivered_at.is_(None) | seldom
    values = {"failing_since": None, "last_error": None, "delivered_at": sa.func.now()}
    await tx.execute(sa.update(channels).where(channels.c.id == channel, news).values(values))


async def failed(tx: Tx, channel: str, error: str, patience_seconds: float) -> Any | None:
    """Note that a receiver did not; the row with ``impatient``: whether all have failed for so long."""
    since = sa.func.coalesce(channels.c.failing_since, sa.func.now())
    limit = columns.ago(patience_seconds)
    statement = sa.update(channels).where(channels.c.id == channel).values(failing_since=since, last_error=error)
    return (await tx.execute(statement.returning(channels, (since < limit).label("impatient")))).first()


# -- what was sent to them -----------------------------------------------------------------------------------------------


async def deliveries(
    reader: Reader, organization: str, limit: int, before: str | None, channel: str | None, state: str | None
) -> Sequence[Any]:
    """Messages to channels, newest first. Never their bodies."""
    m = messages.c
    kept = m.sealed_body.is_not(None).label("kept")
    shown = (m.id, m.lane, m.driver, m.topic, m.queue_state, m.attempts, m.queued_at, m.available_at, m.attempted_at,
             m.status, m.receipt, m.last_error, m.finished_at, m.lease_token, kept)  # fmt: skip
    found = sa.select(*shown).where(m.organization_id == organization)
    found = found.where(
        m.lane == lane(organization, channel) if channel else m.lane.startswith(f"{organization}/", autoescape=True)
    )
    if before is not None:
        found = found.where(m.id < before)
    if state is not None:
        found = found.where(m.queue_state == state)
    return await reader.fetch_all(found.order_by(m.id.desc()).limit(limit))


async def delivery(reader: Reader, organization: str, message: str, *, lock: bool = False) -> Any | None:
    """One of them."""
    m = messages.c
    mine = (
        (m.id == message) & (m.organization_id == organization) & m.lane.startswith(f"{organization}/", autoescape=True)
    )
    found = sa.select(messages).where(mine)
    return await reader.fetch_one(found.with_for_update() if lock else found)


async def tests_since(reader: Reader, organization: str, channel: str, seconds: float) -> tuple[int, int]:
    """How many tests, and codes, were asked for lately: of a channel, and of all that the organization has or had."""
    m = messages.c
    lately = m.queued_at > columns.ago(seconds)
    asked = m.topic.in_([events.TEST, events.CODE])
    here = sa.func.count().filter(m.lane == lane(organization, channel))
    found = sa.select(here, sa.func.count()).where(m.organization_id == organization, asked, lately)
    row: Any = await reader.fetch_one(found)
    return int(row[0]), int(row[1])


async def codes_since(reader: Reader, organization: str, seconds: float) -> int:
    """How many codes the organization had mailed lately, to channels that are gone, too."""
    m = messages.c
    lately = m.queued_at > columns.ago(seconds)
    found = sa.select(sa.func.count()).where(m.organization_id == organization, m.topic == events.CODE, lately)
    return int(await reader.scalar(found))
