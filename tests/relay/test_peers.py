"""Two relays behind one address: a request on the wrong one takes one hop, never two."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import picows
import pytest
from argon2 import PasswordHasher

from portico.errors import Problem
from portico.relay.server import Relay
from portico.settings import RelaySettings, Secret
from portico.wire import frames as f
from portico.wire import policy as documents
from tests.ports import free_port
from tests.relay.authorities import authority, certificate
from tests.relay.doubles import KEY, Client, ScriptedAgent, ScriptedStream, grant, port, session_token
from tests.relay.known import forget, visitors, whole
from tests.relay.test_certificate_files import write
from tests.relay.test_passthrough import HELLO, Visit, alert, heard, know, online, row, said, tls_grant
from tests.relay.test_passthrough import visit as visit_tls
from tests.relay.test_tcp import TcpAgent, TcpStream, Visitor, quiet, tcp_grant, until

__all__ = ["visit_tls"]

GET = b"GET /x HTTP/1.1\r\nHost: web.localhost\r\n\r\n"


async def made(path: Path, name: str, peers: tuple[str, ...], control: int = 0, **more: Any) -> Relay:
    settings = RelaySettings(
        relay_key=Secret("tnl_rly_unused"), api_url="http://127.0.0.1:9", state_dir=path / name, relay_name=name,
        public_port=0, https_port=0, control_port=control, exempt_loopback=True, peers=peers, peer_key=Secret("shared"),
        **more,
    )  # fmt: skip
    relay = Relay(settings)
    relay.snapshot.apply(
        {"type": "snapshot", "version": 1, "state": {"keys": [KEY.public_jwk()], "tunnels": [], "ended": []}}
    )
    await relay.start()
    return relay


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Relay, Relay]]:
    """``(front, owner)``: the owner announces to the front, and the front to the owner."""
    front = await made(tmp_path, "front", ())
    owner = await made(tmp_path, "owner", (f"ws://127.0.0.1:{port(front, 0)}/v1/peer",))
    front._spawn(front.peers._keep(f"ws://127.0.0.1:{port(owner, 0)}/v1/peer", "shared"))
    yield front, owner
    await front.stop()
    await owner.stop()


@pytest.fixture
async def agent(pair: tuple[Relay, Relay]) -> AsyncIterator[ScriptedAgent]:
    front, owner = pair
    scripted = await (await ScriptedAgent().connect(port(owner, 0), session_token())).online(grant(concurrency=2))
    await scripted.until(lambda: front.peers.by_host)
    yield scripted
    scripted.close()


async def visit(relay: Relay, data: bytes) -> Client:
    client = Client(*await asyncio.open_connection("127.0.0.1", port(relay, 1), limit=2**26))
    client.send(data)
    return client


class TestMoved:
    async def test_an_older_connection_lets_go(self, pair: tuple[Relay, Relay]) -> None:
        """The agent is back on the other relay; the one that it left has not missed it yet, and has its port open."""
        front, owner = pair
        number = free_port()
        agent = TcpAgent()
        await agent.until(lambda: front.peers.inbound and owner.peers.inbound)
        await agent.connect(port(front, 0), session_token(), connect=1)
        await agent.online(tcp_grant(number))
        again = TcpAgent()
        await again.connect(port(owner, 0), session_token(), connect=2)
        await again.online(tcp_grant(number))
        assert agent.unbound == {1: "tunnel.moved"}
        assert number in owner.ports.open and not front.ports.open
        late = TcpAgent()
        await late.connect(port(front, 0), session_token(), connect=1)
        late.bind(tcp_grant(number))
        await late.until(lambda: late.refused)  # a late packet of the old connection takes nothing back
        assert owner.ports.open and again.unbound == {}
        for each in (agent, again, late):
            each.close()


class TestHop:
    async def test_a_request_passes_whole(self, pair: tuple[Relay, Relay], agent: ScriptedAgent) -> None:
        def answer(s: ScriptedStream) -> None:
            s.stream.send_interim(103, [b"Early Hints"])
            s.stream.send_response(200, [b"Fine", b"X-A", b"1"], end=False)
            s.stream.send_data(b"body")
            s.stream.send_end([b"X-Sum", b"9"])

        agent.on_stream = answer
        client = await visit(
            pair[0],
            b"POST /x HTTP/1.1\r\nHost: web.localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n",
        )
        assert (await client.read_head()).startswith(b"HTTP/1.1 103")
        assert b"X-A: 1" in await client.read_head()
        assert await client.read(24) == b"4\r\nbody\r\n0\r\nX-Sum: 9\r\n\r\n"
        request = agent.streams[0]
        await request.ended.wait()
        assert (request.method, request.target, bytes(request.body), request.trailers) == (
            b"POST",
            b"/x",
            b"abc",
            [b"X-T", b"1"],
        )
        live = pair[1].agents.by_tunnel["tun_web"]
        await agent.until(lambda: live.inflight == 0)
        assert (live.counters.requests, live.counters.bytes_in, live.counters.bytes_out) == (1, 3, 4)

    async def test_large_bodies_both_ways_keep_order(self, pair: tuple[Relay, Relay], agent: ScriptedAgent) -> None:
        body = bytes(range(251)) * 8000

        def answer(s: ScriptedStream) -> None:
            async def later() -> None:
                await s.ended.wait()
                s.stream.send_response(200, [b"OK", b"Content-Length", b"%d" % len(s.body)], end=False)
                sent = 0

                def feed() -> None:
                    nonlocal sent
                    while sent < len(s.body) and (room := s.stream.sendable()):
                        piece = bytes(s.body[sent : sent + room])
                        sent += len(piece)
                        s.stream.send_data(piece, end=sent == len(s.body))
                    if sent < len(s.body):
                        s.stream.wait()

                s.feeding = feed
                feed()

            tasks.append(asyncio.ensure_future(later()))

        tasks: list[Any] = []
        agent.on_stream = answer
        client = await visit(
            pair[0], b"PUT / HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        client.send(body)
        assert (await client.response())[2] == body

    async def test_upgrade_and_half_close(self, pair: tuple[Relay, Relay], agent: ScriptedAgent) -> None:
        def answer(s: ScriptedStream) -> None:
            s.stream.send_response(101, [b"Switching", b"Upgrade", b"x"], end=False)
            s.stream.send_data(b"first")

        agent.on_stream = answer
        client = await visit(
            pair[0], b"GET / HTTP/1.1\r\nHost: web.localhost\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nraw"
        )
        await client.read_head()
        assert await client.read(5) == b"first"
        client.writer.write_eof()
        await agent.streams[0].ended.wait()
        agent.streams[0].stream.send_data(b"last", end=True)
        assert await client.rest() == b"last"
        assert bytes(agent.streams[0].body) == b"raw"

    async def test_aborts_pass_both_ways(self, pair: tuple[Relay, Relay], agent: ScriptedAgent) -> None:
        agent.on_stream = lambda s: None
        client = await visit(pair[0], GET)
        await agent.until(lambda: agent.streams)
        client.writer.transport.abort()
        await agent.until(lambda: agent.streams[0].reset is not None)
        agent.on_stream = lambda s: s.stream.reset(f.TARGET_REFUSED, "nothing listens")
        client = await visit(pair[0], GET)
        status, fields, _ = await client.response()
        assert (status, fields[b"portico-error"]) == (502, [b"edge.target_refused"])
        await agent.until(lambda: pair[1].agents.by_tunnel["tun_web"].inflight == 0)

    async def test_the_owner_counts_concurrency(self, pair: tuple[Relay, Relay], agent: ScriptedAgent) -> None:
        agent.on_stream = lambda s: None
        held = [await visit(pair[1], GET) for _ in range(2)]
        await agent.until(lambda: len(agent.streams) == 2)
        status, fields, _ = await (await visit(pair[0], GET)).response()
        assert (status, fields[b"portico-error"]) == (429, [b"edge.concurrency_exceeded"])
        del held

    async def test_a_session_out_of_streams_refuses_one_request_and_counts_none(
        self, pair: tuple[Relay, Relay], agent: ScriptedAgent
    ) -> None:
        live = pair[1].agents.by_tunnel["tun_web"]
        live.connection.session.last_stream = 2**32 - 1
        status, fields, _ = await (await visit(pair[0], GET)).response()
        assert (status, fields[b"portico-error"]) == (429, [b"edge.concurrency_exceeded"])
        assert (live.inflight, live.counters.requests) == (0, 0)
        assert pair[0].peers.inbound and next(iter(pair[0].peers.inbound)).session.closed is False


class TestRoutes:
    async def test_routes_follow_what_is_live(self, pair: tuple[Relay, Relay], agent: ScriptedAgent) -> None:
        front, owner = pair
        agent.close()
        await agent.until(lambda: not front.peers.by_host)
        assert (await (await visit(front, GET)).response())[0] == 404
        # The agent comes back on the other relay: now the owner is the one that hops.
        again = await (await ScriptedAgent().connect(port(front, 0), session_token(), connect=2)).online()
        await again.until(lambda: owner.peers.by_host)
        for relay in pair:
            assert (await (await visit(relay, GET)).response())[2] == b"hello"
        again.close()

    async def test_a_tunnel_bound_on_both_is_served_locally(
        self, pair: tuple[Relay, Relay], agent: ScriptedAgent
    ) -> None:
        here = await (await ScriptedAgent().connect(port(pair[0], 0), session_token(), connect=2)).online()
        here.on_stream = lambda s: s.answer(body=b"here")
        assert (await (await visit(pair[0], GET)).response())[2] == b"here"
        here.close()

    async def test_a_lost_peer_takes_its_routes_along(self, pair: tuple[Relay, Relay], agent: ScriptedAgent) -> None:
        front, _ = pair
        agent.on_stream = lambda s: None
        client = await visit(front, GET)
        await agent.until(lambda: agent.streams)
        next(iter(front.peers.inbound)).carrier.abort("cut")
        status, fields, _ = await client.response()
        assert (status, fields[b"portico-error"]) == (502, [b"edge.agent_unreachable"])
        await agent.until(lambda: front.peers.by_host)  # the link is back by itself, and with it the route
        agent.on_stream = lambda s: s.answer(body=b"back")
        assert (await (await visit(front, GET)).response())[2] == b"back"

    @pytest.mark.parametrize("key", [None, "", "wrong", "sharedx", "shar\N{LATIN SMALL LETTER E WITH ACUTE}d"])
    async def test_nobody_else_is_a_peer(self, pair: tuple[Relay, Relay], key: str | None) -> None:
        headers = {
            "Sec-WebSocket-Protocol": f.PROTOCOL,
            **({"Authorization": f"Bearer {key}"} if key is not None else {}),
        }
        with pytest.raises(picows.WSHandshakeError) as caught:
            await picows.ws_connect(
                picows.WSListener, f"ws://127.0.0.1:{port(pair[0], 0)}/v1/peer", extra_headers=headers
            )
        assert caught.value.response is not None and int(caught.value.response.status) == 401


class TestKnown:
    async def test_a_known_request_takes_its_hop(self, pair: tuple[Relay, Relay], agent: ScriptedAgent) -> None:
        """By the short way at the front, by the usual one at the owner; the tunnel is counted once, at the owner."""
        forget()
        front, owner = pair
        asked: list[bool] = []

        def answer(s: ScriptedStream) -> None:
            asked.append(any(v.asked is not None for v in visitors(front)))
            whole(s)

        agent.on_stream = answer
        client = await visit(front, GET)
        for _ in range(4):
            assert (await client.response())[::2] == (200, b"hello")
            client.send(GET)
        assert (await client.response())[::2] == (200, b"hello")
        assert asked == [False, False, True, True, True]
        (remote,) = set(front.peers.by_host.values())
        live = owner.agents.by_tunnel["tun_web"]
        assert (remote.inflight, live.inflight, live.counters.requests, front.peers.hops()) == (0, 0, 5, 0)
        assert {tuple(s.get(b"X-Forwarded-For")) for s in agent.streams} == {(b"127.0.0.1",)}

    async def test_the_tunnel_moves_between_relays(self, pair: tuple[Relay, Relay], agent: ScriptedAgent) -> None:
        """A visitor's connection follows it, from the peer to its own relay and back."""
        forget()
        front, owner = pair
        agent.on_stream = whole
        client = await visit(front, GET)
        for _ in range(3):
            assert (await client.response())[2] == b"hello"
            client.send(GET)
        assert (await client.response())[2] == b"hello"
        for number, relay in ((2, front), (3, owner)):
            moved = ScriptedAgent()
            moved.on_stream = lambda s, number=number: whole(s, b"%d" % number)  # type: ignore[misc]
            await moved.connect(port(relay, 0), session_token(), connect=number)
            await moved.online(grant(concurrency=2))
            await moved.until(
                lambda relay=relay: (
                    (b"web.localhost" in front.agents.by_host) == (relay is front)
                    and (relay is front or front.peers.by_host)
                )
            )
            for _ in range(3):
                client.send(GET)
                assert (await client.response())[2] == b"%d" % number

    async def test_the_owner_dies_meanwhile(self, pair: tuple[Relay, Relay], agent: ScriptedAgent) -> None:
        forget()
        front, _ = pair
        agent.on_stream = whole
        client = await visit(front, GET)
        for _ in range(3):
            await client.response()
            client.send(GET)
        await client.response()
        agent.on_stream = lambda s: None
        count = len(agent.streams)
        client.send(GET)
        await agent.until(lambda: len(agent.streams) > count)
        assert any(v.asked is not None for v in visitors(front))
        (link,) = front.peers.inbound
        link.carrier.abort("made for this test")
        status, fields, _ = await client.response()
        assert (status, fields[b"portico-error"]) == (502, [b"edge.agent_unreachable"])


