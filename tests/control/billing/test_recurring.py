"""Monthly recurring revenue as a subscription moves it: tried, bought, changed, paid late, ended, bought again."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from portico.control.billing import recurring
from portico.control.billing.apply import Applier
from portico.control.finance.events import FinanceEvent, Line
from portico.kit.db import Database
from tests.control.billing.story import Story
from tests.control.billing.test_apply import _settings, applier  # noqa: F401 - fixtures

START = datetime(2026, 11, 1, tzinfo=UTC)


def line(net: int, days: float = 30, kind: str = "plan", unit: int | None = None, quantity: int = 1) -> Line:
    end = START + timedelta(days=days)
    each = net if unit is None else unit
    return Line("Plan", quantity, each, net, net * 19 // 100, 1900, START, end, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("days", "interval"),
    [
        (1, ("day", 1)), (7, ("week", 1)), (14, ("week", 2)), (28, ("month", 1)), (31, ("month", 1)), (59, ("month", 2)),
        (92, ("month", 3)), (181, ("month", 6)), (184, ("month", 6)), (365, ("month", 12)), (366, ("month", 12)),
        (730, ("month", 24)), (10, ("day", 10)),
    ],
)  # fmt: skip
def test_how_often_a_period_comes(days: int, interval: tuple[str, int]) -> None:
    assert recurring.interval(days * 86_400) == interval


def test_what_a_month_brings() -> None:
    def of(*invoices: list[Line]) -> dict[str, int]:
        return recurring.monthly([("EUR", lines) for lines in invoices])

    assert of() == {}
    assert of([line(1000)]) == {"EUR": 1000}
    assert of([line(12_000, 365)]) == {"EUR": 1000}
    assert of([line(1000), line(500, kind="overage")]) == {"EUR": 1000}, "use comes not again"
    assert of([line(1000), line(250)]) == {"EUR": 1250}
    # From Pro to Team in the middle: its price is named beside the half of it that is charged.
    parts = [line(-500, 15, "proration", 1000), line(1500, 15, "proration", 3000)]
    assert of([line(1000)], parts) == {"EUR": 3000}
    # A price that does not fit what was charged says nothing, and the next invoice does.
    odd = [line(-500, 15, "proration"), line(1500, 15, "proration", 1500)]
    assert of([line(1000)], odd) == {"EUR": 1000}
    assert of([line(1000)], odd, [line(3000)]) == {"EUR": 3000}
    assert of(parts) == {}
    assert recurring.monthly([("EUR", [line(1000)]), ("USD", [line(1100)])]) == {"USD": 1100}


def invoiced(story: Story, minute: int, ref: str, *lines: Line, kind: str = "invoice.issued") -> FinanceEvent:
    net, tax = sum(each.net_minor for each in lines), sum(each.tax_minor for each in lines)
    return story(
        kind, minute, ref, invoice_ref=ref, amount_minor=abs(net + tax), tax_minor=tax, currency="EUR", lines=lines,
        plan_ref="price_pro",
    )  # fmt: skip


async def movements(db: Database, story: Story) -> list[tuple[str, int, int]]:
    async with db.read() as reader:
        rows = await reader.raw.fetch(
            "SELECT kind, delta_minor, total_minor FROM mrr_movements WHERE organization_id = $1 ORDER BY id",
            story.organization,
        )
    return [tuple(row) for row in rows]


async def test_the_life_of_a_customer(db: Database, applier: Applier) -> None:  # noqa: F811
    story = await Story(db, applier).found()
    await story.page(subscription="sub_1")
    smaller = [line(-1500, 15, "proration", 3000), line(500, 15, "proration", 1000)]
    steps = [
        story.state(0, "trialing"), invoiced(story, 1, "in_0", line(0, 14)),
        invoiced(story, 2, "in_1", line(1000)), story.state(3, "active"),
        invoiced(story, 4, "in_2", line(-500, 15, "proration", 1000), line(1500, 15, "proration", 3000)),
        story.state(5, "past_due"), story.state(6, "active"), invoiced(story, 7, "in_3", line(3000)),
        invoiced(story, 8, "in_4", *smaller, kind="invoice.credited"),
        story.state(9, "past_due"), story.state(10, "suspended"), story.state(11, "active"), story.state(12, "canceled"),
    ]  # fmt: skip
    assert set(await story.apply(*steps)) == {"applied"}
    assert await movements(db, story) == [
        ("new", 1000, 1000), ("expansion", 2000, 3000), ("contraction", -2000, 1000), ("churn", -1000, 0),
        ("reactivation", 1000, 1000), ("churn", -1000, 0),
    ]  # fmt: skip
    assert set(await story.apply(*steps)) == {"duplicate_effect"}
    assert len(await movements(db, story)) == 6


async def test_any_order_comes_to_the_same(db: Database, applier: Applier) -> None:  # noqa: F811
    shuffled = random.Random(5)
    for _ in range(6):
        story = await Story(db, applier).found()
        await story.page(subscription="sub_1")
        steps: list[Any] = [
            story.state(0, "active"), invoiced(story, 1, "in_1", line(1000)), invoiced(story, 2, "in_2", line(3000)),
            invoiced(story, 3, "in_3", line(9000)),
            story("invoice.voided", 4, "in_3", invoice_ref="in_3", amount_minor=0, currency="EUR"),
        ]  # fmt: skip
        shuffled.shuffle(steps)
        await story.apply(*steps)
        found = await movements(db, story)
        assert found[-1][2] == 3000 == sum(delta for _, delta, _ in found)


@pytest.mark.parametrize("refs", [("in_1", "in_2"), ("in_2", "in_1")])
async def test_a_purchase_and_a_change_in_one_second(db: Database, applier: Applier, refs: tuple[str, str]) -> None:  # noqa: F811
    """Providers tell seconds: what the invoices are about says which was the first, not how they are called."""
    story = await Story(db, applier).found()
    await story.page(subscription="sub_1")
    change = [line(-500, 15, "proration", 1000), line(1500, 15, "proration", 3000)]
    later = timedelta(days=15)
    change = [replace(each, period_start=START + later, period_end=START + 2 * later) for each in change]
    steps = [story.state(0, "active"), invoiced(story, 1, refs[0], line(1000)), invoiced(story, 1, refs[1], *change)]
    assert set(await story.apply(*steps)) == {"applied"}
    assert await movements(db, story) == [("new", 1000, 1000), ("expansion", 2000, 3000)]
