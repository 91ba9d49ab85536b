"""How calls to the API travel: an httpx transport whose connections are dialled as those to a relay are.

So a proxy, several addresses and failures mean the same for both. httpx brings proxies of its own, but speaks SOCKS only with one
more library, looks every name up at the proxy, asks HTTP proxies for IPv6 addresses without brackets, and tells failures of the
proxy and of the API apart by words alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterable
from typing import Any

from portico.agent import proxy as proxies
from portico.agent.proxy import Proxy
from portico.errors import Problem
from portico.kit.dial import connect_tcp, reason
from portico.kit.lean import httpcore, httpx
from portico.settings import AgentSettings

#: Idle connections that are kept, and for how many seconds: what a NAT or proxy forgot meanwhile would hang.
KEPT, KEEP_SECONDS = 4, 5.0


class Transport(httpx.AsyncHTTPTransport):
    """Connections go through ``proxy``, if any, which opens them within ``timeout`` seconds; its problems pass as they are."""

    def __init__(self, proxy: Proxy | None, verify: ssl.SSLContext | bool, timeout: float) -> None:
        # A plain context is never used: it stands where http needs none, and costs no trust store to load.
        context = verify if isinstance(verify, ssl.SSLContext) else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        super().__init__(verify=context, trust_env=False)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_keepalive_connections=KEPT,
            keepalive_expiry=KEEP_SECONDS,
            network_backend=_Backend(proxy, timeout),
        )


def trust(settings: AgentSettings) -> ssl.SSLContext:
    """The TLS client context for the platform: its private CA (`ca_file`), or the public ones; raises ``config.invalid``."""
    file = settings.ca_file
    try:
        return ssl.create_default_context(cafile=str(file.expanduser()) if file else None)
    except OSError as err:  # ssl.SSLError, for a file that holds no certificate, is one too
        why = "holds no certificate" if isinstance(err, ssl.SSLError) else str(err.strerror)
        raise Problem("config.invalid", f"setting ca_file: {file}: {why}") from None


class _Backend(httpcore.AsyncNetworkBackend):
    def __init__(self, proxy: Proxy | None, timeout: float) -> None:
        self._proxy = proxy
        self._timeout = timeout

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        host = host.strip("[]")
        if self._proxy is not None:
            limit = self._timeout if timeout is None else min(timeout, self._timeout)
            sock = await proxies.connect(self._proxy, host, port, limit)
        else:
            with _mapped(httpcore.ConnectTimeout, httpcore.ConnectError):
                async with asyncio.timeout(timeout):
                    sock = await connect_tcp(host, port)
        reader, writer = await asyncio.open_connection(sock=sock)
        return _Stream(reader, writer)

    async def connect_unix_socket(self, path: str, timeout: float | None = None, socket_options: Any = None) -> Any:
        raise NotImplementedError

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _mapped(httpcore.ReadTimeout, httpcore.ReadError):
            async with asyncio.timeout(timeout):
                return await self._reader.read(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with _mapped(httpcore.WriteTimeout, httpcore.WriteError):
            async with asyncio.timeout(timeout):
                self._writer.write(buffer)
                await self._writer.drain()

    async def aclose(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        with _mapped(httpcore.ConnectTimeout, httpcore.ConnectError):
            async with asyncio.timeout(timeout):
                await self._writer.start_tls(ssl_context, server_hostname=server_hostname)
        return self

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # asked of an idle connection: whether the other side closed it
            return self._reader.at_eof()
        return self._writer.get_extra_info({"server_addr": "peername", "client_addr": "sockname"}.get(info, info))


@contextlib.contextmanager
def _mapped(late: type[Exception], broken: type[Exception]) -> Any:
    """httpcore's own exceptions for those of the sockets (``TimeoutError`` is an ``OSError`` too)."""
    try:
        yield
    except TimeoutError as err:
        raise late(str(err)) from err
    except ssl.SSLCertVerificationError as err:
        raise broken(f"its certificate is not trusted: {err.verify_message}") from err
    except OSError as err:
        raise broken(reason(err)) from err
