"""The worker that looks at the books: what it finds, and what the metrics say of it."""

from __future__ import annotations

import logging

import pytest

from portico.control.finance.ledger_figures import FIGURES
from portico.kit.clock import SystemClock
from portico.kit.db import Database
from portico.settings import ApiSettings, Secret, WorkerSettings
from portico.worker import billing_ledger, metrics
from portico.worker.jobs import Context
from tests.control.finance.making import apply, event, organization


def shown() -> dict[str, float]:
    return {metric.name: value for metric, _, value in metrics.read([]) if metric.name.startswith("portico_ledger")}


async def test_a_fault_is_told_until_it_is_mended(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    org = organization()
    facts = {"organization_id": org, "account": org, "invoice_ref": org}
    await apply(db, event("invoice.issued", amount_minor=1190, tax_minor=190, **facts))
    await apply(db, event("payment.succeeded", amount_minor=1190, payment_ref=org, **facts))
    settings = WorkerSettings(database_url=Secret(db.url))
    context = Context(
        settings, ApiSettings(database_url=Secret(db.url), master_key=Secret("unused")), db, SystemClock()
    )

    async def damage(times: str) -> None:
        async with db.transaction() as tx:
            await tx.raw.execute("SET LOCAL session_replication_role = replica")
            await tx.raw.execute(f"UPDATE ledger_postings SET amount_minor = amount_minor {times} 2")

    (job,) = [each for each in billing_ledger.jobs(settings) if each.kind.name == "billing.verify_ledger"]
    assert job.limited(settings).timeout_seconds == settings.verify_ledger_timeout_seconds
    try:
        await job.run(context, None)  # type: ignore[arg-type]
        assert shown() == {"portico_ledger_faults": 0, "portico_ledger_verified_transactions": 2}
        await damage("*")
        with caplog.at_level(logging.ERROR):
            await job.run(context, None)  # type: ignore[arg-type]
        assert shown()["portico_ledger_faults"] == 1
        assert "the books are not what was written" in caplog.text
        await damage("/")
        await job.run(context, None)  # type: ignore[arg-type]
        assert shown()["portico_ledger_faults"] == 0
    finally:
        FIGURES.outcome = None
