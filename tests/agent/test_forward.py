"""Forwarding HTTP to a local target that behaves, and to targets that do not; on uvloop and on plain asyncio."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from typing import Any

import pytest

from portico.agent.target import Target
from portico.settings import AgentSettings
from portico.wire import frames as f
from tests.agent.harness import Visit, answering, read_head, target_server, tunnel_to
from tests.ports import free_port


def local(port: int) -> Target:
    return Target("tcp", "127.0.0.1", port)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def one(handler: Any, head: list[bytes] | None = None, **options: Any) -> Visit:
    """One bodiless request to ``handler``; its visit, over."""
    async with target_server(handler) as port, tunnel_to(local(port), **options) as tunnel:
        return await (tunnel.request(head) if head else tunnel.get(b"/")).over()


class TestRequestHead:
    async def serialised(self, head: list[bytes], flags: int = 0, end: bool = True, **options: Any) -> bytes:
        seen: list[bytes] = []
        async with target_server(answering(OK, seen=seen)) as port, tunnel_to(local(port), **options) as tunnel:
            visit = tunnel.request(head, flags=flags, end=end)
            if not end:
                visit.stream.send_end()
            await visit.over()
        assert visit.status == 200
        return seen[0].replace(b":%d\r\n" % port, b":PORT\r\n")

    async def test_order_and_repetition_are_kept(self) -> None:
        head = [
            b"GET",
            b"/a%20b?c=d",
            b"X-B",
            b"1",
            b"host",
            b"web.test",
            b"Cookie",
            b"a=b",
            b"X-B",
            b"2",
            b"x%y",
            b"%s",
        ]
        assert await self.serialised(head) == (
            b"GET /a%20b?c=d HTTP/1.1\r\nX-B: 1\r\nhost: web.test\r\nCookie: a=b\r\nX-B: 2\r\nx%y: %s\r\n\r\n"
        )

    async def test_hop_by_hop_fields_are_dropped(self) -> None:
        head = [
            b"GET", b"/", b"Host", b"h", b"Connection", b"X-Hop, close", b"X-Hop", b"1", b"Keep-Alive", b"5", b"TE", b"gzip",
            b"Transfer-Encoding", b"chunked", b"Upgrade", b"h2c", b"Proxy-Connection", b"x", b"Trailer", b"x", b"A", b"b",
        ]  # fmt: skip
        assert await self.serialised(head) == b"GET / HTTP/1.1\r\nHost: h\r\nA: b\r\n\r\n"

    async def test_a_host_is_kept_in_its_place(self) -> None:
        head = [b"GET", b"/", b"X-Host", b"1", b"Host", b"web.test", b"A", b"b"]
        assert await self.serialised(head) == b"GET / HTTP/1.1\r\nX-Host: 1\r\nHost: web.test\r\nA: b\r\n\r\n"

    async def test_a_missing_host_is_the_targets(self) -> None:
        got = await self.serialised([b"GET", b"/", b"A", b"b"])
        assert got == b"GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nA: b\r\n\r\n"

    async def test_trailers_flag_asks_for_them(self) -> None:
        got = await self.serialised([b"GET", b"/", b"Host", b"h"], flags=f.F_TRAILERS)
        assert got == b"GET / HTTP/1.1\r\nHost: h\r\nTE: trailers\r\nConnection: TE\r\n\r\n"

    async def test_post_without_a_body_says_so(self) -> None:
        got = await self.serialised([b"POST", b"/", b"Host", b"h"])
        assert got == b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes, bytes]:
    """Head, decoded body and trailers of one request."""
    head = await read_head(reader)
    lower = head.lower()
    if b"transfer-encoding: chunked" in lower:
        body = b""
        while True:
            size = int(await reader.readline(), 16)
            if not size:
                trailers = b""
                while (line := await reader.readline()) != b"\r\n":
                    trailers += line
                return head, body, trailers
            body += await reader.readexactly(size)
            assert await reader.readexactly(2) == b"\r\n"
    for line in lower.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return head, await reader.readexactly(int(line.split(b":")[1])), b""
    return head, b"", b""


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with the request's body and its trailers as a header."""
    while True:
        _head, body, trailers = await read_request(reader)
        got = trailers.strip().replace(b"\r\n", b"|")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Trailers: %b\r\n\r\n" % (len(body), got) + body)


