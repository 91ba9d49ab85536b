"""Dunning cases as who pays and operators see them, and what operators do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from portico.control.billing import dunning_jobs
from portico.control.billing.billing_store import Source
from portico.control.identity.keys import issue
from portico.kit.db import Database
from portico.kit.ids import new_id
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret
from tests.control.billing.story import Story
from tests.control.conftest import Account, MovableClock

_MASTER_KEY = new_master_key()


@pytest.fixture
def settings(database_url: str) -> ApiSettings:
    return ApiSettings(
        database_url=Secret(database_url), master_key=Secret(_MASTER_KEY), default_plan="free",
        registrations_per_address=100_000, rate_write_per_minute=1_000_000, rate_auth_per_minute=1_000_000,
        rate_read_per_minute=1_000_000,
    )  # fmt: skip


@pytest.fixture
async def story(app: Any, owner: Account, db: Database) -> Story:
    """The owner's organization bought a plan eleven days ago and has not paid since."""
    found = Story(db, app.state.billing.applier)
    found.organization, found.source = owner.organization, Source("stripe", new_id("acct"), False)
    await found.page(subscription="sub_1")
    await found.apply(found.state(1, "active", plan_ref=None), found.invoice(2, "in_1"))
    return found


@pytest.fixture
async def operator(app: Any, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    async with app.state.db.transaction() as tx:
        made = await issue(tx, app.state.clock.wall(), None, None, "operator", "operator", [])
    return connect(made.key)


@pytest.fixture
async def member(owner: Account, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    """The owner by a key, which outlives the days that tests let pass."""
    return connect((await owner.key("api", scopes=["audit:read", "billing:read", "organization:read"]))["key"])


async def late(app: Any, story: Story, clock: MovableClock, days: float) -> str:
    """The payment fails, and some days pass; the case."""
    await story.apply(story.failed(3, "in_1", 1))
    clock.advance(days * 86_400)
    await dunning_jobs.round_(story.db, clock, app.state.billing.applier)
    async with story.db.read() as reader:
        query = "SELECT id FROM billing_dunning_cases WHERE organization_id = $1 AND closed_at IS NULL"
        return str(await reader.raw.fetchval(query, story.organization))


async def held(member: httpx.AsyncClient) -> tuple[str, list[str]]:
    shown = (await member.get("/v1/org/plan")).json()
    return shown["plan"]["id"], [each["name"] for each in shown["overrides"]]


async def test_who_pays_sees_it(
    app: Any, member: httpx.AsyncClient, stranger: Account, story: Story, clock: MovableClock
) -> None:
    other = (await stranger.client.get("/v1/billing/dunning")).json()
    case = await late(app, story, clock, 2)
    shown = (await member.get("/v1/billing/dunning")).json()["data"]
    assert [(each["id"], each["state"], each["stage"], each["amount_minor"]) for each in shown] == [
        (case, "retrying", "D1", 1190)
    ]
    owing = (await member.get("/v1/billing/subscription")).json()["subscription"]["owing"]
    assert [each["id"] for each in owing] == [case]
    assert other["data"] == []
    none = await member.get("/v1/billing/dunning", params={"state": "suspended"})
    assert none.json()["data"] == []


async def test_a_pause_gives_back_and_its_days_do_not_count(
    app: Any, member: httpx.AsyncClient, story: Story, clock: MovableClock, operator: httpx.AsyncClient
) -> None:
    case = await late(app, story, clock, 11)
    assert await held(member) == ("pro", ["requests_per_second", "tunnels"])
    paused = await operator.post(f"/v1/admin/dunning/{case}/pause", json={"reason": "we are talking"})
    assert (paused.status_code, paused.json()["state"]) == (200, "paused")
    assert await held(member) == ("pro", [])
    clock.advance(60 * 86_400)
    await dunning_jobs.round_(story.db, clock, app.state.billing.applier)
    assert await held(member) == ("pro", [])
    resumed = await operator.post(f"/v1/admin/dunning/{case}/resume")
    assert (resumed.status_code, resumed.json()["state"]) == (200, "restricted")
    assert await held(member) == ("pro", ["requests_per_second", "tunnels"])
    again = await operator.post(f"/v1/admin/dunning/{case}/resume")
    assert (again.status_code, again.json()["code"]) == (409, "dunning.state")


async def test_closed_for_good(
    app: Any, member: httpx.AsyncClient, story: Story, clock: MovableClock, operator: httpx.AsyncClient
) -> None:
    case = await late(app, story, clock, 15)
    assert (await held(member))[0] == "free"
    closed = await operator.post(f"/v1/admin/dunning/{case}/close", json={"reason": "our mistake"})
    assert (closed.status_code, closed.json()["state"], closed.json()["reason"]) == (200, "canceled", "our mistake")
    assert (await held(member))[0] == "pro"
    await story.apply(story.invoice(90, "in_9", 100, 0))  # whatever else happens, it stays closed
    assert (await member.get("/v1/billing/dunning", params={"unfinished": True})).json()["data"] == []
    again = await operator.post(f"/v1/admin/dunning/{case}/close", json={"reason": "twice"})
    assert (again.status_code, again.json()["code"]) == (409, "dunning.state")
    log = (await member.get("/v1/audit", params={"action": "dunning.close"})).json()["data"]
    assert [(each["target"], each["details"]["reason"]) for each in log] == [(case, "our mistake")]


async def test_a_case_that_is_none(operator: httpx.AsyncClient) -> None:
    answer = await operator.post("/v1/admin/dunning/dun_none/close", json={"reason": "x"})
    assert (answer.status_code, answer.json()["code"]) == (404, "dunning.not_found")
