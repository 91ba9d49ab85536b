"""Heads between the wire and HTTP/1.1: requests serialised for the target, response fields sorted for the relay.

A browser sends the same header names again and again, so the work is done once per sequence of names: a bytes template
with a place for every value. Values hold no CR, LF or NUL (the wire refuses them).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from portico.kit.memo import Memo
from portico.wire import frames as f

ORDINARY, DROP, HOST, LENGTH, CONNECTION, UPGRADE, ENCODING, TE = range(8)

_BY_NAME = {
    b"host": HOST,
    b"content-length": LENGTH,
    b"connection": CONNECTION,
    b"upgrade": UPGRADE,
    b"transfer-encoding": ENCODING,
    b"te": TE,
    b"keep-alive": DROP,
    b"proxy-connection": DROP,
    b"trailer": DROP,
    b"http2-settings": DROP,
}
_KINDS: dict[bytes, int] = {}
_KINDS_MAX = 4096
_PLANS_MAX = 1024
#: Bytes of a template that is remembered: no browser's head has more, and visitors could fill memory with others.
_PLAN_BYTES_MAX = 4096
_NAME_MAX = 256
#: What fits into one frame beside a status and two separators.
_HEAD_MAX = f.MAX_PAYLOAD - 4
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_METHODS_WITH_BODY = frozenset((b"POST", b"PUT", b"PATCH"))
#: Methods whose request has no body here and whose answer has the usual framing.
METHODS_KNOWN = frozenset((b"GET", b"OPTIONS", b"DELETE"))
#: What a relay's ids of requests begin with; letters and digits follow.
ID_PREFIX = b"req_"
_PLAIN_TARGET = re.compile(rb"[^\x00-\x20\x7f]+").fullmatch
#: Targets that are remembered, and bytes of one that is.
_TARGETS_MAX, _TARGET_BYTES_MAX = 4096, 512


class PlainTargets(dict[bytes, bool]):
    """Request target → whether it has no octet that it must not have; the latest good ones are kept."""

    def __missing__(self, target: bytes) -> bool:
        if _PLAIN_TARGET(target) is None:
            return False
        if len(target) <= _TARGET_BYTES_MAX:
            if len(self) >= _TARGETS_MAX:
                self.clear()
            self[target] = True
        return True


PLAIN_TARGETS = PlainTargets()


class HeadError(ValueError):
    """A head that cannot be carried on; the text says why."""


def kind_of(name: bytes) -> int:
    """What a field name means to a proxy; names as spelled are remembered (bounded)."""
    kind = _KINDS.get(name)
    if kind is None:
        if len(name) > _NAME_MAX:
            raise HeadError("a field name is over 256 bytes")
        kind = _BY_NAME.get(name.lower(), ORDINARY)
        if len(_KINDS) < _KINDS_MAX:
            _KINDS[name] = kind
    return kind


def parse_length(value: bytes) -> int:
    """A Content-Length; raises :class:`HeadError`."""
    if not value.isdigit() or len(value) > 18:
        raise HeadError("Content-Length is not a number")
    return int(value)


def _listed(value: bytes) -> set[bytes]:
    """The lower-case members of a comma-separated list."""
    return {part.strip().lower() for part in value.split(b",")} - {b""}


class RequestWriter:
    """Serialises REQUEST heads for one target.

    ``host`` is filled in where a request has no Host: the relay takes it away when the tunnel's policy says ``rewrite``.
    """

    def __init__(self, host: bytes) -> None:
        self._host = host
        self._plans: dict[tuple[object, ...], tuple[bytes, int]] = {}
        #: Fields up to the last value, as a frame has them → what stands between the target and that value in HTTP/1.1.
        self.known: Memo[bytes] = Memo(1024, 2048)

    def learn(self, head: Sequence[bytes], out: bytes) -> None:
        """Remember the fields of a decoded ``head`` without a body that became ``out``, from the second time on.

        The last value is the one that may be another next time, so it must be one that says nothing to a proxy.
        """
        fields = b"\0".join(head[2:-1])
        start = len(head[0]) + len(head[1]) + 1
        if (
            len(head) < 4
            or head[0] not in METHODS_KNOWN
            or kind_of(head[-2]) != ORDINARY
            or not self.known.worth(fields)
        ):
            return
        end = b": %b\r\n\r\n" % head[-1]
        if out.endswith(head[-2] + end):
            self.known.remember(fields, out[start : len(out) - len(head[-1]) - 4])

    def write(self, head: Sequence[bytes], flags: int) -> tuple[bytes, int]:
        """The head in bytes, and the length of the body that follows: -1 when it is chunked, 0 for none.

        Raises :class:`HeadError` for a head whose body length cannot be right.
        """
        names = head[2::2]
        key = (flags, head[0] in _METHODS_WITH_BODY, *names)
        plan = self._plans.get(key)
        if plan is None:
            if any(kind_of(name) == CONNECTION for name in names):
                return self.write(_without_named(head), flags)
            plan = self._plan(names, flags, head[0] in _METHODS_WITH_BODY)
            if len(self._plans) >= _PLANS_MAX:
                self._plans.clear()
            if len(plan[0]) <= _PLAN_BYTES_MAX:
                self._plans[key] = plan
        template, at = plan
        out = template % (head[0], head[1], *head[3::2])
        if at >= 0:
            length = parse_length(head[at])
            if length and flags & f.F_END:
                raise HeadError("Content-Length without a body")
            return out, length
        return out, 0 if flags & (f.F_END | f.F_UPGRADE) else -1

    def _plan(self, names: Sequence[bytes], flags: int, with_body: bool) -> tuple[bytes, int]:
        upgrade = flags & f.F_UPGRADE != 0
        parts = [b"%b %b HTTP/1.1\r\n"]
        at, seen_host = -1, False
        for index, name in enumerate(names):
            kind = kind_of(name)
            keep = kind in (ORDINARY, HOST, LENGTH) or (kind == UPGRADE and upgrade)
            if kind == LENGTH:
                if at >= 0:
                    raise HeadError("Content-Length twice")
                at = 3 + 2 * index
            if kind == HOST:
                keep = not seen_host
                seen_host = True
            parts.append(name.replace(b"%", b"%%") + b": %b\r\n" if keep else b"%.0b")
        if not seen_host:
            parts.insert(1, b"Host: " + self._host.replace(b"%", b"%%") + b"\r\n")
        options = [b"Upgrade"] * upgrade
        if flags & f.F_TRAILERS:
            parts.append(b"TE: trailers\r\n")
            options.append(b"TE")
        if options:
            parts.append(b"Connection: " + b", ".join(options) + b"\r\n")
        if at < 0 and not upgrade:
            if not flags & f.F_END:
                parts.append(b"Transfer-Encoding: chunked\r\n")
            elif with_body:
                parts.append(b"Content-Length: 0\r\n")
        return b"".join(parts) + b"\r\n", at


def _without_named(head: Sequence[bytes]) -> list[bytes]:
    """``head`` without its Connection fields and those that they name (the relay has done it; defend anyway)."""
    named: set[bytes] = {b"connection"}
    for index in range(2, len(head), 2):
        if kind_of(head[index]) == CONNECTION:
            named |= _listed(head[index + 1])
    named -= {b"upgrade", b"host", b"content-length"}
    kept = list(head[:2])
    for index in range(2, len(head), 2):
        if head[index].lower() not in named:
            kept += head[index : index + 2]
    return kept


class ResponseHead:
    """A response head as the relay gets it, and what it says about its body."""

    __slots__ = ("chunked", "close", "fields", "length", "upgrade")

    def __init__(self, reason: bytes, raw: list[bytes], status: int) -> None:
        """Sort flat ``raw`` fields; raises :class:`HeadError` for what the wire could not carry."""
        if _CONTROL.search(reason):
            # The parser takes anything there; fields it has checked itself.
            raise HeadError("a control character in the reason")
        text = b"\0".join(raw)
        if len(reason) + len(text) > _HEAD_MAX:
            raise HeadError(f"a head over {_HEAD_MAX} bytes")
        if b" \0" in text or b"\t\0" in text or text.endswith((b" ", b"\t")):
            raw = [part.strip(b" \t") for part in raw]
        plan = _RESPONSE_PLANS.get(tuple(raw[::2])) or _response_plan(raw[::2])
        length, connection, encoding, upgrade, drop = plan
        self.length = parse_length(raw[length]) if length else -1
        self.close = self.chunked = self.upgrade = False
        if encoding:
            if raw[encoding].lower() != b"chunked":
                raise HeadError(f"transfer coding {raw[encoding].decode('latin-1')[:80]!r} is not supported")
            self.chunked = True
        fields = [reason, *raw]
        if upgrade and status == 101:
            self.upgrade = True
            drop = tuple(at for at in drop if at != upgrade - 1)
        for at in drop:
            del fields[at + 1 : at + 3]
        self.fields = fields
        if connection and (connection < 0 or raw[connection] not in _PLAIN_CONNECTION):
            self._drop_named(b",".join(v for n, v in zip(raw[::2], raw[1::2], strict=True) if kind_of(n) == CONNECTION))

    def _drop_named(self, value: bytes) -> None:
        named = _listed(value)
        self.close = b"close" in named
        named -= {b"close", b"keep-alive", b"upgrade", b"content-length"}
        if named:
            out = self.fields
            kept = out[:1]
            for index in range(1, len(out), 2):
                if out[index].lower() not in named:
                    kept += out[index : index + 2]
            self.fields = kept


class KnownAnswer(NamedTuple):
    """What an answer's head means to the relay: the beginning of an ANSWER payload; ``length`` of the body in bytes."""

    length: int
    head: bytes
    status: int


