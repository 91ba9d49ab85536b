"""`portico api`: uvicorn around the app, with an end that is bounded.

uvicorn waits for open responses before it stops, and an event stream has no end of its own. So the first signal sets
``app.state.stopping``, which every stream watches; what is still open after ``shutdown_seconds`` is cut.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from portico.control import metrics as api_metrics
from portico.control.app import create_app
from portico.control.protocol import protocol
from portico.errors import Problem
from portico.kit import metrics, notify, sockets
from portico.kit.tlsfiles import CertificateFiles, certificate_files
from portico.settings import ApiSettings

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers (they would re-raise the signal after a clean end, and exit non-zero), and with
    a limit on TLS handshakes: uvicorn's own listeners have none that can be set."""

    def __init__(self, config: uvicorn.Config, files: CertificateFiles | None, handshake_seconds: float) -> None:
        super().__init__(config)
        self._context = files.context if files is not None else None
        self._handshake_seconds = handshake_seconds if files is not None else None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        loop = asyncio.get_running_loop()
        for sock in sockets or ():
            listener = await loop.create_server(
                self._connection,
                sock=sock,
                ssl=self._context,
                backlog=self.config.backlog,
                ssl_handshake_timeout=self._handshake_seconds,
            )
            self.servers.append(listener)

    def _connection(self) -> asyncio.Protocol:
        kind: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


async def serve(
    settings: ApiSettings, listen_socket: socket.socket | None = None, metrics_socket: socket.socket | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then end within ``shutdown_seconds`` (a second signal cuts at once).

    SIGHUP reads the certificate again. Raises ``config.invalid`` or what :func:`sockets.bind_tcp` raises.
    """
    files = certificate_files("api_tls", settings.api_tls_cert_file, settings.api_tls_key_file)
    app = create_app(settings)
    server = _Server(_config(app, settings), files, settings.request_head_timeout_seconds)
    listener = listen_socket or sockets.bind_tcp(
        settings.api_host, settings.api_port, what="API", option="PORTICO_API_PORT"
    )
    shown = await metrics.serve(
        api_metrics.DECLARED, lambda: api_metrics.read(app.state), lambda: not app.state.stopping.is_set(),
        settings, metrics_socket,
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    handled = (signal.SIGTERM, signal.SIGINT)
    for number in handled:
        loop.add_signal_handler(number, _stop, app, server, settings.notify_fd)
    loop.add_signal_handler(signal.SIGHUP, _reload, files)
    try:
        await server.serve(sockets=[listener])
    finally:
        if shown is not None:
            await shown.close()
        for number in (*handled, signal.SIGHUP):
            with suppress(ValueError, RuntimeError):
                loop.remove_signal_handler(number)
    if not server.started:
        raise RuntimeError("the API did not start; the log above says why")


def _reload(files: CertificateFiles | None) -> None:
    if files is None:
        log.info("nothing to read again: the API speaks plain HTTP")
        return
    try:
        files.reload()
    except Problem as problem:
        log.error("the certificate stays as it was", extra={"f": {"why": problem.detail}})
    else:
        log.info("read the certificate again")


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
