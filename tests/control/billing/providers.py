"""Settings of payment providers for tests, and a small HTTP server that answers as it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import h11

from portico.control.billing.provider import Origin
from portico.settings import ApiSettings, Secret

#: Everything that three providers need, for tests.
COMPLETE: dict[str, Any] = {
    "stripe_secret_key": Secret("sk_test_123"), "stripe_webhook_secret": Secret("whsec_1"), "stripe_account": "acct_1",
    "stripe_prices": ("pro=price_pro", "team=price_team"),
    "razorpay_key_id": "rzp_test_1", "razorpay_key_secret": Secret("rzp-secret"), "razorpay_webhook_secret": Secret("rzp-hook"),
    "razorpay_account": "acc_1", "razorpay_plans": ("pro=plan_pro", "team=plan_team"),
    "paypal_client_id": "client-1", "paypal_client_secret": Secret("pp-secret"), "paypal_webhook_id": "WH-ID-1",
    "paypal_account": "MERCHANT1", "paypal_plans": ("pro=P-PRO", "team=P-TEAM"),
    "paypal_api_url": "https://api-m.sandbox.paypal.com",
}  # fmt: skip
QUICK: dict[str, Any] = {"billing_retry_min_seconds": 0.001, "billing_retry_max_seconds": 0.01}


def settings(**changes: Any) -> ApiSettings:
    """An API's settings with all three providers set up, but for ``changes``."""
    base = {"database_url": Secret("postgresql://nobody@127.0.0.1/none"), "master_key": Secret("A" * 43 + "=")}
    return ApiSettings(**{**base, **COMPLETE, **QUICK, **changes})


def origin(raw: bytes = b"raw", **changes: Any) -> Origin:
    """Where a body came from."""
    import hashlib

    facts = {"account": "acct_1", "livemode": False, "received_at": datetime(2026, 11, 26, 12, tzinfo=UTC)}
    return Origin(raw_sha256=hashlib.sha256(raw).digest(), **{**facts, **changes})


@dataclass
class Asked:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Told:
    """What the server answers next: a status with a body, or silence, or the end of the connection."""

    status: int = 200
    body: Any = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False
    drop: bool = False


@dataclass
class Server:
    """Answers by ``answer``, in order of the requests; what was asked is in ``asked``."""

    url: str
    asked: list[Asked]
    answer: Callable[[Asked], Told]


@asynccontextmanager
async def serving(answer: Callable[[Asked], Told]) -> AsyncIterator[Server]:
    """A server on a free port. One request a connection."""
    asked: list[Asked] = []
    server = Server("", asked, answer)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        request: h11.Request | None = None
        body = b""
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    data = await reader.read(65_536)
                    if not data:
                        return
                    connection.receive_data(data)
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    break
            assert request is not None
            headers = {name.decode(): value.decode() for name, value in request.headers}
            one = Asked(request.method.decode(), request.target.decode(), headers, body)
            asked.append(one)
            told = server.answer(one)
            if told.drop:
                return
            if told.hang:
                await asyncio.Event().wait()
            sent = told.body if isinstance(told.body, bytes) else json.dumps(told.body).encode()
            fields = {"content-length": str(len(sent)), "connection": "close", **told.headers}
            for part in (
                h11.Response(status_code=told.status, headers=list(fields.items())), h11.Data(data=sent), h11.EndOfMessage(),
            ):  # fmt: skip
                writer.write(connection.send(part) or b"")
            await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()


def script(*answers: Told) -> Callable[[Asked], Told]:
    """The answers in turn; the last one for all later."""
    left = list(answers)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]
