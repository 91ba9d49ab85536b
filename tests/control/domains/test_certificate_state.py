"""The state of a domain's certificate: what histories add up to, and that it is their set alone that counts."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.control.domains.certificate_state import (
    ANSWERS,
    FAILURES,
    Event,
    Registers,
    derive,
    fold,
    life_tier,
    sla,
    trouble,
)
from portico.control.domains.event_mapping import CLASSES, TABLE
from portico.control.domains.store import CERT_STATES

START = datetime(2026, 1, 1, tzinfo=UTC)


def at(days: float) -> str:
    return (START + timedelta(days=days)).isoformat()


def event(pair: str, revision: int = 1, sequence: int = 1, **more: Any) -> Event:
    name, _, action = pair.partition(".")
    return Event("src_1", f"cev_{revision}_{sequence}_{pair}", name, action, revision, sequence, at(sequence), **more)


def deployed(revision: int, sequence: int, days: tuple[float, float] = (0, 90), **more: Any) -> Event:
    facts = {"serial": f"{revision:02x}", "not_before": at(days[0]), "not_after": at(days[1])} | more
    return event("deployment.succeeded", revision, sequence, **facts)


def status(*events: Event) -> str:
    return derive(fold(events)).status


def test_the_way_to_a_certificate() -> None:
    steps = ["validation.started", "validation.succeeded", "issuance.requested", "issuance.succeeded"]
    seen = [status(*(event(pair, 1, n) for n, pair in enumerate(steps[:count], 1))) for count in range(5)]
    assert seen == ["none", "pending_validation", "pending_issuance", "pending_issuance", "pending_deployment"]
    first = [event(pair, 1, n) for n, pair in enumerate(steps, 1)]
    assert status(*first, deployed(1, 9)) == "active"
    assert status(*first, deployed(1, 9), event("renewal.started", 2, 10)) == "renewing"
    assert status(*first, deployed(1, 9), event("renewal.started", 2, 10), deployed(2, 12, (60, 150))) == "active"


def test_an_early_failure_does_not_hide_the_deployment_before_it() -> None:
    """The renewal's failure (revision 2) arrives before the deployment of revision 1 that it came after."""
    early = event("renewal.failed", 2, 40, error_code="dns", error_detail="no answer", retry_at=at(41))
    state = derive(fold([early, deployed(1, 9)]))
    assert (state.status, state.serial, state.error_code, state.failures) == ("active", "01", "dns", 1)
    assert state.retry_at == START + timedelta(days=41)
    assert "renewal" in trouble(fold([early, deployed(1, 9)]), START)


def test_an_old_failure_changes_nothing() -> None:
    late = derive(fold([deployed(2, 12), event("issuance.failed", 1, 3, error_code="x")]))
    assert (late.status, late.error_code, late.failures) == ("active", None, 0)


def test_a_certificate_that_ends_earlier_replaces_none_unless_that_is_revoked() -> None:
    long, short = deployed(1, 9, (0, 90)), deployed(2, 12, (10, 16))
    assert derive(fold([long, short])).serial == "01"
    revoked = event("revocation.succeeded", 1, 20, serial="01")
    assert derive(fold([long, short, revoked])).serial == "02"
    assert derive(fold([revoked, long, short])).serial == "02", "in any order"
    assert derive(fold([deployed(1, 9, not_after=None), long])).serial == "01"


def test_revoked_expired_deleted() -> None:
    revoked = event("revocation.succeeded", 1, 20)
    assert status(deployed(1, 9), revoked) == "revoked"
    assert status(deployed(1, 9), revoked, event("issuance.requested", 2, 21)) == "revoked", "until another one is live"
    assert status(deployed(1, 9), revoked, deployed(2, 30)) == "active"
    expired = event("expiry.reached", 1, 90, serial="01")
    assert status(deployed(1, 9), expired) == "expired"
    assert status(expired, deployed(1, 9), deployed(2, 91, (90, 180))) == "active"
    assert status(deployed(1, 9), event("deletion.succeeded", 1, 50)) == "none"
    assert status(deployed(1, 9), event("deletion.succeeded", 1, 50), deployed(2, 51)) == "active"


@pytest.mark.parametrize("name", ["validation", "issuance", "deployment"])
def test_what_timed_out(name: str) -> None:
    assert status(event(f"{name}.failed", error_code="timed_out")) == f"{name}_timed_out"
    assert status(event(f"{name}.failed", error_code="dns")) == f"pending_{name}"
    assert status(deployed(1, 1), event(f"{name}.failed", 2, 2, error_code="timed_out")) == "active"


def test_facts_come_from_the_issue_where_the_deployment_has_none() -> None:
    issued = event("renewal.succeeded", 3, 5, serial="ab", not_before=at(0), not_after=at(90), issuer="CN=X")
    state = derive(fold([event("deployment.succeeded", 3, 6, regions_active=2, regions_total=3), issued]))
    assert (state.serial, state.issuer, state.not_after) == ("ab", "CN=X", START + timedelta(days=90))
    assert (state.regions_active, state.regions_total, state.source) == (2, 3, "src_1")
    hint = event("renewal.ari_window_changed", 3, 7, renews_at=at(55))
    assert derive(fold([event("deployment.succeeded", 3, 6), issued, hint])).renews_at == START + timedelta(days=55)


