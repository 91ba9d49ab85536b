"""Private keys of certificates on their way to relays: sealed once, opened where they are used, bound to what they are for.

    private key ──AES-256-GCM, a fresh data key──► sealed ─────────────┐
    data key ──HPKE to each region's X25519 key──► one wrap per key ───┤► a relay opens its wrap, then the key
    manifest ──Ed25519, by the certificate worker─► who made all that ─┘

What a wrap opens is bound to certificate, version, hostname, fingerprint and region (HPKE's ``info``), what is sealed to the
first four of them (associated data), so nothing can be shown in another's place. Rotating a region's key wraps data keys anew and
touches nothing else. HPKE is RFC 9180, base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.

Light on purpose: relays import this. ``Opener`` is the seam for a key that lives elsewhere (a KMS).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from portico.kit import jwt
from portico.kit.jwt import InvalidToken, KeySet, SigningKey

#: The ``typ`` of a signed manifest.
TYPE: Final = "portico-certificate+jws"
#: The region of the certificate worker's own wrap, by which it can wrap for a new key. No region can be called so.
WORKER: Final = "*worker"
#: Bytes of a wrap: an encapsulated key, a data key and a tag.
WRAP_BYTES: Final = 32 + 32 + 16
_FORMAT: Final = "portico-certificate-1"
_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_NONCE_BYTES: Final = 12
_KEY_BYTES: Final = 32


class EnvelopeInvalid(ValueError):
    """Something that was sealed, wrapped or signed is not what it is said to be. The text says what, and holds no secret."""


@dataclass(frozen=True, slots=True)
class Binding:
    """What a sealed key is for. ``fingerprint``: SHA-256 of the leaf certificate, hex."""

    certificate: str
    version: int
    hostname: str
    fingerprint: str

    def content(self) -> bytes:
        """Associated data of what is sealed."""
        return _canonical([_FORMAT, "key", self.certificate, self.version, self.hostname, self.fingerprint])

    def region(self, region: str, key_id: str) -> bytes:
        """HPKE's ``info`` of a wrap for a key of ``region``."""
        bound = [self.certificate, self.version, self.hostname, self.fingerprint]
        return _canonical([_FORMAT, "wrap", *bound, region, key_id])


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed private key, and the data key that opens it, which is wrapped and then forgotten."""

    content: bytes
    data_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Wrap:
    """A data key for one key of a region."""

    region: str
    key_id: str
    wrapped: bytes


class Opener(Protocol):
    """Who can open wraps: a key file, or whatever talks to a KMS. It is asked in any thread."""

    def holds(self, key_id: str) -> bool:
        """Whether it has the private half of the key."""

    def unwrap(self, key_id: str, wrapped: bytes, info: bytes) -> bytes:
        """The data key. Raises :class:`EnvelopeInvalid`."""


def key_id(public: X25519PublicKey) -> str:
    """The name of a region's key: a digest of its public half."""
    return "rk_" + hashlib.sha256(public.public_bytes_raw()).hexdigest()[:32]


class Keys:
    """An :class:`Opener` with private keys in memory."""

    def __init__(self, keys: Iterable[X25519PrivateKey]) -> None:
        self._keys = {key_id(key.public_key()): key for key in keys}
        self._marking: bytes | None = None

    @property
    def ids(self) -> list[str]:
        return sorted(self._keys)

    @property
    def newest(self) -> tuple[str, X25519PublicKey]:
        """Id and public half of the key that was named last."""
        name, key = next(reversed(self._keys.items()))
        return name, key.public_key()

    def holds(self, key_id: str) -> bool:
        return key_id in self._keys

    def mark(self, data: bytes) -> bytes:
        """A MAC (HMAC-SHA256) of something that is kept where others may write, under a key that comes of the newest private key
        and is of no other use: who has none of the private keys cannot make it."""
        if self._marking is None:
            private = next(reversed(self._keys.values())).private_bytes_raw()
            self._marking = hmac.digest(private, f"{_FORMAT} marks".encode(), hashlib.sha256)
        return hmac.digest(self._marking, data, hashlib.sha256)

    def unwrap(self, key_id: str, wrapped: bytes, info: bytes) -> bytes:
        key = self._keys.get(key_id)
        if key is None:
            raise EnvelopeInvalid("it is wrapped for a key that is not here")
        if len(wrapped) != WRAP_BYTES:
            raise EnvelopeInvalid("a wrap has not the length of one")
        try:
            return _SUITE.decrypt(wrapped, key, info)
        except (InvalidTag, ValueError):
            raise EnvelopeInvalid("the wrap does not open: another region's, or another certificate's") from None


