"""Use beyond a plan is charged when its month is over: once, on the right invoice, by the right terms; what comes late, later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import httpx
import pytest

from portico.control.billing import overage_store
from portico.control.billing.overage_billing import OverageBilling, describe, month_before
from portico.control.identity.keys import issue
from portico.control.identity.plans import GIB
from portico.control.tunnels import usage
from portico.control.tunnels.standing import midnight, month_of, next_month
from portico.control.tunnels.usage import Batch, Row
from portico.kit.db import Database
from portico.kit.ids import new_id
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret
from portico.simulators.paypal import PayPalSimulator
from portico.simulators.razorpay import RazorpaySimulator
from portico.simulators.stripe import StripeSimulator
from tests.control.billing.story import PRICES, Crash, Statements, Story
from tests.control.billing.test_whole import _LISTS, _SECRETS, Customer
from tests.control.conftest import Account, MovableClock

_MASTER_KEY = new_master_key()
_SIMULATORS: dict[str, Any] = {"stripe": StripeSimulator, "razorpay": RazorpaySimulator, "paypal": PayPalSimulator}


async def used(db: Database, organization: str, at: datetime, bytes_out: int, requests: int = 0) -> None:
    """As a relay reports it, in a batch of its own; its number again is no more use."""
    boot = new_id("boot")
    batch = Batch(1, at, [Row("tun_none", organization, (requests, 0, 0, bytes_out, 0))])
    for _ in range(2):
        async with db.transaction() as tx:
            await usage.count(tx, "relay-test", boot, [batch], at + timedelta(minutes=1))


async def charges(db: Database, organization: str) -> list[Any]:
    async with db.read() as reader:
        found = await overage_store.listing(reader, 100, None, organization=organization, state=None)
    return sorted(found, key=lambda row: row.id)


async def have_asked(app: Any, organization: str) -> None:
    """As the worker asks providers."""
    async with app.state.db.read() as reader:
        query = (
            "SELECT id FROM billing_calls WHERE organization_id = $1 AND act = 'overage' AND queue_state = 'pending'"
        )
        calls = [row["id"] for row in await reader.raw.fetch(query, organization)]
    for call in calls:
        await app.state.billing.calls.now(call)


class TestAtEachProvider:
    @pytest.fixture(params=list(_SIMULATORS))
    async def provider(self, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
        async with _SIMULATORS[request.param]() as running:
            yield running

    @pytest.fixture
    def settings(self, database_url: str, provider: Any) -> ApiSettings:
        known: dict[str, Any] = dict(provider.settings())
        for name in set(_SECRETS) & known.keys():
            known[name] = Secret(known[name])
        for name in set(_LISTS) & known.keys():
            known[name] = tuple(known[name].split(","))
        currency = provider.offers["pro"].currency
        return ApiSettings(
            database_url=Secret(database_url), master_key=Secret(_MASTER_KEY), default_plan="free",
            registrations_per_address=100_000, rate_write_per_minute=1_000_000, rate_auth_per_minute=1_000_000,
            rate_read_per_minute=1_000_000, overage_prices=(f"pro:bytes_per_month={currency}:50:{GIB}",), **known,
        )  # fmt: skip

    @pytest.fixture
    def customer(self, app: Any, owner: Account, provider: Any, clock: MovableClock) -> Customer:
        return Customer(app, owner, provider, clock)

    async def test_a_month_its_late_reports_and_their_invoices(
        self, app: Any, customer: Customer, db: Database, clock: MovableClock, connect: Callable[..., httpx.AsyncClient]
    ) -> None:
        member = connect((await customer.owner.key("api", scopes=["billing:read"]))["key"])
        billing: OverageBilling = app.state.billing.overage_billing
        organization, first = customer.owner.organization, next_month(month_of(clock.wall())).date()
        await customer.buy()
        await self.reach(customer, midnight(first) + timedelta(days=9))
        await used(db, organization, clock.wall(), 103 * GIB + 1)
        shown = (await member.get("/v1/billing/overage")).json()
        assert shown["total_minor"] == 4 * 50
        assert {each["limit"]: each["beyond"] for each in shown["use"]}["bytes_per_month"] == 3 * GIB + 1
        await billing.round(db)
        assert await charges(db, organization) == [], "the month is not over"

        await self.reach(customer, next_month(first) + timedelta(hours=2))
        await asyncio.gather(*(billing.round(db) for _ in range(2)))  # two workers at once
        await billing.round(db)
        (charge,) = await charges(db, organization)
        assert (charge.month, charge.billed_month, charge.quantity, charge.amount_minor) == (first, first, 4, 200)
        await have_asked(app, organization)
        await have_asked(app, organization)
        (row,) = (await member.get("/v1/billing/overage-charges")).json()["data"]
        assert (row["id"], row["state"], row["month"]) == (charge.id, "charged", first.isoformat()[:7])

        # A relay that was cut off reports what it counted in that month; both are priced, and nothing twice.
        await used(db, organization, next_month(first) - timedelta(minutes=5), 2 * GIB)
        await billing.round(db)
        assert len(await charges(db, organization)) == 1
        second = next_month(first).date()
        await self.reach(customer, next_month(second) + timedelta(hours=2))
        await asyncio.gather(*(billing.round(db) for _ in range(2)))
        await billing.round(db)
        await have_asked(app, organization)
        _, late = await charges(db, organization)
        assert (late.month, late.billed_month, late.quantity, late.state) == (first, second, 2, "charged")
        assert late.description.endswith("(reported late)")

        await self.reach(customer, next_month(next_month(second).date()) + timedelta(hours=2))
        lines = await self.lines(db, organization)
        assert sorted((net, provider) for net, provider in lines) == [
            (100, "platform" if customer.provider.name == "paypal" else customer.provider.name),
            (200, "platform" if customer.provider.name == "paypal" else customer.provider.name),
        ], lines
        await customer.story.balanced()
        if customer.provider.name == "paypal":
            async with db.read() as reader:
                query = "SELECT status FROM billing_invoices WHERE organization_id = $1 AND provider = 'platform'"
                assert {row["status"] for row in await reader.raw.fetch(query, organization)} == {"open"}

    @staticmethod
    async def reach(customer: Customer, then: datetime) -> None:
        await customer.later((then - customer.clock.wall()).total_seconds() / 86_400)

    @staticmethod
    async def lines(db: Database, organization: str) -> list[tuple[int, str]]:
        """Net amount and provider of every line for use on an invoice."""
        query = """
            SELECT (line->>'net_minor')::bigint AS net, provider FROM billing_invoices, jsonb_array_elements(lines) line
            WHERE organization_id = $1 AND line->>'kind' = 'overage' AND number IS NOT NULL
        """
        async with db.read() as reader:
            return [(row["net"], row["provider"]) for row in await reader.raw.fetch(query, organization)]


# -- by whose terms, and what goes wrong


@pytest.fixture
def settings(database_url: str) -> ApiSettings:
    """New organizations are on the plan free; Stripe, which nobody answers for, sells two plans."""
    return ApiSettings(
        database_url=Secret(database_url), master_key=Secret(_MASTER_KEY), default_plan="free", stripe_prices=PRICES,
        stripe_secret_key=Secret("sk_test_" + "x" * 24), stripe_webhook_secret=Secret("whsec_" + "y" * 24),
        stripe_account="acct_1", stripe_api_url="http://127.0.0.1:9", billing_retries=0,
        overage_prices=(
            f"pro:bytes_per_month=EUR:50:{GIB}", "pro:requests_per_month=EUR:10:1000", f"team:bytes_per_month=EUR:20:{GIB}",
        ),
    )  # fmt: skip


@pytest.fixture
async def story(db: Database, app: Any) -> Story:
    """An organization that bought the plan pro ten days before this month began."""
    found = await Story(db, app.state.billing.applier).found()
    found.start = midnight(month_of(app.state.clock.wall())) - timedelta(days=10)
    await found.page(subscription="sub_1")
    await found.apply(found.state(1, "active"), found.invoice(2, "in_1"), found.paid(3, "in_1", "pi_1"))
    return found


@pytest.fixture
def billing(app: Any) -> OverageBilling:
    found: OverageBilling = app.state.billing.overage_billing
    return found


async def close(billing: OverageBilling, story: Story) -> list[Any]:
    """Price the month of the story's beginning; what came of it."""
    async with story.db.transaction() as tx:
        await billing.close(tx, story.organization, month_of(story.start))
    return await charges(story.db, story.organization)


