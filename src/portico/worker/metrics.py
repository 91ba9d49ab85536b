"""The workers' metrics: what became of jobs here, and how long the queues are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from portico.control.finance import ledger_figures
from portico.kit.metrics import Metric, Sample
from portico.kit.queue_runner import KindRunner
from portico.worker import billing_figures, certificate_figures
from portico.worker.counted import Counted

JOBS = Metric(
    "portico_queue_jobs_total", "counter",
    "Jobs that this process had in hand, by how they ended: succeeded, failed (tried again), dead, lost (to another process), "
    "given_back (at its end).", ("kind", "outcome"),
)  # fmt: skip
SECONDS = Metric("portico_queue_job_seconds", "histogram", "How long this process had jobs in hand.", ("kind",))
DEPTH = Metric(
    "portico_queue_depth", "gauge",
    "Jobs of the whole queue: waiting (due), later (not due yet), leased (in hand somewhere), dead.", ("kind", "state"),
)  # fmt: skip
OLDEST = Metric("portico_queue_oldest_seconds", "gauge", "How late the oldest due job is; 0 for none.", ("kind",))

DECLARED: tuple[Metric, ...] = (
    JOBS, SECONDS, DEPTH, OLDEST, *certificate_figures.DECLARED, *billing_figures.DECLARED, *ledger_figures.DECLARED,
)  # fmt: skip


def read(runners: Sequence[KindRunner], counted: Sequence[Counted] = ()) -> Iterator[Sample]:
    """The values of this moment; those of whole queues, and what else is counted, are as old as their last count."""
    for figures in counted:
        yield from figures.read()
    for runner in runners:
        kind = runner.kind.name
        for outcome, count in runner.outcomes.items():
            yield JOBS, (kind, outcome), count
        yield SECONDS, (kind,), runner.seconds
        if (counts := runner.counts) is not None:
            for state in ("waiting", "later", "leased", "dead"):
                yield DEPTH, (kind, state), getattr(counts, state)
            yield OLDEST, (kind,), counts.oldest_seconds
    yield from ledger_figures.FIGURES.samples()
