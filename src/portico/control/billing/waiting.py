"""Events that came before their base, kept as they are until it arrives.

A refund can overtake its payment, and everything the checkout whose answer says whose it is. Such an event is parked under the
keys of what it lacks, in the transaction that found it lacking, and applied in the transaction that brings one of them. Both hold
the keys' locks first, so that neither can miss the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any, Final

from portico.control.billing import billing_store as store
from portico.control.billing.billing_store import Source
from portico.control.finance import events
from portico.control.finance.events import FinanceEvent
from portico.kit.db import Tx

#: References of an event that others can be known by, and what they are called in keys.
REFERENCES: Final = {
    "customer_ref": "customer",
    "subscription_ref": "subscription",
    "checkout_ref": "checkout",
    "invoice_ref": "invoice",
    "payment_ref": "payment",
    "dispute_ref": "dispute",
    "refund_ref": "refund",
}
_TIMES: Final = ("occurred_at", "received_at", "period_start", "period_end", "next_attempt_at")
_NAMES: Final = tuple(field.name for field in fields(FinanceEvent))


def key(event: FinanceEvent, name: str) -> str:
    """The key of a reference that ``event`` has."""
    return Source.of(event).key(REFERENCES[name], getattr(event, name))


def keys(event: FinanceEvent, names: Sequence[str] = tuple(REFERENCES)) -> list[str]:
    """The keys of those references of ``event`` that it has."""
    return [key(event, name) for name in names if getattr(event, name) is not None]


async def park(tx: Tx, event: FinanceEvent, needs: Sequence[str]) -> None:
    """Keep ``event`` until one of the keys ``needs`` is there."""
    document = {name: events.plain(value) for name, value in events.values(event).items()}
    await store.park(tx, event, needs, document)


async def unpark(tx: Tx, brought: Sequence[str]) -> list[FinanceEvent]:
    """Take out what waited for one of ``brought``, in the order in which it happened."""
    return [_event(document) for document in await store.unpark(tx, brought)] if brought else []


def _event(document: dict[str, Any]) -> FinanceEvent:
    row = {name: document[name] for name in _NAMES if name in document}
    for name in _TIMES:
        if row.get(name) is not None:
            row[name] = datetime.fromisoformat(row[name])
    row["raw_sha256"] = bytes.fromhex(row["raw_sha256"])
    return events.of_row({**dict.fromkeys(_NAMES), **row})
