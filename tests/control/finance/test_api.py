"""Routes of finance: what who pays may see, what operators may, and seals by hand."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest

from portico.control.finance import recognition, revenue
from portico.control.identity.keys import issue
from portico.kit.db import Database
from tests.control.conftest import Account, MovableClock
from tests.control.finance.making import account, apply, event


@pytest.fixture
async def operator(app: Any, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    async with app.state.db.transaction() as tx:
        made = await issue(tx, app.state.clock.wall(), None, None, "operator", "test", [])
    return connect(made.key)


async def history(db: Database, org: str, clock: MovableClock) -> None:
    """An invoice of three days ago for two days, and its payment."""
    then = clock.wall().replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=3)
    common = {
        "account": account(),
        "organization_id": org,
        "occurred_at": then,
        "plan_ref": "price_pro",
        "invoice_ref": org,
    }
    period = {"period_start": then, "period_end": then + timedelta(days=2)}
    await apply(db, event("invoice.issued", amount_minor=238, tax_minor=38, **period, **common))
    await apply(db, event("payment.succeeded", payment_ref=f"pi_{org}", amount_minor=238, fee_minor=7, **common))


async def test_an_organization_sees_its_own_events_without_our_fees(
    db: Database, owner: Account, stranger: Account, clock: MovableClock, operator: httpx.AsyncClient
) -> None:
    await history(db, owner.organization, clock)
    own = (await owner.client.get("/v1/billing/finance-events", params={"limit": 1})).json()
    assert [row["kind"] for row in own["data"]] == ["payment.succeeded"]
    assert own["next_cursor"] is not None
    assert not {"fee_minor", "net_minor", "account", "hash"} & own["data"][0].keys()
    assert (await stranger.client.get("/v1/billing/finance-events")).json()["data"] == []
    params = {"organization": owner.organization, "kind": "payment.succeeded"}
    seen = (await operator.get("/v1/admin/finance-events", params=params)).json()["data"]
    assert [(row["fee_minor"], row["seq"], len(row["hash"])) for row in seen] == [(7, 2, 64)]
    for path in ("finance-events", "ledger/transactions", "ledger/trial-balance", "ledger/verify", "ledger/seals"):
        assert (await owner.client.get(f"/v1/admin/{path}")).status_code == 403


async def test_operators_see_the_books(
    db: Database, owner: Account, clock: MovableClock, operator: httpx.AsyncClient
) -> None:
    org = owner.organization
    await history(db, org, clock)
    await recognition.advance(db, clock.wall().date(), 10)
    await revenue.refresh(db)
    trial = (await operator.get("/v1/admin/ledger/trial-balance", params={"organization": org})).json()["data"]
    assert [(row["account"], row["natural_minor"]) for row in trial] == [
        ("provider_clearing", 231), ("accounts_receivable", 0), ("deferred_revenue", 0), ("tax_payable", 38),
        ("revenue", 200), ("payment_fees", 7),
    ]  # fmt: skip
    assert sum(row["balance_minor"] for row in trial) == 0
    params: dict[str, Any] = {"organization": org, "limit": 3}
    first = (await operator.get("/v1/admin/ledger/transactions", params=params)).json()
    rest = (
        await operator.get("/v1/admin/ledger/transactions", params={**params, "cursor": first["next_cursor"]})
    ).json()
    kinds = [row["kind"] for row in first["data"] + rest["data"]]
    assert kinds == ["recognition", "recognition", "payment.succeeded", "invoice.issued"]
    assert all(sum(part["amount_minor"] for part in row["postings"]) == 0 for row in first["data"])
    for log, last in (("ledger", 4), ("events", 2)):
        found = (await operator.get("/v1/admin/ledger/verify", params={"chain": org, "log": log})).json()
        assert found == {"chain": org, "log": log, "valid": True, "last": last, "next": None, "fault": None}
    since, until = clock.wall().date() - timedelta(days=5), clock.wall().date()
    span = {"since": since.isoformat(), "until": until.isoformat()}
    days = (await operator.get("/v1/admin/revenue/daily", params={**span, "organization": org})).json()["data"]
    assert [(row["gross_minor"], row["recognized_minor"]) for row in days] == [(238, 100), (0, 100)]
    mrr = (await operator.get("/v1/admin/revenue/mrr", params=span)).json()
    assert mrr == {"start": {}, "end": {}, "movements": []}
    backwards = await operator.get("/v1/admin/revenue/daily", params={"since": span["until"], "until": span["since"]})
    assert (backwards.status_code, backwards.json()["code"]) == (400, "revenue.span_invalid")
    bad = await operator.get("/v1/admin/ledger/transactions", params={"cursor": "WyJ4Il0"})
    assert (bad.status_code, bad.json()["code"]) == (400, "request.cursor_invalid")


async def test_a_period_is_sealed_by_hand_and_that_is_recorded(
    db: Database, owner: Account, clock: MovableClock, operator: httpx.AsyncClient
) -> None:
    await history(db, owner.organization, clock)
    today = clock.wall().date()
    body = {"ends_on": today.isoformat()}
    early = await operator.post("/v1/admin/ledger/seals", json={"ends_on": (today + timedelta(days=1)).isoformat()})
    assert (early.status_code, early.json()["code"]) == (409, "ledger.period_open")
    await recognition.advance(db, today, 100)
    made = await operator.post("/v1/admin/ledger/seals", json=body)
    assert made.status_code == 201, made.text
    again = await operator.post("/v1/admin/ledger/seals", json=body)
    assert (again.status_code, again.json()["code"]) == (409, "ledger.period_sealed")
    listed = (await operator.get("/v1/admin/ledger/seals")).json()
    assert (listed["valid"], listed["fault"], listed["data"][-1]["hash"]) == (True, None, made.json()["hash"])
    log = (await operator.get("/v1/admin/audit", params={"action": "ledger.seal"})).json()["data"]
    assert [row["outcome"] for row in log] == ["refused", "success", "refused"]
