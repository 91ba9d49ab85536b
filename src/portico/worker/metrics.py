"""The workers' metrics: which of them lead here, and how their jobs go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from portico.kit.metrics import Metric, Sample

if TYPE_CHECKING:
    from portico.worker.runner import Runner

LEADS = Metric("portico_worker_leads", "gauge", "1 while this process leads the worker and runs its jobs.", ("worker",))
RUNS = Metric("portico_worker_runs_total", "counter", "Runs of a job, by how they ended.", ("job", "outcome"))
SECONDS = Metric("portico_worker_run_seconds_total", "counter", "Time that the runs of a job took.", ("job",))
FAILING = Metric("portico_worker_failures_in_a_row", "gauge", "Failed runs of a job since it last succeeded.", ("job",))

DECLARED: tuple[Metric, ...] = (LEADS, RUNS, SECONDS, FAILING)


def read(runners: Sequence[Runner]) -> Iterator[Sample]:
    """The values of this moment."""
    for runner in runners:
        yield LEADS, (runner.name,), float(runner.leads)
        for job, (succeeded, failed, seconds) in runner.runs.items():
            yield RUNS, (job, "succeeded"), succeeded
            yield RUNS, (job, "failed"), failed
            yield SECONDS, (job,), seconds
            yield FAILING, (job,), runner.failures[job]
