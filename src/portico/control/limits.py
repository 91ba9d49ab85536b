"""Rates of the API: how many requests a credential or a network makes in a minute, for each class of route.

    auth       sign-in and what else needs no credential      by network
    read       GET                                            by person or key
    write      POST, PUT, PATCH, DELETE                       by person or key
    export     …/export                                       by person or key
    agent      /v1/agent/…                                    by key, in this process alone
    events     certificate events, payment providers'         by network, in this process alone
    page       the console                                    by network
    unknown    a credential that has not proved good yet      by network; taken back when it does
    (none)     /v1/edge/…, health, /openapi.json, keys of tokens

A bucket is a GCRA: one number, the time at which it will be full again. It lets a whole quota through at once, and then one
request every ``window / quota`` seconds. It is kept in Redis where there is one, so that all API processes count together: one
round trip, and when Redis is away each process counts by itself. Nobody is refused because a counter cannot be had.

A request with a credential that this process knows as good costs a digest and a look into a dictionary, and no address is
parsed: agents come back by the thousand at once. Who has no good credential never shares a bucket with those who have one.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from portico.control.access import client_address
from portico.errors import Problem
from portico.kit.networks import network
from portico.kit.redis import Redis
from portico.settings import ApiSettings

WINDOW_SECONDS: Final = 60.0
#: Buckets and known credentials that one process keeps, about 200 bytes each.
MAX_BUCKETS: Final = 100_000
MAX_KNOWN: Final = 50_000

_READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_EXEMPT: Final = ("/healthz", "/readyz", "/openapi.json", "/.well-known/", "/static/", "/v1/edge/")

# KEYS[1] bucket; ARGV interval, window. Answers whether there was room, and how far ahead of now the bucket is then.
# Further ahead than the window no bucket can be: the server's clock was set back, and nobody waits for it to catch up.
_SCRIPT: Final = """
local t = redis.call('TIME')
local now = t[1] + t[2] / 1000000
local at = tonumber(redis.call('GET', KEYS[1]) or '0')
if at < now or at > now + ARGV[2] + 0.001 then at = now end
local ahead = at + ARGV[1] - now
if ahead > tonumber(ARGV[2]) then return {0, tostring(at - now)} end
redis.call('SET', KEYS[1], string.format('%.6f', now + ahead), 'PX', math.ceil(ahead * 1000) + 1000)
return {1, tostring(ahead)}
"""
# A bucket that is full to the last request, in the arithmetic of floats.
_EPSILON: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Rate:
    """How many requests of one class are let through in a window."""

    name: str
    quota: int

    @property
    def interval(self) -> float:
        """Seconds that one request costs."""
        return WINDOW_SECONDS / self.quota

    def fields(self, ahead: float) -> dict[str, str]:
        """``RateLimit`` and ``RateLimit-Policy`` of draft-ietf-httpapi-ratelimit-headers-10."""
        left = max(0, math.floor((WINDOW_SECONDS - ahead) / self.interval + _EPSILON))
        return {
            "RateLimit-Policy": f'"{self.name}";q={self.quota};w={WINDOW_SECONDS:.0f}',
            "RateLimit": f'"{self.name}";r={left};t={math.ceil(ahead)}',
        }


class Buckets:
    """Buckets of this process."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._full_at: dict[tuple[str, str], float] = {}

    def take(self, rate: Rate, who: str, *, always: bool = False) -> tuple[bool, float]:
        """Whether there was room, and how many seconds ahead of now the bucket is then; ``always`` takes a last place, too."""
        now, key = self._monotonic(), (rate.name, who)
        ahead = max(0.0, self._full_at.get(key, 0.0) - now)
        if ahead > WINDOW_SECONDS + _EPSILON:  # a clock that was set back
            ahead = 0.0
        after = ahead + rate.interval
        if after > WINDOW_SECONDS + _EPSILON and not always:
            return False, ahead
        if len(self._full_at) >= MAX_BUCKETS:
            self._make_room(now)
        after = min(after, WINDOW_SECONDS)
        self._full_at[key] = now + after
        return True, after

    def give_back(self, rate: Rate, who: str) -> None:
        """The request did not count after all."""
        key = (rate.name, who)
        if key in self._full_at:
            self._full_at[key] -= rate.interval

    def _make_room(self, now: float) -> None:
        """Forget buckets that are empty; when none is, all: for a moment everybody has a fresh one."""
        self._full_at = {key: at for key, at in self._full_at.items() if at > now}
        if len(self._full_at) >= MAX_BUCKETS:
            self._full_at.clear()

    def __len__(self) -> int:
        return len(self._full_at)


