"""What a plan keeps for fewer days than the installation goes sooner, and only that of its organizations."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import httpx

from portico.control.audit import service as audit
from portico.control.identity import plans
from portico.control.tunnels import jobs
from portico.kit.db import Database
from portico.settings import ApiSettings
from tests.control.conftest import Account
from tests.control.edge.test_api import new_tunnel
from tests.control.identity.test_plans import move, operator

__all__ = ["operator"]


async def test_events(
    owner: Account, stranger: Account, operator: httpx.AsyncClient, db: Database, settings: ApiSettings
) -> None:
    await move(operator, owner.organization, "free", overrides={"events_days": 2})
    tunnels = [await new_tunnel(owner.client), await new_tunnel(stranger.client)]
    async with db.transaction() as tx:
        age = "UPDATE tunnel_events SET at = now() - interval '3 days' WHERE tunnel_id = ANY($1)"
        await tx.raw.execute(age, tunnels)
        await tx.raw.execute(
            "INSERT INTO tunnel_events (id, tunnel_id, kind, details) VALUES ('evt_' || $1, $1, 'started', '{}')",
            tunnels[0],
        )
    await jobs.housekeeping(db, settings)
    async with db.read() as reader:
        query = "SELECT tunnel_id, kind FROM tunnel_events WHERE tunnel_id = ANY($1)"
        left = {tuple(row) for row in await reader.raw.fetch(query, tunnels)}
    assert left == {(tunnels[0], "started"), (tunnels[1], "created")}


async def test_days_by_organization(
    owner: Account, stranger: Account, operator: httpx.AsyncClient, db: Database
) -> None:
    async def days(of: Account) -> list[int]:
        async with db.read() as reader:
            found = await plans.retention(reader, "audit_days")
        return [count for count, organizations in found.items() if of.organization in organizations]

    assert await days(owner) == []
    await move(operator, owner.organization, "pro")
    await move(operator, stranger.organization, "pro", overrides={"audit_days": 0})
    assert (await days(owner), await days(stranger)) == ([90], [1])  # never at once: who looks must find something
    await move(operator, stranger.organization, "pro", overrides={"audit_days": None})
    assert await days(stranger) == []


async def test_the_audit_log_of_one_plan_alone_is_trimmed(
    owner: Account, stranger: Account, app: Any, db: Database
) -> None:
    now = datetime.now(UTC)
    signer = app.state.signing_keys.current_signer
    assert await audit.trim(db, now, signer, now, [owner.organization]) > 0
    async with db.read() as reader:
        query = "SELECT count(*) FROM audit_events WHERE organization_id = $1"
        left = [await reader.raw.fetchval(query, who.organization) for who in (owner, stranger)]
    assert left[0] == 0 < left[1]
