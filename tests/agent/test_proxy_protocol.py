"""The PROXY protocol's headers against the bytes of its specification."""

from __future__ import annotations

import pytest

from portico.agent.proxy_protocol import SIGNATURE, header


class TestVersion1:
    @pytest.mark.parametrize(
        ("peer", "local", "expected"),
        [
            # The specification's own examples (section 2.1), worst case included.
            ("255.255.255.255:65535", "255.255.255.255:65535",
             b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n"),
            ("192.168.0.1:56324", "192.168.0.11:443", b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"),
            ("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535", "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
             b"PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n"),
            ("[2001:db8::7]:50000", "[2001:db8:0:0:0:0:0:1]:7100", b"PROXY TCP6 2001:db8::7 2001:db8::1 50000 7100\r\n"),
            # Both addresses are of one family.
            ("203.0.113.7:1", "[2001:db8::1]:2", b"PROXY TCP6 ::ffff:203.0.113.7 2001:db8::1 1 2\r\n"),
        ],
    )  # fmt: skip
    def test_addresses(self, peer: str, local: str, expected: bytes) -> None:
        made = header(1, peer, local)
        assert made == expected and len(made) <= 107  # the specification's longest line

    @pytest.mark.parametrize(
        "peer", ["", "unix", "203.0.113.7", "203.0.113.7:", "203.0.113.7:65536", "name:1", "1.2.3:4"]
    )
    def test_unknown(self, peer: str) -> None:
        assert header(1, peer, "192.0.2.1:7100") == b"PROXY UNKNOWN\r\n"
        assert header(1, "192.0.2.1:7100", peer) == b"PROXY UNKNOWN\r\n"


class TestVersion2:
    def test_the_signature(self) -> None:
        assert SIGNATURE.hex() == "0d0a0d0a000d0a515549540a"

    def test_ipv4(self) -> None:
        # Version 2 and PROXY; AF_INET and STREAM; 12 bytes: source, destination, source port, destination port.
        assert header(2, "203.0.113.7:50000", "192.0.2.1:7100").hex(" ", 4) == (
            "0d0a0d0a 000d0a51 5549540a 2111000c cb007107 c0000201 c3501bbc"
        )

    def test_ipv6(self) -> None:
        made = header(2, "[2001:db8::7]:50000", "[2001:db8::1]:7100")
        assert made.hex(" ", 4) == (
            "0d0a0d0a 000d0a51 5549540a 21210024 20010db8 00000000 00000000 00000007"
            " 20010db8 00000000 00000000 00000001 c3501bbc"
        )

    def test_both_families(self) -> None:
        made = header(2, "[2001:db8::7]:1", "203.0.113.7:2")
        assert made[12:16].hex() == "21210024"
        assert made[32:48].hex() == "00000000000000000000ffffcb007107"

    def test_local_where_there_is_no_address(self) -> None:
        for peer, local in (("", "192.0.2.1:7100"), ("192.0.2.1:7100", ""), ("", "")):
            assert header(2, peer, local).hex() == "0d0a0d0a000d0a515549540a" + "20000000"
