"""One stream of a session: what its owner may send and has taken, and the credit that bounds both (contracts/wire.md 4 and 5).

The owner is a :class:`Sink`, or, while a request has nothing special about it, a :class:`Lazy` that stands for its stream.
The hot path calls the sink directly and makes no event objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from portico.wire import frames as f

if TYPE_CHECKING:
    from portico.wire.session import Session

#: Bytes left free before a large DATA frame, enough for any WebSocket header (RFC 6455, 5.2: 2 + 8 + 4).
HEADROOM = 14
#: DATA payloads from this size on become a message of their own.
LARGE = 16_384
_PAD = bytes(HEADROOM)
_EMPTY = bytearray()
#: A reader that took this many bytes is fast in itself: kernel buffers, which make every reader look fast at first, are
#: smaller. Until then a stream leaves half of the growth budget alone, so that many slow readers cannot use it up.
PROVEN = 8_388_608
#: Bytes of a stream that go ahead of bulk.
FIRST = 16_384
#: Turns for which a stream keeps what it did not use of its quantum.
KEEPS_QUANTUM = 4
#: Bytes of the session's credit that bulk leaves to first bytes, and of these, what goes into a connection that is congested.
KEPT = 1_048_576


class Sink(Protocol):
    """What a stream's owner implements. After :meth:`on_reset`, or once both directions ended, nothing more is called."""

    def on_response(self, status: int, head: list[bytes], end: bool) -> None:
        """Final response head ``[reason, name, value, …]``; ``end``: no body follows. Relay side only."""

    def on_interim(self, status: int, head: list[bytes]) -> None:
        """A 1xx response. Relay side only."""

    def on_opened(self) -> None:
        """The target accepted the connection of a TCP stream. Relay side only."""

    def on_data(self, data: bytes, end: bool) -> None:
        """Body or connection bytes; call ``stream.consumed(len(data))`` once the far writer has taken them."""

    def on_end(self, trailers: list[bytes]) -> None:
        """The peer's direction ended, with flat trailer fields."""

    def on_reset(self, code: int, detail: str) -> None:
        """The peer (or the end of the session) ended the stream at once, both ways."""

    def on_credit(self) -> None:
        """``stream.sendable()`` is above zero again, after :meth:`Stream.wait`."""


class Lazy(Protocol):
    """The owner of a stream that has nothing but its id: a request without a body, of which nothing special was heard.

    Most requests end so. Whatever else happens to one makes the stream (:meth:`materialise`) and is told to its sink.
    """

    lazy: Literal[True]

    def on_whole(self, response: bytes, body: bytes) -> bool:
        """Relay side: the whole answer, a RESPONSE payload and the body. ``True``: it was taken, the stream is over.

        ``False`` changed nothing: the stream is made, and the answer told to its sink.
        """

    def materialise(self) -> Stream:
        """Make the stream with :meth:`Session.make` and return it."""


class _Ignore:
    """The sink of a stream whose owner let go of it."""

    def on_response(self, status: int, head: list[bytes], end: bool) -> None: ...
    def on_interim(self, status: int, head: list[bytes]) -> None: ...
    def on_opened(self) -> None: ...
    def on_data(self, data: bytes, end: bool) -> None: ...
    def on_end(self, trailers: list[bytes]) -> None: ...
    def on_reset(self, code: int, detail: str) -> None: ...
    def on_credit(self) -> None: ...


IGNORE = _Ignore()


