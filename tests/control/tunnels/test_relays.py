"""Edge choice: region first, then load, at random by weight so that nobody herds."""

from __future__ import annotations

import random
from collections import Counter

from portico.control.tunnels.relays import LiveRelay, order


def relay(name: str, region: str = "eu", load: float = 0.0) -> LiveRelay:
    return LiveRelay(name, region, f"ws://{name}", load, 1e18)


def test_the_region_comes_before_load() -> None:
    relays = [relay("far", "us", 0.0), relay("near", "eu", 50.0)]
    for _ in range(50):
        assert [r.name for r in order(relays, "eu")] == ["near", "far"]


def test_an_unknown_region_still_gets_relays() -> None:
    assert len(order([relay("a"), relay("b")], "mars")) == 2


def test_equal_relays_share_and_a_busy_one_is_rarely_first() -> None:
    draw = random.Random(7).random
    relays = [relay("a"), relay("b"), relay("busy", load=9.0)]
    first = Counter(order(relays, None, draw)[0].name for _ in range(3000))
    assert abs(first["a"] - first["b"]) < 250
    assert 60 < first["busy"] < 300, "weight 1/10 of the others, and not never"
