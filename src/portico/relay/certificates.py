"""Certificates of the public TLS port: where they come from, which one a name gets, and the contexts made of them.

    CertificateSource ──Certificate──► CertificateStore ──by name──► TlsPort
    (files, development authority,       exact, wildcard,
     the vault)                          the platform's own

Everything is in memory. A source puts certificates in and takes them out while connections go on: a connection keeps the context
that it began with. Private keys enter ``ssl`` through a memfd and are written to no file.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import os
import ssl
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from portico.relay import statefiles

#: TLS 1.2 with forward secrecy and authenticated encryption only; TLS 1.3 suites are all of that kind.
CIPHERS_TLS12: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
#: What is spoken on the public TLS port, best first.
ALPN: Final = (b"http/1.1",)
#: Tickets sent after a TLS 1.3 handshake: a browser opens two connections at once.
TICKETS: Final = 2
SMALLEST_RSA: Final = 2048
#: The source of certificates of custom domains (``vault.py``): after files, before what is made here.
VAULT: Final = "vault"
#: Sessions of TLS 1.2 clients without tickets that OpenSSL keeps in a context, at 1 kB each, before the context is made anew
#: (it would keep 20,480, and ``ssl`` has no way to tell it otherwise), and uses of the context between two looks.
SESSIONS_MAX: Final = 2048
USES_PER_LOOK: Final = 256

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey


class CertificateInvalid(Exception):
    """A certificate or key that cannot be served with; the text says why, for the operator."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A leaf with its chain and key. ``pem`` holds the private key, then the chain; it never prints. It is empty where the key
    is not kept: ``opened`` has it when a context is made.

    ``names`` are exact host names, ``parents`` the domains below which a wildcard covers one label, ``addresses`` IP addresses as
    text; all lower-case. ``fingerprint``: SHA-256 of the leaf, hex.
    """

    pem: bytes = field(repr=False)
    names: frozenset[bytes]
    parents: frozenset[bytes]
    addresses: frozenset[bytes]
    not_before: dt.datetime
    not_after: dt.datetime
    fingerprint: str
    opened: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)

    def material(self) -> bytes:
        """Private key and chain. Not to be kept. Raises ``ssl.SSLError`` for a key that does not open any more."""
        return self.pem if self.opened is None else self.opened()

    def covers(self, host: bytes) -> bool:
        """Whether it is for ``host``, normalised (RFC 9525, 6.3: a wildcard stands for exactly one label)."""
        if host in self.names:
            return True
        label, _, parent = host.partition(b".")
        return (label != b"" and parent in self.parents) or host.strip(b"[]") in self.addresses


def read(chain: bytes, key: bytes | None = None, passphrase: bytes | None = None) -> Certificate:
    """The certificate of PEM text; ``key`` is within ``chain`` when it is not given. Raises :class:`CertificateInvalid`."""
    try:
        certificates = x509.load_pem_x509_certificates(chain)
    except ValueError as err:
        raise CertificateInvalid(f"no certificate in PEM form ({err})") from None
    private = _key(chain if key is None else key, passphrase)
    leaf = certificates[0]
    if leaf.public_key() != private.public_key():
        raise CertificateInvalid("the key is not that of the first certificate")
    return build(certificates, private)


def build(chain: list[x509.Certificate], key: Key) -> Certificate:
    """Of parsed parts: the leaf first, then its chain. Raises :class:`CertificateInvalid`."""
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return describe(chain[0], private + b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain))


def describe(leaf: x509.Certificate, pem: bytes) -> Certificate:
    """What a leaf says of itself, with the ``pem`` that is served. Raises :class:`CertificateInvalid`."""
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        raise CertificateInvalid("it names no host (subjectAltName)") from None
    hosts = [name.lower().rstrip(".").encode() for name in found.get_values_for_type(x509.DNSName)]
    addresses = [ipaddress.ip_address(str(ip)).compressed.encode() for ip in found.get_values_for_type(x509.IPAddress)]
    if not hosts and not addresses:
        raise CertificateInvalid("it names no host (subjectAltName)")
    return Certificate(
        pem=pem,
        names=frozenset(host for host in hosts if not host.startswith(b"*.")),
        parents=frozenset(host[2:] for host in hosts if host.startswith(b"*.")),
        addresses=frozenset(addresses),
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
        fingerprint=leaf.fingerprint(hashes.SHA256()).hex(),
    )


def _key(pem: bytes, passphrase: bytes | None) -> Key:
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except TypeError:  # encrypted without a passphrase, or one for a key that is not encrypted
        if passphrase is not None:
            return _key(pem, None)
        raise CertificateInvalid("the private key is encrypted, and no passphrase is set") from None
    except (ValueError, UnsupportedAlgorithm) as err:
        why = "the passphrase does not open the private key" if passphrase else f"no private key in PEM form ({err})"
        raise CertificateInvalid(why) from None
    if not isinstance(key, Key):
        raise CertificateInvalid("the private key is of no kind that TLS uses")
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size < SMALLEST_RSA:
        raise CertificateInvalid(f"an RSA key of {key.key_size} bits is too short")
    return key


# ── contexts ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def server_context(
    certificate: Certificate,
    *,
    client_ca: str | None = None,
    alpn: tuple[bytes, ...] = (),
    tickets: int = 0,
    kind: type[ssl.SSLContext] = ssl.SSLContext,
) -> ssl.SSLContext:
    """A context for a listener: TLS 1.2+, no compression, no renegotiation. Raises ``ssl.SSLError`` for a bad ``client_ca``.

    ``client_ca`` (PEM): a client may show a certificate, and one that does not come from there fails the handshake. ``tickets``
    sent after a handshake are readable by this context alone, so that a session ends with its certificate.
    """
    context = kind(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS_TLS12)
    if alpn:
        context.set_alpn_protocols([name.decode("ascii") for name in alpn])
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if not tickets:
        context.options |= ssl.OP_NO_TICKET
    context.num_tickets = tickets
    load_from_memory(context, certificate.material())
    if client_ca is not None:
        context.load_verify_locations(cadata=client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the CA that was named is trusted, root or not
    return context


def load_from_memory(context: ssl.SSLContext, pem: bytes) -> None:
    """Key and chain into ``context`` without a file on disk: ``ssl`` reads paths only, so they pass through a memfd."""
    fd = os.memfd_create("portico-certificate", os.MFD_CLOEXEC)
    try:
        statefiles.write_all(fd, pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


class _Context:
    """A context that is kept, and since when."""

    __slots__ = ("context", "made", "uses")

    def __init__(self, made: float, context: ssl.SSLContext) -> None:
        self.made = made
        self.context = context
        self.uses = 0

    def full(self) -> bool:
        """Count a use; whether it holds too many sessions."""
        self.uses += 1
        return self.uses % USES_PER_LOOK == 0 and self.context.session_stats()["number"] > SESSIONS_MAX


# ── the store ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class CertificateSource(Protocol):
    """Where certificates come from: it fills the store under its name and tells it of every change, from the loop's thread."""

    name: str

    def fill(self, store: CertificateStore) -> None:
        """Put in what there is; :meth:`CertificateStore.put`, ``drop`` and ``replace`` later."""


