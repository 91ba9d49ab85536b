"""A small HTTP server for the agent's local page: HTTP/1.1 by h11, bounded in size, time and number.

It listens on loopback, but every web page in the developer's browser can send requests there. So before a request reaches
the application, :class:`Guard` checks

- ``Host``: a name that an attacker lets point to 127.0.0.1 (DNS rebinding) is not ours;
- ``Origin`` and ``Sec-Fetch-Site``: what changes something comes from the page itself or from a program, never from another
  page, and other pages may not even read by script;

and every answer forbids framing, sniffing, caching and foreign content.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import h11

from portico.errors import Problem
from portico.settings import AgentSettings

log = logging.getLogger("portico.agent")

READ = 65_536
_HEADERS = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
)
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class Request:
    """``path`` is decoded; ``query`` has the last value of each name; ``headers`` lower-case names."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes = b""

    @property
    def wants_html(self) -> bool:
        return "text/html" in self.headers.get("accept", "")


@dataclass(slots=True)
class Answer:
    """``body`` is sent whole, or chunk by chunk as it comes. A header given here replaces the usual one."""

    status: int
    kind: str
    body: bytes | AsyncIterator[bytes]
    headers: dict[str, str] = field(default_factory=dict)


App = Callable[[Request], Awaitable[Answer]]


def failure(problem: Problem, request: Request | None = None) -> Answer:
    """A problem as an answer: a line for a browser's address bar, the document for everything else."""
    if request is not None and request.wants_html:
        return Answer(problem.status, "text/plain; charset=utf-8", (problem.line() + "\n").encode(), problem.headers)
    return Answer(problem.status, "application/problem+json", problem.json(), problem.headers)


class Guard:
    """Who may ask: ``host`` and ``port`` are the listener's, ``allowed`` further names, with a port or for any."""

    def __init__(self, host: str, port: int, allowed: Iterable[str]) -> None:
        self._port = port
        self._ours = {"localhost", "127.0.0.1", "[::1]"}
        if not ipaddress.ip_address(host).is_unspecified:
            self._ours.add(f"[{host}]" if ":" in host else host)
        self._any_port: set[str] = set()
        self._with_port: set[str] = set()
        for entry in allowed:
            name = entry.strip().lower()
            (self._with_port if name.rpartition(":")[2].isdigit() else self._any_port).add(name)

    def check(self, request: Request) -> None:
        """Raises ``inspect.host_denied`` or ``inspect.origin_denied``."""
        host = request.headers.get("host", "").lower()
        if not self._known(host):
            raise Problem("inspect.host_denied", f"the local page is not served as {host[:100]!r}")
        site = request.headers.get("sec-fetch-site", "none")
        origin = request.headers.get("origin")
        if request.method in ("GET", "HEAD"):
            # Following a link from elsewhere is fine; a script or an element of another page is not.
            navigates = request.headers.get("sec-fetch-mode") == "navigate"
            if site not in ("none", "same-origin") and not navigates:
                raise Problem("inspect.origin_denied")
        elif site not in ("none", "same-origin") or (origin is not None and origin.lower() != f"http://{host}"):
            raise Problem("inspect.origin_denied")

    def _known(self, host: str) -> bool:
        name, colon, port = host.rpartition(":")
        if not colon or port.endswith("]"):
            name, port = host, "80"
        if name in self._ours:
            return port == str(self._port)
        return name in self._any_port or host in self._with_port


