"""Blocking a domain, as the operator does it by a route or by `portico admin domains`: relays serve it no longer within 2 s.

Nobody can prove a blocked name anew, neither who has it nor another organization, and its owner can neither change nor remove it;
certificates are not ordered for it. Its tunnel is remembered. Only an operator ends the block; whether the name is still its
owner's is looked at right afterwards. A block belongs to the domain's row: it is gone with the organization.
"""

from __future__ import annotations

import contextlib
from datetime import datetime
from typing import Any, Final

import idna

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.domains import edge, event_store, lifecycle, ownership, store
from portico.control.domains.certificate_state import Registers
from portico.control.domains.lifecycle import NewEvent
from portico.errors import Problem
from portico.kit import pages
from portico.kit.db import Reader, Tx

#: ``dns_error`` of a domain that an operator has blocked. No event of anybody ends that.
BLOCKED: Final = "blocked"


async def listing(reader: Reader, page: pages.PageRequest, name: str | None, status: str | None) -> dict[str, Any]:
    """A page of the domains of all organizations, the oldest first; ``name``: exactly so."""
    wanted = None if name is None else name.strip().lower().rstrip(".")
    rows = await store.everybodys(reader, wanted, status, page.limit + 1, page.after[0] if page.after else None)
    document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.id,), shown)
    return document


async def blocked(reader: Reader, most: int) -> list[dict[str, Any]]:
    """Domains that are blocked, the oldest first."""
    return [shown(row) for row in await store.everybodys(reader, None, "blocked", most, None)]


def shown(row: Any) -> dict[str, Any]:
    """A domain as operators see it."""
    return {
        "id": row.id,
        "name": row.name,
        "organization": row.organization_id,
        "hostname_status": row.hostname_status,
        "dns_error": row.dns_error,
        "tunnel": row.tunnel_id,
        "certificate_status": row.cert_status,
        "verified_at": row.verified_at,
        "created_at": row.created_at,
        "updated_at": row.updated_at,
    }


async def block(tx: Tx, caller: Caller, domain_id: str, reason: str, now: datetime) -> Any:
    """Block a domain; the row after it. Twice is no error.

    Raises ``domain.not_found``, ``domain.lost``, and ``domain.not_verified`` for a claim, which nobody is served for.
    """
    row = await _held(tx, domain_id)
    if row.hostname_status == "blocked" and row.dns_error == BLOCKED:
        return row
    if row.hostname_status == "deleted":
        raise Problem("domain.lost", f"{row.name} is not that organization's any more")
    if row.hostname_status not in store.HELD:
        raise Problem("domain.not_verified", f"nobody has proved that {row.name} is theirs, and it is served to nobody")
    after = await store.update(tx, row.id, hostname_status="blocked", dns_error=BLOCKED, next_check_at=None)
    await _tell(tx, caller, row, after, "block", reason, now)
    return after


async def unblock(tx: Tx, caller: Caller, domain_id: str, reason: str, now: datetime) -> Any:
    """Let a domain be what its last look said, and look again; the row after it. One that is not blocked stays as it is.

    Raises ``domain.not_found``.
    """
    row = await _held(tx, domain_id)
    if row.hostname_status != "blocked":
        return row
    after = await store.update(tx, row.id, **ownership.released(row, now))
    await _tell(tx, caller, row, after, "unblock", reason, now)
    return after


async def by_name(reader: Reader, text: str) -> str:
    """The id of the domain that holds a name, or of this id. Raises ``domain.not_found``."""
    name = text.strip().lower().rstrip(".")
    if not name.isascii():
        with contextlib.suppress(idna.IDNAError):
            base = idna.encode(name.removeprefix("*."), uts46=True).decode("ascii")
            name = f"*.{base}" if name.startswith("*.") else base
    found = await store.holder(reader, [name])
    row = found[0] if found else await store.find(reader, text.strip())
    if row is None:
        raise Problem("domain.not_found", f"no organization has proved that {text[:80]} is theirs")
    return str(row.id)


async def _held(tx: Tx, domain_id: str) -> Any:
    row = await store.find(tx, domain_id, lock=True)
    if row is None:
        raise Problem("domain.not_found")
    return row


async def _tell(tx: Tx, caller: Caller, row: Any, after: Any, verb: str, reason: str, now: datetime) -> None:
    """Relays, the audit log of the organization, and (by an event that opens an incident, or ends it) its channels."""
    edge.tell(tx, row, after)
    action = "blocked" if verb == "block" else "succeeded"
    known = [event for pair, event in Registers.read(row.cert_applied).newest.items() if pair.startswith("ownership.")]
    revision = max((event.revision for event in known), default=0)
    sequence = max([*await event_store.next_sequences(tx, 1), *(event.sequence + 1 for event in known)])
    event = NewEvent(
        row.id, "ownership", action, revision, sequence, now, object=f"{row.id}/{sequence}",
        error_code=BLOCKED if verb == "block" else None, error_detail=reason if verb == "block" else None,
    )  # fmt: skip
    await lifecycle.record(tx, event)
    facts = {"name": row.name, "from": row.hostname_status, "to": after.hostname_status, "reason": reason}
    await audit.record(tx, caller, f"domain.{verb}", row.id, details=facts, organization=row.organization_id)
