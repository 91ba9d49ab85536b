"""The tables of finance, and the queries on events and chains. Other parts of the control plane ask this package's functions.

Rows of events, transactions, postings, seals and movements are written once: a trigger refuses UPDATE, DELETE and TRUNCATE to
everybody, and the privileges to do so are revoked from the role that made the tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from portico.kit import canonical
from portico.kit.db import HasConnection, Reader, Tx, metadata

#: The two chains of an organization.
EVENTS: Final = "events"
LEDGER: Final = "ledger"
#: What stands before the first row of a chain.
ZERO: Final = bytes(32)


def _text(name: str, *, null: bool = True) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, nullable=null)


def _time(name: str, *, null: bool = True) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=null)


def _minor(name: str, *, null: bool = True) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger, nullable=null)


chains = sa.Table(
    "ledger_chains",
    metadata,
    # An organization, or `platform`.
    sa.Column("chain", sa.Text, primary_key=True),
    sa.Column("log", sa.Text, primary_key=True),
    # Of the newest row; 0: none yet.
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sa.CheckConstraint("log IN ('events', 'ledger')", name="log"),
)

events = sa.Table(
    "billing_finance_events",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("chain", null=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    _time("recorded_at", null=False),
    _text("provider", null=False),
    _text("account", null=False),
    sa.Column("livemode", sa.Boolean, nullable=False),
    _text("event_id", null=False),
    _text("event_type", null=False),
    _text("api_version"),
    _text("kind", null=False),
    _time("occurred_at", null=False),
    _time("received_at", null=False),
    sa.Column("raw_sha256", sa.LargeBinary, nullable=False),
    _text("effect_key", null=False),
    _text("organization_id"),
    _text("customer_ref"),
    _text("subscription_ref"),
    _text("invoice_ref"),
    _text("payment_ref"),
    _text("refund_ref"),
    _text("dispute_ref"),
    _text("payout_ref"),
    _text("checkout_ref"),
    _text("status"),
    _text("plan_ref"),
    sa.Column("cancel_at_period_end", sa.Boolean),
    _minor("amount_minor"),
    _minor("tax_minor"),
    _minor("fee_minor"),
    _minor("net_minor"),
    _text("currency"),
    _time("period_start"),
    _time("period_end"),
    sa.Column("attempt", sa.Integer),
    _time("next_attempt_at"),
    sa.Column("is_final_attempt", sa.Boolean),
    _text("failure_code"),
    sa.Column("object_version", sa.BigInteger, nullable=False),
    _text("invoice_number"),
    sa.Column("lines", JSONB, nullable=False),
    sa.CheckConstraint("currency ~ '^[A-Z]{3}$'", name="currency"),
    sa.UniqueConstraint("chain", "seq", name="billing_finance_events_chain_seq_key"),
    sa.UniqueConstraint("provider", "account", "livemode", "effect_key", name="billing_finance_events_effect_key"),
    sa.Index("billing_finance_events_organization_id_id_ix", "organization_id", "id"),
    sa.Index("billing_finance_events_invoice_ref_ix", "invoice_ref"),
    sa.Index("billing_finance_events_refund_ref_ix", "refund_ref"),
    sa.Index("billing_finance_events_payout_ref_ix", "payout_ref"),
    sa.Index("billing_finance_events_occurred_at_id_ix", "occurred_at", "id"),
    sa.Index("billing_finance_events_account_occurred_at_ix", "provider", "account", "livemode", "occurred_at"),
    sa.Index("billing_finance_events_kind_ix", "kind", "id"),
    sa.Index(
        "billing_finance_events_subscription_ref_ix", "subscription_ref",
        postgresql_where=sa.text("kind IN ('invoice.issued', 'invoice.credited')"),
    ),
)  # fmt: skip

transactions = sa.Table(
    "ledger_transactions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    # Over all chains, in the order in which rows were written; see ledger.cut_off for what may be read up to a number.
    sa.Column("number", sa.BigInteger, sa.Identity(always=True), nullable=False),
    _text("chain", null=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    # What it is about, said so that the same cannot be posted twice.
    _text("key", null=False),
    _text("kind", null=False),
    _text("organization_id"),
    # The day that it counts for. Later than `occurred_at` when that day was sealed before anybody heard of it.
    sa.Column("booked_on", sa.Date, nullable=False),
    _time("occurred_at", null=False),
    _time("recorded_at", null=False),
    _text("provider"),
    _text("provider_account"),
    _text("subscription_ref"),
    _text("invoice_ref"),
    _text("payment_ref"),
    _text("plan_ref"),
    # What it was derived from: a finance event, an invoice, a case, a receipt.
    _text("source"),
    _text("reverses"),
    _text("note"),
    sa.Column("posting_count", sa.SmallInteger, nullable=False),
    sa.UniqueConstraint("number", name="ledger_transactions_number_key"),
    sa.UniqueConstraint("chain", "seq", name="ledger_transactions_chain_seq_key"),
    sa.UniqueConstraint("key", name="ledger_transactions_key_key"),
    sa.UniqueConstraint("reverses", name="ledger_transactions_reverses_key"),
    sa.CheckConstraint("posting_count >= 2", name="posting_count"),
    sa.Index("ledger_transactions_organization_id_number_ix", "organization_id", "number"),
    sa.Index("ledger_transactions_booked_on_ix", "booked_on"),
    sa.Index("ledger_transactions_invoice_ref_ix", "invoice_ref"),
    sa.Index("ledger_transactions_payment_ref_ix", "payment_ref"),
    sa.Index("ledger_transactions_kind_ix", "kind", "number"),
)

postings = sa.Table(
    "ledger_postings",
    metadata,
    sa.Column("transaction_id", sa.Text, primary_key=True),
    sa.Column("position", sa.SmallInteger, primary_key=True),
    _text("organization_id"),
    _text("account", null=False),
    _text("currency", null=False),
    # A debit is positive, a credit negative.
    _minor("amount_minor", null=False),
    _text("provider"),
    _text("invoice_ref"),
    sa.Column("booked_on", sa.Date, nullable=False),
    sa.CheckConstraint("currency ~ '^[A-Z]{3}$'", name="currency"),
    sa.CheckConstraint("amount_minor <> 0 AND abs(amount_minor) < 9007199254740992", name="amount_minor"),
    sa.Index("ledger_postings_account_ix", "account", "currency", "provider"),
    sa.Index("ledger_postings_organization_id_ix", "organization_id", "account", "currency"),
    sa.Index("ledger_postings_booked_on_ix", "booked_on"),
    sa.Index("ledger_postings_invoice_ref_ix", "invoice_ref", postgresql_where=sa.text("invoice_ref IS NOT NULL")),
)

seals = sa.Table(
    "ledger_seals",
    metadata,
    # Days from `starts_on` up to, not including, `ends_on`.
    sa.Column("ends_on", sa.Date, primary_key=True),
    sa.Column("starts_on", sa.Date, nullable=False),
    sa.Column("transactions", sa.BigInteger, nullable=False),
    # SHA-256 over the hashes of the period's transactions, by chain and number in it.
    sa.Column("digest", sa.LargeBinary, nullable=False),
    # [account, currency, movement, closing balance], sorted.
    sa.Column("totals", JSONB, nullable=False),
    sa.Column("previous", sa.LargeBinary, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    _text("sealed_by", null=False),
    _time("sealed_at", null=False),
    sa.CheckConstraint("starts_on < ends_on", name="days"),
)

schedules = sa.Table(
    "ledger_recognition",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    # Account and mode of the provider, its invoice, and the line on it.
    _text("source", null=False),
    _text("invoice_ref", null=False),
    sa.Column("line", sa.Integer, nullable=False),
    _text("organization_id"),
    _text("provider", null=False),
    _text("subscription_ref"),
    _text("plan_ref"),
    _text("currency", null=False),
    _minor("total_minor", null=False),
    _time("starts_at", null=False),
    _time("ends_at", null=False),
    # Every day before this one is in the ledger.
    sa.Column("next_on", sa.Date, nullable=False),
    _minor("recognized_minor", null=False),
    sa.Column("done", sa.Boolean, nullable=False),
    sa.UniqueConstraint("source", "invoice_ref", "line", name="ledger_recognition_line_key"),
    sa.CheckConstraint("starts_at <= ends_at", name="period"),
    sa.CheckConstraint("NOT done OR recognized_minor IN (0, total_minor)", name="recognized"),
    sa.Index("ledger_recognition_due_ix", "next_on", postgresql_where=sa.text("NOT done")),
)

revenue_daily = sa.Table(
    "revenue_daily",
    metadata,
    sa.Column("day", sa.Date, primary_key=True),
    # Empty: of no organization, of no plan.
    sa.Column("organization_id", sa.Text, primary_key=True),
    sa.Column("plan_ref", sa.Text, primary_key=True),
    sa.Column("currency", sa.Text, primary_key=True),
    _minor("gross_minor", null=False),
    _minor("refund_minor", null=False),
    _minor("tax_minor", null=False),
    _minor("fee_minor", null=False),
    _minor("net_minor", null=False),
    _minor("recognized_minor", null=False),
    _minor("deferred_minor", null=False),
    sa.Index("revenue_daily_organization_id_day_ix", "organization_id", "day"),
)

# One row: up to which number of the ledger the days were worked out.
revenue_progress = sa.Table(
    "revenue_progress",
    metadata,
    sa.Column("id", sa.SmallInteger, primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),
)

movements = sa.Table(
    "mrr_movements",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("organization_id", null=False),
    _text("subscription_id", null=False),
    _text("currency", null=False),
    sa.Column("moved_on", sa.Date, nullable=False),
    _text("kind", null=False),
    _minor("delta_minor", null=False),
    # Of the organization in this currency, after it.
    _minor("total_minor", null=False),
    _text("plan"),
    # What moved it, so that the same cannot move it twice.
    _text("cause", null=False),
    _time("recorded_at", null=False),
    sa.UniqueConstraint("subscription_id", "currency", "cause", name="mrr_movements_cause_key"),
    sa.CheckConstraint("kind IN ('new', 'expansion', 'contraction', 'churn', 'reactivation')", name="kind"),
    sa.CheckConstraint("delta_minor <> 0", name="delta_minor"),
    sa.Index("mrr_movements_organization_id_ix", "organization_id", "currency", "id"),
    sa.Index("mrr_movements_moved_on_ix", "moved_on"),
)


# -- chains --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a chain: the number and hash of its newest row; and the time, by the database's clock."""

    seq: int
    hash: bytes
    at: datetime