class TestPolicy:
    async def test_passwords_are_asked_for_where_the_visitor_comes_in(
        self, pair: tuple[Relay, Relay], agent: ScriptedAgent
    ) -> None:
        """The front decides by the owner's policy; the password goes no hop further, and a change comes across the link."""
        forget()
        front, owner = pair
        agent.on_stream = whole
        users = [{"name": "alice", "digest": PasswordHasher(time_cost=1, memory_cost=64).hash("secret")}]
        good = b"Authorization: Basic " + base64.b64encode(b"alice:secret") + b"\r\n"
        bad = b"Authorization: Basic " + base64.b64encode(b"alice:wrong") + b"\r\n"
        client = await visit(front, GET)
        assert (await client.response())[0] == 200
        agent.bind(grant(concurrency=2, policy={"basic_auth": {"users": users}}, policy_version=1))
        await agent.until(lambda: front.peers.by_host[b"web.localhost"].policy_version == 1)
        for fields, expected in ((b"", 401), (bad, 401), (good, 200)) * 3:
            client.send(GET.replace(b"\r\n\r\n", b"\r\n" + fields + b"\r\n"))
            assert (await client.response())[0] == expected
        assert len(agent.streams) == 4
        assert all(stream.get(b"Authorization") == [] for stream in agent.streams)
        assert (front.public.credentials.verified, owner.public.credentials.verified) == (2, 0)

    async def test_a_policy_of_any_characters_fits_its_announcement(
        self, pair: tuple[Relay, Relay], agent: ScriptedAgent
    ) -> None:
        """The largest policy of the most escaped characters, which its owner chose: no link breaks by it, and it is enforced."""
        front, owner = pair
        added = [{"name": "X-Quotes", "value": '"' * 990 + "\\\\"} for _ in range(4)]
        policy = {"addresses": {"otherwise": "deny"}, "headers": {"request": {"add": added}}}
        assert 8000 < len(json.dumps(documents.canonical(policy), separators=(",", ":"))) <= documents.MAX_POLICY_BYTES
        agent.bind(grant(concurrency=2, policy=policy, policy_version=1))
        await agent.until(lambda: front.peers.by_host[b"web.localhost"].policy_version == 1)
        assert front.peers.by_host[b"web.localhost"].document == policy
        client = await visit(front, GET)
        assert (await client.response())[0] == 403
        link = next(iter(owner.peers.outbound))
        link.carrier.abort("the link breaks")
        await agent.until(lambda: owner.peers.outbound and link not in owner.peers.outbound)
        await agent.until(lambda: b"web.localhost" in front.peers.by_host)
        assert front.peers.by_host[b"web.localhost"].document == policy

    async def test_what_fits_no_frame_keeps_no_other_from_being_announced(
        self, pair: tuple[Relay, Relay], agent: ScriptedAgent, caplog: pytest.LogCaptureFixture
    ) -> None:
        _, owner = pair
        link = next(iter(owner.peers.outbound))
        live = owner.agents.by_host[b"web.localhost"]
        live.hosts = tuple(b"%0250d.localhost" % number for number in range(99))
        link.announce(live)
        assert [record.message for record in caplog.records].count("a tunnel cannot be announced") == 1
        assert not link.lost.is_set()


