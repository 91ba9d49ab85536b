"""Compact JWS with one algorithm: Ed25519 (``alg`` = ``EdDSA``, RFC 8037), chosen here and never by the token.

What makes a token acceptable is fixed: three segments, at most ``MAX_TOKEN_BYTES``, a header of exactly ``alg``,
``kid`` and ``typ`` (so neither ``crit``, ``b64`` nor an embedded key can mean anything), the expected ``typ``, a
``kid`` of the given set. There is no algorithm registry to negotiate with, hence ``none`` and HMAC with the public
key as secret are not special cases. Claims are the caller's business; nothing here knows the time.

Light on purpose: relays and agents import this. The tests check it against joserfc, both ways.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MAX_TOKEN_BYTES: Final = 4096
MAX_KEYS: Final = 32  # current, next and retired keys; a larger JWKS is not ours
_HEADER_MEMBERS: Final = frozenset(("alg", "kid", "typ"))


class InvalidToken(ValueError):
    """The token is not one of ours; the message says why, for logs and details (it never holds the token)."""


class InvalidKey(ValueError):
    """A JWK that is not an Ed25519 key with a ``kid``."""


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _decode(text: str) -> bytes:
    """Base64url without padding, nothing else: padding, white space and the ``+/`` alphabet raise ``ValueError``."""
    if "+" in text or "/" in text or "=" in text:
        raise binascii.Error("not base64url")
    padded = text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4)
    return binascii.a2b_base64(padded.encode("ascii"), strict_mode=True)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _object(segment: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(_decode(segment), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise InvalidToken(f"the {what} is not base64url JSON") from None
    if not isinstance(value, dict):
        raise InvalidToken(f"the {what} is not a JSON object")
    return value


def public_jwk(kid: str, x: bytes) -> dict[str, str]:
    """The JWK (RFC 8037) of a raw public key."""
    return {"kty": "OKP", "crv": "Ed25519", "x": _encode(x), "kid": kid, "use": "sig", "alg": "EdDSA"}


def _thumbprint(x: str) -> str:
    """RFC 7638: the members in lexical order, no white space."""
    return _encode(hashlib.sha256(f'{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}'.encode()).digest())


def jwk_of(x: str) -> dict[str, str]:
    """The JWK of a public key that is given as base64url alone; its ``kid`` is its thumbprint (RFC 7638)."""
    return {"kty": "OKP", "crv": "Ed25519", "x": x, "kid": _thumbprint(x), "use": "sig", "alg": "EdDSA"}


class SigningKey:
    """A private Ed25519 key and the ``kid`` under which its public half is published."""

    __slots__ = ("_headers", "_key", "kid", "public")

    def __init__(self, seed: bytes, kid: str | None = None) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self._key.public_key()
        self.kid = kid or _thumbprint(_encode(self.public.public_bytes_raw()))
        self._headers: dict[str, str] = {}  # typ → encoded header; a process signs a handful of types

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    def seed(self) -> bytes:
        """The private half, for storage under encryption or file mode 0600."""
        return self._key.private_bytes_raw()

    def public_jwk(self) -> dict[str, str]:
        """The JWK to publish (RFC 8037)."""
        return public_jwk(self.kid, self.public.public_bytes_raw())

    def sign(self, typ: str, claims: Mapping[str, Any], *, limit: int = MAX_TOKEN_BYTES) -> str:
        """The compact JWS of ``claims``. Raises ``InvalidToken`` when it would be larger than any verifier accepts."""
        header = self._headers.get(typ)
        if header is None:
            members = {"alg": "EdDSA", "kid": self.kid, "typ": typ}
            header = self._headers[typ] = _encode(json.dumps(members, separators=(",", ":")).encode())
        payload = json.dumps(claims, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        signing_input = f"{header}.{_encode(payload.encode())}"
        token = f"{signing_input}.{_encode(self._key.sign(signing_input.encode('ascii')))}"
        if len(token) > limit:
            raise InvalidToken(f"a token of {len(token)} bytes exceeds {limit}")
        return token

    def __repr__(self) -> str:
        return f"SigningKey(kid={self.kid!r})"


class KeySet:
    """Public keys by ``kid``; immutable, replaced whole when keys rotate."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Mapping[str, Ed25519PublicKey]) -> None:
        self._keys = dict(keys)

    @classmethod
    def from_jwks(cls, document: Mapping[str, Any]) -> KeySet:
        """The Ed25519 keys of ``{"keys": [JWK…]}``. Raises ``InvalidKey`` for anything that is not such a set."""
        rows = document.get("keys")
        if not isinstance(rows, list) or len(rows) > MAX_KEYS:
            raise InvalidKey(f"a key set is a list of at most {MAX_KEYS} keys")
        keys = dict(_public_key(row) for row in rows)
        if len(keys) != len(rows):
            raise InvalidKey("two keys of a set have one kid")
        return cls(keys)

    @classmethod
    def of(cls, keys: Iterable[SigningKey]) -> KeySet:
        return cls({key.kid: key.public for key in keys})

    def get(self, kid: str) -> Ed25519PublicKey | None:
        return self._keys.get(kid)

    def __contains__(self, kid: object) -> bool:
        return kid in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _public_key(row: Any) -> tuple[str, Ed25519PublicKey]:
    if not isinstance(row, dict) or row.get("kty") != "OKP" or row.get("crv") != "Ed25519":
        raise InvalidKey("a key is not an Ed25519 JWK")
    if row.get("alg", "EdDSA") != "EdDSA" or row.get("use", "sig") != "sig":
        raise InvalidKey("a key is not meant for EdDSA signatures")
    kid, x = row.get("kid"), row.get("x")
    if not isinstance(kid, str) or not kid or not isinstance(x, str):
        raise InvalidKey("a key has no kid or no x")
    try:
        return kid, Ed25519PublicKey.from_public_bytes(_decode(x))
    except ValueError:
        raise InvalidKey("the x of a key is not 32 bytes in base64url") from None


