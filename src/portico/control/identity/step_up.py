"""Step-up: a person who is signed in proves again who they are, before an act that a stolen session must not be enough for.

The proof is at least as strong as what the account asks for at sign-in: where an authenticator app is set up, the password
alone is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity import account_store, factor_store, throttle
from portico.control.identity.passkeys import Passkeys
from portico.control.identity.passwords import Passwords
from portico.control.identity.proofs import Proof, Proofs
from portico.control.identity.throttle import Bucket
from portico.errors import Problem
from portico.kit.clock import Clock
from portico.kit.db import Database, Tx
from portico.settings import ApiSettings


@dataclass(frozen=True, slots=True)
class Proven:
    """When a session's person last proved who they are, and by what."""

    authenticated_at: datetime
    methods: tuple[str, ...]


class StepUp:
    """The verb, and the check of the current password that other verbs share."""

    def __init__(
        self,
        settings: ApiSettings,
        db: Database,
        clock: Clock,
        passwords: Passwords,
        passkeys: Passkeys,
        proofs: Proofs,
    ) -> None:
        self._settings = settings
        self._db = db
        self._clock = clock
        self._passwords = passwords
        self._passkeys = passkeys
        self._proofs = proofs

    async def passkey_options(self, tx: Tx, caller: Caller) -> dict[str, Any]:
        """What a browser hands to ``navigator.credentials.get`` for a proof by passkey."""
        return await self._passkeys.options(tx, "step_up", caller.session_id, caller.user_id)

    async def prove(self, caller: Caller, proof: Proof) -> Proven:
        """Note a proof in the caller's session. Raises ``auth.proof_invalid``, ``auth.throttled``, ``auth.session_ended``."""
        if proof.password is not None:
            return await self._by_password(caller, proof.password)
        user_id = caller.user_id or ""
        counted = await self._proofs.count(caller, user_id, proof, "step_up", caller.session_id)
        async with self._db.transaction() as tx:
            await account_store.lock_user(tx, user_id)
            if (method := await self._proofs.check(tx, caller, user_id, counted)) is not None:
                return await self.note(tx, caller, method)
        await audit.refused(self._db, caller, "session.step_up", caller.session_id, {"reason": "second step"})
        raise Problem("auth.proof_invalid")

    async def _by_password(self, caller: Caller, password: str) -> Proven:
        async with self._db.read() as reader:
            if await factor_store.has_totp(reader, caller.user_id or ""):
                raise Problem("auth.proof_invalid", "this account has an authenticator app: send a code, or a passkey")
        method = await self.check_password(caller, password, "session.step_up")
        async with self._db.transaction() as tx:
            return await self.note(tx, caller, method)

    async def note(self, tx: Tx, caller: Caller, method: str) -> Proven:
        """Write a proof that was right into the caller's session. Raises ``auth.session_ended``."""
        now = self._clock.wall()
        session = await account_store.lock_session(tx, caller.session_id or "")
        if session is None:
            raise Problem("auth.session_ended")
        await account_store.note_proof(tx, session.id, now, [method])
        await audit.record(tx, caller, "session.step_up", session.id, details={"method": method})
        return Proven(now, (method,))

    async def check_password(self, caller: Caller, password: str, action: str) -> str:
        """``pwd`` when it is the person's password; a refusal is recorded as one of ``action``.

        Raises ``auth.proof_invalid`` and ``auth.throttled``.
        """
        s = self._settings
        # By session, from wherever: its thief has few guesses, and cannot use up those of the person's other sessions.
        name = f"step up {caller.user_id} {caller.session_id}"
        buckets = [Bucket(name, s.step_up_failures, s.sign_in_failure_window_seconds)]
        await throttle.count(self._db, buckets)
        async with self._db.read() as reader:
            row = await account_store.user(reader, caller.user_id or "")
        fits, _ = await self._passwords.verify(password, row.password_hash if row is not None else None)
        if not fits:
            await audit.refused(self._db, caller, action, caller.session_id, {"reason": "password"})
            raise Problem("auth.proof_invalid")
        async with self._db.transaction() as tx:
            await throttle.forgive(tx, buckets)
        return "pwd"
