"""A handler and its sinks that write down every call, so that tests read as transcripts."""

from __future__ import annotations

from typing import Any

from portico.wire import frames as f
from portico.wire.counts import Counts
from portico.wire.stream import Sink, Stream


class StreamRecorder:
    """A sink whose calls land in the recorder's list as `(name, stream id, …)`."""

    def __init__(self, events: list[tuple[Any, ...]], ident: int) -> None:
        self.events = events
        self.ident = ident

    def on_response(self, status: int, head: list[bytes], end: bool) -> None:
        self.events.append(("response", self.ident, status, head, end))

    def on_interim(self, status: int, head: list[bytes]) -> None:
        self.events.append(("interim", self.ident, status, head))

    def on_opened(self) -> None:
        self.events.append(("opened", self.ident))

    def on_data(self, data: bytes, end: bool) -> None:
        self.events.append(("data", self.ident, bytes(data), end))

    def on_end(self, trailers: list[bytes]) -> None:
        self.events.append(("end", self.ident, trailers))

    def on_reset(self, code: int, detail: str) -> None:
        self.events.append(("reset", self.ident, code, detail))

    def on_credit(self) -> None:
        self.events.append(("credit", self.ident))


class Recorder:
    """A handler that accepts every stream."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.streams: dict[int, Stream] = {}

    def sink(self, ident: int) -> StreamRecorder:
        return StreamRecorder(self.events, ident)

    def on_hello(self, body: dict[str, Any]) -> None:
        self.events.append(("hello", body))

    def on_bind(self, bind: int, grant: str) -> None:
        self.events.append(("bind", bind, grant))

    def on_bound(self, bind: int, tunnel: str, name: str, url: str) -> None:
        self.events.append(("bound", bind, tunnel, name, url))

    def on_refused(self, bind: int, code: str, detail: str, retryable: bool) -> None:
        self.events.append(("refused", bind, code, detail, retryable))

    def on_unbind(self, bind: int, code: str, detail: str) -> None:
        self.events.append(("unbind", bind, code, detail))

    def on_auth(self, token: str) -> None:
        self.events.append(("auth", token))

    def on_counts(self, bind: int, counts: Counts) -> None:
        self.events.append(("counts", bind, counts.body()))

    def on_authed(self, body: dict[str, Any]) -> None:
        self.events.append(("authed", body))

    def on_goaway(self, code: str, detail: str, retry_after_ms: int) -> None:
        self.events.append(("goaway", code, detail, retry_after_ms))

    def on_error(self, code: str, detail: str, retryable: bool) -> None:
        self.events.append(("error", code, detail, retryable))

    def on_pong(self, payload: bytes) -> None:
        self.events.append(("pong", payload))

    def on_request(self, stream: Stream, bind: int, head: list[bytes], flags: int) -> Sink | None:
        self.streams[stream.id] = stream
        self.events.append(("request", stream.id, bind, head, flags))
        return self.sink(stream.id)

    def on_open(self, stream: Stream, bind: int, info: dict[str, Any]) -> Sink | None:
        self.streams[stream.id] = stream
        self.events.append(("open", stream.id, bind, info))
        return self.sink(stream.id)


def parse(parts: list[bytes | bytearray], headroom: int) -> list[tuple[str, int, int, bytes]]:
    """What `Session.take` gave, as `(type name, flags, id, payload)` of each frame."""
    found: list[tuple[str, int, int, bytes]] = []
    for part in parts:
        raw = bytes(part[headroom:]) if isinstance(part, bytearray) else part
        at = 0
        while at < len(raw):
            kind, flags, ident, length = f.HEADER.unpack_from(raw, at)
            at += f.HEADER_SIZE
            found.append((f.NAMES[kind], flags, ident, raw[at : at + length]))
            at += length
    return found


def wire_bytes(parts: list[bytes | bytearray], headroom: int) -> list[bytes]:
    """What `Session.take` gave, one bytes object a frame or run of frames, without headroom."""
    return [bytes(part[headroom:]) if isinstance(part, bytearray) else part for part in parts]
