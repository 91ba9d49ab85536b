"""What a worker is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from portico.kit.clock import Clock
from portico.kit.db import Database
from portico.kit.queue import Kind, Limits, Work
from portico.kit.queue_runner import Handler
from portico.settings import ApiSettings, WorkerSettings


@dataclass(frozen=True, slots=True)
class Context:
    """What a job works with. ``control`` is the API's settings: how long things live is said once, there."""

    settings: WorkerSettings
    control: ApiSettings
    db: Database
    clock: Clock


@dataclass(frozen=True, slots=True)
class Job:
    """A kind of jobs as a worker runs it.

    ``run`` does one of them: see :class:`portico.kit.queue.Work` for what it may rely on. ``every_seconds`` puts one in on a
    schedule (a kind of ``queue.plain``). ``limits`` are fields of :class:`Limits` in which it differs from the settings.
    """

    kind: Kind
    run: Callable[[Context, Work], Awaitable[None]]
    every_seconds: float | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)

    def handler(self, context: Context) -> Handler:
        return lambda work: self.run(context, work)

    def limited(self, settings: WorkerSettings) -> Limits:
        """Its limits under ``settings``."""
        common = Limits(
            concurrency=settings.queue_concurrency,
            lease_seconds=settings.queue_lease_seconds,
            timeout_seconds=settings.queue_timeout_seconds,
            max_attempts=settings.queue_max_attempts,
            backoff_seconds=settings.retry_min_seconds,
            backoff_max_seconds=settings.retry_max_seconds,
        )
        return dataclasses.replace(common, **self.limits)
