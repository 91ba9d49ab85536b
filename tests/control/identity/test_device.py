"""Device sign-in: the whole way, and every way in which it ends without a key."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.identity import jobs
from portico.control.identity.device import normal_code, shown_code
from portico.control.identity.tables import api_keys, device_codes, members
from portico.kit.db import Database
from portico.kit.ids import check_token
from tests.control.conftest import Account, MovableClock
from tests.control.test_http import problem


async def _start(client: httpx.AsyncClient, hostname: str = "laptop") -> dict[str, Any]:
    answer = await client.post("/v1/auth/device", json={"hostname": hostname})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def _poll(client: httpx.AsyncClient, started: dict[str, Any]) -> httpx.Response:
    return await client.post("/v1/auth/device/token", json={"device_code": started["device_code"]})


async def _approve(account: Account, code: str, approve: bool = True) -> httpx.Response:
    return await account.client.post("/v1/auth/device/approve", json={"user_code": code, "approve": approve})


def test_codes_are_read_as_people_type_them() -> None:
    assert normal_code(" bcdf-ghjk ") == "BCDFGHJK"
    assert shown_code("BCDFGHJK") == "BCDF-GHJK"
    assert normal_code("aeiou01é\0") == ""


class TestFlow:
    async def test_start_poll_approve_poll(self, owner: Account, client: httpx.AsyncClient, connect: Any) -> None:
        started = await _start(client, "dev-box")
        assert check_token(started["device_code"]) == "dc"
        assert started["verification_uri"] == "http://127.0.0.1:7000/device"
        assert started["verification_uri_complete"].endswith(f"/device?code={started['user_code']}")
        assert started["interval"] == 5
        assert started["expires_in"] == 600
        problem(await _poll(client, started), 400, "device.authorization_pending")

        answer = await _approve(owner, started["user_code"].lower().replace("-", " "))
        assert answer.json() == {"user_code": started["user_code"], "hostname": "dev-box", "state": "approved"}

        got = await _poll(client, started)
        assert got.status_code == 200
        body = got.json()
        assert body["organization"] == {"id": owner.organization, "name": "Acme"}
        assert body["user"] == {"id": owner.user, "email": owner.email}
        me = (await connect(body["agent_key"]).get("/v1/whoami")).json()
        assert me["kind"] == "agent_key"
        assert me["key"]["name"] == "dev-box"
        problem(await _poll(client, started), 400, "device.code_invalid")  # once

        rows = (await owner.client.get("/v1/audit")).json()["data"]
        acts = {(r["action"], r["actor"]["id"]) for r in rows}
        assert {("device.approve", owner.user), ("key.create", owner.user)} <= acts

    async def test_two_polls_at_once_get_one_key(self, owner: Account, client: httpx.AsyncClient, db: Database) -> None:
        started = await _start(client, "racer")
        await _approve(owner, started["user_code"])
        answers = await asyncio.gather(*(_poll(client, started) for _ in range(4)))
        assert sorted(a.status_code for a in answers) == [200, 400, 400, 400]
        async with db.read() as reader:
            query = sa.select(sa.func.count()).where(api_keys.c.name == "racer")
            assert await reader.scalar(query) == 1

    async def test_no_secret_is_at_rest(self, owner: Account, client: httpx.AsyncClient, db: Database) -> None:
        started = await _start(client, "quiet")
        await _approve(owner, started["user_code"])
        async with db.read() as reader:
            rows = await reader.fetch_all(sa.select(device_codes).where(device_codes.c.hostname == "quiet"))
            keys = await reader.scalar(sa.select(sa.func.count()).where(api_keys.c.name == "quiet"))
        assert started["device_code"] not in str([dict(row._mapping) for row in rows])
        assert keys == 0  # the key exists only once it is fetched


class TestRefusals:
    async def test_slow_down_raises_the_interval(self, client: httpx.AsyncClient, clock: MovableClock) -> None:
        started = await _start(client)
        await _poll(client, started)
        clock.advance(5)
        assert problem(await _poll(client, started), 400, "device.authorization_pending")["interval"] == 5
        clock.advance(2)
        assert problem(await _poll(client, started), 400, "device.slow_down")["interval"] == 10
        clock.advance(6)
        assert problem(await _poll(client, started), 400, "device.slow_down")["interval"] == 15
        clock.advance(15)
        problem(await _poll(client, started), 400, "device.authorization_pending")

    async def test_expired(self, owner: Account, client: httpx.AsyncClient, clock: MovableClock, app: Any) -> None:
        started, approved = await _start(client), await _start(client)
        await _approve(owner, approved["user_code"])
        clock.advance(601)
        for one in (started, approved):
            problem(await _poll(client, one), 400, "device.expired")
        answer = await owner.client.post("/v1/auth/refresh", json={"refresh_token": owner.refresh})
        assert answer.status_code == 200  # the person is still there; it is the code that is over
        problem(await _approve(owner, started["user_code"]), 400, "device.code_invalid")
        clock.advance(86_400)
        await jobs.housekeeping(app.state.identity)
        problem(await _poll(client, started), 400, "device.code_invalid")

    async def test_denied(self, owner: Account, client: httpx.AsyncClient) -> None:
        started = await _start(client)
        assert (await _approve(owner, started["user_code"], approve=False)).json()["state"] == "denied"
        problem(await _poll(client, started), 400, "device.denied")
        problem(await _approve(owner, started["user_code"]), 400, "device.code_invalid")
        rows = (await owner.client.get("/v1/audit", params={"action": "device.deny"})).json()["data"]
        assert len(rows) == 1

    async def test_an_approver_who_left_gives_no_key(
        self, owner: Account, client: httpx.AsyncClient, db: Database
    ) -> None:
        started = await _start(client)
        await _approve(owner, started["user_code"])
        async with db.transaction() as tx:
            await tx.execute(sa.delete(members).where(members.c.user_id == owner.user))
        problem(await _poll(client, started), 400, "device.denied")

    @pytest.mark.parametrize("code", ["x", "tnl_dc_" + "0" * 36, "tnl_dc_0123456789ABCDEFGHIJKLMNOPQRST4PMbyp"])
    async def test_unknown_device_codes(self, client: httpx.AsyncClient, code: str) -> None:
        answer = await client.post("/v1/auth/device/token", json={"device_code": code})
        problem(answer, 400, "device.code_invalid")

    async def test_keys_and_strangers_cannot_approve(
        self, owner: Account, client: httpx.AsyncClient, connect: Any
    ) -> None:
        started = await _start(client)
        for kind in ("agent", "api"):
            key = connect((await owner.key(kind))["key"])
            answer = await key.post("/v1/auth/device/approve", json={"user_code": started["user_code"]})
            problem(answer, 403, "auth.forbidden")
        answer = await client.post("/v1/auth/device/approve", json={"user_code": started["user_code"]})
        problem(answer, 401, "auth.required")


class TestGuessing:
    async def test_a_person_has_few_wrong_guesses(self, owner: Account, stranger: Account, client: Any) -> None:
        started = await _start(client)
        answers = await asyncio.gather(*(_approve(stranger, f"BBBB-BBB{c}") for c in "BCDFGHJKLMNPQRS"))
        codes = [a.json()["code"] for a in answers]
        assert codes.count("device.code_invalid") == 10
        assert codes.count("auth.throttled") == 5
        problem(await _approve(stranger, started["user_code"]), 429, "auth.throttled")
        assert (await _approve(owner, started["user_code"])).status_code == 200

    async def test_right_codes_use_no_guess(self, owner: Account, client: httpx.AsyncClient) -> None:
        for _ in range(14):
            started = await _start(client)
            assert (await _approve(owner, started["user_code"])).status_code == 200

    async def test_codes_per_address_are_limited(self, settings: Any, db: Database) -> None:
        from dataclasses import replace

        from portico.control.app import create_app

        app = create_app(replace(settings, device_codes_per_address=3), db=db)
        transport = httpx.ASGITransport(app, client=("192.0.2.50", 1))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://api.test") as client,
        ):
            answers = [await client.post("/v1/auth/device", json={"hostname": "x"}) for _ in range(4)]
        assert [a.status_code for a in answers] == [201, 201, 201, 429]
