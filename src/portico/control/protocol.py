"""uvicorn's HTTP/1.1 with what it leaves open: limits on request heads, and problem documents for what it refuses.

uvicorn alone reads a head of any size for any time, so that anybody could fill the memory of the API or hold its
connections, and answers broken HTTP and an overload as plain text, which no client of this API can read.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from portico.control.http import PROBLEM_TYPE, SECURITY_HEADERS, answer
from portico.errors import Problem
from portico.kit.ids import new_id
from portico.settings import ApiSettings

#: Seconds that a stopping process still answers on a connection that is idle: a request on its way there would be lost.
DRAIN_IDLE_SECONDS = 0.5


class _HeadTooLarge(Exception):
    """Raised inside the parser, which hands on only that a callback failed."""


class Protocol(HttpToolsProtocol):
    """One connection. Made for one set of settings by :func:`protocol`."""

    settings: ClassVar[ApiSettings]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.limit_concurrency = None  # ours, below, answers in the API's own words
        self._serve = self.app
        self._leaving = False
        self._in_head = False
        self._head_bytes = 0  # of names and values read
        self._unread = (
            0  # bytes since the parser last had something to say: it gathers a name or value until it is whole
        )
        self._head_timer: asyncio.TimerHandle | None = None
        self._refusal = Problem("request.malformed", "this is not valid HTTP/1.1", hint="Correct the client.")

    # -- limits

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        # In trailers and chunk extensions too, which no other limit sees.
        if self._unread > 2 * self.settings.request_head_max_bytes and not self.transport.is_closing():
            self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes, self._unread = True, 0, 0
        if self._head_timer is None:
            self._arm()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._in_head, self._unread = False, 0
        self._disarm()
        limit = self.settings.max_concurrency
        busy = len(self.connections) >= limit or len(self.tasks) >= limit
        self.app = _busy if busy else self._serve
        super().on_headers_complete()
        if self._leaving and self.cycle is not None:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """The process stops: this connection ends with its next answer, which says so, or in a moment."""
        self._leaving = True
        if self._idle():
            self.loop.call_later(DRAIN_IDLE_SECONDS, self._end_idle)
        else:
            self.cycle.keep_alive = False

    def _idle(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _end_idle(self) -> None:
        if not self.transport.is_closing() and self._idle():
            self.transport.close()

    def _count(self, size: int) -> None:
        self._unread = 0
        self._head_bytes += size
        if self._head_bytes > self.settings.request_head_max_bytes:
            self._refusal = self._too_large()
            raise _HeadTooLarge

    def _too_large(self) -> Problem:
        limit = self.settings.request_head_max_bytes
        return Problem("request.head_too_large", f"a request head here has at most {limit} bytes", limit=limit)

    def _arm(self) -> None:
        self._head_timer = self.loop.call_later(self.settings.request_head_timeout_seconds, self._late)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        if self._in_head:
            self._refuse(Problem("request.timeout", "the request head did not arrive in time"))
        else:
            self.transport.close()  # it never began to ask

    # -- refusals

    def send_400_response(self, msg: str) -> None:
        """Whatever the parser does not take; uvicorn calls this."""
        self._refuse(self._refusal)

    def _refuse(self, problem: Problem) -> None:
        """Answer and close. What was being answered before is only cut: a refusal inside it would be read as its body."""
        self._disarm()
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(_response(problem))
        self.transport.close()


def _response(problem: Problem) -> bytes:
    request_id = new_id("req")
    body = problem.json(request_id)
    headers = {
        **SECURITY_HEADERS,
        "Content-Type": PROBLEM_TYPE,
        "Content-Length": str(len(body)),
        "X-Request-Id": request_id,
        "Connection": "close",
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[problem.status] + lines.encode() + b"\r\n" + body


async def _busy(scope: Scope, receive: Receive, send: Send) -> None:
    """The whole application while there are more requests than may be served at once."""
    problem = Problem("service.unavailable", "too many requests at once", headers={"Retry-After": "1"})
    request_id = new_id("req")
    response = answer(problem, request_id)
    response.headers.update({**SECURITY_HEADERS, "X-Request-Id": request_id, "Connection": "close"})
    await response(scope, receive, send)


def protocol(settings: ApiSettings) -> type[Protocol]:
    """The protocol class for ``uvicorn.Config(http=…)``."""
    return type("ApiProtocol", (Protocol,), {"settings": settings})
