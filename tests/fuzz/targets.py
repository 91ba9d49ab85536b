"""What the fuzzers drive: each target takes any bytes and raises only when something is wrong.

Used twice: by `make fuzz`, which looks for new inputs by coverage (tests/fuzz/run.py), and by `make test`, which replays the
committed corpus without a fuzzer (test_corpus.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from portico.kit import proxy_protocol
from portico.relay.client_address import Networks, read, told_on
from portico.relay.heads import normal_host
from portico.relay.hello import Hello, Invalid, NeedMore, parse
from portico.wire import frames as f
from portico.wire.frames import WireError
from portico.wire.session import Session
from portico.wire.stream import HEADROOM, Stream
from tests.fuzz import http
from tests.wire.recorder import Recorder, wire_bytes
from tests.wire.vectors import AGENT_HELLO, RELAY_HELLO

MAX_STREAMS = 8
GROWTH = 200_000


class Tape:
    """Reads decisions from the fuzzer's bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    @property
    def left(self) -> bool:
        return self.at < len(self.data)


class Checked(Recorder):
    """A recorder that counts what readers have not taken yet."""

    def held(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for event in self.events:
            if event[0] == "data":
                found[event[1]] = found.get(event[1], 0) + len(event[2])
        return found


def _local(session: Session, recorder: Recorder, tape: Tape) -> None:
    """One act of this side's own, on one of its streams."""
    act = tape.byte() % 9
    streams = list(session.streams.values())
    stream: Stream | None = streams[tape.byte() % len(streams)] if streams else None
    try:
        if act == 0 and session.relay:
            ident = session.last_stream + 1
            session.open_request(1, [b"GET", b"/"], tape.byte() & 3, recorder.sink(ident))
        elif act == 1 and session.relay:
            session.open_tcp(1, {"peer": "p", "local": "l"}, recorder.sink(session.last_stream + 1))
        elif act == 2 and stream is not None:
            stream.send_data(bytes(min(tape.byte() << 8, stream.sendable())), bool(tape.byte() & 1))
        elif act == 3 and stream is not None:
            stream.send_end()
        elif act == 4 and stream is not None:
            stream.reset(f.CANCELLED, "")
        elif act == 5 and stream is not None:
            stream.wait()
        elif act == 6 and stream is not None and not session.relay and not stream.answered:
            stream.send_response(200, [b"OK"], bool(tape.byte() & 1))
        elif act == 7:
            session.pause() if tape.byte() & 1 else session.resume()
        elif act == 8 and stream is not None:
            stream.stalled = True
    except (ValueError, OverflowError):
        pass  # the documented refusals of a caller's own mistake


def wire(data: bytes) -> None:
    """A hostile peer: frames and acts of our own in any order. Only a protocol error may come of it, within all limits."""
    tape = Tape(data)
    mode = tape.byte()
    recorder = Checked()
    session = Session(recorder, relay=bool(mode & 1), max_streams=MAX_STREAMS, growth=GROWTH)
    fed = 0
    try:
        if not mode & 2:
            session.receive(AGENT_HELLO if session.relay else RELAY_HELLO)
        while tape.left:
            choice = tape.byte()
            if choice & 3 == 3:
                _local(session, recorder, tape)
            elif choice & 3 == 2:
                for ident, size in recorder.held().items():
                    if ident in session.streams:
                        session.streams[ident].consumed(size)
                recorder.events = [event for event in recorder.events if event[0] != "data"]
            else:
                # A frame with an honest header around hostile bytes, or bytes as they come.
                kind, ident, size = tape.byte(), tape.byte() & 15, tape.byte() << 8 | tape.byte()
                payload = tape.take(size)
                message = payload if choice & 4 else f.HEADER.pack(kind, choice >> 4, ident, len(payload)) + payload
                fed += len(message)
                session.receive(memoryview(message))
            _check_limits(session, recorder, fed)
    except WireError as err:
        assert err.code in ("wire.protocol_error", "wire.flow_control", "wire.version_unsupported")
        session.fail(err.code, err.detail)
        assert not session.streams
    _check_limits(session, recorder, fed)


def _check_limits(session: Session, recorder: Checked, fed: int) -> None:
    assert len(session.streams) <= MAX_STREAMS
    assert len(session.waiting) <= MAX_STREAMS
    assert 0 <= session.growth <= GROWTH
    for ident, size in recorder.held().items():
        stream = session.streams.get(ident)
        assert stream is None or size <= stream.window
    # Answers that a peer can cause: a PONG, RESET or CREDIT per frame of at least their own size, and what we sent ourselves.
    ours = sum(len(part) for part in wire_bytes(session.out, HEADROOM) if part[0] not in (f.DATA, f.REQUEST, f.OPEN))
    assert ours <= 8 * fed + 65_536


def heads(data: bytes) -> None:
    """Decoders of heads: what they accept, they can encode to the same bytes; what they refuse, they refuse by WireError."""
    kind, payload = data[:1], data[1:]
    try:
        if kind == b"q":
            bind, head = f.decode_request(payload)
            assert f.encode_request(bind, head) == payload
        elif kind == b"s":
            status, head = f.decode_response(payload)
            assert f.encode_response(status, head) == payload
        elif kind == b"t":
            assert f.encode_trailers(f.decode_trailers(payload)) == payload
        elif kind == b"r":
            code, detail = f.decode_reset(payload)
            assert len(f.encode_reset(code, detail)) <= 2 + f.MAX_RESET_DETAIL
        else:
            body = f.decode_json(f.BIND, payload)
            f.member(f.BIND, body, "grant", str).encode()
    except WireError:
        pass


def hello(data: bytes) -> None:
    """The ClientHello: a verdict on any bytes, the same however many were there before, and never a need that does not rise."""
    limit = 8192
    whole = parse(data, limit)
    assert isinstance(whole, Hello | NeedMore | Invalid)
    have = 0
    while have <= len(data):
        found = parse(data[:have], limit)
        if not isinstance(found, NeedMore):
            # Fewer bytes never say anything else than all of them.
            assert found == whole if isinstance(found, Hello) else isinstance(whole, Invalid)
            break
        assert found.total > have
        have = found.total
    if isinstance(whole, Hello):
        assert whole.size <= len(data)
        if whole.sni is not None:
            assert normal_host(whole.sni) == whole.sni


PROXIES = Networks(["10.0.0.0/8"], "trusted_proxies")
VISITOR = "203.0.113.7"


def proxies(data: bytes) -> None:
    """What proxies say of a visitor. A PROXY header is one whatever follows it and however it is cut; and whatever a visitor puts
    into forwarding fields, the client is the one whom the proxy added, or nobody."""
    with contextlib.suppress(ValueError):
        whole = proxy_protocol.read(data, 4096)
        if whole is not None:
            assert 0 < whole.length <= len(data)
            assert proxy_protocol.read(data[: whole.length], 4096) == whole
        for have in range(0, min(len(data), whole.length if whole is not None else len(data)), 7):
            assert proxy_protocol.read(data[:have], 4096) is None
    lines = data.split(b"\n")
    for name, added in ((b"X-Forwarded-For", b"203.0.113.7"), (b"Forwarded", b"for=203.0.113.7;proto=http")):
        fields = [part for line in lines for part in (name, line)]
        told = read([*fields, name, added], "10.0.0.1", PROXIES)
        assert told.client == VISITOR and told.scheme in (None, b"http")
        told = read([name, b", ".join((data, added))], "10.0.0.1", PROXIES)
        assert told.client in ("", VISITOR)
        told = read(
            [*fields, b"X-Forwarded-Proto", data, b"X-Forwarded-Host", data, b"X-Request-Id", data], "10.0.0.1", PROXIES
        )
        flat = told_on(told, "10.0.0.1", b"http", b"web.localhost", 80)
        assert len(flat) == 10 and told.scheme in (None, b"http", b"https")
        assert told.ident is None or told.ident.isascii()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "wire": wire,
    "heads": heads,
    "http1": http.visitor,
    "response": http.target,
    "hello": hello,
    "proxies": proxies,
}
