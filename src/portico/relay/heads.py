"""Request and response heads between HTTP/1 and the wire: which fields pass, which are ours (RFC 9110, 7.6.1; RFC 7239).

Heads repeat their field names, so each spelling is classified once and looked up afterwards (a bounded table).
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from portico.kit.memo import Memo
from portico.wire import frames as f

PASS, DROP, CONNECTION, HOST, LENGTH, ENCODING, UPGRADE, TE, TOO_LONG = range(9)

#: Bytes of a field name, as many as a frame carries: a longer one would end the agent's session.
MAX_NAME = 256

_HOP_BY_HOP = (b"keep-alive", b"proxy-connection", b"proxy-authorization", b"proxy-authenticate", b"http2-settings")
#: Fields that only the relay may tell the target; a visitor's own values are not believed.
_OURS_IN_REQUEST = (
    b"forwarded",
    b"x-forwarded-for",
    b"x-forwarded-proto",
    b"x-forwarded-host",
    b"x-forwarded-port",
    b"x-forwarded-scheme",
    b"x-request-id",
)

_REQUEST_KINDS = {
    **dict.fromkeys((*_HOP_BY_HOP, *_OURS_IN_REQUEST, b"trailer"), DROP),
    b"connection": CONNECTION,
    b"host": HOST,
    b"content-length": LENGTH,
    b"transfer-encoding": ENCODING,
    b"upgrade": UPGRADE,
    b"te": TE,
}
_RESPONSE_KINDS = {
    **dict.fromkeys((*_HOP_BY_HOP, b"te", b"portico-error", b"transfer-encoding", b"connection"), DROP),
    b"content-length": LENGTH,
    b"upgrade": UPGRADE,
}
#: Trailer fields that could change what the message means (RFC 9110, 6.5.1).
_NOT_IN_TRAILERS = frozenset(
    {
        *_HOP_BY_HOP,
        *_OURS_IN_REQUEST,
        *(
            b"portico-error",
            b"connection",
            b"host",
            b"content-length",
            b"transfer-encoding",
            b"upgrade",
            b"te",
            b"trailer",
        ),
        *(
            b"authorization",
            b"cookie",
            b"set-cookie",
            b"content-type",
            b"content-encoding",
            b"content-range",
            b"expect",
        ),
        *(b"cache-control", b"location"),
    }
)

_TABLE_MAX = 4096
#: Bytes of a request line that is looked up instead of parsed.
LINE_MAX = 512
_PLANS_MAX = 2048
#: Names in a sequence that is remembered, and bytes in them: no browser's head has more, and others fill memory.
_PLAN_NAMES_MAX = 64
_PLAN_BYTES_MAX = 1536


def poses(name: bytes, kinds: Container[bytes]) -> bool:
    """Whether a lower-case name is a forwarding field, known to us or not, or one of ``kinds`` with an underscore for a hyphen.

    CGI, WSGI and their like make the same variable of ``X-Forwarded-For`` and ``X_Forwarded_For``: an app that trusts the one
    would believe a visitor's other.
    """
    hyphens = name.replace(b"_", b"-")
    return hyphens.startswith(b"x-forwarded-") or (hyphens != name and hyphens in kinds)


class FieldKinds(dict[bytes, int]):
    """Field name in any spelling → kind; learns the spellings that it meets, up to a bound.

    ``alike``: names that an app could take for one of ``kinds``, or for a forwarding field, are dropped (:func:`poses`).
    """

    def __init__(self, kinds: dict[bytes, int], *, alike: bool = False) -> None:
        super().__init__(kinds)
        self._kinds = dict(kinds)
        self._alike = alike

    def __missing__(self, name: bytes) -> int:
        if len(name) > MAX_NAME:
            return TOO_LONG
        kind = self._kinds.get(name.lower(), PASS)
        if kind == PASS and self._alike and poses(name.lower(), self._kinds):
            kind = DROP
        if len(self) < _TABLE_MAX:
            self[name] = kind
        return kind


REQUEST_KINDS = FieldKinds(_REQUEST_KINDS, alike=True)
RESPONSE_KINDS = FieldKinds(_RESPONSE_KINDS)


class RequestPlan(NamedTuple):
    """Where the fields stand among flat fields of these names: positions of values, 0 for an absent one; names to drop."""

    host: int
    length: int
    connection: int
    drop: tuple[int, ...]


class RequestPlans(dict[tuple[bytes, ...], "RequestPlan | None"]):
    """Sequence of field names → plan, or ``None`` for one that must be read field by field. Browsers repeat themselves."""

    def __missing__(self, names: tuple[bytes, ...]) -> RequestPlan | None:
        plan = _request_plan(names)
        if not _worth_keeping(names):
            return plan
        if len(self) >= _PLANS_MAX:
            self.clear()
        self[names] = plan
        return plan


def _worth_keeping(names: tuple[bytes, ...]) -> bool:
    return len(names) <= _PLAN_NAMES_MAX and sum(map(len, names)) <= _PLAN_BYTES_MAX


def _request_plan(names: tuple[bytes, ...]) -> RequestPlan | None:
    at = {HOST: 0, LENGTH: 0, CONNECTION: 0}
    drop = []
    for index, name in enumerate(names):
        kind = REQUEST_KINDS[name]
        if kind in at and not at[kind]:
            at[kind] = 2 * index + 1
        elif kind not in (PASS, DROP):
            return None
        if kind in (DROP, CONNECTION):
            drop.append(2 * index)
    return RequestPlan(at[HOST], at[LENGTH], at[CONNECTION], tuple(reversed(drop))) if at[HOST] else None


class ResponsePlans(dict[tuple[bytes, ...], "tuple[bytes, int] | None"]):
    """Sequence of field names → a template for the values, and where Content-Length stands (0: absent); ``None`` as above."""

    def __missing__(self, names: tuple[bytes, ...]) -> tuple[bytes, int] | None:
        plan = _response_plan(names)
        if not _worth_keeping(names):
            return plan
        if len(self) >= _PLANS_MAX:
            self.clear()
        self[names] = plan
        return plan


def _response_plan(names: tuple[bytes, ...]) -> tuple[bytes, int] | None:
    template, length = [], 0
    for index, name in enumerate(names):
        kind = RESPONSE_KINDS[name]
        if kind == UPGRADE or (kind == LENGTH and length):
            return None
        if kind == LENGTH:
            length = 2 * index + 2
        # A value that is not passed on is formatted with no place for it.
        template.append(name.replace(b"%", b"%%") + b": %b\r\n" if kind == PASS else b"%.0b")
    return b"".join(template), length


REQUEST_PLANS = RequestPlans()
RESPONSE_PLANS = ResponsePlans()
#: Values of ``Connection`` that name no field.
PLAIN_CONNECTION = frozenset((b"keep-alive", b"Keep-Alive", b"close", b"Close"))

_HOST = re.compile(
    rb"([A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252}[A-Za-z0-9_])?)\.?(?::([0-9]{1,5}))?|\[[0-9A-Fa-f:.]{2,45}\](?::[0-9]{1,5})?"
)
_ABSOLUTE = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?#@]+)(|[/?][^#]*)")


def normal_host(value: bytes) -> bytes | None:
    """The host of a ``Host`` value, lower-case and without port and trailing dot; ``None`` when it is not one."""
    match = _HOST.fullmatch(value)
    if match is None:
        return None
    return (match.group(1) or value[: value.index(b"]") + 1]).lower()


def origin_form(target: bytes, method: bytes, host: bytes) -> bytes | None:
    """The origin-form of a request target (RFC 9112, 3.2), or ``None`` when it has no meaning here.

    An absolute-form target is accepted only for the host that ``Host`` names: routing by one and forwarding the other
    is how requests are smuggled past a check.
    """
    if target[:1] == b"/":
        return target
    if target == b"*":
        return target if method == b"OPTIONS" else None
    match = _ABSOLUTE.fullmatch(target)
    if match is None or match.group(1).lower() != host.lower():
        return None
    rest = match.group(2)
    return rest if rest[:1] == b"/" else b"/" + rest


def tokens(value: bytes) -> list[bytes]:
    """The comma-separated members of a field value, lower-case, without parameters' white space."""
    return [part.strip().lower() for part in value.split(b",") if part.strip()]


