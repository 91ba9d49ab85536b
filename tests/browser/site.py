"""The console on a real port of this machine, with a database, for a browser."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import uvicorn

from portico.control.app import create_app
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to the test run."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass
class Site:
    """A running console. ``url`` has the host ``localhost``, for which browsers have passkeys without TLS."""

    url: str
    app: Any


@contextlib.asynccontextmanager
async def site(database_url: str, **settings: Any) -> AsyncIterator[Site]:
    """The control plane with its pages."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://localhost:{listener.getsockname()[1]}"
        base = ApiSettings(database_url=Secret(database_url), master_key=Secret(new_master_key()), api_url=url)
        app = create_app(replace(base, **settings))
        config = uvicorn.Config(app, lifespan="on", log_config=None, server_header=False, timeout_graceful_shutdown=1)
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with asyncio.timeout(30):
                while not server.started:
                    await asyncio.sleep(0.02)
            yield Site(url, app)
        finally:
            server.should_exit = True
            await serving