async def use(story: Story, bytes_out: int, requests: int = 0) -> None:
    await used(story.db, story.organization, story.start + timedelta(hours=2), bytes_out, requests)


async def test_each_limit_is_a_charge_of_its_own(billing: OverageBilling, story: Story) -> None:
    await use(story, 100 * GIB + 1, 5_000_001)
    found = await close(billing, story)
    assert {(row.metric, row.quantity, row.amount_minor, row.state) for row in found} == {
        ("bytes_per_month", 1, 50, "priced"), ("requests_per_month", 1, 10, "priced"),
    }  # fmt: skip


async def test_within_the_plan_there_is_none_and_what_comes_late_is_still_seen(
    billing: OverageBilling, story: Story
) -> None:
    await use(story, 100 * GIB)
    assert await close(billing, story) == []
    await use(story, 1)
    month = month_of(story.start)
    later = next_month(month).date()
    for _ in range(2):
        async with story.db.transaction() as tx:
            await billing.correct(tx, story.organization, month, later)
    (row,) = await charges(story.db, story.organization)
    assert (row.quantity, row.month, row.billed_month) == (1, month, later)


async def test_a_charge_is_of_the_plan_that_was_had_last(billing: OverageBilling, story: Story) -> None:
    await story.apply(story.state(60, "active", plan_ref="price_team"))
    await use(story, 1025 * GIB)
    (row,) = await close(billing, story)
    assert (row.plan, row.allowed, row.amount_minor) == ("team", 1024 * GIB, 20)


