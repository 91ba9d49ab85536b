"""Signatures of payment providers' webhooks, by the raw bytes that came.

    Stripe     Stripe-Signature: t=1492774577,v1=<hex>[,v1=<hex>…]      HMAC-SHA256 over ``t.body``; the key is the secret's own
               text, its ``whsec_`` included (docs.stripe.com/webhooks, "Verify webhook signatures manually")
    Razorpay   X-Razorpay-Signature: <hex>                              HMAC-SHA256 over the body; no time is signed
               (razorpay.com/docs/webhooks/validate-test)
    PayPal     PAYPAL-TRANSMISSION-ID, -TIME, -SIG, PAYPAL-CERT-URL,    RSA-SHA256 (PKCS #1 v1.5) over
               PAYPAL-AUTH-ALGO: SHA256withRSA                          ``id|time|webhook id|CRC-32 of the body, decimal``, by the
               certificate at the URL (developer.paypal.com/api/rest/webhooks/rest)

Digests are compared in constant time, each with each, whichever fits. Times may be off both ways, and no more: an older message
is a replay, a newer one would be a replay to come. Where no secret is set, nothing is believed.

**PayPal signs 32 bits of a body.** Whoever has one signature makes as many other bodies for it as they like: what such a body
says of money or of a subscription is not known until its object was fetched again.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from portico.kit.signing import MAX_SIGNATURES, TOLERANCE_SECONDS

STRIPE: Final = "stripe-signature"
RAZORPAY: Final = "x-razorpay-signature"
PAYPAL_ID, PAYPAL_TIME, PAYPAL_SIG = "paypal-transmission-id", "paypal-transmission-time", "paypal-transmission-sig"
PAYPAL_CERT, PAYPAL_ALGO = "paypal-cert-url", "paypal-auth-algo"
PAYPAL_FIELDS: Final = (PAYPAL_ID, PAYPAL_TIME, PAYPAL_SIG, PAYPAL_CERT, PAYPAL_ALGO)
#: Characters of a signature's field, and of any other field that is looked at.
FIELD_CHARS: Final = 4096
_SHORT_CHARS: Final = 255
#: PayPal serves its certificates below this path.
CERT_PATH: Final = "/v1/notifications/certs/"
_CERT_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)")
#: A certificate's PEM, its chain included; certificates in it; bits of its key.
CERT_BYTES: Final = 65_536
_CERT_CHAIN: Final = 8
_RSA_BITS: Final = 2048

Fault = Literal[
    "no_secret", "missing", "malformed", "stale", "future", "mismatch", "algorithm", "cert_url", "certificate"
]
FAULTS: Final[tuple[Fault, ...]] = (
    "no_secret", "missing", "malformed", "stale", "future", "mismatch", "algorithm", "cert_url", "certificate",
)  # fmt: skip


class Unbelieved(Exception):
    """A message is not known to be its provider's. ``fault``: ``no_secret`` (none is set, so nothing can be right), a header is
    ``missing`` or ``malformed``, its time is ``stale`` or of the ``future``, no signature fits (``mismatch``); of PayPal: another
    ``algorithm``, a ``cert_url`` that is not PayPal's, a ``certificate`` that is not."""

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(detail)
        self.fault: Fault = fault


def fresh(at: float, now: float, past_seconds: float, future_seconds: float) -> None:
    """Raises :class:`Unbelieved` for a time that is too far from ``now``, either way."""
    if not at >= now - past_seconds:
        raise Unbelieved("stale", f"its time is more than {past_seconds:g} s ago")
    if not at <= now + future_seconds:
        raise Unbelieved("future", f"its time is more than {future_seconds:g} s ahead")


# -- Stripe --------------------------------------------------------------------------------------------------------------


def stripe_header(secrets: Sequence[str], timestamp: int, body: bytes) -> str:
    """``Stripe-Signature`` as Stripe makes it, one ``v1`` for each secret in use: for simulators and tests."""
    made = [f"v1={_mac(secret, b'%d.%b' % (timestamp, body)).decode()}" for secret in secrets]
    return ",".join((f"t={timestamp}", *made))


