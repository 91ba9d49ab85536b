"""An object store that speaks S3 as far as one PUT goes, and believes signatures alone (AWS Signature Version 4)."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from types import TracebackType
from typing import Self
from urllib.parse import quote, unquote

import h11

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/([^,]+), ?SignedHeaders=([^,]+), ?Signature=([0-9a-f]{64})"
)


class ObjectStore:
    """Listens on 127.0.0.1 while it is entered. ``fail``: so many requests are answered 500 first."""

    def __init__(self, key: str, secret: str) -> None:
        self.key, self.secret = key, secret
        self.objects: dict[str, bytes] = {}
        self.order: list[str] = []
        self.refused = 0
        self.fail = 0
        self._server: asyncio.Server | None = None
        self.url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        request: h11.Request | None = None
        body = b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(65_536))
            elif isinstance(event, h11.Request):
                request, body = event, b""
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert request is not None
                status = self._answer(request, body)
                headers = [("content-length", "0"), ("etag", f'"{hashlib.md5(body).hexdigest()}"')]
                writer.write(connection.send(h11.Response(status_code=status, headers=headers)) or b"")
                writer.write(connection.send(h11.EndOfMessage()) or b"")
                await writer.drain()
                connection.start_next_cycle()
            else:
                writer.close()
                return

    def _answer(self, request: h11.Request, body: bytes) -> int:
        if self.fail:
            self.fail -= 1
            return 500
        fields = {name.decode(): value.decode() for name, value in request.headers}
        path = request.target.decode()
        if not self._signed(request.method.decode(), path, fields, body):
            self.refused += 1
            return 403
        self.objects[unquote(path)] = body
        self.order.append(unquote(path))
        return 200

    def _signed(self, method: str, target: str, fields: dict[str, str], body: bytes) -> bool:
        match = _AUTHORIZATION.fullmatch(fields.get("authorization", ""))
        if match is None or match[1] != self.key:
            return False
        scope, names, given = match[2], match[3].split(";"), match[4]
        path, _, query = target.partition("?")
        digest = fields["x-amz-content-sha256"]
        if digest not in ("UNSIGNED-PAYLOAD", hashlib.sha256(body).hexdigest()):
            return False
        canonical = "\n".join([
            method, quote(unquote(path), safe="/-_.~"), query, *(f"{name}:{fields[name].strip()}" for name in names), "",
            ";".join(names), digest,
        ])  # fmt: skip
        signed = "\n".join([
            "AWS4-HMAC-SHA256", fields["x-amz-date"], scope, hashlib.sha256(canonical.encode()).hexdigest(),
        ])  # fmt: skip
        key = f"AWS4{self.secret}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        return hmac.compare_digest(hmac.digest(key, signed.encode(), "sha256").hex(), given)
