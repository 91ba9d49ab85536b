"""Signatures of payment providers: what is believed, and what is not, and why."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from portico.kit import provider_signatures as signatures
from portico.kit.provider_signatures import Unbelieved
from tests.control.billing.webhook_sending import (
    WEBHOOK_ID,
    Authority,
    colliding,
    hexmac,
    leaf_key,
    paypal_fields,
    stripe_fields,
)

BODY = b'{"id": "evt_1",  "amount": 4900}'
NOW = 1_790_000_000
AT = datetime.fromtimestamp(NOW, UTC)
ORIGINS = ("https://api.paypal.com",)
URL = "https://api.paypal.com/v1/notifications/certs/CERT-360caa42-fca2a594"


def fault(call: Any, *given: Any, **more: Any) -> str:
    with pytest.raises(Unbelieved) as refused:
        call(*given, **more)
    return refused.value.fault


# -- Stripe


def test_stripe_is_believed_by_any_secret_in_use() -> None:
    both = stripe_fields(BODY, NOW, "old", "whsec_new")["stripe-signature"]
    assert signatures.verify_stripe(["whsec_new", "old"], both, BODY, NOW) == 0
    assert signatures.verify_stripe(["whsec_newer", "old"], both, BODY, NOW) == 1
    assert signatures.stripe_header(["old", "whsec_new"], NOW, BODY) == both, "as a sender makes it"
    # What is not `v1` is passed over, wherever it stands.
    assert signatures.verify_stripe(["old"], f"v0={'0' * 64},{both},v2=x", BODY, NOW) == 0


STRIPE = hexmac("s", b"%d." % NOW + BODY)
STRIPE_CASES: dict[str, tuple[str, bytes, int, str]] = {
    "nothing": ("", BODY, NOW, "missing"),
    "another secret": (f"t={NOW},v1={hexmac('t', b'%d.' % NOW + BODY)}", BODY, NOW, "mismatch"),
    "no time": (f"v1={STRIPE}", BODY, NOW, "malformed"),
    "two times": (f"t={NOW},t={NOW + 1},v1={STRIPE}", BODY, NOW, "malformed"),
    "a time that is none": (f"t=²,v1={STRIPE}", BODY, NOW, "malformed"),
    "no signature": (f"t={NOW}", BODY, NOW, "malformed"),
    "another scheme": (f"t={NOW},v0={STRIPE}", BODY, NOW, "malformed"),
    "too many": (f"t={NOW}" + f",v1={STRIPE}" * 21, BODY, NOW, "malformed"),
    "too long": (f"t={NOW},v1={STRIPE},v0=" + "0" * 5000, BODY, NOW, "malformed"),
    "stale": (f"t={NOW},v1={STRIPE}", BODY, NOW + 301, "stale"),
    "of the future": (f"t={NOW},v1={STRIPE}", BODY, NOW - 301, "future"),
    "another time than the signed one": (f"t={NOW + 1},v1={STRIPE}", BODY, NOW, "mismatch"),
    "the same number in other digits": (f"t=0{NOW},v1={STRIPE}", BODY, NOW, "mismatch"),
    "in capitals": (f"t={NOW},v1={STRIPE.upper()}", BODY, NOW, "mismatch"),
    "cut": (f"t={NOW},v1={STRIPE[:-1]}", BODY, NOW, "mismatch"),
    "the body cut": (f"t={NOW},v1={STRIPE}", BODY[:-1], NOW, "mismatch"),
    "the body in other bytes": (f"t={NOW},v1={STRIPE}", BODY.replace(b"  ", b" "), NOW, "mismatch"),
    "not ASCII": (f"t={NOW},v1=é{STRIPE[1:]}", BODY, NOW, "mismatch"),
}


@pytest.mark.parametrize("case", STRIPE_CASES)
def test_stripe_is_not(case: str) -> None:
    header, body, now, why = STRIPE_CASES[case]
    assert fault(signatures.verify_stripe, ["s"], header, body, now) == why


def test_time_counts_both_ways_to_the_second() -> None:
    header = f"t={NOW},v1={STRIPE}"
    for now in (NOW - 300, NOW + 300):
        assert signatures.verify_stripe(["s"], header, BODY, now) == 0


def test_without_a_secret_nothing_is_believed() -> None:
    # HMAC under an empty key is a signature that anybody can make.
    for secrets in ([], [""], ["s", ""]):
        assert (
            fault(signatures.verify_stripe, secrets, stripe_fields(BODY, NOW, "")["stripe-signature"], BODY, NOW)
            == "no_secret"
        )
        assert fault(signatures.verify_razorpay, secrets, hexmac("", BODY), BODY) == "no_secret"
    sent = signatures.transmission(paypal_fields(BODY, AT, URL, webhook=""), ORIGINS)
    assert fault(signatures.verify_paypal, leaf_key().public_key(), sent, "", BODY) == "no_secret"


# -- Razorpay


def test_razorpay() -> None:
    header = signatures.razorpay_header("new", BODY)
    assert header == hexmac("new", BODY)
    assert signatures.verify_razorpay(["new", "old"], header, BODY) == 0
    assert signatures.verify_razorpay(["new", "old"], hexmac("old", BODY), BODY) == 1
    for given, body, why in (
        ("", BODY, "missing"), (header[:-1], BODY, "malformed"), (header + "0", BODY, "malformed"),
        (header.upper(), BODY, "mismatch"), ("é" * 64, BODY, "malformed"), (header, BODY + b"\n", "mismatch"),
        (hexmac("older", BODY), BODY, "mismatch"),
    ):  # fmt: skip
        assert fault(signatures.verify_razorpay, ["new", "old"], given, body) == why


# -- PayPal


def test_paypal_signs_a_checksum_and_no_more() -> None:
    sent = signatures.transmission(paypal_fields(BODY, AT, URL), ORIGINS)
    key = leaf_key().public_key()
    signatures.verify_paypal(key, sent, WEBHOOK_ID, BODY)
    assert sent.time == AT
    for body, webhook in ((BODY[:-1], WEBHOOK_ID), (BODY + b" ", WEBHOOK_ID), (BODY, "9XL90610J3647323D")):
        assert fault(signatures.verify_paypal, key, sent, webhook, body) == "mismatch"
    # The weakness that every event is fetched again for.
    signatures.verify_paypal(key, sent, WEBHOOK_ID, colliding(BODY, {"id": "evt_1", "amount": 1}))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"paypal-transmission-id": ""}, "missing"),
        ({"paypal-cert-url": ""}, "missing"),
        ({"paypal-auth-algo": "SHA1withRSA"}, "algorithm"),
        ({"paypal-auth-algo": "none"}, "algorithm"),
        ({"paypal-transmission-id": "a|2026-01-01T00:00:00Z|b"}, "malformed"),
        ({"paypal-transmission-time": "2026-01-01"}, "malformed"),
        ({"paypal-transmission-time": "2026-13-01T00:00:00Z"}, "malformed"),
        ({"paypal-transmission-time": "2026-01-01T00:00:00"}, "malformed"),
        ({"paypal-transmission-sig": "not base64!"}, "malformed"),
        ({"paypal-transmission-sig": "A" * 5000}, "malformed"),
    ],
)
def test_headers_of_paypal(change: dict[str, str], why: str) -> None:
    assert fault(signatures.transmission, paypal_fields(BODY, AT, URL) | change, ORIGINS) == why


@pytest.mark.parametrize(
    "url",
    [
        "http://api.paypal.com/v1/notifications/certs/CERT-1",
        "https://api.paypal.com.evil.example/v1/notifications/certs/CERT-1",
        "https://api.paypal.com@evil.example/v1/notifications/certs/CERT-1",
        "https://evil.example/https://api.paypal.com/v1/notifications/certs/CERT-1",
        "https://api.paypal.com:444/v1/notifications/certs/CERT-1",
        "https://api.paypal.com/v1/notifications/certs/../../evil",
        "https://api.paypal.com/v1/notifications/certs/%2e%2e",
        "https://api.paypal.com/v1/notifications/certs/CERT-1?x=1",
        "https://api.paypal.com/v1/notifications/certs/CERT-1#x",
        "https://api.paypal.com/v1/notifications/certs/CERT-1/x",
        "https://api.paypal.com/v1/notifications/certs/",
        "https://api.paypal.com/v1/notifications/certs/CERT-1\n",
        "https://api.paypal.com\\@evil.example/v1/notifications/certs/CERT-1",
        "https://API.PAYPAL.COM/v1/notifications/certs/CERT-1",
        "https://api.sandbox.paypal.com/v1/notifications/certs/CERT-1",
        "file:///v1/notifications/certs/CERT-1",
    ],
)
def test_certificates_are_had_from_paypal_alone(url: str) -> None:
    assert fault(signatures.check_cert_url, url, ORIGINS) == "cert_url"


def test_the_certificate_is_paypals() -> None:
    authority, now = Authority(), datetime.now(UTC)
    trusted, names = signatures.roots(authority.pem), ("*.paypal.com",)
    key, until = signatures.certificate_key(authority.issue(), trusted, names, now)
    assert key.public_numbers() == leaf_key().public_key().public_numbers()
    assert until > now
    signatures.certificate_key(authority.issue("a.sandbox.paypal.com"), trusted, (*names, "*.sandbox.paypal.com"), now)
    signatures.certificate_key(authority.issue("*.paypal.com"), trusted, names, now)
    bad = {
        "expired": authority.issue(days=(-90, -1)),
        "not yet good": authority.issue(days=(1, 90)),
        "of another root": Authority(1).issue(),
        "for somebody else": authority.issue("messageverificationcerts.paypal.com.evil.example"),
        "for nobody below": authority.issue("paypal.com"),
        "for the tests' host": authority.issue("messageverificationcerts.sandbox.paypal.com"),
        "of a short key": authority.issue(bits=1024),
        "the root itself": authority.pem,
        "none": b"hello",
        "too long": authority.issue() + b"\n" * 70_000,
        "a long chain": authority.issue() + authority.pem * 8,
    }
    for case, pem in bad.items():
        assert fault(signatures.certificate_key, pem, trusted, names, now) == "certificate", case
    assert (
        fault(signatures.certificate_key, authority.issue(), trusted, names, now + timedelta(days=91)) == "certificate"
    )


def test_a_signature_of_another_key_is_none() -> None:
    fields = paypal_fields(BODY, AT, URL)
    raw = bytearray(base64.b64decode(fields["paypal-transmission-sig"]))
    raw[-1] ^= 1
    sent = signatures.transmission(fields | {"paypal-transmission-sig": base64.b64encode(raw).decode()}, ORIGINS)
    assert fault(signatures.verify_paypal, leaf_key().public_key(), sent, WEBHOOK_ID, BODY) == "mismatch"
    cut = fields | {"paypal-transmission-sig": base64.b64encode(raw[:-1]).decode()}
    assert (
        fault(
            signatures.verify_paypal, leaf_key().public_key(), signatures.transmission(cut, ORIGINS), WEBHOOK_ID, BODY
        )
        == "mismatch"
    )
