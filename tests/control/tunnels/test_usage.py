"""Usage: by day and month, once each; shares of a quota told once; a hard cap that relays hear of and that ends by itself."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

import httpx
import pytest

from portico.control.notifications import mail
from portico.control.tunnels.standing import month_of, next_month
from portico.kit.db import Database
from tests.control.conftest import Account, MovableClock
from tests.control.edge.test_api import batch, new_tunnel, row, usage_body
from tests.control.identity.test_plans import move, operator
from tests.control.test_http import problem

__all__ = ["operator"]


class Meter:
    """A relay that reports what one tunnel used."""

    def __init__(self, relay: httpx.AsyncClient, tunnel: str, organization: str) -> None:
        self.relay, self.tunnel, self.organization = relay, tunnel, organization
        self.boot, self.seq = tunnel.removeprefix("tun_"), 0

    async def report(self, requests: int, at: datetime, times: int = 1, **more: int) -> None:
        self.seq += 1
        body = usage_body(batch(self.seq, row(self.tunnel, self.organization, requests, **more), at=at), boot=self.boot)
        for _ in range(times):
            answer = await self.relay.post("/v1/edge/usage", json=body)
            assert answer.json() == {"acknowledged": self.seq}


@pytest.fixture
async def meter(relay: httpx.AsyncClient, owner: Account) -> Meter:
    return Meter(relay, await new_tunnel(owner.client), owner.organization)


@pytest.fixture
def told(app: Any) -> list[dict[str, Any]]:
    """What organizations were told of their quotas."""
    heard: list[dict[str, Any]] = []

    async def hear(tx: Any, organization: str, facts: dict[str, Any], key: str) -> None:
        heard.append({**facts, "organization": organization, "key": key})

    app.state.standing.notify.append(hear)
    return heard


@pytest.fixture
async def key(owner: Account, connect: Any) -> httpx.AsyncClient:
    """A client of the owner's that signs in anew in no month."""
    client: httpx.AsyncClient = connect((await owner.key("api"))["key"])
    return client


async def usage(client: httpx.AsyncClient, **params: str) -> dict[str, Any]:
    answer = await client.get("/v1/usage", params=params)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def edge_row(db: Database, organization: str) -> Any:
    """What relays were last told of the organization."""
    async with db.read() as reader:
        query = """
            SELECT c->'organization' #>> '{refuse,code}' AS code, (c->'organization' #>> '{refuse,until}')::bigint AS until
            FROM edge_changes, jsonb_array_elements(payload) c
            WHERE c->>'kind' = 'organization' AND c->'organization'->>'id' = $1 ORDER BY version DESC LIMIT 1
        """
        return await reader.raw.fetchrow(query, organization)


def middle_of_month(clock: MovableClock) -> datetime:
    """The clock goes to the middle of the month after this one, and says when that is."""
    then = next_month(month_of(clock.wall())) + timedelta(days=14, hours=12)
    clock.advance((then - clock.wall()).total_seconds())
    return clock.wall()