_HEAD = "SELECT seq, hash, clock_timestamp() AS at FROM ledger_chains WHERE chain = $1 AND log = $2"
_BEGIN = "INSERT INTO ledger_chains (chain, log, seq, hash) VALUES ($1, $2, 0, $3) ON CONFLICT DO NOTHING"
_ADVANCE = "UPDATE ledger_chains SET seq = $3, hash = $4 WHERE chain = $1 AND log = $2"


def link(previous: bytes, content: Mapping[str, Any]) -> bytes:
    """The hash of a row with this content after ``previous``: SHA-256 of both, the content by RFC 8785."""
    return hashlib.sha256(previous + canonical.encode(dict(content))).digest()


async def lock_head(tx: Tx, chain: str, log: str) -> Head:
    """The end of a chain, which is made if there is none, locked until ``tx`` ends."""
    row = await tx.raw.fetchrow(_HEAD + " FOR UPDATE", chain, log)
    if row is None:
        await tx.raw.execute(_BEGIN, chain, log, ZERO)
        row = await tx.raw.fetchrow(_HEAD + " FOR UPDATE", chain, log)
    return Head(row["seq"], row["hash"], row["at"])


async def head(reader: HasConnection, chain: str, log: str) -> Head | None:
    """The end of a chain, not locked; ``None``: nothing was ever written."""
    row = await reader.raw.fetchrow(_HEAD, chain, log)
    return None if row is None else Head(row["seq"], row["hash"], row["at"])


