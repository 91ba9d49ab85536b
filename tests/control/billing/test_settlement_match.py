"""Matching as pure functions: the golden files of ``settlements/``, and what must hold for any receipt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.control.billing.settlement_body import ReceiptBody
from portico.control.billing.settlement_match import (
    MAX_FINDINGS,
    Line,
    Ours,
    Stated,
    basis_points,
    compare,
    exchanged,
)

GOLDEN = Path(__file__).parent / "settlements"
_HEAD = {
    "batch_id": "b1", "provider": "stripe", "account": "acct_1", "livemode": True, "issued_at": "2026-02-01T00:00:00Z",
    "period_start": "2026-01-01T00:00:00Z", "period_end": "2026-02-01T00:00:00Z",
}  # fmt: skip


def load(name: str) -> tuple[Ours, ReceiptBody, dict[str, Any]]:
    """Our lines, the receipt, and what is expected of them."""
    document = json.loads((GOLDEN / f"{name}.json").read_text())
    lines = [
        Line(each["ref"], each["kind"], each["currency"], each["amount_minor"], each["fee_minor"])
        for each in document["ours"]
    ]
    return Ours.of(lines), ReceiptBody.model_validate({**_HEAD, **document["receipt"]}), document["expected"]


def names() -> list[str]:
    return sorted(path.stem for path in GOLDEN.glob("*.json"))


def test_every_case_that_was_asked_for_has_a_file() -> None:
    wanted = {"match", "one_minor_unit_off", "missing_line", "extra_line", "refund_sign", "fee", "wrong_currency"}
    assert wanted | {"unknown_period"} <= set(names())
    # What takes more than one message has a file of its history (test_settlement.py).
    assert {path.stem for path in (GOLDEN / "histories").glob("*.json")} >= {
        "duplicate_batch",
        "changed_batch",
        "re_run",
    }


@pytest.mark.parametrize("name", names())
def test_golden(name: str) -> None:
    ours, body, expected = load(name)
    report = compare(ours, body.match_lines(), body.stated())
    assert (report.verdict, report.level, report.reason) == (
        expected["verdict"], expected["level"], expected.get("reason"),
    )  # fmt: skip
    if report.verdict == "failed":
        return
    assert {each.currency: [each.delta_minor, each.delta_bps] for each in report.currencies} == expected["deltas"]
    assert [each.document() for each in report.findings] == expected["findings"]
    if "fx" in expected:
        assert {each.currency: each.fx_delta_minor for each in report.currencies} == expected["fx"]


class TestTolerance:
    def test_up_to_it_nothing_is_off_and_beyond_it_everything_is(self) -> None:
        ours = Ours.of([Line("ch_1", "payment", "EUR", 1000, 0)])
        verdicts = []
        for amount in (1000, 1005, 1006, 995, 994):
            theirs = [Line("ch_1", "payment", "EUR", amount, 0)]
            verdicts.append(compare(ours, theirs, {}, {"EUR": 5}).verdict)
        assert verdicts == ["matched", "matched", "delta", "matched", "delta"]

    def test_is_of_its_currency_alone(self) -> None:
        ours = Ours.of([Line("ch_1", "payment", "EUR", 1000, 0)])
        assert compare(ours, [Line("ch_1", "payment", "EUR", 1001, 0)], {}, {"USD": 5}).verdict == "delta"

    def test_a_small_line_that_is_missing_is_missing(self) -> None:
        ours = Ours.of([Line("ch_1", "payment", "EUR", 1000, 0), Line("ch_2", "payment", "EUR", 1, 0)])
        report = compare(ours, [Line("ch_1", "payment", "EUR", 1000, 0)], {}, {"EUR": 5})
        assert (report.verdict, report.counts) == ("delta", {"missing": 1})

    def test_of_totals_it_forgives_no_count(self) -> None:
        ours = Ours.of([Line("ch_1", "payment", "EUR", 1000, 0)])
        assert compare(ours, None, {"EUR": Stated(net=1003, count=1)}, {"EUR": 5}).verdict == "matched"
        assert compare(ours, None, {"EUR": Stated(net=1000, count=2)}, {"EUR": 5}).verdict == "delta"


class TestReferences:
    def test_an_alias_of_theirs_is_the_same_line(self) -> None:
        ours = Ours.of([Line("pi_1", "payment", "EUR", 1000, 30)])
        theirs = [Line("ch_1", "payment", "EUR", 1000, 30, ("pi_1", "in_1"))]
        assert compare(ours, theirs, {}).verdict == "matched"

    def test_and_so_is_one_of_ours(self) -> None:
        ours = Ours()
        ours.add("pi_1", "payment", "EUR", 1000, 30, "in_1")
        assert compare(ours, [Line("in_1", "payment", "EUR", 1000, 30)], {}).verdict == "matched"

    def test_a_refund_is_no_payment_of_the_same_reference(self) -> None:
        ours = Ours.of([Line("x", "payment", "EUR", 1000, 0)])
        report = compare(ours, [Line("x", "refund", "EUR", 1000, 0)], {})
        assert report.counts == {"missing": 1, "extra": 1}

    def test_a_dispute_that_was_won_comes_to_nothing(self) -> None:
        ours = Ours.of([Line("ch_1", "payment", "EUR", 1000, 0), Line("du_1", "dispute", "EUR", -1000, 0)])
        ours.add("du_1", "dispute", "EUR", 1000, 0)
        theirs = [Line("ch_1", "payment", "EUR", 1000, 0)]
        theirs += [Line("du_1", "dispute", "EUR", amount, 0) for amount in (1000, -1000)]
        assert compare(ours, theirs, {}).verdict == "matched"

    def test_what_moves_nothing_is_nowhere(self) -> None:
        ours = Ours.of([Line("ch_1", "payment", "EUR", 1000, 0), Line("in_0", "payment", "EUR", 0, 0)])
        assert compare(ours, [Line("ch_1", "payment", "EUR", 1000, 0)], {}).verdict == "matched"

    def test_a_fee_that_is_not_stated_is_not_compared(self) -> None:
        ours = Ours.of([Line("ch_1", "payment", "EUR", 1000, 30)])
        assert compare(ours, [Line("ch_1", "payment", "EUR", 1000, None)], {}).verdict == "matched"


def test_findings_are_counted_beyond_those_that_are_kept() -> None:
    many = MAX_FINDINGS + 5
    ours = Ours.of([Line(f"ch_{n}", "payment", "EUR", 100 + n, 0) for n in range(many)])
    report = compare(ours, [Line("ch_0", "payment", "EUR", 100, 0)], {})
    assert (report.counts, len(report.findings)) == ({"missing": many - 1}, MAX_FINDINGS)
    assert report.findings[0].ref == f"ch_{many - 1}", "the greatest difference is told first"


@pytest.mark.parametrize(
    ("delta", "of", "bps"), [(1, 10_000, 1), (-1, 10_000, -1), (1, -10_000, 1), (5, 100_000, 0), (15, 100_000, 2), (7, 0, None)]
)  # fmt: skip
def test_basis_points(delta: int, of: int, bps: int | None) -> None:
    assert basis_points(delta, of) == bps


def test_exchange_between_currencies_of_different_exponents() -> None:
    assert exchanged(1000, "160.255", 2, 0) == 1603  # 10.00 USD in yen, 1602.55
    assert exchanged(1000, "0.00625", 0, 2) == 625  # 1000 yen in USD, 6.25
    assert exchanged(1000, "0.307", 2, 3) == 3070  # 10.00 USD in dinar, 3.070


_LINES = st.lists(
    st.builds(
        Line, st.sampled_from([f"r{n}" for n in range(8)]), st.sampled_from(["payment", "refund", "dispute"]),
        st.sampled_from(["EUR", "JPY"]), st.integers(-10_000, 10_000).filter(bool), st.integers(-50, 50),
    ),
    min_size=1, max_size=12, unique_by=lambda line: (line.kind, line.ref),
)  # fmt: skip


@given(_LINES, st.randoms())
def test_a_receipt_of_just_our_lines_matches_in_any_order(lines: list[Line], random: Any) -> None:
    theirs = list(lines)
    random.shuffle(theirs)
    assert compare(Ours.of(lines), theirs, {}).verdict == "matched"


@given(_LINES, st.integers(0, 11), st.integers(-500, 500).filter(bool))
def test_any_line_that_is_off_by_anything_is_found_by_name(lines: list[Line], at: int, off: int) -> None:
    line = lines[at % len(lines)]
    wrong = Line(line.ref, line.kind, line.currency, line.amount_minor + off, line.fee_minor)
    theirs = [wrong if each is line else each for each in lines]
    report = compare(Ours.of(lines), theirs, {})
    assert report.verdict == "delta"
    assert [(each.kind, each.ref) for each in report.findings] == [(line.kind, line.ref)]
    assert sum(each.delta_minor for each in report.currencies) == off
