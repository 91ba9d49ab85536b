from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from portico.errors import catalogue
from portico.relay import pages

# What visitors can meet: a code with a hop. The others of the area go between relay and API.
EDGE = [code for code, spec in catalogue().items() if code.startswith("edge.") and spec.hop is not None]
EVIL = "\"><script>alert('x')</script>&\r\nSet-Cookie: a=b\x00\x1b[31m"


def named(headers: pages.Headers, name: bytes) -> bytes | None:
    found = [value for key, value in headers if key.lower() == name.lower()]
    assert len(found) <= 1
    return found[0] if found else None


class Reader(HTMLParser):
    """Tags, attributes and text; fails on a tag that is closed out of order."""

    VOID = frozenset(("meta", "br", "link"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


class TestEveryCode:
    @pytest.mark.parametrize("code", EDGE)
    @pytest.mark.parametrize("html", [True, False])
    def test_status_and_headers(self, code: str, html: bool) -> None:
        status, headers, body = pages.refusal(code, request_id="req_1", html=html)
        assert status == catalogue()[code].status
        assert named(headers, b"Portico-Error") == code.encode()
        assert named(headers, b"Cache-Control") == b"no-store"
        assert named(headers, b"X-Request-Id") == b"req_1"
        assert named(headers, b"X-Content-Type-Options") == b"nosniff"
        assert named(headers, b"Content-Length") == str(len(body)).encode()
        assert (named(headers, b"Retry-After") is not None) == (status == 429)

    @pytest.mark.parametrize("code", EDGE)
    def test_a_problem_document_for_programs(self, code: str) -> None:
        _, headers, body = pages.refusal(code, request_id="req_1", html=False, detail="what", host="web.localhost")
        assert named(headers, b"Content-Type") == b"application/problem+json"
        spec = catalogue()[code]
        assert json.loads(body) == {
            "type": f"urn:portico:error:{code}",
            "title": spec.title,
            "status": spec.status,
            "code": code,
            "hint": spec.hint,
            "retryable": spec.retryable,
            "hop": spec.hop,
            "detail": "what",
            "request_id": "req_1",
            "host": "web.localhost",
        }
        bare = json.loads(pages.refusal(code, request_id="req_2", html=False)[2])
        assert bare["detail"] == spec.title and "host" not in bare and bare["request_id"] == "req_2"

    @pytest.mark.parametrize("code", EDGE)
    def test_a_page_that_explains_itself(self, code: str) -> None:
        _, headers, body = pages.refusal(code, request_id="req_1", html=True, host="web.localhost")
        assert named(headers, b"Content-Type") == b"text/html; charset=utf-8"
        page = Reader(body.decode())
        for text in (catalogue()[code].title, code, "req_1", "web.localhost", "If you are visiting", "your tunnel"):
            assert text in page.text
        assert code in pages._ADVICE, "every edge code has words of its own"

    @pytest.mark.parametrize("code", EDGE)
    def test_the_chain_marks_the_hop_of_the_catalogue(self, code: str) -> None:
        text = pages.refusal(code, request_id="req_1", html=True)[2].decode()
        classes = re.findall(r'<li class="(\w+)">(?:<span class="link (\w+)">)?', text)
        states = [state for pair in classes for state in pair if state]
        assert len(states) == 7 and states.count("bad") == 1
        mark = states.index("bad")
        assert states == ["ok"] * mark + ["bad"] + ["open"] * (6 - mark)
        names = ("visitor", "relay", "agent", "local target")
        hop = catalogue()[code].hop
        assert hop == (names[mark // 2] if mark % 2 == 0 else f"{names[mark // 2]} → {names[mark // 2 + 1]}")

    @pytest.mark.parametrize("code", EDGE)
    def test_nothing_is_loaded_and_nothing_runs(self, code: str) -> None:
        _, headers, body = pages.refusal(code, request_id="req_1", html=True)
        page = Reader(body.decode())
        assert not {"script", "link", "img", "iframe", "form", "object"} & set(page.tags)
        assert not [name for name, _ in page.attributes if name in ("src", "href", "style") or name.startswith("on")]
        style = re.search(r"<style>(.*)</style>", body.decode(), re.DOTALL)
        assert style is not None and "url(" not in style[1] and "@import" not in style[1]
        digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
        policy = (named(headers, b"Content-Security-Policy") or b"").decode()
        assert "default-src 'none'" in policy and f"'sha256-{digest}'" in policy


#: What the edge promises by number; another status under the same code would be another promise.
STATUSES = {
    "edge.bad_request": 400,
    "edge.host_unassigned": 404,
    "edge.tunnel_offline": 404,
    "edge.tls_mode_mismatch": 421,
    "edge.https_redirect": 308,
    "edge.domain_blocked": 403,
    "edge.domain_frozen": 403,
    "edge.account_suspended": 403,
    "edge.auth_required": 401,
    "edge.auth_invalid": 401,
    "edge.auth_throttled": 429,
    "edge.ip_denied": 403,
    "edge.concurrency_exceeded": 429,
    "edge.rate_limited": 429,
    "edge.agent_unreachable": 502,
    "edge.target_refused": 502,
    "edge.target_timeout": 504,
}


class TestStatuses:
    def test_they_are_those_of_the_contract(self) -> None:
        assert {code: catalogue()[code].status for code in STATUSES} == STATUSES

    @pytest.mark.parametrize("html", [True, False])
    def test_a_password_is_asked_for(self, html: bool) -> None:
        headers = pages.refusal(
            "edge.auth_required", request_id="r", html=html, extra=[pages.challenge('My "own" \\ realm\r\nX: y é')]
        )[1]
        challenge = named(headers, b"WWW-Authenticate")
        assert challenge == rb'Basic realm="My \"own\" \\ realmX: y ", charset="UTF-8"'
        assert named(pages.refusal("edge.auth_required", request_id="r", html=html)[1], b"WWW-Authenticate") is None

    @pytest.mark.parametrize(
        ("port", "target", "expected"),
        [
            (443, b"/a?b=c", b"https://web.localhost/a?b=c"),
            (7443, b"/", b"https://web.localhost:7443/"),
            (443, b"//other.example/", b"https://web.localhost//other.example/"),
            (443, b"*", b"https://web.localhost/"),
            (443, b"/\xc3\xa9 \r\nX: y", b"https://web.localhost/%C3%A9%20%0D%0AX:%20y"),
        ],
    )
    def test_the_way_to_https(self, port: int, target: bytes, expected: bytes) -> None:
        status, headers, _ = pages.refusal(
            "edge.https_redirect", request_id="r", html=True, extra=[pages.location(b"web.localhost", port, target)]
        )
        assert status == 308 and named(headers, b"Location") == expected
        assert named(headers, b"Cache-Control") == b"no-store"  # the policy may change back

    @pytest.mark.parametrize(
        ("seconds", "expected"), [(0.0, b"1"), (0.2, b"1"), (1.0, b"1"), (1.01, b"2"), (90.0, b"90")]
    )
    def test_when_to_try_again(self, seconds: float, expected: bytes) -> None:
        headers = pages.refusal("edge.rate_limited", request_id="r", html=False, extra=[pages.retry_after(seconds)])[1]
        assert named(headers, b"Retry-After") == expected


class TestEscaping:
    def test_html(self) -> None:
        plain = Reader(
            pages.refusal("edge.host_unassigned", request_id="r", html=True, detail="d", host="h")[2].decode()
        )
        body = pages.refusal("edge.host_unassigned", request_id=EVIL, html=True, detail=EVIL, host=EVIL)[2]
        page = Reader(body.decode())
        assert page.tags == plain.tags
        assert b"<script" not in body and b"\x1b" not in body and b"\x00" not in body and b"\r" not in body

    def test_json(self) -> None:
        body = pages.refusal("edge.host_unassigned", request_id=EVIL, html=False, detail=EVIL, host=EVIL)[2]
        document = json.loads(body)
        assert (document["request_id"], document["detail"], document["host"]) == (EVIL, EVIL, EVIL)

    @pytest.mark.parametrize("html", [True, False])
    def test_headers(self, html: bool) -> None:
        headers = pages.refusal("edge.bad_request", request_id=EVIL, html=html, host=EVIL)[1]
        assert all(b"\r" not in value and b"\n" not in value and b"\x00" not in value for _, value in headers)

    @pytest.mark.parametrize("html", [True, False])
    def test_a_long_detail_is_cut_and_lone_surrogates_pass(self, html: bool) -> None:
        body = pages.refusal("edge.target_invalid", request_id="r", html=html, detail="\udcff" + "x" * 100_000)[2]
        assert len(body) < 12_000


class TestPrefersHtml:
    @pytest.mark.parametrize(
        ("accept", "expected"),
        [
            (b"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
            (b"TEXT/HTML", True),
            (b"application/xhtml+xml", True),
            (b"text/html;q=0.5, application/json;q=0.5", True),
            (b"text/html;q=0.4, application/json", False),
            (b"application/problem+json, text/html;q=0.9", False),
            (b"text/html;q=0", False),
            (b"text/html;q=abc", False),
            (b"*/*", False),
            (b"", False),
            (b"application/json", False),
            (b"\xff\xfe,;;=,text/html", True),
            (b"a," * 10_000 + b"text/html", False),
            (b"text/*", True),
            (b"text/html;q=0, text/*", False),
            (b"text/html;q=0.5, */*", False),
            (b"text/html;q=0.5, */*;q=0.5", True),
            (b"text/html;q=0.9, application/*", False),
            (b"text/html;level=1;q=0.7, application/json;q=0.6", True),
            (b"image/avif,image/webp,*/*;q=0.8", False),
            (b"application/json;q=0, */*, text/html;q=0.1", False),
            (b"application/json;q=0, application/problem+json;q=0, text/html;q=0.1", True),
            (b"text/html;q=nan", False),
        ],
    )
    def test_it(self, accept: bytes, expected: bool) -> None:
        assert pages.prefers_html(accept) is expected


class TestLanding:
    def test_html(self) -> None:
        status, headers, body = pages.landing("tunnels.<b>.example", html=True)
        page = Reader(body.decode())
        assert status == 200 and "portico http 8000" in page.text and "tunnels.<b>.example" in page.text
        assert named(headers, b"Content-Length") == str(len(body)).encode()
        assert named(headers, b"Content-Security-Policy") is not None
        assert named(headers, b"Portico-Error") is None

    def test_text(self) -> None:
        _, headers, body = pages.landing("localhost", html=False)
        assert named(headers, b"Content-Type") == b"text/plain; charset=utf-8"
        assert b"portico http 8000" in body


@pytest.mark.parametrize("html", [True, False])
def test_a_code_without_hop_or_words_of_its_own_is_rendered_from_the_catalogue(html: bool) -> None:
    body = pages.refusal("config.invalid", request_id="r", html=html)[2].decode()
    assert catalogue()["config.invalid"].title in body and 'class="chain"' not in body


def test_an_unlisted_code_fails_at_once() -> None:
    with pytest.raises(KeyError):
        pages.refusal("edge.no_such_code", request_id="r", html=True)
