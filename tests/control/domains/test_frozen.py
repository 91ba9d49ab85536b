"""Domains beyond a smaller plan: the newest are served to nobody until there is room, and stay their organization's."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from portico.control.domains import acme_schedule, frozen, store
from portico.control.domains.acme_cas import Ca
from tests.control.conftest import Account
from tests.control.domains.test_domains import fresh, set_status
from tests.control.domains.test_routes import good, now, route, told, tunnel
from tests.control.identity.test_plans import move, operator
from tests.control.test_http import problem

__all__ = ["operator"]


async def standing(account: Account) -> list[str | None]:
    rows = (await account.client.get("/v1/domains")).json()["data"]
    return [row["frozen"] for row in rows]


async def fit(operator: httpx.AsyncClient, account: Account, most: int | None) -> None:
    await move(operator, account.organization, "pro", overrides={"custom_domains": most})


async def test_the_newest_are_frozen_and_thaw_in_order(app: Any, owner: Account, operator: httpx.AsyncClient) -> None:
    made = await tunnel(owner.client)
    domains = [await good(app, owner) for _ in range(4)]
    for each in domains[1:]:
        await route(owner, each, made["id"])
    since = await now(app)
    await fit(operator, owner, 2)
    assert await standing(owner) == [None, None, "custom_domains", "custom_domains"]
    await fit(operator, owner, 2)  # decided again, the same follows
    found = await told(app, since)
    closed = [{"id": each["id"], "host": each["name"], "code": "edge.domain_frozen"} for each in domains[2:]]
    assert found == [
        change
        for each in closed
        for change in ({"kind": "domain_removed", "id": each["id"]}, {"kind": "domain_closed", "domain": each})
    ]
    state = await app.state.edge_states.read()
    assert [row for row in state.closed_domains if row["id"] in {each["id"] for each in domains}] == closed
    assert {row["id"] for row in state.domains} & {each["id"] for each in domains} == {domains[1]["id"]}
    assert (await owner.client.get(f"/v1/tunnels/{made['id']}")).json()["domains"] == [domains[1]["name"]]
    problem(await route(owner, domains[3], made["id"]), 403, "domain.frozen")
    problem(await owner.client.post("/v1/domains", json={"name": fresh()}), 403, "quota.exceeded")
    since = await now(app)
    assert (await owner.client.delete(f"/v1/domains/{domains[0]['id']}")).status_code == 204
    assert await standing(owner) == [None, None, "custom_domains"]
    await fit(operator, owner, None)
    assert await standing(owner) == [None] * 3
    assert [(change["kind"], change["domain"]["id"]) for change in await told(app, since)] == [
        ("domain", domains[2]["id"]), ("domain", domains[3]["id"]),
    ]  # fmt: skip
    rows = (await owner.client.get("/v1/audit", params={"target": domains[3]["id"]})).json()["data"]
    assert [row["action"] for row in rows][:2] == ["domain.thaw", "domain.freeze"]


async def test_what_is_lost_makes_room(app: Any, owner: Account, operator: httpx.AsyncClient) -> None:
    domains = [await good(app, owner) for _ in range(2)]
    await fit(operator, owner, 1)
    await set_status(app, domains[0]["id"], "deleted")
    await frozen.thaw(app.state.db)
    assert await standing(owner) == [None, None]


async def test_nothing_is_ordered_for_one(app: Any, owner: Account, operator: httpx.AsyncClient) -> None:
    domains = [await good(app, owner) for _ in range(2)]
    await fit(operator, owner, 1)
    cas = [Ca("https://ca.example.com/dir", None, None, None)]
    await acme_schedule.sweep(app.state.db, app.state.settings, cas)
    async with app.state.db.read() as reader:
        rows = await reader.raw.fetch(
            "SELECT domain_id FROM certificate_orders WHERE organization_id = $1", owner.organization
        )
    assert [row["domain_id"] for row in rows] == [domains[0]["id"]]


async def test_removals_and_plans_at_once_leave_what_the_plan_says(
    app: Any, owner: Account, operator: httpx.AsyncClient
) -> None:
    domains = [await good(app, owner) for _ in range(6)]
    await asyncio.gather(
        *(owner.client.delete(f"/v1/domains/{each['id']}") for each in domains[:3]),
        *(fit(operator, owner, most) for most in (1, 5, 2)),
    )
    await fit(operator, owner, 2)
    assert await standing(owner) == [None, None, "custom_domains"]
    async with app.state.db.read() as reader:
        assert await store.count(reader, owner.organization) == 3
