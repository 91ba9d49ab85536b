"""How billing is in the whole installation, counted every so often for metrics: providers' events, reports, settlements."""

from __future__ import annotations

from collections.abc import Iterator

from portico.control.billing import figures
from portico.control.billing.figures import Figures, Provider
from portico.control.billing.provider import NAMES
from portico.control.billing.report_states import EXPORT, SETTLEMENT
from portico.control.billing.settlement_match import CLASSES
from portico.kit.db import Database
from portico.kit.metrics import Metric, Sample
from portico.worker.counted import Counted

FAILED = Metric(
    "portico_billing_webhooks_failed", "gauge",
    "Events of a provider that failed and are tried again, or died within the window of its objective, when that was last looked "
    "at.", ("provider",),
)  # fmt: skip
STALE = Metric(
    "portico_billing_webhooks_stale", "gauge", "Of these and all others, those that wait for longer than the objective has it.",
    ("provider",),
)  # fmt: skip
P95 = Metric(
    "portico_billing_webhooks_lag_seconds", "gauge",
    "From receipt to effect, of 95 in 100 events in that window; no value when it has none.", ("provider",),
)  # fmt: skip
BROKEN = Metric(
    "portico_billing_objective_broken_seconds", "gauge",
    "For how long the objective of a provider's events has been broken; 0 while it is met.", ("provider",),
)  # fmt: skip
LOOKED = Metric(
    "portico_billing_objective_age_seconds", "gauge", "How long ago the objective was looked at.", ("provider",)
)
DEAD = Metric(
    "portico_billing_webhooks_dead",
    "gauge",
    "Events that nobody tries any more, until they are replayed.",
    ("provider",),
)
WAITING = Metric(
    "portico_billing_waiting_events", "gauge",
    "Effects of providers' events that wait for their base: whose they are, or the payment that they change.", ("provider",),
)  # fmt: skip
OLDEST = Metric(
    "portico_billing_waiting_oldest_seconds",
    "gauge",
    "For how long the oldest of them has waited; 0 for none.",
    ("provider",),
)
REPORTS = Metric(
    "portico_report_exports",
    "gauge",
    "Reports that are on their way, or failed in the last seven days, by state.",
    ("state",),
)
MISMATCHES = Metric(
    "portico_report_ack_mismatches", "gauge", "Acknowledgements with another hash, of reports that are kept."
)
RECEIPTS = Metric(
    "portico_settlement_receipts", "gauge", "Settlement receipts of the installation, by state.", ("state",)
)
DELTA = Metric(
    "portico_settlement_delta_minor", "gauge",
    "Theirs less ours in open deltas, in minor units, added up by currency. Two may cancel out: alert on receipts in the state "
    "`delta`.", ("currency",),
)  # fmt: skip
BPS = Metric(
    "portico_settlement_delta_bps", "gauge", "The greatest of them in ten-thousandths of our net.", ("currency",)
)
FINDINGS = Metric(
    "portico_settlement_findings", "gauge", "Lines that differ in open deltas, by what is wrong with them.", ("found",)
)
COUNTED = Metric(
    "portico_billing_count_age_seconds", "gauge", "How old these counts are; they stay when the database is away."
)
DECLARED: tuple[Metric, ...] = (
    FAILED, STALE, P95, BROKEN, LOOKED, DEAD, WAITING, OLDEST, REPORTS, MISMATCHES, RECEIPTS, DELTA, BPS, FINDINGS, COUNTED,
)  # fmt: skip
#: Reports that are over are no figure.
REPORT_STATES = tuple(state for state in EXPORT.states if state not in ("delivered", "acked", "expired"))


class BillingFigures(Counted):
    """One per process that watches the objectives of billing."""

    what = "billing"

    def __init__(self, db: Database, every_seconds: float) -> None:
        super().__init__(db, every_seconds)
        self._found = Figures()

    async def look(self) -> None:
        self._found = await figures.count(self.db)

    def samples(self, age_seconds: float) -> Iterator[Sample]:
        found = self._found
        for name, fares in found.providers.items():
            yield from _provider(name, fares, age_seconds)
        for provider in NAMES:
            count, seconds = found.waiting.get(provider, (0, 0.0))
            yield WAITING, (provider,), count
            yield OLDEST, (provider,), seconds
        for state in REPORT_STATES:
            yield REPORTS, (state,), found.reports.get(state, 0)
        yield MISMATCHES, (), found.ack_mismatches
        for state in SETTLEMENT.states:
            yield RECEIPTS, (state,), found.receipts.get(state, 0)
        for currency, delta, bps in found.deltas:
            yield DELTA, (currency,), delta
            yield BPS, (currency,), bps
        for wrong in CLASSES:
            yield FINDINGS, (wrong,), found.findings.get(wrong, 0)
        yield COUNTED, (), age_seconds


def _provider(provider: str, fares: Provider, age_seconds: float) -> Iterator[Sample]:
    labels = (provider,)
    yield FAILED, labels, fares.failed
    yield STALE, labels, fares.stale
    if fares.p95_seconds is not None:
        yield P95, labels, fares.p95_seconds
    yield BROKEN, labels, fares.broken_seconds
    yield LOOKED, labels, fares.age_seconds + age_seconds
    yield DEAD, labels, fares.dead