class Stream:
    """One request or connection. ``sink`` is the owner; all methods are safe to call from its callbacks."""

    # Defaults stand on the class: most streams are over before they change more than three of them.
    lazy: ClassVar[bool] = False
    upgrade = False
    answered = False
    closed = False
    send_ended = False
    recv_ended = False
    stalled = False
    tcp = False
    waits = False
    sent = 0
    quantum = 0  # what is left of it
    had_turn = 0  # when it was granted
    send_credit = f.STREAM_WINDOW
    recv_credit = f.STREAM_WINDOW
    window = f.STREAM_WINDOW
    unreturned = 0
    taken = 0

    def __init__(self, session: Session, stream_id: int, sink: Sink) -> None:
        self.session = session
        self.id = stream_id
        self.sink = sink

    def sendable(self) -> int:
        """How many bytes of DATA may be sent now; 0 while the carrier is congested, or others have their turn."""
        session = self.session
        room = session.send_credit
        if self.sent < FIRST:
            if session.congested and session.spare <= 0:
                return 0
        elif session.congested or (session.turn <= 0 and self.granted() <= 0):
            return 0
        else:
            room -= KEPT
        credit = self.send_credit
        return credit if credit < room else room if room > 0 else 0

    def granted(self) -> int:
        """What is left of its quantum, which is for a few turns: kept for ever, those of many streams would go at once."""
        return self.quantum if self.session.turns - self.had_turn <= KEEPS_QUANTUM else 0

    def wait(self) -> None:
        """Ask for one :meth:`Sink.on_credit` when more can be sent."""
        if not self.waits:
            self.waits = True
            if self.send_credit > 0:
                self.session.queue(self)

    def send_response(self, status: int, head: Sequence[bytes], end: bool) -> bytes:
        """RESPONSE, and its payload; raises ``ValueError`` when the head does not fit into a frame or is not a valid one."""
        payload = f.encode_response(status, head)
        self.answered = True
        self.session.put(f.HEADER.pack(f.RESPONSE, f.F_END if end else 0, self.id, len(payload)) + payload)
        if end:
            self._sent_end()
        return payload

    def send_interim(self, status: int, head: Sequence[bytes]) -> None:
        """INTERIM; raises ``ValueError`` when the head does not fit into a frame or is not a valid one."""
        payload = f.encode_response(status, head)
        self.session.put(f.frame(f.INTERIM, self.id, payload))

    def send_opened(self) -> None:
        self.answered = True
        self.session.put(f.frame(f.OPENED, self.id))

    def send_data(self, data: bytes | bytearray | memoryview, end: bool = False) -> None:
        """DATA within the credit that :meth:`sendable` gave; raises ``ValueError`` above it or after the end."""
        size = len(data)
        session = self.session
        if self.send_ended or size > self.send_credit or size > session.send_credit:
            raise ValueError("DATA after the end or above the credit")
        self.send_credit -= size
        session.send_credit -= size
        self.sent += size
        granted = self.granted()
        if size <= granted:
            self.quantum -= size
        else:
            session.turn -= size - granted
            self.quantum = 0
        if session.congested:
            session.spare -= size
        if size < LARGE:
            session.put(f.HEADER.pack(f.DATA, f.F_END if end else 0, self.id, size) + data)
        else:
            self._send_large(memoryview(data), end)
        if end:
            self._sent_end()

    def _send_large(self, data: memoryview, end: bool) -> None:
        for start in range(0, len(data), f.MAX_PAYLOAD):
            chunk = data[start : start + f.MAX_PAYLOAD]
            last = end and start + f.MAX_PAYLOAD >= len(data)
            header = f.HEADER.pack(f.DATA, f.F_END if last else 0, self.id, len(chunk))
            # One allocation that is never zero-filled: half the cost of bytearray(size) and a copy.
            self.session.bulky = True
            self.session.put(_EMPTY.join((_PAD, header, chunk)))

    def send_end(self, trailers: Sequence[bytes] = ()) -> None:
        """END with flat trailer fields; the other direction stays open. Does nothing when this direction has ended.

        Raises ``ValueError`` when the trailers are not valid or do not fit; nothing was sent then.
        """
        if not self.send_ended:
            self.session.put(f.frame(f.END, self.id, f.encode_trailers(trailers)))
            self._sent_end()

    def reset(self, code: int, detail: str = "") -> None:
        """RESET: both directions end at once and the sink hears no more. Does nothing on an ended stream."""
        if not self.closed:
            self.session.put(f.frame(f.RESET, self.id, f.encode_reset(code, detail)))
            self.close()

    def consumed(self, size: int) -> None:
        """``size`` bytes of :meth:`Sink.on_data` were taken by the far writer; credit returns in halves of a window."""
        if self.closed:
            return
        if self.recv_ended:
            self._shrink(size)
            return
        self.unreturned += size
        if self.unreturned * 2 >= self.window:
            self._return_credit()

    def _return_credit(self) -> None:
        """Return credit; double the window of a reader that keeps up, take growth back from one that stalled."""
        session, back = self.session, self.unreturned
        self.unreturned = 0
        self.taken += back
        if self.stalled:
            taken = min(self.window - f.STREAM_WINDOW, back)
            self.window -= taken
            session.growth += taken
            back -= taken
            self.stalled = False
        elif self.window * 2 <= session.max_window and self.window <= session.growth - (
            session.reserve if self.taken < PROVEN else 0
        ):
            session.growth -= self.window
            back += self.window
            self.window *= 2
        if back:
            self.recv_credit += back
            session.put(f.frame(f.CREDIT, self.id, f.U32.pack(back)))

    def _shrink(self, freed: int) -> None:
        """Give window growth back to the session, as far as ``freed`` bytes of the window hold nothing any more."""
        taken = min(self.window - f.STREAM_WINDOW, freed)
        self.window -= taken
        self.session.growth += taken

    def received_end(self) -> None:
        """The peer's direction ended: what it did not use of a grown window goes back at once, the rest when consumed."""
        self.recv_ended = True
        if self.window > f.STREAM_WINDOW:
            self._shrink(self.recv_credit + self.unreturned)
            self.recv_credit = self.unreturned = 0

    def _sent_end(self) -> None:
        self.send_ended = True
        if self.recv_ended:
            self.close()

    def close(self) -> None:
        """Forget the stream without telling the peer (both directions ended, or RESET passed)."""
        if self.closed:
            return
        self.closed = self.send_ended = self.recv_ended = True
        session = self.session
        session.growth += self.window - f.STREAM_WINDOW
        self.window = f.STREAM_WINDOW
        session.streams.pop(self.id, None)
        if self.waits:
            self.waits = False
            session.left_line()
        self.sink = IGNORE
