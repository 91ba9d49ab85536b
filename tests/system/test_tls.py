"""TLS tunnels through the whole platform, two relays behind one address: real clients see the target's own certificate."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from portico.cli.output import TUNNEL_REFUSED
from portico.embedded.folders import temp_home
from portico.relay.certificates import Certificate, server_context
from tests.browser.chromium import browser
from tests.relay.authorities import authority, certificate, parts, trusting
from tests.relay.clienthello import records
from tests.system.platform import Account, Agent, Child, Up
from tests.system.targets import listener, port_of
from tests.system.test_tcp import REACH_SECONDS, descriptors, disorder, until
from tests.timing import allowed

pytestmark = [pytest.mark.system, pytest.mark.realtime]

DISORDER_SECONDS = 3.0
BODY = b"<title>vault</title>from behind the target's own TLS"


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    home = temp_home("portico-tls-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        yield Up(home, tmp_path_factory.mktemp("up"), stack, relays=2)


class Files:
    """A certificate for ``host`` of the tests' authority, as files."""

    def __init__(self, folder: Path, host: str) -> None:
        self.host = host
        self.cert, self.key, self.ca = (folder / f"{host}.{kind}.pem" for kind in ("cert", "key", "ca"))
        self.ca.write_bytes(authority("localhost").certificate_pem)
        self.renew()

    def renew(self) -> None:
        """Another certificate in the same place."""
        self.made = certificate(self.host, domain="localhost")
        chain, key = parts(self.made)
        self.key.write_bytes(key)
        self.cert.write_bytes(chain)


def der(made: Certificate) -> bytes:
    return ssl.PEM_cert_to_DER_cert(parts(made)[0].decode().split("-----END")[0] + "-----END CERTIFICATE-----\n")


class TlsAgent(Agent):
    """``portico tls TARGET --name NAME --json``."""

    def __init__(self, where: Account, folder: Path, target: str | int, name: str, *more: str) -> None:
        own = {"server": where.api_url, "agent_key": where.agent_key, "config_dir": folder / "config"}
        args = ["tls", str(target), "--name", name, "--json", *more]
        Child.__init__(self, f"agent-{name}", args, folder, own)

    @property
    def url(self) -> str:
        return str(next(event["url"] for event in self.events() if event["event"] == "online"))


@contextlib.asynccontextmanager
async def site(sock: socket.socket, context: ssl.SSLContext | None, body: bytes = BODY) -> AsyncIterator[list[bytes]]:
    """A small web server on ``sock``; yields the heads of requests as they came."""
    heads: list[bytes] = []
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        with contextlib.suppress(OSError, EOFError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                heads.append(head)
                kind = b"Content-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(body)
                writer.write(b"HTTP/1.1 200 OK\r\n" + kind + body)
        writers.discard(writer)
        writer.close()

    server = await asyncio.start_server(serve, sock=sock.dup(), ssl=context)
    try:
        yield heads
    finally:
        server.close()
        for writer in list(writers):
            writer.transport.abort()
        await asyncio.sleep(0)


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("vault"), "vault.localhost")


@pytest.fixture(scope="module")
def agent(up: Up, account: Account, target: socket.socket, folder: Path) -> Iterator[TlsAgent]:  # type: ignore[override]
    """What ``vault.localhost`` passes through."""
    with ExitStack() as stack:
        child = TlsAgent(account, folder, port_of(target), "vault")
        stack.callback(child.end)
        child.online()
        yield child


@pytest.fixture
async def served(agent: TlsAgent, target: socket.socket, vault: Files) -> AsyncIterator[list[bytes]]:
    """The target, with its own certificate."""
    async with site(target, server_context(vault.made)) as heads:
        yield heads


async def run(*command: str, given: bytes | None = None) -> str:
    """A program's output; the site answers meanwhile."""
    stdin = asyncio.subprocess.PIPE if given is not None else asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *command, stdin=stdin, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(30):
        out, _ = await process.communicate(given)
    return out.decode(errors="replace")


async def s_client(up: Up, host: str, *more: str, given: bytes | None = None) -> str:
    place = ("-connect", f"127.0.0.1:{up.https_port}", "-servername", host)
    return await run("openssl", "s_client", *place, *more, given=given)


def get(host: str) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host.encode()


