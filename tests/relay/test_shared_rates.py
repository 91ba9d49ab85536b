"""An organization's rate over several relays, with a real Valkey: together, alone while it is away, together again."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from portico.embedded.valkey import EmbeddedValkey
from portico.errors import Problem
from portico.kit.redis import Redis
from portico.relay.rates import Rates, TunnelRates
from portico.relay.shared_rates import Lease, SharedRates
from portico.settings import RelaySettings, Secret

SETTINGS = RelaySettings(relay_key=Secret("tnl_rly_unused"), state_dir=Path("unused"), redis_pause_seconds=0.3)
names = (f"org_{n}" for n in itertools.count())


class Relay:
    """What a relay has of rates, and visitors who ask as often as they can."""

    def __init__(self, shared: SharedRates, organization: str, per_second: int, burst: int) -> None:
        self.shared, self.now = shared, asyncio.get_running_loop().time
        limits = {"org_requests": per_second, "org_burst": burst}
        rates = Rates(SETTINGS, self.now, shared)
        found = rates.make("tun_a", None, None, organization, limits)
        assert found is not None
        self.rates: TunnelRates = found
        self.served = self.asked = 0

    @property
    def lease(self) -> Lease:
        assert isinstance(self.rates.organization, Lease)
        return self.rates.organization

    @property
    def connected(self) -> bool:
        return self.shared.connected

    def ask(self) -> bool:
        self.asked += 1
        if self.rates.check(None, self.now()) > 0:
            return False
        self.rates.take(None, self.now())
        self.served += 1
        return True

    async def busy(self, seconds: float, per_second: int = 500) -> int:
        """Requests served of ``per_second`` asked for during ``seconds``."""
        before, began, asked = self.served, self.now(), 0
        while (gone := self.now() - began) < seconds:
            while asked < gone * per_second:
                asked += 1
                self.ask()
            await asyncio.sleep(0.01)
        return self.served - before


@asynccontextmanager
async def relays(url: str, *, per_second: int = 100, burst: int = 100, count: int = 2) -> AsyncIterator[list[Relay]]:
    organization = next(names)
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(count):
            redis = Redis(url, timeout_seconds=1, pause_seconds=SETTINGS.redis_pause_seconds)
            stack.push_async_callback(redis.close)
            shared = SharedRates(SETTINGS, redis, asyncio.get_running_loop().time)
            task = asyncio.ensure_future(shared.run())
            stack.callback(task.cancel)
            made.append(Relay(shared, organization, per_second, burst))
        yield made


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_two_relays_share_a_rate_and_alone_each_has_it_all(server_home: Path) -> None:
    server = EmbeddedValkey(server_home / "shared-rates")
    server.start()
    try:
        async with relays(server.url) as (one, two):
            started = await asyncio.gather(one.busy(0.5), two.busy(0.5))
            assert 100 <= sum(started) <= 300, "a burst is served where it comes in"
            await asyncio.gather(one.busy(1.5), two.busy(1.5))  # what both served at once is worked off
            shares = await asyncio.gather(one.busy(2.5), two.busy(2.5))
            assert 200 <= sum(shares) <= 300, shares
            assert min(shares) >= 0.2 * sum(shares), shares

            assert server.process is not None
            server.process.kill()
            server.stop()
            await asyncio.gather(one.busy(0.5), two.busy(0.5))
            assert [relay.connected for relay in (one, two)] == [False, False]
            alone = await asyncio.gather(one.busy(1), two.busy(1))
            assert all(80 <= served <= 125 for served in alone), alone

            server.start()
            await asyncio.gather(one.busy(2), two.busy(2))
            assert [relay.connected for relay in (one, two)] == [True, True]
            shares = await asyncio.gather(one.busy(2), two.busy(2))
            assert 160 <= sum(shares) <= 240, shares
    finally:
        server.stop()


async def test_no_debt_is_served_on_credit(valkey: Any) -> None:
    """After both served a large burst at once, neither serves again from its own copy before the debt is worked off."""
    async with relays(valkey.url, per_second=40, burst=60) as (one, two):
        assert [one.ask() for _ in range(70)].count(True) == 60
        assert [two.ask() for _ in range(70)].count(True) == 60
        await until(lambda: one.lease.short_until > 0 and two.lease.short_until > 0)
        served = await asyncio.gather(one.busy(1), two.busy(1))
        assert sum(served) <= 12, "60 tokens too many are a second and a half"
        assert one.rates.check(None, one.now()) > 0
        assert 20 <= sum(await asyncio.gather(one.busy(1.5), two.busy(1.5))) <= 60


async def test_a_request_waits_for_nothing(valkey: Any) -> None:
    """The first request of an organization passes before Redis was asked at all, a burst as well."""
    async with relays(valkey.url, per_second=10, burst=50, count=1) as (one,):
        assert [one.ask() for _ in range(55)].count(True) == 50
        assert not one.shared.connected


async def test_unused_tokens_are_given_back(valkey: Any) -> None:
    async with relays(valkey.url, per_second=40, burst=40) as (one, two):
        one.ask()
        await until(lambda: one.lease.tokens > 0)
        await until(lambda: not one.lease.active)
        assert one.lease.tokens == 0 and one.lease not in one.shared.active
        await asyncio.sleep(0.1)
        assert [two.ask() for _ in range(45)].count(True) == 40


async def test_a_slow_rate_is_met_by_whoever_is_asked(valkey: Any) -> None:
    """Two a second, asked for here and there in turn: a token that one relay holds does not keep the other from its own."""
    async with relays(valkey.url, per_second=2, burst=2) as (one, two):
        served = 0
        for turn in range(20):
            served += (one, two)[turn % 2].ask()
            await asyncio.sleep(0.1)
        assert 4 <= served <= 2 * 2 + 2 * 2


async def test_the_rate_of_an_organization_changes(valkey: Any) -> None:
    async with relays(valkey.url, per_second=10, burst=10, count=1) as (one,):
        await one.busy(0.5)
        one.lease.change(200, 200, one.now())
        await one.busy(0.5)
        assert 150 <= await one.busy(1) <= 400


async def test_clocks_of_relays_do_not_matter(valkey: Any) -> None:
    async with relays(valkey.url, per_second=50, burst=50) as (one, two):
        late = two.shared
        late._clock = lambda: one.now() - 86_400
        two.now = late._clock
        await asyncio.gather(one.busy(1.2), two.busy(1.2))
        assert 30 <= sum(await asyncio.gather(one.busy(1.2), two.busy(1.2))) <= 75


@pytest.mark.parametrize("word", ["nonsense", "1 2 3", "a b", "", None])
async def test_what_is_no_bucket_is_written_anew(valkey: Any, word: str | None) -> None:
    """Whatever stands under an organization's key, nobody else is the worse for it."""
    async with relays(valkey.url, per_second=10, burst=10, count=1) as (one,):
        raw = Redis(valkey.url, timeout_seconds=30)
        key = one.lease.key
        await raw.pipeline(lambda p: p.hset(key, "a", "b") if word is None else p.set(key, word))
        assert one.ask()
        await until(lambda: one.shared.connected)
        answers = await raw.pipeline(lambda p: p.get(key))
        assert answers is not None and 0 < float(answers[0].split()[0]) <= 10
        await raw.close()


async def test_from_settings(valkey: Any) -> None:
    clock = asyncio.get_running_loop().time
    assert SharedRates.connect(SETTINGS, clock) is None
    shared = SharedRates.connect(replace(SETTINGS, redis_url=Secret(valkey.url)), clock)
    assert shared is not None
    lease = shared.lease(next(names), 5, 5)
    lease.take(clock())
    await shared.settle()
    assert shared.connected and lease.tokens
    await shared.close()
    with pytest.raises(Problem, match="redis_url"):
        SharedRates.connect(replace(SETTINGS, redis_url=Secret("valkey.example:6379")), clock)
