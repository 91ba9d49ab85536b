"""The state machine of one session (``contracts/wire.md`` sections 3–6): bytes in, calls and bytes out; no I/O and no clock.

    carrier ──receive(message)──►  Session ──►  handler.on_…   (session events)
       ▲                              │    ──►  stream.sink.on_…   (stream events)
       └───────take()◄── out ◄────────┘    ◄──  session.bind(), stream.send_data() …

``take()`` returns the frames to send since the last call: small frames as ``bytes``, to be joined into one message; a large
DATA frame as a ``bytearray`` with :data:`HEADROOM` unused bytes before it, so that a WebSocket header can be put in place
without another copy. ``wake`` is called when ``out`` turns from empty to not empty.

Streams share the connection fairly: the first bytes of each (most answers have no more) go ahead of bulk, and of that there is
:data:`TURN` in a turn of the loop, by streams that take turns. So a small answer waits for little of what this side has
yet to send; what the carrier, the kernel and the other side hold already (some MiB beside 200 downloads) goes before it.

The hot path (REQUEST, RESPONSE, DATA, END, CREDIT) calls the sink directly and makes no event objects.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from struct import Struct
from typing import Any, Protocol

from portico.wire import counts
from portico.wire import frames as f
from portico.wire.counts import Counts
from portico.wire.frames import ANSWER, DATA, F_END, HEADER_SIZE, MAX_PAYLOAD, REQUEST, RESPONSE, WireError
from portico.wire.stream import FIRST, IGNORE, KEPT, LARGE, Lazy, Sink, Stream

pack = f.HEADER.pack
unpack = f.HEADER.unpack_from
#: The same with type and flags as one number, and with the four bytes behind it: with what an ANSWER or a REQUEST begins.
_HOT = Struct("!HIII")
_unpack_hot = _HOT.unpack_from
_HOT_SIZE = _HOT.size
_HOT_ANSWER, _HOT_REQUEST = ANSWER << 8, REQUEST << 8 | F_END
_SESSION_RETURN = f.SESSION_WINDOW // 4
#: Bytes of bulk that one turn of the loop takes up, and what a stream may send of it that had to wait; its last read may be
#: larger, which the turn pays for.
TURN, QUANTUM = 262_144, 65_536
#: Streams that ended while they waited, above which they are taken out of the line at once, if they are half of it.
DEAD_MOST = 256


class Quick(Protocol):
    """Serves requests of one bind at an agent."""

    def quick(self, session: Session, ident: int, payload: bytes) -> Lazy | None:
        """Take a REQUEST without a body whose fields it knows, or return ``None``: then the head is decoded and the handler
        hears of it. It may take only what is valid."""


class Handler(Protocol):
    """Session events. A relay's handler sees binds and tokens, an agent's handler requests and answers to its binds."""

    def on_hello(self, body: dict[str, Any]) -> None: ...
    def on_bind(self, bind: int, grant: str) -> None: ...
    def on_bound(self, bind: int, tunnel: str, name: str, url: str) -> None: ...
    def on_refused(self, bind: int, code: str, detail: str, retryable: bool) -> None: ...
    def on_unbind(self, bind: int, code: str, detail: str) -> None: ...
    def on_auth(self, token: str) -> None: ...
    def on_authed(self, body: dict[str, Any]) -> None: ...
    def on_goaway(self, code: str, detail: str, retry_after_ms: int) -> None: ...
    def on_error(self, code: str, detail: str, retryable: bool) -> None: ...
    def on_pong(self, payload: bytes) -> None: ...
    def on_counts(self, bind: int, counts: Counts) -> None:
        """What happened on a tunnel at the edge. Agent side only."""

    def on_request(self, stream: Stream, bind: int, head: list[bytes], flags: int) -> Sink | None:
        """A new request for ``bind``; returns its sink, or ``None`` after resetting the stream. Agent side only."""

    def on_open(self, stream: Stream, bind: int, info: dict[str, Any]) -> Sink | None:
        """A new TCP connection, as :meth:`on_request`. Agent side only."""


class Session:
    """One side of a session. ``relay`` says which; the other parameters are this side's limits."""

    def __init__(
        self,
        handler: Handler,
        *,
        relay: bool,
        wake: Callable[[], None] = lambda: None,
        max_streams: int = 4096,
        max_window: int = 1_048_576,
        growth: int = 16_777_216,
    ) -> None:
        self.handler = handler
        self.relay = relay
        self.wake = wake
        self.max_streams = max_streams
        self.max_window = max_window
        self.growth = growth
        self.reserve = growth // 2
        self.streams: dict[int, Stream | Lazy] = {}
        #: Streams that wait and have credit of their own: those with first bytes to send, and bulk.
        self.urgent: deque[Stream] = deque()
        self.waiting: deque[Stream] = deque()
        self.turn = TURN
        self.turns = 0  # so far
        self.dead = 0  # streams that ended while they waited
        self.spare = 0
        self.out: list[bytes | bytearray] = []
        #: Whether a frame in :attr:`out` is to be a message of its own.
        self.bulky = False
        self.congested = False
        self.closed = False
        self.greeted = False
        self.last_stream = 0
        #: When the carrier heard the message that is being received (:func:`time.monotonic`): no clock is asked for each frame.
        self.heard = 0.0
        #: When the first of the requests that the next message carries began, set by whoever opens them; the carrier takes it
        #: back with the message. 0 before.
        self.began = 0.0
        self.send_credit = f.SESSION_WINDOW
        self.recv_credit = f.SESSION_WINDOW
        self.recv_unreturned = 0
        #: Whether the other side takes ANSWER, or COUNTS (its HELLO said so).
        self.answers = False
        self.counts = False
        #: Agent: who takes requests whose fields it knows, by bind, if the relay takes ANSWER.
        self.quick: Mapping[int, Quick] = {}

    # ── output ────────────────────────────────────────────────────────────────────────────────────────────────────
    def put(self, part: bytes | bytearray) -> None:
        """Queue one whole frame."""
        if self.closed:
            return
        out = self.out
        out.append(part)
        if len(out) == 1:
            self.wake()

    def take(self) -> list[bytes | bytearray]:
        """The frames queued since the last call."""
        out, self.out = self.out, []
        self.bulky = False
        return out

    def control(self, kind: int, ident: int, **body: Any) -> None:
        """Queue a JSON control frame (HELLO, BIND, BOUND, REFUSED, UNBIND, GOAWAY, AUTH, AUTHED)."""
        self.put(f.json_frame(kind, ident, body))

    def fail(self, code: str, detail: str, retryable: bool = False) -> None:
        """Queue ERROR and end every stream; the carrier flushes and closes the connection."""
        if not self.closed:
            self.control(f.ERROR, 0, code=code, detail=detail[:1024], retryable=retryable)
            self.close(detail)

    def ping(self, payload: bytes) -> None:
        self.put(f.frame(f.PING, 0, payload))

    def open_request(self, bind: int, head: Sequence[bytes], flags: int, sink: Sink, *, parsed: bool = False) -> Stream:
        """Relay: a new stream with REQUEST; ``parsed`` as in :func:`frames.encode_request`.

        Raises ``ValueError`` when the head does not fit or is not a valid one, ``OverflowError`` at a limit.
        """
        payload = f.encode_request(bind, head, parsed)
        stream = self._new_stream(sink, tcp=False)
        stream.upgrade = flags & f.F_UPGRADE != 0
        self.put(f.HEADER.pack(f.REQUEST, flags, stream.id, len(payload)) + payload)
        if flags & f.F_END:
            stream.send_ended = True
        return stream

    def open_encoded(self, payload: bytes, flags: int, sink: Sink) -> Stream:
        """Relay: as :meth:`open_request`, for a payload that the caller made and answers for."""
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"head of {len(payload)} bytes")
        stream = self._new_stream(sink, tcp=False)
        self.put(pack(REQUEST, flags, stream.id, len(payload)) + payload)
        if flags:
            stream.upgrade = flags & f.F_UPGRADE != 0
            stream.send_ended = flags & F_END != 0
        return stream

    def open_lazy(self, bind: bytes, line: bytes, fields: bytes, last: bytes, owner: Lazy) -> int:
        """Relay: a request without a body, for a payload (in four parts) that fits and that the caller answers for.

        Returns the id; raises ``OverflowError`` at a limit.
        """
        streams = self.streams
        ident = self.last_stream + 1
        if self.closed or len(streams) >= self.max_streams or ident >= 2**32:
            raise OverflowError("no more streams on this session")
        self.last_stream = ident
        streams[ident] = owner
        payload = bind + line + fields + last
        out = self.out
        out.append(pack(REQUEST, F_END, ident, len(payload)) + payload)
        if len(out) == 1:
            self.wake()
        return ident

    def make(self, ident: int, sink: Sink) -> Stream:
        """The stream of a lazy request, whose own direction has ended."""
        stream = self.streams[ident] = Stream(self, ident, sink)
        if self.relay:
            stream.send_ended = True
        else:
            stream.recv_ended = True
        return stream

    def answer(self, ident: int, head: bytes, body: bytes) -> None:
        """Agent: the whole answer to a lazy request; ``head`` from :func:`frames.encode_answer`.

        The other side takes ANSWER, and head and body fit into a frame and into the session's credit.
        """
        payload = head + body
        self.send_credit -= len(body)
        del self.streams[ident]
        out = self.out
        out.append(pack(ANSWER, 0, ident, len(payload)) + payload)
        if len(out) == 1:
            self.wake()

    def open_tcp(self, bind: int, info: dict[str, Any], sink: Sink) -> Stream:
        """Relay: a new stream with OPEN; raises ``OverflowError`` at a limit."""
        payload = f.U32.pack(bind) + f.json_frame(f.OPEN, 0, info)[f.HEADER_SIZE :]
        stream = self._new_stream(sink, tcp=True)
        self.put(f.frame(f.OPEN, stream.id, payload))
        return stream

    def _new_stream(self, sink: Sink, tcp: bool) -> Stream:
        if self.closed or len(self.streams) >= self.max_streams or self.last_stream >= 2**32 - 1:
            raise OverflowError("no more streams on this session")
        self.last_stream += 1
        stream = self.streams[self.last_stream] = Stream(self, self.last_stream, sink)
        if tcp:
            stream.tcp = True
        return stream

    # ── the carrier's side ────────────────────────────────────────────────────────────────────────────────────────
    def pause(self) -> None:
        """The carrier's write buffer is full: there is room for first bytes alone, and for few, until :meth:`resume`."""
        self.congested = True
        self.spare = KEPT

    def resume(self) -> None:
        self.congested = False
        self._wake_waiting()

    def next_turn(self) -> None:
        """What was put was taken, and a turn of the loop is over."""
        self.turn = TURN
        self.turns += 1
        if self.waiting or self.urgent:
            self._wake_waiting()

    def queue(self, stream: Stream) -> None:
        """A stream waits that has credit: it has its turn after those that wait already."""
        if stream.sent < FIRST:
            self.urgent.append(stream)
        else:
            self.waiting.append(stream)
        if not self.congested:
            self.wake()  # there must be a next turn

    def _wake_waiting(self) -> None:
        """Tell waiting streams, in the order in which they began to wait, while there is room."""
        for _ in range(len(self.urgent)):
            if not self.urgent:  # who heard that it may go on ended others
                break
            if self.send_credit <= 0 or (self.congested and self.spare <= 0):
                return
            stream = self.urgent.popleft()
            if stream.sent < FIRST:
                self._go_on(stream)
            else:
                self.waiting.append(stream)
        waiting = self.waiting
        while waiting and not self.congested and self.send_credit > KEPT:
            if self.turn <= 0:
                self.wake()
                return
            stream = waiting.popleft()
            if stream.waits and stream.send_credit > 0:
                self.turn -= QUANTUM
                stream.quantum, stream.had_turn = QUANTUM, self.turns
                self._go_on(stream)

    def left_line(self) -> None:
        """A stream ended that waited. It is found out when its turn comes, but that may be long in coming: a peer that reads next
        to nothing, and visitors who come and go, would pile them up."""
        self.dead += 1
        if self.dead > DEAD_MOST and 2 * self.dead > len(self.urgent) + len(self.waiting):
            self.dead = 0
            for line in (self.urgent, self.waiting):
                alive = [stream for stream in line if stream.waits]
                line.clear()
                line.extend(alive)

    def _go_on(self, stream: Stream) -> None:
        """One that is over by now, or used its credit meanwhile, does not."""
        if stream.waits and stream.send_credit > 0:
            stream.waits = False
            stream.sink.on_credit()

    def close(self, detail: str = "connection lost") -> None:
        """The connection ended: every stream is reset (``internal``) towards its own owner. Idempotent."""
        if self.closed:
            return
        self.closed = True
        for owner in list(self.streams.values()):
            stream = owner if isinstance(owner, Stream) else owner.materialise()
            sink = stream.sink
            stream.close()
            sink.on_reset(f.INTERNAL, detail)

    def feed(self, message: bytes | memoryview) -> bool:
        """As :meth:`receive`, but a protocol error queues ERROR, ends the session and answers ``False``."""
        try:
            self.receive(message)
        except WireError as err:
            self.fail(err.code, err.detail)
            return False
        return not self.closed

    def receive(self, message: bytes | memoryview) -> None:
        """One WebSocket message of whole frames. Raises :class:`WireError` when the peer broke the protocol."""
        size = len(message)
        if not 0 < size <= f.MAX_MESSAGE:
            raise WireError("message is empty or too long")
        if size > LARGE and unpack(message)[3] == size - HEADER_SIZE:
            # A large frame comes alone: it is copied once, and for many small ones slices of bytes are cheap.
            self._one(bytes(message[:HEADER_SIZE]), bytes(message[HEADER_SIZE:]))
            return
        data = bytes(message)
        at = 0
        hot = self._hot()
        usual = self._answers if self.relay else self._requests
        while at < size and not self.closed:
            if data[at] == hot:
                before, at = at, usual(data, at, size)
                if at != before:
                    continue
            if size - at < HEADER_SIZE:
                raise WireError("message ends within a frame header")
            start = at + HEADER_SIZE
            at = start + unpack(data, at)[3]
            self._one(data[start - HEADER_SIZE : start], data[start:at])
            hot = self._hot()

    def _hot(self) -> int:
        """The type of frame that messages are mostly made of; none before HELLO."""
        return -1 if not self.greeted else ANSWER if self.relay else REQUEST if self.answers else -1

    # Frames in which all is as usual, without a call for each. What is special about one, if only that it is short, is said
    # by the ordinary way: both return where the first such begins.

    def _answers(self, data: bytes, at: int, size: int) -> int:
        """Relay: whole answers to lazy requests."""
        streams, last, taken = self.streams, size - _HOT_SIZE, 0
        while at <= last:
            kind, ident, length, more = _unpack_hot(data, at)
            start = at + HEADER_SIZE
            end = start + length
            body = start + 2 + (more >> 16)
            if kind != _HOT_ANSWER or not body <= end <= size or length > MAX_PAYLOAD:
                break
            asked = streams.get(ident)
            if asked is None or isinstance(asked, Stream) or not asked.on_whole(data[start + 2 : body], data[body:end]):
                break
            del streams[ident]
            taken += end - body
            at = end
        if taken:
            self._received(taken)
        return at

    def _requests(self, data: bytes, at: int, size: int) -> int:
        """Agent: requests without a body for binds that :attr:`quick` knows."""
        streams, quick, last = self.streams, self.quick, size - _HOT_SIZE
        while at <= last and len(streams) < self.max_streams:
            kind, ident, length, bind = _unpack_hot(data, at)
            start = at + HEADER_SIZE
            end = start + length
            if kind != _HOT_REQUEST or not 4 < length <= MAX_PAYLOAD or end > size or ident <= self.last_stream:
                break
            serves = quick.get(bind)
            owner = serves.quick(self, ident, data[start:end]) if serves is not None else None
            if owner is None:
                break
            self.last_stream = ident
            streams[ident] = owner
            at = end
        return at

    def _one(self, header: bytes, payload: bytes) -> None:
        """One frame, which may be cut short or have a length that it must not have."""
        kind, flags, ident, length = unpack(header)
        if length > MAX_PAYLOAD or length != len(payload):
            raise WireError("frame is too long or cut short")
        if flags and flags & ~f.FLAGS.get(kind, 0):
            raise WireError("undefined flags")
        if not self.greeted:
            self._frame(kind, flags, ident, payload)
        elif kind == REQUEST:
            self._on_request(ident, payload, flags)
        elif kind == DATA:
            self._on_data(ident, payload, flags != 0)
        elif kind == ANSWER:
            self._on_answer(ident, payload)
        else:
            self._frame(kind, flags, ident, payload)

    # ── frames ────────────────────────────────────────────────────────────────────────────────────────────────────
    def _frame(self, kind: int, flags: int, ident: int, payload: bytes) -> None:
        if not self.greeted and kind not in (f.HELLO, f.ERROR):
            raise WireError("the first frame must be HELLO")
        if kind == RESPONSE:
            self._on_response(ident, payload, flags & f.F_END != 0)
        elif kind == REQUEST:
            self._on_request(ident, payload, flags)
        elif kind == f.CREDIT:
            self._on_credit(ident, payload)
        elif kind == f.END:
            self._on_end(ident, payload)
        elif kind == f.RESET:
            self._on_reset(ident, payload)
        elif kind in (f.PING, f.PONG):
            self._on_ping(kind, ident, payload)
        elif kind == f.INTERIM:
            self._on_interim(ident, payload)
        elif kind == f.OPEN:
            self._on_open(ident, payload)
        elif kind == f.OPENED:
            self._on_opened(ident, payload)
        else:
            self._on_control(kind, ident, payload)

    def _stream(self, ident: int) -> Stream | None:
        """The open stream, or ``None`` for one that ended; raises for one that never was."""
        stream = self.streams.get(ident)
        if stream is None:
            if ident == 0 or ident > self.last_stream:
                raise WireError("frame for a stream that was never opened")
            return None
        return stream.materialise() if stream.lazy else stream  # type: ignore[union-attr]

    def _on_data(self, ident: int, data: bytes, end: bool) -> None:
        size = len(data)
        self._received(size)
        stream = self._stream(ident)
        if stream is None:
            return
        if stream.recv_ended or (self.relay and not stream.answered):
            raise WireError("DATA outside of a body")
        stream.recv_credit -= size
        if stream.recv_credit < 0:
            raise WireError("more DATA than stream credit", "wire.flow_control")
        if end:
            stream.received_end()
        stream.sink.on_data(data, end)
        if end and stream.send_ended:
            stream.close()

    def _received(self, size: int) -> None:
        """Account for DATA against the session's credit, and give it back in quarters."""
        self.recv_credit -= size
        if self.recv_credit < 0:
            raise WireError("more DATA than session credit", "wire.flow_control")
        self.recv_unreturned += size
        if self.recv_unreturned >= _SESSION_RETURN:
            self.recv_credit += self.recv_unreturned
            self.put(f.frame(f.CREDIT, 0, f.U32.pack(self.recv_unreturned)))
            self.recv_unreturned = 0

    def _on_response(self, ident: int, payload: bytes, end: bool) -> None:
        if not self.relay:
            raise WireError("RESPONSE sent to an agent")
        status, head = f.decode_response(payload)
        stream = self._stream(ident)
        if stream is None:
            return
        if stream.tcp or stream.answered or (status < 200 and (status != 101 or end or not stream.upgrade)):
            raise WireError("unexpected RESPONSE")
        stream.answered = True
        if end:
            stream.recv_ended = True
        stream.sink.on_response(status, head, end)
        if end and stream.send_ended:
            stream.close()

    def _on_answer(self, ident: int, payload: bytes) -> None:
        """RESPONSE and DATA in one: what most answers are."""
        if not self.relay:
            raise WireError("ANSWER sent to an agent")
        response, body = f.decode_answer(payload)
        owner = self.streams.get(ident)
        if owner is not None and owner.lazy and owner.on_whole(response, body):  # type: ignore[union-attr]
            del self.streams[ident]
            self._received(len(body))
        else:
            self._on_response(ident, response, False)
            self._on_data(ident, body, True)

    def _on_interim(self, ident: int, payload: bytes) -> None:
        if not self.relay:
            raise WireError("INTERIM sent to an agent")
        status, head = f.decode_response(payload)
        stream = self._stream(ident)
        if stream is None:
            return
        if stream.tcp or stream.answered or not 100 <= status <= 199 or status == 101:
            raise WireError("unexpected INTERIM")
        stream.sink.on_interim(status, head)

    def _on_end(self, ident: int, payload: bytes) -> None:
        trailers = f.decode_trailers(payload)
        stream = self._stream(ident)
        if stream is None:
            return
        if stream.recv_ended or (self.relay and not stream.answered):
            raise WireError("END outside of a body")
        stream.received_end()
        stream.sink.on_end(trailers)
        if stream.send_ended:
            stream.close()

    def _on_reset(self, ident: int, payload: bytes) -> None:
        code, detail = f.decode_reset(payload)
        stream = self._stream(ident)
        if stream is not None:
            sink = stream.sink
            stream.close()
            sink.on_reset(code, detail)

    def _on_credit(self, ident: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise WireError("CREDIT has a bad length")
        increment = f.U32.unpack(payload)[0]
        if not increment:
            raise WireError("CREDIT of zero", "wire.flow_control")
        if ident == 0:
            self.send_credit += increment
            if self.send_credit > f.MAX_CREDIT:
                raise WireError("session credit over the limit", "wire.flow_control")
            self._wake_waiting()
            return
        stream = self._stream(ident)
        if stream is None:
            return
        had = stream.send_credit
        stream.send_credit += increment
        if stream.send_credit > f.MAX_CREDIT:
            raise WireError("stream credit over the limit", "wire.flow_control")
        if stream.waits and had <= 0:
            self.queue(stream)
            self._wake_waiting()

    def _on_ping(self, kind: int, ident: int, payload: bytes) -> None:
        if ident or len(payload) != 8:
            raise WireError("PING or PONG has a bad id or length")
        if kind == f.PING:
            self.put(f.frame(f.PONG, 0, payload))
        else:
            self.handler.on_pong(payload)

    def _accept(self, ident: int, tcp: bool) -> Stream | None:
        """Agent: the stream that REQUEST or OPEN opens; ``None`` when it was refused at the limit."""
        if self.relay:
            raise WireError("streams are opened by the relay")
        if ident <= self.last_stream:
            raise WireError("stream ids must grow")
        self.last_stream = ident
        if len(self.streams) >= self.max_streams:
            self.put(f.frame(f.RESET, ident, f.encode_reset(f.TOO_MANY_STREAMS, "stream limit of the agent")))
            return None
        stream = self.streams[ident] = Stream(self, ident, IGNORE)
        if tcp:
            stream.tcp = True
        return stream

    def _on_request(self, ident: int, payload: bytes, flags: int) -> None:
        bind, head = f.decode_request(payload)
        stream = self._accept(ident, tcp=False)
        if stream is None:
            return
        stream.recv_ended = flags & f.F_END != 0
        stream.upgrade = flags & f.F_UPGRADE != 0
        sink = self.handler.on_request(stream, bind, head, flags)
        if sink is not None and not stream.closed:
            stream.sink = sink

    def _on_open(self, ident: int, payload: bytes) -> None:
        if len(payload) < 4:
            raise WireError("OPEN is too short")
        info = f.decode_json(f.OPEN, payload[4:])
        for name in ("peer", "local"):
            f.member(f.OPEN, info, name, str)
        stream = self._accept(ident, tcp=True)
        if stream is None:
            return
        sink = self.handler.on_open(stream, f.U32.unpack_from(payload)[0], info)
        if sink is not None and not stream.closed:
            stream.sink = sink

    def _on_opened(self, ident: int, payload: bytes) -> None:
        if not self.relay or payload:
            raise WireError("unexpected OPENED")
        stream = self._stream(ident)
        if stream is None:
            return
        if not stream.tcp or stream.answered:
            raise WireError("unexpected OPENED")
        stream.answered = True
        stream.sink.on_opened()

    def _on_control(self, kind: int, ident: int, payload: bytes) -> None:
        if kind not in f.NAMES:
            raise WireError(f"unknown frame type {kind:#04x}")
        on_bind_id = kind in (f.BIND, f.BOUND, f.REFUSED, f.UNBIND, f.COUNTS)
        if on_bind_id != (ident != 0):
            raise WireError(f"{f.NAMES[kind]} has a bad id")
        if kind in (_RELAY_HEARS if not self.relay else _AGENT_HEARS):
            raise WireError(f"{f.NAMES[kind]} sent the wrong way")
        self._control_event(kind, ident, f.decode_json(kind, payload))

    def _control_event(self, kind: int, ident: int, body: dict[str, Any]) -> None:
        def text(name: str) -> str:
            value: str = f.member(kind, body, name, str)
            return value

        handler = self.handler
        if kind == f.HELLO:
            self._hello(body)
        elif kind == f.BIND:
            handler.on_bind(ident, text("grant"))
        elif kind == f.BOUND:
            handler.on_bound(ident, text("tunnel"), text("name"), text("url"))
        elif kind == f.REFUSED:
            handler.on_refused(ident, text("code"), text("detail"), body.get("retryable") is True)
        elif kind == f.UNBIND:
            handler.on_unbind(ident, text("code"), text("detail"))
        elif kind == f.AUTH:
            handler.on_auth(text("token"))
        elif kind == f.AUTHED:
            text("expires_at")
            handler.on_authed(body)
        elif kind == f.COUNTS:
            handler.on_counts(ident, counts.decode(body))
        elif kind == f.GOAWAY:
            retry = f.member(kind, body, "retry_after_ms", int)
            handler.on_goaway(text("code"), text("detail"), min(max(retry, 0), 3_600_000))
        else:
            code, detail, retryable = text("code"), text("detail"), body.get("retryable") is True
            self.close(detail)
            handler.on_error(code, detail, retryable)

    def _hello(self, body: dict[str, Any]) -> None:
        if self.greeted:
            raise WireError("HELLO twice")
        if self.relay:
            versions = f.member(f.HELLO, body, "versions", list)
            f.member(f.HELLO, body, "agent", str)
            f.count(f.HELLO, body, "connect")
            self.counts = body.get("counts") is True
            if f.VERSION not in versions:
                raise WireError(f"this relay speaks version {f.VERSION} only", "wire.version_unsupported")
        elif f.member(f.HELLO, body, "version", int) != f.VERSION:
            raise WireError(f"this agent speaks version {f.VERSION} only", "wire.version_unsupported")
        else:
            for name in ("relay", "session"):
                f.member(f.HELLO, body, name, str)
            for name in ("ping_interval_ms", "ping_timeout_ms"):
                f.count(f.HELLO, body, name, least=1, most=3_600_000)
            self.answers = body.get("answers") is True
        self.greeted = True
        self.handler.on_hello(body)


#: Frames that only one side may receive.
_RELAY_HEARS = frozenset((f.BIND, f.AUTH))
_AGENT_HEARS = frozenset((f.BOUND, f.REFUSED, f.AUTHED, f.COUNTS))
