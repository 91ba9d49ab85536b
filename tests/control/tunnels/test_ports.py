"""Ports of TCP tunnels: leased once however many ask at a time, kept with the tunnel, and not handed on at once."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import httpx
import pytest

from portico.control.tunnels import jobs
from portico.control.tunnels.ports import Ports
from portico.errors import Problem
from portico.kit.db import Database
from portico.kit.jwt import KeySet
from portico.settings import ApiSettings, Secret
from portico.wire import grants
from portico.wire.policy import digest
from tests.control.conftest import Account
from tests.control.tunnels.test_sessions import actions, body, code, opened, payloads
from tests.control.tunnels.test_tunnels import made

FIRST, SIZE = 7300, 12
SPEC = {"protocol": "tcp", "target": "tcp://localhost:22"}


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    """A range that can be used up."""
    return dataclasses.replace(settings, tcp_ports=f"{FIRST}-{FIRST + SIZE - 1}", tunnel_connections=7)


@pytest.fixture(autouse=True)
async def empty_range(db: Database) -> None:
    """Every test begins with all ports free and never used; the database is the module's."""
    async with db.transaction() as tx:
        await tx.raw.execute("DELETE FROM tunnels")
        await tx.raw.execute("DELETE FROM tcp_ports")


async def wind_back(db: Database, seconds: int) -> None:
    """As if the ports had been freed that much earlier."""
    async with db.transaction() as tx:
        await tx.raw.execute("UPDATE tcp_ports SET freed_at = freed_at - make_interval(secs => $1)", float(seconds))


class TestCreate:
    async def test_says_what_was_made(self, owner: Account, db: Database) -> None:
        got = await made(owner.client, protocol="tcp", name="ssh", target="tcp://localhost:22")
        assert (got["url"], got["remote_port"], got["subdomain"]) == (f"tcp://localhost:{FIRST}", FIRST, None)
        assert (await owner.client.get(f"/v1/tunnels/{got['id']}")).json() == got
        change = (await payloads(db))[-1]
        assert change["tunnel"] == {
            "id": got["id"], "organization": owner.organization, "protocol": "tcp", "hosts": [], "port": FIRST,
            "state": "active", "generation": 1, "policy": {}, "policy_hash": digest({}), "policy_version": 1,
        }  # fmt: skip
        event = (await owner.client.get(f"/v1/tunnels/{got['id']}/events")).json()["data"][0]
        assert event["details"] == {"name": "ssh", "port": FIRST}
        assert "tunnel.create" in await actions(db, owner.organization)

    async def test_a_port_of_ones_own_choice(self, owner: Account, stranger: Account) -> None:
        got = await made(owner.client, protocol="tcp", remote_port=FIRST + 5)
        assert got["url"].endswith(f":{FIRST + 5}") and len(got["name"].split("-")) == 3
        wish = {"protocol": "tcp", "remote_port": FIRST + 5}
        for client in (owner.client, stranger.client):
            assert code(await client.post("/v1/tunnels", json=wish), 409) == "tunnel.port_taken"

    @pytest.mark.parametrize("port", [FIRST - 1, FIRST + SIZE, 22, 65_535])
    async def test_outside_of_the_range(self, owner: Account, port: int) -> None:
        answer = await owner.client.post("/v1/tunnels", json={"protocol": "tcp", "remote_port": port})
        assert code(answer, 400) == "tunnel.port_invalid"
        assert f"{FIRST} to {FIRST + SIZE - 1}" in answer.json()["detail"]

    @pytest.mark.parametrize("port", [0, -1, 65_536, "7300", True, 1.5])
    async def test_no_port_at_all(self, owner: Account, port: Any) -> None:
        answer = await owner.client.post("/v1/tunnels", json={"protocol": "tcp", "remote_port": port})
        assert code(answer, 422) == "request.invalid"

    async def test_each_protocol_has_its_own_address(self, owner: Account) -> None:
        both = {"protocol": "tcp", "subdomain": "shop"}
        assert code(await owner.client.post("/v1/tunnels", json=both), 400) == "tunnel.name_invalid"
        both = {"protocol": "http", "remote_port": FIRST}
        assert code(await owner.client.post("/v1/tunnels", json=both), 400) == "tunnel.port_invalid"

    async def test_many_at_once_get_different_ports(self, owner: Account, stranger: Account) -> None:
        """More than there are ports: each port goes to one, the rest hear that there is none."""
        wanted = [
            client.post("/v1/tunnels", json={"protocol": "tcp"})
            for _ in range(SIZE)
            for client in (owner.client, stranger.client)
        ]
        answers = await asyncio.gather(*wanted)
        ports = [a.json()["remote_port"] for a in answers if a.status_code == 201]
        assert sorted(ports) == list(range(FIRST, FIRST + SIZE))
        refused = [a for a in answers if a.status_code != 201]
        assert len(refused) == SIZE and {code(a, 409) for a in refused} == {"tunnel.ports_exhausted"}
        assert "portico rm" in refused[0].json()["hint"]

    async def test_one_port_wanted_by_many(self, owner: Account, stranger: Account) -> None:
        wish = {"protocol": "tcp", "remote_port": FIRST}
        answers = await asyncio.gather(
            *(client.post("/v1/tunnels", json=wish) for _ in range(8) for client in (owner.client, stranger.client))
        )
        assert sorted(a.status_code for a in answers) == [201] + [409] * 15

    async def test_a_creation_that_fails_leases_nothing(self, owner: Account, db: Database) -> None:
        await made(owner.client, protocol="tcp", name="twice")
        answer = await owner.client.post("/v1/tunnels", json={"protocol": "tcp", "name": "twice"})
        assert code(answer, 409) == "tunnel.name_taken"
        async with db.read() as reader:
            assert await reader.raw.fetchval("SELECT count(*) FROM tcp_ports WHERE leased_at IS NOT NULL") == 1


