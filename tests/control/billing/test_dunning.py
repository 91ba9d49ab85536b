"""What dunning does by itself beside telling: payments tried again where the provider does not, disputes that stop it all."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from portico.control.access import Caller
from portico.control.billing import billing_store, disputes, dunning_jobs, dunning_store
from portico.control.billing.apply import Applier
from portico.control.billing.disputes import Dispute
from portico.control.finance.events import FinanceEvent
from portico.control.identity import plans
from portico.errors import Problem
from portico.kit.db import Database
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret
from tests.control.billing.story import PRICES, Story
from tests.control.conftest import MovableClock

_MASTER_KEY = new_master_key()
OPERATOR = Caller("operator", "opr_1", None)
START = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def settings(database_url: str) -> ApiSettings:
    return ApiSettings(
        database_url=Secret(database_url), master_key=Secret(_MASTER_KEY), default_plan="free", stripe_prices=PRICES,
        stripe_secret_key=Secret("sk_test_" + "x" * 24), stripe_webhook_secret=Secret("whsec_" + "y" * 24),
        stripe_account="acct_1",
    )  # fmt: skip


@pytest.fixture
def applier(app: Any) -> Applier:
    found: Applier = app.state.billing.applier
    return found


@pytest.fixture
async def story(db: Database, applier: Applier) -> Story:
    """Bought, paid once, and not paid the second time."""
    found = await Story(db, applier).found()
    await found.page(subscription="sub_1")
    await found.apply(
        found.state(1, "active"), found.invoice(2, "in_1"), found.paid(3, "in_1", "pi_1"), found.invoice(4, "in_2")
    )
    return found


class Days:
    """Lets days pass, with two workers that look each time."""

    def __init__(self, story: Story, clock: MovableClock, applier: Applier) -> None:
        self.story, self.clock, self.applier = story, clock, applier

    async def __call__(self, days: float) -> tuple[str, str | None]:
        """State and stage of the case afterwards."""
        self.clock.advance(days * 86_400)
        await asyncio.gather(*(dunning_jobs.round_(self.story.db, self.clock, self.applier) for _ in range(2)))
        return await self.case()

    async def case(self) -> tuple[str, str | None]:
        row = await self.row()
        return row.state, row.stage

    async def row(self) -> Any:
        async with self.story.db.read() as reader:
            (subscription,) = await billing_store.subscriptions_of(reader, self.story.organization)
            return (await dunning_store.open_cases(reader, subscription.id))["EUR"]

    async def asked(self) -> list[tuple[str, str]]:
        """What the provider is to be asked for: act, and the last part of the key."""
        async with self.story.db.read() as reader:
            query = "SELECT act, request_key, arguments->>'invoice' AS invoice FROM billing_calls WHERE organization_id = $1"
            rows = await reader.raw.fetch(query + " ORDER BY id", self.story.organization)
        return [(row["act"], row["request_key"].split(":")[2]) for row in rows if row["act"] == "collect"]

    async def resume(self) -> None:
        """As an operator does."""
        async with self.story.db.transaction() as tx:
            await plans.hold(tx, self.story.organization)
            row = await dunning_store.one(tx, (await self.row()).id)
            subscription = await billing_store.subscription_by_id(tx, row.subscription_id)
            await self.applier.dunning.resume(tx, OPERATOR, row, subscription)
            await self.applier.settle(tx, subscription, known=True, reason="test")

    async def pause(self) -> None:
        async with self.story.db.transaction() as tx:
            await plans.hold(tx, self.story.organization)
            await self.applier.dunning.pause(tx, OPERATOR, await dunning_store.one(tx, (await self.row()).id), "talks")


@pytest.fixture
def days(story: Story, clock: MovableClock, applier: Applier) -> Days:
    return Days(story, clock, applier)


def dispute(story: Story, kind: str, at: datetime, ref: str = "dp_1") -> FinanceEvent:
    minute = int((at - story.start).total_seconds() // 60)
    status = {"opened": "open"}.get(kind, kind)
    return story(
        f"dispute.{kind}", minute, ref, dispute_ref=ref, payment_ref="pi_1", amount_minor=1190, currency="EUR", status=status,
        customer_ref=None, subscription_ref=None,
    )  # fmt: skip


# -- payments tried again


async def test_where_the_provider_gave_up_each_retry_is_asked_for_once(story: Story, days: Days) -> None:
    await story.apply(story.failed(5, "in_2", 1, final=True))
    assert await days.case() == ("notified", "D0")
    assert await days.asked() == []
    for passed, stage in ((1, "D1"), (0, "D1"), (2, "D3"), (4, "D7")):
        assert await days(passed) == ("retrying", stage)
    assert await days.asked() == [("collect", "D1"), ("collect", "D3"), ("collect", "D7")]
    assert await days(3) == ("restricted", "D10")
    assert len(await days.asked()) == 3


async def test_while_the_provider_tries_nobody_else_does(story: Story, days: Days) -> None:
    await story.apply(story.failed(5, "in_2", 1, final=False), story.failed(6, "in_2", 2, final=False))
    assert await days.case() == ("retrying", "D1")
    assert await days.asked() == []


async def test_a_payment_takes_back_what_was_not_asked_for_yet(story: Story, days: Days) -> None:
    await story.apply(story.failed(5, "in_2", 1, final=True))
    await days(1)
    assert len(await days.asked()) == 1
    await story.apply(story.paid(9, "in_2", "pi_2"))
    assert await days.asked() == []


async def test_a_pause_takes_it_back_too(story: Story, days: Days) -> None:
    await story.apply(story.failed(5, "in_2", 1, final=True))
    await days(1)
    await days.pause()
    assert await days.asked() == []


# -- disputes


async def test_a_dispute_pauses_and_its_end_resumes(story: Story, days: Days, clock: MovableClock) -> None:
    await story.apply(story.failed(5, "in_2", 1, final=True))
    assert await days(11) == ("restricted", "D10")
    await story.apply(dispute(story, "opened", clock.wall()))
    assert await days.case() == ("paused", "D10")
    assert (await story.end())["plan"][0][2] is None, "what was taken away is given back"
    assert await days(50) == ("paused", "D10")
    await story.apply(dispute(story, "won", clock.wall()))
    assert await days.case() == ("restricted", "D10"), "its days do not count"
    assert await days(2) == ("restricted", "D10")
    assert await days(1.5) == ("suspended", "D14")


async def test_a_lost_dispute_resumes_as_well(story: Story, days: Days, clock: MovableClock) -> None:
    await story.apply(dispute(story, "opened", clock.wall()), story.failed(5, "in_2", 1, final=True))
    assert await days.case() == ("paused", None)
    await story.apply(dispute(story, "lost", clock.wall() + timedelta(minutes=1)))
    assert await days.case() == ("notified", "D0")


async def test_the_order_does_not_matter(db: Database, applier: Applier, clock: MovableClock) -> None:
    """The end of a dispute before its begin, and both before the failure that opens the case."""
    ends = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        story = await Story(db, applier).found()
        await story.page(subscription="sub_1")
        await story.apply(story.state(1, "active"), story.invoice(2, "in_1"), story.paid(3, "in_1", "pi_1"))
        some = [
            story.failed(10, None, 1, final=True), dispute(story, "opened", story.start + timedelta(minutes=20)),
            dispute(story, "won", story.start + timedelta(minutes=140)),
        ]  # fmt: skip
        await story.apply(story.invoice(9, "in_2"))
        for at in order:
            await story.apply(some[at])
        ends.append((await story.end())["dunning"])
    assert ends[0] == ends[1] == ends[2] == [("EUR", "notified", "D0", 1190, 1, 10)]


async def test_a_pause_by_hand_outlives_a_dispute_and_the_other_way_round(
    story: Story, days: Days, clock: MovableClock
) -> None:
    await story.apply(story.failed(5, "in_2", 1, final=True))
    await days(2)
    await story.apply(dispute(story, "opened", clock.wall()))
    with pytest.raises(Problem) as refused:
        await days.resume()
    assert refused.value.code == "dunning.state" and "disputed" in refused.value.detail
    await days.pause()
    await days(10)
    await story.apply(dispute(story, "won", clock.wall()))
    assert (await days.case())[0] == "paused"
    await days(10)
    await days.resume()
    assert await days.case() == ("retrying", "D1"), "twenty days stood still, and none of them twice"
    assert await days(0.6) == ("retrying", "D1")
    assert await days(0.5) == ("retrying", "D3")


async def test_a_case_that_is_resumed_on_its_last_day_is_written_off(story: Story, days: Days) -> None:
    """The clock was late before the pause; all of the end follows, not its name alone."""
    await story.apply(story.failed(5, "in_2", 1, final=True))
    await days(15)
    days.clock.advance(16 * 86_400)  # nobody looked
    await days.pause()
    await days.resume()
    assert await days.case() == ("written_off", "D30")
    assert ("bad_debt", "EUR", 1190) in (await story.end())["ledger"]
    async with story.db.read() as reader:
        query = "SELECT act FROM billing_calls WHERE organization_id = $1 AND act = 'cancel'"
        assert len(await reader.raw.fetch(query, story.organization)) == 1


@pytest.mark.parametrize(
    ("spans", "wanted"),
    [
        ([], 0.0), ([(1, 3)], 2.0), ([(-5, 3)], 3.0), ([(8, None)], 2.0), ([(1, 4), (2, 3)], 3.0), ([(1, 4), (3, 6)], 5.0),
        ([(-9, -1)], 0.0), ([(1, 2), (5, 6)], 2.0), ([(20, None)], 0.0),
    ],
)  # fmt: skip
def test_days_in_which_one_was_open(spans: list[tuple[int, int | None]], wanted: float) -> None:
    found = [
        Dispute(str(at), START + timedelta(days=first), None if last is None else START + timedelta(days=last))
        for at, (first, last) in enumerate(spans)
    ]
    assert disputes.days(found, START, START + timedelta(days=10)) == wanted
