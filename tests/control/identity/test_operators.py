"""Platform operators: made on the machine and nowhere else, looked at in every request, and never none."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Annotated, Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI

from portico.control import access
from portico.control.access import Caller
from portico.control.audit.store import audit_events
from portico.control.identity import operators, tables
from portico.control.requests import JsonRoute
from portico.errors import Problem
from portico.kit.db import Database
from tests.control.conftest import PASSWORD, Account, MovableClock
from tests.control.test_http import problem


async def _grant(db: Database, clock: MovableClock, user: str, seconds: float | None = None) -> None:
    until = None if seconds is None else clock.wall() + timedelta(seconds=seconds)
    async with db.transaction() as tx:
        await operators.grant(tx, operators.INSTALLATION, user, now=clock.wall(), expires_at=until, reason="on call")


async def _is_operator(account: Account) -> bool:
    return bool((await account.client.get("/v1/whoami")).json()["platform_operator"])


@pytest.fixture
async def operator(stranger: Account, db: Database, clock: MovableClock) -> Account:
    """A person with a grant, in an organization of their own."""
    await _grant(db, clock, stranger.user)
    return stranger


async def _rows(db: Database, action: str, target: str) -> list[Any]:
    query = sa.select(audit_events).where(audit_events.c.action == action, audit_events.c.target == target)
    async with db.read() as reader:
        return list(await reader.fetch_all(query))


class TestGrants:
    async def test_takes_effect_at_once_and_ends_at_once(
        self, owner: Account, operator: Account, db: Database, clock: MovableClock
    ) -> None:
        assert not await _is_operator(owner)
        await _grant(db, clock, owner.user)
        assert await _is_operator(owner)  # in a session from before
        async with db.transaction() as tx:
            await operators.revoke(tx, operators.INSTALLATION, owner.user, now=clock.wall(), reason="left")
        assert not await _is_operator(owner)
        (given,), (ended,) = (
            await _rows(db, "operator.grant", owner.user),
            await _rows(db, "operator.revoke", owner.user),
        )
        assert (given.organization_id, given.details["reason"], given.chain) == (None, "on call", "installation")
        assert (ended.organization_id, ended.details["reason"]) == (None, "left")
        with pytest.raises(Problem, match="no platform operator") as twice:
            async with db.transaction() as tx:
                await operators.revoke(tx, operators.INSTALLATION, owner.user, now=clock.wall())
        assert twice.value.code == "request.not_found"

    async def test_expires_on_its_own(
        self, owner: Account, operator: Account, db: Database, clock: MovableClock
    ) -> None:
        await _grant(db, clock, owner.user, seconds=60)
        assert await _is_operator(owner)
        clock.advance(59)
        assert await _is_operator(owner)
        clock.advance(1.5)
        assert not await _is_operator(owner)
        with pytest.raises(Problem) as refused:
            await _grant(db, clock, owner.user, seconds=0)
        assert refused.value.code == "auth.expiry_invalid"

    async def test_another_grant_replaces_the_first_which_stays_on_record(
        self, owner: Account, operator: Account, db: Database, clock: MovableClock
    ) -> None:
        await _grant(db, clock, owner.user)
        await _grant(db, clock, owner.user, seconds=60)
        async with db.read() as reader:
            query = sa.select(tables.operator_grants).where(tables.operator_grants.c.user_id == owner.user)
            first, second = await reader.fetch_all(query.order_by(tables.operator_grants.c.revoked_at))
        assert first.revoked_at is not None and first.revoked_by == "installation"
        assert second.revoked_at is None and second.expires_at is not None
        told = [row.details.get("replaces") for row in await _rows(db, "operator.grant", owner.user)]
        assert len(told) == 2 and set(told) == {None, first.id}

    async def test_code_from_before_sees_grants_without_expiry_alone(
        self, owner: Account, operator: Account, db: Database, clock: MovableClock
    ) -> None:
        async def column() -> bool:
            async with db.read() as reader:
                query = sa.select(tables.users.c.platform_operator).where(tables.users.c.id == owner.user)
                return bool(await reader.scalar(query))

        await _grant(db, clock, owner.user)
        assert await column()
        await _grant(db, clock, owner.user, seconds=60)
        assert not await column()
        # And what such code writes makes nobody an operator here.
        async with db.transaction() as tx:
            await operators.revoke(tx, operators.INSTALLATION, owner.user, now=clock.wall())
            await tx.execute(sa.update(tables.users).values(platform_operator=True))
        assert not await _is_operator(owner)

    async def test_nobody_who_cannot_sign_in(self, owner: Account, db: Database, clock: MovableClock) -> None:
        async with db.transaction() as tx:
            await tx.execute(
                sa.update(tables.users).where(tables.users.c.id == owner.user).values(disabled_at=clock.wall())
            )
        with pytest.raises(Problem) as refused:
            await _grant(db, clock, owner.user)
        assert refused.value.code == "operator.disabled"


class TestTheLastOne:
    @pytest.fixture(autouse=True)
    async def _alone(self, owner: Account, db: Database, clock: MovableClock) -> None:
        async with db.transaction() as tx:
            await tx.execute(sa.delete(tables.operator_grants))
        await _grant(db, clock, owner.user)

    async def test_stays(self, owner: Account, stranger: Account, db: Database, clock: MovableClock) -> None:
        await _grant(db, clock, stranger.user, seconds=3600)  # will be none in an hour
        for act in (
            lambda tx: operators.revoke(tx, operators.INSTALLATION, owner.user, now=clock.wall()),
            lambda tx: operators.keep_one(tx, owner.user),
        ):
            with pytest.raises(Problem) as refused:
                async with db.transaction() as tx:
                    await act(tx)
            assert refused.value.code == "operator.last"
        with pytest.raises(Problem) as refused:
            await _grant(db, clock, owner.user, seconds=60)
        assert refused.value.code == "operator.last"
        assert await _is_operator(owner)

    async def test_of_two_who_revoke_each_other_one_stays(
        self, owner: Account, stranger: Account, db: Database, clock: MovableClock
    ) -> None:
        await _grant(db, clock, stranger.user)

        async def end(who: Account) -> str:
            try:
                async with db.transaction() as tx:
                    await operators.revoke(tx, operators.INSTALLATION, who.user, now=clock.wall())
            except Problem as refused:
                return refused.code
            return "ended"

        assert sorted(await asyncio.gather(end(owner), end(stranger))) == ["ended", "operator.last"]
        assert [await _is_operator(owner), await _is_operator(stranger)].count(True) == 1


class TestNoOtherWay:
    @pytest.mark.parametrize("value", [True, "true", 1])
    async def test_a_sign_up_that_asks_for_it(self, client: httpx.AsyncClient, db: Database, value: Any) -> None:
        body = {"email": "wants@example.com", "password": PASSWORD, "organization": "x", "platform_operator": value}
        problem(await client.post("/v1/auth/register", json=body), 422, "request.invalid")
        async with db.read() as reader:
            asked = sa.select(tables.users.c.id).where(tables.users.c.email == "wants@example.com")
            assert await reader.scalar(asked) is None

    async def test_no_route_takes_it(self, client: httpx.AsyncClient) -> None:
        document = (await client.get("/openapi.json")).json()
        takes = [
            name for name, schema in document["components"]["schemas"].items()
            if "platform_operator" in schema.get("properties", {}) and name != "WhoAmI"
        ]  # fmt: skip
        assert not [name for name in takes if name.endswith("Body")]


class TestDangerousActs:
    @pytest.fixture
    async def dangerous(self, app: FastAPI) -> str:
        async def act(
            who: Annotated[Caller, Depends(access.require_operator(step_up=True, act="thing.break"))],
        ) -> dict[str, str]:
            return {"id": who.id}

        app.router.add_api_route("/v1/danger/{thing}", act, methods=["POST"], route_class_override=JsonRoute)
        return "/v1/danger/thing_1"

    async def test_need_a_recent_proof(
        self, dangerous: str, operator: Account, db: Database, clock: MovableClock, settings: Any
    ) -> None:
        assert (await operator.client.post(dangerous)).status_code == 200
        clock.advance(settings.operator_step_up_seconds - 5)
        assert (await operator.client.post(dangerous)).status_code == 200
        clock.advance(10)
        refused = await operator.client.post(dangerous)
        # The access token is as old: what is asked here is the age of the proof, whatever the token says.
        if refused.status_code == 401:
            renewed = (await operator.client.post("/v1/auth/refresh", json={"refresh_token": operator.refresh})).json()
            headers = {"Authorization": f"Bearer {renewed['access_token']}"}
            refused = await operator.client.post(dangerous, headers=headers)
        problem(refused, 403, "auth.step_up_required")
        row = (await _rows(db, "thing.break", "thing_1"))[-1]
        assert (row.outcome, row.organization_id, row.actor_id) == ("refused", None, operator.user)
        assert row.details == {"code": "auth.step_up_required"}

    async def test_tried_by_an_owner_is_in_the_log_of_the_installation(
        self, dangerous: str, owner: Account, db: Database
    ) -> None:
        problem(await owner.client.post(dangerous), 403, "auth.operator_required")
        row = (await _rows(db, "thing.break", "thing_1"))[-1]
        assert (row.outcome, row.organization_id, row.actor_id) == ("refused", None, owner.user)
        assert (await owner.client.get("/v1/audit", params={"action": "thing.break"})).json()["data"] == []

    def test_need_the_second_factor_of_who_has_one(self, clock: MovableClock) -> None:
        who = Caller("person", "usr_1", "org_1", authenticated_at=clock.wall(), methods=("pwd",), second_factor=True)
        assert access.SECOND_FACTORS.isdisjoint(who.methods)
        with pytest.raises(Problem) as refused:
            access.check_step_up(who, clock.wall(), 900)
        assert refused.value.code == "auth.step_up_required"
        access.check_step_up(Caller("person", "usr_1", "org_1", authenticated_at=clock.wall(), methods=("pwd", "otp"),
                                    second_factor=True), clock.wall(), 900)  # fmt: skip


async def test_an_operator_is_nothing_more_at_home(
    owner: Account, operator: Account, app: Any, db: Database, connect: Any
) -> None:
    """The grant is for the platform: in an organization, the person's own too, the role alone counts."""
    async with db.transaction() as tx:
        row = {"organization_id": owner.organization, "user_id": operator.user, "role": "viewer"}
        await tx.execute(sa.insert(tables.members).values(**row))
        mine = tables.members.c.organization_id == operator.organization
        await tx.execute(sa.update(tables.members).where(mine).values(role="viewer"))
    problem(await operator.client.post("/v1/tunnels", json={"name": "x"}), 403, "auth.forbidden")
    problem(await operator.client.get("/v1/audit"), 403, "auth.forbidden")
    key = (await owner.key())["id"]
    problem(await operator.client.delete(f"/v1/api-keys/{key}"), 403, "auth.forbidden")