class TestChange:
    async def test_another_port(self, owner: Account, stranger: Account, db: Database) -> None:
        got = await made(owner.client, protocol="tcp")
        answer = await owner.client.patch(f"/v1/tunnels/{got['id']}", json={"remote_port": FIRST + 3})
        assert answer.status_code == 200 and answer.json()["url"] == f"tcp://localhost:{FIRST + 3}"
        change = (await payloads(db))[-1]["tunnel"]
        assert (change["port"], change["generation"]) == (FIRST + 3, 2)  # grants for the old port are fenced
        left = {"protocol": "tcp", "remote_port": FIRST}
        assert code(await stranger.client.post("/v1/tunnels", json=left), 409) == "tunnel.port_taken"
        assert code(await owner.client.patch(f"/v1/tunnels/{got['id']}", json={"remote_port": None}), 400)

    async def test_taken_or_not_there(self, owner: Account, stranger: Account) -> None:
        theirs = await made(stranger.client, protocol="tcp")
        mine = await made(owner.client, protocol="tcp")
        path = f"/v1/tunnels/{mine['id']}"
        answer = await owner.client.patch(path, json={"remote_port": theirs["remote_port"]})
        assert code(answer, 409) == "tunnel.port_taken"
        assert code(await owner.client.patch(path, json={"remote_port": 22}), 400) == "tunnel.port_invalid"
        assert code(await owner.client.patch(path, json={"subdomain": "web"}), 400) == "tunnel.name_invalid"
        assert (await owner.client.get(path)).json()["remote_port"] == mine["remote_port"]


