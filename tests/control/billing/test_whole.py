"""Bought, changed, given back, failed, recovered and ended at each provider's simulator, from HTTP to ledger and plan.

What providers tell is read from their own lists, and normalized as their webhooks are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from portico.control.billing.billing_store import Source
from portico.control.billing.normalize import normalize
from portico.control.billing.provider import Origin
from portico.control.finance.events import FinanceEvent
from portico.kit.db import Database
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret
from portico.simulators.paypal import PayPalSimulator
from portico.simulators.razorpay import RazorpaySimulator
from portico.simulators.stripe import StripeSimulator
from tests.control.billing.story import Story
from tests.control.conftest import Account, MovableClock

_MASTER_KEY = new_master_key()
SIMULATORS: dict[str, Any] = {"stripe": StripeSimulator, "razorpay": RazorpaySimulator, "paypal": PayPalSimulator}
_LISTS = ("stripe_prices", "razorpay_plans", "paypal_plans", "paypal_cert_hosts")
_SECRETS = (
    "stripe_secret_key", "stripe_webhook_secret", "razorpay_key_secret", "razorpay_webhook_secret", "paypal_client_secret"
)  # fmt: skip


@pytest.fixture(params=list(SIMULATORS))
async def provider(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    async with SIMULATORS[request.param]() as running:
        yield running


@pytest.fixture
def settings(database_url: str, provider: Any) -> ApiSettings:
    return settings_of(database_url, provider)


def settings_of(database_url: str, provider: Any) -> ApiSettings:
    """Those of an API that sells by a simulator."""
    known: dict[str, Any] = dict(provider.settings())
    for name in set(_SECRETS) & known.keys():
        known[name] = Secret(known[name])
    for name in set(_LISTS) & known.keys():
        known[name] = tuple(known[name].split(","))
    return ApiSettings(
        database_url=Secret(database_url), master_key=Secret(_MASTER_KEY), default_plan="free",
        registrations_per_address=100_000, rate_write_per_minute=1_000_000, rate_auth_per_minute=1_000_000,
        rate_read_per_minute=1_000_000, **known,
    )  # fmt: skip


class Customer:
    """The owner of an organization who buys, and what the provider tells of it."""

    def __init__(self, app: Any, owner: Account, provider: Any, clock: MovableClock) -> None:
        self.app, self.owner, self.provider, self.clock = app, owner, provider, clock
        self.story = Story(app.state.db, app.state.billing.applier, provider.name)
        self.story.organization = owner.organization
        self.story.source = Source(provider.name, provider.account, False)

    async def post(self, path: str, body: Any, status: int = 200) -> Any:
        answer = await self.owner.client.post(f"/v1/billing/{path}", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def sim(self, verb: str, body: dict[str, Any]) -> Any:
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.post(f"{self.provider.url}/_sim/{verb}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def page(self, plan: str = "pro") -> str:
        """A page to pay on, by what the provider calls it."""
        urls = {"success_url": "https://app.example.com/", "cancel_url": "https://app.example.com/"}
        page = await self.post("checkout-sessions", {"plan": plan, "provider": self.provider.name, **urls}, 201)
        async with self.app.state.db.read() as reader:
            query = "SELECT ref FROM billing_checkouts WHERE id = $1"
            return str(await reader.raw.fetchval(query, page["id"]))

    async def buy(self, plan: str = "pro") -> str:
        await self.sim("pay", {"checkout": await self.page(plan), "card": "good"})
        await self.told()
        return str((await self.subscription())["id"])

    async def told(self) -> None:
        """Everything that the provider has told until now, the newest first."""
        for found in await self.telling():
            await self.story.apply(*found)

    async def telling(self) -> list[list[FinanceEvent]]:
        """What it has told, event by event."""
        adapter = self.app.state.billing.providers.of(self.provider.name)
        # Razorpay lists by the times of objects, which are simulated; the others by when events were made, which is now.
        until = self.clock.wall() + timedelta(days=1) if self.provider.name == "razorpay" else None
        since = datetime.now(UTC) - timedelta(days=2)
        bodies, told = [body async for body in adapter.list_events(since, until)], []
        for body in reversed(bodies):
            text = json.dumps(body).encode()
            origin = Origin(
                adapter.account, False, datetime.now(UTC), hashlib.sha256(text).digest(), str(body.get("id", ""))
            )
            told.append(normalize(self.provider.name, body, await adapter.authority(body), origin=origin))
        return told

    async def subscription(self) -> Any:
        answer = await self.owner.client.get("/v1/billing/subscription")
        return answer.json()["subscription"]

    async def plan(self) -> str:
        return str((await self.owner.client.get("/v1/org/plan")).json()["plan"]["id"])

    async def later(self, days: float) -> None:
        await self.sim("clock", {"advance": days * 86_400})
        self.clock.advance(days * 86_400)
        await self.told()

    async def ref(self) -> str:
        async with self.app.state.db.read() as reader:
            query = "SELECT ref FROM billing_subscriptions WHERE organization_id = $1"
            return str(await reader.raw.fetchval(query, self.owner.organization))


@pytest.fixture
def customer(app: Any, owner: Account, provider: Any, clock: MovableClock) -> Customer:
    return Customer(app, owner, provider, clock)


async def test_bought_given_back_and_ended(customer: Customer, db: Database) -> None:
    await customer.buy()
    shown = await customer.subscription()
    assert (shown["status"], shown["plan"], await customer.plan()) == ("active", "pro", "pro")
    (paid,) = (await customer.owner.client.get("/v1/billing/payments")).json()["data"]
    back = await customer.post("refunds", {"payment": paid["id"], "amount_minor": 500, "reason": "a week less"}, 201)
    assert back["state"] in ("pending", "succeeded")
    await customer.told()
    refunds = (await customer.owner.client.get("/v1/billing/refunds")).json()["data"]
    assert [(each["id"], each["state"], each["amount_minor"]) for each in refunds] == [(back["id"], "succeeded", 500)]
    end = await customer.story.end()
    assert end["waiting"] == []
    balances = {row[0]: row[2] for row in end["ledger"]}
    assert 0 < balances["contra_revenue"] <= 500
    await customer.post("subscription/cancel", {"at_period_end": False})
    await customer.told()
    assert ((await customer.subscription())["status"], await customer.plan()) == ("canceled", "free")


async def test_a_payment_fails_and_is_made_good(customer: Customer) -> None:
    await customer.buy()
    await customer.sim("card", {"subscription": await customer.ref(), "card": "declines"})
    await customer.later(32)
    end = await customer.story.end()
    assert len(end["dunning"]) == 1, end
    assert end["subscription"][0][1] in ("past_due", "suspended")
    await customer.sim("card", {"subscription": await customer.ref(), "card": "good"})
    await customer.later(6)
    end = await customer.story.end()
    assert (end["dunning"], end["subscription"][0][1], end["plan"][0][0]) == ([], "active", "pro")


async def test_ends_with_its_period_unless_taken_back(customer: Customer) -> None:
    await customer.buy()
    asked = await customer.post("subscription/cancel", {"at_period_end": True})
    assert asked["request"] in ("done", "scheduled")
    await customer.told()
    assert (await customer.subscription())["cancel_at_period_end"] is True
    can = customer.app.state.billing.providers.of(customer.provider.name).can
    if asked["request"] == "done" and "undo_cancel" not in can:
        return
    await customer.post("subscription/resume", None)
    await customer.told()
    assert (await customer.subscription())["cancel_at_period_end"] is False
    assert await customer.plan() == "pro"


async def test_another_plan(customer: Customer) -> None:
    await customer.buy()
    can = customer.app.state.billing.providers.of(customer.provider.name).can
    asked = await customer.post("subscription/change", {"plan": "team", "return_url": "https://app.example.com/"})
    await customer.told()
    if asked["request"] != "done":
        assert await customer.plan() == "pro"
        assert "change_now" not in can
        return
    assert await customer.plan() == "team"
