"""Rates of organizations that several relays share: tokens leased in batches through Redis, never within a request.

    requests ──take──► Lease (one per organization) ◄──every 100 ms, in the background──► one bucket in Redis
                         │ what was used, what is wanted ►        ◄ what is granted, or that there is little left

While the shared bucket has plenty, a relay serves from its own copy of the bucket and reports afterwards; once it is told that
there is little left, it serves only what was leased to it. So no request waits for the network, a burst is met where it comes
in, and what several relays served beyond the limit in the same moment is a debt of the shared bucket: in the long run all of
them together serve the organization's rate. Leased tokens that nobody used are given back; those of a relay that died are lost.

Without Redis every relay applies the whole rate by itself (fails open: a limit against excess must not turn into refusals of
what is within it), and shares again with the first answer. Time is Redis' own: clocks of relays do not matter.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from portico.relay.rates import Bucket

if TYPE_CHECKING:
    from portico.kit.redis import Redis
    from portico.settings import RelaySettings

_KEY: Final = "portico:rate:"

# KEYS[1]: "level at" of a bucket, absent when it is full. ARGV: tokens per second, burst, tokens used beyond what was leased
# (negative: given back), tokens wanted. Answers tokens granted, and the level that is left. Of what there is, half stays for
# the others.
_LEASE: Final = """
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local level = burst
local kept = redis.pcall('GET', KEYS[1])
if type(kept) == 'string' then
  local was, at = string.match(kept, '^(-?[%d.]+) ([%d.]+)$')
  was, at = tonumber(was), tonumber(at)
  if was and at then level = math.min(burst, was + math.max(0, now - at) * rate) end
end
level = math.min(burst, level - tonumber(ARGV[3]))
local granted = math.max(0, math.min(tonumber(ARGV[4]), math.ceil(level / 2)))
if granted > level then granted = 0 end
level = level - granted
redis.call('SET', KEYS[1], string.format('%.6f %.6f', level, now), 'PX', math.ceil((burst - level) / rate * 1000) + 1000)
return {granted, string.format('%.6f', level)}
"""
_SHA: Final = hashlib.sha1(_LEASE.encode(), usedforsecurity=False).hexdigest()


class Lease:
    """One organization's tokens at this relay; a ``rates.Allowance``."""

    __slots__ = (
        "__weakref__", "_shared", "active", "key", "local", "owed", "per_second", "recent", "retry_at", "short_until", "tokens",
        "tokens_until", "used", "used_at", "want",
    )  # fmt: skip

    def __init__(self, shared: SharedRates, organization: str, per_second: float, burst: int) -> None:
        self._shared = shared
        self.key = _KEY + organization
        self.per_second = per_second
        #: What this relay alone may serve, whatever the others do.
        self.local = Bucket(per_second, burst)
        self.tokens = 0
        self.tokens_until = 0.0
        self.owed = 0  # used without a lease, and not reported yet
        self.used = 0  # since the last report
        self.used_at = -math.inf
        self.recent = 0.0
        self.want = 0
        self.short_until = -math.inf  # until then: only what was leased
        self.retry_at = 0.0
        self.active = False

    def wait(self, now: float) -> float:
        wait = self.local.wait(now)
        if wait or now >= self.short_until or not self._shared.connected or (self.tokens and now < self.tokens_until):
            return wait
        return max(self.retry_at - now, self._shared.every)

    def take(self, now: float) -> None:
        self.local.take(now)
        if self.tokens and now < self.tokens_until:
            self.tokens -= 1
        else:
            self.owed += 1
        self.used += 1
        self.used_at = now
        if not self.active:
            self.active = True
            self._shared.active.add(self)

    def change(self, per_second: float, burst: int, now: float) -> None:
        self.per_second = per_second
        self.local.change(per_second, burst, now)

    def idle(self, now: float) -> bool:
        return not self.active and self.local.idle(now)

    # ── in the background ─────────────────────────────────────────────────────────────────────────────────────────
    def report(self, now: float, limits: RelaySettings) -> tuple[int, int]:
        """Tokens used without a lease (negative: leased ones given back), and tokens wanted by recent use."""
        owed, self.owed = self.owed, 0
        if self.tokens and now >= self.tokens_until:
            owed -= self.tokens
            self.tokens = 0
        self.recent = max(float(self.used), 0.7 * self.recent + 0.3 * self.used)
        self.used = 0
        self.want = 0
        if now < self.short_until or now - self.used_at < limits.rate_lease_seconds:
            most = max(1, int(self.per_second * limits.rate_batch_seconds))
            self.want = max(0, min(math.ceil(2 * self.recent) or 1, most) - self.tokens)
        return owed, self.want

    def granted(self, count: int, level: float, now: float, limits: RelaySettings) -> None:
        """The answer to the last report."""
        if count:
            self.tokens += count
            self.tokens_until = now + limits.rate_lease_seconds
        if not self.want:
            return
        # Once it was short, our own copy is fuller than what is left for all: it counts again when there is plenty.
        plenty = self.local.burst / 2 if now < self.short_until else self.want
        if count < self.want or level < plenty:
            # A debt has to be worked off first: what was asked meanwhile must not be served on credit again.
            self.short_until = now + limits.rate_lease_seconds + max(0.0, -level / self.per_second)
            self.retry_at = now + max(0.0, (1 - level) / self.per_second)
        else:
            self.short_until = -math.inf

    def forget(self) -> None:
        """Redis is away, and with it what was leased."""
        self.tokens = self.owed = self.used = 0
        self.short_until = -math.inf


