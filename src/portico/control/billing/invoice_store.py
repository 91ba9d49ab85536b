"""The tables of invoices and tax, and every query on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, insert

from portico.kit.db import Reader, Tx, metadata

STATUSES: Final = ("pending", "open", "paid", "void", "uncollectible")
TREATMENTS: Final = ("standard", "reverse_charge", "exempt", "zero", "out_of_scope")
#: The legal entity that sells, as long as there is one.
ENTITY: Final = "default"


def _text(name: str, *, null: bool = True) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, nullable=null)


def _time(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True))


def _now(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now())


def _amount(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


def _one_of(column: str, values: Sequence[str]) -> sa.CheckConstraint:
    return sa.CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=column)


def _numbered() -> list[sa.Column[Any]]:
    """Whose number it has, and which."""
    return [
        _text("entity_id"),
        sa.Column("year", sa.SmallInteger),
        sa.Column("sequence", sa.BigInteger),
        _text("number"),
    ]


entities = sa.Table(
    "billing_entities",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("name", null=False),
    _text("address", null=False),
    _text("country"),
    _text("tax_id"),
    _text("email"),
    _text("footer", null=False),
    _text("invoice_prefix", null=False),
    _text("credit_note_prefix", null=False),
    _text("rounding", null=False),
    # Basis points by country (ISO 3166).
    sa.Column("rates", JSONB, nullable=False),
    _now("updated_at"),
    _one_of("rounding", ("half_up", "half_even", "down")),
)

profiles = sa.Table(
    "billing_profiles",
    metadata,
    sa.Column("organization_id", sa.Text, primary_key=True),
    _text("name", null=False),
    _text("address", null=False),
    _text("country"),
    _text("email"),
    # [{"country", "value", "checked_at", "valid", "how"}]
    sa.Column("tax_ids", JSONB, nullable=False),
    # Set by operators, who have seen a certificate.
    sa.Column("exempt", sa.Boolean, nullable=False),
    _now("updated_at"),
)

series = sa.Table(
    "billing_number_series",
    metadata,
    sa.Column("entity_id", sa.Text, primary_key=True),
    sa.Column("series", sa.Text, primary_key=True),
    sa.Column("year", sa.SmallInteger, primary_key=True, autoincrement=False),
    sa.Column("last", sa.BigInteger, nullable=False),
    _one_of("series", ("invoice", "credit_note")),
)

invoices = sa.Table(
    "billing_invoices",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("organization_id", null=False),
    _text("provider", null=False),
    _text("account", null=False),
    sa.Column("livemode", sa.Boolean, nullable=False),
    _text("provider_ref", null=False),
    _text("provider_number"),
    _text("subscription_ref"),
    _text("plan_ref"),
    # pending: something is known of it, but it was not issued yet; it has no number then, and nobody is shown it.
    _text("status", null=False),
    *_numbered(),
    _text("currency"),
    _amount("net_minor"),
    _amount("tax_minor"),
    _amount("gross_minor"),
    _amount("paid_minor"),
    _amount("credited_minor"),
    _amount("credited_tax_minor"),
    sa.Column("lines", JSONB, nullable=False, server_default="[]"),
    # As they were when it was issued.
    sa.Column("seller", JSONB),
    sa.Column("customer", JSONB),
    _time("period_start"),
    _time("period_end"),
    _time("issued_at"),
    _time("paid_at"),
    _time("voided_at"),
    _time("uncollectible_at"),
    _now("created_at"),
    _one_of("status", STATUSES),
    sa.CheckConstraint("currency ~ '^[A-Z]{3}$'", name="currency"),
    sa.CheckConstraint("(number IS NULL) = (issued_at IS NULL)", name="numbered"),
    sa.CheckConstraint("gross_minor = net_minor + tax_minor", name="gross"),
    sa.UniqueConstraint("provider", "account", "livemode", "provider_ref", name="billing_invoices_provider_ref_key"),
    sa.UniqueConstraint("entity_id", "number", name="billing_invoices_number_key"),
    sa.UniqueConstraint("entity_id", "year", "sequence", name="billing_invoices_sequence_key"),
    sa.Index("billing_invoices_organization_id_id_ix", "organization_id", "id"),
)

credit_notes = sa.Table(
    "billing_credit_notes",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("organization_id", null=False),
    _text("provider", null=False),
    _text("account", null=False),
    sa.Column("livemode", sa.Boolean, nullable=False),
    _text("refund_ref", null=False),
    _text("invoice_id"),
    # pending: its invoice was not issued yet; void: the refund failed after all.
    _text("status", null=False),
    *_numbered(),
    _text("currency"),
    _amount("net_minor"),
    _amount("tax_minor"),
    _amount("gross_minor"),
    _time("issued_at"),
    _time("voided_at"),
    _now("created_at"),
    _one_of("status", ("pending", "issued", "void")),
    sa.CheckConstraint("(number IS NULL) = (issued_at IS NULL)", name="numbered"),
    sa.UniqueConstraint("provider", "account", "livemode", "refund_ref", name="billing_credit_notes_refund_ref_key"),
    sa.UniqueConstraint("entity_id", "number", name="billing_credit_notes_number_key"),
    sa.UniqueConstraint("entity_id", "year", "sequence", name="billing_credit_notes_sequence_key"),
    sa.Index("billing_credit_notes_organization_id_ix", "organization_id", "id"),
    sa.Index("billing_credit_notes_invoice_id_ix", "invoice_id"),
)

tax_records = sa.Table(
    "billing_tax_records",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("organization_id", null=False),
    _text("invoice_id", null=False),
    _text("credit_note_id"),
    sa.Column("line", sa.Integer, nullable=False),
    # A country, or empty: nobody said.
    _text("jurisdiction", null=False),
    _text("treatment", null=False),
    sa.Column("rate_bp", sa.Integer, nullable=False),
    _text("currency", null=False),
    sa.Column("base_minor", sa.BigInteger, nullable=False),
    sa.Column("tax_minor", sa.BigInteger, nullable=False),
    # What was charged, less what the rate says; not zero where a provider rounds or taxes otherwise.
    sa.Column("difference_minor", sa.BigInteger, nullable=False),
    _text("customer_tax_id"),
    sa.Column("evidence", JSONB, nullable=False),
    _text("rounding", null=False),
    _now("recorded_at"),
    _one_of("treatment", TREATMENTS),
    sa.Index("billing_tax_records_invoice_id_ix", "invoice_id"),
    sa.Index("billing_tax_records_organization_id_ix", "organization_id", "id"),
)

_I, _C = invoices.c, credit_notes.c

_NEXT: Final = """
INSERT INTO billing_number_series (entity_id, series, year, last) VALUES ($1, $2, $3, 1)
ON CONFLICT (entity_id, series, year) DO UPDATE SET last = billing_number_series.last + 1 RETURNING last
"""


async def next_number(tx: Tx, entity: str, kind: str, year: int) -> int:
    """The next number of a series. Its row is locked until ``tx`` ends, so one that is rolled back leaves no gap."""
    return int(await tx.raw.fetchval(_NEXT, entity, kind, year))


async def entity(reader: Reader, name: str = ENTITY) -> sa.Row[Any]:
    """Who sells."""
    row = await reader.fetch_one(sa.select(entities).where(entities.c.id == name))
    assert row is not None, "the migration makes it, and nothing removes it"
    return row


async def put_entity(tx: Tx, values: Mapping[str, Any], name: str = ENTITY) -> sa.Row[Any]:
    """Say who sells; what was issued before keeps what it says."""
    statement = sa.update(entities).where(entities.c.id == name).values(**values, updated_at=sa.func.now())
    return (await tx.execute(statement.returning(entities))).one()


async def profile(reader: Reader, organization: str) -> sa.Row[Any] | None:
    """What a customer said about itself."""
    return await reader.fetch_one(sa.select(profiles).where(profiles.c.organization_id == organization))


async def put_profile(tx: Tx, organization: str, values: Mapping[str, Any]) -> sa.Row[Any]:
    """Replace it, but for what only operators set."""
    row = {"organization_id": organization, "exempt": False, **values}
    statement = insert(profiles).values(**row)
    statement = statement.on_conflict_do_update(
        index_elements=["organization_id"], set_={**values, "updated_at": sa.func.now()}
    )
    return (await tx.execute(statement.returning(profiles))).one()


async def put_exemption(tx: Tx, organization: str, exempt: bool) -> sa.Row[Any] | None:
    """Set what only operators set; ``None``: the customer has said nothing about itself yet."""
    statement = sa.update(profiles).where(profiles.c.organization_id == organization)
    return (await tx.execute(statement.values(exempt=exempt).returning(profiles))).first()


# -- invoices ------------------------------------------------------------------------------------------------------------


async def hold(tx: Tx, key: Mapping[str, Any], new: Mapping[str, Any]) -> sa.Row[Any]:
    """The invoice with this key (``provider, account, livemode, provider_ref``), locked; made of ``new`` if there is none."""
    await tx.execute(
        insert(invoices).values(**key, **new).on_conflict_do_nothing(constraint="billing_invoices_provider_ref_key")
    )
    query = sa.select(invoices).where(*(_I[name] == value for name, value in key.items())).with_for_update()
    row = await tx.fetch_one(query)
    assert row is not None
    return row


async def change(tx: Tx, invoice: str, **values: Any) -> sa.Row[Any]:
    """Change one that is held."""
    return (await tx.execute(sa.update(invoices).where(_I.id == invoice).values(**values).returning(invoices))).one()


async def one(reader: Reader, invoice: str, organization: str | None) -> sa.Row[Any] | None:
    """One that was issued (to an organization)."""
    query = sa.select(invoices).where(_I.id == invoice, _I.number.is_not(None))
    if organization is not None:
        query = query.where(_I.organization_id == organization)
    return await reader.fetch_one(query)


async def listing(
    reader: Reader, organization: str | None, filters: Mapping[str, Any], limit: int, before: str | None
) -> Sequence[sa.Row[Any]]:
    """Those that were issued, the newest first.

    ``filters``: ``status``, ``since``, ``until`` (of ``issued_at``), ``organization``, any of them ``None``.
    """
    query = sa.select(invoices).where(_I.number.is_not(None))
    wanted = organization or filters.get("organization")
    if wanted is not None:
        query = query.where(_I.organization_id == wanted)
    if filters.get("status") is not None:
        query = query.where(_I.status == filters["status"])
    if filters.get("since") is not None:
        query = query.where(_I.issued_at >= filters["since"])
    if filters.get("until") is not None:
        query = query.where(_I.issued_at < filters["until"])
    if before is not None:
        query = query.where(_I.id < before)
    return await reader.fetch_all(query.order_by(_I.id.desc()).limit(limit))


async def id_of(reader: Reader, event: Any) -> str | None:
    """Our invoice that an event is about, by its provider, account, mode and reference."""
    query = sa.select(_I.id).where(
        _I.provider == event.provider, _I.account == event.account, _I.livemode.is_(event.livemode),
        _I.provider_ref == event.invoice_ref,
    )  # fmt: skip
    found: str | None = await reader.scalar(query)
    return found


async def held_by_id(tx: Tx, invoice: str) -> sa.Row[Any] | None:
    """One, locked."""
    return await tx.fetch_one(sa.select(invoices).where(_I.id == invoice).with_for_update())


# -- credit notes --------------------------------------------------------------------------------------------------------


async def hold_credit(tx: Tx, key: Mapping[str, Any], new: Mapping[str, Any]) -> sa.Row[Any]:
    """The credit note with this key (``provider, account, livemode, refund_ref``), locked; made of ``new`` if there is none."""
    await tx.execute(
        insert(credit_notes)
        .values(**key, **new)
        .on_conflict_do_nothing(constraint="billing_credit_notes_refund_ref_key")
    )
    query = sa.select(credit_notes).where(*(_C[name] == value for name, value in key.items())).with_for_update()
    row = await tx.fetch_one(query)
    assert row is not None
    return row


async def change_credit(tx: Tx, note: str, **values: Any) -> sa.Row[Any]:
    """Change one that is held."""
    statement = sa.update(credit_notes).where(_C.id == note).values(**values).returning(credit_notes)
    return (await tx.execute(statement)).one()


async def pending_credits(tx: Tx, invoice: str) -> Sequence[sa.Row[Any]]:
    """Credit notes that wait for the issue of an invoice, locked, in order."""
    query = sa.select(credit_notes).where(_C.invoice_id == invoice, _C.status == "pending").order_by(_C.id)
    return await tx.fetch_all(query.with_for_update())


async def credits_of(reader: Reader, invoices_: Sequence[str]) -> dict[str, list[sa.Row[Any]]]:
    """Credit notes of some invoices that have a number, in order."""
    query = sa.select(credit_notes).where(_C.invoice_id.in_(invoices_), _C.number.is_not(None)).order_by(_C.id)
    found: dict[str, list[sa.Row[Any]]] = {name: [] for name in invoices_}
    for row in await reader.fetch_all(query):
        found[row.invoice_id].append(row)
    return found


async def credit_note(reader: Reader, note: str, organization: str) -> sa.Row[Any] | None:
    """One of an organization that has a number."""
    query = sa.select(credit_notes).where(_C.id == note, _C.organization_id == organization, _C.number.is_not(None))
    return await reader.fetch_one(query)


# -- tax -----------------------------------------------------------------------------------------------------------------


async def add_tax(tx: Tx, rows: Sequence[Mapping[str, Any]]) -> None:
    """More records."""
    if rows:
        await tx.execute(sa.insert(tax_records), [dict(row) for row in rows])


async def tax_of(reader: Reader, invoice: str) -> Sequence[sa.Row[Any]]:
    """The records of an invoice and its credit notes, in order."""
    query = sa.select(tax_records).where(tax_records.c.invoice_id == invoice)
    return await reader.fetch_all(query.order_by(tax_records.c.id, tax_records.c.line))


async def treatments_of(reader: Reader, invoices_: Sequence[str]) -> dict[str, list[str]]:
    """The treatments that lines of some invoices have."""
    columns = tax_records.c
    query = sa.select(columns.invoice_id, columns.treatment).where(
        columns.invoice_id.in_(invoices_), columns.credit_note_id.is_(None)
    )
    found: dict[str, list[str]] = {}
    for row in await reader.fetch_all(query.distinct().order_by(columns.invoice_id, columns.treatment)):
        found.setdefault(row.invoice_id, []).append(row.treatment)
    return found


def at(value: datetime | None) -> str | None:
    """A time as JSON has it."""
    return None if value is None else value.isoformat()
