"""Transcripts of one session side: `<<` bytes that arrive, `>>` frames that leave, and what the owner is told."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest

from portico.wire import frames as f
from portico.wire.frames import WireError
from portico.wire.session import DEAD_MOST, QUANTUM, TURN, Session
from portico.wire.stream import FIRST, HEADROOM, KEEPS_QUANTUM, KEPT, LARGE, PROVEN, Stream
from tests.wire.recorder import Recorder, parse
from tests.wire.vectors import AGENT_HELLO, session_in

POST = [b"POST", b"/up", b"Host", b"web.localhost"]


def sent(session: Session) -> list[tuple[str, int, int, bytes]]:
    """What the session has to send now."""
    return parse(session.take(), HEADROOM)


def response(ident: int, status: int = 200, flags: int = 0) -> bytes:
    return f.frame(f.RESPONSE, ident, f.encode_response(status, [b""]), flags)


def data(ident: int, payload: bytes, flags: int = 0) -> bytes:
    return f.frame(f.DATA, ident, payload, flags)


class TestHello:
    def test_an_agent_is_greeted_once(self) -> None:
        session, events = session_in("new", "relay")
        session.receive(AGENT_HELLO)
        assert events.events == [("hello", {"versions": [1], "agent": "portico/0.1.0", "connect": 1})]
        with pytest.raises(WireError, match="HELLO twice"):
            session.receive(AGENT_HELLO)

    def test_an_error_may_come_first(self) -> None:
        session, events = session_in("new", "agent")
        session.receive(f.json_frame(f.ERROR, 0, {"code": "session.superseded", "detail": "late", "retryable": False}))
        assert events.events == [("error", "session.superseded", "late", False)]
        assert session.closed


class TestControl:
    def test_binds_and_their_answers(self) -> None:
        relay, heard = session_in("greeted", "relay")
        relay.receive(f.json_frame(f.BIND, 1, {"grant": "g"}) + f.json_frame(f.AUTH, 0, {"token": "t"}))
        assert heard.events == [("bind", 1, "g"), ("auth", "t")]
        relay.control(f.BOUND, 1, tunnel="tun_1", name="web", url="http://web.localhost")
        relay.control(f.REFUSED, 2, code="tunnel.grant_expired", detail="late", retryable=True)
        relay.control(f.AUTHED, 0, expires_at="2026-11-23T15:21:20Z")
        relay.control(f.GOAWAY, 0, code="relay.draining", detail="", retry_after_ms=10**9)
        agent, told = session_in("greeted", "agent")
        agent.receive(b"".join(relay.take()))
        assert told.events == [
            ("bound", 1, "tun_1", "web", "http://web.localhost"),
            ("refused", 2, "tunnel.grant_expired", "late", True),
            ("authed", {"expires_at": "2026-11-23T15:21:20Z"}),
            ("goaway", "relay.draining", "", 3_600_000),
        ]

    def test_a_ping_is_answered_with_its_bytes(self) -> None:
        session, events = session_in("greeted", "relay")
        session.receive(f.frame(f.PING, 0, b"12345678") + f.frame(f.PONG, 0, b"abcdefgh"))
        assert sent(session) == [("PONG", 0, 0, b"12345678")]
        assert events.events == [("pong", b"abcdefgh")]

    def test_a_control_body_over_the_limit_is_our_own_fault(self) -> None:
        session, _ = session_in("greeted", "relay")
        with pytest.raises(ValueError, match="over 16384"):
            session.control(f.UNBIND, 1, code="a.b", detail="x" * f.MAX_JSON)

    def test_error_ends_every_stream_and_nothing_follows(self) -> None:
        session, events = session_in("request", "agent")
        session.receive(f.json_frame(f.ERROR, 0, {"code": "session.revoked", "detail": "gone"}) + data(1, b"late"))
        assert events.events == [("reset", 1, f.INTERNAL, "gone"), ("error", "session.revoked", "gone", False)]
        assert not session.streams
        session.ping(b"12345678")
        assert sent(session) == []

    def test_fail_sends_error_last(self) -> None:
        session, events = session_in("request", "agent")
        session.fail("wire.protocol_error", "é" * 5000)
        session.fail("wire.protocol_error", "again")
        ((kind, _, _, payload),) = sent(session)
        assert kind == "ERROR"
        assert json.loads(payload) == {"code": "wire.protocol_error", "detail": "é" * 1024, "retryable": False}
        assert events.events == [("reset", 1, f.INTERNAL, "é" * 5000)]

    def test_wake_is_called_once_per_batch(self) -> None:
        woken: list[int] = []
        session = Session(Recorder(), relay=True, wake=lambda: woken.append(1))
        session.ping(b"12345678")
        session.ping(b"12345678")
        assert woken == [1]
        session.take()
        session.ping(b"12345678")
        assert woken == [1, 1]


class TestExchange:
    def test_a_request_with_a_body_and_its_answer(self) -> None:
        relay, told = session_in("greeted", "relay")
        agent, asked = session_in("greeted", "agent")
        stream = relay.open_request(7, POST, f.F_TRAILERS, told.sink(1))
        stream.send_data(b"hello")
        stream.send_end([b"Checksum", b"1"])
        agent.receive(b"".join(relay.take()))
        assert asked.events == [
            ("request", 1, 7, POST, f.F_TRAILERS),
            ("data", 1, b"hello", False),
            ("end", 1, [b"Checksum", b"1"]),
        ]
        answer = asked.streams[1]
        answer.send_interim(103, [b"Early Hints", b"Link", b"</a>"])
        answer.send_response(200, [b"OK", b"Set-Cookie", b"a", b"Set-Cookie", b"b"], end=False)
        answer.send_data(b"world", end=True)
        relay.receive(b"".join(agent.take()))
        assert told.events == [
            ("interim", 1, 103, [b"Early Hints", b"Link", b"</a>"]),
            ("response", 1, 200, [b"OK", b"Set-Cookie", b"a", b"Set-Cookie", b"b"], False),
            ("data", 1, b"world", True),
        ]
        assert not relay.streams
        assert not agent.streams

    def test_an_answer_may_end_before_the_request(self) -> None:
        relay, told = session_in("request", "relay")
        relay.receive(response(1, 413, f.F_END) + f.frame(f.RESET, 1, f.encode_reset(f.NO_ERROR, "")))
        assert told.events == [("response", 1, 413, [b""], True), ("reset", 1, f.NO_ERROR, "")]
        assert not relay.streams

    def test_frames_for_an_ended_stream_are_ignored(self) -> None:
        session, events = session_in("answered", "relay")
        stream = session.streams[1]
        stream.reset(f.CANCELLED, "visitor went away")
        assert sent(session) == [("RESET", 0, 1, b"\0\1visitor went away")]
        session.receive(
            data(1, b"x", f.F_END) + f.frame(f.END, 1) + f.frame(f.RESET, 1, b"\0\5")
            + f.frame(f.CREDIT, 1, b"\0\0\0\1") + response(1) + f.frame(f.OPENED, 1)
        )  # fmt: skip
        assert events.events == []
        stream.reset(f.CANCELLED)
        stream.send_end()
        stream.consumed(1)
        assert sent(session) == []

    def test_an_upgrade_turns_both_directions_into_bytes(self) -> None:
        relay, told = session_in("greeted", "relay")
        stream = relay.open_request(1, [b"GET", b"/ws"], f.F_UPGRADE, told.sink(1))
        relay.receive(response(1, 101) + data(1, b"server first"))
        stream.send_data(b"client")
        relay.receive(f.frame(f.END, 1))
        assert [event[0] for event in told.events] == ["response", "data", "end"]
        assert relay.streams == {1: stream}
        stream.send_end()
        assert not relay.streams

    def test_tcp_opens_and_half_closes(self) -> None:
        relay, told = session_in("greeted", "relay")
        agent, asked = session_in("greeted", "agent")
        stream = relay.open_tcp(3, {"peer": "203.0.113.9:1", "local": "127.0.0.1:7100"}, told.sink(1))
        stream.send_data(b"early", end=True)
        agent.receive(b"".join(relay.take()))
        assert asked.events == [
            ("open", 1, 3, {"peer": "203.0.113.9:1", "local": "127.0.0.1:7100"}),
            ("data", 1, b"early", True),
        ]
        asked.streams[1].send_opened()
        asked.streams[1].send_data(b"late", end=True)
        relay.receive(b"".join(agent.take()))
        assert told.events == [("opened", 1), ("data", 1, b"late", True)]
        assert not relay.streams
        assert not agent.streams

    def test_a_stream_that_its_handler_refused_is_gone(self) -> None:
        class Refusing(Recorder):
            def on_request(self, stream: Any, bind: int, head: list[bytes], flags: int) -> None:
                stream.reset(f.NO_SUCH_BIND, "")

            def on_open(self, stream: Any, bind: int, info: dict[str, Any]) -> None:
                stream.reset(f.NO_SUCH_BIND, "")

        session = Session(Refusing(), relay=False)
        session.greeted = True
        session.receive(f.frame(f.REQUEST, 1, f.encode_request(9, [b"GET", b"/"])) + data(1, b"ignored"))
        session.receive(f.frame(f.OPEN, 2, b"\0\0\0\1" + b'{"peer":"p","local":"l"}'))
        assert sent(session) == [("RESET", 0, 1, b"\0\x08"), ("RESET", 0, 2, b"\0\x08")]
        assert not session.streams


class TestLimits:
    def test_an_agent_resets_streams_above_its_limit(self) -> None:
        session, events = session_in("greeted", "agent", max_streams=2)
        for ident in (1, 2, 3):
            session.receive(f.frame(f.REQUEST, ident, f.encode_request(1, POST)))
        session.receive(data(3, b"ignored", f.F_END))
        assert [event[1] for event in events.events] == [1, 2]
        assert [frame[:3] for frame in sent(session)] == [("RESET", 0, 3)]

    def test_a_relay_opens_no_more_than_its_limit(self) -> None:
        session, events = session_in("greeted", "relay", max_streams=1)
        first = session.open_request(1, POST, f.F_END, events.sink(1))
        with pytest.raises(OverflowError):
            session.open_request(1, POST, 0, events.sink(2))
        first.reset(f.CANCELLED)
        assert session.open_tcp(1, {"peer": "p", "local": "l"}, events.sink(2)).id == 2

    def test_stream_ids_end(self) -> None:
        session, events = session_in("greeted", "relay")
        session.last_stream = 2**32 - 2
        assert session.open_request(1, POST, f.F_END, events.sink(1)).id == 2**32 - 1
        with pytest.raises(OverflowError):
            session.open_request(1, POST, f.F_END, events.sink(1))

    def test_a_closed_session_opens_nothing(self) -> None:
        session, events = session_in("greeted", "relay")
        session.close()
        with pytest.raises(OverflowError):
            session.open_request(1, POST, 0, events.sink(1))

    @pytest.mark.parametrize(
        "head",
        [
            [b"GET", b"/", *[b"X", b"y"] * 257],
            [b"GET", b"/", b"X", b"a\0b"],
            [b"GET", b"/", b"X", b"a\nb"],
            [b"GET", b"/", b"X" * 257, b"v"],
            [b"GET", b"/", b"X"],
            [b"GET", b"/", b"X", b"v" * f.MAX_PAYLOAD],
            [b"G T", b"/"],
            [b"GET", b"/ "],
        ],
    )
    def test_a_strange_request_never_leaves(self, head: list[bytes]) -> None:
        session, events = session_in("greeted", "relay")
        with pytest.raises(ValueError, match="head"):
            session.open_request(1, head, 0, events.sink(1))
        assert not session.streams
        assert sent(session) == []

    def test_a_strange_answer_never_leaves(self) -> None:
        session, events = session_in("request", "agent")
        stream = events.streams.get(1) or session.streams[1]
        for status, head in ((200, [b"O\0K"]), (99, [b""]), (200, [b"", b"a b", b"c"]), (200, [b"", b"X", b"\x07"])):
            with pytest.raises(ValueError, match=r"head|status"):
                stream.send_response(status, head, end=True)
        with pytest.raises(ValueError, match="head"):
            stream.send_end([b"Bad Name", b""])
        assert sent(session) == []
        stream.send_response(200, [b"OK"], end=True)
        assert [frame[0] for frame in sent(session)] == ["RESPONSE"]


class TestFlowControl:
    def test_data_needs_credit_of_its_stream_and_of_the_session(self) -> None:
        session, _ = session_in("request", "relay")
        stream = session.streams[1]
        assert stream.sendable() == f.STREAM_WINDOW
        stream.send_data(bytes(f.STREAM_WINDOW))
        assert stream.sendable() == 0
        with pytest.raises(ValueError, match="credit"):
            stream.send_data(b"x")
        session.send_credit = KEPT + 10
        session.receive(f.frame(f.CREDIT, 1, f.U32.pack(100)))
        assert stream.sendable() == 10
        session.pause()
        assert stream.sendable() == 0

    def test_a_waiting_stream_hears_of_credit_once(self) -> None:
        session, events = session_in("request", "relay")
        stream = session.streams[1]
        stream.send_data(bytes(f.STREAM_WINDOW))
        stream.wait()
        session.receive(f.frame(f.CREDIT, 1, f.U32.pack(1)))
        session.receive(f.frame(f.CREDIT, 1, f.U32.pack(1)))
        assert events.events == [("credit", 1)]

    def test_a_congested_carrier_holds_everybody_and_wakes_them_in_order(self) -> None:
        session, events = session_in("greeted", "relay")
        streams = [session.open_request(1, POST, 0, events.sink(ident)) for ident in (1, 2, 3)]
        for stream in streams:
            stream.send_data(bytes(FIRST))
        session.pause()
        for stream in (streams[2], streams[0], streams[1]):
            stream.wait()
        session.receive(f.frame(f.CREDIT, 1, f.U32.pack(1)))
        assert events.events == []
        session.resume()
        assert events.events == [("credit", 3), ("credit", 1), ("credit", 2)]

    def test_session_credit_wakes_only_streams_that_have_their_own(self) -> None:
        session, events = session_in("greeted", "relay")
        first = session.open_request(1, POST, 0, events.sink(1))
        second = session.open_request(1, POST, 0, events.sink(2))
        first.send_data(bytes(f.STREAM_WINDOW))
        session.send_credit = 0
        first.wait()
        second.wait()
        session.receive(f.frame(f.CREDIT, 0, f.U32.pack(1000)))
        assert events.events == [("credit", 2)]

    def test_bulk_takes_turns_and_first_bytes_wait_for_none(self) -> None:
        """A turn of the loop has room for four of them; who had its turn is the last of those that wait."""
        session, events = session_in("greeted", "relay")
        streams = [session.open_request(1, POST, 0, events.sink(ident)) for ident in range(1, 8)]
        for stream in streams[:6]:
            stream.send_data(bytes(f.STREAM_WINDOW))
            session.receive(f.frame(f.CREDIT, stream.id, f.U32.pack(f.STREAM_WINDOW)))
        turns: list[list[int]] = []
        assert [stream.sendable() for stream in streams] == [0] * 6 + [f.STREAM_WINDOW]
        for stream in streams[:6]:
            stream.wait()
        assert events.events == []
        for _ in range(4):
            session.take()
            session.next_turn()
            turns.append([ident for _, ident in events.events])
            events.events.clear()
            for ident in turns[-1]:
                streams[ident - 1].send_data(bytes(QUANTUM))
                session.receive(f.frame(f.CREDIT, ident, f.U32.pack(QUANTUM)))
                assert streams[ident - 1].sendable() == 0
                streams[ident - 1].wait()
        assert turns == [[1, 2, 3, 4], [5, 6, 1, 2], [3, 4, 5, 6], [1, 2, 3, 4]]
        assert streams[6].sendable() == f.STREAM_WINDOW

    def test_what_streams_left_of_their_turns_does_not_go_at_once(self) -> None:
        """A hundred that had a turn and little to send, and then much: of that, a turn has no more than of others' bulk."""
        session, events = session_in("greeted", "relay")
        streams = [session.open_request(1, POST, 0, events.sink(ident)) for ident in range(100)]
        for stream in streams:
            stream.send_data(bytes(FIRST))
            session.receive(f.frame(f.CREDIT, stream.id, f.U32.pack(8 * QUANTUM)))
            session.turn = 0
            stream.wait()
        while session.waiting:
            session.take()
            session.next_turn()
            for _, ident in events.events:
                streams[ident].send_data(b"x")
            events.events.clear()
        session.take()
        session.next_turn()
        before, session.turn = session.send_credit, 0
        for stream in streams:
            stream.send_data(bytes(min(stream.sendable(), 2 * QUANTUM)))  # as much as a read brings
        assert before - session.send_credit <= 2 * (KEEPS_QUANTUM + 1) * TURN

    def test_what_a_read_brings_above_the_quantum_is_paid_by_the_turn(self) -> None:
        session, events = session_in("greeted", "relay")
        stream = session.open_request(1, POST, 0, events.sink(1))
        stream.send_data(bytes(FIRST))
        session.receive(f.frame(f.CREDIT, 1, f.U32.pack(16 * QUANTUM)))
        session.turn = 0
        stream.wait()
        session.next_turn()
        session.turn = 0
        assert events.events == [("credit", 1)]
        stream.send_data(bytes(1000))
        assert session.turn == 0 < stream.sendable()
        stream.send_data(bytes(QUANTUM))
        assert (session.turn, stream.sendable()) == (-1000, 0)

    def test_a_stream_without_credit_has_no_turn_and_hears_of_its_credit(self) -> None:
        session, events = session_in("greeted", "relay")
        stream = session.open_request(1, POST, 0, events.sink(1))
        stream.send_data(bytes(FIRST))
        session.turn = 0
        stream.wait()
        stream.send_data(bytes(f.STREAM_WINDOW - FIRST))  # though it waits
        session.next_turn()
        assert (session.turn, events.events) == (TURN, [])
        session.receive(f.frame(f.CREDIT, 1, f.U32.pack(10)))
        assert (events.events, stream.sendable()) == ([("credit", 1)], 10)

    @pytest.mark.parametrize("first", [0, FIRST], ids=["first bytes", "bulk"])
    def test_streams_that_end_while_they_wait_do_not_pile_up(self, first: int) -> None:
        """The peer reads next to nothing, and visitors come and go."""
        session, events = session_in("greeted", "relay")
        session.pause()
        session.spare = 0
        kept = session.open_request(1, POST, 0, events.sink(0))
        kept.wait()
        for number in range(1, 2000):
            stream = session.open_request(1, POST, 0, events.sink(number))
            if first:
                session.send_credit += first
                stream.send_data(bytes(first))
            stream.wait()
            stream.reset(f.CANCELLED)
            session.take()
            assert len(session.waiting) + len(session.urgent) < 2 * DEAD_MOST
        session.resume()
        assert events.events == [("credit", 0)]

    def test_who_goes_on_may_end_all_others(self) -> None:
        session, events = session_in("greeted", "relay")
        session.pause()
        session.spare = 0
        streams: list[Stream] = []

        class Ends(Recorder):
            def on_credit(self) -> None:
                for stream in streams[1:]:
                    stream.reset(f.CANCELLED)

        for number in range(DEAD_MOST + 2):
            streams.append(session.open_request(1, POST, 0, events.sink(number) if number else Ends()))
            streams[-1].wait()
        session.resume()
        assert (events.events, list(session.urgent), list(session.waiting)) == ([], [], [])

    def test_first_bytes_go_into_a_congested_connection_and_few_of_them(self) -> None:
        session, events = session_in("greeted", "relay")
        session.pause()
        count = 0
        while (stream := session.open_request(1, POST, 0, events.sink(count))).sendable():
            stream.send_data(bytes(FIRST))
            assert stream.sendable() == 0
            count += 1
        assert count == KEPT // FIRST
        stream.wait()
        session.resume()
        assert events.events == [("credit", count)]

    def test_a_stream_that_waits_for_its_turn_and_ends_leaves_it_to_others(self) -> None:
        session, events = session_in("greeted", "relay")
        woken: list[None] = []
        streams = [session.open_request(1, POST, 0, events.sink(ident)) for ident in (1, 2)]
        session.wake = lambda: woken.append(None)
        for stream in streams:
            stream.send_data(bytes(FIRST))
        session.turn = 0
        for stream in streams:
            stream.wait()
        assert woken, "nobody would give them a turn"
        streams[0].reset(f.CANCELLED)
        session.next_turn()
        assert events.events == [("credit", 2)]
        assert not session.waiting

    def test_credit_comes_back_in_halves_of_the_window(self) -> None:
        session, events = session_in("request", "agent", growth=0)
        stream = session.streams[1]
        session.receive(data(1, bytes(40_000)))
        stream.consumed(20_000)
        assert sent(session) == []
        stream.consumed(20_000)
        assert sent(session) == [("CREDIT", 0, 1, f.U32.pack(40_000))]
        assert stream.recv_credit == f.STREAM_WINDOW
        assert events.events == [("data", 1, bytes(40_000), False)]

    def test_session_credit_comes_back_when_read_however_slow_the_stream(self) -> None:
        session, _ = session_in("greeted", "agent")
        returned = 0
        for ident in range(1, 300):
            session.receive(f.frame(f.REQUEST, ident, f.encode_request(1, POST)) + data(ident, bytes(f.STREAM_WINDOW)))
            for kind, _, stream, payload in sent(session):
                assert (kind, stream) == ("CREDIT", 0)
                returned += f.U32.unpack(payload)[0]
        assert returned >= 299 * f.STREAM_WINDOW - f.SESSION_WINDOW // 4

    def test_data_for_ended_streams_still_counts_for_the_session(self) -> None:
        session, _ = session_in("request", "agent")
        session.streams[1].reset(f.TARGET_RESET)
        with pytest.raises(WireError) as refused:
            session.recv_credit = 10
            session.receive(data(1, bytes(11)))
        assert refused.value.code == "wire.flow_control"

    def test_a_reader_that_keeps_up_gets_a_larger_window_and_one_that_stalls_loses_it(self) -> None:
        session, _ = session_in("request", "agent", growth=65_536 * 3)
        stream = session.streams[1]
        stream.taken = PROVEN

        def feed(size: int) -> None:
            while size:
                piece = min(size, f.MAX_PAYLOAD)
                session.receive(data(1, bytes(piece)))
                stream.consumed(piece)
                size -= piece

        feed(stream.recv_credit)
        assert (stream.window, session.growth) == (131_072, 131_072)
        feed(stream.recv_credit)
        assert (stream.window, session.growth) == (262_144, 0)
        feed(stream.recv_credit)
        assert stream.window == 262_144
        stream.stalled = True
        feed(131_072)
        assert (stream.window, session.growth) == (131_072, 131_072)
        stream.reset(f.CANCELLED)
        assert session.growth == 65_536 * 3

    def test_young_streams_leave_half_of_the_budget_to_those_that_proved_fast(self) -> None:
        """Kernel buffers make every reader look fast at first: 200 slow ones must not take the budget from a fast one."""
        session, _ = session_in("greeted", "agent", growth=65_536 * 8)

        def feed(stream: Stream, size: int) -> None:
            while size:
                piece = min(size, f.MAX_PAYLOAD)
                session.receive(data(stream.id, bytes(piece)))
                stream.consumed(piece)
                size -= piece

        for ident in range(1, 9):
            session.receive(f.frame(f.REQUEST, ident, f.encode_request(1, POST)))
            feed(session.streams[ident], 65_536 * 3)
        assert session.growth == 65_536 * 4
        last = session.streams[8]
        feed(last, PROVEN)
        assert (last.window, session.growth) == (65_536 * 4, 65_536)

    def test_a_grown_window_returns_to_the_budget_as_the_body_ends(self) -> None:
        session, _ = session_in("request", "agent", growth=65_536)
        stream = session.streams[1]
        stream.taken = PROVEN
        session.receive(data(1, bytes(f.MAX_PAYLOAD)))
        stream.consumed(f.MAX_PAYLOAD)
        assert (stream.window, session.growth) == (131_072, 0)
        session.receive(data(1, bytes(f.MAX_PAYLOAD)) + data(1, bytes(60_000), f.F_END))
        assert session.growth == 131_072 - 125_536
        stream.consumed(125_536)
        assert (stream.window, session.growth) == (65_536, 65_536)

    def test_a_large_chunk_leaves_room_for_a_websocket_header(self) -> None:
        session, _ = session_in("request", "relay")
        session.streams[1].send_data(memoryview(bytes(LARGE)), end=True)
        (part,) = session.take()
        assert isinstance(part, bytearray)
        assert part[:HEADROOM] == bytes(HEADROOM)
        assert parse([part], HEADROOM) == [("DATA", f.F_END, 1, bytes(LARGE))]

    def test_a_chunk_over_one_frame_is_split_and_ends_once(self) -> None:
        session, _ = session_in("request", "relay")
        stream = session.streams[1]
        session.receive(f.frame(f.CREDIT, 1, f.U32.pack(200_000)))
        stream.send_data(bytes(150_000), end=True)
        assert [(flags, len(payload)) for _, flags, _, payload in sent(session)] == [
            (0, 65_536),
            (0, 65_536),
            (f.F_END, 18_928),
        ]
        with pytest.raises(ValueError, match="after the end"):
            stream.send_data(b"x")


