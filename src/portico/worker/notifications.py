"""The worker `notifications`: delivers what is in the outbox, each driver's messages as a kind of their own.

    outbox.mail      by SMTP; without a server for it, into a folder
    outbox.webhook   to an organization's webhooks, signed
    outbox.slack     to incoming webhooks of Slack

Organizations and their receivers take turns (``kit/queue_turns.py``); what fails is tried again for three days.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from portico.control.domains import runbooks
from portico.control.identity import facts
from portico.control.notifications import mail, reach, smtp
from portico.control.notifications.outgoing import ChannelDriver, ChannelMail, Health
from portico.kit import outbox
from portico.kit.outbound import Client
from portico.kit.queue import Work
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings, WorkerSettings
from portico.worker.jobs import Context, Job

MAIL, WEBHOOK, SLACK = (outbox.kind(driver) for driver in (mail.DRIVER, "webhook", "slack"))


def jobs(settings: WorkerSettings) -> list[Job]:
    """One job kind for each driver."""
    kept = limits(settings)
    return [Job(MAIL, deliver_mail, limits=kept), *(Job(kind, deliver, limits=kept) for kind in (WEBHOOK, SLACK))]


def limits(settings: WorkerSettings) -> dict[str, Any]:
    """How messages are delivered, whichever way out it is."""
    ladder = settings.delivery_retry_seconds
    return {
        "ladder": ladder,
        "max_attempts": len(ladder) + 1,
        "concurrency": settings.delivery_concurrency,
        "lane_places": settings.destination_concurrency,
        "group_places": max(1, settings.delivery_concurrency // 2),
    }


async def deliver_mail(context: Context, work: Work) -> None:
    """By SMTP; without a server for it, as a file that a person, or a browser test, opens."""
    server = _server(context.control)
    driver: outbox.Driver = outbox.FileDriver(context.settings.outbox_dir)
    if server is not None:
        driver = smtp.SmtpDriver(server, context.clock)
    await _deliver(context, work, ChannelMail(context.db, Sealer(context.control.master_key), driver))


async def deliver(context: Context, work: Work) -> None:
    """To where the message's channel leads at this moment."""
    sealer = Sealer(context.control.master_key)
    to, hosts = client(context.control), context.control.slack_hosts
    await _deliver(context, work, ChannelDriver(context.db, context.clock, sealer, to, hosts))


async def _deliver(context: Context, work: Work, driver: outbox.Driver) -> None:
    sealer = Sealer(context.control.master_key)
    health = Health(context.control, sealer, facts.owner_addresses)
    await outbox.deliver(work, driver, sealer, health.record)


# Settings do not change while a process lives, and reading certificates takes a while.
@functools.lru_cache(maxsize=8)
def client(settings: ApiSettings) -> Client:
    """The client for addresses that people name; raises ``config.invalid``."""
    return reach.client_of(settings)


@functools.lru_cache(maxsize=8)
def _server(settings: ApiSettings) -> smtp.Server | None:
    return smtp.configured(settings)


def check(settings: ApiSettings) -> Sequence[object]:
    """Look at the settings of the ways out when the worker starts, not at the first message; raises ``config.invalid``."""
    runbooks.check(settings)
    return client(settings), _server(settings)
