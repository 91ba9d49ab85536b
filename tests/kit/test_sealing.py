"""Sealed secrets open only with the key, purpose and row they were sealed for."""

from __future__ import annotations

import pytest

from portico.errors import Problem
from portico.kit.sealing import Sealer, new_master_key
from portico.settings import Secret


@pytest.fixture
def sealer() -> Sealer:
    return Sealer(Secret(new_master_key()))


def test_round_trip_with_a_fresh_nonce_each_time(sealer: Sealer) -> None:
    first, second = (sealer.seal("signing key", "kid-1", b"seed") for _ in range(2))
    assert first != second
    assert sealer.open("signing key", "kid-1", first) == b"seed"
    assert b"seed" not in first


def test_other_purpose_row_key_or_bytes_do_not_open(sealer: Sealer) -> None:
    sealed = sealer.seal("signing key", "kid-1", b"seed")
    other = Sealer(Secret(new_master_key()))
    attempts = [
        (sealer, "other", "kid-1", sealed),
        (sealer, "signing key", "kid-2", sealed),
        (other, "signing key", "kid-1", sealed),
        (sealer, "signing key", "kid-1", sealed[:-1] + bytes([sealed[-1] ^ 1])),
        (sealer, "signing key", "kid-1", b"\x02" + sealed[1:]),
        (sealer, "signing key", "kid-1", b""),
    ]
    for one, purpose, context, box in attempts:
        with pytest.raises(Problem) as refused:
            one.open(purpose, context, box)
        assert refused.value.code == "config.invalid"


@pytest.mark.parametrize("key", ["", "short", "a" * 43, "*" * 44])
def test_a_master_key_that_is_not_32_bytes_is_refused(key: str) -> None:
    with pytest.raises(Problem) as refused:
        Sealer(Secret(key))
    assert refused.value.code == "config.invalid"
    assert key == "" or key not in refused.value.detail


def test_macs_differ_by_purpose_text_and_key(sealer: Sealer) -> None:
    macs = {
        sealer.mac("a", "x"),
        sealer.mac("b", "x"),
        sealer.mac("a", "y"),
        Sealer(Secret(new_master_key())).mac("a", "x"),
    }
    assert len(macs) == 4
    assert sealer.mac("a", "x") == sealer.mac("a", "x")
