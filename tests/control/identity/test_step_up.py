"""A recent proof of who somebody is: noted, asked for, refused; and what an unverified address leaves."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Annotated, Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import APIRouter, Depends

from portico.control.access import Caller, require_recent
from portico.control.identity.tables import users
from portico.control.requests import UnitOfWork
from portico.kit.db import Database
from portico.settings import ApiSettings
from tests.control.conftest import PASSWORD, Account, MovableClock
from tests.control.test_http import problem


@pytest.fixture
def app(app: Any) -> Any:
    router = APIRouter(route_class=UnitOfWork)

    @router.post("/dangerous", status_code=204)
    async def dangerous(who: Annotated[Caller, Depends(require_recent("keys:write"))]) -> None: ...

    app.include_router(router, prefix="/v1")
    return app


async def _step_up(account: Account, **proof: Any) -> httpx.Response:
    return await account.client.post("/v1/auth/step-up", json=proof)


async def _later(account: Account, client: httpx.AsyncClient, clock: MovableClock, connect: Any) -> Account:
    """The account's session, an hour old and with a fresh access token."""
    clock.advance(3600)
    answer = await client.post("/v1/auth/refresh", json={"refresh_token": account.refresh})
    return replace(account, client=connect(answer.json()["access_token"]))


class TestStepUp:
    async def test_a_sign_in_counts_for_a_while(
        self, owner: Account, client: httpx.AsyncClient, clock: MovableClock, connect: Any
    ) -> None:
        assert (await owner.client.post("/v1/dangerous")).status_code == 204
        owner = await _later(owner, client, clock, connect)
        assert problem(await owner.client.post("/v1/dangerous"), 403, "auth.step_up_required")["max_age"] == 900
        answer = await _step_up(owner, password=PASSWORD)
        assert answer.status_code == 200, answer.text
        assert answer.json()["methods"] == ["pwd"]
        assert (await owner.client.post("/v1/dangerous")).status_code == 204
        rows = (await owner.client.get("/v1/audit", params={"action": "session.step_up"})).json()["data"]
        assert [(r["target"], r["outcome"]) for r in rows] == [(owner.session, "success")]

    async def test_a_remembered_answer_asks_for_it_too(
        self, owner: Account, client: httpx.AsyncClient, clock: MovableClock, connect: Any, db: Database
    ) -> None:
        """It may be a secret that only a session with a recent proof is given."""
        again = {"Idempotency-Key": "once"}
        assert (await owner.client.post("/v1/dangerous", headers=again)).status_code == 204
        owner = await _later(owner, client, clock, connect)
        problem(await owner.client.post("/v1/dangerous", headers=again), 403, "auth.step_up_required")
        assert (await _step_up(owner, password=PASSWORD)).status_code == 200
        answer = await owner.client.post("/v1/dangerous", headers=again)
        assert (answer.status_code, answer.headers["idempotency-replayed"]) == (204, "true")
        async with db.transaction() as tx:
            await tx.execute(
                sa.text("UPDATE members SET role = 'viewer' WHERE user_id = :id").bindparams(id=owner.user)
            )
        problem(await owner.client.post("/v1/dangerous", headers=again), 403, "auth.forbidden")

    async def test_a_refresh_is_no_proof(
        self, owner: Account, client: httpx.AsyncClient, clock: MovableClock, connect: Any
    ) -> None:
        owner = await _later(owner, client, clock, connect)
        problem(await owner.client.post("/v1/dangerous"), 403, "auth.step_up_required")

    async def test_it_counts_for_its_own_session_alone(
        self, owner: Account, client: httpx.AsyncClient, clock: MovableClock, connect: Any
    ) -> None:
        other = await _later(owner, client, clock, connect)
        login = await client.post("/v1/auth/login", json={"email": owner.email, "password": PASSWORD})
        assert (await connect(login.json()["access_token"]).post("/v1/dangerous")).status_code == 204
        problem(await other.client.post("/v1/dangerous"), 403, "auth.step_up_required")

    async def test_keys_never_pass(self, owner: Account, connect: Any) -> None:
        key = connect((await owner.key("api"))["key"])
        problem(await key.post("/v1/dangerous"), 403, "auth.forbidden")
        problem(await key.post("/v1/auth/step-up", json={"password": PASSWORD}), 403, "auth.forbidden")

    async def test_wrong_passwords_are_counted_and_recorded(self, owner: Account, settings: ApiSettings) -> None:
        for n in range(settings.step_up_failures):
            problem(await _step_up(owner, password=f"wrong-Guess-{n}"), 400, "auth.proof_invalid")
        problem(await _step_up(owner, password=PASSWORD), 429, "auth.throttled")
        rows = (await owner.client.get("/v1/audit", params={"action": "session.step_up"})).json()["data"]
        assert {r["outcome"] for r in rows} == {"refused"}
        assert "wrong-Guess" not in str(rows)

    async def test_a_thief_of_one_session_leaves_the_others_their_attempts(
        self, owner: Account, client: httpx.AsyncClient, connect: Any, settings: ApiSettings
    ) -> None:
        for n in range(settings.step_up_failures):
            thief = replace(owner, client=connect(owner.access, f"203.0.113.{n}"))
            problem(await _step_up(thief, password=f"wrong-Guess-{n}"), 400, "auth.proof_invalid")
        thief = replace(owner, client=connect(owner.access, "198.51.100.77"))
        problem(await _step_up(thief, password=PASSWORD), 429, "auth.throttled")
        login = await client.post("/v1/auth/login", json={"email": owner.email, "password": PASSWORD})
        mine = replace(owner, client=connect(login.json()["access_token"]))
        assert (await _step_up(mine, password=PASSWORD)).status_code == 200

    async def test_bodies_that_prove_nothing(self, owner: Account) -> None:
        for body in ({"password": PASSWORD, "extra": 1}, {"password": ""}, {"passkey": "x"}):
            problem(await _step_up(owner, **body), 422, "request.invalid")
        for body in ({}, {"password": PASSWORD, "code": "123456"}):
            problem(await _step_up(owner, **body), 400, "auth.proof_invalid")

    async def test_sessions_tell_when_and_how(self, owner: Account) -> None:
        (row,) = (await owner.client.get("/v1/auth/sessions")).json()["data"]
        assert row["methods"] == ["pwd"]
        assert row["authenticated_at"] == row["created_at"]

    async def test_all_others_end(self, owner: Account, client: httpx.AsyncClient, connect: Any) -> None:
        login = await client.post("/v1/auth/login", json={"email": owner.email, "password": PASSWORD})
        answer = await owner.client.delete("/v1/auth/sessions", params={"keep_current": True})
        assert answer.status_code == 204
        assert (await owner.client.get("/v1/whoami")).status_code == 200
        problem(await connect(login.json()["access_token"]).get("/v1/whoami"), 401, "auth.session_ended")


