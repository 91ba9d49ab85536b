"""Forwarding fields of trusted proxies: the rightmost address that is not theirs, and no way for anybody else to be it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.errors import Problem
from portico.relay import client_address
from portico.relay.client_address import Networks, Told, address_of, read, told_on

PROXIES = Networks(["10.0.0.0/8", "2001:db8:f::/48", "192.0.2.1"], "trusted_proxies")
PEER = "10.0.0.1"


def told(*fields: tuple[str, str], peer: str = PEER) -> Told:
    return read([part.encode("latin-1") for pair in fields for part in pair], peer, PROXIES)


def sent_on(found: Told, peer: str = PEER, scheme: bytes = b"http", port: int = 7080) -> dict[str, str]:
    flat = [part.decode("latin-1") for part in told_on(found, peer, scheme, b"web.example.com", port)]
    return dict(zip(flat[::2], flat[1::2], strict=True))


def x(value: str) -> tuple[str, str]:
    return ("X-Forwarded-For", value)


def f(value: str) -> tuple[str, str]:
    return ("Forwarded", value)


CLIENTS = [
    ([], PEER),
    ([x("203.0.113.7")], "203.0.113.7"),
    ([x("6.6.6.6, 203.0.113.7")], "203.0.113.7"),
    ([x("6.6.6.6,203.0.113.7,10.9.9.9 , 192.0.2.1")], "203.0.113.7"),
    ([x("6.6.6.6"), x("203.0.113.7")], "203.0.113.7"),  # a visitor's own line comes before the proxy's
    ([x("203.0.113.7"), x("10.2.3.4")], "203.0.113.7"),
    ([("x-fORWARDED-fOR", "203.0.113.7")], "203.0.113.7"),
    ([x("203.0.113.7,")], "203.0.113.7"),
    ([x(",, 6.6.6.6,,203.0.113.7 ,, ")], "203.0.113.7"),
    ([x(""), x(" , ")], PEER),
    ([x("203.0.113.7:51234")], "203.0.113.7"),
    ([x("2001:db8::7")], "2001:db8::7"),
    ([x("[2001:db8::7]")], "2001:db8::7"),
    ([x("[2001:DB8:0::7]:443, 2001:db8:f::1")], "2001:db8::7"),
    ([x("::ffff:203.0.113.7")], "203.0.113.7"),
    ([x("::ffff:203.0.113.7, ::ffff:10.0.0.7")], "203.0.113.7"),
    ([x("10.0.0.5, 10.0.0.6")], "10.0.0.5"),  # proxies all the way: the first of them asked
    # What is no address is nobody: it is not skipped, or whoever stands left of it could be anybody.
    ([x("203.0.113.7, unknown")], ""),
    ([x("203.0.113.7, _hidden, 10.0.0.6")], ""),
    ([x("unix:")], ""),
    ([x("203.0.113.7, 203.0.113.999")], ""),
    ([x("203.0.113.7 10.0.0.6")], ""),
    ([x('"203.0.113.7"')], ""),
    ([x("fe80::1%eth0")], ""),
    ([x("010.0.0.6")], ""),
    ([x("[203.0.113.7")], ""),
    ([x("203.0.113.7:")], ""),
    ([x("203.0.113.7:port")], ""),
    ([x("203.0.113.\xb2")], ""),
    ([x("localhost")], ""),
    # RFC 7239
    ([f("for=203.0.113.7")], "203.0.113.7"),
    ([f("For=203.0.113.7;proto=https")], "203.0.113.7"),
    ([f('for=6.6.6.6, for="203.0.113.7:80";by=10.0.0.1, for=10.0.0.6')], "203.0.113.7"),
    ([f("for=6.6.6.6"), f("for=203.0.113.7")], "203.0.113.7"),
    ([f('for="[2001:db8::7]"')], "2001:db8::7"),
    ([f('for="[2001:db8::7]:4711"')], "2001:db8::7"),
    ([f('for="203.0.113.7:_port"')], "203.0.113.7"),
    ([f('for="2\\03.0.113.7"')], "203.0.113.7"),
    ([f("for=203.0.113.7,")], "203.0.113.7"),
    ([f(" , for=203.0.113.7 ,, ")], "203.0.113.7"),
    ([f("for=203.0.113.7; proto=https")], "203.0.113.7"),
    ([f("for=_hidden")], ""),
    ([f('for="_hidden:80"')], ""),
    ([f("for=unknown, for=10.0.0.6")], ""),
    ([f("proto=https")], ""),
    ([f("for=[2001:db8::7]")], ""),
    ([f("for=203.0.113.7;for=6.6.6.6")], ""),
    ([f("for=203.0.113.7;FOR=6.6.6.6")], ""),
    ([f("for = 203.0.113.7")], ""),
    ([f("for=203.0.113.7 for=6.6.6.6")], ""),
    ([f('for="203.0.113.7')], ""),
    ([f("203.0.113.7")], ""),
    ([f("for=203.0.113.7;;")], ""),
    # A visitor's open quotes do not swallow what the proxy adds, in the same line or in one of its own.
    ([f('for=6.6.6.6, for="abc, for=203.0.113.7')], ""),
    ([f('for=6.6.6.6, for="abc'), f("for=203.0.113.7")], "203.0.113.7"),
    ([f('for=6.6.6.6, x="abc, for="[2001:db8::7]"')], ""),
    # Both ways to say it: a proxy that sets one may pass on the visitor's other.
    ([x("203.0.113.7"), f("for=203.0.113.7")], "203.0.113.7"),
    ([x("203.0.113.7, 10.0.0.6"), f("for=203.0.113.7, for=10.0.0.6")], "203.0.113.7"),
    ([x("203.0.113.7"), f("for=6.6.6.6")], ""),
    ([x("6.6.6.6"), f("for=203.0.113.7")], ""),
    ([x("203.0.113.7"), f("garbage")], ""),
    # No field of another name says anything.
    ([("X_Forwarded_For", "6.6.6.6"), ("X-Forwarded", "6.6.6.6"), ("X-Real-IP", "6.6.6.6")], PEER),
    ([("X-Forwarded-For ", "6.6.6.6"), ("X-Forwarded-For2", "6.6.6.6")], PEER),
]


@pytest.mark.parametrize(("fields", "client"), CLIENTS)
def test_the_client(fields: list[tuple[str, str]], client: str) -> None:
    assert told(*fields).client == client


def test_a_chain_without_end_is_no_chain() -> None:
    assert told(x("203.0.113.7" + ", 10.0.0.6" * 31)).client == "203.0.113.7"
    assert told(x("203.0.113.7" + ", 10.0.0.6" * 32)).client == ""


@pytest.mark.parametrize(
    ("fields", "scheme"),
    [
        ([("X-Forwarded-Proto", "https")], b"https"),
        ([("x-forwarded-proto", " HTTP ")], b"http"),
        ([("X-Forwarded-Proto", "wss")], None),
        ([("X-Forwarded-Proto", "https, http")], None),
        ([("X-Forwarded-Proto", "https"), ("X-Forwarded-Proto", "https")], None),
        ([("X-Forwarded-Proto", "")], None),
        ([("X_Forwarded_Proto", "https")], None),
        ([f("for=203.0.113.7;proto=https")], b"https"),
        ([f("for=203.0.113.7;proto=https, for=10.0.0.6;proto=http")], b"https"),
        ([f("for=6.6.6.6;proto=https, for=203.0.113.7;proto=http, for=10.0.0.6;proto=https")], b"http"),
        ([f("for=_x;proto=https")], None),
        ([x("203.0.113.7"), ("X-Forwarded-Proto", "http"), f("for=203.0.113.7;proto=https")], None),
        ([x("203.0.113.7"), ("X-Forwarded-Proto", "https"), f("for=203.0.113.7;proto=HTTPS")], b"https"),
    ],
)
def test_the_scheme(fields: list[tuple[str, str]], scheme: bytes | None) -> None:
    assert told(*fields).scheme == scheme


def test_host_port_and_id() -> None:
    found = told(
        ("X-Forwarded-Host", "shop.example.com:8443"), ("X-Forwarded-Port", "8443"), ("X-Request-Id", "f3a9c1d2-77aa")
    )
    assert (found.host, found.port, found.ident) == (b"shop.example.com:8443", 8443, b"f3a9c1d2-77aa")
    for name, value in (
        ("X-Forwarded-Host", "a, b"), ("X-Forwarded-Host", "a b"), ("X-Forwarded-Host", 'a"b'), ("X-Forwarded-Host", "a/b"),
        ("X-Forwarded-Port", "0"), ("X-Forwarded-Port", "65536"), ("X-Forwarded-Port", "80,443"), ("X-Forwarded-Port", "-1"),
        ("X-Forwarded-Port", "\xb2"), ("X-Request-Id", "short"), ("X-Request-Id", "a" * 129), ("X-Request-Id", "abcdefgh\ti"),
        ("X-Request-Id", 'abcdefgh"'), ("X-Request-Id", "-abcdefgh"), ("X-Request-Id", "abcdefgh\xe9"),
    ):  # fmt: skip
        found = told((name, value))
        assert (found.host, found.port, found.ident) == (None, None, None), (name, value)
    assert told(("X-Request-Id", "f3a9c1d2-77aa"), ("X-Request-Id", "f3a9c1d2-77aa")).ident is None


def test_lists_are_added_to() -> None:
    found = sent_on(told(x("6.6.6.6"), x("203.0.113.7, 10.0.0.6"), ("X-Forwarded-Proto", "https")))
    assert found["X-Forwarded-For"] == "6.6.6.6, 203.0.113.7, 10.0.0.6, 10.0.0.1"
    assert found["Forwarded"] == "for=203.0.113.7;host=web.example.com;proto=https, for=10.0.0.6, for=10.0.0.1"
    assert (found["X-Forwarded-Proto"], found["X-Forwarded-Host"], found["X-Forwarded-Port"]) == (
        "https", "web.example.com", "443",
    )  # fmt: skip
    found = sent_on(told(f("for=203.0.113.7;proto=https;host=shop.example.com")), peer="2001:db8:f::1")
    assert found["X-Forwarded-For"] == "203.0.113.7, 2001:db8:f::1"
    assert found["Forwarded"] == (
        "for=203.0.113.7;proto=https;host=shop.example.com, "
        'for="[2001:db8:f::1]";host=web.example.com;proto=http'
    )  # fmt: skip
    assert (found["X-Forwarded-Proto"], found["X-Forwarded-Host"]) == ("https", "shop.example.com")


def test_without_a_word_of_it_the_proxy_is_the_client() -> None:
    found = sent_on(told(), scheme=b"https", port=7443)
    assert found == {
        "X-Forwarded-For": "10.0.0.1",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "web.example.com",
        "X-Forwarded-Port": "7443",
        "Forwarded": "for=10.0.0.1;host=web.example.com;proto=https",
    }


def test_an_unknown_client_is_said_to_be() -> None:
    found = sent_on(told(x("_hidden")))
    assert found["X-Forwarded-For"] == "_hidden, 10.0.0.1"
    assert found["Forwarded"] == "for=unknown;host=web.example.com;proto=http, for=10.0.0.1"
    assert sent_on(told(f("for=unknown")))["X-Forwarded-For"] == "unknown, 10.0.0.1"


def test_the_port_follows_the_scheme() -> None:
    assert sent_on(told(("X-Forwarded-Proto", "http")), scheme=b"https", port=7443)["X-Forwarded-Port"] == "80"
    assert sent_on(told(("X-Forwarded-Port", "8080")), port=7080)["X-Forwarded-Port"] == "8080"


def test_networks() -> None:
    for address in ("10.255.0.1", "192.0.2.1", "2001:db8:f:1::"):
        assert address in PROXIES and address in PROXIES
    for address in ("11.0.0.1", "192.0.2.2", "2001:db8:e::1", "", "localhost", "10.0.0.1/32"):
        assert address not in PROXIES
    assert "10.0.0.1" in Networks(["::ffff:10.0.0.0/104"], "s") and "10.0.0.1" not in Networks([], "s")
    for wrong in ("10.0.0.1/8", "proxy.example.com", "10.0.0.0/33", ""):
        with pytest.raises(Problem, match="trusted_proxies"):
            Networks([wrong], "trusted_proxies")


def test_the_table_of_answers_is_bounded() -> None:
    nets = Networks(["10.0.0.0/8"], "s")
    for n in range(10_000):
        assert (f"10.1.{n // 256}.{n % 256}" in nets) is True
    assert len(nets._known) <= client_address._KNOWN_MAX


@given(st.text(st.characters(max_codepoint=255), max_size=60), st.sampled_from(["for=", "", "for=10.0.0.1, "]))
def test_whatever_a_visitor_wrote_the_proxys_word_is_the_last(text: str, start: str) -> None:
    """Never somebody of the visitor's choice: the address that the proxy added, or nobody."""
    assert told(x(f"{text}, 203.0.113.7")).client == "203.0.113.7"
    assert told(f(start + text), f("for=203.0.113.7")).client == "203.0.113.7"
    for added in ("for=203.0.113.7", 'for="[2001:db8::7]:80";proto=http'):
        client = told(f(f"{start}{text}, {added}")).client
        assert client in ("", "203.0.113.7", "2001:db8::7")


@given(st.text("0123456789abcdefF:.[]%_,- ", max_size=40))
def test_addresses_come_out_plain(text: str) -> None:
    found = address_of(text)
    assert found is None or address_of(found) == found
