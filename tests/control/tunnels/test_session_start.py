"""A new instance with tunnels that exist is one statement; what takes its key's rights away is never overtaken by it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.access import AGENT_KEY_PERMISSIONS, Caller
from portico.control.tunnels.sessions import AgentFacts, TunnelSpec
from portico.kit.db import Database
from portico.kit.jwt import KeySet
from portico.wire import grants
from tests.control.conftest import Account, MovableClock
from tests.control.identity.racing import overtaken
from tests.control.identity.test_plans import move, operator
from tests.control.test_http import problem

__all__ = ["operator"]

SPECS = [{"name": "shop", "protocol": "http"}, {"name": "desk", "protocol": "http", "target": "http://127.0.0.1:8000"}]


async def ask(client: httpx.AsyncClient, agent_id: str, *specs: dict[str, Any]) -> httpx.Response:
    body = {"agent_id": agent_id, "hostname": "laptop", "version": "1", "tunnels": list(specs or SPECS)}
    return await client.post("/v1/agent/sessions", json=body)


async def sessions(db: Database, agent_id: str) -> int:
    async with db.read() as reader:
        return int(await reader.raw.fetchval("SELECT count(*) FROM agent_sessions WHERE agent_id = $1", agent_id))


@pytest.fixture
def opens(app: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The agent ids for whom one statement was not enough."""
    seen: list[str] = []
    usual = app.state.agent_sessions.open

    async def noted(tx: Any, caller: Any, agent: AgentFacts, specs: Any) -> Any:
        seen.append(agent.agent_id)
        return await usual(tx, caller, agent, specs)

    monkeypatch.setattr(app.state.agent_sessions, "open", noted)
    return seen


async def test_it_is_what_the_many_statements_make(
    agent: httpx.AsyncClient, owner: Account, opens: list[str], db: Database, clock: MovableClock
) -> None:
    first = (await ask(agent, "agt-first-1")).json()
    for number in (2, 3):  # the second is authenticated, the third recalled
        got = (await ask(agent, f"agt-first-{number}")).json()
        assert opens == ["agt-first-1"]
        keys = KeySet.from_jwks((await agent.get("/.well-known/jwks.json")).json())
        session = grants.verify_session(got["token"], keys, clock.wall().timestamp())
        assert (session.sid, session.agent, session.gen) == (got["session"], f"agt-first-{number}", 1)
        for row, before in zip(got["grants"], first["grants"], strict=True):
            made = grants.verify_grant(row["grant"], keys, clock.wall().timestamp(), session=session)
            as_before = grants.verify_grant(before["grant"], keys, clock.wall().timestamp())
            same = (
                "tun",
                "org",
                "name",
                "proto",
                "hosts",
                "limits",
                "gen",
                "policy",
                "policy_hash",
                "policy_version",
                "url",
            )
            assert [getattr(made, name) for name in same] == [getattr(as_before, name) for name in same]
        assert {name: got[name] for name in ("account", "edges")} == {
            name: first[name] for name in ("account", "edges")
        }
        # What a refresh finds is what was bound, in order.
        again = await agent.post(
            f"/v1/agent/sessions/{got['session']}/refresh", json={"agent_id": f"agt-first-{number}"}
        )
        assert [row["tunnel"] for row in again.json()["grants"]] == [row["tunnel"] for row in got["grants"]]
        (event, *_) = (await agent.get(f"/v1/tunnels/{got['grants'][1]['tunnel']}/events")).json()["data"]
        assert (event["kind"], event["details"]) == ("session", {"session": got["session"]})
        rows = (await owner.client.get("/v1/audit", params={"action": "agent_session.open"})).json()["data"]
        assert (rows[0]["target"], rows[0]["details"]) == (
            got["session"], {"agent_id": f"agt-first-{number}", "hostname": "laptop"},
        )  # fmt: skip
    assert (await owner.client.get("/v1/audit/verify")).json()["valid"]