class TestPeriods:
    async def test_by_day_and_month_and_tunnel(
        self, key: httpx.AsyncClient, owner: Account, meter: Meter, clock: MovableClock
    ) -> None:
        now = middle_of_month(clock)
        yesterday, before = now - timedelta(days=1), now - timedelta(days=20)
        await meter.report(5, now, times=3, bytes_in=10, bytes_out=20, connections=1, errors=1)
        await meter.report(2, yesterday)
        await meter.report(7, before)
        today = now.date()
        document = await usage(key)
        assert (document["from"], document["to"]) == (today.replace(day=1).isoformat(), today.isoformat())
        assert [(p["period"], p["requests"]) for p in document["data"]] == [
            (yesterday.date().isoformat(), 2), (today.isoformat(), 5),
        ]  # fmt: skip
        wanted = {"connections": 1, "bytes_in": 10, "bytes_out": 20, "errors": 1}
        assert {name: document["data"][1][name] for name in wanted} == wanted
        months = await usage(key, by="month", **{"from": before.date().isoformat(), "to": today.isoformat()})
        assert [(p["period"], p["requests"]) for p in months["data"]] == [
            (before.date().isoformat()[:7], 7), (today.isoformat()[:7], 7),
        ]  # fmt: skip
        await key.delete(f"/v1/tunnels/{meter.tunnel}")
        assert (await usage(key, tunnel=meter.tunnel))["data"] == document["data"]  # what it used stays
        used = {limit["name"]: limit["used"] for limit in document["month"]["limits"]}
        assert used == {"requests_per_month": 8, "bytes_per_month": 30}

    @pytest.mark.parametrize(
        "params",
        [
            {"from": "2026-02-02", "to": "2026-02-01"},
            {"from": "2020-01-01", "to": "2021-01-01"},
            {"from": "2010-01-01", "to": "2026-01-01", "by": "month"},
            {"from": "9999-12-30", "to": "9999-12-31"},
        ],
    )
    async def test_days_that_make_no_sense(
        self, key: httpx.AsyncClient, owner: Account, params: dict[str, str]
    ) -> None:
        problem(await key.get("/v1/usage", params=params), 400, "usage.range_invalid")

    async def test_the_first_and_last_days_of_the_calendar(self, key: httpx.AsyncClient, owner: Account) -> None:
        assert (await usage(key, **{"from": "0001-01-01", "to": "0001-01-01", "by": "month"}))["data"] == []
        assert (await usage(key, to="2020-02-28"))["from"] == "2020-02-28"

    async def test_of_another_organization_it_is_not_there(self, stranger: Account, meter: Meter) -> None:
        await meter.report(1, datetime.now(UTC))
        path = "/v1/usage"
        problem(await stranger.client.get(path, params={"tunnel": meter.tunnel}), 404, "tunnel.not_found")
        assert (await usage(stranger.client))["data"] == []


class TestNotices:
    async def test_each_share_is_told_once_a_month(
        self,
        key: httpx.AsyncClient,
        owner: Account,
        operator: httpx.AsyncClient,
        meter: Meter,
        told: list[dict[str, Any]],
        clock: MovableClock,
    ) -> None:
        now = middle_of_month(clock)
        await move(operator, owner.organization, "pro", overrides={"requests_per_month": 100})
        await meter.report(49, now)
        assert told == []
        await meter.report(1, now, times=3)
        await meter.report(29, now)
        assert [(n["limit"], n["percent"], n["used"]) for n in told] == [("requests_per_month", 50, 50)]
        await meter.report(60, now)  # over two at once: the higher one says it all
        await meter.report(1, now)
        assert [n["percent"] for n in told] == [50, 100]
        assert told[1]["organization"] == owner.organization and told[1]["allowed"] == 100
        assert len({n["key"] for n in told}) == 2
        document = (await usage(key))["month"]
        assert (document["refused"], document["limits"][0]["percent"]) == (False, 140)  # no hard cap: it goes on
        clock.advance(31 * 86_400)
        await meter.report(50, clock.wall())
        assert [n["percent"] for n in told] == [50, 100, 50]

    async def test_what_comes_late_counts_for_its_own_month(
        self, key: httpx.AsyncClient, owner: Account, operator: httpx.AsyncClient, meter: Meter, told: list[dict[str, Any]],
        clock: MovableClock,
        db: Database,
    ) -> None:  # fmt: skip
        now = middle_of_month(clock)
        await move(operator, owner.organization, "free", overrides={"requests_per_month": 10})
        await meter.report(500, now - timedelta(days=20))
        assert told == []
        assert (await edge_row(db, owner.organization))["code"] is None
        assert (await usage(key))["month"]["limits"][0]["used"] == 0

    async def test_a_failure_on_the_way_is_made_good_by_the_next_report(
        self, owner: Account, operator: httpx.AsyncClient, meter: Meter, told: list[dict[str, Any]], app: Any,
        clock: MovableClock, db: Database,
    ) -> None:  # fmt: skip
        """The report is counted, and its relay told so, whatever becomes of the comparison after it."""
        now = middle_of_month(clock)
        await move(operator, owner.organization, "free", overrides={"requests_per_month": 10})
        settle = app.state.standing.settle

        async def fail(*args: Any, **more: Any) -> None:
            raise RuntimeError("killed")

        app.state.standing.settle = fail
        await meter.report(20, now)
        app.state.standing.settle = settle
        assert told == []
        await meter.report(0, now, bytes_in=1)
        assert [n["percent"] for n in told] == [100]
        assert (await edge_row(db, owner.organization))["code"] == "edge.quota_exceeded"


