"""Plans: the declared table is what the database has, versions never change, and who moves is moved at once."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import asyncpg
import httpx
import pytest

from portico.control.app import create_app
from portico.control.identity import plans
from portico.control.identity.keys import issue
from portico.control.identity.plans import FEATURE_TABLE, LIMIT_TABLE, PLAN_TABLE
from portico.errors import Problem
from portico.kit.db import Database
from portico.settings import ApiSettings
from tests.control.conftest import Account
from tests.control.test_http import problem


@pytest.fixture
async def operator(app: Any, connect: Any) -> httpx.AsyncClient:
    """A client of the platform operator."""
    async with app.state.db.transaction() as tx:
        made = await issue(tx, datetime.now(UTC), None, None, "operator", "operator", [])
    client: httpx.AsyncClient = connect(made.key)
    return client


async def move(operator: httpx.AsyncClient, organization: str, plan: str, **more: Any) -> dict[str, Any]:
    """Put an organization on a plan; overrides as ``{name: value}``."""
    overrides = [{"name": name, "value": value} for name, value in more.pop("overrides", {}).items()]
    body = {"plan": plan, "reason": "test", "overrides": overrides, **more}
    answer = await operator.put(f"/v1/admin/organizations/{organization}/plan", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def allowed(document: dict[str, Any]) -> dict[str, int | None]:
    return {row["name"]: row["allowed"] for row in document["limits"]}


async def test_the_database_has_what_is_declared(db: Database) -> None:
    async with db.read() as reader:
        stored = {(plan.id, plan.version): plan for plan, _, _ in await plans.versions(reader)}
    declared = {(plan.id, plan.version): plan for plan in PLAN_TABLE}
    assert {key: stored.get(key) for key in declared} == declared, "a version that was changed, or has no migration"
    assert {id for id, _ in stored if id in ("free", "pro", "team", "unlimited")} == {id for id, _ in declared}
    for plan in PLAN_TABLE:
        assert plan.limits.keys() == LIMIT_TABLE.keys()
        assert plan.features <= FEATURE_TABLE.keys()


@pytest.mark.parametrize(
    "statement", ["UPDATE plans SET name = 'x' WHERE id = 'free'", "DELETE FROM plans WHERE id = 'pro'"]
)
async def test_a_version_is_never_changed(db: Database, statement: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with db.transaction() as tx:
            await tx.raw.execute(statement)


async def test_everybody_sees_what_is_offered(client: httpx.AsyncClient) -> None:
    offered = (await client.get("/v1/plans")).json()["data"]
    assert [plan["id"] for plan in offered] == ["free", "pro", "team"]
    for smaller, larger in pairwise(offered):
        for name, most in smaller["limits"].items():
            assert larger["limits"][name] is None or larger["limits"][name] >= most, name
        assert set(smaller["features"]) <= set(larger["features"])


async def test_a_new_organization_is_not_hampered(owner: Account, settings: ApiSettings) -> None:
    found = (await owner.client.get("/v1/org/plan")).json()
    assert found["plan"] == {"id": "unlimited", "version": 1, "name": "Unlimited"}
    assert all(feature["has"] for feature in found["features"])
    assert allowed(found)["members"] is None
    assert allowed(found)["tunnels"] == settings.tunnels_per_organization  # the installation's ceiling
    used = {row["name"]: row["used"] for row in found["limits"]}
    assert (used["members"], used["tunnels"], used["api_keys"]) == (1, 0, 0)


class TestDefaultPlan:
    @pytest.fixture
    async def settings(self, settings: ApiSettings, db: Database) -> ApiSettings:
        """A plan of the test's own, as versions stay for ever, is what new organizations are on."""
        name = f"start-{secrets.token_hex(4)}"
        async with db.transaction() as tx:
            await plans.add_version(tx, replace(PLAN_TABLE[0], id=name, listed=False))
        return replace(settings, default_plan=name)

    async def test_a_new_organization_is_on_its_newest_version(
        self, owner: Account, operator: httpx.AsyncClient, register: Any, settings: ApiSettings
    ) -> None:
        """Who is there keeps the limits that it signed up with; who comes later has the new ones."""
        name = settings.default_plan
        written = await operator.put(f"/v1/admin/plans/{name}", json={"limits": {"tunnels": 2}})
        assert (written.status_code, written.json()["version"]) == (200, 2)
        later = await register()
        before = (await owner.client.get("/v1/org/plan")).json()
        after = (await later.client.get("/v1/org/plan")).json()
        assert (before["plan"]["version"], allowed(before)["tunnels"]) == (1, PLAN_TABLE[0].limits["tunnels"])
        assert (after["plan"]["version"], allowed(after)["tunnels"]) == (2, 2)
        assert allowed(after)["members"] == PLAN_TABLE[0].limits["members"]  # what was left out is as before
        rows = (await operator.get("/v1/admin/plans")).json()["data"]
        assert {row["version"]: row["organizations"] for row in rows if row["id"] == name} == {1: 1, 2: 1}
        # A move that names no version leaves an organization on the one that it has; one that does moves it.
        assert (await move(operator, owner.organization, name))["plan"]["version"] == 1
        assert (await move(operator, owner.organization, name, version=2))["plan"]["version"] == 2


async def test_a_default_plan_that_does_not_exist_is_told_at_the_start(settings: ApiSettings, db: Database) -> None:
    made = create_app(replace(settings, default_plan="fre"), db=db)
    with pytest.raises(Problem, match="default_plan") as refused:
        async with made.router.lifespan_context(made):
            pass
    assert refused.value.code == "config.invalid"


