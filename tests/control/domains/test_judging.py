"""What looks mean: the ladder, the states, and that nobody loses a domain because nobody answered."""

from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.control.domains import judging
from portico.control.domains.dns import Answer
from portico.control.domains.judging import Judged, Looked
from portico.control.domains.records import Record
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret

SETTINGS = ApiSettings(database_url=Secret("postgresql://none"), master_key=Secret(new_master_key()))
NOW = datetime(2030, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
NOTHING = Answer("nodata")
FAILED = Answer("failed", why="SERVFAIL")
WANTED = [
    Record("ownership", "TXT", "_portico-challenge.www.example.com", "portico-verification=t", True),
    Record("routing", "CNAME", "www.example.com", "edge.portico.test", True),
    Record("delegation", "CNAME", "_acme-challenge.www.example.com", "x.challenges.portico.test", False),
]


def row(status: str, **more: Any) -> Any:
    return SimpleNamespace(**{"hostname_status": status, "failing_since": None, "check_attempts": 0, **more})


def after(status: str, owner: str, points: str, *, manual: bool = False, **more: Any) -> dict[str, Any]:
    judged = Judged(owner, points)  # type: ignore[arg-type]
    return judging.settle(SETTINGS, row(status, **more), judged, NOW, manual=manual)


def test_the_ladder_is_the_one_of_the_page() -> None:
    assert [judging.pause(n) for n in range(10)] == [60, 63, 66, 69, 72, 76, 80, 84, 88, 93]
    assert judging.pause(10) == math.floor(60 * 1.15**10) == 242
    assert judging.pause(39) == 13_975
    assert judging.pause(40) == judging.pause(75) == judging.pause(10**6) == 14_400
    assert sum(judging.pause(n) for n in range(76)) == pytest.approx(7.23 * 86_400, rel=0.01)


class TestStates:
    @pytest.mark.parametrize(
        ("status", "owner", "points", "wanted"),
        [
            ("pending", "no", "yes", "pending"),  # pointing here proves nothing
            ("pending", "unknown", "yes", "pending"),
            ("pending", "yes", "no", "verified"),
            ("pending", "yes", "yes", "active"),
            ("verified", "yes", "yes", "active"),
            ("verified", "no", "yes", "verified"),
            ("verified", "unknown", "yes", "verified"),
            ("active", "yes", "no", "active"),
            ("active", "no", "yes", "active"),
            ("moved", "no", "yes", "moved"),  # somebody else's name may point here, too
            ("moved", "yes", "no", "moved"),
            ("moved", "yes", "yes", "active"),
        ],
    )
    def test_after_one_look(self, status: str, owner: str, points: str, wanted: str) -> None:
        assert after(status, owner, points)["hostname_status"] == wanted

    def test_who_asks_gets_back_what_is_theirs(self) -> None:
        assert after("moved", "yes", "no", manual=True)["hostname_status"] == "verified"
        assert after("moved", "no", "no", manual=True)["hostname_status"] == "moved"

    @pytest.mark.parametrize(("status", "owner", "points"), [("active", "yes", "no"), ("verified", "no", "no")])
    def test_seven_days_of_failing_and_seven_more(self, status: str, owner: str, points: str) -> None:
        first = after(status, owner, points)
        assert (first["hostname_status"], first["failing_since"]) == (status, NOW)
        almost = after(status, owner, points, failing_since=NOW - 7 * DAY + timedelta(seconds=1))
        assert almost["hostname_status"] == status
        moved = after(status, owner, points, failing_since=NOW - 7 * DAY)
        assert (moved["hostname_status"], moved["failing_since"]) == ("moved", NOW)
        still = after("moved", owner, points, failing_since=NOW - 6 * DAY)
        assert (still["hostname_status"], still["failing_since"]) == ("moved", NOW - 6 * DAY)
        lost = after("moved", owner, points, failing_since=NOW - 7 * DAY)
        assert (lost["hostname_status"], lost["next_check_at"], lost["tunnel_id"]) == ("deleted", None, None)

    def test_what_comes_back_starts_anew(self) -> None:
        found = after("active", "yes", "yes", failing_since=NOW - 6 * DAY, check_attempts=40)
        assert (found["failing_since"], found["check_attempts"]) == (None, 0)
        assert found["next_check_at"] == NOW + timedelta(seconds=SETTINGS.domain_recheck_seconds)

    def test_a_look_that_learned_nothing_is_made_again_soon(self) -> None:
        """Resolvers that were silent for a moment delay a name by seconds; where they stay so, the ladder is what it was."""
        waits = []
        attempts = 0
        for _ in range(8):
            found = (
                after("pending", "yes", "unknown")
                if not waits
                else after("verified", "yes", "unknown", check_attempts=attempts)
            )
            waits.append((found["next_check_at"] - NOW).total_seconds())
            attempts = found["check_attempts"]
        assert waits == [5, 10, 20, 40, *(judging.pause(attempts) for attempts in (4, 5, 6, 7))]

    def test_a_claim_that_nobody_proves_is_looked_at_for_a_week(self) -> None:
        first = after("pending", "no", "no")
        assert first["failing_since"] == NOW
        assert first["next_check_at"] == NOW + timedelta(seconds=60)
        over = after("pending", "no", "no", failing_since=NOW - 7 * DAY, check_attempts=70)
        assert (over["hostname_status"], over["next_check_at"]) == ("pending", None)
        again = after("pending", "no", "no", failing_since=NOW - 30 * DAY, check_attempts=70, manual=True)
        assert (again["failing_since"], again["check_attempts"]) == (NOW, 1)
        assert again["next_check_at"] == NOW + timedelta(seconds=60)

    @given(
        st.sampled_from(["verified", "active", "moved"]),
        st.sampled_from(["yes", "unknown"]),
        st.sampled_from(["yes", "unknown"]),
        st.integers(0, 1000),
    )
    def test_nobody_loses_a_domain_because_nobody_answers(
        self, status: str, owner: str, points: str, days: int
    ) -> None:
        found = after(status, owner, points, failing_since=NOW - days * DAY)
        assert found["hostname_status"] != "deleted"
        assert found["hostname_status"] in (status, "active")
        assert found["next_check_at"] > NOW

    @given(st.lists(st.tuples(st.sampled_from(["yes", "no", "unknown"]), st.sampled_from(["yes", "no", "unknown"]))))
    def test_any_history_keeps_the_rules(self, looks: list[tuple[str, str]]) -> None:
        """A proved claim never falls back to an unproved one; it is deleted only out of ``moved``, two weeks after it failed."""
        state, now, before, failed_at = row("pending"), NOW, "pending", None
        for owner, points in looks * 8:
            now += DAY
            values = judging.settle(SETTINGS, state, Judged(owner, points), now, manual=False)  # type: ignore[arg-type]
            status = values["hostname_status"]
            assert before == "pending" or status != "pending"
            assert status != "moved" or before in ("verified", "active", "moved")
            if "no" in (owner, points) and before in ("verified", "active") and failed_at is None:
                failed_at = now
            if status == "deleted":
                assert before == "moved"
                assert failed_at is not None
                assert now - failed_at >= 14 * DAY
                return
            before = status
            state = row(**{"status": status, **{k: v for k, v in values.items() if k != "hostname_status"}})


class TestPointing:
    def judge(self, *pairs: judging.Pair, own: set[str] | None = None, txt: Answer = NOTHING) -> Judged:
        addresses = frozenset({"192.0.2.7", "2001:db8::7"} if own is None else own)
        looked = Looked(NOW, [txt] * 3, pairs, addresses, [NOTHING] * 3)
        return judging.judge(looked, "t", WANTED, "edge.portico.test")

    def test_by_alias(self) -> None:
        alias = Answer("found", ("198.51.100.1",), ("Edge.Portico.Test".lower(),))
        judged = self.judge(*[(alias, NOTHING)] * 3)
        assert judged.points == "yes"
        assert judged.findings["routing"].found == ["edge.portico.test", "198.51.100.1"]
        unresolved = Answer("nxdomain", (), ("edge.portico.test",))
        assert self.judge(*[(unresolved, unresolved)] * 3, own=set()).points == "yes"

    def test_by_our_addresses_and_no_other(self) -> None:
        ours, six = Answer("found", ("192.0.2.7",)), Answer("found", ("2001:db8::7",))
        both = Answer("found", ("192.0.2.7", "203.0.113.9"))
        assert self.judge(*[(ours, NOTHING)] * 3).points == "yes"
        assert self.judge(*[(ours, six)] * 3).points == "yes"
        mixed = self.judge(*[(both, six)] * 3)
        assert mixed.points == "no"
        assert mixed.findings["routing"].fix == "Some visitors still go elsewhere: remove 203.0.113.9"
        assert self.judge(*[(Answer("found", ("203.0.113.9",)), NOTHING)] * 3).error == "ownership_missing"

    def test_what_is_not_known(self) -> None:
        ours = Answer("found", ("192.0.2.7",))
        assert self.judge((ours, NOTHING), (FAILED, FAILED), (ours, NOTHING)).points == "yes"
        assert self.judge((ours, NOTHING), (FAILED, FAILED), (NOTHING, NOTHING)).points == "unknown"
        assert self.judge(*[(ours, FAILED)] * 3).points == "unknown"
        assert self.judge(*[(ours, NOTHING)] * 3, own=set()).points == "unknown"  # we do not know our own

    def test_what_to_fix_is_said(self) -> None:
        proof = Answer("found", ("portico-verification=t",))
        none = self.judge(*[(NOTHING, NOTHING)] * 3, txt=proof)
        assert (none.owner, none.error) == ("yes", "not_pointing")
        assert none.findings["routing"].fix == "Set CNAME www.example.com → edge.portico.test"
        loop = Answer("loop", (), ("b.example.com", "www.example.com"))
        circle = self.judge(*[(loop, loop)] * 3, txt=proof)
        assert circle.error == "alias_loop"
        assert "in a circle (b.example.com → www.example.com)" in str(circle.findings["routing"].fix)
        silent = self.judge(*[(FAILED, FAILED)] * 3, txt=FAILED)
        assert silent.error == "resolvers_silent"
        assert "SERVFAIL" in str(silent.findings["ownership"].fix)
        wrong = self.judge(*[(NOTHING, NOTHING)] * 3, txt=Answer("found", ("portico-verification=old", "v=spf1")))
        assert wrong.findings["ownership"].state == "wrong"
        assert wrong.findings["ownership"].found == ["portico-verification=old"]


def test_what_is_stored_has_a_size() -> None:
    many = Answer("found", tuple(f"portico-verification={n}" for n in range(90)))
    looked = Looked(NOW, [many], [(many, many)], frozenset())
    stored = judging.judge(looked, "t", WANTED, "edge.portico.test").stored()
    assert all(len(finding["found"]) <= 8 for finding in stored.values())
    assert dataclasses.replace(looked).at == NOW
