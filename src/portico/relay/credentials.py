"""Passwords of visitors (basic auth): read from the request, verified off the loop, and remembered for the next request.

    Authorization ─► look ─► missing · valid · invalid · throttled          (a keyed look-up; every request)
                       └───► need ─► verify ─► argon2id in a thread ─► done, then look again

A password costs tens of milliseconds and megabytes to verify, and anybody can send one. So identical attempts wait for one
verification, a client network has a budget of attempts, what waits is bounded for all and for each policy, policies take
turns, and the threads yield to the loop. What was found is remembered under a hash whose key lives and dies with the process and
that covers the stored digest: a password that is changed never matches again, and there is no table of passwords or of hashes
that could be guessed at without the key. An unknown user costs what a wrong password does. Nothing here prints or raises
anything of a credential.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import logging
import math
import os
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Literal, Protocol

from portico.errors import Problem
from portico.relay.rates import Clients, Room
from portico.settings import RelaySettings
from portico.wire.policy import Rate
from portico.wire.policy_check import password_digest

log = logging.getLogger("portico.relay.credentials")

Verdict = Literal["missing", "valid", "invalid", "throttled", "need"]

#: Bytes of an Authorization value that is read, and of the two parts of a credential.
MAX_AUTHORIZATION, MAX_NAME, MAX_PASSWORD = 2048, 256, 1024
#: Of a decoy beside no user at all: what the API makes digests with.
_USUAL_COST = "m=19456,t=2,p=1"
#: Networks whose budget is remembered; each has made an attempt within the last minutes.
MAX_NETWORKS: Final = 16_384
#: How much the threads yield to everything else of the machine (Linux: nice is a thread's own).
NICE: Final = 10

_BASIC = re.compile(rb"basic +", re.IGNORECASE)
_BASE64 = re.compile(rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")


class User(Protocol):
    """One row of a policy's ``basic_auth.users``."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...


def authorization(fields: Sequence[bytes]) -> bytes | None:
    """The Authorization value of flat fields: ``None`` without one, an empty one (which is invalid) for more than one."""
    found = [fields[at + 1] for at in range(0, len(fields), 2) if fields[at].lower() == b"authorization"]
    return None if not found else found[0] if len(found) == 1 else b""


def carried(fields: Sequence[bytes]) -> bool:
    """Whether flat fields have a password in them, which is to be kept no longer than it is needed."""
    value = authorization(fields)
    return value is not None and (not value or _BASIC.match(value) is not None)


def parse(value: bytes) -> tuple[bytes, bytes] | None:
    """Name and password of a ``Basic`` Authorization value (RFC 7617), or ``None`` when it is none.

    Both are bytes: UTF-8, as the challenge asks for, or whatever else a client sends. The first colon ends the name.
    """
    scheme = _BASIC.match(value)
    if scheme is None or len(value) > MAX_AUTHORIZATION or _BASE64.fullmatch(value, scheme.end()) is None:
        return None
    text = binascii.a2b_base64(value[scheme.end() :])
    name, colon, password = text.partition(b":")
    if not colon or len(name) > MAX_NAME or len(password) > MAX_PASSWORD or _CONTROL.search(text):
        return None
    return name, password


def cost(digest: str) -> str | None:
    """The parameters of an argon2id digest as they are written in it, ``None`` for one that a relay may not verify."""
    try:
        return password_digest(digest).split("$")[3]
    except ValueError:
        return None


class Accounts:
    """The users of one policy, compiled. A digest that may not be verified belongs to a user that nobody can be."""

    __slots__ = ("_decoy", "_digests")

    def __init__(self, users: Sequence[User]) -> None:
        costs = {user.digest: cost(user.digest) for user in users}
        self._digests = {user.name.encode(): user.digest.encode() for user in users if costs[user.digest] is not None}
        usual = next((found for found in costs.values() if found is not None), _USUAL_COST)
        salt, digest = (base64.b64encode(secrets.token_bytes(size)).rstrip(b"=").decode() for size in (16, 32))
        self._decoy = f"$argon2id$v=19${usual}${salt}${digest}".encode()

    def digest(self, name: bytes) -> bytes:
        """What a password of this user is verified against: for an unknown one a digest of nothing that costs the same."""
        return self._digests.get(name, self._decoy)