class TestKeeping:
    async def test_stop_keeps_the_port(self, owner: Account) -> None:
        got = await made(owner.client, protocol="tcp")
        stopped = (await owner.client.post(f"/v1/tunnels/{got['id']}/stop")).json()
        assert (stopped["state"], stopped["url"]) == ("stopped", got["url"])

    async def test_a_deleted_port_stays_with_nobody_for_a_while(
        self, owner: Account, stranger: Account, db: Database, settings: ApiSettings
    ) -> None:
        got = await made(owner.client, protocol="tcp")
        assert (await owner.client.delete(f"/v1/tunnels/{got['id']}")).status_code == 204
        wish = {"protocol": "tcp", "remote_port": FIRST}
        assert code(await stranger.client.post("/v1/tunnels", json=wish), 409) == "tunnel.port_taken"
        assert (await made(stranger.client, protocol="tcp"))["remote_port"] == FIRST + 1
        await wind_back(db, settings.tcp_port_quarantine_seconds + 1)
        assert (await made(stranger.client, **wish))["remote_port"] == FIRST

    async def test_its_last_owner_may_have_it_back(self, owner: Account) -> None:
        got = await made(owner.client, protocol="tcp")
        await owner.client.delete(f"/v1/tunnels/{got['id']}")
        assert (await made(owner.client, protocol="tcp"))["remote_port"] == FIRST + 1  # not by chance
        assert (await made(owner.client, protocol="tcp", remote_port=FIRST))["remote_port"] == FIRST

    async def test_ports_that_were_free_for_longest_come_first(self, owner: Account, db: Database) -> None:
        rows = [await made(owner.client, protocol="tcp") for _ in range(SIZE)]
        for number in (4, 2):
            await owner.client.delete(f"/v1/tunnels/{rows[number]['id']}")
            await wind_back(db, 1000)
        assert (await made(owner.client, protocol="tcp"))["remote_port"] == FIRST + 4
        assert (await made(owner.client, protocol="tcp"))["remote_port"] == FIRST + 2

    async def test_ports_of_tunnels_that_went_with_their_organization(
        self, owner: Account, stranger: Account, db: Database, settings: ApiSettings
    ) -> None:
        got = await made(owner.client, protocol="tcp")
        kept = await made(stranger.client, protocol="tcp")
        async with db.transaction() as tx:
            await tx.raw.execute("DELETE FROM tunnels WHERE id = $1", got["id"])  # as a cascade does
        await jobs.housekeeping(db, settings)
        async with db.read() as reader:
            rows = await reader.raw.fetch("SELECT port FROM tcp_ports WHERE leased_at IS NOT NULL")
        assert [row["port"] for row in rows] == [kept["remote_port"]]

    async def test_a_narrower_range_takes_no_port_away(self, owner: Account, db: Database, app: Any) -> None:
        rows = [await made(owner.client, protocol="tcp") for _ in range(3)]
        app.state.tunnels.ports.range = range(FIRST, FIRST + 2)
        last = f"/v1/tunnels/{rows[2]['id']}"
        assert (await owner.client.get(last)).json()["url"] == rows[2]["url"]
        assert (await owner.client.post(f"{last}/stop")).status_code == 200


