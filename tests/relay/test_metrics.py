"""The relay's figures, from a real relay to a scrape of it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from portico.control import metrics as api_metrics
from portico.kit import metrics as common
from portico.relay import metrics
from portico.relay.server import Relay
from portico.wire.session import Session
from portico.worker import metrics as worker_metrics
from tests.relay.doubles import Client, ScriptedAgent, grant, port
from tests.relay.known import GET, forget, learn, whole

REQUEST = b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n"
Visit = Callable[..., Any]


@pytest.fixture
def relay_settings() -> dict[str, Any]:
    return {"metrics_port": 0}


class Scrape:
    """What one scrape showed; ``scrape["name", "label", …]`` with the values of the labels, these by name."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.values = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __getitem__(self, key: str | tuple[str, ...]) -> float:
        return self.values[key if isinstance(key, tuple) else (key,)]


def shown_at(relay: Relay) -> int:
    assert relay.metrics is not None
    return relay.metrics.port


async def scrape(relay: Relay) -> Scrape:
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"http://127.0.0.1:{shown_at(relay)}/metrics")
    assert answer.status_code == 200
    return Scrape(answer.text)


async def test_faults_of_the_short_way_are_counted_and_the_visitor_gets_its_answer(
    relay: Relay, agent: ScriptedAgent, visit: Visit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget()
    agent.on_stream = whole
    client: Client = await visit()
    await learn(client)
    assert (await scrape(relay))["portico_relay_short_way_faults_total"] == 0

    def broken(*args: Any) -> int:
        raise RuntimeError("not today")

    monkeypatch.setattr(Session, "open_lazy", broken)
    for count in (1, 2):
        client.send(GET)
        assert (await client.response())[0] == 200
        assert (await scrape(relay))["portico_relay_short_way_faults_total"] == count
    assert [record.message for record in caplog.records if record.exc_info] == [
        "fault on the short way of a repeated request"
    ]
    forget()


async def test_what_is_connected_and_what_was_refused(relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
    client: Client = await visit(REQUEST % b"web.localhost")
    assert (await client.response())[0] == 200
    client.send(REQUEST % b"nobody.localhost")
    assert (await client.response())[0] == 404
    seen = await scrape(relay)
    assert seen["portico_relay_sessions"] == 1
    assert seen["portico_relay_tunnels", "http"] == 1
    assert seen["portico_relay_streams"] == 0
    assert seen["portico_relay_connections", "http"] == seen["portico_relay_connections_total", "http"] == 1
    assert seen["portico_relay_refusals_total", "edge.host_unassigned"] == 1
    assert seen["portico_relay_visitor_bytes_total", "out"] == 43
    assert seen["portico_relay_edge_stream_up"] == 0
    assert seen["portico_relay_edge_version"] == 1
    with pytest.raises(Exception, match="401"):
        await ScriptedAgent().connect(port(relay, 0), "no token")
    assert (await scrape(relay))["portico_relay_agent_refusals_total", "session.token_invalid"] == 1


async def test_totals_never_go_back(relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
    client: Client = await visit(REQUEST % b"web.localhost")
    await client.response()
    before = relay.meter.totals()
    assert before["requests"] == 1
    agent.close()
    await agent.until(lambda: not relay.agents.by_tunnel)
    await relay.meter.collect()
    for counters in relay.meter._counters.values():
        counters.quiet_since -= 2 * relay.settings.usage_forget_seconds
    await relay.meter.collect()
    assert not relay.meter._counters
    assert relay.meter.totals() == before


async def test_how_far_the_edge_state_is_behind(relay: Relay) -> None:
    await relay.link._line(json.dumps({"type": "heartbeat", "version": 4}).encode())
    seen = await scrape(relay)
    assert (seen["portico_relay_edge_version"], seen["portico_relay_edge_versions_behind"]) == (1, 3)
    relay.snapshot.advance(4)
    assert (await scrape(relay))["portico_relay_edge_versions_behind"] == 0


async def test_only_its_own_listener_shows_them(relay: Relay, visit: Visit) -> None:
    client: Client = await visit(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"portico_relay" not in (await client.response())[2]
    async with httpx.AsyncClient(trust_env=False) as control:
        assert (await control.get(f"http://127.0.0.1:{port(relay, 0)}/metrics")).status_code != 200


async def test_readiness_ends_with_the_drain_and_the_figures_with_the_process(
    relay: Relay, agent: ScriptedAgent
) -> None:
    async with httpx.AsyncClient(trust_env=False, base_url=f"http://127.0.0.1:{shown_at(relay)}") as client:
        assert (await client.get("/readyz")).status_code == 200
        agent.on_stream = lambda stream: None
        reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 1))
        writer.write(REQUEST % b"web.localhost")
        await agent.until(lambda: agent.streams)
        stopping = asyncio.create_task(relay.stop())
        await agent.until(lambda: relay.agents.draining)
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/healthz")).status_code == 200
        agent.streams[0].answer(body=b"late")
        assert b"late" in await reader.read(4096) + await reader.read(4096)
        writer.close()
        await stopping
        with pytest.raises(httpx.ConnectError):
            await client.get("/healthz")


def test_names_units_and_help_follow_the_conventions() -> None:
    """What `promtool check metrics` complains of."""
    declared = [
        *common.COMMON, *metrics.DECLARED, *api_metrics.DECLARED, *worker_metrics.DECLARED,
    ]  # fmt: skip
    names = [metric.name for metric in declared]
    assert len(set(names)) == len(names)
    for metric in declared:
        assert re.fullmatch(r"portico_[a-z]+(_[a-z]+)*", metric.name), metric
        assert (metric.kind == "counter") is metric.name.endswith("_total"), metric
        assert metric.help.endswith("."), metric
        assert metric.kind != "histogram" or metric.name.endswith(("_seconds", "_bytes")), metric
        assert not re.search(r"(_ms|_milliseconds|_kb|_count|_sum|_bucket)$", metric.name), metric
        tenants = {"tunnel", "organization", "host", "path", "address", "client", "le", "user"}
        assert not tenants & set(metric.labels), metric


async def test_every_declared_family_has_a_sample_or_waits_for_its_first(relay: Relay, agent: ScriptedAgent) -> None:
    agent.bind(grant(), 1)
    seen = await scrape(relay)
    for metric in metrics.DECLARED:
        family = metric.name.removesuffix("_total")
        assert f"# TYPE {metric.name} {metric.kind}" in seen.text
        sampled = any(name[0].startswith(family) for name in seen.values)
        assert sampled or "code" in metric.labels, metric
