"""Agent-side termination of TLS: handshakes, bytes both ways, every end, and certificates that change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from portico.agent.stats import Stats
from portico.agent.target import Target, parse_tls_target
from portico.agent.tcp import TcpForwarder
from portico.agent.tls_files import TlsFiles, TlsIdentity, alpn_names, doubts
from portico.errors import Problem
from portico.settings import AgentSettings
from portico.wire import frames as f
from tests.agent.certificates import certificate
from tests.agent.harness import RelayConnection, Visit, serving, target_server
from tests.agent.test_tcp import abort

HOST = "vault.test"


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificate and key of ``HOST``, its own authority."""
    return certificate(tmp_path_factory.mktemp("tls"), HOST)[1]


class Tunnel:
    """A forwarder that ends TLS, behind a real link."""

    def __init__(self, relay: RelayConnection, forwarder: TcpForwarder) -> None:
        self.relay, self.forwarder, self.stats = relay, forwarder, forwarder.stats

    async def visitor(self, trust: Path, **options: Any) -> Visitor:
        """Connected, with TLS."""
        visitor = Visitor(self.relay.open_tcp(), client(trust, **options))
        await visitor.shake_hands()
        return visitor

    async def until_idle(self) -> None:
        forwarder = self.forwarder
        async with asyncio.timeout(30):
            while forwarder._open or forwarder._tasks or forwarder.stats.open or self.relay.session.streams:
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def tunnel_to(
    port: int, files: TlsFiles, settings: AgentSettings | None = None, **options: Any
) -> AsyncIterator[Tunnel]:
    settings = settings or AgentSettings()
    target = Target("tcp", "127.0.0.1", port, raw=True)
    forwarder = TcpForwarder(target, settings, Stats(), identity=TlsIdentity(files), **options)
    async with serving(forwarder, settings) as (relay, _, _):
        yield Tunnel(relay, forwarder)
    await forwarder.abort()


def client(trust: Path, *, alpn: list[str] | None = None, newest: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(trust))
    if alpn:
        context.set_alpn_protocols(alpn)
    if newest is not None:
        context.minimum_version = context.maximum_version = newest
    return context


class Visitor:
    """A TLS client at the other end of a stream."""

    def __init__(self, visit: Visit, context: ssl.SSLContext) -> None:
        self.visit = visit
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=HOST)
        self.fed = 0

    async def flush(self) -> None:
        if data := self.outgoing.read():
            await self.visit.send(data)

    async def more(self) -> None:
        """Wait for records."""
        visit = self.visit
        await visit.until(lambda: len(visit.body) > self.fed or visit.ended or visit.reset is not None, 10)
        assert len(visit.body) > self.fed, ("the stream is over", visit.reset)
        self.incoming.write(bytes(visit.body[self.fed :]))
        self.fed = len(visit.body)

    async def shake_hands(self, first: bytes = b"") -> None:
        """``first``: what goes with the last message of the handshake."""
        while True:
            try:
                self.tls.do_handshake()
                if first:
                    self.tls.write(first)
                await self.flush()
                return
            except ssl.SSLWantReadError:
                await self.flush()
                await self.more()
            except ssl.SSLError:
                await self.flush()  # the alert
                raise

    async def send(self, data: bytes) -> None:
        self.tls.write(data)
        await self.flush()

    async def read(self, count: int) -> bytes:
        """So many bytes; fewer at an orderly end (close_notify)."""
        got = bytearray()
        while len(got) < count:
            try:
                data = self.tls.read(65_536)
            except ssl.SSLWantReadError:
                await self.more()
                continue
            except ssl.SSLZeroReturnError:
                data = b""
            if not data:
                break
            got += data
        return bytes(got)

    async def end(self) -> None:
        """A close_notify: no more from here."""
        with contextlib.suppress(ssl.SSLError):
            self.tls.unwrap()
        await self.flush()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()


