"""What a relay writes into its access log: a line for each request and connection, with the id that everybody else has."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portico.relay import access_log
from portico.relay.repeats import Repeats
from portico.relay.server import Relay
from portico.wire import frames as f
from tests.ports import free_port
from tests.relay.doubles import Client, ScriptedAgent, ScriptedStream, grant, port, session_token
from tests.relay.known import whole
from tests.relay.test_metrics import scrape
from tests.relay.test_tcp import TcpAgent, tcp_grant

Visit = Callable[..., Any]


@pytest.fixture
def relay_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(access_log, "BATCH_SECONDS", 0.01)
    return {"access_log": str(tmp_path / "access.log"), "metrics_port": 0, "max_head_bytes": 8192}


class Log:
    def __init__(self, relay: Relay) -> None:
        self.path = Path(relay.settings.access_log)

    @property
    def text(self) -> str:
        return self.path.read_text()

    async def lines(self, count: int) -> list[dict[str, Any]]:
        """The lines, once there are as many."""
        async with asyncio.timeout(30):
            while len(found := self.text.splitlines()) < count:
                await asyncio.sleep(0.01)
        assert len(found) == count, found
        return [json.loads(line) for line in found]


@pytest.fixture
def log(relay: Relay) -> Log:
    return Log(relay)


def request(head: bytes = b"", line: bytes = b"GET /a?token=secret HTTP/1.1", body: bytes = b"") -> bytes:
    return line + b"\r\nHost: web.localhost\r\n" + head + b"\r\n" + body


async def test_every_member_and_the_same_by_either_way(
    relay: Relay, agent: ScriptedAgent, visit: Visit, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []
    short = Repeats.on_whole
    monkeypatch.setattr(Repeats, "on_whole", lambda self, *a: taken.append(short(self, *a)) or taken[-1])
    agent.on_stream = whole
    client: Client = await visit()
    for _ in range(6):
        client.send(request(b"Cookie: session=secret\r\nAuthorization: Basic c2VjcmV0\r\nX-Secret: secret\r\n"))
        assert (await client.response())[2] == b"hello"
        client.send(request(b"User-Agent: secret\r\n"))
        assert (await client.response())[2] == b"hello"
    lines = await log.lines(12)
    assert 0 < sum(taken) < 12, "both ways were taken"
    assert "secret" not in log.text
    ids = [stream.get(b"X-Request-Id")[0].decode() for stream in agent.streams]
    assert [line.pop("request") for line in lines] == ids, "the target's id is the one in the log"
    for line in lines:
        assert line.pop("time").endswith("Z")
        duration, head = line.pop("duration_ms"), line.pop("head_ms")
        assert 0 < head <= duration < 5000
        assert line == {
            "tunnel": "tun_web", "organization": "org_test", "host": "web.localhost", "method": "GET", "path": "/a",
            "protocol": "http", "status": 200, "code": None, "client": "127.0.0.1", "bytes_in": 0, "bytes_out": 43,
            "tls": None, "end": "answered", "relay": "relay-1",
        }  # fmt: skip
    seen = await scrape(relay)
    assert seen["portico_relay_requests_total", "http", "2xx"] == 12
    for name in ("portico_relay_response_head_seconds", "portico_relay_request_seconds"):
        assert seen[f"{name}_count"] == 12
        assert 12 * 0.00001 < seen[f"{name}_sum"] < 12 * 5
    assert seen["portico_relay_access_log_lines_total", "written"] == 12


async def test_refusals_have_the_id_of_their_page(relay: Relay, visit: Visit, log: Log) -> None:
    agent = await (await ScriptedAgent().connect(port(relay, 0), session_token())).online(grant(concurrency=1))
    agent.on_stream = lambda stream: None
    waiting: Client = await visit(request())
    await agent.until(lambda: agent.streams)
    client: Client = await visit(request(line=b"GET /b HTTP/1.1"))
    pages = [json.loads((await client.response())[2])]
    client.send(b"GET / HTTP/1.1\r\nHost: nobody.localhost\r\n\r\n")
    pages.append(json.loads((await client.response())[2]))
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
    pages.append(json.loads((await client.response())[2]))
    huge: Client = await visit(request(b"X: " + b"x" * 10_000 + b"\r\n"))
    pages.append(json.loads((await huge.response())[2]))
    lines = await log.lines(4)
    assert [line["request"] for line in lines] == [page["request_id"] for page in pages]
    assert [(line["status"], line["code"], line["end"]) for line in lines] == [
        (429, "edge.concurrency_exceeded", "refused"),
        (404, "edge.host_unassigned", "refused"),
        (400, "edge.bad_request", "refused"),
        (431, "edge.head_too_large", "refused"),
    ]
    assert [line["tunnel"] for line in lines] == ["tun_web", None, None, None]
    assert [line["path"] for line in lines] == ["/b", "/", None, None]
    assert [line["host"] for line in lines[:3]] == ["web.localhost", "nobody.localhost", None]
    seen = await scrape(relay)
    assert seen["portico_relay_requests_total", "http", "4xx"] == 4
    agent.streams[0].answer(body=b"hello")
    await waiting.response()
    agent.close()


async def test_ends_that_are_no_answers(relay: Relay, agent: ScriptedAgent, visit: Visit, log: Log) -> None:
    agent.on_stream = lambda stream: None
    left: Client = await visit(request(line=b"POST /left HTTP/1.1", head=b"Content-Length: 9\r\n", body=b"half"))
    await agent.until(lambda: agent.streams and agent.streams[0].body == b"half")
    left.writer.close()
    (line,) = await log.lines(1)
    assert (line["status"], line["code"], line["end"], line["bytes_in"]) == (499, None, "visitor_left", 4)

    agent.on_stream = lambda stream: stream.stream.reset(f.TARGET_REFUSED, "nothing listens")
    client: Client = await visit(request())
    assert (await client.response())[0] == 502

    def break_off(stream: ScriptedStream) -> None:
        stream.stream.send_response(200, [b"OK", b"Content-Length", b"100"], end=False)
        stream.stream.send_data(b"some")
        stream.stream.reset(f.TARGET_RESET, "gone")

    agent.on_stream = break_off
    client.send(request())
    await client.rest()
    _, refused, broken = await log.lines(3)
    assert (refused["status"], refused["code"], refused["end"]) == (502, "edge.target_refused", "refused")
    assert (broken["status"], broken["code"], broken["end"]) == (200, None, "broken_off")
    assert broken["bytes_out"] == len(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n") + 4
    seen = await scrape(relay)
    counts = [seen["portico_relay_requests_total", "http", kind] for kind in ("none", "2xx", "5xx")]
    assert counts == [1, 1, 1]


async def test_a_websocket_is_one_line_at_its_end(relay: Relay, agent: ScriptedAgent, visit: Visit, log: Log) -> None:
    def switch(stream: ScriptedStream) -> None:
        stream.stream.send_response(101, [b"Switching Protocols", b"Upgrade", b"websocket"], end=False)
        stream.stream.send_data(b"hello")

    agent.on_stream = switch
    client: Client = await visit(request(b"Connection: Upgrade\r\nUpgrade: websocket\r\n"))
    head = await client.read_head()
    client.send(b"frames")
    await agent.until(lambda: agent.streams[0].body == b"frames")
    assert log.text == ""
    client.writer.close()
    await agent.streams[0].ended.wait()
    agent.streams[0].stream.send_end()
    (line,) = await log.lines(1)
    assert line["request"] == agent.streams[0].get(b"X-Request-Id")[0].decode()
    assert (line["protocol"], line["status"], line["bytes_in"]) == ("websocket", 101, 6)
    assert line["bytes_out"] == len(head) + 5
    seen = await scrape(relay)
    assert seen["portico_relay_requests_total", "websocket", "1xx"] == 1
    assert seen["portico_relay_request_seconds_count"] == 0, "a conversation has no latency"
    assert seen["portico_relay_response_head_seconds_count"] == 1


async def test_tls_has_its_version(relay: Relay, agent: ScriptedAgent, log: Log) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port(relay, 2), ssl=context, server_hostname="web.localhost"
    )
    client = Client(reader, writer)
    for _ in range(4):
        client.send(request())
        assert (await client.response())[0] == 200
    lines = await log.lines(4)
    assert {(line["protocol"], line["tls"]) for line in lines} == {("https", "TLSv1.3")}
    seen = await scrape(relay)
    assert seen["portico_relay_requests_total", "https", "2xx"] == 4
    assert seen["portico_relay_tls_handshakes_total", "TLSv1.3"] == 1
    assert seen["portico_relay_connections", "https"] == 1
    writer.close()


async def test_tcp_connections(relay: Relay, log: Log, caplog: pytest.LogCaptureFixture) -> None:
    number = free_port()
    agent = TcpAgent()
    await agent.connect(port(relay, 0), session_token())
    await agent.online(tcp_grant(number))
    reader, writer = await asyncio.open_connection("127.0.0.1", number)
    writer.write(b"to the target")
    stream = await agent.stream()
    stream.stream.send_data(b"and back")
    assert await reader.readexactly(8) == b"and back"
    await agent.until(lambda: bytes(stream.body) == b"to the target")
    stream.stream.send_end()
    writer.close()
    (line,) = await log.lines(1)
    assert line["request"] == stream.info["id"]
    assert (line["protocol"], line["port"], line["code"], line["end"]) == ("tcp", number, None, "answered")
    assert (line["bytes_in"], line["bytes_out"], line["organization"]) == (13, 8, "org_test")
    agent.on_tcp = lambda made: made.stream.reset(f.TARGET_REFUSED, "nothing listens")
    _, refused = await asyncio.open_connection("127.0.0.1", number)
    _, line = await log.lines(2)
    assert (line["code"], line["end"]) == ("edge.target_refused", "refused")
    said: list[Any] = [record.__dict__["f"] for record in caplog.records if "connection ended" in record.getMessage()]
    assert said[0]["request"] == line["request"], "the relay's own log has the same id"
    seen = await scrape(relay)
    assert seen["portico_relay_raw_connections_total", "served", "tcp"] == 1
    assert seen["portico_relay_raw_connections_total", "refused", "tcp"] == 1
    refused.close()
    agent.close()


@pytest.mark.parametrize("relay_settings", [{"access_log": "off"}])
async def test_off_makes_none(relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
    client: Client = await visit(request())
    assert (await client.response())[0] == 200
    assert relay.public.access is None
