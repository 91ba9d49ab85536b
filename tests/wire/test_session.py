"""Transcripts of one session side: `<<` bytes that arrive, `>>` frames that leave, and what the owner is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from portico.wire import frames as f
from portico.wire.frames import WireError
from portico.wire.session import HEADROOM, LARGE, PROVEN, Session, Stream
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
        session.send_credit = 10
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
