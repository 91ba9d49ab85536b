"""Tables, page and chart, read off a result document."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from bench import chart, report
from bench.targets import TARGETS
from tests.bench.documents import bulk, document, get, plain

DOCUMENT = document(
    small_get={
        "direct": [plain(100.0)] * 3,
        "portico": [get(14, 14), get(15, 15), get(28, 28)],
        "rathole": [get(10, 10), get(12, 12), {"refused": "the load generator saw errors: 3 read"}],
    },
    small_get_1={"direct": [plain(100.0), plain(110.0)], "portico": [get(50, 50, p50=240.0), get(50, 50, p50=270.0)]},
    download={"portico": [bulk(0.6, 0.9)], "rathole": [{"refused": "the bytes are wrong"}]},
)


def verdicts() -> dict[str, str]:
    return {target.title: target.verdict(DOCUMENT) for target in reversed(TARGETS)}


def test_a_row_has_medians_parts_ratios_and_rates() -> None:
    row = next(row for row in report.case_rows(DOCUMENT, "small-get") if row[0] == "Portico <http>")
    assert row == ("Portico <http>", "30.0 ±47%", "15.0 ±47%", "15.0 ±47%", "–", "1.32 ±6%", "500 ±0%", "250,000 ±0%")


def test_a_case_whose_samples_were_all_refused_says_why() -> None:
    row = next(row for row in report.case_rows(DOCUMENT, "download") if row[0] == "rathole")
    assert row[1] == "refused: the bytes are wrong"


def test_targets_are_met_missed_or_not_measured() -> None:
    found = verdicts()
    assert found["small GET, 64 connections: CPU of relay + agent"] == "met"
    assert found["the same against rathole's plain TCP tunnel"] == "missed by 6%"
    assert found["download: CPU of relay + agent"] == "missed by 7%"
    assert found["download: memory of the relay above idle"] == "met"
    assert found["download: memory of the agent above idle"] == "missed by 2%"
    assert found["added latency at 1 connection, p50"] == "met"  # 140 and 160 above direct
    assert found["first request after `portico http`"] == "not measured"


def test_limits_in_time_of_a_processor_are_also_judged_at_the_pace_of_the_machine_for_which_they_were_set() -> None:
    slow = document(
        small_get={
            "nginx": [get(26, 0)] * 3,
            "portico": [get(20, 20)] * 3,
            "portico-tls": [get(30, 30)] * 3,
        },
        download={"portico": [bulk(1.5, 1.5)]},
    ) | {"platform": {"grants": {"per_second": 300}}}
    found = {row[0]: row[2:] for row in reversed(report.target_rows(slow))}
    assert found["small GET, 64 connections: CPU of relay + agent"] == (
        "20.0 µs",
        "≤ 30.0 µs",
        "missed by 33% here, met at that pace",
    )
    assert found["small GET, TLS at the edge against plain"] == ("", "≤ 1.40 ×", "missed by 7%")
    assert found["download: CPU of relay + agent"] == ("1.50 s/GiB", "≤ 1.40 s/GiB", "missed by 114%")
    assert found["grants on one API process"] == ("600 /s", "≥ 500 /s", "missed by 40% here, met at that pace")
    fast = document(small_get={"nginx": [get(6.5, 0)] * 3, "portico": [get(10, 10)] * 3})
    assert {row[0]: row[-1] for row in reversed(report.target_rows(fast))}[
        TARGETS[0].title
    ] == "met here, not at that pace"
    assert "26.0 µs" in report.markdown(slow) and "at the pace" in report.markdown(slow)


def test_at_least_is_the_other_way_round() -> None:
    grants = next(target for target in TARGETS if target.least)
    assert grants.verdict(DOCUMENT | {"platform": {"grants": {"per_second": 600}}}) == "met"
    assert grants.verdict(DOCUMENT | {"platform": {"grants": {"per_second": 400}}}) == "missed by 20%"


def test_the_page_names_machine_commit_and_what_was_skipped() -> None:
    page = report.markdown(DOCUMENT)
    for text in ("2 cores (Some CPU)", "`abc`", "2026-01-02", "frp-http (frps and frpc are not on PATH)", "30.0 ±47%"):
        assert text in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    heads = [i for i, line in enumerate(tables) if line.startswith("| ---")]
    assert heads and all(tables[i].count("|") == tables[i - 1].count("|") for i in heads)


def test_the_page_says_when_the_machine_was_busy() -> None:
    about = DOCUMENT["about"]
    assert "busy" not in report.markdown(DOCUMENT)
    assert "busy with other work (load 7.5)" in report.markdown(DOCUMENT | {"about": about | {"load": 7.5}})


def test_the_terminal_has_every_case_and_no_empty_end() -> None:
    text = report.terminal(DOCUMENT)
    assert "small-get: small GET, 64 keep-alive connections" in text
    assert "SKIPPED" not in text and "frps and frpc are not on PATH" in text
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_the_chart_is_well_formed_and_its_bars_are_in_proportion() -> None:
    root = ET.fromstring(chart.chart(DOCUMENT))
    assert "Portico <http>" in "".join(root.itertext())
    bars = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("class") in ("ours", "others")]
    rathole, portico = float(bars[0].get("width", 0)), float(bars[1].get("width", 0))
    assert abs(portico / rathole - 30 / 22) < 0.01  # the median of rathole's two samples
    assert all(float(r.get("x", 0)) + float(r.get("width", 0)) <= chart.WIDTH - chart.VALUE + 0.1 for r in bars)
