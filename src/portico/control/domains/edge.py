"""A domain as relays hold it: a host that belongs to a tunnel beside the host of its own.

Relays know a domain while it is routed, its name is its owner's and its plan has room for it. The row says all that they need to
go on without the control plane: under the policy ``strict``, until when its certificate is good.

Of a name that is somebody's and is served to nobody (blocked, or frozen) relays know just that, so that visitors can read it, and
so that a wildcard above it does not serve it.
"""

from __future__ import annotations

from typing import Any, Final

from portico.control import changes
from portico.control.domains import store
from portico.kit.db import Reader, Tx

#: Certificates that visitors may rely on.
_GOOD = ("active", "renewing")
#: What visitors of a domain are told that is served to nobody (contracts/errors.toml).
BLOCKED: Final = "edge.domain_blocked"
FROZEN: Final = "edge.domain_frozen"


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


def closed(row: Any) -> dict[str, Any] | None:
    """What relays hold of a domain that is served to nobody, and why; ``None`` for any other."""
    code = None
    if row.hostname_status == "blocked":
        code = BLOCKED
    elif row.frozen is not None and row.tunnel_id is not None and row.hostname_status in store.SERVED:
        code = FROZEN
    return None if code is None else {"id": row.id, "host": row.name, "code": code}


def tell(tx: Tx, before: Any | None, after: Any | None) -> None:
    """Tell relays of a change from one row to another, where it makes a difference to them."""
    old, new = _told(before), _told(after)
    if new == old:
        return
    opens = new is not None and "code" not in new
    # Relays of before pass over what is closed: to them it is removed.
    if old is not None and not opens:
        changes.append(tx, changes.domain_removed(old["id"]))
    if new is not None:
        changes.append(tx, changes.domain(new) if opens else changes.domain_closed(new))


def _told(row: Any | None) -> dict[str, Any] | None:
    if row is None:
        return None
    return document(row) if known(row) else closed(row)


async def rows(reader: Reader) -> list[dict[str, Any]]:
    """Every domain as relays hold it, in the reader's snapshot."""
    return [document(row) for row in await store.routed(reader)]


async def closed_rows(reader: Reader) -> list[dict[str, Any]]:
    """Every domain that is served to nobody, likewise."""
    return [found for row in await store.closed(reader) if (found := closed(row)) is not None]
