"""A sealed version is held only when everything about it agrees; each test spoils one thing."""

from __future__ import annotations

import datetime as dt
import json
import ssl
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from portico.kit.envelope import Keys
from portico.kit.jwt import KeySet, SigningKey
from portico.relay import certificates
from portico.relay.sealed import Trust, Unusable, parse
from tests.relay.authorities import certificate
from tests.relay.sealing import REGION_KEY, SIGNER, TRUST, Sealed, sealed

NOW = dt.datetime.now(dt.UTC)


def refused(version: Sealed, match: str, trust: Trust = TRUST) -> None:
    with pytest.raises(Unusable, match=match):
        trust.hold(parse(version.bundle), now=NOW, load=True)


def pem(key: Any) -> bytes:
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return bytes(key.private_bytes(*form))


def test_a_good_one_is_held_without_its_key() -> None:
    version = sealed()
    held = TRUST.hold(parse(version.bundle), now=NOW, load=True)
    assert (held.id, held.version) == ("crt_dom_1_1", 1)
    assert held.certificate.names == {b"app.example.com"} and held.certificate.pem == b""
    assert version.key_pem() in held.certificate.material()
    assert isinstance(certificates.server_context(held.certificate), ssl.SSLContext)
    assert "PRIVATE" not in repr(held)


def test_a_wildcard_and_an_rsa_key() -> None:
    made = certificate("*.example.com", "example.com")
    held = TRUST.hold(parse(sealed("*.example.com", made=made).bundle), now=NOW, load=True)
    assert held.certificate.parents == {b"example.com"}
    short = sealed(key=pem(rsa.generate_private_key(65537, 1024)))
    refused(short, "too short")


def test_what_was_held_is_known_by_its_mark() -> None:
    """It says the same of itself, and opens; with another region's key, another signer, or a letter changed, it is not known."""
    held = TRUST.hold(parse(sealed().bundle), now=NOW, load=True)
    kept = TRUST.keep(held)
    found = TRUST.recall(json.loads(json.dumps(kept)), now=NOW)
    assert found == held and found is not None
    assert found.certificate.material() == held.certificate.material()
    assert TRUST.recall(kept, now=held.certificate.not_after) is None
    for other in (
        Trust("eu", TRUST.signers, Keys([X25519PrivateKey.generate()])),
        Trust("eu", KeySet.of([SigningKey.generate()]), TRUST.opener),
        Trust("us", TRUST.signers, TRUST.opener),
    ):
        assert other.recall(kept, now=NOW) is None
    for name in kept:
        spoilt = {**kept, name: 2} if name == "version" else {**kept, name: kept["mark"]}
        assert name == "mark" or TRUST.recall(spoilt, now=NOW) is None
    for nonsense in (None, [], {"mark": 1}, {"mark": "\u00e4"}, {"mark": ""}, {"mark": kept["mark"]}):
        assert TRUST.recall(nonsense, now=NOW) is None


def test_a_kms_makes_no_marks() -> None:
    """It would be asked for each: what was kept is looked at anew."""

    class Kms:
        def holds(self, key_id: str) -> bool:
            return TRUST.opener.holds(key_id)

        def unwrap(self, key_id: str, wrapped: bytes, info: bytes) -> bytes:
            return TRUST.opener.unwrap(key_id, wrapped, info)

    trust = Trust("eu", TRUST.signers, Kms())
    held = trust.hold(parse(sealed().bundle), now=NOW, load=True)
    assert trust.keep(held) == held.bundle.encode() and trust.recall(trust.keep(held), now=NOW) is None


def test_another_region_opens_nothing() -> None:
    version = sealed()
    us = X25519PrivateKey.generate()
    refused(version, "no key that is here", Trust("us", TRUST.signers, Keys([us])))
    refused(version, "does not open", Trust("us", TRUST.signers, Keys([REGION_KEY])))


def test_a_forged_manifest_is_refused() -> None:
    forger = SigningKey.generate()
    refused(sealed(signer=forger), "unknown key")
    refused(sealed(signer=SigningKey(forger.seed(), SIGNER.kid)), "signature is wrong")
    refused(sealed(), "unknown key", Trust("eu", KeySet.of([]), TRUST.opener))


@pytest.mark.parametrize(
    ("member", "value", "match"),
    [
        ("certificate", "crt_other", "of another certificate"),
        ("domain", "dom_2", "of another certificate"),
        ("version", 2, "of another certificate"),
        ("hostname", "other.example.com", "not for the host name"),
        ("fingerprint", "ab" * 32, "not that of the manifest"),
        ("chain", "ab" * 32, "not those of the manifest"),
        ("sealed", "ab" * 32, "not those of the manifest"),
    ],
)
def test_a_manifest_that_says_something_else(member: str, value: Any, match: str) -> None:
    version = sealed(spoilt={member: value})
    version.bundle |= {"certificate": "crt_dom_1_1", "domain": "dom_1", "version": 1}
    refused(version, match)


@pytest.mark.parametrize("part", ["sealed", "wraps", "chain", "manifest"])
def test_parts_of_two_versions_do_not_mix(part: str) -> None:
    one, other = sealed(version=1), sealed(version=2)
    one.bundle[part] = other.bundle[part]
    refused(one, "manifest|does not open")


def test_the_same_key_for_another_host_does_not_open() -> None:
    """Both are signed, with the same certificate: what is sealed for one host name is not opened for another."""
    made = certificate("app.example.com", "b.example.com")
    one, other = sealed(made=made), sealed("b.example.com", made=made)
    other.bundle["wraps"] = one.bundle["wraps"]
    refused(other, "does not open")


def test_a_key_that_is_not_the_leafs() -> None:
    refused(sealed(key=pem(ec.generate_private_key(ec.SECP256R1()))), "not that of the first certificate")
    refused(sealed(key=b"canary"), "no private key")
    refused(sealed(key=b""), "no private key")


def test_one_that_has_ended() -> None:
    refused(sealed(made=certificate("app.example.com", days_ago=4000)), "it ended at")


@pytest.mark.parametrize(
    "spoil",
    [
        {"sealed": "!"}, {"sealed": 1}, {"wraps": None}, {"wraps": [{}]}, {"wraps": [{"key_id": 1, "wrapped": ""}]},
        {"version": "1"}, {"version": True}, {"chain": "é"}, {"chain": None}, {"manifest": None}, {"certificate": 3},
        {"wraps": [{"key_id": "a", "wrapped": ""}] * 17}, {"chain": "x" * 300_000},
    ],
)  # fmt: skip
def test_what_is_no_bundle(spoil: dict[str, Any]) -> None:
    with pytest.raises(Unusable):
        parse(sealed().bundle | spoil)
    for value in (None, [], "text", {}):
        with pytest.raises(Unusable):
            parse(value)


def test_a_truncated_chain_or_key() -> None:
    for name in ("chain", "sealed", "manifest"):
        version = sealed()
        version.bundle[name] = version.bundle[name][: len(version.bundle[name]) // 8 * 4]
        refused(version, "manifest|form")
