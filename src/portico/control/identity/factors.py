"""Second steps that people have: an authenticator app, and recovery codes for the day it is lost.

An authenticator app is what makes a sign-in by password take a second step. A code works once: a later use of its step, or of an
earlier one, is refused under the lock of the row. Recovery codes have 80 random bits, so a plain digest keeps them.
"""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime, timedelta
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity import account_store, factor_store, standing, throttle, totp
from portico.control.identity.letters import Letters
from portico.control.identity.throttle import Bucket
from portico.errors import Problem
from portico.kit import networks
from portico.kit.clock import Clock
from portico.kit.db import Database, Reader, Tx
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

_PURPOSE: Final = "authenticator key"
_DAY_SECONDS: Final = 86_400
RECOVERY_CODES: Final = 10
# No letters or digits that look alike; 32 of them, so 16 are 80 bits.
_ALPHABET: Final = "23456789ABCDEFGHJKLMNPQRSTUVWXYZ"
_CODE_CHARS: Final = 16


class Factors:
    """The verbs on one's own authenticator app and recovery codes."""

    def __init__(self, settings: ApiSettings, db: Database, clock: Clock, sealer: Sealer, letters: Letters) -> None:
        self._settings = settings
        self._db = db
        self._clock = clock
        self._sealer = sealer
        self._letters = letters

    async def status(self, reader: Reader, caller: Caller) -> dict[str, Any]:
        """What the person signs in with: ``{password, totp, recovery_codes, passkeys}``, the last two as numbers."""
        user_id = caller.user_id or ""
        row = await account_store.user(reader, user_id)
        return {
            "password": row is not None and row.password_hash is not None,
            "totp": await factor_store.has_totp(reader, user_id),
            "recovery_codes": await factor_store.recovery_codes_left(reader, user_id),
            "passkeys": len(await factor_store.passkeys_of(reader, user_id)),
        }

    async def pending(self, reader: Reader, caller: Caller) -> dict[str, str] | None:
        """The key that :meth:`start` made and that no code has confirmed yet; ``None`` without one."""
        user_id = caller.user_id or ""
        row, person = await factor_store.totp(reader, user_id), await account_store.user(reader, user_id)
        if row is None or person is None or row.confirmed_at is not None or self._too_old(row, self._clock.wall()):
            return None
        return self._shown(self._sealer.open(_PURPOSE, user_id, row.sealed_secret), person.email)

    def _shown(self, secret: bytes, email: str) -> dict[str, str]:
        return {"secret": totp.shown(secret), "uri": totp.uri(secret, email, self._settings.service_name)}

    # --- setting up

    async def start(self, tx: Tx, caller: Caller) -> dict[str, str]:
        """A key for an app: ``{secret, uri}``. It counts once :meth:`confirm` got a code made with it.

        Raises ``mfa.already_on``.
        """
        user_id = caller.user_id or ""
        person = await standing.hold_person(tx, caller)
        secret = totp.new_secret()
        sealed = self._sealer.seal(_PURPOSE, user_id, secret)
        if not await factor_store.put_totp(tx, user_id, sealed, self._clock.wall()):
            raise Problem("mfa.already_on")
        await audit.record(tx, caller, "mfa.start", user_id)
        return self._shown(secret, person.email)

    async def confirm(self, caller: Caller, code: str) -> list[str]:
        """Switch the second step on with a first code; returns the recovery codes, which are shown this once.

        Raises ``mfa.not_started``, ``mfa.already_on``, ``auth.proof_invalid``, ``auth.throttled``.
        """
        user_id = caller.user_id or ""
        buckets = await self.buckets(user_id, caller.address)
        await throttle.count(self._db, buckets)
        now = self._clock.wall()
        async with self._db.transaction() as tx:
            person = await standing.hold_person(tx, caller)
            row = await factor_store.lock_totp(tx, user_id)
            if row is not None and row.confirmed_at is not None:
                raise Problem("mfa.already_on")
            if row is None or self._too_old(row, now):
                raise Problem("mfa.not_started")
            if (step := self._step(row, code)) is not None:
                await throttle.forgive(tx, buckets)
                await factor_store.update_totp(tx, user_id, last_step=step, confirmed_at=now)
                codes = await self._make_recovery_codes(tx, user_id)
                # The code is a proof of this session, too; the person's others need one from now on.
                await account_store.note_proof(tx, caller.session_id or "", now, ["otp"])
                await audit.record(tx, caller, "mfa.enable", user_id, details={"method": "otp"})
                await self._letters.tell(tx, caller, person.email, "totp_on")
                return codes
        await audit.refused(self._db, caller, "mfa.enable", user_id, {"reason": "code"})
        raise Problem("auth.proof_invalid")

    def _too_old(self, row: Any, now: datetime) -> bool:
        """Whether a key was shown so long ago that nobody is about to confirm it: who saw a screen then has it, too."""
        return bool(now - row.created_at > timedelta(seconds=self._settings.totp_setup_seconds))

    async def disable(self, tx: Tx, caller: Caller) -> None:
        """Switch the second step off, and forget the recovery codes. Raises ``mfa.not_on``."""
        user_id = caller.user_id or ""
        person = await standing.hold_person(tx, caller)
        if not await factor_store.drop_totp(tx, user_id):
            raise Problem("mfa.not_on")
        await audit.record(tx, caller, "mfa.disable", user_id, details={"method": "otp"})
        await self._letters.tell(tx, caller, person.email, "totp_off")

    async def new_recovery_codes(self, tx: Tx, caller: Caller) -> list[str]:
        """Ten in the place of those there were. Raises ``mfa.not_on``."""
        user_id = caller.user_id or ""
        person = await standing.hold_person(tx, caller)
        if not await factor_store.has_totp(tx, user_id):
            raise Problem("mfa.not_on")
        codes = await self._make_recovery_codes(tx, user_id)
        await audit.record(tx, caller, "mfa.recovery_codes", user_id)
        await self._letters.tell(tx, caller, person.email, "recovery_new")
        return codes

    async def _make_recovery_codes(self, tx: Tx, user_id: str) -> list[str]:
        codes = [new_recovery_code() for _ in range(RECOVERY_CODES)]
        await factor_store.replace_recovery_codes(tx, user_id, [_digest(code) for code in codes], self._clock.wall())
        return codes

    # --- using

    async def buckets(self, user_id: str, address: str | None) -> list[Bucket]:
        """What an attempt with a code of six digits counts in.

        Three of a million codes fit at a time, so a day's attempts are few. Where the person signed in before, only those from
        there count: strangers elsewhere, who know the password even, do not use the person's up.
        """
        s = self._settings
        network, window = networks.network(address), s.sign_in_failure_window_seconds
        buckets = [
            Bucket(f"code {user_id} {network}", s.code_failures_per_pair, window),
            Bucket(f"code day {user_id} {network}", s.code_failures_per_day, _DAY_SECONDS),
        ]
        async with self._db.read() as reader:
            known = await factor_store.known_address(reader, user_id, address)
        if not known:
            buckets.append(Bucket(f"code day {user_id}", s.code_failures_per_day, _DAY_SECONDS))
        return buckets

    async def check_code(self, tx: Tx, user_id: str, code: str) -> bool:
        """Whether it is a code of the person's app that was not used; uses it up."""
        row = await factor_store.lock_totp(tx, user_id)
        if row is None or row.confirmed_at is None or (step := self._step(row, code)) is None:
            return False
        await factor_store.update_totp(tx, user_id, last_step=step)
        return True

    async def check_recovery_code(self, tx: Tx, caller: Caller, user_id: str, typed: str) -> bool:
        """Whether it is an unused recovery code of the person; uses it up, and tells them."""
        if not await factor_store.use_recovery_code(tx, user_id, _digest(typed), self._clock.wall()):
            return False
        person = await account_store.user(tx, user_id)
        assert person is not None  # foreign key
        left = await factor_store.recovery_codes_left(tx, user_id)
        await self._letters.tell(tx, caller, person.email, "recovery_used", detail=f"{left} codes are left.")
        return True

    def _step(self, row: Any, code: str) -> int | None:
        secret = self._sealer.open(_PURPOSE, row.user_id, row.sealed_secret)
        return totp.fitting_step(secret, code, self._clock.wall().timestamp(), row.last_step)


def new_recovery_code() -> str:
    """A code as people write it down: XXXX-XXXX-XXXX-XXXX."""
    text = "".join(secrets.choice(_ALPHABET) for _ in range(_CODE_CHARS))
    return "-".join(text[i : i + 4] for i in range(0, _CODE_CHARS, 4))


def _digest(typed: str) -> bytes:
    plain = "".join(c for c in typed.upper() if c in _ALPHABET)
    return hashlib.sha256(plain.encode()).digest()
