"""Subscriptions that were bought beside another one, and our invoice of each payment.

A new column that may be empty: code before this step does not know it. Payments get the invoice that they have always had by the
provider's name of it.
"""

from __future__ import annotations

from alembic import op

revision = "0034"
down_revision = "0033"

STATEMENTS = """
ALTER TABLE billing_subscriptions ADD COLUMN beside text;
UPDATE billing_payments p SET invoice_id = i.id FROM billing_invoices i
WHERE p.invoice_id IS NULL AND i.provider = p.provider AND i.account = p.account AND i.livemode = p.livemode
    AND i.provider_ref = p.invoice_ref;
"""


def upgrade() -> None:
    """Add the column, and fill the other one."""
    for statement in STATEMENTS.split(";"):
        if statement.strip():
            op.execute(statement)
