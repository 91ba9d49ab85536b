"""Files with the private keys of certificate distribution: PEM (PKCS #8), readable by their owner alone.

    a region's   X25519, one or (while it rotates) more     openssl genpkey -algorithm X25519
    the worker's Ed25519 for manifests and X25519 for its own wraps, one of each

A file that its group or others can read or write is refused: whoever could, may have the key.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from portico.errors import Problem
from portico.kit import envelope
from portico.kit.jwt import SigningKey
from portico.settings import SECRET_FILE_MAX_BYTES, mounted_secret

_BLOCK: Final = re.compile(rb"-----BEGIN PRIVATE KEY-----.+?-----END PRIVATE KEY-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class WorkerKeys:
    """What the certificate worker holds: it signs manifests, and opens its own wraps to wrap for a region's new key."""

    signer: SigningKey
    own: X25519PrivateKey

    @property
    def public(self) -> str:
        """What relays must trust: the setting ``certificate_signers``."""
        return self.signer.public_jwk()["x"]

    @property
    def opener(self) -> envelope.Keys:
        return envelope.Keys([self.own])


def region_keys(setting: str, paths: tuple[Path, ...]) -> envelope.Keys:
    """The keys of a region. Raises ``config.invalid``, which names ``setting``."""
    found: list[X25519PrivateKey] = []
    for path in paths:
        for key in _private_keys(setting, path):
            if not isinstance(key, X25519PrivateKey):
                raise _refused(setting, path, f"a key of a region is an X25519 key; this one is {type(key).__name__}")
            found.append(key)
    return envelope.Keys(found)


def worker_keys(setting: str, path: Path) -> WorkerKeys:
    """The certificate worker's keys. Raises ``config.invalid``."""
    keys = _private_keys(setting, path)
    signing = [key for key in keys if isinstance(key, Ed25519PrivateKey)]
    own = [key for key in keys if isinstance(key, X25519PrivateKey)]
    if len(keys) != 2 or len(signing) != 1 or len(own) != 1:
        raise _refused(setting, path, "it must hold one Ed25519 key and one X25519 key")
    return WorkerKeys(SigningKey(signing[0].private_bytes_raw()), own[0])


#: What the first letter of a text in base64url stands for when it is a hyphen.
_DASH: Final = 62


def new_region_key() -> str:
    """The text of a new key file for a region. The public half, as text, does not look like an option of a command."""
    while True:
        key = X25519PrivateKey.generate()
        if key.public_key().public_bytes_raw()[0] >> 2 != _DASH:
            return _pem(key)


def new_worker_keys() -> str:
    """The text of a new key file for the certificate worker."""
    return _pem(Ed25519PrivateKey.generate()) + _pem(X25519PrivateKey.generate())


def _pem(key: Ed25519PrivateKey | X25519PrivateKey) -> str:
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(*form).decode()


def _private_keys(setting: str, path: Path) -> list[object]:
    blocks = _BLOCK.findall(_read(setting, path.expanduser()))
    if not blocks:
        raise _refused(setting, path, "it holds no private key in PEM form (PKCS #8, not encrypted)")
    try:
        return [serialization.load_pem_private_key(block, None) for block in blocks]
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _refused(setting, path, "a private key in it cannot be read") from None


def _read(setting: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            data = file.read(SECRET_FILE_MAX_BYTES + 1)
    except OSError as err:
        raise _refused(setting, path, f"cannot be read: {err.strerror}") from None
    mode = info.st_mode
    if not stat.S_ISREG(mode) or len(data) > SECRET_FILE_MAX_BYTES:
        raise _refused(setting, path, "is not a file of keys")
    if mounted_secret(path):
        return data
    if hasattr(os, "geteuid") and info.st_uid not in (0, os.geteuid()):
        raise _refused(setting, path, "belongs to another user")
    if mode & 0o077:
        advice = f"Run: chmod 600 {path}. If others had access, make a new key and rotate."
        text = f"setting {setting}: {path} has mode {stat.S_IMODE(mode):04o}; only its owner may read it (0600)"
        raise Problem("config.invalid", text, hint=advice, key=setting)
    return data


def _refused(setting: str, path: Path, why: str) -> Problem:
    return Problem("config.invalid", f"setting {setting}: {path}: {why}", key=setting)
