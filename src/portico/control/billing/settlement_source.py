"""Our side of a settlement: what finance events recorded of an account in a period, with the signs that the ledger gave it.

A payment's fee is what it told, or what lies between gross and net, or what was told later (``fee.charged``), else 0, since
that is what the ledger has; and what is posted once there counts once here, however many events tell of it. A refund counts when
it succeeded, and is taken back when it failed after that. A dispute is withdrawn when it opens and reinstated when it is won.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from portico.control.billing.settlement_match import Ours
from portico.control.finance.postings import kind_by
from portico.kit.db import Reader

# What moves money at a provider; payouts move what was settled already.
_MOVES: Final = "(e.kind IN ('payment.succeeded', 'fee.charged') OR e.kind LIKE 'refund.%' OR e.kind LIKE 'dispute.%')"
_SCOPE: Final = f"""
FROM billing_finance_events AS e WHERE e.provider = $1 AND e.account = $2 AND e.livemode = $3
AND e.occurred_at >= $4 AND e.occurred_at < $5 AND {_MOVES}
"""  # our own words
# Of a refund that failed: whether it had succeeded, in whichever period that was.
_SUCCEEDED: Final = """
CASE WHEN e.kind LIKE 'refund.%' THEN (
    SELECT max(r.amount_minor) FROM billing_finance_events AS r
    WHERE r.provider = e.provider AND r.account = e.account AND r.livemode = e.livemode AND r.refund_ref = e.refund_ref
    AND (r.status = 'succeeded' OR r.kind = 'refund.succeeded')) END
"""
_LINES: Final = f"""
SELECT e.kind, e.status, e.payment_ref, e.refund_ref, e.dispute_ref, e.invoice_ref, e.amount_minor, e.fee_minor, e.net_minor,
    e.currency, {_SUCCEEDED} AS succeeded_minor
{_SCOPE} ORDER BY e.id
"""
_COUNT: Final = f"SELECT count(*) + count({_SUCCEEDED}) {_SCOPE}"
_PREFETCH: Final = 5000


@dataclass(frozen=True, slots=True)
class Scope:
    """What a receipt is about: an account of a provider in one mode, from ``start`` up to, not including, ``end``."""

    provider: str
    account: str
    livemode: bool
    start: datetime
    end: datetime

    @property
    def parameters(self) -> tuple[Any, ...]:
        return self.provider, self.account, self.livemode, self.start, self.end


async def count(reader: Reader, scope: Scope) -> int:
    """How many events there are, and how many of its refunds did succeed, in whichever period that was. Events are never removed,
    so a greater number means that some came late."""
    return int(await reader.raw.fetchval(_COUNT, *scope.parameters))


async def read(reader: Reader, scope: Scope) -> tuple[Ours, int]:
    """The lines, and what :func:`count` says; ``reader`` holds a snapshot, so that both are of one moment."""
    found, seen = Ours(), 0
    once: set[tuple[str, str]] = set()
    fees: list[tuple[str, str, int]] = []
    async for row in reader.raw.cursor(_LINES, *scope.parameters, prefetch=_PREFETCH):
        seen += 1 + (row["succeeded_minor"] is not None)
        if row["currency"] is not None:
            _add(found, row, once, fees)
    for ref, currency, fee in fees:
        found.charge(ref, currency, fee)
    return found, seen


def _add(found: Ours, row: Any, once: set[tuple[str, str]], fees: list[tuple[str, str, int]]) -> None:
    kind, currency = kind_by(row["kind"], row["status"]), row["currency"]
    amount, fee = row["amount_minor"] or 0, row["fee_minor"]
    if kind == "payment.succeeded":
        ref = row["payment_ref"] or row["invoice_ref"]
        if ref is not None and (ref, kind) not in once:
            once.add((ref, kind))
            if fee is None:
                fee = amount - row["net_minor"] if row["net_minor"] is not None else 0
            found.add(ref, "payment", currency, amount, fee, row["invoice_ref"])
    elif kind == "fee.charged":
        ref = row["payment_ref"] or row["invoice_ref"]
        if ref is not None and (row["payment_ref"] is None or (ref, kind) not in once):
            once.add((ref, kind))
            fees.append((ref, currency, amount if fee is None else fee))
    elif kind in ("refund.succeeded", "refund.failed"):
        ref = row["refund_ref"]
        if ref is None or (ref, kind) in once or row["succeeded_minor"] is None:
            return
        once.add((ref, kind))
        amount = row["succeeded_minor"]
        found.add(ref, "refund", currency, -amount if kind == "refund.succeeded" else amount, 0)
    elif (
        kind in ("dispute.opened", "dispute.won")
        and (ref := row["dispute_ref"]) is not None
        and (ref, kind) not in once
    ):
        once.add((ref, kind))
        found.add(ref, "dispute", currency, -amount if kind == "dispute.opened" else amount, fee or 0)
