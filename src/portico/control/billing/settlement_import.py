"""What providers say themselves, as the body of a receipt: balance transactions of Stripe, settlement recon rows of Razorpay.

Both are checked by their own arithmetic before anything is made of them, so that a row that was read wrongly cannot match:

    Stripe      net = amount - fee                       amounts have their signs already
                (docs.stripe.com/api/balance_transactions/object)
    Razorpay    credit - debit = amount - fee of a payment; of a refund and a transfer -(amount + fee), tax inside of fee
                (razorpay.com/docs/api/settlements/fetch-recon)

Rows of another currency than the account's were exchanged by the provider: they carry both amounts and the rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from portico.control.billing.settlement_match import Kind
from portico.errors import Problem

#: Stripe's types of what is neither income nor its reversal: money on its way to the bank, and what is kept back for a while.
_MOVEMENTS: Final = frozenset({
    "payout", "payout_cancel", "payout_failure", "transfer", "transfer_cancel", "transfer_failure", "topup",
    "topup_reversal", "reserve_transaction", "reserved_funds", "payment_network_reserve_hold",
    "payment_network_reserve_release", "obligation_outbound", "obligation_reversal_inbound",
})  # fmt: skip
_STRIPE: Final[Mapping[str, Kind]] = {
    "charge": "payment", "payment": "payment", "refund": "refund", "payment_refund": "refund",
    "refund_failure": "refund", "payment_failure_refund": "refund", "payment_reversal": "refund",
    "stripe_fee": "fee", "stripe_fx_fee": "fee", "tax_fee": "fee", "network_cost": "fee", "application_fee": "fee",
    "application_fee_refund": "fee",
}  # fmt: skip
_DISPUTES: Final = frozenset({"dispute", "dispute_reversal"})


def stripe(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of balance transactions. Raises ``settlement.import_invalid`` with the row that does not add up."""
    lines = []
    for number, row in enumerate(rows):
        kind = str(row.get("type"))
        if kind in _MOVEMENTS:
            continue
        amount, fee, net = (_minor(row, name, number) for name in ("amount", "fee", "net"))
        if net != amount - fee:
            raise _invalid(number, f"net is {net}, and amount less fee is {amount - fee}")
        source = row.get("source")
        known = _STRIPE.get(kind) or ("dispute" if row.get("reporting_category") in _DISPUTES else "adjustment")
        lines.append(_stripe_line(row, number, known, source, amount, fee))
    return lines


def _stripe_line(row: Mapping[str, Any], number: int, kind: Kind, source: Any, amount: int, fee: int) -> dict[str, Any]:
    expanded: Mapping[str, Any] = source if isinstance(source, Mapping) else {}
    ref = expanded.get("id") if expanded else source
    if ref is None and kind in ("fee", "adjustment"):
        ref = row.get("id")
    if not isinstance(ref, str) or not ref:
        raise _invalid(number, "it names no source")
    others = [expanded.get(name) for name in ("payment_intent", "invoice", "charge")]
    if kind == "dispute":
        others = []  # of one charge there may be several
    line: dict[str, Any] = {
        "ref": ref, "kind": kind, "currency": _currency(row, "currency", number), "amount_minor": amount, "fee_minor": fee,
        "aliases": [each for each in others if isinstance(each, str) and each != ref],
    }  # fmt: skip
    if row.get("exchange_rate") is not None and isinstance(expanded.get("amount"), int):
        line |= {
            "original_currency": _currency(expanded, "currency", number),
            "original_minor": expanded["amount"] if amount >= 0 else -expanded["amount"],
            "exchange_rate": _rate(row["exchange_rate"], number),
        }
    return line


_RAZORPAY: Final[Mapping[str, tuple[Kind, int]]] = {
    "payment": ("payment", 1), "refund": ("refund", -1), "transfer": ("adjustment", -1), "adjustment": ("adjustment", 0),
}  # fmt: skip


def razorpay(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of recon rows. Raises ``settlement.import_invalid`` with the row that does not add up."""
    return [_recon(row, number) for number, row in enumerate(rows)]


def _recon(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    named = str(row.get("type"))
    if named not in _RAZORPAY:
        raise _invalid(number, f"its type is {named[:40]}")
    kind, sign = _RAZORPAY[named]
    credit, debit, amount, fee = (_minor(row, name, number) for name in ("credit", "debit", "amount", "fee"))
    tax = _minor(row, "tax", number)
    if not 0 <= tax <= max(fee, 0):
        raise _invalid(number, f"tax is {tax}, and lies inside of fee, {fee}")
    net = credit - debit
    signed = sign * amount if sign else net + fee
    if net != signed - fee:
        raise _invalid(number, f"credit less debit is {net}, and amount less fee is {signed - fee}")
    if not isinstance(ref := row.get("entity_id"), str) or not ref:
        raise _invalid(number, "it names no entity")
    return {
        "ref": ref, "kind": kind, "currency": _currency(row, "currency", number), "amount_minor": signed, "fee_minor": fee,
        "aliases": [],
    }  # fmt: skip


def receipt(
    provider: str, rows: Sequence[Mapping[str, Any]], *, batch_id: str, account: str, livemode: bool,
    period_start: datetime, period_end: datetime, issued_at: datetime,
) -> dict[str, Any]:  # fmt: skip
    """The body of a receipt made of a provider's own rows."""
    readers = {"stripe": stripe, "razorpay": razorpay}
    if provider not in readers:
        raise Problem("settlement.import_invalid", f"there is no import for {provider}")
    times = {"period_start": period_start, "period_end": period_end, "issued_at": issued_at}
    return {
        "batch_id": batch_id, "provider": provider, "account": account, "livemode": livemode, "totals": [],
        "lines": readers[provider](rows), **{name: at.isoformat() for name, at in times.items()},
    }  # fmt: skip


def _invalid(number: int, what: str) -> Problem:
    return Problem("settlement.import_invalid", f"row {number + 1}: {what}", row=number + 1)


def _minor(row: Mapping[str, Any], name: str, number: int) -> int:
    value = row.get(name, 0)
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool):
        raise _invalid(number, f"{name} is no integer of minor units")
    return value


def _rate(value: Any, number: int) -> str:
    """A rate in plain digits: JSON's 0.00006 is a number that Python writes as 6e-05."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _invalid(number, "exchange_rate is no number")
    try:
        found = Decimal(str(value))
    except InvalidOperation:
        raise _invalid(number, "exchange_rate is no number") from None
    if not found.is_finite():
        raise _invalid(number, "exchange_rate is no number")
    return f"{found:f}"[:40]


def _currency(row: Mapping[str, Any], name: str, number: int) -> str:
    text = str(row.get(name) or "").upper()
    if len(text) != 3 or not (text.isascii() and text.isalpha()):
        raise _invalid(number, f"{name} is no currency")
    return text
