"""Health and readiness of the app."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest

from portico.control import migrations
from portico.control.app import create_app
from portico.errors import Problem
from portico.settings import ApiSettings, Secret
from tests.control.test_http import problem


async def test_ready_with_schema_and_keys(client: httpx.AsyncClient) -> None:
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    assert (await client.get("/readyz")).json() == {"status": "ready"}


async def test_an_unmigrated_database_is_not_ready(settings: ApiSettings, empty_database_url: str) -> None:
    app = create_app(replace(settings, database_url=Secret(empty_database_url), housekeeping_seconds=60))
    async with app.router.lifespan_context(app), _client(app) as client:
        body = problem(await client.get("/readyz"), 503, "service.unavailable")
        assert "portico migrate" in body["hint"]
        await migrations.upgrade(empty_database_url)
        for _ in range(100):  # housekeeping makes the first keys by itself once it can
            if (answer := await client.get("/readyz")).status_code == 200:
                break
            import asyncio

            await asyncio.sleep(0.05)
        assert answer.status_code == 200


async def test_without_a_database_everything_is_unavailable_and_nothing_a_fault(settings: ApiSettings) -> None:
    app = create_app(replace(settings, database_url=Secret("postgresql://nobody@127.0.0.1:1/none")))
    async with app.router.lifespan_context(app), _client(app) as client:
        assert (await client.get("/healthz")).status_code == 200
        problem(await client.get("/readyz"), 503, "service.unavailable")
        login = {"email": "a@example.com", "password": "tall-Giraffe-42"}
        answer = await client.post("/v1/auth/login", json=login)
        problem(answer, 503, "service.unavailable")
        assert answer.headers["retry-after"] == "1"
        key = {"Authorization": "Bearer tnl_agt_0123456789ABCDEFGHIJKLMNOPQRST4PMbyp"}
        problem(await client.post("/v1/api-keys", json={}, headers=key), 503, "service.unavailable")


def test_a_proxy_that_is_no_network_is_named(settings: ApiSettings) -> None:
    with pytest.raises(Problem) as refused:
        create_app(replace(settings, trusted_proxies=("10.0.0.0/8", "nonsense")))
    assert refused.value.code == "config.invalid"
    assert "nonsense" in refused.value.detail


def _client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api.test")
