"""A bounded memory of exact bytes."""

from __future__ import annotations

from portico.kit.memo import Memo


def test_the_second_sighting_is_worth_it() -> None:
    memo: Memo[int] = Memo(4, 8)
    assert not memo.worth(b"a")
    assert memo.worth(b"a")
    memo.remember(b"a", 1)
    assert memo.get(b"a") == 1
    assert memo.get(b"b") is None


def test_long_bytes_never_are() -> None:
    memo: Memo[int] = Memo(4, 8)
    assert not any(memo.worth(b"123456789") for _ in range(3))
    assert not memo.worth(b"12345678")
    assert memo.worth(b"12345678")


def test_full_it_begins_anew() -> None:
    memo: Memo[int] = Memo(4, 8)
    for number in range(4):
        memo.remember(b"%d" % number, number)
    assert len(memo) == 4
    memo.remember(b"new", 9)
    assert dict(memo) == {b"new": 9}
    assert memo.get(b"0") is None


def test_what_is_seen_once_fills_no_memory() -> None:
    memo: Memo[int] = Memo(4, 8)
    for number in range(10_000):
        assert not memo.worth(b"%d" % number)
    assert not memo
    assert len(memo._seen) <= 16