async def test_channels_that_want_it_and_owners_are_told(
    owner: Account, operator: httpx.AsyncClient, meter: Meter, clock: MovableClock, db: Database, key: httpx.AsyncClient
) -> None:
    channel = {
        "kind": "webhook",
        "name": "Usage",
        "target": "https://hooks.example.com/x",
        "events": ["usage.threshold"],
    }
    made = await owner.client.put("/v1/org/notification-channels", json={"channels": [channel]})
    assert made.status_code == 200, made.text
    now = middle_of_month(clock)
    await move(operator, owner.organization, "free", overrides={"bytes_per_month": 1 << 30})
    await meter.report(1, now, bytes_in=1 << 30)
    await meter.report(1, now, bytes_in=1)
    async with db.read() as reader:
        query = "SELECT driver, recipient FROM outbox_messages WHERE organization_id = $1 AND topic = 'usage.threshold'"
        found = sorted(tuple(row) for row in await reader.raw.fetch(query, owner.organization))
    assert found == [("mail", owner.email), ("webhook", made.json()["data"][0]["id"])]


@pytest.mark.parametrize(
    ("percent", "stops", "sentence"),
    [(50, False, "Nothing stops at 100 %"), (80, True, "At 100 % its tunnels"), (100, True, "Its tunnels answer")],
)
def test_what_the_mail_says(percent: int, stops: bool, sentence: str) -> None:
    facts = {
        "percent": percent, "what": "requests this month", "used": "80", "allowed": "100", "month": "2026-02",
        "plan": "free", "stops": stops, "console": "https://api.example.com", "organization": "Acme",
    }  # fmt: skip
    made = mail.render("usage.threshold", facts)
    assert made.subject == f"Acme has used {percent} % of its requests this month"
    assert sentence in made.text and sentence in made.html


class TestHardCap:
    async def test_it_is_told_lifted_by_a_plan_and_ends_with_the_month(
        self,
        key: httpx.AsyncClient,
        owner: Account,
        operator: httpx.AsyncClient,
        meter: Meter,
        app: Any,
        clock: MovableClock,
        db: Database,
    ) -> None:
        now = middle_of_month(clock)
        small = {"bytes_per_month": 1000}
        await move(operator, owner.organization, "free", overrides=small)
        await meter.report(1, now, bytes_in=400, bytes_out=599)
        assert (await edge_row(db, owner.organization))["code"] is None
        await meter.report(1, now, bytes_out=1)
        end = int(next_month(month_of(now)).timestamp())
        assert dict(await edge_row(db, owner.organization)) == {"code": "edge.quota_exceeded", "until": end}
        document = (await usage(key))["month"]
        assert document["refused"] is True
        assert datetime.fromisoformat(document["resets_at"]).timestamp() == end
        await move(operator, owner.organization, "free", overrides={"bytes_per_month": 2000})
        assert (await edge_row(db, owner.organization))["code"] is None
        await meter.report(1, now, bytes_out=1000)  # all notices are out: it is refused all the same
        assert (await edge_row(db, owner.organization))["code"] == "edge.quota_exceeded"
        await move(operator, owner.organization, "pro")
        assert (await edge_row(db, owner.organization))["code"] is None
        await move(operator, owner.organization, "free", overrides=small)
        assert (await edge_row(db, owner.organization))["code"] == "edge.quota_exceeded"
        clock.advance(end - clock.wall().timestamp() + 1)
        await app.state.standing.round(app.state.db)
        assert (await edge_row(db, owner.organization))["code"] is None
        assert (await usage(key))["month"]["refused"] is False

    async def test_a_relay_that_comes_later_hears_of_it(
        self, owner: Account, operator: httpx.AsyncClient, meter: Meter, app: Any, clock: MovableClock
    ) -> None:
        await move(operator, owner.organization, "free", overrides={"requests_per_month": 1, "concurrency": 3})
        await meter.report(1, clock.wall())
        state = await app.state.edge_states.read()
        found = next(row for row in state.organizations if row["id"] == owner.organization)
        assert (found["limits"]["concurrency"], found["refuse"]["code"]) == (3, "edge.quota_exceeded")
        async with app.state.db.transaction() as tx:
            await tx.raw.execute("UPDATE organizations SET edge_state = NULL WHERE id = $1", owner.organization)


@pytest.mark.parametrize(
    ("month", "after"),
    [(date(2026, 1, 1), datetime(2026, 2, 1, tzinfo=UTC)), (date(2026, 12, 1), datetime(2027, 1, 1, tzinfo=UTC))],
)
def test_the_month_after(month: date, after: datetime) -> None:
    assert next_month(month) == after
