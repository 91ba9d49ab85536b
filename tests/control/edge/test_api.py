"""The edge API: credentials, heartbeats and presence, acknowledgements, usage counted once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from portico.control.access import Caller
from portico.control.tunnels import relays
from portico.kit.db import Database
from portico.kit.ids import new_token
from portico.settings import Secret
from tests.control.conftest import Account, heartbeat_body

OPERATOR = Caller("operator", "installation", None)
Connect = Callable[..., httpx.AsyncClient]


def code(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return str(answer.json()["code"])


def usage_body(*batches: dict[str, Any], relay: str = "relay-1", boot: str = "aa11") -> dict[str, Any]:
    return {"relay": relay, "boot": boot, "batches": list(batches)}


def batch(seq: int, *rows: dict[str, Any], at: datetime | float | None = None) -> dict[str, Any]:
    moment = at if at is not None else datetime.now(UTC)
    text = moment.isoformat() if isinstance(moment, datetime) else moment
    return {"seq": seq, "from": text, "to": text, "rows": list(rows)}


def row(tunnel: str, organization: str = "org_none", requests: int = 1, **more: int) -> dict[str, Any]:
    return {"tunnel": tunnel, "organization": organization, "requests": requests, **more}


async def new_tunnel(person: httpx.AsyncClient) -> str:
    answer = await person.post("/v1/tunnels", json={})
    assert answer.status_code == 201
    return str(answer.json()["id"])


async def tunnel_total(db: Database, tunnel: str, column: str = "requests") -> int:
    async with db.read() as reader:
        query = f"SELECT coalesce(sum({column}), 0) FROM tunnel_usage WHERE tunnel_id = $1"
        return int(await reader.raw.fetchval(query, tunnel))


async def organization_total(db: Database, organization: str) -> int:
    async with db.read() as reader:
        query = "SELECT coalesce(sum(requests), 0) FROM organization_usage WHERE organization_id = $1"
        return int(await reader.raw.fetchval(query, organization))


REQUESTS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", "/v1/edge/stream", None),
    ("POST", "/v1/edge/heartbeat", heartbeat_body()),
    ("POST", "/v1/edge/acks", {"relay": "relay-1", "version": 1}),
    ("POST", "/v1/edge/usage", usage_body({"seq": 1, "from": 1.0, "to": 2.0, "rows": []})),
]


class TestCredentials:
    @pytest.mark.parametrize(("method", "path", "json"), REQUESTS)
    async def test_nothing_but_a_live_relay_key(
        self, method: str, path: str, json: Any, owner: Account, connect: Connect, app: Any
    ) -> None:
        agent, scoped = (await owner.key())["key"], (await owner.key("api"))["key"]
        async with app.state.db.transaction() as tx:
            revoked_id, revoked = await relays.create_key(tx, OPERATOR, "old")
            assert await relays.revoke_key(tx, OPERATOR, revoked_id)
            assert not await relays.revoke_key(tx, OPERATOR, revoked_id)
        for credential, expected in (
            (None, "auth.required"),
            (agent, "edge.relay_key_invalid"),
            (scoped, "edge.relay_key_invalid"),
            (owner.access, "edge.relay_key_invalid"),
            (new_token("rly"), "edge.relay_key_invalid"),
            (revoked, "edge.relay_key_revoked"),
        ):
            assert code(await connect(credential).request(method, path, json=json), 401) == expected

    async def test_a_relay_key_opens_nothing_else(self, relay: httpx.AsyncClient) -> None:
        for method, path in (
            ("GET", "/v1/tunnels"), ("POST", "/v1/tunnels"), ("GET", "/v1/tunnels/tun_x"), ("DELETE", "/v1/tunnels/tun_x"),
            ("POST", "/v1/tunnels/tun_x/stop"), ("GET", "/v1/tunnels/tun_x/events"), ("PATCH", "/v1/tunnels/tun_x"),
            ("POST", "/v1/agent/sessions"), ("POST", "/v1/agent/sessions/ses_x/refresh"), ("DELETE", "/v1/agent/sessions/ses_x"),
        ):  # fmt: skip
            body = {"agent_id": "agt-0123456789"} if method in ("POST", "PATCH") else None
            answer = await relay.request(method, path, json=body)
            assert answer.status_code == 401 and answer.json()["code"] == "auth.key_invalid", path

    async def test_a_key_bound_to_one_name(self, app: Any, connect: Connect) -> None:
        async with app.state.db.transaction() as tx:
            _, token = await relays.create_key(tx, OPERATOR, "eu", relay="relay-eu")
        client = connect(token)
        assert (await client.post("/v1/edge/heartbeat", json=heartbeat_body("relay-eu"))).status_code == 200
        for path, body in (
            ("heartbeat", heartbeat_body("relay-us")),
            ("acks", {"relay": "relay-us", "version": 1}),
            ("usage", usage_body(batch(1), relay="relay-us")),
        ):
            assert code(await client.post(f"/v1/edge/{path}", json=body), 403) == "auth.forbidden"


class TestHeartbeat:
    async def test_registers_and_renews(self, relay: httpx.AsyncClient, db: Database) -> None:
        body = heartbeat_body(version=7, load={"sessions": 3, "cpu": 0.25})
        answer = await relay.post("/v1/edge/heartbeat", json=body)
        assert answer.json()["ok"] is True and abs(answer.json()["time"] - datetime.now(UTC).timestamp()) < 5
        async with db.read() as reader:
            found = await reader.raw.fetchrow(
                "SELECT version, now() - seen_at AS age FROM relays WHERE name = 'relay-1'"
            )
        assert found["version"] == 7 and found["age"] < timedelta(seconds=2)

    async def test_ack_never_goes_back(self, relay: httpx.AsyncClient, db: Database) -> None:
        for version in (9, 5):
            assert (await relay.post("/v1/edge/acks", json={"relay": "relay-1", "version": version})).status_code == 200
        async with db.read() as reader:
            assert await reader.raw.fetchval("SELECT version FROM relays WHERE name = 'relay-1'") == 9

    async def test_an_unchanged_set_writes_no_binding(self, relay: httpx.AsyncClient, db: Database) -> None:
        bound = [{"tunnel": f"tun_{n}", "session": "ses_1", "generation": 1} for n in range(50)]

        async def rows() -> dict[str, tuple[str, int]]:
            async with db.read() as reader:
                found = await reader.raw.fetch("SELECT tunnel_id, session_id, xmin::text FROM relay_bindings")
            return {r["tunnel_id"]: (r["session_id"], r["xmin"]) for r in found}

        await relay.post("/v1/edge/heartbeat", json=heartbeat_body(bound=bound))
        first = await rows()
        await relay.post("/v1/edge/heartbeat", json=heartbeat_body(bound=bound[::-1]))
        assert await rows() == first and len(first) == 50
        changed = [
            *bound[1:49],
            {"tunnel": "tun_49", "session": "ses_2", "generation": 2},
            {**bound[0], "tunnel": "tun_new"},
        ]
        await relay.post("/v1/edge/heartbeat", json=heartbeat_body(bound=changed))
        second = await rows()
        assert second.keys() == (first.keys() - {"tun_0"}) | {"tun_new"}
        assert [t for t in second if second[t] != first.get(t)] and second["tun_1"] == first["tun_1"]
        assert second["tun_49"][0] == "ses_2"

    @pytest.mark.parametrize(
        "change",
        [
            {"relay": "Relay 1"}, {"relay": ""}, {"connect_url": "http://x"}, {"public_url": "ws://x"}, {"version": -1},
            {"version": "1"}, {"load": {"cpu": -1}}, {"load": {"sessions": 1.5}}, {"bound": [{"tunnel": "t"}]},
            {"bound": [{"tunnel": "t", "session": "s", "generation": True}]}, {"draining": "maybe"}, {"region": "EU west"},
        ],
    )  # fmt: skip
    async def test_shapes(self, relay: httpx.AsyncClient, change: dict[str, Any]) -> None:
        answer = await relay.post("/v1/edge/heartbeat", json=heartbeat_body(**change))
        assert code(answer, 422) == "request.invalid"

    async def test_ten_thousand_bound_tunnels(self, relay: httpx.AsyncClient) -> None:
        bound = [{"tunnel": f"tun_{n:026}", "session": f"ses_{n:026}", "generation": 1} for n in range(10_000)]
        assert (await relay.post("/v1/edge/heartbeat", json=heartbeat_body(bound=bound))).status_code == 200


class Presence:
    """A tunnel that its relay reports as bound, or not."""

    def __init__(self, owner: Account, agent: httpx.AsyncClient, relay: httpx.AsyncClient) -> None:
        self.owner, self.agent, self.relay = owner, agent, relay
        self.tunnel = self.session = ""

    async def open(self) -> None:
        body = {"agent_id": "agt-0123456789", "hostname": "laptop", "tunnels": [{"protocol": "http"}]}
        got = (await self.agent.post("/v1/agent/sessions", json=body)).json()
        self.tunnel, self.session = got["grants"][0]["tunnel"], got["session"]

    async def report(self, *, bound: bool, relay: str = "relay-1") -> dict[str, Any]:
        rows = [{"tunnel": self.tunnel, "session": self.session, "generation": 1}] if bound else []
        answer = await self.relay.post("/v1/edge/heartbeat", json=heartbeat_body(relay, bound=rows))
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def state(self) -> tuple[str, Any]:
        found = (await self.owner.client.get(f"/v1/tunnels/{self.tunnel}")).json()
        assert found == (await self.owner.client.get("/v1/tunnels")).json()["data"][0]
        return found["state"], found["agent"]


@pytest.fixture
async def presence(owner: Account, agent: httpx.AsyncClient, relay: httpx.AsyncClient) -> Presence:
    made = Presence(owner, agent, relay)
    await made.open()
    return made


ONLINE = ("online", {"hostname": "laptop", "relay": "relay-1"})


class TestPresenceWithoutRedis:
    async def test_bound_is_online_and_a_silent_relay_is_not(self, presence: Presence, db: Database, app: Any) -> None:
        assert await presence.state() == ("offline", None)
        assert (await presence.report(bound=True))["presence"] is False
        assert await presence.state() == ONLINE
        await presence.report(bound=False)
        assert await presence.state() == ("offline", None)
        await presence.report(bound=True)
        async with db.transaction() as tx:
            await tx.raw.execute("UPDATE relays SET seen_at = now() - interval '16 s'")
        app.state.relays.forget()
        assert await presence.state() == ("offline", None)

    async def test_stopped_is_stopped_even_while_it_is_still_bound(self, presence: Presence) -> None:
        await presence.report(bound=True)
        answer = await presence.owner.client.post(f"/v1/tunnels/{presence.tunnel}/stop")
        assert answer.json()["state"] == "stopped"
        assert await presence.state() == ("stopped", None)


class TestPresenceInRedis:
    @pytest.fixture
    def settings(self, settings: Any, valkey: Any) -> Any:
        return dataclasses.replace(settings, redis_url=Secret(valkey.url), redis_pause_seconds=0.2)

    async def test_it_answers_and_forgets_with_the_lease(self, presence: Presence, app: Any, db: Database) -> None:
        assert (await presence.report(bound=True))["presence"] is True
        async with db.transaction() as tx:
            await tx.raw.execute("DELETE FROM relay_bindings")  # so that only Redis can say so
        assert await presence.state() == ONLINE
        ttl = await app.state.redis.pipeline(lambda p: p.ttl("portico:bound:relay-1"))
        assert 0 < ttl[0] <= 15
        await presence.report(bound=False)
        assert await presence.state() == ("offline", None)

    async def test_another_relay_takes_over(self, presence: Presence) -> None:
        await presence.report(bound=True)
        await presence.report(bound=True, relay="relay-2")
        await presence.report(bound=False)
        assert await presence.state() == ("online", {"hostname": "laptop", "relay": "relay-2"})

    async def test_emptied_redis_is_not_believed(self, presence: Presence, app: Any) -> None:
        await presence.report(bound=True)
        await app.state.redis.pipeline(lambda p: p.flushdb())
        assert await presence.state() == ONLINE, "PostgreSQL knows"
        assert (await presence.report(bound=True))["presence"] is True


class TestPresenceWhileRedisIsDown:
    @pytest.fixture
    def settings(self, settings: Any, tmp_path: Any) -> Any:
        return dataclasses.replace(settings, redis_url=Secret(f"unix://{tmp_path}/nobody.sock"))

    async def test_everything_works(self, presence: Presence) -> None:
        assert (await presence.report(bound=True))["presence"] is False
        assert await presence.state() == ONLINE


class TestUsage:
    async def test_counts_into_hours_for_tunnel_and_organization(
        self, relay: httpx.AsyncClient, owner: Account, db: Database
    ) -> None:
        tunnel = await new_tunnel(owner.client)
        now = datetime.now(UTC).replace(minute=30, second=0, microsecond=0)
        early = now - timedelta(hours=2)
        counts = {"connections": 2, "bytes_in": 10, "bytes_out": 2**40, "errors": 1}
        answer = await relay.post(
            "/v1/edge/usage",
            json=usage_body(
                batch(1, row(tunnel, owner.organization, 5, **counts), at=now),
                batch(2, row(tunnel, owner.organization, 7), at=early.timestamp()),
                batch(4, row(tunnel, "org_wrong", 1), at=now),
            ),
        )
        assert answer.status_code == 200 and answer.json() == {"acknowledged": 4}
        async with db.read() as reader:
            rows = await reader.raw.fetch("SELECT * FROM tunnel_usage WHERE tunnel_id = $1 ORDER BY hour", tunnel)
        assert [(r["hour"], r["requests"]) for r in rows] == [
            (early.replace(minute=0), 7), (now.replace(minute=0), 6),
        ]  # fmt: skip
        last = rows[1]
        assert (last["connections"], last["bytes_in"], last["bytes_out"], last["errors"]) == (2, 10, 2**40, 1)
        assert last["organization_id"] == owner.organization, "the database knows whose tunnel it is"
        assert await organization_total(db, owner.organization) == 13

    async def test_sent_again_it_is_counted_once(self, relay: httpx.AsyncClient, owner: Account, db: Database) -> None:
        tunnel = await new_tunnel(owner.client)
        body = usage_body(batch(1, row(tunnel)), batch(2, row(tunnel)), boot="again")
        for _ in range(3):
            assert (await relay.post("/v1/edge/usage", json=body)).json() == {"acknowledged": 2}
        overlap = usage_body(batch(2, row(tunnel)), batch(3, row(tunnel)), batch(3, row(tunnel)), boot="again")
        await relay.post("/v1/edge/usage", json=overlap)
        assert await tunnel_total(db, tunnel) == 3
        assert await organization_total(db, owner.organization) == 3

    async def test_more_than_a_total_can_hold(self, relay: httpx.AsyncClient, owner: Account, db: Database) -> None:
        """A fault here would be reported again and again, and nothing of the relay counted any more."""
        tunnel = await new_tunnel(owner.client)
        rows = [row(tunnel, owner.organization, 2**53 - 1) for _ in range(1100)]
        for seq in (1, 2):
            answer = await relay.post("/v1/edge/usage", json=usage_body(batch(seq, *rows), boot="vast"))
            assert answer.status_code == 200 and answer.json() == {"acknowledged": seq}
        assert await tunnel_total(db, tunnel) == 2**63 - 1
        assert await organization_total(db, owner.organization) == 2**63 - 1

    async def test_simultaneous_duplicates_are_counted_once(
        self, relay: httpx.AsyncClient, owner: Account, db: Database
    ) -> None:
        tunnels = [await new_tunnel(owner.client) for _ in range(3)]

        async def send(order: int) -> None:
            rows = [row(t) for t in (tunnels if order % 2 else tunnels[::-1])]
            seqs = range(1, 11) if order % 2 else range(10, 0, -1)
            body = usage_body(*(batch(seq, *rows) for seq in seqs), boot="race")
            answer = await relay.post("/v1/edge/usage", json=body)
            assert answer.json() == {"acknowledged": 10}, answer.text

        await asyncio.gather(*(send(n) for n in range(16)))
        assert [await tunnel_total(db, t) for t in tunnels] == [10] * 3
        assert await organization_total(db, owner.organization) == 30

    async def test_another_boot_or_relay_is_another_sequence(
        self, relay: httpx.AsyncClient, owner: Account, db: Database
    ) -> None:
        tunnel = await new_tunnel(owner.client)
        for name, boot in (("relay-1", "b1"), ("relay-1", "b2"), ("relay-2", "b1")):
            await relay.post("/v1/edge/usage", json=usage_body(batch(1, row(tunnel)), relay=name, boot=boot))
        assert await tunnel_total(db, tunnel) == 3

    async def test_late_gaps_are_filled(self, relay: httpx.AsyncClient, owner: Account, db: Database) -> None:
        tunnel = await new_tunnel(owner.client)
        for seq in (5, 2, 9):
            answer = await relay.post("/v1/edge/usage", json=usage_body(batch(seq, row(tunnel)), boot="gaps"))
            assert answer.json() == {"acknowledged": seq}
        assert await tunnel_total(db, tunnel) == 3

    async def test_unknown_tunnels_count_for_a_known_organization_alone(
        self, relay: httpx.AsyncClient, owner: Account, db: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        body = usage_body(
            batch(1, row("tun_gone", owner.organization, 4), row("tun_gone", "org_nobody", 9)), boot="unknown"
        )
        assert (await relay.post("/v1/edge/usage", json=body)).json() == {"acknowledged": 1}
        assert await organization_total(db, owner.organization) == 4
        assert await organization_total(db, "org_nobody") == 0
        assert await tunnel_total(db, "tun_gone") == 0
        assert "usage of nobody dropped" in caplog.text

    async def test_a_deleted_tunnel_keeps_what_it_used(
        self, relay: httpx.AsyncClient, owner: Account, db: Database
    ) -> None:
        tunnel = await new_tunnel(owner.client)
        await relay.post("/v1/edge/usage", json=usage_body(batch(1, row(tunnel, owner.organization)), boot="del"))
        await owner.client.delete(f"/v1/tunnels/{tunnel}")
        await relay.post("/v1/edge/usage", json=usage_body(batch(2, row(tunnel, owner.organization)), boot="del"))
        assert await tunnel_total(db, tunnel) == 2

    async def test_a_clock_gone_wrong_counts_for_the_present(
        self, relay: httpx.AsyncClient, owner: Account, db: Database
    ) -> None:
        tunnel = await new_tunnel(owner.client)
        for seq, moment in ((1, 0.0), (2, 4e9), (3, 1e12)):
            body = usage_body(batch(seq, row(tunnel), at=moment), boot="clock")
            assert (await relay.post("/v1/edge/usage", json=body)).status_code == 200
        async with db.read() as reader:
            hours = await reader.raw.fetch("SELECT hour FROM tunnel_usage WHERE tunnel_id = $1", tunnel)
        assert all(abs(r["hour"] - datetime.now(UTC)) < timedelta(hours=1, minutes=1) for r in hours)
        assert await tunnel_total(db, tunnel) == 3

    @pytest.mark.parametrize(
        "bad",
        [
            usage_body(), usage_body(batch(0)), usage_body(batch(-1)), usage_body({"seq": 1, "rows": []}),
            usage_body({**batch(1), "from": "yesterday"}), usage_body(batch(1, {"tunnel": "t"})),
            usage_body(batch(1, row("t", requests=-1))), usage_body(batch(1, row("t", requests=2**60))),
            usage_body(batch(1), boot=""), usage_body(batch(1), boot="a b"),
        ],
    )  # fmt: skip
    async def test_shapes(self, relay: httpx.AsyncClient, bad: dict[str, Any]) -> None:
        assert code(await relay.post("/v1/edge/usage", json=bad), 422) == "request.invalid"
