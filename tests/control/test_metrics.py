"""The API's figures, and the worker's."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from portico.control import metrics
from portico.control.metrics import Tally
from portico.kit.metrics import Histogram
from tests.control.conftest import Account


def values(state: Any) -> dict[tuple[str, ...], Any]:
    return {(metric.name, *labels): value for metric, labels, value in metrics.read(state)}


async def test_answers_are_counted_by_class_and_time(app: Any, client: httpx.AsyncClient, owner: Account) -> None:
    tally: Tally = app.state.tally
    before, timed = list(tally.statuses), sum(tally.seconds.counts)
    assert (await client.get("/healthz")).status_code == 200
    assert (await client.get("/v1/nothing")).status_code == 404
    assert (await client.put("/v1/whoami")).status_code == 405
    assert [after - was for after, was in zip(tally.statuses, before, strict=True)] == [0, 1, 0, 2, 0]
    assert sum(tally.seconds.counts) == timed + 3
    assert tally.in_flight == 0
    seen = values(app.state)
    assert seen["portico_api_requests_total", "4xx"] == tally.statuses[3]
    assert isinstance(seen["portico_api_answer_seconds",], Histogram)
    assert {name for name, *_ in seen} == {metric.name for metric in metrics.DECLARED}


async def test_the_pool_is_seen_at_work(app: Any, owner: Account) -> None:
    async with app.state.db.read():
        assert values(app.state)["portico_api_database_connections", "in_use"] >= 1  # housekeeping can have its own
    async with asyncio.timeout(30):
        while (seen := values(app.state))["portico_api_database_connections", "in_use"]:
            await asyncio.sleep(0.01)
    assert seen["portico_api_redis_up",] == 0
    assert seen["portico_api_database_connections", "idle"] >= 1
