"""How things end under a visitor or an agent that does not play along: nothing stays open, held or half answered."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Any

import pytest

from portico.relay.server import Relay
from portico.wire import frames as f
from tests.relay.doubles import Client, ScriptedAgent, ScriptedStream, grant, port, session_token

Visit = Callable[..., Any]
GET = b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n"


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


class TestVisitors:
    @pytest.mark.parametrize("relay_settings", [{"connections_per_address": 1, "exempt_loopback": False}])
    async def test_a_refused_connection_is_not_kept_by_its_visitor(self, relay: Relay, visit: Visit) -> None:
        """It counts nowhere, so that it must not stay for as long as the other side likes."""
        await visit(GET[:5])
        await until(lambda: relay.public.connections)
        refused = await visit(GET)
        assert b" 429 " in await refused.read_head()
        await refused.rest()
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(30):
                while True:  # our own end is open: only the relay's close ends this
                    refused.send(b"x")
                    await refused.writer.drain()
                    await asyncio.sleep(0.05)

    @pytest.mark.parametrize("relay_settings", [{"close_timeout_seconds": 0.5}])
    async def test_an_answer_that_nobody_takes_does_not_hold_its_connection(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit
    ) -> None:
        """The answer is complete and was to be the last; what is left of it lies in the relay's buffer."""

        def answer(stream: ScriptedStream) -> None:
            size = 16_000_000
            stream.stream.send_response(200, [b"OK", b"Content-Length", b"%d" % size], end=False)
            left = size

            def feed() -> None:
                nonlocal left
                while left and (room := stream.stream.sendable()):
                    data = bytes(min(room, left))
                    left -= len(data)
                    stream.stream.send_data(data, end=not left)
                if left:
                    stream.stream.wait()

            stream.feeding = feed
            feed()

        agent.on_stream = answer
        reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 1), limit=1)
        writer.write(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        got = 0
        await until(lambda: relay.public.connections)
        (visitor,) = relay.public.connections
        # Take just so much that the whole of it left the agent.
        while visitor.current is not None or not agent.streams:
            got += len(await reader.read(65_536)) if got < 16_000_000 else 0
        assert got < 16_000_000
        await until(lambda: not relay.public.connections)
        writer.close()

    @pytest.mark.parametrize("relay_settings", [{"head_timeout_seconds": 0.5}])
    async def test_a_head_begun_under_an_answer_has_its_time_too(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = lambda s: None
        visitor = await visit(GET + GET[:9])
        await until(lambda: agent.streams)
        agent.streams[0].answer(body=b"one")
        assert (await visitor.response())[0] == 200
        assert b" 408 " in await asyncio.wait_for(visitor.read_head(), 30)

    async def test_a_refusal_of_http10_ends_its_connection(self, relay: Relay, visit: Visit) -> None:
        """Without the field that says so, an HTTP/1.0 client does not know that the connection stays."""
        visitor = await visit(b"GET / HTTP/1.0\r\nHost: nobody.localhost\r\nConnection: keep-alive\r\n\r\n")
        assert b" 404 " in await asyncio.wait_for(visitor.rest(), 30)


class TestAnswers:
    async def test_an_end_before_the_announced_length(self, agent: ScriptedAgent, visit: Visit) -> None:
        """Else the next answer on the connection would be read as this one's body."""
        agent.on_stream = lambda s: s.stream.send_response(200, [b"OK", b"Content-Length", b"5"], end=True)
        status, fields, _ = await (await visit(GET)).response()
        assert (status, fields[b"portico-error"]) == (502, [b"edge.target_invalid"])

    async def test_interim_responses_do_not_pile_up(self, relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
        """They have no credit: a visitor that does not read them must not cost memory."""
        agent.on_stream = lambda s: None
        client = await visit(GET)
        client.writer.transport.pause_reading()
        await until(lambda: agent.streams)
        (visitor,) = relay.public.connections
        for _ in range(200):
            for _ in range(20):
                agent.streams[0].stream.send_interim(103, [b"Early Hints", b"Link", b"x" * 8000])
            await asyncio.sleep(0)
        await agent.until(lambda: agent.carrier.transport is not None)
        agent.carrier.rtt = None
        agent.carrier.probe()
        await agent.until(lambda: agent.carrier.rtt is not None)
        assert visitor.transport.get_write_buffer_size() < 1_000_000


class TestUpgrades:
    async def test_bytes_that_follow_early_in_a_segment_of_their_own(self, agent: ScriptedAgent, visit: Visit) -> None:
        """They are of the new protocol if the target agrees, and were never HTTP, however they look."""
        agent.on_stream = lambda s: None
        visitor: Client = await visit(
            b"GET / HTTP/1.1\r\nHost: web.localhost\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
        )
        await until(lambda: agent.streams)
        for part in (GET, b"more"):
            visitor.send(part)
            await asyncio.sleep(0.05)
        (stream,) = agent.streams
        stream.stream.send_response(101, [b"Switching", b"Upgrade", b"x"], end=False)
        await visitor.read_head()
        await until(lambda: bytes(stream.body) == GET + b"more")

    @pytest.mark.parametrize("token", [b"h2c", b"x", b"websocket"])
    @pytest.mark.parametrize("chunked", [False, True])
    @pytest.mark.parametrize("whole", [False, True])
    async def test_a_body_stays_a_body(
        self, agent: ScriptedAgent, visit: Visit, token: bytes, chunked: bool, whole: bool
    ) -> None:
        """Some clients ask for HTTP/2 on every request, also with a body. Taken for what follows an upgrade, the body
        would be read as a request of its own."""
        agent.on_stream = lambda s: None
        body = GET.replace(b"/", b"/smuggled", 1)
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
        sent = b"%x\r\n%b\r\n0\r\nX-Sum: 1\r\n\r\n" % (len(body), body) if chunked else body
        head = b"POST / HTTP/1.1\r\nHost: web.localhost\r\nConnection: Upgrade\r\nUpgrade: %b\r\n%b\r\n\r\n"
        data = head % (token, framing) + sent + GET.replace(b"/", b"/next", 1)
        visitor = await visit()
        for part in (data,) if whole else (data[at : at + 7] for at in range(0, len(data), 7)):
            visitor.send(part)
            await asyncio.sleep(0)
        await until(lambda: agent.streams and agent.streams[0].ended.is_set())
        (first,) = agent.streams
        assert bytes(first.body) == body
        assert first.trailers == ([b"X-Sum", b"1"] if chunked else [])
        assert not first.get(b"Upgrade")
        first.answer(body=b"one")
        assert (await visitor.response())[::2] == (200, b"one")
        await until(lambda: len(agent.streams) == 2)
        assert (agent.streams[1].method, agent.streams[1].target) == (b"GET", b"/next")
        agent.streams[1].answer(body=b"two")
        assert (await visitor.response())[::2] == (200, b"two")

    async def test_the_targets_end_reaches_a_visitor_over_tls(self, relay: Relay, agent: ScriptedAgent) -> None:
        """TLS has no half-close here: without a close a WebSocket client waits for its own time limit."""
        agent.on_stream = lambda s: None
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 2), ssl=context)
        writer.write(b"GET / HTTP/1.1\r\nHost: web.localhost\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
        await until(lambda: agent.streams)
        stream = agent.streams[0].stream
        stream.send_response(101, [b"Switching", b"Upgrade", b"x"], end=False)
        stream.send_data(b"bye", end=True)
        assert (await asyncio.wait_for(reader.read(-1), 30)).endswith(b"\r\n\r\nbye")
        writer.close()
        await until(lambda: relay.agents.by_host[b"web.localhost"].inflight == 0)
        await until(lambda: not agent.session.streams)


class TestControlPort:
    async def test_a_request_that_is_no_upgrade_holds_no_session(self, relay: Relay) -> None:
        """Its token is good, so that it came through the door; but nothing connected."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 0))
        lines = f"GET /v1/connect HTTP/1.1\r\nHost: x\r\nSec-WebSocket-Protocol: {f.PROTOCOL}\r\n"
        writer.write(f"{lines}Authorization: Bearer {session_token()}\r\n\r\n".encode())
        assert b" 400 " in await asyncio.wait_for(reader.read(-1), 30)
        writer.close()
        assert not relay.agents.connections

    async def test_pings_of_a_peer_that_reads_nothing(self, relay: Relay, agent: ScriptedAgent) -> None:
        """The WebSocket's own pings: each answer costs memory, and nobody counts them but us."""
        (connection,) = relay.agents.connections
        mine = agent.carrier.transport
        assert mine is not None
        mine.underlying_transport.pause_reading()
        ping = b"\x89\xfd\0\0\0\0" + bytes(125)
        with contextlib.suppress(ConnectionError):
            for _ in range(400):
                mine.underlying_transport.write(ping * 500)
                await asyncio.sleep(0)
        theirs = connection.carrier.transport
        assert theirs is not None
        await until(lambda: not mine.underlying_transport.get_write_buffer_size())
        await asyncio.sleep(0.1)
        assert theirs.underlying_transport.get_write_buffer_size() < 4_000_000

    async def test_a_websocket_ping_is_answered(self, relay: Relay, agent: ScriptedAgent) -> None:
        """Whoever stands between may ask by it whether the connection lives."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 0))
        writer.write(
            b"GET /v1/connect HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            b"Sec-WebSocket-Protocol: portico.v1\r\n"
            b"Authorization: Bearer " + session_token(session="ses_b").encode() + b"\r\n\r\n\x89\x82\0\0\0\0hi"
        )
        await reader.readuntil(b"\r\n\r\n")
        assert await asyncio.wait_for(reader.readexactly(4), 30) == b"\x8a\x02hi"
        writer.close()


class TestTakeOver:
    @pytest.mark.parametrize("relay_settings", [{"takeover_probe_seconds": 0.5}])
    async def test_a_tunnel_stopped_while_its_holder_is_probed(self, relay: Relay, agent: ScriptedAgent) -> None:
        """The grant was good when the probe began, and is not when it ends."""
        assert agent.carrier.transport is not None
        agent.carrier.transport.underlying_transport.pause_reading()
        other = await ScriptedAgent().connect(port(relay, 0), session_token(session="ses_b", agent="agt-b"))
        other.bind(grant(session="ses_b"))
        await until(lambda: any(c.pending for c in relay.agents.connections))
        row = {
            "id": "tun_web", "organization": "org_test", "hosts": ["web.localhost"], "state": "stopped", "generation": 2,
        }  # fmt: skip
        relay.snapshot.apply({"type": "delta", "version": 2, "changes": [{"kind": "tunnel", "tunnel": row}]})
        await other.until(lambda: other.bound or other.refused)
        assert other.refused[1][0] == "tunnel.stopped"
        other.close()

    @pytest.mark.parametrize("relay_settings", [{"takeover_probe_seconds": 0.5}])
    async def test_two_agents_that_wait_for_one_dead_holder(self, relay: Relay, agent: ScriptedAgent) -> None:
        """One gets the tunnel; the other is told so, and nobody believes to hold what another holds."""
        assert agent.carrier.transport is not None
        agent.carrier.transport.underlying_transport.pause_reading()
        others = []
        for name in "bc":
            other = await ScriptedAgent().connect(port(relay, 0), session_token(f"ses_{name}", f"agt-{name}"))
            other.bind(grant(session=f"ses_{name}"))
            others.append(other)
        for other in others:
            await other.until(lambda other=other: other.bound or other.refused)
        await asyncio.sleep(0.2)
        assert sorted(bool(other.bound) for other in others) == [False, True]
        assert [other.refused[1][0] for other in others if other.refused] == ["tunnel.in_use"]
        for other in others:
            other.close()
