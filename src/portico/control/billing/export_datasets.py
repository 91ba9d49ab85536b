"""What a report can be of: columns with their types, the query behind them, and what is added up.

A dataset's columns are a promise to whoever loads it: one is added at the end together with a new ``version``, never renamed or
removed. Amounts are integer minor units beside their currency. Times are UTC. A period is half open, ``[start, end)``, of the
column that ``when`` names.

Texts that a spreadsheet would take for a formula are written with an apostrophe before them in CSV (OWASP, CSV injection); JSON
Lines and Parquet carry them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Type = Literal["text", "integer", "boolean", "time", "date", "json"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its name in the report, its type, and the expression that it is read by."""

    name: str
    type: Type
    sql: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """``source``: FROM and its joins, $1 the organization (null: all), $2 and $3 the period, $4 the ledger's cut-off.

    ``totals``: expressions of a currency and of amounts by name, added up by currency in the same snapshot.
    """

    name: str
    version: int
    columns: tuple[Column, ...]
    source: str
    when: str
    order: str
    organization: str | None
    currency: str | None = None
    totals: Mapping[str, str] | None = None
    #: Uses $4.
    cut: str | None = None

    @property
    def operators_only(self) -> bool:
        """Whether it is about nobody's organization."""
        return self.organization is None

    @property
    def conditions(self) -> str:
        """WHERE …; every parameter is used, whatever the dataset."""
        mine = "$1::text IS NULL" if self.organization is None else f"($1::text IS NULL OR {self.organization} = $1)"
        cut = "$4::bigint IS NOT NULL" if self.cut is None else f"{self.cut} <= $4::bigint"
        return f"WHERE {mine} AND {self.when} >= $2::timestamptz AND {self.when} < $3::timestamptz AND {cut}"


def _columns(alias: str, text: str) -> tuple[Column, ...]:
    """``name:type`` or ``name:type=expression``, one after another; without an expression, of the table ``alias``."""
    found = []
    for part in text.split():
        named, _, sql = part.partition("=")
        name, _, kind = named.partition(":")
        found.append(Column(name, kind or "text", sql or f"{alias}.{name}"))  # type: ignore[arg-type]
    return tuple(found)


_EVENTS: Final = Dataset(
    "finance_events", 1,
    _columns("e", """
        id seq:integer organization_id provider account livemode:boolean event_id event_type api_version kind
        occurred_at:time received_at:time recorded_at:time effect_key customer_ref subscription_ref invoice_ref
        payment_ref refund_ref dispute_ref payout_ref checkout_ref status plan_ref amount_minor:integer tax_minor:integer
        fee_minor:integer net_minor:integer currency period_start:time period_end:time attempt:integer
        failure_code invoice_number raw_sha256:text=encode(e.raw_sha256,'hex') hash:text=encode(e.hash,'hex')
    """),
    "billing_finance_events AS e", "e.occurred_at", "e.occurred_at, e.id", "e.organization_id", "e.currency",
    {
        "payments": "sum(e.amount_minor) FILTER (WHERE e.kind = 'payment.succeeded')",
        "refunds": "-sum(e.amount_minor) FILTER (WHERE e.kind LIKE 'refund.%' AND e.status = 'succeeded')",
        "fees": "sum(e.fee_minor) FILTER (WHERE e.kind = 'payment.succeeded')",
        "events": "count(*)",
    },
)  # fmt: skip

_LEDGER: Final = Dataset(
    "ledger", 1,
    _columns("t", """
        transaction_id:text=t.id number:integer position:integer=p.position organization_id kind booked_on:date
        occurred_at:time recorded_at:time account:text=p.account currency:text=p.currency
        amount_minor:integer=p.amount_minor provider:text=coalesce(p.provider,t.provider) provider_account
        subscription_ref invoice_ref:text=coalesce(p.invoice_ref,t.invoice_ref) payment_ref source reverses note
        hash:text=encode(t.hash,'hex')
    """),
    "ledger_transactions AS t JOIN ledger_postings AS p ON p.transaction_id = t.id", "t.occurred_at",
    "t.number, p.position", "t.organization_id", "p.currency",
    {
        "debits": "sum(p.amount_minor) FILTER (WHERE p.amount_minor > 0)",
        "credits": "sum(p.amount_minor) FILTER (WHERE p.amount_minor < 0)",
        "balance": "sum(p.amount_minor)",
        "postings": "count(*)",
    },
    cut="t.number",
)  # fmt: skip

_INVOICES: Final = Dataset(
    "invoices", 1,
    _columns("i", """
        id organization_id number status provider account livemode:boolean provider_ref provider_number subscription_ref
        plan_ref currency net_minor:integer tax_minor:integer gross_minor:integer paid_minor:integer credited_minor:integer
        credited_tax_minor:integer customer_name:text=i.customer->>'name' customer_country:text=i.customer->>'country'
        period_start:time period_end:time issued_at:time paid_at:time voided_at:time uncollectible_at:time lines:json
    """),
    "billing_invoices AS i", "i.issued_at", "i.issued_at, i.id", "i.organization_id", "i.currency",
    {
        "net": "sum(i.net_minor)", "tax": "sum(i.tax_minor)", "gross": "sum(i.gross_minor)", "paid": "sum(i.paid_minor)",
        "credited": "sum(i.credited_minor)", "invoices": "count(*)",
    },
)  # fmt: skip

_DUNNING: Final = Dataset(
    "dunning", 1,
    _columns("d", """
        id organization_id subscription_id currency state stage amount_minor:integer attempts:integer failure_code
        next_attempt_at:time opened_at:time due_at:time closed_at:time reason
    """),
    "billing_dunning_cases AS d", "d.opened_at", "d.opened_at, d.id", "d.organization_id", "d.currency",
    {"open": "sum(d.amount_minor) FILTER (WHERE d.closed_at IS NULL)", "cases": "count(*)"},
)  # fmt: skip

_SETTLEMENTS: Final = Dataset(
    "settlements", 1,
    _columns("r", """
        id sink_id batch_id revision:integer provider account livemode:boolean period_start:time period_end:time export_id
        state reason resolution superseded_by issued_at:time received_at:time reconciled_at:time runs:integer
        currency:text=d.key delta_minor:integer=(d.value->>'delta_minor')::bigint
        delta_bps:integer=(d.value->>'delta_bps')::bigint findings:json
        sha256:text=encode(r.body_digest,'hex')
    """),
    "billing_settlement_receipts AS r LEFT JOIN LATERAL jsonb_each(r.deltas) AS d ON true", "r.period_start",
    "r.id, d.key", None, "d.key",
    {"delta": "sum((d.value->>'delta_minor')::bigint)", "receipts": "count(*)"},
)  # fmt: skip

_USAGE: Final = Dataset(
    "usage", 1,
    _columns("u", """
        organization_id tunnel_id hour:time requests:integer connections:integer bytes_in:integer bytes_out:integer
        errors:integer
    """),
    "tunnel_usage AS u", "u.hour", "u.hour, u.tunnel_id", "u.organization_id",
)  # fmt: skip

_ALL: Final = (_EVENTS, _LEDGER, _INVOICES, _DUNNING, _SETTLEMENTS, _USAGE)
DATASETS: Final[Mapping[str, Dataset]] = {each.name: each for each in _ALL}
