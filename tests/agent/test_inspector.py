"""The local page's server and API, over real HTTP, with requests that really passed."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from portico.agent.inspector import Inspector, bind, listening_address
from portico.agent.stats import Stats
from portico.agent.web import Guard, Request
from portico.errors import Problem
from portico.kit.sockets import port_of
from portico.settings import AgentSettings
from tests.agent.harness import answering, target_server
from tests.agent.inspecting import Inspected, inspected
from tests.agent.test_forward import OK, local

LIVE = {"Accept": "text/event-stream"}


@contextlib.asynccontextmanager
async def page(*answers: bytes, **settings: Any) -> AsyncIterator[Inspected]:
    """A tunnel to a target that gives ``answers``, and its page."""
    async with target_server(answering(*(answers or (OK,)))) as port:
        async with inspected(local(port), AgentSettings(**settings)) as tunnel:
            yield tunnel


async def visit(tunnel: Inspected, *paths: bytes, method: bytes = b"GET") -> None:
    for path in paths:
        await tunnel.get(path, method=method).over()
    await tunnel.ended()


class TestAddress:
    @pytest.mark.parametrize(
        ("value", "where"),
        [
            ("127.0.0.1:4040", ("127.0.0.1", 4040)), ("localhost:1", ("127.0.0.1", 1)), ("4041", ("127.0.0.1", 4041)),
            ("[::1]:4040", ("::1", 4040)), (":5000", ("127.0.0.1", 5000)), ("127.9.9.9:0", ("127.9.9.9", 0)),
            ("false", None), ("off", None), ("", None),
        ],
    )  # fmt: skip
    def test_what_may_be_said(self, value: str, where: tuple[str, int] | None) -> None:
        assert listening_address(AgentSettings(web_addr=value)) == where

    @pytest.mark.parametrize(
        "value", ["127.0.0.1", "x", "127.0.0.1:x", "127.0.0.1:65536", "box.test:4040", "0.0.0.0:1"]
    )
    def test_what_is_refused(self, value: str) -> None:
        with pytest.raises(Problem) as refused:
            listening_address(AgentSettings(web_addr=value))
        assert refused.value.code == "config.invalid" and "web_addr" in refused.value.detail

    def test_other_machines_only_when_allowed_by_name(self) -> None:
        with pytest.raises(Problem, match="every request with its secrets"):
            listening_address(AgentSettings(web_addr="0.0.0.0:4040"))
        allowed = AgentSettings(web_addr="0.0.0.0:4040", web_allow_remote=True)
        assert listening_address(allowed) == ("0.0.0.0", 4040)

    def test_the_next_port_when_one_is_taken(self) -> None:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            first.listen()
            taken = first.getsockname()[1]
            found = bind("127.0.0.1", taken, 20)
            assert found is not None and taken < port_of(found) < taken + 20
            found.close()
            assert bind("127.0.0.1", taken, 1) is None

    async def test_no_free_port_is_no_page(self) -> None:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            first.listen()
            settings = AgentSettings(web_addr=f"127.0.0.1:{first.getsockname()[1]}", web_ports_tried=1)
            inspector = Inspector(settings, Stats())
            assert not await inspector.start() and inspector.url == ""


def ask(method: str = "GET", host: str = "127.0.0.1:4040", **headers: str) -> Request:
    return Request(method, "/", {}, {"host": host, **{k.replace("_", "-"): v for k, v in headers.items()}})


class TestGuard:
    guard = Guard("127.0.0.1", 4040, ("box.test", "dev.test:8080"))

    @pytest.mark.parametrize(
        "host", ["127.0.0.1:4040", "localhost:4040", "LOCALHOST:4040", "[::1]:4040", "box.test", "box.test:1", "dev.test:8080"]
    )  # fmt: skip
    def test_names_of_the_page(self, host: str) -> None:
        self.guard.check(ask(host=host))

    @pytest.mark.parametrize(
        "host",
        [
            "", "evil.test", "evil.test:4040", "127.0.0.1", "localhost", "127.0.0.1:4041", "localhost.evil.test:4040", "[::1]",
            "dev.test", "dev.test:4040", "0.0.0.0:4040", "127.0.0.1:4040@evil.test", "localhost.:4040", "::1:4040",
        ],
    )  # fmt: skip
    def test_rebinding(self, host: str) -> None:
        with pytest.raises(Problem) as refused:
            self.guard.check(ask(host=host))
        assert refused.value.code == "inspect.host_denied"

    @pytest.mark.parametrize(
        "headers",
        [
            {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site", "sec_fetch_mode": "cors"},
            {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"},
        ],
    )  # fmt: skip
    def test_scripts_of_other_pages_may_not_read(self, headers: dict[str, str]) -> None:
        with pytest.raises(Problem) as refused:
            self.guard.check(ask(**headers))
        assert refused.value.code == "inspect.origin_denied"

    def test_links_from_elsewhere_work(self) -> None:
        self.guard.check(ask(sec_fetch_site="cross-site", sec_fetch_mode="navigate"))

    @pytest.mark.parametrize("method", ["POST", "DELETE"])
    @pytest.mark.parametrize(
        "headers",
        [
            {"origin": "http://evil.test"}, {"origin": "null"}, {"origin": "http://127.0.0.1:3000"},
            {"origin": "https://127.0.0.1:4040"}, {"origin": "http://localhost:4040"}, {"sec_fetch_site": "same-site"},
            {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"},
        ],
    )  # fmt: skip
    def test_changes_from_other_pages(self, method: str, headers: dict[str, str]) -> None:
        with pytest.raises(Problem) as refused:
            self.guard.check(ask(method, **headers))
        assert refused.value.code == "inspect.origin_denied"

    @pytest.mark.parametrize("headers", [{}, {"origin": "http://127.0.0.1:4040", "sec_fetch_site": "same-origin"}])
    def test_changes_from_the_page_and_from_programs(self, headers: dict[str, str]) -> None:
        self.guard.check(ask("POST", **headers))


async def raw(tunnel: Inspected, data: bytes, limit: float = 30.0) -> bytes:
    """What the page's server answers to bytes, until it closes."""
    port = int(tunnel.inspector.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(), limit)
    finally:
        writer.close()


