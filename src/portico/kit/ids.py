"""Identifiers and secret tokens.

    object id   tun_01jd2x…          prefix + 26 characters of Crockford base32 over a UUIDv7: sorts by time of creation
    token       tnl_agt_<30><6>      30 random base62 characters, then CRC32 of those 30 in base62 (GitHub's format)

The checksum lets a secret scanner, and the API before it asks the database, tell a token from noise.
PostgreSQL before 18 has no UUIDv7, so it is made here.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
import uuid
import zlib

_TO_CROCKFORD = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", b"0123456789abcdefghjkmnpqrstvwxyz")
_ID_CHARS = 26
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BODY_LENGTH = 30
_CHECK_LENGTH = 6

# Token kinds. A kind is part of every issued token: never rename one.
# The last four: links by mail (to verify, to reset, to change an address), and half a sign-in.
TOKEN_KINDS = frozenset({"agt", "sk", "rly", "opr", "rt", "dc", "bs", "sup", "inv", "ev", "pr", "ec", "mf"})


def uuid7() -> uuid.UUID:
    """A UUIDv7 (RFC 9562 method 3): milliseconds, then 12 bits of the fraction, then 62 random bits."""
    now = time.time_ns()
    millis, rest = divmod(now, 1_000_000)
    fraction = (rest << 12) // 1_000_000
    value = (millis & (1 << 48) - 1) << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | secrets.randbits(62)
    return uuid.UUID(int=value)


def new_id(prefix: str) -> str:
    """A new object id such as ``tun_01jd2x8k3nf0v4q5w6e7r8t9ya``; ids of one prefix sort by time of creation."""
    return f"{prefix}_{_written(uuid7().int)}"


def _written(value: int) -> str:
    """128 bits as 26 characters of Crockford's alphabet: those of RFC 4648 in other clothes, right-aligned in 20 bytes."""
    return base64.b32encode(value.to_bytes(20, "big")).translate(_TO_CROCKFORD)[-_ID_CHARS:].decode()


def first_id(prefix: str, seconds: float) -> str:
    """The smallest id that can have been made at or after a time (seconds since 1970)."""
    return f"{prefix}_{_written(max(0, int(seconds * 1000)) << 80)}"


def _base62(number: int, width: int) -> str:
    digits = ""
    while number:
        number, rest = divmod(number, 62)
        digits = _BASE62[rest] + digits
    return digits.rjust(width, "0")


def checksum(body: str) -> str:
    """Six base62 characters of the CRC32 of a token's 30-character body (the prefix is not covered)."""
    return _base62(zlib.crc32(body.encode("ascii")), _CHECK_LENGTH)


def new_token(kind: str) -> str:
    """A new secret token ``tnl_<kind>_<30 random><6 checksum>``: 178 bits of entropy."""
    if kind not in TOKEN_KINDS:
        raise ValueError(f"unknown token kind {kind!r}")
    body = "".join(secrets.choice(_BASE62) for _ in range(_BODY_LENGTH))
    return f"tnl_{kind}_{body}{checksum(body)}"


def check_token(text: str) -> str | None:
    """The kind of a well-formed token whose checksum fits, else ``None``. Says nothing about whether it is live."""
    parts = text.split("_")
    if len(parts) != 3 or parts[0] != "tnl" or parts[1] not in TOKEN_KINDS:
        return None
    secret = parts[2]
    if len(secret) != _BODY_LENGTH + _CHECK_LENGTH or not (secret.isascii() and secret.isalnum()):
        return None
    body, check = secret[:_BODY_LENGTH], secret[_BODY_LENGTH:]
    return parts[1] if checksum(body) == check else None


def digest(token: str) -> bytes:
    """SHA-256 of a token: what is stored and looked up. Tokens have full entropy: no salt, no stretching."""
    return hashlib.sha256(token.encode("utf-8")).digest()


def display_prefix(token: str) -> str:
    """The part of a token that lists may show: its kind and the first four characters of its body."""
    return token[: token.rindex("_") + 5]
