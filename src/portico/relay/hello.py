"""What a TLS client says first, read without answering it: strict, without I/O, from the bytes that came so far.

:func:`parse` is given everything that came on the connection. It says how much more it needs at least, what the ClientHello
says, or why this is none. The message may be cut into records, and these into segments, in any way; what follows it (early
data) is not looked at. RFC 8446, 4.1.2 and 5.1; names RFC 6066, 3; ALPN RFC 7301, 3.1; Encrypted Client Hello RFC 9849, 5.

It is stricter than TLS libraries are: whoever stands behind this relay (an agent's own TLS server) must not be able to read
another name out of the same bytes. An IP address in the place of the name is no name (RFC 6066 has no addresses there, but
clients send them when one is in their URL): such a connection is never passed through.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

RECORD_HEADER: Final = 5
MESSAGE_HEADER: Final = 4
#: Bytes of one record in clear text.
MAX_RECORD: Final = 16_384
#: Bytes of the shortest hello: version, random, empty session id, one suite, one compression method.
_SHORTEST: Final = 2 + 32 + 1 + 2 + 2 + 1 + 1
_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_SERVER_NAME, _ALPN, _SUPPORTED_VERSIONS, _ECH = 0, 16, 43, 0xFE0D

# Alert descriptions (RFC 8446, 6).
UNEXPECTED_MESSAGE: Final = 10
RECORD_OVERFLOW: Final = 22
HANDSHAKE_FAILURE: Final = 40
ILLEGAL_PARAMETER: Final = 47
DECODE_ERROR: Final = 50
PROTOCOL_VERSION: Final = 70
INTERNAL_ERROR: Final = 80
UNRECOGNIZED_NAME: Final = 112
NO_APPLICATION_PROTOCOL: Final = 120

#: Host names as DNS has them, with the underscore that some have; the last label is not a number (that would be an address).
_NAME: Final = re.compile(
    rb"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*(?!(?:[0-9]+|0x[0-9a-f]*)\Z)[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
)
#: What an IP address is written with; no scope, no brackets.
_ADDRESS: Final = re.compile(rb"[0-9a-f.:]{2,45}")


@dataclass(frozen=True, slots=True)
class Hello:
    """A whole ClientHello. ``sni`` is lower-case and without trailing dot; ``None`` for an IP address. ``ech``: the extension
    is there, in earnest or as grease (which look alike). ``versions`` are those offered, as on the wire (0x0304 is TLS 1.3).
    ``size``: bytes from the connection's start to the end of the record that ends it."""

    sni: bytes | None
    alpn: tuple[bytes, ...]
    ech: bool
    versions: tuple[int, ...]
    session_id: bytes
    size: int


class NeedMore(NamedTuple):
    """Nothing can be said before ``total`` bytes are there, counted from the connection's start."""

    total: int


class Invalid(NamedTuple):
    """No hello will come of it. ``kind`` is what statistics count, ``alert`` what to answer (``None``: it is not TLS)."""

    kind: Literal["not_tls", "malformed", "too_large", "bad_name"]
    why: str
    alert: int | None


class _Fault(Exception):
    def __init__(
        self, why: str, alert: int = DECODE_ERROR, kind: Literal["malformed", "bad_name"] = "malformed"
    ) -> None:
        super().__init__(why)
        self.invalid = Invalid(kind, why, alert)


def parse(data: bytes | bytearray | memoryview, limit: int) -> Hello | NeedMore | Invalid:
    """What ``data`` says, everything that came on a connection. ``limit``: bytes that the message may have."""
    message = bytearray()
    at, wanted, have = 0, MESSAGE_HEADER + _SHORTEST, len(data)
    while True:
        if (refused := _record_refused(data[at : at + RECORD_HEADER], at)) is not None:
            return refused
        if have < at + RECORD_HEADER:
            # At least one more record, with all that is missing if it can hold that much.
            return NeedMore(at + RECORD_HEADER + (min(wanted - len(message), MAX_RECORD) if at else 0))
        size = data[at + 3] << 8 | data[at + 4]
        part = data[at + RECORD_HEADER : at + RECORD_HEADER + size]
        message += part
        if len(message) >= 1 and message[0] != _CLIENT_HELLO:
            return Invalid("malformed", "the first message is no ClientHello", UNEXPECTED_MESSAGE)
        if len(message) >= MESSAGE_HEADER:
            wanted = MESSAGE_HEADER + int.from_bytes(message[1:4])
            if wanted > limit:
                return Invalid("too_large", f"a ClientHello of {wanted} bytes", RECORD_OVERFLOW)
            if wanted < MESSAGE_HEADER + _SHORTEST:
                return Invalid("malformed", "the ClientHello is too short", DECODE_ERROR)
        if len(message) > wanted:
            return Invalid("malformed", "something follows the ClientHello in its record", UNEXPECTED_MESSAGE)
        if len(part) < size:
            beyond = wanted - len(message) - (size - len(part))
            if beyond < 0 and len(message) >= MESSAGE_HEADER:
                return Invalid("malformed", "a record goes beyond the ClientHello", UNEXPECTED_MESSAGE)
            more = RECORD_HEADER + min(beyond, MAX_RECORD) if beyond > 0 else 0
            return NeedMore(at + RECORD_HEADER + size + more)
        at += RECORD_HEADER + size
        if len(message) == wanted:
            try:
                return _hello(_Reader(bytes(message[MESSAGE_HEADER:])), at)
            except _Fault as fault:
                return fault.invalid


