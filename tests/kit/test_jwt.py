"""kit.jwt: only what SigningKey signs is accepted, and joserfc agrees in both directions."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
import warnings
from typing import Any

import pytest
from joserfc import jws
from joserfc.jwk import OKPKey

from portico.kit import jwt
from portico.kit.jwt import InvalidKey, InvalidToken, KeySet, SigningKey

TYP = "portico-test+jwt"


def b64(raw: bytes | str | dict[str, Any]) -> str:
    if isinstance(raw, dict):
        raw = json.dumps(raw)
    if isinstance(raw, str):
        raw = raw.encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def crafted(key: SigningKey, header: Any, payload: Any = '{"a":1}') -> str:
    """A token with a right signature over whatever header and payload."""
    signing_input = f"{b64(header)}.{b64(payload)}"
    return f"{signing_input}.{b64(key._key.sign(signing_input.encode()))}"


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture(scope="module")
def keys(key: SigningKey) -> KeySet:
    return KeySet.of([key])


@pytest.fixture(scope="module")
def header(key: SigningKey) -> dict[str, Any]:
    return {"alg": "EdDSA", "typ": TYP, "kid": key.kid}


class TestSign:
    def test_round_trip(self, key: SigningKey, keys: KeySet) -> None:
        claims = {"text": "ünï", "number": 2**53, "list": [1, None, True]}
        assert jwt.verify(key.sign(TYP, claims), keys, typ=TYP) == claims

    def test_too_large_is_refused_when_signing(self, key: SigningKey) -> None:
        with pytest.raises(InvalidToken, match="exceeds 4096"):
            key.sign(TYP, {"a": "x" * 4000})

    def test_the_seed_restores_the_key(self, key: SigningKey, keys: KeySet) -> None:
        again = SigningKey(key.seed())
        assert again.kid == key.kid
        assert jwt.verify(again.sign(TYP, {"a": 1}), keys, typ=TYP) == {"a": 1}

    def test_repr_shows_no_secret(self, key: SigningKey) -> None:
        assert repr(key) == f"SigningKey(kid={key.kid!r})"


class TestAgainstJoserfc:
    """An independent implementation reads our tokens and keys, and we read its."""

    def test_joserfc_verifies_ours(self, key: SigningKey) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joserfc prefers the name of RFC 9864 to that of RFC 8037
            token = jws.deserialize_compact(
                key.sign(TYP, {"a": 1}), OKPKey.import_key(key.public_jwk()), algorithms=["EdDSA"]
            )
        assert json.loads(token.payload) == {"a": 1}
        assert token.protected == {"alg": "EdDSA", "typ": TYP, "kid": key.kid}

    def test_we_verify_joserfc(self) -> None:
        theirs = OKPKey.generate_key("Ed25519")
        header = {"alg": "EdDSA", "typ": TYP, "kid": theirs.thumbprint()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            token = jws.serialize_compact(header, b'{"a":1}', theirs, algorithms=["EdDSA"])
        public = {**theirs.as_dict(private=False), "kid": theirs.thumbprint()}
        assert jwt.verify(token, KeySet.from_jwks({"keys": [public]}), typ=TYP) == {"a": 1}

    def test_the_kid_is_the_rfc_7638_thumbprint(self, key: SigningKey) -> None:
        assert OKPKey.import_key(key.public_jwk()).thumbprint() == key.kid


class TestHostileTokens:
    def refused(self, token: Any, keys: KeySet, match: str) -> None:
        with pytest.raises(InvalidToken, match=match):
            jwt.verify(token, keys, typ=TYP)

    def test_alg_none_in_every_spelling(self, key: SigningKey, keys: KeySet, header: dict[str, Any]) -> None:
        for alg in ("none", "None", "NONE", "", None, ["EdDSA"], {"alg": "EdDSA"}, 0):
            unsigned = f"{b64({**header, 'alg': alg})}.{b64('{}')}."
            self.refused(unsigned, keys, "algorithm")
            self.refused(crafted(key, {**header, "alg": alg}), keys, "algorithm")

    def test_hmac_with_the_public_key_as_secret(self, key: SigningKey, keys: KeySet, header: dict[str, Any]) -> None:
        for secret in (key.public.public_bytes_raw(), json.dumps(key.public_jwk()).encode(), b""):
            for alg in ("HS256", "EdDSA"):
                signing_input = f"{b64({**header, 'alg': alg})}.{b64('{}')}"
                mac = hmac.digest(secret, signing_input.encode(), hashlib.sha256)
                self.refused(f"{signing_input}.{b64(mac)}", keys, "algorithm|signature")

    def test_other_algorithms_that_our_key_signed(self, key: SigningKey, keys: KeySet, header: dict[str, Any]) -> None:
        for alg in ("Ed25519", "Ed448", "ES256", "eddsa", "EdDSA "):
            self.refused(crafted(key, {**header, "alg": alg}), keys, "algorithm")

    def test_wrong_typ(self, key: SigningKey, keys: KeySet, header: dict[str, Any]) -> None:
        for typ in ("JWT", TYP.upper(), f"application/{TYP}", None, 1, [TYP]):
            self.refused(crafted(key, {**header, "typ": typ}), keys, "type is not")

    def test_unknown_and_malformed_kid(self, key: SigningKey, keys: KeySet, header: dict[str, Any]) -> None:
        self.refused(crafted(key, {**header, "kid": "other"}), keys, "unknown key")
        for kid in (None, 1, [key.kid], {key.kid: 1}):
            self.refused(crafted(key, {**header, "kid": kid}), keys, "kid is not a string")

    def test_a_known_kid_with_another_keys_signature(self, keys: KeySet, header: dict[str, Any]) -> None:
        self.refused(crafted(SigningKey.generate(), header), keys, "signature")

    def test_crit_b64_and_embedded_keys_are_refused(self, keys: KeySet, header: dict[str, Any]) -> None:
        attacker = SigningKey.generate()
        for extra in (
            {"crit": ["exp"]},
            {"crit": []},
            {"b64": False, "crit": ["b64"]},
            {"jwk": attacker.public_jwk()},
            {"jku": "https://attacker.example/jwks"},
            {"x5c": ["AAAA"]},
        ):
            self.refused(crafted(attacker, {**header, **extra}), keys, "members other")

    def test_missing_header_members(self, key: SigningKey, keys: KeySet, header: dict[str, Any]) -> None:
        for name in header:
            self.refused(crafted(key, {k: v for k, v in header.items() if k != name}), keys, "members other")

    def test_tampering_with_any_segment(self, key: SigningKey, keys: KeySet) -> None:
        token = key.sign(TYP, {"role": "viewer"})
        head, payload, signature = token.split(".")
        self.refused(f"{head}.{b64({'role': 'admin'})}.{signature}", keys, "signature")
        self.refused(f"{head}.{payload}.{b64(bytes(64))}", keys, "signature")
        self.refused(f"{head}.{payload}.{signature[:-4]}", keys, "signature")
        self.refused(f"{head}.{payload}.", keys, "signature")

    def test_segments_and_alphabet(self, key: SigningKey, keys: KeySet) -> None:
        token = key.sign(TYP, {"a": 1})
        head, payload, signature = token.split(".")
        for bad in ("", ".", "..", "a.b", f"{token}.", f"{token}.x.y", f"{head}.{payload}"):
            self.refused(bad, keys, "three segments|base64url")
        for bad in (f" {token}", f"{head}=.{payload}.{signature}", f"{head}\n.{payload}.{signature}", f"{head}+.a.b"):
            self.refused(bad, keys, "base64url")
        self.refused(f"{token}=", keys, "signature")
        self.refused(f"{token}\n", keys, "signature")

    def test_size_and_alphabet_of_the_input(self, key: SigningKey, keys: KeySet) -> None:
        token = key.sign(TYP, {"a": 1})
        for bad in ("x" * 4097, token + "A" * 4096, "é.é.é"):
            self.refused(bad, keys, "at most 4096")

    def test_json_that_is_not_an_object(self, key: SigningKey, keys: KeySet, header: dict[str, Any]) -> None:
        for text in ("[]", "null", '"x"', "1", "", "{", '{"a":NaN}', '{"a":Infinity}', "[" * 2000, b"\xff\xfe"):
            self.refused(crafted(key, text), keys, "header is not")
            self.refused(crafted(key, header, text), keys, "payload is not")


class TestKeySet:
    def test_keeps_every_key_by_kid(self) -> None:
        old, new = SigningKey.generate(), SigningKey.generate()
        keys = KeySet.from_jwks({"keys": [old.public_jwk(), new.public_jwk()]})
        assert set(keys) == {old.kid, new.kid} and len(keys) == 2 and old.kid in keys
        for key in (old, new):
            assert jwt.verify(key.sign(TYP, {}), keys, typ=TYP) == {}

    @pytest.mark.parametrize(
        "change",
        [{"kty": "oct", "k": "AAAA"}, {"crv": "X25519"}, {"alg": "HS256"}, {"use": "enc"}, {"kid": None}, {"kid": ""},
         {"x": None}, {"x": "AAAA"}, {"x": "!"}, {"x": "é"}],
    )  # fmt: skip
    def test_foreign_keys_are_refused(self, key: SigningKey, change: dict[str, Any]) -> None:
        with pytest.raises(InvalidKey):
            KeySet.from_jwks({"keys": [{**key.public_jwk(), **change}]})

    @pytest.mark.parametrize("document", [{}, {"keys": None}, {"keys": {}}, {"keys": ["x"]}, {"keys": [{}] * 33}])
    def test_malformed_sets_are_refused(self, document: dict[str, Any]) -> None:
        with pytest.raises(InvalidKey):
            KeySet.from_jwks(document)

    def test_two_keys_of_one_kid_are_refused(self, key: SigningKey) -> None:
        other = SigningKey.generate().public_jwk()
        with pytest.raises(InvalidKey, match="one kid"):
            KeySet.from_jwks({"keys": [key.public_jwk(), {**other, "kid": key.kid}]})


def test_verification_costs_little_more_than_the_signature(key: SigningKey, keys: KeySet) -> None:
    """A relay verifies one token per bind; parsing must stay small beside Ed25519 itself."""
    token = key.sign(TYP, {"a": "x" * 800})
    signing_input, _, signature = token.rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "==")

    def seconds(call: Any) -> float:
        start = time.thread_time()
        for _ in range(50):
            call()
        return time.thread_time() - start

    bare = whole = 1.0
    for _ in range(50):  # in turn, so that a machine that is busy for a while does not see to one of them alone
        bare = min(bare, seconds(lambda: key.public.verify(raw, signing_input.encode())))
        whole = min(whole, seconds(lambda: jwt.verify(token, keys, typ=TYP)))
        if whole < 2 * bare:
            break
    assert whole < 2 * bare
