"""TCP tunnels at the relay: ports that open and close with their tunnels, and the connections of visitors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from portico.relay.server import Relay
from portico.wire import frames as f
from portico.wire import grants
from portico.wire.stream import Stream
from tests.ports import free_port
from tests.relay.doubles import KEY, ORG, ScriptedAgent, session_token
from tests.relay.doubles import port as control_port


def tcp_grant(
    number: int,
    name: str = "ssh",
    session: str = "ses_a",
    generation: int = 1,
    concurrency: int = 100,
    policy: dict[str, Any] | None = None,
) -> str:
    claims = grants.grant_claims(
        session=session, organization=ORG, tunnel=f"tun_{name}", name=name, protocol="tcp", hosts=[], port=number,
        limits={"concurrency": concurrency}, generation=generation, policy_hash="none", policy=policy or {},
        url=f"tcp://localhost:{number}", now=int(time.time()), life=900,
    )  # fmt: skip
    return KEY.sign(grants.GRANT_TYP, claims)


def row(number: int, name: str = "ssh", state: str = "active", generation: int = 1) -> dict[str, Any]:
    return {
        "id": f"tun_{name}", "organization": ORG, "hosts": [], "port": number, "state": state, "generation": generation,
    }  # fmt: skip


class TcpStream:
    """A TCP stream at the agent; records what came, and acknowledges it if it ``takes``."""

    def __init__(self, stream: Stream, info: dict[str, Any]) -> None:
        self.stream, self.info = stream, info
        self.body = bytearray()
        self.ended = False
        self.reset: tuple[int, str] | None = None
        self.take = True
        self.on_room: Callable[[], None] = lambda: None

    def on_data(self, data: bytes, end: bool) -> None:
        self.body += data
        if self.take:
            self.stream.consumed(len(data))
        self.ended = self.ended or end

    def on_end(self, trailers: list[bytes]) -> None:
        self.ended = True

    def on_reset(self, code: int, detail: str) -> None:
        self.reset = (code, detail)

    def on_credit(self) -> None:
        self.on_room()


class TcpAgent(ScriptedAgent):
    """``on_tcp`` is called with each connection; it opens it unless it is told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.tcp: list[TcpStream] = []
        self.on_tcp: Callable[[TcpStream], None] = lambda s: s.stream.send_opened()

    def on_open(self, stream: Stream, bind: int, info: dict[str, Any]) -> TcpStream:
        made = TcpStream(stream, info)
        stream.sink = made  # type: ignore[assignment]
        self.tcp.append(made)
        self.on_tcp(made)
        return made

    async def stream(self, number: int = 1) -> TcpStream:
        await self.until(lambda: len(self.tcp) >= number)
        return self.tcp[number - 1]


@pytest.fixture
def number() -> int:
    """The tunnel's public port."""
    return free_port()


@pytest.fixture
async def agent(relay: Relay, number: int) -> AsyncIterator[TcpAgent]:
    """Connected, with the TCP tunnel on ``number`` bound as bind 1."""
    made = TcpAgent()
    await made.connect(control_port(relay, 0), session_token())
    await made.online(tcp_grant(number))
    yield made
    made.close()


class Visitor:
    """A connection to a tunnel's port."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def end(self) -> None:
        self.writer.write_eof()

    async def read(self, count: int) -> bytes:
        async with asyncio.timeout(30):
            return await self.reader.readexactly(count)

    async def rest(self) -> bytes:
        async with asyncio.timeout(30):
            return await self.reader.read(-1)

    async def is_reset(self) -> bool:
        """Whether the connection ended with RST (and not with FIN)."""
        try:
            await self.rest()
        except ConnectionResetError:
            return True
        return False

    def reset(self) -> None:
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@pytest.fixture
async def visit(number: int) -> AsyncIterator[Callable[..., Any]]:
    opened: list[Visitor] = []

    async def connect(**options: Any) -> Visitor:
        opened.append(Visitor(*await asyncio.open_connection("127.0.0.1", number, limit=2**26, **options)))
        return opened[-1]

    yield connect
    for visitor in opened:
        visitor.writer.transport.abort()


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def listening(number: int) -> bool:
    """Whether anybody listens on the port, from the system's own table (a connection would be a visit)."""
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    return any(int(x[1].split(":")[1], 16) == number and x[3] == "0A" for x in map(str.split, lines))


def sockets_of_this_process() -> int:
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(fd))
    return sum(link.startswith("socket:") for link in links)