class SharedRates:
    """The leases of a relay, and the one task that renews them."""

    def __init__(self, settings: RelaySettings, redis: Redis, clock: Callable[[], float]) -> None:
        """``clock``: the loop's time."""
        self._settings, self._redis, self._clock = settings, redis, clock
        self.every = settings.rate_sync_seconds
        self.active: set[Lease] = set()
        #: Whether Redis answered last.
        self.connected = False

    def lease(self, organization: str, per_second: float, burst: int) -> Lease:
        """The allowance of an organization; its owner keeps one per organization."""
        return Lease(self, organization, per_second, burst)

    @classmethod
    def connect(cls, settings: RelaySettings, clock: Callable[[], float]) -> SharedRates | None:
        """As the settings say, ``None`` without a Redis. Raises ``config.invalid``. Nothing is dialled yet."""
        if settings.redis_url is None:
            return None
        from portico.kit.redis import Redis  # 5 MB that a relay alone does without

        url, timeout = settings.redis_url.reveal(), settings.redis_timeout_seconds
        return cls(settings, Redis(url, timeout_seconds=timeout, pause_seconds=settings.redis_pause_seconds), clock)

    async def close(self) -> None:
        """Close the connections; called when :meth:`run` has ended."""
        await self._redis.close()

    async def run(self) -> None:
        """Report and ask until cancelled; at uneven times, so that no relay always comes just behind another."""
        task = asyncio.current_task()
        assert task is not None
        while not task.cancelling():  # what comes in the midst of a call may be taken for that call's own end
            await asyncio.sleep(self.every * random.uniform(0.6, 1.4))  # noqa: S311 - no secret
            if self.active:
                await self.settle()

    async def settle(self) -> None:
        """One round for all organizations with requests in the last moments."""
        limits, now = self._settings, self._clock()
        asked = [(lease, *lease.report(now, limits)) for lease in self.active]
        for lease, owed, want in asked:
            if not (owed or want or lease.tokens):
                lease.active = False
                self.active.discard(lease)
        asked = [ask for ask in asked if ask[1] or ask[2]]
        if not asked:
            return
        answers = await self._redis.pipeline(lambda commands: self._fill(commands, asked))
        self.connected = answers is not None
        now = self._clock()
        if answers is None:
            for lease in self.active:
                lease.forget()
            return
        for (lease, _, _), (count, level) in zip(asked, answers[1:], strict=True):
            lease.granted(count, float(level), now, limits)

    def _fill(self, commands: Any, asked: list[tuple[Lease, int, int]]) -> None:
        commands.script_load(_LEASE)  # a server that was restarted does not know it
        for lease, owed, want in asked:
            commands.evalsha(_SHA, 1, lease.key, lease.per_second, lease.local.burst, owed, want)