async def open_tls(up: Up, host: str, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with asyncio.timeout(30):
        return await asyncio.open_connection("127.0.0.1", up.https_port, ssl=context, server_hostname=host)


async def presented(up: Up, host: str) -> bytes:
    """The certificate that a visitor of ``host`` is shown (it has to be one of the tests' authority)."""
    _, writer = await open_tls(up, host, trusting(authority("localhost")))
    shown: bytes = writer.get_extra_info("ssl_object").getpeercert(True)
    writer.transport.abort()
    return shown


class TestClients:
    async def test_openssl(self, up: Up, served: list[bytes], vault: Files) -> None:
        out = await s_client(
            up,
            vault.host,
            "-CAfile",
            str(vault.ca),
            "-verify_return_error",
            "-verify_hostname",
            vault.host,
            "-showcerts",
        )
        assert "Verify return code: 0 (ok)" in out
        shown = out[out.index("-----BEGIN CERTIFICATE") : out.index("-----END CERTIFICATE-----") + 26]
        assert ssl.PEM_cert_to_DER_cert(shown) == der(vault.made)

    async def test_curl(self, up: Up, agent: TlsAgent, served: list[bytes], vault: Files) -> None:
        assert agent.url == f"tls://vault.localhost:{up.https_port}"
        to = ("--connect-to", f"{vault.host}:443:127.0.0.1:{up.https_port}", f"https://{vault.host}/a")
        for _ in range(6):  # over either relay
            assert (await run("curl", "-sS", "--cacert", str(vault.ca), *to)).encode() == BODY
        assert len(served) == 6 and served[0].startswith(b"GET /a HTTP/1.1\r\nHost: vault.localhost\r\n")
        assert b"Forwarded" not in served[0]  # not a byte of it is touched
        untrusted = await run("curl", "-sS", *to)
        assert "SSL certificate problem" in untrusted

    async def test_chromium(self, up: Up, served: list[bytes], vault: Files) -> None:
        key = x509.load_der_x509_certificate(der(vault.made)).public_key()
        spki = hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()
        trust = f"--ignore-certificate-errors-spki-list={base64.b64encode(spki).decode()}"
        async with browser(trust, "--no-proxy-server") as page:
            await page.call("Network.enable")
            url = f"https://{vault.host}:{up.https_port}/"
            await page.open(url)
            assert await page.js("document.title") == "vault"
            shown = (await page.call("Network.getCertificate", origin=url.rstrip("/")))["tableNames"]
            assert base64.b64decode(shown[0]) == der(vault.made)

    @pytest.mark.parametrize(
        ("names", "sizes", "segment"), [(1, (1, 2, 3, 50), 10), (63, (16_384,), 1460), (63, (200,), 90)]
    )
    async def test_hellos_in_many_pieces_and_of_16_kB(
        self, up: Up, served: list[bytes], vault: Files, names: int, sizes: tuple[int, ...], segment: int
    ) -> None:
        """A whole handshake whose hello was cut into other records and segments on its way (a hash covers the message alone)."""
        context = trusting(authority("localhost"))
        context.set_alpn_protocols([f"{number:03}{'x' * 250}" for number in range(names)])
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(incoming, outgoing, server_hostname=vault.host)
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        greeting = outgoing.read()
        message, at = b"", 0
        while at < len(greeting):
            size = int.from_bytes(greeting[at + 3 : at + 5])
            message += greeting[at + 5 : at + 5 + size]
            at += 5 + size
        assert len(message) > (16_000 if names > 1 else 200)
        reader, writer = await asyncio.open_connection("127.0.0.1", up.https_port)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        cut = records(message, sizes)
        for start in range(0, len(cut), segment):
            writer.write(cut[start : start + segment])
            if start % (20 * segment) == 0:
                await asyncio.sleep(0.002)
        got = b""
        async with asyncio.timeout(30):
            while BODY not in got:
                incoming.write(await reader.read(65_536))
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.do_handshake()
                    if not got:
                        client.write(get(vault.host))
                    got += client.read(65_536)
                writer.write(outgoing.read())
        assert client.getpeercert(True) == der(vault.made)
        writer.transport.abort()


class TestRouting:
    async def test_two_tunnels_and_http_on_one_port(
        self, up: Up, account: Account, folder: Path, served: list[bytes], vault: Files, started: ExitStack,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        safe = Files(tmp_path, "safe.localhost")
        with listener() as sock, listener() as plain:
            for child in (
                TlsAgent(account, folder, port_of(sock), "safe"),
                Agent(account, folder, port_of(plain), "plain"),
            ):
                started.callback(child.end)
                child.online()
            async with site(sock, server_context(safe.made), b"the safe"), site(plain, None, b"plain"):
                for _ in range(4):
                    assert await presented(up, safe.host) == der(safe.made)
                    assert await presented(up, vault.host) == der(vault.made)
                https = ("curl", "-sSk", "-o", "-", "-D", "-", "--http1.1")
                assert (await run(*https, f"https://plain.localhost:{up.https_port}/")).endswith("plain")
                # HTTP to a host that passes TLS through is at the wrong place, also over a connection for another host.
                clear = await run(*https, f"http://vault.localhost:{up.http_port}/")
                other = await run(*https, "-H", "Host: vault.localhost", f"https://plain.localhost:{up.https_port}/")
                for answer in (clear, other):
                    assert answer.startswith("HTTP/1.1 421") and "edge.tls_mode_mismatch" in answer

    async def test_a_target_that_is_down(
        self, up: Up, agent: TlsAgent, account: Account, folder: Path, started: ExitStack
    ) -> None:
        with listener() as sock:
            number = port_of(sock)
        down = TlsAgent(account, folder, number, "down")
        started.callback(down.end)
        down.online()
        assert "internal error" in await s_client(up, "down.localhost")
        down.wait_for(lambda: f"nothing listens on localhost:{number}" in down.err, 5, "warning")
        up.child.wait_for(lambda: "edge.target_refused" in up.child.err, 5, "reason in the relay's log")

    async def test_an_address_that_is_not_allowed(
        self, up: Up, account: Account, folder: Path, target: socket.socket, served: list[bytes], started: ExitStack
    ) -> None:
        """An alert says so, and a new policy is in force within 2 s, without a restart."""
        child = TlsAgent(account, folder, port_of(target), "barred", "--deny-cidr", "127.0.0.0/8", "--deny-cidr", "::1")
        started.callback(child.end)
        child.online()
        assert "access denied" in await s_client(up, "barred.localhost")
        assert not served
        account.call("PATCH", f"/tunnels/{account.tunnels()['barred']['id']}", {"policy": {}})

        async def let_in() -> bool:
            return "Server certificate" in await s_client(up, "barred.localhost")

        await until(let_in, REACH_SECONDS, "new policy")
        assert not any(event["event"] == "offline" for event in child.events())

    async def test_offline_stopped_deleted(
        self, up: Up, account: Account, folder: Path, target: socket.socket, served: list[bytes], started: ExitStack
    ) -> None:
        """Each reaches an open connection within 2 s, and who comes later hears that there is no such name."""
        first = TlsAgent(account, folder, port_of(target), "ends")
        started.callback(first.end)
        first.online()
        lenient = ssl.create_default_context()
        lenient.check_hostname, lenient.verify_mode = False, ssl.CERT_NONE

        async def ended(act: Callable[[], Any]) -> None:
            """By ``act``, at a connection that is in use."""
            reader, writer = await open_tls(up, "ends.localhost", lenient)
            writer.write(get("ends.localhost"))
            await reader.readuntil(BODY)
            act()
            began = time.monotonic()
            with contextlib.suppress(OSError):
                async with asyncio.timeout(30):
                    await reader.read()
            assert time.monotonic() - began < allowed(REACH_SECONDS, began)
            writer.transport.abort()

        assert f"tls://ends.localhost:{up.https_port}" in up.command(account, "ls").stdout
        await ended(lambda: up.command(account, "stop", "ends"))
        assert await first.exit(10) == TUNNEL_REFUSED
        assert "unrecognized name" in await s_client(up, "ends.localhost")
        again = TlsAgent(account, folder, port_of(target), "ends")
        started.callback(again.end)
        again.online()
        await ended(lambda: up.command(account, "rm", "ends"))
        assert account.tunnels().keys() & {"ends"} == set()
        # The name is nobody's now: what the platform answers for such names, with a certificate of its own.
        out = await run("curl", "-sSk", "-D", "-", f"https://ends.localhost:{up.https_port}/")
        assert "edge.host_unassigned" in out

    async def test_over_the_death_of_each_relay(
        self, up: Up, agent: TlsAgent, served: list[bytes], vault: Files
    ) -> None:
        async def works() -> bool:
            with contextlib.suppress(OSError, TimeoutError):
                return await presented(up, vault.host) == der(vault.made)
            return False

        for name in ("relay-1", "relay-2"):
            os.kill(up.pid(name), signal.SIGKILL)
            for _ in range(5):
                print(f"{await until(works, 3, 'take-over'):.2f} s")
            await asyncio.sleep(1)


class TestDisorder:
    async def test_every_kind_of_end_leaves_nothing(
        self, up: Up, account: Account, folder: Path, started: ExitStack, tmp_path: Path
    ) -> None:
        """TLS ends at the agent, and visitors and target send, read, half-close, break TLS and reset as chance has it."""
        files = Files(tmp_path, "chaos.localhost")
        with listener() as sock:
            keys = ("--tls-cert", str(files.cert), "--tls-key", str(files.key))
            child = TlsAgent(account, folder, port_of(sock), "chaos", *keys)
            started.callback(child.end)
            child.online()
            pids = (up.pid("relay-1"), up.pid("relay-2"), child.pid)
            before = [descriptors(pid) for pid in pids]
            over = time.monotonic() + DISORDER_SECONDS

            def serve() -> None:
                sock.settimeout(0.1)
                while time.monotonic() < over + 1:
                    with contextlib.suppress(TimeoutError):
                        conn = sock.accept()[0]
                        threading.Thread(
                            target=disorder, args=(conn, random.Random(conn.fileno())), daemon=True
                        ).start()

            def visit(seed: int) -> int:
                chance, count = random.Random(seed), 0
                context = trusting(authority("localhost"))
                while time.monotonic() < over:
                    with contextlib.suppress(OSError, ValueError):  # also what the ssl module has for its own disorder
                        conn = socket.create_connection(("127.0.0.1", up.https_port), timeout=5)
                        with context.wrap_socket(conn, server_hostname=files.host) as tls:
                            count += 1
                            disorder(tls, chance)
                return count

            serving = asyncio.create_task(asyncio.to_thread(serve))
            counts = await asyncio.gather(*(asyncio.to_thread(visit, seed) for seed in range(8)))
            await serving
            print(f"{sum(counts)} connections")
            assert sum(counts) > 100

            async def settled() -> bool:
                return all(descriptors(pid) <= had + 2 for pid, had in zip(pids, before, strict=True))

            await until(settled, 15, "end of connections")
            assert "Traceback" not in up.child.err + child.err
            assert not any(event["event"] == "offline" for event in child.events())
            async with site(sock, None):
                assert await presented(up, files.host) == der(files.made)


class TestTermination:
    async def test_the_agent_ends_tls(
        self, up: Up, account: Account, folder: Path, started: ExitStack, tmp_path: Path
    ) -> None:
        """By its own files, which are followed; the target gets plain bytes and the visitor's address."""
        ended = Files(tmp_path, "ended.localhost")
        with listener() as sock:
            options = ("--tls-cert", str(ended.cert), "--tls-key", str(ended.key), "--tls-alpn", "http/1.1")
            child = TlsAgent(account, folder, port_of(sock), "ended", *options, "--proxy-protocol", "1")
            started.callback(child.end)
            child.online()
            assert (
                next(e["target"] for e in child.events() if e["event"] == "online")
                == f"tcp://localhost:{port_of(sock)}"
            )
            async with site(sock, None) as heads:
                curl = ("curl", "-sSv", "--cacert", str(ended.ca), f"https://{ended.host}:{up.https_port}/")
                out = await run(*curl)
                assert BODY.decode() in out and "ALPN: server accepted http/1.1" in out
                proxy, request = heads[-1].split(b"\r\n", 1)
                assert proxy.startswith(b"PROXY TCP4 127.0.0.1 127.0.0.1 ") and proxy.endswith(b" %d" % up.https_port)
                assert request.startswith(b"GET / HTTP/1.1\r\n")
                before = ended.made
                assert await presented(up, ended.host) == der(before)
                ended.renew()
                assert await presented(up, ended.host) == der(ended.made) != der(before)
                ended.key.write_text("not a key")
                assert await presented(up, ended.host) == der(ended.made)
                child.wait_for(lambda: "stays in use" in child.err, 5, "warning")
                # A visitor that does not trust it: the user of the agent hears why.
                assert "SSL certificate problem" in await run("curl", "-sS", f"https://{ended.host}:{up.https_port}/")
                child.wait_for(lambda: "does not trust the certificate" in child.err, 5, "warning")
        key = parts(ended.made)[1].splitlines()[1].decode()
        assert key not in child.said + up.child.err
