from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portico.relay.hello import Hello, Invalid, NeedMore, parse
from tests.relay.clienthello import (
    LIMIT,
    alpn,
    body,
    extension,
    hello,
    message,
    recorded,
    records,
    server_name,
    vector,
)

NAME = server_name(b"web.example.com")


def whole(data: bytes) -> Hello:
    found = parse(data, LIMIT)
    assert isinstance(found, Hello), found
    return found


def refused(data: bytes) -> Invalid:
    found = parse(data, LIMIT)
    assert isinstance(found, Invalid), found
    return found


def step_by_step(data: bytes) -> tuple[Hello | Invalid, int]:
    """As the port reads: never more than what was said to be needed. The looks that it took, too."""
    have, looks = 1, 0
    while True:
        looks += 1
        found = parse(data[:have], LIMIT)
        if not isinstance(found, NeedMore):
            return found, looks
        assert found.total > have
        assert found.total <= len(data), "more than the whole hello is asked for"
        have = found.total


class TestRealClients:
    @pytest.mark.parametrize(
        ("client", "sni", "protocols", "ech", "newest"),
        [
            ("chromium", b"web.localhost", (b"h2", b"http/1.1"), True, 0x0304),
            ("curl", b"web.localhost", (b"h2", b"http/1.1"), False, 0x0304),
            ("openssl-3", b"web.example.com", (), False, 0x0304),
            ("openssl-3-tls12", b"web.example.com", (b"h2", b"http/1.1"), False, 0x0303),
            ("no-name", None, (), False, 0x0304),
        ],
    )
    def test_what_they_say(
        self, client: str, sni: bytes | None, protocols: tuple[bytes, ...], ech: bool, newest: int
    ) -> None:
        data = recorded(client)
        found = whole(data)
        assert (found.sni, found.alpn, found.ech, found.size) == (sni, protocols, ech, len(data))
        assert newest in found.versions
        assert len(found.session_id) in (0, 32)

    @pytest.mark.parametrize("client", ["chromium", "curl", "openssl-3-tls12"])
    def test_every_beginning_of_it_wants_more(self, client: str) -> None:
        data = recorded(client)
        for end in range(len(data)):
            found = parse(data[:end], LIMIT)
            assert isinstance(found, NeedMore)
            assert end < found.total <= len(data)

    @pytest.mark.parametrize("behind", [b"\x16", b"\x14\x03\x03\0\x01\x01", b"\x17\x03\x03\0\x02hi", b"rubbish"])
    def test_what_follows_its_record_is_not_looked_at(self, behind: bytes) -> None:
        """Early data comes right behind it."""
        data = recorded("curl")
        assert whole(data + behind) == whole(data)


class TestPieces:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.sampled_from(["chromium", "openssl-3"]))
    def test_records_of_any_size(self, sizes: list[int], client: str) -> None:
        plain = whole(recorded(client))
        data = records(recorded(client)[5:], sizes)
        found, _ = step_by_step(data)
        assert isinstance(found, Hello)
        assert (found.sni, found.alpn, found.session_id, found.size) == (
            plain.sni,
            plain.alpn,
            plain.session_id,
            len(data),
        )

    @pytest.mark.parametrize("size", [1, 2, 3, 100])
    def test_many_records_take_few_looks(self, size: int) -> None:
        """Else a hello in records of one byte would cost the square of its length."""
        data = records(recorded("chromium")[5:], [size])
        found, looks = step_by_step(data)
        assert isinstance(found, Hello)
        assert looks < 80

    @pytest.mark.parametrize("size", [16_000, 16_384, 20_000, 32_000])
    def test_large_ones(self, size: int) -> None:
        data = hello(NAME, extension(21, bytes(size)))
        assert whole(data).sni == b"web.example.com"
        found, looks = step_by_step(data)
        assert isinstance(found, Hello)
        assert looks <= 6

    def test_one_above_the_limit_is_refused_by_its_length(self) -> None:
        data = hello(NAME, extension(21, bytes(40_000)))
        found = refused(data[:9])
        assert (found.kind, found.alert) == ("too_large", 22)


