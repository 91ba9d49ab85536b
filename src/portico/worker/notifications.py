"""The worker `notifications`: delivers what is in the outbox, each driver's messages as a kind of their own."""

from __future__ import annotations

from portico.kit import outbox
from portico.kit.queue import Work
from portico.kit.sealing import Sealer
from portico.settings import WorkerSettings
from portico.worker.jobs import Context, Job

FILE = outbox.kind("file")


def jobs(settings: WorkerSettings) -> list[Job]:
    """One job kind for each driver."""
    return [Job(FILE, to_files)]


async def to_files(context: Context, work: Work) -> None:
    """Development's driver: a message becomes a file that a person, or a browser test, opens."""
    driver = outbox.FileDriver(context.settings.outbox_dir)
    await outbox.deliver(work, driver, Sealer(context.control.master_key))
