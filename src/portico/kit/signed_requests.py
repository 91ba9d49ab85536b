"""One verifier for requests signed in one of three ways: who a request says it is, and whether a key of theirs signed it.

    A  Standard Webhooks   Webhook-Id, Webhook-Timestamp, Webhook-Signature: v1,<base64 HMAC-SHA256> v1a,<base64 Ed25519> …
                           over id.timestamp.body
    B  compact             X-Cert-Signature: t=<seconds>,v1=<hex HMAC-SHA256>[,v1=…]
                           over cert-ingest-v1, time, source, cluster, id, method, path and SHA-256 of the body, each on a line
    C  RFC 9421            Signature-Input, Signature, Content-Digest: method, authority, path, digest and type of the body

Nothing of a body is looked at, only its bytes. Reading a request (:func:`present`) says nothing about whether it is true;
:meth:`Presented.signer` does, and compares every signature with every key, whichever fits.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from portico.kit import http_signatures, signing
from portico.kit.http_signatures import Target

COMPACT: Final = "x-cert-signature"
SOURCE, CLUSTER, KEY_ID = "x-cert-source", "x-cert-cluster", "x-cert-key-id"
INPUT, SIGNATURE, DIGEST = "signature-input", "signature", "content-digest"
#: Every field that takes part; each is there once, or the request is not read.
FIELDS: Final = (
    signing.ID, signing.TIMESTAMP, signing.SIGNATURE, COMPACT, SOURCE, CLUSTER, KEY_ID, INPUT, SIGNATURE, DIGEST,
)  # fmt: skip
COVERED: Final = ("@method", "@authority", "@path", "content-digest", "content-type")
TAG: Final = "cert-ingest"
PUBLIC_PREFIX, PRIVATE_PREFIX = "whpk_", "whsk_"
_FIELD_CHARS: Final = 8192
_ID_CHARS: Final = 128
_COMPACT = re.compile(r"t=([0-9]{1,12})((?:,v1=[0-9a-f]{64}){1,20})")
_ID = re.compile(r"[\x21-\x2d\x2f-\x7e]{1,128}")

Codec = Literal["standard", "compact", "http"]
Algorithm = Literal["hmac", "ed25519"]


class Unreadable(ValueError):
    """A request is not signed in a way that we know. ``str()`` says why, for whoever runs this, not for the sender."""


@dataclass(frozen=True, slots=True)
class Key:
    """What signatures are checked with: a shared secret, or the public half of an Ed25519 pair."""

    id: str
    algorithm: Algorithm
    material: bytes

    def fits(self, signed: bytes, signatures: Sequence[bytes]) -> bool:
        """Whether the key's owner made one of ``signatures`` over ``signed``. All of them are compared, whichever fits."""
        if self.algorithm == "hmac":
            own = hmac.digest(self.material, signed, hashlib.sha256)
            return sum([hmac.compare_digest(own, signature) for signature in signatures]) > 0
        public = Ed25519PublicKey.from_public_bytes(self.material)
        return sum([_verifies(public, signature, signed) for signature in signatures]) > 0