class TestBytes:
    @pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_plain_bytes_at_the_target(self, pem: Path, newest: ssl.TLSVersion) -> None:
        got: list[bytes] = []

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            got.append(await reader.readexactly(5))
            writer.write(b"plain answer")

        async with target_server(handler) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            visitor = await tunnel.visitor(pem, newest=newest)
            assert visitor.tls.getpeercert() and visitor.tls.selected_alpn_protocol() is None
            await visitor.send(b"hello")
            assert await visitor.read(1000) == b"plain answer"  # and a close_notify
            assert got == [b"hello"]
            await visitor.end()
            await tunnel.until_idle()
            assert tunnel.stats.failures == 0

    async def test_the_target_speaks_first(self, pem: Path) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 ready\r\n")
            writer.write(await reader.read(100))

        async with target_server(handler) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            late = Visitor(tunnel.relay.open_tcp(), client(pem))
            await late.visit.until(lambda: late.visit.opened)
            await asyncio.sleep(0.05)  # the banner waits for the handshake
            await late.shake_hands()
            assert await late.read(11) == b"220 ready\r\n"
            await late.send(b"hi")
            assert await late.read(9) == b"hi"

    async def test_megabytes_each_way_under_credit(self, pem: Path) -> None:
        data = os.urandom(5 << 20)
        async with target_server(echo) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            visitor = await tunnel.visitor(pem)

            async def upload() -> None:
                for at in range(0, len(data), 100_000):
                    await visitor.send(data[at : at + 100_000])
                await visitor.end()

            back, _ = await asyncio.gather(visitor.read(len(data) + 1), upload())
            assert back == data
            await tunnel.until_idle()

    async def test_a_visitor_that_reads_nothing_stops_its_target(self, pem: Path) -> None:
        sent = 0

        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            while True:
                writer.write(b"x" * 65_536)
                await writer.drain()
                sent += 65_536

        async with target_server(flood) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            visitor = await tunnel.visitor(pem)
            visitor.visit.hold = True
            before = -1
            while sent != before:
                before = sent
                await asyncio.sleep(0.3)
            assert len(visitor.visit.body) <= visitor.visit.unread + 8192  # what came with the handshake
            assert visitor.visit.unread <= f.STREAM_WINDOW and sent < 16 << 20
            visitor.visit.release()
            await visitor.visit.until(lambda: sent > before, 10)

    async def test_a_target_that_reads_nothing_stops_its_visitor(self, pem: Path) -> None:
        go = asyncio.Event()
        got = bytearray()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await go.wait()
            while data := await reader.read(65_536):
                got.extend(data)

        async with target_server(slow) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            visitor = await tunnel.visitor(pem)
            sending = asyncio.create_task(visitor.send(b"y" * (24 << 20)))
            async with asyncio.timeout(30):
                while visitor.visit.stream.sendable():
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            assert not sending.done()
            assert visitor.visit.stream.sendable() == 0  # the rest waits where it is
            go.set()
            await sending
            await visitor.end()
            await tunnel.until_idle()
            assert len(got) == 24 << 20


