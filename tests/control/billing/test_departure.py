"""What an organization takes with it of billing: its own rows, all of them, and nobody else's."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from portico.control.billing import departure
from portico.control.billing.overage_billing import OverageBilling
from portico.control.identity.plans import GIB
from portico.control.tunnels.standing import month_of
from portico.kit.db import Database
from tests.control.billing.story import Story
from tests.control.billing.test_overage_billing import settings, used

__all__ = ["settings"]


async def lines(db: Database, organization: str) -> dict[str, list[Any]]:
    async with db.read(snapshot=True) as reader:
        return {
            name: [json.loads(line) async for part in source(reader, organization) for line in part.splitlines()]
            for name, source in departure.SOURCES.items()
        }


@pytest.fixture
async def stories(db: Database, app: Any) -> list[Story]:
    """Two organizations with a bit of everything."""
    made = []
    billing: OverageBilling = app.state.billing.overage_billing
    for _ in range(2):
        story = await Story(db, app.state.billing.applier).found()
        await story.page(subscription="sub_1")
        await story.apply(
            story.state(1, "active"), story.invoice(2, "in_1"), story.paid(3, "in_1", "pi_1"),
            story.refund(4, "pi_1", "re_1", 119), story.invoice(5, "in_2"), story.failed(6, "in_2", 1),
            story.paid(8, "in_9", "pi_9"),
        )  # fmt: skip
        later = story.start + timedelta(hours=2)
        await used(db, story.organization, later, 101 * GIB)
        async with db.transaction() as tx:
            await billing.close(tx, story.organization, month_of(later))
        made.append(story)
    return made


async def test_own_rows_alone(db: Database, stories: list[Story]) -> None:
    own, other = stories
    found = await lines(db, own.organization)
    assert {name: len(rows) for name, rows in found.items()} == {
        "billing_profile": 0, "subscriptions": 1, "invoices": 2, "credit_notes": 1, "payments": 2, "refunds": 1,
        "dunning": 1, "overage_charges": 1,
    }  # fmt: skip
    assert other.tag not in json.dumps(found)
    assert [(row["gross_minor"], row["status"]) for row in found["invoices"]] == [(1190, "paid"), (1190, "open")]
    assert all(row["number"] for row in found["invoices"]), "a payment whose invoice nobody issued makes no invoice"
    assert (found["overage_charges"][0]["amount_minor"], found["dunning"][0]["amount_minor"]) == (50, 1190)
    assert await lines(db, "org_none") == {name: [] for name in departure.SOURCES}