class TestServer:
    async def test_rebinding_and_other_origins_over_the_wire(self) -> None:
        async with page() as tunnel:
            await visit(tunnel, b"/")
            denied = await tunnel.web.get("/api/requests", headers={"Host": "evil.test"})
            assert (denied.status_code, denied.json()["code"]) == (403, "inspect.host_denied")
            seen = await tunnel.web.get("/", headers={"Host": "evil.test", "Accept": "text/html"})
            assert "inspect.host_denied" in seen.text and seen.headers["content-type"].startswith("text/plain")
            path = f"/api/requests/{tunnel.entry().id}/replay"
            denied = await tunnel.web.post(path, headers={"Origin": "http://evil.test"})
            assert (denied.status_code, denied.json()["code"]) == (403, "inspect.origin_denied")
            denied = await tunnel.web.delete("/api/requests", headers={"Origin": "http://localhost:3000"})
            assert denied.status_code == 403 and tunnel.recorder.last == 1 and len(tunnel.recorder.entries) == 1
            assert (await tunnel.web.get(path)).status_code == 405

    async def test_headers_of_every_answer(self) -> None:
        async with page() as tunnel:
            for path in ("/", "/api/status", "/api/nothing", "/static/tokens.css"):
                headers = (await tunnel.web.get(path)).headers
                assert "default-src 'none'" in headers["content-security-policy"]
                assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
                assert headers["cross-origin-resource-policy"] == "same-origin" and headers["cache-control"]
                assert "access-control-allow-origin" not in headers and "server" not in headers

    async def test_head_and_unknown_addresses(self) -> None:
        async with page() as tunnel:
            head = await tunnel.web.head("/api/status")
            assert head.status_code == 200 and head.content == b"" and int(head.headers["content-length"]) > 10
            for path in (
                "/x",
                "/api",
                "/api/requests/x",
                "/api/requests/x/y",
                "/static/../web.py",
                "/static/%2e%2e",
                "//a",
            ):
                answer = await tunnel.web.get(tunnel.inspector.url + path)
                assert answer.status_code in (400, 404), path
            assert (await tunnel.web.get("/api/requests/zz-1")).json()["code"] == "inspect.not_found"
            refused = await tunnel.web.post("/api/status")
            assert refused.status_code == 405 and refused.headers["allow"] == "GET, HEAD"

    @pytest.mark.parametrize(
        "data",
        [
            b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            b"GET http://127.0.0.1/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000,
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc",
        ],
    )  # fmt: skip
    async def test_what_is_no_http(self, data: bytes) -> None:
        async with page() as tunnel:
            assert (await raw(tunnel, data)).split(b" ")[1] in (b"400", b"403", b"431")

    async def test_a_body_over_the_limit(self) -> None:
        async with page(web_body_max_bytes=1000) as tunnel:
            await visit(tunnel, b"/")
            answer = await tunnel.web.post(f"/api/requests/{tunnel.entry().id}/replay", content=b"x" * 2000)
            assert (answer.status_code, answer.json()["code"]) == (413, "request.too_large")

    async def test_slow_senders_and_idlers_are_cut_off(self) -> None:
        async with page(web_timeout_seconds=0.3, web_idle_timeout_seconds=0.3) as tunnel:
            assert await raw(tunnel, b"") == b""
            assert await raw(tunnel, b"GET / HT") == b""
            head = b"POST /api/x HTTP/1.1\r\nHost: " + tunnel.inspector.url[7:].encode()
            assert await raw(tunnel, head + b"\r\nContent-Length: 5\r\n\r\nab") == b""

    async def test_connections_are_limited(self) -> None:
        async with page(web_connections_max=3) as tunnel:
            port = int(tunnel.inspector.url.rpartition(":")[2])
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            await asyncio.sleep(0.05)
            with pytest.raises(httpx.HTTPError):
                await tunnel.web.get("/api/status")
            for _, writer in held:
                writer.close()
            await asyncio.sleep(0.05)
            assert (await tunnel.web.get("/api/status")).status_code == 200

    async def test_a_reader_that_stalls_is_cut_off(self) -> None:
        async with page(web_timeout_seconds=0.3) as tunnel:
            for _ in range(40):
                await visit(tunnel, b"/")
                tunnel.entry().response_body = b"x" * 1_000_000
            port = int(tunnel.inspector.url.rpartition(":")[2])
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.connect(("127.0.0.1", port))
                sock.sendall(b"GET /api/har HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % port)
                server = tunnel.inspector._server
                assert server is not None
                await tunnel.until(lambda: len(server._tasks) == 1)
                await tunnel.until(lambda: not server._tasks)

    async def test_requests_one_after_the_other_and_pipelined(self) -> None:
        async with page() as tunnel:
            one = b"GET /api/status HTTP/1.1\r\nHost: " + tunnel.inspector.url[7:].encode() + b"\r\n"
            got = await raw(tunnel, one + b"\r\n" + one + b"Connection: close\r\n\r\n")
            assert got.count(b"HTTP/1.1 200") == 2

    async def test_a_large_upload_may_ask_first(self) -> None:
        async with page() as tunnel:
            await visit(tunnel, b"/")
            host = tunnel.inspector.url[7:].encode()
            head = b"POST /api/requests/%b/replay HTTP/1.1\r\nHost: %b\r\n" % (tunnel.entry().id.encode(), host)
            port = int(host.rpartition(b":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + b"Content-Length: 2\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            writer.write(b"{}")
            assert (await reader.read()).startswith(b"HTTP/1.1 201")
            writer.close()


class TestList:
    async def test_newest_first_in_pages(self) -> None:
        async with page() as tunnel:
            await visit(tunnel, *(b"/%d" % n for n in range(10)))
            seen: list[str] = []
            query: dict[str, Any] = {"limit": 4}
            while True:
                got = await tunnel.json("/api/requests", params=query)
                seen += [row["path"] for row in got["requests"]]
                if got["next_before"] is None:
                    break
                query["before"] = got["next_before"]
            assert seen == [f"/{n}" for n in reversed(range(10))]

    async def test_filters(self) -> None:
        answers = [b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % code for code in (200, 404, 500, 200)]
        async with page(*answers) as tunnel:
            await visit(tunnel, b"/users/1", b"/Users/2", b"/orders?x=users")
            await visit(tunnel, b"/pay", method=b"DELETE")

            async def paths(**query: str) -> list[str]:
                return [row["path"] for row in (await tunnel.json("/api/requests", params=query))["requests"]]

            assert await paths(path="users") == ["/orders?x=users", "/Users/2", "/users/1"]
            assert await paths(status="4xx") == ["/Users/2"] == await paths(status="404")
            assert await paths(status="error") == ["/orders?x=users", "/Users/2"]
            assert await paths(method="delete") == ["/pay"] == await paths(method="DELETE", tunnel="web")
            assert await paths(tunnel="other") == await paths(status="running") == []
            assert await paths(path="users", status="200", method="get") == ["/users/1"]

    @pytest.mark.parametrize(
        "query", ["limit=0", "limit=x", "limit=501", "before=1", "status=abc", "status=6xx", "sort=up"]
    )
    async def test_queries_that_make_no_sense(self, query: str) -> None:
        async with page() as tunnel:
            answer = await tunnel.web.get(f"/api/requests?{query}")
            assert (answer.status_code, answer.json()["code"]) == (400, "inspect.query_invalid")

    async def test_forget_all(self) -> None:
        async with page() as tunnel:
            await visit(tunnel, b"/", b"/")
            assert (await tunnel.web.delete("/api/requests")).status_code == 204
            assert (await tunnel.json("/api/requests"))["requests"] == []
            await visit(tunnel, b"/new")
            assert [row["path"] for row in (await tunnel.json("/api/requests"))["requests"]] == ["/new"]


def with_body(body: bytes, kind: bytes = b"", encoding: bytes = b"") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(body)
    head += b"Content-Type: " + kind + b"\r\n" if kind else b""
    head += b"Content-Encoding: " + encoding + b"\r\n" if encoding else b""
    return head + b"\r\n" + body


class TestDetail:
    @pytest.mark.parametrize(
        ("answer", "kind", "text"),
        [
            (with_body(b'{"a":1}', b"application/json"), "json", '{"a":1}'),
            (with_body(b'{"a":1}', b"application/problem+json; charset=utf-8"), "json", '{"a":1}'),
            (with_body(b'[1]'), "json", "[1]"),
            (with_body(b"[not json"), "text", "[not json"),
            (with_body(b"a=1&b=%20", b"application/x-www-form-urlencoded"), "form", "a=1&b=%20"),
            (with_body("grüße".encode(), b"text/plain"), "text", "grüße"),
            (with_body("grüße".encode("latin-1"), b"text/plain; charset=ISO-8859-1"), "text", "grüße"),
            (with_body(b"\x89PNG\xff", b"image/png"), "image", None),
            (with_body(b"<svg/>", b"image/svg+xml"), "text", "<svg/>"),
            (with_body(b"\xff\x00\x01", b"application/octet-stream"), "binary", None),
            (with_body(b"a\0b", b"text/plain"), "binary", None),
            (with_body(gzip.compress(b"packed"), b"text/plain", b"gzip"), "text", "packed"),
            (with_body(zlib.compress(b"packed"), b"text/plain", b"deflate"), "text", "packed"),
            (with_body(zlib.compress(b"packed")[2:-4], b"text/plain", b"deflate"), "text", "packed"),
            (with_body(b"\x8b\x02\x80brotli", b"text/plain", b"br"), "binary", None),
            (with_body(b"no gzip", b"text/plain", b"gzip"), "text", "no gzip"),
            (with_body(b""), "empty", None),
        ],
    )  # fmt: skip
    async def test_bodies_for_showing(self, answer: bytes, kind: str, text: str | None) -> None:
        async with page(answer) as tunnel:
            await visit(tunnel, b"/")
            shown = (await tunnel.detail())["response"]["body"]
            assert (shown["kind"], shown.get("text")) == (kind, text)
            assert shown["truncated"] is False and shown["bytes"] == shown["kept"]

    async def test_a_bomb_unpacks_to_the_limit(self) -> None:
        bomb = gzip.compress(b"x" * 10_000_000)
        async with page(with_body(bomb, b"text/plain", b"gzip"), web_decoded_max_bytes=5000) as tunnel:
            await visit(tunnel, b"/")
            assert (await tunnel.detail())["response"]["body"]["text"] == "x" * 5000

    async def test_a_cut_body_says_so(self) -> None:
        async with page(with_body("ü".encode() * 40_000, b"text/plain"), inspect_body_max_bytes=1001) as tunnel:
            await visit(tunnel, b"/")
            shown = (await tunnel.detail())["response"]["body"]
            assert (shown["bytes"], shown["kept"], shown["truncated"]) == (80_000, 1001, True)
            assert shown["text"] == "ü" * 500

    async def test_facts(self) -> None:
        async with page() as tunnel:
            await tunnel.get(b"/\xff", b"X-Forwarded-For", b"1.2.3.4, 5.6.7.8", b"X-Request-Id", b"req_1").over()
            await tunnel.ended()
            document = await tunnel.detail()
            assert document["path"] == "/\\xff" and document["remote_addr"] == "1.2.3.4"
            assert document["request_id"] == "req_1" and document["tunnel"] == "web" and document["replayable"]
            timing = document["timing"]
            assert timing["wait_ms"] + timing["receive_ms"] == pytest.approx(timing["total_ms"], abs=0.01)
            assert document["started_at"].endswith("Z")

    async def test_bytes_never_get_a_type_that_runs(self) -> None:
        answers = [with_body(b"<script>alert(1)</script>", b"text/html"), with_body(b"<svg/>", b"image/svg+xml")]
        async with page(*answers, with_body(b"\x89PNG", b"image/png")) as tunnel:
            await visit(tunnel, b"/a", b"/b", b"/c")
            for back, kind in ((3, None), (2, None), (1, "image/png")):
                base = f"/api/requests/{tunnel.entry(back).id}/body/response"
                plain = await tunnel.web.get(base)
                assert plain.headers["content-type"] == "application/octet-stream"
                assert plain.headers["content-disposition"].startswith("attachment")
                assert "sandbox" in plain.headers["content-security-policy"]
                image = await tunnel.web.get(base + "?as=image")
                assert image.headers["content-type"] == (kind or "application/octet-stream")
                assert image.headers["x-content-type-options"] == "nosniff"
            assert plain.content == b"\x89PNG"

    async def test_pages_without_javascript_escape_what_visitors_send(self) -> None:
        body = with_body(b"<script>alert(3)</script>", b"text/html")
        async with page(body) as tunnel:
            await tunnel.get(b"/<script>alert(1)</script>", b"X-Evil", b'"><script>alert(2)</script>').over()
            await tunnel.ended()
            for path in ("/", f"/requests/{tunnel.entry().id}"):
                text = (await tunnel.web.get(path)).text
                assert "&lt;script&gt;alert(1)" in text and "<script>alert" not in text


async def events(tunnel: Inspected, count: int, act: Any) -> list[tuple[str, Any]]:
    """Do ``act`` while listening; the first ``count`` events."""
    got: list[tuple[str, Any]] = []
    async with tunnel.web.stream("GET", "/api/events") as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        name = ""
        task = asyncio.ensure_future(act())
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                got.append((name, json.loads(line[6:])))
                if len(got) == count:
                    break
        await task
    return got


class TestLive:
    async def test_new_and_changed_requests_are_told(self) -> None:
        async with page(web_refresh_seconds=0.05) as tunnel:
            await visit(tunnel, b"/before")
            (first, status), (second, news) = await events(tunnel, 2, lambda: visit(tunnel, b"/a"))
            assert (first, status["recorder"]["requests"]) == ("status", 1)
            assert second == "requests" and [row["path"] for row in news["rows"]] == ["/a"] and news["skipped"] == 0

    async def test_more_than_a_page_shows(self) -> None:
        async with page(web_refresh_seconds=0.2) as tunnel:

            async def burst() -> None:
                visits = [tunnel.get(b"/%d" % n) for n in range(250)]
                for one in visits:
                    await one.over()

            got = await events(tunnel, 2, burst)
            rows = [row for name, told in got if name == "requests" for row in told["rows"]]
            assert rows[-1]["path"] == "/249" and len(rows) == 100 and got[1][1]["skipped"] == 150

    async def test_an_emptied_list_is_told(self) -> None:
        async with page(web_refresh_seconds=0.05) as tunnel:
            await visit(tunnel, b"/")
            got = await events(tunnel, 2, lambda: tunnel.web.delete("/api/requests"))
            assert got[1] == ("cleared", {})

    async def test_pages_are_limited_and_leave_nothing(self) -> None:
        async with page(web_streams_max=1, web_refresh_seconds=0.02) as tunnel:
            async with tunnel.web.stream("GET", "/api/events") as answer:
                assert answer.status_code == 200
                refused = await tunnel.web.get("/api/events")
                assert (refused.status_code, refused.json()["code"]) == (429, "inspect.busy")
            live = tunnel.inspector._live
            await tunnel.until(lambda: not live._pages and live._task is None)
            async with tunnel.web.stream("GET", "/api/events") as answer:
                assert answer.status_code == 200