async def test_a_plan_of_ones_own(owner: Account, operator: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    name = f"big-{secrets.token_hex(4)}"
    body = {
        "name": "Big",
        "limits": {"tunnels": 3000, "requests_per_month": None},
        "features": ["tcp"],
        "hard_cap": False,
    }
    made = await operator.put(f"/v1/admin/plans/{name}", json=body)
    assert (made.status_code, made.json()["version"], made.json()["listed"]) == (200, 1, False)
    assert made.json()["limits"]["members"] == PLAN_TABLE[0].limits["members"]  # closed where nothing was said
    assert name not in [plan["id"] for plan in (await client.get("/v1/plans")).json()["data"]]
    assert allowed(await move(operator, owner.organization, name))["requests_per_month"] is None
    problem(await operator.put(f"/v1/admin/plans/{name}", json={"limits": {"cups": 1}}), 400, "plan.limit_invalid")
    problem(await operator.put(f"/v1/admin/plans/{name}", json={"features": ["flight"]}), 400, "plan.limit_invalid")


class TestMove:
    async def test_it_is_audited_in_the_organization_with_its_reason(
        self, owner: Account, operator: httpx.AsyncClient
    ) -> None:
        await move(operator, owner.organization, "pro", overrides={"tunnels": 7, "tcp": 0}, reason="they asked")
        found = (await owner.client.get("/v1/org/plan")).json()
        assert (found["plan"]["id"], allowed(found)["tunnels"]) == ("pro", 7)
        assert {row["name"] for row in found["features"] if row["has"]} == {"tls", "ip_rules"}
        assert [(row["name"], row["value"]) for row in found["overrides"]] == [("tcp", 0), ("tunnels", 7)]
        row = (await owner.client.get("/v1/audit", params={"action": "organization.plan"})).json()["data"][0]
        assert (row["actor"]["kind"], row["details"]["reason"]) == ("operator", "they asked")
        assert row["details"]["before"] == {"plan": "unlimited", "version": 1}
        assert (await owner.client.get("/v1/whoami")).json()["organization"]["plan"] == "pro"

    async def test_overrides_are_replaced_as_a_whole(self, owner: Account, operator: httpx.AsyncClient) -> None:
        await move(operator, owner.organization, "free", overrides={"members": 50, "tunnels": None})
        assert (await move(operator, owner.organization, "free"))["overrides"] == []

    async def test_an_override_ends_at_its_time(self, owner: Account, operator: httpx.AsyncClient, app: Any) -> None:
        path = f"/v1/admin/organizations/{owner.organization}/plan"
        past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
        over = {"name": "tunnels", "value": 90, "expires_at": past}
        answer = await operator.put(path, json={"plan": "free", "reason": "trial", "overrides": [over]})
        assert allowed(answer.json())["tunnels"] == PLAN_TABLE[0].limits["tunnels"]
        await app.state.standing.round(app.state.db)
        async with app.state.db.read() as reader:
            query = "SELECT count(*) FROM plan_overrides WHERE organization_id = $1"
            assert await reader.raw.fetchval(query, owner.organization) == 0

    async def test_a_move_and_the_end_of_an_override_wait_for_each_other_in_one_order(
        self, owner: Account, operator: httpx.AsyncClient, app: Any
    ) -> None:
        """Each holds the organization before its overrides: else both would, now and then, wait for ever."""
        path = f"/v1/admin/organizations/{owner.organization}/plan"
        past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
        over = {"name": "tunnels", "value": 90, "expires_at": past}
        assert (await operator.put(path, json={"plan": "free", "reason": "trial", "overrides": [over]})).is_success
        async with app.state.db.transaction() as tx:
            assert await plans.hold(tx, owner.organization) is not None  # as a move does first …
            ending = asyncio.create_task(app.state.standing.round(app.state.db))
            async with app.state.db.read() as reader:
                query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
                while not await reader.raw.fetchval(query):
                    assert not ending.done()
                    await asyncio.sleep(0.01)
            await tx.raw.execute("SET LOCAL lock_timeout = '5s'")
            await plans.replace_overrides(tx, owner.organization, [])  # … and then this
        await ending

    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            ({"plan": "none"}, 404, "plan.not_found"),
            ({"plan": "free", "version": 9}, 404, "plan.not_found"),
            ({"plan": "free", "overrides": [{"name": "cups", "value": 1}]}, 400, "plan.override_invalid"),
            ({"plan": "free", "overrides": [{"name": "tcp", "value": 2}]}, 400, "plan.override_invalid"),
            ({"plan": "free", "overrides": [{"name": "tcp", "value": None}]}, 400, "plan.override_invalid"),
            ({"plan": "free", "overrides": [{"name": "tcp", "value": 1}] * 2}, 400, "plan.override_invalid"),
            ({"plan": "free", "overrides": [{"name": "tunnels", "value": -1}]}, 422, "request.invalid"),
            ({"plan": "free", "reason": ""}, 422, "request.invalid"),
        ],
    )
    async def test_what_makes_no_sense_changes_nothing(
        self, owner: Account, operator: httpx.AsyncClient, body: dict[str, Any], status: int, code: str
    ) -> None:
        path = f"/v1/admin/organizations/{owner.organization}/plan"
        problem(await operator.put(path, json={"reason": "x", **body}), status, code)
        assert (await operator.get(path)).json()["plan"]["id"] == "unlimited"
        problem(await operator.get("/v1/admin/organizations/org_none/plan"), 404, "request.not_found")
        problem(await owner.client.put(path, json={"plan": "team", "reason": "x"}), 403, "auth.operator_required")
