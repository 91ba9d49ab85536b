"""Certificates in files, and a relay that follows them."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from pathlib import Path
from typing import Any

import pytest

from portico.errors import Problem
from portico.relay.certificate_files import CertificateFiles, pairs
from portico.relay.certificates import Certificate, CertificateStore
from portico.relay.server import Relay
from portico.settings import Secret
from tests.relay.authorities import authority, certificate, encrypted, parts, trusting
from tests.relay.doubles import ScriptedAgent, grant, port, session_token


def write(chain: Path, made: Certificate, key: Path | None = None) -> None:
    """As renewing programs do: each file replaced whole."""
    texts = parts(made)
    for path, text in ((chain, texts[0]), (key or chain.with_suffix(".key"), texts[1])):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(".partial")
        partial.write_bytes(text)
        partial.chmod(0o600)
        partial.replace(path)


@pytest.fixture
def store() -> CertificateStore:
    return CertificateStore("example.com", contexts_max=10, context_seconds=100, clock=lambda: 0.0)


def served(store: CertificateStore, name: bytes = b"a.example.com") -> Certificate | None:
    return store.find(name)


def look(files: CertificateFiles, store: CertificateStore) -> None:
    files.take(files.look(), store)


class TestWhere:
    def test_pairs_of_all_kinds(self, tmp_path: Path, store: CertificateStore) -> None:
        made = {
            name: certificate(f"{name}.example.com") for name in ("one", "crt", "certbot", "kube", "mkcert", "both")
        }
        write(tmp_path / "one.pem", made["one"], tmp_path / "else" / "key.pem")
        folder = tmp_path / "folder"
        write(folder / "a.crt", made["crt"])
        write(folder / "live" / "fullchain.pem", made["certbot"], folder / "live" / "privkey.pem")
        (folder / "live" / "chain.pem").write_bytes(b"a part of it")
        write(folder / "secret" / "tls.crt", made["kube"], folder / "secret" / "tls.key")
        write(folder / "m" / "localhost+2.pem", made["mkcert"], folder / "m" / "localhost+2-key.pem")
        (folder / "both.pem").write_bytes(made["both"].pem)
        (folder / "both.pem").chmod(0o600)
        (folder / "readme.txt").write_text("not one of them")
        items = (f"{tmp_path / 'one.pem'}:{tmp_path / 'else' / 'key.pem'}", str(folder))
        CertificateFiles(items, None).fill(store)
        for name, one in made.items():
            assert served(store, f"{name}.example.com".encode()) == one
        assert len(store) == len(made) == len(pairs(items))

    def test_the_links_of_certbot(self, tmp_path: Path, store: CertificateStore) -> None:
        """A renewal moves the links, and the files behind them have other numbers."""
        live = tmp_path / "live" / "a"
        live.mkdir(parents=True)
        for number in (1, 2):
            write(tmp_path / "archive" / f"cert{number}.pem", certificate("a.example.com"))
        for name, target in (("fullchain.pem", "cert1.pem"), ("privkey.pem", "cert1.key")):
            (live / name).symlink_to(tmp_path / "archive" / target)
        files = CertificateFiles((str(tmp_path / "live"),), None)
        files.fill(store)
        first = served(store)
        for name, target in (("fullchain.pem", "cert2.pem"), ("privkey.pem", "cert2.key")):
            (live / name).unlink()
            (live / name).symlink_to(tmp_path / "archive" / target)
            look(files, store)
            assert served(store) is not None
        assert served(store) != first

    def test_an_encrypted_key(self, tmp_path: Path, store: CertificateStore) -> None:
        made = certificate("a.example.com")
        write(tmp_path / "a.crt", made)
        (tmp_path / "a.key").write_bytes(encrypted(made, b"open sesame"))
        CertificateFiles((str(tmp_path),), Secret("open sesame")).fill(store)
        assert served(store) == made


class TestBadOnes:
    @pytest.mark.parametrize(
        ("fault", "why"),
        [
            ("gone", "cannot be read: No such file or directory"),
            ("open", "can be read by every user"),
            ("mixed", "the key is not that of the first certificate"),
            ("garbage", "no certificate in PEM form"),
        ],
    )
    def test_a_named_one_at_the_start(self, tmp_path: Path, store: CertificateStore, fault: str, why: str) -> None:
        chain, key = tmp_path / "a.crt", tmp_path / "a.key"
        write(chain, certificate("a.example.com"))
        if fault == "gone":
            key.unlink()
        elif fault == "open":
            key.chmod(0o644)
        elif fault == "mixed":
            write(tmp_path / "b.crt", certificate("a.example.com"), key)
        else:
            chain.write_bytes(b"garbage")
        with pytest.raises(Problem, match=why) as refused:
            CertificateFiles((f"{chain}:{key}",), None).fill(store)
        assert refused.value.code == "config.invalid" and str(chain) in refused.value.detail

    def test_one_of_a_folder_does_not_hold_up_the_others(
        self, tmp_path: Path, store: CertificateStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        write(tmp_path / "a.crt", certificate("a.example.com"))
        (tmp_path / "b.crt").write_bytes(b"garbage")
        files = CertificateFiles((str(tmp_path),), None)
        files.fill(store)
        assert served(store) is not None
        said = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(said) == 1 and str(said[0].f["file"]) == str(tmp_path / "b.crt")  # type: ignore[attr-defined]
        look(files, store)
        assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1, "said again"

    @pytest.mark.parametrize("fault", ["torn", "mixed", "ended", "open", "empty"])
    def test_a_new_one_never_replaces_a_good_one(
        self, tmp_path: Path, store: CertificateStore, caplog: pytest.LogCaptureFixture, fault: str
    ) -> None:
        chain, key = tmp_path / "a.crt", tmp_path / "a.key"
        good = certificate("a.example.com")
        write(chain, good)
        files = CertificateFiles((f"{chain}:{key}",), None)
        files.fill(store)
        new = certificate("a.example.com")
        if fault == "torn":
            chain.write_bytes(parts(new)[0][:300])
        elif fault == "mixed":
            chain.write_bytes(parts(new)[0])
        elif fault == "ended":
            write(chain, certificate("a.example.com", days_ago=500))
        elif fault == "open":
            write(chain, new)
            key.chmod(0o644)
        else:
            chain.write_bytes(b"")
        look(files, store)
        assert served(store) == good
        assert "the one before goes on" in str([getattr(record, "f", {}) for record in caplog.records])
        write(chain, new)
        look(files, store)
        assert served(store) == new

    def test_one_that_has_ended_is_better_than_none(self, tmp_path: Path, store: CertificateStore) -> None:
        write(tmp_path / "a.crt", certificate("a.example.com", days_ago=500))
        CertificateFiles((str(tmp_path),), None).fill(store)
        assert served(store) is not None

    def test_one_that_goes_for_a_moment_and_one_that_stays_away(self, tmp_path: Path, store: CertificateStore) -> None:
        for name in ("a", "b"):
            write(tmp_path / f"{name}.crt", certificate(f"{name}.example.com"))
        files = CertificateFiles((str(tmp_path),), None)
        files.fill(store)
        (tmp_path / "a.crt").rename(tmp_path / "away")
        look(files, store)
        assert served(store) is not None
        (tmp_path / "away").rename(tmp_path / "a.crt")
        look(files, store)
        look(files, store)
        assert served(store) is not None and len(store) == 2
        (tmp_path / "a.crt").unlink()
        look(files, store)
        look(files, store)
        assert served(store) is None and len(store) == 1


async def spoken(port: int, name: str, client: ssl.SSLContext) -> bytes:
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname=name)
    der: bytes = writer.get_extra_info("ssl_object").getpeercert(True)
    writer.close()
    return der


class TestARelay:
    @pytest.fixture
    def relay_settings(self, tmp_path: Path) -> dict[str, Any]:
        write(tmp_path / "tls" / "a.crt", certificate("a.example.com"))
        write(tmp_path / "control.crt", certificate("localhost", domain="localhost"))
        return {
            "tls_certificates": (str(tmp_path / "tls"),),
            "tls_poll_seconds": 0.05,
            "control_tls_cert_file": tmp_path / "control.crt",
            "control_tls_key_file": tmp_path / "control.key",
        }

    @pytest.fixture
    def agent(self) -> None:
        """Not the one that speaks without TLS."""

    async def test_a_file_that_is_replaced(self, relay: Relay, tmp_path: Path) -> None:
        client = trusting(authority("example.com"))
        first = await spoken(port(relay, 2), "a.example.com", client)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port(relay, 2), ssl=client, server_hostname="a.example.com"
        )
        write(tmp_path / "tls" / "a.crt", certificate("a.example.com"))
        async with asyncio.timeout(30):
            while await spoken(port(relay, 2), "a.example.com", client) == first:
                await asyncio.sleep(0.05)
        writer.write(b"GET / HTTP/1.1\r\nHost: a.example.com\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 404"), "a connection that is open goes on"
        writer.close()

    async def test_agents_come_by_tls(self, relay: Relay, tmp_path: Path) -> None:
        """An agent that is connected stays, whatever happens to the certificate; the next one sees the new one."""
        client = trusting(authority("localhost"))
        one = await ScriptedAgent().connect(port(relay, 0), session_token(), tls=client)
        await one.online(grant())
        before = await spoken(port(relay, 0), "localhost", client)
        (tmp_path / "control.crt").write_bytes(b"garbage")
        await asyncio.sleep(0.2)
        assert await spoken(port(relay, 0), "localhost", client) == before
        write(tmp_path / "control.crt", certificate("localhost", domain="localhost"))
        async with asyncio.timeout(30):
            while await spoken(port(relay, 0), "localhost", client) == before:
                await asyncio.sleep(0.05)
        reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 1))
        writer.write(b"GET / HTTP/1.1\r\nHost: web.localhost\r\nConnection: close\r\n\r\n")
        assert (await reader.read(-1)).endswith(b"hello")
        writer.close()
        one.close()
        with pytest.raises(ssl.SSLCertVerificationError):
            await ScriptedAgent().connect(port(relay, 0), session_token(), tls=trusting(authority("example.com")))
        reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 0))
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"HTTP" not in await reader.read()
        writer.close()

    async def test_a_signal_needs_no_poll(self, relay: Relay, tmp_path: Path) -> None:
        client = trusting(authority("example.com"))
        first = await spoken(port(relay, 2), "a.example.com", client)
        object.__setattr__(relay.certificates.settings, "tls_poll_seconds", 60.0)
        await asyncio.sleep(0.1)
        write(tmp_path / "tls" / "a.crt", certificate("a.example.com"))
        await asyncio.sleep(0.2)
        assert await spoken(port(relay, 2), "a.example.com", client) == first
        relay.certificates.reload()
        async with asyncio.timeout(30):
            while await spoken(port(relay, 2), "a.example.com", client) == first:
                await asyncio.sleep(0.02)
        assert os.access(tmp_path / "tls" / "a.key", os.R_OK)