def verify_stripe(
    secrets: Sequence[str], header: str, body: bytes, now: float, tolerance_seconds: float = TOLERANCE_SECONDS
) -> int:
    """Which of ``secrets`` signed ``body``, by its place; raises :class:`Unbelieved`.

    Schemes other than ``v1`` are not looked at: whoever could choose one would choose the weakest.
    """
    _need(secrets, header)
    stamps, candidates = [], []
    for part in header.split(","):
        name, _, value = part.strip(" ").partition("=")
        if name == "t":
            stamps.append(value)
        elif name == "v1":
            candidates.append(value.encode("ascii", "replace"))
    if len(stamps) != 1 or not (stamps[0].isascii() and stamps[0].isdigit() and len(stamps[0]) <= 12):
        raise Unbelieved("malformed", "one t=SECONDS is needed")
    if not 0 < len(candidates) <= MAX_SIGNATURES:
        raise Unbelieved("malformed", f"1 to {MAX_SIGNATURES} signatures of the scheme v1 are needed")
    # The text that was signed, not the number: 0161… and 161… are not the same message.
    found = _signer(secrets, b"%b.%b" % (stamps[0].encode(), body), candidates)
    fresh(int(stamps[0]), now, tolerance_seconds, tolerance_seconds)
    if found is None:
        raise Unbelieved("mismatch", "no signature fits")
    return found


# -- Razorpay ------------------------------------------------------------------------------------------------------------


def razorpay_header(secret: str, body: bytes) -> str:
    """``X-Razorpay-Signature`` as Razorpay makes it: for simulators and tests."""
    return _mac(secret, body).decode()


def verify_razorpay(secrets: Sequence[str], header: str, body: bytes) -> int:
    """Which of ``secrets`` signed ``body``, by its place; raises :class:`Unbelieved`. When it was made is for the body to say."""
    _need(secrets, header)
    if len(header) != 64 or not header.isascii():
        raise Unbelieved("malformed", "a signature has 64 hexadecimal digits")
    found = _signer(secrets, body, [header.encode()])
    if found is None:
        raise Unbelieved("mismatch", "no signature fits")
    return found


def _need(secrets: Sequence[str], header: str) -> None:
    if not secrets or not all(secrets):
        raise Unbelieved("no_secret", "no secret is set: nothing is believed")
    if not header:
        raise Unbelieved("missing", "there is no signature")
    if len(header) > FIELD_CHARS:
        raise Unbelieved("malformed", f"a signature has at most {FIELD_CHARS} characters")


def _signer(secrets: Sequence[str], signed: bytes, candidates: Sequence[bytes]) -> int | None:
    """The place of the first secret that made one of ``candidates``; each is compared with each."""
    found = None
    for place, secret in reversed(list(enumerate(secrets))):
        wanted = _mac(secret, signed)
        fits = False
        for candidate in candidates:
            fits |= hmac.compare_digest(wanted, candidate)
        found = place if fits else found
    return found


def _mac(secret: str, signed: bytes) -> bytes:
    return hmac.digest(secret.encode(), signed, hashlib.sha256).hex().encode()


# -- PayPal --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Transmission:
    """What PayPal's headers say of one delivery. ``time_text`` is what was signed, ``time`` what it means."""

    id: str
    time_text: str
    time: datetime
    signature: bytes
    cert_url: str

    def signed(self, webhook_id: str, body: bytes) -> bytes:
        """The bytes that PayPal signs."""
        return f"{self.id}|{self.time_text}|{webhook_id}|{zlib.crc32(body)}".encode()


