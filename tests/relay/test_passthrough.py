"""TLS that passes through the relay: by its name, byte for byte, with the decision's refusals as alerts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from portico.relay.certificates import server_context
from portico.relay.passthrough import PassVisitor
from portico.relay.server import Relay
from portico.wire import frames as f
from portico.wire import grants
from tests.relay.authorities import authority, certificate, trusting
from tests.relay.clienthello import extension, hello, recorded, server_name
from tests.relay.doubles import KEY, ORG, Client, ScriptedAgent, grant, port, session_token
from tests.relay.test_tcp import TcpAgent, TcpStream, Visitor, quiet, until

HELLO = hello(server_name(b"vault.localhost"))
ALERTS = {"unrecognized_name": 112, "access_denied": 49, "internal_error": 80}


def alert(name: str) -> bytes:
    return b"\x15\x03\x03\x00\x02\x02" + bytes((ALERTS[name],))


def tls_grant(name: str = "vault", session: str = "ses_a", concurrency: int = 100, **more: Any) -> str:
    claims = grants.grant_claims(
        session=session, organization=ORG, tunnel=f"tun_{name}", name=name, protocol="tls",
        hosts=[{"host": f"{name}.localhost", "tls": "passthrough"}], limits={"concurrency": concurrency},
        generation=1, policy_hash="none", url=f"tls://{name}.localhost:7443", now=int(time.time()), life=900,
        **{"policy": {}, **more},
    )  # fmt: skip
    return KEY.sign(grants.GRANT_TYP, claims)


def row(name: str = "vault", state: str = "active", generation: int = 1) -> dict[str, Any]:
    return {
        "id": f"tun_{name}", "organization": ORG, "hosts": [f"{name}.localhost"], "protocol": "tls", "state": state,
        "generation": generation,
    }  # fmt: skip


def know(relay: Relay, *rows: dict[str, Any]) -> None:
    """The edge stream says so."""
    assert relay.snapshot.version is not None
    changes = [{"kind": "tunnel", "tunnel": one} for one in rows]
    relay.snapshot.apply({"type": "delta", "version": relay.snapshot.version + 1, "changes": changes})


@pytest.fixture
async def agent(relay: Relay) -> AsyncIterator[TcpAgent]:
    """Connected, with the TLS tunnel of ``vault.localhost`` bound as bind 1."""
    connected = await online(relay, tls_grant())
    yield connected
    connected.close()


async def online(relay: Relay, granted: str, session: str = "ses_a", connect: int = 1) -> TcpAgent:
    one = TcpAgent()
    await one.connect(port(relay, 0), session_token(session, f"agt-{session}"), connect=connect)
    await one.online(granted)
    return one


Visit = Callable[..., Any]


@pytest.fixture
async def visit() -> AsyncIterator[Visit]:
    opened: list[Visitor] = []

    async def connect(relay: Relay, data: bytes = HELLO) -> Visitor:
        visitor = Visitor(*await asyncio.open_connection("127.0.0.1", port(relay, 2), limit=2**26))
        opened.append(visitor)
        visitor.send(data)
        return visitor

    yield connect
    for visitor in opened:
        visitor.writer.transport.abort()


async def heard(visitor: Visitor) -> bytes:
    """All that a refused visitor hears; it closes then, as TLS clients do."""
    got = await visitor.rest()
    visitor.writer.close()
    return got


def said(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of what was logged of raw connections."""
    return [r.f for r in caplog.records if r.name == "portico.relay.raw"]  # type: ignore[attr-defined]


