"""What an organization has of billing, as lines of its export. What providers were sent and told, and how, stays here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from portico.control.identity.exports import Source, rows_of


def _table(name: str, columns: str, order: str = "id", more: str = "") -> Source:
    # Our own names.
    inner = f"SELECT {columns} FROM {name} WHERE organization_id = $1{more} ORDER BY {order}"  # noqa: S608
    return rows_of(f"SELECT to_json(x)::text AS line FROM ({inner}) x")  # noqa: S608


#: What billing knows of an organization, by the name of the file in its export.
SOURCES: Final[Mapping[str, Source]] = {
    "billing_profile": _table(
        "billing_profiles", "name, address, country, email, tax_ids, exempt, updated_at", "organization_id"
    ),
    "subscriptions": _table(
        "billing_subscriptions",
        "id, provider, ref, status, status_at, checkout_plan, plan_ref, cancel_at_period_end, period_start, period_end,"
        " created_at",
    ),
    "invoices": _table(
        "billing_invoices",
        "id, number, status, currency, net_minor, tax_minor, gross_minor, paid_minor, credited_minor, lines, seller, customer,"
        " provider, provider_ref, provider_number, period_start, period_end, issued_at, paid_at, voided_at",
        more=" AND number IS NOT NULL",
    ),
    "credit_notes": _table(
        "billing_credit_notes",
        "id, number, status, invoice_id, currency, net_minor, tax_minor, gross_minor, provider, refund_ref, issued_at, voided_at",
        more=" AND number IS NOT NULL",
    ),
    "payments": _table(
        "billing_payments",
        "id, provider, ref, subscription_id, invoice_id, currency, amount_minor, tax_minor, paid_at",
    ),
    "refunds": _table(
        "billing_refunds", "id, payment_id, provider, ref, state, amount_minor, currency, reason, created_at"
    ),
    "dunning": _table(
        "billing_dunning_cases",
        "id, subscription_id, currency, state, stage, amount_minor, attempts, failure_code, opened_at, closed_at, reason",
    ),
    "overage_charges": _table(
        "billing_overage_charges",
        "id, subscription_id, plan, metric, month, billed_month, description, used, allowed, quantity, unit_minor,"
        " amount_minor, currency, state, invoice_id, created_at, settled_at",
    ),
}
