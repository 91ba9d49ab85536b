"""The public keys with which a secret scanner signs its reports, and the check of a signature.

The document is GitHub's (https://docs.github.com, "Secret scanning partner program"): ``{"public_keys": [{"key_identifier",
"key", "is_current"}]}``, keys as PEM of ECDSA P-256. It comes from a file, read at the start, or from an address of the
installation's choice, fetched when a report names a key that is not known: one fetch at a time, and after one the next no
sooner than ``RETRY_SECONDS`` later, whatever unknown keys are named meanwhile. Keys fetched before outlive an outage of that
address for a day.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from portico.errors import Problem
from portico.kit.clock import Clock
from portico.kit.dial import is_loopback
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 30.0
_STALE_SECONDS: Final = 86_400.0
_FETCH_SECONDS: Final = 5.0
_DOCUMENT_BYTES: Final = 65_536
_MAX_KEYS: Final = 32
# Characters of a key's name and of a signature in base64 (DER of two 32-byte numbers has 72 bytes at most).
_IDENTIFIER_CHARS: Final = 128
_SIGNATURE_CHARS: Final = 128

Keys = dict[str, ec.EllipticCurvePublicKey]


def read_keys(document: bytes) -> Keys:
    """The P-256 keys of a document by their identifiers; others are left out. Raises ``ValueError`` when it is none."""
    try:
        rows = json.loads(document)["public_keys"]
        texts = {str(row["key_identifier"]): str(row["key"]) for row in rows[:_MAX_KEYS]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("not a document of public keys") from None
    found: Keys = {}
    for name, text in texts.items():
        try:
            key = load_pem_public_key(text.encode())
        except (ValueError, UnsupportedAlgorithm):
            continue
        if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
            found[name] = key
    return found


def fits(key: ec.EllipticCurvePublicKey, signature: str, body: bytes) -> bool:
    """Whether ``signature`` (base64 of DER) is the key's over exactly ``body``, by ECDSA with SHA-256."""
    if len(signature) > _SIGNATURE_CHARS:
        return False
    try:
        key.verify(base64.b64decode(signature, validate=True), body, ec.ECDSA(hashes.SHA256()))
    except (binascii.Error, ValueError, InvalidSignature):
        return False
    return True


class ScannerKeys:
    """The keys of one scanner. One per process."""

    def __init__(self, settings: ApiSettings, clock: Clock) -> None:
        self._url = _checked(settings.secret_scanning_keys_url)
        self._life = settings.secret_scanning_keys_seconds
        self._clock = clock
        self._fixed = _from_file(settings.secret_scanning_keys_file)
        self._fetched: Keys = {}
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._lock = asyncio.Lock()

    @property
    def configured(self) -> bool:
        """Whether there is anything that a signature could be checked with."""
        return bool(self._fixed or self._url)

    async def check(self, identifier: str, signature: str, body: bytes) -> None:
        """Raises ``secret_scanning.signature_invalid``, or ``service.unavailable`` when the keys cannot be had just now."""
        key = await self._key(identifier) if 0 < len(identifier) <= _IDENTIFIER_CHARS else None
        if key is None or not fits(key, signature, body):
            raise Problem("secret_scanning.signature_invalid")

    async def _key(self, identifier: str) -> ec.EllipticCurvePublicKey | None:
        if found := self._fixed.get(identifier):
            return found
        if not self._url:
            return None
        if self._age() < self._life and identifier in self._fetched:
            return self._fetched[identifier]
        async with self._lock:
            known = identifier in self._fetched and self._age() < self._life
            if not known and self._clock.monotonic() - self._tried_at >= RETRY_SECONDS:
                await self._fetch()
        if self._age() > _STALE_SECONDS:
            raise Problem(
                "service.unavailable", "the scanner's public keys cannot be had", headers={"Retry-After": "30"}
            )
        return self._fetched.get(identifier)

    def _age(self) -> float:
        return self._clock.monotonic() - self._fetched_at

    async def _fetch(self) -> None:
        self._tried_at = self._clock.monotonic()
        try:
            self._fetched = read_keys(await _download(self._url))
            self._fetched_at = self._clock.monotonic()
        except (httpx.HTTPError, ValueError, TimeoutError) as err:
            log.warning(
                "the scanner's keys were not fetched", extra={"f": {"error": f"{type(err).__name__}: {err}"[:200]}}
            )


async def _download(url: str) -> bytes:
    """The document, of bounded size and within a bounded time. Raises ``httpx.HTTPError``, ``TimeoutError``, ``ValueError``."""
    body = bytearray()
    async with (
        asyncio.timeout(_FETCH_SECONDS),
        httpx.AsyncClient(follow_redirects=False) as client,
        client.stream("GET", url, headers={"Accept": "application/json"}) as answer,
    ):
        if answer.status_code != 200:
            raise ValueError(f"the answer was {answer.status_code}")
        async for chunk in answer.aiter_bytes(16_384):
            body += chunk
            if len(body) > _DOCUMENT_BYTES:
                raise ValueError("the answer is too long")
    return bytes(body)


def _checked(url: str) -> str:
    """The address; keys that come in the clear could be anybody's."""
    parts = urlsplit(url)
    if url and not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))):
        raise Problem(
            "config.invalid", "setting secret_scanning_keys_url: https://…, please", key="secret_scanning_keys_url"
        )
    return url


def _from_file(path: Path | None) -> Keys:
    if path is None:
        return {}
    try:
        found = read_keys(path.expanduser().read_bytes())
    except (OSError, ValueError) as err:
        why = getattr(err, "strerror", None) or str(err)
        detail = f"setting secret_scanning_keys_file: {path}: {why}"
        raise Problem("config.invalid", detail, key="secret_scanning_keys_file") from None
    if not found:
        detail = f"setting secret_scanning_keys_file: {path} has no ECDSA P-256 key"
        raise Problem("config.invalid", detail, key="secret_scanning_keys_file")
    return found
