"""What billing asks of providers by itself. Written down here, made by the worker (``calls.py``).

Subscriptions that end because their organization goes or nobody pays; payments that are tried again; use that is charged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from portico.control.billing import billing_store, checkout_store
from portico.control.billing.subscription_states import TERMINAL
from portico.kit import queue
from portico.kit.db import Tx
from portico.kit.ids import new_id

#: The actor of a call that nobody waits for.
PLATFORM: Final = {"kind": "operator", "id": "billing"}


async def leave(tx: Tx, organization: str) -> int:
    """Have every subscription of an organization that goes ended, and its open pages closed; always 0: nothing is left to do
    another time. The records of its money stay."""
    for row in await billing_store.subscriptions_of(tx, organization):
        await gone(tx, row)
    for page in await checkout_store.open_pages(tx, organization):
        await ask(tx, page, "close", page.id, f"close:{page.id}", {"ref": page.ref, "first": ""})
    return 0


async def gone(tx: Tx, row: Any) -> None:
    """Have a subscription ended whose organization is gone, or going: nobody has what it would pay for."""
    await end(tx, row, f"departure:{row.id}", "the organization was deleted")


async def end(tx: Tx, row: Any, key: str, reason: str) -> None:
    """Have a subscription ended at its provider, once for each ``key``."""
    if row.status in TERMINAL or await checkout_store.call_by_request(tx, row.organization_id, key) is not None:
        return
    await checkout_store.unschedule(tx, row.id)
    await ask(tx, row, "cancel", row.id, key, {"ref": row.ref, "at_period_end": False, "reason": reason})


async def collect(tx: Tx, row: Any, case: str, key: str, debt: Mapping[str, Any]) -> None:
    """Have a payment that failed tried again, once for each ``key``. A provider that cannot is left alone."""
    wanted = {"invoice": debt["invoice_ref"] or None, "amount_minor": debt["amount"], "currency": debt["currency"]}
    await ask(tx, row, "collect", case, key, {"ref": row.ref, **wanted})


async def ask(tx: Tx, row: Any, act: str, subject: str, key: str, arguments: Mapping[str, Any]) -> None:
    """Have the provider of ``row`` asked by the worker, once for each ``key`` of its organization; ``subject``: what it is about,
    by our id."""
    if await checkout_store.call_by_request(tx, row.organization_id, key) is not None:
        return
    await checkout_store.add_call(tx, {
        "id": new_id("cll"), "organization_id": row.organization_id, "request_key": key, "act": act, "subject": subject,
        "provider": row.provider, "actor": PLATFORM, "arguments": dict(arguments),
    })  # fmt: skip
    await queue.wake(tx, checkout_store.CALL)
