"""Alerts: every figure, label and value that a rule asks about is there, and whoever is woken finds what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from portico.control import metrics as api_metrics
from portico.control.billing.report_states import SETTLEMENT
from portico.control.domains import incident_store, vault_store
from portico.kit.metrics import COMMON
from portico.relay import metrics as relay_metrics
from portico.worker import billing_figures
from portico.worker import metrics as worker_metrics

ROOT = Path(__file__).parents[2]
KNOWN = {
    metric.name: metric
    for metric in (*COMMON, *api_metrics.DECLARED, *relay_metrics.DECLARED, *worker_metrics.DECLARED)
}
#: Labels with a closed set of values.
VALUES = {
    ("portico_certificate_incidents", "status"): incident_store.STATUSES,
    ("portico_certificate_incidents", "tier"): ("1", "2", "3"),
    ("portico_certificate_replicas", "state"): vault_store.REPLICA_STATES,
    ("portico_relay_certificates", "state"): ("served", "staged", "refused", "behind"),
    ("portico_queue_depth", "state"): ("waiting", "later", "leased", "dead"),
    ("portico_report_exports", "state"): billing_figures.REPORT_STATES,
    ("portico_settlement_receipts", "state"): SETTLEMENT.states,
}


def rules() -> list[Any]:
    found = [
        pytest.param(rule, id=rule["alert"])
        for path in sorted((ROOT / "deploy/observability").glob("*.rules.yml"))
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]
    assert found
    return found


@pytest.mark.parametrize("rule", rules())
def test_a_rule_asks_about_what_there_is(rule: dict[str, Any]) -> None:
    selectors = re.findall(r"(portico_\w+)(?:\{([^}]*)\})?", rule["expr"])
    assert selectors
    for name, matchers in selectors:
        assert name in KNOWN, name
        for label, operator, value in re.findall(r"(\w+)(=~|=|!=)\"([^\"]*)\"", matchers):
            assert label in KNOWN[name].labels, (name, label)
            wanted = value.split("|") if operator == "=~" else [value]
            assert set(wanted) <= set(VALUES.get((name, label), wanted)), (name, label, value)
    labels = {label for name, _ in selectors for label in KNOWN[name].labels}
    grouped = re.search(r"by \(([^)]*)\)", rule["expr"])
    kept = set(grouped[1].split(", ")) if grouped else labels
    assert kept <= labels
    assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= kept
    assert (ROOT / rule["annotations"]["runbook"]).is_file()
    assert rule["labels"]["severity"] in ("warning", "critical") and re.fullmatch(r"\d+[mhd]", rule["for"])


#: What no rule about money may be missing for: each is a way in which money is wrong, or nobody knows whether it is.
WATCHED = {
    "portico_billing_webhooks_failed", "portico_billing_webhooks_stale", "portico_billing_webhooks_lag_seconds",
    "portico_billing_webhooks_dead", "portico_billing_waiting_oldest_seconds", "portico_billing_objective_age_seconds",
    "portico_billing_objective_broken_seconds", "portico_billing_count_age_seconds", "portico_report_exports",
    "portico_report_ack_mismatches", "portico_settlement_receipts",
}  # fmt: skip


def test_nothing_about_money_is_unwatched() -> None:
    text = (ROOT / "deploy/observability/billing.rules.yml").read_text()
    assert set(re.findall(r"portico_\w+", text)) >= WATCHED
    alerts = [rule.values[0]["alert"] for rule in rules()]
    assert len(set(alerts)) == len(alerts)


def test_whoever_is_woken_about_money_is_led_on() -> None:
    """Every runbook of a rule is in the index, and leads nowhere that is not there."""
    index = (ROOT / "docs/runbooks/index.md").read_text()
    for rule in rules():
        path = ROOT / rule.values[0]["annotations"]["runbook"]
        if path.parent.name == "runbooks" and path.name != "index.md":
            assert f"({path.name})" in index, path.name
            for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
                assert (path.parent / link).is_file(), (path.name, link)