class TestNames:
    @pytest.mark.parametrize(
        ("given", "name"),
        [
            (b"WEB.Example.com", b"web.example.com"),
            (b"web.example.com.", b"web.example.com"),
            (b"localhost", b"localhost"),
            (b"a_b.example", b"a_b.example"),
            (b"xn--bcher-kva.example", b"xn--bcher-kva.example"),
            (b"1and1.example", b"1and1.example"),
            (b"1.2.3.4.example", b"1.2.3.4.example"),
            (b".".join([b"a" * 63] * 3 + [b"b" * 61]), b".".join([b"a" * 63] * 3 + [b"b" * 61])),
        ],
    )
    def test_host_names(self, given: bytes, name: bytes) -> None:
        assert whole(hello(server_name(given))).sni == name

    @pytest.mark.parametrize("given", [b"127.0.0.1", b"192.0.2.255", b"::1", b"2001:DB8::1", b"::ffff:192.0.2.1"])
    def test_an_address_is_no_name(self, given: bytes) -> None:
        """RFC 6066 has none there; clients that are given an address send it all the same."""
        assert whole(hello(server_name(given), alpn(b"http/1.1"))).sni is None

    @pytest.mark.parametrize(
        "given",
        [
            b".", b"..", b".example", b"a..b", b"a b", b"a\0b", b"web.example.com\0", b"web.example.com\n", b"-a.example",
            b"a-.example", b"a" * 64, b".".join([b"a" * 63] * 4), b"127.0.0.1.", b"127.0.0.01", b"256.0.0.1", b"1.2.3", b"42",
            b"0x7f", b"1.2.3.0x4", b"[::1]", b"fe80::1%eth0", b"::g", b"127.0.0.1\0", b"127.0.0.1:443", b"a:443", b"a/b",
            b"a@b", b"\xff.example", b"b\xc3\xbccher.example", b"*.example.com", b"web.example.com..",
        ],
    )  # fmt: skip
    def test_others(self, given: bytes) -> None:
        found = refused(hello(server_name(given)))
        assert (found.kind, found.alert) == ("bad_name", 112)

    def test_none_at_all(self) -> None:
        assert whole(hello(alpn(b"h2"))).sni is None
        assert whole(records(message(body(None)))).sni is None

    @pytest.mark.parametrize(
        "ext",
        [
            server_name(b"a.example", b"b.example"),
            server_name(b"a.example", b"a.example"),
            server_name(b"a.example", kind=1),
        ],
    )
    def test_anything_but_one_host_name(self, ext: bytes) -> None:
        found = refused(hello(ext))
        assert (found.kind, found.alert) == ("bad_name", 47)

    @pytest.mark.parametrize(
        "ext",
        [
            extension(0, b""),
            extension(0, vector(2, b"")),
            server_name(b""),
            extension(0, vector(2, b"\0" + vector(2, b"a.example")) + b"\0"),
            extension(0, vector(2, b"\0\0\x20a.example")),
            extension(0, b"\0\xff\0\0\x09a.example"),
        ],
    )
    def test_lengths_that_do_not_fit(self, ext: bytes) -> None:
        assert refused(hello(ext)).alert == 50


class TestShape:
    @pytest.mark.parametrize(
        "data",
        [b"G", b"GET / HTTP/1.1\r\n\r\n", b"\x80\x2e\x01\x03\x01", b"\0", b"\x15\x03\x01", b"\x16\x02", b"SSH-2.0"],
    )
    def test_what_is_not_tls(self, data: bytes) -> None:
        found = refused(data)
        assert (found.kind, found.alert) == ("not_tls", None)

    @pytest.mark.parametrize(
        ("data", "alert"),
        [
            (b"\x16\x03\x05", 70),
            (b"\x16\x03\x01\0\0", 10),
            (b"\x16\x03\x01\x40\x01", 22),
            (records(message(body(NAME), kind=2)), 10),
            (b"\x16\x03\x01\0\x01\x02", 10),
            (records(message(b"")), 50),
            (records(message(body(NAME)[:-1])), 50),
            (records(message(body(NAME) + b"\0")), 50),
            (records(message(body(NAME)) + b"\0"), 10),
            (records(message(body(NAME)) + message(body(NAME))), 10),
            (records(message(body(NAME)), [60])[:65] + records(message(body(NAME))[60:], kind=23), 10),
            (records(message(body(NAME, session=bytes(33)))), 47),
            (records(message(body(NAME, version=0x0203))), 70),
            (hello(NAME, NAME), 47),
            (hello(NAME, extension(16, b"")), 50),
            (hello(NAME, extension(16, vector(2, b"\0"))), 50),
            (hello(NAME, extension(16, vector(2, b"\x02h2\0"))), 50),
            (hello(NAME, alpn(b"h2")[:-2] + b"\x05h2"), 50),
            (hello(NAME, extension(43, b"")), 50),
            (hello(NAME, extension(43, b"\x03\x03\x04\x03")), 50),
            (hello(NAME, b"\0"), 50),
        ],
    )  # fmt: skip
    def test_what_is_malformed(self, data: bytes, alert: int) -> None:
        found = refused(data)
        assert (found.kind, found.alert) == ("malformed", alert)

    def test_a_record_that_is_announced_beyond_the_message(self) -> None:
        """It is refused before the rest comes: nothing may follow the hello in its record."""
        data = message(body(NAME))
        assert refused(b"\x16\x03\x01" + (len(data) + 1).to_bytes(2) + data[:10]).alert == 10

    @pytest.mark.parametrize(
        "content",
        [
            bytes(34) + vector(1, b"") + vector(2, b"\x13\x01\x13") + vector(1, b"\0") + vector(2, b""),
            bytes(34) + vector(1, b"") + vector(2, b"") + vector(1, b"\0") + vector(2, b"abcd"),
            b"\x03\x03" + bytes(32) + vector(1, b"") + vector(2, b"\x13\x01") + vector(1, b"\x01") + vector(2, b""),
            b"\x03\x03" + bytes(32) + vector(1, b"") + vector(2, b"\x13\x01") + vector(1, b"") + vector(2, b"ab"),
        ],
    )
    def test_other_fields(self, content: bytes) -> None:
        assert refused(records(message(content))).kind == "malformed"

    @settings(max_examples=300, deadline=None)
    @given(st.binary(max_size=300), st.integers(0, 2**32), st.booleans())
    def test_any_bytes_end_in_a_verdict(self, noise: bytes, seed: int, damage: bool) -> None:
        if damage:
            data = bytearray(recorded("curl"))
            for value in noise[:5]:
                data[random.Random(seed + value).randrange(len(data))] = value
            noise = bytes(data)
        found = parse(noise, LIMIT)
        assert isinstance(found, Hello | NeedMore | Invalid)
        if isinstance(found, NeedMore):
            assert found.total > len(noise)
        if isinstance(found, Hello) and found.sni is not None:
            assert found.sni == found.sni.lower() and 0 < len(found.sni) <= 253
