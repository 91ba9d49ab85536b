"""`portico api`: uvicorn around the app, with an end that is bounded.

uvicorn waits for open responses before it stops, and an event stream has no end of its own. So the first signal sets
``app.state.stopping``, which every stream watches; what is still open after ``shutdown_seconds`` is cut.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from portico.control.app import create_app
from portico.control.protocol import protocol
from portico.kit import notify
from portico.settings import ApiSettings

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: they would re-raise the signal after a clean end, and exit non-zero."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: ApiSettings, listen_socket: socket.socket | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then end within ``shutdown_seconds`` (a second signal cuts at once)."""
    app = create_app(settings)
    server = _Server(_config(app, settings))
    loop = asyncio.get_running_loop()
    handled = (signal.SIGTERM, signal.SIGINT)
    for number in handled:
        loop.add_signal_handler(number, _stop, app, server, settings.notify_fd)
    try:
        await server.serve(sockets=[listen_socket] if listen_socket else None)
    finally:
        for number in handled:
            with suppress(ValueError, RuntimeError):
                loop.remove_signal_handler(number)
    if not server.started:
        raise RuntimeError("the API did not start; the log above says why")


def _stop(app: FastAPI, server: uvicorn.Server, notify_fd: int | None) -> None:
    if server.should_exit:
        server.force_exit = True
        return
    log.info("stopping")
    notify.stopping(notify_fd)
    app.state.stopping.set()
    server.should_exit = True


def _config(app: FastAPI, settings: ApiSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        http=protocol(settings),
        ws="none",
        lifespan="on",
        loop="none",  # the caller runs the loop (kit/loop.py)
        log_config=None,
        access_log=False,
        server_header=False,
        # X-Forwarded-For is read by control/access.py, from trusted proxies alone.
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, int(settings.shutdown_seconds)),
    )