def verify(token: str, keys: KeySet, *, typ: str, limit: int = MAX_TOKEN_BYTES) -> dict[str, Any]:
    """The claims of a token of type ``typ`` signed by a key of the set. Raises ``InvalidToken`` for anything else.

    ``limit`` is the longest token of that type. Only the signature and the shape are checked; times, issuer and audience
    are the caller's.
    """
    if len(token) > limit or not token.isascii():
        raise InvalidToken(f"not a token of at most {limit} ASCII characters")
    segments = token.split(".", 3)
    if len(segments) != 3:
        raise InvalidToken("not three segments")
    key = keys.get(_kid(_object(segments[0], "header"), typ))
    if key is None:
        raise InvalidToken("signed by an unknown key")
    try:
        key.verify(_decode(segments[2]), f"{segments[0]}.{segments[1]}".encode("ascii"))
    except (ValueError, InvalidSignature):
        raise InvalidToken("the signature is wrong") from None
    return _object(segments[1], "payload")


def unverified(token: str) -> dict[str, Any]:
    """The claims of a token without a look at its signature: for its holder to show, and for nothing else.

    Raises ``InvalidToken`` for what is no token.
    """
    segments = token.split(".", 3)
    if len(segments) != 3:
        raise InvalidToken("not three segments")
    return _object(segments[1], "payload")


def _kid(header: dict[str, Any], typ: str) -> str:
    if header.keys() != _HEADER_MEMBERS:
        raise InvalidToken("the header has members other than alg, kid and typ")
    if header["alg"] != "EdDSA":
        raise InvalidToken("the algorithm is not EdDSA")
    if header["typ"] != typ:
        raise InvalidToken(f"the type is not {typ}")
    kid = header["kid"]
    if not isinstance(kid, str):
        raise InvalidToken("the kid is not a string")
    return kid
