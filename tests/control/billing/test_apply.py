"""Finance events into subscription, plan, ledger, dunning and notices: any order, any repetition, any crash."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from portico.control.billing import billing_store, checkout_store, dunning_jobs
from portico.control.billing.apply import Applier
from portico.control.finance.events import FinanceEvent
from portico.kit.db import Database
from portico.kit.ids import new_id
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret
from tests.control.billing.story import PRICES, Crash, Statements, Story
from tests.control.conftest import MovableClock

_MASTER_KEY = new_master_key()


@pytest.fixture
def applier(app: Any) -> Applier:
    found: Applier = app.state.billing.applier
    return found


@pytest.fixture(name="settings")
def _settings(database_url: str) -> ApiSettings:
    """New organizations are on the plan free, and Stripe sells two."""
    return ApiSettings(
        database_url=Secret(database_url), master_key=Secret(_MASTER_KEY), default_plan="free", stripe_prices=PRICES,
        stripe_secret_key=Secret("sk_test_" + "x" * 24), stripe_webhook_secret=Secret("whsec_" + "y" * 24),
        stripe_account="acct_1",
    )  # fmt: skip


@pytest.fixture
async def story(db: Database, applier: Applier) -> Story:
    return await Story(db, applier).found()


async def plan(story: Story) -> Any:
    return (await story.end())["plan"][0]


# -- one thing after another


async def test_bought_paid_renewed_and_ended(story: Story) -> None:
    await story.page(subscription="sub_1")
    done = await story.apply(
        story.state(0, "pending"), story.invoice(1, "in_1"), story.paid(2, "in_1", "pi_1"), story.state(3, "active"),
        story("checkout.completed", 4, "cs_1", checkout_ref="cs_1"),
    )  # fmt: skip
    assert done == ["applied"] * 5
    end = await story.end()
    assert end["plan"] == [("pro", 1, None)]
    assert end["subscription"][0][:3] == ("sub_1", "active", "price_pro")
    assert end["checkout"] == [("completed", "sub_1")]
    assert {row[0]: row[2] for row in end["ledger"]} == {
        "deferred_revenue": -1000, "payment_fees": 31, "provider_clearing": 1159, "tax_payable": -190,
    }  # fmt: skip
    assert await story.apply(story.state(9, "canceled")) == ["applied"]
    assert (await story.end())["plan"] == [("free", 1, None)]


async def test_another_price_is_another_plan(story: Story) -> None:
    await story.page()
    await story.apply(story.state(1, "active"), story.state(2, "active", plan_ref="price_team"))
    assert (await plan(story))[0] == "team"


async def test_a_price_that_nobody_knows_is_what_was_bought(story: Story) -> None:
    await story.page(subscription="sub_1")
    await story.apply(story.state(1, "active", plan_ref="price_other"))
    assert (await plan(story))[0] == "pro"


async def test_what_an_operator_gave_since_stays(story: Story, db: Database) -> None:
    await story.page()
    await story.apply(story.state(1, "active"))
    async with db.transaction() as tx:
        await tx.raw.execute("UPDATE organizations SET plan = 'unlimited' WHERE id = $1", story.organization)
    await story.apply(story.state(2, "active"), story.invoice(3, "in_1"))
    assert (await plan(story))[0] == "unlimited"
    await story.apply(story.state(4, "canceled"))
    assert (await plan(story))[0] == "free"


async def test_live_tunnels_hear_of_it(story: Story, db: Database) -> None:
    """The plan and the change that relays get are one transaction."""
    await story.page()
    async with db.read() as reader:
        before = await reader.raw.fetchval("SELECT max(version) FROM edge_changes")
    await story.apply(story.state(1, "active"))
    async with db.read() as reader:
        rows = await reader.raw.fetch("SELECT payload::text FROM edge_changes WHERE version > $1", before)
    assert any(story.organization in row["payload"] and '"organization"' in row["payload"] for row in rows)


async def test_an_older_version_changes_nothing(story: Story) -> None:
    await story.page()
    late = story.state(1, "past_due", plan_ref="price_team")
    assert await story.apply(story.state(5, "active"), late, late) == ["applied", "superseded", "duplicate_effect"]
    assert (await plan(story))[0] == "pro"


async def test_an_illegal_transition_changes_no_state(story: Story) -> None:
    await story.page()
    back = story.state(9, "active", plan_ref="price_team")
    assert await story.apply(story.state(5, "canceled"), back) == ["applied", "illegal_transition"]
    end = await story.end()
    assert (end["subscription"][0][1], end["plan"][0][0]) == ("canceled", "free")


async def test_one_effect_told_by_two_events_is_one(story: Story) -> None:
    await story.page()
    paid = story.paid(2, "in_1", "pi_1")
    again = dataclasses.replace(paid, event_id="evt_other")
    assert await story.apply(story.invoice(1, "in_1"), paid, again) == ["applied", "applied", "duplicate_effect"]
    assert len((await story.end())["payments"]) == 1


# -- whose it is


async def test_nobody_s_event_waits_and_is_applied_with_its_checkout(story: Story) -> None:
    assert await story.apply(story.state(1, "active"), story.invoice(1, "in_1")) == ["waiting", "waiting"]
    assert (await story.end())["waiting"] == [("invoice.issued",), ("subscription.updated",)]
    await story.page(subscription="sub_1")
    end = await story.end()
    assert (end["waiting"], end["plan"][0][0], len(end["events"])) == ([], "pro", 2)


async def test_of_another_account_or_mode_it_is_nobody_s(story: Story) -> None:
    await story.page(subscription="sub_1")
    live = dataclasses.replace(story.state(1, "active"), livemode=True)
    other = dataclasses.replace(story.state(1, "active"), account="acct_other")
    assert await story.apply(live, other) == ["waiting", "waiting"]
    assert (await plan(story))[0] == "free"


async def test_an_organization_that_an_event_names_is_not_believed(
    story: Story, db: Database, applier: Applier
) -> None:
    other = await Story(db, applier).found()
    forged = dataclasses.replace(story.state(1, "active"), organization_id=other.organization)
    assert await story.apply(forged) == ["waiting"]
    await story.page()
    assert ((await plan(story))[0], (await plan(other))[0]) == ("pro", "free")


async def test_references_of_two_organizations_are_refused(story: Story, db: Database, applier: Applier) -> None:
    other = Story(db, applier)
    other.source = story.source
    await story.page(subscription="sub_1")
    await other.found()
    async with db.transaction() as tx:
        await billing_store.add_customer(tx, other.organization, other.source, "cus_2")
    assert await story.apply(story.state(1, "active", customer_ref="cus_2")) == ["mapping_conflict"]
    assert ((await plan(story))[0], (await plan(other))[0]) == ("free", "free")


@pytest.mark.parametrize("provider", ["razorpay", "paypal"])
async def test_who_pays_for_two_organizations_is_one_customer_there(
    db: Database, applier: Applier, provider: str
) -> None:
    """These providers know people: the same one pays for both, and each has what was paid for it."""
    one, other = [await Story(db, applier, provider).found() for _ in range(2)]
    other.source = one.source
    await one.page(subscription="sub_1")
    await one.apply(one.state(1, "active"))
    stranger = other.state(2, "active", subscription_ref="sub_2", plan_ref="price_team")
    assert await other.apply(stranger) == ["waiting"], "the customer does not say whose it is"
    async with db.transaction() as tx:
        row = {"id": new_id("chk"), "organization_id": other.organization, **one.source.columns, "plan": "team"}
        await checkout_store.add_checkout(tx, {**row, "plan_version": 1})
        answered = {"ref": "cs_2", "customer_ref": None, "subscription_ref": "sub_2", "url": "https://x.example"}
        await checkout_store.opened(tx, row["id"], answered)
        await applier.wake(tx, [one.source.key("subscription", "sub_2")])
    later = other.state(3, "active", subscription_ref="sub_2", plan_ref="price_team")
    assert await other.apply(later) == ["applied"]
    held = {story.organization: (await story.end())["subscription"] for story in (one, other)}
    assert {name: [row[0] for row in rows] for name, rows in held.items()} == {
        one.organization: ["sub_1"], other.organization: ["sub_2"],
    }  # fmt: skip


async def test_money_of_an_organization_that_is_gone_is_booked(story: Story, db: Database) -> None:
    await story.page(subscription="sub_1")
    async with db.transaction() as tx:
        await tx.raw.execute("DELETE FROM organizations WHERE id = $1", story.organization)
    done = await story.apply(story.invoice(1, "in_1"), story.paid(2, "in_1", "pi_1"), story.state(3, "active"))
    assert done == ["applied"] * 3
    assert len((await story.end())["ledger"]) == 4


async def test_nobody_goes_on_paying_for_an_organization_that_is_gone(story: Story, db: Database) -> None:
    """Its page was paid afterwards: what was bought is ended at the provider, once."""
    await story.page(subscription="sub_1")
    async with db.transaction() as tx:
        await tx.raw.execute("DELETE FROM organizations WHERE id = $1", story.organization)
    await story.apply(story.state(3, "active"), story.state(4, "active"))
    assert await asked(story) == [("cancel", False)]


async def asked(story: Story) -> list[tuple[str, bool]]:
    """What billing asks of the provider by itself."""
    query = (
        "SELECT act, (arguments ->> 'at_period_end')::boolean AS later FROM billing_calls WHERE organization_id = $1"
        " ORDER BY id"
    )
    async with story.db.read() as reader:
        return [(row["act"], row["later"]) for row in await reader.raw.fetch(query, story.organization)]


async def test_a_payment_names_its_invoice(story: Story) -> None:
    await story.page()
    await story.apply(story.paid(2, "in_1", "pi_1"), story.invoice(1, "in_1"))
    query = (
        "SELECT i.provider_ref, i.number IS NOT NULL FROM billing_payments p JOIN billing_invoices i ON i.id = p.invoice_id"
        " WHERE p.organization_id = $1"
    )
    async with story.db.read() as reader:
        rows = [tuple(row) for row in await reader.raw.fetch(query, story.organization)]
    assert rows == [(f"in_1_{story.tag}", True)]


def _dispute(story: Story, minute: int, end: str) -> FinanceEvent:
    status = {"opened": "open"}.get(end, end)
    return story(
        f"dispute.{end}", minute, "dp_1", dispute_ref="dp_1", payment_ref="pi_1", amount_minor=1190, currency="EUR",
        status=status, customer_ref=None, subscription_ref=None,
    )  # fmt: skip


@pytest.mark.parametrize(("end", "calls"), [("lost", [("cancel", False)]), ("won", [])])
async def test_a_dispute_that_is_lost_ends_the_subscription(story: Story, end: str, calls: list[Any]) -> None:
    await story.page()
    await story.apply(story.state(1, "active"), story.invoice(1, "in_1"), story.paid(2, "in_1", "pi_1"))
    done = _dispute(story, 9, end)
    await story.apply(_dispute(story, 8, "opened"), done, done)
    assert await asked(story) == calls


async def test_a_payout_is_ours(story: Story) -> None:
    payout = story(
        "payout.paid", 1, "po_1", payout_ref="po_1", amount_minor=500, currency="EUR", customer_ref=None,
        subscription_ref=None,
    )  # fmt: skip
    assert await story.apply(payout, payout) == ["applied", "duplicate_effect"]


# -- refunds


async def test_a_refund_waits_for_its_payment(story: Story) -> None:
    await story.page()
    back = story.refund(5, "pi_1", "re_1", 119)
    assert await story.apply(back, story.invoice(1, "in_1")) == ["waiting", "applied"]
    await story.apply(story.paid(2, "in_1", "pi_1"))
    end = await story.end()
    assert (end["refunds"], end["waiting"]) == ([("re_1", "succeeded", 119)], [])
    balances = {row[0]: row[2] for row in end["ledger"]}
    # A tenth was given back, so a tenth of the tax is.
    assert (balances["tax_payable"], balances["contra_revenue"]) == (-171, 100)


async def test_a_refund_that_failed_after_all(story: Story) -> None:
    await story.page()
    await story.apply(story.invoice(1, "in_1"), story.paid(2, "in_1", "pi_1"))
    before = (await story.end())["ledger"]
    await story.apply(story.refund(5, "pi_1", "re_1", 119), story.refund(6, "pi_1", "re_1", 119, "failed"))
    end = await story.end()
    assert (end["refunds"], end["ledger"]) == ([("re_1", "failed", 119)], before)


# -- dunning


async def test_a_failure_opens_a_case_and_its_payment_ends_it(story: Story) -> None:
    await story.page()
    await story.apply(story.state(1, "active"), story.invoice(2, "in_1"), story.failed(3, "in_1", 1))
    assert (await story.end())["dunning"] == [("EUR", "notified", "D0", 1190, 1, 3)]
    await story.apply(story.paid(9, "in_1", "pi_1"))
    assert (await story.end())["dunning"] == []


async def test_a_payment_of_one_invoice_of_two_does_not_end_it(story: Story) -> None:
    await story.page()
    await story.apply(
        story.state(1, "active"), story.invoice(2, "in_1"), story.failed(3, "in_1", 1), story.invoice(4, "in_2"),
        story.failed(5, "in_2", 1), story.paid(6, "in_2", "pi_2"),
    )  # fmt: skip
    assert (await story.end())["dunning"] == [("EUR", "notified", "D0", 1190, 1, 3)]


async def test_a_void_invoice_is_not_owed(story: Story) -> None:
    await story.page()
    await story.apply(story.state(1, "active"), story.invoice(2, "in_1"), story.failed(3, "in_1", 1))
    await story.apply(story("invoice.voided", 4, "in_1", invoice_ref="in_1", currency="EUR", amount_minor=0))
    assert (await story.end())["dunning"] == []


async def test_a_failure_told_after_its_payment_opens_nothing(story: Story) -> None:
    await story.page()
    await story.apply(story.state(1, "active"), story.invoice(2, "in_1"), story.paid(9, "in_1", "pi_1"))
    await story.apply(story.failed(3, "in_1", 1))
    assert (await story.end())["dunning"] == []


async def test_without_invoices_any_later_payment_counts(db: Database, applier: Applier) -> None:
    story = await Story(db, applier, "paypal").found()
    await story.page(subscription="sub_1")
    await story.apply(story.state(1, "active"), story.failed(3, None, 1))
    assert len((await story.end())["dunning"]) == 1
    await story.apply(story.invoice(8, "sale_1"), story.paid(9, "sale_1", "sale_1"))
    assert (await story.end())["dunning"] == []


async def test_the_end_of_the_subscription_ends_its_case(story: Story) -> None:
    await story.page()
    await story.apply(story.state(1, "active"), story.invoice(2, "in_1"), story.failed(3, "in_1", 1))
    await story.apply(story.state(9, "canceled"))
    assert (await story.end())["dunning"] == []


@pytest.mark.parametrize(
    ("days", "state", "held"),
    [(9, "retrying", "pro"), (10.1, "restricted", "pro"), (14.1, "suspended", "free"), (31, "written_off", "free")],
)
async def test_the_clock_takes_away_and_a_payment_gives_back(
    story: Story, db: Database, clock: MovableClock, applier: Applier, days: float, state: str, held: str
) -> None:
    await story.page()
    await story.apply(story.state(1, "active"), story.invoice(2, "in_1"), story.failed(3, "in_1", 1))
    clock.advance(days * 86_400)
    await asyncio.gather(*(dunning_jobs.round_(db, clock, applier) for _ in range(2)))  # two workers at once
    end = await story.end()
    assert (end["dunning"][0][1], end["plan"][0][0]) == (state, held)
    assert (end["plan"][0][2] is not None) is (state == "restricted")
    if state == "written_off":
        assert ("bad_debt", "EUR", 1190) in end["ledger"]
    await story.balanced()
    await story.apply(story.paid(9, "in_1", "pi_1"))
    end = await story.end()
    assert (end["dunning"], end["plan"]) == ([], [("pro", 1, None)])


async def test_each_stage_is_told_once(story: Story, db: Database, clock: MovableClock, applier: Applier) -> None:
    async with db.transaction() as tx:
        await tx.raw.execute("INSERT INTO users (id, email) VALUES ($1, $2)", story.organization, "payer@example.com")
        add = "INSERT INTO members (organization_id, user_id, role) VALUES ($1, $1, 'owner')"
        await tx.raw.execute(add, story.organization)
    await story.page()
    failed = story.failed(3, "in_1", 1)
    await story.apply(story.state(1, "active"), story.invoice(2, "in_1"), failed, failed, story.failed(4, "in_1", 2))
    for days in (1, 0, 6, 3):
        clock.advance(days * 86_400)
        await asyncio.gather(*(dunning_jobs.round_(db, clock, applier) for _ in range(2)))
    await story.apply(story.paid(9, "in_1", "pi_1"))
    query = "SELECT topic, count(*) AS n FROM outbox_messages WHERE organization_id = $1 GROUP BY topic"
    async with db.read() as reader:
        told = {row["topic"]: row["n"] for row in await reader.raw.fetch(query, story.organization)}
    assert told == {"dunning.advanced": 4, "dunning.recovered": 1}  # D0, D1, D7, D10


# -- any order


def everything(story: Story) -> list[FinanceEvent]:
    """A history with everything in it that order could spoil."""
    return [
        story("checkout.completed", 4, "cs_1", checkout_ref="cs_1"),
        story.state(1, "pending"), story.invoice(1, "in_1"), story.paid(2, "in_1", "pi_1"), story.state(3, "active"),
        story.refund(5, "pi_1", "re_1", 333), story.refund(6, "pi_1", "re_2", 100),
        story.refund(7, "pi_1", "re_2", 100, "failed"),
        story.invoice(10, "in_2"), story.failed(11, "in_2", 1), story.state(11, "past_due"),
        story.failed(12, "in_2", 2), story.paid(13, "in_2", "pi_2"), story.state(13, "active"),
        story("dispute.opened", 14, "dp_1", dispute_ref="dp_1", payment_ref="pi_2", amount_minor=1190, currency="EUR",
              status="open", customer_ref=None, subscription_ref=None),
        story("dispute.won", 15, "dp_1", dispute_ref="dp_1", payment_ref="pi_2", amount_minor=1190, currency="EUR",
              status="won", customer_ref=None, subscription_ref=None),
        story.invoice(20, "in_3"), story.failed(21, "in_3", 1), story.state(22, "past_due", plan_ref="price_team"),
        story.state(23, "past_due", plan_ref="price_team", cancel_at_period_end=True),
    ]  # fmt: skip


class TestAnyOrder:
    async def test_every_permutation_and_duplication_ends_the_same(self, applier: Applier, db: Database) -> None:
        """Each example has an organization and an account of its own; the recorded checkout is one of what is permuted."""
        count = len(everything(Story(db, applier)))
        orders = st.lists(st.integers(0, count), max_size=6).flatmap(
            lambda again: st.permutations([*range(count + 1), *again])
        )
        loop = asyncio.get_running_loop()

        async def run(order: list[int]) -> dict[str, Any]:
            story = await Story(db, applier).found()
            known, opened = everything(story), False
            for at in order:
                if at < count:
                    await story.apply(known[at])
                elif not opened:
                    opened = True
                    await story.page()
            return await story.end()

        wanted = await run([count, *range(count)])
        assert wanted["subscription"][0][1:3] == ("past_due", "price_team")
        assert (wanted["plan"], wanted["waiting"]) == ([("team", 1, None)], [])
        assert wanted["dunning"] == [("EUR", "notified", "D0", 1190, 1, 21)]

        @settings(max_examples=12)
        @given(orders)
        def check(order: list[int]) -> None:
            assert asyncio.run_coroutine_threadsafe(run(order), loop).result(300) == wanted

        await asyncio.to_thread(check)

    async def test_backwards(self, applier: Applier, db: Database) -> None:
        forwards, backwards = await Story(db, applier).found(), await Story(db, applier).found()
        await forwards.page()
        await forwards.apply(*everything(forwards))
        await backwards.apply(*reversed(everything(backwards)))
        await backwards.page()
        assert await backwards.end() == await forwards.end()

    async def test_several_workers_at_once(self, applier: Applier, db: Database) -> None:
        quiet, busy = await Story(db, applier).found(), await Story(db, applier).found()
        await quiet.page()
        await quiet.apply(*everything(quiet))
        events = everything(busy) * 2
        random.Random(7).shuffle(events)

        async def work(some: list[FinanceEvent]) -> None:
            for event in some:
                while True:  # as the queue does after a deadlock or a conflict of two workers
                    try:
                        await busy.apply(event)
                    except sa.exc.DBAPIError:
                        await asyncio.sleep(0.01)
                    else:
                        break

        await asyncio.gather(*(work(events[at::3]) for at in range(3)), busy.page())
        assert await busy.end() == await quiet.end()


async def _apply_with(story: Story, event: FinanceEvent, statements: Statements) -> None:
    async with story.db.transaction() as tx, statements.hook(tx):
        await story.applier.apply(tx, event)


async def _rows(db: Database) -> Any:
    """Everything in the database that an event can change."""
    async with db.read() as reader:
        names = await reader.raw.fetch(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
            " AND (table_name ~ '^(billing|ledger|finance|plan_overrides|outbox|audit|edge_changes|organizations|revenue|mrr)')"
        )
        parts = [f"SELECT '{row[0]}' || t::text AS x FROM {row[0]} t" for row in names]
        return await reader.raw.fetchval(
            f"SELECT md5(string_agg(x, '' ORDER BY x)) FROM ({' UNION ALL '.join(parts)}) y"
        )


@pytest.mark.parametrize(
    "which",
    [
        lambda story: (story.state(3, "active"), [story.invoice(1, "in_1")]),
        lambda story: (story.failed(4, "in_1", 1), [story.state(3, "active"), story.invoice(1, "in_1")]),
        lambda story: (story.paid(2, "in_1", "pi_1"), [story.invoice(1, "in_1"), story.refund(5, "pi_1", "re_1", 100)]),
    ],
    ids=["a new plan", "a case", "a payment and the refund that waited"],
)
async def test_a_crash_before_any_statement_leaves_no_trace(
    story: Story, which: Callable[[Story], tuple[FinanceEvent, list[FinanceEvent]]]
) -> None:
    await story.page()
    event, earlier = which(story)
    await story.apply(*earlier)
    before, at = await _rows(story.db), 0
    while True:
        statements = Statements(at)
        try:
            await _apply_with(story, event, statements)
        except Crash:
            assert await _rows(story.db) == before, at
            at += 1
        else:
            break
    assert statements.count == at > 20  # every index was visited
    assert await _rows(story.db) != before
    assert await story.apply(event) == ["duplicate_effect"]
