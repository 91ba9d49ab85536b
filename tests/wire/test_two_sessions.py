"""Two sessions talk over a link that batches, delays and congests as Hypothesis likes; what must hold always holds.

The link keeps order within a direction (it is one TCP connection) and nothing else: frames gather in a queue, are joined into
messages anywhere, and each side is served when the machine says so. Every byte of every stream comes from a pattern that depends
on stream and position, so loss, duplication and reordering all show as a wrong byte.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from portico.wire import frames as f
from portico.wire import session as session_module
from portico.wire import stream as stream_module
from portico.wire.session import Session
from portico.wire.stream import HEADROOM, Stream
from tests.wire.recorder import Recorder, parse, wire_bytes
from tests.wire.vectors import AGENT_HELLO, RELAY_HELLO

PATTERN = bytes(range(251)) * 9_000
GROWTH = 400_000
MAX_WINDOW = 262_144
MAX_STREAMS = 6
SESSION_WINDOW = 500_000
SIZES = st.sampled_from([0, 1, 1000, 16_383, 16_384, 65_536, 65_537, 10**9])


def pattern(ident: int, at: int, size: int) -> bytes:
    start = (ident + at) % 251
    return PATTERN[start : start + size]


@dataclass
class Ear:
    """One side's view of one stream: the sink, or the owner of what is no stream yet, and what a test knows about it."""

    side: Side
    ident: int
    stream: Stream | None = None
    sent: int = 0
    received: int = 0
    consumed: int = 0
    heard_end: bool = False
    heard_reset: bool = False
    did_reset: bool = False
    answered: bool = False
    wants_credit: bool = False
    lazy: bool = False
    takes: bool = True
    whole: bool = False  # it was over without ever being a stream

    def on_whole(self, response: bytes, body: bytes) -> bool:
        assert self.stream is None
        if not self.takes:
            return False
        self.on_response(*f.decode_response(response), end=False)
        self.on_data(body, end=True)
        self.consumed = self.received
        self.whole = True
        return True

    def materialise(self) -> Stream:
        assert self.stream is None and not self.whole
        self.stream = self.side.session.make(self.ident, self)
        return self.stream

    def _hears(self) -> None:
        assert not (self.heard_end or self.heard_reset or self.did_reset), "an ended stream heard something"

    def on_response(self, status: int, head: list[bytes], end: bool) -> None:
        self._hears()
        assert not self.answered
        self.answered = True
        self.heard_end = end

    def on_interim(self, status: int, head: list[bytes]) -> None:
        self._hears()
        assert not self.answered

    def on_opened(self) -> None:
        self._hears()
        assert not self.answered
        self.answered = True

    def on_data(self, data: bytes, end: bool) -> None:
        self._hears()
        assert data == pattern(self.ident, self.received, len(data)), "a byte was lost, doubled or moved"
        self.received += len(data)
        self.heard_end = end

    def on_end(self, trailers: list[bytes]) -> None:
        self._hears()
        self.heard_end = True

    def on_reset(self, code: int, detail: str) -> None:
        assert not (self.heard_reset or self.did_reset)
        self.heard_reset = True

    def on_credit(self) -> None:
        assert self.wants_credit, "credit nobody asked for"
        assert self.stream is not None
        assert self.stream.sendable() > 0
        self.wants_credit = False


@dataclass
class Side(Recorder):
    """One session with its queue of messages towards the other side."""

    relay: bool
    ears: dict[int, Ear] = field(default_factory=dict)
    link: list[bytes] = field(default_factory=list)
    woken: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.session = Session(
            self, relay=self.relay, wake=self.wake, max_streams=MAX_STREAMS, max_window=MAX_WINDOW, growth=GROWTH
        )

    def wake(self) -> None:
        self.woken = True

    def accept(self, stream: Stream) -> Ear:
        assert stream.id not in self.ears
        ear = self.ears[stream.id] = Ear(self, stream.id, stream)
        return ear

    def on_request(self, stream: Stream, bind: int, head: list[bytes], flags: int) -> Ear:
        ear = self.accept(stream)
        ear.heard_end = flags & f.F_END != 0
        return ear

    def on_open(self, stream: Stream, bind: int, info: dict[str, Any]) -> Ear:
        return self.accept(stream)

    def quick(self, ident: int, payload: bytes) -> Ear | None:
        """Half of the requests without a body are known ones."""
        f.decode_request(payload)
        assert ident not in self.ears
        if ident & 1:
            return None
        ear = self.ears[ident] = Ear(self, ident, heard_end=True, lazy=True)
        return ear

    def flush(self, join: int) -> None:
        """Move what is queued to the link, at most `join` frames a message, as the carrier would."""
        self.woken = False
        frames = wire_bytes(self.session.take(), HEADROOM)
        message = b""
        for number, part in enumerate(frames):
            if message and (number % join == 0 or len(message) + len(part) > f.MAX_MESSAGE):
                self.link.append(message)
                message = b""
            message += part
        if message:
            self.link.append(message)
        self.session.next_turn()

    def under_way(self) -> list[tuple[str, int, int, bytes]]:
        """Frames that the other side has not seen."""
        return parse([*self.link, *wire_bytes(self.session.out, HEADROOM)], 0)


