"""The second step of a sign-in: between the right password and the session stands a code, or a passkey.

    login ──right password──► token ──code, recovery code or passkey──► session
                              (5 minutes, one use)

The token proves the first step and nothing else. A wrong code leaves it, so that people can mistype; how often is counted in
buckets that only who knows the password can fill.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity import account_store, factor_store
from portico.control.identity.account_store import Person
from portico.control.identity.passkeys import Passkeys
from portico.control.identity.proofs import Proof, Proofs
from portico.control.identity.sign_in import Client, SignedIn, SignIns
from portico.errors import Problem
from portico.kit.clock import Clock
from portico.kit.db import Database, Tx
from portico.kit.ids import check_token, digest, new_token
from portico.settings import ApiSettings

_PURPOSE: Final = "sign_in"


@dataclass(frozen=True, slots=True)
class SecondStep:
    """A sign-in that is half done."""

    mfa_token: str
    methods: tuple[str, ...]  # of otp, recovery, passkey
    expires_in: int


class SecondSteps:
    """Begins second steps, and ends them."""

    def __init__(
        self, settings: ApiSettings, db: Database, clock: Clock, sign_ins: SignIns, passkeys: Passkeys, proofs: Proofs
    ) -> None:
        self._settings = settings
        self._db = db
        self._clock = clock
        self._sign_ins = sign_ins
        self._passkeys = passkeys
        self._proofs = proofs

    async def begin(self, tx: Tx, person: Person) -> SecondStep | None:
        """The second step that a person who is held has to take; ``None`` for who has none set up."""
        if not await factor_store.has_totp(tx, person.id):
            return None
        methods = ["otp"]
        if await factor_store.recovery_codes_left(tx, person.id):
            methods.append("recovery")
        if await factor_store.passkeys_of(tx, person.id):
            methods.append("passkey")
        token, now, life = new_token("mf"), self._clock.wall(), self._settings.second_step_seconds
        row = {"digest": digest(token), "purpose": _PURPOSE, "user_id": person.id, "email": person.email}
        await account_store.insert_token(tx, {**row, "created_at": now, "expires_at": now + timedelta(seconds=life)})
        return SecondStep(token, tuple(methods), life)

    async def passkey_options(self, token: str) -> dict[str, Any]:
        """What a browser hands to ``navigator.credentials.get`` for this step. Raises ``auth.mfa_token_invalid``."""
        user_id = await self._user(token)
        async with self._db.transaction() as tx:
            return await self._passkeys.options(tx, "second_step", digest(token).hex(), user_id)

    async def verify(
        self, caller: Caller, token: str, proof: Proof, client: Client, *, cookie: bool = False
    ) -> SignedIn:
        """The session, for the token of the first step and the proof of the second.

        Raises ``auth.mfa_token_invalid``, ``auth.second_step_invalid``, ``auth.throttled``.
        """
        user_id, bound_to = await self._user(token), digest(token).hex()
        counted = await self._proofs.count(caller, user_id, proof, "second_step", bound_to)
        async with self._db.transaction() as tx:
            person = await self._sign_ins.hold(tx, user_id)
            method = await self._proofs.check(tx, caller, user_id, counted) if person is not None else None
            if person is not None and method is not None:
                if await account_store.use_token(tx, digest(token), _PURPOSE, self._clock.wall()) is None:
                    raise Problem("auth.mfa_token_invalid")
                return await self._sign_ins.open(tx, person, client, ("pwd", method), caller=caller, cookie=cookie)
        async with self._db.read() as reader:
            home = await account_store.home(reader, user_id)
        await audit.refused(self._db, caller, "user.login", user_id, {"reason": "second step"}, organization=home)
        raise Problem("auth.second_step_invalid")

    async def _user(self, token: str) -> str:
        if check_token(token) != "mf":
            raise Problem("auth.mfa_token_invalid")
        async with self._db.read() as reader:
            row = await account_store.token(reader, digest(token), _PURPOSE, self._clock.wall())
        if row is None:
            raise Problem("auth.mfa_token_invalid")
        return str(row.user_id)