async def advance(tx: Tx, chain: str, log: str, seq: int, hash_: bytes) -> None:
    """Move the end of a chain, whose head ``tx`` holds, to a row that it has just written."""
    await tx.raw.execute(_ADVANCE, chain, log, seq, hash_)


async def chain_names(reader: Reader, log: str) -> list[str]:
    """Every chain of a log, in order: those with a head, and those that rows name all the same."""
    table = events if log == EVENTS else transactions
    named = sa.union(sa.select(chains.c.chain).where(chains.c.log == log), sa.select(table.c.chain).distinct())
    rows = await reader.fetch_all(named)
    return sorted(row.chain for row in rows)


async def hash_of(reader: HasConnection, chain: str, log: str, seq: int) -> bytes | None:
    """The hash of one row of a chain."""
    table = "billing_finance_events" if log == EVENTS else "ledger_transactions"
    query = f"SELECT hash FROM {table} WHERE chain = $1 AND seq = $2"  # noqa: S608 - one of two names
    found: bytes | None = await reader.raw.fetchval(query, chain, seq)
    return found


# -- events --------------------------------------------------------------------------------------------------------------


async def event_id(reader: HasConnection, provider: str, account: str, livemode: bool, effect: str) -> str | None:
    """The event with this effect."""
    query = """
        SELECT id FROM billing_finance_events
        WHERE provider = $1 AND account = $2 AND livemode = $3 AND effect_key = $4
    """
    found: str | None = await reader.raw.fetchval(query, provider, account, livemode, effect)
    return found


