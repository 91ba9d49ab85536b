from __future__ import annotations

import asyncio
import datetime as dt
import ssl
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from portico.relay import tls

NOW = dt.datetime(2026, 11, 23, tzinfo=dt.UTC)


def parsed(certificate: tls.Certificate) -> x509.Certificate:
    return x509.load_pem_x509_certificate(certificate.pem)


class TestDevelopmentCertificate:
    def test_what_it_is(self, tmp_path: Path) -> None:
        made = tls.development_certificate(tmp_path / "state", "localhost", now=NOW)
        certificate = parsed(made)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["localhost", "*.localhost"]
        assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
        assert certificate.not_valid_after_utc - certificate.not_valid_before_utc <= dt.timedelta(days=397)
        assert certificate.not_valid_before_utc < NOW < certificate.not_valid_after_utc
        assert certificate.public_key().curve.name == "secp256r1"  # type: ignore[union-attr]
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca

    def test_the_key_is_private_and_never_printed(self, tmp_path: Path) -> None:
        made = tls.development_certificate(tmp_path, "localhost", now=NOW)
        (file,) = tmp_path.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert "PRIVATE KEY" not in repr(made) and made.fingerprint in repr(made)

    def test_it_is_kept_and_its_mode_mended(self, tmp_path: Path) -> None:
        made = tls.development_certificate(tmp_path, "localhost", now=NOW)
        (tmp_path / tls.FILE).chmod(0o644)
        again = tls.development_certificate(tmp_path, "localhost", now=NOW + dt.timedelta(days=300))
        assert again == made
        assert stat.S_IMODE((tmp_path / tls.FILE).stat().st_mode) == 0o600

    @pytest.mark.parametrize("days", [370, 500, -2])
    def test_another_when_its_end_is_near_or_the_clock_was_wrong(self, tmp_path: Path, days: int) -> None:
        made = tls.development_certificate(tmp_path, "localhost", now=NOW)
        later = NOW + dt.timedelta(days=days)
        again = tls.development_certificate(tmp_path, "localhost", now=later)
        assert again.fingerprint != made.fingerprint and again.not_after > later

    def test_another_when_the_base_domain_changed(self, tmp_path: Path) -> None:
        made = tls.development_certificate(tmp_path, "localhost", now=NOW)
        again = tls.development_certificate(tmp_path, "tunnels.example.com", now=NOW)
        assert again.fingerprint != made.fingerprint

    @pytest.mark.parametrize("damage", ["empty", "torn", "other_key", "garbage"])
    def test_another_when_the_file_is_damaged(self, tmp_path: Path, damage: str) -> None:
        made = tls.development_certificate(tmp_path, "localhost", now=NOW)
        path = tmp_path / tls.FILE
        good = path.read_bytes()
        stranger = tls.development_certificate(tmp_path / "other", "localhost", now=NOW).pem
        cut = good.index(b"-----BEGIN CERTIFICATE")
        path.write_bytes(
            {
                "empty": b"",
                "torn": good[: len(good) - 100],
                "other_key": stranger[: stranger.index(b"-----BEGIN CERTIFICATE")] + good[cut:],
                "garbage": b"\xff" * 50,
            }[damage]
        )
        again = tls.development_certificate(tmp_path, "localhost", now=NOW)
        assert again.fingerprint != made.fingerprint
        tls.server_context(again)


class TestServerContext:
    @pytest.fixture
    def certificate(self, tmp_path: Path) -> tls.Certificate:
        return tls.development_certificate(tmp_path, "tunnels.example.com")

    @pytest.fixture
    async def port(self, certificate: tls.Certificate) -> AsyncIterator[int]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readline())
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls.server_context(certificate))
        yield server.sockets[0].getsockname()[1]
        server.close()

    @pytest.fixture
    def client(self, certificate: tls.Certificate) -> ssl.SSLContext:
        pem = parsed(certificate).public_bytes(serialization.Encoding.PEM).decode()
        return ssl.create_default_context(cadata=pem)

    async def talk(self, port: int, client: ssl.SSLContext, name: str) -> ssl.SSLObject:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname=name)
        writer.write(b"hello\n")
        assert await reader.readline() == b"hello\n"
        spoken: ssl.SSLObject = writer.get_extra_info("ssl_object")
        writer.transport.abort()
        return spoken

    @pytest.mark.parametrize("name", ["tunnels.example.com", "web.tunnels.example.com", "127.0.0.1"])
    async def test_a_client_that_trusts_it_connects_by_every_name(
        self, port: int, client: ssl.SSLContext, name: str
    ) -> None:
        await self.talk(port, client, name)

    async def test_another_name_is_refused_by_the_client(self, port: int, client: ssl.SSLContext) -> None:
        with pytest.raises(ssl.SSLCertVerificationError):
            await self.talk(port, client, "elsewhere.example.com")

    async def test_http_1_1_is_chosen_whatever_is_offered(self, port: int, client: ssl.SSLContext) -> None:
        client.set_alpn_protocols(["h2", "http/1.1"])
        assert (await self.talk(port, client, "127.0.0.1")).selected_alpn_protocol() == "http/1.1"

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_no_session_is_resumable(self, port: int, client: ssl.SSLContext, version: ssl.TLSVersion) -> None:
        client.minimum_version = client.maximum_version = version
        session = (await self.talk(port, client, "127.0.0.1")).session
        assert session is None or not session.has_ticket

    async def test_suites_without_forward_secrecy_are_refused(self, port: int, client: ssl.SSLContext) -> None:
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        client.set_ciphers("AES128-SHA:AES128-GCM-SHA256")  # no forward secrecy
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await self.talk(port, client, "127.0.0.1")

    def test_older_versions_are_off(self, certificate: tls.Certificate) -> None:
        assert tls.server_context(certificate).minimum_version is ssl.TLSVersion.TLSv1_2
