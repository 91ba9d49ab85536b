"""The clock, the calendar and the file of the simulators."""

from __future__ import annotations

import calendar
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.simulators import billing_world as world


def at(*when: int) -> int:
    return calendar.timegm((*when, 0, 0, 0)[:6])


@pytest.mark.parametrize(
    ("start", "interval", "end"),
    [
        ((2026, 1, 31), "month", (2026, 2, 28)),
        ((2028, 1, 31), "month", (2028, 2, 29)),
        ((2026, 12, 15), "month", (2027, 1, 15)),
        ((2028, 2, 29), "year", (2029, 2, 28)),
        ((2026, 3, 31), "day", (2026, 4, 1)),
    ],
    ids=["short", "leap", "over the year", "leap year", "day"],
)
def test_periods_end_on_a_day_that_exists(start: tuple[int, ...], interval: str, end: tuple[int, ...]) -> None:
    assert world.after(at(*start), interval) == at(*end)


@given(st.integers(0, 4_000_000_000), st.sampled_from(["day", "month", "year"]))
def test_a_period_is_never_empty_and_keeps_the_time_of_day(start: int, interval: str) -> None:
    end = world.after(start, interval)
    assert 1 <= (end - start) // world.DAY <= 366 and end % world.DAY == start % world.DAY


def test_things_happen_in_order_and_at_their_own_time() -> None:
    clock = world.Clock()
    seen: list[tuple[str, int]] = []
    start = clock.now
    plan = [(start + 30, "b"), (start + 10, "a"), (start + 99, "never")]

    def due() -> tuple[float, Callable[[], None]] | None:
        if not plan:
            return None
        first = min(plan)

        def act() -> None:
            plan.remove(first)
            seen.append((first[1], clock.now - start))

        return first[0], act

    assert world.run_until(clock, start + 50, due) == 2
    assert seen == [("a", 10), ("b", 30)]


def test_a_rule_without_progress_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "MAX_STEPS", 10)
    with pytest.raises(RuntimeError, match="no progress"):
        world.run_until(world.Clock(), 100, lambda: (1, lambda: None))


def test_what_is_known_outlives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "world.json"
    first = world.World(path)
    first.put("things", {"id": "a", "_secret": 1})
    secret = first.kept("key", "", lambda: "made")
    first.clock.release(first.clock.exact + 1000)
    first.count("series")
    first.save()
    second = world.World(path)
    assert second.get("things", "a") == {"id": "a", "_secret": 1}
    assert second.kept("key", "", lambda: "another") == secret == "made"
    assert 999 <= second.clock.offset <= 1000 and second.count("series") == 2
    assert path.stat().st_mode & 0o077 == 0


def test_what_is_its_own_does_not_leave() -> None:
    assert world.public({"a": [{"_b": 1, "c": 2}], "_d": 3}) == {"a": [{"c": 2}]}


def test_amounts_have_the_digits_of_their_currency() -> None:
    assert world.amount(1900, "usd") == "19.00 USD"
    assert world.amount(1900, "JPY") == "1,900 JPY"
    assert world.amount(1900, "KWD") == "1.900 KWD"


@given(st.integers(-10_000, 10_000), st.integers(0, 100))
def test_shares_are_whole_and_fair(amount: int, part: int) -> None:
    found = world.share(amount, part, 100)
    assert abs(found * 100 - amount * part) <= 50
