"""The machine of dunning cases, and the days of its schedule."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from portico.control.billing import dunning_states as states
from portico.control.billing.dunning_states import IllegalStep, Owed, Schedule
from portico.settings import ApiSettings, Secret

_START = datetime(2030, 1, 1, tzinfo=UTC)
SCHEDULE = Schedule.of(ApiSettings(database_url=Secret("postgresql://x"), master_key=Secret("x")))
#: As reviewed: a case goes down the ladder, may skip rungs, and never climbs.
LADDER = ["grace", "notified", "retrying", "restricted", "suspended", "written_off"]
OWED = Owed(_START, 1900, 1, None, True)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(states.STATES, repeat=2)))
def test_every_pair(before: str, after: str) -> None:
    over = before in ("recovered", "canceled")
    aside = after in ("recovered", "canceled") or (after == "paused" and before != "paused")
    down = before in LADDER and after in LADDER and LADDER.index(after) > LADDER.index(before)
    again = before == "paused" and after in LADDER
    if not over and (aside or down or again):
        assert states.step(before, after) == after
    else:
        with pytest.raises(IllegalStep):
            states.step(before, after)


@pytest.mark.parametrize(
    ("days", "stage", "state"),
    [
        (0, "D0", "notified"), (0.9, "D0", "notified"), (1, "D1", "retrying"), (3, "D3", "retrying"),
        (7, "D7", "retrying"), (9.99, "D7", "retrying"), (10, "D10", "restricted"), (13, "D10", "restricted"),
        (14, "D14", "suspended"), (29, "D14", "suspended"), (30, "D30", "written_off"), (900, "D30", "written_off"),
    ],
)  # fmt: skip
def test_our_clock_when_nobody_tries_again(days: float, stage: str, state: str) -> None:
    found = SCHEDULE.at(OWED, _START + timedelta(days=days))
    assert found is not None
    assert (found.name, found.state) == (stage, state)


@pytest.mark.parametrize(("attempts", "stage"), [(1, "D0"), (2, "D1"), (3, "D3"), (4, "D7"), (8, "D7")])
def test_the_provider_s_attempts_while_it_tries(attempts: int, stage: str) -> None:
    """Nothing is taken away before its last attempt, however late that is."""
    now = _START + timedelta(days=12)
    owed = replace(OWED, attempts=attempts, next_attempt_at=now + timedelta(days=2), is_final=False)
    found = SCHEDULE.at(owed, now)
    assert found is not None
    assert found.name == stage


def test_a_provider_that_forgets_is_not_waited_for() -> None:
    owed = replace(OWED, next_attempt_at=_START + timedelta(days=11), is_final=False)
    late = SCHEDULE.at(owed, _START + timedelta(days=13))
    assert late is not None
    assert late.state == "restricted"
    for_ever = replace(OWED, next_attempt_at=_START + timedelta(days=400), is_final=False)
    gone = SCHEDULE.at(for_ever, _START + timedelta(days=22))
    assert gone is not None
    assert gone.state == "suspended"


def test_days_of_a_pause_do_not_count() -> None:
    found = SCHEDULE.at(replace(OWED, paused_days=5.0), _START + timedelta(days=12))
    assert found is not None
    assert found.name == "D7"


def test_when_the_clock_has_something() -> None:
    assert SCHEDULE.next_at(OWED, _START + timedelta(days=4)) == _START + timedelta(days=7)
    assert SCHEDULE.next_at(OWED, _START + timedelta(days=31)) is None
    tried = replace(OWED, next_attempt_at=_START + timedelta(days=4.5), is_final=False)
    assert SCHEDULE.next_at(tried, _START + timedelta(days=4)) == _START + timedelta(days=5.5)


def test_several_unpaid_invoices_are_one_debt() -> None:
    row = {"amount": 100, "next_attempt_at": None, "is_final": True, "failure_code": "a"}
    older = {**row, "since": _START, "attempts": 4, "invoice_ref": "in_1"}
    newer = {**row, "since": _START + timedelta(days=30), "attempts": 1, "invoice_ref": "in_2", "failure_code": "b"}
    newer |= {"next_attempt_at": _START + timedelta(days=31), "is_final": False}
    owed = Owed.together([newer, older])
    assert (owed.since, owed.amount_minor, owed.attempts, owed.is_final) == (_START, 200, 4, False)
    assert (owed.next_attempt_at, owed.failure_code) == (_START + timedelta(days=31), "a")