def quiet(relay: Relay) -> bool:
    """No visitor is left, and no place is held."""
    lives = relay.agents.by_tunnel.values()
    return not relay.public.connections and not any(live.inflight for live in lives)


class TestBytes:
    async def test_the_target_speaks_first(self, relay: Relay, agent: TcpAgent, visit: Any) -> None:
        def banner(s: TcpStream) -> None:
            s.stream.send_opened()
            s.stream.send_data(b"SSH-2.0-x\r\n")

        agent.on_tcp = banner
        visitor = await visit()
        assert await visitor.read(11) == b"SSH-2.0-x\r\n"
        visitor.send(b"hello")
        stream = await agent.stream()
        await until(lambda: stream.body == b"hello")

    async def test_the_visitor_speaks_before_it_is_opened(self, relay: Relay, agent: TcpAgent, visit: Any) -> None:
        agent.on_tcp = lambda s: None
        visitor = await visit()
        visitor.send(b"early")
        visitor.end()
        stream = await agent.stream()
        await until(lambda: stream.ended)
        assert stream.body == b"early"
        stream.stream.send_opened()
        stream.stream.send_data(b"late", end=True)
        assert await visitor.rest() == b"late"
        await until(lambda: quiet(relay))

    async def test_addresses_travel_with_it(self, agent: TcpAgent, visit: Any, number: int) -> None:
        visitor = await visit()
        host, port = visitor.writer.get_extra_info("sockname")
        stream = await agent.stream()
        assert stream.info.pop("id").startswith("req_")
        assert stream.info == {"peer": f"{host}:{port}", "local": f"127.0.0.1:{number}"}

    async def test_half_close_by_the_target(self, relay: Relay, agent: TcpAgent, visit: Any) -> None:
        def bye(s: TcpStream) -> None:
            s.stream.send_opened()
            s.stream.send_data(b"bye", end=True)

        agent.on_tcp = bye
        visitor = await visit()
        assert await visitor.rest() == b"bye"
        visitor.send(b"still here")
        stream = await agent.stream()
        await until(lambda: stream.body == b"still here")
        assert not stream.ended
        visitor.writer.close()
        await until(lambda: stream.ended and quiet(relay))
        assert stream.reset is None

    async def test_megabytes_each_way_under_credit(self, relay: Relay, agent: TcpAgent, visit: Any) -> None:
        data = os.urandom(6 << 20)
        left = bytearray(data)

        def feed(s: TcpStream) -> None:
            stream = s.stream
            while left and (room := stream.sendable()):
                stream.send_data(bytes(left[:room]))
                del left[:room]
            if left:
                stream.wait()
            elif not stream.send_ended:
                stream.send_end()

        def start(s: TcpStream) -> None:
            s.stream.send_opened()
            s.on_room = lambda: feed(s)
            feed(s)

        agent.on_tcp = start
        visitor = await visit()

        async def upload() -> None:
            visitor.send(data)
            await visitor.writer.drain()
            visitor.end()

        got, _ = await asyncio.gather(visitor.rest(), upload())
        stream = await agent.stream()
        await until(lambda: stream.ended)
        assert got == data and stream.body == data
        await until(lambda: quiet(relay))
        counters = relay.meter.counters("tun_ssh", ORG)
        assert (counters.connections, counters.requests) == (1, 0)
        assert (counters.bytes_in, counters.bytes_out) == (len(data), len(data))

    async def test_a_target_that_takes_nothing_stops_its_visitor(self, agent: TcpAgent, visit: Any) -> None:
        def stand_still(s: TcpStream) -> None:
            s.take = False
            s.stream.send_opened()

        agent.on_tcp = stand_still
        visitor = await visit()
        visitor.send(b"x" * (32 << 20))
        stream = await agent.stream()
        await until(lambda: len(stream.body) == f.STREAM_WINDOW)
        await asyncio.sleep(0.2)
        assert len(stream.body) == f.STREAM_WINDOW
        assert visitor.writer.transport.get_write_buffer_size() > 8 << 20  # the rest waits where it is
        stream.take = True
        stream.stream.consumed(len(stream.body))
        await until(lambda: len(stream.body) == 32 << 20, 20)

    async def test_a_visitor_that_reads_nothing_stops_its_target(
        self, relay: Relay, agent: TcpAgent, visit: Any
    ) -> None:
        sent = 0

        def feed(s: TcpStream) -> None:
            nonlocal sent
            while room := s.stream.sendable():
                s.stream.send_data(b"x" * room)
                sent += room
            s.stream.wait()

        def start(s: TcpStream) -> None:
            s.stream.send_opened()
            s.on_room = lambda: feed(s)
            feed(s)

        agent.on_tcp = start
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", next(iter(relay.ports.open))))
        await agent.stream()
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.3)
        (visitor,) = relay.public.connections
        waiting = visitor.transport.get_write_buffer_size()  # type: ignore[attr-defined]
        assert waiting <= relay.settings.stream_window_max_bytes + relay.settings.visitor_write_buffer_bytes
        assert sent < 8 << 20  # that, and what the kernel's buffers took
        sock.close()
        await until(lambda: quiet(relay))


