"""What the inspector keeps of the requests an agent serves: a ring bounded in bytes, oldest out first.

    Exchange ──Tap.begin()──► Entry ──answer(), request_data(), response_data(), finish()──►  (in the ring all the while)
                                │
    inspector, replay ◄── Recorder.newest(), find() ◄── nothing is decoded or formatted before somebody looks

This is on the path of every request, so an entry is little: the head as it went to the target (bytes that exist anyway),
the answer's head as its frame has it, and references to the first bytes of the bodies. Tens of thousands of entries of few
objects are also freed faster than of many. Times are :func:`time.perf_counter` values; :meth:`Recorder.wall` makes dates of
them.
"""

from __future__ import annotations

import time
import weakref
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

from portico.settings import AgentSettings
from portico.wire import frames as f

#: What an entry costs beside its bytes: the object, its place in the ring, the headers of its parts.
_ENTRY_BYTES = 480
#: The same for a request that was over when it was noted.
_WHOLE_BYTES = 320
#: A first piece of body up to this size is kept as it is and counted when the request is over.
_SMALL = 4096
#: Bytes that are freed at once beyond what must be, so that not every request frees another one.
_EVICT_BYTES = 65_536
#: Requests still running that stay listed, without their bodies, after the ring had to let go of them.
_RUNNING_KEPT = 256
#: Interim answers that are kept of one request.
_INTERIM_KEPT = 16
#: Seconds that wall clock and monotonic clock may drift apart (a step, a sleeping machine) before it is noted.
_DRIFT_SECONDS = 0.25


class Extra:
    """What few requests have: more than a small body, trailers, interim answers, an origin, a bad end.

    ``failure``: why an answer is missing or broken. ``aborted``: why the visitor did not take it to its end.
    """

    __slots__ = (
        "aborted", "failure", "interim", "replay_of", "request_body", "request_room", "request_trailers", "response_room",
        "response_trailers", "sent", "whole",
    )  # fmt: skip

    def __init__(self, room: int) -> None:
        self.request_room = self.response_room = room
        self.request_body: bytes | bytearray | None = None
        self.sent = 0
        self.whole = False
        self.request_trailers: list[bytes] = []
        self.response_trailers: list[bytes] = []
        self.interim: list[tuple[int, list[bytes]]] = []
        self.replay_of = 0
        self.failure = self.aborted = ""


