"""How billing is in the whole installation, as every worker that watches it shows it to Prometheus."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta

import httpx
import sqlalchemy as sa

from portico.control.billing import export_store, exports, settlement_store, webhook_store
from portico.control.billing.exports import Wanted
from portico.kit.clock import SystemClock
from portico.kit.db import Database
from portico.kit.ids import new_id
from portico.kit.sealing import Sealer, new_master_key
from portico.kit.sockets import bind_tcp
from portico.settings import ApiSettings, Secret, WorkerSettings
from portico.worker import runner
from portico.worker.jobs import Context

NOW = datetime.now(UTC)
SEALER = Sealer(Secret(new_master_key()))


async def webhook(db: Database, provider: str, **more: object) -> None:
    number = new_id("evt")
    row = {
        "id": new_id("bwh"), "provider": provider, "account": "a", "livemode": False, "event_id": number, "event_type": "x",
        "occurred_at": NOW, "raw_sha256": number.encode(), "proven": True, "status": "verified", "lane": provider, **more,
    }  # fmt: skip
    async with db.transaction() as tx:
        await tx.execute(sa.insert(webhook_store.events).values(**row))


async def report(db: Database, state: str, **more: object) -> None:
    wanted = Wanted(None, "usage", "csv", NOW - timedelta(days=1), NOW, {"kind": "download"})
    row = exports.new_row(SEALER, wanted, "test", NOW)
    async with db.transaction() as tx:
        await export_store.add(tx, row)
        await export_store.update(tx, row["id"], **{"state": state, "queue_state": "done", **more})


async def receipt(db: Database, state: str, **more: object) -> None:
    made = new_id("stl")
    row = {
        "id": made, "origin": "import:stripe:a", "message_id": made, "batch_id": made, "revision": 1, "issued_at": NOW,
        "body_digest": b"1", "sealed_body": b"1", "provider": "stripe", "account": "a", "livemode": True,
        "period_start": NOW - timedelta(days=1), "period_end": NOW, "state": state, "queue_state": "done", **more,
    }  # fmt: skip
    async with db.transaction() as tx:
        await tx.execute(sa.insert(settlement_store.receipts).values(**row))


async def test_a_worker_shows_what_is_wrong_with_money(db: Database) -> None:
    for _ in range(2):
        await webhook(db, "stripe", queue_state="dead", finished_at=NOW, last_error="x")
    await webhook(db, "paypal", queued_at=NOW - timedelta(hours=1), available_at=NOW + timedelta(hours=1))
    done = {"status": "applied", "queue_state": "done", "queued_at": NOW - timedelta(seconds=4), "finished_at": NOW}
    await webhook(db, "razorpay", **done)
    await report(db, "failed")
    await report(db, "failed", created_at=NOW - timedelta(days=8))
    await report(db, "delivering", file="f", ack_mismatches=2)
    await report(db, "expired", ack_mismatches=5)
    # Of two that cancel out each is off all the same; no sum of them is too large.
    for delta in (8 * 10**18, 8 * 10**18, -(10**18)):
        await receipt(db, "delta", deltas={"EUR": {"delta_minor": delta, "delta_bps": -3}}, findings={"missing": 2})
    await receipt(db, "failed")

    settings = WorkerSettings(
        database_url=Secret(db.url), queue_count_seconds=0.1, billing_webhook_auto_replay_limit=0,
        billing_webhook_slo_failures=2, billing_webhook_watch_seconds=0.2,
    )  # fmt: skip
    control = ApiSettings(database_url=Secret(db.url), master_key=Secret("unused"))
    sock, stopping = bind_tcp("127.0.0.1", 0, what="metrics", option="metrics_port"), asyncio.Event()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}/metrics"
    jobs = runner.choose(settings, ["billing.watch_webhooks"])
    broken = 'billing_objective_broken_seconds{provider="stripe"}'
    task = asyncio.create_task(runner.run(Context(settings, control, db, SystemClock()), jobs, stopping, sock))
    try:
        async with asyncio.timeout(60), httpx.AsyncClient(trust_env=False) as client:
            text = ""
            while not (value(text, broken) and value(text, 'billing_webhooks_stale{provider="paypal"}')):
                text = await _scrape(client, url)
                await asyncio.sleep(0.05)
    finally:
        stopping.set()
        await task
    wanted = {
        'billing_webhooks_failed{provider="stripe"}': 2, 'billing_webhooks_dead{provider="stripe"}': 2,
        'billing_webhooks_dead{provider="paypal"}': 0, 'billing_webhooks_stale{provider="paypal"}': 1,
        'billing_objective_broken_seconds{provider="razorpay"}': 0, 'billing_webhooks_lag_seconds{provider="stripe"}': None,
        'billing_webhooks_lag_seconds{provider="razorpay"}': 4,
        'report_exports{state="failed"}': 1, 'report_exports{state="delivering"}': 1,
        'report_exports{state="queued"}': 0, "report_ack_mismatches": 2, 'settlement_receipts{state="delta"}': 3,
        'settlement_receipts{state="failed"}': 1, 'settlement_receipts{state="matched"}': 0,
        'settlement_delta_minor{currency="EUR"}': 1.5e19, 'settlement_delta_bps{currency="EUR"}': 3,
        'settlement_findings{found="missing"}': 6,
    }  # fmt: skip
    assert {name: value(text, name) for name in wanted} == wanted
    looked = value(text, 'objective_age_seconds{provider="stripe"}')
    assert looked is not None and 0 <= looked < 60
    assert value(text, "billing_count_age_seconds") is not None


def value(text: str, name: str) -> float | None:
    """What a scrape says of a sample."""
    found = re.search(rf"^portico_(?:billing_)?{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return None if found is None else float(found[1])


async def _scrape(client: httpx.AsyncClient, url: str) -> str:
    try:
        return (await client.get(url)).text
    except httpx.TransportError:
        return ""