class WebServer:
    """Serves ``app`` on a bound socket until :meth:`stop`."""

    def __init__(self, settings: AgentSettings, sock: socket.socket, guard: Guard, app: App) -> None:
        self._settings = settings
        self._sock = sock
        self._guard = guard
        self._app = app
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Accept connections."""
        self._server = await asyncio.start_server(self._connected, sock=self._sock, limit=READ)

    async def stop(self) -> None:
        """Close the listener and every connection."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= self._settings.web_connections_max:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await _Connection(self._settings, self._guard, self._app, reader, writer).run()
        except h11.LocalProtocolError:
            log.exception("the local page sent something that is no HTTP")
        except (OSError, TimeoutError, asyncio.CancelledError, h11.RemoteProtocolError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()


class _Connection:
    """One connection: requests one after the other."""

    def __init__(
        self,
        settings: AgentSettings,
        guard: Guard,
        app: App,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._settings = settings
        self._guard = guard
        self._app = app
        self._reader = reader
        self._writer = writer
        self._asked: Request | None = None
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=settings.web_head_max_bytes)

    async def run(self) -> None:
        """Serve until the client or a limit ends it."""
        while True:
            first = self._h11.trailing_data[0]
            if not first:
                async with asyncio.timeout(self._settings.web_idle_timeout_seconds):
                    first = await self._reader.read(READ)
                self._h11.receive_data(first)
                if not first:
                    return
            try:
                async with asyncio.timeout(self._settings.web_timeout_seconds):
                    request = await self._request()
            except h11.RemoteProtocolError as err:
                await self._refuse(Problem("request.malformed", f"not valid HTTP: {err}"), err.error_status_hint)
                return
            except Problem as problem:
                await self._refuse(problem, problem.status)
                return
            if request is None:
                return
            await self._send(await self._answer(request), request.method == "HEAD")
            if self._h11.our_state is not h11.DONE or self._h11.their_state is not h11.DONE:
                return
            self._h11.start_next_cycle()

    async def _event(self) -> Any:
        while True:
            event = self._h11.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self._h11.they_are_waiting_for_100_continue:
                self._writer.write(self._h11.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
            self._h11.receive_data(await self._reader.read(READ))

    async def _request(self) -> Request | None:
        """The next request; ``None`` when the client has closed. Raises what refuses it."""
        event = await self._event()
        if not isinstance(event, h11.Request):
            return None
        try:
            url = urlsplit(event.target.decode("ascii"))
            query = dict(parse_qsl(url.query, keep_blank_values=True, max_num_fields=32))
        except ValueError:
            raise Problem("request.malformed") from None
        if event.target[:1] != b"/" or event.target[:2] == b"//":
            raise Problem("request.malformed", "the request target must be a path")
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}
        request = Request(event.method.decode("ascii"), unquote(url.path), query, headers)
        self._asked = request
        self._guard.check(request)  # before a body is taken in
        body = bytearray()
        while isinstance(event := await self._event(), h11.Data):
            body += event.data
            if len(body) > self._settings.web_body_max_bytes:
                raise Problem("request.too_large", f"the body is over {self._settings.web_body_max_bytes} bytes")
        if not isinstance(event, h11.EndOfMessage):
            return None
        return Request(request.method, request.path, query, headers, bytes(body))

    async def _answer(self, request: Request) -> Answer:
        try:
            return await self._app(request)
        except Problem as problem:
            return failure(problem, request)
        except Exception:
            log.exception("the local page failed on %s %s", request.method, request.path[:200])
            return Answer(500, "text/plain; charset=utf-8", b"The local page failed; the agent's log says how.\n")

    async def _refuse(self, problem: Problem, status: int) -> None:
        """Answer a request that was not taken in; the connection closes."""
        if self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = failure(problem, self._asked)
            answer.status = status
            answer.headers = {**answer.headers, "Connection": "close"}
            await self._send(answer, False)

    async def _send(self, answer: Answer, bodiless: bool) -> None:
        headers = dict(_HEADERS)
        headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        headers["Content-Type"] = answer.kind
        headers |= answer.headers
        if isinstance(answer.body, bytes):
            headers["Content-Length"] = str(len(answer.body))
        self._put(h11.Response(status_code=answer.status, headers=list(headers.items())))
        if bodiless:
            if not isinstance(answer.body, bytes):
                await answer.body.aclose()  # type: ignore[attr-defined]
        elif isinstance(answer.body, bytes):
            self._put(h11.Data(data=answer.body))
        else:
            await self._stream(answer.body)
        self._put(h11.EndOfMessage())
        await self._drain()

    async def _stream(self, chunks: AsyncIterator[bytes]) -> None:
        """Send chunks as they come; a client that leaves, or speaks out of turn, ends it."""
        leaving = asyncio.ensure_future(self._reader.read(1))
        following: asyncio.Future[bytes] | None = None
        try:
            while True:
                following = asyncio.ensure_future(anext(chunks))
                await asyncio.wait((leaving, following), return_when=asyncio.FIRST_COMPLETED)
                if leaving.done():
                    raise ConnectionResetError
                try:
                    data = following.result()
                except StopAsyncIteration:
                    return
                self._put(h11.Data(data=data))
                await self._drain()
        finally:
            for task in (leaving, following):
                if task is not None and not task.done():
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
            await chunks.aclose()  # type: ignore[attr-defined]

    def _put(self, event: Any) -> None:
        self._writer.write(self._h11.send(event) or b"")

    async def _drain(self) -> None:
        async with asyncio.timeout(self._settings.web_timeout_seconds):
            await self._writer.drain()