class TestClose:
    def test_every_stream_hears_it_once(self) -> None:
        session, events = session_in("request", "relay")
        session.close("connection lost")
        session.close("again")
        assert events.events == [("reset", 1, f.INTERNAL, "connection lost")]
        session.receive(data(1, b"x"))
        assert events.events == [("reset", 1, f.INTERNAL, "connection lost")]


def test_names_that_nobody_uses_do_not_pile_up() -> None:
    for number in range(10_000):
        f.check_fields([b"X-%d" % number, b""], 0)
    assert len(f._KNOWN_NAMES) <= f._KNOWN_NAMES_MAX
    f.check_fields([b"Host", b""], 0)
    assert b"Host" in f._KNOWN_NAMES


def test_a_reset_detail_is_cut_between_characters() -> None:
    code, detail = f.decode_reset(f.encode_reset(f.INTERNAL, "é" * 300 + "x"))
    assert (code, detail) == (f.INTERNAL, "é" * 256)


class Owner:
    """Has a request that is no stream yet; ``takes`` whole answers or not."""

    def __init__(self, session: Session, events: Recorder, takes: bool = True) -> None:
        self.lazy: Literal[True] = True
        self.session, self.events, self.takes = session, events, takes
        self.ident = 0
        self.made = 0
        self.wholes: list[tuple[bytes, bytes]] = []

    def on_whole(self, response: bytes, body: bytes) -> bool:
        self.wholes.append((response, body))
        return self.takes

    def materialise(self) -> Stream:
        self.made += 1
        return self.session.make(self.ident, self.events.sink(self.ident))


