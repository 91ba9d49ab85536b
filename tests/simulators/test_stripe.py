"""The Stripe simulator, by Stripe's own SDK and by HTTP, delivering to a real receiver."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import stripe
from stripe import StripeClient

from portico.simulators.billing_world import DAY
from portico.simulators.stripe import StripeSimulator
from tests.simulators.receiver import Received

MONTH = 32 * DAY
# The SDK passes a body to httpx in its older way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


class Shop:
    """A simulator, the SDK speaking to it, and the receiver of its webhooks."""

    def __init__(self, simulator: StripeSimulator, receiver: Received) -> None:
        self.stripe, self.receiver = simulator, receiver
        self.client = StripeClient(
            simulator.secret_key,
            base_addresses={"api": simulator.url},
            http_client=stripe.HTTPXClient(),
            max_network_retries=2,
        )
        self.http = httpx.AsyncClient(base_url=simulator.url, auth=(simulator.secret_key, ""))

    async def checkout(self, plan: str = "pro", **more: Any) -> Any:
        return await self.client.v1.checkout.sessions.create_async({
            "mode": "subscription", "line_items": [{"price": self.stripe.price(plan), "quantity": 1}],
            "success_url": "http://shop.test/ok?session={CHECKOUT_SESSION_ID}", "cancel_url": "http://shop.test/no",
            "client_reference_id": "chk_1", **more,
        })  # fmt: skip

    async def subscribed(self, plan: str = "pro", card: str = "good", **more: Any) -> Any:
        """A subscription that somebody paid for."""
        session = await self.checkout(plan, **more)
        self.stripe.pay(session.id, card)  # type: ignore[arg-type]
        await self.stripe.settled()
        ref = (await self.client.v1.checkout.sessions.retrieve_async(session.id)).subscription
        return await self.client.v1.subscriptions.retrieve_async(str(ref))

    async def events(self) -> list[str]:
        """Types of what came since the last look, in order, each verified by the SDK."""
        await self.stripe.settled()
        found = []
        for got in self.receiver.got:
            header = got.headers["stripe-signature"]
            found.append(stripe.Webhook.construct_event(got.body, header, self.stripe.webhook_secret).type)  # type: ignore[no-untyped-call]
        self.receiver.clear()
        return found


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    async with Received() as receiver, StripeSimulator(webhook_url=receiver.address) as simulator:
        made = Shop(simulator, receiver)
        yield made
        await made.http.aclose()


async def test_a_checkout_ends_in_an_active_subscription(shop: Shop) -> None:
    session = await shop.checkout()
    assert (
        session.status == "open"
        and session.url == f"{shop.stripe.url}/c/pay/{session.id}"
        and session.subscription is None
    )
    page = await shop.http.get(session.url, auth=None)  # type: ignore[arg-type]
    assert page.status_code == 200 and "19.00 USD" in page.text and "no money moves" in page.text
    refused = await shop.http.post(session.url, data={"act": "pay", "card": "declines"})
    assert refused.status_code == 402 and "declined" in refused.text
    paid = await shop.http.post(session.url, data={"act": "pay", "card": "good"})
    assert paid.status_code == 303 and paid.headers["location"] == f"http://shop.test/ok?session={session.id}"
    assert await shop.events() == [
        "customer.created", "customer.subscription.created", "invoice.created", "invoice.finalized", "payment_intent.succeeded",
        "charge.succeeded", "invoice.paid", "invoice.payment_succeeded", "checkout.session.completed",
    ]  # fmt: skip
    done = await shop.client.v1.checkout.sessions.retrieve_async(session.id, {"expand": ["subscription", "invoice"]})
    assert done.status == "complete" and done.payment_status == "paid" and done.client_reference_id == "chk_1"
    assert done.subscription.status == "active" and done.invoice.amount_paid == 1900  # type: ignore[union-attr]
    again = await shop.http.post(session.url, data={"act": "pay", "card": "good"})
    assert again.status_code == 410, "it is paid once"
    assert await shop.events() == []


async def test_the_two_shapes_of_the_api(shop: Shop) -> None:
    sub = await shop.subscribed()
    item = sub["items"].data[0]
    assert item.current_period_end > item.current_period_start and "current_period_end" not in sub
    invoice = await shop.client.v1.invoices.retrieve_async(str(sub.latest_invoice), {"expand": ["payments"]})
    assert invoice.parent.subscription_details.subscription == sub.id and "subscription" not in invoice  # type: ignore[union-attr]
    intent = invoice.payments.data[0].payment.payment_intent  # type: ignore[union-attr]
    older = {"Stripe-Version": "2024-06-20"}
    was = (await shop.http.get(f"/v1/invoices/{invoice.id}", headers=older)).json()
    assert (
        was["subscription"] == sub.id
        and was["payment_intent"] == intent
        and was["paid"] is True
        and "parent" not in was
    )
    assert (
        was["lines"]["data"][0]["price"]["id"] == shop.stripe.price("pro") and "pricing" not in was["lines"]["data"][0]
    )
    then = (await shop.http.get(f"/v1/subscriptions/{sub.id}", headers=older)).json()
    assert (
        then["current_period_end"] == item.current_period_end and "current_period_end" not in then["items"]["data"][0]
    )


async def test_an_older_endpoint_gets_the_older_shape() -> None:
    async with (
        Received() as receiver,
        StripeSimulator(webhook_url=receiver.address, api_version="2024-06-20") as simulator,
    ):
        await Shop(simulator, receiver).subscribed()
        found = {event["type"]: event for event in receiver.documents}
        assert found["invoice.paid"]["api_version"] == "2024-06-20"
        assert found["invoice.paid"]["data"]["object"]["subscription"].startswith("sub_1")
        assert found["customer.subscription.created"]["data"]["object"]["current_period_end"] > 0


async def test_renewal_failure_retries_and_recovery(shop: Shop) -> None:
    sub = await shop.subscribed(card="fails_later")
    first_end = sub["items"].data[0].current_period_end
    await shop.events()
    await shop.stripe.advance(first_end - shop.stripe.clock.now + 1)
    assert await shop.events() == [
        "customer.subscription.updated", "invoice.created", "invoice.finalized", "payment_intent.payment_failed", "charge.failed",
        "invoice.payment_failed",
    ]  # fmt: skip
    sub = await shop.client.v1.subscriptions.retrieve_async(sub.id)
    assert sub.status == "past_due" and sub["items"].data[0].current_period_start == first_end
    invoice = await shop.client.v1.invoices.retrieve_async(str(sub.latest_invoice))
    assert (invoice.status, invoice.attempt_count) == (
        "open",
        1,
    ) and invoice.next_payment_attempt == first_end + 3 * DAY
    await shop.stripe.advance(3 * DAY)
    invoice = await shop.client.v1.invoices.retrieve_async(invoice.id)
    assert invoice.attempt_count == 2 and invoice.next_payment_attempt == first_end + 8 * DAY
    shop.stripe.set_card(sub.id, "good")
    await shop.events()
    await shop.stripe.advance(5 * DAY)
    assert (await shop.events())[-3:] == ["invoice.paid", "invoice.payment_succeeded", "customer.subscription.updated"]
    assert (await shop.client.v1.subscriptions.retrieve_async(sub.id)).status == "active"
    assert (await shop.client.v1.invoices.retrieve_async(invoice.id)).next_payment_attempt is None


async def test_after_the_last_attempt_it_is_unpaid(shop: Shop) -> None:
    sub = await shop.subscribed(card="fails_later")
    await shop.stripe.advance(MONTH + 20 * DAY)
    events = [event for event in shop.receiver.documents if event["type"] == "invoice.payment_failed"]
    assert [event["data"]["object"]["attempt_count"] for event in events] == [1, 2, 3, 4]
    assert [event["data"]["object"]["next_payment_attempt"] is None for event in events] == [False, False, False, True]
    assert (await shop.client.v1.subscriptions.retrieve_async(sub.id)).status == "unpaid"
    with pytest.raises(stripe.CardError) as refused:
        await shop.client.v1.invoices.pay_async(events[0]["data"]["object"]["id"])
    assert refused.value.code == "card_declined"
    shop.stripe.set_card(sub.id, "good")
    assert (await shop.client.v1.invoices.pay_async(events[0]["data"]["object"]["id"])).status == "paid"
    assert (await shop.client.v1.subscriptions.retrieve_async(sub.id)).status == "active"


async def test_upgrade_prorates_to_the_cent(shop: Shop) -> None:
    sub = await shop.subscribed()
    item = sub["items"].data[0]
    await shop.stripe.advance(10 * DAY)
    await shop.events()
    await shop.client.v1.subscriptions.update_async(sub.id, {
        "items": [{"id": item.id, "price": shop.stripe.price("team")}], "proration_behavior": "always_invoice",
    })  # fmt: skip
    assert (await shop.events())[0] == "customer.subscription.updated"
    invoice = (await shop.client.v1.invoices.list_async({"subscription": sub.id, "limit": 1})).data[0]
    credit, charge = invoice.lines.data
    assert invoice.billing_reason == "subscription_update" and credit.amount < 0 < charge.amount
    left = (item.current_period_end - credit.period.start) / (item.current_period_end - item.current_period_start)
    assert credit.amount == -round(1900 * left) and charge.amount == round(9900 * left)
    assert invoice.amount_paid == credit.amount + charge.amount == invoice.total
    # Back to the cheaper one: a credit, which the next invoice uses.
    await shop.client.v1.subscriptions.update_async(sub.id, {
        "items": [{"id": item.id, "price": shop.stripe.price("pro")}], "proration_behavior": "always_invoice",
    })  # fmt: skip
    customer = await shop.client.v1.customers.retrieve_async(str(sub.customer))
    credited = -customer.balance  # type: ignore[operator]
    assert credited > 0
    await shop.stripe.advance(item.current_period_end - shop.stripe.clock.now + 1)
    renewal = (await shop.client.v1.invoices.list_async({"subscription": sub.id, "limit": 1})).data[0]
    assert renewal.starting_balance == -credited and renewal.amount_due == max(0, 1900 - credited)


async def test_cancel_at_the_end_taken_back_and_at_once(shop: Shop) -> None:
    sub = await shop.subscribed()
    await shop.client.v1.subscriptions.update_async(sub.id, {"cancel_at_period_end": True})
    found = await shop.client.v1.subscriptions.update_async(sub.id, {"cancel_at_period_end": False})
    assert found.cancel_at is None and found.status == "active"
    await shop.client.v1.subscriptions.update_async(sub.id, {"cancel_at_period_end": True})
    await shop.events()
    await shop.stripe.advance(MONTH)
    assert await shop.events() == ["customer.subscription.deleted"]
    assert (await shop.client.v1.subscriptions.retrieve_async(sub.id)).status == "canceled"
    other = await shop.subscribed()
    assert (await shop.client.v1.subscriptions.cancel_async(other.id)).status == "canceled"
    with pytest.raises(stripe.InvalidRequestError):
        await shop.client.v1.subscriptions.cancel_async(other.id)
    listed = await shop.client.v1.subscriptions.list_async({"status": "canceled"})
    assert {row.id for row in listed.data} == {sub.id, other.id}
    assert (await shop.client.v1.subscriptions.list_async()).data == []


async def test_trial_warns_and_then_charges(shop: Shop) -> None:
    sub = await shop.subscribed(subscription_data={"trial_period_days": 7})
    assert sub.status == "trialing" and sub.trial_end is not None
    await shop.events()
    await shop.stripe.advance(5 * DAY)
    assert await shop.events() == ["customer.subscription.trial_will_end"]
    await shop.stripe.advance(3 * DAY)
    assert "invoice.paid" in await shop.events()
    assert (await shop.client.v1.subscriptions.retrieve_async(sub.id)).status == "active"


async def test_a_checkout_expires_by_the_clock_and_by_request(shop: Shop) -> None:
    by_clock, by_hand = await shop.checkout(), await shop.checkout()
    assert (await shop.client.v1.checkout.sessions.expire_async(by_hand.id)).status == "expired"
    await shop.stripe.advance(DAY + 1)
    assert await shop.events() == ["checkout.session.expired"] * 2
    assert (await shop.client.v1.checkout.sessions.retrieve_async(by_clock.id)).status == "expired"
    assert (await shop.http.get(f"/c/pay/{by_clock.id}")).status_code == 410
    with pytest.raises(ValueError, match="expired"):
        shop.stripe.pay(by_clock.id, "good")


async def test_refunds_disputes_and_a_payout_that_adds_up(shop: Shop) -> None:
    sub, other = await shop.subscribed(), await shop.subscribed("team")
    charges = {row.customer: row for row in (await shop.client.v1.charges.list_async()).data}
    intent = str(charges[sub.customer].payment_intent)
    part = await shop.client.v1.refunds.create_async({"payment_intent": intent, "amount": 500})
    rest = await shop.client.v1.refunds.create_async({"payment_intent": intent})
    assert (part.amount, rest.amount, rest.status) == (500, 1400, "succeeded")
    with pytest.raises(stripe.InvalidRequestError) as gone:
        await shop.client.v1.refunds.create_async({"payment_intent": intent, "amount": 1})
    assert gone.value.code == "charge_already_refunded"
    dispute = shop.stripe.dispute(charges[other.customer].id, "fraudulent")
    shop.stripe.decide(dispute["id"], won=True)
    third = await shop.subscribed("team")
    charge = str(
        next(row.id for row in (await shop.client.v1.charges.list_async()).data if row.customer == third.customer)
    )
    shop.stripe.dispute(charge, "fraudulent")
    await shop.subscribed("team")
    payout = shop.stripe.payout()
    assert payout is not None
    rows = (await shop.client.v1.balance_transactions.list_async({"payout": payout["id"], "limit": 100})).data
    assert all(row.net == row.amount - row.fee for row in rows)
    assert (
        sum(row.net for row in rows) == 0 and sum(row.net for row in rows if row.type != "payout") == payout["amount"]
    )
    assert {row.reporting_category for row in rows} == {"charge", "refund", "dispute", "dispute_reversal", "payout"}
    assert (await shop.events())[-3:] == ["payout.created", "payout.paid", "payout.reconciliation_completed"]
    assert shop.stripe.payout() is None, "nothing is paid out twice"


async def test_what_is_asked_twice_with_one_key_is_done_once(shop: Shop) -> None:
    sub = await shop.subscribed()
    charge = (await shop.client.v1.charges.list_async({"customer": sub.customer})).data[0]  # type: ignore[typeddict-item]
    options: Any = {"idempotency_key": "refund-1"}
    first = await shop.client.v1.refunds.create_async({"charge": charge.id, "amount": 100}, options)
    second = await shop.client.v1.refunds.create_async({"charge": charge.id, "amount": 100}, options)
    assert first.id == second.id and len((await shop.client.v1.refunds.list_async()).data) == 1
    with pytest.raises(stripe.IdempotencyError):
        await shop.client.v1.refunds.create_async({"charge": charge.id, "amount": 200}, options)


async def test_an_answer_that_is_lost_is_had_by_asking_again(shop: Shop) -> None:
    sub = await shop.subscribed()
    charge = (await shop.client.v1.charges.list_async({"customer": sub.customer})).data[0]  # type: ignore[typeddict-item]
    shop.stripe.faults.api_lost = 1
    made = await shop.client.v1.refunds.create_async({"charge": charge.id, "amount": 100})
    assert [row.id for row in (await shop.client.v1.refunds.list_async()).data] == [made.id], (
        "the SDK asked twice, with its key"
    )
    shop.stripe.faults.change({"api_count": 3, "api_status": 503})
    with pytest.raises(stripe.APIError):
        await shop.client.v1.balance.retrieve_async()
    assert shop.stripe.faults.api_count == 0


async def test_lists_page_both_ways_and_by_time(shop: Shop) -> None:
    for number in range(5):
        await shop.client.v1.customers.create_async({"email": f"{number}@example.com", "metadata": {"n": str(number)}})
    newest = await shop.client.v1.customers.list_async({"limit": 2})
    assert [row.metadata["n"] for row in newest.data] == ["4", "3"] and newest.has_more  # type: ignore[index]
    everything = [row.email async for row in newest.auto_paging_iter()]
    assert everything == [f"{number}@example.com" for number in (4, 3, 2, 1, 0)]
    back = await shop.client.v1.customers.list_async({"ending_before": newest.data[1].id, "limit": 5})
    assert [row.id for row in back.data] == [newest.data[0].id]
    old = await shop.client.v1.events.list_async({"created": {"lt": newest.data[0].created - 3600}})
    assert old.data == []
    with pytest.raises(stripe.InvalidRequestError):
        await shop.client.v1.customers.list_async({"limit": 101})


async def test_wrong_keys_and_unknown_things_are_refused_in_stripes_words(shop: Shop) -> None:
    wrong = StripeClient("sk_test_wrong", base_addresses={"api": shop.stripe.url}, http_client=stripe.HTTPXClient())
    with pytest.raises(stripe.AuthenticationError):
        await wrong.v1.customers.list_async()
    with pytest.raises(stripe.InvalidRequestError) as missing:
        await shop.client.v1.subscriptions.retrieve_async("sub_1nothing")
    assert missing.value.http_status == 404 and missing.value.code == "resource_missing"
    assert (await shop.http.get("/v1/nothing")).status_code == 404
    bad = await shop.http.post("/v1/checkout/sessions", data={"mode": "payment"})
    assert bad.status_code == 400 and bad.json()["error"]["type"] == "invalid_request_error"


async def test_webhooks_that_go_wrong_on_request(shop: Shop) -> None:
    sim, http = shop.stripe, shop.http

    async def customer() -> list[Any]:
        shop.receiver.clear()
        await shop.client.v1.customers.create_async({"email": "a@example.com"})
        await sim.settled()
        return shop.receiver.documents

    sim.faults.duplicates = 2
    assert len({event["id"] for event in await customer()}) == 1 and len(shop.receiver.got) == 3
    sim.faults.change({"duplicates": 0, "lose": 1})
    assert await customer() == []
    assert (await shop.client.v1.events.list_async({"limit": 1})).data[0].type == "customer.created", "the API lists it"
    sim.faults.other_body = 1
    first, other = await customer()
    assert first["id"] == other["id"] and first != other
    sim.faults.wrong_signature = 1
    await customer()
    with pytest.raises(stripe.SignatureVerificationError):
        await shop.events()
    sim.faults.stale = 3600
    await customer()
    with pytest.raises(stripe.SignatureVerificationError, match="tolerance"):
        await shop.events()
    assert (await http.request("DELETE", "/_sim/faults")).json()["stale"] == 0
    assert (await http.post("/_sim/faults", json={"reorder": -1})).status_code == 200
    assert await customer() == [] and await customer() == []
    assert (await http.post("/_sim/flush", json={})).json() == {"sent": 2}
    created = [event["id"] for event in shop.receiver.documents]
    listed = [row.id for row in (await shop.client.v1.events.list_async({"limit": 2})).data]
    assert created == listed, "the last one came first"
    assert (await http.post("/_sim/faults", json={"nonsense": 1})).status_code == 400


async def test_what_is_not_taken_is_sent_again_by_the_clock(shop: Shop) -> None:
    from portico.simulators.webhooks import Behaviour

    shop.receiver.plan(Behaviour(status=500), Behaviour(status=503))
    await shop.client.v1.customers.create_async({"email": "a@example.com"})
    await shop.stripe.settled()
    await shop.stripe.advance(10)
    await shop.stripe.advance(60)
    assert len({event["id"] for event in shop.receiver.documents}) == 1
    attempts = (await shop.http.get("/_sim/deliveries")).json()["data"]
    assert [(row["number"], row["status"]) for row in attempts] == [(1, 500), (2, 503), (3, 200)]
    await shop.stripe.advance(5 * DAY)
    assert len(shop.receiver.got) == 3
    event = shop.receiver.documents[0]["id"]
    assert (await shop.http.post("/_sim/resend", json={"event": event})).json() == {"sent": 1}
    assert len(shop.receiver.got) == 4


async def test_it_is_driven_over_http_alone(shop: Shop) -> None:
    http = shop.http
    session = await shop.checkout()
    paid = (await http.post("/_sim/pay", json={"checkout": session.id})).json()
    assert paid["paid"] is True
    assert (await http.post("/_sim/pay", json={"checkout": session.id})).status_code == 400
    before = (await http.get("/_sim/")).json()
    moved = (await http.post("/_sim/clock", json={"advance": MONTH})).json()
    assert moved["happened"] == 1 and moved["now"] >= before["now"] + MONTH
    assert (await http.post("/_sim/clock", json={"advance": -1})).status_code == 400
    assert (await http.post("/_sim/payout", content=b"{}")).status_code == 400, "a form of another page cannot"
    payout = (await http.post("/_sim/payout", json={})).json()
    assert payout["object"] == "payout" and payout["status"] == "paid"


async def test_the_portal_takes_another_card_and_collects(shop: Shop) -> None:
    sub = await shop.subscribed(card="fails_later")
    await shop.stripe.advance(MONTH)
    portal = await shop.client.v1.billing_portal.sessions.create_async({
        "customer": str(sub.customer), "return_url": "http://shop.test/back",
    })  # fmt: skip
    assert "How you pay" in (await shop.http.get(portal.url)).text
    sent = await shop.http.post(portal.url, data={"act": "pay", "card": "good"})
    assert sent.status_code == 303 and sent.headers["location"] == "http://shop.test/back"
    assert (await shop.client.v1.subscriptions.retrieve_async(sub.id)).status == "active"


async def test_a_preview_leaves_no_trace(shop: Shop) -> None:
    sub = await shop.subscribed()
    await shop.events()
    preview = await shop.client.v1.invoices.create_preview_async({
        "subscription": sub.id,
        "subscription_details": {"items": [{"id": sub["items"].data[0].id, "price": shop.stripe.price("team")}]},
    })  # fmt: skip
    assert preview.total == 9900 - 1900
    assert (await shop.client.v1.subscriptions.retrieve_async(sub.id))["items"].data[0].price.id == shop.stripe.price(
        "pro"
    )
    assert await shop.events() == [] and len((await shop.client.v1.invoices.list_async()).data) == 1


async def test_tax_is_on_top_and_in_rows(shop: Shop) -> None:
    shop.stripe.books.tax_bp = 1900
    sub = await shop.subscribed()
    invoice = await shop.client.v1.invoices.retrieve_async(str(sub.latest_invoice))
    assert (invoice.subtotal, invoice.total, invoice.amount_paid) == (1900, 2261, 2261)
    assert [row.amount for row in invoice.total_taxes] == [361]  # type: ignore[union-attr]
    older = (await shop.http.get(f"/v1/invoices/{invoice.id}", headers={"Stripe-Version": "2024-06-20"})).json()
    assert older["tax"] == 361 and older["total_tax_amounts"][0]["amount"] == 361


async def test_a_change_waits_for_its_payment_or_for_the_next_period(shop: Shop) -> None:
    sub = await shop.subscribed(card="fails_later")
    item = sub["items"].data[0]
    waiting: Any = {
        "items": [{"id": item.id, "price": shop.stripe.price("team")}], "proration_behavior": "always_invoice",
        "payment_behavior": "pending_if_incomplete",
    }  # fmt: skip
    found = await shop.client.v1.subscriptions.update_async(sub.id, waiting)
    assert found["items"].data[0].price.id == shop.stripe.price("pro") and found.pending_update is not None
    await shop.stripe.advance(DAY)
    found = await shop.client.v1.subscriptions.retrieve_async(sub.id)
    assert found.pending_update is None and found.status == "active", "nobody paid in time"
    found = await shop.client.v1.subscriptions.update_async(sub.id, waiting)
    shop.stripe.set_card(sub.id, "good")
    await shop.client.v1.invoices.pay_async(str(found.latest_invoice))
    found = await shop.client.v1.subscriptions.retrieve_async(sub.id)
    assert found["items"].data[0].price.id == shop.stripe.price("team") and found.pending_update is None
    schedule = await shop.client.v1.subscription_schedules.create_async({"from_subscription": sub.id})
    first = schedule.phases[0]
    await shop.client.v1.subscription_schedules.update_async(schedule.id, {"end_behavior": "release", "phases": [
        {"items": [{"price": shop.stripe.price("team")}], "start_date": first.start_date, "end_date": first.end_date},
        {"items": [{"price": shop.stripe.price("pro")}], "start_date": first.end_date},
    ]})  # fmt: skip
    assert (await shop.client.v1.subscriptions.retrieve_async(sub.id)).schedule == schedule.id
    await shop.stripe.advance(MONTH)
    found = await shop.client.v1.subscriptions.retrieve_async(sub.id)
    assert found["items"].data[0].price.id == shop.stripe.price("pro") and found.schedule is None
    newest = (await shop.client.v1.invoices.list_async({"subscription": sub.id, "limit": 1})).data[0]
    assert (newest.billing_reason, newest.amount_paid) == ("subscription_cycle", 1900)