async def insert_event(tx: Tx, row: Mapping[str, Any]) -> None:
    """One more."""
    await tx.execute(sa.insert(events), dict(row))


async def event_kinds(
    reader: Reader, provider: str, account: str, livemode: bool, references: Mapping[str, str]
) -> list[tuple[str, str | None]]:
    """Kind and status of the events with these references."""
    columns = events.c
    query = sa.select(columns.kind, columns.status).where(
        columns.provider == provider,
        columns.account == account,
        columns.livemode == livemode,
        *(columns[name] == value for name, value in references.items()),
    )
    return [(row.kind, row.status) for row in await reader.fetch_all(query.distinct())]


# Of several of one moment the provider's own reference decides: whatever order they were heard of in.
_LINES: Final = """
SELECT e.currency, e.lines::text AS lines, e.occurred_at FROM billing_finance_events e
WHERE e.subscription_ref = $4 AND e.kind IN ('invoice.issued', 'invoice.credited') AND e.currency IS NOT NULL
    AND e.provider = $1 AND e.account = $2 AND e.livemode = $3
    AND NOT EXISTS (
        SELECT FROM billing_finance_events v WHERE v.invoice_ref = e.invoice_ref AND v.kind = 'invoice.voided'
            AND v.provider = e.provider AND v.account = e.account AND v.livemode = e.livemode)
ORDER BY e.occurred_at DESC, e.invoice_ref DESC LIMIT 24
"""


async def event_lines(
    reader: HasConnection, provider: str, account: str, livemode: bool, subscription: str
) -> Sequence[Any]:
    """``currency, lines`` (JSON), ``occurred_at`` of the newest invoices of a subscription that are not void, newest first."""
    rows: Sequence[Any] = await reader.raw.fetch(_LINES, provider, account, livemode, subscription)
    return rows


async def dispute_events(reader: Reader, subscription: Any) -> Sequence[sa.Row[Any]]:
    """What was told of disputes of a subscription (``organization_id``, ``provider``, ``account``, ``livemode``, ``ref``)."""
    columns = events.c
    query = sa.select(columns.kind, columns.status, columns.dispute_ref, columns.occurred_at).where(
        columns.organization_id == subscription.organization_id,
        columns.dispute_ref.is_not(None),
        columns.provider == subscription.provider,
        columns.account == subscription.account,
        columns.livemode == subscription.livemode,
        columns.subscription_ref == subscription.ref,
    )
    return await reader.fetch_all(query)


async def events_listing(
    reader: Reader, organization: str | None, filters: Mapping[str, Any], limit: int, before: str | None
) -> Sequence[sa.Row[Any]]:
    """Those of an organization (or all) that fit, the newest first."""
    columns = events.c
    query = sa.select(events)
    if organization is not None:
        query = query.where(columns.organization_id == organization)
    for name, column in {
        "kind": columns.kind,
        "provider": columns.provider,
        "organization": columns.organization_id,
    }.items():
        if (wanted := filters.get(name)) is not None:
            query = query.where(column == wanted)
    if (since := filters.get("since")) is not None:
        query = query.where(columns.occurred_at >= since)
    if (until := filters.get("until")) is not None:
        query = query.where(columns.occurred_at < until)
    if before is not None:
        query = query.where(columns.id < before)
    return await reader.fetch_all(query.order_by(columns.id.desc()).limit(limit))


async def events_stretch(reader: Reader, chain: str, first: int, limit: int) -> Sequence[sa.Row[Any]]:
    """Events of a chain from a number on, in order."""
    query = sa.select(events).where(events.c.chain == chain, events.c.seq >= first).order_by(events.c.seq)
    return await reader.fetch_all(query.limit(limit))
