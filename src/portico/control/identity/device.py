"""Device sign-in (RFC 8628): a terminal shows a code, a person approves it in a browser, the terminal gets an agent key.

    pending ──approve──► approved ──poll──► used
       └──────deny─────► denied

The device code is a full-entropy secret and stored as a digest. The user code is short because people type it: 20^8
codes, few guesses per person and window, ten minutes of life. The key is made when the terminal fetches it, so its text
is never at rest.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import exc as sa_exc

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity import roster, standing, store, throttle
from portico.control.identity.keys import Keys, NewKey
from portico.control.identity.tables import device_codes as t
from portico.control.identity.tables import users
from portico.control.identity.throttle import Bucket
from portico.errors import Problem
from portico.kit import networks
from portico.kit.batches import delete_in_batches
from portico.kit.clock import Clock
from portico.kit.db import Database, Tx, is_unique_violation
from portico.kit.ids import check_token, digest, new_token
from portico.settings import ApiSettings

# No vowels (no words), no digits or letters that look alike (RFC 8628 section 6.1).
_ALPHABET: Final = "BCDFGHJKLMNPQRSTVWXZ"
_CODE_LENGTH: Final = 8
_SLOW_DOWN_SECONDS: Final = 5
# A poll this much early is the network's doing, not the client's.
_TOLERANCE_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class DeviceCode:
    """What a terminal starts with."""

    device_code: str
    user_code: str
    verification_uri: str
    verification_uri_complete: str
    interval: int
    expires_in: int


@dataclass(frozen=True, slots=True)
class PendingDevice:
    """What the person who approves should compare with their own terminal."""

    user_code: str
    hostname: str
    address: str | None


def normal_code(typed: str) -> str:
    """The code as stored: upper-case letters alone, whatever dashes and spaces were typed."""
    return "".join(c for c in typed.upper() if c in _ALPHABET)


def shown_code(code: str) -> str:
    """The code as people read it: XXXX-XXXX."""
    return f"{code[:4]}-{code[4:]}"


class DeviceFlow:
    """The verbs of device sign-in."""

    def __init__(self, settings: ApiSettings, db: Database, clock: Clock, keys: Keys) -> None:
        self._settings = settings
        self._db = db
        self._clock = clock
        self._keys = keys

    async def start(self, caller: Caller, hostname: str) -> DeviceCode:
        """A new pair of codes. Raises ``auth.throttled``."""
        s = self._settings
        bucket = Bucket(f"device {networks.network(caller.address)}", s.device_codes_per_address, s.device_code_seconds)
        await throttle.count(self._db, [bucket])
        device_code = new_token("dc")
        user_code = await self._insert(device_code, hostname, caller.address)
        page = f"{s.api_url.rstrip('/')}/device"
        shown = shown_code(user_code)
        return DeviceCode(
            device_code, shown, page, f"{page}?code={shown}", s.device_poll_seconds, s.device_code_seconds
        )

    async def _insert(self, device_code: str, hostname: str, address: str | None) -> str:
        now = self._clock.wall()
        row = {
            "digest": digest(device_code),
            "hostname": hostname,
            "address": address,
            "interval_seconds": self._settings.device_poll_seconds,
            "created_at": now,
            "expires_at": now + timedelta(seconds=self._settings.device_code_seconds),
        }
        while True:  # a collision in 2.5e10 codes is drawn again
            user_code = "".join(secrets.choice(_ALPHABET) for _ in range(_CODE_LENGTH))
            try:
                async with self._db.transaction() as tx:
                    await tx.execute(sa.insert(t).values(user_code=user_code, **row))
                return user_code
            except sa_exc.IntegrityError as err:
                if not is_unique_violation(err, "device_codes_user_code_key"):
                    raise

    async def poll(self, caller: Caller, device_code: str) -> tuple[NewKey, str, str]:
        """The agent key, once, with the organization's and the person's id.

        Raises ``device.authorization_pending``, ``device.slow_down``, ``device.denied``, ``device.expired``,
        ``device.code_invalid``.
        """
        if check_token(device_code) != "dc":
            raise Problem("device.code_invalid")
        now = self._clock.wall()
        async with self._db.transaction() as tx:
            held = await self._hold_approver(tx, device_code)
            row = await tx.fetch_one(sa.select(t).where(t.c.digest == digest(device_code)).with_for_update())
            if row is None or row.state == "used":
                raise Problem("device.code_invalid")
            if row.expires_at <= now:
                raise Problem("device.expired")
            if row.state == "denied":
                raise Problem("device.denied")
            if row.state == "approved" and held:  # approved this moment, it is fetched by the next poll
                return await self._deliver(tx, caller, row), row.organization_id, row.user_id
            refusal = await self._wait(tx, row, now)
        raise refusal

    async def _hold_approver(self, tx: Tx, device_code: str) -> bool:
        """Hold the organization and the person of an approved code; whether it is one.

        Before the code itself: whoever ends what a person began, approvals among it, holds the person first.
        """
        approved = sa.and_(t.c.digest == digest(device_code), t.c.state == "approved")
        row = await tx.fetch_one(sa.select(t.c.organization_id, t.c.user_id).where(approved))
        if row is not None:
            await store.lock_organization(tx, row.organization_id)
            person = sa.select(users.c.id).where(users.c.id == row.user_id)
            await tx.execute(person.with_for_update(read=True))
        return row is not None

    async def _wait(self, tx: Tx, row: Any, now: datetime) -> Problem:
        """Note the poll of a pending code; the refusal is raised after the commit."""
        interval = row.interval_seconds
        early = row.last_polled_at is not None and (
            (now - row.last_polled_at).total_seconds() < interval - _TOLERANCE_SECONDS
        )
        if early:
            interval += _SLOW_DOWN_SECONDS
        held = sa.update(t).where(t.c.digest == row.digest)
        await tx.execute(held.values(last_polled_at=now, interval_seconds=interval))
        return Problem("device.slow_down" if early else "device.authorization_pending", interval=interval)

    async def _deliver(self, tx: Tx, caller: Caller, row: Any) -> NewKey:
        """Make the key in the name of the person who approved it, if that person is still a member."""
        role = await roster.role_of(tx, row.organization_id, row.user_id)
        if role is None:
            raise Problem("device.denied", "the person who approved this device has left the organization")
        await tx.execute(sa.update(t).where(t.c.digest == row.digest).values(state="used"))
        person = Caller(
            "person",
            row.user_id,
            row.organization_id,
            role.permissions,
            user_id=row.user_id,
            request_id=caller.request_id,
            address=caller.address,
        )
        try:
            return await self._keys.create(tx, person, "agent", row.hostname, details={"by": "device sign-in"})
        except Problem as problem:
            if problem.code not in ("auth.forbidden", "auth.session_ended"):
                raise
            raise Problem("device.denied", "the person who approved this device may not make keys any more") from None

    async def look_up(self, caller: Caller, typed: str) -> PendingDevice:
        """The pending device behind a typed code. Raises ``device.code_invalid`` or ``auth.throttled``."""
        buckets = await self._count_guess(caller)
        async with self._db.transaction() as tx:
            row = await self._pending(tx, typed)
            await throttle.forgive(tx, buckets)
        return PendingDevice(shown_code(row.user_code), row.hostname, row.address)

    async def decide(self, caller: Caller, typed: str, *, approve: bool) -> PendingDevice:
        """Approve or deny a pending code as a person who may make keys.

        Raises ``auth.forbidden``, ``device.code_invalid``, ``auth.throttled``.
        """
        if caller.kind != "person":
            raise Problem(
                "auth.forbidden", "a device is approved by a person who is signed in", permission="keys:write"
            )
        caller.check_any(("keys:own", "keys:write"))
        buckets = await self._count_guess(caller)
        async with self._db.transaction() as tx:
            row = await self._pending(tx, typed)
            await throttle.forgive(tx, buckets)
            await standing.hold(tx, caller, ("keys:own", "keys:write"))
            state = "approved" if approve else "denied"
            change = {"state": state, "user_id": caller.user_id, "organization_id": caller.org}
            await tx.execute(sa.update(t).where(t.c.digest == row.digest).values(**change))
            facts = {"hostname": row.hostname, "address": row.address}
            await audit.record(tx, caller, f"device.{'approve' if approve else 'deny'}", row.user_code, details=facts)
        return PendingDevice(shown_code(row.user_code), row.hostname, row.address)

    async def _count_guess(self, caller: Caller) -> list[Bucket]:
        limit, window = self._settings.device_code_guesses, self._settings.device_code_seconds
        # By person, not by address alone: an attacker has many addresses, but needs an account for each person.
        buckets = [Bucket(f"device guess {caller.user_id}", limit, window)]
        await throttle.count(self._db, buckets)
        return buckets

    async def _pending(self, tx: Tx, typed: str) -> Any:
        live = sa.and_(t.c.state == "pending", t.c.expires_at > self._clock.wall())
        query = sa.select(t).where(t.c.user_code == normal_code(typed), live)
        row = await tx.fetch_one(query.with_for_update())
        if row is None:
            raise Problem("device.code_invalid")
        return row


async def expire(db: Database, before: datetime) -> None:
    """Delete codes that expired before ``before``."""
    await delete_in_batches(db, t, t.c.expires_at < before)
