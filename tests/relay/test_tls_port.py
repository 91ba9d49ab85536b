"""The public TLS port, by real clients and by exact bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from portico.relay import tls_port
from portico.relay.certificates import Certificate
from portico.relay.hello import Hello
from portico.relay.server import Relay
from portico.relay.tls_port import TlsPort
from tests.relay.authorities import authority, certificate, trusting
from tests.relay.clienthello import alpn, body, extension, hello, message, recorded, records, server_name
from tests.relay.doubles import ScriptedAgent, port
from tests.timing import Since

GET = b"GET / HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n"
ECH = extension(0xFE0D, b"\0" * 200)


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def tls(relay: Relay) -> TlsPort:
    found = relay.servers[2]
    assert isinstance(found, TlsPort)
    return found


@pytest.fixture
def certificates(relay: Relay) -> dict[str, Certificate]:
    """An exact one and a wildcard, beside the platform's own."""
    made = {
        "exact": certificate("web.example.com"),
        "wildcard": certificate("*.example.com", "example.com"),
    }
    for one in made.values():
        relay.certificates.store.put("test", one)
    return made


@pytest.fixture
async def raw(relay: Relay) -> AsyncIterator[Callable[..., Any]]:
    """Opens connections to the TLS port without TLS, which end with the test."""
    writers: list[asyncio.StreamWriter] = []

    async def connect(data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 2))
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        writers.append(writer)
        writer.write(data)
        return reader, writer

    yield connect
    for writer in writers:
        writer.transport.abort()


async def answer(reader: asyncio.StreamReader, seconds: float = 30.0) -> bytes:
    """Everything up to the end; a reset is an end."""
    got = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(seconds):
            while part := await reader.read(65_536):
                got += part
    return got


async def presented(relay: Relay, name: str | None, client: ssl.SSLContext | None = None) -> bytes:
    """The certificate (DER) that ``name`` is served with; ``None`` asks for no name."""
    if client is None:
        client = ssl.create_default_context()
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection(
        "127.0.0.1", port(relay, 2), ssl=client, server_hostname="" if name is None else name
    )
    der: bytes = writer.get_extra_info("ssl_object").getpeercert(True)
    writer.close()
    return der


def der(one: Certificate | None) -> bytes:
    assert one is not None
    return ssl.PEM_cert_to_DER_cert("-----BEGIN" + one.pem.decode().split("-----BEGIN")[2])


async def s_client(relay: Relay, *options: str, ask: bytes = b"") -> str:
    """What `openssl s_client` prints."""
    command = ("openssl", "s_client", "-connect", f"127.0.0.1:{port(relay, 2)}", "-servername", *options)
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(30):
        out, _ = await process.communicate(ask)
    return out.decode(errors="replace")


