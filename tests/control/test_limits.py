"""Rates of the API: who is counted together, what answers say, and what a flood leaves alone."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest
import redis.asyncio
from starlette.datastructures import Headers

from portico.control import limits
from portico.control.app import create_app
from portico.control.limits import WINDOW_SECONDS, Buckets, Limits, Rate, class_of
from portico.errors import Problem
from portico.kit.db import Database
from portico.kit.ids import new_token
from portico.kit.redis import Redis
from portico.settings import ApiSettings, Secret
from tests.control.conftest import Account, MovableClock
from tests.control.test_http import problem

Connect = Callable[..., httpx.AsyncClient]
READS, WRITES, UNKNOWN, AUTH = 12, 6, 10, 40


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    return replace(
        settings,
        rate_read_per_minute=READS,
        rate_write_per_minute=WRITES,
        rate_unknown_per_minute=UNKNOWN,
        rate_auth_per_minute=AUTH,
        rate_export_per_minute=2,
        rate_page_per_minute=3,
    )


def left(answer: httpx.Response) -> tuple[str, int]:
    """The class of an answer's limit and how much of it is left."""
    found = re.fullmatch(r'"([a-z]+)";r=(\d+);t=(\d+)', answer.headers["ratelimit"])
    assert found is not None, answer.headers["ratelimit"]
    return found[1], int(found[2])


async def reads(client: httpx.AsyncClient, count: int, path: str = "/v1/whoami") -> list[int]:
    return [(await client.get(path)).status_code for _ in range(count)]


class TestAnswers:
    async def test_say_what_is_left(self, owner: Account, clock: MovableClock) -> None:
        answer = await owner.client.get("/v1/whoami")
        assert answer.headers["ratelimit-policy"] == f'"read";q={READS};w=60'
        assert left(answer) == ("read", READS - 1)
        assert left(await owner.client.get("/v1/tunnels")) == ("read", READS - 2)
        assert left(await owner.client.post("/v1/tunnels", json={"name": "one"})) == ("write", WRITES - 1)
        clock.advance(60)
        assert left(await owner.client.get("/v1/whoami")) == ("read", READS - 1)

    async def test_refuse_what_is_too_much_and_say_when(self, owner: Account, clock: MovableClock) -> None:
        assert await reads(owner.client, READS) == [200] * READS
        refused = await owner.client.get("/v1/whoami")
        told = problem(refused, 429, "request.rate_limited")
        assert told["limit"] == READS and left(refused) == ("read", 0)
        wait = int(refused.headers["retry-after"])
        assert 1 <= wait <= WINDOW_SECONDS / READS + 1
        assert (await owner.client.post("/v1/tunnels", json={"name": "two"})).status_code == 201  # another class
        clock.advance(wait)
        assert await reads(owner.client, 2) == [200, 429]

    async def test_refusals_cost_nothing_more(self, owner: Account, clock: MovableClock) -> None:
        await reads(owner.client, READS + 20)
        clock.advance(WINDOW_SECONDS / READS + 0.1)
        assert await reads(owner.client, 1) == [200]

    async def test_a_problem_has_them_too(self, owner: Account) -> None:
        answer = await owner.client.get("/v1/tunnels/tun_none")
        assert answer.status_code == 404 and left(answer) == ("read", READS - 1)

    async def test_routes_without_a_limit(self, client: httpx.AsyncClient, relay: httpx.AsyncClient) -> None:
        for path in ("/healthz", "/readyz", "/openapi.json", "/.well-known/jwks.json"):
            for _ in range(5):
                answer = await client.get(path)
                assert answer.status_code == 200 and "ratelimit" not in answer.headers, path
        for _ in range(UNKNOWN + 5):
            assert (await relay.post("/v1/edge/acks", json={})).status_code == 422

    @pytest.mark.parametrize(
        ("method", "path", "name"),
        [
            ("GET", "/v1/tunnels", "read"),
            ("HEAD", "/v1/tunnels", "read"),
            ("DELETE", "/v1/tunnels/x", "write"),
            ("POST", "/v1/auth/login", "auth"),
            ("POST", "/v1/secret-scanning/github", "auth"),
            ("GET", "/v1/audit/export", "export"),
            ("POST", "/v1/agent/sessions", "agent"),
            ("GET", "/v1/edge/stream", ""),
            ("GET", "/device", "page"),
            ("GET", "/v1", "page"),
        ],
    )
    def test_classes(self, method: str, path: str, name: str) -> None:
        assert class_of(method, path) == name