class TestSessions:
    async def test_a_grant_names_the_port(self, agent: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
        answer = await opened(agent, {**SPEC, "name": "db"})
        keys = KeySet.from_jwks((await client.get("/.well-known/jwks.json")).json())
        claims = grants.verify_grant(answer["grants"][0]["grant"], keys, now=_now(answer))
        assert (claims.proto, claims.port, claims.hosts) == ("tcp", FIRST, ())
        assert claims.url == answer["grants"][0]["url"] == f"tcp://localhost:{FIRST}"
        assert claims.limits["concurrency"] == 7  # connections, not requests

    async def test_an_http_grant_has_none(self, agent: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
        answer = await opened(agent, {"protocol": "http", "name": "web"})
        keys = KeySet.from_jwks((await client.get("/.well-known/jwks.json")).json())
        assert grants.verify_grant(answer["grants"][0]["grant"], keys, now=_now(answer)).port is None

    async def test_the_port_survives_agents(self, agent: httpx.AsyncClient) -> None:
        """Named, or found again by its target: another process, later, gets the same address."""
        for spec in ({**SPEC, "name": "kept"}, SPEC):
            first = await opened(agent, spec, agent_id="agt-one-0001")
            assert (await agent.delete(f"/v1/agent/sessions/{first['session']}")).status_code == 204
            second = await opened(agent, spec, agent_id="agt-two-0002")
            assert second["grants"][0]["url"] == first["grants"][0]["url"]
            assert (await agent.delete(f"/v1/agent/sessions/{second['session']}")).status_code == 204

    async def test_a_wish_is_found_again_without_a_name(self, agent: httpx.AsyncClient) -> None:
        spec = {**SPEC, "remote_port": FIRST + 8}
        first = await opened(agent, spec, agent_id="agt-one-0001")
        second = await opened(agent, spec, agent_id="agt-two-0002")
        assert second["grants"][0]["tunnel"] == first["grants"][0]["tunnel"]
        assert first["grants"][0]["url"].endswith(str(FIRST + 8))

    async def test_a_new_wish_moves_a_named_tunnel(self, agent: httpx.AsyncClient) -> None:
        first = await opened(agent, {**SPEC, "name": "moves"})
        second = await opened(agent, {**SPEC, "name": "moves", "remote_port": FIRST + 9})  # the quick way is left
        assert first["grants"][0]["tunnel"] == second["grants"][0]["tunnel"]
        assert second["grants"][0]["url"].endswith(str(FIRST + 9))
        again = await opened(agent, {**SPEC, "name": "moves"})
        assert again["grants"][0]["url"] == second["grants"][0]["url"]

    async def test_a_strangers_port_cannot_be_taken(
        self, agent: httpx.AsyncClient, stranger: Account, connect: Any
    ) -> None:
        mine = await opened(agent, {**SPEC, "remote_port": FIRST + 1})
        theirs = connect((await stranger.key())["key"])
        answer = await theirs.post("/v1/agent/sessions", json=body({**SPEC, "remote_port": FIRST + 1}))
        assert code(answer, 409) == "tunnel.port_taken"
        path = f"/v1/tunnels/{mine['grants'][0]['tunnel']}"
        assert code(await stranger.client.get(path), 404) == "tunnel.not_found"
        assert str(FIRST + 1) not in json.dumps((await stranger.client.get("/v1/tunnels")).json())

    async def test_protocols_do_not_mix(self, agent: httpx.AsyncClient) -> None:
        """A name keeps its protocol; one target may have a tunnel of each."""
        await opened(agent, {"protocol": "http", "name": "web"})
        answer = await agent.post("/v1/agent/sessions", json=body({**SPEC, "name": "web"}))
        assert code(answer, 409) == "tunnel.protocol_mismatch"
        target = {"target": "unix:/run/app.sock"}
        both = await opened(agent, {"protocol": "http", **target}, {"protocol": "tcp", **target})
        assert [g["url"].split(":")[0] for g in both["grants"]] == ["http", "tcp"]

    async def test_wishes_are_checked(self, agent: httpx.AsyncClient) -> None:
        async def refused(**more: Any) -> httpx.Response:
            return await agent.post("/v1/agent/sessions", json=body({**SPEC, **more}))

        assert code(await refused(remote_port=22), 400) == "tunnel.port_invalid"
        assert code(await refused(subdomain="shop"), 400) == "tunnel.name_invalid"
        assert code(await refused(protocol="http", remote_port=FIRST), 400) == "tunnel.port_invalid"


class TestRange:
    @pytest.mark.parametrize("text", ["7100", "7100-", "-7199", "7199-7100", "0-10", "1-65536", "a-b"])
    def test_refuses_what_is_none(self, text: str) -> None:
        with pytest.raises(Problem, match="tcp_ports"):
            Ports(ApiSettings(database_url=Secret("x"), master_key=Secret("x"), tcp_ports=text))

    async def test_an_installation_without_one(self, owner: Account, app: Any) -> None:
        app.state.tunnels.ports.range = range(0)
        answer = await owner.client.post("/v1/tunnels", json={"protocol": "tcp"})
        assert code(answer, 400) == "tunnel.protocol_unavailable"

    async def test_urls_with_a_host_of_their_own(self, settings: ApiSettings) -> None:
        from portico.control.tunnels.addresses import Addresses

        row = {"protocol": "tcp", "port": 7100, "subdomain": None}
        for host, shown in (("tcp.example.com", "tcp.example.com"), ("2001:db8::1", "[2001:db8::1]")):
            assert Addresses(dataclasses.replace(settings, tcp_url_host=host)).url(row) == f"tcp://{shown}:7100"


def _now(answer: dict[str, Any]) -> float:
    from datetime import datetime

    return datetime.fromisoformat(answer["expires_at"]).timestamp() - 60
