"""A control plane small enough for a test, over real HTTP: sessions, refresh, tunnels, device flow."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any

KEY = "tnl_agt_0123456789abcdefghijABCDEFGHIJ3mpbCX"
Answer = tuple[int, dict[str, Any]]


def problem(status: int, code: str, detail: str = "no") -> Answer:
    """A problem document."""
    return status, {"code": code, "detail": detail, "hint": f"hint of {code}", "status": status}


class TestApi:
    """Answers by ``routes`` (method and path); every call is kept in ``calls``."""

    __test__ = False

    def __init__(self, edges: list[str] | None = None) -> None:
        self.edges = edges or []
        self.calls: list[tuple[str, str, dict[str, Any], str]] = []
        self.generation = 0
        self.refreshes = 0
        self.life = 900.0
        self.refresh_after = 600.0
        self.session = "ses_1"
        self.refuse: Answer | None = None
        self.routes: dict[str, Callable[[dict[str, Any]], Answer]] = {
            "POST /v1/agent/sessions": self.open,
            f"POST /v1/agent/sessions/{self.session}/refresh": self.refresh,
            f"DELETE /v1/agent/sessions/{self.session}": lambda body: (204, {}),
            f"POST /v1/agent/sessions/{self.session}/tunnels": self.add,
        }
        self.routes["GET /readyz"] = lambda body: (200, {"status": "ready"})
        self.routes["GET /openapi.json"] = lambda body: (200, {"info": {"version": "0.1.0"}})
        #: Seconds that this API's clock is ahead.
        self.clock_ahead = 0.0
        self.names: list[str] = []
        #: Tunnels that are refused, by name.
        self.refuse_names: dict[str, Answer] = {}
        self.server: asyncio.Server | None = None
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self, body: dict[str, Any]) -> Answer:
        for spec in body["tunnels"]:
            if spec.get("name") in self.refuse_names:
                return self.refuse_names[spec["name"]]
        self.generation += 1
        self.names = [spec.get("name") or "made-up" for spec in body["tunnels"]]
        return 201, self.document()

    def add(self, body: dict[str, Any]) -> Answer:
        name = body["name"]
        if name in self.refuse_names:
            return self.refuse_names[name]
        if name not in self.names:
            self.names.append(name)
            path = f"/v1/agent/sessions/{self.session}/tunnels/tun_{name}"
            self.routes[f"DELETE {path}"] = lambda body: self.names.remove(name) or (204, {})  # type: ignore[func-returns-value]
        host = body.get("subdomain", name)
        grants = [g for g in self.document()["grants"] if g["name"] == name]
        return 201, {"grants": [{**g, "url": f"http://{host}.localhost:7080"} for g in grants]}

    def refresh(self, body: dict[str, Any]) -> Answer:
        self.refreshes += 1
        return 200, self.document()

    def document(self) -> dict[str, Any]:
        mark = f"{self.generation}.{self.refreshes}"
        until = datetime.fromtimestamp(time.time() + self.life, UTC).isoformat()
        return {
            "session": self.session,
            "token": f"token {mark}",
            "expires_at": until,
            "refresh_after": self.refresh_after,
            "edges": self.edges,
            "account": {"organization": {"id": "org_1", "name": "Org"}, "user": "a@b.c", "plan": "free"},
            "grants": [
                {
                    "tunnel": f"tun_{name}",
                    "name": name,
                    "url": f"http://{name}.localhost:7080",
                    "grant": f"{name}:{mark}",
                    "expires_at": until,
                }
                for name in self.names
            ],
        }

    def find(self, method: str, path: str) -> Callable[[dict[str, Any]], Answer] | None:
        """What answers a call."""
        return self.routes.get(f"{method} {path}")

    def count(self, route: str) -> int:
        return sum(f"{method} {path}" == route for method, path, _, _ in self.calls)

    async def start(self, port: int = 0, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> TestApi:
        self.server = await asyncio.start_server(self._serve, host, port, reuse_address=True, ssl=tls)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split("\r\n")[0].split(" ")
                fields = {k.lower(): v for k, v in (line.split(": ", 1) for line in head.split("\r\n")[1:] if line)}
                raw = await reader.readexactly(int(fields.get("content-length", 0)))
                body = json.loads(raw) if raw else {}
                self.calls.append((method, path, body, fields.get("authorization", "")))
                route = self.find(method, path)
                status, answer = self.refuse or (route(body) if route else problem(404, "request.not_found"))
                data = b"" if status == 204 else json.dumps(answer).encode()
                length = "" if status == 204 else f"Content-Length: {len(data)}\r\n"
                date = f"Date: {formatdate(time.time() + self.clock_ahead, usegmt=True)}\r\n"
                writer.write(
                    f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{date}{length}\r\n".encode() + data
                )
        self._writers.discard(writer)
        writer.close()
