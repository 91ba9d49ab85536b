"""The API on a real socket, and a relay's view of its stream."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import uvicorn

from portico.control import server
from portico.control.app import create_app
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret

MASTER_KEY = new_master_key()
_SCHEMA = json.loads((Path(__file__).parents[3] / "contracts" / "edge-stream.schema.json").read_text())
_VALIDATOR = jsonschema.Draft202012Validator(_SCHEMA)


def api_settings(database_url: str, **more: Any) -> ApiSettings:
    return ApiSettings(
        database_url=Secret(database_url),
        master_key=Secret(MASTER_KEY),
        registrations_per_address=100_000,
        rate_auth_per_minute=0,
        rate_export_per_minute=0,
        rate_page_per_minute=0,
        rate_read_per_minute=0,
        rate_unknown_per_minute=0,
        rate_write_per_minute=0,
        edge_heartbeat_seconds=0.3,
        edge_poll_seconds=0.5,
        dns_resolvers=("127.0.0.1:9",),
        dns_timeout_seconds=0.05,
        **more,
    )


class Api:
    """One API process in all but the process: an app with its own pool, hub and listening socket."""

    def __init__(self, settings: ApiSettings) -> None:
        self.app = create_app(settings)
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Api]:
        # With its protocol named asyncio sends small writes at once; without, every answer waits for an ACK (40 ms).
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = server._config(self.app, self.app.state.settings)
        instance = uvicorn.Server(config)
        instance.capture_signals = _no_signals  # type: ignore[method-assign, assignment]
        task = asyncio.create_task(instance.serve(sockets=[listening]))
        while not instance.started:
            await asyncio.sleep(0.01)
        try:
            yield self
        finally:
            self.app.state.stopping.set()
            instance.should_exit = True
            await task
            listening.close()

    def client(self, credential: str | None = None) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {credential}"} if credential else {}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=20)


class _no_signals:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Stream:
    """What a relay holds after the lines that it read. Each line is checked against the contract."""

    def __init__(self, response: httpx.Response, *, checked: bool = True) -> None:
        self._checked = checked
        self._lines = response.aiter_lines()
        self.version = -1
        self.lines: list[dict[str, Any]] = []
        self.changes: list[dict[str, Any]] = []

    async def next(self, seconds: float = 30.0) -> dict[str, Any]:
        """The next line. Raises ``StopAsyncIteration`` at the end of the stream."""
        line = json.loads(await asyncio.wait_for(anext(self._lines), seconds))
        if self._checked:
            _VALIDATOR.validate(line)
        if line["type"] == "heartbeat":
            assert line["version"] == self.version or self.version == -1
        elif line["type"] != "goodbye":
            assert line["version"] > self.version, "versions rise"
            self.version = line["version"]
            self.changes += line.get("changes", [])
        self.lines.append(line)
        return line

    async def until(self, wanted: Callable[[dict[str, Any]], bool], seconds: float = 30.0) -> dict[str, Any]:
        """The first line that is wanted."""
        async with asyncio.timeout(seconds):
            while not wanted(line := await self.next(seconds)):
                pass
        return line

    async def change(self, seconds: float = 30.0, **members: Any) -> dict[str, Any]:
        """The first change with these members, as soon as it is there."""
        looked = 0
        async with asyncio.timeout(seconds):
            while True:
                for found in self.changes[looked:]:
                    if members.items() <= found.items():
                        return found
                looked = len(self.changes)
                await self.next(seconds)

    async def ended(self, seconds: float = 30.0) -> None:
        """Read to the end."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await self.next(seconds)
        except (StopAsyncIteration, httpx.RemoteProtocolError, httpx.ReadError):
            return


@asynccontextmanager
async def following(
    client: httpx.AsyncClient, version: int | None = None, *, checked: bool = True
) -> AsyncIterator[Stream]:
    """An open edge stream."""
    params = {} if version is None else {"version": version}
    async with client.stream("GET", "/v1/edge/stream", params=params) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"] == "application/x-ndjson"
        yield Stream(response, checked=checked)
