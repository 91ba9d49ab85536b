"""The listener of a process, as Prometheus and people ask it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from portico.errors import Problem
from portico.kit import metrics
from portico.kit.metrics import Histogram, Listener, Metric, Sample
from portico.kit.sockets import bind_tcp, port_of
from portico.settings import RelaySettings, Secret

COUNTED = Metric("portico_test_total", "counter", 'Counts "things" \\ so on.', ("kind",))
LEVEL = Metric("portico_test_level", "gauge", "Goes up and down.")
TOOK = Metric("portico_test_seconds", "histogram", "Takes its time.")
SILENT = Metric("portico_test_silent_total", "counter", "Never happened.", ("code",))


@pytest.fixture
def took() -> Histogram:
    return Histogram((0.1, 1.0))


@pytest.fixture
async def shown(took: Histogram) -> AsyncIterator[tuple[Listener, int]]:
    def read() -> Iterator[Sample]:
        yield COUNTED, ('a"b\\c\nd',), 3
        yield LEVEL, (), 1.5
        yield TOOK, (), took

    sock = bind_tcp("127.0.0.1", 0)
    settings = RelaySettings(relay_key=Secret("x"))
    listener = await metrics.serve((COUNTED, LEVEL, TOOK, SILENT), read, lambda: ready[0], settings, sock)
    assert listener is not None
    ready[0] = True
    yield listener, port_of(sock)
    await listener.close()


ready = [True]


async def ask(port: int, path: str, method: str = "GET", accept: str = "") -> tuple[int, dict[str, str], str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    first, *lines = head.decode().split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), fields, body.decode()


def sampled(families: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


async def test_both_formats_can_be_read_back(shown: tuple[Listener, int], took: Histogram) -> None:
    for seconds in (0.1, 0.5, 0.5, 7.0):
        took.observe(seconds)
    for accept, parse, kind in (
        ("text/plain", text_string_to_metric_families, "text/plain"),
        ("application/openmetrics-text; version=1.0.0", openmetrics_families, "application/openmetrics-text"),
    ):
        status, fields, body = await ask(shown[1], "/metrics?x=y", accept=accept)
        assert (status, fields["content-type"].split(";")[0]) == (200, kind)
        found = sampled(parse(body))
        assert found["portico_test_total", (("kind", 'a"b\\c\nd'),)] == 3
        assert found["portico_test_level", ()] == 1.5
        # An observation on a bound is within it.
        buckets = [found["portico_test_seconds_bucket", (("le", bound),)] for bound in ("0.1", "1.0", "+Inf")]
        assert buckets == [1, 3, 4]
        assert found["portico_test_seconds_count", ()] == 4
        assert found["portico_test_seconds_sum", ()] == pytest.approx(8.1)
        assert found["process_open_fds", ()] > 3
        assert any(name == "portico_build_info" for name, _ in found)
        assert "# HELP portico_test_silent" in body


async def test_the_lag_of_the_loop_is_measured(shown: tuple[Listener, int]) -> None:
    import time

    await asyncio.sleep(0.15)
    time.sleep(0.3)
    await asyncio.sleep(0.05)
    found = sampled(text_string_to_metric_families((await ask(shown[1], "/metrics"))[2]))
    late = found["portico_loop_lag_seconds_count", ()] - found["portico_loop_lag_seconds_bucket", (("le", "0.1"),)]
    assert late >= 1


async def test_health_and_readiness_and_nothing_else(shown: tuple[Listener, int]) -> None:
    assert (await ask(shown[1], "/healthz"))[::2] == (200, "ok\n")
    assert (await ask(shown[1], "/readyz"))[::2] == (200, "ready\n")
    ready[0] = False
    assert (await ask(shown[1], "/readyz"))[::2] == (503, "not ready\n")
    assert (await ask(shown[1], "/"))[0] == 404
    status, fields, body = await ask(shown[1], "/metrics", "HEAD")
    assert (status, body) == (200, "")
    assert int(fields["content-length"]) > 500
    assert (await ask(shown[1], "/metrics", "POST"))[0] == 405


async def test_a_head_without_an_end_is_cut_off(shown: tuple[Listener, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_SECONDS", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", shown[1])
    writer.write(b"GET /metrics HTTP/1.1\r\n")
    assert await asyncio.wait_for(reader.read(), 30) == b""
    long, long_writer = await asyncio.open_connection("127.0.0.1", shown[1])
    long_writer.write(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000)
    with pytest.raises((ConnectionError, AssertionError)):
        assert await asyncio.wait_for(long.read(), 30)
    for each in (writer, long_writer):
        each.close()
    assert (await ask(shown[1], "/healthz"))[0] == 200


async def test_more_connections_than_it_takes(shown: tuple[Listener, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_CONNECTIONS", 2)
    held = [await asyncio.open_connection("127.0.0.1", shown[1]) for _ in range(2)]
    await asyncio.sleep(0.05)
    with pytest.raises((ConnectionError, IndexError)):
        await ask(shown[1], "/healthz")
    for _, writer in held:
        writer.close()
    await asyncio.sleep(0.05)
    assert (await ask(shown[1], "/healthz"))[0] == 200


async def test_no_port_no_listener_and_a_taken_one_is_named() -> None:
    off = RelaySettings(relay_key=Secret("x"))
    assert await metrics.serve((), lambda: (), lambda: True, off, None) is None
    sock = bind_tcp("127.0.0.1", 0)
    taken = RelaySettings(relay_key=Secret("x"), metrics_port=port_of(sock))
    with pytest.raises(Problem, match="metrics") as refused:
        await metrics.serve((), lambda: (), lambda: True, taken, None)
    assert refused.value.code == "up.port_taken"
    sock.close()
