"""One request is one transaction, and a repeated write is carried out once.

    router = APIRouter(route_class=UnitOfWork)

A write route gets an open transaction (``access.InTx``) that is committed *before* the answer leaves; a problem
rolls it back. A read route gets a connection (``access.Reading``). The body is read before a connection is taken, so a slow
sender holds none.

``Idempotency-Key``: the key, the request's fingerprint and the answer are written in the same transaction as the
change, so there is no moment at which one exists without the other. A concurrent duplicate waits on the row of the
first. Only successes are kept (a refusal changed nothing, repeating it is harmless). Answers are sealed under the
master key, since one may carry a secret that is shown once; the repeat shows the same secret to the same caller.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import sqlalchemy as sa
from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy.dialects.postgresql import insert

from portico.control import access
from portico.errors import Problem
from portico.kit import columns
from portico.kit.batches import delete_in_batches
from portico.kit.db import Database, Reader, Tx, metadata
from portico.kit.sealing import Sealer

WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
Handler = Callable[[Request], Coroutine[Any, Any, Response]]

idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("caller", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("fingerprint", sa.LargeBinary, nullable=False),
    sa.Column("status", sa.SmallInteger),
    sa.Column("content_type", sa.Text),
    sa.Column("location", sa.Text),
    sa.Column("body", sa.LargeBinary),
    columns.created(),
    sa.Index(None, "created_at"),
)

# Marks, in what a route adds to OpenAPI, one that takes an Idempotency-Key; openapi.py says so in OpenAPI's own words.
REPEATABLE = "x-repeatable"
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
# What JSON allows and PostgreSQL or UTF-8 does not: NUL, lone surrogates, and Python's own NaN and Infinity.
_SUSPECT = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])|NaN|Infinity")


# Of text that is shown to people and printed in terminals: what ends a line, steers a terminal or turns text around.
_UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    """``text`` as it is; a ``ValueError`` (422) when it would show as something else than it says."""
    if _UNSHOWN.search(text):
        raise ValueError("control characters are not text")
    return text


class JsonRoute(APIRoute):
    """A route whose body is whole and storable before the handler runs, and that shows in OpenAPI whom it admits."""

    repeatable = False

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        found = _access(self.dependant)
        shown = found.openapi() if found is not None else {}
        self.openapi_extra = {**shown, REPEATABLE: self.repeatable, **(self.openapi_extra or {})}

    def get_route_handler(self) -> Handler:
        inner = self._wrap(super().get_route_handler())

        async def handle(request: Request) -> Response:
            refuse_unstorable(await request.body())
            try:
                return await inner(request)
            except Problem as problem:
                await _note_refusal(request, problem)
                raise

        return handle

    def _wrap(self, inner: Handler) -> Handler:
        """What a kind of route puts around its handler; it has ended when a refusal is recorded."""
        return inner


def _access(dependant: Dependant) -> access.Access | None:
    """Who may call, by what the dependencies of a route declare; the outermost decides."""
    for inner in dependant.dependencies:
        found = access.declared(inner.call) or _access(inner)
        if found is not None:
            return found
    return None


def _again(dependant: Dependant) -> Iterable[Callable[[Request, access.Caller], Any]]:
    """What the dependencies of a route check of its caller, each of those that say so."""
    for inner in dependant.dependencies:
        yield from access.again(inner.call) or _again(inner)


class Repeatable(JsonRoute):
    """A route that opens its transactions itself, and takes an Idempotency-Key by calling :func:`once`."""

    repeatable = True


class UnitOfWork(JsonRoute):
    """A route that runs in one transaction (writes) or on one connection (reads)."""

    repeatable = True

    def _wrap(self, inner: Handler) -> Handler:
        return _write(inner, self) if self.methods and self.methods & WRITES else _read(inner)


def _read(inner: Handler) -> Handler:
    async def handle(request: Request) -> Response:
        db: Database = request.app.state.db
        async with db.read() as reader:
            request.state.reader = reader
            return await inner(request)

    return handle


def _write(inner: Handler, route: JsonRoute) -> Handler:
    async def admit(request: Request, who: access.Caller) -> None:
        for check in _again(route.dependant):
            await check(request, who)

    async def handle(request: Request) -> Response:
        db: Database = request.app.state.db
        async with db.transaction() as tx:
            request.state.reader = tx
            if "idempotency-key" in request.headers:
                return await once(request, tx, lambda: inner(request), admit)
            return await inner(request)

    return handle


async def _note_refusal(request: Request, problem: Problem) -> None:
    """Record that a caller was refused an act that its route says is worth knowing; the act's transaction is gone by now.

    What only operators may do is recorded in the installation's log, whoever tried.
    """
    act: str | None = getattr(request.state, "act", None)
    if act is None or problem.status not in (403, 409):
        return
    who: access.Caller = request.state.caller
    details = {"code": problem.code, **{k: v for k, v in problem.extra.items() if k in ("permission", "limit")}}
    target = next(iter(request.path_params.values()), None)
    chain = "installation" if getattr(request.state, "act_of_installation", False) else None
    await request.app.state.note_refusal(who, act, target and str(target)[:64], details, organization=chain)


def refuse_unstorable(body: bytes) -> None:
    """Raises ``request.invalid`` for JSON whose strings or numbers cannot be stored; other faults are the parser's."""
    if not _SUSPECT.search(body):
        return
    try:
        document = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return  # not JSON at all: the parser says so in its own words
    stack = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack.extend(value.keys())
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise _unstorable("NUL and lone surrogates are not text")


