"""A secret scanner with GitHub's partner protocol: it has keys, publishes them, rotates them, and signs reports.

    async with SecretScanner() as scanner:                      # settings: secret_scanning_keys_url=scanner.url
        body, headers = scanner.report(["tnl_sk_…"])            # what it would POST to /v1/secret-scanning/github

It can misbehave: ``mode`` is ``ok``, ``down`` (answers 503), ``hang`` (never answers), ``huge`` (an endless document) or
``nonsense``; ``fetches`` counts how often its keys were asked for.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import Iterable
from typing import Any, Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from portico.simulators.loopback import Loopback

Mode = Literal["ok", "down", "hang", "huge", "nonsense"]
_HUGE_CHUNK = b"x" * 65_536


class SecretScanner(Loopback):
    """One scanner; ``url`` has its public keys while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.mode: Mode = "ok"
        self.fetches = 0
        self._keys: dict[str, ec.EllipticCurvePrivateKey] = {}
        self.current = self.rotate()

    def rotate(self) -> str:
        """A new signing key beside those before; its identifier."""
        self.current = secrets.token_hex(32)
        self._keys[self.current] = ec.generate_private_key(ec.SECP256R1())
        return self.current

    def document(self) -> dict[str, Any]:
        """The public keys, as they are published."""
        return {
            "public_keys": [
                {
                    "key_identifier": name,
                    "key": key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(),
                    "is_current": name == self.current,
                }
                for name, key in self._keys.items()
            ]
        }

    def sign(self, body: bytes) -> dict[str, str]:
        """The headers of a POST of exactly these bytes."""
        signature = self._keys[self.current].sign(body, ec.ECDSA(hashes.SHA256()))
        return {
            "Content-Type": "application/json",
            "Github-Public-Key-Identifier": self.current,
            "Github-Public-Key-Signature": base64.b64encode(signature).decode(),
        }

    def report(self, tokens: Iterable[str], url: str = "https://github.com/octocat/leaky/blob/main/.env") -> Any:
        """Body and headers of a report of these tokens."""
        matches = [{"token": t, "type": "portico_key", "url": url, "source": "content"} for t in tokens]
        body = json.dumps(matches).encode()
        return body, self.sign(body)

    @property
    def url(self) -> str:
        """Where its public keys are."""
        return f"http://127.0.0.1:{self.port}/meta/public_keys/secret_scanning"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.fetches += 1
        await self._answer(reader, writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode == "hang":
            await reader.read()
            return
        if self.mode == "huge":
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            while True:
                writer.write(_HUGE_CHUNK)
                await writer.drain()
        status = "503 Unavailable" if self.mode == "down" else "200 OK"
        body = b"<html>" if self.mode == "nonsense" else json.dumps(self.document()).encode()
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
        )
        writer.write(head.encode() + b"\r\n\r\n" + body)
        await writer.drain()
