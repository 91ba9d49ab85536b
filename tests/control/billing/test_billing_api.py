"""Buying, changing, ending and giving back, over HTTP, against Stripe's simulator."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from portico.control.access import Caller
from portico.control.billing import checkout_store
from portico.control.billing.billing_store import Source
from portico.control.billing.checkout import Purchase
from portico.errors import Problem
from portico.kit import queue
from portico.kit.db import Database
from portico.kit.queue import Limits
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret
from portico.simulators.stripe import StripeSimulator
from tests.control.billing.story import Story
from tests.control.conftest import Account

_URLS = {"success_url": "https://app.example.com/paid", "cancel_url": "http://localhost:8000/"}
_MASTER_KEY = new_master_key()


@pytest.fixture
async def stripe() -> AsyncIterator[StripeSimulator]:
    """Stripe, whose events go nowhere: tests say what was told."""
    async with StripeSimulator(webhook_secret="whsec_" + "x" * 32) as running:
        yield running


@pytest.fixture
def settings(database_url: str, stripe: StripeSimulator) -> ApiSettings:
    known: dict[str, Any] = dict(stripe.settings())
    for name in ("stripe_secret_key", "stripe_webhook_secret"):
        known[name] = Secret(known[name])
    known["stripe_prices"] = tuple(known["stripe_prices"].split(","))
    return ApiSettings(
        database_url=Secret(database_url), master_key=Secret(_MASTER_KEY), default_plan="free",
        registrations_per_address=100_000, rate_write_per_minute=1_000_000, rate_auth_per_minute=1_000_000,
        rate_read_per_minute=1_000_000, billing_retry_min_seconds=0.01, billing_retry_max_seconds=0.02, **known,
    )  # fmt: skip


@pytest.fixture
async def story(app: Any, owner: Account, stripe: StripeSimulator, db: Database) -> Story:
    """What Stripe tells of the owner's organization."""
    found = Story(db, app.state.billing.applier)
    found.organization, found.source = owner.organization, Source("stripe", stripe.account, False)
    return found


def order(**more: Any) -> dict[str, Any]:
    return {"plan": "pro", "provider": "stripe", **_URLS, **more}


async def buy(owner: Account, **more: Any) -> httpx.Response:
    return await owner.client.post("/v1/billing/checkout-sessions", json=order(**more))


async def subscription(owner: Account) -> Any:
    answer = await owner.client.get("/v1/billing/subscription")
    assert answer.status_code == 200, answer.text
    return answer.json()["subscription"]


