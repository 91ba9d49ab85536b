"""How settlements stand, for the metrics: read now and then, shown as long as it is fresh."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from portico.control.billing import settlement_store as store
from portico.control.billing.report_states import SETTLEMENT
from portico.control.billing.settlement_match import CLASSES
from portico.kit.clock import Clock
from portico.kit.db import Database
from portico.kit.metrics import Metric, Sample

RECEIPTS: Final = Metric(
    "portico_settlement_receipts", "gauge", "Settlement receipts of the installation, by state.", ("state",)
)
DELTA: Final = Metric(
    "portico_settlement_delta_minor", "gauge",
    "Theirs less ours in open deltas, in minor units, by currency. Alert on any that is not 0.", ("currency",),
)  # fmt: skip
BPS: Final = Metric(
    "portico_settlement_delta_bps", "gauge", "The greatest of them in ten-thousandths of our net.", ("currency",)
)
FINDINGS: Final = Metric(
    "portico_settlement_findings", "gauge", "Lines that differ in open deltas, by what is wrong with them.", ("found",)
)
DECLARED: Final = (RECEIPTS, DELTA, BPS, FINDINGS)
#: Seconds after which figures of this process are no news: another process has the job now.
_FRESH_SECONDS: Final = 900.0


@dataclass
class Figures:
    """What was read last in this process."""

    read_at: float | None = None
    states: dict[str, int] = field(default_factory=dict)
    deltas: list[Any] = field(default_factory=list)
    findings: dict[str, int] = field(default_factory=dict)
    clock: Clock | None = None

    async def refresh(self, db: Database, clock: Clock) -> None:
        """Read them."""
        async with db.read() as reader:
            self.states, self.deltas, self.findings = await store.figures(reader)
        self.read_at, self.clock = clock.monotonic(), clock

    def samples(self) -> Iterator[Sample]:
        """The values, while they are fresh."""
        if self.read_at is None or self.clock is None or self.clock.monotonic() - self.read_at > _FRESH_SECONDS:
            return
        for state in SETTLEMENT.states:
            yield RECEIPTS, (state,), self.states.get(state, 0)
        for row in self.deltas:
            yield DELTA, (row["currency"],), row["delta_minor"]
            yield BPS, (row["currency"],), row["delta_bps"] or 0
        for name in CLASSES:
            yield FINDINGS, (name,), self.findings.get(name, 0)


#: Of this process.
FIGURES: Final = Figures()
