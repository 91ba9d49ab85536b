"""What happened to tunnels, as far as the platform truly knows it.

created  changed  stopped  started     by people and keys, in the transaction of the change
session                                an agent named the tunnel in a session
online   offline                       a relay reported it bound, or bound no more, and why
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from portico.control.access import Caller
from portico.control.tunnels import relay_store, store
from portico.errors import Problem
from portico.kit import pages
from portico.kit.db import Reader, Tx
from portico.kit.ids import first_id, new_id

#: Ids are made by API processes, times by PostgreSQL: clocks that differ by more than this lose events of `since`.
_CLOCKS = timedelta(minutes=5)
_LAST_ID = "evt_" + "z" * 26
_EVER = datetime(2000, 1, 1, tzinfo=UTC)


async def presence_changed(
    tx: Tx, relay: str, before: Mapping[str, str], now: Mapping[str, str], left: Mapping[str, str], *, lease: float
) -> None:
    """Events for what came to ``relay`` and what went (tunnel → session); ``left`` says why.

    A tunnel that another live relay has bound by now has moved, and is not off line. A relay that cannot say why a tunnel went
    never had it: it is a new process under the name.
    """
    came = [tunnel for tunnel, session in now.items() if before.get(tunnel) != session]
    gone = [tunnel for tunnel in before if tunnel not in now]
    held = {row["tunnel_id"] for row in await relay_store.live_bindings(tx, gone, lease)} if gone else set()
    events = [
        ("offline", tunnel, before[tunnel], left.get(tunnel) or "the relay was restarted")
        for tunnel in gone
        if tunnel not in held
    ]
    await _add(tx, relay, [*events, *(("online", tunnel, now[tunnel], "") for tunnel in came)])


async def relays_fell_silent(tx: Tx, lease: float) -> int:
    """Tunnels of relays that report no more are off line; how many. Twice the lease: an outage of the API is not theirs."""
    rows = await relay_store.forget_silent_relays(tx, 2 * lease)
    held = {row["tunnel_id"] for row in await relay_store.live_bindings(tx, [row["tunnel_id"] for row in rows], lease)}
    gone: dict[str, list[tuple[str, str, str, str]]] = {}
    for row in rows:
        if row["tunnel_id"] not in held:
            why = f"the relay has not reported since {row['seen_at']:%H:%M:%S} UTC"
            gone.setdefault(row["relay"], []).append(("offline", row["tunnel_id"], row["session_id"], why))
    for relay, events in gone.items():
        await _add(tx, relay, events)
    return sum(map(len, gone.values()))


async def _add(tx: Tx, relay: str, events: list[tuple[str, str, str, str]]) -> None:
    if not events:
        return
    details = [
        json.dumps({"relay": relay, "session": session} | ({"reason": why} if why else {}))
        for _, _, session, why in events
    ]
    ids = [new_id("evt") for _ in events]
    await store.add_presence(tx, (ids, [e[1] for e in events], [e[2] for e in events], [e[0] for e in events], details))


async def organization(
    reader: Reader, caller: Caller, tunnels: list[str], since: datetime | None, page: pages.PageRequest
) -> dict[str, Any]:
    """A page of what happened to the organization's tunnels, or to those named, newest first.

    Raises ``tunnel.not_found`` for an id that is not the organization's.
    """
    if tunnels and (unknown := set(tunnels) - await store.known_tunnels(reader, caller.org, tunnels)):
        raise Problem("tunnel.not_found", f"there is no tunnel {min(unknown)}")
    since = since or _EVER
    floor = first_id("evt", (max(since, _EVER + _CLOCKS) - _CLOCKS).timestamp())
    before = page.after[0] if page.after else _LAST_ID
    rows = await store.organization_events(reader, caller.org, tunnels or None, floor, before, since, page.limit + 1)
    document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row["id"],), _render)
    return document


def _render(row: Any) -> dict[str, Any]:
    details = row["details"]
    return {
        "id": row["id"],
        "at": row["at"],
        "tunnel": row["tunnel"],
        "name": row["name"],
        "kind": row["kind"],
        "details": json.loads(details) if isinstance(details, str) else details,
    }
