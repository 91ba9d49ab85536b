"""The PROXY protocol's header, versions 1 and 2, as it is read: who a connection is from, in the word of the proxy before us.

    found = read(received)       # None: more has to come; ``ValueError``: it is no such header
    received[found.length:]      # what the client itself sent

https://www.haproxy.org/download/1.8/doc/proxy-protocol.txt (sections 2.1 and 2.2). What is not exactly a header is refused at the
first byte that shows it: a reader that is lenient here reads a stranger's bytes as the proxy's word.
"""

from __future__ import annotations

import struct
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Final, NamedTuple

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
LOCAL, PROXY = 0x20, 0x21
TCP4, TCP6 = 0x11, 0x21
HEAD: Final = struct.Struct("!12sBBH")
ADDRESSES_4: Final = struct.Struct("!4s4sHH")
ADDRESSES_6: Final = struct.Struct("!16s16sHH")

_UNSPEC, _UNIX = 0x00, 0x31
_UNIX_SIZE: Final = 216
_WORD_1: Final = b"PROXY "
#: Bytes of a version 1 header with its line end.
_MAX_1: Final = 107

Place = tuple[str, int]


class Found(NamedTuple):
    """A header: its length in bytes, and where the connection came from and went to.

    Both are ``None`` when the proxy speaks for itself (a health check) or does not know: the connection's own ends hold then.
    The address of a visitor on a Unix socket is empty.
    """

    length: int
    source: Place | None
    destination: Place | None


def read(data: bytes, most: int = 65_551) -> Found | None:
    """The header at the start of ``data``; ``None`` while it may become one. Raises ``ValueError`` for anything else, and for
    one of more than ``most`` bytes."""
    if data[:1] == _WORD_1[:1]:
        return _read_1(data, most)
    if data[: len(SIGNATURE)] != SIGNATURE[: len(data)]:
        raise ValueError("no PROXY header")
    return _read_2(data, most)


def _read_1(data: bytes, most: int) -> Found | None:
    if data[: len(_WORD_1)] != _WORD_1[: len(data)]:
        raise ValueError("no PROXY header")
    most = min(most, _MAX_1)
    end = data.find(b"\r\n", 0, most)
    if end < 0:
        if len(data) >= most or b"\n" in data:
            raise ValueError("the PROXY line does not end")
        return None
    words = data[:end].decode("latin-1").split(" ")[1:]
    if words[0] == "UNKNOWN":
        return Found(end + 2, None, None)
    if len(words) != 5 or words[0] not in ("TCP4", "TCP6"):
        raise ValueError("the PROXY line has other parts")
    family = IPv4Address if words[0] == "TCP4" else IPv6Address
    return Found(end + 2, (_address(family, words[1]), _port(words[3])), (_address(family, words[2]), _port(words[4])))


def _read_2(data: bytes, most: int) -> Found | None:
    if len(data) < HEAD.size:
        if len(data) > 12 and data[12] not in (LOCAL, PROXY):
            raise ValueError("the PROXY header has another version or command")
        return None
    _, command, family, size = HEAD.unpack_from(data)
    if command not in (LOCAL, PROXY):
        raise ValueError("the PROXY header has another version or command")
    length = HEAD.size + size
    if length > most:
        raise ValueError("the PROXY header is too long")
    least = _least_2(command, family)
    if size < least:
        raise ValueError("the PROXY header is shorter than its addresses")
    if len(data) < length:
        return None
    if command == LOCAL or family == _UNSPEC:
        return Found(length, None, None)
    if family == _UNIX:
        return Found(length, ("", 0), ("", 0))
    v4 = family == TCP4
    source, to, port, to_port = (ADDRESSES_4 if v4 else ADDRESSES_6).unpack_from(data, HEAD.size)
    made = IPv4Address if v4 else IPv6Address
    return Found(length, (_text(made(source)), port), (_text(made(to)), to_port))


def _least_2(command: int, family: int) -> int:
    """Bytes of the addresses of a family; raises for one that no TCP connection has."""
    if command == LOCAL or family == _UNSPEC:
        return 0
    sizes = {TCP4: ADDRESSES_4.size, TCP6: ADDRESSES_6.size, _UNIX: _UNIX_SIZE}
    if family not in sizes:
        raise ValueError("the PROXY header has a family that is none of TCP's")
    return sizes[family]


def _address(family: type[IPv4Address | IPv6Address], text: str) -> str:
    if "%" in text:
        raise ValueError("the PROXY line has an address with a zone")
    try:
        return _text(family(text))
    except AddressValueError:
        raise ValueError("the PROXY line has no address where one must be") from None


def _text(address: IPv4Address | IPv6Address) -> str:
    """As everywhere: of a mapped address the IPv4 one."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def _port(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else -1
    if not 0 <= number < 65_536 or str(number) != text:
        raise ValueError("the PROXY line has no port where one must be")
    return number
