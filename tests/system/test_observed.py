"""One request seen from everywhere: visitor, relay, agent and target call it by the same id."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.platform import Account, Agent, Up
from tests.system.targets import Request, app
from tests.system.visitor import Answer, connected, request
from tests.timing import allowed

pytestmark = [pytest.mark.system, pytest.mark.realtime]

#: Refusals reach the agent within a second, and its output a moment later.
TOLD_SECONDS = 4.0


async def ask(up: Up, host: str, path: str, *fields: str) -> Answer:
    async with asyncio.timeout(30), connected(up.http_port) as wire:
        await wire.send(request(host, path, fields=[*fields, "Connection: close"]))
        return await wire.answer()


async def until(what: Any, why: str, limit: float = TOLD_SECONDS) -> Any:
    began = time.monotonic()
    while not (found := what()):
        assert time.monotonic() - began < allowed(limit, began), why
        await asyncio.sleep(0.02)
    return found


def logged(up: Up, ident: str) -> list[dict[str, Any]]:
    """The lines of the access log about one request."""
    lines = (up.home / "access.log").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row.get("request") == ident]


async def test_one_id_from_the_visitor_to_the_target(
    up: Up, account: Account, agent: Agent, host: str, target: socket.socket
) -> None:
    ids: list[str] = []

    async def seen(request: Request) -> None:
        ids.extend(request.values("X-Request-Id"))
        await request.respond(b"seen")

    async with app(target, seen=seen):
        for _ in range(4):  # from the second on by the short way of both relay and agent
            assert (await ask(up, host, "/seen?token=secret", "X-Request-Id: a-visitors-own")).status == 200
    assert len(set(ids)) == 4 and "a-visitors-own" not in ids
    local = next(event["inspector"] for event in agent.events() if event["event"] == "online")
    for ident in ids:
        (line,) = await until(lambda ident=ident: logged(up, ident), "no line in the access log")
        assert (line["path"], line["status"], line["host"]) == ("/seen", 200, host)
        assert line["tunnel"] == account.tunnels()["observed"]["id"]
        await until(lambda ident=ident: ident in agent.out, "the agent did not say the id")
        (event,) = [e for e in agent.events() if e.get("request_id") == ident]
        assert (event["event"], event["path"]) == ("request", "/seen?token=secret")
    async with httpx.AsyncClient(base_url=local, trust_env=False) as page:
        rows = (await page.get("/api/requests?limit=4")).json()["requests"]
        shown = [(await page.get(f"/api/requests/{row['id']}")).json()["request_id"] for row in rows]
    assert shown == ids[::-1]


async def test_who_is_refused_at_the_edge_is_known_at_the_agent(
    up: Up, account: Account, agent: Agent, host: str
) -> None:
    tunnel = account.tunnels()["observed"]["id"]
    policy = {"addresses": {"rules": [{"deny": "127.0.0.0/8"}]}}
    account.call("PATCH", f"/tunnels/{tunnel}", {"policy": policy})
    began = time.monotonic()
    while (refused := await ask(up, host, "/")).status != 403:
        assert time.monotonic() - began < allowed(TOLD_SECONDS, began), refused
    (line,) = await until(lambda: logged(up, json.loads(refused.body)["request_id"]), "no line in the access log")
    assert (line["status"], line["code"], line["end"]) == (403, "edge.ip_denied", "refused")
    told = await until(lambda: [e for e in agent.events() if e["event"] == "refused"], "the agent was not told")
    assert told[0] == {"event": "refused", "name": "observed", "code": "edge.ip_denied", "count": 1, "total": 1}
    local = next(event["inspector"] for event in agent.events() if event["event"] == "online")
    async with httpx.AsyncClient(base_url=local, trust_env=False) as page:
        (shown,) = (await page.get("/api/tunnels")).json()["tunnels"]
    assert shown["edge"]["refused"] == {"edge.ip_denied": 1}
    account.call("PATCH", f"/tunnels/{tunnel}", {"policy": {}})


async def test_every_process_shows_its_figures(up: Up, host: str) -> None:
    targets = json.loads(Path(up.home / "metrics.json").read_text())
    places = {group["labels"]["process"]: group["targets"][0] for group in targets}
    async with httpx.AsyncClient(trust_env=False) as client:
        for process, family in (
            ("api", "portico_api_requests_total"),
            ("relay-1", 'portico_relay_refusals_total{code="edge.ip_denied"}'),
            ("worker", 'portico_queue_job_seconds_count{kind="outbox.mail"}'),
        ):
            answer = await client.get(f"http://{places[process]}/metrics")
            assert answer.status_code == 200 and family in answer.text
        for url in (up.credentials["relay_url"], up.credentials["api_url"]):
            assert "portico_" not in (await client.get(f"{url}/metrics")).text
