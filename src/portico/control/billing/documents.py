"""Whether invoices and credit notes say what the ledger says, and whether their numbers have no gaps.

An invoice's state (what was paid of it, whether it is void) changes, so no hash covers it. But all of it follows from finance
events, as the ledger does, and both are written in one transaction: whatever differs was written by somebody else.
"""

from __future__ import annotations

from typing import Final

from portico.kit.db import HasConnection

# What was issued, by the key of its transaction; an invoice of nothing has none.
_ISSUED: Final = """
SELECT i.number FROM billing_invoices i
LEFT JOIN ledger_transactions t ON t.key = 'invoice.issued:' || i.provider || ':' || i.account || ':'
    || CASE WHEN i.livemode THEN 'live' ELSE 'test' END || ':' || i.provider_ref
LEFT JOIN (
    SELECT transaction_id, sum(amount_minor) FILTER (WHERE account IN ('accounts_receivable', 'customer_credit')) AS gross,
        -sum(amount_minor) FILTER (WHERE account = 'tax_payable') AS tax
    FROM ledger_postings GROUP BY transaction_id
) AS p ON p.transaction_id = t.id
WHERE i.number IS NOT NULL AND (coalesce(p.gross, 0) <> i.gross_minor OR coalesce(p.tax, 0) <> i.tax_minor)
ORDER BY i.number LIMIT 1
"""
_PAID: Final = """
SELECT i.number, i.paid_minor, coalesce(p.paid, 0) AS posted FROM billing_invoices i
LEFT JOIN (
    SELECT t.provider, t.provider_account, g.invoice_ref, -sum(g.amount_minor) AS paid
    FROM ledger_transactions t JOIN ledger_postings g ON g.transaction_id = t.id AND g.account = 'accounts_receivable'
    WHERE t.kind IN ('payment.succeeded', 'credit.applied') GROUP BY 1, 2, 3
) AS p ON p.provider = i.provider AND p.provider_account = i.account AND p.invoice_ref = i.provider_ref
WHERE i.number IS NOT NULL AND (coalesce(p.paid, 0) <> i.paid_minor
    OR (i.status = 'paid' AND i.paid_minor < i.gross_minor) OR (i.status = 'void') <> (i.voided_at IS NOT NULL))
ORDER BY i.number LIMIT 1
"""
_CREDITED: Final = """
SELECT i.number FROM billing_invoices i
LEFT JOIN (
    SELECT invoice_id, sum(gross_minor) AS gross, sum(tax_minor) AS tax FROM billing_credit_notes
    WHERE status = 'issued' GROUP BY invoice_id
) AS n ON n.invoice_id = i.id
WHERE i.number IS NOT NULL
    AND (coalesce(n.gross, 0) <> i.credited_minor OR coalesce(n.tax, 0) <> i.credited_tax_minor)
ORDER BY i.number LIMIT 1
"""
_GAPS: Final = """
SELECT s.series, s.year, s.last, count(d.sequence) AS found FROM billing_number_series s
LEFT JOIN (
    SELECT 'invoice' AS series, entity_id, year, sequence FROM billing_invoices WHERE number IS NOT NULL
    UNION ALL SELECT 'credit_note', entity_id, year, sequence FROM billing_credit_notes WHERE number IS NOT NULL
) AS d ON d.series = s.series AND d.entity_id = s.entity_id AND d.year = s.year AND d.sequence BETWEEN 1 AND s.last
GROUP BY s.entity_id, s.series, s.year, s.last HAVING count(d.sequence) <> s.last ORDER BY s.year, s.series LIMIT 1
"""


async def fault(reader: HasConnection) -> tuple[str, str] | None:
    """The first document that is not what the ledger says: which, and what; ``None``: all are. ``reader`` has a snapshot."""
    raw = reader.raw
    if row := await raw.fetchrow(_ISSUED):
        return f"invoice {row['number']}", "is not of the amount or the tax that the ledger has of it"
    if row := await raw.fetchrow(_PAID):
        detail = f"says that {row['paid_minor']} was paid, the ledger {row['posted']}; or its status does not follow"
        return f"invoice {row['number']}", detail
    if row := await raw.fetchrow(_CREDITED):
        return f"invoice {row['number']}", "was not credited what its credit notes sum to"
    if row := await raw.fetchrow(_GAPS):
        return f"series {row['series']} {row['year']}", f"has {row['found']} of {row['last']} numbers"
    return None
