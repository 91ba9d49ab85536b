"""The edge stream over real sockets: snapshot, deltas, resume, fan-out over two processes, slow relays, ends."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from typing import Any

import httpx
import pytest

from portico.control import changes
from portico.control.access import Caller
from portico.control.edge.hub import Line, Subscription
from portico.control.tunnels import relays
from tests.control.conftest import heartbeat_body
from tests.control.edge.live import Api, api_settings, following
from tests.timing import Since


async def new_tunnel(person: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    answer = await person.post("/v1/tunnels", json=more)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def agent_session(api: Api, person: httpx.AsyncClient, edge: httpx.AsyncClient) -> dict[str, Any]:
    """A live agent session: ``key`` (id), ``session``, ``tunnel``."""
    assert (await edge.post("/v1/edge/heartbeat", json=heartbeat_body())).status_code == 200
    key = (await person.post("/v1/api-keys", json={"kind": "agent", "name": "test"})).json()
    async with api.client(key["key"]) as agent:
        spec = {"agent_id": "agt-0123456789", "tunnels": [{"protocol": "http"}]}
        answer = await agent.post("/v1/agent/sessions", json=spec)
    assert answer.status_code == 201, answer.text
    return {"key": key["id"], "session": answer.json()["session"], "tunnel": answer.json()["grants"][0]["tunnel"]}


class TestSnapshotAndDeltas:
    async def test_a_snapshot_then_every_change(
        self, edge: httpx.AsyncClient, person: httpx.AsyncClient, api: Api
    ) -> None:
        before = await new_tunnel(person, subdomain="snap-before")
        async with following(edge) as stream:
            snapshot = await stream.next()
            assert snapshot["type"] == "snapshot"
            (row,) = [t for t in snapshot["state"]["tunnels"] if t["id"] == before["id"]]
            assert row["hosts"] == ["snap-before.localhost"] and (row["state"], row["generation"]) == ("active", 1)
            jwks = (await person.get("/.well-known/jwks.json")).json()["keys"]
            assert sorted(k["kid"] for k in snapshot["state"]["keys"]) == sorted(k["kid"] for k in jwks)

            made = await new_tunnel(person, subdomain="snap-after")
            assert (await stream.change(kind="tunnel"))["tunnel"]["id"] == made["id"]
            await person.post(f"/v1/tunnels/{made['id']}/stop")
            row = (await stream.until(lambda line: line["type"] == "delta"))["changes"][0]["tunnel"]
            assert (row["state"], row["generation"]) == ("stopped", 2)
            await person.delete(f"/v1/tunnels/{made['id']}")
            removed = await stream.change(kind="tunnel_removed", id=made["id"])
            assert removed["code"] == "tunnel.deleted"

    async def test_version_zero_and_unknown_versions_get_a_snapshot(self, edge: httpx.AsyncClient) -> None:
        for version in (0, 2**50):
            async with following(edge, version) as stream:
                assert (await stream.next())["type"] == "snapshot"

    async def test_resume_gets_what_was_missed_and_a_heartbeat_at_once(
        self, edge: httpx.AsyncClient, person: httpx.AsyncClient
    ) -> None:
        await new_tunnel(person)
        async with following(edge) as stream:
            version = (await stream.next())["version"]
        missed = [(await new_tunnel(person))["id"] for _ in range(3)]
        async with following(edge, version) as stream:
            lines = [await stream.next(1) for _ in range(4)]
        assert [line["type"] for line in lines] == ["delta"] * 3 + ["heartbeat"]
        assert [line["changes"][0]["tunnel"]["id"] for line in lines[:3]] == missed

    async def test_a_trimmed_version_gets_a_snapshot(
        self, edge: httpx.AsyncClient, person: httpx.AsyncClient, api: Api
    ) -> None:
        await new_tunnel(person)
        async with following(edge) as stream:
            version = (await stream.next())["version"]
        made = [(await new_tunnel(person))["id"] for _ in range(3)]
        async with api.app.state.db.transaction() as tx:
            await changes.trim(tx, keep_seconds=3600, keep_rows=1)
        async with following(edge, version) as stream:
            snapshot = await stream.next()
        assert snapshot["type"] == "snapshot"
        assert set(made) <= {row["id"] for row in snapshot["state"]["tunnels"]}

    async def test_the_hash_in_a_heartbeat_is_that_of_the_state_held(
        self, database_url: str, person: httpx.AsyncClient, key: tuple[str, str]
    ) -> None:
        from portico.relay.snapshot import Snapshot

        async with (
            Api(api_settings(database_url, edge_hash_seconds=0.2)).running() as hashing,
            hashing.client(key[1]) as edge,
            following(edge) as stream,
        ):
            held = Snapshot()
            held.apply(await stream.next())
            for _ in range(5):
                await new_tunnel(person)
            organization = (await person.get("/v1/whoami")).json()["organization"]["id"]
            async with hashing.app.state.db.transaction() as tx:
                await hashing.app.state.standing.moved(tx, organization)
            versions: list[Any] = []
            while len(versions) < 2 or versions[-1] is None:
                line = await stream.until(lambda line: True)
                while "hash" not in line:
                    if line["type"] == "delta":
                        held.apply(line)
                    line = await stream.next()
                assert line["version"] == held.version
                assert held.digest(at=line["time"]) == line["hash"]
                frozen = held.frozen()
                assert frozen is not None and frozen.organizations_digest() == line["organizations_hash"]
                versions.append(held.organization(organization))

    async def test_rotated_keys_reach_relays(self, edge: httpx.AsyncClient, api: Api) -> None:
        state = api.app.state
        async with following(edge) as stream:
            known = {key["kid"] for key in (await stream.next())["state"]["keys"]}
            async with state.db.transaction() as tx:
                await state.signing_keys.rotate(tx, force=True)
            keys = (await stream.change(kind="keys"))["keys"]
            assert known < {key["kid"] for key in keys}


class TestRevocation:
    @pytest.mark.parametrize("how", ["key", "session", "stop", "delete"])
    async def test_is_on_the_streams_of_both_processes_within_two_seconds(
        self, how: str, api: Api, second_api: Api, edge: httpx.AsyncClient, person: httpx.AsyncClient, key: Any
    ) -> None:
        made = await agent_session(api, person, edge)
        expected: dict[str, dict[str, Any]] = {
            "key": {"kind": "session_ended", "session": made["session"], "code": "session.revoked"},
            "session": {"kind": "session_ended", "session": made["session"], "code": "session.revoked"},
            "stop": {"kind": "tunnel"},
            "delete": {"kind": "tunnel_removed", "id": made["tunnel"]},
        }
        async with (
            second_api.client(key[1]) as other,
            following(edge) as here,
            following(other) as there,
        ):
            await here.next()
            await there.next()
            since = Since()
            if how in ("key", "session"):
                assert (await person.delete(f"/v1/api-keys/{made['key']}")).status_code == 204
            elif how == "stop":
                assert (await person.post(f"/v1/tunnels/{made['tunnel']}/stop")).status_code == 200
            else:
                assert (await person.delete(f"/v1/tunnels/{made['tunnel']}")).status_code == 204
            for stream in (here, there):
                await stream.change(2, **expected[how])
            assert since.waited() < 2

    async def test_without_notifications_polling_finds_it(
        self, api: Api, edge: httpx.AsyncClient, person: httpx.AsyncClient
    ) -> None:
        async with following(edge) as stream:
            await stream.next()
            async with api.app.state.db.transaction() as tx:  # a row that nobody was notified of
                change = json.dumps([changes.tunnel_removed("tun_silent", "tunnel.deleted")])
                await tx.raw.execute("INSERT INTO edge_changes (payload) VALUES ($1::text::jsonb)", change)
            await stream.change(2, id="tun_silent")


class TestManyWriters:
    async def test_resuming_again_and_again_loses_nothing(
        self, api: Api, second_api: Api, edge: httpx.AsyncClient, key: tuple[str, str]
    ) -> None:
        """200 writers; a relay that is cut after every few lines and resumes, at either process in turn."""
        db = api.app.state.db
        async with following(edge) as stream:
            version = (await stream.next())["version"]
        if version == 0:
            async with db.transaction() as tx:
                changes.append(tx, changes.tunnel_removed("tun_first", "tunnel.deleted"))
            version = 1
        seen: list[str] = []
        written = asyncio.Event()

        async def write(number: int) -> None:
            await asyncio.sleep(0.001 * number)
            async with db.transaction() as tx:
                changes.append(tx, changes.tunnel_removed(f"tun_{number}", "tunnel.deleted"))

        async def follow() -> None:
            nonlocal version
            turn = 0
            async with second_api.client(key[1]) as other:
                while not (written.is_set() and len(seen) >= 200):
                    turn += 1
                    async with following((edge, other)[turn % 2], version) as stream:
                        stream.version = version
                        for _ in range(turn % 5 + 1):
                            line = await stream.next()
                            assert line["type"] != "snapshot"
                            seen.extend(change["id"] for change in line.get("changes", []))
                        version = stream.version

        reading = asyncio.create_task(follow())
        await asyncio.gather(*(write(n) for n in range(200)))
        written.set()
        await asyncio.wait_for(reading, 30)
        assert sorted(seen) == sorted(f"tun_{n}" for n in range(200)), "each once, none missing"


class TestEnds:
    async def test_stopping_ends_streams_within_a_second(self, database_url: str, key: tuple[str, str]) -> None:
        async with Api(api_settings(database_url)).running() as stopping, stopping.client(key[1]) as edge:
            async with following(edge) as stream:
                await stream.next()
                since = Since()
                stopping.app.state.stopping.set()
                while (line := await stream.next())["type"] == "heartbeat":
                    pass  # one may have been under way
                assert line == {"type": "goodbye", "retry_after_ms": 0}
                await stream.ended()
                assert since.waited() < 1
            refused = await edge.get("/v1/edge/stream")
            assert (refused.status_code, refused.json()["code"]) == (503, "service.unavailable")

    async def test_a_revoked_relay_key_ends_its_stream_and_no_other(
        self, api: Api, edge: httpx.AsyncClient, key: tuple[str, str]
    ) -> None:
        operator = Caller("operator", "installation", None)
        async with api.app.state.db.transaction() as tx:
            _, spare = await relays.create_key(tx, operator, "spare")
        async with api.client(spare) as other, following(edge) as doomed, following(other) as kept:
            await doomed.next()
            await kept.next()
            async with api.app.state.db.transaction() as tx:
                assert await relays.revoke_key(tx, operator, key[0])
            await doomed.ended()
            assert (await kept.next())["type"] == "heartbeat"
            refused = await edge.get("/v1/edge/stream")
            assert (refused.status_code, refused.json()["code"]) == (401, "edge.relay_key_revoked")

    async def test_a_relay_that_goes_away_leaves_nothing_behind(self, api: Api, edge: httpx.AsyncClient) -> None:
        async with following(edge) as stream:
            await stream.next()
            assert len(api.app.state.edge_hub._streams) == 1
        async with asyncio.timeout(30):
            while api.app.state.edge_hub._streams:
                await asyncio.sleep(0.02)

    async def test_no_more_streams_than_allowed(self, database_url: str, key: tuple[str, str]) -> None:
        async with (
            Api(api_settings(database_url, edge_max_streams=1)).running() as small,
            small.client(key[1]) as edge,
            following(edge) as stream,
        ):
            await stream.next()
            refused = await edge.get("/v1/edge/stream")
            assert (refused.status_code, refused.json()["code"]) == (503, "edge.streams_exhausted")
            assert (await stream.next())["type"] == "heartbeat"

    async def test_a_relay_that_reads_nothing_is_cut_and_holds_up_nobody(
        self, database_url: str, key: tuple[str, str], person: httpx.AsyncClient
    ) -> None:
        settings = api_settings(database_url, edge_send_seconds=0.5, edge_queue_bytes=400_000)
        async with Api(settings).running() as strict, strict.client(key[1]) as edge:
            port = int(strict.url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
            writer.write(f"GET /v1/edge/stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key[1]}\r\n\r\n".encode())
            await reader.readline()
            hub = strict.app.state.edge_hub
            async with following(edge, checked=False) as quick:
                await quick.next()
                assert len(hub._streams) == 2
                many = [changes.tunnel_removed("x" * 64, "tunnel.deleted")] * 500
                for _ in range(200):  # some 11 MB: more than the kernel and uvicorn hold between them
                    async with strict.app.state.db.transaction() as tx:
                        changes.append(tx, *many)
                    await quick.until(lambda line: line["type"] == "delta")
                async with asyncio.timeout(30):
                    while len(hub._streams) > 1:
                        await asyncio.sleep(0.05)
                assert (await quick.until(lambda line: line["type"] == "heartbeat"))["version"] == quick.version
            writer.close()


class TestQueue:
    def line(self, size: int = 10) -> Line:
        return Line(1, b"x" * size, True)

    async def test_keeps_order_and_ends_once_told(self) -> None:
        queue = Subscription("key", 10, 1000)
        first, second = self.line(1), self.line(2)
        queue.put(first)
        queue.put(second)
        assert [await queue.get(), await queue.get()] == [first, second]
        queue.close("over")
        queue.close("again")
        assert await queue.get() is None and queue.closed == "over"

    @pytest.mark.parametrize(("lines", "size"), [(11, 1), (2, 501)])
    async def test_full_by_lines_or_bytes_ends_it(self, lines: int, size: int) -> None:
        queue = Subscription("key", 10, 1000)
        for _ in range(lines):
            assert queue.closed is None
            queue.put(self.line(size))
        assert queue.closed == "the relay reads too slowly" and await queue.get() is None


class TestOutage:
    async def test_a_database_that_is_away_ends_streams_and_its_return_loses_nothing(self, server_home: Any) -> None:
        """PostgreSQL restarted at once, then held down for longer than the limit; never a heartbeat that lies."""
        from portico.control import migrations
        from portico.embedded.postgres import EmbeddedPostgres

        postgres = EmbeddedPostgres(server_home / "restarts", durable=False)
        postgres.start()
        try:
            await migrations.upgrade(postgres.uri)
            settings = dataclasses.replace(api_settings(postgres.uri), edge_outage_seconds=1.0)
            async with Api(settings).running() as api:
                state = api.app.state
                async with state.db.transaction() as tx:
                    _, token = await relays.create_key(tx, Caller("operator", "installation", None), "test")
                async with api.client(token) as edge:
                    async with following(edge) as stream:
                        await stream.next()
                        await _change(state.db, "tun_before")
                        await stream.change(id="tun_before")
                        await asyncio.to_thread(postgres.stop)
                        down = time.time()
                        await stream.ended(6)
                        beats = [line["time"] for line in stream.lines if line["type"] == "heartbeat"]
                        assert max(beats) < down + 0.5, "no heartbeat while nothing could be read"
                        version = stream.version
                    refused = await edge.get("/v1/edge/stream", params={"version": version})
                    assert (refused.status_code, refused.json()["code"]) == (503, "service.unavailable")
                    postgres.start()
                    await _change(state.db, "tun_meanwhile")
                    async with _when_back(edge, version) as stream:
                        await stream.change(id="tun_meanwhile")
                        assert stream.lines[0]["type"] == "delta"
        finally:
            postgres.stop()


async def _change(db: Any, name: str) -> None:
    async with db.transaction() as tx:
        changes.append(tx, changes.tunnel_removed(name, "tunnel.deleted"))


def _when_back(edge: httpx.AsyncClient, version: int) -> Any:
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def attempts() -> Any:
        async with asyncio.timeout(30):
            while (await edge.post("/v1/edge/heartbeat", json=heartbeat_body())).status_code != 200:
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
        async with following(edge, version) as stream:
            yield stream

    return attempts()
