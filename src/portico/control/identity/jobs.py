"""Housekeeping: rotate signing keys when it is time, write key uses, delete what has expired."""

from __future__ import annotations

from datetime import timedelta

from portico.control.identity import account_store, device, signing_keys, store, throttle
from portico.control.identity.invitation_store import over
from portico.control.identity.service import Identity
from portico.control.identity.tables import invitations
from portico.kit.batches import delete_in_batches

# Ended sessions and expired codes are kept this long, so that a late use is still answered with its own code.
KEEP = timedelta(days=1)


async def housekeeping(identity: Identity) -> None:
    """One round. Safe to run in several processes at once: rotation takes a lock, deletes are idempotent."""
    await signing_keys.ensure(identity.db, identity.signing_keys)
    await identity.write_last_used()
    now = identity.clock.wall()
    await delete_in_batches(
        identity.db, invitations, over(now - timedelta(days=identity.settings.invitation_keep_days))
    )
    await throttle.expire(identity.db, now)
    await device.expire(identity.db, now - KEEP)
    await store.expire_sessions(identity.db, now - KEEP)
    await account_store.expire(identity.db, now - KEEP)
