"""Certificates in files: what is refused, and that a renewed pair serves the next handshake."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from pathlib import Path

import pytest

from portico.errors import Problem
from portico.kit.tlsfiles import CertificateFiles, certificate_files
from tests.authority import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def refused(cert: Path | None, key: Path | None) -> str:
    with pytest.raises(Problem) as refusal:
        certificate_files("api_tls", cert, key)
    assert refusal.value.code == "config.invalid"
    return refusal.value.line()


async def subject(files: CertificateFiles, trust: Authority) -> str:
    """The name in the certificate that a handshake shows."""
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0, ssl=files.context)
    port = server.sockets[0].getsockname()[1]
    context = trust.client()
    context.check_hostname = False
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    shown = writer.get_extra_info("peercert")["subject"][0][0][1]
    writer.close()
    server.close()
    return str(shown)


async def test_a_renewed_pair_serves_the_next_handshake(authority: Authority) -> None:
    cert, key = authority.issue("a", "a.test")
    files = CertificateFiles("api_tls", cert, key)
    assert await subject(files, authority) == "a.test"
    for new, old in zip(authority.issue("b", "b.test"), (cert, key), strict=True):
        shutil.copy(new, old)
    assert await subject(files, authority) == "a.test", "not before it is told"
    files.reload()
    assert await subject(files, authority) == "b.test"


async def test_a_bad_pair_changes_nothing(authority: Authority) -> None:
    cert, key = authority.issue("a", "a.test")
    files = CertificateFiles("api_tls", cert, key)
    shutil.copy(authority.issue("b", "b.test")[0], cert)
    with pytest.raises(Problem, match="the key does not belong to the certificate"):
        files.reload()
    assert await subject(files, authority) == "a.test"


def test_neither_is_no_tls() -> None:
    assert certificate_files("api_tls", None, None) is None


def test_one_without_the_other(tmp_path: Path) -> None:
    assert "setting api_tls_key_file" in refused(tmp_path / "a", None)
    assert "setting api_tls_cert_file" in refused(None, tmp_path / "a")


def test_what_cannot_be_used(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("a", "a.test")
    assert "setting api_tls_cert_file" in refused(tmp_path / "none", key)
    assert "none is not there" in refused(cert, tmp_path / "none")
    (tmp_path / "text").write_text("no certificate")
    assert "no PEM" in refused(tmp_path / "text", key)
    key.chmod(0o644)
    assert f"{key} can be read by every user" in refused(cert, key)


def test_a_key_with_a_password_asks_nobody(authority: Authority, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s

    cert, key = authority.issue("a", "a.test")
    secret = s.load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(secret.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"x")))
    assert "encrypted with a password" in refused(cert, key)


async def test_old_versions_of_the_protocol(authority: Authority) -> None:
    files = CertificateFiles("api_tls", *authority.issue("a", "a.test"))
    assert files.context.minimum_version == ssl.TLSVersion.TLSv1_2
