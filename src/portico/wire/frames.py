"""The codec of ``portico.v1``: frames, heads and JSON payloads, to and from bytes (``contracts/wire.md`` sections 2 and 6).

Everything here is a pure function. Malformed input raises :class:`WireError` and nothing else; no function allocates more
than a small multiple of its input.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from struct import Struct
from typing import Any

PROTOCOL = "portico.v1"
VERSION = 1

MAX_PAYLOAD = 65_536
MAX_MESSAGE = 1_048_576
MAX_JSON = 16_384
MAX_FIELDS = 256
MAX_RESET_DETAIL = 512
MAX_CREDIT = 2**31 - 1
STREAM_WINDOW = 65_536
SESSION_WINDOW = 16_777_216

HELLO, BIND, BOUND, REFUSED, UNBIND, GOAWAY, ERROR, AUTH, AUTHED, COUNTS = range(0x01, 0x0B)
REQUEST, RESPONSE, INTERIM, DATA, END, RESET, CREDIT, PING, PONG, OPEN, OPENED, ANSWER = range(0x10, 0x1C)

NAMES = {
    value: name
    for name, value in list(globals().items())
    if name.isupper()
    and isinstance(value, int)
    and (0x01 <= value <= 0x0A or 0x10 <= value <= 0x1B)
    and name != "VERSION"
}

F_END, F_UPGRADE, F_TRAILERS = 0x01, 0x02, 0x04
#: The flag bits that each type defines; any other bit is a protocol error.
FLAGS = {REQUEST: F_END | F_UPGRADE | F_TRAILERS, RESPONSE: F_END, DATA: F_END}

HEADER = Struct("!BBII")
HEADER_SIZE = HEADER.size
U16 = Struct("!H")
U32 = Struct("!I")

# RESET codes
(
    NO_ERROR,
    CANCELLED,
    TARGET_REFUSED,
    TARGET_TIMEOUT,
    TARGET_INVALID,
    TARGET_RESET,
    INTERNAL,
    FLOW_CONTROL,
    NO_SUCH_BIND,
    TOO_MANY_STREAMS,
    IDLE_TIMEOUT,
    REQUEST_INVALID,
    RATE_LIMITED,
) = range(13)

Fields = list[bytes]
"""A flat head: ``[name, value, name, value, …]``, in order, repetitions kept."""


class WireError(Exception):
    """The peer broke the protocol; the session ends with ERROR. ``code`` is a stable code of ``contracts/errors.toml``."""

    def __init__(self, detail: str, code: str = "wire.protocol_error") -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


def frame(kind: int, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """One frame, ready to send. The caller keeps ``payload`` within :data:`MAX_PAYLOAD`."""
    return HEADER.pack(kind, flags, stream, len(payload)) + payload


def json_frame(kind: int, stream: int, body: dict[str, Any]) -> bytes:
    """One frame with a JSON payload; raises ``ValueError`` when the body is over the limit (a fault of our own)."""
    payload = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    if len(payload) > MAX_JSON:
        raise ValueError(f"{NAMES[kind]} payload of {len(payload)} bytes is over {MAX_JSON}")
    return frame(kind, stream, payload)


def _no_constant(name: str) -> None:
    """NaN and Infinity are Python's own addition to JSON."""
    raise ValueError(name)


