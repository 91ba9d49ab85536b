"""What a tunnel changes about a message, all of it. Everything else must be equal; `docs/reference/headers.md` names the same.

A difference that is not in these tables is a bug, and a row that nothing needs any more is one too (the tests look for both).
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass, replace
from typing import Any

from tests.differential.exact import Answer, Fields, parse_fields

#: Fields of one connection (RFC 9110, 7.6.1), in either direction: each hop has its own.
HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade", b"http2-settings")
)
#: Framing, which each hop says for itself at the end of the head (`Trailer` announces what framing carries).
FRAMING = frozenset((b"content-length", b"trailer"))
#: Credentials for a proxy, and its questions for them.
PROXY = frozenset((b"proxy-authorization", b"proxy-authenticate"))
#: What the relay tells the target; a visitor's own values are not believed.
SET_IN_REQUESTS = frozenset(
    (
        *(b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-forwarded-port", b"x-forwarded-scheme"),
        *(b"forwarded", b"x-request-id"),
    )
)
#: What a target can never say.
KEPT_FROM_TARGETS = frozenset((b"portico-error",))

#: Not compared in requests, as the target sees them (names in lower case; what `Connection` names goes with it) …
DOCUMENTED_REQUEST = HOP_BY_HOP | FRAMING | PROXY | SET_IN_REQUESTS
#: … and in answers, as the visitor sees them.
DOCUMENTED_ANSWER = HOP_BY_HOP | FRAMING | PROXY | KEPT_FROM_TARGETS
#: Trailer fields that are not passed on, either way: they would say something about the message after its fact.
NOT_IN_TRAILERS = (
    HOP_BY_HOP
    | FRAMING
    | PROXY
    | SET_IN_REQUESTS
    | KEPT_FROM_TARGETS
    | frozenset((b"host", b"authorization", b"cookie", b"set-cookie", b"expect", b"cache-control", b"location"))
    | frozenset((b"content-type", b"content-encoding", b"content-range"))
)
#: Request lines reach the target in origin-form and as HTTP/1.1; answers reach the visitor as HTTP/1.1.
DOCUMENTED_LINES = ("absolute-form", "HTTP/1.0")


_RANDOM = re.compile(rb"boundary=[0-9a-f]{20,}")


@dataclass(frozen=True)
class Seen:
    """A message without what is documented: what is compared. ``framing`` says how its end is found."""

    first: bytes
    fields: tuple[tuple[bytes, bytes], ...]
    interims: tuple[Any, ...] = ()
    body: Any = b""
    trailers: tuple[tuple[bytes, bytes], ...] = ()
    framing: str = ""
    length: bytes = b""


def less(fields: Fields, documented: frozenset[bytes]) -> tuple[tuple[bytes, bytes], ...]:
    """``fields`` in order and with repetition, without the documented ones and those that Connection names."""
    named = {
        part.strip().lower() for name, value in fields if name.lower() == b"connection" for part in value.split(b",")
    }
    named -= {b"cookie", b"host", b""}
    return tuple(
        (name, _RANDOM.sub(b"boundary=(random)", b"(now)" if name == b"Date" else value))
        for name, value in fields
        if name.lower() not in documented | named
    )


def answer_seen(answer: Answer) -> Seen:
    """An answer as the visitor sees it."""
    body = body_seen(answer)
    lengths = answer.head.values(b"content-length")
    first = answer.head.first.replace(b"HTTP/1.0 ", b"HTTP/1.1 ", 1)
    return Seen(
        first,
        less(answer.head.fields, DOCUMENTED_ANSWER),
        tuple((head.first, less(head.fields, DOCUMENTED_ANSWER)) for head in answer.interims),
        body,
        tuple(answer.trailers),
        # The end of a body by the end of the connection is only for HTTP/1.0; a body of no bytes needs no coding.
        "empty" if not answer.body else "body",
        lengths[0] if lengths and body == answer.body and answer.framing == "none" else b"",
    )


def body_seen(answer: Answer) -> Any:
    """A body; where httpbin shows the fields that it got, without the documented ones."""
    body = answer.body
    coding = answer.head.values(b"content-encoding")
    if coding in ([b"gzip"], [b"deflate"]):
        body = zlib.decompress(body, wbits=47)
    boundary = _RANDOM.search(b" ".join(answer.head.values(b"content-type")))
    if boundary:
        return body.replace(boundary[0][9:], b"(random)")
    try:
        shown = [json.loads(line) for line in (body.splitlines() if b'\n{"' in body else [body])]
    except ValueError:
        return body
    return [json_seen(one) for one in shown] if shown and isinstance(shown[0], dict) else body


def json_seen(shown: dict[str, Any]) -> dict[str, Any]:
    if isinstance(shown.get("headers"), dict):
        shown["headers"] = {
            name: value for name, value in shown["headers"].items() if name.lower().encode() not in DOCUMENTED_REQUEST
        }
    # httpbin says the scheme that X-Forwarded-Proto names.
    if "url" in shown:
        shown["url"] = shown["url"].removeprefix("https:").removeprefix("http:")
    return shown


def request_seen(head: bytes, body: bytes, trailers: bytes) -> Seen:
    """A request as the target sees it, from the bytes of its head."""
    first, *lines = head[:-4].split(b"\r\n")
    method, target, _ = first.split(b" ", 2)
    if target.lower().startswith((b"http://", b"https://")):
        target = b"/" + target.split(b"/", 3)[3] if target.count(b"/") > 2 else b"/"
    fields: Fields = []
    for line in lines:
        name, _, value = line.partition(b":")
        fields.append((name, value.strip(b" \t")))
    rest = tuple(parse_fields(trailers.split(b"\r\n")[:-1]))
    seen = Seen(b"%b %b" % (method, target), less(fields, DOCUMENTED_REQUEST), body=body, trailers=rest)
    return less_trailers(seen)


def less_trailers(seen: Seen) -> Seen:
    """Without the trailers that are not passed on."""
    return replace(seen, trailers=tuple(pair for pair in seen.trailers if pair[0].lower() not in NOT_IN_TRAILERS))


__all__ = ["DOCUMENTED_ANSWER", "DOCUMENTED_LINES", "DOCUMENTED_REQUEST", "Seen", "answer_seen", "request_seen"]