class TestBytes:
    @pytest.mark.parametrize(
        "greeting",
        [
            HELLO,
            hello(server_name(b"vault.localhost"), sizes=(1, 2, 3, 5, 8)),
            hello(server_name(b"vault.localhost"), extension(21, bytes(16_000))),
            hello(server_name(b"vault.localhost"), extension(0xFE0D, bytes(200))),
            hello(server_name(b"Vault.LocalHost.")),
        ],
        ids=["one-record", "many-records", "16kB", "ech", "spelled-otherwise"],
    )
    async def test_a_hello_arrives_as_it_was_sent(
        self, relay: Relay, agent: TcpAgent, visit: Visit, greeting: bytes
    ) -> None:
        visitor = await visit(relay, b"")
        cut = max(1, len(greeting) // 7)
        for at in range(0, len(greeting), cut):
            visitor.send(greeting[at : at + cut])
            await asyncio.sleep(0.002)
        stream = await agent.stream()
        visitor.send(b"more")
        await until(lambda: bytes(stream.body) == greeting + b"more")
        host, number = visitor.writer.get_extra_info("sockname")
        assert stream.info.pop("id").startswith("req_")
        assert stream.info == {"peer": f"{host}:{number}", "local": f"127.0.0.1:{port(relay, 2)}"}

    @pytest.mark.parametrize("client", ["curl", "chromium", "openssl-3", "openssl-3-tls12"])
    async def test_hellos_of_real_clients(self, relay: Relay, visit: Visit, client: str) -> None:
        """Recorded ones, by the name that they ask for."""
        from portico.relay.hello import Hello, parse

        greeting = recorded(client)
        found = parse(greeting, 32_768)
        assert isinstance(found, Hello) and found.sni is not None
        name = found.sni.decode()
        host = [{"host": name, "tls": "passthrough"}]
        claims = grants.grant_claims(
            session="ses_a", organization=ORG, tunnel="tun_x", name="x", protocol="tls", hosts=host, limits={},
            generation=1, policy_hash="none", policy={}, url=f"tls://{name}", now=int(time.time()), life=900,
        )  # fmt: skip
        agent = await online(relay, KEY.sign(grants.GRANT_TYP, claims))
        await visit(relay, greeting)
        stream = await agent.stream()
        await until(lambda: bytes(stream.body) == greeting)
        agent.close()

    async def test_two_tunnels_and_the_platforms_own_on_one_port(
        self, relay: Relay, agent: TcpAgent, visit: Visit
    ) -> None:
        other = await online(relay, tls_grant("safe", session="ses_b"), "ses_b")
        web = ScriptedAgent()
        await web.connect(port(relay, 0), session_token("ses_c", "agt-c"))
        await web.online(grant(session="ses_c"))
        await visit(relay)
        await visit(relay, hello(server_name(b"safe.localhost")))
        await agent.stream()
        await other.stream()
        client = ssl.create_default_context()
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port(relay, 2), ssl=client, server_hostname="web.localhost"
        )
        visitor = Client(reader, writer)
        visitor.send(b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n")
        assert (await visitor.response())[2] == b"hello"
        # And asked for the passthrough host by that connection, or in clear text, it is the wrong place.
        visitor.send(b"GET / HTTP/1.1\r\nHost: vault.localhost\r\n\r\n")
        assert (await visitor.response())[:2][0] == 421
        plain = Client(*await asyncio.open_connection("127.0.0.1", port(relay, 1)))
        plain.send(b"GET / HTTP/1.1\r\nHost: vault.localhost\r\n\r\n")
        status, fields, _ = await plain.response()
        assert (status, fields[b"portico-error"]) == (421, [b"edge.tls_mode_mismatch"])
        assert (len(agent.tcp), len(other.tcp), len(web.streams)) == (1, 1, 1)
        for one in (visitor, plain):
            one.writer.close()
        for scripted in (other, web):
            scripted.close()

    async def test_a_targets_own_certificate(self, relay: Relay, agent: TcpAgent) -> None:
        """A whole handshake with a target behind the agent, and megabytes both ways."""
        leaf = certificate("vault.localhost", domain="localhost")
        server = server_context(leaf)
        agent.on_tcp = lambda s: TlsTarget(s, server)  # type: ignore[assignment, return-value]
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port(relay, 2), ssl=trusting(authority("localhost")), server_hostname="vault.localhost"
        )
        seen = writer.get_extra_info("ssl_object").getpeercert(True)
        assert seen == ssl.PEM_cert_to_DER_cert("-----BEGIN" + leaf.pem.decode().split("-----BEGIN")[2])
        data = os.urandom(2 << 20)

        async def send() -> None:
            writer.write(data)
            await writer.drain()

        async with asyncio.timeout(30):
            back, _ = await asyncio.gather(reader.readexactly(len(data)), send())
        assert back == data
        writer.transport.abort()
        await until(lambda: quiet(relay))
        counters = relay.meter.counters("tun_vault", ORG)
        assert (counters.connections, counters.requests) == (1, 0)
        assert counters.bytes_in > len(data) and counters.bytes_out > len(data)


class TlsTarget:
    """A TLS server behind a stream, which echoes."""

    def __init__(self, tcp: TcpStream, context: ssl.SSLContext) -> None:
        self.tcp = tcp
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.ready = False
        self.out = b""
        tcp.on_data = self.on_data  # type: ignore[method-assign]
        tcp.on_room = self.flush
        tcp.on_end = lambda trailers: tcp.stream.send_end()  # type: ignore[method-assign]
        tcp.stream.send_opened()

    def on_data(self, data: bytes, end: bool) -> None:
        self.incoming.write(data)
        self.tcp.stream.consumed(len(data))
        try:
            if not self.ready:
                self.tls.do_handshake()
                self.ready = True
            while plain := self.tls.read(65_536):
                self.tls.write(plain)
        except ssl.SSLWantReadError:
            pass
        self.flush()

    def flush(self) -> None:
        self.out += self.outgoing.read()
        stream = self.tcp.stream
        while self.out and (room := stream.sendable()):
            stream.send_data(self.out[:room])
            self.out = self.out[room:]
        if self.out:
            stream.wait()