def without(fields: list[bytes], names: Container[bytes]) -> list[bytes]:
    """Flat fields without those of these lower-case names."""
    kept: list[bytes] = []
    for at in range(0, len(fields), 2):
        if fields[at].lower() not in names:
            kept += fields[at : at + 2]
    return kept


def trailers(fields: list[bytes]) -> list[bytes]:
    """The flat trailer fields that may be passed on."""
    kept: list[bytes] = []
    for at in range(0, len(fields), 2):
        name = fields[at].lower()
        if name not in _NOT_IN_TRAILERS and not poses(name, _NOT_IN_TRAILERS):
            kept += fields[at : at + 2]
    return kept


def wire_fields(fields: Sequence[bytes]) -> bytes:
    """Flat fields as a REQUEST payload has them behind the target, each with its NUL before it.

    They come out of the strict parser, which checked names and values but for control characters in odd places; raises
    ``ValueError`` for those.
    """
    if not fields:
        return b""
    payload = b"\0" + b"\0".join(fields)
    if payload.count(b"\0") != len(fields) or not f.is_clean(payload):
        raise ValueError("head has a control character in a field")
    return payload


@dataclass(slots=True, eq=False)
class KnownHead:
    """The fields of a request without a body, as the parser read them: what is the same when they come again."""

    host: bytes
    fields: list[bytes]
    wire: bytes
    keep_alive: bool