async def test_who_ends_within_the_month_pays_for_what_was_used(billing: OverageBilling, story: Story) -> None:
    await use(story, 101 * GIB)
    await story.apply(story.state(60, "canceled"))
    (row,) = await close(billing, story)
    assert (row.plan, row.quantity, row.state) == ("pro", 1, "priced")
    async with story.db.read() as reader:
        query = "SELECT arguments->>'at_once' FROM billing_calls WHERE organization_id = $1"
        assert await reader.raw.fetchval(query, story.organization) == "true", "no invoice comes by itself any more"


async def test_what_an_operator_gave_counts(billing: OverageBilling, story: Story) -> None:
    async with story.db.transaction() as tx:
        move = "UPDATE organizations SET plan = 'unlimited', plan_version = 1 WHERE id = $1"
        await tx.raw.execute(move, story.organization)
    await use(story, 900 * GIB)
    assert await close(billing, story) == []


async def test_where_traffic_stops_there_is_none(billing: OverageBilling, story: Story) -> None:
    async with story.db.transaction() as tx:
        cap = "INSERT INTO plan_overrides (organization_id, name, value) VALUES ($1, 'hard_cap', 1)"
        await tx.raw.execute(cap, story.organization)
    await use(story, 900 * GIB)
    assert await close(billing, story) == []


async def test_what_was_used_before_it_was_bought_is_not_charged(billing: OverageBilling, story: Story) -> None:
    """The hour in which it was bought is the buyer's."""
    for hours in (-3, 0):
        await used(story.db, story.organization, story.start + timedelta(hours=hours), 900 * GIB)
    await use(story, 101 * GIB)
    (row,) = await close(billing, story)
    assert (row.used, row.quantity) == (101 * GIB, 1)