class TestCheckout:
    async def test_a_page_to_pay_on(self, owner: Account, stripe: StripeSimulator) -> None:
        answer = await buy(owner)
        assert answer.status_code == 201, answer.text
        made = answer.json()
        assert (made["plan"], made["id"][:4]) == ("pro", "chk_")
        assert made["url"].startswith(stripe.url)
        assert await subscription(owner) is None  # nothing is had before it is paid

    async def test_the_same_request_is_one_page(self, owner: Account) -> None:
        async def ask(body: dict[str, Any]) -> httpx.Response:
            headers = {"Idempotency-Key": "one"}
            return await owner.client.post("/v1/billing/checkout-sessions", json=body, headers=headers)

        first, again = await ask(order()), await ask(order())
        assert (first.status_code, again.json()) == (201, first.json())
        other = await ask(order(plan="team"))
        assert (other.status_code, other.json()["code"]) == (422, "idempotency.mismatch")

    @pytest.mark.parametrize(
        ("more", "status", "code"),
        [
            ({"plan": "unlimited"}, 404, "plan.not_found"),
            ({"plan": "free"}, 400, "billing.plan_not_sold"),
            ({"provider": "paypal"}, 409, "billing.provider_unconfigured"),
            ({"success_url": "http://evil.example/"}, 400, "billing.url_invalid"),
            ({"cancel_url": "javascript:alert(1)"}, 400, "billing.url_invalid"),
            ({"cancel_url": "https://user@example.com/"}, 400, "billing.url_invalid"),
            ({"cancel_url": "https://[::1"}, 400, "billing.url_invalid"),
        ],
    )
    async def test_what_cannot_be_bought(self, owner: Account, more: dict[str, Any], status: int, code: str) -> None:
        answer = await buy(owner, **more)
        assert (answer.status_code, answer.json()["code"]) == (status, code)

    async def test_nobody_pays_twice(self, owner: Account, story: Story) -> None:
        await buy(owner)
        await _bought(story, owner)
        answer = await buy(owner, plan="team")
        assert (answer.status_code, answer.json()["code"]) == (409, "billing.already_subscribed")

    async def test_a_provider_that_is_away(self, owner: Account, stripe: StripeSimulator, db: Database) -> None:
        stripe.faults.api_count = 99
        answer = await buy(owner)
        assert answer.status_code == 503, answer.text
        assert answer.json()["code"].startswith("billing.provider_")
        async with db.read() as reader:  # nobody waits for that page: no worker asks again
            query = "SELECT state FROM billing_checkouts WHERE organization_id = $1"
            assert await reader.raw.fetchval(query, owner.organization) == "failed"
            assert (await queue.count(reader, checkout_store.CALL)).waiting == 0

    async def test_one_that_nobody_could_open_is_said_again_and_no_fault_of_ours(
        self, owner: Account, stripe: StripeSimulator
    ) -> None:
        headers = {"Idempotency-Key": "away"}

        async def ask() -> httpx.Response:
            return await owner.client.post("/v1/billing/checkout-sessions", json=order(), headers=headers)

        stripe.faults.api_count = 99
        assert (await ask()).status_code == 503
        stripe.faults.api_count = 0
        again = await ask()
        assert (again.status_code, again.json()["code"]) == (503, "billing.provider_unreachable")
        assert (await buy(owner)).status_code == 201

    async def test_one_that_went_with_its_organization(
        self, owner: Account, db: Database, app: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the call and the answer, which are two transactions."""
        real = app.state.billing.calls.now

        async def now(call: str) -> Any:
            row = await real(call)
            async with db.transaction() as tx:
                await tx.raw.execute("DELETE FROM billing_checkouts WHERE organization_id = $1", owner.organization)
            return row

        monkeypatch.setattr(app.state.billing.calls, "now", now)
        answer = await buy(owner)
        assert (answer.status_code, answer.json()["code"]) == (409, "billing.call_running")

    async def test_it_is_said_whether_the_page_leads_back(self, owner: Account) -> None:
        assert (await buy(owner)).json()["returns"] is True


async def _bought(story: Story, owner: Account) -> None:
    """What Stripe would tell of the newest page: it was paid."""
    async with story.db.read() as reader:
        page = await checkout_store.latest_open(reader, owner.organization)
    assert page is not None
    done = story(
        "checkout.completed", 1, page.ref, checkout_ref=page.ref, customer_ref="cus_" + page.ref,
        subscription_ref="sub_" + page.ref,
    )  # fmt: skip
    names = {"customer_ref": done.customer_ref, "subscription_ref": done.subscription_ref}
    assert await story.apply(done) == ["applied"]
    for event in (story.state(2, "active", plan_ref=None), story.invoice(2, "in_" + page.ref), _paid(story, page.ref)):
        event = dataclasses.replace(event, effect_key=f"{event.effect_key}:{page.ref}", **names)
        assert await story.apply(event) == ["applied"]


def _paid(story: Story, ref: str) -> Any:
    return story.paid(3, "in_" + ref, "pi_" + ref)


async def test_what_was_bought_is_shown(owner: Account, story: Story) -> None:
    await buy(owner)
    await _bought(story, owner)
    shown = await subscription(owner)
    assert (shown["plan"], shown["status"], shown["owing"]) == ("pro", "active", [])
    assert (await owner.client.get("/v1/org/plan")).json()["plan"]["id"] == "pro"
    payments = (await owner.client.get("/v1/billing/payments")).json()["data"]
    assert [(each["amount_minor"], each["refunded_minor"]) for each in payments] == [(1190, 0)]


@pytest.mark.parametrize("path", ["cancel", "resume", "change"])
async def test_without_a_subscription(owner: Account, path: str) -> None:
    body = {"cancel": {}, "resume": None, "change": {"plan": "team"}}[path]
    answer = await owner.client.post(f"/v1/billing/subscription/{path}", json=body)
    assert (answer.status_code, answer.json()["code"]) == (409, "billing.no_subscription")


class TestRefunds:
    async def _payment(self, owner: Account, story: Story) -> str:
        await buy(owner)
        await _bought(story, owner)
        return str((await owner.client.get("/v1/billing/payments")).json()["data"][0]["id"])

    async def test_of_another_organization(self, owner: Account, stranger: Account, story: Story) -> None:
        body = {"payment": await self._payment(owner, story), "reason": "mine?"}
        answer = await stranger.client.post("/v1/billing/refunds", json=body)
        assert (answer.status_code, answer.json()["code"]) == (404, "billing.payment_not_found")

    async def test_no_more_than_there_was(self, owner: Account, story: Story) -> None:
        body = {"payment": await self._payment(owner, story), "reason": "too much", "amount_minor": 1191}
        answer = await owner.client.post("/v1/billing/refunds", json=body)
        assert (answer.status_code, answer.json()["code"], answer.json()["left_minor"]) == (
            409, "billing.refund_exceeds", 1190
        )  # fmt: skip

    async def test_two_at_once_give_back_once(self, owner: Account, story: Story) -> None:
        """Stripe knows no such payment here and refuses; what is decided before that is decided under a lock."""
        body = {"payment": await self._payment(owner, story), "reason": "changed my mind"}
        answers = await asyncio.gather(*(owner.client.post("/v1/billing/refunds", json=body) for _ in range(3)))
        asked = [answer for answer in answers if answer.json()["code"] != "billing.refund_exceeds"]
        assert len(asked) >= 1
        async with story.db.read() as reader:
            query = "SELECT state, sum(amount_minor)::bigint AS total FROM billing_refunds GROUP BY state"
            totals = {row["state"]: row["total"] for row in await reader.raw.fetch(query)}
        assert totals.get("requested", 0) + totals.get("pending", 0) + totals.get("succeeded", 0) <= 1190

    async def test_an_old_payment(self, owner: Account, story: Story, clock: Any) -> None:
        body = {"payment": await self._payment(owner, story), "reason": "late"}
        key = await owner.key("api", scopes=["billing:write"])  # the sign-in is over by then
        clock.advance(15 * 86_400)
        headers = {"Authorization": f"Bearer {key['key']}"}
        answer = await owner.client.post("/v1/billing/refunds", json=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (409, "billing.refund_late")


async def test_a_worker_makes_the_call_of_a_process_that_died(
    app: Any, owner: Account, story: Story, db: Database, stripe: StripeSimulator
) -> None:
    """The intent is committed; the process that was to ask is gone."""
    billing = app.state.billing
    who = Caller("person", owner.user, owner.organization)
    async with db.transaction() as tx:
        made, call = await billing.checkouts.buy(tx, who, Purchase("pro", "stripe", *_URLS.values()), None)
        await tx.raw.execute("UPDATE billing_calls SET available_at = now() WHERE id = $1", call)
    works, _ = await queue.claim(db, checkout_store.CALL, Limits(), 5)
    await asyncio.gather(*(billing.calls.carry_out(work) for work in works))
    async with db.read() as reader:
        page = await checkout_store.checkout(reader, made)
    assert page is not None
    assert (page.state, page.url.startswith(stripe.url)) == ("open", True)


async def test_a_call_that_somebody_makes_is_not_made_again(app: Any, owner: Account, db: Database) -> None:
    billing, who = app.state.billing, Caller("person", owner.user, owner.organization)
    async with db.transaction() as tx:
        _, call = await billing.checkouts.buy(tx, who, Purchase("pro", "stripe", *_URLS.values()), None)
        assert await checkout_store.take(tx, call, 60.0) is not None
    with pytest.raises(Problem) as refused:
        await billing.calls.now(call)
    assert refused.value.code == "billing.call_running"


async def test_the_plan_that_it_is_for_already(owner: Account, story: Story) -> None:
    await buy(owner)
    await _bought(story, owner)
    answer = await owner.client.post("/v1/billing/subscription/change", json={"plan": "pro"})
    assert (answer.status_code, answer.json()["code"]) == (409, "billing.same_plan")


async def test_a_subscription_that_is_paused_changes_no_plan(owner: Account, story: Story) -> None:
    await buy(owner)
    await _bought(story, owner)
    async with story.db.transaction() as tx:
        query = "UPDATE billing_subscriptions SET status = 'paused' WHERE organization_id = $1"
        await tx.raw.execute(query, owner.organization)
    answer = await owner.client.post("/v1/billing/subscription/change", json={"plan": "team"})
    assert (answer.status_code, answer.json()["code"]) == (409, "billing.subscription_state")


async def test_a_later_request_waits_for_the_answer_of_an_earlier_one(
    owner: Account, story: Story, stripe: StripeSimulator, db: Database
) -> None:
    """An earlier one that got no answer is made again by the worker: after a later one, it would undo that."""
    await buy(owner)
    await _bought(story, owner)
    stripe.faults.api_count = 99
    first = await owner.client.post("/v1/billing/subscription/change", json={"plan": "team"})
    assert first.json()["request"] == "requested", first.text
    stripe.faults.api_count = 0
    for path, body in (("cancel", {}), ("resume", None), ("change", {"plan": "team"})):
        answer = await owner.client.post(f"/v1/billing/subscription/{path}", json=body)
        assert (answer.status_code, answer.json()["code"]) == (409, "billing.call_running"), path
        assert answer.headers["retry-after"] == "5"
    async with db.transaction() as tx:
        await tx.raw.execute("UPDATE billing_calls SET queue_state = 'done' WHERE act = 'change'")
    answer = await owner.client.post("/v1/billing/subscription/resume")
    assert answer.json().get("code") != "billing.call_running"