ANSWERED = f.encode_response(200, [b"OK", b"Content-Length", b"5"])
WHOLE = [("response", 1, 200, [b"OK", b"Content-Length", b"5"], False), ("data", 1, b"hello", True)]


def answer(ident: int, body: bytes = b"hello", response: bytes = ANSWERED) -> bytes:
    return f.frame(f.ANSWER, ident, f.encode_answer(response) + body)


class TestLazyAtTheRelay:
    def opened(self, takes: bool = True) -> tuple[Session, Recorder, Owner]:
        session, events = session_in("greeted", "relay")
        owner = Owner(session, events, takes)
        owner.ident = session.open_lazy(f.U32.pack(7), b"GET\0/", b"\0Host\0a\0X-Request-Id\0", b"1", owner)
        payload = f.encode_request(7, [b"GET", b"/", b"Host", b"a", b"X-Request-Id", b"1"])
        assert sent(session) == [("REQUEST", f.F_END, 1, payload)]
        assert session.streams == {1: owner}
        return session, events, owner

    def test_a_whole_answer_ends_it(self) -> None:
        session, events, owner = self.opened()
        credit = session.recv_credit
        session.receive(answer(1))
        assert (owner.wholes, owner.made, events.events) == ([(ANSWERED, b"hello")], 0, [])
        assert not session.streams
        assert (session.recv_credit, session.recv_unreturned) == (credit - 5, 5)
        session.receive(answer(1) + data(1, b"late") + f.frame(f.RESET, 1, f.encode_reset(1, "")))  # they crossed
        assert (len(owner.wholes), events.events) == (1, [])

    def test_one_that_is_not_taken_is_two_frames(self) -> None:
        session, events, owner = self.opened(takes=False)
        session.receive(answer(1))
        assert (set(owner.wholes), owner.made, events.events) == ({(ANSWERED, b"hello")}, 1, WHOLE)
        assert not session.streams
        assert session.recv_unreturned == 5

    def test_many_in_one_message(self) -> None:
        session, events, first = self.opened()
        owners = [first]
        for takes in (True, False, True):
            owners.append(owner := Owner(session, events, takes))
            owner.ident = session.open_lazy(f.U32.pack(7), b"GET\0/", b"\0A\0", b"1", owner)
        session.receive(b"".join(answer(ident) for ident in (4, 2, 3, 1)))
        assert [(len(set(owner.wholes)), owner.made) for owner in owners] == [(1, 0), (1, 0), (1, 1), (1, 0)]
        assert [event[1] for event in events.events] == [3, 3]
        assert not session.streams
        assert session.recv_unreturned == 20

    @pytest.mark.parametrize("body", [b"", b"x", b"four"])
    def test_a_short_one_at_the_end_of_a_message(self, body: bytes) -> None:
        session, events, owner = self.opened()
        session.receive(f.frame(f.PING, 0, bytes(8)) + answer(1, body, response=f.encode_response(200, [b""])))
        assert (owner.wholes, events.events, session.streams) == ([(f.encode_response(200, [b""]), body)], [], {})

    @pytest.mark.parametrize("cut", range(1, 20))
    def test_one_that_is_cut_short_is_nobodys(self, cut: int) -> None:
        session, _, owner = self.opened()
        again = Owner(session, Recorder())
        again.ident = session.open_lazy(f.U32.pack(7), b"GET\0/", b"\0A\0", b"1", again)
        assert not session.feed(answer(1) + answer(again.ident)[:-cut])
        assert (len(owner.wholes), again.wholes) == (1, [])

    @pytest.mark.parametrize("head", [b"\xff\xff", b"\0\x08"])
    def test_a_head_longer_than_its_frame_is_not_read_beyond_it(self, head: bytes) -> None:
        session, _, owner = self.opened()
        assert not session.feed(f.frame(f.ANSWER, 1, head + b"\0\xc8abc") + bytes(4 * LARGE))
        assert owner.wholes == []

    def test_one_that_its_owner_leaves_goes_on_behind_it(self) -> None:
        session, _, first = self.opened(takes=False)
        second = Owner(session, Recorder())
        second.ident = session.open_lazy(f.U32.pack(7), b"GET\0/", b"\0A\0", b"1", second)
        session.receive(answer(1) + f.frame(f.PING, 0, bytes(8)) + answer(second.ident))
        assert (first.made, second.made, len(second.wholes), session.streams) == (1, 0, 1, {})

    def test_a_large_one_comes_alone(self) -> None:
        session, events, owner = self.opened()
        session.receive(memoryview(answer(1, bytes(2 * LARGE))))
        assert (owner.wholes, events.events) == ([(ANSWERED, bytes(2 * LARGE))], [])
        assert not session.streams
        assert session.recv_unreturned == 2 * LARGE

    def test_a_usual_stream_takes_one_too(self) -> None:
        session, events = session_in("request", "relay")
        stream = session.streams[1]
        session.receive(answer(1))
        assert events.events == WHOLE
        assert session.streams == {1: stream}  # its request goes on
        stream.send_end()  # type: ignore[union-attr]
        assert not session.streams

    @pytest.mark.parametrize(
        ("frame", "events", "over"),
        [
            (response(1), [("response", 1, 200, [b""], False)], False),
            (response(1, flags=f.F_END), [("response", 1, 200, [b""], True)], True),
            (f.frame(f.INTERIM, 1, f.encode_response(103, [b""])), [("interim", 1, 103, [b""])], False),
            (f.frame(f.RESET, 1, f.encode_reset(2, "no")), [("reset", 1, 2, "no")], True),
            (f.frame(f.CREDIT, 1, f.U32.pack(9)), [], False),
            (
                response(1) + data(1, b"ab", f.F_END),
                [("response", 1, 200, [b""], False), ("data", 1, b"ab", True)],
                True,
            ),
            (response(1) + f.frame(f.END, 1), [("response", 1, 200, [b""], False), ("end", 1, [])], True),
        ],
        ids=["RESPONSE", "RESPONSE END", "INTERIM", "RESET", "CREDIT", "DATA", "END"],
    )
    def test_whatever_else_comes_makes_the_stream(self, frame: bytes, events: list[Any], over: bool) -> None:
        session, told, owner = self.opened()
        session.receive(frame)
        assert (owner.made, owner.wholes, told.events) == (1, [], events)
        assert bool(session.streams) is not over
        if not over:
            stream = session.streams[1]
            assert isinstance(stream, Stream)
            assert stream.send_ended

    @pytest.mark.parametrize(
        "frame",
        [data(1, b"x"), f.frame(f.END, 1), f.frame(f.OPENED, 1), response(1, 101), answer(1, b"", f.encode_response(103, [b""])),
         f.frame(f.CREDIT, 1, f.U32.pack(0)), f.frame(f.INTERIM, 1, f.encode_response(200, [b""])), answer(2)],
        ids=["DATA", "END", "OPENED", "101", "ANSWER 103", "CREDIT 0", "INTERIM 200", "ANSWER for none"],
    )  # fmt: skip
    def test_violations_end_it_with_the_session(self, frame: bytes) -> None:
        session, told, owner = self.opened(takes=False)
        assert not session.feed(frame)
        assert session.closed
        assert not session.streams
        assert owner.made == 1
        assert told.events[-1][:3] == ("reset", 1, f.INTERNAL)

    def test_the_end_of_the_session(self) -> None:
        session, told, owner = self.opened()
        session.close("lost")
        session.close("again")
        assert (owner.made, told.events) == (1, [("reset", 1, f.INTERNAL, "lost")])
        assert not session.streams
        session.receive(answer(1))
        assert owner.wholes == []

    def test_more_than_the_sessions_credit(self) -> None:
        session, _, _ = self.opened()
        session.recv_credit = 4
        with pytest.raises(WireError) as refused:
            session.receive(answer(1))
        assert refused.value.code == "wire.flow_control"

    def test_the_last_id(self) -> None:
        session, events, _ = self.opened()
        session.last_stream = 2**32 - 2
        owner = Owner(session, events)
        assert session.open_lazy(bytes(4), b"GET\0/", b"\0A\0", b"1", owner) == 2**32 - 1
        before = dict(session.streams)
        with pytest.raises(OverflowError):
            session.open_lazy(bytes(4), b"GET\0/", b"\0A\0", b"1", owner)
        assert session.streams == before
        session.receive(answer(2**32 - 1))
        assert len(owner.wholes) == 1


