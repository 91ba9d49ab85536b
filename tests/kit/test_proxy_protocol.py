"""The PROXY protocol's header as it is read: both versions, whatever way it arrives, and nothing else."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from portico.agent.proxy_protocol import header
from portico.kit.proxy_protocol import SIGNATURE, Found, read


def v2(command: int = 0x21, family: int = 0x11, body: bytes = b"") -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(body)) + body


FOUR = bytes([192, 0, 2, 7, 198, 51, 100, 9]) + struct.pack("!HH", 40000, 443)
SIX = ipaddress.ip_address("2001:db8::7").packed + ipaddress.ip_address("2001:db8::9").packed + struct.pack("!HH", 1, 2)
MAPPED = ipaddress.ip_address("::ffff:192.0.2.7").packed * 2 + struct.pack("!HH", 1, 2)
UNIX = b"/run/a.sock".ljust(108, b"\0") + b"/run/b.sock".ljust(108, b"\0")
TLVS = b"\x04\x00\x03abc" + b"\x02\x00\x0bexample.com"

HEADERS = {
    b"PROXY TCP4 192.0.2.7 198.51.100.9 40000 443\r\n": (("192.0.2.7", 40000), ("198.51.100.9", 443)),
    b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n": (("255.255.255.255", 65535),) * 2,
    b"PROXY TCP6 2001:db8::7 2001:db8::9 1 65535\r\n": (("2001:db8::7", 1), ("2001:db8::9", 65535)),
    b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:192.0.2.9 1 2\r\n": (("192.0.2.7", 1), ("192.0.2.9", 2)),
    b"PROXY UNKNOWN\r\n": (None, None),
    b"PROXY UNKNOWN ffff:f...f:ffff 65535 65535\r\n": (None, None),
    v2(body=FOUR): (("192.0.2.7", 40000), ("198.51.100.9", 443)),
    v2(body=FOUR + TLVS): (("192.0.2.7", 40000), ("198.51.100.9", 443)),
    v2(family=0x21, body=SIX): (("2001:db8::7", 1), ("2001:db8::9", 2)),
    v2(family=0x21, body=SIX + b"\x04\xff\xff"): (("2001:db8::7", 1), ("2001:db8::9", 2)),
    v2(family=0x21, body=MAPPED): (("192.0.2.7", 1), ("192.0.2.7", 2)),
    v2(family=0x31, body=UNIX): (("", 0), ("", 0)),
    v2(family=0x00): (None, None),
    v2(family=0x00, body=TLVS): (None, None),
    v2(command=0x20): (None, None),
    v2(command=0x20, family=0x11, body=FOUR): (None, None),
    v2(command=0x20, family=0xFF, body=b"x" * 300): (None, None),
}

GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"proxy TCP4 192.0.2.7 198.51.100.9 40000 443\r\n",
    b"PROXY  TCP4 192.0.2.7 198.51.100.9 40000 443\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.9 40000 443 \r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.9 40000\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.9 40000 443\n\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.9 40000 443\n",
    b"PROXY TCP4 192.0.2.007 198.51.100.9 40000 443\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.9 040000 443\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.9 65536 443\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.9 -1 443\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.9 \xb2 443\r\n",
    b"PROXY TCP4 2001:db8::7 2001:db8::9 1 2\r\n",
    b"PROXY TCP6 192.0.2.7 192.0.2.9 1 2\r\n",
    b"PROXY TCP6 fe80::1%eth0 fe80::2 1 2\r\n",
    b"PROXY UDP4 192.0.2.7 198.51.100.9 40000 443\r\n",
    b"PROXY \r\n",
    b"PROXY\r\n",
    b"PROXY TCP4 " + b"1" * 200,
    b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
    b"\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01",
    v2(command=0x11, body=FOUR),
    v2(command=0x22, body=FOUR),
    v2(command=0x31, body=FOUR),
    v2(family=0x12, body=FOUR),
    v2(family=0x22, body=SIX),
    v2(family=0x32, body=UNIX),
    v2(family=0x41, body=FOUR),
    v2(body=FOUR[:-1]),
    v2(family=0x21, body=FOUR),
    v2(family=0x31, body=UNIX[:-1]),
    v2(family=0x00, body=b"x" * 5000),
]


@pytest.mark.parametrize("data", HEADERS)
def test_a_header_in_any_pieces(data: bytes) -> None:
    source, destination = HEADERS[data]
    for cut in range(len(data)):
        assert read(data[:cut], 4096) is None, cut
    for rest in (b"", b"GET / HTTP/1.1\r\n", b"\r\n", b"PROXY UNKNOWN\r\n", SIGNATURE):
        assert read(data + rest, 4096) == Found(len(data), source, destination)


@pytest.mark.parametrize("data", GARBAGE)
def test_anything_else_is_refused_and_stays_so(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w+"):
        read(data, 4096)
    refused = False
    for cut in range(len(data) + 1):
        try:
            assert read(data[:cut], 4096) is None
            assert not refused, "what was refused once does not become a header by more bytes"
        except ValueError:
            refused = True


def test_the_longest_line_is_taken() -> None:
    longest = b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n"
    assert len(longest) == 107
    assert read(longest) == Found(107, None, None)


def test_the_longest_block_is_within_the_limit_given() -> None:
    data = v2(body=FOUR.ljust(4080, b"\0"))
    assert read(data, 4096) == Found(4096, ("192.0.2.7", 40000), ("198.51.100.9", 443))
    with pytest.raises(ValueError, match="too long"):
        read(v2(body=FOUR.ljust(4081, b"\0"))[:16], 4096)
    assert read(v2(body=FOUR.ljust(65_535, b"\0"))) is not None


addresses = st.ip_addresses().map(str).filter(lambda text: "%" not in text)


@given(
    st.sampled_from([1, 2]), addresses, addresses, st.integers(0, 65535), st.integers(0, 65535), st.binary(max_size=50)
)
@example(1, "::ffff:1.2.3.4", "1.2.3.4", 1, 2, b"")
def test_what_an_agent_writes_is_read_back(version: int, a: str, b: str, port: int, to: int, rest: bytes) -> None:
    def place(address: str, number: int) -> str:
        return f"[{address}]:{number}" if ":" in address else f"{address}:{number}"

    def plain(address: str) -> str:
        found = ipaddress.ip_address(address)
        return str(getattr(found, "ipv4_mapped", None) or found)

    data = header(version, place(a, port), place(b, to))
    assert read(data + rest) == Found(len(data), (plain(a), port), (plain(b), to))


@given(st.binary(max_size=300))
def test_no_bytes_are_a_fault(data: bytes) -> None:
    for start in (b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11"):
        try:
            found = read(start + data, 4096)
        except ValueError:
            continue
        assert found is None or 0 < found.length <= len(start + data)