class TestCertificates:
    async def test_exact_wildcard_and_the_platforms_own(
        self, relay: Relay, certificates: dict[str, Certificate]
    ) -> None:
        assert await presented(relay, "web.example.com") == der(certificates["exact"])
        assert await presented(relay, "WEB.example.com") == der(certificates["exact"])
        assert await presented(relay, "other.example.com") == der(certificates["wildcard"])
        assert await presented(relay, "example.com") == der(certificates["wildcard"])
        assert await presented(relay, None) == der(relay.certificates.store.own)
        assert await presented(relay, "localhost") == der(relay.certificates.store.own)

    @pytest.mark.parametrize("name", ["a.b.example.com", "example.org", "web.example.com.example.org"])
    async def test_a_name_that_nothing_covers(
        self, relay: Relay, certificates: dict[str, Certificate], name: str
    ) -> None:
        """By the alert that says so (RFC 6066, 3), and no certificate."""
        with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
            await presented(relay, name)
        assert tls(relay).stats.failures["unknown_name"] == 1

    async def test_openssl_sees_the_same(
        self, relay: Relay, agent: ScriptedAgent, certificates: dict[str, Certificate]
    ) -> None:
        out = await s_client(relay, "web.example.com", "-showcerts")
        assert der(certificates["exact"]) == ssl.PEM_cert_to_DER_cert(
            out[out.index("-----BEGIN") : out.index("-----END CERTIFICATE-----") + 26]
        )
        assert "unrecognized name" in await s_client(relay, "nobody.example.org")
        assert "HTTP/1.1 200 OK" in await s_client(relay, "web.localhost", "-ign_eof", ask=GET % b"web.localhost")

    async def test_an_address_instead_of_a_name(self, relay: Relay, agent: ScriptedAgent) -> None:
        """As clients send that were given an address: the platform's own certificate, and then the Host decides."""
        good = await s_client(relay, "127.0.0.1", "-showcerts", "-ign_eof", ask=GET % b"web.localhost")
        assert "HTTP/1.1 200 OK" in good
        assert der(relay.certificates.store.own) == ssl.PEM_cert_to_DER_cert(
            good[good.index("-----BEGIN") : good.index("-----END CERTIFICATE-----") + 26]
        )
        other = await s_client(relay, "127.0.0.1", "-ign_eof", ask=GET % b"web.example.com")
        assert "HTTP/1.1 404 " in other and "edge.host_unassigned" in other

    async def test_a_certificate_that_is_exchanged(self, relay: Relay, agent: ScriptedAgent) -> None:
        """A connection that is open goes on; the next one has the new one."""
        first, second = (
            certificate("web.localhost", domain="localhost"),
            certificate("web.localhost", domain="localhost"),
        )
        relay.certificates.store.register("first")
        relay.certificates.store._sources.reverse()
        relay.certificates.store.replace("first", [first])
        client = trusting(authority("localhost"))
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port(relay, 2), ssl=client, server_hostname="web.localhost"
        )
        assert writer.get_extra_info("ssl_object").getpeercert(True) == der(first)
        relay.certificates.store.replace("first", [second])
        assert await presented(relay, "web.localhost", client) == der(second)
        writer.write(GET % b"web.localhost")
        assert (await answer(reader)).startswith(b"HTTP/1.1 200")
        writer.close()


