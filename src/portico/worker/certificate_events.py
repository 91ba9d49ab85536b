"""Jobs of the worker `certificates` about events: what happened to certificates becomes the state of domains."""

from __future__ import annotations

from datetime import timedelta

from portico.control.domains import incidents, lifecycle, replay
from portico.control.domains.incidents import Incidents
from portico.control.domains.runbooks import RunbookDriver
from portico.kit import outbox, queue
from portico.kit.queue import Work
from portico.kit.sealing import Sealer
from portico.settings import WorkerSettings
from portico.worker import notifications
from portico.worker.jobs import Context, Job

CLEAR_EVENTS = queue.plain("certificates.clear_events")
REPLAY_DEAD = queue.plain("certificates.replay_dead")
WATCH = queue.plain("certificates.watch")


def jobs(settings: WorkerSettings) -> list[Job]:
    """Its jobs, each harmless when it runs twice."""
    applying = {
        "max_attempts": settings.cert_event_attempts,
        "backoff_seconds": settings.cert_event_retry_seconds,
        "backoff_max_seconds": settings.cert_event_retry_max_seconds,
        "prefetch": 32,
    }
    return [
        Job(lifecycle.KIND, apply_event, limits=applying),
        Job(CLEAR_EVENTS, clear_events, settings.clear_cert_events_seconds),
        Job(REPLAY_DEAD, replay_dead, settings.cert_auto_replay_seconds),
        Job(WATCH, watch, settings.cert_watch_seconds),
        Job(outbox.kind(incidents.RUNBOOK), deliver_runbook, limits=notifications.limits(settings)),
    ]


async def apply_event(context: Context, work: Work) -> None:
    """One event into the state of its domain, and what that means for incidents."""
    await lifecycle.apply(work, context.clock.wall(), _incidents(context).follow)


async def clear_events(context: Context, work: Work) -> None:
    """Events past their time."""
    await lifecycle.clear(context.db, context.clock.wall() - timedelta(seconds=context.control.cert_event_keep_seconds))


async def replay_dead(context: Context, work: Work) -> None:
    """Dead events that have another chance."""
    await replay.automatically(context.db, context.settings, context.clock.wall())


async def watch(context: Context, work: Work) -> None:
    """Incidents that only the clock changes."""
    await _incidents(context).watch(context.db)


async def deliver_runbook(context: Context, work: Work) -> None:
    """To the operator's automation."""
    driver = RunbookDriver(context.control, context.clock, notifications.client(context.control))
    await outbox.deliver(work, driver, Sealer(context.control.master_key))


def _incidents(context: Context) -> Incidents:
    return Incidents(context.control, Sealer(context.control.master_key), context.clock)