class TestWhoIsCounted:
    async def test_everybody_alone(self, owner: Account, stranger: Account, connect: Connect) -> None:
        """Two keys of one person, and two organizations; a new access token is the same person."""
        one, two = connect((await owner.key())["key"]), connect((await owner.key())["key"])
        assert (await reads(one, READS + 1))[-1] == 429
        assert await reads(two, 1) == await reads(stranger.client, 1) == await reads(owner.client, 1) == [200]
        body = {"refresh_token": owner.refresh}
        fresh = (await connect().post("/v1/auth/refresh", json=body)).json()["access_token"]
        again = await connect(fresh).get("/v1/whoami")
        assert left(again)[1] == READS - 2

    async def test_a_flood_of_bad_credentials_is_the_networks(self, owner: Account, connect: Connect) -> None:
        """It leaves alone who is known to be good, in the same network, and everybody in others."""
        assert await reads(owner.client, 1) == [200]
        guesses = [(await connect(new_token("sk")).get("/v1/whoami")).status_code for _ in range(UNKNOWN + 3)]
        assert guesses == [401] * UNKNOWN + [429] * 3
        assert await reads(connect(None), 1) == [429]
        assert await reads(owner.client, 1) == [200]
        assert await reads(connect(owner.access, address="198.51.100.7"), 1) == [200]
        assert await reads(connect("nonsense", address="198.51.100.8"), 1) == [401]

    async def test_a_forged_forwarded_address_is_no_new_bucket(self, connect: Connect) -> None:
        client = connect("nonsense", address="203.0.113.5")
        answers = [
            await client.get("/v1/whoami", headers={"x-forwarded-for": f"198.51.100.{n}"}) for n in range(UNKNOWN + 1)
        ]
        assert [answer.status_code for answer in answers] == [401] * UNKNOWN + [429]

    async def test_an_ipv6_network_is_one(self, connect: Connect) -> None:
        clients = [connect("nonsense", address=f"2001:db8::{n}") for n in range(1, UNKNOWN + 2)]
        assert [(await client.get("/v1/whoami")).status_code for client in clients] == [401] * UNKNOWN + [429]
        assert await reads(connect("nonsense", address="2001:db8:0:1::1"), 1) == [401]

    async def test_good_credentials_cost_their_network_nothing(self, owner: Account, connect: Connect) -> None:
        """However many arrive from one network, such as a fleet that starts."""
        for made in [await owner.key() for _ in range(WRITES)]:
            assert await reads(connect(made["key"]), 3) == [200] * 3
        assert await reads(connect("nonsense"), UNKNOWN) == [401] * UNKNOWN

    async def test_a_revoked_key_is_unknown_again(self, owner: Account, connect: Connect, app: Any) -> None:
        made = await owner.key()
        client = connect(made["key"], address="198.51.100.9")
        assert await reads(client, 1) == [200]
        await owner.client.delete(f"/v1/api-keys/{made['id']}")
        assert await reads(client, UNKNOWN + 2) == [401] * (UNKNOWN + 1) + [429]

    async def test_sign_in_is_counted_by_network(self, connect: Connect) -> None:
        client = connect(address="198.51.100.10")
        body = {"refresh_token": new_token("rt")}
        answers = [(await client.post("/v1/auth/refresh", json=body)).status_code for _ in range(AUTH + 1)]
        assert answers == [401] * AUTH + [429]

    async def test_pages_are_counted_by_network(self, client: httpx.AsyncClient) -> None:
        assert (await reads(client, 4, "/nothing"))[-1] == 429


class TestAgents:
    async def test_a_fleet_with_one_key_comes_back_at_once(
        self, owner: Account, relay: httpx.AsyncClient, connect: Connect
    ) -> None:
        agent = connect((await owner.key())["key"])
        bodies = [{"agent_id": f"agt-{n:010}", "tunnels": []} for n in range(60)]
        assert (await agent.post("/v1/agent/sessions", json=bodies[0])).status_code == 201
        answers = await asyncio.gather(*(agent.post("/v1/agent/sessions", json=body) for body in bodies))
        assert {answer.status_code for answer in answers} == {201}
        assert left(answers[-1])[0] == "agent"

    async def test_agents_never_wait_for_redis(self, settings: ApiSettings, clock: MovableClock) -> None:
        class NoRedis:
            async def pipeline(self, *_: Any, **__: Any) -> Any:
                raise AssertionError("asked")

        made = Limits(settings, NoRedis(), clock.monotonic)  # type: ignore[arg-type]
        made._known[limits._digest("Bearer x")] = "key_1"
        scope = {"type": "http", "method": "POST", "path": "/v1/agent/sessions", "state": {}, "headers": []}
        ticket = await made.admit(scope, Headers({"authorization": "Bearer x"}))
        assert ticket is not None and ticket.rate.name == "agent"

    async def test_the_first_requests_of_thousands_pass(self, clock: MovableClock) -> None:
        """By the defaults: as many as a process serves at once are on their way before the first has proved good."""
        settings = ApiSettings(Secret("postgresql://x/y"), Secret("x"))
        made = Limits(settings, None, clock.monotonic)
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/agent/sessions",
            "headers": [],
            "client": ("10.0.0.1", 1),
        }

        class App:
            class state:
                trusted_proxies = ()

        who = type("Caller", (), {"id": "key_1"})
        for wave in range(5):
            tickets = []
            for n in range(settings.max_concurrency):
                one = {**scope, "state": {}, "app": App}
                headers = Headers({"authorization": f"Bearer {wave}-{n}"})
                tickets.append((one, await made.admit(one, headers)))
            for one, ticket in tickets:
                assert ticket is not None
                one["state"]["caller"] = who
                made.answered(ticket, one, 201)


