"""How certificates are in the whole installation, counted every so often for metrics: incidents, and replicas by region."""

from __future__ import annotations

from collections.abc import Iterator

from portico.control.domains import figures
from portico.control.domains.figures import Figures
from portico.kit.db import Database
from portico.kit.metrics import Metric, Sample
from portico.worker.counted import Counted

INCIDENTS = Metric(
    "portico_certificate_incidents", "gauge",
    "Incidents of certificates that are not resolved, of the whole installation; tier 1 is the worst.",
    ("class", "tier", "status"),
)  # fmt: skip
REPLICAS = Metric(
    "portico_certificate_replicas", "gauge",
    "Versions of certificates that serve, or are about to, by region and how they stand there.", ("region", "state"),
)  # fmt: skip
LAG = Metric(
    "portico_certificate_replica_lag_seconds", "gauge",
    "For how long the region has been behind with the version that it is behind with the longest; 0 for none.", ("region",),
)  # fmt: skip
COUNTED = Metric(
    "portico_certificate_count_age_seconds", "gauge", "How old these counts are; they stay when the database is away.",
)  # fmt: skip

DECLARED: tuple[Metric, ...] = (INCIDENTS, REPLICAS, LAG, COUNTED)


class CertificateFigures(Counted):
    """One per process that runs the worker `certificates`."""

    what = "certificates"

    def __init__(self, db: Database, every_seconds: float) -> None:
        super().__init__(db, every_seconds)
        self._found = Figures()

    async def look(self) -> None:
        self._found = await figures.count(self.db)

    def samples(self, age_seconds: float) -> Iterator[Sample]:
        for (name, tier, status), count in sorted(self._found.incidents.items()):
            yield INCIDENTS, (name, str(tier), status), count
        replicas = self._found.replicas
        for region in sorted({region for region, _ in replicas}):
            found = {state: replicas.get((region, state), (0, 0.0)) for state in figures.STATES}
            for state, (count, _) in found.items():
                yield REPLICAS, (region, state), count
            yield LAG, (region,), max(lag for _, lag in found.values())
        yield COUNTED, (), age_seconds
