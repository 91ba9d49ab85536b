"""Record acts and list them.

An act and its row share a transaction: no act without its row, no row of an act that was rolled back. A *refused*
dangerous act changes nothing, so its row gets a transaction of its own (``refused``).
"""

from __future__ import annotations

from typing import Any

from portico.control.access import Caller
from portico.control.audit import store
from portico.kit import pages
from portico.kit.db import Database, Reader, Tx
from portico.kit.ids import new_id


async def record(
    tx: Tx,
    caller: Caller,
    action: str,
    target: str | None,
    outcome: str = "success",
    details: dict[str, Any] | None = None,
    *,
    organization: str | None = None,
) -> None:
    """Add the row of ``action`` (``noun.verb``) on ``target`` (an object id). ``details`` never holds a secret.

    The row belongs to the caller's organization unless ``organization`` names another.
    """
    row = {
        "id": new_id("aud"),
        "organization_id": organization or caller.organization,
        "actor_kind": caller.kind,
        "actor_id": caller.id,
        "action": action,
        "target": target,
        "outcome": outcome,
        "details": details or {},
        "request_id": caller.request_id,
        "address": caller.address,
    }
    await store.insert(tx, row)


async def refused(
    db: Database,
    caller: Caller,
    action: str,
    target: str | None,
    details: dict[str, Any] | None = None,
    *,
    organization: str | None = None,
) -> None:
    """Add the row of a refused act in its own transaction, since the act's own is rolled back."""
    async with db.transaction() as tx:
        await record(tx, caller, action, target, "refused", details, organization=organization)


async def listing(reader: Reader, caller: Caller, page: pages.PageRequest, action: str | None = None) -> dict[str, Any]:
    """A page of the caller's organization's rows, newest first."""
    before = page.after[0] if page.after else None
    rows = await store.listing(reader, caller.org, page.limit + 1, before, action)
    document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.id,), _render)
    return document


def _render(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "at": row.at,
        "actor": {"kind": row.actor_kind, "id": row.actor_id, "address": row.address},
        "action": row.action,
        "target": row.target,
        "outcome": row.outcome,
        "details": row.details,
        "request_id": row.request_id,
    }
