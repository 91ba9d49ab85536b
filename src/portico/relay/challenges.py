"""What certificate authorities (CAs) ask this edge to see whose a name is, answered from the edge stream.

    http-01       GET http://HOST/.well-known/acme-challenge/TOKEN → the key authorization      RFC 8555, 8.3
    tls-alpn-01   a handshake with ALPN acme-tls/1 → a certificate that holds its digest        RFC 8737, 3

Asked for before anything is decided about a tunnel: the name may have none, be held back, or want credentials. Only tokens and
names that the control plane told of are answered; any other request of that kind goes where the name leads, so that a target
that gets certificates of its own still does. Nothing here is secret, and nothing is answered after its time.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ssl
import time
from collections.abc import Callable
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from portico.relay.certificates import build, server_context
from portico.relay.edge_rows import Challenge
from portico.relay.snapshot import Change, Snapshot

PATH: Final = b"/.well-known/acme-challenge/"
ALPN: Final = b"acme-tls/1"
#: id-pe-acmeIdentifier (RFC 8737, 3).
_IDENTIFIER: Final = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")
_OCTET_STRING: Final = b"\x04\x20"
_METHODS: Final = (b"GET", b"HEAD")
#: How long the certificate of an answer is valid: it is looked at in the moment that it is shown.
_VALID: Final = dt.timedelta(days=1)


class Proof:
    """The answer to one tls-alpn-01 challenge; its certificate is made when it is first asked for."""

    def __init__(self, row: Challenge) -> None:
        self.row = row
        self._context: ssl.SSLContext | None = None

    def context(self, kind: type[ssl.SSLContext]) -> ssl.SSLContext:
        """What the handshake is done with."""
        if self._context is None:
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = build([_certificate(self.row, key)], key)
            self._context = server_context(certificate, alpn=(ALPN,), kind=kind)
        return self._context


class Challenges:
    """The open challenges of a snapshot, by what they are asked with. ``open``: whether there are any, for the hot path."""

    def __init__(self, snapshot: Snapshot, *, wall: Callable[[], float] = time.time) -> None:
        self._snapshot = snapshot
        self._wall = wall
        self._tokens: dict[tuple[bytes, bytes], Challenge] = {}
        self._names: dict[bytes, Proof] = {}
        self.open = False
        snapshot.on_change(self._changed)

    def _changed(self, change: Change) -> None:
        if change.kind != "challenge":
            return
        tokens: dict[tuple[bytes, bytes], Challenge] = {}
        names: dict[bytes, Proof] = {}
        for row in self._snapshot.challenges.values():
            host = row.host.encode()
            if row.type == "http-01":
                tokens[host, row.token.encode()] = row
            elif row.type == "tls-alpn-01":
                kept = self._names.get(host)
                names[host] = kept if kept is not None and kept.row == row else Proof(row)
        self._tokens, self._names = tokens, names
        self.open = bool(tokens)

    def http(self, host: bytes, method: bytes, target: bytes) -> bytes | None:
        """The body that answers a request; ``None`` when it is no challenge of ours. ``host`` is normalised."""
        if not target.startswith(PATH) or method not in _METHODS:
            return None
        row = self._tokens.get((host, target[len(PATH) :]))
        return row.authorization.encode() if row is not None and self._wall() < row.until else None

    def tls(self, name: bytes | None) -> Proof | None:
        """The answer to a handshake with ALPN ``acme-tls/1`` for ``name``."""
        proof = self._names.get(name) if name is not None else None
        return proof if proof is not None and self._wall() < proof.row.until else None


def response(body: bytes, *, keep_alive: bool, head_only: bool) -> bytes:
    """The whole answer over HTTP/1.1."""
    close = b"" if keep_alive else b"Connection: close\r\n"
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nCache-Control: no-store\r\n"
        b"X-Content-Type-Options: nosniff\r\nContent-Length: %d\r\n%b\r\n" % (len(body), close)
    )
    return head if head_only else head + body


def _certificate(row: Challenge, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """Self-signed, for the name alone, with the digest of the key authorization in a critical extension."""
    digest = hashlib.sha256(row.authorization.encode()).digest()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "acme-tls/1")])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - _VALID).not_valid_after(now + _VALID)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(row.host)]), critical=False)
    identifier = x509.UnrecognizedExtension(_IDENTIFIER, _OCTET_STRING + digest)
    return builder.add_extension(identifier, critical=True).sign(key, hashes.SHA256())
