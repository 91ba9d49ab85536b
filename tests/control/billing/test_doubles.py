"""Two open pages of one organization, both paid: one subscription stays, and the other's money comes back. At each provider."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.access import Caller
from portico.control.billing import checkout_store
from portico.control.billing.checkout import Purchase
from portico.control.finance.events import FinanceEvent
from portico.kit import queue
from portico.kit.queue import Limits, Retry
from portico.settings import ApiSettings
from tests.control.billing.test_whole import SIMULATORS, Customer, settings_of
from tests.control.conftest import Account, MovableClock


@pytest.fixture(params=list(SIMULATORS))
async def provider(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    async with SIMULATORS[request.param]() as running:
        yield running


@pytest.fixture
def settings(database_url: str, provider: Any) -> ApiSettings:
    return settings_of(database_url, provider)


@pytest.fixture
def customer(app: Any, owner: Account, provider: Any, clock: MovableClock) -> Customer:
    return Customer(app, owner, provider, clock)


async def calls(customer: Customer) -> None:
    """What billing asks of the provider by itself, as the worker does."""
    state = customer.app.state
    async with state.db.transaction() as tx:  # those that other tests have left are not for this provider
        others = "UPDATE billing_calls SET queue_state = 'done' WHERE organization_id <> $1 AND queue_state = 'pending'"
        await tx.raw.execute(others, customer.owner.organization)
    while works := (await queue.claim(state.db, checkout_store.CALL, Limits(), 20))[0]:
        for work in works:
            try:
                await state.billing.calls.carry_out(work)
            except Retry as err:
                await queue.fail(work, str(err), 0.0, dead=work.attempt > 3)


async def rows(customer: Customer, query: str) -> list[tuple[Any, ...]]:
    async with customer.app.state.db.read() as reader:
        return [tuple(row) for row in await reader.raw.fetch(query, customer.owner.organization)]


async def settled(customer: Customer) -> None:
    """Until the provider and we have nothing to tell each other."""
    for _ in range(3):
        await calls(customer)
        await customer.told()


async def one_subscription_stays(customer: Customer) -> None:
    """The plan, one subscription, and of two payments one whole one given back: in the books, too."""
    held = await rows(customer, "SELECT status, beside IS NULL FROM billing_subscriptions WHERE organization_id = $1")
    assert sorted(held) == [("active", True), ("canceled", False)]
    assert await customer.plan() == "pro"
    assert (await customer.subscription())["status"] == "active"
    paid = await rows(
        customer,
        "SELECT s.beside IS NULL, p.amount_minor, coalesce((SELECT sum(r.amount_minor) FROM billing_refunds r"
        " WHERE r.payment_id = p.id AND r.state = 'succeeded'), 0)::bigint FROM billing_payments p"
        " JOIN billing_subscriptions s ON s.id = p.subscription_id WHERE p.organization_id = $1 ORDER BY 1",
    )
    (_, amount, back), (_, kept, nothing) = paid
    assert (back, nothing) == (amount, 0) and kept == amount
    told = await rows(customer, "SELECT topic, count(*) FROM outbox_messages WHERE organization_id = $1 GROUP BY 1")
    assert dict(told)["subscription.double"] == 1
    audited = await rows(customer, "SELECT action, outcome FROM audit_events WHERE organization_id = $1")
    assert audited.count(("subscription.double", "success")) == 1
    await customer.story.balanced()
    end = await customer.story.end()
    assert end["waiting"] == []


async def test_a_page_is_closed_when_another_one_is_paid(customer: Customer, provider: Any) -> None:
    first, second = await customer.page(), await customer.page()
    await customer.sim("pay", {"checkout": first, "card": "good"})
    await customer.told()
    await settled(customer)
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.post(f"{provider.url}/_sim/pay", json={"checkout": second, "card": "good"})
    closes = "close_page" in customer.app.state.billing.providers.of(provider.name).can
    assert (answer.status_code != 200) is closes, answer.text
    if closes:
        held = await rows(customer, "SELECT ref, state FROM billing_checkouts WHERE organization_id = $1")
        states = dict(held)
        # Razorpay's list, of which this is read, does not tell of the checkout itself.
        assert (states[second], states[first]) == ("expired", "completed")
        assert [row[1] for row in await rows(customer, _ALIVE)] == ["active"]
        assert await rows(customer, "SELECT id FROM billing_refunds WHERE organization_id = $1") == []
    else:
        await settled(customer)
        await one_subscription_stays(customer)


_ALIVE = (
    "SELECT ref, status FROM billing_subscriptions WHERE organization_id = $1 AND status NOT IN ('canceled', 'pending')"
)


@pytest.mark.parametrize("workers", [1, 3])
async def test_two_pages_are_paid_before_anybody_hears_of_it(customer: Customer, workers: int) -> None:
    """Whichever is told of first stays, in whatever order the rest comes, and however many hear of it at once."""
    pages = [await customer.page(), await customer.page()]
    for page in pages:
        await customer.sim("pay", {"checkout": page, "card": "good"})
    told = await customer.telling() * 2
    random.Random(workers).shuffle(told)

    async def work(some: list[list[FinanceEvent]]) -> None:
        for found in some:
            while True:
                try:
                    await customer.story.apply(*found)
                except sa.exc.DBAPIError:  # a deadlock, as the queue takes it
                    await asyncio.sleep(0.01)
                else:
                    break

    await asyncio.gather(*(work(told[at::workers]) for at in range(workers)))
    await settled(customer)
    await one_subscription_stays(customer)


async def test_a_page_that_opens_when_another_one_is_paid_already(customer: Customer, provider: Any) -> None:
    """The second is asked for before the first is paid; its answer comes afterwards."""
    first = await customer.page()
    billing, who = customer.app.state.billing, customer.owner
    async with customer.app.state.db.transaction() as tx:
        caller = Caller("person", who.user, who.organization)
        wanted = Purchase("pro", provider.name, "https://app.example.com/", "https://app.example.com/")
        _, call = await billing.checkouts.buy(tx, caller, wanted, None)
    await customer.sim("pay", {"checkout": first, "card": "good"})
    await customer.told()
    await billing.calls.now(call)
    asked = await rows(customer, "SELECT act FROM billing_calls WHERE organization_id = $1 ORDER BY id")
    assert asked == [("checkout",), ("checkout",), ("close",)]


@pytest.mark.parametrize("provider", ["paypal"], indirect=True)
async def test_a_second_page_that_is_paid_when_the_first_subscription_is_over_stays(customer: Customer) -> None:
    """PayPal closes no pages: what is paid there later is a new subscription, when the one before has ended."""
    first, second = await customer.page(), await customer.page()
    await customer.sim("pay", {"checkout": first, "card": "good"})
    await customer.told()
    await settled(customer)
    await customer.post("subscription/cancel", {"at_period_end": False})
    await customer.told()
    await customer.sim("pay", {"checkout": second, "card": "good"})
    await customer.told()
    await settled(customer)
    held = await rows(customer, "SELECT status, beside FROM billing_subscriptions WHERE organization_id = $1")
    assert sorted(held) == [("active", None), ("canceled", None)]
    assert await customer.plan() == "pro"


async def test_a_page_of_an_organization_that_is_gone(customer: Customer) -> None:
    """It is paid all the same: the subscription is ended, and what it would pay for is nobody's."""
    page = await customer.page()
    await customer.sim("pay", {"checkout": page, "card": "good"})
    async with customer.app.state.db.transaction() as tx:
        await tx.raw.execute("DELETE FROM organizations WHERE id = $1", customer.owner.organization)
    await customer.told()
    await settled(customer)
    held = await rows(customer, "SELECT status FROM billing_subscriptions WHERE organization_id = $1")
    assert held == [("canceled",)]