class Entry:
    """One request and its answer, complete or still running (``ended`` is 0 then).

    ``out`` is the head as it was written to the target, ``payload`` the answer's as it went to the relay. The
    bodies are the first ``inspect_body_max_bytes`` as they were on the wire; after a 101 they are what either side sent.
    """

    __slots__ = (
        "answered", "ended", "extra", "flags", "out", "payload", "received", "response_body", "ring", "seq", "size",
        "started", "status", "tap",
    )  # fmt: skip

    # Set by Tap.begin: an __init__ would double the cost.
    tap: Tap
    ring: Recorder | _Gone
    seq: int
    out: bytes
    flags: int
    started: float
    answered: float
    ended: float
    status: int
    received: int
    size: int
    payload: bytes | None
    response_body: bytes | bytearray | None
    extra: Extra | None

    # ── the hot path ──────────────────────────────────────────────────────────────────────────────────────────────
    def answer(self, status: int, payload: bytes) -> None:
        """The response head, as the RESPONSE frame has it."""
        self.answered = perf_counter()
        self.status = status
        self.payload = payload

    def response_data(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes of the target's body, or of its direction after a 101."""
        size = len(data)
        if not self.received and size <= _SMALL and type(data) is bytes:
            self.received = size
            self.response_body = data
        else:
            self._more_data(data, size)

    def finish(self, status: int, ended: float = 0.0) -> None:
        """The request is over, since ``ended`` or now."""
        self.ended = ended or perf_counter()
        size = len(self.out) + _ENTRY_BYTES
        if self.payload is not None:
            size += len(self.payload)
        if self.extra is None:
            size += self.received
        elif self.extra.aborted and self.payload is not None:
            status = self.status
        self.status = status
        self.size += size
        ring = self.ring
        ring.bytes += size
        if ring.bytes > ring.limit:
            ring.evict()

    # ── less often ────────────────────────────────────────────────────────────────────────────────────────────────
    def extend(self) -> Extra:
        """Make room for what few requests have."""
        extra = self.extra
        if extra is None:
            room = self.ring.body_limit
            extra = self.extra = Extra(room)
            if self.response_body is not None:
                self.response_body = self.response_body[:room]
                extra.response_room -= len(self.response_body)
                self._charge(len(self.response_body))
        return extra

    def _more_data(self, data: bytes | bytearray | memoryview, size: int) -> None:
        extra = self.extend()
        self.received += size
        room = extra.response_room
        if room:
            self.response_body = _join(self.response_body, data[:room])
            extra.response_room -= min(size, room)
            self._charge(min(size, room))

    def request_data(self, data: bytes) -> None:
        """Bytes of the visitor's body, or of its direction after a 101."""
        extra = self.extend()
        size, room = len(data), extra.request_room
        extra.sent += size
        if room:
            extra.request_body = (
                data if extra.request_body is None and size <= room else _join(extra.request_body, data[:room])
            )
            extra.request_room -= min(size, room)
            self._charge(min(size, room))

    def request_end(self, trailers: list[bytes]) -> None:
        """The visitor's body is whole."""
        extra = self.extend()
        extra.whole = True
        if trailers:
            extra.request_trailers = trailers
            self._charge(_cost(trailers))

    def interim(self, status: int, fields: list[bytes]) -> None:
        """A 1xx answer before the final one."""
        kept = self.extend().interim
        if len(kept) < _INTERIM_KEPT:
            kept.append((status, fields))
            self._charge(_cost(fields))

    def response_trailers(self, trailers: list[bytes]) -> None:
        """Trailer fields of the answer."""
        self.extend().response_trailers = trailers
        self._charge(_cost(trailers))

    def fail(self, why: str) -> None:
        """The answer will not come, or not to its end."""
        self.extend().failure = why

    def abort(self, why: str) -> None:
        """The visitor, or the way to it, is gone; :meth:`finish` follows."""
        self.extend().aborted = why or "the visitor left"

    def _charge(self, size: int) -> None:
        self.size += size
        self.ring.bytes += size
        if self.ring.bytes > self.ring.limit:
            self.ring.evict()

    def let_go(self) -> None:
        """The ring dropped the entry while it runs: what still comes is counted and not kept."""
        self.ring = _GONE
        extra = self.extend()
        extra.request_room = extra.response_room = 0
        self.response_body = extra.request_body = None
        extra.interim = []

    # ── readers ───────────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def id(self) -> str:
        """What the outside calls it; of this run of the agent alone."""
        return f"{self.tap.recorder.run}-{self.seq}"

    @property
    def more(self) -> Extra:
        """``extra``, or one that says nothing."""
        return self.extra or Extra(0)

    @property
    def complete(self) -> bool:
        """Whether the request's body arrived and was kept to its last byte."""
        if self.flags & f.F_END:
            return True
        extra = self.extra
        return extra is not None and extra.whole and extra.sent == len(extra.request_body or b"")

    def line(self) -> tuple[bytes, bytes]:
        """Method and request target."""
        method, _, rest = self.out.partition(b" ")
        return method, rest[: rest.find(b" HTTP/1.1\r\n")]

    def head(self) -> list[bytes]:
        """The request's head as ``[method, path, name, value, …]``."""
        parts: list[bytes] = [*self.line()]
        for line in self.out.split(b"\r\n")[1:-2]:
            name, _, value = line.partition(b": ")
            parts += (name, value)
        return parts

    def answer_head(self) -> list[bytes]:
        """The answer's head as ``[reason, name, value, …]``; empty without one."""
        return f.decode_response(self.payload)[1] if self.payload is not None else []


class _Gone:
    """The ring of entries that no ring holds."""

    bytes = 0
    limit = 1 << 62
    body_limit = 0

    def evict(self) -> None:
        """Nothing to do: nothing is held."""


_GONE = _Gone()


def _join(body: bytes | bytearray | None, data: bytes | bytearray | memoryview) -> bytes | bytearray:
    """``body`` with ``data`` behind it; never the caller's own buffer."""
    if body is None:
        return bytes(data)
    if type(body) is bytes:
        body = bytearray(body)
    body += data
    return body


def _cost(fields: Sequence[bytes]) -> int:
    """Bytes that a list of names and values holds in memory."""
    return 48 * len(fields) + sum(map(len, fields))


#: Number, size, tap, head as the target got it, start, end, status, head of the answer, body: see :meth:`Tap.whole`.
Whole = tuple[int, int, "Tap", bytes, float, float, int, bytes, bytes]


class Tap:
    """Where one tunnel's requests enter the recorder. ``serves`` is the tunnel's forwarder or folder."""

    __slots__ = ("__weakref__", "name", "recorder", "serves", "target")

    def __init__(self, recorder: Recorder, serves: Any, target: str) -> None:
        self.recorder = recorder
        self.serves = serves
        self.target = target
        #: The tunnel's name, once the platform gave it one.
        self.name = ""

    def begin(self, out: bytes, flags: int, started: float) -> Entry:
        """A request came; ``out`` is its head as the target gets it."""
        ring = self.recorder
        ring.last = seq = ring.last + 1
        entry = self.fill(seq, out, flags, started)
        ring.entries.append(entry)
        return entry

    def fill(self, seq: int, out: bytes, flags: int, started: float) -> Entry:
        """An entry of this tunnel that the ring does not hold (yet)."""
        entry = Entry()
        entry.tap = self
        entry.ring = self.recorder
        entry.seq = seq
        entry.out = out
        entry.flags = flags
        entry.started = started
        entry.answered = entry.ended = 0.0
        entry.status = entry.received = entry.size = 0
        entry.payload = entry.response_body = entry.extra = None
        return entry

    def whole(self, out: bytes, started: float, ended: float, status: int, head: bytes, body: bytes) -> None:
        """A request without a body and all of its answer, both over; ``head`` as :func:`frames.encode_answer` made it.

        Most requests are such, so nothing is made of them before somebody looks.
        """
        ring = self.recorder
        if len(body) > ring.body_limit:
            entry = self.begin(out, f.F_END, started)
            entry.answer(status, head[2:])
            entry.response_data(body)
            entry.answered = ended
            entry.finish(status, ended)
            return
        ring.last = seq = ring.last + 1
        size = len(out) + len(body) + len(head) + _WHOLE_BYTES
        ring.entries.append((seq, size, self, out, started, ended, status, head, body))
        ring.bytes += size
        if ring.bytes > ring.limit:
            ring.evict()


class Recorder:
    """The ring: at most ``inspect_max_bytes``, counted as what the entries hold in memory."""

    def __init__(self, settings: AgentSettings, run: str) -> None:
        self.run = run
        self.limit = settings.inspect_max_bytes
        self.body_limit = settings.inspect_body_max_bytes
        self.bytes = 0
        #: Number of the newest entry; they count from 1 without a gap.
        self.last = 0
        #: Entries that had to make room.
        self.evicted = 0
        #: Raised by :meth:`clear`, so that a reader knows that its list is old.
        self.clears = 0
        self.entries: deque[Entry | Whole] = deque()
        #: Taps live as long as their tunnels, or entries of these: tunnels come and go with portico.yml.
        self._taps: weakref.WeakSet[Tap] = weakref.WeakSet()
        self._running: dict[int, Entry] = {}
        self._clock: list[tuple[float, float]] = [(0.0, time.time() - perf_counter())]

    def tap(self, serves: Any, target: str, name: str = "") -> Tap:
        """An entrance for one tunnel, whose name may be told later."""
        made = Tap(self, serves, target)
        made.name = name
        self._taps.add(made)
        return made

    def evict(self) -> None:
        """Drop the oldest entries until the rest fits; those that still run stay listed, without bodies."""
        entries = self.entries
        goal = self.limit - min(_EVICT_BYTES, self.limit >> 4)
        while self.bytes > goal and entries:
            entry = entries.popleft()
            self.evicted += 1
            if not isinstance(entry, Entry):
                self.bytes -= entry[1]
                continue
            self.bytes -= entry.size
            if not entry.ended:
                entry.let_go()
                self._running[entry.seq] = entry
                if len(self._running) > _RUNNING_KEPT:
                    self._forget_ended()

    def _forget_ended(self) -> None:
        self._running = {seq: entry for seq, entry in self._running.items() if not entry.ended}
        while len(self._running) > _RUNNING_KEPT:
            del self._running[next(iter(self._running))]

    def clear(self) -> None:
        """Forget what is over; requests still running stay."""
        running = [entry for entry in self.entries if isinstance(entry, Entry) and not entry.ended]
        self.entries.clear()
        self.entries.extend(running)
        self.bytes = sum(entry.size for entry in running)
        self.evicted = 0
        self.clears += 1

    # ── readers ───────────────────────────────────────────────────────────────────────────────────────────────────
    def newest(self, before: int | None = None) -> Iterator[Entry]:
        """Entries from the newest to the oldest, those below number ``before``; a snapshot, safe across awaits."""
        self._reveal()
        kept = list(self.entries)
        if before is not None:
            del kept[bisect_left(kept, before, key=_seq) :]
        oldest = _seq(kept[0]) if kept else before
        for one in reversed(kept):
            yield one if isinstance(one, Entry) else _entry(one)
        for entry in sorted(self._running.values(), key=_seq, reverse=True):
            if not entry.ended and (oldest is None or entry.seq < oldest):
                yield entry

    def running(self) -> list[Entry]:
        """The requests that are not over."""
        self._reveal()
        kept = [*self._running.values(), *(one for one in self.entries if isinstance(one, Entry))]
        return [entry for entry in kept if not entry.ended]

    def _reveal(self) -> None:
        for tap in list(self._taps):
            if tap.serves is not None:
                tap.serves.reveal()

    def find(self, seq: int) -> Entry | None:
        """The entry with a number, while it is kept."""
        at = bisect_left(self.entries, seq, key=_seq)
        if at < len(self.entries) and _seq(one := self.entries[at]) == seq:
            return one if isinstance(one, Entry) else _entry(one)
        entry = self._running.get(seq)
        return entry if entry is not None and not entry.ended else None

    def note_clock(self) -> None:
        """Remember a step of the wall clock; called now and then."""
        offset = time.time() - perf_counter()
        if abs(offset - self._clock[-1][1]) > _DRIFT_SECONDS:
            self._clock.append((perf_counter(), offset))
            del self._clock[:-64]

    def wall(self, moment: float) -> float:
        """Seconds since 1970 of a :func:`time.perf_counter` value."""
        at = bisect_right(self._clock, moment, key=lambda row: row[0])
        return moment + self._clock[max(0, at - 1)][1]


def head_bytes(head: Sequence[bytes]) -> bytes:
    """``[method, path, name, value, …]`` as an HTTP/1.1 head, for a request that no target gets as bytes."""
    lines = [b"%b %b HTTP/1.1" % (head[0], head[1])]
    lines += [b"%b: %b" % pair for pair in zip(head[2::2], head[3::2], strict=True)]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _seq(entry: Entry | Whole) -> int:
    return entry.seq if isinstance(entry, Entry) else entry[0]


def _entry(whole: Whole) -> Entry:
    """The entry of what :meth:`Tap.whole` noted."""
    seq, size, tap, out, started, ended, status, head, body = whole
    entry = tap.fill(seq, out, f.F_END, started)
    entry.answered = entry.ended = ended
    entry.status, entry.size, entry.received = status, size, len(body)
    entry.payload = head[2:]  # after its length
    entry.response_body = body or None
    return entry