class TestHellos:
    @pytest.mark.parametrize("client", ["chromium", "curl", "no-name"])
    @pytest.mark.parametrize("pieces", [1, 7, 500])
    async def test_one_in_many_segments(self, relay: Relay, raw: Any, client: str, pieces: int) -> None:
        """The server's first flight answers it: a ServerHello in a record of the handshake."""
        reader, writer = await raw()
        data = recorded(client)
        step = pieces if len(data) < 600 or pieces > 1 else 3
        for at in range(0, len(data), step):
            writer.write(data[at : at + step])
            await asyncio.sleep(0)
        async with asyncio.timeout(30):
            assert (await reader.readexactly(6))[0::5] == b"\x16\x02"

    @pytest.mark.parametrize("size", [1, 50, 16_384])
    async def test_one_in_many_records(self, relay: Relay, raw: Any, size: int) -> None:
        reader, _ = await raw(records(recorded("curl")[5:], [size]))
        async with asyncio.timeout(30):
            assert (await reader.readexactly(6))[0::5] == b"\x16\x02"

    async def test_sixteen_kilobytes(self, relay: Relay, raw: Any) -> None:
        inner = recorded("curl")[9:]
        grown = inner[: 2 + 32 + 33]
        suites = 2 + int.from_bytes(inner[67:69])
        grown += inner[67 : 67 + suites] + b"\x01\0"
        extensions = inner[67 + suites + 4 :] + extension(0x1234, bytes(16_000))
        grown += len(extensions).to_bytes(2) + extensions
        message = b"\x01" + len(grown).to_bytes(3) + grown
        reader, _ = await raw(records(message, [3000]))
        async with asyncio.timeout(30):
            assert (await reader.readexactly(6))[0::5] == b"\x16\x02"

    @pytest.mark.parametrize("relay_settings", [{"head_timeout_seconds": 0.6}])
    @pytest.mark.parametrize("said", [b"", b"\x16", recorded("curl")[:-1]])
    async def test_one_that_does_not_end_in_time(self, relay: Relay, raw: Any, said: bytes) -> None:
        reader, _ = await raw(said)
        assert await answer(reader, 4) == b""
        await until(lambda: not relay.public.connections)
        assert tls(relay).stats.failures["hello_timeout"] == 1

    @pytest.mark.parametrize("relay_settings", [{"head_timeout_seconds": 0.6}])
    async def test_a_handshake_that_does_not_end_in_time(self, relay: Relay, raw: Any) -> None:
        reader, _ = await raw(recorded("curl"))
        assert (await answer(reader, 5)).startswith(b"\x16\x03\x03")
        await until(lambda: not relay.public.connections and not tls(relay).pending)
        assert tls(relay).stats.failures["handshake_timeout"] == 1

    async def test_a_part_of_one_costs_nothing_until_the_rest_is_there(
        self, relay: Relay, raw: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The socket has bytes that are not read; the loop must not be told of them again and again."""
        looks = 0
        look = TlsPort._look

        def counted(self: TlsPort, arrival: Any) -> None:
            nonlocal looks
            looks += 1
            look(self, arrival)

        monkeypatch.setattr(TlsPort, "_look", counted)
        reader, writer = await raw()
        data = recorded("chromium")
        for part in (data[:3], data[3:100], data[100:101], data[101:-1]):
            writer.write(part)
            await asyncio.sleep(0.1)
        assert 1 <= looks <= 3
        writer.write(data[-1:])
        async with asyncio.timeout(30):
            assert (await reader.readexactly(6))[0::5] == b"\x16\x02"

    @pytest.mark.parametrize("said", [b"", b"\x16\x03", recorded("curl")[:-1]])
    async def test_a_client_that_leaves(self, relay: Relay, raw: Any, said: bytes) -> None:
        _, writer = await raw(said)
        await asyncio.sleep(0.05)
        writer.close()
        await until(lambda: tls(relay).stats.failures["hello_gone"] == 1)
        assert not relay.public.connections and not tls(relay).pending


class TestRefusals:
    @pytest.mark.parametrize(
        ("said", "description", "kind"),
        [
            (hello(server_name(b"nobody.example.org")), 112, "unknown_name"),
            (hello(server_name(b"nobody.example.org"), ECH), 112, "unknown_name_ech"),
            (hello(server_name(b"127.0.0.01")), 112, "bad_name"),
            (hello(server_name(b"a.localhost\0.example.org")), 112, "bad_name"),
            (hello(server_name(b"a.localhost", b"b.localhost")), 47, "bad_name"),
            (hello(server_name(b"web.localhost"), alpn(b"spdy/3")), 120, "no_protocol"),
            (hello(extension(21, bytes(33_000))), 22, "too_large"),
            (hello(server_name(b"web.localhost"))[:5] + b"\x02", 10, "malformed"),
            (hello(server_name(b"web.localhost"), b"\0"), 50, "malformed"),
        ],
    )
    async def test_by_alert(self, relay: Relay, raw: Any, said: bytes, description: int, kind: str) -> None:
        reader, _ = await raw(said)
        assert await answer(reader) == bytes((21, 3, 3, 0, 2, 2, description))
        assert tls(relay).stats.failures[kind] == 1
        assert not relay.public.connections

    async def test_alerts_of_openssl_reach_the_client(self, relay: Relay, raw: Any) -> None:
        """A hello with no suite that is served; event loops themselves would drop the reason."""
        reader, _ = await raw(hello(server_name(b"web.localhost")))
        assert (await answer(reader))[:6] == bytes((21, 3, 3, 0, 2, 2))
        await until(lambda: not tls(relay).pending)
        assert sum(tls(relay).stats.failures.values()) == 1

    async def test_old_versions(self, relay: Relay, raw: Any) -> None:
        reader, _ = await raw(records(message(body(server_name(b"web.localhost"), version=0x0302))))
        assert (await answer(reader))[-2:] == bytes((2, 70))
        await until(lambda: tls(relay).stats.failures["version"] == 1)

    async def test_suites_without_forward_secrecy(self, relay: Relay) -> None:
        client = ssl.create_default_context()
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        client.set_ciphers("AES128-SHA:AES128-GCM-SHA256")
        with pytest.raises(ssl.SSLError, match="ALERT_HANDSHAKE_FAILURE"):
            await presented(relay, "web.localhost", client)
        assert tls(relay).stats.failures["cipher"] == 1

    async def test_plain_http_is_told_so(self, relay: Relay, raw: Any) -> None:
        reader, _ = await raw(b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n")
        said = await answer(reader)
        assert said.startswith(b"HTTP/1.1 400 ") and b"edge.bad_request" in said and b"this port speaks TLS" in said
        assert tls(relay).stats.failures["plain_http"] == 1

    async def test_anything_else_is_closed(self, relay: Relay, raw: Any) -> None:
        reader, _ = await raw(b"SSH-2.0-OpenSSH_9.2\r\n")
        assert await answer(reader) == b""
        assert tls(relay).stats.failures["not_tls"] == 1

    @pytest.mark.parametrize("relay_settings", [{"connections_per_address": 2, "exempt_loopback": False}])
    async def test_connections_of_one_address_are_counted_before_they_speak(
        self, relay: Relay, agent: ScriptedAgent, raw: Any
    ) -> None:
        await raw()
        _, second = await raw(b"\x16")
        await until(lambda: len(relay.public.connections) == 2)
        third, _ = await raw(recorded("curl"))
        assert await answer(third) == b""
        assert tls(relay).stats.failures["too_many"] == 1
        assert relay.public.refusals["edge.too_many_connections"] == 1
        # A place that was left is free, and a connection has one from its accept to its end.
        second.transport.abort()
        await until(lambda: len(relay.public.connections) == 1)
        client = trusting(authority("localhost"))
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 2), ssl=client)
        await until(lambda: not tls(relay)._shaking)
        assert len(relay.public.connections) == 2
        assert sum(relay.public._by_address.values()) == 2
        writer.write(GET % b"web.localhost")
        assert (await answer(reader)).startswith(b"HTTP/1.1 200")
        writer.close()
        await until(lambda: len(relay.public.connections) == 1)

    @pytest.mark.parametrize("relay_settings", [{"max_handshakes": 3}])
    async def test_who_says_nothing_makes_room(self, relay: Relay, raw: Any) -> None:
        silent = [await raw() for _ in range(3)]
        await until(lambda: tls(relay).pending == 3)
        await presented(relay, "localhost")
        assert await answer(silent[0][0]) == b""
        assert tls(relay).stats.failures["too_many"] == 1
        await until(lambda: tls(relay).pending == 2)


class TestPace:
    async def test_others_have_their_turn_between_handshakes(
        self, relay: Relay, agent: ScriptedAgent, raw: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By the time that handshakes took: more of it is left to others while they ask on connections that they have."""
        monkeypatch.setattr(tls_port._Pace, "free_at", time.monotonic() + 0.4)
        began, since = time.monotonic(), Since()
        reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 1))
        waiting = asyncio.create_task(presented(relay, "localhost"))
        for _ in range(6):  # of which the last ones are known, and count
            writer.write(b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n")
            async with asyncio.timeout(30):
                await reader.readuntil(b"hello")
        assert since.waited() < 0.4, "requests wait for no handshake"
        await waiting
        assert time.monotonic() - began >= 0.4
        writer.close()
        assert tls_port._Pace.free_at > began + 0.4
        assert tls_port._Pace.pause == tls_port.PAUSE_AMONG_OTHERS
        tls(relay)._returned_at -= tls_port.OTHERS_SECONDS
        await presented(relay, "localhost")
        assert tls_port._Pace.pause == tls_port.PAUSE_ALONE

    @pytest.mark.parametrize("relay_settings", [{"max_handshakes": 4}])
    async def test_an_address_that_brings_many_waits_behind_itself(
        self, relay: Relay, raw: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another one has its handshake after the first of them, and finds room when there is none."""
        monkeypatch.setattr(tls_port._Pace, "free_at", time.monotonic() + 3600)
        many = [(await raw(recorded("curl")))[0] for _ in range(4)]
        await until(lambda: len(tls(relay)._ready) == 4)
        _, writer = await asyncio.open_connection("127.0.0.1", port(relay, 2), local_addr=("127.0.0.2", 0))
        writer.write(recorded("curl"))
        await until(lambda: len(tls(relay)._ready) == 4 and tls(relay).stats.failures["too_many"] == 1)
        assert await answer(many[3]) == b"", "the last of those that came in numbers"
        assert [tls(relay)._ready.pop().address for _ in range(3)] == ["127.0.0.1", "127.0.0.2", "127.0.0.1"]
        writer.close()

    @pytest.mark.parametrize("relay_settings", [{"max_handshakes": 2}])
    async def test_an_address_makes_no_room_for_itself(
        self, relay: Relay, raw: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tls_port._Pace, "free_at", time.monotonic() + 3600)
        for _ in range(2):
            await raw(recorded("curl"))
        await until(lambda: len(tls(relay)._ready) == 2)
        reader, _ = await raw(recorded("curl"))
        assert await answer(reader) == b""
        assert len(tls(relay)._ready) == 2

    async def test_a_handshake_that_stood_still_puts_off_others_for_a_moment_only(
        self, relay: Relay, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As one does in a process that was stopped, or one that comes in crumbs: their times would add up to minutes."""
        monkeypatch.setattr(tls_port._Pace, "free_at", 0.0)
        context = tls_port.EdgeContext(ssl.PROTOCOL_TLS_SERVER)
        stopped = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
        real, ago = time.monotonic, [3600.0]
        with monkeypatch.context() as patch, pytest.raises(ssl.SSLWantReadError):
            patch.setattr(tls_port.time, "monotonic", lambda: real() - (ago.pop() if ago else 0.0))
            stopped.do_handshake()
        assert 0 < tls_port._Pace.free_at <= time.monotonic() + tls_port.LONGEST_PAUSE
        await presented(relay, "localhost")

    async def test_a_fault_at_one_handshake_does_not_stop_the_line(
        self, relay: Relay, raw: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = tls(relay)
        monkeypatch.setattr(tls_port._Pace, "free_at", time.monotonic() + 0.2)
        for _ in range(3):
            await raw(recorded("curl"))
        await until(lambda: len(one._ready) == 3)
        begin, faults = one._begin, iter((True,))

        def broken(arrival: Any) -> None:
            if next(faults, False):
                raise RuntimeError("made for this test")
            begin(arrival)

        monkeypatch.setattr(one, "_begin", broken)
        relay.public.loop.set_exception_handler(lambda loop, context: None)
        await until(lambda: not one._ready)
        await presented(relay, "localhost")

    def test_an_ipv6_network_waits_behind_itself(self, relay: Relay) -> None:
        """One customer has all addresses of it."""

        def arrival(address: str) -> tls_port.Arrival:
            return tls_port.Arrival(tls(relay), socket.socket(), (address, 1), 0.0)

        turns = tls_port.Turns()
        for address in ("2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:0:1::1"):
            turns.add(arrival(address))
        assert turns.drop("2001:db8::9") is None, "it has most of them itself"
        dropped = turns.drop("198.51.100.1")
        assert dropped is not None and dropped.address == "2001:db8::3"
        assert [turns.pop().address for _ in range(3)] == ["2001:db8::1", "2001:db8:0:1::1", "2001:db8::2"]

    async def test_accepting_pauses_for_a_moment_at_most(self, relay: Relay, raw: Any) -> None:
        one = tls(relay)
        relay.public.returning += 1
        one._spent = 3600
        await raw(recorded("curl"))
        await until(lambda: one.stats.accepted == 1)
        await raw(recorded("curl"))
        await until(lambda: one.stats.accepted == 2, 30)

    async def test_accepting_pauses_while_others_ask(self, relay: Relay, raw: Any) -> None:
        """For a multiple of what it took; the connections wait in the kernel, and none is lost."""
        one = tls(relay)
        relay.public.returning += 1
        one._spent = 0.05
        first = (await raw(recorded("curl")))[0]
        await until(lambda: one.stats.accepted == 1)
        began = time.monotonic()
        second = (await raw(recorded("curl")))[0]
        for reader in (first, second):
            async with asyncio.timeout(30):
                assert (await reader.readexactly(6))[0::5] == b"\x16\x02"
        assert time.monotonic() - began >= 0.05 * tls_port.PAUSE_AMONG_OTHERS - 0.05

    async def test_accepting_does_not_pause_for_nobody(self, relay: Relay, raw: Any) -> None:
        one = tls(relay)
        one._spent = 3600
        await raw(recorded("curl"))
        await until(lambda: one.stats.accepted == 1)
        assert one._spent < 1
        await raw(recorded("curl"))
        await until(lambda: one.stats.accepted == 2)


class TestPassthrough:
    async def test_the_socket_with_everything_unread(self, relay: Relay, raw: Any) -> None:
        taken: list[tuple[socket.socket, Hello, Any]] = []

        def take(sock: socket.socket, said: Hello, peer: Any, local: Any) -> bool:
            if said.sni != b"web.example.org":
                return False
            taken.append((sock, said, peer))
            return True

        tls(relay).passthrough = take
        data = hello(server_name(b"web.example.org"), extension(21, bytes(8000)), sizes=[1000])
        _, writer = await raw()
        for at in range(0, len(data), 999):
            writer.write(data[at : at + 999])
            await asyncio.sleep(0.001)
        await until(lambda: taken)
        ((sock, said, peer),) = taken
        assert said.size == len(data) and peer[0] == "127.0.0.1"
        assert not relay.public.connections and tls(relay).stats.passed_through == 1
        loop = asyncio.get_running_loop()
        got = b""
        while len(got) < len(data):
            got += await loop.sock_recv(sock, 65_536)
        assert got == data
        writer.write(b"!")  # a single byte is told of again
        async with asyncio.timeout(30):
            assert await loop.sock_recv(sock, 1) == b"!"
        sock.close()
        assert len(await presented(relay, "localhost")) > 100

    async def test_a_fault_of_it_ends_that_connection_alone(self, relay: Relay, raw: Any) -> None:
        tls(relay).passthrough = lambda sock, said, peer, local: 1 // 0 == 0
        reader, _ = await raw(recorded("curl"))
        assert await answer(reader) == b""
        assert tls(relay).stats.failures["internal"] == 1 and not relay.public.connections


class TestEnd:
    async def test_a_relay_that_stops_waits_for_nobody_who_says_nothing(self, relay: Relay, raw: Any) -> None:
        silent, _ = await raw()
        begun, _ = await raw(b"\x16\x03")
        shaking, _ = await raw(recorded("curl"))
        await until(lambda: tls(relay).pending == 3)
        since = Since()
        await relay.stop()
        assert since.waited() < 4
        for reader in (silent, begun, shaking):
            await answer(reader, 2)
        assert not tls(relay).pending and not relay.public.connections

    async def test_counters_of_versions_and_resumption(self, relay: Relay) -> None:
        client = ssl.create_default_context()
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        await presented(relay, "localhost", client)
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        await presented(relay, "localhost", client)
        await until(lambda: tls(relay).stats.versions == {"TLSv1.2": 1, "TLSv1.3": 1})
        assert tls(relay).stats.resumed == 0
