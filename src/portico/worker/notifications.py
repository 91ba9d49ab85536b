"""The worker `notifications`: delivers what is in the outbox, each driver's messages as a kind of their own."""

from __future__ import annotations

from typing import Any

from portico.control.notifications import mail, smtp
from portico.kit import outbox
from portico.kit.queue import Work
from portico.kit.sealing import Sealer
from portico.settings import WorkerSettings
from portico.worker.jobs import Context, Job

MAIL = outbox.kind(mail.DRIVER)


def jobs(settings: WorkerSettings) -> list[Job]:
    """One job kind for each driver."""
    ladder = settings.delivery_retry_seconds
    limits: dict[str, Any] = {
        "ladder": ladder,
        "max_attempts": len(ladder) + 1,
        "concurrency": settings.delivery_concurrency,
        "lane_places": settings.destination_concurrency,
        "group_places": max(1, settings.delivery_concurrency // 2),
    }
    return [Job(MAIL, deliver_mail, limits=limits)]


async def deliver_mail(context: Context, work: Work) -> None:
    """By SMTP; without a server for it, as a file that a person, or a browser test, opens."""
    server = smtp.configured(context.control)
    driver: outbox.Driver = outbox.FileDriver(context.settings.outbox_dir)
    if server is not None:
        driver = smtp.SmtpDriver(server, context.clock)
    await outbox.deliver(work, driver, Sealer(context.control.master_key))
