"""Proofs of who somebody is, beside the password: a code of an authenticator app, a recovery code, a passkey.

Whoever asks for one (second step of a sign-in, step-up) counts it first, and checks it in the transaction of what it is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portico.control.access import Caller
from portico.control.identity import account_store, throttle
from portico.control.identity.factors import Factors
from portico.control.identity.letters import Letters
from portico.control.identity.passkeys import Passkeys, Purpose, Signed
from portico.control.identity.throttle import Bucket
from portico.errors import Problem
from portico.kit import networks
from portico.kit.clock import Clock
from portico.kit.db import Database, Tx
from portico.settings import ApiSettings


@dataclass(frozen=True, slots=True)
class Proof:
    """One way to prove who one is; exactly one member is given, else ``Problem`` ``auth.proof_invalid``."""

    password: str | None = None
    code: str | None = None
    recovery_code: str | None = None
    passkey: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        given = [x for x in (self.password, self.code, self.recovery_code, self.passkey) if x is not None]
        if len(given) != 1:
            raise Problem("auth.proof_invalid", "send one proof, and only one")


@dataclass(frozen=True, slots=True)
class Counted:
    """A proof that was counted as an attempt, to be checked."""

    proof: Proof
    buckets: list[Bucket]
    signed: Signed | None  # of a passkey: the answer, whose challenge is used up by now


class Proofs:
    """Counts and checks."""

    def __init__(
        self,
        settings: ApiSettings,
        db: Database,
        clock: Clock,
        factors: Factors,
        passkeys: Passkeys,
        letters: Letters,
    ) -> None:
        self._settings = settings
        self._db = db
        self._clock = clock
        self._factors = factors
        self._passkeys = passkeys
        self._letters = letters

    async def count(
        self, caller: Caller, user_id: str, proof: Proof, purpose: Purpose, bound_to: str | None
    ) -> Counted:
        """Count an attempt of somebody who has shown to be the person so far. Raises ``auth.throttled``.

        A passkey must answer a challenge of ``purpose`` that is ``bound_to`` whoever asks.
        """
        buckets = await self._buckets(caller, user_id, proof)
        try:
            await throttle.count(self._db, buckets)
        except Problem:
            await self._warn(caller, user_id)
            raise
        signed = None
        if proof.passkey is not None:
            signed = await self._passkeys.take(proof.passkey, purpose, bound_to)
        return Counted(proof, buckets, signed)

    async def check(self, tx: Tx, caller: Caller, user_id: str, counted: Counted) -> str | None:
        """The method (``otp``, ``recovery``, ``passkey``) when the proof is right, which uses it up; else ``None``."""
        proof, method = counted.proof, None
        if proof.code is not None:
            method = "otp" if await self._factors.check_code(tx, user_id, proof.code) else None
        elif proof.recovery_code is not None:
            fits = await self._factors.check_recovery_code(tx, caller, user_id, proof.recovery_code)
            method = "recovery" if fits else None
        elif counted.signed is not None:
            method = "passkey" if await self._passkeys.fits(tx, user_id, counted.signed) else None
        if method is not None:
            await throttle.forgive(tx, counted.buckets)
        return method

    async def _buckets(self, caller: Caller, user_id: str, proof: Proof) -> list[Bucket]:
        if proof.code is not None:
            return await self._factors.buckets(user_id, caller.address)
        # Nobody guesses 80 bits, or signatures; this only bounds the work.
        s, name = self._settings, f"proof {user_id} {networks.network(caller.address)}"
        return [Bucket(name, s.sign_in_failures_per_pair, s.sign_in_failure_window_seconds)]

    async def _warn(self, caller: Caller, user_id: str) -> None:
        """Tell the person, once a day, that somebody who got this far is guessing."""
        async with self._db.transaction() as tx:
            person = await account_store.user(tx, user_id)
            if person is not None:
                key = f"account.guessing:{user_id}:{self._clock.wall():%Y-%m-%d}"
                await self._letters.tell(tx, caller, person.email, "guessing", key=key)