class TestEnds:
    async def test_a_reset_by_the_visitor_reaches_the_agent(self, relay: Relay, agent: TcpAgent, visit: Any) -> None:
        visitor = await visit()
        stream = await agent.stream()
        visitor.reset()
        await until(lambda: stream.reset)
        assert stream.reset == (f.CANCELLED, "the visitor reset the connection")
        await until(lambda: quiet(relay))

    async def test_a_reset_by_the_target_reaches_the_visitor(self, relay: Relay, agent: TcpAgent, visit: Any) -> None:
        visitor = await visit()
        stream = await agent.stream()
        stream.stream.send_data(b"last words")
        stream.stream.reset(f.TARGET_RESET, "the target reset the connection")
        assert await visitor.is_reset()
        await until(lambda: quiet(relay))

    async def test_what_came_before_a_reset_was_sent(self, relay: Relay, agent: TcpAgent, visit: Any) -> None:
        """As with a direct connection, a reader that is quick enough has it."""
        visitor = await visit()
        stream = await agent.stream()
        await until(lambda: any(v.opened for v in relay.public.connections))  # type: ignore[attr-defined]
        stream.stream.send_data(b"last words")
        stream.stream.reset(f.TARGET_RESET, "")
        assert await visitor.read(10) == b"last words"
        assert await visitor.is_reset()

    async def test_an_end_of_both_ways_at_once(self, relay: Relay, agent: TcpAgent, visit: Any) -> None:
        """`no_error`: the target closed its connection, which is no fault."""
        visitor = await visit()
        stream = await agent.stream()
        stream.stream.send_data(b"all of it")
        stream.stream.reset(f.NO_ERROR, "the target closed the connection")
        assert await visitor.rest() == b"all of it"
        await until(lambda: quiet(relay))

    @pytest.mark.parametrize(
        ("reset", "code"),
        [
            (f.TARGET_REFUSED, "edge.target_refused"),
            (f.TARGET_TIMEOUT, "edge.target_timeout"),
            (f.NO_SUCH_BIND, "edge.agent_unreachable"),
            (f.TOO_MANY_STREAMS, "edge.concurrency_exceeded"),
        ],
    )
    async def test_a_target_that_is_not_there(
        self, relay: Relay, agent: TcpAgent, visit: Any, caplog: pytest.LogCaptureFixture, reset: int, code: str
    ) -> None:
        """Closed without a byte, also when the visitor has spoken; the log says why, once."""
        agent.on_tcp = lambda s: s.stream.reset(reset, "nothing listens on 127.0.0.1:22")
        with caplog.at_level(logging.WARNING, "portico.relay.raw"):
            for _ in range(3):
                assert await (await visit()).rest() == b""
        (said,) = [r for r in caplog.records if r.name == "portico.relay.raw"]
        fields = said.f  # type: ignore[attr-defined]
        assert fields["code"] == code and fields["detail"] == "nothing listens on 127.0.0.1:22"
        assert fields["tunnel"] == "tun_ssh" and fields["visitor"] == "127.0.0.1"
        assert relay.public.refusals[code] == 3
        assert relay.meter.counters("tun_ssh", ORG).errors == 3
        await until(lambda: quiet(relay))

    async def test_the_agent_is_gone(self, relay: Relay, agent: TcpAgent, visit: Any) -> None:
        visitor = await visit()
        await agent.stream()
        agent.close()
        assert await visitor.is_reset()
        await until(lambda: quiet(relay))

    async def test_the_agent_does_not_answer(
        self, relay: Relay, agent: TcpAgent, visit: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        agent.on_tcp = lambda s: None
        visitor = await visit()
        stream = await agent.stream()
        for connection in relay.public.connections:
            connection.deadline = 0.0
        assert await visitor.rest() == b""
        await until(lambda: stream.reset)
        assert "edge.target_timeout" in str([r.f for r in caplog.records if r.name == "portico.relay.raw"])  # type: ignore[attr-defined]
        await until(lambda: quiet(relay))


class TestIdle:
    @pytest.fixture
    def relay_settings(self) -> dict[str, Any]:
        return {"tcp_idle_timeout_seconds": 0.8}

    async def test_silence_ends_a_connection(
        self, relay: Relay, agent: TcpAgent, visit: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        visitor = await visit()
        stream = await agent.stream()
        for _ in range(2):  # a byte now and then, either way, keeps it
            await asyncio.sleep(0.4)
            visitor.send(b".")
            await asyncio.sleep(0.4)
            stream.stream.send_data(b".")
        assert stream.reset is None
        assert await visitor.is_reset()
        assert stream.reset is not None and stream.reset[0] == f.IDLE_TIMEOUT
        assert "edge.connection_idle" in str([r.f for r in caplog.records if r.name == "portico.relay.raw"])  # type: ignore[attr-defined]
        await until(lambda: quiet(relay))


class TestRoom:
    async def test_the_tunnels_concurrency(self, relay: Relay, agent: TcpAgent, visit: Any, number: int) -> None:
        await agent.online(tcp_grant(number, concurrency=2))
        kept = [await visit(), await visit()]
        await agent.stream(2)
        assert await (await visit()).rest() == b""
        assert relay.public.refusals["edge.concurrency_exceeded"] == 1
        kept[0].reset()
        await until(lambda: agent.tcp[0].reset)
        fourth = await visit()
        await agent.stream(3)
        fourth.send(b"in")
        await until(lambda: agent.tcp[2].body == b"in")

    async def test_streams_of_the_session(self, relay: Relay, agent: TcpAgent, visit: Any) -> None:
        (connection,) = relay.agents.connections
        connection.session.max_streams = 1
        await visit()
        await agent.stream()
        assert await (await visit()).rest() == b""
        assert relay.public.refusals["edge.agent_unreachable"] == 1


class TestOneAddress:
    @pytest.fixture
    def relay_settings(self) -> dict[str, Any]:
        return {"exempt_loopback": False, "connections_per_address": 2}

    async def test_holds_so_many_and_no_more(self, relay: Relay, agent: TcpAgent, visit: Any) -> None:
        first = await visit()
        await visit()
        await agent.stream(2)
        assert await (await visit()).rest() == b""
        assert relay.public.refusals["edge.too_many_connections"] == 1
        assert len(agent.tcp) == 2
        first.reset()
        await until(lambda: agent.tcp[0].reset)
        await visit()
        await agent.stream(3)


class TestPorts:
    async def test_open_while_bound(self, relay: Relay, agent: TcpAgent, number: int) -> None:
        assert listening(number)
        agent.session.control(f.UNBIND, 1, code="tunnel.stopped", detail="")
        await until(lambda: not listening(number))
        await agent.online(tcp_grant(number), bind=2)
        assert listening(number)
        agent.close()
        await until(lambda: not listening(number))

    async def test_bound_means_open(self, relay: Relay, number: int) -> None:
        """The answer to BIND comes when a visitor can connect, not before."""
        agent = await TcpAgent().connect(control_port(relay, 0), session_token())
        seen: list[bool] = []
        answer = agent.on_bound
        agent.on_bound = lambda *a: (seen.append(listening(number)), answer(*a))[1]  # type: ignore[method-assign]
        await agent.online(tcp_grant(number))
        assert seen == [True]
        agent.close()

    async def test_a_renewed_grant_keeps_port_and_connections(
        self, relay: Relay, agent: TcpAgent, visit: Any, number: int
    ) -> None:
        visitor = await visit()
        stream = await agent.stream()
        before = relay.ports.open[number]
        agent.bound.clear()
        await agent.online(tcp_grant(number))
        assert relay.ports.open[number] is before
        visitor.send(b"on")
        await until(lambda: stream.body == b"on")

    async def test_another_port_for_the_same_tunnel(self, relay: Relay, agent: TcpAgent, number: int) -> None:
        other = free_port()
        agent.bound.clear()
        await agent.online(tcp_grant(other, generation=2))
        assert listening(other) and not listening(number) and list(relay.ports.open) == [other]

    @pytest.mark.parametrize("state", ["stopped", "suspended", "deleted"])
    async def test_the_platforms_end_is_everybodys_end(
        self, relay: Relay, agent: TcpAgent, visit: Any, number: int, state: str
    ) -> None:
        relay.snapshot.apply({"type": "delta", "version": 2, "changes": [{"kind": "tunnel", "tunnel": row(number)}]})
        visitor = await visit()
        stream = await agent.stream()
        change = (
            {"kind": "tunnel_removed", "id": "tun_ssh", "code": "tunnel.deleted"}
            if state == "deleted"
            else {"kind": "tunnel", "tunnel": row(number, state=state, generation=2)}
        )
        relay.snapshot.apply({"type": "delta", "version": 3, "changes": [change]})
        assert await visitor.is_reset()
        await until(lambda: stream.reset and not listening(number))
        assert stream.reset == (f.CANCELLED, "the platform ended the tunnel")
        await until(lambda: quiet(relay))

    async def test_a_newer_connection_of_the_agent_takes_the_port_over(
        self, relay: Relay, agent: TcpAgent, visit: Any, number: int
    ) -> None:
        """It is never closed meanwhile; what is open on the old connection goes on there."""
        old = await visit()
        await agent.stream()
        before = relay.ports.open[number].sock
        newer = TcpAgent()
        await newer.connect(control_port(relay, 0), session_token(), connect=2)
        await newer.online(tcp_grant(number))
        assert relay.ports.open[number].sock is before
        await visit()
        await newer.stream()
        old.send(b"still")
        await until(lambda: agent.tcp[0].body == b"still")
        newer.close()

    async def test_who_waits_in_the_queue_when_the_agent_gives_the_port_back_is_served(
        self, relay: Relay, agent: TcpAgent, number: int
    ) -> None:
        """As in a relay's restart in order: its agent has another connection, and answers what crosses the UNBIND."""
        (connection,) = relay.agents.connections
        # Neither the connections nor the UNBIND let the loop run: the kernel has queued them when the relay hears of it.
        waiting = [socket.create_connection(("127.0.0.1", number)) for _ in range(3)]
        waiting[0].sendall(b"early")
        connection.on_unbind(1, "tunnel.moved", "the tunnel moves to another connection")
        await until(lambda: not relay.ports.open)
        await until(lambda: len(agent.tcp) == 3 and any(stream.body == b"early" for stream in agent.tcp))
        assert all(stream.reset is None for stream in agent.tcp)
        await until(lambda: not listening(number))
        for sock in waiting:
            sock.close()

    async def test_nobody_in_the_queue_is_served_when_the_platform_ends_the_tunnel(
        self, relay: Relay, agent: TcpAgent, number: int
    ) -> None:
        relay.snapshot.apply({"type": "delta", "version": 2, "changes": [{"kind": "tunnel", "tunnel": row(number)}]})
        with socket.create_connection(("127.0.0.1", number)):
            change = {"kind": "tunnel", "tunnel": row(number, state="suspended", generation=2)}
            relay.snapshot.apply({"type": "delta", "version": 3, "changes": [change]})
            await until(lambda: not listening(number) and not relay.ports.open)
        assert not agent.tcp

    async def test_many_binds_and_ends_leave_no_socket(self, relay: Relay, number: int) -> None:
        agent = await TcpAgent().connect(control_port(relay, 0), session_token())
        numbers = [free_port() for _ in range(5)]

        async def round_trip() -> None:
            for bind, each in enumerate(numbers, start=1):
                agent.bound.pop(bind, None)
                await agent.online(tcp_grant(each, name=f"t{bind}"), bind=bind)
            for bind in range(1, 6):
                agent.session.control(f.UNBIND, bind, code="tunnel.stopped", detail="")
            await until(lambda: not relay.ports.open)

        await round_trip()
        before = sockets_of_this_process()
        for _ in range(40):
            await round_trip()
        await until(lambda: sockets_of_this_process() <= before)
        assert not any(map(listening, numbers)) and not relay.ports._starting
        agent.close()

    async def test_sessions_that_come_and_go_leave_no_socket(self, relay: Relay, number: int) -> None:
        async def session(serial: int) -> None:
            agent = await TcpAgent().connect(control_port(relay, 0), session_token(generation=serial))
            await agent.online(tcp_grant(number))
            reader, writer = await asyncio.open_connection("127.0.0.1", number)
            await agent.stream()
            agent.carrier.transport.underlying_transport.abort()  # type: ignore[union-attr]
            with contextlib.suppress(ConnectionResetError):
                await reader.read()
            writer.transport.abort()
            await until(lambda: not relay.ports.open and not relay.agents.connections)

        await session(1)
        before = sockets_of_this_process()
        for serial in range(2, 30):
            await session(serial)
        await until(lambda: sockets_of_this_process() <= before)
        assert not listening(number)


class TestTaken:
    @pytest.fixture
    def relay_settings(self) -> dict[str, Any]:
        return {"tcp_bind_seconds": 1.0}

    async def test_a_port_that_is_let_go_in_time(self, relay: Relay, number: int) -> None:
        """As when the relay that had it has just been killed."""
        agent = await TcpAgent().connect(control_port(relay, 0), session_token())
        with socket.create_server(("127.0.0.1", number)):
            agent.bind(tcp_grant(number))
            await asyncio.sleep(0.3)
            assert not agent.bound and not agent.refused
        await agent.until(lambda: agent.bound)
        assert listening(number)
        agent.close()

    async def test_a_port_that_is_not(self, relay: Relay, number: int) -> None:
        agent = await TcpAgent().connect(control_port(relay, 0), session_token())
        with socket.create_server(("127.0.0.1", number)):
            agent.bind(tcp_grant(number))
            await agent.until(lambda: agent.refused)
            code, detail, retryable = agent.refused[1]
            assert (code, retryable) == ("tunnel.port_unavailable", True) and str(number) in detail
            assert not relay.agents.by_tunnel  # not said to be online
        await agent.online(tcp_grant(number), bind=2)
        agent.close()

    async def test_an_agent_that_goes_meanwhile(self, relay: Relay, number: int) -> None:
        agent = await TcpAgent().connect(control_port(relay, 0), session_token())
        with socket.create_server(("127.0.0.1", number)):
            agent.bind(tcp_grant(number))
            await until(lambda: relay.agents.by_tunnel)
            agent.close()
            await until(lambda: not relay.agents.connections)
        await asyncio.sleep(0.2)
        assert not listening(number) and not relay.ports.open

    async def test_another_tunnels_port(self, relay: Relay, agent: TcpAgent, number: int) -> None:
        """Never two tunnels behind one port, whatever the grants say; once the first is gone the second has it."""
        agent.bind(tcp_grant(number, name="other"), bind=2)
        await agent.until(lambda: agent.refused)
        assert agent.refused[2][0] == "tunnel.port_unavailable"
        assert relay.ports.open[number].tunnel == "tun_ssh"
        agent.session.control(f.UNBIND, 1, code="tunnel.stopped", detail="")
        await agent.online(tcp_grant(number, name="other"), bind=3)
        assert relay.ports.open[number].tunnel == "tun_other"


class TestNoListener:
    @pytest.fixture
    def relay_settings(self) -> dict[str, Any]:
        return {"tcp_host": "203.0.113.1"}  # not an address of this machine

    async def test_an_address_that_is_not_ours_is_refused_at_once(self, relay: Relay, number: int) -> None:
        agent = await TcpAgent().connect(control_port(relay, 0), session_token())
        agent.bind(tcp_grant(number))
        await agent.until(lambda: agent.refused, 0.5)
        assert agent.refused[1][0] == "tunnel.port_unavailable"
        agent.close()


class TestDrain:
    @pytest.fixture
    def relay_settings(self) -> dict[str, Any]:
        return {"drain_seconds": 1.0}

    async def test_a_renewed_grant_does_not_open_the_port_again(
        self, relay: Relay, agent: TcpAgent, visit: Any, number: int
    ) -> None:
        await visit()
        await agent.stream()
        stopping = asyncio.create_task(relay.stop())
        await agent.until(lambda: agent.goaway)
        assert listening(number)  # until the agent has another relay
        agent.session.control(f.UNBIND, 1, code="tunnel.moved", detail="")
        await until(lambda: not listening(number))
        await agent.online(tcp_grant(number), bind=2)
        assert not listening(number)
        await stopping

    async def test_connections_go_on_until_the_limit(
        self, relay: Relay, agent: TcpAgent, visit: Any, number: int
    ) -> None:
        short, long = await visit(), await visit()
        await agent.stream(2)
        stopping = asyncio.create_task(relay.stop())
        await agent.until(lambda: agent.goaway)
        short.send(b"done")
        await until(lambda: any(s.body == b"done" for s in agent.tcp))
        first = next(s for s in agent.tcp if s.body == b"done")
        first.stream.send_data(b"good", end=True)
        assert await short.read(4) == b"good"
        short.end()
        assert await short.rest() == b""
        assert await long.is_reset()  # cut off, and not made to look complete
        await stopping
        assert not relay.public.connections and not listening(number)
