"""Bytes both ways, within credit and with half-close: a connection after 101, and every TCP stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from portico.kit.sockets import end_output
from portico.wire import frames as f

if TYPE_CHECKING:
    from portico.agent.recorder import Entry


class Connection(Protocol):
    """A connection to the target that is bytes both ways: after a 101, or from its start."""

    transport: Any
    raw: RawPipe | None
    lost: bool
    write_paused: bool

    def hold(self) -> None:
        """Stop reading until the relay grants credit."""

    def unpause(self) -> None:
        """Read again."""

    def abort(self) -> None:
        """Close at once; nothing more is heard of the connection."""

    def reset(self) -> None:
        """The same with RST: what was sent is not all that there was."""


class RawStream(Protocol):
    """What a pipe needs of its stream: that of a session, or the TLS in front of it (``tls_stream.py``)."""

    stalled: bool

    @property
    def closed(self) -> bool: ...
    def sendable(self) -> int: ...
    def wait(self) -> None: ...
    def send_opened(self) -> None: ...
    def send_data(self, data: bytes | memoryview) -> None: ...
    def send_end(self) -> None: ...
    def consumed(self, size: int) -> None: ...
    def reset(self, code: int, detail: str = "") -> None: ...


class RawPipe:
    """The sink of a raw stream, and the reader of its connection to the target. ``done`` is called once, at its end."""

    __slots__ = (
        "_done",
        "_read_ended",
        "_to_relay",
        "_to_target",
        "_uncredited",
        "_write_ended",
        "connection",
        "entry",
        "over",
        "stream",
    )

    def __init__(self, stream: RawStream, done: Callable[[], None]) -> None:
        self.stream = stream
        self.connection: Connection | None = None
        #: The upgraded request, when it is recorded.
        self.entry: Entry | None = None
        self.over = False
        self._done = done
        self._to_target: list[bytes] = []
        self._to_relay: list[bytes] = []
        self._read_ended = self._write_ended = False
        self._uncredited = 0

    def attach(self, connection: Connection) -> None:
        """The connection is there: send what arrived before it."""
        self.connection = connection
        connection.raw = self
        waiting, self._to_target = self._to_target, []
        for data in waiting:
            self._write(connection, data)
        if self._write_ended:
            self._write_eof(connection)

    # ── from the target ───────────────────────────────────────────────────────────────────────────────────────────
    def received(self, data: memoryview) -> None:
        """Bytes of the target: within the credit, save the rest of the segment that held the 101."""
        if self.entry is not None:
            self.entry.response_data(data)
        room = 0 if self._to_relay else self.stream.sendable()
        if len(data) <= room:
            self.stream.send_data(data)
        else:
            if room > 0:
                self.stream.send_data(data[:room])
            self._to_relay.append(bytes(data[max(room, 0) :]))
        if (self._to_relay or self.stream.sendable() <= 0) and self.connection is not None:
            self.connection.hold()

    def eof(self) -> bool:
        """The target will send no more; ``True`` keeps the way towards it open (TLS has no half-close)."""
        self._read_ended = True
        if not self._to_relay:
            self._end_towards_relay()
        return not self.over and self.connection is not None and self.connection.transport.can_write_eof()

    def lost(self, exc: Exception | None) -> None:
        """The connection is gone, both ways."""
        if self.over:
            return
        if exc is None and self._write_ended and not self._read_ended:
            # We closed it for want of a half-close (TLS): that is the end of both ways.
            self._read_ended = True
            if not self._to_relay:
                self._end_towards_relay()
        elif exc is not None or not (self._read_ended or self.connection is None):
            self._finish(
                f.TARGET_RESET, "the target reset the connection" if exc else "the target closed the connection"
            )
        elif not self._to_relay:
            self._finish(f.NO_ERROR, "the target closed the connection")

    def _end_towards_relay(self) -> None:
        self.stream.send_end()
        if self.stream.closed:
            self._finish()
        elif self.connection is not None and self.connection.lost:
            self._finish(f.NO_ERROR, "the target closed the connection")

    # ── from the relay ────────────────────────────────────────────────────────────────────────────────────────────
    def on_data(self, data: bytes, end: bool) -> None:
        if data:
            if self.entry is not None:
                self.entry.request_data(data)
            if self.connection is None:
                self._to_target.append(data)
            else:
                self._write(self.connection, data)
        if end:
            self.on_end([])

    def on_end(self, trailers: list[bytes]) -> None:
        self._write_ended = True
        if self.connection is not None:
            self._write_eof(self.connection)

    def on_reset(self, code: int, detail: str) -> None:
        self._finish()

    def on_credit(self) -> None:
        stream = self.stream
        while self._to_relay:
            room = stream.sendable()
            if room <= 0:
                stream.wait()
                return
            data = self._to_relay[0]
            stream.send_data(data[:room])
            if room < len(data):
                self._to_relay[0] = data[room:]
            else:
                del self._to_relay[0]
        if self._read_ended:
            self._end_towards_relay()
        elif stream.sendable() <= 0:
            stream.wait()
        elif self.connection is not None:
            self.connection.unpause()

    def on_response(self, status: int, head: list[bytes], end: bool) -> None: ...
    def on_interim(self, status: int, head: list[bytes]) -> None: ...
    def on_opened(self) -> None: ...

    # ── towards the target ────────────────────────────────────────────────────────────────────────────────────────
    def _write(self, connection: Connection, data: bytes) -> None:
        connection.transport.write(data)
        if connection.write_paused:
            self._uncredited += len(data)
        else:
            self.stream.consumed(len(data))

    def writable(self) -> None:
        """The target takes bytes again: so may the relay."""
        size, self._uncredited = self._uncredited, 0
        self.stream.consumed(size)

    def _write_eof(self, connection: Connection) -> None:
        if self._read_ended and not self._to_relay:
            # Both ways ended. The session closes the stream once this callback returns.
            self._finish(graceful=True)
        elif connection.transport.can_write_eof():
            end_output(connection.transport)
        else:
            connection.transport.close()

    def fail(self, code: int, detail: str) -> None:
        """End both ways with RESET."""
        self._finish(code, detail)

    def _finish(self, code: int | None = None, detail: str = "", graceful: bool = False) -> None:
        if self.over:
            return
        self.over = True
        if code is not None:
            self.stream.reset(code, detail)
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.raw = None
            if graceful or (self._read_ended and self._write_ended):
                connection.transport.close()
            elif self._write_ended:
                connection.abort()
            else:
                connection.reset()
        self._done()
