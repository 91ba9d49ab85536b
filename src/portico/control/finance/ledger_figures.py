"""Whether the books are what was written, for the metrics: as the last look at all of them in this process found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from portico.control.finance.verification import Outcome
from portico.kit.clock import Clock
from portico.kit.metrics import Metric, Sample

FAULTS: Final = Metric(
    "portico_ledger_faults", "gauge",
    "1 when the last look at the books found something that is not what was written, else 0. Alert on any that is not 0.",
)  # fmt: skip
TRANSACTIONS: Final = Metric(
    "portico_ledger_verified_transactions", "gauge", "Transactions of the ledger that the last look at the books read."
)
DECLARED: Final = (FAULTS, TRANSACTIONS)


@dataclass
class Figures:
    """What was found last in this process, shown until ``ends``: another process may have looked since."""

    outcome: Outcome | None = None
    clock: Clock | None = None
    ends: float = 0.0

    def found(self, outcome: Outcome, clock: Clock, seconds: float) -> None:
        """Keep it for some seconds."""
        self.outcome, self.clock, self.ends = outcome, clock, clock.monotonic() + seconds

    def samples(self) -> Iterator[Sample]:
        """The values, while they are fresh."""
        if self.outcome is None or self.clock is None or self.clock.monotonic() > self.ends:
            return
        yield FAULTS, (), int(self.outcome.fault is not None)
        yield TRANSACTIONS, (), self.outcome.transactions


#: Of this process.
FIGURES: Final = Figures()
