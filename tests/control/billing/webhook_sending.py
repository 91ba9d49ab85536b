"""Payment providers that send events, for tests: their signatures made by hand, so that a fault in ours cannot hide itself."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import datetime as dt
import functools
import hashlib
import hmac
import itertools
import json
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from portico.settings import ApiSettings, Secret

STRIPE_SECRET, STRIPE_OLD = "whsec_current", "whsec_before"
RAZORPAY_SECRET, RAZORPAY_OLD = "razor current", "razor before"
WEBHOOK_ID = "9XL90610J3647323C"
ACCOUNTS = {"stripe": "acct_ours", "razorpay": "acc_ours", "paypal": "MERCHANT1"}
NAME = "messageverificationcerts.paypal.com"
_numbers = itertools.count(1)


def with_providers(settings: ApiSettings, **more: Any) -> ApiSettings:
    """Settings with all three providers."""
    given: dict[str, Any] = {
        "stripe_secret_key": Secret("sk_test_1"), "stripe_account": ACCOUNTS["stripe"],
        "stripe_webhook_secret": Secret(STRIPE_SECRET), "stripe_webhook_secret_old": Secret(STRIPE_OLD),
        "razorpay_key_id": "rzp_test_1", "razorpay_key_secret": Secret("x"), "razorpay_account": ACCOUNTS["razorpay"],
        "razorpay_webhook_secret": Secret(RAZORPAY_SECRET), "razorpay_webhook_secret_old": Secret(RAZORPAY_OLD),
        "paypal_client_id": "client", "paypal_client_secret": Secret("x"), "paypal_account": ACCOUNTS["paypal"],
        "paypal_webhook_id": WEBHOOK_ID, "billing_webhook_activity_seconds": 3600.0,
        "billing_webhook_certificate_refresh_seconds": 0.0, "stripe_prices": ("pro=price_1",),
        "razorpay_plans": ("pro=plan_1",), "paypal_plans": ("pro=P-1",), "paypal_api_url": "http://127.0.0.1:9",
    }  # fmt: skip
    return dataclasses.replace(settings, **given | more)


# -- bodies and signatures -----------------------------------------------------------------------------------------------


def body_of(provider: str, now: dt.datetime, **more: Any) -> dict[str, Any]:
    """An event about a subscription that nobody has; ``more`` replaces members, and ``None`` drops them."""
    number, at = next(_numbers), int(now.timestamp())
    made: dict[str, dict[str, Any]] = {
        "stripe": {
            "id": f"evt_{number}", "object": "event", "api_version": "2025-09-30.clover", "created": at, "livemode": False,
            "type": "customer.subscription.updated",
            "data": {"object": {"id": f"sub_{number}", "object": "subscription", "customer": f"cus_{number}",
                                "status": "active"}},
        },
        "razorpay": {
            "entity": "event", "account_id": ACCOUNTS["razorpay"], "event": "subscription.activated",
            "contains": ["subscription"], "created_at": at,
            "payload": {"subscription": {"entity": {"id": f"sub_{number}", "plan_id": "plan_1", "status": "active"}}},
        },
        "paypal": {
            "id": f"WH-{number}", "event_version": "1.0", "create_time": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "resource_type": "subscription", "event_type": "BILLING.SUBSCRIPTION.ACTIVATED",
            "resource": {"id": f"I-{number}", "plan_id": "P-1", "status": "ACTIVE"},
        },
    }  # fmt: skip
    return {name: value for name, value in (made[provider] | more).items() if value is not None}


def hexmac(secret: str, signed: bytes) -> str:
    return hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()


def stripe_fields(body: bytes, at: int, *secrets: str) -> dict[str, str]:
    parts = [f"v1={hexmac(secret, f'{at}.'.encode() + body)}" for secret in secrets]
    return {"stripe-signature": ",".join([f"t={at}", *parts])}


def razorpay_fields(body: bytes, event: str | None, secret: str = RAZORPAY_SECRET) -> dict[str, str]:
    return {"x-razorpay-signature": hexmac(secret, body)} | ({"x-razorpay-event-id": event} if event else {})


# -- PayPal --------------------------------------------------------------------------------------------------------------


@functools.cache
def _key(number: int, bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@dataclass
class Authority:
    """A root, and certificates below it."""

    number: int = 0
    root: x509.Certificate = field(init=False)

    def __post_init__(self) -> None:
        now, key = dt.datetime.now(dt.UTC), _key(self.number)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"root {self.number}")])
        self.root = (
            _builder(name, name, key.public_key(), now - dt.timedelta(days=900), now + dt.timedelta(days=900))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )  # fmt: skip

    @property
    def pem(self) -> bytes:
        return self.root.public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str = NAME, *, days: tuple[int, int] = (-1, 90), bits: int = 2048) -> bytes:
        """A certificate, its key being that of :func:`leaf_key`."""
        now, key = dt.datetime.now(dt.UTC), leaf_key(bits)
        start, end = (now + dt.timedelta(days=each) for each in days)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = (
            _builder(subject, self.root.subject, key.public_key(), start, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(_key(self.number).public_key()), critical=False)
            .sign(_key(self.number), hashes.SHA256())
        )  # fmt: skip
        return made.public_bytes(serialization.Encoding.PEM)


def leaf_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    return _key(99, bits)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: rsa.RSAPublicKey, start: dt.datetime, end: dt.datetime
) -> x509.CertificateBuilder:
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return made.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=ca, crl_sign=ca, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def paypal_fields(
    body: bytes, at: dt.datetime, url: str, *, transmission: str = "", webhook: str = WEBHOOK_ID, bits: int = 2048
) -> dict[str, str]:
    sent, stamp = transmission or f"t-{next(_numbers)}", at.strftime("%Y-%m-%dT%H:%M:%SZ")
    signed = f"{sent}|{stamp}|{webhook}|{zlib.crc32(body)}".encode()
    signature = leaf_key(bits).sign(signed, padding.PKCS1v15(), hashes.SHA256())
    return {
        "paypal-transmission-id": sent, "paypal-transmission-time": stamp, "paypal-auth-algo": "SHA256withRSA",
        "paypal-transmission-sig": base64.b64encode(signature).decode(), "paypal-cert-url": url,
    }  # fmt: skip


def colliding(genuine: bytes, wanted: Mapping[str, Any]) -> bytes:
    """A body that says ``wanted`` and has the CRC-32 of ``genuine``, for which PayPal's signature was made.

    CRC-32 is affine: each of 64 characters that is `0` or `1` toggles a pattern of its own, and 32 equations say which to take.
    """
    head, tail = json.dumps(wanted).encode()[:-1] + b', "x": "', b'"}'
    digits = 64
    start = zlib.crc32(head + b"0" * digits + tail)
    basis: dict[int, tuple[int, int]] = {}
    for place in range(digits):
        text = bytearray(b"0" * digits)
        text[place] = ord("1")
        pattern, mask = zlib.crc32(head + text + tail) ^ start, 1 << place
        while pattern and (top := pattern.bit_length()) in basis:
            pattern, mask = pattern ^ basis[top][0], mask ^ basis[top][1]
        if pattern:
            basis[pattern.bit_length()] = (pattern, mask)
    need, chosen = start ^ zlib.crc32(genuine), 0
    while need:
        pattern, mask = basis[need.bit_length()]
        need, chosen = need ^ pattern, chosen ^ mask
    made = head + bytes(ord("1") if chosen >> place & 1 else ord("0") for place in range(digits)) + tail
    assert zlib.crc32(made) == zlib.crc32(genuine)
    return made


@dataclass
class CertificateServer:
    """What PayPal serves certificates from. ``status`` is answered instead of 200 while it is set."""

    origin: str
    served: dict[str, bytes] = field(default_factory=dict)
    status: int | None = None
    asked: list[str] = field(default_factory=list)

    def url(self, name: str = "CERT-1") -> str:
        return f"{self.origin}/v1/notifications/certs/{name}"


@asynccontextmanager
async def certificate_server() -> AsyncIterator[CertificateServer]:
    made = CertificateServer("")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        name = head.split(b" ")[1].decode().rpartition("/")[2]
        made.asked.append(name)
        body = made.served.get(name, b"")
        status = made.status or (200 if body else 404)
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    made.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield made


# -- sending -------------------------------------------------------------------------------------------------------------


@dataclass
class Sender:
    """Posts events as their providers do."""

    client: httpx.AsyncClient
    clock: Any
    certificates: CertificateServer | None = None

    def fields(self, provider: str, raw: bytes, *, shift: float = 0.0, **how: Any) -> dict[str, str]:
        at = self.clock.wall() + dt.timedelta(seconds=shift)
        if provider == "stripe":
            return stripe_fields(raw, int(at.timestamp()), *how.get("secrets", (STRIPE_SECRET,)))
        if provider == "razorpay":
            event = how.get("event", f"rzp{hashlib.sha256(raw).hexdigest()[:14]}")
            return razorpay_fields(raw, event, how.get("secret", RAZORPAY_SECRET))
        url = how.pop("url", self.certificates.url() if self.certificates else "")
        return paypal_fields(raw, at, url, **how)

    async def send(
        self, provider: str, document: Mapping[str, Any] | bytes | None = None, *,
        change: Mapping[str, str | None] | None = None, body: bytes | None = None, **how: Any,
    ) -> httpx.Response:  # fmt: skip
        """Sign and post; afterwards ``change`` replaces header fields (``None`` drops them) and ``body`` the body."""
        if document is None:
            document = body_of(provider, self.clock.wall())
        raw = document if isinstance(document, bytes) else json.dumps(document).encode()
        given = {**self.fields(provider, raw, **how), "content-type": "application/json", **(change or {})}
        fields = {name: value for name, value in given.items() if value is not None}
        return await self.client.post(f"/v1/billing/webhooks/{provider}", content=body or raw, headers=fields)


def trust(folder: Path, authority: Authority) -> Path:
    """A file with the root that vouches for PayPal's certificates."""
    path = folder / "paypal-ca.pem"
    path.write_bytes(authority.pem)
    return path
