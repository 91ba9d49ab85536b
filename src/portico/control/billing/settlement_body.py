"""The body of a settlement receipt, ``POST /v1/billing/settlement-receipts``: what a sink says was settled in a period.

Amounts are integer minor units with their signs (``settlement_match``). Totals or lines, or both; both must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from portico.control.access import Instant
from portico.control.billing.settlement_match import Kind, Line, Stated
from portico.kit.canonical import MAX_INTEGER

#: Minor units that a bigint holds, with room for the sum of a million of them.
MAX_MINOR = 9_000_000_000_000
Minor = Annotated[int, Field(strict=True, ge=-MAX_MINOR, le=MAX_MINOR)]
Ref = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")]
Currency = Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
Provider = Literal["stripe", "razorpay", "paypal", "platform"]


def _rate(text: str) -> str:
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ValueError("is no decimal number") from None
    if not value.is_finite() or not Decimal("1e-12") <= value <= Decimal("1e12"):
        raise ValueError("is no rate")
    return text


Rate = Annotated[str, StringConstraints(max_length=40, pattern=r"^[0-9]+(\.[0-9]+)?$"), AfterValidator(_rate)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ReceiptLine(_Body):
    """Something that was settled. `aliases`: other references of the provider's to the same thing."""

    ref: Ref
    kind: Kind
    currency: Currency
    amount_minor: Minor
    fee_minor: Minor | None = None
    aliases: Annotated[list[Ref], Field(max_length=8)] = []
    original_currency: Currency | None = None
    original_minor: Minor | None = None
    exchange_rate: Rate | None = None

    @model_validator(mode="after")
    def _exchange(self) -> ReceiptLine:
        if (self.original_currency is None) != (self.original_minor is None):
            raise ValueError("original_currency and original_minor belong together")
        if self.original_currency == self.currency:
            raise ValueError("what was exchanged has two currencies")
        return self

    def line(self) -> Line:
        return Line(
            self.ref, self.kind, self.currency, self.amount_minor, self.fee_minor, tuple(self.aliases),
            self.original_currency, self.original_minor, self.exchange_rate,
        )  # fmt: skip


class ReceiptTotals(_Body):
    """The totals of one currency; what is not there is not compared."""

    currency: Currency
    gross_minor: Minor | None = None
    refunds_minor: Minor | None = None
    disputes_minor: Minor | None = None
    adjustments_minor: Minor | None = None
    fees_minor: Minor | None = None
    net_minor: Minor | None = None
    count: Annotated[int, Field(strict=True, ge=0, le=1_000_000_000)] | None = None


class ReceiptBody(_Body):
    """A receipt. `batch_id` names the batch at the sink: the same again is a duplicate, another content with a later `issued_at`
    replaces it. `export_id`: the report that the sink loaded, if it is about one."""

    batch_id: Ref
    provider: Provider
    account: Ref
    livemode: bool
    period_start: Instant
    period_end: Instant
    issued_at: Instant
    export_id: Ref | None = None
    totals: Annotated[list[ReceiptTotals], Field(max_length=200)] = []
    lines: Annotated[list[ReceiptLine], Field(max_length=1_000_000)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> ReceiptBody:
        if self.period_start >= self.period_end:
            raise ValueError("period_end lies after period_start")
        if self.lines is None and not self.totals:
            raise ValueError("a receipt has totals, lines, or both")
        if len({each.currency for each in self.totals}) != len(self.totals):
            raise ValueError("a currency has one entry in totals")
        # Each fits, and so must their sum: it is hashed, posted and told as a number that every JSON reader knows.
        if sum(abs(each.amount_minor) + abs(each.fee_minor or 0) for each in self.lines or ()) > MAX_INTEGER // 2:
            raise ValueError("its lines come to more than a number of 52 bits")
        return self

    def stated(self) -> Mapping[str, Stated]:
        """Its totals by currency."""
        return {
            each.currency: Stated(
                each.gross_minor, each.refunds_minor, each.disputes_minor, each.adjustments_minor, each.fees_minor,
                each.net_minor, each.count,
            )
            for each in self.totals
        }  # fmt: skip

    def match_lines(self) -> list[Line] | None:
        """Its lines; ``None`` when it has none to offer."""
        return None if self.lines is None else [each.line() for each in self.lines]
