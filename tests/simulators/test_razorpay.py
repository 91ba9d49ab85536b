"""The Razorpay simulator, by HTTP, delivering to a real receiver."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from portico.simulators.billing_world import DAY
from portico.simulators.razorpay import RazorpaySimulator
from tests.simulators.receiver import Received

MONTH = 32 * DAY


class Shop:
    """A simulator, a client with its keys, and the receiver of its webhooks."""

    def __init__(self, simulator: RazorpaySimulator, receiver: Received) -> None:
        self.razorpay, self.receiver = simulator, receiver
        self.http = httpx.AsyncClient(base_url=simulator.url, auth=(simulator.key_id, simulator.key_secret))

    async def post(self, path: str, body: Any = None, status: int = 200, **headers: str) -> Any:
        answer = await self.http.post(f"/v1/{path}", json=body or {}, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def get(self, path: str) -> Any:
        return (await self.http.get(f"/v1/{path}")).raise_for_status().json()

    async def created(self, plan: str = "pro", **more: Any) -> Any:
        return await self.post(
            "subscriptions", {"plan_id": self.razorpay.price(plan), "total_count": 12, "notes": {"k": "v"}, **more}
        )

    async def subscribed(self, plan: str = "pro", card: str = "good", **more: Any) -> Any:
        made = await self.created(plan, **more)
        self.razorpay.pay(made["id"], card)  # type: ignore[arg-type]
        await self.razorpay.settled()
        return await self.get(f"subscriptions/{made['id']}")

    async def events(self) -> list[str]:
        """Types of what came since the last look, each verified by our own arithmetic."""
        await self.razorpay.settled()
        found = []
        for got in self.receiver.got:
            mac = hmac.new(self.razorpay.webhook_secret.encode(), got.body, hashlib.sha256).hexdigest()
            assert got.headers["x-razorpay-signature"] == mac and got.headers["x-razorpay-event-id"]
            found.append(json.loads(got.body)["event"])
        self.receiver.clear()
        return found


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    async with Received() as receiver, RazorpaySimulator(webhook_url=receiver.address) as simulator:
        made = Shop(simulator, receiver)
        yield made
        await made.http.aclose()


async def test_a_page_is_paid_and_the_subscription_is_active(shop: Shop) -> None:
    made = await shop.created(notify_info={"notify_email": "ann@example.com"})
    assert made["status"] == "created" and made["remaining_count"] == 12 and made["customer_id"] is None
    page = f"{made['short_url']}?callback_url=http://shop.test/ok?x=1"
    shown = await shop.http.get(page)
    assert "1,499.00 INR" in shown.text and "ann@example.com" in shown.text
    assert (await shop.http.post(page, data={"act": "pay", "card": "declines"})).status_code == 402
    back = await shop.http.post(page, data={"act": "pay", "card": "good"})
    query = dict(httpx.URL(back.headers["location"]).params)
    signed = f"{query['razorpay_payment_id']}|{made['id']}".encode()
    assert (
        query["razorpay_signature"] == hmac.new(shop.razorpay.key_secret.encode(), signed, hashlib.sha256).hexdigest()
    )
    events = shop.receiver.documents if await shop.razorpay.settled() is None else []
    assert all(event["account_id"] == shop.razorpay.account and event["entity"] == "event" for event in events)
    assert await shop.events() == [
        "subscription.authenticated", "subscription.activated", "payment.captured", "invoice.paid", "subscription.charged",
    ]  # fmt: skip
    charged = events[-1]
    assert charged["contains"] == ["subscription", "payment"] and abs(charged["created_at"] - time.time()) < 60
    payment = charged["payload"]["payment"]["entity"]
    assert (
        payment["captured"] is True
        and payment["amount"] == 149_900
        and payment["tax"] * 100 == pytest.approx((payment["fee"] - payment["tax"]) * 18, abs=100)
    )
    now = await shop.get(f"subscriptions/{made['id']}")
    assert now["status"] == "active" and now["paid_count"] == 1 and now["notes"] == {"k": "v"}
    assert (await shop.http.post(page, data={"act": "pay", "card": "good"})).status_code == 410


async def test_failed_charges_pending_then_halted_then_a_new_card(shop: Shop) -> None:
    sub = await shop.subscribed(card="fails_later")
    await shop.events()
    await shop.razorpay.advance(sub["current_end"] - shop.razorpay.clock.now + 1)
    assert await shop.events() == ["payment.failed", "subscription.pending"]
    assert (await shop.get(f"subscriptions/{sub['id']}"))["status"] == "pending"
    await shop.razorpay.advance(3 * DAY)
    assert await shop.events() == ["payment.failed", "subscription.pending"] * 2 + [
        "payment.failed",
        "subscription.halted",
    ]
    await shop.razorpay.advance(MONTH)
    assert await shop.events() == [], "invoices go on and are not collected"
    invoices = (await shop.get(f"invoices?subscription_id={sub['id']}"))["items"]
    assert [row["status"] for row in invoices] == ["issued", "issued", "paid"]
    shop.razorpay.set_card(sub["id"], "good")
    assert await shop.events() == ["subscription.activated"]
    assert (await shop.get(f"invoices/{invoices[0]['id']}"))["status"] == "issued", "old ones stay as they are"
    await shop.razorpay.advance(MONTH)
    assert (await shop.events())[-1] == "subscription.charged"


async def test_a_pending_subscription_recovers(shop: Shop) -> None:
    sub = await shop.subscribed(card="fails_later")
    await shop.razorpay.advance(MONTH - DAY)
    shop.razorpay.set_card(sub["id"], "good")
    await shop.events()
    await shop.razorpay.advance(DAY)
    assert await shop.events() == ["subscription.activated", "payment.captured", "invoice.paid", "subscription.charged"]


async def test_changes_now_and_with_the_cycle(shop: Shop) -> None:
    sub = await shop.subscribed()
    await shop.events()
    await shop.razorpay.advance(10 * DAY)
    answer = await shop.http.patch(f"/v1/subscriptions/{sub['id']}", json={"plan_id": shop.razorpay.price("team")})
    assert answer.json()["plan_id"] == shop.razorpay.price("team")
    assert await shop.events() == ["payment.captured", "invoice.paid", "subscription.updated"]
    payment = (await shop.get("payments?count=1"))["items"][0]
    assert 0 < payment["amount"] < 799_900 - 149_900
    later = {"plan_id": shop.razorpay.price("pro"), "schedule_change_at": "cycle_end"}
    answer = await shop.http.patch(f"/v1/subscriptions/{sub['id']}", json=later)
    assert answer.json()["has_scheduled_changes"] is True and answer.json()["plan_id"] == shop.razorpay.price("team")
    assert (await shop.get(f"subscriptions/{sub['id']}/retrieve_scheduled_changes"))["plan_id"] == shop.razorpay.price(
        "pro"
    )
    await shop.razorpay.advance(MONTH)
    now = await shop.get(f"subscriptions/{sub['id']}")
    assert now["plan_id"] == shop.razorpay.price("pro") and now["has_scheduled_changes"] is False
    assert (await shop.get("payments?count=1"))["items"][0]["amount"] == 149_900


async def test_whoever_lives_by_the_machines_clock_buys_when_ours_was_set_forward(shop: Shop) -> None:
    await shop.razorpay.advance(MONTH)
    sub = await shop.created(expire_by=int(time.time()) + 3600)
    assert 3590 < sub["expire_by"] - shop.razorpay.clock.now <= 3600
    late = {"plan_id": sub["plan_id"], "total_count": 3, "expire_by": int(time.time()) - 60}
    assert (await shop.post("subscriptions", late, 400))["error"]["code"] == "BAD_REQUEST_ERROR"


async def test_cancel_pause_resume_completion_and_expiry(shop: Shop) -> None:
    first, second, third = await shop.subscribed(), await shop.subscribed(), await shop.subscribed(total_count=2)
    fourth = await shop.created(expire_by=shop.razorpay.clock.now + 3600)
    await shop.events()
    assert (await shop.post(f"subscriptions/{first['id']}/cancel", {"cancel_at_cycle_end": 1}))["status"] == "active"
    assert (await shop.post(f"subscriptions/{second['id']}/pause"))["status"] == "paused"
    assert await shop.events() == ["subscription.paused"]
    await shop.razorpay.advance(MONTH)
    assert sorted(await shop.events()) == [
        "invoice.paid",
        "payment.captured",
        "subscription.cancelled",
        "subscription.charged",
    ]
    assert (await shop.post(f"subscriptions/{second['id']}/resume", {"resume_at": "now"}))["status"] == "active"
    await shop.razorpay.advance(MONTH)
    states = {
        sub["id"]: (await shop.get(f"subscriptions/{sub['id']}"))["status"] for sub in (first, second, third, fourth)
    }
    assert list(states.values()) == ["cancelled", "active", "completed", "expired"]
    refused = await shop.post(f"subscriptions/{first['id']}/cancel", status=400)
    assert refused["error"]["code"] == "BAD_REQUEST_ERROR" and "cancelled" in refused["error"]["description"]


async def test_a_trial_is_charged_when_it_is_over(shop: Shop) -> None:
    sub = await shop.subscribed(start_at=shop.razorpay.clock.now + 7 * DAY)
    assert sub["status"] == "authenticated" and await shop.events() == ["subscription.authenticated"]
    await shop.razorpay.advance(8 * DAY)
    assert await shop.events() == ["subscription.activated", "payment.captured", "invoice.paid", "subscription.charged"]


async def test_refunds_once_per_key_and_never_too_much(shop: Shop) -> None:
    await shop.subscribed()
    payment = (await shop.get("payments"))["items"][0]
    path = f"payments/{payment['id']}/refund"
    key = {"X-Refund-Idempotency": "a-key-of-ours-1"}
    first = await shop.post(path, {"amount": 100}, **key)
    assert await shop.post(path, {"amount": 100}, **key) == first
    other = await shop.post(path, {"amount": 200}, status=400, **key)
    assert "same idempotency key" in other["error"]["description"]
    await shop.post(path, {"amount": 149_900}, status=400)
    rest = await shop.post(path)
    assert rest["amount"] == 149_800 and rest["status"] == "processed"
    assert (await shop.get(f"payments/{payment['id']}"))["refund_status"] == "full"
    assert (await shop.get(f"payments/{payment['id']}/refunds"))["count"] == 2
    assert (await shop.events())[-2:] == ["refund.created", "refund.processed"]
    await shop.subscribed()
    payment = (await shop.get("payments?count=1"))["items"][0]
    path, key = f"payments/{payment['id']}/refund", {"X-Refund-Idempotency": "a-key-of-ours-2"}
    shop.razorpay.faults.api_lost = 1
    await shop.post(path, {"amount": 100}, status=500, **key)
    assert (await shop.post(path, {"amount": 100}, **key))["amount"] == 100
    assert (await shop.get(f"payments/{payment['id']}"))["amount_refunded"] == 100, "done once"


async def test_settlements_and_recon_rows_add_up(shop: Shop) -> None:
    for plan in ("pro", "team", "team"):
        await shop.subscribed(plan)
    payments = (await shop.get("payments"))["items"]
    await shop.post(f"payments/{payments[-1]['id']}/refund", {"amount": 5000})
    won, lost = (shop.razorpay.dispute(row["id"], "chargeback") for row in payments[:2])
    shop.razorpay.decide(won["id"], won=True)
    await shop.post(f"disputes/{lost['id']}/accept")
    await shop.events()
    settlement = shop.razorpay.payout()
    assert settlement is not None and await shop.events() == ["settlement.processed"]
    today = time.gmtime(settlement["created_at"])
    where = f"settlements/recon/combined?year={today.tm_year}&month={today.tm_mon}&day={today.tm_mday}&count=100"
    rows = (await shop.get(where))["items"]
    assert sum(row["credit"] - row["debit"] for row in rows) == settlement["amount"]
    assert {row["settlement_id"] for row in rows} == {settlement["id"]} and {row["settlement_utr"] for row in rows} == {
        settlement["utr"]
    }
    assert all(row["credit"] == row["amount"] - row["fee"] for row in rows if row["type"] == "payment"), (
        "tax is inside the fee"
    )
    assert [row["type"] for row in rows].count("adjustment") == 1 and shop.razorpay.payout() is None


async def test_who_may_not_and_what_is_not(shop: Shop) -> None:
    stranger = await shop.http.get("/v1/payments", auth=(shop.razorpay.key_id, "wrong"))
    assert stranger.status_code == 401
    missing = await shop.http.get("/v1/payments/pay_nothing")
    assert missing.status_code == 400 and "does not exist" in missing.json()["error"]["description"]
    assert (await shop.http.post("/v1/subscriptions", content=b"[]")).status_code == 400
    shop.razorpay.faults.wrong_signature = 1
    await shop.subscribed()
    bad = shop.receiver.got[0]
    mac = hmac.new(shop.razorpay.webhook_secret.encode(), bad.body, hashlib.sha256).hexdigest()
    assert bad.headers["x-razorpay-signature"] != mac


async def test_events_can_be_stamped_by_its_clock(shop: Shop) -> None:
    await shop.razorpay.advance(100 * DAY)
    await shop.subscribed()
    assert abs(shop.receiver.documents[0]["created_at"] - time.time()) < 60, (
        "a receiver would refuse what is from the future"
    )
    shop.receiver.clear()
    shop.razorpay.stamp_by_clock = True
    await shop.subscribed()
    assert shop.receiver.documents[0]["created_at"] > time.time() + 99 * DAY
