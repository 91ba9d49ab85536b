"""RFC 9421: its own known answers, and what must not be believed."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key

from portico.kit import http_signatures
from portico.kit.http_signatures import Target, base, digest, digest_fits, read_input, read_signature

# The test request of appendix B.2, its shared secret (B.1.5) and its Ed25519 key (B.1.4).
TARGET = Target("POST", "example.com", "/foo")
FIELDS = {
    "date": "Tue, 20 Apr 2021 02:07:55 GMT",
    "content-type": "application/json",
    "content-length": "18",
}
BODY = b'{"hello": "world"}'
SECRET = base64.b64decode("uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ==")
PUBLIC = base64.b64decode("MCowBQYDK2VwAyEAJrQLj5P/89iXES9+vFgrIy29clF9CC/oPPsw3c5D0bs=")
RFC_DIGEST = "sha-512=:WZDPaVn/7XgHaAy8pmojAkGWoRx2UFChF41A2svX+TaPm+AbwAgBWnrIiYllu7BNNyealdVLvRwEmTHWXvJwew==:"


def test_the_rfcs_hmac() -> None:
    found = read_input('sig-b25=("date" "@authority" "content-type");created=1618884473;keyid="test-shared-secret"')
    signature = read_signature("sig-b25=:pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=:", found.label)
    assert hmac.digest(SECRET, base(found, TARGET, FIELDS), hashlib.sha256) == signature
    assert (found.number("created"), found.text("keyid"), found["tag"]) == (1618884473, "test-shared-secret", None)


def test_the_rfcs_ed25519() -> None:
    text = '("date" "@method" "@path" "@authority" "content-type" "content-length");created=1618884473;keyid="test-key-ed25519"'
    found = read_input(f"sig-b26={text}")
    signature = read_signature(
        "sig-b26=:wqcAqbmYJ2ji2glfAMaRy4gruYYnx2nEFN2HN6jrnDnQCK1u02Gb04v9EDgwUPiu4A0w6vuQv5lIp5WPpBKRCw==:", "sig-b26"
    )
    key = load_der_public_key(PUBLIC)
    assert isinstance(key, Ed25519PublicKey)
    key.verify(signature, base(found, TARGET, FIELDS))


def test_digests() -> None:
    assert digest_fits(RFC_DIGEST, BODY), "RFC 9530's own"
    assert digest_fits(digest(BODY), BODY)
    assert digest_fits(f"{digest(BODY)}, {RFC_DIGEST}", BODY)
    assert digest_fits(f"md5=:AAAA:, {digest(BODY)}", BODY), "one that nobody should use says nothing"
    for wrong in ("", "md5=:AAAA:", digest(b"other"), f"{digest(BODY)}, {digest(b'other')}", "sha-256=:!:", "sha-256"):
        assert not digest_fits(wrong, BODY), wrong


@pytest.mark.parametrize(
    "field",
    [
        "",
        'sig=("@method")  ;created=1',
        'sig=("@method"),other=("@path")',
        'sig=("@method" "@method")',
        'sig=("@method");created=1;created=2',
        'sig=("@method");created=01',
        'sig=("@method";sf)',
        'sig=( "@method")',
        'sig=("@method");keyid="a\\"b"',
        "sig=(" + " ".join(f'"x{n}"' for n in range(21)) + ")",
    ],
)
def test_other_spellings_are_not_read(field: str) -> None:
    with pytest.raises(ValueError, match=r"Signature-Input|twice"):
        read_input(field)


def test_what_is_covered_must_be_there() -> None:
    for component in ("digest", "@query", "Content-Type", "@target-uri"):
        with pytest.raises(ValueError, match="not there"):
            base(read_input(f'sig=("{component}")'), TARGET, FIELDS)
    with pytest.raises(ValueError, match="more than one line"):
        base(read_input('sig=("date")'), TARGET, {"date": "a\n b"})
    with pytest.raises(ValueError, match="tells of"):
        read_signature("other=:AAAA:", "sig")


def test_authority() -> None:
    assert http_signatures.authority("API.example.com:443") == "api.example.com"
    assert http_signatures.authority("api.example.com:8443") == "api.example.com:8443"
    assert http_signatures.authority("api.example.com") == "api.example.com"