#: Header section (with the empty line at its end) of a request without a body → what it says.
KNOWN_HEADS: Memo[KnownHead] = Memo(1024, 2048)
_PLAIN_LINE = re.compile(rb"(GET|OPTIONS|DELETE) (/[A-Za-z0-9/._~!$&'()*+,;=:@%?-]*) HTTP/1\.1")


class PlainLines(dict[bytes, "bytes | None"]):
    """Request line → method and target as a frame has them, or ``None`` where a parser must read it; the latest are kept.

    Plain is a line without a body to come, with an answer's usual framing (not HEAD), and a path of plain characters.
    """

    def __missing__(self, line: bytes) -> bytes | None:
        match = _PLAIN_LINE.fullmatch(line)
        if match is None or len(line) > LINE_MAX:
            return None
        if len(self) >= _TABLE_MAX:
            self.clear()
        found = self[line] = match[1] + b"\0" + match[2]
        return found


PLAIN_LINES = PlainLines()


class KnownAnswer(NamedTuple):
    """An answer's head as it is written to an HTTP/1.1 visitor that keeps its connection; ``length`` of the body in bytes.

    ``kind``: the class of the status, 2 to 5.
    """

    text: bytes
    length: int
    kind: int


#: RESPONSE payload → the head for an ordinary visitor.
KNOWN_ANSWERS: Memo[KnownAnswer] = Memo(2048, 2048)


def forwarding(client: str, scheme: bytes, host: bytes, port: int) -> tuple[bytes, ...]:
    """The forwarding fields of one connection and host, flat (RFC 7239 and its customary forerunners)."""
    address = client.encode() or b"unknown"
    node = b'"[%b]"' % address if b":" in address else address
    named = host if b":" not in host else b'"%b"' % host
    return (
        *(b"X-Forwarded-For", address, b"X-Forwarded-Proto", scheme, b"X-Forwarded-Host", host),
        *(b"X-Forwarded-Port", b"%d" % port, b"Forwarded", b"for=%b;host=%b;proto=%b" % (node, named, scheme)),
    )


class Forwarding(dict[tuple[str, bytes, bytes, int], bytes]):
    """``(client, scheme, host, port)`` → the forwarding fields as a frame has them, up to the request's own id; the latest
    are remembered, since a client opens many connections."""

    def __missing__(self, key: tuple[str, bytes, bytes, int]) -> bytes:
        wire = wire_fields((*forwarding(*key), b"X-Request-Id", b""))
        if len(self) >= _TABLE_MAX:
            self.clear()
        self[key] = wire
        return wire


FORWARDING = Forwarding()


class StatusLines(dict[tuple[int, bytes], bytes]):
    """``(status, reason)`` → status line; bounded, since a target chooses the reason."""

    def __missing__(self, key: tuple[int, bytes]) -> bytes:
        line = b"HTTP/1.1 %d %b\r\n" % key
        if len(self) < _TABLE_MAX:
            self[key] = line
        return line


STATUS_LINES = StatusLines()
