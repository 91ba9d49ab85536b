"""Visitors' passwords become argon2id digests: once, off the event loop and outside any transaction.

The salt is derived from the installation's master key, the organization and the user's name. So the same password of the
same user is the same digest on every process: an agent that reconnects with the same flags changes nothing. Nobody can
prepare for a salt that needs the key, and one that leaks speeds nothing up: a guess costs a whole hash.

Digests that were made are remembered under a keyed hash, bounded, and never the passwords.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pwdlib.hashers.argon2 import Argon2Hasher

from portico.control.identity.passwords import LANES, MEMORY_KIB, PASSES
from portico.control.tunnels.policy import Wanted, refusal
from portico.errors import Problem
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings
from portico.wire.policy import Fault

_SALT_BYTES = 16


class VisitorPasswords:
    """One per process; ``close()`` at the end. A thread of its own, so that people who sign in never wait behind policies."""

    def __init__(self, settings: ApiSettings, sealer: Sealer) -> None:
        self._settings = settings
        self._sealer = sealer
        self._hasher = Argon2Hasher(time_cost=PASSES, memory_cost=MEMORY_KIB, parallelism=LANES)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="visitors")
        self._making: dict[bytes, asyncio.Task[str]] = {}
        self._key = secrets.token_bytes(32)
        self._made: OrderedDict[bytes, str] = OrderedDict()

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def digested(self, organization: str, wanted: Sequence[Wanted | None]) -> list[Wanted | None]:
        """The same policies with a digest in the place of each password.

        Raises ``tunnel.policy_invalid`` for too many passwords at once, ``auth.throttled`` when too many wait already.
        """
        pairs = {pair for policy in wanted if policy is not None for pair in policy.passwords()}
        marks = {pair: self._mark(organization, pair) for pair in pairs}
        digests = {pair: self._made[mark] for pair, mark in marks.items() if mark in self._made}
        fresh = [pair for pair in pairs if pair not in digests]
        if len(fresh) > (most := self._settings.visitor_passwords_per_request):
            what = (
                f"{len(fresh)} new passwords in one request; at most {most}: give digests, or fewer tunnels at a time"
            )
            raise refusal([Fault("basic_auth.users", what)], {})
        for pair in fresh:  # one after the other: a request has one place in the queue
            digests[pair] = await self._make(organization, pair, marks[pair])
        for mark in marks.values():
            if mark in self._made:
                self._made.move_to_end(mark)
        return [None if policy is None else policy.with_digests(digests) for policy in wanted]

    def _mark(self, organization: str, pair: tuple[str, str]) -> bytes:
        return hmac.digest(self._key, "\0".join((organization, *pair)).encode(), "sha256")

    async def _make(self, organization: str, pair: tuple[str, str], mark: bytes) -> str:
        """One hash, which all who ask for it meanwhile share: agents of one team come back at once after an outage."""
        task = self._making.get(mark)
        if task is None:
            if len(self._making) >= self._settings.visitor_passwords_waiting:
                what = "too many new passwords of visitors at once"
                raise Problem("auth.throttled", what, headers={"Retry-After": "2"})
            salt = bytes.fromhex(self._sealer.mac("visitor salt", f"{organization}\0{pair[0]}"))[:_SALT_BYTES]
            task = self._making[mark] = asyncio.create_task(self._run(pair[1], salt, mark))
        return await asyncio.shield(task)

    async def _run(self, password: str, salt: bytes, mark: bytes) -> str:
        try:
            digest = await asyncio.get_running_loop().run_in_executor(self._thread, self._hash, password, salt)
        finally:
            del self._making[mark]
        self._made[mark] = digest
        while len(self._made) > self._settings.visitor_password_cache:
            self._made.popitem(last=False)
        return digest

    def _hash(self, password: str, salt: bytes) -> str:
        return self._hasher.hash(password, salt=salt)
