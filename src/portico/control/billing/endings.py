"""Subscriptions that we end: their organization goes, or nobody pays. Written down here, made by the worker (``calls.py``)."""

from __future__ import annotations

from typing import Any

from portico.control.billing import billing_store, checkout_store
from portico.control.billing.subscription_states import TERMINAL
from portico.kit import queue
from portico.kit.db import Tx
from portico.kit.ids import new_id


async def leave(tx: Tx, organization: str) -> int:
    """Have every subscription of an organization that goes ended; always 0: nothing is left to do another time. The records of
    its money stay."""
    for row in await billing_store.subscriptions_of(tx, organization):
        await end(tx, row, f"departure:{row.id}", "the organization was deleted")
    return 0


async def end(tx: Tx, row: Any, key: str, reason: str) -> None:
    """Have a subscription ended at its provider, once for each ``key``."""
    if row.status in TERMINAL or await checkout_store.call_by_request(tx, row.organization_id, key) is not None:
        return
    await checkout_store.unschedule(tx, row.id)
    await checkout_store.add_call(tx, {
        "id": new_id("cll"), "organization_id": row.organization_id, "request_key": key, "act": "cancel",
        "subject": row.id, "provider": row.provider, "actor": {"kind": "operator", "id": "billing"},
        "arguments": {"ref": row.ref, "at_period_end": False, "reason": reason},
    })  # fmt: skip
    await queue.wake(tx, checkout_store.CALL)
