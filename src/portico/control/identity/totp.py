"""Time-based one-time passwords (RFC 6238, over RFC 4226) as every authenticator app has them: SHA-1, six digits, 30 seconds."""

from __future__ import annotations

import base64
import hmac
import secrets
from typing import Final
from urllib.parse import quote

#: Bytes of a shared key: as long as the hash (RFC 4226, section 4).
SECRET_BYTES: Final = 20
STEP_SECONDS: Final = 30
DIGITS: Final = 6
# A clock may be one step off, either way (RFC 6238, section 5.2).
_DRIFT: Final = 1


def new_secret() -> bytes:
    """A fresh shared key."""
    return secrets.token_bytes(SECRET_BYTES)


def shown(secret: bytes) -> str:
    """The key as people type it into an app: base32 without padding."""
    return base64.b32encode(secret).decode().rstrip("=")


def step_at(seconds: float) -> int:
    """The time step of a Unix time."""
    return int(seconds) // STEP_SECONDS


def code(secret: bytes, step: int, digits: int = DIGITS) -> str:
    """The code of one step (RFC 4226, section 5.3)."""
    found = hmac.digest(secret, step.to_bytes(8, "big"), "sha1")
    start = found[-1] & 15
    return f"{(int.from_bytes(found[start : start + 4], 'big') & 0x7FFFFFFF) % 10**digits:0{digits}d}"


def fitting_step(secret: bytes, typed: str, seconds: float, last_step: int) -> int | None:
    """The step that ``typed`` is the code of, if it is near ``seconds`` and later than ``last_step``; else ``None``.

    Spaces in what was typed do not matter. All candidates are compared, whichever fits.
    """
    plain = "".join(typed.split())
    now, found = step_at(seconds), None
    for step in range(now + _DRIFT, now - _DRIFT - 1, -1):
        fits = hmac.compare_digest(code(secret, step).encode(), plain.encode("utf-8", "replace"))
        if fits and step > last_step:
            found = step
    return found


def uri(secret: bytes, account: str, issuer: str) -> str:
    """What a QR code for an app holds (Google Authenticator's key URI format)."""
    label = f"{quote(issuer, safe='')}:{quote(account, safe='@')}"
    return (
        f"otpauth://totp/{label}?secret={shown(secret)}&issuer={quote(issuer, safe='')}"
        f"&algorithm=SHA1&digits={DIGITS}&period={STEP_SECONDS}"
    )
