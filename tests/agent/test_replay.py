"""Replay: the recorded request reaches its own target again, as it was or as edited, and nothing else does."""

from __future__ import annotations

import asyncio
import base64
from types import SimpleNamespace
from typing import Any

import pytest

from portico.settings import AgentSettings
from portico.wire import frames as f
from tests.agent.harness import answering, read_head, target_server
from tests.agent.inspecting import inspected
from tests.agent.test_forward import OK, local, read_request

Seen = list[tuple[bytes, bytes, bytes]]


def noting(seen: Seen) -> Any:
    """A target that keeps head, body and trailers of each request."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            seen.append(await read_request(reader))
            writer.write(OK)

    return handler


class TestUnchanged:
    @pytest.mark.parametrize("known", [True, False])
    async def test_the_target_sees_the_same_bytes(self, known: bool) -> None:
        seen: Seen = []
        length = [b"Content-Length", b"6"] if known else []
        head = [
            b"PUT",
            b"/a?b=%20",
            b"Host",
            b"web.test",
            b"X-A",
            b"1",
            b"X-A",
            b"2",
            b"Authorization",
            b"Basic x",
            *length,
        ]
        async with target_server(noting(seen)) as port, inspected(local(port)) as tunnel:
            visit = tunnel.request(head, end=False)
            await visit.send(b"\x00b\xffdy\n")
            visit.stream.send_end([] if known else [b"X-Sum", b"1"])
            await visit.over()
            first = await tunnel.ended()
            answer = await tunnel.replay()
            assert answer.status_code == 201
            assert seen[0] == seen[1] and seen[0][1] == b"\x00b\xffdy\n"
            document = answer.json()
            assert document["replay_of"] == first.id == document["original"]["id"]
            assert document["id"] == tunnel.entry().id != first.id and document["status"] == 200
            rows = (await tunnel.json("/api/requests"))["requests"]
            assert [row.get("replay_of") for row in rows] == [first.id, None]

    async def test_no_redirect_is_followed(self) -> None:
        seen: list[bytes] = []
        moved = b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"
        async with target_server(answering(moved, seen=seen)) as port, inspected(local(port)) as tunnel:
            await tunnel.get().over()
            await tunnel.ended()
            assert (await tunnel.replay()).json()["status"] == 302
            assert len(seen) == 2 and all(head.startswith(b"GET / ") for head in seen)

    async def test_of_a_target_that_is_gone(self) -> None:
        async with target_server(answering(OK)) as port, inspected(local(port)) as tunnel:
            await tunnel.get().over()
            await tunnel.ended()
            tunnel.serves.pool.close()
            tunnel.serves.pool._closed = False
            tunnel.serves.pool.target = local(1)
            document = (await tunnel.replay()).json()
            assert document["status"] == 502 and "nothing listens" in document["failure"]

    async def test_the_tunnel_of_another_target_does_not_step_in(self) -> None:
        async with target_server(answering(OK)) as port, inspected(local(port)) as tunnel:
            await tunnel.get().over()
            await tunnel.ended()
            tunnel.inspector.agent = SimpleNamespace(tunnels=[])  # type: ignore[assignment]
            refused = await tunnel.replay()
            assert (refused.status_code, refused.json()["code"]) == (409, "inspect.tunnel_gone")
            assert tunnel.recorder.last == 1

    async def test_a_body_that_was_cut_off(self) -> None:
        seen: Seen = []
        settings = AgentSettings(inspect_body_max_bytes=1000)
        async with target_server(noting(seen)) as port, inspected(local(port), settings) as tunnel:
            visit = tunnel.request([b"POST", b"/", b"Host", b"h", b"Content-Length", b"3000"], end=False)
            await visit.send(b"x" * 3000, end=True)
            await visit.over()
            entry = await tunnel.ended()
            assert not (await tunnel.detail())["replayable"]
            refused = await tunnel.replay()
            assert (refused.status_code, refused.json()["code"]) == (409, "inspect.body_incomplete")
            assert (await tunnel.replay(method="PUT")).status_code == 409
            assert (await tunnel.web.get(f"/api/requests/{entry.id}/curl")).json()["code"] == "inspect.body_incomplete"
            assert (await tunnel.replay(body="whole")).status_code == 201
            assert len(seen) == 2 and seen[1][1] == b"whole"

    async def test_a_body_that_never_came_whole(self) -> None:
        async with target_server(answering(OK)) as port, inspected(local(port)) as tunnel:
            visit = tunnel.request([b"POST", b"/", b"Host", b"h", b"Content-Length", b"10"], end=False)
            await visit.send(b"half")
            await tunnel.until(lambda: tunnel.recorder.last and tunnel.entry().more.sent)
            assert (await tunnel.replay()).json()["code"] == "inspect.body_incomplete"

    async def test_an_upgrade(self) -> None:
        async with target_server(answering(OK)) as port, inspected(local(port)) as tunnel:
            head = [b"GET", b"/", b"Host", b"h", b"Upgrade", b"websocket"]
            await tunnel.request(head, flags=f.F_UPGRADE, end=False).over()
            await tunnel.ended()
            assert (await tunnel.replay()).json()["code"] == "inspect.replay_upgrade"

    async def test_one_that_does_not_end(self) -> None:
        left = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\ndata: 1\n\n")
            await reader.read()
            left.set()

        settings = AgentSettings(replay_timeout_seconds=0.3, replays_max=1)
        async with target_server(handler) as port, inspected(local(port), settings) as tunnel:
            visit = tunnel.get()
            await visit.until(lambda: visit.body)
            running = asyncio.ensure_future(tunnel.replay())
            await tunnel.until(lambda: tunnel.recorder.last == 2)
            refused = await tunnel.replay(tunnel.recorder.find(1))
            assert (refused.status_code, refused.json()["code"]) == (429, "inspect.busy")
            document = (await running).json()
            assert document["state"] == "failed" and "cut off after 0.3 s" in document["failure"]
            assert document["status"] == 200 and document["response"]["body"]["text"] == "data: 1\n\n"
            await asyncio.wait_for(left.wait(), 30)
            assert tunnel.serves.stats.open == 1  # the visitor's own

    async def test_a_large_answer_keeps_the_start(self) -> None:
        body = b"x" * 3_000_000
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        async with target_server(answering(answer)) as port, inspected(local(port)) as tunnel:
            await tunnel.get().over()
            await tunnel.ended()
            shown = (await tunnel.replay()).json()["response"]["body"]
            assert (shown["bytes"], shown["kept"], shown["truncated"]) == (3_000_000, 65_536, True)


class TestEdited:
    async def test_method_path_headers_and_body(self) -> None:
        seen: Seen = []
        async with target_server(noting(seen)) as port, inspected(local(port)) as tunnel:
            await tunnel.get(b"/a", b"X-Old", b"1").over()
            await tunnel.ended()
            headers = [
                ["Host", "other.test"],
                ["X-New", "ü"],
                ["Content-Length", "999"],
                ["Transfer-Encoding", "chunked"],
            ]
            answer = await tunnel.replay(method="PATCH", path="/b?c=d", headers=headers, body='{"a": "ü"}')
            assert answer.status_code == 201
            head, body, _ = seen[1]
            assert head == (
                "PATCH /b?c=d HTTP/1.1\r\nHost: other.test\r\nX-New: ü\r\nContent-Length: 11\r\n\r\n".encode()
            )
            assert body == '{"a": "ü"}'.encode()
            original = (await tunnel.json(f"/api/requests/{tunnel.entry(2).id}"))["method"]
            assert original == "GET"

    async def test_only_the_body_and_large(self) -> None:
        seen: Seen = []
        async with target_server(noting(seen)) as port, inspected(local(port)) as tunnel:
            visit = tunnel.request([b"POST", b"/", b"Host", b"h", b"Content-Length", b"3"], end=False)
            await visit.send(b"abc", end=True)
            await visit.over()
            await tunnel.ended()
            large = bytes(range(256)) * 4000
            assert (await tunnel.replay(body_base64=base64.b64encode(large).decode())).status_code == 201
            assert seen[1][1] == large
            assert (await tunnel.replay(tunnel.recorder.find(1), body="")).status_code == 201
            assert seen[2][0].endswith(b"Host: h\r\nContent-Length: 0\r\n\r\n")
            assert (await tunnel.replay(tunnel.recorder.find(1), method="PUT")).status_code == 201
            assert seen[3][0].startswith(b"PUT / ") and seen[3][1] == b"abc"

    @pytest.mark.parametrize(
        "edit",
        [
            b"no json", b"[]", b"1", b'{"verb":"GET"}', b'{"method":1}', b'{"method":""}', b'{"method":"A B"}',
            b'{"path":"/a b"}', b'{"path":"/a\\r\\nX: y"}', b'{"headers":{}}', b'{"headers":[["a"]]}', b'{"headers":[["a",1]]}',
            b'{"headers":[["a b","c"]]}', b'{"headers":[["a","b\\r\\nc: d"]]}', b'{"headers":[["","b"]]}', b'{"body":1}',
            b'{"headers":[["a","b\\u0000"]]}', b'{"body":"a","body_base64":"YQ=="}', b'{"body_base64":"?"}',
            b'{"body":"\\ud800"}', b'{"method":"\\ud800"}', b"[" * 100_000,
        ],
    )  # fmt: skip
    async def test_what_is_no_request(self, edit: bytes) -> None:
        async with target_server(answering(OK)) as port, inspected(local(port)) as tunnel:
            await tunnel.get().over()
            await tunnel.ended()
            refused = await tunnel.web.post(f"/api/requests/{tunnel.entry().id}/replay", content=edit)
            assert (refused.status_code, refused.json()["code"]) == (400, "inspect.edit_invalid"), refused.text
            assert tunnel.recorder.last == 1
