"""Signatures of Standard Webhooks 1.0 (standardwebhooks.com): sign what we send, verify what others send.

    webhook-id: msg_…                    the same in every attempt at one message
    webhook-timestamp: 1614265330        seconds since 1970 at which this attempt was made
    webhook-signature: v1,<base64> …     HMAC-SHA256 over ``id.timestamp.body``, one for each secret in use, in any order

A secret is ``whsec_`` and base64 of 24 to 64 bytes. While one is replaced by the next there are two: a sender signs with both,
a receiver takes either. A timestamp may be off by five minutes both ways: an older message is a replay, a newer one would be a
replay to come. Whoever receives must also remember ids for as long, since within the tolerance a copy is as good as the original.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from typing import Final, Literal

ID, TIMESTAMP, SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"
PREFIX: Final = "whsec_"
#: Bytes of a secret (the specification's bounds) and of one that is made here.
SECRET_BYTES: Final = range(24, 65)
_NEW_BYTES: Final = 32
#: Seconds by which a timestamp may be off, both ways.
TOLERANCE_SECONDS: Final = 300
#: Signatures in one header that are looked at, and characters of an id.
MAX_SIGNATURES: Final = 20
ID_CHARS: Final = 255

Fault = Literal["no_secret", "missing", "malformed", "stale", "mismatch"]


class SignatureError(Exception):
    """A message is not known to be from whom it should be. ``fault``: ``no_secret`` (none is set, so nothing can be right), a
    header is ``missing`` or ``malformed``, the timestamp is ``stale`` (or of the future), or no signature fits: ``mismatch``."""

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(detail)
        self.fault = fault


def new_secret() -> str:
    """A fresh secret, 256 bits of it."""
    return PREFIX + base64.b64encode(secrets.token_bytes(_NEW_BYTES)).decode()


def key_of(secret: str) -> bytes:
    """The bytes behind a secret's text; raises ``ValueError`` when it is none."""
    if not secret.startswith(PREFIX):
        raise ValueError(f"a secret begins with {PREFIX}")
    try:
        raw = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("a secret is base64") from None
    if len(raw) not in SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES[0]} to {SECRET_BYTES[-1]} bytes")
    return raw


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """``v1,<base64>``. Raises ``ValueError`` for a secret or an id that cannot be."""
    if not _is_id(message_id):
        raise ValueError("an id has 1 to 255 characters, no full stop and no space")
    signed = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    return "v1," + base64.b64encode(hmac.digest(key_of(secret), signed, hashlib.sha256)).decode()


def headers(secrets_in_use: Sequence[str], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of one attempt, signed with every secret in use."""
    if not secrets_in_use:
        raise ValueError("nothing is sent unsigned")
    signatures = " ".join(sign(secret, message_id, timestamp, body) for secret in secrets_in_use)
    return {ID: message_id, TIMESTAMP: str(timestamp), SIGNATURE: signatures}


def verify(
    secrets_in_use: Sequence[str],
    given: Mapping[str, str],
    body: bytes,
    now: float,
    tolerance_seconds: float = TOLERANCE_SECONDS,
) -> tuple[str, int]:
    """The id and the timestamp of a message that one of ``secrets_in_use`` signed; raises :class:`SignatureError`.

    ``given`` are headers by lower-case name. Every signature is compared with every secret, in constant time, whichever fits.
    """
    if not secrets_in_use:
        raise SignatureError("no_secret", "no secret is set: nothing is believed")
    message_id, stamp, signatures = (given.get(name, "") for name in (ID, TIMESTAMP, SIGNATURE))
    if not (message_id and stamp and signatures):
        raise SignatureError("missing", f"{ID}, {TIMESTAMP} and {SIGNATURE} are needed")
    if not _is_id(message_id) or not (stamp.isascii() and stamp.isdigit() and len(stamp) <= 12):
        raise SignatureError("malformed", f"{ID} or {TIMESTAMP} is not in the form of Standard Webhooks")
    candidates = [part.encode(errors="replace") for part in signatures.split(" ") if part.startswith("v1,")]
    if len(candidates) > MAX_SIGNATURES:
        raise SignatureError("malformed", f"more than {MAX_SIGNATURES} signatures")
    timestamp = int(stamp)
    if not abs(now - timestamp) <= tolerance_seconds:
        raise SignatureError("stale", f"the timestamp is off by more than {tolerance_seconds:g} s")
    fits = False
    for secret in secrets_in_use:
        # The text that was signed, not the number: 0161… and 161… are not the same message.
        signed = b"%b.%b.%b" % (message_id.encode(), stamp.encode(), body)
        wanted = b"v1," + base64.b64encode(hmac.digest(key_of(secret), signed, hashlib.sha256))
        for candidate in candidates:
            fits |= hmac.compare_digest(wanted, candidate)
    if not fits:
        raise SignatureError("mismatch", "no signature fits")
    return message_id, timestamp


def _is_id(text: str) -> bool:
    return 0 < len(text) <= ID_CHARS and text.isascii() and text.isprintable() and "." not in text and " " not in text
