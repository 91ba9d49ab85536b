"""What a plan allows of tunnels binds where they are made and taken on line, however many ask at once; what is over is frozen."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest

from portico.control.access import AGENT_KEY_PERMISSIONS, Caller
from portico.control.identity.quotas import Quotas
from portico.control.tunnels.sessions import AgentFacts, TunnelSpec
from portico.kit.db import Database
from portico.settings import ApiSettings
from portico.wire import grants
from tests.control.conftest import Account, MovableClock, heartbeat_body
from tests.control.identity.test_plans import move, operator
from tests.control.test_http import problem

__all__ = ["operator"]


async def make(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/tunnels", json=body)


async def states(client: httpx.AsyncClient) -> dict[str, tuple[str, str | None]]:
    rows = (await client.get("/v1/tunnels", params={"limit": 100})).json()["data"]
    return {row["name"]: (row["state"], row["frozen"]) for row in rows}


def session(agent_id: str, *names: str) -> dict[str, Any]:
    return {"agent_id": agent_id, "tunnels": [{"name": name, "protocol": "http"} for name in names]}


async def ask(client: httpx.AsyncClient, agent_id: str, *names: str) -> httpx.Response:
    return await client.post("/v1/agent/sessions", json=session(agent_id, *names))


class TestCreate:
    async def test_fifty_at_a_limit_of_ten_leave_ten(self, owner: Account, operator: httpx.AsyncClient) -> None:
        await move(operator, owner.organization, "free", overrides={"tunnels": 10})
        answers = await asyncio.gather(*(make(owner.client, name=f"t{n}") for n in range(50)))
        assert sorted(answer.status_code for answer in answers) == [201] * 10 + [403] * 40
        assert len(await states(owner.client)) == 10

    async def test_what_is_refused_names_limit_and_remedy(self, owner: Account, operator: httpx.AsyncClient) -> None:
        await move(operator, owner.organization, "free", overrides={"tunnels": 1})
        assert (await make(owner.client, name="one")).status_code == 201
        refused = problem(await make(owner.client, name="two"), 403, "quota.exceeded")
        wanted = {"limit": "tunnels", "used": 1, "allowed": 1, "plan": "free", "lifted_by": "free"}
        assert {name: refused[name] for name in wanted} == wanted  # the plan itself allows five
        problem(await make(owner.client, name="one"), 409, "tunnel.name_taken")  # the truer answer
        await move(operator, owner.organization, "free", overrides={"tunnels": 500})
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(make(owner.client))
        await move(operator, owner.organization, "free")
        refused = problem(await make(owner.client), 403, "quota.exceeded")
        assert (refused["lifted_by"], refused["hint"]) == (
            "pro", "Remove what is no longer needed, or move to the plan pro.",
        )  # fmt: skip

    async def test_the_ceiling_of_the_installation_stays(
        self, owner: Account, app: Any, operator: httpx.AsyncClient
    ) -> None:
        quotas: Quotas = app.state.identity.quotas
        quotas.kinds["tunnels"] = replace(quotas.kinds["tunnels"], ceiling=1)
        assert (await make(owner.client)).status_code == 201
        assert problem(await make(owner.client), 403, "tunnel.limit_reached")["limit"] == 1

    async def test_reserved_names(self, owner: Account, operator: httpx.AsyncClient) -> None:
        await move(operator, owner.organization, "free", overrides={"reserved_names": 2})
        names = [f"kept-{owner.organization[-6:]}-{n}" for n in range(6)]
        answers = await asyncio.gather(*(owner.client.post("/v1/reserved-names", json={"name": n}) for n in names))
        assert sorted(answer.status_code for answer in answers) == [201] * 2 + [403] * 4
        refused = next(answer.json() for answer in answers if answer.status_code == 403)
        assert (refused["code"], refused["limit"], refused["lifted_by"]) == ("quota.exceeded", "reserved_names", "free")

    async def test_features(self, owner: Account, operator: httpx.AsyncClient) -> None:
        await move(operator, owner.organization, "free")
        rule = {"addresses": {"rules": [{"allow": "192.0.2.0/24"}]}}
        refused = problem(await make(owner.client, policy=rule), 403, "quota.feature_missing")
        assert (refused["feature"], refused["lifted_by"]) == ("ip_rules", "pro")
        assert problem(await make(owner.client, protocol="tls"), 403, "quota.feature_missing")["feature"] == "tls"
        plain = (await make(owner.client)).json()["id"]
        problem(await owner.client.patch(f"/v1/tunnels/{plain}", json={"policy": rule}), 403, "quota.feature_missing")
        body = {"name": "x", "permissions": []}
        problem(await owner.client.post("/v1/org/roles", json=body), 403, "quota.feature_missing")


async def test_keys_members_and_roles_go_through_the_same(owner: Account, operator: httpx.AsyncClient) -> None:
    await move(operator, owner.organization, "free", overrides={"api_keys": 2, "custom_roles": 1, "roles": 1})
    body = {"kind": "api", "name": "x", "scopes": []}
    answers = await asyncio.gather(*(owner.client.post("/v1/api-keys", json=body) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [201] * 2 + [403] * 4
    assert {answer.json().get("limit") for answer in answers if answer.status_code == 403} == {"api_keys"}
    made = await owner.client.post("/v1/org/roles", json={"name": "one", "permissions": []})
    assert made.status_code == 201
    second = await owner.client.post("/v1/org/roles", json={"name": "two", "permissions": []})
    assert problem(second, 403, "quota.exceeded")["limit"] == "roles"


class TestFrozen:
    async def test_the_newest_go_and_come_back_in_order(
        self, owner: Account, operator: httpx.AsyncClient, agent: httpx.AsyncClient
    ) -> None:
        for name in ("one", "two", "three", "four"):
            assert (await make(owner.client, name=name)).status_code == 201
        ids = {row["name"]: row["id"] for row in (await owner.client.get("/v1/tunnels")).json()["data"]}
        await move(operator, owner.organization, "free", overrides={"tunnels": 2})
        off, over = ("offline", None), ("suspended", "tunnels")
        assert await states(owner.client) == {"one": off, "two": off, "three": over, "four": over}
        refused = problem(await ask(agent, "agent-0001", "three"), 403, "tunnel.frozen")
        assert "allows 2 tunnels" in refused["detail"]
        assert (await ask(agent, "agent-0001", "two")).status_code == 201
        # Deciding again gives the same; a deletion makes room for the next, and a larger plan for all.
        await move(operator, owner.organization, "free", overrides={"tunnels": 2})
        assert (await owner.client.delete(f"/v1/tunnels/{ids['one']}")).status_code == 204
        assert await states(owner.client) == {"two": off, "three": off, "four": over}
        await move(operator, owner.organization, "team")
        assert await states(owner.client) == {"two": off, "three": off, "four": off}
        kinds = [row["kind"] for row in (await owner.client.get(f"/v1/tunnels/{ids['four']}/events")).json()["data"]]
        assert kinds == ["thawed", "frozen", "created"]

    async def test_what_a_tunnel_needs_is_never_dropped(self, owner: Account, operator: httpx.AsyncClient) -> None:
        rule = {"addresses": {"rules": [{"allow": "192.0.2.0/24"}]}}
        await make(owner.client, name="ruled", policy=rule)
        await make(owner.client, name="plain")
        await make(owner.client, name="through", protocol="tls")
        await move(operator, owner.organization, "free")
        assert await states(owner.client) == {
            "ruled": ("suspended", "ip_rules"), "plain": ("offline", None), "through": ("suspended", "tls"),
        }  # fmt: skip

    async def test_a_create_that_began_before_the_move_is_counted(
        self, owner: Account, operator: httpx.AsyncClient
    ) -> None:
        """Whichever is first: after the move no more than the plan allows can serve."""
        for _ in range(4):
            await move(operator, owner.organization, "unlimited")
            many = [make(owner.client) for _ in range(4)]
            await asyncio.gather(
                *many[:2], move(operator, owner.organization, "free", overrides={"tunnels": 3}), *many[2:]
            )
            assert sum(1 for state, _ in (await states(owner.client)).values() if state == "offline") <= 3


class TestOnline:
    async def test_of_many_agents_no_more_than_allowed_get_a_grant(
        self, owner: Account, operator: httpx.AsyncClient, agent: httpx.AsyncClient
    ) -> None:
        await move(operator, owner.organization, "free", overrides={"tunnels": 50, "tunnels_online": 3})
        answers = await asyncio.gather(*(ask(agent, f"agent-{n:04}", f"t{n}") for n in range(12)))
        assert sorted(answer.status_code for answer in answers) == [201] * 3 + [403] * 9
        refused = next(answer.json() for answer in answers if answer.status_code == 403)
        assert (refused["limit"], refused["used"], refused["allowed"]) == ("tunnels_online", 3, 3)
        assert refused["lifted_by"] == "pro"

    async def test_an_instance_that_comes_again_needs_no_second_place(
        self, owner: Account, operator: httpx.AsyncClient, agent: httpx.AsyncClient
    ) -> None:
        await move(operator, owner.organization, "free", overrides={"tunnels_online": 2})
        first = (await ask(agent, "agent-0001", "a", "b")).json()
        assert len((await ask(agent, "agent-0001", "a", "b")).json()["grants"]) == 2
        path = f"/v1/agent/sessions/{first['session']}/tunnels"
        spec = {"name": "c", "protocol": "http"}
        problem(await agent.post(path, json=spec), 403, "quota.exceeded")
        assert (await agent.delete(f"/v1/agent/sessions/{first['session']}")).status_code == 204
        assert (await ask(agent, "agent-0002", "c")).status_code == 201  # the place of one that left is free

    async def test_an_agent_that_died_and_was_started_anew_needs_no_second_place(
        self, owner: Account, operator: httpx.AsyncClient, agent: httpx.AsyncClient
    ) -> None:
        await move(operator, owner.organization, "free", overrides={"tunnels_online": 2})
        assert (await ask(agent, "agent-0001", "a", "b")).status_code == 201
        assert (await ask(agent, "agent-0002", "a", "b")).status_code == 201
        problem(await ask(agent, "agent-0003", "a", "c"), 403, "quota.exceeded")

    async def test_who_was_away_comes_back_to_no_more_places_than_there_are(
        self, owner: Account, operator: httpx.AsyncClient, agent: httpx.AsyncClient, db: Database
    ) -> None:
        """In one step as in several: the session is continued by the process that opened it."""
        await move(operator, owner.organization, "free", overrides={"tunnels_online": 2})
        opened = (await ask(agent, "agent-0001", "a", "b")).json()
        assert (await ask(agent, "agent-0001", "a", "b")).json()["session"] == opened["session"]
        async with db.transaction() as tx:
            query = "UPDATE agent_sessions SET updated_at = now() - interval '5 minutes' WHERE id = $1"
            await tx.raw.execute(query, opened["session"])
        assert (await ask(agent, "agent-0002", "c", "d")).status_code == 201
        problem(await ask(agent, "agent-0001", "a", "b"), 403, "quota.exceeded")

    async def test_who_is_on_line_is_continued_in_one_step(
        self, owner: Account, operator: httpx.AsyncClient, agent: httpx.AsyncClient, relay: httpx.AsyncClient,
        db: Database, app: Any, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        await move(operator, owner.organization, "free", overrides={"tunnels_online": 2})
        opened = (await ask(agent, "agent-0001", "a", "b")).json()
        bound = [{"tunnel": g["tunnel"], "session": opened["session"], "generation": 1} for g in opened["grants"]]
        await relay.post("/v1/edge/heartbeat", json=heartbeat_body(bound=bound))
        async with db.transaction() as tx:
            query = "UPDATE agent_sessions SET updated_at = now() - interval '5 minutes' WHERE id = $1"
            await tx.raw.execute(query, opened["session"])
        monkeypatch.setattr(app.state.agent_sessions, "open", None)
        assert (await ask(agent, "agent-0001", "a", "b")).json()["session"] == opened["session"]

    async def test_grants_that_are_held_unconnected_are_worth_no_more_places(
        self,
        owner: Account,
        operator: httpx.AsyncClient,
        agent: httpx.AsyncClient,
        relay: httpx.AsyncClient,
        db: Database,
    ) -> None:
        """Asked for one after the other, each when those before are forgotten, and then connected all at once."""
        await move(operator, owner.organization, "free", overrides={"tunnels_online": 2})
        held = []
        for name in ("a", "b", "c"):
            got = (await ask(agent, f"agent-000{name}", name)).json()
            held.append({"tunnel": got["grants"][0]["tunnel"], "session": got["session"], "generation": 1})
            await self.forget(db, owner)
        beat = await relay.post("/v1/edge/heartbeat", json=heartbeat_body(bound=held))
        assert beat.status_code == 200
        async with db.read() as reader:
            query = "SELECT payload::text FROM edge_changes ORDER BY version DESC LIMIT 1"
            assert held[2]["tunnel"] in await reader.raw.fetchval(query)  # the relay is told that its grant is over
        refreshed = [
            await agent.post(f"/v1/agent/sessions/{one['session']}/refresh", json={"agent_id": f"agent-000{name}"})
            for one, name in zip(held, "abc", strict=True)
        ]
        assert [[grant["name"] for grant in answer.json()["grants"]] for answer in refreshed] == [["a"], ["b"], []]

    async def test_a_refresh_takes_no_place_that_others_have(
        self,
        owner: Account,
        operator: httpx.AsyncClient,
        agent: httpx.AsyncClient,
        relay: httpx.AsyncClient,
        db: Database,
    ) -> None:
        await move(operator, owner.organization, "free", overrides={"tunnels_online": 2})
        away = (await ask(agent, "agent-0001", "a", "b")).json()["session"]
        await self.forget(db, owner)
        there = (await ask(agent, "agent-0002", "c")).json()
        path = f"/v1/agent/sessions/{away}/refresh"
        refused = problem(await agent.post(path, json={"agent_id": "agent-0001"}), 403, "quota.exceeded")
        assert (refused["used"], refused["allowed"]) == (1, 2)
        # Who is on line is refreshed whatever the time since; who comes back to a free place, too.
        bound = [{"tunnel": there["grants"][0]["tunnel"], "session": there["session"], "generation": 1}]
        await relay.post("/v1/edge/heartbeat", json=heartbeat_body(bound=bound))
        await self.forget(db, owner)
        answer = await agent.post(f"/v1/agent/sessions/{there['session']}/refresh", json={"agent_id": "agent-0002"})
        assert len(answer.json()["grants"]) == 1
        assert (await agent.delete(f"/v1/agent/sessions/{there['session']}")).status_code == 204
        assert len((await agent.post(path, json={"agent_id": "agent-0001"})).json()["grants"]) == 2
        problem(await agent.post(path, json={"agent_id": "agent-0002"}), 404, "session.not_found")

    async def forget(self, db: Database, owner: Account) -> None:
        """As if the sessions were asked for some time ago."""
        async with db.transaction() as tx:
            query = "UPDATE agent_sessions SET updated_at = now() - interval '5 minutes' WHERE organization_id = $1"
            await tx.raw.execute(query, owner.organization)

    async def test_a_session_that_began_before_the_move_is_counted(
        self, owner: Account, operator: httpx.AsyncClient, agent: httpx.AsyncClient, db: Database, app: Any
    ) -> None:
        """It saw no limit and nothing to make or to change, so it took no lock of the organization's."""
        await move(operator, owner.organization, "unlimited")
        for name in ("a", "b", "c"):
            assert (await make(owner.client, name=name)).status_code == 201
        me = (await agent.get("/v1/whoami")).json()["key"]["id"]
        caller = Caller("agent_key", me, owner.organization, AGENT_KEY_PERMISSIONS)
        facts = AgentFacts("agent-0001", "host", "1", None)
        specs = [TunnelSpec("http", name) for name in ("a", "b", "c")]
        async with db.transaction() as tx:
            opened = await app.state.agent_sessions.open(tx, caller, facts, specs)
            moving = asyncio.create_task(
                move(operator, owner.organization, "free", overrides={"tunnels": 9, "tunnels_online": 1})
            )
            query = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
            async with db.read() as reader:
                while not await reader.raw.fetchval(query) and not moving.done():
                    await asyncio.sleep(0.01)
        await moving
        again = await agent.post(f"/v1/agent/sessions/{opened['session']}/refresh", json={"agent_id": "agent-0001"})
        assert [grant["name"] for grant in again.json()["grants"]] == ["a"]

    async def test_a_smaller_plan_takes_the_newest_off_line(
        self, owner: Account, operator: httpx.AsyncClient, agent: httpx.AsyncClient, relay: httpx.AsyncClient
    ) -> None:
        opened = (await ask(agent, "agent-0001", "a", "b", "c")).json()
        bound = [{"tunnel": g["tunnel"], "session": opened["session"], "generation": 1} for g in opened["grants"]]
        await relay.post("/v1/edge/heartbeat", json=heartbeat_body(bound=bound))
        await move(operator, owner.organization, "free", overrides={"tunnels_online": 2})
        again = await agent.post(f"/v1/agent/sessions/{opened['session']}/refresh", json={"agent_id": "agent-0001"})
        assert sorted(grant["name"] for grant in again.json()["grants"]) == ["a", "b"]


