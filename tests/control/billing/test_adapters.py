"""The adapters against the simulators: from the checkout to the refund, each act once, and what the events of it mean."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from portico.control.billing import provider
from portico.control.billing.normalize import normalize
from portico.control.billing.provider import Charge, Name, Order, Origin, Provider
from portico.control.finance.events import FinanceEvent, check
from portico.errors import Problem
from portico.simulators.paypal import PayPalSimulator
from portico.simulators.razorpay import RazorpaySimulator
from portico.simulators.stripe import StripeSimulator
from tests.control.billing.providers import settings

EVERY = pytest.mark.parametrize("name", provider.NAMES)
_KINDS: dict[str, Any] = {"stripe": StripeSimulator, "razorpay": RazorpaySimulator, "paypal": PayPalSimulator}
_MONTH = 32 * 86_400


@dataclass
class Shop:
    """A simulator and the adapter that speaks to it."""

    sim: Any
    adapter: Provider
    given: dict[str, Any]

    def again(self, **changes: Any) -> Provider:
        """Another adapter of the same shop."""
        return provider.of(settings(**{**self.given, **changes}), self.adapter.name)

    def order(self, plan: str = "pro", reference: str = "chk_0001", **changes: Any) -> Order:
        facts = {"success_url": "https://app.example.com/ok", "cancel_url": "https://app.example.com/no"}
        return Order(reference=reference, price=self.sim.price(plan), email="a@example.com", **{**facts, **changes})

    async def buy(self, plan: str = "pro", card: str = "good") -> str:
        """A paid subscription; its reference."""
        bought = await self.adapter.checkout(self.order(plan), key="chk_0001")
        self.sim.pay(bought.ref, card)
        ref = bought.subscription_ref
        if ref is None:
            ref = (await self.adapter.fetch(bought.ref))["subscription"]
        assert isinstance(ref, str)
        return ref

    async def told(self) -> list[dict[str, Any]]:
        """The bodies of all events so far, as they were sent."""
        return [json.loads(self.sim.message(one["id"]).body) for one in self.sim.world.all("events")]

    async def meaning(self, *kinds: str) -> list[FinanceEvent]:
        """What all events so far mean, of these kinds; each normalized with what the adapter fetches for it."""
        found = []
        for stored in self.sim.world.all("events"):
            raw = self.sim.message(stored["id"]).body
            found += await self.means(json.loads(raw), raw, stored["id"])
        return [each for each in found if not kinds or each.kind in kinds]

    async def means(self, body: Any, raw: bytes, event_id: str) -> list[FinanceEvent]:
        digest = hashlib.sha256(raw).digest()
        where = Origin(self.adapter.account, False, datetime.now(UTC), digest, event_id)
        events = normalize(self.adapter.name, body, await self.adapter.authority(body), origin=where)
        for each in events:
            check(each)
        return events

    async def payment(self) -> FinanceEvent:
        """The first payment."""
        return next(each for each in await self.meaning("payment.succeeded") if each.amount_minor)


@asynccontextmanager
async def shop(name: Name, **changes: Any) -> AsyncIterator[Shop]:
    async with _KINDS[name]() as sim:
        given = sim.settings()
        for pairs in ("stripe_prices", "razorpay_plans", "paypal_plans", "paypal_cert_hosts"):
            if pairs in given:
                given[pairs] = tuple(given[pairs].split(","))
        secrets = {
            key: _secret(value) for key, value in given.items() if key.endswith("_secret") or key == "stripe_secret_key"
        }
        chosen = {**given, **secrets, **changes}
        adapter = provider.of(settings(**chosen), name)
        try:
            yield Shop(sim, adapter, chosen)
        finally:
            await adapter.close()


def _secret(text: str) -> Any:
    from portico.settings import Secret

    return Secret(text)


async def refusal(coroutine: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        await coroutine
    return caught.value


# -- buying


@EVERY
async def test_a_checkout_is_one_however_often_it_is_asked_for(name: Name) -> None:
    async with shop(name) as at:
        first = await at.adapter.checkout(at.order(), key="chk_0001")
        again = await at.adapter.checkout(at.order(), key="chk_0001")
        other = await at.adapter.checkout(at.order(reference="chk_0002"), key="chk_0002")
        assert first == again != other
        assert first.url.startswith(at.sim.url)
        assert (first.customer_ref is not None) == (name == "stripe")
        assert (first.subscription_ref is None) == (name == "stripe")
        assert (await at.adapter.fetch(first.ref))["id"] == first.ref


@EVERY
async def test_a_checkout_whose_answer_is_lost_is_found_again(name: Name) -> None:
    async with shop(name) as at:
        at.sim.faults.api_lost = 1
        try:
            bought = await at.adapter.checkout(at.order(), key="chk_0001")
        except Problem as problem:  # Razorpay's is not asked for twice within a call
            assert problem.retryable
            bought = await at.adapter.checkout(at.order(), key="chk_0001")
        kind = "sessions" if name == "stripe" else "subscriptions"
        assert [one["id"] for one in at.sim.world.all(kind)] == [bought.ref]


@EVERY
async def test_a_paid_checkout_means_a_plan_an_invoice_and_a_payment(name: Name) -> None:
    async with shop(name) as at:
        ref = await at.buy()
        events = await at.meaning()
        kinds = {each.kind for each in events}
        assert {"checkout.completed", "subscription.activated", "invoice.issued", "payment.succeeded"} <= kinds, kinds
        states = [each for each in events if each.kind.startswith("subscription.")]
        assert states[-1].status == "active" and states[-1].plan_ref == at.sim.price("pro")
        assert {each.subscription_ref for each in states} == {ref}
        paid = [each for each in events if each.kind == "payment.succeeded"]
        issued = [each for each in events if each.kind == "invoice.issued"]
        assert len({each.effect_key for each in paid}) == len({each.effect_key for each in issued}) == 1
        assert paid[0].amount_minor == issued[0].amount_minor == at.sim.offers["pro"].amount_minor
        assert paid[0].invoice_ref == issued[0].invoice_ref and paid[0].subscription_ref == ref
        assert paid[0].fee_minor and paid[0].net_minor == paid[0].amount_minor - paid[0].fee_minor
        assert paid[0].payment_ref is not None


@EVERY
async def test_what_is_fetched_decides_however_old_the_event(name: Name) -> None:
    """Every event of a life, told again at its end, says how it ended; money keeps its effects."""
    async with shop(name) as at:
        ref = await at.buy()
        before = {each.effect_key for each in await at.meaning("payment.succeeded", "invoice.issued")}
        await at.adapter.cancel(ref, at_period_end=False, reason="test", key="can_0001")
        states = [each for each in await at.meaning() if each.kind.startswith("subscription.")]
        assert {each.status for each in states} == {"canceled"}
        assert {each.effect_key for each in await at.meaning("payment.succeeded", "invoice.issued")} == before


# -- changing and ending


@EVERY
async def test_another_plan(name: Name) -> None:
    async with shop(name) as at:
        ref, team = await at.buy(), at.sim.price("team")
        if "change_now" in at.adapter.can:
            for _ in range(2):
                assert (await at.adapter.change(ref, team, when="now", key="cha_0001")).status == "done"
            states = [each for each in await at.meaning() if each.kind.startswith("subscription.")]
            assert states[-1].plan_ref == team
        else:
            assert (await refusal(at.adapter.change(ref, team, when="now", key="cha_0001"))).code == (
                "billing.provider_unsupported"
            )
            asked = await at.adapter.change(
                ref, team, when="period_end", return_url="https://app.example.com/b", key="cha_2"
            )
            assert asked.status == "needs_consent" and (asked.url or "").startswith(at.sim.url)


@pytest.mark.parametrize("name", ["stripe", "razorpay"])
async def test_another_plan_from_the_next_period_on(name: Name) -> None:
    async with shop(name) as at:
        ref, team = await at.buy(), at.sim.price("team")
        for key in ("cha_0001", "cha_0001", "cha_0002"):
            assert (await at.adapter.change(ref, team, when="period_end", key=key)).status == "scheduled"
        states = [each for each in await at.meaning() if each.kind.startswith("subscription.")]
        assert states[-1].plan_ref == at.sim.price("pro"), "not yet"
        await at.sim.advance(_MONTH)
        states = [each for each in await at.meaning() if each.kind.startswith("subscription.")]
        assert states[-1].plan_ref == team


@EVERY
async def test_an_end_now_is_one_however_often_it_is_asked_for(name: Name) -> None:
    async with shop(name) as at:
        ref = await at.buy()
        for key in ("can_0001", "can_0001", "can_0002"):
            state = await at.adapter.cancel(ref, at_period_end=False, reason="no more\n" * 50, key=key)
            assert state.ref == ref and state.provider_status.lower() in ("canceled", "cancelled")
            assert state.cancel_at_period_end is False


@EVERY
async def test_an_end_with_the_period_and_back(name: Name) -> None:
    async with shop(name) as at:
        ref = await at.buy()
        if "cancel_at_period_end" not in at.adapter.can:
            problem = await refusal(at.adapter.cancel(ref, at_period_end=True, reason="x", key="can_0001"))
            assert problem.code == "billing.provider_unsupported"
            return
        state = await at.adapter.cancel(ref, at_period_end=True, reason="x", key="can_0001")
        assert (state.cancel_at_period_end, state.provider_status) == (True, "active")
        if "undo_cancel" not in at.adapter.can:
            problem = await refusal(at.adapter.resume(ref, key="res_0001"))
            assert problem.code == "billing.provider_unsupported"
        else:
            assert (await at.adapter.resume(ref, key="res_0001")).cancel_at_period_end is False
            await at.sim.advance(_MONTH)
            assert (await at.adapter.fetch(ref))["status"] == "active"


async def test_a_change_that_was_planned_does_not_survive_an_end() -> None:
    async with shop("stripe") as at:
        ref = await at.buy()
        await at.adapter.change(ref, at.sim.price("team"), when="period_end", key="cha_0001")
        state = await at.adapter.cancel(ref, at_period_end=True, reason="x", key="can_0001")
        assert state.cancel_at_period_end is True
        await at.sim.advance(_MONTH)
        assert (await at.adapter.fetch(ref))["status"] == "canceled"


# -- money back


@EVERY
async def test_money_goes_back_in_parts_and_no_part_twice(name: Name) -> None:
    async with shop(name) as at:
        await at.buy()
        paid = await at.payment()
        assert paid.payment_ref and paid.currency and paid.amount_minor
        ask = {"currency": paid.currency, "reason": "goodwill"}
        part = await at.adapter.refund(paid.payment_ref, amount_minor=700, key="rfd_000000001", **ask)
        again = await at.adapter.refund(paid.payment_ref, amount_minor=700, key="rfd_000000001", **ask)
        assert part == again and (part.amount_minor, part.currency) == (700, paid.currency)
        rest = await at.adapter.refund(paid.payment_ref, amount_minor=None, key="rfd_000000002", **ask)
        assert rest.amount_minor == paid.amount_minor - 700
        problem = await refusal(at.adapter.refund(paid.payment_ref, amount_minor=1, key="rfd_000000003", **ask))
        assert problem.code == "billing.provider_refused"
        refunds = {each.effect_key: each for each in await at.meaning("refund.succeeded")}
        assert sorted(each.amount_minor or 0 for each in refunds.values()) == sorted([700, rest.amount_minor])
        for each in refunds.values():
            assert (each.payment_ref, each.invoice_ref) == (paid.payment_ref, paid.invoice_ref)
            assert each.subscription_ref == paid.subscription_ref


@EVERY
async def test_a_key_is_one_requests(name: Name) -> None:
    async with shop(name) as at:
        await at.buy()
        paid = await at.payment()
        ask: dict[str, Any] = {"currency": paid.currency, "reason": "x", "key": "rfd_000000001"}
        await at.adapter.refund(str(paid.payment_ref), amount_minor=700, **ask)
        problem = await refusal(at.adapter.refund(str(paid.payment_ref), amount_minor=800, **ask))
        assert problem.code == "billing.provider_key_reused"


# -- what goes wrong with payments


@EVERY
async def test_a_failed_renewal_is_told_with_its_next_attempt(name: Name) -> None:
    async with shop(name) as at:
        ref = await at.buy(card="fails_later")
        renewal = datetime.now(UTC) + timedelta(days=25)
        await at.sim.advance(27 * 86_400)
        failed: list[FinanceEvent] = []
        for _ in range(6):  # then a day at a time: what is fetched is how it stands when it has just failed
            await at.sim.advance(86_400)
            if failed := await at.meaning("payment.failed"):
                break
        assert failed, "no renewal failed within 33 days"
        got = failed[0]
        assert got.subscription_ref == ref and got.amount_minor == at.sim.offers["pro"].amount_minor
        assert got.is_final_attempt is False and got.next_attempt_at is not None and got.next_attempt_at > renewal
        states = [each for each in await at.meaning() if each.kind.startswith("subscription.")]
        assert states[-1].status == "past_due"


@EVERY
async def test_a_dispute_is_opened_and_decided(name: Name) -> None:
    for won, expected in ((True, "dispute.won"), (False, "dispute.lost")):
        async with shop(name) as at:
            await at.buy()
            paid = await at.payment()
            made = at.sim.dispute(paid.payment_ref, "fraudulent")
            opened = await at.meaning("dispute.opened")
            at.sim.decide(made.get("id") or made["dispute_id"], won)
            ended = await at.meaning(expected)
            assert len({each.effect_key for each in opened}) == len({each.effect_key for each in ended}) == 1
            for each in (opened[0], ended[0]):
                assert each.amount_minor == paid.amount_minor and each.payment_ref == paid.payment_ref
                assert each.dispute_ref == opened[0].dispute_ref and each.subscription_ref == paid.subscription_ref


@EVERY
async def test_a_dispute_after_a_partial_refund_is_about_what_was_left_whatever_tells_of_it(name: Name) -> None:
    async with shop(name) as at:
        await at.buy()
        paid = await at.payment()
        await at.adapter.refund(
            str(paid.payment_ref), amount_minor=500, currency=str(paid.currency), reason="x", key="rfd_000000002"
        )
        made = at.sim.dispute(paid.payment_ref, "fraudulent")
        at.sim.decide(made.get("id") or made["dispute_id"], False)
        told = await at.meaning("dispute.opened", "dispute.lost")
        amounts = {(each.effect_key, each.amount_minor) for each in told}
        assert len(amounts) == len({effect for effect, _ in amounts}) == 2
        assert {amount for _, amount in amounts} == {(paid.amount_minor or 0) - 500}


async def test_an_invoice_of_many_lines_is_read_whole() -> None:
    async with shop("stripe", billing_list_page=5) as at:
        sub = at.sim.world.get("subscriptions", await at.buy())
        for _ in range(6):  # each takes a line back and makes another; the next invoice has them all
            for plan in ("team", "pro"):
                price = at.sim.world.get("prices", at.sim.price(plan))
                at.sim.books.change(sub, price, 1, "create_prorations")
        await at.sim.advance(_MONTH)
        bodies = [body for body in await at.told() if body["type"] == "invoice.finalized"]
        assert (len(bodies[-1]["data"]["object"]["lines"]["data"]), bodies[-1]["data"]["object"]["lines"]["has_more"]) == (
            10, True,
        )  # fmt: skip
        issued = (await at.meaning("invoice.issued"))[-1]
        assert len(issued.lines) == 25, "two of each change, and the plan"
        assert sum(line.net_minor for line in issued.lines) == issued.net_minor


@EVERY
async def test_a_page_that_is_closed_is_paid_no_longer(name: Name) -> None:
    async with shop(name) as at:
        paid, left = [await at.adapter.checkout(at.order(reference=f"chk_000{n}"), key=f"chk_000{n}") for n in range(2)]
        at.sim.pay(paid.ref, "good")
        assert (await refusal(at.adapter.close_page(paid.ref, key="cls_0000"))).code in (
            "billing.provider_refused", "billing.provider_unsupported",
        )  # fmt: skip
        if "close_page" not in at.adapter.can:
            assert (await refusal(at.adapter.close_page(left.ref, key="cls_0001"))).code == (
                "billing.provider_unsupported"
            )
            return
        await at.adapter.close_page(left.ref, key="cls_0001")
        with pytest.raises(ValueError, match=r"expired|cancelled"):
            at.sim.pay(left.ref, "good")


@pytest.mark.parametrize("name", ["stripe", "razorpay"])
async def test_a_refund_is_found_when_its_key_may_be_forgotten(name: Name) -> None:
    async with shop(name) as at:
        await at.buy()
        payment = await at.payment()
        ref, currency = str(payment.payment_ref), str(payment.currency)
        assert await at.adapter.refund_made(ref, key="rfd_000000001") is None
        made = [
            await at.adapter.refund(ref, amount_minor=amount, currency=currency, reason="x", key=f"rfd_00000000{n}")
            for n, amount in enumerate((100, 200, 300))
        ]
        assert await at.adapter.refund_made(ref, key="rfd_000000001") == made[1]
        assert await at.adapter.refund_made(ref, key="rfd_000000009") is None


# -- reconcile


@EVERY
async def test_the_providers_own_list_has_the_same_effects(name: Name) -> None:
    async with shop(name) as at:
        await at.buy()
        paid = await at.payment()
        await at.adapter.refund(
            str(paid.payment_ref), amount_minor=500, currency=str(paid.currency), reason="x", key="rfd_000000001"
        )
        money = ("payment.succeeded", "invoice.issued", "refund.succeeded")
        sent = {each.effect_key for each in await at.meaning(*money)}
        listed, ids = set[str](), list[str]()
        since = datetime.fromtimestamp(time.time(), UTC) - timedelta(hours=2)
        until = datetime.fromtimestamp(time.time(), UTC) + timedelta(hours=2)
        async for body in at.adapter.list_events(since, until):
            ids.append(str(body["id"]))
            events = await at.means(body, json.dumps(body).encode(), str(body["id"]))
            listed |= {each.effect_key for each in events if each.kind in money}
        assert listed == sent != set()
        assert len(ids) == len(set(ids))
        again = [str(body["id"]) async for body in at.adapter.list_events(since, until)]
        assert sorted(again) == sorted(ids), "the same things have the same ids"
        assert ("events" in at.adapter.can) == (not any(one.startswith("list:") for one in ids))


@EVERY
async def test_a_list_of_many_pages_is_read_whole(name: Name) -> None:
    async with shop(name, billing_list_page=2) as at:
        for number in range(5):
            bought = await at.adapter.checkout(at.order(reference=f"chk_{number:04}"), key=f"chk_{number:04}")
            at.sim.pay(bought.ref, "good")
        since, until = datetime.now(UTC) - timedelta(hours=2), datetime.now(UTC) + timedelta(hours=2)
        ids = [str(body["id"]) async for body in at.adapter.list_events(since, until)]
        assert len(ids) == len(set(ids)) >= 10


@EVERY
async def test_a_list_that_is_too_long_is_an_error_and_leaves_nothing_out_in_silence(name: Name) -> None:
    async with shop(name) as at:
        for number in range(3):
            bought = await at.adapter.checkout(at.order(reference=f"chk_{number:04}"), key=f"chk_{number:04}")
            at.sim.pay(bought.ref, "good")
        narrow = at.again(billing_list_page=1, billing_list_pages=2)
        with pytest.raises(Problem) as caught:
            async for _ in narrow.list_events(datetime.now(UTC) - timedelta(hours=2)):
                pass
        await narrow.close()
        assert caught.value.code == "billing.provider_unreadable"


# -- what stands in the way


@EVERY
async def test_a_wrong_key_is_said_and_nothing_of_it_is_shown(name: Name) -> None:
    wrong = {
        "stripe": {"stripe_secret_key": _secret("sk_test_wrong_key")},
        "razorpay": {"razorpay_key_secret": _secret("wrong_key")},
        "paypal": {"paypal_client_secret": _secret("wrong_key")},
    }[name]
    async with shop(name, **wrong) as at:
        problem = await refusal(at.adapter.checkout(at.order(), key="chk_0001"))
        assert (problem.code, problem.retryable) == ("billing.provider_credentials", False)
        assert "wrong_key" not in str(problem) + str(problem.document())


@EVERY
async def test_what_is_not_there_is_missing(name: Name) -> None:
    ref = {"stripe": "sub_nothing", "razorpay": "sub_00000000000000", "paypal": "I-NOTHING"}[name]
    async with shop(name) as at:
        assert (await refusal(at.adapter.fetch(ref))).code == "billing.provider_object_missing"
        for strange in ("../customers", "sub_1/../../x", "nonsense"):
            assert (await refusal(at.adapter.fetch(strange))).code == "billing.provider_object_missing"
        body = {
            "stripe": {"type": "customer.subscription.updated", "data": {"object": {"id": ref}}},
            "razorpay": {"event": "subscription.updated", "payload": {"subscription": {"entity": {"id": ref}}}},
            "paypal": {"event_type": "BILLING.SUBSCRIPTION.UPDATED", "resource": {"id": ref}},
        }[name]
        assert (await at.adapter.authority(body)).objects == {}


def charge(at: Shop, subscription: str, customer: str | None, **changes: Any) -> Charge:
    now = datetime.now(UTC)
    facts = {
        "amount_minor": 250,
        "currency": at.sim.offers["pro"].currency,
        "description": "2 × 1 GiB beyond the plan pro",
    }
    times = {"period_start": now - timedelta(days=30), "period_end": now, "since": now}
    return Charge("ovc_0001", subscription, customer, **{**facts, **times, **changes})


@EVERY
async def test_a_charge_beside_the_plan_is_one_and_is_on_the_next_invoice(name: Name) -> None:
    async with shop(name) as at:
        subscription = await at.buy()
        customer = (await at.adapter.fetch(subscription)).get("customer")
        wanted = charge(at, subscription, customer)
        if "charge" not in at.adapter.can:
            assert (await refusal(at.adapter.charge(wanted, key="cll_1"))).code == "billing.provider_unsupported"
            return
        first = await at.adapter.charge(wanted, key="cll_1")
        assert await at.adapter.charge(wanted, key="cll_1") == first
        assert await at.adapter.charge(wanted, key="cll_2") == first, "a key of long ago is known no more"
        await at.sim.advance(32 * 86_400)
        issued = [
            each for each in await at.meaning("invoice.issued") if any(line.kind == "overage" for line in each.lines)
        ]
        (event,) = {each.effect_key: each for each in issued}.values()
        price = at.sim.offers["pro"].amount_minor
        assert event.amount_minor == price + 250
        assert {(line.kind, line.net_minor) for line in event.lines} == {("plan", price), ("overage", 250)}


async def test_a_charge_has_an_invoice_of_its_own_when_no_other_comes() -> None:
    async with shop("stripe") as at:
        subscription = await at.buy()
        customer = (await at.adapter.fetch(subscription))["customer"]
        await at.adapter.cancel(subscription, at_period_end=False, reason="enough", key="can_1")
        wanted = charge(at, subscription, customer, at_once=True)
        made = [await at.adapter.charge(wanted, key=key) for key in ("cll_1", "cll_1", "cll_2")]
        assert len(set(made)) == 1
        found = {each.effect_key: each for each in await at.meaning("invoice.issued", "payment.succeeded")}
        about = [(each.kind, each.amount_minor, [line.kind for line in each.lines]) for each in found.values()][-2:]
        assert about == [("invoice.issued", 250, ["overage"]), ("payment.succeeded", 250, [])]


async def test_an_invoice_that_was_left_as_a_draft_is_finished() -> None:
    async with shop("stripe") as at:
        subscription = await at.buy()
        customer = (await at.adapter.fetch(subscription))["customer"]
        wanted = charge(at, subscription, customer, at_once=True)
        at.sim.faults.api_lost = 0
        draft = await at.adapter._ask("post", "/v1/invoices", {  # type: ignore[attr-defined]
            "customer": customer, "currency": "usd", "auto_advance": False, "pending_invoice_items_behavior": "exclude",
        }, key="cll_1:invoice")  # fmt: skip
        item = {"customer": customer, "amount": 250, "currency": "usd", "invoice": draft["id"]}
        await at.adapter._ask(  # type: ignore[attr-defined]
            "post", "/v1/invoiceitems", {**item, "metadata": {"reference": wanted.reference}}, key="cll_1:item"
        )
        await at.adapter.charge(wanted, key="cll_2")
        assert (await at.adapter.fetch(draft["id"]))["status"] == "paid"


@EVERY
async def test_a_payment_that_failed_is_tried_once_more(name: Name) -> None:
    async with shop(name) as at:
        subscription = await at.buy()
        paid = await at.payment()
        facts: dict[str, Any] = {"amount_minor": 1, "currency": at.sim.offers["pro"].currency}
        if "collect" not in at.adapter.can:
            problem = await refusal(at.adapter.collect(subscription, paid.invoice_ref, key="col_1", **facts))
            assert problem.code == "billing.provider_unsupported"
            return
        assert await at.adapter.collect(subscription, paid.invoice_ref, key="col_1", **facts) == "nothing"
        at.sim.set_card(subscription, "declines")
        await at.sim.advance(32 * 86_400)
        failed = (await at.meaning("payment.failed"))[-1]
        assert await at.adapter.collect(subscription, failed.invoice_ref, key="col_2", **facts) == "declined"
        at.sim.set_card(subscription, "good")
        assert await at.adapter.collect(subscription, failed.invoice_ref, key="col_3", **facts) == "paid"
        assert await at.adapter.collect(subscription, failed.invoice_ref, key="col_4", **facts) == "nothing"


@EVERY
async def test_what_a_provider_cannot_do_is_said(name: Name) -> None:
    async with shop(name) as at:
        if "portal" in at.adapter.can:
            bought = await at.adapter.checkout(at.order(), key="chk_0001")
            page = await at.adapter.portal(str(bought.customer_ref), "https://app.example.com", key="por_0001")
            assert page.startswith(at.sim.url)
        else:
            problem = await refusal(at.adapter.portal("cust_1", "https://app.example.com", key="por_0001"))
            assert problem.code == "billing.provider_unsupported"


@EVERY
async def test_a_provider_in_trouble_is_asked_again_and_nothing_happens_twice(name: Name) -> None:
    async with shop(name) as at:
        await at.buy()
        paid = await at.payment()
        at.sim.faults.api_status, at.sim.faults.api_count = 503, 2
        made = await at.adapter.refund(
            str(paid.payment_ref), amount_minor=300, currency=str(paid.currency), reason="x", key="rfd_000000001"
        )
        assert made.amount_minor == 300
        at.sim.faults.api_lost = 1  # done, and the answer is lost
        second = await at.adapter.refund(
            str(paid.payment_ref), amount_minor=200, currency=str(paid.currency), reason="x", key="rfd_000000002"
        )
        assert second.amount_minor == 200
        refunds = {each.effect_key: each.amount_minor for each in await at.meaning("refund.succeeded")}
        assert sorted(each or 0 for each in refunds.values()) == [200, 300]
        at.sim.faults.api_status, at.sim.faults.api_count = 500, 100
        assert (await refusal(at.adapter.fetch(str(paid.subscription_ref)))).code == "billing.provider_busy"
