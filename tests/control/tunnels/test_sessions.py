"""Agent sessions: tokens that relays accept, generations, reuse of tunnels, and every way in which a session ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import argon2
import httpx
import pytest

from portico.control.access import AGENT_KEY_PERMISSIONS, Caller
from portico.kit.db import Database
from portico.kit.jwt import KeySet
from portico.wire import grants, policy
from tests.control.conftest import Account, MovableClock, heartbeat_body

AGENT = "agt-0123456789"
SPEC = {"protocol": "http", "target": "http://127.0.0.1:8000"}


def body(*tunnels: dict[str, Any], agent_id: str = "agt-0123456789") -> dict[str, Any]:
    return {"agent_id": agent_id, "hostname": "laptop", "version": "0.1.0", "tunnels": list(tunnels)}


async def opened(client: httpx.AsyncClient, *tunnels: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = await client.post("/v1/agent/sessions", json=body(*tunnels, **more))
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def code(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return str(answer.json()["code"])


async def payloads(db: Database) -> list[dict[str, Any]]:
    """Every change in the change table, in order."""
    import json

    async with db.read() as reader:
        rows = await reader.raw.fetch("SELECT payload::text FROM edge_changes ORDER BY version")
    return [change for row in rows for change in json.loads(row["payload"])]


async def actions(db: Database, organization: str) -> list[str]:
    async with db.read() as reader:
        rows = await reader.raw.fetch(
            "SELECT action FROM audit_events WHERE organization_id = $1 ORDER BY id", organization
        )
    return [row["action"] for row in rows]


@pytest.fixture
async def keys(client: httpx.AsyncClient) -> KeySet:
    return KeySet.from_jwks((await client.get("/.well-known/jwks.json")).json())


class TestOpen:
    async def test_a_relay_accepts_what_the_agent_gets(
        self, agent: httpx.AsyncClient, owner: Account, keys: KeySet, clock: MovableClock
    ) -> None:
        got = await opened(agent, {**SPEC, "name": "shop", "subdomain": "shop-open"})
        now = clock.wall().timestamp()
        session = grants.verify_session(got["token"], keys, now)
        assert (session.sid, session.org, session.agent, session.gen) == (
            got["session"], owner.organization, "agt-0123456789", 1,
        )  # fmt: skip
        (row,) = got["grants"]
        grant = grants.verify_grant(row["grant"], keys, now, session=session)
        assert grant.hosts == (grants.GrantHost("shop-open.localhost", "terminate"),)
        assert (grant.tun, grant.name, grant.gen, grant.proto) == (row["tunnel"], "shop", 1, "http")
        assert grant.limits == {"concurrency": 100}
        assert row["url"] == grant.url == "http://shop-open.localhost:7080"
        assert got["edges"] == ["ws://127.0.0.1:7081/relay-1"]
        assert got["account"] == {
            "organization": {"id": owner.organization, "name": "Acme"}, "plan": "unlimited", "user": owner.email,
        }  # fmt: skip
        assert got["refresh_after"] == 600 and got["expires_at"].endswith("Z")

    async def test_nothing_outlives_the_key_that_asked_for_it(
        self,
        owner: Account,
        relay: httpx.AsyncClient,
        connect: Callable[..., httpx.AsyncClient],
        keys: KeySet,
        clock: MovableClock,
    ) -> None:
        ends = clock.wall() + timedelta(seconds=120)
        agent = connect((await owner.key(expires_at=ends.isoformat()))["key"])
        got = await opened(agent, {**SPEC, "name": "brief"})
        refreshed = (await agent.post(f"/v1/agent/sessions/{got['session']}/refresh", json={"agent_id": AGENT})).json()
        reopened = await opened(agent, {**SPEC, "name": "brief"})
        added = await agent.post(f"/v1/agent/sessions/{got['session']}/tunnels", json={**SPEC, "name": "more"})
        now = clock.wall().timestamp()
        for answer in (got, refreshed, reopened):
            assert 0 < answer["refresh_after"] <= 80
            assert grants.verify_session(answer["token"], keys, now).exp <= ends.timestamp()
        for row in (*got["grants"], *refreshed["grants"], *reopened["grants"], *added.json()["grants"]):
            assert grants.verify_grant(row["grant"], keys, now).exp <= ends.timestamp()
        clock.advance(121)
        answer = await agent.post(f"/v1/agent/sessions/{got['session']}/refresh", json={"agent_id": AGENT})
        assert code(answer, 401) == "auth.key_invalid"

    async def test_tokens_fit_their_limit_with_the_longest_of_everything(self, agent: httpx.AsyncClient) -> None:
        name = "x" * 63
        got = await opened(agent, {**SPEC, "name": name, "subdomain": name, "policy": {"concurrency": 1, "version": 1}})
        assert len(got["token"]) <= 4096 and len(got["grants"][0]["grant"]) <= 4096

    async def test_again_is_the_next_generation_of_one_session(
        self, agent: httpx.AsyncClient, keys: KeySet, clock: MovableClock
    ) -> None:
        first = await opened(agent, {**SPEC, "name": "again"})
        second = await opened(agent, {**SPEC, "name": "again"})
        assert first["session"] == second["session"]
        assert grants.verify_session(second["token"], keys, clock.wall().timestamp()).gen == 2
        assert first["grants"][0]["tunnel"] == second["grants"][0]["tunnel"]

    async def test_another_instance_has_another_session(self, agent: httpx.AsyncClient) -> None:
        first = await opened(agent, {**SPEC, "name": "two"})
        second = await opened(agent, {**SPEC, "name": "two"}, agent_id="agt-another-one")
        assert first["session"] != second["session"]
        assert first["grants"][0]["tunnel"] == second["grants"][0]["tunnel"]

    async def test_simultaneous_opens_of_one_instance_share_a_session(self, agent: httpx.AsyncClient) -> None:
        got = await asyncio.gather(*(opened(agent, {**SPEC, "name": "race"}) for _ in range(12)))
        assert len({g["session"] for g in got}) == 1
        assert len({g["grants"][0]["tunnel"] for g in got}) == 1

    async def test_sessions_that_change_one_tunnel_and_make_another_never_deadlock(
        self, agent: httpx.AsyncClient
    ) -> None:
        """In pairs, the new one before the shared one in the alphabet and behind it; the shared ones by name or subdomain."""
        await opened(agent, *({**SPEC, "name": f"shared-{n}", "subdomain": f"deadlock-{n}"} for n in (1, 2)))

        async def instance(number: int, first: str, second: str) -> None:
            specs = [
                {**SPEC, "name": f"{first}-new-{number}"},
                {"protocol": "http", "name": "shared-1", "target": f"http://127.0.0.1:{9000 + number}"},
                {"protocol": "http", "subdomain": "deadlock-2", "target": f"http://127.0.0.1:{9000 + number}"},
                {**SPEC, "name": f"{second}-new-{number}", "subdomain": f"{second}-deadlock-{number}"},
            ]
            got = await opened(agent, *specs[:: 1 if number % 2 else -1], agent_id=f"agt-deadlock-{number}")
            assert len(got["grants"]) == 4

        letters = [("a", "z"), ("z", "a"), ("a", "b"), ("y", "z")]
        await asyncio.gather(*(instance(number, *letters[number % 4]) for number in range(20)))

    async def test_an_unnamed_tunnel_keeps_its_name(self, agent: httpx.AsyncClient) -> None:
        first = await opened(agent, SPEC, SPEC, {**SPEC, "target": "http://127.0.0.1:9000"})
        names = [g["name"] for g in first["grants"]]
        assert len(set(names)) == 3 and all(len(name.split("-")) == 3 for name in names)
        assert [
            g["name"] for g in (await opened(agent, SPEC, SPEC, {**SPEC, "target": "http://127.0.0.1:9000"}))["grants"]
        ] == names

    async def test_an_unnamed_tunnel_survives_the_agents_restart_and_is_not_taken_from_a_running_one(
        self, agent: httpx.AsyncClient
    ) -> None:
        spec = {**SPEC, "target": "http://127.0.0.1:5000"}
        first = await opened(agent, spec, agent_id="agt-first-run")
        beside = await opened(agent, spec, agent_id="agt-beside-it")
        assert beside["grants"][0]["name"] != first["grants"][0]["name"]
        assert (await agent.delete(f"/v1/agent/sessions/{first['session']}")).status_code == 204
        restarted = await opened(agent, spec, agent_id="agt-second-run")
        assert restarted["grants"][0]["name"] == first["grants"][0]["name"]

    async def test_a_killed_agents_unnamed_tunnel_is_free_once_no_relay_has_it(
        self, agent: httpx.AsyncClient, relay: httpx.AsyncClient, db: Database
    ) -> None:
        spec = {**SPEC, "target": "http://127.0.0.1:5001"}
        killed = await opened(agent, spec, agent_id="agt-killed-1")
        tunnel = killed["grants"][0]["tunnel"]
        async with db.transaction() as tx:
            await tx.raw.execute(
                "UPDATE agent_sessions SET updated_at = now() - interval '1 minute' WHERE id = $1", killed["session"]
            )
        bound = [{"tunnel": tunnel, "session": killed["session"], "generation": 1}]
        await relay.post("/v1/edge/heartbeat", json=heartbeat_body(bound=bound))
        other = await opened(agent, spec, agent_id="agt-killed-2")
        assert other["grants"][0]["tunnel"] != tunnel
        await relay.post("/v1/edge/heartbeat", json=heartbeat_body())
        back = await opened(agent, spec, agent_id="agt-killed-3")
        assert back["grants"][0]["tunnel"] == tunnel

    async def test_the_session_has_exactly_the_tunnels_named_last(self, agent: httpx.AsyncClient) -> None:
        first = await opened(agent, {**SPEC, "name": "one-of-two"}, {**SPEC, "name": "two-of-two"})
        await opened(agent, {**SPEC, "name": "two-of-two"})
        answer = await agent.post(f"/v1/agent/sessions/{first['session']}/refresh", json={"agent_id": "agt-0123456789"})
        assert [g["name"] for g in answer.json()["grants"]] == ["two-of-two"]

    async def test_the_agents_subdomain_and_policy_win_and_the_subdomain_fences_older_grants(
        self, agent: httpx.AsyncClient, keys: KeySet, clock: MovableClock, db: Database
    ) -> None:
        await opened(agent, {**SPEC, "name": "moving"})
        got = await opened(agent, {**SPEC, "name": "moving", "subdomain": "moved-here", "policy": {"concurrency": 7}})
        grant = grants.verify_grant(got["grants"][0]["grant"], keys, clock.wall().timestamp())
        assert grant.hosts[0].host == "moved-here.localhost"
        assert grant.gen == 2 and grant.limits == {"concurrency": 100}
        assert grant.policy == {"concurrency": 7} and grant.policy_version == 2
        last = (await payloads(db))[-1]["tunnel"]
        assert last["hosts"] == ["moved-here.localhost"] and last["generation"] == 2
        assert (last["policy"], last["policy_version"]) == ({"concurrency": 7}, 2)

    async def test_passwords_stay_here_and_a_reconnect_changes_nothing(
        self, agent: httpx.AsyncClient, keys: KeySet, clock: MovableClock, db: Database, app: Any
    ) -> None:
        users = [{"name": "alice", "password": "open sesame 42"}, {"name": "bob", "password": "b"}]
        spec = {**SPEC, "name": "guarded", "policy": {"basic_auth": {"users": users}}}
        first = await opened(agent, spec)
        grant = grants.verify_grant(first["grants"][0]["grant"], keys, clock.wall().timestamp())
        stored = policy.parse(grant.policy).basic_auth
        assert stored is not None and [user.name for user in stored.users] == ["alice", "bob"]
        assert argon2.PasswordHasher().verify(stored.users[0].digest, "open sesame 42")
        app.state.visitor_passwords._made.clear()  # as another process, or this one after its restart
        again = await opened(agent, spec, agent_id="agt-0123456789")
        grant = grants.verify_grant(again["grants"][0]["grant"], keys, clock.wall().timestamp())
        assert policy.parse(grant.policy).basic_auth == stored and grant.policy_version == 1
        spec["policy"] = {"basic_auth": {"users": [{**users[0], "password": "other"}, users[1]]}}
        changed = await opened(agent, spec)
        grant = grants.verify_grant(changed["grants"][0]["grant"], keys, clock.wall().timestamp())
        now = policy.parse(grant.policy).basic_auth
        assert now is not None and now.users[1] == stored.users[1] and now.users[0] != stored.users[0]
        assert grant.policy_version == 2 and grant.gen == 1
        async with db.read() as reader:
            for table in ("tunnels", "tunnel_events", "audit_events", "edge_changes", "idempotency_keys"):
                rows = await reader.raw.fetch(f"SELECT t::text AS row FROM {table} t")
                assert not any("sesame" in row["row"] for row in rows), table
                if table in ("tunnel_events", "audit_events"):
                    assert not any("argon2id" in row["row"] for row in rows), table

    async def test_a_policy_of_nobody_is_kept_and_an_empty_one_is_taken(
        self, agent: httpx.AsyncClient, keys: KeySet, clock: MovableClock
    ) -> None:
        async def now(**more: Any) -> grants.GrantClaims:
            got = await opened(agent, {**SPEC, "name": "kept-policy", **more})
            return grants.verify_grant(got["grants"][0]["grant"], keys, clock.wall().timestamp())

        assert (await now(policy={"concurrency": 7})).policy_version == 1
        assert (await now()).policy == {"concurrency": 7}
        last = await now(policy={})
        assert (last.policy, last.policy_version, last.gen) == ({}, 2, 1)

    async def test_faults_say_whose_policy(self, agent: httpx.AsyncClient) -> None:
        wrong = {**SPEC, "name": "wrong-policy", "policy": {"queue": {}, "concurrency": 0}}
        answer = await agent.post("/v1/agent/sessions", json=body({**SPEC, "name": "right-policy"}, wrong))
        assert code(answer, 400) == "tunnel.policy_invalid"
        assert answer.json()["tunnel"] == "wrong-policy" and len(answer.json()["errors"]) == 3

    async def test_passwords_are_bounded(self, agent: httpx.AsyncClient, app: Any) -> None:
        object.__setattr__(app.state.settings, "visitor_passwords_per_request", 2)
        users = [{"name": f"user{index}", "password": "p"} for index in range(3)]
        spec = {**SPEC, "name": "many-users", "policy": {"basic_auth": {"users": users}}}
        answer = await agent.post("/v1/agent/sessions", json=body(spec))
        assert code(answer, 400) == "tunnel.policy_invalid" and "3 new passwords" in answer.json()["detail"]
        object.__setattr__(app.state.settings, "visitor_passwords_waiting", 0)
        spec["policy"] = {"basic_auth": {"users": users[:1]}}
        answer = await agent.post("/v1/agent/sessions", json=body(spec))
        assert code(answer, 429) == "auth.throttled" and answer.headers["retry-after"] == "2"

    async def test_two_specs_of_one_tunnel(self, agent: httpx.AsyncClient) -> None:
        answer = await agent.post("/v1/agent/sessions", json=body({**SPEC, "name": "twin"}, {**SPEC, "name": "twin"}))
        assert code(answer, 409) == "tunnel.name_taken"

    async def test_a_subdomain_of_somebody_else(
        self, agent: httpx.AsyncClient, stranger: Account, connect: Callable[..., httpx.AsyncClient]
    ) -> None:
        await opened(agent, {**SPEC, "subdomain": "mine-alone"})
        theirs = connect((await stranger.key())["key"])
        answer = await theirs.post("/v1/agent/sessions", json=body({**SPEC, "subdomain": "mine-alone"}))
        assert code(answer, 409) == "tunnel.subdomain_taken"
        got = await opened(theirs, {**SPEC, "name": "mine-alone"})
        assert got["grants"][0]["url"] != "http://mine-alone.localhost:7080"  # the name is theirs, the subdomain is not
        assert (await theirs.get("/v1/tunnels")).json()["data"][0]["subdomain"].startswith("mine-alone-")

    async def test_no_relay(
        self, owner: Account, connect: Callable[..., httpx.AsyncClient], app: Any, db: Database
    ) -> None:
        async with db.transaction() as tx:
            await tx.raw.execute("DELETE FROM relays")
        app.state.relays.forget()
        answer = await connect((await owner.key())["key"]).post("/v1/agent/sessions", json=body(SPEC))
        assert code(answer, 503) == "edge.no_relay"
        assert answer.headers["retry-after"] == "1"

    async def test_a_draining_or_silent_relay_is_not_assigned(
        self, agent: httpx.AsyncClient, relay: httpx.AsyncClient, db: Database, app: Any
    ) -> None:
        for name in ("relay-2", "relay-3"):
            await relay.post("/v1/edge/heartbeat", json=heartbeat_body(name, draining=name == "relay-2"))
        async with db.transaction() as tx:
            await tx.raw.execute("UPDATE relays SET seen_at = now() - interval '16 s' WHERE name = 'relay-3'")
        app.state.relays.forget()
        assert (await opened(agent, {**SPEC, "name": "assigned"}))["edges"] == ["ws://127.0.0.1:7081/relay-1"]

    @pytest.mark.parametrize(
        "wanted",
        [
            {"name": "other"},
            {"name": "kept", "policy": {}},
            {"name": "kept", "policy": {"concurrency": 9}},
            {"name": "kept", "subdomain": "elsewhere"},
        ],
        ids=["make", "strip", "change", "move"],
    )
    async def test_who_may_only_connect_changes_nothing(
        self, owner: Account, connect: Any, wanted: dict[str, Any]
    ) -> None:
        policy = {"concurrency": 1, "addresses": {"rules": [{"deny": "10.0.0.0/8"}]}}
        kept = (await owner.client.post("/v1/tunnels", json={"name": "kept", "policy": policy})).json()
        connecting = connect((await owner.key("api", scopes=["agent:connect"]))["key"])
        answer = await connecting.post("/v1/agent/sessions", json=body({**SPEC, **wanted}))
        assert code(answer, 403) == "auth.forbidden"
        now = (await owner.client.get(f"/v1/tunnels/{kept['id']}")).json()
        assert (now["policy"], now["subdomain"]) == (policy, kept["subdomain"])
        assert len((await owner.client.get("/v1/tunnels")).json()["data"]) == 1
        assert (await opened(connecting, {**SPEC, "name": "kept"}))["grants"][0]["name"] == "kept"

    async def test_wrong_credentials(self, owner: Account, agent: httpx.AsyncClient, connect: Any) -> None:
        scoped = (await owner.key("api", scopes=["tunnels:read"]))["key"]
        for client, status, expected in (
            (connect(), 401, "auth.required"),
            (connect("nonsense"), 401, "auth.token_invalid"),
            (connect("tnl_agt_" + "0" * 36), 401, "auth.key_invalid"),
            (connect(scoped), 403, "auth.forbidden"),
            (owner.client, 403, "auth.forbidden"),
        ):
            answer = await client.post("/v1/agent/sessions", json=body(SPEC))
            assert code(answer, status) == expected

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"name": "UPPER"}, "tunnel.name_invalid"),
            ({"name": "-x"}, "tunnel.name_invalid"),
            ({"subdomain": "ab"}, "tunnel.name_invalid"),
            ({"subdomain": "xn--a"}, "tunnel.name_invalid"),
            ({"subdomain": "admin"}, "tunnel.name_reserved"),
            ({"policy": {"basic_auth": ["a:b"]}}, "tunnel.policy_invalid"),
            ({"policy": {"concurrency": 0}}, "tunnel.policy_invalid"),
            ({"policy": {"concurrency": True}}, "tunnel.policy_invalid"),
            ({"policy": {"version": 2}}, "tunnel.policy_invalid"),
            ({"protocol": "tls", "remote_port": 7100}, "tunnel.port_invalid"),
            ({"domain": "app.example.com"}, "tunnel.domain_unavailable"),
        ],
    )
    async def test_refused_specs_change_nothing(
        self, agent: httpx.AsyncClient, change: dict[str, Any], expected: str
    ) -> None:
        answer = await agent.post("/v1/agent/sessions", json=body({**SPEC, "name": "fine"}, {**SPEC, **change}))
        assert answer.json()["code"] == expected and 400 <= answer.status_code < 410
        assert (await agent.get("/v1/tunnels")).json()["data"] == []

    @pytest.mark.parametrize(
        "bad",
        [
            {}, {"agent_id": "short"}, {"agent_id": "has spaces in"}, {"agent_id": 5},
            {"agent_id": "agt-0123456789", "tunnels": {}},
            {"agent_id": "agt-0123456789", "tunnels": [{"protocol": "udp"}]},
            {"agent_id": "agt-0123456789", "hostname": "a\u001bb"}, {"agent_id": "agt-0123456789", "region": "EU!"},
        ],
    )  # fmt: skip
    async def test_shapes(self, agent: httpx.AsyncClient, bad: dict[str, Any]) -> None:
        assert code(await agent.post("/v1/agent/sessions", json=bad), 422) == "request.invalid"


class TestLimits:
    @pytest.fixture
    def settings(self, settings: Any) -> Any:
        import dataclasses

        return dataclasses.replace(settings, tunnels_per_organization=3, session_max_tunnels=2)

    async def test_per_session_and_per_organization(self, agent: httpx.AsyncClient) -> None:
        three = [{**SPEC, "name": f"limit-{n}"} for n in range(3)]
        answer = await agent.post("/v1/agent/sessions", json=body(*three))
        assert code(answer, 403) == "tunnel.limit_reached"
        got = await opened(agent, *three[:2])
        answer = await agent.post(f"/v1/agent/sessions/{got['session']}/tunnels", json=three[2])
        assert code(answer, 403) == "tunnel.limit_reached"
        await opened(agent, three[2])
        answer = await agent.post("/v1/agent/sessions", json=body({**SPEC, "name": "limit-4"}))
        assert code(answer, 403) == "tunnel.limit_reached"
        await opened(agent, three[0])  # one that exists costs nothing

    async def test_the_limit_holds_under_a_race(self, agent: httpx.AsyncClient) -> None:
        answers = await asyncio.gather(*(agent.post("/v1/tunnels", json={"name": f"rush-{n}"}) for n in range(12)))
        assert sorted(a.status_code for a in answers) == [201] * 3 + [403] * 9


class TestRefresh:
    async def refresh(
        self, client: httpx.AsyncClient, session: str, agent_id: str = "agt-0123456789"
    ) -> httpx.Response:
        return await client.post(f"/v1/agent/sessions/{session}/refresh", json={"agent_id": agent_id})

    async def test_new_tokens_same_generation(
        self, agent: httpx.AsyncClient, keys: KeySet, clock: MovableClock
    ) -> None:
        got = await opened(agent, {**SPEC, "name": "fresh"})
        clock.advance(800)
        again = (await self.refresh(agent, got["session"])).json()
        session = grants.verify_session(again["token"], keys, clock.wall().timestamp())
        assert (session.sid, session.gen) == (got["session"], 1)
        assert session.exp - grants.verify_session(got["token"], keys, clock.wall().timestamp()).exp in (799, 800, 801)
        assert set(again) == set(got) and again["grants"][0]["tunnel"] == got["grants"][0]["tunnel"]

    async def test_a_stopped_tunnel_gets_no_grant_until_an_agent_names_it(
        self, agent: httpx.AsyncClient, keys: KeySet, clock: MovableClock
    ) -> None:
        got = await opened(agent, {**SPEC, "name": "halted"})
        tunnel = got["grants"][0]["tunnel"]
        assert (await agent.post(f"/v1/tunnels/{tunnel}/stop")).json()["state"] == "stopped"
        assert (await self.refresh(agent, got["session"])).json()["grants"] == []
        back = await opened(agent, {**SPEC, "name": "halted"})
        grant = grants.verify_grant(back["grants"][0]["grant"], keys, clock.wall().timestamp())
        assert grant.gen == 3  # stopped, started: what was granted before stays fenced

    async def test_only_its_own_instance_and_key(
        self, agent: httpx.AsyncClient, owner: Account, stranger: Account, connect: Any
    ) -> None:
        got = await opened(agent, {**SPEC, "name": "own"})
        other_key = connect((await owner.key())["key"])
        theirs = connect((await stranger.key())["key"])
        for client, agent_id in (
            (agent, "agt-somebody-else"),
            (other_key, "agt-0123456789"),
            (theirs, "agt-0123456789"),
        ):
            assert code(await self.refresh(client, got["session"], agent_id), 404) == "session.not_found"
        assert code(await self.refresh(agent, "ses_none"), 404) == "session.not_found"


class TestTunnelsOfASession:
    async def test_add_and_remove(self, agent: httpx.AsyncClient, keys: KeySet, clock: MovableClock) -> None:
        got = await opened(agent, {**SPEC, "name": "base"})
        path = f"/v1/agent/sessions/{got['session']}/tunnels"
        added = await agent.post(path, json={**SPEC, "name": "extra"})
        assert added.status_code == 201
        (row,) = added.json()["grants"]
        grant = grants.verify_grant(row["grant"], keys, clock.wall().timestamp())
        assert (grant.sid, grant.name) == (got["session"], "extra")
        refresh = f"/v1/agent/sessions/{got['session']}/refresh"
        names = [g["name"] for g in (await agent.post(refresh, json={"agent_id": "agt-0123456789"})).json()["grants"]]
        assert names == ["base", "extra"]
        for _ in range(2):
            assert (await agent.delete(f"{path}/{row['tunnel']}")).status_code == 204
        names = [g["name"] for g in (await agent.post(refresh, json={"agent_id": "agt-0123456789"})).json()["grants"]]
        assert names == ["base"]
        assert (await agent.get(f"/v1/tunnels/{row['tunnel']}")).status_code == 200

    async def test_of_another_key(self, agent: httpx.AsyncClient, stranger: Account, connect: Any) -> None:
        got = await opened(agent, {**SPEC, "name": "base2"})
        theirs = connect((await stranger.key())["key"])
        path = f"/v1/agent/sessions/{got['session']}"
        assert code(await theirs.post(f"{path}/tunnels", json=SPEC), 404) == "session.not_found"
        tunnel = got["grants"][0]["tunnel"]
        assert code(await theirs.delete(f"{path}/tunnels/{tunnel}"), 404) == "session.not_found"
        assert code(await theirs.delete(path), 404) == "session.not_found"


class TestEnd:
    async def test_delete_tells_the_relays_and_the_audit_log(
        self, agent: httpx.AsyncClient, owner: Account, db: Database, clock: MovableClock
    ) -> None:
        got = await opened(agent, {**SPEC, "name": "ending"})
        assert (await agent.delete(f"/v1/agent/sessions/{got['session']}")).status_code == 204
        last = (await payloads(db))[-1]
        assert (last["kind"], last["session"], last["code"]) == ("session_ended", got["session"], "session.ended")
        # Token life, outage grace, and the leeway that relays give: none of its tokens outlives the refusal.
        assert last["until"] >= clock.wall().timestamp() + 900 + 86_400 + 60 - 2
        assert code(await agent.delete(f"/v1/agent/sessions/{got['session']}"), 404) == "session.not_found"
        assert (await actions(db, owner.organization))[-2:] == ["tunnel.create", "agent_session.end"]
        assert (await opened(agent, {**SPEC, "name": "ending"}))["session"] != got["session"]

    async def test_revoking_the_key_ends_its_sessions_and_no_others(
        self, owner: Account, relay: httpx.AsyncClient, connect: Any, db: Database
    ) -> None:
        doomed, spared = await owner.key(), await owner.key()
        client, other = connect(doomed["key"]), connect(spared["key"])
        ids = [
            (await opened(client, {**SPEC, "name": f"doomed-{n}"}, agent_id=f"agt-doomed-{n}"))["session"]
            for n in (1, 2)
        ]
        kept = (await opened(other, {**SPEC, "name": "spared"}))["session"]
        assert (await owner.client.delete(f"/v1/api-keys/{doomed['id']}")).status_code == 204
        ended = [c for c in await payloads(db) if c["kind"] == "session_ended" and c["session"] in [*ids, kept]]
        assert sorted(c["session"] for c in ended) == sorted(ids)
        assert {c["code"] for c in ended} == {"session.revoked"}
        answer = await client.post(f"/v1/agent/sessions/{ids[0]}/refresh", json={"agent_id": "agt-doomed-1"})
        assert code(answer, 401) == "auth.key_revoked"
        answer = await other.post(f"/v1/agent/sessions/{kept}/refresh", json={"agent_id": "agt-0123456789"})
        assert answer.status_code == 200

    async def test_a_session_never_outlives_a_revocation_that_races_with_it(
        self, owner: Account, relay: httpx.AsyncClient, connect: Any, app: Any, db: Database
    ) -> None:
        """The session's transaction authenticated before the revocation committed, and goes on after it."""
        from portico.control.tunnels.sessions import AgentFacts, TunnelSpec
        from portico.errors import Problem

        key = await owner.key()
        who = Caller("agent_key", key["id"], owner.organization, AGENT_KEY_PERMISSIONS, address="127.0.0.1")
        facts = AgentFacts("agt-racing-1", "laptop", "0", None)
        async with db.transaction() as tx:
            await tx.raw.fetchval("SELECT 1")  # the transaction is open: its authentication is over
            assert (await owner.client.delete(f"/v1/api-keys/{key['id']}")).status_code == 204
            with pytest.raises(Problem) as caught:
                await app.state.agent_sessions.open(tx, who, facts, [TunnelSpec("http")])
        assert caught.value.code == "auth.key_revoked"

    async def test_a_revocation_waits_for_a_session_in_the_making_and_ends_it(
        self, owner: Account, relay: httpx.AsyncClient, app: Any, db: Database
    ) -> None:
        from portico.control.tunnels.sessions import AgentFacts, TunnelSpec

        key = await owner.key()
        who = Caller("agent_key", key["id"], owner.organization, AGENT_KEY_PERMISSIONS, address="127.0.0.1")
        async with db.transaction() as tx:
            got = await app.state.agent_sessions.open(
                tx, who, AgentFacts("agt-racing-2", "laptop", "0", None), [TunnelSpec("http", name="racing")]
            )
            revoking = asyncio.create_task(owner.client.delete(f"/v1/api-keys/{key['id']}"))
            await asyncio.sleep(0.2)
            assert not revoking.done()
        assert (await revoking).status_code == 204
        assert {"kind": "session_ended", "session": got["session"]}.items() <= (await payloads(db))[-1].items()
