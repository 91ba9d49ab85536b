"""What every HTTP exchange with the API has: a request id, limits on the body, security headers, problem documents.

One pure ASGI middleware (Starlette's BaseHTTPMiddleware would buffer and break streams) and the exception handlers.
No input is a 500: whatever is not a ``Problem`` is either shaped into one or logged with the request id.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import asyncpg
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy import exc as sa_exc
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from portico.control.console import frame
from portico.control.limits import Limits, Ticket
from portico.control.metrics import Tally
from portico.control.shortcuts import Shortcuts
from portico.errors import Problem
from portico.kit.ids import new_id
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

PROBLEM_TYPE = "application/problem+json"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_ERRORS = 20
# What brings a whole settlement.
_RECEIPTS = ("/v1/billing/settlement-receipts", "/v1/admin/settlements/import")
# Of two that differ, one program would believe the first and another the last.
_SINGLE = (b"authorization", b"content-type", b"idempotency-key")
_CONTROLS = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def answer(problem: Problem, request_id: str) -> Response:
    """The problem as a response."""
    headers = {**problem.headers}
    if problem.status == 401:
        headers.setdefault("WWW-Authenticate", "Bearer")
    return Response(problem.json(request_id), problem.status, headers, media_type=PROBLEM_TYPE)


def answer_to(request: Request, problem: Problem) -> Response:
    """The same, or a page where a person with a browser waits for it."""
    if frame.wants_page(request):
        return frame.problem_page(problem, _id(request))
    return answer(problem, _id(request))


class Exchange:
    """The middleware. ``scope["state"]["request_id"]`` is set before anything else runs."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self.app = app
        self.settings = settings
        found = dict(SECURITY_HEADERS)
        if settings.api_url.startswith("https://"):
            found["Strict-Transport-Security"] = "max-age=31536000"
        self.headers = _raw(found)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        tally: Tally = scope["app"].state.tally
        tally.in_flight += 1
        began = time.perf_counter()
        scope.setdefault("state", {})["request_id"] = request_id
        started = False
        limits: Limits = scope["app"].state.limits
        ticket: Ticket | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                tally.answered(message["status"], time.perf_counter() - began)
                more = {} if ticket is None else _told(limits, ticket, scope, headers, message["status"])
                self._finish(message, {**more, "X-Request-Id": request_id})
            await send(message)

        try:
            limit = self._limit(scope, headers)
            ticket = await limits.admit(scope, headers)
            response, rest = await _cut_short(scope, self._bounded(receive, limit))
            if response is None:
                await self.app(scope, rest, send_with_headers)
            else:
                await response(scope, rest, send_with_headers)
        except Problem as problem:
            if started:
                raise
            await answer_to(Request(scope), problem)(scope, receive, send_with_headers)
        except ClientDisconnect:
            log.debug("the client left before its body was whole", extra={"f": {"request": request_id}})
        except asyncio.CancelledError:
            # The server's patience with open requests at its end is over. In the middle of an answer it cuts by itself.
            if started or not scope["app"].state.stopping.is_set():
                raise
            log.info("request ended with the process", extra={"f": {"request": request_id}})
            await answer_to(Request(scope), _stopping())(scope, receive, send_with_headers)
        except Exception:
            log.exception("request failed", extra={"f": {"request": request_id, "path": scope["path"]}})
            if started:
                raise  # the server cuts the connection: the client must not take a torn answer for a whole one
            await answer_to(Request(scope), Problem("internal.error"))(scope, receive, send_with_headers)
        finally:
            tally.in_flight -= 1

    def _finish(self, message: Message, own: Mapping[str, str]) -> None:
        """Add to the head of an answer what each has, and ``own``, which replaces what is there."""
        added = _raw(own)
        names = {name for name, _ in added}
        found = [pair for pair in message.get("headers", ()) if pair[0] not in names]
        names = {name for name, _ in found}
        message["headers"] = [*found, *added, *(pair for pair in self.headers if pair[0] not in names)]

    def _limit(self, scope: Scope, headers: Headers) -> int:
        """The body limit of this request; raises for what its head alone rules out."""
        if _CONTROLS.search(scope["path"]) or b"%00" in scope["query_string"]:
            raise Problem("request.malformed", "the address holds control characters")
        names = [name for name, _ in scope["headers"]]
        for name in _SINGLE if len(set(names)) < len(names) else ():
            if names.count(name) > 1:
                shown = name.decode()
                raise Problem("request.malformed", f"the header {shown} is there twice", hint="Send it once.")
        limit = self.settings.request_body_max_bytes
        if scope["path"].startswith("/v1/edge/"):
            limit = self.settings.edge_body_max_bytes
        elif scope["path"] == "/v1/domains/cert-events":
            limit = self.settings.cert_event_max_bytes
        elif scope["path"].startswith("/v1/billing/webhooks/"):
            limit = self.settings.billing_webhook_max_bytes
        elif scope["path"] in _RECEIPTS:
            limit = self.settings.settlement_receipt_max_bytes
        declared = headers.get("content-length", "0")
        if len(declared) > 18 or not declared.isdecimal() or int(declared) > limit:
            raise Problem("request.too_large", f"a body here has at most {limit} bytes", limit=limit)
        return limit

    def _bounded(self, receive: Receive, limit: int) -> Receive:
        """``receive`` that counts the body and its time. Once the body is whole it only waits for the disconnect."""
        received = 0
        whole = False
        deadline = asyncio.get_running_loop().time() + self.settings.request_body_timeout_seconds

        async def bounded() -> Message:
            nonlocal received, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise Problem("request.timeout") from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if received > limit:
                    raise Problem("request.too_large", f"a body here has at most {limit} bytes", limit=limit)
            return message

        return bounded