class TestRequestBody:
    @pytest.mark.parametrize("size", [0, 1, 40_000, 3_000_000])
    @pytest.mark.parametrize("known", [True, False])
    async def test_arrives_whole(self, size: int, known: bool) -> None:
        body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        length = [b"Content-Length", b"%d" % size] if known else []
        async with target_server(echo) as port, tunnel_to(local(port)) as tunnel:
            for _ in range(2):  # the second on the kept connection
                visit = tunnel.request([b"POST", b"/", b"Host", b"h", *length], end=False)
                await visit.send(body)
                visit.stream.send_end()
                await visit.over()
                assert (visit.status, visit.reset) == (200, None)
                assert bytes(visit.body) == body
            assert len(tunnel.forwarder.pool.idle) == 1

    async def test_trailers_of_a_chunked_request(self) -> None:
        async with target_server(echo) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.request([b"POST", b"/", b"Host", b"h"], end=False)
            await visit.send(b"body")
            visit.stream.send_end([b"X-Sum", b"42", b"X-More", b"1"])
            await visit.over()
            assert visit.field(b"X-Trailers") == [b"X-Sum: 42|X-More: 1"]

    @pytest.mark.parametrize("sent", [b"123", b"123456789"])
    async def test_a_length_that_does_not_fit_resets(self, sent: bytes) -> None:
        ended = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await read_request(reader)
            finally:
                ended.set()

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.request([b"POST", b"/", b"Host", b"h", b"Content-Length", b"5"], end=False)
            await asyncio.sleep(0.05)  # the head is with the target by now
            await visit.send(sent, end=True)
            await visit.over()
            assert visit.reset is not None and visit.reset[0] == f.REQUEST_INVALID
            if len(sent) < 5:
                await asyncio.wait_for(ended.wait(), 30)
            assert not tunnel.forwarder.pool.open

    async def test_expect_continue_is_the_targets_to_answer(self) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert b"Expect: 100-continue" in await read_head(reader)
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            assert await reader.readexactly(4) == b"body"
            writer.write(OK)
            await reader.read()

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            head = [b"PUT", b"/", b"Host", b"h", b"Content-Length", b"4", b"Expect", b"100-continue"]
            visit = tunnel.request(head, end=False)
            await visit.until(lambda: visit.interim)
            assert visit.interim == [(100, [b"Continue"])]
            await visit.send(b"body", end=True)
            assert (await visit.over()).status == 200

    async def test_an_early_answer_ends_the_request(self) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
            await reader.read()

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.request([b"POST", b"/", b"Host", b"h"], end=False)
            await visit.send(b"first")
            await visit.until(lambda: visit.reset)
            assert (visit.status, bytes(visit.body), visit.ended) == (413, b"big", True)
            assert visit.reset is not None and visit.reset[0] == f.NO_ERROR
            assert not tunnel.forwarder.pool.open

    async def test_an_early_answer_before_a_close_is_heard(self) -> None:
        """The close resets the connection, since the target left the body unread; our next write comes before our read."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            async with tunnel_to(local(server.getsockname()[1])) as tunnel:
                visit = tunnel.request(
                    [b"POST", b"/", b"Host", b"web.localhost", b"Content-Length", b"100000"], end=False
                )
                await visit.send(bytes(10_000))
                pool = tunnel.forwarder.pool
                await asyncio.sleep(0.1)
                target, _ = server.accept()
                (connection,) = pool.open
                target.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
                target.close()
                for _ in range(2):
                    connection.transport.write(bytes(10_000))
                await visit.over()
                assert (visit.status, bytes(visit.body)) == (413, b"big"), visit.reset
                assert not tunnel.forwarder.stats.open

    async def test_a_target_that_does_not_read_holds_the_sender(self) -> None:
        go = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await go.wait()
            _, body, _ = await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n%08d" % len(body))
            await writer.drain()

        size = 32_000_000
        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.request([b"PUT", b"/", b"Host", b"h", b"Content-Length", b"%d" % size], end=False)
            sending = asyncio.create_task(visit.send(bytes(size), end=True))
            await asyncio.sleep(0.3)
            assert not sending.done()
            (connection,) = tunnel.forwarder.pool.open
            assert connection.transport.get_write_buffer_size() < 2_000_000
            go.set()
            await sending
            assert bytes((await visit.over()).body) == b"32000000"


class TestResponse:
    async def test_plain(self) -> None:
        answer = b"HTTP/1.1 201 Made it\r\nA: b  \r\nSet-Cookie: 1\r\nset-cookie: 2\r\nContent-Length: 3\r\n\r\nabc"
        visit = await one(answering(answer))
        assert visit.status == 201
        assert visit.head == [
            b"Made it", b"A", b"b", b"Set-Cookie", b"1", b"set-cookie", b"2", b"Content-Length", b"3",
        ]  # fmt: skip
        assert bytes(visit.body) == b"abc"

    async def test_hop_by_hop_fields_are_dropped(self) -> None:
        answer = (
            b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nConnection: X-Hop, Content-Length\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n"
            b"Upgrade: h2c\r\nTrailer: x\r\nContent-Length: 2\r\nProxy-Connection: x\r\nB: c\r\n\r\nok"
        )
        assert (await one(answering(answer))).head == [b"OK", b"Content-Length", b"2", b"B", b"c"]

    async def test_chunked_with_trailers(self) -> None:
        answer = (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n5;ext=1\r\nhello\r\n6\r\n world\r\n"
            b"0\r\nX-Sum: 42 \r\nKeep-Alive: 9\r\n\r\n"
        )
        visit = await one(answering(answer))
        assert (visit.head, bytes(visit.body)) == ([b"OK"], b"hello world")
        assert visit.trailers == [b"X-Sum", b"42"]

    async def test_until_the_connection_closes(self) -> None:
        visit = await one(answering(b"HTTP/1.0 200 OK\r\nA: b\r\n\r\nall of it", close=True))
        assert (visit.status, bytes(visit.body), visit.trailers, visit.reset) == (200, b"all of it", [], None)

    async def test_interim_responses_pass(self) -> None:
        early = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n"
        visit = await one(answering(early + early + OK))
        assert visit.interim == [(103, [b"Early Hints", b"Link", b"</a.css>"])] * 2
        assert (visit.status, bytes(visit.body)) == (200, b"ok")

    @pytest.mark.parametrize(
        ("method", "answer"),
        [
            (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"),
            (b"HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
            (b"HEAD", b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n"),
            (b"GET", b"HTTP/1.1 204 No\r\n\r\n"),
            (b"GET", b"HTTP/1.1 304 Not\r\nContent-Length: 500\r\n\r\n"),
            (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        ],
    )
    async def test_no_body(self, method: bytes, answer: bytes) -> None:
        async with target_server(answering(answer)) as port, tunnel_to(local(port)) as tunnel:
            for _ in range(3):
                visit = await tunnel.get(method=method).over()
                assert (visit.status, visit.ended, bytes(visit.body)) == (int(answer[9:12]), True, b"")
            assert len(tunnel.forwarder.pool.idle) == 1  # one connection served all three

    @pytest.mark.parametrize("framing", ["length", "chunked", "close"])
    @pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 5_000_001])
    async def test_large_bodies(self, framing: str, size: int) -> None:
        body = (bytes(range(251)) * (size // 251 + 1))[:size]

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await read_head(reader)
                if framing == "length":
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + body)
                elif framing == "chunked":
                    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                    for at in range(0, size, 10_007):
                        part = body[at : at + 10_007]
                        writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                    writer.write(b"0\r\n\r\n")
                else:
                    writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + body)
                await writer.drain()
                if framing == "close":
                    return

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            for _ in range(2):
                visit = await tunnel.get().over()
                assert bytes(visit.body) == body
            assert len(tunnel.forwarder.pool.idle) == (framing != "close")

    @pytest.mark.parametrize("chunked", [True, False])
    async def test_a_slow_reader_stops_the_target(self, chunked: bool) -> None:
        sent = 0

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            await read_head(reader)
            how = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 64000000"
            writer.write(b"HTTP/1.1 200 OK\r\n" + how + b"\r\n\r\n")
            while sent < 64_000_000:
                writer.write(b"fa00\r\n" + bytes(64_000) + b"\r\n" if chunked else bytes(64_000))
                await writer.drain()
                sent += 64_000
            writer.write(b"0\r\n\r\n" if chunked else b"")
            await reader.read()

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            slow = tunnel.get(hold=True)
            await slow.until(lambda: len(slow.body) == f.STREAM_WINDOW)
            await asyncio.sleep(0.2)
            assert len(slow.body) == f.STREAM_WINDOW
            assert sent < 16_000_000  # what kernel buffers took
            (connection,) = tunnel.forwarder.pool.open
            assert sum(map(len, connection.held)) <= 131_072
            slow.release()
            await slow.over(20)
            assert (len(slow.body), slow.reset) == (64_000_000, None)

    async def test_events_pass_as_they_come(self) -> None:
        step = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(3):
                writer.write(b"9\r\ndata: 1\n\n\r\n")
                await step.wait()
                step.clear()
            writer.write(b"0\r\n\r\n")
            await reader.read()

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.get()
            for count in range(1, 4):
                await visit.until(lambda count=count: len(visit.chunks) == count)  # type: ignore[misc]
                step.set()
            await visit.over()
            assert bytes(visit.body) == b"data: 1\n\n" * 3


class TestInvalidAnswers:
    @pytest.mark.parametrize(
        "answer",
        [
            b"SSH-2.0-OpenSSH_9\r\n\r\n",
            b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
            b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: \0\r\n\r\n",
            b"HTTP/1.1 200 O\0K\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
            b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx",
            b"HTTP/1.1 700 OK\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
            b"HTTP/1.1 199 Early\r\nContent-Length: 3\r\n\r\nyesHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 103 Early\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nyes\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 257 + b"Content-Length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n" + b"A" * 300 + b": b\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: " + b"b" * 80_000 + b"\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: " + b"b" * 200_000,
        ],
    )
    async def test_are_refused_and_the_session_lives(self, answer: bytes) -> None:
        async with target_server(answering(answer)) as port, tunnel_to(local(port)) as tunnel:
            visit = await tunnel.get().over()
            assert visit.status == 0
            assert visit.reset is not None and visit.reset[0] == f.TARGET_INVALID, visit.reset
            assert not tunnel.forwarder.pool.open
            assert not tunnel.link.lost and tunnel.forwarder.stats.open == 0

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
            b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\nhalf",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ],
    )
    async def test_broken_off_after_the_head(self, answer: bytes) -> None:
        visit = await one(answering(answer, close=True))
        assert visit.status == 200
        assert visit.reset is not None and visit.reset[0] == f.TARGET_RESET

    async def test_closed_without_an_answer(self) -> None:
        visit = await one(answering(b"", close=True))
        assert visit.reset is not None and visit.reset[0] == f.TARGET_INVALID
        assert "closed the connection without an answer" in visit.reset[1]

    @pytest.mark.parametrize("junk", [b"x", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"\r\n\r\nHT"])
    @pytest.mark.parametrize("answer", [OK, b"HTTP/1.1 304 N\r\nContent-Length: 9\r\n\r\n"])
    async def test_junk_after_a_response_ends_the_connection(self, junk: bytes, answer: bytes) -> None:
        async with target_server(answering(answer + junk)) as port, tunnel_to(local(port)) as tunnel:
            for _ in range(2):
                visit = await tunnel.get().over()
                assert visit.status == int(answer[9:12]) and bytes(visit.body) in (b"", b"ok")
                assert not tunnel.forwarder.pool.idle

    async def test_bytes_on_an_idle_connection_end_it(self) -> None:
        late = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(OK)
            await late.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
            await reader.read()

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            await tunnel.get().over()
            assert len(tunnel.forwarder.pool.idle) == 1
            late.set()
            await asyncio.sleep(0.05)
            assert not tunnel.forwarder.pool.idle
            assert bytes((await tunnel.get().over()).body) == b"ok"


def dying(times: int) -> Any:
    """A target whose connections answer once and then close at the next request, ``times`` times."""
    count = {"closed": 0, "heads": []}

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = True
        while True:
            head = await read_head(reader)
            count["heads"].append(head)  # type: ignore[attr-defined]
            if not first and count["closed"] < times:  # type: ignore[operator]
                count["closed"] += 1  # type: ignore[operator]
                return
            first = False
            writer.write(OK)

    return handler, count


class TestRetry:
    async def test_a_get_on_a_stale_connection_is_sent_again(self) -> None:
        handler, count = dying(1)
        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            await tunnel.get().over()
            visit = await tunnel.get(b"/again").over()
            assert (visit.status, visit.reset) == (200, None)
            assert count["closed"] == 1

    async def test_a_put_with_a_small_body_is_sent_again_whole(self) -> None:
        bodies: list[bytes] = []

        async def choose(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            _, body, _ = await read_request(reader)
            bodies.append(body)
            writer.write(OK)
            if len(bodies) == 1:
                _, body, _ = await read_request(reader)
                bodies.append(body)
                return
            await reader.read()

        async with target_server(choose) as port, tunnel_to(local(port)) as tunnel:
            await tunnel.get().over()
            visit = tunnel.request([b"PUT", b"/", b"Host", b"h"], end=False)
            await visit.send(b"the body", end=True)
            await visit.over()
            assert visit.status == 200 and bodies == [b"", b"the body", b"the body"]

    async def test_a_post_is_not_sent_twice(self) -> None:
        handler, count = dying(1)
        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            await tunnel.get().over()
            visit = await tunnel.get(method=b"POST").over()
            assert visit.reset is not None and visit.reset[0] == f.TARGET_INVALID
            assert len(count["heads"]) == 2

    async def test_a_post_takes_no_connection_that_the_target_closed(self) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(OK)

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            for _ in range(5):
                visit = await tunnel.get(method=b"POST").over()
                assert (visit.status, visit.reset) == (200, None)

    async def test_only_once(self) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal served
            await read_head(reader)
            if served:
                return
            served = True
            writer.write(OK)
            await read_head(reader)

        served = False
        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            await tunnel.get().over()
            visit = await tunnel.get().over()
            assert visit.reset is not None and visit.reset[0] == f.TARGET_INVALID


class TestUnreachable:
    async def test_nothing_listens(self) -> None:
        port = free_port()
        async with tunnel_to(local(port)) as tunnel:
            visits = [await tunnel.get().over() for _ in range(3)]
            for visit in visits:
                assert visit.reset == (f.TARGET_REFUSED, f"nothing listens on 127.0.0.1:{port}")
            assert tunnel.forwarder.pool.dialling == 0 and tunnel.forwarder.stats.open == 0

    async def test_localhost_is_tried_on_both_addresses(self) -> None:
        try:
            server = await asyncio.start_server(answering(OK), "::1", 0)
        except OSError:
            pytest.skip("no IPv6 on this machine")
        async with server, tunnel_to(Target("tcp", "localhost", server.sockets[0].getsockname()[1])) as tunnel:
            assert (await tunnel.get().over()).status == 200

    async def test_unknown_name(self) -> None:
        async with tunnel_to(Target("tcp", "no-such-host.invalid", 80)) as tunnel:
            visit = await tunnel.get().over()
            assert visit.reset == (f.TARGET_REFUSED, "the name no-such-host.invalid cannot be resolved")

    async def test_a_name_that_cannot_be_one(self) -> None:
        async with tunnel_to(Target("tcp", "a..b", 80)) as tunnel:
            visit = await tunnel.get().over()
            assert visit.reset == (f.TARGET_REFUSED, "the name a..b cannot be resolved")

    async def test_no_unix_socket(self, tmp_path: Any) -> None:
        async with tunnel_to(Target("unix", path=str(tmp_path / "none.sock"))) as tunnel:
            visit = await tunnel.get().over()
            assert visit.reset == (f.TARGET_REFUSED, f"there is no socket at {tmp_path}/none.sock")

    async def test_silence_is_a_timeout(self) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        settings = AgentSettings(first_byte_timeout_seconds=0.2)
        async with target_server(handler) as port, tunnel_to(local(port), settings) as tunnel:
            visit = await tunnel.get().over()
            assert visit.reset == (f.TARGET_TIMEOUT, f"127.0.0.1:{port} sent nothing for 0.2 s")
            # A visitor who is still sending is not the target's silence.
            slow = tunnel.request([b"POST", b"/", b"Host", b"h"], end=False)
            await asyncio.sleep(0.4)
            assert slow.reset is None
            slow.stream.send_end()
            await slow.over()
            assert slow.reset is not None and slow.reset[0] == f.TARGET_TIMEOUT

    async def test_a_visitor_who_leaves_ends_the_request_at_the_target(self) -> None:
        ended = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            try:
                await reader.read()
            finally:
                ended.set()

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.get()
            await asyncio.sleep(0.05)
            visit.stream.reset(f.CANCELLED, "left")
            await asyncio.wait_for(ended.wait(), 30)
            assert tunnel.forwarder.stats.open == 0 and not tunnel.forwarder.pool.open


class TestPool:
    async def test_parallel_requests_do_not_wait_for_each_other(self) -> None:
        together = asyncio.Barrier(20)

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await read_head(reader)
                await together.wait()  # nobody is answered before all have asked
                writer.write(OK)

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            for visit in [tunnel.get() for _ in range(20)]:
                assert (await visit.over()).status == 200

    async def test_above_the_limit_requests_wait_in_order(self) -> None:
        together = most = 0

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal together, most
            while True:
                await read_head(reader)
                together += 1
                most = max(most, together)
                await asyncio.sleep(0.01)
                together -= 1
                writer.write(OK)

        settings = AgentSettings(target_connections_max=3)
        async with target_server(handler) as port, tunnel_to(local(port), settings) as tunnel:
            for visit in [tunnel.get() for _ in range(20)]:
                assert (await visit.over()).status == 200
            assert most == 3

    async def test_idle_connections_are_closed(self) -> None:
        closed = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(OK)
            await reader.read()
            closed.set()

        settings = AgentSettings(target_idle_seconds=0.05)
        async with target_server(handler) as port, tunnel_to(local(port), settings) as tunnel:
            await tunnel.get().over()
            await asyncio.wait_for(closed.wait(), 30)
            assert not tunnel.forwarder.pool.idle and not tunnel.forwarder.pool.open

    async def test_unix_socket(self, tmp_path: Any) -> None:
        path = str(tmp_path / "a.sock")
        server = await asyncio.start_unix_server(answering(OK), path)
        async with server, tunnel_to(Target("unix", path=path)) as tunnel:
            assert (await tunnel.get().over()).status == 200


def upgrading(after: bytes = b"") -> Any:
    """A target that switches protocols, says ``after`` in the same segment, then echoes until the end."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_head(reader)
        assert b"Connection: Upgrade\r\n" in head and b"Upgrade: echo\r\n" in head
        writer.write(b"HTTP/1.1 101 Switching\r\nUpgrade: echo\r\nConnection: Upgrade\r\nX: y\r\n\r\n" + after)
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.write(b"bye")

    return handler


