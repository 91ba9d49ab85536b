"""Balances: what the ledger's postings add up to. Nothing is kept beside them, so nothing can differ from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Final

import sqlalchemy as sa

from portico.control.finance import accounts
from portico.control.finance.store import postings
from portico.kit.db import HasConnection, Reader

_P = postings.c


@dataclass(frozen=True, slots=True)
class Balance:
    """What an account holds in a currency: debits less credits, and both of them (each not negative)."""

    account: str
    currency: str
    balance_minor: int
    debit_minor: int
    credit_minor: int


async def trial(
    reader: Reader, *, until: date | None = None, since: date | None = None, organization: str | None = None
) -> list[Balance]:
    """The trial balance: every account and currency, of everybody or of an organization, booked before ``until`` (and not
    before ``since``). The balances of a currency sum to zero."""
    total = sa.func.sum(_P.amount_minor)
    debits = sa.func.coalesce(total.filter(_P.amount_minor > 0), 0)
    query = sa.select(_P.account, _P.currency, total.label("balance"), debits.label("debits")).group_by(
        _P.account, _P.currency
    )
    if until is not None:
        query = query.where(_P.booked_on < until)
    if since is not None:
        query = query.where(_P.booked_on >= since)
    if organization is not None:
        query = query.where(_P.organization_id == organization)
    rows = await reader.fetch_all(query)
    found = [
        Balance(row.account, row.currency, int(row.balance), int(row.debits), int(row.debits) - int(row.balance))
        for row in rows
    ]
    return sorted(found, key=lambda each: (each.currency, accounts.known(each.account).number))


async def of(
    reader: Reader,
    account: str,
    currency: str,
    *,
    organization: str | None = None,
    provider: str | None = None,
    invoice_ref: str | None = None,
) -> int:
    """One balance: debits less credits."""
    query = sa.select(sa.func.coalesce(sa.func.sum(_P.amount_minor), 0)).where(
        _P.account == account, _P.currency == currency
    )
    for column, wanted in ((_P.organization_id, organization), (_P.provider, provider), (_P.invoice_ref, invoice_ref)):
        if wanted is not None:
            query = query.where(column == wanted)
    return int(await reader.scalar(query))


async def clearing(reader: Reader, provider: str) -> dict[str, int]:
    """What a provider holds of ours, by currency: with no mistake on either side, the sum of its unsettled transactions."""
    query = (
        sa.select(_P.currency, sa.func.sum(_P.amount_minor).label("balance"))
        .where(_P.account == accounts.CLEARING, _P.provider == provider)
        .group_by(_P.currency)
        .order_by(_P.currency)
    )
    return {row.currency: int(row.balance) for row in await reader.fetch_all(query)}


@dataclass(frozen=True, slots=True)
class Invoice:
    """What the ledger knows of an invoice in a currency; ``steps``: how many transactions name it."""

    gross: int
    tax: int
    refunded: int
    tax_refunded: int
    receivable: int
    bad_debt: int
    steps: int


# Refunds name the invoice, or a payment of it. One that was reversed sums to zero with its reversal.
_OF_INVOICE: Final = """
WITH own AS (
    SELECT id, kind, payment_ref FROM ledger_transactions
    WHERE provider = $1 AND invoice_ref = $2 AND ($3::text IS NULL OR provider_account = $3)
), about AS (
    SELECT id, kind FROM own
    UNION
    SELECT t.id, t.kind FROM own o JOIN ledger_transactions t ON t.payment_ref = o.payment_ref
    WHERE o.kind = 'payment.succeeded' AND t.provider = $1 AND ($3::text IS NULL OR t.provider_account = $3)
      AND t.kind IN ('refund.succeeded', 'refund.failed')
)
SELECT p.currency, count(DISTINCT a.id) AS steps,
       coalesce(sum(p.amount_minor) FILTER (WHERE a.kind IN ('invoice.issued', 'invoice.voided')
                                              AND p.account IN ('accounts_receivable', 'customer_credit')), 0)::bigint AS gross,
       coalesce(-sum(p.amount_minor) FILTER (WHERE a.kind IN ('invoice.issued', 'invoice.voided')
                                               AND p.account = 'tax_payable'), 0)::bigint AS tax,
       coalesce(-sum(p.amount_minor) FILTER (WHERE a.kind IN ('refund.succeeded', 'refund.failed')
                                               AND p.account = 'provider_clearing'), 0)::bigint AS refunded,
       coalesce(sum(p.amount_minor) FILTER (WHERE a.kind = 'refund.tax' AND p.account = 'tax_payable'), 0)::bigint
           AS tax_refunded,
       coalesce(sum(p.amount_minor) FILTER (WHERE p.account = 'accounts_receivable'), 0)::bigint AS receivable,
       coalesce(sum(p.amount_minor) FILTER (WHERE p.account = 'bad_debt'), 0)::bigint AS bad_debt
FROM about a JOIN ledger_postings p ON p.transaction_id = a.id GROUP BY p.currency
"""


async def of_invoice(
    reader: HasConnection, provider: str, invoice: str, account: str | None = None
) -> dict[str, Invoice]:
    """What is known of an invoice of a provider (in one of its accounts), by currency."""
    rows: Sequence[Any] = await reader.raw.fetch(_OF_INVOICE, provider, invoice, account)
    return {row["currency"]: Invoice(**{k: v for k, v in dict(row).items() if k != "currency"}) for row in rows}


async def invoice_of_payment(reader: HasConnection, provider: str, account: str, payment: str) -> str | None:
    """The invoice that a payment was for, once the payment is in the ledger."""
    query = """
        SELECT invoice_ref FROM ledger_transactions
        WHERE provider = $1 AND provider_account = $3 AND payment_ref = $2 AND kind = 'payment.succeeded' LIMIT 1
    """
    found: str | None = await reader.raw.fetchval(query, provider, payment, account)
    return found


async def receivable(
    reader: HasConnection, provider: str, invoice: str, currency: str, account: str | None = None
) -> int:
    """What is open of an invoice: above zero, the customer owes it; below, they paid what is not invoiced."""
    found = (await of_invoice(reader, provider, invoice, account)).get(currency)
    return 0 if found is None else found.receivable
