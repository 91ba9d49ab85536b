"""Recorded requests as documents: what the local page, its API, the HAR export and the plain page are made of.

Nothing here runs unless somebody looks. Bytes become text leniently (a visitor may have sent anything); the bodies' exact
bytes are served by ``/api/requests/{id}/body/…``.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from portico.agent.recorder import Entry
from portico.agent.websocket import messages
from portico.wire import frames as f

Pairs = list[tuple[str, str]]

#: Image types that every browser decodes and none runs.
IMAGES = frozenset(("image/png", "image/jpeg", "image/gif", "image/webp", "image/avif", "image/bmp", "image/x-icon"))


def text(data: bytes | bytearray) -> str:
    """Bytes of a head for showing: UTF-8, with what is none as ``\\xNN``."""
    return bytes(data).decode("utf-8", "backslashreplace")


def pairs(flat: Sequence[bytes]) -> Pairs:
    """Flat names and values as pairs of text, order and repetition kept."""
    return [(text(name), text(value)) for name, value in zip(flat[::2], flat[1::2], strict=True)]


def value_of(fields: Pairs, name: str) -> str:
    """The first value of a header, or ""."""
    return next((value for key, value in fields if key.lower() == name), "")


def stamp(seconds: float) -> str:
    """RFC 3339 in UTC, with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def millis(entry: Entry, now: float) -> float:
    """How long the request took, or has been taking."""
    return round(((entry.ended or now) - entry.started) * 1000, 3)


def state(entry: Entry) -> str:
    """``running``, ``done``, ``failed`` (no answer, or a broken one) or ``aborted`` (the visitor left first)."""
    if not entry.ended:
        return "running"
    if entry.more.failure:
        return "failed"
    return "aborted" if entry.more.aborted else "done"


def kind_of(entry: Entry) -> str:
    """``websocket``, ``upgrade``, ``events`` (SSE) or ``plain``."""
    if entry.status == 101:
        upgrade = value_of(pairs(entry.answer_head()[1:]), "upgrade")
        return "websocket" if upgrade.lower() == "websocket" else "upgrade"
    if entry.payload is not None and b"text/event-stream" in entry.payload:
        return "events"
    return "plain"


def summary(entry: Entry, now: float) -> dict[str, Any]:
    """One row of the list; ``now`` is :func:`time.perf_counter`."""
    method, path = entry.line()
    more = entry.more
    row: dict[str, Any] = {
        "id": entry.id,
        "tunnel": entry.tap.name,
        "method": text(method),
        "path": text(path),
        "status": entry.status,
        "state": state(entry),
        "kind": kind_of(entry),
        "started_at": stamp(entry.tap.recorder.wall(entry.started)),
        "duration_ms": millis(entry, now),
        "request_bytes": more.sent,
        "response_bytes": entry.received,
    }
    if more.replay_of:
        row["replay_of"] = f"{entry.tap.recorder.run}-{more.replay_of}"
    if more.failure or more.aborted:
        row["failure"] = more.failure or more.aborted
    return row


def detail(entry: Entry, now: float, decoded_max: int) -> dict[str, Any]:
    """Everything about one request."""
    head, fields, more = entry.head(), entry.answer_head(), entry.more
    request = pairs(head[2:])
    response = pairs(fields[1:])
    raw = entry.status == 101
    document = summary(entry, now)
    document |= {
        "target": entry.tap.target,
        "remote_addr": value_of(request, "x-forwarded-for").split(",")[0].strip(),
        "request_id": value_of(request, "x-request-id"),
        "timing": _timing(entry, now),
        "replayable": entry.complete and not entry.flags & f.F_UPGRADE,
        "request": {
            "headers": request,
            "trailers": pairs(more.request_trailers),
            "body": body([] if raw else request, more.request_body, more.sent, decoded_max),
        },
        "response": None,
        "interim": [{"status": status, "headers": pairs(answer[1:])} for status, answer in more.interim],
    }
    if entry.payload is not None:
        document["response"] = {
            "status": entry.status,
            "reason": text(fields[0]) if fields else "",
            "headers": response,
            "trailers": pairs(more.response_trailers),
            "body": body([] if raw else response, entry.response_body, entry.received, decoded_max),
        }
    if document["kind"] == "websocket":
        used = value_of(response, "sec-websocket-extensions").lower()
        for name, side, kept in (
            ("request", "client", more.request_body),
            ("response", "server", entry.response_body),
        ):
            document[name]["messages"] = messages(bytes(kept or b""), used, side, decoded_max)
    return document