async def _cut_short(scope: Scope, receive: Receive) -> tuple[Response | None, Receive]:
    """As :meth:`Shortcuts.answer`; what routes' handlers of exceptions would answer is answered here."""
    shortcuts: Shortcuts = scope["app"].state.shortcuts
    try:
        return await shortcuts.answer(scope, receive)
    except (sa_exc.DBAPIError, asyncpg.PostgresError) as err:
        return await _on_database(Request(scope), err), receive


def _told(limits: Limits, ticket: Ticket, scope: Scope, headers: Headers, status: int) -> dict[str, str]:
    """What the answer says of the limit that its request was counted by."""
    if status == 401:
        limits.forget(headers)
    return limits.answered(ticket, scope, status)


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """As ASGI has them."""
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


def _stopping() -> Problem:
    return Problem(
        "service.unavailable", "this process is stopping", headers={"Retry-After": "1", "Connection": "close"}
    )


def _request_id(offered: str | None) -> str:
    """The client's own id when it is harmless in a log line and a header, else a new one."""
    return offered if offered and _REQUEST_ID.fullmatch(offered) else new_id("req")


def install(app: FastAPI, settings: ApiSettings) -> None:
    """Add the middleware and the exception handlers."""
    app.state.tally = Tally()
    app.add_middleware(Exchange, settings=settings)
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(sa_exc.DBAPIError, _on_database)
    app.add_exception_handler(asyncpg.PostgresError, _on_database)


def _id(request: Request) -> str:
    return str(request.scope["state"]["request_id"])


async def _on_problem(request: Request, err: Exception) -> Response:
    assert isinstance(err, Problem)
    return answer_to(request, err)


async def _on_validation(request: Request, err: Exception) -> Response:
    """422 for a shape that does not fit; names the fields, never repeats their values (one may be a password)."""
    assert isinstance(err, RequestValidationError)
    errors = list(err.errors())
    if any(e["type"] == "json_invalid" for e in errors):
        return answer_to(request, Problem("request.malformed", "the body is not valid JSON"))
    shown = [_field_error(e) for e in errors[:_MAX_ERRORS]]
    first, rest = shown[0], len(errors) - 1
    where = f"{first['field']}: {first['message']}" + (f" (and {rest} more)" if rest else "")
    return answer_to(request, Problem("request.invalid", f"the request does not fit: {where}", errors=shown))


