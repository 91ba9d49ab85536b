"""Passwords: argon2id, off the event loop, a few at a time, the same work whether or not the account exists.

Parameters follow OWASP's first choice (19 MiB, 2 passes, 1 lane); a stored hash with other parameters is replaced at
the next sign-in.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher

from portico.errors import Problem
from portico.settings import ApiSettings

T = TypeVar("T")

MEMORY_KIB = 19_456
PASSES = 2
LANES = 1

# Long enough for the length rule and still tried first by everybody. (Shorter ones fall to the length.)
_WELL_KNOWN = """
    1234567890 0123456789 0987654321 12345678910 1111111111 0000000000 123456789a qwertyuiop qwerty12345
    qwerty1234 1q2w3e4r5t 1qaz2wsx3edc password12 password123 password1234 passw0rd123 p@ssw0rd123 letmein123
    iloveyou123 welcome123 welcome1234 changeme123 administrator superman123 football123 princess123 asdfghjkl1
    abcdefghij abcd123456 abc123456789 q1w2e3r4t5 q1w2e3r4t5y6 zaq12wsxcde3 correcthorsebatterystaple
"""


class Passwords:
    """Hashes and verifies. One per process; ``close()`` at the end."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._well_known = frozenset(_WELL_KNOWN.split())
        self._hasher = PasswordHash((Argon2Hasher(time_cost=PASSES, memory_cost=MEMORY_KIB, parallelism=LANES),))
        self._threads = ThreadPoolExecutor(settings.password_hash_concurrency, thread_name_prefix="argon2")
        self._waiting = 0
        # What a sign-in to an account that does not exist is verified against: same parameters, unknown password.
        self._decoy = self._hasher.hash(secrets.token_urlsafe(32))

    @property
    def waiting(self) -> int:
        """Hashes under way or waiting for their turn."""
        return self._waiting

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def accept(self, password: str, email: str) -> None:
        """Raises ``auth.password_weak`` for a password that a person may not choose."""
        lowest, highest = self._settings.password_min_length, self._settings.password_max_length
        if not lowest <= len(password) <= highest:
            raise Problem("auth.password_weak", f"a password has {lowest} to {highest} characters")
        plain = password.lower()
        if plain in self._well_known or plain in (email, email.partition("@")[0]) or len(set(plain)) < 4:
            raise Problem("auth.password_weak", "this password is among the first that anybody would try")

    async def hash(self, password: str) -> str:
        """The argon2id hash of ``password``."""
        return await self._run(self._hasher.hash, password)

    async def verify(self, password: str, stored: str | None) -> tuple[bool, str | None]:
        """Whether ``password`` fits ``stored``, and a better hash to store if there is one.

        Without ``stored`` the same work is done and the answer is no.
        """
        fits, better = await self._run(self._hasher.verify_and_update, password, stored or self._decoy)
        return (fits, better) if stored else (False, None)

    async def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        if self._waiting >= self._settings.password_hash_waiting:
            raise Problem("auth.throttled", "too many sign-ins at once", headers={"Retry-After": "2"})
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        finally:
            self._waiting -= 1
