"""Worker and API are cut off at every statement of sealing, switching and wrapping anew: never half of anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from portico.control.domains import replicas
from portico.control.domains.replicas import Rules, Said
from portico.kit.db import Database, PoolLimits
from portico.kit.queue_runner import FAILURES
from tests.control.domains.certificates import Fleet, domain, rows, store, worker_vault
from tests.worker.statement_proxy import StatementProxy

RULES = Rules(lease_seconds=3600, share=1.0, wait_seconds=60, stale_seconds=30)
#: More round trips than any of the three takes; what is beyond them ends undisturbed.
ROUND_TRIPS = 70


async def state(db: Database, domain_id: str) -> tuple[Any, ...]:
    """Everything that the parts of a domain say about which version serves: they have to agree."""
    head = await rows(
        db, "SELECT active_id, staged_id, last_version FROM certificate_heads WHERE domain_id = $1", domain_id
    )
    active, staged, last = head[0] if head else (None, None, 0)
    versions = await rows(
        db, "SELECT id, state, version, sealed FROM certificate_versions WHERE domain_id = $1", domain_id
    )
    by_state = {name: [row["id"] for row in versions if row["state"] == name] for name in ("active", "staging")}
    assert by_state["active"] == ([active] if active else []) and by_state["staging"] == ([staged] if staged else [])
    for row in versions:
        assert (row["sealed"] is not None) == (row["id"] in (active, staged))
        wraps = await rows(db, "SELECT region FROM certificate_wraps WHERE certificate_id = $1", row["id"])
        assert len(wraps) in ((0,) if row["sealed"] is None else (1, 2))
    told = [
        change["certificate"]
        for line in await rows(db, "SELECT payload::text FROM edge_changes ORDER BY version")
        for change in json.loads(line["payload"])
        if change["kind"] == "certificate" and change["certificate"]["domain"] == domain_id
    ]
    last_told = told[-1] if told else {}
    assert (last_told.get("active") or {}).get("id") == active and (last_told.get("staged") or {}).get("id") == staged
    events = await rows(
        db,
        "SELECT revision FROM certificate_lifecycle_events WHERE domain_id = $1 AND event_type = 'cert.deployed'",
        domain_id,
    )
    serving = {row["version"] for row in versions if row["state"] in ("active", "retired")}
    assert sorted(row["revision"] for row in events) == sorted(serving)
    return active, staged, last


@pytest.mark.parametrize("after", [False, True])
async def test_cut_off_at_every_statement(db: Database, database_url: str, tmp_path: Path, after: bool) -> None:
    fleet, sealer = Fleet(db), worker_vault(tmp_path)
    async with db.transaction() as tx:
        for table in ("certificate_region_keys", "relays"):
            await tx.raw.execute(f"DELETE FROM {table}")
    await fleet.region("eu", "eu-1")
    reached, name = set(), f"cut-{after}.example.com".lower()
    mine = await domain(db, name)
    first = await store(db, sealer, mine, name)
    async with db.transaction() as tx:
        assert await replicas.acknowledge(tx, "eu-1", [Said(first.id, first.fingerprint, "staged")], RULES) == [mine]
    before = await state(db, mine)
    for at in range(1, ROUND_TRIPS + 1):
        proxy = await StatementProxy(database_url, tmp_path, at=at, after=after).start()
        cut = Database(proxy.url, PoolLimits(size=1, connect_timeout_seconds=5))
        step = "seal"
        try:
            version = await store(cut, sealer, mine, name)
            step = "switch"
            async with cut.transaction() as tx:
                await replicas.acknowledge(tx, "eu-1", [Said(version.id, version.fingerprint, "staged")], RULES)
            step = "done"
        except FAILURES:
            reached.add(step)
        finally:
            await cut.close()
            await proxy.close()
        now = await state(db, mine)
        assert now[0] is not None  # something serves at every moment
        assert now[2] >= before[2]
        before = now
        # Whoever looks next goes on from there.
        await replicas.sweep(db, RULES)
        await state(db, mine)
    assert {"seal", "switch"} <= reached, reached
    last = await store(db, sealer, mine, name)
    async with db.transaction() as tx:
        assert await replicas.acknowledge(tx, "eu-1", [Said(last.id, last.fingerprint, "staged")], RULES) == [mine]
    assert (await state(db, mine))[0] == last.id


async def test_wrapping_anew_goes_on_where_it_was_cut_off(db: Database, database_url: str, tmp_path: Path) -> None:
    fleet, sealer = Fleet(db), worker_vault(tmp_path)
    names = [f"wrap-{number}.example.com" for number in range(3)]
    for name in names:
        await store(db, sealer, await domain(db, name), name)
    await fleet.region("later")
    fired = 0
    for at in range(1, 9):
        proxy = await StatementProxy(database_url, tmp_path, at=at, after=at % 2 == 0).start()
        cut = Database(proxy.url, PoolLimits(size=1, connect_timeout_seconds=5))
        try:
            await sealer.rewrap(cut)
        except FAILURES:
            fired += 1
        finally:
            await cut.close()
            await proxy.close()
        found = await rows(db, "SELECT certificate_id FROM certificate_wraps WHERE region = 'later'")
        assert len(found) == len({row["certificate_id"] for row in found})
    assert fired
    await sealer.rewrap(db)
    missing = """
        SELECT 1 FROM certificate_versions v WHERE hostname LIKE 'wrap-%' AND NOT EXISTS (
            SELECT 1 FROM certificate_wraps w WHERE w.certificate_id = v.id AND w.region = 'later')
    """
    assert not await rows(db, missing)
