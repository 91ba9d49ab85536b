"""The states of reports and receipts: every way that there is, and none that there is not."""

from __future__ import annotations

import itertools

import pytest

from portico.control.billing.report_states import EXPORT, SETTLEMENT, IllegalTransition, Machine

WAYS = {
    EXPORT: {
        ("queued", "generating"), ("queued", "failed"), ("generating", "ready"), ("generating", "failed"),
        ("ready", "delivering"), ("ready", "expired"), ("delivering", "delivered"), ("delivering", "failed"),
        ("delivered", "acked"), ("delivered", "delivering"), ("delivered", "expired"), ("acked", "delivering"),
        ("failed", "delivering"), ("failed", "expired"),
    },
    SETTLEMENT: {
        ("received", "verified"), ("received", "failed"), ("received", "resolved"), ("verified", "matched"),
        ("verified", "delta"), ("verified", "failed"), ("verified", "resolved"), ("matched", "verified"),
        ("matched", "resolved"), ("delta", "verified"), ("delta", "resolved"), ("failed", "received"),
        ("failed", "resolved"), ("resolved", "verified"),
    },
}  # fmt: skip


@pytest.mark.parametrize("machine", WAYS, ids=lambda machine: machine.name)
def test_every_pair_of_states(machine: Machine) -> None:
    for at, to in itertools.product(machine.states, repeat=2):
        if (at, to) in WAYS[machine]:
            assert machine.move(at, to) == to
            assert at in machine.sources(to)
        else:
            with pytest.raises(IllegalTransition, match=f"{at} does not lead to {to}"):
                machine.move(at, to)
            assert at not in machine.sources(to)