class TestGrant:
    async def test_it_carries_the_lower_of_plan_and_ceiling(
        self,
        owner: Account,
        operator: httpx.AsyncClient,
        agent: httpx.AsyncClient,
        settings: ApiSettings,
        app: Any,
        clock: MovableClock,
    ) -> None:
        async def limits(protocol: str = "http") -> dict[str, int]:
            spec = {"name": protocol, "protocol": protocol}
            answer = await agent.post("/v1/agent/sessions", json={"agent_id": "agent-0001", "tunnels": [spec]})
            async with app.state.db.read() as reader:
                keys = await app.state.signing_keys.key_set(reader)
            claims = grants.verify_grant(answer.json()["grants"][0]["grant"], keys, app.state.clock.wall().timestamp())
            return dict(claims.limits)

        assert await limits() == {"concurrency": settings.tunnel_concurrency}
        await move(operator, owner.organization, "pro", overrides={"concurrency": 7, "requests_per_second": 4})
        assert await limits() == {"concurrency": 7, "org_requests": 4, "org_burst": 8, "version": 1}
        assert (await limits("tls"))["concurrency"] == 200
        await move(operator, owner.organization, "team", overrides={"concurrency": 10_000})
        clock.advance(61)  # a reconnect may bring what was a minute ago: relays let the newer version win
        assert (await limits())["concurrency"] == settings.tunnel_concurrency
        assert (await limits())["version"] == 2


