"""The public HTTP/1.1 side: what passes, how it is framed, and what is refused because it could be read in two ways."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from portico.relay.server import Relay
from portico.wire import frames as f
from tests.relay.doubles import Client, ScriptedAgent, ScriptedStream, grant

Visit = Callable[..., Awaitable[Client]]
GET = b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n"


class TestForward:
    async def test_a_request_and_its_answer_pass(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = lambda s: s.answer(201, (b"X-One", b"1", b"X-One", b"2", b"Server", b"app"), b"made")
        client = await visit(
            b"POST /a?b=c HTTP/1.1\r\nHost: web.localhost\r\nX-A: 1\r\nx-a: 2\r\nContent-Length: 4\r\n\r\nbody"
        )
        status, fields, body = await client.response()
        assert (status, body, fields[b"x-one"], fields[b"server"]) == (201, b"made", [b"1", b"2"], [b"app"])
        request = agent.streams[0]
        await request.ended.wait()
        assert (request.method, request.target, bytes(request.body)) == (b"POST", b"/a?b=c", b"body")
        assert request.get(b"X-A") == [b"1", b"2"]
        assert [name for name, _ in request.fields][:3] == [b"Host", b"X-A", b"x-a"]

    async def test_forwarding_fields_are_the_relays_own(self, agent: ScriptedAgent, visit: Visit) -> None:
        client = await visit(
            b"GET / HTTP/1.1\r\nHost: WEB.localhost:7080\r\nX-Forwarded-For: 6.6.6.6\r\nForwarded: for=6.6.6.6\r\n"
            b"X-Forwarded-Proto: https\r\nX-Request-Id: mine\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nTE: gzip\r\n\r\n"
        )
        await client.response()
        request = agent.streams[0]
        assert request.get(b"X-Forwarded-For") == [b"127.0.0.1"]
        assert request.get(b"X-Forwarded-Proto") == [b"http"]
        assert request.get(b"Host") == [b"WEB.localhost:7080"]
        assert request.get(b"Forwarded") == [b"for=127.0.0.1;host=web.localhost;proto=http"]
        assert len(request.get(b"X-Request-Id")) == 1 and request.get(b"X-Request-Id") != [b"mine"]
        for name in (b"X-Hop", b"Connection", b"TE"):
            assert request.get(name) == []

    async def test_a_visitor_that_reads_trailers_is_known_to_the_agent_by_a_flag(
        self, agent: ScriptedAgent, visit: Visit
    ) -> None:
        client = await visit()
        for value, flag in (
            (b"trailers", f.F_TRAILERS),
            (b"gzip, Trailers;q=1", 0),
            (b"deflate, trailers", f.F_TRAILERS),
        ):
            for _ in range(3):
                client.send(b"GET / HTTP/1.1\r\nHost: web.localhost\r\nTE: %b\r\nConnection: TE\r\n\r\n" % value)
                assert (await client.response())[0] == 200
                assert agent.streams[-1].flags == f.F_END | flag
                assert agent.streams[-1].get(b"TE") == agent.streams[-1].get(b"Connection") == []

    async def test_keep_alive_and_pipelining_keep_order(self, agent: ScriptedAgent, visit: Visit) -> None:
        waiting: list[ScriptedStream] = []
        agent.on_stream = waiting.append
        client = await visit(b"".join(b"GET /%d HTTP/1.1\r\nHost: web.localhost\r\n\r\n" % n for n in range(3)))
        for number in range(3):
            await agent.until(lambda number=number: len(waiting) == number + 1)
            assert waiting[number].target == b"/%d" % number
            waiting[number].answer(body=b"n%d" % number)
            assert (await client.response())[2] == b"n%d" % number

    async def test_pipelined_post_bodies_go_with_their_own_request(self, agent: ScriptedAgent, visit: Visit) -> None:
        def answer(s: ScriptedStream) -> None:
            async def later() -> None:
                await s.ended.wait()
                s.answer(body=bytes(s.body))

            tasks.append(asyncio.ensure_future(later()))

        tasks: list[Any] = []
        agent.on_stream = answer
        one = b"POST / HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: 3\r\n\r\n%b"
        chunked = b"POST / HTTP/1.1\r\nHost: web.localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nccc\r\n0\r\n\r\n"
        client = await visit(one % b"aaa" + one % b"bbb" + chunked)
        assert [(await client.response())[2] for _ in range(3)] == [b"aaa", b"bbb", b"ccc"]

    async def test_thousands_of_pipelined_refusals_do_not_nest(self, relay: Relay, visit: Visit) -> None:
        client = await visit(b"GET / HTTP/1.1\r\nHost: nobody.localhost\r\n\r\n" * 3000)
        for _ in range(3000):
            assert (await client.response())[0] == 404

    async def test_chunked_answer_with_trailers(self, agent: ScriptedAgent, visit: Visit) -> None:
        def answer(s: ScriptedStream) -> None:
            s.stream.send_response(200, [b"OK", b"Trailer", b"X-Sum"], end=False)
            s.stream.send_data(b"one")
            s.stream.send_data(b"two")
            s.stream.send_end([b"X-Sum", b"42", b"Content-Length", b"9"])

        agent.on_stream = answer
        client = await visit(GET)
        head = await client.read_head()
        assert b"Transfer-Encoding: chunked" in head and b"Content-Length" not in head
        assert await client.read(32) == b"3\r\none\r\n3\r\ntwo\r\n0\r\nX-Sum: 42\r\n\r\n"

    async def test_chunked_request_with_trailers(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = lambda s: None
        client = await visit(
            b"POST / HTTP/1.1\r\nHost: web.localhost\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
            b"5\r\nhello\r\n0\r\nX-Sum: 7\r\nHost: evil\r\n\r\n"
        )
        await agent.until(lambda: agent.streams)
        await agent.streams[0].ended.wait()
        assert bytes(agent.streams[0].body) == b"hello"
        assert agent.streams[0].trailers == [b"X-Sum", b"7"]
        agent.streams[0].answer()
        assert (await client.response())[0] == 200

    @pytest.mark.parametrize(("status", "method"), [(204, b"GET"), (304, b"GET"), (200, b"HEAD")])
    async def test_answers_without_a_body(self, agent: ScriptedAgent, visit: Visit, status: int, method: bytes) -> None:
        agent.on_stream = lambda s: s.stream.send_response(status, [b"X", b"Content-Length", b"10"], end=True)
        client = await visit(b"%b / HTTP/1.1\r\nHost: web.localhost\r\n\r\n" % method)
        head = await client.read_head()
        assert head.startswith(b"HTTP/1.1 %d X\r\n" % status)
        assert (b"Content-Length: 10" in head) == (status != 204)
        client.send(b"%b / HTTP/1.1\r\nHost: web.localhost\r\n\r\n" % method)
        assert (await client.read_head()).startswith(b"HTTP/1.1 %d" % status)  # the connection goes on

    async def test_interim_responses_pass(self, agent: ScriptedAgent, visit: Visit) -> None:
        def answer(s: ScriptedStream) -> None:
            s.stream.send_interim(103, [b"Early Hints", b"Link", b"</a.css>"])
            s.stream.send_interim(100, [b"Continue"])

        agent.on_stream = answer
        client = await visit(
            b"PUT / HTTP/1.1\r\nHost: web.localhost\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        )
        assert await client.read_head() == b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n"
        assert await client.read_head() == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert agent.streams[0].get(b"Expect") == [b"100-continue"]
        client.send(b"ok")
        await agent.streams[0].ended.wait()
        agent.streams[0].answer(body=b"done")
        assert (await client.response())[2] == b"done"

    async def test_http10_gets_no_chunks_and_is_closed(self, agent: ScriptedAgent, visit: Visit) -> None:
        def answer(s: ScriptedStream) -> None:
            s.stream.send_response(200, [b"OK"], end=False)
            s.stream.send_data(b"stream", end=True)

        agent.on_stream = answer
        client = await visit(b"GET / HTTP/1.0\r\nHost: web.localhost\r\nConnection: keep-alive\r\n\r\n")
        text = await client.rest()
        assert text == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nstream"

    async def test_first_byte_comes_when_the_target_sends_it(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = lambda s: s.stream.send_response(
            200, [b"OK", b"Content-Type", b"text/event-stream"], end=False
        )
        client = await visit(GET)
        await client.read_head()
        for event in (b"data: 1\n\n", b"data: 2\n\n"):
            agent.streams[0].stream.send_data(event)
            assert event in await client.read(len(event) + 5)

    async def test_early_answer_lets_the_upload_finish(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = lambda s: s.answer(body=b"early")
        client = await visit(b"POST / HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: 6\r\n\r\nabc")
        assert (await client.response())[2] == b"early"
        client.send(b"def" + GET)
        assert (await client.response())[2] == b"early"
        assert bytes(agent.streams[0].body) == b"abcdef"

    async def test_early_answer_with_reset_closes(self, agent: ScriptedAgent, visit: Visit) -> None:
        def answer(s: ScriptedStream) -> None:
            s.answer(413, body=b"too big")
            s.stream.reset(f.NO_ERROR)

        agent.on_stream = answer
        client = await visit(b"POST / HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: 600000\r\n\r\nabc")
        assert (await client.response())[0] == 413
        assert await client.rest() == b""


class TestUpgrade:
    ASK = b"GET /ws HTTP/1.1\r\nHost: web.localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n"

    async def test_bytes_both_ways_and_half_close(self, agent: ScriptedAgent, visit: Visit) -> None:
        def answer(s: ScriptedStream) -> None:
            s.stream.send_response(101, [b"Switching Protocols", b"Upgrade", b"websocket"], end=False)
            s.stream.send_data(b"server first")

        agent.on_stream = answer
        client = await visit(self.ASK + b"early bytes")
        head = await client.read_head()
        assert b"Upgrade: websocket\r\n" in head and b"Connection: Upgrade\r\n" in head
        assert await client.read(12) == b"server first"
        request = agent.streams[0]
        assert request.flags == f.F_UPGRADE and request.get(b"Upgrade") == [b"websocket"]
        await agent.until(lambda: True)
        client.writer.write_eof()
        await request.ended.wait()
        assert bytes(request.body) == b"early bytes"
        request.stream.send_data(b"last")
        request.stream.send_end()
        assert await client.rest() == b"last"

    async def test_declined_upgrade_stays_http(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = lambda s: s.answer(body=s.target)
        client = await visit(self.ASK + GET)
        assert (await client.response())[2] == b"/ws"
        assert (await client.response())[2] == b"/"

    async def test_h2c_is_not_asked_for(self, agent: ScriptedAgent, visit: Visit) -> None:
        client = await visit(
            b"GET / HTTP/1.1\r\nHost: web.localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
            b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n"
        )
        assert (await client.response())[2] == b"hello"
        assert agent.streams[0].get(b"Upgrade") == agent.streams[0].get(b"HTTP2-Settings") == []


AMBIGUOUS = {
    "length and coding": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
    "two lengths": b"Content-Length: 4\r\nContent-Length: 5\r\n",
    "two equal lengths": b"Content-Length: 4\r\nContent-Length: 4\r\n",
    "list of lengths": b"Content-Length: 4, 4\r\n",
    "signed length": b"Content-Length: +4\r\n",
    "negative length": b"Content-Length: -4\r\n",
    "hex length": b"Content-Length: 0x4\r\n",
    "huge length": b"Content-Length: 99999999999999999999999\r\n",
    "coding twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    "coding list": b"Transfer-Encoding: gzip, chunked\r\n",
    "chunked not last": b"Transfer-Encoding: chunked, identity\r\n",
    "unknown coding": b"Transfer-Encoding: xchunked\r\n",
    "coding with vertical tab": b"Transfer-Encoding: \x0bchunked\r\n",
    "space before colon": b"Transfer-Encoding : chunked\r\n",
    "quoted coding": b'Transfer-Encoding: "chunked"\r\n',
    "obs-fold": b"X-A: 1\r\n folded\r\n",
    "bare LF": b"X-A: 1\nX-B: 2\r\n",
    "bare CR": b"X-A: 1\rX-B: 2\r\n",
    "NUL in value": b"X-A: 1\x002\r\n",
    "NUL in name": b"X\x00A: 1\r\n",
    "space in name": b"X A: 1\r\n",
    "no colon": b"nonsense\r\n",
    "empty name": b": 1\r\n",
    "two hosts": b"Host: other.localhost\r\n",
    "same host twice": b"Host: web.localhost\r\n",
}


class TestStrict:
    @pytest.mark.parametrize("fields", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
    async def test_ambiguous_heads_are_400_and_close(self, agent: ScriptedAgent, visit: Visit, fields: bytes) -> None:
        client = await visit(b"POST / HTTP/1.1\r\nHost: web.localhost\r\n" + fields + b"\r\n4\r\nGET \r\n0\r\n\r\n")
        status, answer, body = await client.response()
        assert (status, answer[b"portico-error"], answer[b"connection"]) == (400, [b"edge.bad_request"], [b"close"])
        assert answer[b"cache-control"] == [b"no-store"]
        assert json.loads(body)["code"] == "edge.bad_request"
        assert await client.rest() == b""
        assert agent.streams == []

    @pytest.mark.parametrize(
        "line",
        [
            b"GET http://other.localhost/ HTTP/1.1",
            b"GET http://web.localhost@evil/ HTTP/1.1",
            b"GET ftp://web.localhost/ HTTP/1.1",
            b"GET web.localhost:80 HTTP/1.1",
            b"GET * HTTP/1.1",
            b"CONNECT web.localhost:80 HTTP/1.1",
            b"GET / HTTP/2.0",
            b"GET / HTTP/0.9",
            b"GET /",
            b"GET / a HTTP/1.1",
            b"GET /\x01 HTTP/1.1",
            b"BREW / HTTP/1.1",
            b"get / HTTP/1.1",
            b"PRI * HTTP/2.0",
        ],
    )
    async def test_request_lines_that_mean_nothing_here(self, agent: ScriptedAgent, visit: Visit, line: bytes) -> None:
        client = await visit(line + b"\r\nHost: web.localhost\r\n\r\n")
        status, answer, _ = await client.response()
        assert (status, answer[b"portico-error"]) == (400, [b"edge.bad_request"])
        assert agent.streams == []

    @pytest.mark.parametrize(
        "host", [b"", b"a b", b"a/b", b"a@b", b"web.localhost:port", b"web..localhost:1:2", b"\xffweb", b"a,b"]
    )
    async def test_bad_host_values(self, agent: ScriptedAgent, visit: Visit, host: bytes) -> None:
        client = await visit(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
        assert (await client.response())[0] == 400

    async def test_no_host(self, agent: ScriptedAgent, visit: Visit) -> None:
        client = await visit(b"GET / HTTP/1.1\r\n\r\n")
        assert (await client.response())[0] == 400

    async def test_http10_with_a_coding(self, agent: ScriptedAgent, visit: Visit) -> None:
        client = await visit(b"POST / HTTP/1.0\r\nHost: web.localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        assert (await client.response())[0] == 400

    @pytest.mark.parametrize(
        "chunk", [b"x\r\n", b"4\nGET ", b"4;a\x00\r\nGET ", b"-1\r\n", b"fffffffffffffffff\r\n", b"4\r\nGET XX"]
    )
    async def test_a_broken_chunk_ends_the_request_at_the_target_too(
        self, agent: ScriptedAgent, visit: Visit, chunk: bytes
    ) -> None:
        agent.on_stream = lambda s: None
        client = await visit(b"POST / HTTP/1.1\r\nHost: web.localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
        assert (await client.response())[0] == 400
        await agent.until(lambda: agent.streams and agent.streams[0].reset is not None)
        assert agent.streams[0].reset is not None and agent.streams[0].reset[0] == f.CANCELLED

    async def test_absolute_form_for_the_same_host_becomes_origin_form(
        self, agent: ScriptedAgent, visit: Visit
    ) -> None:
        client = await visit(b"GET http://WEB.localhost/x?y HTTP/1.1\r\nHost: web.localhost\r\n\r\n")
        await client.response()
        assert agent.streams[0].target == b"/x?y"

    async def test_options_star(self, agent: ScriptedAgent, visit: Visit) -> None:
        client = await visit(b"OPTIONS * HTTP/1.1\r\nHost: web.localhost\r\n\r\n")
        await client.response()
        assert agent.streams[0].target == b"*"

    async def test_requests_before_a_malformed_one_are_answered(self, agent: ScriptedAgent, visit: Visit) -> None:
        waiting: list[ScriptedStream] = []
        agent.on_stream = waiting.append
        client = await visit(GET + b"GARBAGE\r\n\r\n")
        await agent.until(lambda: waiting)
        waiting[0].answer(body=b"fine")
        assert (await client.response())[2] == b"fine"
        assert (await client.response())[0] == 400
        assert await client.rest() == b""

    @pytest.mark.parametrize("relay_settings", [{"max_head_bytes": 2048}])
    async def test_large_heads_are_431(self, agent: ScriptedAgent, visit: Visit) -> None:
        for head in (b"X-A: " + b"a" * 3000, b"\r\n".join(b"X-%d: %b" % (n, b"a" * 90) for n in range(30))):
            client = await visit(b"GET / HTTP/1.1\r\nHost: web.localhost\r\n" + head + b"\r\n\r\n")
            status, answer, _ = await client.response()
            assert (status, answer[b"portico-error"]) == (431, [b"edge.head_too_large"])
        endless = await visit(b"GET /" + b"a" * 1500)
        endless.send(b"a" * 1500)
        assert (await endless.response())[0] == 431

    async def test_too_many_fields_are_431(self, agent: ScriptedAgent, visit: Visit) -> None:
        client = await visit(b"GET / HTTP/1.1\r\nHost: web.localhost\r\n" + b"A: 1\r\n" * 500 + b"\r\n")
        assert (await client.response())[0] == 431


class TestRefusals:
    async def test_unknown_offline_and_busy(self, relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
        relay.snapshot.apply(
            {"type": "delta", "version": 2, "changes": [{"kind": "tunnel", "tunnel": {
                "id": "tun_off", "organization": "o", "hosts": ["off.localhost"], "state": "active", "generation": 1}}]}
        )  # fmt: skip
        agent.bind(grant("busy", concurrency=1), 2)
        await agent.until(lambda: 2 in agent.bound)
        agent.on_stream = lambda s: None
        await visit(b"GET / HTTP/1.1\r\nHost: busy.localhost\r\n\r\n")
        await agent.until(lambda: agent.streams)
        for host, status, code in (
            (b"none.localhost", 404, b"edge.host_unassigned"),
            (b"off.localhost", 404, b"edge.tunnel_offline"),
            (b"busy.localhost", 429, b"edge.concurrency_exceeded"),
        ):
            client = await visit(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
            got, fields, body = await client.response()
            assert (got, fields[b"portico-error"], fields[b"cache-control"]) == (status, [code], [b"no-store"])
            assert json.loads(body)["code"] == code.decode()
            assert (b"retry-after" in fields) == (status == 429)
        agent.streams[0].answer()
        await agent.until(lambda: relay.agents.by_tunnel["tun_busy"].inflight == 0)

    async def test_a_browser_gets_a_page_and_head_gets_no_body(self, relay: Relay, visit: Visit) -> None:
        client = await visit(b"GET / HTTP/1.1\r\nHost: x.localhost\r\nAccept: text/html,*/*;q=0.8\r\n\r\n")
        _, fields, body = await client.response()
        assert fields[b"content-type"][0].startswith(b"text/html") and b"edge.host_unassigned" in body
        client.send(b"HEAD / HTTP/1.1\r\nHost: x.localhost\r\n\r\n")
        assert b"Content-Length: " in await client.read_head()
        client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await client.response())[0] == 200  # the landing page of the base domain

    async def test_a_target_cannot_forge_an_edge_refusal(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = lambda s: s.answer(404, (b"Portico-Error", b"edge.host_unassigned", b"X-A", b"1"))
        client = await visit(GET)
        _, fields, _ = await client.response()
        assert b"portico-error" not in fields and fields[b"x-a"] == [b"1"]

    @pytest.mark.parametrize(
        ("reset", "status", "code"),
        [
            (f.TARGET_REFUSED, 502, b"edge.target_refused"),
            (f.TARGET_INVALID, 502, b"edge.target_invalid"),
            (f.TARGET_TIMEOUT, 504, b"edge.target_timeout"),
            (f.INTERNAL, 502, b"edge.agent_unreachable"),
            (999, 502, b"edge.agent_unreachable"),
        ],
    )
    async def test_resets_before_the_answer(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit, reset: int, status: int, code: bytes
    ) -> None:
        agent.on_stream = lambda s: s.stream.reset(reset, "nothing listens on 127.0.0.1:3000")
        client = await visit(GET)
        got, fields, body = await client.response()
        assert (got, fields[b"portico-error"]) == (status, [code])
        assert json.loads(body)["detail"].startswith("nothing listens on 127.0.0.1:3000")
        assert relay.agents.by_tunnel["tun_web"].inflight == 0

    async def test_the_agent_is_lost_under_a_request(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = lambda s: agent.close()
        client = await visit(GET)
        status, fields, _ = await client.response()
        assert (status, fields[b"portico-error"]) == (502, [b"edge.agent_unreachable"])

    @pytest.mark.parametrize("relay_settings", [{"first_byte_timeout_seconds": 0.4}])
    async def test_a_silent_target_is_504(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = lambda s: None
        client = await visit(GET)
        status, fields, _ = await client.response()
        assert (status, fields[b"portico-error"]) == (504, [b"edge.target_timeout"])
        await agent.until(lambda: agent.streams[0].reset is not None)

    @pytest.mark.parametrize("relay_settings", [{"head_timeout_seconds": 0.3}])
    async def test_a_slow_head_is_408_and_an_idle_start_is_closed(self, relay: Relay, visit: Visit) -> None:
        slow, silent = await visit(b"GET / HTT"), await visit()
        status, fields, _ = await slow.response()
        assert (status, fields[b"portico-error"]) == (408, [b"edge.head_timeout"])
        assert await silent.rest() == b""

    @pytest.mark.parametrize("relay_settings", [{"connections_per_address": 2, "exempt_loopback": False}])
    async def test_connections_per_address(self, agent: ScriptedAgent, visit: Visit) -> None:
        first, second = await visit(GET), await visit(GET)
        assert (await first.response())[0] == (await second.response())[0] == 200
        third = await visit()
        status, fields, _ = await third.response()
        assert (status, fields[b"portico-error"]) == (429, [b"edge.too_many_connections"])
        first.writer.close()
        await first.writer.wait_closed()
        await asyncio.sleep(0.05)
        assert (await (await visit(GET)).response())[0] == 200


class TestAborts:
    async def test_a_visitor_that_leaves_reaches_the_target(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit
    ) -> None:
        agent.on_stream = lambda s: None
        client = await visit(GET)
        await agent.until(lambda: agent.streams)
        client.writer.transport.abort()
        await agent.until(lambda: agent.streams[0].reset is not None)
        assert agent.streams[0].reset is not None and agent.streams[0].reset[0] == f.CANCELLED
        assert relay.agents.by_tunnel["tun_web"].inflight == 0

    async def test_a_closed_visitor_is_noticed_while_nothing_is_sent(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = lambda s: None
        client = await visit(GET)
        await agent.until(lambda: agent.streams)
        client.writer.close()
        await agent.until(lambda: agent.streams[0].reset is not None, seconds=4)

    async def test_a_half_closed_visitor_still_gets_its_answer(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = lambda s: None
        client = await visit(GET)
        client.writer.write_eof()
        await agent.until(lambda: agent.streams)
        await asyncio.sleep(0.2)
        agent.streams[0].answer(body=b"here")
        assert (await client.response())[2] == b"here"
        assert await client.rest() == b""

    @pytest.mark.parametrize("counted", [True, False])
    async def test_a_target_that_breaks_off_shows(self, agent: ScriptedAgent, visit: Visit, counted: bool) -> None:
        def answer(s: ScriptedStream) -> None:
            s.stream.send_response(200, [b"OK", *((b"Content-Length", b"100") if counted else ())], end=False)
            s.stream.send_data(b"part")
            s.stream.reset(f.TARGET_RESET)

        agent.on_stream = answer
        client = await visit(GET)
        await client.read_head()
        body = await client.rest()
        assert b"part" in body and len(body) < 100 and not body.endswith(b"0\r\n\r\n")

    @pytest.mark.parametrize("size", [3, 5])
    async def test_a_body_that_is_not_its_length(self, agent: ScriptedAgent, visit: Visit, size: int) -> None:
        def answer(s: ScriptedStream) -> None:
            s.stream.send_response(200, [b"OK", b"Content-Length", b"4"], end=False)
            s.stream.send_data(b"x" * size, end=True)

        agent.on_stream = answer
        client = await visit(GET)
        await client.read_head()
        assert len(await client.rest()) < 4

    @pytest.mark.parametrize("value", [b"4, 4", b"abc", b"-1", b"9" * 30])
    async def test_an_answer_with_a_bad_length(self, agent: ScriptedAgent, visit: Visit, value: bytes) -> None:
        agent.on_stream = lambda s: s.stream.send_response(200, [b"OK", b"Content-Length", value], end=True)
        client = await visit(GET)
        status, fields, _ = await client.response()
        assert (status, fields[b"portico-error"]) == (502, [b"edge.target_invalid"])


class TestBackpressure:
    async def test_an_upload_waits_for_credit_and_loses_nothing(self, agent: ScriptedAgent, visit: Visit) -> None:
        def hold(s: ScriptedStream) -> None:
            s.take = False

        agent.on_stream = hold
        body = bytes(range(256)) * 4096
        client = await visit(b"POST / HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: %d\r\n\r\n" % len(body))
        client.send(body)
        await agent.until(lambda: agent.streams and len(agent.streams[0].body) == f.STREAM_WINDOW)
        await asyncio.sleep(0.2)
        stream = agent.streams[0]
        assert len(stream.body) == f.STREAM_WINDOW
        stream.take = True
        stream.stream.consumed(f.STREAM_WINDOW)
        await asyncio.wait_for(stream.ended.wait(), 30)
        assert bytes(stream.body) == body
        stream.answer(body=b"got it")
        assert (await client.response())[2] == b"got it"

    async def test_a_visitor_that_does_not_read_stops_its_own_stream_only(
        self, agent: ScriptedAgent, visit: Visit
    ) -> None:
        def answer(s: ScriptedStream) -> None:
            if s.target == b"/fast":
                s.answer(body=b"quick")
                return
            s.stream.send_response(200, [b"OK", b"Content-Length", b"200000000"], end=False)

            def feed() -> None:
                while room := s.stream.sendable():
                    sent[0] += room
                    s.stream.send_data(bytes(room))
                s.stream.wait()

            s.feeding = feed
            feed()

        sent = [0]
        agent.on_stream = answer
        slow = await visit(b"GET /slow HTTP/1.1\r\nHost: web.localhost\r\n\r\n")
        slow.writer.transport.pause_reading()
        await agent.until(lambda: agent.streams)
        last = -1
        async with asyncio.timeout(30):
            while last != sent[0]:
                last = sent[0]
                await asyncio.sleep(0.3)
        assert sent[0] < 30_000_000  # kernel buffers and one window, not the body
        fast = await visit(b"GET /fast HTTP/1.1\r\nHost: web.localhost\r\n\r\n")
        assert (await fast.response())[2] == b"quick"
