"""Secrets at rest: AES-256-GCM under keys derived from one master key.

``seal(purpose, …)`` derives a key per purpose (HKDF-SHA256) and binds ``context`` (a row's id) as associated data, so a
ciphertext moved to another row or column does not open. Format: version byte 1, 12-byte nonce, ciphertext with tag.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hmac
import os
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from portico.errors import Problem
from portico.settings import Secret

_VERSION = b"\x01"
_NONCE_BYTES = 12


def new_master_key() -> str:
    """A fresh master key as settings carry it: 32 random bytes in base64url."""
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()


class Sealer:
    """Seals and opens small secrets. Raises ``config.invalid`` for a master key that is not 32 bytes."""

    def __init__(self, master_key: Secret) -> None:
        try:
            raw = base64.b64decode(master_key.reveal(), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) != 32:
            raise Problem("config.invalid", "setting master_key: not 32 bytes in base64url", key="master_key")
        self._master = raw
        self._cipher = functools.lru_cache(maxsize=32)(self._derive)

    def _derive(self, purpose: str) -> AESGCM:
        kdf = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"portico/" + purpose.encode())
        return AESGCM(kdf.derive(self._master))

    def mac(self, purpose: str, text: str) -> str:
        """A MAC of ``text`` under a key of its own, in hex: for tokens that only we can make."""
        key = hmac.digest(self._master, b"portico/mac/" + purpose.encode(), "sha256")
        return hmac.digest(key, text.encode(), "sha256").hex()

    def seal(self, purpose: str, context: str, plaintext: bytes) -> bytes:
        """The ciphertext of ``plaintext``, bound to ``purpose`` and ``context``."""
        nonce = os.urandom(_NONCE_BYTES)
        return _VERSION + nonce + self._cipher(purpose).encrypt(nonce, plaintext, context.encode())

    def open(self, purpose: str, context: str, sealed: bytes) -> bytes:
        """The plaintext; raises ``config.invalid`` when the master key or the row is not the one of ``seal``."""
        nonce, body = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            if sealed[:1] != _VERSION:
                raise InvalidTag
            return self._cipher(purpose).decrypt(nonce, body, context.encode())
        except InvalidTag:
            raise Problem(
                "config.invalid", f"setting master_key: cannot open a stored {purpose}", key="master_key"
            ) from None