class CertificateStore:
    """What is served for which name. Look-ups are two of a dictionary, whatever the number of certificates.

    Where sources have a certificate for the same name, the one that was registered first has it; within a source, the one that
    is valid longest. ``own`` is for connections without a name, and for names that only it covers: the first source's that is
    marked so.
    """

    def __init__(
        self, base_domain: str, *, contexts_max: int, context_seconds: float, clock: Callable[[], float]
    ) -> None:
        self.base = base_domain.lower().encode()
        self._sources: list[str] = []
        self._held: dict[str, dict[str, Certificate]] = {}
        self._by_name: dict[bytes, list[tuple[int, float, Certificate]]] = {}
        self._by_parent: dict[bytes, list[tuple[int, float, Certificate]]] = {}
        self.own: Certificate | None = None
        #: Makes certificates when they are asked for; ``None`` for a name that is not its own. Asked after exact names.
        self.on_demand: Callable[[bytes], Certificate | None] | None = None
        self._contexts: OrderedDict[tuple[str, str | None, type], _Context] = OrderedDict()
        self._contexts_max = contexts_max
        self._context_seconds = context_seconds
        self._clock = clock

    # -- certificates --
    def register(self, source: str) -> None:
        """Sources have the order in which they are registered."""
        if source not in self._held:
            self._sources.append(source)
            self._held[source] = {}

    def put(self, source: str, certificate: Certificate) -> None:
        """From now on new connections are served with it where it comes first."""
        self.register(source)
        if certificate.fingerprint in self._held[source]:
            return
        self._held[source][certificate.fingerprint] = certificate
        rank = (self._sources.index(source), -certificate.not_after.timestamp(), certificate)
        for table, keys in ((self._by_name, certificate.names), (self._by_parent, certificate.parents)):
            for key in keys:
                places = table.setdefault(key, [])
                places.append(rank)
                places.sort(key=lambda place: place[:2])
        self._choose_own()

    def drop(self, source: str, fingerprint: str) -> None:
        """It serves no new connection; those that are open go on."""
        certificate = self._held.get(source, {}).pop(fingerprint, None)
        if certificate is None:
            return
        number = self._sources.index(source)
        for table, keys in ((self._by_name, certificate.names), (self._by_parent, certificate.parents)):
            for key in keys:
                places = [p for p in table[key] if (p[0], p[2].fingerprint) != (number, fingerprint)]
                if places:
                    table[key] = places
                else:
                    del table[key]
        if not any(fingerprint in held for held in self._held.values()):
            self.forget_contexts(fingerprint)
        self._choose_own()

    def replace(self, source: str, certificates: Iterable[Certificate]) -> None:
        """All that a source has, at once: no name is without a certificate in between."""
        self.register(source)
        wanted = {certificate.fingerprint: certificate for certificate in certificates}
        for certificate in wanted.values():
            self.put(source, certificate)
        for fingerprint in [f for f in self._held[source] if f not in wanted]:
            self.drop(source, fingerprint)

    def _choose_own(self) -> None:
        """The platform's own: what the base domain itself is served with, else what names directly below it are."""
        places = self._by_name.get(self.base) or self._by_parent.get(self.base)
        first = next((c for source in self._sources for c in self._held[source].values()), None)
        self.own = places[0][2] if places else first

    def __len__(self) -> int:
        return sum(len(held) for held in self._held.values())

    def certificates(self) -> list[tuple[str, Certificate]]:
        """All of them with the name of their source."""
        return [(source, one) for source in self._sources for one in self._held[source].values()]

    def find(self, name: bytes | None) -> Certificate | None:
        """What a client is served that asks for ``name`` (normalised), or for none: exact, wildcard, the platform's own.
        ``None``: nothing here is for that name."""
        if name is None:
            return self.own
        if (places := self._by_name.get(name)) is not None:
            return places[0][2]
        if self.on_demand is not None and (made := self.on_demand(name)) is not None:
            return made
        if (places := self._by_parent.get(name.partition(b".")[2])) is not None:
            return places[0][2]
        own = self.own
        return own if own is not None and own.covers(name) else None

    # -- contexts --
    def context(
        self, certificate: Certificate, client_ca: tuple[str, str] | None, kind: type[ssl.SSLContext]
    ) -> ssl.SSLContext:
        """The context of a certificate and a client CA (its hash, and PEM); made when it is first asked for.

        One that is old is made anew, and with it the key of its tickets. Raises ``ssl.SSLError`` for a CA that OpenSSL does not
        read.
        """
        key = (certificate.fingerprint, client_ca[0] if client_ca is not None else None, kind)
        now = self._clock()
        kept = self._contexts.get(key)
        if kept is not None and now - kept.made < self._context_seconds and not kept.full():
            self._contexts.move_to_end(key)
            return kept.context
        pem = client_ca[1] if client_ca is not None else None
        # Where client certificates count, every handshake is a whole one: a resumed session would neither ask for one nor
        # see that it has ended meanwhile.
        tickets = TICKETS if pem is None else 0
        context = server_context(certificate, client_ca=pem, alpn=ALPN, tickets=tickets, kind=kind)
        self._contexts[key] = _Context(now, context)
        self._contexts.move_to_end(key)
        while len(self._contexts) > self._contexts_max:
            self._contexts.popitem(last=False)
        return context

    def forget_contexts(self, fingerprint: str) -> None:
        for key in [key for key in self._contexts if key[0] == fingerprint]:
            del self._contexts[key]


def ca_hash(pem: str) -> str:
    """The name of a client CA, of its PEM text."""
    return hashlib.sha256(pem.encode()).hexdigest()