# -- sealing and opening -----------------------------------------------------------------------------------------------


def seal(secret: bytes, binding: Binding) -> Sealed:
    """``secret`` under a data key that was never used before."""
    data_key = AESGCM.generate_key(8 * _KEY_BYTES)
    nonce = os.urandom(_NONCE_BYTES)
    return Sealed(nonce + AESGCM(data_key).encrypt(nonce, secret, binding.content()), data_key)


def open_sealed(content: bytes, data_key: bytes, binding: Binding) -> bytes:
    """What was sealed. Raises :class:`EnvelopeInvalid`."""
    try:
        return AESGCM(data_key).decrypt(content[:_NONCE_BYTES], content[_NONCE_BYTES:], binding.content())
    except (InvalidTag, ValueError):
        raise EnvelopeInvalid("the key does not open: it is cut, or was sealed for another certificate") from None


def wrap(data_key: bytes, binding: Binding, region: str, public: X25519PublicKey) -> Wrap:
    """The data key for one key of a region."""
    name = key_id(public)
    return Wrap(region, name, _SUITE.encrypt(data_key, public, binding.region(region, name)))


def unwrap(wraps: Iterable[Wrap], binding: Binding, region: str, opener: Opener) -> bytes:
    """The data key, by the first of the wraps whose key ``opener`` holds. Raises :class:`EnvelopeInvalid`."""
    for each in wraps:
        if opener.holds(each.key_id):
            return opener.unwrap(each.key_id, each.wrapped, binding.region(region, each.key_id))
    raise EnvelopeInvalid("it is wrapped for no key that is here")


# -- the manifest ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the certificate worker vouches for: that this version of this domain is this certificate with this sealed key.

    ``chain`` and ``sealed`` are SHA-256 digests, hex, of the chain's PEM text and of what is sealed. Times are unix seconds.
    """

    domain: str
    certificate: str
    version: int
    hostname: str
    fingerprint: str
    chain: str
    sealed: str
    not_before: int
    not_after: int

    @property
    def binding(self) -> Binding:
        return Binding(self.certificate, self.version, self.hostname, self.fingerprint)

    def sign(self, signer: SigningKey) -> str:
        """The compact JWS that goes with the certificate."""
        return signer.sign(TYPE, {name: getattr(self, name) for name in _MEMBERS})


_MEMBERS: Final = tuple(Manifest.__dataclass_fields__)
_NUMBERS: Final = ("version", "not_before", "not_after")


def verify(token: str, signers: KeySet) -> Manifest:
    """The manifest that one of ``signers`` signed. Raises :class:`EnvelopeInvalid`.

    ``signers`` come from the relay's own configuration: neither the manifest nor who delivers it names them.
    """
    try:
        claims = jwt.verify(token, signers, typ=TYPE)
    except InvalidToken as err:
        raise EnvelopeInvalid(f"the manifest: {err}") from None
    if claims.keys() != set(_MEMBERS):
        raise EnvelopeInvalid("the manifest has other members than those of its format")
    for name, value in claims.items():
        kind: type = int if name in _NUMBERS else str
        if type(value) is not kind:
            raise EnvelopeInvalid(f"{name} of the manifest is not of its type")
    return Manifest(**claims)


def digest(data: bytes) -> str:
    """As manifests name contents."""
    return hashlib.sha256(data).hexdigest()


def signers(publics: Iterable[str]) -> KeySet:
    """A key set of raw Ed25519 public keys in base64url, as settings carry them. Raises ``InvalidKey``."""
    return KeySet.from_jwks({"keys": [jwt.jwk_of(x) for x in publics]})


def _canonical(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