def _field_error(error: dict[str, Any]) -> dict[str, str]:
    # A path of the payload can hold a key that the client chose; it is cut, and only names its place.
    parts: Iterable[str] = (str(part)[:64].encode("utf-8", "replace").decode() for part in error["loc"])
    return {"field": ".".join(parts), "message": str(error["msg"])[:200], "type": str(error["type"])}


async def _on_http(request: Request, err: Exception) -> Response:
    """Starlette's own refusals: no route, no method, a body that could not be read."""
    assert isinstance(err, HTTPException)
    if isinstance(err.__cause__, Problem):  # raised by the bounded body, wrapped by FastAPI
        return answer_to(request, err.__cause__)
    if err.status_code == 404:
        hint = "Check the path; /openapi.json at the root lists every operation, and all of them are under /v1."
        return answer_to(request, Problem("request.not_found", "there is nothing at this address", hint=hint))
    if err.status_code == 405:
        allow = ", ".join(_methods(request)) or (err.headers or {}).get("allow", "")
        return answer_to(request, Problem("request.method_not_allowed", headers={"Allow": allow}))
    if 400 <= err.status_code < 500:
        return answer_to(request, Problem("request.malformed", "the body could not be read"))
    log.error("request failed", extra={"f": {"request": _id(request), "status": err.status_code}})
    return answer_to(request, Problem("internal.error"))


def _methods(request: Request) -> list[str]:
    """Every method of the address (RFC 9110 section 15.5.6); Starlette names those of the first route that fits its path.

    An address that is written out (`/api-keys/posture`) is none of the objects that a pattern beside it (`/api-keys/{key}`)
    would take it for: of several patterns the one with the fewest parameters decides.
    """
    path, state = request.scope["path"], request.app.state
    if not hasattr(state, "patterns"):
        state.patterns = _patterns(request.app)
    fitting = [(pattern.count("{"), methods) for pattern, fits, methods in state.patterns if fits(path)]
    least = min((parameters for parameters, _ in fitting), default=0)
    return sorted(set[str]().union(*(methods for parameters, methods in fitting if parameters == least)))


def _patterns(app: FastAPI) -> list[tuple[str, Callable[[str], Any], frozenset[str]]]:
    """Every route: its path as declared, a test of a path, its methods."""
    found: list[tuple[str, Callable[[str], Any], frozenset[str]]] = []
    for route in app.router.routes:
        for known in [*route.effective_route_contexts()] if hasattr(route, "effective_route_contexts") else [route]:
            path = str(getattr(known, "path", ""))
            methods = frozenset(getattr(known, "methods", None) or ())
            refuses = getattr(getattr(known, "endpoint", None), "refuses", False)  # it is there to say 405
            found.append((path, compile_path(path)[0].match, frozenset() if refuses else methods))
    return found


_RETRY = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError, asyncpg.LockNotAvailableError)
_LOST = (asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError, asyncpg.CrashShutdownError, OSError)
_SLOW = (asyncpg.QueryCanceledError, asyncpg.TooManyConnectionsError, asyncpg.InterfaceError)


async def _on_database(request: Request, err: Exception) -> Response:
    """A lost race or a lost connection is the client's to retry; anything else is a fault of ours."""
    origin = err.orig.__cause__ if isinstance(err, sa_exc.DBAPIError) and err.orig is not None else err
    if isinstance(origin, _RETRY):
        return answer_to(request, Problem("request.conflict", headers={"Retry-After": "1"}))
    if isinstance(origin, _LOST + _SLOW):
        log.warning("database failed", extra={"f": {"request": _id(request), "error": type(origin).__name__}})
        return answer_to(request, Problem("service.unavailable", headers={"Retry-After": "1"}))
    raise err