class TestEnds:
    async def test_half_close_both_ways(self, relay: Relay, agent: TcpAgent, visit: Visit) -> None:
        visitor = await visit(relay)
        visitor.end()
        stream = await agent.stream()
        await until(lambda: stream.ended)
        assert bytes(stream.body) == HELLO
        stream.stream.send_data(b"answer", end=True)
        assert await visitor.rest() == b"answer"
        await until(lambda: quiet(relay))

    async def test_resets_both_ways(self, relay: Relay, agent: TcpAgent, visit: Visit) -> None:
        one, two = await visit(relay), await visit(relay)
        await agent.stream(2)
        first, second = agent.tcp
        if first.info["peer"].endswith(f":{two.writer.get_extra_info('sockname')[1]}"):
            first, second = second, first
        one.reset()
        await until(lambda: first.reset)
        assert first.reset == (f.CANCELLED, "the visitor reset the connection")
        second.stream.reset(f.TARGET_RESET, "the target reset the connection")
        assert await two.is_reset()
        await until(lambda: quiet(relay))

    async def test_the_platform_ends_the_tunnel(
        self, relay: Relay, agent: TcpAgent, visit: Visit, caplog: pytest.LogCaptureFixture
    ) -> None:
        know(relay, row())
        visitor = await visit(relay)
        stream = await agent.stream()
        await until(lambda: stream.body)
        with caplog.at_level(logging.WARNING, "portico.relay.raw"):
            know(relay, row(state="stopped", generation=2))
            assert await visitor.is_reset()
            assert await heard(await visit(relay)) == alert("unrecognized_name")
        await until(lambda: stream.reset)
        ended, refused = said(caplog)
        assert (ended["code"], ended["tunnel"], ended["host"]) == ("tunnel.stopped", "tun_vault", "vault.localhost")
        assert (refused["code"], refused["tunnel"]) == ("edge.tunnel_offline", "tun_vault")

    async def test_the_agent_is_gone(self, relay: Relay, agent: TcpAgent, visit: Visit) -> None:
        visitor = await visit(relay)
        await agent.stream()
        agent.close()
        assert await visitor.is_reset()
        await until(lambda: quiet(relay))