async def test_it_is_recorded_that_the_key_was_used(agent: httpx.AsyncClient, owner: Account, app: Any) -> None:
    for number in range(3):
        await app.state.identity.write_last_used()
        assert (await ask(agent, f"agt-used-{number}")).status_code == 201
        assert app.state.identity._last_used.at


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "other"},
        {"subdomain": "elsewhere-9"},
        {"target": "http://127.0.0.1:9"},
        {"policy": {"addresses": {"rules": [{"allow": "198.51.100.0/24"}]}}},
    ],
)
async def test_whatever_is_not_so_yet_is_made_so(
    agent: httpx.AsyncClient, opens: list[str], spec: dict[str, Any]
) -> None:
    """The statement writes nothing then, and the usual way decides."""
    assert (await ask(agent, "agt-before-1")).status_code == 201
    answer = await ask(agent, "agt-before-2", {**SPECS[1], **spec})
    assert opens[1:] == ["agt-before-2"]
    assert answer.status_code == 201, answer.text
    found = (await agent.get(f"/v1/tunnels/{answer.json()['grants'][0]['tunnel']}")).json()
    assert {name: found[name] for name in spec} == spec


async def test_a_tunnel_named_twice_or_stopped(agent: httpx.AsyncClient, opens: list[str]) -> None:
    got = (await ask(agent, "agt-named-1")).json()
    problem(await ask(agent, "agt-named-2", SPECS[0], SPECS[0]), 409, "tunnel.name_taken")
    assert (await agent.post(f"/v1/tunnels/{got['grants'][0]['tunnel']}/stop")).status_code == 200
    assert (await ask(agent, "agt-named-3")).status_code == 201
    assert (await agent.get(f"/v1/tunnels/{got['grants'][0]['tunnel']}")).json()["state"] == "offline"
    assert opens[1:] == ["agt-named-2", "agt-named-3"]


async def test_one_instance_that_asks_ten_times_at_once_has_one_session(agent: httpx.AsyncClient, db: Database) -> None:
    await ask(agent, "agt-ten-1")
    answers = await asyncio.gather(*(ask(agent, "agt-ten-2") for _ in range(10)))
    assert {answer.status_code for answer in answers} == {201}
    assert await sessions(db, "agt-ten-2") == 1


# What takes a key's right away: the change, and how it is told.
TAKEN = {
    "revoked": ("UPDATE api_keys SET revoked_at = now() WHERE id = :key", 401, "auth.key_revoked"),
    "expired": ("UPDATE api_keys SET expires_at = now() - interval '1 day' WHERE id = :key", 401, "auth.key_invalid"),
    "elsewhere": ("UPDATE api_keys SET allowed_cidrs = '{203.0.113.0/24}' WHERE id = :key", 403, "auth.address_denied"),
    "viewer": ("UPDATE members SET role = 'viewer' WHERE user_id = :user", 403, "auth.forbidden"),
    "no member": ("DELETE FROM members WHERE user_id = :user", 401, "auth.key_revoked"),
    "disabled": ("UPDATE users SET disabled_at = now() WHERE id = :user", 401, "auth.key_revoked"),
    "suspended": ("UPDATE organizations SET suspended_at = now() WHERE id = :organization", 403, "organization.suspended"),
    "deleting": ("UPDATE organizations SET delete_after = now() WHERE id = :organization", 403, "organization.deleting"),
}  # fmt: skip


