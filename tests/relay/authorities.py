"""Certificates for tests, of real authorities."""

from __future__ import annotations

import datetime as dt
import functools
import ssl

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from portico.kit.authority import Authority
from portico.relay.certificates import Certificate, build


@functools.cache
def authority(domain: str) -> Authority:
    return Authority.make(domain, dt.datetime.now(dt.UTC))


def certificate(*names: str, domain: str = "example.com", days_ago: int = 0) -> Certificate:
    """A leaf for ``names`` of the authority of ``domain``."""
    key = ec.generate_private_key(ec.SECP256R1())
    at = dt.datetime.now(dt.UTC) - dt.timedelta(days=days_ago)
    return build([authority(domain).issue([x509.DNSName(name) for name in names], key.public_key(), at)], key)


def parts(made: Certificate) -> tuple[bytes, bytes]:
    """Chain and key, as two files have them."""
    at = made.pem.index(b"-----BEGIN CERTIFICATE-----")
    return made.pem[at:], made.pem[:at]


def trusting(*authorities: Authority) -> ssl.SSLContext:
    """A client's context."""
    return ssl.create_default_context(cadata="".join(one.certificate_pem.decode() for one in authorities))


def encrypted(made: Certificate, passphrase: bytes) -> bytes:
    """Its key, encrypted."""
    key = serialization.load_pem_private_key(parts(made)[1], None)
    kind = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, kind)
