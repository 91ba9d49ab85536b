"""Requests and answers at the agent whose bytes were seen before take a short way; what can be observed may not differ.

Each test makes request and answer known, and looks at the connection to the target (``asked``) that the short way is what it
tests. The relay of these tests takes ANSWER; it counts the frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from portico.agent.connection import TargetConnection
from portico.agent.forward import Exchange, Forwarder
from portico.agent.heads import KNOWN_ANSWERS, RequestWriter
from portico.agent.hints import HostHint
from portico.agent.recorder import Recorder, Tap
from portico.agent.stats import Stats
from portico.agent.target import Target
from portico.settings import AgentSettings
from portico.wire import frames as f
from portico.wire.session import Session
from tests.agent.harness import Handler, Relay, RelayConnection, Visit, read_head, serving, target_server
from tests.timing import PATIENCE_SECONDS

OK = b"HTTP/1.1 200 OK\r\nServer: app\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    def forget() -> None:
        KNOWN_ANSWERS.clear()
        KNOWN_ANSWERS._seen.clear()

    forget()
    yield
    forget()


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[Exchange]:
    """Every exchange that is made from here on."""
    made: list[Exchange] = []
    begin = Exchange.__init__

    def noting(self: Exchange, *args: Any) -> None:
        made.append(self)
        begin(self, *args)

    monkeypatch.setattr(Exchange, "__init__", noting)
    return made


class Tunnel:
    """A forwarder behind a real link to a relay that takes ANSWER, or does not."""

    def __init__(self, relay: RelayConnection, hub: Relay, agent: Session, forwarder: Forwarder, tap: Tap) -> None:
        self.relay, self.hub, self.agent, self.forwarder, self.tap = relay, hub, agent, forwarder, tap
        self.recorder = tap.recorder
        self.stats = forwarder.stats
        self.ids = itertools.count(1)
        self.answers = 0
        self.host = [b"Host", b"web.localhost"]
        on_answer = relay.session._on_answer

        def counting(ident: int, payload: bytes) -> None:
            self.answers += 1
            on_answer(ident, payload)

        relay.session._on_answer = counting  # type: ignore[method-assign]

    def send(self, path: bytes = b"/", method: bytes = b"GET", last: bytes | None = None) -> Visit:
        """A request as the relay sends it, with an id of its own at its end."""
        ident = b"req_%d" % next(self.ids) if last is None else last
        return self.relay.request([method, path, *self.host, b"X-Request-Id", ident])

    async def get(self, path: bytes = b"/", **options: Any) -> Visit:
        return await self.send(path, **options).over()

    async def learn(self, times: int = 4) -> None:
        for _ in range(times):
            assert (await self.get()).status == 200
        assert KNOWN_ANSWERS
        assert self.forwarder.writer.known

    @property
    def asked(self) -> list[TargetConnection]:
        """Connections on which a known request is under way."""
        return [connection for connection in self.forwarder.pool.open if connection.asked is not None]

    async def ask(self, path: bytes = b"/") -> Visit:
        """Send a known request that is at the target by the short way, unanswered."""
        visit = self.send(path)
        async with asyncio.timeout(30):
            while not self.asked:
                await asyncio.sleep(0.001)
        return visit

    async def quiet(self) -> None:
        """Nothing is under way, and the session is well."""
        async with asyncio.timeout(30):
            while self.agent.streams or self.relay.session.streams or self.stats.open:
                await asyncio.sleep(0.005)
        assert not self.asked
        assert not self.agent.closed
        assert not self.relay.session.closed


@contextlib.asynccontextmanager
async def tunnel_to(handler: Handler, answers: bool = True, **changes: Any) -> AsyncIterator[Tunnel]:
    """A tunnel to a target that runs ``handler`` for each connection."""
    settings = AgentSettings(**changes)
    async with target_server(handler) as port:
        forwarder = Forwarder(Target("tcp", "127.0.0.1", port), settings, Stats())
        tap = forwarder.tap = Recorder(settings, "run").tap(forwarder, "target")
        async with serving(forwarder, settings) as (relay, hub, link):
            link.session.answers = answers
            yield Tunnel(relay, hub, link.session, forwarder, tap)
        await forwarder.abort()


class Script:
    """A target that gives one answer, until the test sets ``step``, which then gets the connection for each request."""

    def __init__(self, answer: bytes = OK) -> None:
        self.answer = answer
        self.seen: list[bytes] = []
        self.connections = 0
        self.step: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any] | None = None
        self.closed = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                self.seen.append(await read_head(reader))
                if self.step is None:
                    writer.write(self.answer)
                else:
                    await self.step(reader, writer)
        finally:
            self.closed.set()


def parts(*data: bytes, pause: float = 0.03) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    """A step that writes pieces, each a read of its own at the agent."""

    async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number, piece in enumerate(data):
            if number:
                await asyncio.sleep(pause)
            writer.write(piece)
            await writer.drain()

    return step


class TestTheShortWay:
    async def test_it_is_taken(self, exchanges: list[Exchange]) -> None:
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()
            exchanges.clear()
            before = tunnel.answers
            for _ in range(20):
                visit = await tunnel.get()
                assert (visit.status, visit.head, bytes(visit.body), visit.trailers) == (
                    200, [b"OK", b"Server", b"app", b"Content-Length", b"2"], b"ok", None,
                )  # fmt: skip
            assert exchanges == []
            assert tunnel.answers == before + 20
            assert script.connections == 1
            await tunnel.quiet()

    async def test_the_target_sees_the_same_head_with_an_id_of_its_own(self) -> None:
        script = Script()
        async with tunnel_to(script) as tunnel:
            for _ in range(6):
                await tunnel.get(b"/a?b=%25")
        assert script.seen == [
            b"GET /a?b=%%25 HTTP/1.1\r\nHost: web.localhost\r\nX-Request-Id: req_%d\r\n\r\n" % n for n in range(1, 7)
        ]

    async def test_another_path_and_method(self, exchanges: list[Exchange]) -> None:
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()
            exchanges.clear()
            for method, path in ((b"DELETE", b"/x/1"), (b"OPTIONS", b"*"), (b"GET", b"/caf\xc3\xa9")):
                assert (await tunnel.get(path, method=method)).status == 200
                assert script.seen[-1].startswith(method + b" " + path + b" HTTP/1.1\r\nHost: web.localhost\r\n")
            assert exchanges == []

    async def test_the_targets_host_is_filled_in(self, exchanges: list[Exchange]) -> None:
        """The relay leaves Host out where the policy says rewrite; such requests are remembered like others."""
        script = Script()
        async with tunnel_to(script) as tunnel:
            tunnel.host = [b"Accept", b"*/*"]
            await tunnel.learn()
            exchanges.clear()
            await tunnel.get()
            assert exchanges == []
            host = tunnel.forwarder.target.authority.encode()
        assert all(head.count(b"Host: %b\r\n" % host) == 1 for head in script.seen)

    async def test_a_relay_that_does_not_take_answers(self, exchanges: list[Exchange]) -> None:
        async with tunnel_to(Script(), answers=False) as tunnel:
            for _ in range(6):
                assert bytes((await tunnel.get()).body) == b"ok"
            assert len(exchanges) == 6
            assert tunnel.answers == 0

    async def test_a_head_that_changes_is_read_anew(self) -> None:
        """As a Date does every second."""

        async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            second = len(script.seen) // 4
            writer.write(OK.replace(b"Server: app", b"Date: %d" % second))

        script = Script()
        script.step = step
        async with tunnel_to(script) as tunnel:
            for number in range(1, 20):
                assert (await tunnel.get()).field(b"Date") == [b"%d" % (number // 4)]

    @pytest.mark.parametrize(("method", "status"), [(b"HEAD", 200), (b"POST", 200), (b"PUT", 200)])
    async def test_other_methods_are_parsed(self, exchanges: list[Exchange], method: bytes, status: int) -> None:
        script = Script(answer=OK[:-2] if method == b"HEAD" else OK)
        async with tunnel_to(script) as tunnel:
            for _ in range(4):
                assert (await tunnel.get(method=method)).status == status
            assert len(exchanges) == 4
            assert not tunnel.forwarder.writer.known

    async def test_odd_parts_are_parsed(self, exchanges: list[Exchange]) -> None:
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()
            exchanges.clear()
            for number, last in enumerate((b"a b", b"req_a b", b"req_a\tb", b"req_\x80", b"req_", b"")):
                await tunnel.get(last=last)
                assert script.seen[-1].endswith(b"X-Request-Id: " + last + b"\r\n\r\n")
                assert len(exchanges) == number + 1
            for path in (b"/\x80", b"/a?b"):
                await tunnel.get(path)
            assert len(exchanges) == number + 1


class TestLastField:
    """The value that may be another is the last one: it must not be one that frames or routes."""

    @pytest.mark.parametrize(
        "name", [b"Content-Length", b"content-length", b"Host", b"Connection", b"Transfer-Encoding"]
    )
    def test_is_an_ordinary_one(self, name: bytes) -> None:
        writer = RequestWriter(b"app")
        for _ in range(3):
            head = [b"GET", b"/", b"A", b"b", name, b"0"]
            writer.learn(head, writer.write(head, f.F_END)[0])
        assert not writer.known

    def test_ids_are(self) -> None:
        writer = RequestWriter(b"app")
        for _ in range(2):
            head = [b"GET", b"/", b"Host", b"a", b"X-Request-Id", b"1"]
            writer.learn(head, writer.write(head, f.F_END)[0])
        assert dict(writer.known) == {b"Host\0a\0X-Request-Id": b" HTTP/1.1\r\nHost: a\r\nX-Request-Id: "}

    async def test_a_length_without_a_body_stays_refused(self) -> None:
        script = Script()
        async with tunnel_to(script) as tunnel:
            for length in (b"0", b"0", b"0", b"5"):
                visit = await tunnel.relay.request([b"GET", b"/", b"Host", b"a", b"Content-Length", length]).over()
            assert visit.reset is not None and visit.reset[0] == f.REQUEST_INVALID
        assert len(script.seen) == 3


class TestAnswers:
    """The known request is answered in another way than the last ones."""

    @pytest.mark.parametrize(
        ("pieces", "status", "body"),
        [
            pytest.param((OK[:-2], OK[-2:]), 200, b"ok", id="a known head before its body"),
            pytest.param((OK[:-1], OK[-1:]), 200, b"ok", id="a byte short"),
            pytest.param((OK[:20], OK[20:]), 200, b"ok", id="half a head"),
            pytest.param((b"\r\n" + OK,), 200, b"ok", id="an empty line before"),
            pytest.param((OK.replace(b"200 OK", b"404 No"),), 404, b"ok", id="another status"),
            pytest.param((b"HTTP/1.1 204 No\r\n\r\n",), 204, b"", id="204"),
            pytest.param((b"HTTP/1.1 304 No\r\nContent-Length: 5\r\n\r\n",), 304, b"", id="304"),
            pytest.param(
                (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",),
                200,
                b"ok",
                id="chunked",
            ),
            pytest.param((b"HTTP/1.1 103 Hints\r\nLink: a\r\n\r\n" + OK,), 200, b"ok", id="an interim answer before"),
            pytest.param((b"HTTP/1.1 103 Hints\r\n\r\n", OK), 200, b"ok", id="an interim answer in a read of its own"),
            pytest.param((OK[:-4] + b"X: " + b"x" * 20_000 + b"\r\n\r\nok",), 200, b"ok", id="a large head"),
        ],
    )
    async def test_is_passed(self, pieces: tuple[bytes, ...], status: int, body: bytes) -> None:
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()
            script.step = parts(*pieces)
            for _ in range(3):
                before = tunnel.answers
                visit = await tunnel.get()
                assert (visit.status, bytes(visit.body), visit.reset) == (status, body, None)
            if b"interim" not in pieces[0] and len(pieces) > 1:
                assert tunnel.answers == before  # never whole in one read
            script.step = None
            assert (await tunnel.get()).status == 200
            await tunnel.quiet()
            assert script.connections == 1

    async def test_late(self) -> None:
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()
            go = asyncio.Event()

            async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await go.wait()
                writer.write(OK)

            script.step = step
            before = tunnel.answers
            visit = await tunnel.ask()
            assert tunnel.stats.open == 1
            go.set()
            assert bytes((await visit.over()).body) == b"ok"
            assert tunnel.answers == before + 1
            await tunnel.quiet()

    @pytest.mark.parametrize("junk", [b"x", b"\r\n", OK, b"HTTP/1.1 200 OK\r\n"])
    async def test_with_junk_behind_it(self, junk: bytes) -> None:
        """It is passed, and the connection is not used again (where the parser would use it)."""
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()
            script.step = parts(OK + junk)
            assert bytes((await tunnel.get()).body) == b"ok"
            script.step = None
            assert bytes((await tunnel.get()).body) == b"ok"
            assert script.connections == (1 if junk == b"\r\n" else 2)
            await tunnel.quiet()

    async def test_and_bytes_that_nobody_asked_for(self) -> None:
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()
            script.step = parts(OK, OK.replace(b"ok", b"no"))
            assert bytes((await tunnel.get()).body) == b"ok"
            await asyncio.wait_for(script.closed.wait(), 30)
            script.step = None
            assert bytes((await tunnel.get()).body) == b"ok"
            assert script.connections == 2

    async def test_that_ends_the_connection(self) -> None:
        """Known as it is, the target closes behind it without having said so."""
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()

            async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(OK)
                writer.close()

            script.step = step
            for _ in range(3):
                visit = await tunnel.get()
                assert (bytes(visit.body), visit.reset) == (b"ok", None)
            await tunnel.quiet()

    @pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
                                        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok"])  # fmt: skip
    async def test_that_says_so_is_not_learned(self, answer: bytes) -> None:
        script = Script(answer=answer)
        async with tunnel_to(script) as tunnel:
            for _ in range(4):
                assert (await tunnel.get()).status == 200
            assert not KNOWN_ANSWERS
            assert script.connections == 4

    async def test_refusals_are_shown_to_the_hint(self) -> None:
        """Also where another tunnel has met the same answer before, and this one knows its requests."""
        refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 20\r\n\r\nInvalid Host header!"
        told: list[str] = []
        for hint in (None, HostHint("it", told.append)):
            script = Script()
            async with tunnel_to(script) as tunnel:
                tunnel.forwarder.host_hint = hint
                await tunnel.learn()
                script.answer = refusal
                for _ in range(4):
                    assert (await tunnel.get()).status == 403
                await tunnel.quiet()
        assert len(told) == 1


class TestInFlight:
    async def held(self, tunnel: Tunnel, script: Script) -> Visit:
        await tunnel.learn()

        async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)

        script.step = step
        return await tunnel.ask()

    async def test_the_visitor_leaves(self) -> None:
        script = Script()
        async with tunnel_to(script) as tunnel:
            visit = await self.held(tunnel, script)
            visit.stream.reset(f.CANCELLED, "gone")
            await asyncio.wait_for(script.closed.wait(), 30)
            await tunnel.quiet()
            assert tunnel.stats.records[-1][2] == 499
            entry = next(tunnel.recorder.newest())
            assert (entry.status, entry.more.aborted) == (499, "gone")

    async def test_the_session_is_lost(self) -> None:
        script = Script()
        async with tunnel_to(script) as tunnel:
            await self.held(tunnel, script)
            tunnel.relay.carrier.abort("made for this test")
            await asyncio.wait_for(script.closed.wait(), 30)
            assert not tunnel.asked
            assert not tunnel.agent.streams
            assert tunnel.stats.open == 0
            assert tunnel.stats.records[-1][2] == 499

    async def test_the_tunnel_is_unbound(self) -> None:
        """What is in flight is answered, and the connection is not kept."""
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()
            go = asyncio.Event()

            async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await go.wait()
                writer.write(OK)

            script.step = step
            visit = await tunnel.ask()
            tunnel.forwarder.retire()
            assert tunnel.forwarder.busy
            go.set()
            assert bytes((await visit.over()).body) == b"ok"
            await asyncio.wait_for(script.closed.wait(), 30)
            assert not tunnel.forwarder.busy

    async def test_the_forwarder_is_cut(self) -> None:
        """It is not sent again on a new connection when its own is cut."""
        script = Script()
        async with tunnel_to(script) as tunnel:
            await self.held(tunnel, script)
            await tunnel.forwarder.abort()
            await asyncio.sleep(0.1)
            assert (script.connections, len(script.seen)) == (1, 5)
            assert not tunnel.asked
            assert not tunnel.forwarder.pool.open

    async def test_the_target_is_silent(self) -> None:
        script = Script()
        async with tunnel_to(script, first_byte_timeout_seconds=0.4) as tunnel:
            visit = await self.held(tunnel, script)
            began = asyncio.get_running_loop().time()
            await visit.over()
            took = asyncio.get_running_loop().time() - began
            assert visit.reset is not None
            assert visit.reset[0] == f.TARGET_TIMEOUT
            assert 0.3 < took < PATIENCE_SECONDS
            await tunnel.quiet()
            assert tunnel.stats.failures == 1

    @pytest.mark.parametrize("how", ["close", "reset"])
    async def test_a_stale_connection(self, how: str) -> None:
        """The target closes the idle connection just as the request is written: it is sent once more, on a new one."""
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()

            async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                script.step = None
                if how == "reset":
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                writer.close()
                await reader.read()

            script.step = step
            visit = await tunnel.get()
            assert (visit.status, bytes(visit.body), visit.reset) == (200, b"ok", None)
            assert script.connections == 2
            assert script.seen[-1] == script.seen[-2]
            await tunnel.quiet()
            assert tunnel.stats.failures == 0

    async def test_a_target_that_dies_each_time_fails_once(self) -> None:
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()

            async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.close()
                await reader.read()

            script.step = step
            visit = await tunnel.get()
            assert visit.reset is not None and visit.reset[0] == f.TARGET_INVALID
            assert (script.connections, len(script.seen)) == (2, 6)
            await tunnel.quiet()

    async def test_bytes_of_the_relay_that_need_a_stream(self) -> None:
        """CREDIT for it makes the stream; the answer then comes by the long way."""
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()
            go = asyncio.Event()

            async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await go.wait()
                writer.write(OK)

            script.step = step
            visit = await tunnel.ask()
            tunnel.relay.session.put(f.frame(f.CREDIT, visit.stream.id, f.U32.pack(1000)))
            async with asyncio.timeout(30):
                while tunnel.asked:
                    await asyncio.sleep(0.001)
            go.set()
            assert bytes((await visit.over()).body) == b"ok"
            await tunnel.quiet()


class TestLimits:
    async def test_connections_to_the_target(self, exchanges: list[Exchange]) -> None:
        """At the limit others wait for the connection that a known request is on, and get it."""
        script = Script()
        async with tunnel_to(script, target_connections_max=1) as tunnel:
            await tunnel.learn()
            script.step = parts(OK, pause=0)
            exchanges.clear()
            visits = [tunnel.send(b"/%d" % number) for number in range(10)]
            for visit in visits:
                assert bytes((await visit.over()).body) == b"ok"
            assert script.connections == 1
            assert len(exchanges) < 10
            assert [head.split(b" ")[1] for head in script.seen[4:]] == [b"/%d" % number for number in range(10)]
            await tunnel.quiet()

    async def test_streams(self) -> None:
        script = Script()
        async with tunnel_to(script, max_streams=1) as tunnel:
            await tunnel.learn()
            go = asyncio.Event()

            async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await go.wait()
                writer.write(OK)

            script.step = step
            visit = await tunnel.ask()
            other = await tunnel.get()
            assert other.reset is not None and other.reset[0] == f.TOO_MANY_STREAMS
            go.set()
            assert (await visit.over()).status == 200
            await tunnel.quiet()

    async def test_the_sessions_credit_is_used_up(self, exchanges: list[Exchange]) -> None:
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()
            exchanges.clear()
            kept, tunnel.agent.send_credit = tunnel.agent.send_credit, 1
            before = tunnel.answers
            visit = tunnel.send()
            await visit.until(lambda: visit.body == b"o")
            assert len(exchanges) == 1
            assert tunnel.answers == before
            tunnel.relay.session.put(f.frame(f.CREDIT, 0, f.U32.pack(kept - 1)))
            assert bytes((await visit.over()).body) == b"ok"
            await tunnel.quiet()
            assert tunnel.agent.send_credit == kept - 2

    async def test_the_carrier_is_congested(self, exchanges: list[Exchange]) -> None:
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()
            exchanges.clear()
            tunnel.agent.pause()
            tunnel.agent.spare = 0  # what a congested carrier takes of first bytes has gone
            visit = tunnel.send()
            await visit.until(lambda: visit.status)
            await asyncio.sleep(0.05)
            assert bytes(visit.body) == b""
            assert len(exchanges) == 1
            tunnel.agent.resume()
            assert bytes((await visit.over()).body) == b"ok"
            await tunnel.quiet()

    async def test_credit_is_that_of_both_frames(self) -> None:
        """More bytes than the session's window, in ANSWER frames alone."""
        body = b"x" * 16_000
        script = Script(answer=b"HTTP/1.1 200 OK\r\nContent-Length: 16000\r\n\r\n" + body)
        async with tunnel_to(script) as tunnel:
            count = f.SESSION_WINDOW // len(body) + 300
            await tunnel.learn()
            before = tunnel.answers
            for _ in range(count // 50):
                visits = [tunnel.send() for _ in range(50)]
                for visit in visits:
                    assert bytes((await visit.over()).body) == body
            assert tunnel.answers > before
            await tunnel.quiet()
            sent, back = tunnel.agent, tunnel.relay.session
            assert sent.send_credit == back.recv_credit
            assert 0 < sent.send_credit <= f.SESSION_WINDOW

    @pytest.mark.parametrize("ident", [0, 4, 1])
    async def test_ids_that_do_not_grow(self, ident: int) -> None:
        """From a relay that has lost count: the session ends, by the protocol's own words."""
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()
            payload = f.encode_request(1, [b"GET", b"/", b"Host", b"web.localhost", b"X-Request-Id", b"a"])
            tunnel.relay.session.put(f.frame(f.REQUEST, ident, payload, f.F_END))
            await tunnel.hub.until(lambda: tunnel.relay.error is not None)
            assert tunnel.relay.error is not None
            assert tunnel.relay.error[0] == "wire.protocol_error"
            assert len(script.seen) == 4

    async def test_ids_may_jump(self) -> None:
        async with tunnel_to(Script()) as tunnel:
            await tunnel.learn()
            tunnel.relay.session.last_stream = 2**32 - 3
            for _ in range(2):
                assert (await tunnel.get()).status == 200
            with pytest.raises(OverflowError):
                tunnel.send()


def entry_key(entry: Any) -> tuple[Any, ...]:
    """What an entry shows, but for times."""
    more = entry.more
    return (
        entry.line(), entry.head(), entry.status, entry.answer_head(), entry.received, bytes(entry.response_body or b""),
        entry.complete, more.failure, more.aborted, more.interim, more.response_trailers, bool(entry.ended),
        0 < entry.started <= entry.answered <= entry.ended,
    )  # fmt: skip


class TestWhatIsRecorded:
    @pytest.mark.parametrize("size", [0, 2, 4096, 4097, 16_000])
    @pytest.mark.parametrize("limit", [0, 100, 8192, 65_536])
    async def test_entries_and_counts_are_those_of_the_long_way(
        self, exchanges: list[Exchange], size: int, limit: int
    ) -> None:
        body = bytes(range(256)) * 63
        answer = b"HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: %d\r\n\r\n" % size + body[:size]
        async with tunnel_to(Script(answer=answer), inspect_body_max_bytes=limit) as tunnel:
            for _ in range(6):
                await tunnel.get(last=b"same")
            await tunnel.quiet()
            if size <= 4097:  # larger ones may take two reads
                assert len(exchanges) < 6
            keys = [entry_key(entry) for entry in tunnel.recorder.newest()]
            assert len(keys) == 6
            assert all(key == keys[-1] for key in keys)
            assert [entry.seq for entry in tunnel.recorder.newest()] == [6, 5, 4, 3, 2, 1]
            assert (tunnel.stats.total, tunnel.stats.open, tunnel.stats.failures, tunnel.stats.written) == (6, 0, 0, 6)
            assert {row[:3] for row in tunnel.stats.records} == {(b"GET", b"/", 200)}
            assert all(row[3] <= row[4] for row in tunnel.stats.records)

    async def test_what_is_in_flight_is_shown(self) -> None:
        script = Script()
        async with tunnel_to(script) as tunnel:
            await tunnel.learn()
            go = asyncio.Event()

            async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await go.wait()
                writer.write(OK)

            script.step = step
            visit = await tunnel.ask(b"/slow")
            entry = next(tunnel.recorder.newest())
            assert (entry.line(), entry.ended, entry.status) == ((b"GET", b"/slow"), 0.0, 0)
            assert not tunnel.asked
            assert len(list(tunnel.recorder.newest())) == 5
            go.set()
            await visit.over()
            await tunnel.quiet()
            assert next(tunnel.recorder.newest()).status == 200
            assert len(list(tunnel.recorder.newest())) == 5
