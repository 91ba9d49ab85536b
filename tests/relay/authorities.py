"""Certificates for tests, of real authorities."""

from __future__ import annotations

import datetime as dt
import functools
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

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


@functools.cache
def client_authority(name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """One that signs clients' certificates."""
    key = ec.generate_private_key(ec.SECP256R1())
    made = _signed(name, key.public_key(), name, key, x509.BasicConstraints(ca=True, path_length=0))
    return made, key


def client_ca_pem(name: str) -> str:
    return client_authority(name)[0].public_bytes(serialization.Encoding.PEM).decode()


def client_certificate(ca: str, folder: Path, usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH) -> Path:
    """A file with key and certificate of a client of the authority ``ca``."""
    _, signer = client_authority(ca)
    key = ec.generate_private_key(ec.SECP256R1())
    made = _signed(f"a client of {ca}", key.public_key(), ca, signer, x509.ExtendedKeyUsage([usage]))
    path = folder / f"{ca}-{usage.dotted_string}.pem"
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(pem + made.public_bytes(serialization.Encoding.PEM))
    return path


def _signed(
    name: str,
    key: ec.EllipticCurvePublicKey,
    issuer: str,
    signer: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> x509.Certificate:
    subject, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer))
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(by).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).add_extension(extension, critical=True)
    builder = builder.not_valid_before(now - dt.timedelta(hours=1)).not_valid_after(now + dt.timedelta(days=1))
    return builder.sign(signer, hashes.SHA256())


def trusting(*authorities: Authority) -> ssl.SSLContext:
    """A client's context."""
    return ssl.create_default_context(cadata="".join(one.certificate_pem.decode() for one in authorities))


def encrypted(made: Certificate, passphrase: bytes) -> bytes:
    """Its key, encrypted."""
    key = serialization.load_pem_private_key(parts(made)[1], None)
    kind = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, kind)