async def test_an_organization_that_goes_pays_first(app: Any, billing: OverageBilling, story: Story) -> None:
    this = app.state.clock.wall()
    await use(story, 101 * GIB)
    await used(story.db, story.organization, this, 102 * GIB)
    for _ in range(2):
        async with story.db.transaction() as tx:
            assert await billing.leave(tx, story.organization) == 0
    found = await charges(story.db, story.organization)
    assert [(row.month, row.quantity) for row in found] == [(month_of(story.start), 1), (month_of(this), 2)]


async def test_nonsense_of_a_relay_waits_for_a_person(billing: OverageBilling, story: Story) -> None:
    await use(story, 2**62)
    (row,) = await close(billing, story)
    assert (row.state, row.reason) == ("failed", "needs_review")
    async with story.db.read() as reader:
        query = "SELECT count(*) FROM billing_calls WHERE organization_id = $1 AND act = 'overage'"
        assert await reader.raw.fetchval(query, story.organization) == 0


async def test_a_crash_before_any_statement_leaves_no_trace(billing: OverageBilling, story: Story) -> None:
    await use(story, 101 * GIB, 5_000_001)
    at = 0
    while True:
        statements = Statements(at)
        try:
            async with story.db.transaction() as tx, statements.hook(tx):
                await billing.close(tx, story.organization, month_of(story.start))
        except Crash:
            assert await charges(story.db, story.organization) == []
            at += 1
        else:
            break
    assert statements.count == at > 10
    assert len(await charges(story.db, story.organization)) == 2
    async with story.db.read() as reader:
        query = "SELECT count(*) FROM billing_calls WHERE organization_id = $1 AND act = 'overage'"
        assert await reader.raw.fetchval(query, story.organization) == 2
    assert len(await close(billing, story)) == 2


async def test_two_at_once_price_it_once(billing: OverageBilling, story: Story) -> None:
    await use(story, 101 * GIB)
    await asyncio.gather(*(close(billing, story) for _ in range(4)))
    assert len(await charges(story.db, story.organization)) == 1


# -- months


