"""A smaller plan in the middle of a period at Stripe's simulator, from HTTP to ledger, invoices and MRR."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from portico.kit.db import Database
from portico.simulators.stripe import StripeSimulator
from tests.control.billing.test_whole import Customer, customer, settings  # noqa: F401 - fixtures


@pytest.fixture
async def provider() -> AsyncIterator[Any]:
    async with StripeSimulator() as running:
        yield running


async def later(customer: Customer, days: int) -> None:  # noqa: F811
    """At the provider: here, the session of who asks would be over."""
    await customer.sim("clock", {"advance": days * 86_400})
    await customer.told()


async def held(customer: Customer) -> dict[str, int]:  # noqa: F811
    return {row[0]: row[2] for row in (await customer.story.end())["ledger"]}


async def movements(db: Database, organization: str) -> list[tuple[str, int]]:
    async with db.read() as reader:
        rows = await reader.raw.fetch(
            "SELECT kind, total_minor FROM mrr_movements WHERE organization_id = $1 ORDER BY id", organization
        )
    return [tuple(row) for row in rows]


async def test_what_a_smaller_plan_leaves_pays_the_next_invoices(customer: Customer, db: Database) -> None:  # noqa: F811
    await customer.buy("team")
    ((_, begun),) = await movements(db, customer.owner.organization)
    await later(customer, 10)
    await customer.post("subscription/change", {"plan": "pro", "when": "now"})
    await customer.told()
    credit = -(await held(customer))["customer_credit"]
    assert credit > 0, "two thirds of the difference"
    moved = await movements(db, customer.owner.organization)
    assert [kind for kind, _ in moved] == ["new", "contraction"] and begun > moved[1][1] > 0
    shown = (await customer.owner.client.get("/v1/billing/invoices")).json()["data"]
    assert (shown[0]["status"], shown[0]["gross_minor"]) == ("paid", -credit)

    now: dict[str, int] = {}
    for _ in range(3):  # renewals, until it is used up
        await later(customer, 31)
        now = await held(customer)
        assert "accounts_receivable" not in now, "what the credit paid is not owed"
        assert 0 <= -now.get("customer_credit", 0) < credit
        credit = max(1, -now.get("customer_credit", 0))
    assert "customer_credit" not in now
    shown = (await customer.owner.client.get("/v1/billing/invoices")).json()["data"]
    assert {each["status"] for each in shown} == {"paid"}
    taken = sum(row["amount_minor"] for row in (await customer.owner.client.get("/v1/billing/payments")).json()["data"])
    assert taken == sum(each["gross_minor"] for each in shown), "the card paid what all invoices sum to"
    assert [kind for kind, _ in await movements(db, customer.owner.organization)] == ["new", "contraction"]