UPGRADE = [b"GET", b"/ws", b"Host", b"h", b"Upgrade", b"echo"]


class TestUpgrade:
    async def test_server_speaks_first_and_half_close(self) -> None:
        async with target_server(upgrading(b"hello first")) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.request(UPGRADE, flags=f.F_UPGRADE, end=False)
            await visit.until(lambda: bytes(visit.body) == b"hello first")
            assert (visit.status, visit.head) == (101, [b"Switching", b"Upgrade", b"echo", b"X", b"y"])
            await visit.send(b" and echo")
            await visit.until(lambda: bytes(visit.body) == b"hello first and echo")
            visit.stream.send_end()
            await visit.over()
            assert bytes(visit.body).endswith(b"echobye") and visit.reset is None
            assert tunnel.forwarder.stats.open == 0 and not tunnel.relay.session.streams

    async def test_bytes_before_the_101_are_kept(self) -> None:
        async with target_server(upgrading()) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.request(UPGRADE, flags=f.F_UPGRADE, end=False)
            await visit.send(b"too early", end=True)
            await visit.over()
            assert bytes(visit.body) == b"too earlybye"

    async def test_large_and_slow(self) -> None:
        async with target_server(upgrading(b"z" * 100_000)) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.request(UPGRADE, flags=f.F_UPGRADE, end=False, hold=True)
            await visit.until(lambda: len(visit.body) == f.STREAM_WINDOW)
            visit.release()
            sending = asyncio.create_task(visit.send(bytes(8_000_000), end=True))
            await visit.over(20)
            await sending
            assert len(visit.body) == 100_000 + 8_000_000 + 3

    async def test_refused_is_an_ordinary_answer(self) -> None:
        async with (
            target_server(answering(b"HTTP/1.1 400 No\r\nContent-Length: 2\r\n\r\nno")) as port,
            tunnel_to(local(port)) as tunnel,
        ):
            visit = tunnel.request(UPGRADE, flags=f.F_UPGRADE, end=False)
            await visit.until(lambda: visit.reset)
            assert (visit.status, bytes(visit.body), visit.reset and visit.reset[0]) == (400, b"no", f.NO_ERROR)
            assert len(tunnel.forwarder.pool.idle) == 1

    async def test_a_target_that_dies_resets(self) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(b"HTTP/1.1 101 S\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n")
            await reader.read(1)
            linger = struct.pack("ii", 1, 0)  # close() sends RST
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.request(UPGRADE, flags=f.F_UPGRADE, end=False)
            await visit.until(lambda: visit.status)
            await visit.send(b"xy")
            await visit.over()
            assert visit.reset is not None and visit.reset[0] == f.TARGET_RESET
            assert tunnel.forwarder.stats.open == 0

    async def test_a_visitor_who_leaves_closes_the_target(self) -> None:
        async with target_server(upgrading()) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.request(UPGRADE, flags=f.F_UPGRADE, end=False)
            await visit.until(lambda: visit.status)
            visit.stream.reset(f.CANCELLED)
            await asyncio.sleep(0.05)
            assert tunnel.forwarder.stats.open == 0

    @pytest.mark.parametrize("ended", [False, True])
    async def test_the_target_sees_whether_a_visitor_left_in_order(self, ended: bool) -> None:
        seen: asyncio.Queue[str] = asyncio.Queue()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(b"HTTP/1.1 101 S\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n")
            try:
                while data := await reader.read(100):
                    seen.put_nowait(data.decode())
                seen.put_nowait("end")
            except ConnectionResetError:
                seen.put_nowait("reset")

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.request(UPGRADE, flags=f.F_UPGRADE, end=False)
            await visit.until(lambda: visit.status)
            await visit.send(b"words", end=ended)
            visit.stream.reset(f.CANCELLED)
            assert await asyncio.wait_for(seen.get(), 30) == "words"
            assert await asyncio.wait_for(seen.get(), 30) == ("end" if ended else "reset")