@pytest.fixture(params=["Europe/Berlin", "America/St_Johns", "Pacific/Apia"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The machine is in a zone with daylight saving, or far from UTC."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("moment", "month", "before", "end"),
    [
        (datetime(2028, 2, 29, 23, 59, 59, tzinfo=UTC), date(2028, 2, 1), date(2028, 1, 1), datetime(2028, 3, 1, tzinfo=UTC)),
        (datetime(2027, 2, 28, 23, 59, 59, tzinfo=UTC), date(2027, 2, 1), date(2027, 1, 1), datetime(2027, 3, 1, tzinfo=UTC)),
        (datetime(2027, 1, 1, tzinfo=UTC), date(2027, 1, 1), date(2026, 12, 1), datetime(2027, 2, 1, tzinfo=UTC)),
        # The hours in which clocks of people are set, and one that is another month elsewhere.
        (datetime(2027, 3, 28, 1, 30, tzinfo=UTC), date(2027, 3, 1), date(2027, 2, 1), datetime(2027, 4, 1, tzinfo=UTC)),
        (datetime(2027, 10, 31, 0, 30, tzinfo=UTC), date(2027, 10, 1), date(2027, 9, 1), datetime(2027, 11, 1, tzinfo=UTC)),
        (
            datetime.fromisoformat("2027-11-01T00:30:00+02:00"), date(2027, 10, 1), date(2027, 9, 1),
            datetime(2027, 11, 1, tzinfo=UTC),
        ),
    ],
)  # fmt: skip
def test_months_are_utc_wherever_the_machine_is(
    zone: str, moment: datetime, month: date, before: date, end: datetime
) -> None:
    assert month_of(moment) == month
    assert month_before(month) == before
    assert next_month(month) == end and next_month(before) == midnight(month)


async def test_the_last_second_of_a_month_is_of_it(zone: str, billing: OverageBilling, story: Story) -> None:
    """Whatever zone the machine is in, use is added to the month of UTC in which it happened."""
    end = next_month(month_of(story.start))
    for at, size in ((end - timedelta(seconds=1), 2), (end, 1)):
        batch = Batch(1, at, [Row("tun_none", story.organization, (0, 0, 0, size, 0))])
        async with story.db.transaction() as tx:
            await usage.count(tx, "relay-test", new_id("boot"), [batch], end + timedelta(minutes=1))
    async with story.db.read() as reader:
        query = "SELECT month, bytes_out FROM organization_months WHERE organization_id = $1 ORDER BY month"
        rows = [tuple(row) for row in await reader.raw.fetch(query, story.organization)]
    assert rows == [(month_of(story.start), 2), (end.date(), 1)]


def test_what_an_invoice_says() -> None:
    month = date(2026, 11, 1)
    assert describe("bytes_per_month", 12, GIB, "pro", month, late=False) == "12 × 1 GiB beyond the plan pro, 2026-11"
    assert (
        describe("bytes_per_month", 1, 1500, "pro", month, late=False) == "1 × 1,500 bytes beyond the plan pro, 2026-11"
    )
    late = describe("requests_per_month", 3, 1000, "pro", month, late=True)
    assert late == "3 × 1,000 requests beyond the plan pro, 2026-11 (reported late)"


# -- by hand


@pytest.fixture
async def operator(app: Any, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    async with app.state.db.transaction() as tx:
        made = await issue(tx, app.state.clock.wall(), None, None, "operator", "operator", [])
    return connect(made.key)


async def test_an_operator_waives_and_tries_again(
    app: Any, billing: OverageBilling, story: Story, operator: httpx.AsyncClient
) -> None:
    await use(story, 101 * GIB, 5_000_001)
    first, second = await close(billing, story)
    path = "/v1/admin/overage-charges"
    waived = await operator.post(f"{path}/{first.id}/waive", json={"reason": "our relay looped"})
    assert (waived.status_code, waived.json()["state"], waived.json()["reason"]) == (200, "waived", "our relay looped")
    again = await operator.post(f"{path}/{first.id}/waive", json={"reason": "twice"})
    assert (again.status_code, again.json()["code"]) == (409, "overage.state")
    early = await operator.post(f"{path}/{second.id}/retry")
    assert (early.status_code, early.json()["code"]) == (409, "overage.state")
    async with story.db.transaction() as tx:
        await overage_store.failed(tx, second.id, "billing.provider_refused")
    tried = await operator.post(f"{path}/{second.id}/retry")
    assert (tried.status_code, tried.json()["state"], tried.json()["reason"]) == (200, "priced", None)
    listed = (await operator.get(path, params={"organization": story.organization, "state": "priced"})).json()["data"]
    assert [each["id"] for each in listed] == [second.id]
    none = await operator.post(f"{path}/ovc_none/retry")
    assert (none.status_code, none.json()["code"]) == (404, "overage.not_found")
    async with story.db.read() as reader:
        query = "SELECT count(*) FROM billing_calls WHERE organization_id = $1 AND act = 'overage'"
        assert await reader.raw.fetchval(query, story.organization) == 2, "the waived one is not asked for any more"


async def test_a_charge_that_is_being_asked_for_cannot_be_waived(
    app: Any, billing: OverageBilling, story: Story, operator: httpx.AsyncClient
) -> None:
    await use(story, 101 * GIB)
    (row,) = await close(billing, story)
    async with story.db.transaction() as tx:  # a worker has begun, and has no answer
        busy = "UPDATE billing_calls SET attempts = 1 WHERE organization_id = $1 AND act = 'overage'"
        await tx.raw.execute(busy, story.organization)
    answer = await operator.post(f"/v1/admin/overage-charges/{row.id}/waive", json={"reason": "no"})
    assert (answer.status_code, answer.json()["code"]) == (409, "overage.state")
