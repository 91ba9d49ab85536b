"""Heads between HTTP/1 and the wire."""

from __future__ import annotations

import pytest

from portico.relay import heads


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"web.localhost", b"web.localhost"),
        (b"WEB.LocalHost:7080", b"web.localhost"),
        (b"web.localhost.", b"web.localhost"),
        (b"web.localhost.:80", b"web.localhost"),
        (b"a_b.localhost", b"a_b.localhost"),
        (b"127.0.0.1:80", b"127.0.0.1"),
        (b"[::1]:80", b"[::1]"),
        (b"[FE80::1]", b"[fe80::1]"),
        (b"x", b"x"),
        (b"", None),
        (b".", None),
        (b":80", None),
        (b"-web", None),
        (b"web:", None),
        (b"web:123456", None),
        (b"we b", None),
        (b"web/x", None),
        (b"user@web", None),
        (b"web,web", None),
        (b"w\xc3\xa9b", None),
        (b"[::1", None),
        (b"[web]", None),
        (b"a" * 300, None),
    ],
)
def test_hosts(value: bytes, expected: bytes | None) -> None:
    assert heads.normal_host(value) == expected


@pytest.mark.parametrize(
    ("target", "method", "expected"),
    [
        (b"/", b"GET", b"/"),
        (b"/a/../b?c=d&e", b"GET", b"/a/../b?c=d&e"),
        (b"//evil/x", b"GET", b"//evil/x"),
        (b"*", b"OPTIONS", b"*"),
        (b"*", b"GET", None),
        (b"http://web:80/x?y", b"GET", b"/x?y"),
        (b"HTTPS://WEB:80", b"GET", b"/"),
        (b"http://web:80?q", b"GET", b"/?q"),
        (b"http://web/x", b"GET", None),
        (b"http://web:80@evil/x", b"GET", None),
        (b"http://evil#web:80/", b"GET", None),
        (b"ftp://web:80/", b"GET", None),
        (b"web:80", b"CONNECT", None),
        (b"x/y", b"GET", None),
        (b"", b"GET", None),
    ],
)
def test_targets(target: bytes, method: bytes, expected: bytes | None) -> None:
    assert heads.origin_form(target, method, b"web:80") == expected


def test_field_kinds_ignore_case_and_stay_bounded() -> None:
    kinds = heads.FieldKinds({b"host": heads.HOST})
    assert kinds[b"HoSt"] == kinds[b"host"] == heads.HOST
    for number in range(10_000):
        assert kinds[b"x-%d" % number] == heads.PASS
    assert len(kinds) <= 4096
    assert kinds[b"HOST"] == heads.HOST


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((b"X-Forwarded-For", heads.DROP), (b"x-forwarded-prefix", heads.DROP), (b"X-Forwarded-Ssl", heads.DROP)),
        *((b"X_Forwarded_For", heads.DROP), (b"X-Forwarded_For", heads.DROP), (b"X_REQUEST_ID", heads.DROP)),
        *((b"Content_Length", heads.DROP), (b"Transfer_Encoding", heads.DROP), (b"Proxy_Authorization", heads.DROP)),
        *((b"X-Forwarded", heads.PASS), (b"X-Forwarder", heads.PASS), (b"X_My_Header", heads.PASS)),
        *((b"Content_Type", heads.PASS), (b"Content-Length", heads.LENGTH), (b"Host", heads.HOST)),
    ],
)
def test_what_an_app_could_take_for_a_field_of_ours_is_dropped(name: bytes, kind: int) -> None:
    assert heads.REQUEST_KINDS[name] == kind


def test_status_lines_stay_bounded() -> None:
    lines = heads.StatusLines()
    for number in range(10_000):
        assert lines[200, b"r%d" % number] == b"HTTP/1.1 200 r%d\r\n" % number
    assert len(lines) <= 4096


def test_forwarding_fields() -> None:
    flat = heads.forwarding("2001:db8::1", b"https", b"web.localhost", 7443)
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    assert fields == {
        b"X-Forwarded-For": b"2001:db8::1",
        b"X-Forwarded-Proto": b"https",
        b"X-Forwarded-Host": b"web.localhost",
        b"X-Forwarded-Port": b"7443",
        b"Forwarded": b'for="[2001:db8::1]";host=web.localhost;proto=https',
    }


@pytest.mark.parametrize(
    "name",
    [
        *(b"Content-Length", b"transfer-ENCODING", b"Host", b"Set-Cookie", b"Authorization", b"Portico-Error", b"TE"),
        *(b"PORTICO_ERROR", b"X-Forwarded-For", b"x_forwarded_for", b"X-Forwarded-Prefix", b"Content_Length"),
    ],
)
def test_trailers_cannot_change_the_message(name: bytes) -> None:
    assert heads.trailers([b"X-Sum", b"1", name, b"x", b"X-End", b"2"]) == [b"X-Sum", b"1", b"X-End", b"2"]


def test_fields_named_by_connection_are_dropped() -> None:
    assert heads.tokens(b" Close ,X-Hop,, x-b") == [b"close", b"x-hop", b"x-b"]
    assert heads.without([b"X-Hop", b"1", b"X-A", b"2", b"x-hop", b"3"], {b"x-hop"}) == [b"X-A", b"2"]


def test_sequences_of_made_up_names_are_not_remembered() -> None:
    """A head has room for 48 KB of names: a table of such would be what a stranger makes of our memory."""
    for plans in (heads.REQUEST_PLANS, heads.RESPONSE_PLANS):
        for names in (
            (b"Host", *(b"X%d" % at for at in range(100))),
            (b"Host", *(b"%d" % at * 200 for at in range(10))),
        ):
            before = len(plans)
            assert plans[names] is not None
            assert len(plans) == before
        assert plans[(b"Host", b"X-Usual")] is plans[(b"Host", b"X-Usual")]