def _timing(entry: Entry, now: float) -> dict[str, float | None]:
    """Milliseconds: to the answer's head, of the answer's body, and together."""
    if not entry.answered:
        return {"wait_ms": None, "receive_ms": None, "total_ms": millis(entry, now)}
    end = entry.ended or now
    return {
        "wait_ms": round((entry.answered - entry.started) * 1000, 3),
        "receive_ms": round((end - entry.answered) * 1000, 3),
        "total_ms": millis(entry, now),
    }


def body(fields: Pairs, kept: bytes | bytearray | None, size: int, decoded_max: int) -> dict[str, Any]:
    """A body for showing: ``text``, or ``base64`` when it is none.

    ``bytes`` is its length on the wire, ``kept`` how many of them are here; ``encoding`` a Content-Encoding, ``decoded``
    whether it is undone in ``text`` or ``base64``; ``kind`` is ``empty``, ``json``, ``form``, ``text``, ``image``, ``binary``.
    """
    data = bytes(kept or b"")
    kind = value_of(fields, "content-type")
    encoding = value_of(fields, "content-encoding").strip().lower()
    document: dict[str, Any] = {
        "bytes": size,
        "kept": len(data),
        "truncated": size > len(data),
        "type": kind,
        "encoding": encoding,
        "decoded": False,
        "kind": "empty",
    }
    if not data:
        return document
    plain = decode(data, encoding, decoded_max) if encoding not in ("", "identity") else data
    if plain is not None and plain is not data:
        document["decoded"] = True
    shown = data if plain is None else plain
    words = _words(shown, kind, cut=size > len(data) or len(shown) >= decoded_max)
    document["kind"] = _kind(kind, words)
    if words is not None:
        document["text"] = words
    else:
        document["base64"] = base64.b64encode(shown).decode()
    return document


def decode(data: bytes, encoding: str, limit: int) -> bytes | None:
    """``data`` unpacked as far as it goes, at most ``limit`` bytes; ``None`` for a coding that is not known or not so."""
    if encoding in ("gzip", "x-gzip"):
        tries: tuple[int, ...] = (31,)
    elif encoding == "deflate":
        tries = (15, -15)  # zlib as RFC 9110 has it, and the bare stream that some send
    else:
        return None
    for bits in tries:
        try:
            return zlib.decompressobj(bits).decompress(data, limit)
        except zlib.error:
            continue
    return None


def _words(data: bytes, kind: str, cut: bool) -> str | None:
    """``data`` as text, when it is text. ``cut``: it may end in the middle of a character."""
    _, _, charset = kind.lower().partition("charset=")
    charset = charset.split(";")[0].strip(" \"'")
    try:
        words = data.decode("utf-8")
    except UnicodeDecodeError as err:
        if cut and err.end == len(data) and err.start > len(data) - 4:
            words = data[: err.start].decode("utf-8")
        elif charset in ("iso-8859-1", "latin1", "windows-1252", "us-ascii"):
            words = data.decode("cp1252" if charset == "windows-1252" else "latin-1", "replace")
        else:
            return None
    return None if "\0" in words else words


def _kind(header: str, words: str | None) -> str:
    media = header.partition(";")[0].strip().lower()
    if words is None:
        return "image" if media in IMAGES else "binary"
    if media == "application/x-www-form-urlencoded":
        return "form"
    if media.endswith(("/json", "+json")):
        return "json"
    if not media and words.lstrip()[:1] in ("{", "["):
        return "json" if _is_json(words) else "text"
    return "text"


def _is_json(words: str) -> bool:
    try:
        json.loads(words)
    except (ValueError, RecursionError):
        return False
    return True
