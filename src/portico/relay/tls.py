"""TLS at the edge: server contexts, and the certificate that the HTTPS port is served with before there is a real one.

The development certificate is self-signed, for the base domain, every name directly below it and the loopback addresses. It
says so in its subject. Browsers warn about it; and OpenSSL's clients do not match ``*.localhost`` at all, since a wildcard
needs two labels behind it. Certificates of custom domains come from the control plane.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from portico.relay import statefiles

log = logging.getLogger(__name__)

FILE = "development-certificate.pem"
LIFE = dt.timedelta(days=397)  # the longest that browsers accept
RENEW_BEFORE = dt.timedelta(days=30)
BACKDATED = dt.timedelta(hours=1)  # for clients whose clock is a little slow
LOOPBACK = (ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1"))

# TLS 1.2 with forward secrecy and authenticated encryption only; TLS 1.3 suites are all of that kind.
CIPHERS_TLS12 = "ECDHE+AESGCM:ECDHE+CHACHA20"


@dataclass(frozen=True, slots=True)
class Certificate:
    """``pem`` holds the private key and then the chain; it never prints."""

    pem: bytes
    not_after: dt.datetime
    fingerprint: str

    def __repr__(self) -> str:
        return f"Certificate(sha256={self.fingerprint}, not_after={self.not_after.isoformat()})"


def server_context(certificate: Certificate) -> ssl.SSLContext:
    """A context for the public listener: TLS 1.2+, HTTP/1.1 by ALPN, every handshake a full one.

    Session tickets are off: a ticket outlives the certificate switch and the client checks that a context makes.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS_TLS12)
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.num_tickets = 0
    load_from_memory(context, certificate.pem)
    return context


def load_from_memory(context: ssl.SSLContext, pem: bytes) -> None:
    """Key and chain into ``context`` without a file on disk: ``ssl`` reads paths only, so they pass through a memfd."""
    fd = os.memfd_create("portico-certificate", os.MFD_CLOEXEC)
    try:
        statefiles.write_all(fd, pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def development_certificate(state_dir: Path, base_domain: str, *, now: dt.datetime | None = None) -> Certificate:
    """The certificate in the state folder, or a new one when there is none, its end is near or its names differ.

    Blocks for some milliseconds; call it before serving. Raises ``OSError`` when the folder cannot be written.
    """
    now = now or dt.datetime.now(dt.UTC)
    path = state_dir / FILE
    kept = _kept(path, base_domain, now)
    if kept is not None:
        return kept
    statefiles.ensure_dir(state_dir)
    made = _make(base_domain, now)
    statefiles.replace(path, made.pem)
    fields = {"domain": base_domain, "sha256": made.fingerprint, "until": made.not_after.date()}
    log.info("made a self-signed development certificate", extra={"f": fields})
    return made


def _kept(path: Path, base_domain: str, now: dt.datetime) -> Certificate | None:
    """The stored certificate if it still serves; a damaged file is replaced, not reported as a failure."""
    try:
        pem = path.read_bytes()
        key = serialization.load_pem_private_key(pem, password=None)
        certificate = x509.load_pem_x509_certificate(pem)
        names = set(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, x509.ExtensionNotFound) as err:
        log.warning("the development certificate is damaged; making another", extra={"f": {"why": err}})
        return None
    fits = names == set(_names(base_domain)) and certificate.public_key() == key.public_key()
    lasts = certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc - RENEW_BEFORE
    if not (fits and lasts):
        return None
    path.chmod(statefiles.PRIVATE)
    return _certificate(pem, certificate)


def _names(base_domain: str) -> list[x509.GeneralName]:
    hosts = [base_domain, f"*.{base_domain}"]
    return [*(x509.DNSName(host) for host in hosts), *(x509.IPAddress(address) for address in LOOPBACK)]


def _make(base_domain: str, now: dt.datetime) -> Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Portico development certificate")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now - BACKDATED + LIFE)
    )
    for extension, critical in _extensions(base_domain, key.public_key()):
        builder = builder.add_extension(extension, critical)
    certificate = builder.sign(key, hashes.SHA256())
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return _certificate(key_pem + certificate.public_bytes(serialization.Encoding.PEM), certificate)


def _extensions(base_domain: str, key: ec.EllipticCurvePublicKey) -> list[tuple[x509.ExtensionType, bool]]:
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    return [
        (x509.SubjectAlternativeName(_names(base_domain)), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (usage, True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectKeyIdentifier.from_public_key(key), False),
    ]


def _certificate(pem: bytes, certificate: x509.Certificate) -> Certificate:
    return Certificate(pem, certificate.not_valid_after_utc, certificate.fingerprint(hashes.SHA256()).hex())
