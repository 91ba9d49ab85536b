"""The chart of accounts. docs/explanation/money-flow.md shows the table; its rows are written from here.

An amount that is posted is positive for a debit and negative for a credit. So an asset or an expense that grew has a positive
balance, a liability, income or equity that grew a negative one, and every transaction sums to zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

AccountType = Literal["asset", "liability", "income", "expense"]


@dataclass(frozen=True, slots=True)
class Account:
    """An account: its number in the chart, what it is, and what its balance says."""

    number: int
    title: str
    type: AccountType
    about: str

    @property
    def debit(self) -> bool:
        """Whether it grows by debits."""
        return self.type in ("asset", "expense")


BANK: Final = "bank"
RECEIVABLE: Final = "accounts_receivable"
CLEARING: Final = "provider_clearing"
DISPUTE_HOLD: Final = "dispute_hold"
DEFERRED: Final = "deferred_revenue"
TAX: Final = "tax_payable"
CUSTOMER_CREDIT: Final = "customer_credit"
REVENUE: Final = "revenue"
CONTRA_REVENUE: Final = "contra_revenue"
FEES: Final = "payment_fees"
DISPUTE_LOSS: Final = "dispute_loss"
BAD_DEBT: Final = "bad_debt"
ADJUSTMENT: Final = "settlement_adjustment"

# Never rename or renumber one: rows in sealed periods name them.
CHART: Final[Mapping[str, Account]] = {
    BANK: Account(1000, "Bank", "asset", "Money that providers have paid out."),
    CLEARING: Account(1100, "Provider clearing", "asset", "Money that a provider has taken and not yet paid out."),
    RECEIVABLE: Account(1200, "Accounts receivable", "asset", "What customers owe on invoices. Below zero: paid in advance."),
    DISPUTE_HOLD: Account(1300, "Dispute hold", "asset", "Money that a provider withholds until a dispute is decided."),
    DEFERRED: Account(2000, "Deferred revenue", "liability", "Invoiced, and still to be delivered."),
    TAX: Account(2100, "Tax payable", "liability", "Tax invoiced for an authority, less what refunds took back."),
    CUSTOMER_CREDIT: Account(2200, "Customer credit", "liability", "What customers have to their credit for invoices to come."),
    REVENUE: Account(4000, "Revenue", "income", "Delivered, a day at a time."),
    CONTRA_REVENUE: Account(4100, "Refunds", "income", "Given back without tax; lowers revenue."),
    FEES: Account(5000, "Payment fees", "expense", "What providers keep for themselves."),
    DISPUTE_LOSS: Account(5100, "Dispute loss", "expense", "Disputes that were lost."),
    BAD_DEBT: Account(5200, "Bad debt", "expense", "Receivables that were written off."),
    ADJUSTMENT: Account(5300, "Settlement adjustment", "expense", "Differences to a settlement that somebody accepted."),
}  # fmt: skip


def known(name: str) -> Account:
    """The account of a posting. One that the chart lacks, which no code of ours wrote, is shown at the end all the same."""
    return CHART.get(name) or Account(9999, name, "asset", "")