def _no_constant(name: str) -> Any:
    raise _unstorable(f"{name} is not JSON")


def _unstorable(message: str) -> RequestValidationError:
    return RequestValidationError([{"type": "text_invalid", "loc": ("body",), "msg": message, "input": None}])


def fingerprint(method: str, path: str, query: str, body: bytes) -> bytes:
    """What makes two requests the same request."""
    head = f"{method}\n{path}\n{query}\n".encode()
    return hashlib.sha256(head + body).digest()


async def once(
    request: Request,
    tx: Tx,
    run: Callable[[], Awaitable[Response]],
    admit: Callable[[Request, access.Caller], Awaitable[None]] | None = None,
) -> Response:
    """``run()`` unless this caller already did under the same key; then its stored answer, if ``admit`` lets the caller have it:
    what ``run`` would check first. Rights and proofs end within a session, and an answer may hold what they were asked for.
    """
    key = request.headers["idempotency-key"]
    if not _KEY.fullmatch(key):
        raise Problem("idempotency.key_invalid")
    who = await access.identify(request)
    caller = _actor(who)
    sealer: Sealer = request.app.state.sealer
    plain = fingerprint(request.method, request.url.path, request.url.query, await request.body())
    # Under a key: a body may hold a password, and a bare hash of it would let anybody who reads the row try words.
    mark = bytes.fromhex(sealer.mac("idempotent request", plain.hex()))
    life = timedelta(seconds=request.app.state.settings.idempotency_seconds)
    if not await _claim(tx, caller, key, mark, life):
        if admit is not None:
            await admit(request, who)
        return await _replay(tx, caller, key, (mark, plain), sealer)
    response = await run()
    await _remember(tx, caller, key, response, sealer)
    return response


async def permitted(request: Request, reader: Reader, permission: str) -> access.Caller:
    """``access.require(permission)`` on a connection at hand, for routes that open theirs themselves."""
    request.state.reader = reader
    who = await access.identify(request)
    who.check(permission)
    return who


async def writing(
    request: Request, permission: str, run: Callable[[Tx, access.Caller], Awaitable[Response]]
) -> Response:
    """``run`` in a transaction that is committed before the answer leaves; once, for an ``Idempotency-Key``."""
    async with request.app.state.db.transaction() as tx:
        who = await permitted(request, tx, permission)
        if "idempotency-key" in request.headers:
            return await once(request, tx, lambda: run(tx, who))
        return await run(tx, who)


def _actor(who: access.Caller) -> str:
    """Whose keys these are. A person may act in several organizations and sessions, and an answer of one is not repeated in
    another: it may be a token of that session, or a secret that only a session with a recent proof is given."""
    return f"{who.id} {who.organization or ''} {who.session_id}" if who.kind == "person" else who.id


async def _claim(tx: Tx, caller: str, key: str, mark: bytes, life: timedelta) -> bool:
    """Take the key for this transaction; waits while another transaction holds it. An expired row is taken over."""
    fresh = insert(idempotency_keys).values(caller=caller, key=key, fingerprint=mark)
    claim = fresh.on_conflict_do_update(
        index_elements=["caller", "key"],
        set_={"fingerprint": mark, "status": None, "body": None, "created_at": sa.func.now()},
        where=idempotency_keys.c.created_at < sa.func.now() - life,
    ).returning(sa.literal(1))
    try:
        return (await tx.execute(claim)).first() is not None
    except sa.exc.DBAPIError as err:
        if isinstance(getattr(err.orig, "__cause__", None), asyncpg.LockNotAvailableError):
            raise Problem("idempotency.in_progress", headers={"Retry-After": "1"}) from None
        raise


async def _replay(tx: Tx, caller: str, key: str, marks: tuple[bytes, bytes], sealer: Sealer) -> Response:
    """The stored answer. The second mark is what code before this one stored."""
    t = idempotency_keys
    row = await tx.fetch_one(sa.select(t).where(t.c.caller == caller, t.c.key == key))
    if row is None or row.status is None:  # cleared in this moment
        raise Problem("idempotency.in_progress", headers={"Retry-After": "1"})
    if row.fingerprint not in marks:
        raise Problem("idempotency.mismatch")
    headers = {"Idempotency-Replayed": "true"}
    if row.location:
        headers["Location"] = row.location
    body = sealer.open("idempotent answer", f"{caller} {key}", row.body)
    return Response(body, row.status, headers, media_type=row.content_type)


async def _remember(tx: Tx, caller: str, key: str, response: Response, sealer: Sealer) -> None:
    t = idempotency_keys
    await tx.execute(
        sa.update(t)
        .where(t.c.caller == caller, t.c.key == key)
        .values(
            status=response.status_code,
            content_type=response.headers.get("content-type"),
            location=response.headers.get("location"),
            body=sealer.seal("idempotent answer", f"{caller} {key}", bytes(response.body)),
        )
    )


async def expire(db: Database, now: datetime, life_seconds: int) -> int:
    """Delete remembered answers past their life, some at a time; returns how many."""
    t = idempotency_keys
    return await delete_in_batches(db, t, t.c.created_at < now - timedelta(seconds=life_seconds))