class TwoSessions(RuleBasedStateMachine):
    """The machine. `pick` chooses among the streams that a rule could act on."""

    def __init__(self) -> None:
        super().__init__()
        self.relay = Side(relay=True)
        self.agent = Side(relay=False)
        # A session window small enough to run out.
        self.smaller = [
            mock.patch.object(session_module, "_SESSION_RETURN", SESSION_WINDOW // 4),
            mock.patch.object(session_module, "KEPT", SESSION_WINDOW // 8),
            mock.patch.object(stream_module, "KEPT", SESSION_WINDOW // 8),
        ]
        for one in self.smaller:
            one.start()
        for side in (self.relay, self.agent):
            side.session.send_credit = side.session.recv_credit = SESSION_WINDOW
        self.relay.session.receive(AGENT_HELLO)
        self.agent.session.receive(RELAY_HELLO)
        self.agent.session.quick = self.agent.quick

    def side(self, relay: bool) -> tuple[Side, Side]:
        return (self.relay, self.agent) if relay else (self.agent, self.relay)

    def speakers(self, side: Side) -> list[Ear]:
        """Streams on which this side may send DATA now."""
        return [
            ear
            for ear in side.ears.values()
            if ear.stream is not None and not ear.stream.send_ended and (side.relay or ear.answered)
        ]

    # ── the relay opens, the agent answers ───────────────────────────────────────────────────────────────────────
    @precondition(lambda self: len(self.relay.session.streams) < MAX_STREAMS)
    @rule(flags=st.sampled_from([0, 0, f.F_END, f.F_UPGRADE]), tcp=st.booleans())
    def open(self, flags: int, tcp: bool) -> None:
        ear = Ear(self.relay, self.relay.session.last_stream + 1)
        if tcp:
            ear.stream = self.relay.session.open_tcp(1, {"peer": "p", "local": "l"}, ear)
        else:
            ear.stream = self.relay.session.open_request(1, [b"GET", b"/"], flags, ear)
        self.relay.ears[ear.ident] = ear

    @precondition(lambda self: len(self.relay.session.streams) < MAX_STREAMS)
    @rule(takes=st.booleans())
    def open_lazy(self, takes: bool) -> None:
        ear = Ear(self.relay, self.relay.session.last_stream + 1, lazy=True, takes=takes)
        ident = self.relay.session.open_lazy(f.U32.pack(1), b"GET\0/", b"\0X-Request-Id\0", b"a", ear)
        assert ident == ear.ident
        self.relay.ears[ident] = ear

    def unmade(self, side: Side) -> list[Ear]:
        """Requests under way that are no streams."""
        return [ear for ear in side.ears.values() if ear.lazy and ear.stream is None and not ear.whole]

    @precondition(lambda self: self.unmade(self.agent))
    @rule(data=st.data(), size=st.sampled_from([0, 1, 1000, 16_384]))
    def answer_whole(self, data: st.DataObject, size: int) -> None:
        session = self.agent.session
        ear = data.draw(st.sampled_from(self.unmade(self.agent)))
        if size <= session.send_credit and not session.congested:
            body = pattern(ear.ident, 0, size)
            session.answer(ear.ident, f.encode_answer(f.encode_response(200, [b"OK"])), body)
            ear.sent, ear.answered, ear.whole = size, True, True

    @rule(relay=st.booleans(), data=st.data())
    def make(self, relay: bool, data: st.DataObject) -> None:
        """Something special happens to a request on this side alone."""
        if ears := self.unmade(self.side(relay)[0]):
            data.draw(st.sampled_from(ears)).materialise()

    @precondition(
        lambda self: any(not e.answered and e.stream and not e.stream.closed for e in self.agent.ears.values())
    )
    @rule(data=st.data(), interim=st.booleans(), end=st.booleans())
    def answer(self, data: st.DataObject, interim: bool, end: bool) -> None:
        ear = data.draw(
            st.sampled_from(
                [e for e in self.agent.ears.values() if not e.answered and e.stream and not e.stream.closed]
            )
        )
        assert ear.stream is not None
        ear.answered = True
        if ear.stream.tcp:
            ear.stream.send_opened()
            return
        if interim:
            ear.stream.send_interim(103, [b"Early Hints"])
        ear.stream.send_response(101 if ear.stream.upgrade and not end else 200, [b"OK"], end)

    # ── either side sends, ends, resets ──────────────────────────────────────────────────────────────────────────
    @rule(relay=st.booleans(), data=st.data(), size=SIZES, end=st.booleans())
    def send(self, relay: bool, data: st.DataObject, size: int, end: bool) -> None:
        side, _ = self.side(relay)
        if ears := self.speakers(side):
            self.say(data.draw(st.sampled_from(ears)), size, end)

    def say(self, ear: Ear, size: int, end: bool = False) -> None:
        """Send at most `size` bytes, and ask to be told of credit when it is used up."""
        assert ear.stream is not None
        payload = pattern(ear.ident, ear.sent, min(size, ear.stream.sendable()))
        ear.sent += len(payload)
        ear.stream.send_data(payload, end)
        if not ear.stream.sendable() and not ear.stream.send_ended:
            ear.wants_credit = True
            ear.stream.wait()

    @rule(relay=st.booleans(), data=st.data())
    def end(self, relay: bool, data: st.DataObject) -> None:
        side, _ = self.side(relay)
        if ears := self.speakers(side):
            ear = data.draw(st.sampled_from(ears))
            assert ear.stream is not None
            ear.stream.send_end([b"T", b"1"])

    @rule(relay=st.booleans(), data=st.data())
    def reset(self, relay: bool, data: st.DataObject) -> None:
        side, _ = self.side(relay)
        if ears := [e for e in side.ears.values() if not e.whole and not (e.stream and e.stream.closed)]:
            ear = data.draw(st.sampled_from(ears))
            (ear.stream or ear.materialise()).reset(f.CANCELLED, "enough")
            ear.did_reset = True

    # ── readers, slow and fast ───────────────────────────────────────────────────────────────────────────────────
    @rule(relay=st.booleans(), data=st.data(), size=SIZES, stalled=st.booleans())
    def consume(self, relay: bool, data: st.DataObject, size: int, stalled: bool) -> None:
        side, _ = self.side(relay)
        if ears := [ear for ear in side.ears.values() if ear.received > ear.consumed]:
            self.eat(data.draw(st.sampled_from(ears)), size, stalled)

    def eat(self, ear: Ear, size: int, stalled: bool = False) -> None:
        if ear.stream is None:
            return  # a whole answer is taken as it comes
        size = min(size, ear.received - ear.consumed)
        ear.consumed += size
        ear.stream.stalled = ear.stream.stalled or stalled
        ear.stream.consumed(size)

    # ── the link ─────────────────────────────────────────────────────────────────────────────────────────────────
    @rule(relay=st.booleans(), join=st.integers(1, 50))
    def flush(self, relay: bool, join: int) -> None:
        self.side(relay)[0].flush(join)

    @rule(relay=st.booleans(), count=st.integers(1, 20))
    def deliver(self, relay: bool, count: int) -> None:
        source, target = self.side(relay)
        for _ in range(min(count, len(source.link))):
            target.session.receive(memoryview(source.link.pop(0)))

    @rule(relay=st.booleans(), rounds=st.integers(1, 12), readers=st.sampled_from(["eager", "half", "stalling"]))
    def pump(self, relay: bool, rounds: int, readers: str) -> None:
        """A burst: one side sends all it may on every stream, round after round, to readers that take what they take."""
        side, other = self.side(relay)
        for _ in range(rounds):
            for ear in self.speakers(side):
                self.say(ear, 10**9)
            for way in (relay, not relay):
                self.flush(way, 7)
                self.deliver(way, 10_000)
            for ear in other.ears.values():
                waiting = ear.received - ear.consumed
                self.eat(ear, waiting if readers == "eager" else waiting // 2, readers == "stalling")
            self.flush(not relay, 7)
            self.deliver(not relay, 10_000)

    @rule(relay=st.booleans(), congested=st.booleans())
    def congest(self, relay: bool, congested: bool) -> None:
        session = self.side(relay)[0].session
        session.pause() if congested else session.resume()

    @rule(relay=st.booleans())
    def ping(self, relay: bool) -> None:
        self.side(relay)[0].session.ping(b"12345678")

    # ── what always holds ────────────────────────────────────────────────────────────────────────────────────────
    @invariant()
    def credit_is_conserved(self) -> None:
        """What a sender may send, what is under way and what is being returned add up to what the receiver expects."""
        for relay in (True, False):
            sender, receiver = self.side(relay)
            forth, back = sender.under_way(), receiver.under_way()
            data = sum(len(payload) for kind, _, _, payload in forth if kind == "DATA")
            data += sum(len(f.decode_answer(payload)[1]) for kind, _, _, payload in forth if kind == "ANSWER")
            credit = sum(f.U32.unpack(p)[0] for kind, _, ident, p in back if kind == "CREDIT" and ident == 0)
            assert sender.session.send_credit + data + credit == receiver.session.recv_credit
            for ident, stream in sender.session.streams.items():
                other = receiver.session.streams.get(ident)
                if other is None or (relay if stream.lazy else stream.send_ended):
                    continue
                data = sum(len(p) for kind, _, i, p in forth if kind == "DATA" and i == ident)
                credit = sum(f.U32.unpack(p)[0] for kind, _, i, p in back if kind == "CREDIT" and i == ident)
                may_send = f.STREAM_WINDOW if stream.lazy else stream.send_credit
                assert may_send + data + credit == (f.STREAM_WINDOW if other.lazy else other.recv_credit)

    @invariant()
    def memory_is_bounded(self) -> None:
        """What readers have not taken fits into the windows, and the windows into the budget."""
        for side in (self.relay, self.agent):
            assert len(side.session.streams) <= MAX_STREAMS
            streams = {ident: stream for ident, stream in side.session.streams.items() if not stream.lazy}
            grown = sum(stream.window - f.STREAM_WINDOW for stream in streams.values())
            assert grown + side.session.growth == GROWTH
            for ident, stream in streams.items():
                ear = side.ears[ident]
                assert f.STREAM_WINDOW <= stream.window <= MAX_WINDOW
                assert ear.received - ear.consumed <= stream.window
                assert 0 <= stream.recv_credit <= stream.window

    @invariant()
    def nobody_sends_more_than_it_may(self) -> None:
        for side in (self.relay, self.agent):
            assert 0 <= side.session.send_credit <= SESSION_WINDOW
            streams = [stream for stream in side.session.streams.values() if not stream.lazy]
            assert all(0 <= stream.send_credit <= MAX_WINDOW for stream in streams)

    def teardown(self) -> None:
        """Let the link run dry with eager readers: then all that was sent has arrived, and nobody waits for credit."""
        try:
            self._run_dry()
            self._all_is_well()
        finally:
            for one in self.smaller:
                one.stop()

    def _run_dry(self) -> None:
        sides = (self.relay, self.agent)
        for side in sides:
            side.session.resume()
        for _ in range(200):
            for relay in (True, False):
                if self.side(relay)[0].woken:  # as a carrier does: nobody else gives streams their turn
                    self.flush(relay, 10)
                self.deliver(relay, 10_000)
            for side in sides:
                for ear in side.ears.values():
                    self.eat(ear, 10**9)
            if not any(side.link or side.session.out or side.woken for side in sides):
                break
        else:
            pytest.fail("the sessions never fall silent")
        for side in sides:
            side.session.next_turn()

    def _all_is_well(self) -> None:
        for side, other in ((self.relay, self.agent), (self.agent, self.relay)):
            for ident, ear in side.ears.items():
                far = other.ears.get(ident)
                if ear.stream is None:
                    assert ear.lazy
                    if far is not None and ear.whole and not far.did_reset:
                        assert (far.received, far.sent) == (ear.sent, ear.received)
                        assert far.heard_end
                    assert (ident in side.session.streams) != ear.whole
                    continue
                if far is None or ear.did_reset or ear.heard_reset or far.did_reset or far.heard_reset:
                    assert ear.stream.closed or far is None
                    continue
                assert far.received == ear.sent
                assert far.heard_end == ear.stream.send_ended
                assert ear.stream.send_ended or (ear.stream.sendable() > 0 and not ear.wants_credit), "stuck"
                assert ear.stream.closed == (ear.stream.send_ended and ear.heard_end)


TestTwoSessions = TwoSessions.TestCase
TwoSessions.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    database=None,
)