class TestEnds:
    async def test_half_close_by_the_visitor(self, pem: Path) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            got = await reader.read()
            writer.write(b"%d bytes" % len(got))

        async with target_server(handler) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            visitor = await tunnel.visitor(pem)
            await visitor.send(b"x" * 70_000)
            await visitor.end()
            assert await visitor.read(100) == b"70000 bytes"
            await tunnel.until_idle()

    async def test_half_close_by_the_target(self, pem: Path) -> None:
        got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"bye")
            writer.write_eof()
            got.set_result(await reader.read())

        async with target_server(handler) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            visitor = await tunnel.visitor(pem)
            assert await visitor.read(100) == b"bye"
            await visitor.send(b"still sent")
            await visitor.end()
            assert await asyncio.wait_for(got, 30) == b"still sent"
            await tunnel.until_idle()

    async def test_an_end_without_close_notify_is_a_reset_to_the_target(self, pem: Path) -> None:
        """Somebody on the way may have cut it: it must not look complete."""
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.read()
                end.set_result("complete")
            except ConnectionResetError:
                end.set_result("reset")

        async with target_server(handler) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            visitor = await tunnel.visitor(pem)
            await visitor.send(b"half of it")
            visitor.visit.stream.send_end()
            assert await asyncio.wait_for(end, 30) == "reset"
            await tunnel.until_idle()

    async def test_a_target_that_ends_before_the_handshake(self, pem: Path) -> None:
        """The visitor hears of it in TLS, by a handshake and an orderly end; what it says itself arrives."""
        got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write_eof()
            got.set_result(await reader.read())

        async with target_server(handler) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            late = Visitor(tunnel.relay.open_tcp(), client(pem))
            await late.visit.until(lambda: late.visit.opened)
            await asyncio.sleep(0.05)
            assert not late.visit.ended
            await late.shake_hands(b"at once")
            assert await late.read(1) == b""
            await late.send(b" and later")
            await late.end()
            assert await asyncio.wait_for(got, 30) == b"at once and later"
            await tunnel.until_idle()

    @pytest.mark.parametrize("opened", [False, True], ids=["in-the-handshake", "after-it"])
    async def test_garbage_after_the_targets_end_hurts_nobody_else(self, pem: Path, opened: bool) -> None:
        """OpenSSL has an alert for it, which has no place in a stream that said its end."""

        async def bye(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write_eof()
            await reader.read()

        async with target_server(bye) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            visitor = Visitor(tunnel.relay.open_tcp(), client(pem))
            await visitor.visit.until(lambda: visitor.visit.opened)
            await asyncio.sleep(0.05)
            if opened:
                await visitor.shake_hands()
                await visitor.visit.until(lambda: visitor.visit.ended)
            await visitor.visit.send(b"\x17\x03\x03\x00\x20" + b"z" * 32)
            await visitor.visit.until(lambda: visitor.visit.reset is not None)
            await tunnel.until_idle()
            assert not tunnel.relay.lost
            other = await tunnel.visitor(pem)
            assert await other.read(1) == b""

    async def test_a_reset_by_the_target(self, pem: Path) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(1)
            abort(writer)

        async with target_server(handler) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            visitor = await tunnel.visitor(pem)
            await visitor.send(b"x" * 60_000)
            await visitor.visit.over()
            assert visitor.visit.reset is not None and visitor.visit.reset[0] == f.TARGET_RESET
            await tunnel.until_idle()

    async def test_a_reset_by_the_visitor(self, pem: Path) -> None:
        async with target_server(echo) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            visitor = await tunnel.visitor(pem)
            visitor.visit.stream.reset(f.CANCELLED, "the visitor reset the connection")
            await tunnel.until_idle()
            assert tunnel.stats.failures == 0

    async def test_a_target_that_is_not_there(self, pem: Path) -> None:
        async with target_server(echo) as port:
            pass
        async with tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            visit = tunnel.relay.open_tcp()
            await visit.over()
            assert visit.reset == (f.TARGET_REFUSED, f"nothing listens on 127.0.0.1:{port}") and not visit.opened
            await tunnel.until_idle()

    async def test_the_proxy_header_goes_first(self, pem: Path) -> None:
        got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            got.set_result(await reader.read())

        async with target_server(handler) as port, tunnel_to(port, TlsFiles(pem, pem), proxy_protocol=1) as tunnel:
            visitor = await tunnel.visitor(pem)
            await visitor.send(b"hello")
            await visitor.end()
            assert await asyncio.wait_for(got, 30) == b"PROXY TCP4 1.2.3.4 0.0.0.0 5 6\r\nhello"


class TestHandshake:
    async def test_a_visitor_without_tls_is_told_by_an_alert_and_the_user_by_a_sentence(self, pem: Path) -> None:
        got = bytearray()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            got.extend(await reader.read())

        async with target_server(handler) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            visit = tunnel.relay.open_tcp()
            await visit.send(b"GET / HTTP/1.1\r\nHost: vault.test\r\n\r\n")
            await visit.over()
            assert visit.reset is not None and visit.reset[0] == f.NO_ERROR
            assert tunnel.stats.last_failure == "a visitor's TLS handshake failed: it speaks HTTP without TLS"
            await tunnel.until_idle()
            assert got == b""

    @pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
    async def test_an_old_version(self, pem: Path) -> None:
        async with target_server(echo) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            old = client(pem)
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
            old.set_ciphers("ALL:@SECLEVEL=0")
            with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
                await Visitor(tunnel.relay.open_tcp(), old).shake_hands()
            assert "no version of TLS from 1.2 on" in tunnel.stats.last_failure
            await tunnel.until_idle()

    async def test_a_visitor_that_does_not_trust_it(self, pem: Path, tmp_path: Path) -> None:
        stranger = certificate(tmp_path, HOST)[1]
        async with target_server(echo) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            with pytest.raises(ssl.SSLCertVerificationError):
                await tunnel.visitor(stranger)
            async with asyncio.timeout(30):
                while not tunnel.stats.failures:
                    await asyncio.sleep(0.005)
            assert "does not trust the certificate" in tunnel.stats.last_failure
            await tunnel.until_idle()

    @pytest.mark.parametrize(
        ("host", "days", "says"),
        [
            (
                "other.test",
                30,
                "it does not take the certificate; the certificate is for other.test, not for vault.test",
            ),
            (
                HOST,
                -1,
                "it found the certificate expired; the certificate expired on 2",
            ),
        ],
    )
    async def test_a_certificate_that_visitors_do_not_take(
        self, tmp_path: Path, host: str, days: float, says: str
    ) -> None:
        """The user hears what is wrong with it."""
        pem = certificate(tmp_path, host, days=days)[1]
        async with target_server(echo) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            with pytest.raises(ssl.SSLCertVerificationError):
                await tunnel.visitor(pem)
            async with asyncio.timeout(30):
                while not tunnel.stats.failures:
                    await asyncio.sleep(0.005)
            assert tunnel.stats.last_failure.startswith(f"a visitor's TLS handshake failed: {says}")
            await tunnel.until_idle()

    async def test_a_handshake_that_does_not_come(self, pem: Path) -> None:
        settings = AgentSettings(tls_handshake_timeout_seconds=0.2)
        async with target_server(echo) as port, tunnel_to(port, TlsFiles(pem, pem), settings) as tunnel:
            visit = tunnel.relay.open_tcp()
            await visit.send(b"\x16\x03\x01")
            await visit.over()
            assert visit.reset is not None and visit.reset[0] == f.NO_ERROR
            assert tunnel.stats.last_failure == "a visitor's TLS handshake was not complete within 0.2 s"
            await tunnel.until_idle()

    async def test_who_looks_in_and_leaves_is_no_failure(self, pem: Path) -> None:
        async with target_server(echo) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            visit = tunnel.relay.open_tcp()
            visit.stream.send_end()
            await visit.over()
            await tunnel.until_idle()
            assert tunnel.stats.failures == 0

    async def test_garbage_after_the_handshake(self, pem: Path) -> None:
        async with target_server(echo) as port, tunnel_to(port, TlsFiles(pem, pem)) as tunnel:
            visitor = await tunnel.visitor(pem)
            await visitor.visit.send(b"\x17\x03\x03\x00\x20" + b"z" * 32)
            await visitor.visit.over()
            assert tunnel.stats.last_failure.startswith("a visitor's TLS failed: ")
            await tunnel.until_idle()

    @pytest.mark.parametrize(
        ("offered", "wanted", "chosen"),
        [
            (("h2", "http/1.1"), ["http/1.1", "h2"], "h2"),
            (("http/1.1",), ["h2", "http/1.1"], "http/1.1"),
            ((), ["h2"], None),
        ],
    )
    async def test_alpn(self, pem: Path, offered: tuple[str, ...], wanted: list[str], chosen: str | None) -> None:
        async with target_server(echo) as port, tunnel_to(port, TlsFiles(pem, pem, offered)) as tunnel:
            visitor = await tunnel.visitor(pem, alpn=wanted)
            assert visitor.tls.selected_alpn_protocol() == chosen


class TestFiles:
    async def test_a_new_certificate_is_used_by_the_next_connection(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        first, second = (certificate(folder(tmp_path, name), HOST)[1] for name in "ab")
        live = tmp_path / "live.pem"
        shutil.copy(first, live)
        async with target_server(echo) as port, tunnel_to(port, TlsFiles(live, live)) as tunnel:
            before = await tunnel.visitor(first)
            (tmp_path / "next.pem").write_bytes(second.read_bytes())
            (tmp_path / "next.pem").replace(live)
            after = await tunnel.visitor(second)
            await before.send(b"goes on")
            assert await before.read(7) == b"goes on"
            live.write_text("half of a certificate")
            with caplog.at_level(logging.WARNING, "portico.agent"):
                still = await tunnel.visitor(second)
                await tunnel.visitor(second)
            assert after.tls.getpeercert() == still.tls.getpeercert() != before.tls.getpeercert()
            (said,) = [r.getMessage() for r in caplog.records if "stays in use" in r.getMessage()]
            assert "holds no certificate" in said
            live.unlink()
            await tunnel.visitor(second)

    async def test_files_that_were_never_there(self, tmp_path: Path) -> None:
        gone = tmp_path / "gone.pem"
        async with target_server(echo) as port, tunnel_to(port, TlsFiles(gone, gone)) as tunnel:
            visit = tunnel.relay.open_tcp()
            await visit.over()
            assert visit.reset == (f.INTERNAL, "the agent has no certificate to show")
            assert "cannot be read" in tunnel.stats.last_failure
            await tunnel.until_idle()

    def test_what_is_wrong_is_said(self, pem: Path, tmp_path: Path) -> None:
        other = certificate(tmp_path, HOST)[1]
        empty = tmp_path / "empty.pem"
        empty.touch()
        key = serialization.load_pem_private_key(pem.read_bytes(), None)
        secret = serialization.BestAvailableEncryption(b"hunter2")
        sealed = tmp_path / "sealed.pem"
        form = serialization.PrivateFormat.PKCS8
        sealed.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, secret))
        alone = tmp_path / "alone.pem"
        alone.write_bytes(pem.read_bytes().split(b"-----BEGIN PRIVATE KEY")[0])
        for certificate_file, key_file, sentence in (
            (tmp_path / "no.pem", pem, "tls_cert .*no.pem cannot be read: No such file"),
            (pem, tmp_path / "no.pem", "tls_key .*no.pem cannot be read: No such file"),
            (tmp_path, pem, "tls_cert .* cannot be read: Is a directory"),
            (empty, pem, "tls_cert .*empty.pem holds no certificate"),
            (pem, empty, "tls_key .*empty.pem holds no private key"),
            (pem, alone, "tls_key .*alone.pem holds no private key"),
            (pem, other, "tls_key .* is not the key of the certificate in tls_cert"),
            (alone, sealed, "tls_key .*sealed.pem is encrypted"),
        ):
            with pytest.raises(Problem, match=sentence) as caught:
                TlsFiles(certificate_file, key_file).load()
            assert caught.value.code == "config.invalid"
        TlsFiles(alone, pem).load()

    @pytest.mark.parametrize("text", ["", "h2,", "http 1.1", "é", "x" * 256])
    def test_alpn_names(self, text: str) -> None:
        with pytest.raises(ValueError, match="not the name of a protocol"):
            alpn_names(text)
        assert alpn_names("h2, http/1.1") == ("h2", "http/1.1")

    def test_doubts(self, tmp_path: Path) -> None:
        def made(name: str, days: float = 30) -> Path:
            return certificate(tmp_path, name, days=days)[1]

        assert doubts(made("a.example.com"), "a.example.com") == "" == doubts(made("a.example.com"), None)
        assert doubts(made("*.example.com"), "a.example.com") == ""
        assert (
            doubts(made("*.example.com"), "a.b.example.com")
            == "the certificate is for *.example.com, not for a.b.example.com"
        )
        assert (
            doubts(made("127.0.0.1"), "a.example.com") == "the certificate is for no host name, not for a.example.com"
        )
        assert re.fullmatch(
            r"the certificate expired on 20..-..-..", doubts(made("a.example.com", -3), "a.example.com")
        )
        assert re.fullmatch(
            r"the certificate is valid from 20..-..-.. on", doubts(made("a.example.com", 200), "a.example.com")
        )
        assert doubts(tmp_path / "gone.pem", "a.example.com") == ""


class TestTarget:
    @pytest.mark.parametrize(
        ("text", "url"),
        [
            ("8443", "tls://localhost:8443"),
            ("tls://Vault.internal:443", "tls://vault.internal:443"),
            ("tcp://[::1]:8443/", "tls://[::1]:8443"),
            ("unix:/run/vault.sock", "unix:/run/vault.sock"),
        ],
    )
    def test_takes(self, text: str, url: str) -> None:
        target = parse_tls_target(text)
        assert (target.url, target.raw) == (url, True)

    @pytest.mark.parametrize(
        "text", ["https://vault:443", "http://x:1", "file:///srv", "vault", "tls://vault", "1.2.3.4:0"]
    )
    def test_refuses(self, text: str) -> None:
        with pytest.raises(Problem) as caught:
            parse_tls_target(text)
        assert caught.value.code == "target.invalid" and "tls://host:port" in str(caught.value.hint)


def folder(parent: Path, name: str) -> Path:
    made = parent / name
    made.mkdir()
    return made