def _record_refused(head: bytes | bytearray | memoryview, at: int) -> Invalid | None:
    """Why what there is of a record's header begins no handshake record."""
    if len(head) >= 1 and head[0] != _HANDSHAKE:
        if at == 0:
            return Invalid("not_tls", "it does not begin like TLS", None)
        return Invalid("malformed", "another record within the ClientHello", UNEXPECTED_MESSAGE)
    if len(head) >= 2 and head[1] != 3:
        return Invalid("not_tls", "it does not begin like TLS", None)
    if len(head) >= 3 and head[2] > 4:
        return Invalid("malformed", "a record of an unknown version", PROTOCOL_VERSION)
    if len(head) >= RECORD_HEADER:
        size = head[3] << 8 | head[4]
        if size == 0:
            return Invalid("malformed", "an empty record", UNEXPECTED_MESSAGE)
        if size > MAX_RECORD:
            return Invalid("malformed", f"a record of {size} bytes", RECORD_OVERFLOW)
    return None


class _Reader:
    """Takes values off the front of bytes; raises :class:`_Fault` where they end early or late."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise _Fault("a length goes beyond its field")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, prefix: int, least: int, what: str) -> bytes:
        """The value behind a length of ``prefix`` bytes; of at least ``least`` bytes."""
        value = self.take(self.number(prefix))
        if len(value) < least:
            raise _Fault(f"{what} is too short")
        return value

    def end(self, what: str) -> None:
        if self.left:
            raise _Fault(f"{self.left} bytes follow {what}")


def _hello(body: _Reader, size: int) -> Hello:
    version = body.number(2)
    if version >> 8 != 3:
        raise _Fault("an unknown version", PROTOCOL_VERSION)
    body.take(32)
    session_id = body.vector(1, 0, "the session id")
    if len(session_id) > 32:
        raise _Fault("the session id is too long", ILLEGAL_PARAMETER)
    if len(body.vector(2, 2, "the list of cipher suites")) % 2:
        raise _Fault("half a cipher suite")
    if 0 not in body.vector(1, 1, "the list of compression methods"):
        raise _Fault("no compression is not offered", ILLEGAL_PARAMETER)
    found = _extensions(body.vector(2, 0, "the extensions") if body.left else b"")
    body.end("the extensions")
    return Hello(
        sni=_server_name(found[_SERVER_NAME]) if _SERVER_NAME in found else None,
        alpn=_protocols(found[_ALPN]) if _ALPN in found else (),
        ech=_ECH in found,
        versions=_versions(found[_SUPPORTED_VERSIONS]) if _SUPPORTED_VERSIONS in found else (version,),
        session_id=session_id,
        size=size,
    )


def _extensions(data: bytes) -> dict[int, bytes]:
    """By plain arithmetic: there are a dozen of them in every hello."""
    found: dict[int, bytes] = {}
    at, end = 0, len(data)
    while at < end:
        start = at + 4
        if start > end:
            raise _Fault("half an extension")
        kind = data[at] << 8 | data[at + 1]
        at = start + (data[at + 2] << 8 | data[at + 3])
        if at > end:
            raise _Fault("a length goes beyond its field")
        if kind in found:
            raise _Fault(f"extension {kind} comes twice", ILLEGAL_PARAMETER)
        found[kind] = data[start:at]
    return found


def _server_name(value: bytes) -> bytes | None:
    """The one name of the extension; ``None`` where an IP address stands in its place."""
    outer = _Reader(value)
    names = _Reader(outer.vector(2, 1, "the list of server names"))
    outer.end("the server names")
    if names.number(1) != 0:
        raise _Fault("a server name that is no host name", ILLEGAL_PARAMETER, "bad_name")
    name = names.vector(2, 1, "the server name").lower()
    if names.left:
        raise _Fault("more than one server name", ILLEGAL_PARAMETER, "bad_name")
    if _is_address(name):
        return None
    name = name.removesuffix(b".")
    if _NAME.fullmatch(name) is None:
        raise _Fault("the server name is no host name", UNRECOGNIZED_NAME, "bad_name")
    return name


def _is_address(name: bytes) -> bool:
    if _ADDRESS.fullmatch(name) is None:
        return False
    try:
        ipaddress.ip_address(name.decode("ascii"))
    except ValueError:
        return False
    return True


def _protocols(value: bytes) -> tuple[bytes, ...]:
    outer = _Reader(value)
    names = _Reader(outer.vector(2, 2, "the list of protocols"))
    outer.end("the protocols")
    found: list[bytes] = []
    while names.left:
        found.append(names.vector(1, 1, "a protocol's name"))
    return tuple(found)


def _versions(value: bytes) -> tuple[int, ...]:
    outer = _Reader(value)
    offered = outer.vector(1, 2, "the list of versions")
    outer.end("the versions")
    if len(offered) % 2:
        raise _Fault("half a version")
    return tuple(offered[at] << 8 | offered[at + 1] for at in range(0, len(offered), 2))


def alert(description: int) -> bytes:
    """The record of a fatal alert, as it is sent before anything is agreed (RFC 8446, 5.1 and 6)."""
    return bytes((21, 3, 3, 0, 2, 2, description))
