"""A certificate authority for development: made on a machine, trusted by whoever installs it, and good for one domain only.

Its names are constrained (RFC 5280, 4.2.1.10) to the base domain and to loopback addresses: whoever steals its key can still
not pose as anybody's bank.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFE = dt.timedelta(days=1825)
LEAF_LIFE = dt.timedelta(days=397)  # the longest that browsers accept
RENEW_BEFORE = dt.timedelta(days=30)
BACKDATED = dt.timedelta(hours=1)  # for clients whose clock is a little slow
LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
LOOPBACK_ADDRESSES = (ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1"))


class AuthorityInvalid(Exception):
    """Stored bytes that make no authority; the text says why."""


class Authority:
    """A CA with its key, which it never prints."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self._key = key
        self._identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())

    @classmethod
    def make(cls, base_domain: str, now: dt.datetime, organization: str = "Portico") -> Authority:
        """A new one for ``base_domain`` and every name below it."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(organization, f"Portico development CA for {base_domain}")
        constraints = [x509.DNSName(base_domain), *(x509.IPAddress(network) for network in LOOPBACK)]
        builder = _builder(name, name, key.public_key(), now, LIFE)
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(ca=True, path_length=0), True),
            (_usage(ca=True), True),
            (x509.NameConstraints(permitted_subtrees=constraints, excluded_subtrees=None), True),
            (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        ]
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def read(cls, certificate: bytes, key: bytes, passphrase: bytes) -> Authority:
        """Of PEM text, the key encrypted with ``passphrase``. Raises :class:`AuthorityInvalid`."""
        try:
            parsed = x509.load_pem_x509_certificate(certificate)
            private = serialization.load_pem_private_key(key, passphrase)
        except (ValueError, TypeError) as err:
            raise AuthorityInvalid(f"it cannot be read ({err})") from None
        if not isinstance(private, ec.EllipticCurvePrivateKey) or parsed.public_key() != private.public_key():
            raise AuthorityInvalid("certificate and key do not belong together")
        return cls(parsed, private)

    def fits(self, base_domain: str, now: dt.datetime) -> bool:
        """Whether it is for this domain, and is not about to end."""
        try:
            found = self.certificate.extensions.get_extension_for_class(x509.NameConstraints).value
        except (x509.ExtensionNotFound, ValueError):
            return False
        lasts = self.certificate.not_valid_before_utc <= now < self.certificate.not_valid_after_utc - RENEW_BEFORE
        return lasts and x509.DNSName(base_domain) in (found.permitted_subtrees or [])

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self, passphrase: bytes) -> bytes:
        """The key in PKCS #8, encrypted."""
        return self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(passphrase),
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, hex."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def issue(
        self, names: Iterable[x509.GeneralName], key: ec.EllipticCurvePublicKey, now: dt.datetime
    ) -> x509.Certificate:
        """A server's certificate for ``names``."""
        until = min(LEAF_LIFE, self.certificate.not_valid_after_utc - now + BACKDATED)
        subject = _name("Portico", "Portico development certificate")
        builder = _builder(subject, self.certificate.subject, key, now, until)
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.SubjectAlternativeName(names), False),
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(ca=False), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
            (x509.SubjectKeyIdentifier.from_public_key(key), False),
            (self._identifier, False),
        ]
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256())


def _name(organization: str, common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
            x509.NameAttribute(NameOID.COMMON_NAME, common[:64]),
        ]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: dt.datetime, life: dt.timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now - BACKDATED + life)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