def test_one_effect_counts_once() -> None:
    twice = [event("validation.failed", 1, n, effect="challenge-1/failed") for n in (1, 2, 3)]
    assert derive(fold(twice)).failures == 1
    assert "validation" not in trouble(fold(twice), START)
    three = [event("validation.failed", 1, n, effect=f"challenge-{n}/failed") for n in (1, 2, 3)]
    assert trouble(fold(three), START)["validation"].tier == 3
    assert trouble(fold([*three, event("validation.succeeded", 1, 4)]), START) == {}


def test_tiers() -> None:
    def tiers(*events: Event, days: float = 0) -> dict[str, int]:
        found = trouble(fold(events), START + timedelta(days=days))
        return {name: each.tier for name, each in found.items()}

    assert tiers(event("issuance.failed")) == {"issuance": 2}
    limited = event("issuance.rate_limited", retry_at=at(2))
    assert (tiers(limited, days=1), tiers(limited, days=3)) == ({"issuance": 3}, {"issuance": 2})
    assert tiers(event("deployment.partial")) == {"deployment": 2}
    assert tiers(event("revocation.requested")) == {"revocation": 1}
    assert tiers(event("deletion.failed")) == {"deletion": 3}
    assert tiers(event("replication.lagging")) == {"replication": 2}
    assert tiers(event("integrity.key_mismatch")) == {"integrity": 1}
    assert tiers(event("ownership.moved")) == {"ownership": 2}
    assert tiers(deployed(1, 1), days=80) == {"expiry": 3}
    assert tiers(deployed(1, 1), days=91) == {"expiry": 1}
    failed = (deployed(1, 1), event("renewal.failed", 2, 2))
    assert [tiers(*failed, days=day)["renewal"] for day in (40, 80, 84, 86)] == [3, 3, 2, 1]


@pytest.mark.parametrize(
    ("days", "left", "tier"),
    [
        (90, 30, None),
        (90, 22, 3),
        (90, 8, 2),
        (90, 4, 1),
        (90, 0.9, 1),
        (90, -1, 1),
        (6.6, 3, None),
        (6.6, 1.5, 3),
        (6.6, 0.9, 1),
        (1, 0.5, None),
        (1, 0.2, 1),
        (365, 80, 3),
    ],
)
def test_urgency_is_a_share_of_life(days: float, left: float, tier: int | None) -> None:
    assert life_tier(START, START + timedelta(days=days), START + timedelta(days=days - left)) == tier


def test_renewal_sla() -> None:
    state = derive(fold([deployed(1, 1, (0, 90))]))
    late = [sla(state, START + timedelta(days=day), 0.05, 0.10) for day in (59, 63, 65, 69.5)]
    assert late == [None, None, "warning", "breach"]
    hinted = derive(fold([deployed(1, 1, (0, 90), renews_at=at(30))]))
    assert sla(hinted, START + timedelta(days=40), 0.05, 0.10) == "breach"


# -- the set alone counts ------------------------------------------------------------------------------------------------

PAIRS = sorted(f"{name}.{action}" for name, action in TABLE)


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    made = {}
    for _ in range(draw(st.integers(1, 12))):
        revision, sequence = draw(st.integers(0, 3)), draw(st.integers(0, 5))
        more: dict[str, Any] = {"effect": draw(st.sampled_from(["", "a", "b"]))}
        more["serial"] = draw(st.sampled_from([None, "01", "02"]))
        more["not_after"] = draw(st.sampled_from([None, at(10), at(20), at(30)]))
        more["error_code"] = draw(st.sampled_from([None, "x", "timed_out"]))
        found = event(draw(st.sampled_from(PAIRS)), revision, sequence, **more)
        made[found.event] = found
    return list(made.values())


@given(histories(), st.data())
def test_any_permutation_with_duplicates_ends_the_same(history: list[Event], data: st.DataObject) -> None:
    again = data.draw(st.lists(st.sampled_from(history), max_size=8))
    other = data.draw(st.permutations([*history, *again]))
    assert fold(other).written() == fold(history).written()
    stored: dict[str, Any] = {}
    for each in other:  # as the worker does it: through JSON, one at a time
        stored = json.loads(json.dumps(Registers.read(stored).with_event(each).written()))
    assert stored == fold(history).written()
    state = derive(Registers.read(stored))
    assert state == derive(fold(history))
    assert state.status in CERT_STATES
    assert trouble(fold(other), START) == trouble(fold(history), START)


def test_tables_agree() -> None:
    assert set(CLASSES) == set(FAILURES) == set(ANSWERS)
    assert {f"{name}.{action}" for name, actions in FAILURES.items() for action in actions} <= set(PAIRS)
    assert {pair for pairs in ANSWERS.values() for pair in pairs} <= set(PAIRS)