class TestRedis:
    @pytest.fixture
    async def pair(
        self, settings: ApiSettings, db: Database, valkey: Any, clock: MovableClock
    ) -> AsyncIterator[list[Any]]:
        """Two processes with one Redis."""
        async with AsyncExitStack() as stack:
            apps = []
            for _ in range(2):
                app = create_app(
                    replace(settings, redis_url=Secret(valkey.url), redis_timeout_seconds=2.0), clock=clock, db=db
                )
                await stack.enter_async_context(app.router.lifespan_context(app))
                apps.append(app)
            yield apps

    async def test_processes_count_together_and_go_on_alone_without_it(
        self, pair: list[Any], owner: Account, valkey: Any
    ) -> None:
        headers = {"Authorization": f"Bearer {(await owner.key())['key']}"}
        clients = [
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api.test", headers=headers)
            for app in pair
        ]
        for client in clients:  # each learns that the key is good; that one is counted by itself
            assert (await client.get("/v1/whoami")).status_code == 200
        began = time.monotonic()
        statuses = [(await clients[n % 2].get("/v1/whoami")).status_code for n in range(READS + 8)]
        back = (time.monotonic() - began) / WINDOW_SECONDS * READS  # since the first of them
        assert statuses[:READS] == [200] * READS and 429 in statuses
        assert statuses.count(200) <= READS + back + 1
        while (await clients[1].get("/v1/whoami")).status_code != 429:
            pass
        refused = await clients[0].get("/v1/whoami")
        problem(refused, 429, "request.rate_limited")
        assert 1 <= int(refused.headers["retry-after"]) <= WINDOW_SECONDS / READS + 1
        await self._move_buckets(valkey.url, 600)  # as if its clock had been set back by ten minutes
        assert (await clients[0].get("/v1/whoami")).status_code == 200
        for app in pair:
            app.state.limits._redis = Redis("redis://127.0.0.1:1/0", timeout_seconds=0.2)
        answers = [await client.get("/v1/whoami") for client in clients]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert all(left(answer)[1] >= READS - 3 for answer in answers)
        for client in clients:
            await client.aclose()

    @staticmethod
    async def _move_buckets(url: str, seconds: float) -> None:
        async with redis.asyncio.Redis.from_url(url) as server:
            for key in await server.keys("portico:rate:*"):
                value = await server.get(key)
                await server.set(key, f"{float(value) + seconds:.6f}", px=600_000)


class TestBuckets:
    def test_a_clock_that_is_set_back_keeps_nobody_waiting(self) -> None:
        now = [10_000.0]
        rate, buckets = Rate("x", 60), Buckets(lambda: now[0])
        assert [buckets.take(rate, "a")[0] for _ in range(61)] == [True] * 60 + [False]
        now[0] -= 600
        assert [buckets.take(rate, "a")[0] for _ in range(61)] == [True] * 60 + [False]

    def test_the_whole_quota_at_once_then_evenly(self, clock: MovableClock) -> None:
        rate, buckets = Rate("x", 60), Buckets(clock.monotonic)
        now = clock.monotonic()
        buckets._monotonic = lambda: now
        assert [buckets.take(rate, "a")[0] for _ in range(61)] == [True] * 60 + [False]
        buckets._monotonic = lambda: now + 1.0
        assert [buckets.take(rate, "a")[0] for _ in range(2)] == [True, False]
        buckets.give_back(rate, "a")
        assert buckets.take(rate, "a")[0]
        assert buckets.take(rate, "b")[0] and buckets.take(Rate("y", 1), "a")[0]

    def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "MAX_BUCKETS", 100)
        now = [0.0]
        buckets = Buckets(lambda: now[0])
        for n in range(1000):
            now[0] += 0.5
            buckets.take(Rate("x", 60), f"network-{n}")
            assert len(buckets) <= 101

    async def test_a_quota_of_nought_is_no_limit(self, settings: ApiSettings, clock: MovableClock) -> None:
        made = Limits(replace(settings, rate_read_per_minute=0), None, clock.monotonic)
        scope = {"type": "http", "method": "GET", "path": "/v1/tunnels", "state": {}, "headers": []}
        assert await made.admit(scope, Headers()) is None

    def test_a_refusal_is_a_problem(self) -> None:
        refusal = limits._refusal(Rate("read", 60), 60.0)
        assert isinstance(refusal, Problem) and refusal.headers["Retry-After"] == "1"
