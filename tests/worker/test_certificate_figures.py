"""How certificates are in the whole installation, as every worker of theirs shows it to Prometheus."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from pathlib import Path

import httpx

from portico.control.domains import incident_store, replicas, vault_store
from portico.control.domains.replicas import Rules
from portico.kit.clock import SystemClock
from portico.kit.db import Database
from portico.kit.ids import new_id
from portico.kit.sockets import bind_tcp
from portico.settings import ApiSettings, Secret, WorkerSettings
from portico.worker import runner
from portico.worker.jobs import Context
from tests.control.domains.certificates import Fleet, domain, store, worker_vault

RULES = Rules(lease_seconds=30, share=1, wait_seconds=0, stale_seconds=60)


async def incident(db: Database, domain_id: str, name: str, tier: int, status: str) -> None:
    now = datetime.now(UTC)
    row = {
        "id": new_id("cin"), "domain_id": domain_id, "organization_id": "org_x", "hostname": "x.example.com",
        "incident_class": name, "tier": tier, "status": status, "conditions": {}, "opened_at": now, "changed_at": now,
    }  # fmt: skip
    async with db.transaction() as tx:
        await incident_store.add(tx, row)


async def test_a_worker_shows_incidents_and_how_regions_stand(db: Database, tmp_path: Path) -> None:
    fleet = Fleet(db)
    await fleet.region("eu", "relay-eu")
    await fleet.region("us", "relay-us")
    made = await domain(db, "figures.example.com")
    await incident(db, made, "issuance", 2, "open")
    await incident(db, made, "expiry", 1, "acknowledged")
    await incident(db, made, "renewal", 3, "resolved")
    version = await store(db, worker_vault(tmp_path), made, "figures.example.com")
    said = replicas.Said(version.id, version.fingerprint, "staged")
    async with db.transaction() as tx:
        assert await replicas.acknowledge(tx, "relay-eu", [said], RULES) == [], "the other region has it not"

    settings = WorkerSettings(database_url=Secret(db.url), queue_count_seconds=0.1)
    control = ApiSettings(database_url=Secret(db.url), master_key=Secret("unused"))
    sock, stopping = bind_tcp("127.0.0.1", 0, what="metrics", option="metrics_port"), asyncio.Event()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}/metrics"
    jobs = runner.choose(settings, ["certificates.settle"])
    task = asyncio.create_task(runner.run(Context(settings, control, db, SystemClock()), jobs, stopping, sock))
    try:
        async with asyncio.timeout(60), httpx.AsyncClient(trust_env=False) as client:
            while "portico_certificate_replicas{" not in (text := await _scrape(client, url)):
                await asyncio.sleep(0.05)
    finally:
        stopping.set()
        await task
    assert 'portico_certificate_incidents{class="issuance",status="open",tier="2"} 1.0' in text
    assert 'portico_certificate_incidents{class="expiry",status="acknowledged",tier="1"} 1.0' in text
    assert 'class="renewal"' not in text
    for region, state in (("eu", "staged"), ("us", "pending")):
        for each in vault_store.REPLICA_STATES:
            line = f'portico_certificate_replicas{{region="{region}",state="{each}"}} {float(each == state)}'
            assert line in text, line
        lag = re.search(rf'portico_certificate_replica_lag_seconds{{region="{region}"}} ([\d.e-]+)', text)
        assert lag is not None and float(lag[1]) > 0, text
    assert "portico_certificate_count_age_seconds " in text


async def _scrape(client: httpx.AsyncClient, url: str) -> str:
    try:
        return (await client.get(url)).text
    except httpx.TransportError:
        return ""
