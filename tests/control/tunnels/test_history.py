"""The history of tunnels: what relays report becomes events, and an organization reads its own."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from portico.control.tunnels import jobs
from portico.kit.db import Database
from portico.kit.ids import first_id, new_id
from portico.settings import ApiSettings
from tests.control.conftest import Account, heartbeat_body

Beat = Callable[..., Any]


async def made(client: httpx.AsyncClient, name: str) -> str:
    answer = await client.post("/v1/tunnels", json={"name": name})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def session_of(agent: httpx.AsyncClient, *names: str) -> str:
    body = {"agent_id": new_id("agt"), "hostname": "laptop", "tunnels": [{"name": name} for name in names]}
    answer = await agent.post("/v1/agent/sessions", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["session"])


async def events(client: httpx.AsyncClient, *tunnels: str, **query: Any) -> list[dict[str, Any]]:
    answer = await client.get("/v1/events", params=[*(("tunnel", t) for t in tunnels), *query.items()])
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


@pytest.fixture
def beat(relay: httpx.AsyncClient) -> Beat:
    """A heartbeat with these tunnels bound (tunnel → session), and reasons for what left."""

    async def send(bound: dict[str, str], left: dict[str, str] | None = None, name: str = "relay-1") -> None:
        body = heartbeat_body(
            name,
            bound=[{"tunnel": t, "session": s, "generation": 1} for t, s in bound.items()],
            left=[{"tunnel": t, "reason": why} for t, why in (left or {}).items()],
        )
        answer = await relay.post("/v1/edge/heartbeat", json=body)
        assert answer.status_code == 200, answer.text

    return send


class TestPresence:
    async def test_online_and_offline_with_reason_and_machine(
        self, owner: Account, agent: httpx.AsyncClient, beat: Beat
    ) -> None:
        tunnel = await made(owner.client, "comes-and-goes")
        session = await session_of(agent, "comes-and-goes")
        await beat({tunnel: session})
        await beat({tunnel: session})
        await beat({}, {tunnel: "the agent is stopping"})
        await beat({}, {tunnel: "said twice"})
        found = await events(owner.client, tunnel)
        assert [e["kind"] for e in found] == ["offline", "online", "session", "created"]
        where = {"relay": "relay-1", "session": session, "agent": "laptop"}
        assert found[0]["details"] == where | {"reason": "the agent is stopping"} and found[1]["details"] == where
        assert (found[0]["tunnel"], found[0]["name"]) == (tunnel, "comes-and-goes")

    async def test_a_relay_that_was_restarted_knows_no_reason(
        self, owner: Account, agent: httpx.AsyncClient, beat: Beat
    ) -> None:
        tunnel = await made(owner.client, "relay-restarted")
        session = await session_of(agent, "relay-restarted")
        await beat({tunnel: session})
        await beat({})
        await beat({tunnel: session})
        found = (await events(owner.client, tunnel))[:3]
        assert [e["kind"] for e in found] == ["online", "offline", "online"]
        assert found[1]["details"]["reason"] == "the relay was restarted"

    async def test_another_session_is_online_anew(self, owner: Account, agent: httpx.AsyncClient, beat: Beat) -> None:
        tunnel = await made(owner.client, "taken-over")
        first, second = await session_of(agent, "taken-over"), "ses_other"
        await beat({tunnel: first})
        await beat({tunnel: second})
        kinds = [(e["kind"], e["details"].get("session")) for e in await events(owner.client, tunnel)]
        assert kinds[:2] == [("online", second), ("online", first)]

    async def test_a_move_to_another_relay_is_not_off_line(
        self, owner: Account, agent: httpx.AsyncClient, beat: Beat
    ) -> None:
        tunnel = await made(owner.client, "moves")
        session = await session_of(agent, "moves")
        await beat({tunnel: session})
        await beat({tunnel: session}, name="relay-2")
        await beat({}, {tunnel: "relay shut down"})
        found = await events(owner.client, tunnel)
        assert [(e["kind"], e["details"].get("relay")) for e in found][:2] == [
            ("online", "relay-2"),
            ("online", "relay-1"),
        ]
        await beat({}, {tunnel: "closed"}, name="relay-2")
        assert (await events(owner.client, tunnel))[0]["kind"] == "offline"

    async def test_a_deleted_or_unknown_tunnel_is_no_trouble(
        self, owner: Account, agent: httpx.AsyncClient, beat: Beat
    ) -> None:
        tunnel = await made(owner.client, "deleted-while-online")
        session = await session_of(agent, "deleted-while-online")
        await beat({tunnel: session, "tun_unknown": "ses_x"})
        await owner.client.delete(f"/v1/tunnels/{tunnel}")
        await beat({}, {tunnel: "the tunnel was deleted"})
        assert tunnel not in {e["tunnel"] for e in await events(owner.client)}

    async def test_a_relay_that_falls_silent(
        self, owner: Account, agent: httpx.AsyncClient, beat: Beat, db: Database, settings: ApiSettings
    ) -> None:
        stays, lost = await made(owner.client, "stays"), await made(owner.client, "lost")
        session = await session_of(agent, "stays", "lost")
        await beat({stays: session, lost: session}, name="relay-dead")
        await beat({stays: session})
        async with db.transaction() as tx:
            await tx.raw.execute("UPDATE relays SET seen_at = now() - interval '20 s' WHERE name = 'relay-dead'")
        await jobs.housekeeping(db, settings)
        assert (await events(owner.client, lost))[0]["kind"] == "online", "an outage of the API may be as long"
        async with db.transaction() as tx:
            await tx.raw.execute("UPDATE relays SET seen_at = now() - interval '40 s' WHERE name = 'relay-dead'")
        for _ in range(2):
            await jobs.housekeeping(db, settings)
        found = await events(owner.client, lost)
        assert [e["kind"] for e in found[:2]] == ["offline", "online"]
        assert "has not reported since" in found[0]["details"]["reason"]
        assert (await events(owner.client, stays))[0]["kind"] == "online", "another relay has it"
        await beat({lost: session}, name="relay-dead")
        assert (await events(owner.client, lost))[0]["kind"] == "online", "it came back with the same tunnels"


class TestReading:
    async def test_pages_times_and_choice(self, owner: Account) -> None:
        one, two = await made(owner.client, "read-one"), await made(owner.client, "read-two")
        for n in range(3):
            await owner.client.patch(f"/v1/tunnels/{one}", json={"target": f"http://localhost:{n}"})
        everything = await events(owner.client)
        assert [e["kind"] for e in everything] == ["changed"] * 3 + ["created"] * 2
        assert everything == sorted(everything, key=lambda e: e["id"], reverse=True)
        assert [e["tunnel"] for e in await events(owner.client, two)] == [two]
        assert await events(owner.client, one, two) == everything
        answer = (await owner.client.get("/v1/events", params={"limit": 2})).json()
        rest = (await owner.client.get("/v1/events", params={"cursor": answer["next_cursor"]})).json()
        assert answer["data"] + rest["data"] == everything and rest["next_cursor"] is None
        since = everything[1]["at"]
        assert await events(owner.client, since=since) == everything[:2]
        assert await events(owner.client, since=(datetime.now(UTC) + timedelta(days=1)).isoformat()) == []
        for ever in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59+23:59", "1970-01-01T00:00:00Z"):
            assert len(await events(owner.client, since=ever)) in (0, 5)

    async def test_nobody_elses(self, owner: Account, stranger: Account, connect: Any) -> None:
        tunnel = await made(owner.client, "not-yours")
        assert await events(stranger.client) == []
        answer = await stranger.client.get("/v1/events", params={"tunnel": tunnel})
        assert answer.status_code == 404 and answer.json()["code"] == "tunnel.not_found"
        nothing = connect((await owner.key("api", scopes=["audit:read"]))["key"])
        assert (await nothing.get("/v1/events")).status_code == 403
        assert (await connect().get("/v1/events")).status_code == 401

    @pytest.mark.parametrize(
        "query", ["tunnel=a%20b", "tunnel=", "since=yesterday", "since=2026-01-01T00:00:00", "limit=0"]
    )
    async def test_bad_questions(self, owner: Account, query: str) -> None:
        answer = await owner.client.get(f"/v1/events?{query}")
        assert answer.status_code == 422, answer.text

    def test_the_first_id_of_a_moment(self) -> None:
        now = datetime.now(UTC).timestamp()
        assert first_id("evt", now - 1) < new_id("evt") < first_id("evt", now + 5)
        assert len(first_id("evt", now)) == len(new_id("evt"))
