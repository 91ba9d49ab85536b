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

from argon2.exceptions import VerificationError, VerifyMismatchError
from argon2.low_level import Type, verify_secret

from portico.kit.networks import network
from portico.settings import RelaySettings

log = logging.getLogger("portico.relay.credentials")

Verdict = Literal["missing", "valid", "invalid", "throttled", "need"]

#: Bytes of an Authorization value that is read, and of the two parts of a credential.
MAX_AUTHORIZATION, MAX_NAME, MAX_PASSWORD = 2048, 256, 1024
#: What a stored digest may demand of a relay: KiB of memory, passes, lanes. One that demands more fits no password.
MAX_MEMORY_KIB, MAX_PASSES, MAX_LANES = 65_536, 4, 4
#: Of a decoy beside no user at all: what the API makes digests with.
_USUAL_COST = "m=19456,t=2,p=1"
#: Networks whose budget is remembered; each has made an attempt within the last minutes.
MAX_NETWORKS: Final = 16_384
#: How much the threads yield to everything else of the machine (Linux: nice is a thread's own).
NICE: Final = 10

_BASIC = re.compile(rb"basic +", re.IGNORECASE)
_BASE64 = re.compile(rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_DIGEST = re.compile(
    r"\$argon2id\$v=19\$(m=([1-9][0-9]{0,9}),t=([1-9][0-9]{0,9}),p=([1-9][0-9]{0,9}))"
    r"\$[A-Za-z0-9+/]{11,86}\$[A-Za-z0-9+/]{16,86}"
)


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
    found = _DIGEST.fullmatch(digest)
    if found is None:
        return None
    memory, passes, lanes = (int(found[at]) for at in (2, 3, 4))
    within = 8 * lanes <= memory <= MAX_MEMORY_KIB and passes <= MAX_PASSES and lanes <= MAX_LANES
    return found[1] if within else None


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

    __slots__ = ("accounts", "digest", "key", "network", "password", "waiters")

    def __init__(self, accounts: Accounts, key: bytes, digest: bytes, password: bytes, client: str) -> None:
        self.accounts = accounts
        self.key = key
        self.digest = digest
        self.password = password
        self.network = client
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
        self._settings = settings
        self._loop = loop
        self._threads = ThreadPoolExecutor(settings.password_verify_threads, "password", initializer=_yield_to_others)
        self._secret = secrets.token_bytes(32)
        self._valid = _Answers(settings.password_cache_max, settings.password_cache_seconds)
        self._invalid = _Answers(settings.password_refusal_cache_max, settings.password_refusal_cache_seconds)
        self._attempts: dict[bytes, _Attempt] = {}
        self._queues: dict[Accounts, deque[_Attempt]] = {}  # in the order of their turns
        self._waiting: dict[Accounts, int] = {}
        self._budgets: dict[str, tuple[float, float]] = {}  # network → attempts left, as of when
        self._running = 0
        self._closed = False
        #: Requests that wait for a verification now; verifications since the start.
        self.waiting = self.verified = 0

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
        return "need" if self._may(accounts, key, network(address), now) else "throttled"

    def verify(self, accounts: Accounts, authorization: bytes, address: str, done: Callable[[], None]) -> None:
        """Find out; ``done`` is called from the loop once :meth:`look` knows. Asked for directly after a ``need``."""
        given = parse(authorization)
        assert given is not None, "only what needs it is verified"
        name, password = given
        digest = accounts.digest(name)
        key = self._key(digest, name, password)
        attempt = self._attempts.get(key)
        if attempt is None:
            client = network(address)
            self._spend(client, 1.0)
            attempt = self._attempts[key] = _Attempt(accounts, key, digest, password, client)
            self._queues.setdefault(accounts, deque()).append(attempt)
        attempt.waiters.append(done)
        self._count(attempt.accounts, 1)
        self._start()

    def retry_after(self, address: str) -> int:
        """Whole seconds, at least one, until an attempt of this client may be taken."""
        lacking = 1.0 - self._left(network(address), self._loop.time())
        return max(1, math.ceil(lacking * 60.0 / max(1, self._settings.password_attempts_per_address)))

    def _key(self, digest: bytes, name: bytes, password: bytes) -> bytes:
        told = b"%d %d %b%b%b" % (len(digest), len(name), digest, name, password)
        return hashlib.blake2b(told, key=self._secret, digest_size=32).digest()

    # ── limits ────────────────────────────────────────────────────────────────────────────────────────────────────
    def _may(self, accounts: Accounts, key: bytes, client: str, now: float) -> bool:
        limits = self._settings
        if self.waiting >= limits.password_verify_waiting:
            return False
        if self._waiting.get(accounts, 0) >= limits.password_verify_waiting_per_policy:
            return False
        return key in self._attempts or self._left(client, now) >= 1.0

    def _left(self, client: str, now: float) -> float:
        """Attempts that a network may make now: a bucket that fills by the minute."""
        limits = self._settings
        left, at = self._budgets.get(client, (math.inf, now))
        return min(limits.password_attempts_burst, left + (now - at) * limits.password_attempts_per_address / 60.0)

    def _spend(self, client: str, attempts: float) -> None:
        now = self._loop.time()
        left = self._left(client, now) - attempts
        self._budgets.pop(client, None)
        while len(self._budgets) >= MAX_NETWORKS:
            del self._budgets[next(iter(self._budgets))]  # the longest without an attempt
        self._budgets[client] = (left, now)

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
            self._spend(attempt.network, -1.0)  # people behind one address may all sign in
        else:
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
    try:
        return verify_secret(digest, password, Type.ID)
    except VerifyMismatchError:
        return False
    except VerificationError:  # its text is of the library's own: memory, or a broken digest
        log.error("a visitor's password could not be verified", extra={"f": {"reason": "argon2"}})
        return False