@pytest.fixture
def tight(settings: ApiSettings, app: Any) -> int:
    app.state.tunnels._settings = replace(settings, policy_bytes_per_organization=3000)
    return 3000


async def test_simultaneous_policies_stay_within_their_bytes(owner: Account, tight: int, db: Database) -> None:
    ids = [(await make(owner.client)).json()["id"] for _ in range(6)]
    policy = {"headers": {"request": {"add": [{"name": "X-Long", "value": "v" * 900}]}}}
    answers = await asyncio.gather(*(owner.client.patch(f"/v1/tunnels/{id}", json={"policy": policy}) for id in ids))
    assert sorted({answer.status_code for answer in answers}) == [200, 403]
    async with db.read() as reader:
        query = "SELECT sum(octet_length(policy::text)) FROM tunnels WHERE organization_id = $1"
        total = await reader.raw.fetchval(query, owner.organization)
    assert total <= tight


async def test_an_open_invitation_has_its_place(owner: Account, operator: httpx.AsyncClient) -> None:
    await move(operator, owner.organization, "free", overrides={"members": 2})

    async def invite(name: str) -> httpx.Response:
        body = {"email": f"{name}-{owner.organization[-6:]}@example.com", "role": "viewer"}
        return await owner.client.post("/v1/org/invitations", json=body)

    answers = await asyncio.gather(*(invite(f"p{n}") for n in range(5)))
    assert sorted(answer.status_code for answer in answers) == [201] + [403] * 4
    assert {a.json()["limit"] for a in answers if a.status_code == 403} == {"members"}
    open_one = next(answer.json()["id"] for answer in answers if answer.status_code == 201)
    assert (await owner.client.delete(f"/v1/org/invitations/{open_one}")).status_code == 204
    assert (await invite("another")).status_code == 201
