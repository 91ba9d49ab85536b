"""The machine of subscriptions: every pair of statuses, and folding a set whatever its order."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.control.billing import subscription_states as states
from portico.control.billing.subscription_states import IllegalTransition, Snapshot, State

_START = datetime(2030, 1, 1, tzinfo=UTC)

# Written out by hand, as reviewed: one arrow, and any number of arrows.
ARROWS = {
    ("pending", "trialing"), ("pending", "active"), ("pending", "expired"),
    ("trialing", "active"), ("trialing", "past_due"), ("trialing", "canceled"),
    ("active", "past_due"), ("active", "paused"), ("active", "canceled"), ("active", "completed"),
    ("past_due", "active"), ("past_due", "suspended"), ("past_due", "canceled"),
    ("suspended", "active"), ("suspended", "canceled"),
    ("paused", "active"), ("paused", "canceled"),
}  # fmt: skip
_LIVE = ("active", "past_due", "suspended", "paused")
PATHS = {
    **{("pending", after): True for after in (*_LIVE, "trialing", "canceled", "completed", "expired")},
    **{("trialing", after): True for after in (*_LIVE, "canceled", "completed")},
    **{(before, after): True for before in _LIVE for after in (*_LIVE, "canceled", "completed")},
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(states.STATUSES, repeat=2)))
def test_every_pair(before: str, after: str) -> None:
    if (before, after) in ARROWS:
        assert states.step(before, after) == after
    else:
        with pytest.raises(IllegalTransition):
            states.step(before, after)
    if before == after or (before, after) in PATHS:
        assert states.follow(before, after) == after
    else:
        with pytest.raises(IllegalTransition):
            states.follow(before, after)


def test_what_is_over_stays_over() -> None:
    assert {"canceled", "completed", "expired"} == states.TERMINAL
    assert not states.TERMINAL & states.ENTITLED


def said(version: int, status: str | None, **more: object) -> Snapshot:
    more = {"effect_key": f"e{version}:{status}", "event_id": f"evt_{version}", **more}
    return Snapshot(version=version, occurred_at=_START + timedelta(seconds=version), status=status, **more)  # type: ignore[arg-type]


def test_an_older_version_overwrites_nothing() -> None:
    new = said(5, "active", plan_ref="new", cancel_at_period_end=True)
    old = said(4, "past_due", plan_ref="old", cancel_at_period_end=False)
    state, refused = states.derive([new, old])
    assert (state.status, state.plan_ref, state.cancel_at_period_end, state.version) == ("active", "new", True, 5)
    assert refused == frozenset()


def test_an_unknown_version_overrides_nothing_known() -> None:
    late = Snapshot("e", "evt", 0, _START + timedelta(days=9), "past_due")
    assert states.derive([said(1, "active"), late])[0].status == "active"


def test_nothing_comes_back_from_the_end() -> None:
    state, refused = states.derive([said(1, "active"), said(2, "canceled"), said(3, "active", plan_ref="x")])
    assert (state.status, state.plan_ref, refused) == ("canceled", None, {"e3:active"})


def test_canceled_before_created() -> None:
    assert states.derive([said(9, "canceled"), said(1, "pending"), said(2, "active")])[0].status == "canceled"


def test_what_was_not_said_stays() -> None:
    first = said(1, "active", plan_ref="p", period_start=_START, period_end=_START + timedelta(days=30))
    state, _ = states.derive([first, said(2, None, cancel_at_period_end=True)])
    assert (state.status, state.plan_ref, state.cancel_at_period_end) == ("active", "p", True)
    assert state.period_end == _START + timedelta(days=30)


def test_a_status_is_entered_once() -> None:
    state, _ = states.derive([said(1, "active"), said(7, "active")])
    assert state.status_at == _START + timedelta(seconds=1)


_SNAPSHOTS = st.builds(
    lambda version, second, status, plan, key: Snapshot(
        f"e{key}", f"evt_{key}", version, _START + timedelta(seconds=second), status, plan
    ),
    st.integers(0, 4), st.integers(0, 4), st.sampled_from([*states.STATUSES, None]), st.sampled_from(["a", "b", None]),
    st.integers(0, 30),
)  # fmt: skip


@given(st.lists(_SNAPSHOTS, max_size=8, unique_by=lambda each: each.effect_key), st.randoms())
def test_order_and_repetition_change_nothing(snapshots: list[Snapshot], random: object) -> None:
    wanted = states.derive(snapshots)
    again = snapshots + snapshots[: len(snapshots) // 2]
    random.shuffle(again)  # type: ignore[attr-defined]
    known = {each.effect_key: each for each in again}
    assert states.derive(known.values()) == wanted
    # One at a time, as they come: the last fold is the fold of all.
    held: dict[str, Snapshot] = {}
    state = State()
    for each in again:
        held[each.effect_key] = each
        state, _ = states.derive(held.values())
    assert state == wanted[0]
