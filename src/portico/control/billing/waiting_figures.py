"""How many events of providers wait for what they are about, for the metrics: read now and then, shown as long as it is fresh."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from portico.control.billing import billing_store
from portico.control.billing.provider import NAMES
from portico.kit.clock import Clock
from portico.kit.db import Database
from portico.kit.metrics import Metric, Sample

WAITING: Final = Metric(
    "portico_billing_waiting_events", "gauge",
    "Effects of providers' events that wait for their base: whose they are, or the payment that they change.", ("provider",),
)  # fmt: skip
OLDEST: Final = Metric(
    "portico_billing_waiting_oldest_seconds",
    "gauge",
    "For how long the oldest of them has waited; 0 for none.",
    ("provider",),
)
DECLARED: Final = (WAITING, OLDEST)
#: Seconds after which figures of this process are no news: another process has the job now.
_FRESH_SECONDS: Final = 900.0


@dataclass
class Figures:
    """What was read last in this process."""

    read_at: float | None = None
    found: dict[str, Any] = field(default_factory=dict)
    clock: Clock | None = None

    async def refresh(self, db: Database, clock: Clock) -> None:
        """Read them."""
        async with db.read() as reader:
            self.found = {row["provider"]: row for row in await billing_store.waiting_count(reader)}
        self.read_at, self.clock = clock.monotonic(), clock

    def samples(self) -> Iterator[Sample]:
        """The values, while they are fresh."""
        if self.read_at is None or self.clock is None or self.clock.monotonic() - self.read_at > _FRESH_SECONDS:
            return
        for name in NAMES:
            row = self.found.get(name)
            yield WAITING, (name,), row["count"] if row is not None else 0
            yield OLDEST, (name,), row["seconds"] if row is not None else 0.0


#: Of this process.
FIGURES: Final = Figures()