@dataclass(slots=True)
class Ticket:
    """A request that was let through: what it was counted by, and what its answer says."""

    rate: Rate
    who: str
    ahead: float
    credential: bytes | None = None  # its digest, when it was not known to be good
    wanted: Rate | None = None  # the class that it belongs to once it is


class Limits:
    """One per process. ``admit`` before a request is served, ``answered`` with its status."""

    def __init__(
        self, settings: ApiSettings, redis: Redis | None, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._redis = redis
        self._buckets = Buckets(monotonic)
        self._known: dict[bytes, str] = {}
        quotas = {
            "auth": settings.rate_auth_per_minute,
            "read": settings.rate_read_per_minute,
            "write": settings.rate_write_per_minute,
            "export": settings.rate_export_per_minute,
            "agent": settings.rate_agent_per_minute,
            "events": settings.rate_events_per_minute,
            "page": settings.rate_page_per_minute,
            "unknown": settings.rate_unknown_per_minute,
        }
        self._rates = {name: Rate(name, quota) for name, quota in quotas.items() if quota > 0}

    async def admit(self, scope: Scope, headers: Headers) -> Ticket | None:
        """Count a request; ``None`` for one that has no limit. Raises ``request.rate_limited``."""
        name = class_of(scope["method"], scope["path"])
        rate = self._rates.get(name)
        if rate is None:
            return None
        if name == "events":
            return self._local(rate, network(client_address(Request(scope))))
        if name in ("auth", "page"):
            return await self._shared(rate, network(client_address(Request(scope))))
        credential = _digest(headers.get("authorization", ""))
        who = self._known.get(credential)
        if who is None:
            return self._unknown(rate, scope, credential)
        if name == "agent":
            return self._local(rate, who)
        return await self._shared(rate, who)

    def answered(self, ticket: Ticket, scope: Scope, status: int) -> dict[str, str]:
        """What the answer says of the limit. A credential that proved good is counted by itself from now on."""
        caller = scope["state"].get("caller")
        if ticket.credential is not None and caller is not None and ticket.wanted is not None:
            self._buckets.give_back(ticket.rate, ticket.who)
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[ticket.credential] = caller.id
            _, ahead = self._buckets.take(ticket.wanted, caller.id, always=True)
            return ticket.wanted.fields(ahead)
        return ticket.rate.fields(ticket.ahead)

    def forget(self, headers: Headers) -> None:
        """The credential was refused: it counts as unknown again."""
        self._known.pop(_digest(headers.get("authorization", "")), None)

    def _unknown(self, wanted: Rate, scope: Scope, credential: bytes) -> Ticket | None:
        rate = self._rates.get("unknown")
        if rate is None:
            return None
        ticket = self._local(rate, network(client_address(Request(scope))))
        ticket.credential, ticket.wanted = credential, wanted
        return ticket

    def _local(self, rate: Rate, who: str) -> Ticket:
        room, ahead = self._buckets.take(rate, who)
        if not room:
            raise _refusal(rate, ahead)
        return Ticket(rate, who, ahead)

    async def _shared(self, rate: Rate, who: str) -> Ticket:
        if self._redis is None:
            return self._local(rate, who)
        key = f"portico:rate:{rate.name}:{hashlib.sha256(who.encode('utf-8', 'replace')).hexdigest()[:32]}"
        interval, window = repr(rate.interval), repr(WINDOW_SECONDS + _EPSILON)
        answers = await self._redis.pipeline(lambda p: p.eval(_SCRIPT, 1, key, interval, window))
        if answers is None:
            return self._local(rate, who)
        room, ahead = answers[0]
        if not int(room):
            raise _refusal(rate, float(ahead))
        return Ticket(rate, who, float(ahead))


def class_of(method: str, path: str) -> str:
    """The class of a route, by its method and path; empty for those without a limit."""
    if path.startswith("/v1/agent/"):
        return "agent"
    if path.startswith(_EXEMPT):
        return ""
    if path == "/v1/domains/cert-events" or path.startswith("/v1/billing/webhooks/"):
        return "events"
    if not path.startswith("/v1/"):
        return "page"
    if path.startswith(("/v1/auth/", "/v1/secret-scanning/")):
        return "auth"
    if path.endswith("/export"):
        return "export"
    return "read" if method in _READS else "write"


def _digest(authorization: str) -> bytes:
    return hashlib.sha256(authorization.encode("utf-8", "replace")).digest()


def _refusal(rate: Rate, ahead: float) -> Problem:
    wait = max(1, math.ceil(ahead + rate.interval - WINDOW_SECONDS))
    headers: dict[str, Any] = {"Retry-After": str(wait), **rate.fields(ahead)}
    detail = f"more than {rate.quota} requests a minute of the class {rate.name}; wait {wait} s"
    return Problem("request.rate_limited", detail, headers=headers, limit=rate.quota)