def asked_for(ident: int, bind: int) -> bytes:
    return f.frame(f.REQUEST, ident, f.encode_request(bind, [b"GET", b"/"]), f.F_END)


class Taking:
    """Who takes the requests of one bind."""

    def __init__(self, owner: Owner | None) -> None:
        self.owner = owner
        self.asked: list[int] = []

    def quick(self, session: Session, ident: int, payload: bytes) -> Owner | None:
        f.decode_request(payload)
        self.asked.append(ident)
        if self.owner is not None:
            self.owner.ident = ident
        return self.owner


class TestLazyAtTheAgent:
    REQUEST = f.frame(f.REQUEST, 3, f.encode_request(1, [b"GET", b"/", b"A", b"1"]), f.F_END)

    def quick(self, state: str = "greeted", **limits: int) -> tuple[Session, Recorder, Owner, list[int]]:
        session, events = session_in(state, "agent", **limits)
        owner = Owner(session, events)
        taking = Taking(owner)
        session.answers, session.quick = True, {1: taking}
        return session, events, owner, taking.asked

    def test_the_answer_is_one_frame(self) -> None:
        session, events, owner, asked = self.quick()
        credit = session.send_credit
        session.receive(self.REQUEST)
        assert (asked, session.streams, session.last_stream, events.events) == ([3], {3: owner}, 3, [])
        session.answer(3, f.encode_answer(ANSWERED), b"hello")
        assert sent(session) == [("ANSWER", 0, 3, f.encode_answer(ANSWERED) + b"hello")]
        assert not session.streams
        assert session.send_credit == credit - 5
        session.receive(
            f.frame(f.RESET, 3, f.encode_reset(1, "")) + f.frame(f.CREDIT, 3, f.U32.pack(1))
        )  # they crossed
        assert (owner.made, events.events) == (0, [])

    def test_only_requests_without_a_body(self) -> None:
        session, events, _, asked = self.quick()
        for ident, flags in ((1, 0), (2, f.F_UPGRADE), (3, f.F_TRAILERS), (4, f.F_END | f.F_UPGRADE)):
            session.receive(f.frame(f.REQUEST, ident, f.encode_request(1, [b"GET", b"/"]), flags))
        assert asked == []
        assert [event[0] for event in events.events] == ["request"] * 4

    def test_one_that_is_not_taken_is_a_usual_one(self) -> None:
        session, events, _, _ = self.quick()
        session.quick = {1: Taking(None)}
        session.receive(self.REQUEST)
        assert events.events == [("request", 3, 1, [b"GET", b"/", b"A", b"1"], f.F_END)]

    def test_nor_is_one_for_another_bind(self) -> None:
        session, events, _, asked = self.quick()
        session.receive(asked_for(3, bind=2) + asked_for(4, bind=1))
        assert (asked, events.events) == ([4], [("request", 3, 2, [b"GET", b"/"], f.F_END)])

    @pytest.mark.parametrize("payload", [b"", b"\0", b"\0\0\0", b"\0\0\0\1"])
    def test_what_follows_a_short_one_is_not_its_own(self, payload: bytes) -> None:
        """The bytes behind a frame that is too short would be read as its bind."""
        session, events, _, asked = self.quick()
        assert not session.feed(f.frame(f.REQUEST, 3, payload, f.F_END) + b"\0\0\0\1" * 8)
        assert (asked, session.streams, events.events) == ([], {}, [])

    @pytest.mark.parametrize("cut", range(1, 20))
    def test_one_that_is_cut_short_is_not_taken(self, cut: int) -> None:
        session, _, owner, asked = self.quick()
        assert not session.feed(asked_for(1, bind=1) + self.REQUEST[:-cut])
        assert (asked, session.streams, owner.made) == ([1], {}, 1)

    @pytest.mark.parametrize(
        ("frame", "told"),
        [
            (f.frame(f.RESET, 3, f.encode_reset(1, "gone")), [("reset", 3, 1, "gone")]),
            (f.frame(f.CREDIT, 3, f.U32.pack(9)), []),
        ],
        ids=["RESET", "CREDIT"],
    )
    def test_whatever_comes_for_it_makes_the_stream(self, frame: bytes, told: list[Any]) -> None:
        session, events, owner, _ = self.quick()
        session.receive(self.REQUEST + frame)
        assert (owner.made, events.events) == (1, told)
        stream = session.streams.get(3)
        assert (stream is None) is bool(told)
        if isinstance(stream, Stream):
            assert stream.recv_ended
            assert stream.send_credit == f.STREAM_WINDOW + 9

    @pytest.mark.parametrize(
        "frame",
        [data(3, b"x"), f.frame(f.END, 3), response(3), answer(3), REQUEST, f.frame(f.CREDIT, 3, f.U32.pack(f.MAX_CREDIT))],
        ids=["DATA", "END", "RESPONSE", "ANSWER", "its id again", "credit"],
    )  # fmt: skip
    def test_violations_end_it_with_the_session(self, frame: bytes) -> None:
        session, events, owner, asked = self.quick()
        assert not session.feed(self.REQUEST + frame)
        assert (asked, owner.made, session.streams) == ([3], 1, {})
        assert events.events[-1][:3] == ("reset", 3, f.INTERNAL)

    @pytest.mark.parametrize("ident", [0, 2, 3])
    def test_ids_grow(self, ident: int) -> None:
        session, _, _, asked = self.quick()
        session.receive(self.REQUEST)
        session.answer(3, f.encode_answer(ANSWERED), b"")
        with pytest.raises(WireError, match="must grow"):
            session.receive(f.frame(f.REQUEST, ident, f.encode_request(1, [b"GET", b"/"]), f.F_END))
        assert asked == [3]

    def test_the_limit_of_streams(self) -> None:
        session, events, owner, asked = self.quick(max_streams=1)
        session.receive(self.REQUEST)
        session.receive(f.frame(f.REQUEST, 4, f.encode_request(1, [b"GET", b"/"]), f.F_END))
        ((kind, _, ident, payload),) = sent(session)
        assert (kind, ident, f.decode_reset(payload)[0]) == ("RESET", 4, f.TOO_MANY_STREAMS)
        assert (asked, session.streams, events.events) == ([3], {3: owner}, [])

    def test_nothing_is_asked_before_hello(self) -> None:
        """Whatever type the frame has that comes first."""
        for kind in (0, f.REQUEST):
            session, _, _, asked = self.quick("new")
            with pytest.raises(WireError, match="HELLO"):
                session.receive(f.frame(kind, 1, f.encode_request(1, [b"GET", b"/"]), f.F_END if kind else 0))
            assert asked == []
        session, _, _, asked = self.quick("new")
        assert not session.feed(f.frame(0, 1, f.encode_request(1, [b"GET", b"/"]), f.F_END))
        assert asked == []

    def test_the_end_of_the_session(self) -> None:
        session, events, owner, _ = self.quick()
        session.receive(self.REQUEST)
        session.close("lost")
        assert (owner.made, events.events) == (1, [("reset", 3, f.INTERNAL, "lost")])
        assert not session.streams
