"""Replay: a recorded request sent to its local target again, as it was or edited.

    compose() ──head, body──► relay side ═══ a session within this process ═══ agent side ──► the tunnel's own forwarder

The forwarder cannot tell a replay from a visitor's request, so everything holds for it that holds for them: the target of
that tunnel and no other, its limits and retries, no redirect followed, and the recording.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from portico.agent.link import Serves
from portico.agent.recorder import Entry, Recorder
from portico.errors import Problem
from portico.settings import AgentSettings
from portico.wire import frames as f
from portico.wire.counts import Counts
from portico.wire.session import Session
from portico.wire.stream import HEADROOM, Sink, Stream

#: Fields that say how a body is framed: the forwarder writes its own.
_FRAMING = frozenset((b"content-length", b"transfer-encoding", b"connection", b"te"))


@dataclass(frozen=True, slots=True)
class Edit:
    """What differs from the recorded request; ``None`` keeps a part."""

    method: bytes | None = None
    path: bytes | None = None
    headers: list[bytes] | None = None
    body: bytes | None = None

    @property
    def empty(self) -> bool:
        return self.method is None and self.path is None and self.headers is None and self.body is None


def parse_edit(raw: bytes) -> Edit:
    """The JSON of a replay request; nothing at all means unchanged. Raises ``inspect.edit_invalid``."""
    if not raw.strip():
        return Edit()
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        raise _invalid("the body is not JSON") from None
    known = {"method", "path", "headers", "body", "body_base64"}
    if not isinstance(document, dict) or not known.issuperset(document):
        raise _invalid(f"expected an object with some of {', '.join(sorted(known))}")
    return Edit(
        _text(document, "method"), _text(document, "path"), _headers(document.get("headers")), _new_body(document)
    )


def _invalid(why: str) -> Problem:
    return Problem("inspect.edit_invalid", why)


def _bytes(value: str, what: str) -> bytes:
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError:
        raise _invalid(f"{what} is not valid Unicode") from None


def _text(document: dict[str, Any], name: str) -> bytes | None:
    value = document.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise _invalid(f"{name} must be a text")
    return _bytes(value, name)


def _headers(value: Any) -> list[bytes] | None:
    if value is None:
        return None
    flat: list[bytes] = []
    for row in value if isinstance(value, list) else (None,):
        if not isinstance(row, list) or len(row) != 2 or not all(isinstance(part, str) for part in row):
            raise _invalid("headers must be a list of [name, value]")
        flat += (_bytes(row[0], "a header name"), _bytes(row[1].strip(" \t"), "a header value"))
    return flat


def _new_body(document: dict[str, Any]) -> bytes | None:
    words, coded = document.get("body"), document.get("body_base64")
    if words is not None and coded is not None:
        raise _invalid("give body or body_base64, not both")
    if not isinstance(words, str | None) or not isinstance(coded, str | None):
        raise _invalid("body must be a text")
    if coded is None:
        return None if words is None else _bytes(words, "body")
    try:
        return base64.b64decode(coded, validate=True)
    except (binascii.Error, ValueError):
        raise _invalid("body_base64 is not base64") from None


@dataclass(frozen=True, slots=True)
class Composed:
    """A request as the wire has it."""

    head: list[bytes]
    flags: int
    body: bytes
    trailers: list[bytes]


def compose(entry: Entry, edit: Edit) -> Composed:
    """``entry`` with ``edit`` applied. Raises what makes a replay impossible."""
    if entry.flags & f.F_UPGRADE:
        raise Problem("inspect.replay_upgrade")
    body = edit.body
    if body is None:
        if not entry.complete:
            raise Problem("inspect.body_incomplete")
        body = bytes(entry.more.request_body or b"")
    recorded = entry.head()
    fields = recorded[2:] if edit.headers is None else edit.headers
    had_length = any(name.lower() == b"content-length" for name in recorded[2::2])
    flat = [
        part
        for name, value in zip(fields[::2], fields[1::2], strict=True)
        if name.lower() not in _FRAMING
        for part in (name, value)
    ]
    if had_length or edit.body is not None:
        # Without a length the forwarder chunks, as the visitor did.
        flat += (b"Content-Length", b"%d" % len(body)) if body else ()
    trailers = entry.more.request_trailers if edit.empty else []
    ended = not body and not trailers
    flags = (entry.flags & ~(f.F_END | f.F_UPGRADE)) | (f.F_END if ended else 0)
    return Composed([edit.method or recorded[0], edit.path or recorded[1], *flat], flags, body, trailers)


async def replay(entry: Entry, edit: Edit, serves: Serves, settings: AgentSettings) -> Entry:
    """Send ``entry`` again to ``serves`` and return the entry of the replay, which is over unless its limit of time cut it off.

    Raises what makes it impossible, ``inspect.edit_invalid`` for an edit that is no HTTP.
    """
    request = compose(entry, edit)
    loopback = _Loopback(serves, entry.tap.recorder)
    try:
        made = loopback.send(request)
    except ValueError as err:
        raise _invalid(str(err)) from None
    if made is None:
        raise Problem("inspect.tunnel_gone")
    made.extend().replay_of = entry.seq
    try:
        async with asyncio.timeout(settings.replay_timeout_seconds):
            await loopback.over.wait()
    except TimeoutError:
        made.fail(f"the replay was cut off after {settings.replay_timeout_seconds:g} s")
    finally:
        loopback.close()
    return made


class _Loopback:
    """Both ends of a session that carries one request; also the handler of both, and the sink of its relay side."""

    def __init__(self, serves: Serves, recorder: Recorder) -> None:
        self.over = asyncio.Event()
        self._serves = serves
        self._recorder = recorder
        self._loop = asyncio.get_running_loop()
        self._entry: Entry | None = None
        self._unsent = memoryview(b"")
        self._trailers: list[bytes] = []
        self._due = False
        self._relay = Session(self, relay=True, wake=self._wake)
        self._agent = Session(self, relay=False, wake=self._wake)
        self._agent.control(f.HELLO, 0, versions=[f.VERSION], agent="replay", connect=1)
        self._relay.control(
            f.HELLO, 0, version=f.VERSION, relay="replay", session="replay", ping_interval_ms=1000, ping_timeout_ms=1000
        )
        self._pump()

    def send(self, request: Composed) -> Entry | None:
        """Begin; the entry of the new request. Raises ``ValueError`` when the head is not a valid one."""
        self._stream = self._relay.open_request(1, request.head, request.flags, self)
        self._pump()
        self._unsent = memoryview(request.body)
        self._trailers = request.trailers
        if not request.flags & f.F_END:
            self.on_credit()
        return self._entry

    def close(self) -> None:
        """End what still runs, as a visitor who leaves."""
        self._stream.reset(f.CANCELLED, "the replay is over")
        self._pump()
        self._relay.close()
        self._agent.close()

    # ── the carrier ───────────────────────────────────────────────────────────────────────────────────────────────
    def _wake(self) -> None:
        if not self._due:
            self._due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Carry what is queued, both ways, and let streams that wait for their turn go on."""
        self._due = True
        while True:
            for source, target in ((self._relay, self._agent), (self._agent, self._relay)):
                for part in source.take():
                    target.feed(part if type(part) is bytes else memoryview(part)[HEADROOM:])
            self._relay.next_turn()
            self._agent.next_turn()
            if not self._relay.out and not self._agent.out:
                break
        self._due = False

    # ── handler ───────────────────────────────────────────────────────────────────────────────────────────────────
    def on_request(self, stream: Stream, bind: int, head: list[bytes], flags: int) -> Sink | None:
        number = self._recorder.last + 1
        sink = self._serves.on_request(stream, head, flags)
        self._entry = self._recorder.find(number)
        return sink

    def on_open(self, stream: Stream, bind: int, info: dict[str, Any]) -> Sink | None: ...
    def on_hello(self, body: dict[str, Any]) -> None: ...
    def on_bind(self, bind: int, grant: str) -> None: ...
    def on_bound(self, bind: int, tunnel: str, name: str, url: str) -> None: ...
    def on_refused(self, bind: int, code: str, detail: str, retryable: bool) -> None: ...
    def on_unbind(self, bind: int, code: str, detail: str) -> None: ...
    def on_auth(self, token: str) -> None: ...
    def on_authed(self, body: dict[str, Any]) -> None: ...
    def on_counts(self, bind: int, counts: Counts) -> None: ...
    def on_goaway(self, code: str, detail: str, retry_after_ms: int) -> None: ...
    def on_error(self, code: str, detail: str, retryable: bool) -> None: ...
    def on_pong(self, payload: bytes) -> None: ...

    # ── sink of the relay's side ──────────────────────────────────────────────────────────────────────────────────
    def on_response(self, status: int, head: list[bytes], end: bool) -> None:
        if end:
            self.over.set()

    def on_interim(self, status: int, head: list[bytes]) -> None: ...
    def on_opened(self) -> None: ...

    def on_data(self, data: bytes, end: bool) -> None:
        self._stream.consumed(len(data))
        if end:
            self.over.set()

    def on_end(self, trailers: list[bytes]) -> None:
        self.over.set()

    def on_reset(self, code: int, detail: str) -> None:
        self.over.set()

    def on_credit(self) -> None:
        """Send the body as far as there is credit."""
        stream = self._stream
        while self._unsent:
            room = stream.sendable()
            if room <= 0:
                stream.wait()
                return
            part, self._unsent = self._unsent[:room], self._unsent[room:]
            stream.send_data(part, end=not self._unsent and not self._trailers)
        if self._trailers and not stream.send_ended:
            stream.send_end(self._trailers)
