"""The platform's adapters, its checks of signatures and its normalization, against the simulated providers.

One life of a subscription each: bought, changed, not paid, refunded, disputed, paid out, canceled. What arrives is
verified as the API
verifies it, the objects are fetched by the adapter, and money and states come out as they went in.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from portico import settings
from portico.control.billing import normalize, provider
from portico.control.billing.provider import Order, Origin
from portico.control.finance.events import FinanceEvent
from portico.errors import Problem
from portico.kit import provider_signatures as signatures
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings
from portico.simulators.billing_server import ProviderSimulator
from portico.simulators.billing_world import DAY
from portico.simulators.paypal import PayPalSimulator
from portico.simulators.razorpay import RazorpaySimulator
from portico.simulators.stripe import StripeSimulator
from portico.simulators.webhooks import Got, WebhookReceiver

MONTH = 32 * DAY
PAYMENTS = {"stripe": "charges", "razorpay": "payments", "paypal": "sales"}


class Life:
    """A provider with its adapter, and what came of its webhooks."""

    def __init__(self, simulator: ProviderSimulator, receiver: WebhookReceiver) -> None:
        self.simulator, self.receiver = simulator, receiver
        given: Any = {"database_url": "postgresql://nobody@localhost/none", "master_key": new_master_key()}
        self.settings = settings.load(ApiSettings, environ={}, overrides=given | simulator.settings())
        self.adapter = provider.of(self.settings, simulator.name)
        self.subscription = ""

    async def buy(self, card: str = "good") -> None:
        order = Order(
            "chk_1", self.simulator.price("pro"), "http://127.0.0.1/ok", "http://127.0.0.1/no", email="a@example.com"
        )
        made = await self.adapter.checkout(order, key="chk_1")
        again = await self.adapter.checkout(order, key="chk_1")
        assert again.ref == made.ref, "one key, one checkout"
        assert self.simulator.pay(made.ref, card)["paid"]  # type: ignore[arg-type]
        self.subscription = self.simulator.held()[0].ref

    async def events(self) -> list[FinanceEvent]:
        """What came since the last look, verified and normalized; each effect once."""
        await self.simulator.settled()
        found: dict[str, FinanceEvent] = {}
        for got in self.receiver.got:
            await self.verify(got)
            for event in await self.normalized(json.loads(got.body), got):
                known = found.setdefault(event.effect_key, event)
                assert (known.kind, known.amount_minor) == (event.kind, event.amount_minor), "an effect is one thing"
        self.receiver.got.clear()
        return list(found.values())

    async def normalized(self, body: Any, got: Got) -> list[FinanceEvent]:
        event_id = got.headers.get("x-razorpay-event-id") or body["id"]
        digest = hashlib.sha256(got.body).digest()
        origin = Origin(self.adapter.account, False, datetime.now(UTC), digest, event_id)
        return normalize.normalize(self.adapter.name, body, await self.adapter.authority(body), origin=origin)

    async def verify(self, got: Got) -> None:
        """As the API does; raises ``Unbelieved``."""
        if self.simulator.name == "stripe":
            signatures.verify_stripe(
                [self.simulator.webhook_secret], got.headers[signatures.STRIPE], got.body, time.time()
            )
        elif self.simulator.name == "razorpay":
            signatures.verify_razorpay([self.simulator.webhook_secret], got.headers[signatures.RAZORPAY], got.body)
        else:
            assert isinstance(self.simulator, PayPalSimulator)
            sent = signatures.transmission(got.headers, list(self.settings.paypal_cert_hosts))
            async with httpx.AsyncClient() as http:
                pem = (await http.get(sent.cert_url)).content
            trusted = signatures.roots(self.simulator.root.encode())
            key, _ = signatures.certificate_key(pem, trusted, ["*.paypal.com"], datetime.now(UTC))
            signatures.verify_paypal(key, sent, self.settings.paypal_webhook_id, got.body)


@pytest.fixture(params=[StripeSimulator, RazorpaySimulator, PayPalSimulator], ids=lambda kind: kind.name)
async def life(request: pytest.FixtureRequest) -> AsyncIterator[Life]:
    async with WebhookReceiver(host="127.0.0.1") as receiver, request.param(webhook_url=receiver.url) as simulator:
        made = Life(simulator, receiver)
        yield made
        await made.adapter.close()


def amounts(events: list[FinanceEvent], kind: str) -> list[int | None]:
    return [event.amount_minor for event in events if event.kind == kind]


async def test_a_life_at_each_provider(life: Life) -> None:
    adapter, simulator = life.adapter, life.simulator
    price = {plan: offer.amount_minor for plan, offer in simulator.offers.items()}
    currency = simulator.offers["pro"].currency
    await life.buy()
    bought = await life.events()
    assert amounts(bought, "payment.succeeded") == amounts(bought, "invoice.issued") == [price["pro"]]
    assert any(event.kind == "checkout.completed" for event in bought)
    states = [event for event in bought if event.status == "active"]
    assert {event.subscription_ref for event in states} == {life.subscription}
    assert {event.plan_ref for event in states} == {simulator.price("pro")}
    payment = next(event for event in bought if event.kind == "payment.succeeded")
    assert payment.fee_minor and payment.net_minor == price["pro"] - payment.fee_minor

    if "change_now" in adapter.can:
        assert (await adapter.change(life.subscription, simulator.price("team"), when="now", key="k1")).status == "done"
        changed = await life.events()
        assert 0 < sum(amount or 0 for amount in amounts(changed, "payment.succeeded")) <= price["team"] - price["pro"]
        assert {event.plan_ref for event in changed if event.status == "active"} == {simulator.price("team")}

    simulator.set_card(life.subscription, "declines")
    await simulator.advance(MONTH + 20 * DAY)
    failed = await life.events()
    assert [event for event in failed if event.kind == "payment.failed" and event.is_final_attempt]
    assert [event for event in failed if event.status == "suspended"]
    assert amounts(failed, "payment.succeeded") == []

    assert payment.payment_ref is not None
    back = [
        await adapter.refund(payment.payment_ref, amount_minor=100, currency=currency, reason="asked", key="refund")
        for _ in range(2)
    ]
    assert back[0] == back[1] and back[0].status == "succeeded"
    assert amounts(await life.events(), "refund.succeeded") == [100]

    dispute = simulator.dispute(simulator.world.all(PAYMENTS[simulator.name])[-1]["id"], "fraudulent")
    opened = await life.events()
    assert any(event.kind == "dispute.opened" for event in opened)
    simulator.decide(dispute.get("dispute_id") or dispute["id"], won=True)
    assert any(event.kind == "dispute.won" for event in await life.events())

    if (payout := simulator.payout()) is not None:
        assert amounts(await life.events(), "payout.paid") == [payout["amount"]]

    assert (await adapter.cancel(life.subscription, at_period_end=False, reason="enough", key="end")).provider_status
    assert any(event.status == "canceled" for event in await life.events())
    listed = [body async for body in adapter.list_events(datetime.now(UTC) - timedelta(days=1))]
    assert listed


async def test_what_is_not_the_providers_is_not_believed(life: Life) -> None:
    await life.buy()
    await life.events()
    life.simulator.faults.wrong_signature = -1
    await life.simulator.advance(MONTH)
    assert life.receiver.got
    for got in life.receiver.got:
        with pytest.raises(signatures.Unbelieved) as refused:
            await life.verify(got)
        assert refused.value.fault == "mismatch"


async def test_a_provider_that_stumbles_is_asked_again(life: Life) -> None:
    life.simulator.faults.change({"api_count": 1, "api_status": 503})
    await life.buy()
    life.simulator.faults.api_lost = 1
    payment = life.simulator.world.all(PAYMENTS[life.simulator.name])[0]["id"]
    currency = life.simulator.offers["pro"].currency
    done = await life.adapter.refund(payment, amount_minor=100, currency=currency, reason="asked", key="refund")
    assert done.amount_minor == 100 and len(life.simulator.world.all("refunds")) == 1, "done once, and known"


async def test_a_forged_body_under_paypals_signature_moves_no_money() -> None:
    async with WebhookReceiver(host="127.0.0.1") as receiver, PayPalSimulator(webhook_url=receiver.url) as simulator:
        life = Life(simulator, receiver)
        simulator.faults.tamper = -1
        await life.buy()
        await simulator.settled()
        forged = next(got for got in receiver.got if b"PAYMENT.SALE.COMPLETED" in got.body)
        await life.verify(forged)
        body = json.loads(forged.body)
        assert body["resource"]["amount"]["total"] == "190.00" and zlib.crc32(forged.body)
        events = await life.normalized(body, forged)
        assert amounts(events, "payment.succeeded") == [1900], "the sale's amount, not the body's"
        body["resource"]["id"] = "0" * 17
        with pytest.raises(Problem) as refused:
            await life.normalized(body, forged)
        assert refused.value.code == "billing.event_unconfirmed"
        await life.adapter.close()