class TestWithTls:
    async def test_a_link_with_a_ca_of_ones_own(self, tmp_path: Path) -> None:
        """A front that speaks TLS on its control port: an owner that trusts its CA comes in, one that does not stays out."""
        write(tmp_path / "control.crt", certificate("localhost", domain="localhost"))
        for name in ("localhost", "example.com"):
            (tmp_path / f"{name}.pem").write_bytes(authority(name).certificate_pem)
        crt, key = tmp_path / "control.crt", tmp_path / "control.key"
        front = await made(tmp_path, "front", (), control_tls_cert_file=crt, control_tls_key_file=key)
        url = f"wss://localhost:{port(front, 0)}/v1/peer"
        owner = await made(tmp_path, "owner", (url,), peer_ca_file=tmp_path / "localhost.pem")
        stranger = await made(tmp_path, "stranger", (url,), peer_ca_file=tmp_path / "example.com.pem")
        agent = await (await ScriptedAgent().connect(port(owner, 0), session_token())).online(grant())
        await agent.until(lambda: front.peers.by_host)
        assert (await (await visit(front, GET)).response())[::2] == (200, b"hello")
        assert owner.peers.outbound and not stranger.peers.outbound and len(front.peers.inbound) == 1
        agent.close()
        for relay in (front, owner, stranger):
            await relay.stop()

    async def test_a_bundle_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "none.pem").write_text("nothing")
        with pytest.raises(Problem, match=r"setting peer_ca_file: .* holds no certificate"):
            await made(tmp_path, "relay", ("wss://localhost:1/v1/peer",), peer_ca_file=tmp_path / "none.pem")


