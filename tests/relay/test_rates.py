"""Token buckets: what passes in which time, who shares a bucket, and that nothing but time fills one."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.relay.rates import Bucket, Rates, TunnelRates
from portico.settings import RelaySettings, Secret
from portico.wire import policy


def rate(requests: int = 10, seconds: float = 1.0, burst: int = 20) -> policy.Rate:
    return policy.Rate(requests, seconds, burst)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rates(clock: Clock) -> Rates:
    return make(clock)


def make(clock: Clock, **limits: Any) -> Rates:
    settings = RelaySettings(relay_key=Secret("tnl_rly_unused"), state_dir=Path("unused"))
    return Rates(replace(settings, **limits), clock)


def passed(rates: TunnelRates, address: str | None, now: float, tries: int) -> int:
    """How many of ``tries`` requests at once pass."""
    count = 0
    for _ in range(tries):
        if rates.check(address, now) == 0:
            rates.take(address, now)
            count += 1
    return count


def test_a_bucket_is_full_at_first_and_fills_with_time() -> None:
    bucket = Bucket(10, 3)
    assert [take(bucket, 5.0) for _ in range(4)] == [True, True, True, False]
    assert bucket.wait(5.0) == pytest.approx(0.1)
    assert bucket.wait(5.04) == pytest.approx(0.06)
    assert take(bucket, 5.1) and not take(bucket, 5.1)
    assert sum(take(bucket, 100.0) for _ in range(10)) == 3, "never more than the burst"


def take(bucket: Bucket, now: float) -> bool:
    if bucket.wait(now) > 0:
        return False
    bucket.take(now)
    return True


@given(
    per_second=st.floats(0.01, 1000),
    burst=st.integers(1, 100),
    gaps=st.lists(st.floats(0, 10), min_size=1, max_size=200),
)
def test_in_no_time_span_more_than_burst_and_rate(per_second: float, burst: int, gaps: list[float]) -> None:
    bucket, now, accepted = Bucket(per_second, burst), 0.0, [0.0][:0]
    for gap in gaps:
        now += gap
        wait = bucket.wait(now)
        if wait == 0:
            bucket.take(now)
            accepted.append(now)
        else:
            assert bucket.wait(now + wait + 1e-6) == 0, "whoever waits as long as told passes"
    for first in range(len(accepted)):
        span = accepted[-1] - accepted[first]
        assert len(accepted) - first <= burst + per_second * span + 1e-3


def test_nothing_set_is_nothing_to_ask(rates: Rates) -> None:
    assert rates.make("tun_a", None, None, "org_a", {"concurrency": 5, "org_requests": 0}) is None
    assert len(rates) == 0


def test_the_longest_wait_is_told(rates: Rates, clock: Clock) -> None:
    found = rates.make("tun_a", rate(100, 1.0, 1), rate(1, 10.0, 1), "org_a", {"org_requests": 2, "org_burst": 1})
    assert found is not None
    assert passed(found, "192.0.2.1", clock.now, 5) == 1
    assert found.check("192.0.2.1", clock.now) == pytest.approx(10)
    assert found.check("192.0.2.2", clock.now) == pytest.approx(0.5)
    assert found.check(None, clock.now) == pytest.approx(0.5), "of a request from a peer the client was counted there"


def test_a_refused_request_costs_nothing(rates: Rates, clock: Clock) -> None:
    found = rates.make("tun_a", rate(10, 1, 1), None)
    assert found is not None
    found.take("192.0.2.1", clock.now)
    for _ in range(100):
        assert found.check("192.0.2.1", clock.now) == pytest.approx(0.1)
    assert found.check("192.0.2.1", clock.now + 0.1) == 0


def test_each_client_has_its_own(rates: Rates, clock: Clock) -> None:
    found = rates.make("tun_a", None, rate(10, 1, 5))
    assert found is not None
    assert [passed(found, f"192.0.2.{n}", clock.now, 9) for n in range(3)] == [5, 5, 5]
    assert passed(found, "2001:db8::1", clock.now, 9) == 5
    assert passed(found, "2001:db8::ffff:2", clock.now, 9) == 0, "a /64 is one client"
    assert passed(found, "2001:db8:0:1::1", clock.now, 9) == 5
    assert passed(found, "::ffff:192.0.2.1", clock.now, 9) == 0, "a mapped address is the IPv4 one"
    assert passed(found, "", clock.now, 9) == 5, "a Unix socket's visitors are one"


def test_organization_over_all_its_tunnels(rates: Rates, clock: Clock) -> None:
    limits = {"org_requests": 10, "org_burst": 6}
    one, two = (rates.make(f"tun_{n}", None, None, "org_a", limits) for n in "ab")
    other = rates.make("tun_c", None, None, "org_b", {"org_requests": 4})
    assert one is not None and two is not None and other is not None
    assert passed(one, None, clock.now, 4) + passed(two, None, clock.now, 4) == 6
    assert passed(other, None, clock.now, 9) == 4, "without a burst: of a second"


def test_neither_a_reconnect_nor_an_edit_fills_a_bucket(rates: Rates, clock: Clock) -> None:
    limits = {"org_requests": 10, "org_burst": 5000}
    found = rates.make("tun_a", rate(), rate(), "org_a", limits)
    assert found is not None and passed(found, "192.0.2.1", clock.now, 30) == 20
    del found
    gc.collect()
    rates.prune()
    again = rates.make("tun_a", rate(), rate(), "org_a", limits)
    assert again is not None and passed(again, "192.0.2.2", clock.now, 30) == 0
    rates.make("tun_a", rate(1, 1.0, 100), rate(1, 1.0, 100), "org_a", limits)
    assert passed(again, "192.0.2.1", clock.now, 200) == 80, "what was used stays used"
    rates.make("tun_a", rate(1000, 1.0, 10), rate(1000, 1.0, 10), "org_a", limits)
    assert passed(again, "192.0.2.1", clock.now, 99) == 0
    assert 0 < again.check("192.0.2.1", clock.now) < 1, "the wait is that of the rate that holds now"


def test_a_rate_that_is_gone_holds_nobody(rates: Rates, clock: Clock) -> None:
    found = rates.make("tun_a", rate(), rate(), "org_a", {"org_requests": 1})
    assert found is not None
    passed(found, "192.0.2.1", clock.now, 30)
    again = rates.make("tun_a", rate(1000, 1.0, 5000), None, "org_a", {})
    assert again is found and passed(found, "192.0.2.1", clock.now, 100) == 100


def test_what_is_full_and_in_nobodys_use_is_forgotten(rates: Rates, clock: Clock) -> None:
    limits = {"org_requests": 10}
    live = rates.make("tun_a", rate(), rate(), "org_a", limits)
    gone = rates.make("tun_b", rate(), rate(), "org_b", limits)
    assert live is not None and gone is not None
    gone.take("192.0.2.1", clock.now)
    del gone
    rates.prune()
    assert len(rates) == 4, "a token is still missing"
    clock.now += 60
    rates.prune()
    rates.prune()
    assert len(rates) == 2, "of the live one nothing is"
    assert rates.make("tun_a", rate(), rate(), "org_a", limits) is live


def test_a_flood_of_addresses_does_not_wash_a_bucket_away(clock: Clock) -> None:
    rates = make(clock, rate_clients_per_tunnel=50)
    found = rates.make("tun_a", None, rate(1, 100.0, 3))
    assert found is not None and found.clients is not None
    assert passed(found, "192.0.2.1", clock.now, 9) == 3
    through = sum(passed(found, f"198.51.{n // 250}.{n % 250}", clock.now, 5) for n in range(5000))
    assert len(found.clients) == 50
    assert passed(found, "192.0.2.1", clock.now, 9) == 0
    assert through <= 3 * (49 + 256), "those for whom there is no room share what there is"


def test_full_buckets_make_room(clock: Clock) -> None:
    rates = make(clock, rate_clients_per_tunnel=50)
    found = rates.make("tun_a", None, rate(1, 1.0, 3))
    assert found is not None and found.clients is not None
    assert passed(found, "192.0.2.1", clock.now, 9) == 3
    for n in range(49):
        assert passed(found, f"198.51.100.{n}", clock.now, 1) == 1
    clock.now += 1.5  # those are full again, the first client's is not
    for n in range(49):
        assert passed(found, f"203.0.113.{n}", clock.now, 9) == 3, n
    assert len(found.clients) == 50
    assert passed(found, "192.0.2.1", clock.now, 9) == 1


def test_all_tables_together_are_bounded(clock: Clock) -> None:
    rates = make(clock, rate_clients_per_tunnel=50, rate_clients_max=80)
    one = rates.make("tun_a", None, rate(1, 100.0, 3))
    two = rates.make("tun_b", None, rate(1, 100.0, 3))
    assert one is not None and two is not None and one.clients is not None and two.clients is not None
    for n in range(60):
        one.take(f"198.51.100.{n}", clock.now)
        two.take(f"198.51.100.{n}", clock.now)
    assert len(one.clients) + len(two.clients) == 80
    rates.make("tun_a", rate(), None)
    for n in range(60):
        two.take(f"203.0.113.{n}", clock.now)
    assert len(two.clients) == 50, "the room of one that counts clients no more is free"


def test_of_a_tunnel_here_and_of_a_peers(rates: Rates, clock: Clock) -> None:
    """The owner counts tunnel and organization; where the visitor came in, clients are counted."""
    ruled = SimpleNamespace(tunnel_rate=rate(), client_rate=rate(1, 1, 1))
    grant = SimpleNamespace(tun="tun_a", org="org_a", limits={"org_requests": 5, "concurrency": 9})
    here = rates.of(cast(Any, SimpleNamespace(policy=ruled, grant=grant, limits=lambda: grant.limits)))
    there = rates.of(cast(Any, SimpleNamespace(policy=ruled, tunnel="tun_b", organization="org_a")))
    assert here is not None and here.tunnel is not None and here.organization is not None and here.clients is not None
    assert there is not None and there.tunnel is None and there.organization is None and there.clients is not None
    bare = SimpleNamespace(tunnel_rate=rate(), client_rate=None)
    assert rates.of(cast(Any, SimpleNamespace(policy=bare, tunnel="tun_c", organization="org_a"))) is None


def test_a_tunnel_that_is_live_here_and_on_a_peer_keeps_all_its_rates(rates: Rates, clock: Clock) -> None:
    """What a peer announces of it, while it moves or to get around a limit, takes no rate off; clients are one and the same."""
    ruled = SimpleNamespace(tunnel_rate=rate(1, 100.0, 2), client_rate=rate(1, 100.0, 3))
    grant = SimpleNamespace(tun="tun_b", org="org_a", limits={"org_requests": 9})
    here = rates.of(cast(Any, SimpleNamespace(policy=ruled, grant=grant, limits=lambda: grant.limits)))
    there = rates.of(cast(Any, SimpleNamespace(policy=ruled, tunnel="tun_b", organization="org_a")))
    assert here is not None and there is not None and here.tunnel is not None and here.organization is not None
    assert (there.tunnel, there.organization) == (None, None)
    for holder in (here, there, there):
        holder.take("10.0.0.1", clock())
    assert here.tunnel.wait(clock()) == 0.0
    assert min(holder.check("10.0.0.1", clock()) for holder in (here, there)) > 0
    assert there.check("10.0.0.2", clock()) == 0.0
