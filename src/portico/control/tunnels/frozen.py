"""Tunnels that an organization's plan has no room for: kept, with name, address and policy, but off line.

After a move to a smaller plan the oldest tunnels stay and the newest are frozen; one that needs what the plan lacks (its
protocol, a rule of its policy) is frozen whatever its age, since serving it without its rule would open it. Which ones follows
from the rows alone, so that deciding again gives the same. A deletion, or a larger plan, thaws the next in order. Of those on
line beyond the plan's number, the newest are taken off line; their agents may come back when there is room.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from portico.control import changes
from portico.control.identity import plans
from portico.control.identity.plans import Entitlements
from portico.control.tunnels import policy, session_store, store
from portico.control.tunnels.addresses import Addresses
from portico.errors import Problem
from portico.kit.db import Database, Tx
from portico.kit.ids import new_id
from portico.settings import ApiSettings

log = logging.getLogger(__name__)


class Frozen:
    """The verbs on frozen tunnels."""

    def __init__(self, settings: ApiSettings, addresses: Addresses) -> None:
        self._settings = settings
        self._addresses = addresses

    async def settle(self, tx: Tx, organization: str) -> None:
        """Freeze and thaw what follows from the plan that holds now; relays are told in the same transaction."""
        await store.lock_set(tx, organization)
        held = await plans.entitlements(tx, organization)
        rows = await store.plan_facts(tx, organization)
        wanted = chosen(held, rows)
        for row in rows:
            if row.frozen != wanted[row.id]:
                changed = await store.freeze(tx, organization, row.id, wanted[row.id])
                kind = "frozen" if changed.frozen is not None else "thawed"
                details = {"plan": held.plan, "for": changed.frozen or row.frozen}
                event = {"id": new_id("evt"), "tunnel_id": row.id, "kind": kind, "details": details}
                await store.add_events(tx, [event])
                changes.append(tx, changes.tunnel(self._addresses.edge_row(changed._mapping)))
        await self._online(tx, held, [row.id for row in rows if wanted[row.id] is not None])

    async def look(self, db: Database, tunnels: Sequence[str]) -> None:
        """Take off line what is beyond the plan among the tunnels of those organizations that have just come on line with one.

        A grant is a promise for minutes, and places are counted when it is given: agents that hold grants and connect later,
        all at once, are seen here. What is due follows from the rows, so that whatever goes wrong is made good by the next
        heartbeat that brings a change.
        """
        try:
            async with db.read() as reader:
                crowd = await session_store.crowd(reader, list(tunnels), self._settings.relay_lease_seconds)
                held = await plans.entitlements_of(reader, list(crowd))
            for organization, online in sorted(crowd.items()):
                allowed = held[organization].limit("tunnels_online") if organization in held else None
                if allowed is not None and online > allowed:
                    async with db.transaction() as tx:
                        await self.settle(tx, organization)
        except Exception as err:
            log.warning(
                "tunnels on line were not counted", extra={"f": {"error": f"{type(err).__name__}: {err}"[:200]}}
            )

    async def _online(self, tx: Tx, held: Entitlements, frozen: Sequence[str]) -> None:
        allowed = held.limit("tunnels_online")
        if allowed is None:
            return
        online = await session_store.online_tunnels(tx, held.organization, "", self._settings.relay_lease_seconds)
        if beyond := [tunnel for tunnel in online if tunnel not in set(frozen)][allowed:]:
            rows = await store.take_offline(tx, held.organization, beyond)
            changes.append(tx, *(changes.tunnel(self._addresses.edge_row(row._mapping)) for row in rows))


def chosen(held: Entitlements, rows: Sequence[Any]) -> dict[str, str | None]:
    """For each tunnel (the oldest first) the limit or feature for want of which it is frozen, or ``None``."""
    found: dict[str, str | None] = {}
    most, kept = held.limit("tunnels"), 0
    for row in rows:
        lacking = next((need for need in policy.needs(row.protocol, row.policy) if need not in held.features), None)
        found[row.id] = lacking or ("tunnels" if most is not None and kept >= most else None)
        kept += found[row.id] is None
    return found


def refusal(row: Any, held: Entitlements) -> Problem:
    """Why a frozen tunnel does not serve: ``tunnel.frozen``."""
    reason = row["frozen"]
    if reason in plans.FEATURE_TABLE:
        why = f"the plan {held.name} has no {plans.FEATURE_TABLE[reason]}"
    else:
        noun = plans.LIMIT_TABLE[reason].noun if reason in plans.LIMIT_TABLE else reason
        why = f"the plan {held.name} allows {held.limit(reason)} {noun}, and older ones come first"
    return Problem("tunnel.frozen", f"the tunnel {row['name']} is frozen: {why}", plan=held.plan, limit=reason)
