"""Domains lead to tunnels: by route, by an agent that names one, and relays are told of each step in order."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from portico.control import changes
from portico.control.domains import failure_policy, lifecycle, store
from portico.control.domains.lifecycle import NewEvent
from tests.control.conftest import Account
from tests.control.domains.sending import apply_all
from tests.control.domains.test_domains import add, fresh, set_status
from tests.control.test_http import problem


async def good(app: Any, account: Account, **more: Any) -> dict[str, Any]:
    """A domain that is its owner's."""
    made = await add(account, fresh(), **more)
    await set_status(app, made["id"], "active")
    return made


async def tunnel(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post("/v1/tunnels", json=body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def route(account: Account, domain: dict[str, Any], tunnel: str) -> httpx.Response:
    return await account.client.post(f"/v1/domains/{domain['id']}/route", json={"tunnel": tunnel})


async def told(app: Any, since: int) -> list[dict[str, Any]]:
    """What relays heard about domains after a version."""
    async with app.state.db.read() as reader:
        entries = await changes.after(reader, since, 500)
    assert entries is not None
    found = [change for entry in entries for change in json.loads(entry.changes)]
    return [change for change in found if change["kind"].startswith("domain")]


async def now(app: Any) -> int:
    async with app.state.db.read() as reader:
        return await changes.newest(reader)


async def test_there_and_back(app: Any, owner: Account) -> None:
    domain, first, second = await good(app, owner), await tunnel(owner.client), await tunnel(owner.client)
    since = await now(app)
    answer = await route(owner, domain, first["id"])
    assert (answer.status_code, answer.json()["tunnel"]) == (200, first["id"])
    assert (await route(owner, domain, first["name"])).status_code == 200  # twice is no change
    assert (await owner.client.get(f"/v1/tunnels/{first['id']}")).json()["domains"] == [domain["name"]]
    assert (await route(owner, domain, second["name"])).json()["tunnel"] == second["id"]
    assert (await owner.client.post(f"/v1/domains/{domain['id']}/unroute")).json()["tunnel"] is None
    assert (await owner.client.post(f"/v1/domains/{domain['id']}/unroute")).status_code == 200
    row = {"id": domain["id"], "host": domain["name"], "tls": "terminate"}
    assert await told(app, since) == [
        {"kind": "domain", "domain": {**row, "tunnel": first["id"]}},
        {"kind": "domain", "domain": {**row, "tunnel": second["id"]}},
        {"kind": "domain_removed", "id": domain["id"]},
    ]
    rows = (await owner.client.get("/v1/audit", params={"target": domain["id"]})).json()["data"]
    assert [row["action"] for row in rows] == ["domain.unroute", "domain.route", "domain.route", "domain.add"]
    events = (await owner.client.get(f"/v1/tunnels/{second['id']}/events")).json()["data"]
    assert [event["kind"] for event in events] == ["domain_unrouted", "domain_routed", "created"]


async def test_the_snapshot_tells_the_same(app: Any, owner: Account) -> None:
    domain, made = await good(app, owner, failure_policy="strict"), await tunnel(owner.client)
    await route(owner, domain, made["id"])
    state = await app.state.edge_states.read()
    (row,) = (row for row in state.domains if row["id"] == domain["id"])
    assert row["valid_until"] == 0  # it has no certificate, and is not served without
    snapshot = json.loads(await state.line())
    assert row in snapshot["state"]["domains"]


@pytest.mark.parametrize("status", ["pending", "blocked", "deleted"])
async def test_only_what_is_ones_own(app: Any, owner: Account, status: str) -> None:
    domain, made = await add(owner, fresh()), await tunnel(owner.client)
    await set_status(app, domain["id"], status)
    codes = {
        "pending": (409, "domain.not_verified"),
        "blocked": (403, "domain.blocked"),
        "deleted": (409, "domain.lost"),
    }
    problem(await route(owner, domain, made["id"]), *codes[status])


async def test_tenants(app: Any, owner: Account, stranger: Account) -> None:
    mine, theirs = await good(app, owner), await tunnel(stranger.client)
    problem(await route(owner, mine, theirs["id"]), 404, "tunnel.not_found")
    problem(await route(stranger, mine, theirs["id"]), 404, "domain.not_found")
    problem(await stranger.client.post(f"/v1/domains/{mine['id']}/unroute"), 404, "domain.not_found")
    answer = await stranger.client.post("/v1/tunnels", json={"domain": mine["name"]})
    problem(answer, 400, "tunnel.domain_unavailable")


async def test_who_ends_tls_must_fit(app: Any, owner: Account) -> None:
    ends, passes = await good(app, owner), await good(app, owner, tls_mode="passthrough")
    http, tls = await tunnel(owner.client), await tunnel(owner.client, protocol="tls")
    problem(await route(owner, ends, tls["id"]), 409, "domain.mode_mismatch")
    problem(await route(owner, passes, http["id"]), 409, "domain.mode_mismatch")
    assert (await route(owner, passes, tls["id"])).status_code == 200
    problem(
        await owner.client.patch(f"/v1/domains/{passes['id']}", json={"tls_mode": "terminate"}), 409, "domain.routed"
    )


async def test_a_tunnel_that_goes_leaves_its_domains(app: Any, owner: Account) -> None:
    domain, made = await good(app, owner), await tunnel(owner.client)
    await route(owner, domain, made["id"])
    since = await now(app)
    assert (await owner.client.delete(f"/v1/tunnels/{made['id']}")).status_code == 204
    assert await told(app, since) == [{"kind": "domain_removed", "id": domain["id"]}]
    assert (await owner.client.get(f"/v1/domains/{domain['id']}")).json()["tunnel"] is None


async def test_a_domain_that_goes_or_changes_is_told(app: Any, owner: Account) -> None:
    domain, made = await good(app, owner), await tunnel(owner.client)
    await route(owner, domain, made["id"])
    since = await now(app)
    await owner.client.patch(f"/v1/domains/{domain['id']}", json={"failure_policy": "strict"})
    await owner.client.patch(f"/v1/domains/{domain['id']}", json={"failure_policy": "hold"})
    await owner.client.delete(f"/v1/domains/{domain['id']}")
    kinds = [(change["kind"], change.get("domain", {}).get("valid_until")) for change in await told(app, since)]
    assert kinds == [("domain", 0), ("domain", None), ("domain_removed", None)]


async def test_routing_and_deleting_at_once_never_hang(app: Any, owner: Account) -> None:
    for _ in range(4):
        domain, made = await good(app, owner), await tunnel(owner.client)
        answers = await asyncio.gather(
            route(owner, domain, made["id"]),
            owner.client.delete(f"/v1/tunnels/{made['id']}"),
            owner.client.post(f"/v1/domains/{domain['id']}/unroute"),
        )
        assert all(answer.status_code in (200, 204, 404) for answer in answers), [a.text for a in answers]
        async with app.state.db.read() as reader:
            assert (await store.find(reader, domain["id"])).tunnel_id is None


class TestAgents:
    async def _open(
        self, agent: httpx.AsyncClient, *specs: dict[str, Any], who: str = "agt-0123456789"
    ) -> httpx.Response:
        return await agent.post("/v1/agent/sessions", json={"agent_id": who, "tunnels": list(specs)})

    async def test_an_agent_names_a_domain(self, app: Any, owner: Account, agent: httpx.AsyncClient) -> None:
        domain = await good(app, owner)
        opened = await self._open(agent, {"domain": domain["name"], "target": "127.0.0.1:1"})
        assert opened.status_code == 201, opened.text
        made = opened.json()["grants"][0]["tunnel"]
        assert (await agent.get(f"/v1/domains/{domain['id']}")).json()["tunnel"] == made
        # Again, and from another machine: it is the same tunnel, found by its domain.
        for who in ("agt-0123456789", "agt-9876543210"):
            again = await self._open(agent, {"domain": domain["name"].upper()}, who=who)
            assert again.json()["grants"][0]["tunnel"] == made

    async def test_what_is_refused(self, app: Any, owner: Account, agent: httpx.AsyncClient) -> None:
        pending, taken = await add(owner, fresh()), await good(app, owner)
        await route(owner, taken, (await tunnel(owner.client, name="other"))["id"])
        problem(await self._open(agent, {"domain": pending["name"]}), 409, "domain.not_verified")
        problem(await self._open(agent, {"domain": "nobody.example.org"}), 400, "tunnel.domain_unavailable")
        problem(await self._open(agent, {"name": "mine", "domain": taken["name"]}), 409, "domain.routed")
        assert (await agent.get("/v1/tunnels")).json()["data"][0]["name"] == "other"  # nothing was made on the way

    async def test_one_more_in_a_session(self, app: Any, owner: Account, agent: httpx.AsyncClient) -> None:
        domain = await good(app, owner)
        session = (await self._open(agent)).json()["session"]
        added = await agent.post(f"/v1/agent/sessions/{session}/tunnels", json={"domain": domain["name"]})
        assert added.status_code == 201, added.text
        assert (await agent.get(f"/v1/domains/{domain['id']}")).json()["tunnel"] == added.json()["grants"][0]["tunnel"]


class TestFailurePolicies:
    """Events of certificates, through the queue that everybody uses, to what relays hear and what may be tried."""

    async def _events(self, app: Any, *events: NewEvent) -> None:
        async with app.state.db.transaction() as tx:
            for event in events:
                await lifecycle.record(tx, event)
        await apply_all(app.state.db)

    async def test_relays_know_until_when_a_strict_domain_may_be_served(self, app: Any, owner: Account) -> None:
        domain, made = await good(app, owner, failure_policy="strict"), await tunnel(owner.client)
        await route(owner, domain, made["id"])
        since, start = await now(app), datetime.now(UTC).replace(microsecond=0)
        life: dict[str, Any] = {"serial": "01", "not_before": start, "not_after": start + timedelta(days=90)}
        await self._events(app, NewEvent(domain["id"], "deployment", "succeeded", 1, **life))
        await self._events(app, NewEvent(domain["id"], "renewal", "failed", 2, error_code="caa"))
        await self._events(app, NewEvent(domain["id"], "revocation", "succeeded", 1, serial="01"))
        assert [change["domain"]["valid_until"] for change in await told(app, since)] == [
            int(life["not_after"].timestamp()), 0,
        ]  # fmt: skip

    async def test_hold_holds_from_the_first_failure_to_a_success(self, app: Any, owner: Account) -> None:
        domain = await good(app, owner, failure_policy="hold")

        async def held() -> Any:
            return (await owner.client.get(f"/v1/domains/{domain['id']}")).json()["certificate"]["held_at"]

        await self._events(app, NewEvent(domain["id"], "issuance", "requested", 1))
        assert await held() is None
        await self._events(app, NewEvent(domain["id"], "issuance", "failed", 1, error_code="dns"))
        first = await held()
        assert first is not None
        async with app.state.db.read() as reader:
            assert not failure_policy.may_try(await store.find(reader, domain["id"]))
        await self._events(app, NewEvent(domain["id"], "issuance", "failed", 2, error_code="dns"))
        assert await held() == first
        await self._events(app, NewEvent(domain["id"], "deployment", "succeeded", 3, serial="02"))
        assert await held() is None

    async def test_a_failure_of_before_holds_nothing(self, app: Any, owner: Account) -> None:
        domain = await good(app, owner)
        await self._events(app, NewEvent(domain["id"], "issuance", "failed", 1, error_code="dns"))
        await owner.client.patch(f"/v1/domains/{domain['id']}", json={"failure_policy": "hold"})
        async with app.state.db.read() as reader:
            assert failure_policy.may_try(await store.find(reader, domain["id"]))
        await self._events(app, NewEvent(domain["id"], "issuance", "failed", 2, error_code="dns"))
        async with app.state.db.read() as reader:
            assert not failure_policy.may_try(await store.find(reader, domain["id"]))