def transmission(given: Mapping[str, str], origins: Sequence[str]) -> Transmission:
    """The headers (by lower-case name) of a delivery; raises :class:`Unbelieved`.

    ``origins`` (``https://api.paypal.com``) are those that a certificate may be had from: who names the key that proves a message
    could else name their own.
    """
    values = [given.get(name, "") for name in PAYPAL_FIELDS]
    if not all(values):
        raise Unbelieved("missing", f"{', '.join(PAYPAL_FIELDS)} are needed")
    made, stamp, signature, url, algorithm = values
    if len(signature) > FIELD_CHARS or any(len(text) > _SHORT_CHARS for text in (made, stamp, url, algorithm)):
        raise Unbelieved("malformed", "a header is too long")
    if algorithm.lower() != "sha256withrsa":
        raise Unbelieved("algorithm", "only SHA256withRSA is believed")
    if not _TOKEN.fullmatch(made) or not _TIME.fullmatch(stamp):
        raise Unbelieved("malformed", f"{PAYPAL_ID} or {PAYPAL_TIME} is not as PayPal has it")
    check_cert_url(url, origins)
    try:
        raw = base64.b64decode(signature, validate=True)
        at = datetime.fromisoformat(stamp).astimezone(UTC)
    except (binascii.Error, ValueError, OverflowError):
        raise Unbelieved("malformed", f"{PAYPAL_SIG} or {PAYPAL_TIME} cannot be read") from None
    return Transmission(made, stamp, at, raw, url)


def check_cert_url(url: str, origins: Sequence[str]) -> None:
    """Raises :class:`Unbelieved` unless ``url`` names a certificate at one of ``origins``, written in its one plain way."""
    for origin in origins:
        name = url.removeprefix(origin + CERT_PATH)
        if name != url and _CERT_NAME.fullmatch(name):
            return
    raise Unbelieved("cert_url", "the certificate is not at PayPal")


def verify_paypal(key: rsa.RSAPublicKey, sent: Transmission, webhook_id: str, body: bytes) -> None:
    """Raises :class:`Unbelieved` unless ``key`` signed this delivery for our webhook."""
    if not webhook_id:
        raise Unbelieved("no_secret", "no webhook id is set: nothing is believed")
    try:
        key.verify(sent.signature, sent.signed(webhook_id, body), padding.PKCS1v15(), SHA256())
    except InvalidSignature:
        raise Unbelieved("mismatch", "the signature does not fit") from None


def roots(pem: bytes) -> Store:
    """Trusted certificates. Raises ``ValueError`` for text that holds none."""
    return Store(x509.load_pem_x509_certificates(pem))


def certificate_key(
    pem: bytes, trusted: Store, names: Sequence[str], now: datetime
) -> tuple[rsa.RSAPublicKey, datetime]:
    """The key of PayPal's certificate and when it ends; raises :class:`Unbelieved`.

    ``pem`` is the certificate, with others of its chain after it. It must be good at ``now``, lead to a root in ``trusted``, and
    be for one of ``names``; one such may be ``*.example.com``: any one name below.
    """
    if len(pem) > CERT_BYTES:
        raise Unbelieved("certificate", f"a certificate has at most {CERT_BYTES} bytes")
    try:
        leaf, *others = x509.load_pem_x509_certificates(pem)
        alternatives = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        held = alternatives.get_values_for_type(x509.DNSName)
        key = leaf.public_key()
    except (ValueError, x509.ExtensionNotFound, UnsupportedAlgorithm):
        raise Unbelieved("certificate", "what came back is no certificate") from None
    if len(others) >= _CERT_CHAIN:
        raise Unbelieved("certificate", "its chain is too long")
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size < _RSA_BITS:
        raise Unbelieved("certificate", f"its key is not RSA of {_RSA_BITS} bits or more")
    pairs = ((each.lower(), name.lower()) for each in held for name in names)
    subject = next((found for pair in pairs if (found := _subject(*pair))), None)
    if subject is None:
        raise Unbelieved("certificate", f"the certificate is not for {' or '.join(names)}")
    try:
        PolicyBuilder().store(trusted).time(now).build_server_verifier(x509.DNSName(subject)).verify(leaf, others)
    except (VerificationError, ValueError):
        raise Unbelieved(
            "certificate", "the certificate is not good: expired, or no trusted root leads to it"
        ) from None
    return key, leaf.not_valid_after_utc


def _subject(held: str, name: str) -> str | None:
    """The name to verify a certificate for, if ``held``, which it has, is one that ``name`` stands for."""
    if not name.startswith("*."):
        return held if held == name else None
    label, _, rest = held.partition(".")
    if rest != name[2:] or not label:
        return None
    return f"any.{rest}" if label == "*" else held