class _Attempt:
    """One verification, waiting or under way, and who waits for it."""

    __slots__ = ("accounts", "address", "digest", "key", "password", "waiters")

    def __init__(self, accounts: Accounts, key: bytes, digest: bytes, password: bytes, address: str) -> None:
        self.accounts = accounts
        self.key = key
        self.digest = digest
        self.password = password
        self.address = address
        self.waiters: list[Callable[[], None]] = []


class _Answers(dict[bytes, float]):
    """Key → when it is forgotten; bounded, the oldest goes first."""

    def __init__(self, most: int, seconds: float) -> None:
        super().__init__()
        self._most = most
        self._seconds = seconds

    def add(self, key: bytes, now: float) -> None:
        self.pop(key, None)
        while self and len(self) >= self._most:
            del self[next(iter(self))]
        self[key] = now + self._seconds

    def holds(self, key: bytes, now: float) -> bool:
        return self.get(key, -math.inf) > now


class Credentials:
    """See the module. One for each relay process, used from its loop; ``close()`` at the end."""

    def __init__(self, settings: RelaySettings, loop: asyncio.AbstractEventLoop) -> None:
        """Raises ``config.invalid`` where a setting leaves no way to verify anything."""
        for name in ("password_verify_threads", "password_attempts_per_address", "password_attempts_burst"):
            if getattr(settings, name) < 1:
                raise Problem("config.invalid", f"setting {name}: must be at least 1", key=name)
        self._settings = settings
        self._loop = loop
        self._threads = ThreadPoolExecutor(settings.password_verify_threads, "password", initializer=_yield_to_others)
        self._secret = secrets.token_bytes(32)
        self._valid = _Answers(settings.password_cache_max, settings.password_cache_seconds)
        self._invalid = _Answers(settings.password_refusal_cache_max, settings.password_refusal_cache_seconds)
        self._attempts: dict[bytes, _Attempt] = {}
        self._queues: dict[Accounts, deque[_Attempt]] = {}  # in the order of their turns
        self._waiting: dict[Accounts, int] = {}
        attempts = Rate(settings.password_attempts_per_address, 60.0, settings.password_attempts_burst)
        self._budgets = Clients(attempts, MAX_NETWORKS, Room(MAX_NETWORKS))
        self._running = 0
        self._closed = False
        #: Requests that wait for a verification now; verifications since the start, and those that found a wrong password.
        self.waiting = self.verified = self.wrong = 0

    def close(self) -> None:
        """Verify nothing more; what waits is not called."""
        self._closed = True
        self._queues.clear()
        self._attempts.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ── asked for each request ────────────────────────────────────────────────────────────────────────────────────
    def look(self, accounts: Accounts, authorization: bytes | None, address: str, now: float) -> Verdict:
        """What is known of a credential from a client address; ``now``: the loop's time. Changes nothing.

        ``missing``: none, or of another scheme. ``need``: :meth:`verify` it, then look again. ``throttled``: too many attempts
        of this client network, or too many at once; only for a credential that nothing is known of.
        """
        if authorization is None or (authorization and _BASIC.match(authorization) is None):
            return "missing"
        given = parse(authorization)
        if given is None:
            return "invalid"
        key = self._key(accounts.digest(given[0]), *given)
        if self._valid.holds(key, now):
            return "valid"
        if self._invalid.holds(key, now):
            return "invalid"
        return "need" if self._may(accounts, key, address, now) else "throttled"

    def verify(self, accounts: Accounts, authorization: bytes, address: str, done: Callable[[], None]) -> None:
        """Find out; ``done`` is called from the loop once :meth:`look` knows. Asked for directly after a ``need``."""
        given = parse(authorization)
        assert given is not None, "only what needs it is verified"
        name, password = given
        digest = accounts.digest(name)
        key = self._key(digest, name, password)
        attempt = self._attempts.get(key)
        if attempt is None:
            self._budgets.take(address, self._loop.time())
            attempt = self._attempts[key] = _Attempt(accounts, key, digest, password, address)
            self._queues.setdefault(accounts, deque()).append(attempt)
        attempt.waiters.append(done)
        self._count(attempt.accounts, 1)
        self._start()

    def retry_after(self, address: str) -> float:
        """Seconds until an attempt of this client may be taken, at the least."""
        return self._budgets.wait(address, self._loop.time())

    def _key(self, digest: bytes, name: bytes, password: bytes) -> bytes:
        told = b"%d %d %b%b%b" % (len(digest), len(name), digest, name, password)
        return hashlib.blake2b(told, key=self._secret, digest_size=32).digest()

    # ── limits ────────────────────────────────────────────────────────────────────────────────────────────────────
    def _may(self, accounts: Accounts, key: bytes, address: str, now: float) -> bool:
        limits = self._settings
        if self.waiting >= limits.password_verify_waiting:
            return False
        if self._waiting.get(accounts, 0) >= limits.password_verify_waiting_per_policy:
            return False
        return key in self._attempts or not self._budgets.wait(address, now)

    def _count(self, accounts: Accounts, requests: int) -> None:
        self.waiting += requests
        here = self._waiting.get(accounts, 0) + requests
        if here:
            self._waiting[accounts] = here
        else:
            self._waiting.pop(accounts, None)

    # ── the threads ───────────────────────────────────────────────────────────────────────────────────────────────
    def _start(self) -> None:
        """Give free threads work: policies in turn, so that one under attack does not hold up the others."""
        while self._queues and self._running < self._settings.password_verify_threads:
            accounts = next(iter(self._queues))
            queue = self._queues.pop(accounts)
            attempt = queue.popleft()
            if queue:
                self._queues[accounts] = queue
            self._running += 1
            work = self._threads.submit(_fits, attempt.digest, attempt.password)
            work.add_done_callback(lambda found, attempt=attempt: self._found(attempt, found))  # type: ignore[misc]

    def _found(self, attempt: _Attempt, work: Future[bool]) -> None:
        """Called in a thread."""
        if not self._closed and not work.cancelled():
            with contextlib.suppress(RuntimeError):  # the loop ended meanwhile
                self._loop.call_soon_threadsafe(self._answer, attempt, work.result())

    def _answer(self, attempt: _Attempt, fits: bool) -> None:
        if self._closed:
            return
        self._running -= 1
        self.verified += 1
        now = self._loop.time()
        if fits:
            self._valid.add(attempt.key, now)
            self._budgets.give_back(attempt.address)  # people behind one address may all sign in
        else:
            self.wrong += 1
            self._invalid.add(attempt.key, now)
        del self._attempts[attempt.key]
        self._count(attempt.accounts, -len(attempt.waiters))
        self._start()
        for done in attempt.waiters:
            self._loop.call_soon(done)  # not from here: one that fails is no matter of the others


def _yield_to_others() -> None:
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def _fits(digest: bytes, password: bytes) -> bool:
    """Whether a password is the one of a digest; a digest that cannot be verified fits none."""
    # Here, because the light package has no argon2: it runs no relay, but imports of it must work.
    from argon2.exceptions import VerificationError, VerifyMismatchError
    from argon2.low_level import Type, verify_secret

    try:
        return verify_secret(digest, password, Type.ID)
    except VerifyMismatchError:
        return False
    except VerificationError:  # its text is of the library's own: memory, or a broken digest
        log.error("a visitor's password could not be verified", extra={"f": {"reason": "argon2"}})
        return False
