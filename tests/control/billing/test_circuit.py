"""The circuit breaker: what opens it, what closes it, and that one call alone tries."""

from __future__ import annotations

from datetime import UTC, datetime

from portico.control.billing.circuit import Circuit


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> datetime:
        return datetime.fromtimestamp(self.now, UTC)


def _failing(times: int, clock: _Clock) -> Circuit:
    circuit = Circuit(3, 30, clock)
    for _ in range(times):
        assert circuit.enter()
        circuit.bad()
    return circuit


def test_it_opens_after_failures_in_a_row_and_says_for_how_long() -> None:
    clock = _Clock()
    assert _failing(2, clock).state == "closed"
    circuit = _failing(3, clock)
    assert circuit.state == "open" and not circuit.enter() and circuit.wait == 30
    clock.now += 29.5
    assert not circuit.enter() and circuit.wait == 0.5


def test_an_answer_in_between_forgives() -> None:
    circuit = _failing(2, _Clock())
    circuit.good()
    for _ in range(2):
        circuit.bad()
    assert circuit.state == "closed"


def test_one_call_tries_and_its_outcome_decides() -> None:
    clock = _Clock()
    circuit = _failing(3, clock)
    clock.now += 30
    assert circuit.state == "half_open"
    assert circuit.enter() and not circuit.enter(), "a second one waits for the first"
    circuit.bad()
    assert circuit.state == "open" and circuit.wait == 30
    clock.now += 30
    assert circuit.enter()
    circuit.good()
    assert circuit.state == "closed" and circuit.enter()


def test_a_try_that_was_given_up_lets_the_next_one_try() -> None:
    clock = _Clock()
    circuit = _failing(3, clock)
    clock.now += 30
    assert circuit.enter()
    circuit.gone()
    assert circuit.enter()