def _verifies(public: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        public.verify(signature, signed)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class Presented:
    """What a request says of itself before anything is proved. ``expires``: when its sender says that it is void."""

    codec: Codec
    source: str
    message_id: str
    timestamp: int
    signed: bytes
    signatures: tuple[tuple[Algorithm | None, bytes], ...]
    cluster: str | None = None
    key_id: str | None = None
    expires: int | None = None
    whole: bool = True  # of C: whether the digest in its fields is that of the body

    def fresh(self, now: float, tolerance_seconds: float) -> bool:
        """Whether it was signed a moment ago, by a clock that may be off in both directions."""
        return abs(now - self.timestamp) <= tolerance_seconds and (self.expires is None or now <= self.expires)

    def signer(self, keys: Sequence[Key]) -> Key | None:
        """The key that signed it. Of C, the one that its ``keyid`` names must."""
        found = None
        for key in keys:
            candidates = [each for algorithm, each in self.signatures if algorithm in (None, key.algorithm)]
            if key.fits(self.signed, candidates) and (self.codec != "http" or self.key_id == key.id):
                found = found or key
        return found if self.whole else None


def present(target: Target, fields: Mapping[str, str], body: bytes) -> Presented:
    """Read a request; ``fields`` by lower-case name. Raises :class:`Unreadable`."""
    if any(len(fields.get(name, "")) > _FIELD_CHARS for name in FIELDS):
        raise Unreadable("a field is too long")
    ways = [name for name in (signing.SIGNATURE, COMPACT, INPUT) if name in fields]
    if len(ways) != 1:
        raise Unreadable("it is not signed" if not ways else "it is signed in several ways")
    source, message = fields.get(SOURCE, ""), fields.get(signing.ID, "")
    if not _ID.fullmatch(source) or not _ID.fullmatch(message):
        raise Unreadable("its source or its id is missing, or not in the form of one")
    read = {signing.SIGNATURE: _standard, COMPACT: _compact, INPUT: _http}[ways[0]]
    return read(target, fields, body)


def _standard(target: Target, fields: Mapping[str, str], body: bytes) -> Presented:
    stamp, message = fields.get(signing.TIMESTAMP, ""), fields[signing.ID]
    if not (stamp.isascii() and stamp.isdigit() and len(stamp) <= 12):
        raise Unreadable("its timestamp is missing, or no number")
    found: list[tuple[Algorithm | None, bytes]] = []
    for part in fields[signing.SIGNATURE].split(" "):
        version, _, text = part.partition(",")
        if version in ("v1", "v1a"):
            found.append(("hmac" if version == "v1" else "ed25519", _decoded(text)))
    if not 0 < len(found) <= signing.MAX_SIGNATURES:
        raise Unreadable("no signature of a version that we know, or too many")
    signed = b"%b.%b.%b" % (message.encode(), stamp.encode(), body)
    source = fields[SOURCE]
    return Presented(
        "standard", source, message, int(stamp), signed, tuple(found), fields.get(CLUSTER), fields.get(KEY_ID)
    )


def _compact(target: Target, fields: Mapping[str, str], body: bytes) -> Presented:
    match = _COMPACT.fullmatch(fields[COMPACT])
    cluster = fields.get(CLUSTER, "")
    if match is None or not _ID.fullmatch(cluster):
        raise Unreadable("its signature is not t=…,v1=…, or its cluster is missing")
    signatures: tuple[tuple[Algorithm | None, bytes], ...] = tuple(
        ("hmac", bytes.fromhex(part.removeprefix("v1="))) for part in match[2][1:].split(",")
    )
    signed = compact_base(match[1], fields[SOURCE], cluster, fields[signing.ID], target, body)
    return Presented(
        "compact", fields[SOURCE], fields[signing.ID], int(match[1]), signed, signatures, cluster, fields.get(KEY_ID)
    )


def compact_base(stamp: str, source: str, cluster: str, message: str, target: Target, body: bytes) -> bytes:
    """What codec B signs."""
    lines = (
        f"{TAG}-v1", stamp, source, cluster, message, target.method, target.path, hashlib.sha256(body).hexdigest(),
    )  # fmt: skip
    return "\n".join(lines).encode()


def _http(target: Target, fields: Mapping[str, str], body: bytes) -> Presented:
    try:
        found = http_signatures.read_input(fields[INPUT])
        signature = http_signatures.read_signature(fields.get(SIGNATURE, ""), found.label)
        signed = http_signatures.base(found, target, fields)
    except ValueError as err:
        raise Unreadable(str(err)) from None
    created, expires, key, nonce = (
        found.number("created"),
        found.number("expires"),
        found.text("keyid"),
        found["nonce"],
    )
    if not set(COVERED) <= set(found.components) or found["tag"] != TAG:
        raise Unreadable(f"it does not cover {', '.join(COVERED)}, or is not tagged {TAG}")
    if created is None or expires is None or not key or not isinstance(nonce, str) or not nonce:
        raise Unreadable("created, expires, keyid and nonce are needed")
    algorithms: Mapping[object, Algorithm | None] = {None: None, "hmac-sha256": "hmac", "ed25519": "ed25519"}
    if (named := found["alg"]) not in algorithms:
        raise Unreadable("its algorithm is not one that we know")
    whole = http_signatures.digest_fits(fields["content-digest"], body)
    return Presented(
        "http", fields[SOURCE], fields[signing.ID], created, signed, ((algorithms[named], signature),),
        fields.get(CLUSTER), key, expires, whole,
    )  # fmt: skip


# -- for senders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SigningKey:
    """What a sender signs with: the text of a shared secret (``whsec_…``) or of a private key (``whsk_…``)."""

    id: str
    algorithm: Algorithm
    material: bytes

    @classmethod
    def of(cls, key_id: str, text: str) -> SigningKey:
        """Raises ``ValueError`` for a text that is neither."""
        if text.startswith(PRIVATE_PREFIX):
            raw = _decoded(text.removeprefix(PRIVATE_PREFIX))
            if len(raw) not in (32, 64):
                raise ValueError("a private key has 32 bytes, or 64 with its public half")
            return cls(key_id, "ed25519", raw[:32])
        return cls(key_id, "hmac", signing.key_of(text))

    def sign(self, signed: bytes) -> bytes:
        """The signature."""
        if self.algorithm == "hmac":
            return hmac.digest(self.material, signed, hashlib.sha256)
        return Ed25519PrivateKey.from_private_bytes(self.material).sign(signed)

    @property
    def public(self) -> Key:
        """What the other side checks with."""
        if self.algorithm == "hmac":
            return Key(self.id, "hmac", self.material)
        pair = Ed25519PrivateKey.from_private_bytes(self.material)
        return Key(self.id, "ed25519", pair.public_key().public_bytes_raw())


def public_key_of(text: str) -> bytes:
    """The bytes of ``whpk_…``. Raises ``ValueError``."""
    raw = _decoded(text.removeprefix(PUBLIC_PREFIX)) if text.startswith(PUBLIC_PREFIX) else b""
    if len(raw) != 32:
        raise ValueError(f"a public key is {PUBLIC_PREFIX} and base64 of 32 bytes")
    Ed25519PublicKey.from_public_bytes(raw)
    return raw


def headers(
    codec: Codec, key: SigningKey, source: str, cluster: str, message: str, timestamp: int, target: Target, body: bytes
) -> dict[str, str]:
    """The fields of one attempt, content type included. Raises ``ValueError`` for a key that the codec does not know."""
    made = {
        "content-type": "application/json", signing.ID: message, SOURCE: source, CLUSTER: cluster, KEY_ID: key.id,
    }  # fmt: skip
    if codec == "standard":
        version = "v1" if key.algorithm == "hmac" else "v1a"
        signature = key.sign(b"%b.%d.%b" % (message.encode(), timestamp, body))
        shown = f"{version},{base64.b64encode(signature).decode()}"
        return made | {signing.TIMESTAMP: str(timestamp), signing.SIGNATURE: shown}
    if codec == "compact":
        if key.algorithm != "hmac":
            raise ValueError("the compact codec signs with a shared secret")
        signature = key.sign(compact_base(str(timestamp), source, cluster, message, target, body))
        return made | {COMPACT: f"t={timestamp},v1={signature.hex()}"}
    made |= {DIGEST: http_signatures.digest(body)}
    parameters: list[tuple[str, str | int]] = [
        ("created", timestamp), ("expires", timestamp + signing.TOLERANCE_SECONDS), ("keyid", key.id),
        ("nonce", secrets.token_urlsafe(16)), ("tag", TAG),
    ]  # fmt: skip
    announced, signed = http_signatures.headers("sig", COVERED, parameters, target, made)
    shown = base64.b64encode(key.sign(signed)).decode()
    return made | {INPUT: f"sig={announced.value}", SIGNATURE: f"sig=:{shown}:"}


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Unreadable("a signature is not base64") from None
