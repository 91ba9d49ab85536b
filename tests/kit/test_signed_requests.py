"""The one verifier behind three codecs: each is believed when its own key signed it, and in no other case."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.kit import signed_requests, signing
from portico.kit.http_signatures import Target, digest
from portico.kit.signed_requests import Codec, Key, Presented, SigningKey, Unreadable, headers, present, public_key_of

TARGET = Target("POST", "api.example.com", "/v1/domains/cert-events")
BODY = b'{"eventId": "cev_1"}'
AT = 1_700_000_000
HMAC = SigningKey.of("k1", signing.new_secret())
PAIR = SigningKey.of("k2", "whsk_" + base64.b64encode(b"\x07" * 32).decode())
WAYS: list[tuple[Codec, SigningKey]] = [
    ("standard", HMAC), ("standard", PAIR), ("compact", HMAC), ("http", HMAC), ("http", PAIR),
]  # fmt: skip


def made(codec: Codec, key: SigningKey, body: bytes = BODY) -> dict[str, str]:
    return headers(codec, key, "src_1", "eu-1", "cev_1", AT, TARGET, body)


@pytest.mark.parametrize(("codec", "key"), WAYS)
def test_a_signed_request_is_known(codec: Codec, key: SigningKey) -> None:
    found = present(TARGET, made(codec, key), BODY)
    assert (found.codec, found.source, found.message_id, found.timestamp) == (codec, "src_1", "cev_1", AT)
    other = SigningKey.of("k3", signing.new_secret())
    assert found.signer([other.public, key.public]) == key.public
    assert found.signer([other.public]) is None
    assert found.signer([]) is None


@pytest.mark.parametrize(("codec", "key"), WAYS)
@given(at=st.integers(0, len(BODY) - 1), to=st.integers(0, 255))
def test_no_other_body(codec: Codec, key: SigningKey, at: int, to: int) -> None:
    other = BODY[:at] + bytes([to]) + BODY[at + 1 :]
    found = present(TARGET, made(codec, key), other).signer([key.public])
    assert (found is not None) is (other == BODY)


@pytest.mark.parametrize(("codec", "key"), WAYS)
def test_every_signed_field_counts(codec: Codec, key: SigningKey) -> None:
    good = made(codec, key)
    changed = {
        "standard": {signing.ID: "cev_2", signing.TIMESTAMP: str(AT + 1)},
        "compact": {
            signing.ID: "cev_2",
            signed_requests.SOURCE: "src_2",
            signed_requests.CLUSTER: "eu-2",
            signed_requests.COMPACT: good.get(signed_requests.COMPACT, "").replace(str(AT), str(AT + 1)),
        },
        "http": {"content-type": "text/plain", "content-digest": digest(b"other")},
    }[codec]
    for name, value in changed.items():
        assert present(TARGET, good | {name: value}, BODY).signer([key.public]) is None, name
    if codec != "standard":
        for target in (replace(TARGET, path="/v1/billing"), replace(TARGET, method="PUT")):
            assert present(target, good, BODY).signer([key.public]) is None
    if codec == "http":
        assert present(replace(TARGET, authority="evil.example"), good, BODY).signer([key.public]) is None
        assert present(TARGET, good, BODY).signer([replace(key.public, id="other")]) is None, "another keyid"


def test_a_public_key_is_no_shared_secret() -> None:
    """A verifier that took the algorithm from the message would take an HMAC under the public key, which everybody has."""
    forged = SigningKey(PAIR.id, "hmac", PAIR.public.material)
    codecs: tuple[Codec, ...] = ("standard", "http")
    for codec in codecs:
        assert present(TARGET, made(codec, forged), BODY).signer([PAIR.public]) is None


def test_several_signatures_one_of_which_fits() -> None:
    old = SigningKey.of("k0", signing.new_secret())
    both = made("standard", HMAC) | {
        signing.SIGNATURE: " ".join(made("standard", key)[signing.SIGNATURE] for key in (old, HMAC)) + " v9,AAAA"
    }
    assert present(TARGET, both, BODY).signer([HMAC.public]) == HMAC.public
    two = made("compact", HMAC)[signed_requests.COMPACT].replace(",v1=", ",v1=" + "0" * 64 + ",v1=")
    assert present(TARGET, made("compact", HMAC) | {signed_requests.COMPACT: two}, BODY).signer([HMAC.public])


def test_freshness_has_two_sides() -> None:
    found = present(TARGET, made("http", HMAC), BODY)
    assert all(found.fresh(AT + off, 300) for off in (-300, 0, 300))
    assert not any(found.fresh(AT + off, 300) for off in (-301, 301, float("nan")))
    assert not replace(found, expires=AT - 1).fresh(AT, 300), "its sender says that it is over"


@pytest.mark.parametrize(
    "change",
    [
        {signing.SIGNATURE: None},
        {signed_requests.COMPACT: "t=1,v1=" + "0" * 64},  # two ways at once
        {signing.SIGNATURE: "v1,!!"},
        {signing.SIGNATURE: "v2,AAAA"},
        {signing.SIGNATURE: " ".join(["v1,AAAA"] * 21)},
        {signing.TIMESTAMP: None},
        {signing.TIMESTAMP: "-1"},
        {signing.TIMESTAMP: "1" * 13},
        {signing.TIMESTAMP: "١٢"},
        {signing.ID: None},
        {signing.ID: "a.b"},
        {signed_requests.SOURCE: None},
        {signed_requests.SOURCE: "x" * 200},
        {signing.SIGNATURE: "v1," + "A" * 9000},
    ],
)
def test_what_cannot_be_read(change: dict[str, str | None]) -> None:
    fields = {name: value for name, value in (made("standard", HMAC) | change).items() if value is not None}
    with pytest.raises(Unreadable):
        present(TARGET, fields, BODY)


@pytest.mark.parametrize("gone", ["created", "expires", "keyid", "nonce", "tag", "cover", "digest"])
def test_rfc_9421_needs_all_of_it(gone: str) -> None:
    fields = made("http", HMAC)
    text = fields[signed_requests.INPUT]
    if gone == "digest":
        del fields[signed_requests.DIGEST]
    elif gone == "cover":
        text = text.replace(' "content-digest"', "")
    else:
        text = ";".join(part for part in text.split(";") if not part.startswith(f"{gone}="))
    with pytest.raises(Unreadable):
        present(TARGET, fields | {signed_requests.INPUT: text}, BODY)


def test_keys_as_text() -> None:
    public = "whpk_" + base64.b64encode(PAIR.public.material).decode()
    assert Key("k2", "ed25519", public_key_of(public)) == PAIR.public
    for wrong in ("whpk_", "whpk_AAAA", "whsec_" + "A" * 43 + "="):
        with pytest.raises((ValueError, Unreadable)):
            public_key_of(wrong)
    with pytest.raises(ValueError, match="shared secret"):
        made("compact", PAIR)


def test_presenting_proves_nothing() -> None:
    found: Presented = present(TARGET, made("standard", HMAC), b"")
    assert found.signer([HMAC.public]) is None