class TestUnverified:
    @pytest.fixture
    def settings(self, settings: ApiSettings) -> ApiSettings:
        return replace(settings, require_verified_email=True)

    async def test_may_look_around_and_nothing_else(
        self, owner: Account, client: httpx.AsyncClient, db: Database
    ) -> None:
        problem(
            await owner.client.post("/v1/api-keys", json={"kind": "agent", "name": "x"}), 403, "auth.email_unverified"
        )
        problem(await owner.client.post("/v1/tunnels", json={"name": "web"}), 403, "auth.email_unverified")
        problem(await owner.client.get("/v1/audit"), 403, "auth.email_unverified")
        code = (await client.post("/v1/auth/device", json={"hostname": "x"})).json()["user_code"]
        answer = await owner.client.post("/v1/auth/device/approve", json={"user_code": code})
        problem(answer, 403, "auth.email_unverified")
        for path in ("/v1/org", "/v1/tunnels", "/v1/auth/sessions"):
            assert (await owner.client.get(path)).status_code == 200
        async with db.transaction() as tx:
            await tx.execute(sa.update(users).where(users.c.id == owner.user).values(email_verified_at=sa.func.now()))
        assert (await owner.key())["kind"] == "agent"

    async def test_their_keys_of_before_serve_nothing(self, owner: Account, db: Database, connect: Any) -> None:
        verified = sa.update(users).where(users.c.id == owner.user)
        async with db.transaction() as tx:
            await tx.execute(verified.values(email_verified_at=sa.func.now() - timedelta(days=1)))
        key = connect((await owner.key())["key"])
        async with db.transaction() as tx:
            await tx.execute(verified.values(email_verified_at=None))
        answer = await key.post("/v1/agent/sessions", json={"agent_id": "agt-0123456789", "tunnels": []})
        problem(answer, 403, "auth.email_unverified")