def decode_json(kind: int, payload: bytes) -> dict[str, Any]:
    """The JSON object of a control frame; raises :class:`WireError` for anything else."""
    if len(payload) > MAX_JSON:
        raise WireError(f"{NAMES[kind]} payload over {MAX_JSON} bytes")
    try:
        # Decoded first: json.loads would take UTF-16 too, and two encodings are two readings.
        body = json.loads(payload.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise WireError(f"{NAMES[kind]} payload is not JSON") from None
    if not isinstance(body, dict):
        raise WireError(f"{NAMES[kind]} payload is not an object")
    return body


def member(kind: int, body: dict[str, Any], name: str, of: type | tuple[type, ...]) -> Any:
    """A required member of a JSON payload with its type checked; raises :class:`WireError`."""
    value = body.get(name)
    if not isinstance(value, of) or (isinstance(value, bool) and of is int):
        raise WireError(f"{NAMES[kind]} lacks a valid {name!r}")
    if isinstance(value, str) and _SURROGATE.search(value):
        raise WireError(f"{NAMES[kind]} has half a surrogate pair in {name!r}")
    return value


def count(kind: int, body: dict[str, Any], name: str, least: int = 0, most: int = 2**53 - 1) -> int:
    """A required integer member within its range; raises :class:`WireError`."""
    value: int = member(kind, body, name, int)
    if not least <= value <= most:
        raise WireError(f"{NAMES[kind]} has {name!r} out of range")
    return value


_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TARGET = re.compile(rb"[\x21-\x7e\x80-\xff]+")
#: Octets that no field of a head may contain: control characters other than NUL (the separator) and HTAB.
_FORBIDDEN = bytes((*range(0x01, 0x09), *range(0x0A, 0x20), 0x7F))
#: One more part than the fullest valid head has, so that a payload of NULs is not split into 65,536 parts.
_MAX_SPLIT = 2 + 2 * MAX_FIELDS
_KNOWN_NAMES: set[bytes] = set()
_KNOWN_NAMES_MAX = 4096


def _is_token(name: bytes) -> bool:
    """Whether ``name`` is a token; the names seen so far are remembered (bounded), since heads repeat them."""
    if name in _KNOWN_NAMES:
        return True
    if _TOKEN.fullmatch(name) is None:
        return False
    if len(_KNOWN_NAMES) >= _KNOWN_NAMES_MAX:
        # Someone sends made-up names; the usual ones are back after a few heads.
        _KNOWN_NAMES.clear()
    _KNOWN_NAMES.add(name)
    return True


def check_fields(fields: Sequence[bytes], start: int) -> None:
    """Refuse a flat head whose names are not tokens or which has too many or unpaired fields."""
    if (len(fields) - start) & 1:
        raise WireError("head has a name without a value")
    if len(fields) - start > 2 * MAX_FIELDS:
        raise WireError(f"head has more than {MAX_FIELDS} fields")
    names = fields[start::2]
    if not _KNOWN_NAMES.issuperset(names):
        for name in names:
            if not _is_token(name):
                raise WireError("head has a field name that is not a token")


def is_clean(payload: bytes) -> bool:
    """Whether a head has no octet that no field may contain (NUL, which separates fields, does not count)."""
    return len(payload.translate(None, _FORBIDDEN)) == len(payload)


def _split(payload: bytes) -> list[bytes]:
    if not is_clean(payload):
        raise WireError("head contains a control character")
    return payload.split(b"\0", _MAX_SPLIT)


def _join(head: Sequence[bytes], start: int, room: int, names_checked: bool = False) -> bytes:
    """A flat head as payload; raises ``ValueError`` for one that the other side would have to refuse.

    A head comes from a visitor or a target. Were it sent unchecked, a strange one would end the session for all.
    """
    payload = b"\0".join(head)
    if payload.count(b"\0") != len(head) - 1 or not is_clean(payload):
        raise ValueError("head has a control character in a field")
    if len(payload) > MAX_PAYLOAD - room:
        raise ValueError(f"head of {len(payload)} bytes")
    if names_checked and len(head) - start <= 2 * MAX_FIELDS:
        return payload
    try:
        check_fields(head, start)
    except WireError as err:
        raise ValueError(err.detail) from None
    return payload


def encode_request(bind: int, head: Sequence[bytes], parsed: bool = False) -> bytes:
    """REQUEST payload; ``head`` is flat: method, target, then names and values. Raises ``ValueError`` as :func:`_join`.

    ``parsed``: method, target and names come out of a strict HTTP parser, which has checked their characters already,
    and no name is longer than 256 octets: the caller answers for that.
    """
    payload = _join(head, 2, U32.size, parsed)
    if parsed:
        return U32.pack(bind) + payload
    if not _is_token(head[0]) or _TARGET.fullmatch(head[1]) is None:
        raise ValueError("head has no valid method and target")
    return U32.pack(bind) + payload


def decode_request(payload: bytes) -> tuple[int, list[bytes]]:
    """``(bind, [method, target, name, value, …])``; raises :class:`WireError`."""
    if len(payload) < 7:
        raise WireError("REQUEST is too short")
    head = _split(payload[4:])
    if len(head) < 2 or not _is_token(head[0]) or _TARGET.fullmatch(head[1]) is None:
        raise WireError("REQUEST has no valid method and target")
    check_fields(head, 2)
    return U32.unpack_from(payload)[0], head


def encode_response(status: int, head: Sequence[bytes]) -> bytes:
    """RESPONSE or INTERIM payload; ``head`` is flat: reason, then names and values. Raises ``ValueError`` as :func:`_join`."""
    if not 100 <= status <= 599:
        raise ValueError(f"status {status}")
    return U16.pack(status) + _join(head, 1, U16.size)


def decode_response(payload: bytes) -> tuple[int, list[bytes]]:
    """``(status, [reason, name, value, …])``; raises :class:`WireError`."""
    if len(payload) < 2:
        raise WireError("RESPONSE is too short")
    status = payload[0] << 8 | payload[1]
    if not 100 <= status <= 599:
        raise WireError(f"RESPONSE has status {status}")
    head = _split(payload[2:])
    check_fields(head, 1)
    return status, head


def encode_answer(response: bytes) -> bytes:
    """The beginning of an ANSWER payload, up to the body, from a RESPONSE payload."""
    return U16.pack(len(response)) + response


def decode_answer(payload: bytes) -> tuple[bytes, bytes]:
    """``(RESPONSE payload, body)`` of an ANSWER; raises :class:`WireError` when it is cut short."""
    start = 2 + (payload[0] << 8 | payload[1]) if len(payload) >= 2 else 2
    if start > len(payload):
        raise WireError("ANSWER is too short")
    return payload[2:start], payload[start:]


def encode_trailers(fields: Sequence[bytes]) -> bytes:
    """END payload; ``fields`` is flat: names and values, may be empty. Raises ``ValueError`` as :func:`_join`."""
    return _join(fields, 0, 0) if fields else b""


def decode_trailers(payload: bytes) -> Fields:
    """The flat trailer fields of an END frame; raises :class:`WireError`."""
    if not payload:
        return []
    fields = _split(payload)
    check_fields(fields, 0)
    return fields


def encode_reset(code: int, detail: str) -> bytes:
    """RESET payload; the detail is cut to its limit without breaking a character."""
    return U16.pack(code) + detail.encode(errors="replace")[:MAX_RESET_DETAIL].decode(errors="ignore").encode()


def decode_reset(payload: bytes) -> tuple[int, str]:
    """``(code, detail)``; an unknown code is kept, broken UTF-8 is replaced; raises :class:`WireError` on a bad length."""
    if not 2 <= len(payload) <= 2 + MAX_RESET_DETAIL:
        raise WireError("RESET has a bad length")
    return payload[0] << 8 | payload[1], payload[2:].decode(errors="replace")
