from __future__ import annotations

import contextlib
import datetime as dt
import os
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from portico.kit.authority import Authority
from portico.relay.certificates import Certificate, CertificateInvalid, CertificateStore, read, server_context
from portico.relay.development import Development
from tests.relay.authorities import authority, certificate, encrypted, parts, trusting

BASE = "tunnels.example.com"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> CertificateStore:
    return CertificateStore(BASE, contexts_max=3, context_seconds=100, clock=clock)


def context(store: CertificateStore, one: Certificate, ca: tuple[str, str] | None = None) -> ssl.SSLContext:
    return store.context(one, ca, ssl.SSLContext)


class TestReading:
    def test_of_two_files_or_one(self) -> None:
        made = certificate("Web.example.com", "*.Example.com")
        chain, key = parts(made)
        for found in (read(chain, key), read(key + chain), read(chain + key)):
            assert found == made
        assert made.names == {b"web.example.com"} and made.parents == {b"example.com"}

    def test_it_never_prints_its_key(self) -> None:
        made = certificate("web.example.com")
        assert b"PRIVATE KEY" in made.pem and "PRIVATE KEY" not in repr(made) and "pem" not in repr(made)

    @pytest.mark.parametrize(
        ("host", "covered"),
        [
            (b"web.example.com", True),
            (b"other.example.com", True),
            (b"example.com", False),
            (b"a.b.example.com", False),
            (b"example.org", False),
            (b"", False),
            (b".example.com", False),
        ],
    )
    def test_what_it_covers(self, host: bytes, covered: bool) -> None:
        assert certificate("*.example.com").covers(host) is covered

    def test_addresses(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        development = Development(authority("localhost"), "localhost", lambda name: False)
        made = development._issue([x509.IPAddress(address) for address in development_addresses()])
        assert made.covers(b"127.0.0.1") and made.covers(b"[::1]") and not made.covers(b"127.0.0.2")
        assert not made.names and key

    def test_an_encrypted_key(self) -> None:
        made = certificate("web.example.com")
        chain, _ = parts(made)
        assert read(chain, encrypted(made, b"open sesame"), b"open sesame") == made
        assert read(*parts(made), b"for another file") == made
        with pytest.raises(CertificateInvalid, match="does not open"):
            read(chain, encrypted(made, b"open sesame"), b"wrong")
        with pytest.raises(CertificateInvalid, match="no passphrase is set"):
            read(chain, encrypted(made, b"open sesame"))

    @pytest.mark.parametrize("damage", ["other key", "no key", "no certificate", "torn", "garbage", "empty"])
    def test_what_is_no_pair(self, damage: str) -> None:
        chain, key = parts(certificate("web.example.com"))
        stranger = parts(certificate("web.example.com"))[1]
        chain, key = {
            "other key": (chain, stranger),
            "no key": (chain, chain),
            "no certificate": (key, key),
            "torn": (chain[:-60], key),
            "garbage": (b"\xff" * 99, key),
            "empty": (b"", b""),
        }[damage]
        with pytest.raises(CertificateInvalid):
            read(chain, key)

    def test_a_short_rsa_key(self) -> None:
        key = rsa.generate_private_key(65537, 1024)
        issued = authority("example.com").issue(
            [x509.DNSName("a.example.com")], key.public_key(), dt.datetime.now(dt.UTC)
        )  # type: ignore[arg-type]
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with pytest.raises(CertificateInvalid, match="1024 bits is too short"):
            read(issued.public_bytes(serialization.Encoding.PEM), pem)

    def test_one_that_names_no_host(self) -> None:
        with pytest.raises(CertificateInvalid, match="names no host"):
            certificate()


def development_addresses() -> tuple[object, ...]:
    from portico.kit.authority import LOOPBACK_ADDRESSES

    return LOOPBACK_ADDRESSES


class TestStore:
    def test_exact_before_wildcard_before_the_platforms_own(self, store: CertificateStore) -> None:
        own, wild, exact = (
            certificate(f"*.{BASE}", BASE),
            certificate("*.shop.example.com"),
            certificate("a.shop.example.com"),
        )
        for one in (own, wild, exact):
            store.put("files", one)
        assert store.own is own
        assert store.find(None) is own
        assert store.find(b"web.tunnels.example.com") is own
        assert store.find(b"tunnels.example.com") is own
        assert store.find(b"a.shop.example.com") is exact
        assert store.find(b"b.shop.example.com") is wild
        assert store.find(b"shop.example.com") is None
        assert store.find(b"example.org") is None

    def test_the_platforms_own_is_what_the_base_domain_has(self, store: CertificateStore) -> None:
        other, wild, base = certificate("other.example.com"), certificate(f"*.{BASE}"), certificate(BASE)
        store.put("files", other)
        assert store.own is other
        store.put("files", wild)
        assert store.own is wild
        store.put("files", base)
        assert store.own is base
        store.drop("files", base.fingerprint)
        assert store.own is wild

    def test_the_first_source_wins_and_within_it_the_longest_life(self, store: CertificateStore) -> None:
        store.register("first")
        store.register("second")
        mine, older, newer = (certificate("a.example.com", days_ago=days) for days in (0, 50, 10))
        store.put("second", mine)
        assert store.find(b"a.example.com") is mine
        for one in (older, newer):
            store.put("first", one)
        assert store.find(b"a.example.com") is newer
        store.drop("first", newer.fingerprint)
        assert store.find(b"a.example.com") is older
        store.replace("first", [])
        assert store.find(b"a.example.com") is mine
        store.drop("second", mine.fingerprint)
        store.drop("second", mine.fingerprint)
        assert store.find(b"a.example.com") is None and len(store) == 0 and store.own is None

    def test_what_is_made_on_demand_stands_between_exact_and_wildcard(self, store: CertificateStore) -> None:
        wild, made, exact = certificate("*.example.com"), certificate("b.example.com"), certificate("a.example.com")
        for one in (wild, exact):
            store.put("files", one)
        store.on_demand = lambda name: made if name in (b"a.example.com", b"b.example.com") else None
        assert store.find(b"a.example.com") is exact
        assert store.find(b"b.example.com") is made
        assert store.find(b"c.example.com") is wild


class TestContexts:
    def test_made_once_for_a_certificate_and_a_client_ca(self, store: CertificateStore) -> None:
        one, ca = certificate("a.example.com"), authority("example.com").certificate_pem.decode()
        plain = context(store, one)
        assert context(store, one) is plain
        assert plain.verify_mode is ssl.CERT_NONE
        checked = context(store, one, ("hash-1", ca))
        assert checked is not plain and checked.verify_mode is ssl.CERT_OPTIONAL
        assert context(store, one, ("hash-2", ca)) is not checked

    def test_no_more_than_so_many_and_none_for_ever(self, store: CertificateStore, clock: Clock) -> None:
        made = [certificate("a.example.com") for _ in range(4)]
        first = context(store, made[0])
        context(store, made[1])
        context(store, made[2])
        assert context(store, made[0]) is first  # used again: not the oldest
        context(store, made[3])
        assert context(store, made[0]) is first
        assert len(store._contexts) == 3
        clock.now += 101
        assert context(store, made[0]) is not first

    def test_sessions_do_not_pile_up(self, store: CertificateStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of TLS 1.2 clients without tickets OpenSSL keeps each session, for hours."""
        monkeypatch.setattr("portico.relay.certificates.SESSIONS_MAX", 20)
        monkeypatch.setattr("portico.relay.certificates.USES_PER_LOOK", 8)
        one = certificate("a.example.com")
        client = trusting(authority("example.com"))
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        client.options |= ssl.OP_NO_TICKET
        seen: list[ssl.SSLContext] = []
        for _ in range(100):
            server = context(store, one)
            handshake(server, client, "a.example.com")
            assert server.session_stats()["number"] <= 20 + 8
            if server not in seen:
                seen.append(server)
        assert len(seen) > 2

    def test_gone_with_its_certificate(self, store: CertificateStore) -> None:
        one = certificate("a.example.com")
        store.put("files", one)
        context(store, one)
        store.drop("files", one.fingerprint)
        assert not store._contexts

    def test_a_client_ca_that_is_none(self, store: CertificateStore) -> None:
        with pytest.raises(ssl.SSLError):
            context(store, certificate("a.example.com"), ("x", "-----BEGIN CERTIFICATE-----\n"))
        assert not store._contexts

    def test_what_every_context_forbids(self) -> None:
        made = server_context(certificate("a.example.com"))
        assert made.minimum_version is ssl.TLSVersion.TLSv1_2
        assert made.options & ssl.OP_NO_COMPRESSION and made.options & ssl.OP_NO_RENEGOTIATION
        assert made.options & ssl.OP_NO_TICKET and made.num_tickets == 0
        assert not server_context(certificate("a.example.com"), tickets=2).options & ssl.OP_NO_TICKET
        kinds = {cipher["kea"] for cipher in made.get_ciphers() if cipher["protocol"] == "TLSv1.2"}
        assert kinds == {"kx-ecdhe"}

    def test_the_key_touches_no_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not even for a moment: what is opened for writing while a context is made is no file with a name."""
        opened: list[str] = []
        real = os.open
        monkeypatch.setattr(
            os, "open", lambda path, *rest, **more: opened.append(str(path)) or real(path, *rest, **more)
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        server_context(certificate("a.example.com"))
        assert opened == [] and list(tmp_path.iterdir()) == []
        descriptors = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)}
        assert not any("portico-certificate" in name for name in descriptors)


def _exists(fd: str) -> bool:
    with contextlib.suppress(OSError):
        os.readlink(f"/proc/self/fd/{fd}")
        return True
    return False


class TestDevelopment:
    @pytest.fixture
    def local(self, clock: Clock) -> CertificateStore:
        store = CertificateStore("localhost", contexts_max=3, context_seconds=100, clock=clock)
        Development(authority("localhost"), "localhost", lambda name: name.startswith(b"web")).fill(store)
        return store

    def test_what_it_serves(self, local: CertificateStore) -> None:
        """OpenSSL's clients do not match a wildcard below a single label."""
        own = local.find(b"localhost")
        assert own is local.own and own is not None
        assert own.names == {b"localhost"} and own.parents == {b"localhost"}
        assert own.addresses == {b"127.0.0.1", b"::1"}
        web = local.find(b"web.localhost")
        assert web is not None and web.names == {b"web.localhost"} and not web.parents
        assert local.find(b"web.localhost") is web
        nobody = local.find(b"nobody.localhost")
        assert nobody is not None and nobody.names == {b"nobody.localhost"}, "its page says that it is nobody's"
        assert local.find(b"web.sub.localhost") is None
        assert local.find(b"web.example.com") is None

    def test_names_that_are_invented_by_the_thousand(self, local: CertificateStore) -> None:
        made = {local.find(b"n%d.localhost" % number) for number in range(200)}
        assert len(made) == 61 and local.own in made
        web = local.find(b"web1.localhost")
        assert web is not None and web is not local.own

    def test_a_longer_base_domain_needs_the_wildcard_alone(self, store: CertificateStore) -> None:
        Development(authority(BASE), BASE, lambda name: True).fill(store)
        assert store.find(b"web.tunnels.example.com") is store.own

    def test_leaves_of_its_ca_alone_and_within_its_names(self, local: CertificateStore, tmp_path: Path) -> None:
        """By OpenSSL itself: good for the base domain; for another name the CA's constraint speaks against it."""
        issuer = authority("localhost")
        client = ssl.create_default_context(cadata=issuer.certificate_pem.decode())
        own = local.own
        assert own is not None
        handshake(server_context(own), client, "localhost")
        web = local.find(b"web.localhost")
        assert web is not None
        handshake(server_context(web), client, "web.localhost")
        key = ec.generate_private_key(ec.SECP256R1())
        stolen = issuer.issue([x509.DNSName("bank.example.com")], key.public_key(), dt.datetime.now(dt.UTC))
        from portico.relay.certificates import build

        with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
            handshake(server_context(build([stolen], key)), client, "bank.example.com")

    def test_life(self) -> None:
        now = dt.datetime(2026, 11, 23, tzinfo=dt.UTC)
        made = Authority.make("localhost", now)
        assert made.fits("localhost", now) and not made.fits("other.example.com", now)
        assert not made.fits("localhost", now - dt.timedelta(days=2))
        assert not made.fits("localhost", now + dt.timedelta(days=1800))
        again = Authority.read(made.certificate_pem, made.key_pem(b"pass"), b"pass")
        assert again.fingerprint == made.fingerprint
        late = now + dt.timedelta(days=1700)
        leaf = made.issue([x509.DNSName("localhost")], ec.generate_private_key(ec.SECP256R1()).public_key(), late)
        assert leaf.not_valid_after_utc <= made.certificate.not_valid_after_utc

    def test_a_new_one_when_its_end_is_near(self, local: CertificateStore, monkeypatch: pytest.MonkeyPatch) -> None:
        source = Development(authority("localhost"), "localhost", lambda name: False)
        source.fill(local)
        first = local.own
        source.renew(local)
        assert local.own is first
        monkeypatch.setattr("portico.relay.development.RENEW_BEFORE", dt.timedelta(days=400))
        source.renew(local)
        assert local.own is not first


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> None:
    """A connection in memory."""
    one, two = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(two, one, server_hostname=name), server.wrap_bio(one, two, server_side=True)]
    for step in (
        ssl.SSLObject.do_handshake,
        ssl.SSLObject.unwrap,
    ):  # without the second OpenSSL would forget the session
        left = list(ends)
        while left:
            for end in list(left):
                with contextlib.suppress(ssl.SSLWantReadError):
                    step(end)
                    left.remove(end)
