"""A domain as relays hold it: a host that belongs to a tunnel beside the host of its own.

Relays know a domain while it is routed, its name is its owner's and its plan has room for it. The row says all that they need to
go on without the control plane: under the policy ``strict``, until when its certificate is good.
"""

from __future__ import annotations

from typing import Any

from portico.control import changes
from portico.control.domains import store
from portico.kit.db import Reader, Tx

#: Certificates that visitors may rely on.
_GOOD = ("active", "renewing")


def known(row: Any) -> bool:
    """Whether relays hold the domain."""
    return row.tunnel_id is not None and row.hostname_status in store.SERVED and row.frozen is None


def document(row: Any) -> dict[str, Any]:
    """The row of ``contracts/edge-stream.schema.json``."""
    found = {"id": row.id, "host": row.name, "tunnel": row.tunnel_id, "tls": row.tls_mode}
    if row.failure_policy == "strict" and row.tls_mode == "terminate":
        good = row.cert_status in _GOOD and row.cert_not_after is not None
        found["valid_until"] = int(row.cert_not_after.timestamp()) if good else 0
    return found


def tell(tx: Tx, before: Any | None, after: Any | None) -> None:
    """Tell relays of a change from one row to another, where it makes a difference to them."""
    old = document(before) if before is not None and known(before) else None
    new = document(after) if after is not None and known(after) else None
    if new is not None and new != old:
        changes.append(tx, changes.domain(new))
    elif old is not None and new is None:
        changes.append(tx, changes.domain_removed(old["id"]))


async def rows(reader: Reader) -> list[dict[str, Any]]:
    """Every domain as relays hold it, in the reader's snapshot."""
    return [document(row) for row in await store.routed(reader)]