class TestRefusals:
    @pytest.mark.parametrize(
        ("reset", "code"),
        [
            (f.TARGET_REFUSED, "edge.target_refused"),
            (f.TARGET_TIMEOUT, "edge.target_timeout"),
            (f.NO_SUCH_BIND, "edge.agent_unreachable"),
            (f.INTERNAL, "edge.agent_unreachable"),
        ],
    )
    async def test_a_target_that_is_not_there(
        self, relay: Relay, agent: TcpAgent, visit: Visit, caplog: pytest.LogCaptureFixture, reset: int, code: str
    ) -> None:
        agent.on_tcp = lambda s: s.stream.reset(reset, "nothing listens on 127.0.0.1:8443")
        with caplog.at_level(logging.WARNING, "portico.relay.raw"):
            for _ in range(2):
                assert await heard(await visit(relay)) == alert("internal_error")
        (fields,) = said(caplog)
        assert (fields["code"], fields["host"]) == (code, "vault.localhost") and fields["visitor"] == "127.0.0.1"
        assert relay.public.refusals[code] == 2 and relay.meter.counters("tun_vault", ORG).errors == 2
        await until(lambda: quiet(relay))

    async def test_an_address_that_is_not_allowed(self, relay: Relay, visit: Visit) -> None:
        policy = {"addresses": {"rules": [{"allow": "10.0.0.0/8"}]}}
        agent = await online(relay, tls_grant(policy=policy))
        assert await heard(await visit(relay)) == alert("access_denied")
        assert relay.public.refusals["edge.ip_denied"] == 1 and not agent.tcp
        agent.close()

    async def test_room(self, relay: Relay, visit: Visit) -> None:
        agent = await online(relay, tls_grant(concurrency=1))
        await visit(relay)
        await agent.stream()
        assert await heard(await visit(relay)) == alert("internal_error")
        assert relay.public.refusals["edge.concurrency_exceeded"] == 1
        agent.close()

    async def test_a_suspended_owner(self, relay: Relay, visit: Visit) -> None:
        know(relay, row(state="suspended"))
        assert await heard(await visit(relay)) == alert("access_denied")
        assert relay.public.refusals["edge.account_suspended"] == 1

    async def test_the_agents_session_takes_no_more(self, relay: Relay, agent: TcpAgent, visit: Visit) -> None:
        relay.agents.by_tunnel["tun_vault"].connection.session.last_stream = 2**32 - 1
        assert await heard(await visit(relay)) == alert("internal_error")
        await until(lambda: quiet(relay))

    async def test_openssl_names_the_alert(self, relay: Relay) -> None:
        know(relay, row())
        process = await asyncio.create_subprocess_exec(
            "openssl", "s_client", "-connect", f"127.0.0.1:{port(relay, 2)}", "-servername", "vault.localhost",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(30):
            out, _ = await process.communicate()
        assert b"unrecognized name" in out, out

    async def test_a_visitor_that_goes_on_talking_is_cut_off(
        self, relay: Relay, visit: Visit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("portico.relay.passthrough.LINGER_SECONDS", 0.1)
        know(relay, row())
        visitor = await visit(relay)
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(30):
                while relay.public.connections or not relay.public.refusals:
                    visitor.send(b"x" * 1000)
                    await asyncio.sleep(0.02)
        await until(lambda: not relay.public.connections)

    async def test_an_idle_connection(self, relay: Relay, agent: TcpAgent, visit: Visit) -> None:
        visitor = await visit(relay)
        stream = await agent.stream()
        await until(lambda: any(v.opened for v in relay.public.connections))  # type: ignore[attr-defined]
        for connection in relay.public.connections:
            connection.deadline = 0.0
            connection.heard = -(10.0**9)  # type: ignore[attr-defined]
        assert await visitor.is_reset()
        await until(lambda: stream.reset)
        assert stream.reset == (f.IDLE_TIMEOUT, "no data in either direction")


async def ended_at_once(visitor: Visitor) -> None:
    """The relay's end of the connection is closed both ways: what the visitor says on is answered by a reset."""
    with contextlib.suppress(ConnectionResetError):
        assert await visitor.rest() in (b"", alert("internal_error"))
    async with asyncio.timeout(30):
        while not visitor.writer.transport.is_closing():
            visitor.send(b"x")
            await asyncio.sleep(0.01)


class TestLimits:
    @pytest.fixture
    def relay_settings(self) -> dict[str, Any]:
        return {"connections_per_address": 2, "exempt_loopback": False}

    async def test_connections_of_one_address(self, relay: Relay, agent: TcpAgent, visit: Visit) -> None:
        """Those beyond are ended at once, also when their visitors stay."""
        held = [await visit(relay) for _ in range(2)]
        await agent.stream(2)
        for _ in range(5):
            await ended_at_once(await visit(relay))
        assert relay.public.refusals["edge.too_many_connections"] == 5 and len(relay.public.connections) == 2
        held[0].reset()
        await until(lambda: len(relay.public.connections) == 1)
        await visit(relay)
        await agent.stream(3)

    async def test_room_that_was_taken_after_the_hello(
        self, relay: Relay, agent: TcpAgent, visit: Visit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the look at its hello and its turn, others may have come: it is ended though no sweep knows it."""
        admit = relay.public.admit
        monkeypatch.setattr(relay.public, "admit", lambda guest: not isinstance(guest, PassVisitor) and admit(guest))
        await ended_at_once(await visit(relay))
        assert relay.public.refusals["edge.too_many_connections"] == 1 and not agent.tcp


class TestWaiting:
    @pytest.fixture
    def relay_settings(self) -> dict[str, Any]:
        return {"hold_seconds": 3.0}

    async def test_a_visitor_waits_for_an_agent_that_comes_back(self, relay: Relay, visit: Visit) -> None:
        know(relay, row())
        agent = await online(relay, tls_grant())
        agent.close()
        await until(lambda: not relay.agents.by_host)
        visitor = await visit(relay)
        await until(lambda: relay.public.holding.count == 1)
        visitor.send(b"more")
        await asyncio.sleep(0.05)
        again = await online(relay, tls_grant(), connect=2)
        stream = await again.stream()
        await until(lambda: bytes(stream.body) == HELLO + b"more")
        stream.stream.send_data(b"back", end=True)
        assert await visitor.read(4) == b"back"
        visitor.end()
        await until(lambda: quiet(relay))
        again.close()

    async def test_and_hears_of_it_when_it_does_not(self, relay: Relay, visit: Visit) -> None:
        know(relay, row())
        relay.public.holding._settled_at = asyncio.get_running_loop().time() + 0.3
        began = time.monotonic()
        visitor = await visit(relay)
        visitor.end()
        assert await heard(visitor) == alert("unrecognized_name")
        assert time.monotonic() - began > 0.2
        await until(lambda: quiet(relay))
