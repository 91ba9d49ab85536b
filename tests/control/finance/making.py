"""Finance events as tests need them: short to write, and each about an account of its own."""

from __future__ import annotations

import hashlib
import itertools
from datetime import UTC, datetime
from typing import Any

from portico.control.finance import events, postings
from portico.control.finance.events import FinanceEvent
from portico.kit.db import Database
from portico.kit.ids import new_id

AT = datetime(2026, 11, 10, 9, 30, tzinfo=UTC)
_numbers = itertools.count(1)


def organization() -> str:
    """An organization that nobody has seen before."""
    return new_id("org")


def account() -> str:
    """An account of a provider that nobody has seen before: references are unique in it."""
    return f"acct_{next(_numbers)}_{new_id('x')}"


def event(kind: str, **more: Any) -> FinanceEvent:
    """An event of Stripe in euros; its effect is what it is about."""
    about = more.get("refund_ref") or more.get("dispute_ref") or more.get("payout_ref")
    about = about or (kind.startswith("payment") and more.get("payment_ref")) or more.get("invoice_ref") or "none"
    known: dict[str, Any] = {
        "provider": "stripe", "account": "acct_test", "livemode": False, "event_id": f"evt_{next(_numbers)}",
        "event_type": kind, "api_version": "2026-01-01", "kind": kind, "occurred_at": AT, "received_at": AT,
        "raw_sha256": hashlib.sha256(kind.encode()).digest(), "effect_key": f"{kind}:stripe:{about}",
        "currency": "EUR" if more.get("amount_minor") is not None else None,
    }  # fmt: skip
    return FinanceEvent(**{**known, **more})


async def apply(db: Database, one: FinanceEvent) -> bool:
    """Record and post it as the applier does; whether it was new."""
    async with db.transaction() as tx:
        new = await events.record(tx, one)
        if new:
            await postings.post(tx, one)
    return new
