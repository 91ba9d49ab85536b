"""A figure is believed only when nothing went wrong, and ratios are taken within a round."""

from __future__ import annotations

import pytest

from bench.figures import Refused, check_load, median, ratio

NONE = {"connect": 0, "read": 0, "write": 0, "status": 0, "timeout": 0}


def test_a_median_has_its_extremes_and_half_their_distance_as_a_share() -> None:
    found = median([10.0, 30.0, 20.0])
    assert found is not None
    assert (found.value, found.low, found.high, found.count, found.spread) == (20.0, 10.0, 30.0, 3, 0.5)
    assert median([]) is None


def test_a_ratio_is_taken_within_each_round() -> None:
    # A busy machine made round 1 twice as dear for both: the ratio does not see it.
    found = ratio({0: 30.0, 1: 60.0, 2: 33.0}, {0: 20.0, 1: 40.0, 2: 30.0})
    assert found is not None
    assert (found.value, found.high) == (1.5, 1.5)


def test_a_ratio_leaves_out_rounds_that_one_side_lacks() -> None:
    found = ratio({0: 30.0, 1: 99.0}, {0: 20.0, 2: 1.0})
    assert found is not None
    assert (found.value, found.count) == (1.5, 1)
    assert ratio({0: 1.0}, {}) is None


def test_a_flawless_load_is_believed() -> None:
    check_load(1000, NONE, 1000 * 300 + 5 * 300, 300, 64)


@pytest.mark.parametrize("kind", NONE)
def test_one_error_of_any_kind_refuses_the_figure(kind: str) -> None:
    with pytest.raises(Refused, match=f"1 {kind}"):
        check_load(1000, NONE | {kind: 1}, 1000 * 300, 300, 64)


@pytest.mark.parametrize("read", [1000 * 150, 1000 * 400, 0])
def test_bytes_that_do_not_add_up_refuse_the_figure(read: int) -> None:
    with pytest.raises(Refused, match="300 in each expected"):
        check_load(1000, NONE, read, 300, 64)


def test_no_answer_at_all_is_no_figure() -> None:
    with pytest.raises(Refused, match="no request was answered"):
        check_load(0, NONE, 0, 300, 64)