#: Head in bytes, with the empty line at its end, of an answer that keeps its connection → what it means.
KNOWN_ANSWERS: Memo[KnownAnswer] = Memo(2048, 2048)

_PLAIN_CONNECTION = frozenset((b"keep-alive", b"Keep-Alive", b"upgrade", b"Upgrade"))
_ResponsePlan = tuple[int, int, int, int, tuple[int, ...]]
_RESPONSE_PLANS: dict[tuple[bytes, ...], _ResponsePlan] = {}


def _response_plan(names: list[bytes]) -> _ResponsePlan:
    """Where the values stand that matter (0: absent, -1: several), and which fields are dropped, last one first."""
    if len(names) > f.MAX_FIELDS:
        raise HeadError(f"more than {f.MAX_FIELDS} header fields")
    at = {LENGTH: 0, CONNECTION: 0, ENCODING: 0, UPGRADE: 0}
    drop: list[int] = []
    for index, name in enumerate(names):
        kind = kind_of(name)
        if kind in (LENGTH, ENCODING) and at[kind]:
            raise HeadError(f"{name.decode()} twice")
        if kind in at:
            at[kind] = -1 if kind == CONNECTION and at[kind] else 2 * index + 1
        # On a response Upgrade only matters with 101, where it is kept.
        if kind not in (ORDINARY, HOST, LENGTH):
            drop.insert(0, 2 * index)
    plan = (at[LENGTH], at[CONNECTION], at[ENCODING], at[UPGRADE], tuple(drop))
    if len(_RESPONSE_PLANS) >= _PLANS_MAX:
        _RESPONSE_PLANS.clear()
    _RESPONSE_PLANS[tuple(names)] = plan
    return plan


def trailer_fields(raw: list[bytes]) -> list[bytes]:
    """Flat trailer fields without those that a trailer must not hold (RFC 9110, 6.5.1); raises :class:`HeadError`."""
    if len(raw) > 2 * f.MAX_FIELDS:
        raise HeadError(f"more than {f.MAX_FIELDS} trailer fields")
    out: list[bytes] = []
    for index in range(0, len(raw), 2):
        if kind_of(raw[index]) == ORDINARY:
            out += (raw[index], raw[index + 1].strip(b" \t"))
    if sum(map(len, out)) + len(out) > _HEAD_MAX:
        raise HeadError(f"trailers over {_HEAD_MAX} bytes")
    return out
