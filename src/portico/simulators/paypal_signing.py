"""PayPal's signatures in the simulator: a root of its own, a certificate for PayPal's name below it, and a forger.

What is signed is ``transmission id|time|webhook id|CRC-32 of the body``; so :func:`forge` makes another body for the
same signature.
"""

from __future__ import annotations

import datetime as dt
import zlib
from typing import Final, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from portico.simulators.billing_world import Doc

#: The name that PayPal's certificate has.
CERTIFICATE_NAME: Final = "messageverificationcerts.paypal.com"
_LIFE: Final = dt.timedelta(days=3650)
#: A certificate of a server is believed for so long at most.
_LEAF_LIFE: Final = dt.timedelta(days=397)
_BITS: Final = 2048
_FILLER: Final = 64


def new_keys(now: dt.datetime) -> Doc:
    """A root and a certificate, in PEM: ``root``, ``certificate`` (the chain), ``key``."""
    root_key = rsa.generate_private_key(public_exponent=65537, key_size=_BITS)
    root_name = _name("Simulated PayPal root")
    root = _signed(root_name, root_name, root_key.public_key(), root_key, now, _LIFE, [
        (x509.BasicConstraints(ca=True, path_length=0), True), (_usage(ca=True), True),
        (x509.SubjectKeyIdentifier.from_public_key(root_key.public_key()), False),
    ])  # fmt: skip
    key = rsa.generate_private_key(public_exponent=65537, key_size=_BITS)
    leaf = _signed(_name(CERTIFICATE_NAME), root_name, key.public_key(), root_key, now, _LEAF_LIFE, [
        (x509.BasicConstraints(ca=False, path_length=None), True), (_usage(ca=False), True),
        (x509.SubjectAlternativeName([x509.DNSName(CERTIFICATE_NAME)]), False),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), False),
    ])  # fmt: skip
    plain = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    return {
        "id": "keys",
        "root": root.public_bytes(pem).decode(),
        "certificate": leaf.public_bytes(pem).decode(),
        "key": key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain).decode(),
        "until": leaf.not_valid_after_utc.timestamp(),
    }


def sign(key_pem: str, transmission: str, at: str, webhook: str, body: bytes) -> bytes:
    """The signature of one delivery."""
    key = cast(rsa.RSAPrivateKey, serialization.load_pem_private_key(key_pem.encode(), None))
    return key.sign(f"{transmission}|{at}|{webhook}|{zlib.crc32(body)}".encode(), padding.PKCS1v15(), hashes.SHA256())


def forge(genuine: bytes, wanted: bytes) -> bytes:
    """``wanted`` (a JSON object) with one member more, so that it has the CRC-32 of ``genuine``.

    CRC-32 is affine over bits: a character that is ``a`` or ``c`` (one bit apart) toggles a fixed pattern, and 64 of
    them span all 32
    bits. Which of them toggle is the solution of 32 equations.
    """
    head = wanted.rstrip()[:-1] + b',"filler":"'
    tail = b'"}'
    filler = bytearray(b"a" * _FILLER)
    start = zlib.crc32(head + filler + tail)
    rows: list[tuple[int, int]] = []
    for place in range(_FILLER):
        toggled = bytearray(filler)
        toggled[place] = ord("c")
        rows.append((zlib.crc32(head + toggled + tail) ^ start, 1 << place))
    need, chosen = start ^ zlib.crc32(genuine), 0
    for bit in range(32):
        pivot = next((found for found in range(len(rows)) if rows[found][0] >> bit & 1), None)
        if pivot is None:
            raise ValueError("the filler does not span every bit")
        pattern, mask = rows.pop(pivot)
        rows = [(p ^ pattern, m ^ mask) if p >> bit & 1 else (p, m) for p, m in rows]
        if need >> bit & 1:
            need, chosen = need ^ pattern, chosen ^ mask
    for place in range(_FILLER):
        if chosen >> place & 1:
            filler[place] = ord("c")
    return head + bytes(filler) + tail


def _signed(
    subject: x509.Name,
    issuer: x509.Name,
    public: rsa.RSAPublicKey,
    by: rsa.RSAPrivateKey,
    now: dt.datetime,
    life: dt.timedelta,
    extensions: list[tuple[x509.ExtensionType, bool]],
) -> x509.Certificate:
    start = now - dt.timedelta(hours=1)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(start + life)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(by, hashes.SHA256())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=not ca,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
