"""What visitors are told: in which form, how long it may be kept, and by whom (a target can never say that it is the edge)."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from portico.errors import catalogue
from portico.relay.server import Relay
from tests.relay.doubles import Client
from tests.relay.edge import Edge, online

Visit = Callable[..., Any]
BROWSER = b"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8\r\n"
GET = b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n"


@pytest.fixture
async def edge(relay: Relay) -> AsyncIterator[Edge]:
    async with online(relay, {}) as tunnel:
        yield tunnel


#: What a policy or a request does → the code.
REFUSALS: list[tuple[str, dict[str, Any], bytes]] = [
    ("edge.host_unassigned", {}, b"Host: nobody.localhost\r\n"),
    ("edge.bad_request", {}, b"Host: web.localhost\r\nHost: web.localhost\r\n"),
    ("edge.tls_mode_mismatch", {"plain_http": "refuse"}, b"Host: web.localhost\r\n"),
    ("edge.https_redirect", {"plain_http": "redirect"}, b"Host: web.localhost\r\n"),
    ("edge.ip_denied", {"addresses": {"rules": [{"deny": "127.0.0.0/8"}]}}, b"Host: web.localhost\r\n"),
    ("edge.rate_limited", {"rate_limits": {"tunnel": {"requests": 1, "seconds": 3600}}}, b"Host: web.localhost\r\n"),
]


class TestForm:
    @pytest.mark.parametrize(("code", "policy", "fields"), REFUSALS, ids=[row[0] for row in REFUSALS])
    async def test_every_refusal(
        self, edge: Edge, visit: Visit, code: str, policy: dict[str, Any], fields: bytes
    ) -> None:
        """A page for a browser, a document for a program, for HEAD the same head alone; never kept by anybody."""
        edge.change(policy)
        if code == "edge.rate_limited":
            assert (await (await visit(GET)).response())[0] == 200
        asked = edge.target.requests
        bodies = []
        for accept in (b"", b"Accept: */*\r\n", b"Accept: application/json\r\n", BROWSER):
            client: Client = await visit(b"GET /a HTTP/1.1\r\n" + fields + accept + b"\r\n")
            status, got, body = await client.response()
            assert (status, got[b"portico-error"], got[b"cache-control"]) == (
                *(catalogue()[code].status, [code.encode()]), [b"no-store"],
            )  # fmt: skip
            html = accept == BROWSER
            assert got[b"content-type"] == ([b"text/html; charset=utf-8"] if html else [b"application/problem+json"])
            (ident,) = got[b"x-request-id"]
            assert re.fullmatch(rb"req_[0-9a-f]{22}", ident)
            assert (b"retry-after" in got) == (status == 429) and (b"location" in got) == (status == 308)
            if html:
                assert b"<h1>" in body and ident in body and code.encode() in body
            else:
                document = json.loads(body)
                assert (document["code"], document["request_id"]) == (code, ident.decode())
            bodies.append((got, body))
        client = await visit(b"HEAD /a HTTP/1.1\r\n" + fields + BROWSER + b"Connection: close\r\n\r\n")
        head = await client.rest()
        if code != "edge.bad_request":
            assert head.endswith(b"\r\n\r\n") and head.count(b"\r\n\r\n") == 1
            length = int(re.findall(rb"Content-Length: (\d+)", head)[0])
            assert length == len(bodies[-1][1])
        assert edge.target.requests == asked, "nothing of it reached the app"

    async def test_a_browser_with_too_many_cookies_gets_a_page(self, edge: Edge, visit: Visit) -> None:
        cookies = b"Cookie: " + b"a" * 60_000 + b"\r\n"
        client: Client = await visit(b"GET / HTTP/1.1\r\nHost: web.localhost\r\n" + BROWSER + cookies + b"\r\n")
        status, fields, body = await client.response()
        assert (status, fields[b"portico-error"]) == (431, [b"edge.head_too_large"])
        assert b"Delete the cookies" in body and b"<h1>" in body

    async def test_when_to_come_back_is_when_there_is_room(self, edge: Edge, visit: Visit) -> None:
        edge.change({"rate_limits": {"tunnel": {"requests": 1, "seconds": 90}}})
        client: Client = await visit(GET * 2)
        assert (await client.response())[0] == 200
        status, fields, _ = await client.response()
        assert status == 429 and 85 <= int(fields[b"retry-after"][0]) <= 90

    async def test_the_landing_page(self, relay: Relay, visit: Visit) -> None:
        client: Client = await visit(b"GET /any?thing HTTP/1.1\r\nHost: LOCALHOST:80\r\n" + BROWSER + b"\r\n")
        status, fields, body = await client.response()
        assert status == 200 and b"portico http 8000" in body and b"portico-error" not in fields
        assert fields[b"content-type"] == [b"text/html; charset=utf-8"] and fields[b"cache-control"] == [b"no-store"]
        for secret in (relay.settings.relay_key.reveal(), str(relay.settings.state_dir), relay.settings.api_url):
            assert secret.encode() not in body
        client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        status, fields, body = await client.response()
        assert status == 200 and fields[b"content-type"] == [b"text/plain; charset=utf-8"]
        client.send(b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (await client.rest()).endswith(b"\r\n\r\n")


class TestOnlyTheEdgeSaysSo:
    """``Portico-Error`` is the edge's word: an app may say 502, but not that the edge did."""

    FORGED = b"Portico-Error: edge.ip_denied\r\nPORTICO-ERROR: a\r\nportico-error: b\r\nPortico-error:\r\n"

    async def test_in_heads(self, edge: Edge, visit: Visit) -> None:
        edge.target.answer = (
            b"HTTP/1.1 502 Bad\r\n" + self.FORGED + b"X-Kept: 1\r\nContent-Length: 2\r\n" + self.FORGED + b"\r\nok"
        )
        client: Client = await visit()
        for _ in range(5):  # the later ones are answers that were seen before
            client.send(GET)
            status, fields, body = await client.response()
            assert (status, body, fields[b"x-kept"]) == (502, b"ok", [b"1"])
            assert b"portico-error" not in fields

    async def test_in_trailers(self, edge: Edge, visit: Visit) -> None:
        edge.target.answer = (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Portico-Error, X-Sum\r\n\r\n"
            b"2\r\nok\r\n0\r\n" + self.FORGED + b"X-Sum: 7\r\n" + self.FORGED + b"\r\n"
        )
        client: Client = await visit(GET.replace(b"\r\n\r\n", b"\r\nConnection: close, TE\r\nTE: trailers\r\n\r\n"))
        answer = await client.rest()
        assert answer.endswith(b"2\r\nok\r\n0\r\nX-Sum: 7\r\n\r\n") and b"portico-error" not in answer.lower()

    async def test_in_interim_answers(self, edge: Edge, visit: Visit) -> None:
        edge.target.answer = (
            b"HTTP/1.1 103 Early Hints\r\n" + self.FORGED + b"Link: </a>\r\n\r\n"
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        )
        client: Client = await visit(GET)
        assert await client.read_head() == b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        assert (await client.response())[2] == b"ok"

    async def test_in_a_switch_of_protocols(self, edge: Edge, visit: Visit) -> None:
        edge.target.switch = edge.target.switch.replace(b"\r\n\r\n", b"\r\n" + self.FORGED + b"X-Kept: 1\r\n\r\n")
        client: Client = await visit(GET.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"))
        head = await client.read_head()
        assert head.startswith(b"HTTP/1.1 101 ") and b"X-Kept: 1" in head and b"portico-error" not in head.lower()

    async def test_as_a_name_that_is_almost_it(self, edge: Edge, visit: Visit) -> None:
        """White space before the colon is no name at all, and makes the answer unusable rather than its own."""
        edge.target.answer = b"HTTP/1.1 200 OK\r\nPortico-Error : edge.ip_denied\r\nContent-Length: 0\r\n\r\n"
        client: Client = await visit(GET)
        status, fields, _ = await client.response()
        assert (status, fields[b"portico-error"]) == (502, [b"edge.target_invalid"])

    async def test_named_by_connection_it_is_gone_too(self, edge: Edge, visit: Visit) -> None:
        edge.target.answer = (
            b"HTTP/1.1 200 OK\r\nConnection: Portico-Error\r\nPortico-Error: x\r\nContent-Length: 0\r\n\r\n"
        )
        client: Client = await visit(GET)
        assert b"portico-error" not in (await client.read_head()).lower()
