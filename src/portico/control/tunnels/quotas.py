"""What the quotas of tunnels count, under which lock."""

from __future__ import annotations

from portico.control.identity.quotas import Kind
from portico.control.tunnels import claim_store, session_store, store
from portico.kit.db import Reader
from portico.settings import ApiSettings


def kinds(settings: ApiSettings) -> dict[str, Kind]:
    """The kinds that are counted here, by the names of their limits."""

    async def online(reader: Reader, organization: str) -> int:
        return len(await session_store.online_tunnels(reader, organization, "", settings.relay_lease_seconds))

    most, names = settings.tunnels_per_organization, settings.reserved_names_per_organization
    return {
        "tunnels": Kind(
            store.number_of_tunnels,
            store.lock_set,
            most,
            "tunnel.limit_reached",
            f"your organization has {most} tunnels already",
        ),
        "tunnels_online": Kind(online, store.lock_set),
        "reserved_names": Kind(
            claim_store.count_reserved,
            claim_store.lock_reservations,
            names,
            "name.limit_reached",
            f"your organization reserves {names} names already",
        ),
    }