class TestTaken:
    @pytest.fixture
    async def key(self, owner: Account, relay: httpx.AsyncClient) -> dict[str, Any]:
        return await owner.key()

    def change(self, what: str, key: dict[str, Any], owner: Account) -> sa.Executable:
        names = {"key": key["id"], "user": owner.user, "organization": owner.organization}
        statement = TAKEN[what][0]
        return sa.text(statement).bindparams(**{name: names[name] for name in names if f":{name}" in statement})

    @pytest.mark.parametrize("what", TAKEN)
    async def test_what_is_remembered_of_a_key_opens_nothing(
        self, what: str, key: dict[str, Any], owner: Account, connect: Callable[..., httpx.AsyncClient], db: Database
    ) -> None:
        agent = connect(key["key"])
        for number in range(2):
            assert (await ask(agent, f"agt-held-{number}")).status_code == 201
        async with db.transaction() as tx:
            await tx.execute(self.change(what, key, owner))
        problem(await ask(agent, "agt-held-9"), *TAKEN[what][1:])
        assert await sessions(db, "agt-held-9") == 0

    @pytest.mark.parametrize("what", ["revoked", "viewer", "suspended"])
    async def test_nor_while_the_change_is_being_made(
        self, what: str, key: dict[str, Any], owner: Account, connect: Callable[..., httpx.AsyncClient], db: Database
    ) -> None:
        """The statement has begun, and with it its first look at the database; what follows the lock is looked at anew."""
        agent = connect(key["key"])
        for number in range(2):
            assert (await ask(agent, f"agt-held-{number}")).status_code == 201
        hold = sa.text("SELECT FROM api_keys WHERE id = :key FOR UPDATE").bindparams(key=key["id"])
        answer = await overtaken(db, hold, self.change(what, key, owner), act=ask(agent, "agt-held-9"))
        problem(answer, *TAKEN[what][1:])
        assert await sessions(db, "agt-held-9") == 0

    async def test_a_revocation_waits_for_a_session_in_the_making_and_ends_it(
        self, key: dict[str, Any], owner: Account, connect: Callable[..., httpx.AsyncClient], app: Any, db: Database
    ) -> None:
        assert (await ask(connect(key["key"]), "agt-making-1")).status_code == 201
        who = Caller("agent_key", key["id"], owner.organization, AGENT_KEY_PERMISSIONS, address="127.0.0.1")
        facts = AgentFacts("agt-making-2", "laptop", "0", None)
        async with db.transaction() as tx:
            got = await app.state.agent_sessions.started(tx, who, facts, [TunnelSpec("http", name="shop")])
            assert got is not None
            revoking = asyncio.create_task(owner.client.delete(f"/v1/api-keys/{key['id']}"))
            await asyncio.sleep(0.2)
            assert not revoking.done()
        assert (await revoking).status_code == 204
        async with db.read() as reader:
            query = "SELECT ended_code FROM agent_sessions WHERE id = $1"
            assert await reader.raw.fetchval(query, got["session"]) == "session.revoked"


async def test_a_tunnel_that_is_deleted_at_this_moment_is_made_anew(agent: httpx.AsyncClient, db: Database) -> None:
    got = (await ask(agent, "agt-gone-1", SPECS[0])).json()
    gone = sa.text("DELETE FROM tunnels WHERE id = :id").bindparams(id=got["grants"][0]["tunnel"])
    answer = await overtaken(db, gone, act=ask(agent, "agt-gone-2", SPECS[0]))
    assert answer.status_code == 201, answer.text
    assert answer.json()["grants"][0]["tunnel"] != got["grants"][0]["tunnel"]
    assert await sessions(db, "agt-gone-2") == 1


async def test_the_tunnels_of_another_organization_are_not_found(
    agent: httpx.AsyncClient, stranger: Account, connect: Callable[..., httpx.AsyncClient], opens: list[str]
) -> None:
    got = (await ask(agent, "agt-ours-1")).json()
    theirs = (await ask(connect((await stranger.key())["key"]), "agt-theirs-1")).json()
    assert opens == ["agt-ours-1", "agt-theirs-1"]
    assert {row["tunnel"] for row in got["grants"]}.isdisjoint(row["tunnel"] for row in theirs["grants"])


class TestPlans:
    async def test_of_many_new_instances_no_more_are_on_line_than_allowed(
        self, agent: httpx.AsyncClient, owner: Account, operator: httpx.AsyncClient, opens: list[str]
    ) -> None:
        for n in range(6):
            assert (await owner.client.post("/v1/tunnels", json={"name": f"t{n}"})).status_code == 201
        await move(operator, owner.organization, "free", overrides={"tunnels": 10, "tunnels_online": 2})
        answers = await asyncio.gather(*(ask(agent, f"agt-many-{n}", {"name": f"t{n}"}) for n in range(6)))
        assert sorted(answer.status_code for answer in answers) == [201] * 2 + [403] * 4
        assert len(set(opens)) == 4  # those who are refused, by the usual way
        # Their own tunnels need no second place.
        served = next(n for n, answer in enumerate(answers) if answer.status_code == 201)
        assert (await ask(agent, "agt-many-new", {"name": f"t{served}"})).status_code == 201

    async def test_a_grant_never_carries_the_limits_of_the_plan_before(
        self, agent: httpx.AsyncClient, owner: Account, operator: httpx.AsyncClient, opens: list[str]
    ) -> None:
        for number in range(2):
            await ask(agent, f"agt-plan-{number}")
        await move(operator, owner.organization, "free")
        got = (await ask(agent, "agt-plan-9")).json()
        keys = KeySet.from_jwks((await agent.get("/.well-known/jwks.json")).json())
        claims = grants.verify_grant(got["grants"][0]["grant"], keys, 0, leeway=1e12)
        assert claims.limits["concurrency"] == 20
        assert got["account"]["plan"] == "free"