async def test_a_tcp_connection_is_refused() -> None:
    async with target_server(answering(OK)) as port, tunnel_to(local(port)) as tunnel:
        visit = await tunnel.relay.open_tcp().over()
        assert visit.reset is not None and visit.reset[0] == f.NO_SUCH_BIND


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A self-signed certificate for localhost, with its key, in one file."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False).sign(key, hashes.SHA256())
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return str(path)


class TestTls:
    def context(self, certificate: str) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        return context

    async def test_a_loopback_target_is_not_verified_unless_asked(self, certificate: str) -> None:
        body = b"x" * 300_000
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + body
        async with target_server(answering(answer), ssl=self.context(certificate)) as port:
            target = Target("tcp", "127.0.0.1", port, tls=True)
            async with tunnel_to(target) as tunnel:
                for _ in range(2):
                    assert bytes((await tunnel.get().over()).body) == body
                assert len(tunnel.forwarder.pool.idle) == 1
            async with tunnel_to(target, tls_verify=True) as tunnel:
                visit = await tunnel.get().over()
                assert visit.reset is not None and visit.reset[0] == f.TARGET_REFUSED
                assert "is not trusted" in visit.reset[1]

    async def test_a_plain_target_behind_https(self) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 No\r\n\r\n")
            await reader.read()

        async with target_server(handler) as port, tunnel_to(Target("tcp", "127.0.0.1", port, tls=True)) as tunnel:
            visit = await tunnel.get().over()
            assert visit.reset is not None and visit.reset[0] == f.TARGET_REFUSED

    async def test_until_close_and_slow(self, certificate: str) -> None:
        answer = b"HTTP/1.1 200 OK\r\n\r\n" + b"y" * 400_000
        async with (
            target_server(answering(answer, close=True), ssl=self.context(certificate)) as port,
            tunnel_to(Target("tcp", "127.0.0.1", port, tls=True)) as tunnel,
        ):
            visit = tunnel.get(hold=True)
            await visit.until(lambda: len(visit.body) == f.STREAM_WINDOW)
            await asyncio.sleep(0.1)
            visit.release()
            await visit.over()
            assert (len(visit.body), visit.reset) == (400_000, None)

    async def test_upgrade(self, certificate: str) -> None:
        async with (
            target_server(upgrading(b"first"), ssl=self.context(certificate)) as port,
            tunnel_to(Target("tcp", "127.0.0.1", port, tls=True)) as tunnel,
        ):
            visit = tunnel.request(UPGRADE, flags=f.F_UPGRADE, end=False)
            await visit.send(b" echo")
            await visit.until(lambda: bytes(visit.body) == b"first echo")
            visit.stream.send_end()
            await visit.over()
            assert tunnel.forwarder.stats.open == 0


async def test_a_lost_session_ends_requests_at_the_target() -> None:
    ended = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        try:
            await reader.read()
        finally:
            ended.set()

    async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
        tunnel.get()
        await asyncio.sleep(0.05)
        tunnel.relay.carrier.abort("cut")
        await asyncio.wait_for(ended.wait(), 30)


async def test_unknown_bind() -> None:
    async with target_server(answering(OK)) as port, tunnel_to(local(port)) as tunnel:
        visit = await tunnel.request([b"GET", b"/"], bind=9).over()
        assert visit.reset is not None and visit.reset[0] == f.NO_SUCH_BIND