class TestPassthrough:
    async def test_a_connection_takes_its_hop(
        self, pair: tuple[Relay, Relay], visit_tls: Visit, caplog: pytest.LogCaptureFixture
    ) -> None:
        front, owner = pair
        agent = await online(owner, tls_grant(concurrency=3))
        await until(lambda: front.peers.by_host)
        visitor = await visit_tls(front)
        stream = await agent.stream()
        await until(lambda: bytes(stream.body) == HELLO)
        assert stream.info["peer"].endswith(f":{visitor.writer.get_extra_info('sockname')[1]}")
        live = owner.agents.by_tunnel["tun_vault"]
        assert (live.inflight, len(owner.peers.raw_hops), front.peers.hops(), owner.peers.hops()) == (1, 1, 0, 1)
        stream.stream.send_data(b"a" * 60_000, end=True)
        assert await visitor.read(60_000) == b"a" * 60_000
        visitor.send(b"b" * 300_000)
        visitor.end()
        await until(lambda: stream.ended)
        assert len(stream.body) == len(HELLO) + 300_000
        await until(lambda: live.inflight == 0 and not owner.peers.raw_hops)
        assert (live.counters.connections, live.counters.bytes_out) == (1, 60_000)
        assert live.counters.bytes_in == len(HELLO) + 300_000

        agent.on_tcp = lambda s: s.stream.reset(f.TARGET_REFUSED, "nothing listens")
        assert await heard(await visit_tls(front)) == alert("internal_error")
        assert front.public.refusals["edge.target_refused"] == 1

        agent.on_tcp = lambda s: s.stream.send_opened()
        gone, reset, ended = await visit_tls(front), await visit_tls(front), await visit_tls(front)
        await until(lambda: live.inflight == 3 and len(agent.tcp) == 5 and all(s.body for s in agent.tcp[2:]))
        assert await heard(await visit_tls(front)) == alert("internal_error")  # the owner counts
        by_port = {s.info["peer"].rpartition(":")[2]: s for s in agent.tcp[2:]}

        def of(one: Visitor) -> TcpStream:
            return by_port[str(one.writer.get_extra_info("sockname")[1])]

        gone.reset()
        await until(lambda: of(gone).reset)
        of(reset).stream.reset(f.TARGET_RESET, "the target reset the connection")
        assert await reset.is_reset()
        with caplog.at_level(logging.WARNING, "portico.relay.raw"):
            know(owner, row(state="stopped", generation=2))
            assert await ended.is_reset()
            await until(lambda: of(ended).reset)
        assert "tunnel.stopped" in said(caplog)[-1]["detail"]
        await until(lambda: live.inflight == 0 and quiet(front) and not owner.peers.raw_hops)
        agent.close()
