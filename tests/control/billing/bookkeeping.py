"""Finance events on the books, sinks that send receipts, and the worker's hands, for tests of reports and settlement."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from portico.control.billing import export_delivery, export_store, exports, settlement, settlement_store
from portico.control.finance import events, postings
from portico.control.finance.events import FinanceEvent
from portico.control.identity.keys import issue
from portico.kit import outbox, queue, signing
from portico.kit.queue import Hopeless, Limits, Retry
from portico.settings import ApiSettings

START = datetime(2026, 1, 1, tzinfo=UTC)
END = datetime(2026, 2, 1, tzinfo=UTC)
_numbers = itertools.count(1)


def finance_event(
    kind: str, amount: int, *, account: str, organization: str | None = None, **more: Any
) -> FinanceEvent:
    """An event of Stripe's in January 2026."""
    number = next(_numbers)
    at = START + timedelta(hours=number % 700)
    facts: dict[str, Any] = {
        "provider": "stripe", "account": account, "livemode": True, "event_id": f"evt_{number}", "event_type": kind,
        "api_version": None, "kind": kind, "occurred_at": at, "received_at": at, "effect_key": f"{kind}:{number}",
        "raw_sha256": hashlib.sha256(str(number).encode()).digest(), "organization_id": organization,
        "amount_minor": amount, "currency": "EUR", "invoice_ref": f"in_{number}",
    }  # fmt: skip
    return FinanceEvent(**(facts | more))


async def book(db: Any, *told: FinanceEvent) -> None:
    """Record events, and post what they mean."""
    async with db.transaction() as tx:
        for event in told:
            if await events.record(tx, event):
                await postings.post(tx, event)


async def january(db: Any, account: str, organization: str | None = None) -> None:
    """The books of the golden files: three payments with fees, a partial refund, a dispute."""

    def made(kind: str, amount: int, **more: Any) -> FinanceEvent:
        return finance_event(kind, amount, account=account, organization=organization, **more)

    await book(
        db, made("payment.succeeded", 11900, payment_ref="ch_1", fee_minor=375),
        made("payment.succeeded", 23800, payment_ref="ch_2", fee_minor=715),
        made("payment.succeeded", 5000, payment_ref="ch_3", fee_minor=175),
        made("refund.succeeded", 2500, payment_ref="ch_2", refund_ref="re_1", status="succeeded", invoice_ref=None),
        made("dispute.opened", 5000, payment_ref="ch_3", dispute_ref="du_1", status="open", fee_minor=1500),
    )  # fmt: skip


async def operator_client(app: Any, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    """A client with an operator key."""
    async with app.state.db.transaction() as tx:
        made = await issue(tx, app.state.clock.wall(), None, None, "operator", "test", [])
    return connect(made.key)


@dataclass
class Sink:
    """A sink with its secret, and who sends for it."""

    client: httpx.AsyncClient
    id: str
    secret: str
    clock: Any

    async def send(
        self, body: dict[str, Any] | bytes, message: str | None = None, *, shift: int = 0, **change: str
    ) -> httpx.Response:
        """Sign and post; ``change`` replaces header fields (``webhook_signature="…"``)."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        at = int(self.clock.wall().timestamp()) + shift
        fields = signing.headers([self.secret], message or f"msg_{next(_numbers)}", at, raw)
        fields |= {"webhook-key-id": self.id, "content-type": "application/json"}
        fields |= {name.replace("_", "-"): value for name, value in change.items()}
        return await self.client.post("/v1/billing/settlement-receipts", content=raw, headers=fields)


async def make_sink(operator: httpx.AsyncClient, client: httpx.AsyncClient, clock: Any, url: str | None = None) -> Sink:
    """A new sink."""
    answer = await operator.post("/v1/admin/settlement-sinks", json={"name": f"sink {next(_numbers)}", "url": url})
    assert answer.status_code == 201, answer.text
    return Sink(client, answer.json()["id"], answer.json()["secret"], clock)


def receipt(
    account: str, lines: Sequence[dict[str, Any]] | None, batch: str = "b1", issued: int = 0, **more: Any
) -> dict[str, Any]:
    """The body of a receipt of January 2026."""
    return {
        "batch_id": batch, "provider": "stripe", "account": account, "livemode": True, "period_start": START.isoformat(),
        "period_end": END.isoformat(), "issued_at": (END + timedelta(hours=issued)).isoformat(), "totals": [],
        "lines": None if lines is None else list(lines), **more,
    }  # fmt: skip


def line(ref: str, kind: str, amount: int, fee: int = 0, currency: str = "EUR") -> dict[str, Any]:
    """A line of a receipt."""
    return {"ref": ref, "kind": kind, "currency": currency, "amount_minor": amount, "fee_minor": fee}


JANUARY = [
    line("ch_1", "payment", 11900, 375), line("ch_2", "payment", 23800, 715), line("ch_3", "payment", 5000, 175),
    line("re_1", "refund", -2500), line("du_1", "dispute", -5000, 1500),
]  # fmt: skip


async def reconcile_all(app: Any) -> int:
    """Compare everything that waits, as the worker does; how many receipts it were."""
    state, count = app.state, 0
    while True:
        found, _ = await queue.claim(state.db, settlement_store.KIND, Limits(), 20)
        if not found:
            return count
        for work in found:
            await settlement.reconcile(work, state.settings, state.sealer, state.clock)
            count += 1


async def make_all(app: Any, settings: ApiSettings | None = None) -> int:
    """Make every report that waits, as the worker does; how many."""
    state, count = app.state, 0
    while True:
        found, _ = await queue.claim(state.db, export_store.KIND, Limits(max_attempts=1), 20)
        if not found:
            return count
        for work in found:
            await exports.make(work, settings or state.settings, state.sealer, state.clock)
            count += 1


async def deliver_all(app: Any, client: Any, settings: ApiSettings | None = None) -> list[str]:
    """One attempt at every delivery that is due; what came of each."""
    state = app.state
    driver = export_delivery.ReportDriver(settings or state.settings, state.db, state.clock, state.sealer, client)
    came = []
    found, _ = await queue.claim(state.db, outbox.kind("report"), Limits(), 20)
    for work in found:
        try:
            await outbox.deliver(work, driver, state.sealer, driver.record)
            came.append("delivered")
        except (Retry, Hopeless) as err:
            came.append(f"{type(err).__name__}: {err}")
            await queue.fail(work, str(err), 0.0, dead=isinstance(err, Hopeless))
    return came
