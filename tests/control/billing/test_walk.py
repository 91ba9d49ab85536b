"""One customer's whole way at each provider, from the page on which a plan is paid to its end: after each step the subscription,
the plan, every account of the ledger in numbers, the invoices with their credit notes, and the notices.

Everything is real but the provider: requests and webhooks by HTTP, two workers, PostgreSQL.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.control.billing.shop import SIMULATORS, Buyer, Shop, open_shop

#: Tax in hundredths of a per cent; the other simulators have none.
TAX_BP = {"stripe": 1900, "razorpay": 0, "paypal": 0}
#: What the plan `pro` costs with tax, and what the provider keeps of it: 2.9 % and 30 cents; 2 % and 18 % on that; 3.5 % and 49.
FIRST = {"stripe": (2261, 361, 96), "razorpay": (149_900, 0, 3538), "paypal": (1900, 0, 116)}
PAYMENTS = {"stripe": "charges", "razorpay": "payments", "paypal": "sales"}


@pytest.fixture(params=list(SIMULATORS))
async def shop(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> AsyncIterator[Shop]:
    async with open_shop(database_url, SIMULATORS[request.param], tmp_path, workers=2) as made:
        if (bp := TAX_BP[made.name]) != 0:
            made.simulator.books.tax_bp = bp  # type: ignore[attr-defined]
        yield made


@dataclass
class Books:
    """The ledger as an accountant keeps it by hand. What is deferred and what is earned of it are one here: days pass."""

    accounts: Counter[str] = field(default_factory=Counter)

    def move(self, amount: int, debit: str, credit: str) -> None:
        self.accounts[debit] += amount
        self.accounts[credit] -= amount

    def invoiced(self, gross: int, tax: int) -> None:
        self.move(gross - tax, "accounts_receivable", "earned")
        self.move(tax, "accounts_receivable", "tax_payable")

    def paid(self, gross: int, fee: int) -> None:
        self.move(gross - fee, "provider_clearing", "accounts_receivable")
        self.move(fee, "payment_fees", "accounts_receivable")

    def refunded(self, gross: int, tax: int) -> None:
        self.move(gross - tax, "contra_revenue", "provider_clearing")
        self.move(tax, "tax_payable", "provider_clearing")

    def disputed(self, gross: int, fee: int) -> None:
        self.move(gross, "dispute_hold", "provider_clearing")
        self.move(fee, "payment_fees", "provider_clearing")

    def decided(self, gross: int, *, won: bool) -> None:
        self.move(gross, "provider_clearing" if won else "dispute_loss", "dispute_hold")


def owed_of(invoice: Any) -> tuple[str, int, int, int]:
    return invoice["status"], invoice["gross_minor"], invoice["paid_minor"], invoice["credited_minor"]


class Walk:
    """A customer, and what has to be there. ``status`` of the subscription, ``plan`` of the organization."""

    def __init__(self, shop: Shop, buyer: Buyer) -> None:
        self.shop, self.buyer, self.books = shop, buyer, Books()
        self.status, self.plan = "", "free"
        self.invoices: list[tuple[str, int, int, int]] = []
        self.notes: list[tuple[int, int]] = []
        self.notices: dict[str, int] = {}
        self.owing: list[tuple[str, int]] = []

    # -- what the provider did

    def made(self, kind: str) -> list[Any]:
        return self.shop.simulator.world.all(kind)

    def sales(self) -> list[Any]:
        """Payments that went well."""
        good = {"stripe": "succeeded", "razorpay": "captured", "paypal": "completed"}[self.shop.name]
        name = "state" if self.shop.name == "paypal" else "status"
        later = {"refunded", "partially_refunded", "reversed"}
        return [row for row in self.made(PAYMENTS[self.shop.name]) if row[name] in {good, *later}]

    def money(self, sale: Any) -> tuple[int, int, int]:
        """What a payment was, the tax in it and the provider's fee, as the provider's own books have it."""
        if self.shop.name == "stripe":
            (entry,) = [row for row in self.made("balance_transactions") if row["source"] == sale["id"]]
            invoice = self.shop.simulator.world.kinds["invoices"][sale["_invoice"]]
            return sale["amount"], sum(each["amount"] for each in invoice["total_taxes"]), entry["fee"]
        if self.shop.name == "razorpay":
            return sale["amount"], 0, sale["fee"]
        return sale["_amount"], 0, sale["_fee"]

    def sold(self) -> tuple[int, int, int]:
        """Write down the newest payment, and its invoice."""
        gross, tax, fee = self.money(self.sales()[-1])
        if not (self.invoices and self.invoices[-1] == ("open", gross, 0, 0)):
            self.books.invoiced(gross, tax)
            self.invoices.append(("open", gross, 0, 0))
        self.books.paid(gross, fee)
        self.invoices[-1] = ("paid", gross, gross, 0)
        return gross, tax, fee

    # -- what is there

    async def check(self, step: str) -> None:
        """Everything, after a step."""
        held = await self.buyer.subscription()
        assert (held["status"], await self.buyer.plan()) == (self.status, self.plan), step
        assert [(case["state"], case["amount_minor"]) for case in held["owing"]] == self.owing, step
        found = Counter(await self.buyer.ledger())
        found["earned"] = found.pop("deferred_revenue", 0) + found.pop("revenue", 0)
        wanted = {name: amount for name, amount in self.books.accounts.items() if amount}
        assert {name: amount for name, amount in found.items() if amount} == wanted, step
        invoices = await self.buyer.invoices()
        assert [owed_of(each) for each in invoices] == self.invoices, step
        assert len({each["number"] for each in invoices}) == len(invoices), step
        notes = [
            (note["gross_minor"], note["tax_minor"])
            for each in invoices
            for note in (await self.buyer.get(f"/billing/invoices/{each['id']}"))["credit_notes"]
        ]
        assert sorted(notes) == sorted(self.notes), step
        assert await self.buyer.notices() == self.notices, step
        assert len(self.mails()) == sum(self.notices.values()), step
        await self.shop.balanced()

    def mails(self) -> list[Any]:
        """Mails about dunning that went out to the owner."""
        assert self.shop.outbox is not None
        files = [*self.shop.outbox.glob("dunning.*.json")]
        return [
            each for each in (json.loads(file.read_text()) for file in files) if each["recipient"] == self.buyer.email
        ]


async def test_a_customers_whole_way(shop: Shop) -> None:
    walk = Walk(shop, await shop.register())
    assert await walk.buyer.plan() == "free"
    await buys(walk)
    await moves_up(walk)
    await fails(walk)
    await recovers(walk)
    await is_given_back(walk)
    await renews(walk)
    await wins_a_dispute(walk)
    await stays_after_all(walk)
    await ends_with_the_period(walk)
    await buys_again_and_ends_at_once(walk)
    await loses_a_dispute(walk)
    await is_all_earned(walk)


async def buys(walk: Walk) -> None:
    await walk.buyer.press(url := await walk.buyer.page(), "declines")
    await walk.shop.settled()
    held = await walk.buyer.subscription()
    assert held is None or held["status"] == "pending", "PayPal has one as soon as it is asked for"
    assert (await walk.buyer.plan(), await walk.buyer.ledger()) == ("free", {})
    await walk.buyer.press(url)
    await walk.shop.settled()
    assert walk.sold() == FIRST[walk.shop.name]
    walk.status, walk.plan = "active", "pro"
    await walk.check("bought")


async def moves_up(walk: Walk) -> None:
    """At once and prorated; at PayPal by the customer's consent, from the next period on."""
    team, pro = (walk.shop.simulator.offers[plan].amount_minor for plan in ("team", "pro"))
    asked = await walk.buyer.post("subscription/change", {"plan": "team", "return_url": "https://app.example.com/"})
    if walk.shop.name == "paypal":
        assert asked["request"] == "needs_consent"
        await walk.shop.settled()
        await walk.check("asked, and not agreed")
        await walk.buyer.press(asked["url"])
        await walk.shop.settled()
    else:
        assert asked["request"] == "done"
        await walk.shop.settled()
        gross, tax, _ = walk.sold()
        assert 0.99 * (team - pro) < gross - tax <= team - pro, "the difference, for what is left of the period"
    walk.plan = "team"
    await walk.check("moved up")


async def until(walk: Walk, *, back: float = 0.0) -> None:
    """Until an hour after the end of the period, or so many seconds before it."""
    end = datetime.fromisoformat((await walk.buyer.subscription())["period_end"])
    await walk.shop.later(to=end - timedelta(seconds=back) if back else end + timedelta(hours=1))


async def fails(walk: Walk) -> None:
    await walk.buyer.card("declines")
    await until(walk)
    team = walk.shop.simulator.offers["team"].amount_minor
    tax = team * TAX_BP[walk.shop.name] // 10_000
    if walk.shop.name != "paypal":  # a sale is PayPal's invoice, and there is none
        walk.books.invoiced(team + tax, tax)
        walk.invoices.append(("open", team + tax, 0, 0))
    walk.status = "past_due"
    walk.owing, walk.notices = [("notified", team + tax)], {"dunning.advanced": 1}
    await walk.check("failed")


async def recovers(walk: Walk) -> None:
    await walk.buyer.card("good")
    for _ in range(6):  # Stripe tries after three days, Razorpay after one, PayPal after five
        await walk.shop.later(days=1)
        if (await walk.buyer.subscription())["status"] == "active":
            break
    walk.sold()
    walk.status, walk.owing, walk.notices = "active", [], {"dunning.advanced": 1, "dunning.recovered": 1}
    await walk.check("recovered")


async def is_given_back(walk: Walk) -> None:
    """A part of the last payment, then what is left of it, then nothing more."""
    gross, tax, _ = walk.money(walk.sales()[-1])
    payment = (await walk.buyer.payments())[-1]
    assert (payment["amount_minor"], payment["refunded_minor"]) == (gross, 0)
    body = {"payment": payment["id"], "reason": "a week without service"}
    part = gross // 3
    await walk.buyer.post("refunds", {**body, "amount_minor": part}, 201)
    await walk.shop.settled()
    part_tax = (2 * part * tax + gross) // (2 * gross)
    walk.books.refunded(part, part_tax)
    walk.notes.append((part, part_tax))
    walk.invoices[-1] = ("paid", gross, gross, part)
    await walk.check("a part given back")
    await walk.buyer.post("refunds", body, 201)
    await walk.shop.settled()
    walk.books.refunded(gross - part, tax - part_tax)
    walk.notes.append((gross - part, tax - part_tax))
    walk.invoices[-1] = ("paid", gross, gross, gross)
    await walk.check("all of it given back")
    refused = await walk.buyer.http.post("/billing/refunds", json={**body, "amount_minor": 1})
    assert (refused.status_code, refused.json()["code"]) == (409, "billing.refund_exceeds"), refused.text
    assert [each["state"] for each in (await walk.buyer.get("/billing/refunds"))["data"]] == ["succeeded"] * 2


async def renews(walk: Walk) -> None:
    await until(walk)
    walk.sold()
    await walk.check("renewed")


async def disputed(walk: Walk, sale: Any) -> tuple[str, int]:
    """A bank wants a payment back; the dispute, and how much. Where it asks for a fee, it keeps that whatever is decided."""
    gross, _, _ = walk.money(sale)
    dispute = walk.shop.simulator.dispute(sale["id"], "fraudulent")
    await walk.shop.settled()
    walk.books.disputed(gross, 1500 if walk.shop.name == "stripe" else 0)
    await walk.check("disputed")
    return dispute.get("dispute_id") or dispute["id"], gross


async def wins_a_dispute(walk: Walk) -> None:
    dispute, gross = await disputed(walk, walk.sales()[0])
    walk.shop.simulator.decide(dispute, won=True)
    await walk.shop.settled()
    walk.books.decided(gross, won=True)
    await walk.check("won")


async def loses_a_dispute(walk: Walk) -> None:
    """The money is gone, and so is the subscription that it was paid for."""
    await buys_again(walk)
    dispute, gross = await disputed(walk, walk.sales()[-1])
    walk.shop.simulator.decide(dispute, won=False)
    await walk.shop.settled()
    walk.books.decided(gross, won=False)
    walk.status, walk.plan = "canceled", "free"
    await walk.check("lost")


async def stays_after_all(walk: Walk) -> None:
    """Cancelled for the end of the period, and that taken back; Razorpay cannot."""
    if walk.shop.name == "razorpay":
        return
    await walk.buyer.post("subscription/cancel", {"at_period_end": True, "reason": "too dear"})
    await walk.shop.settled()
    assert (await walk.buyer.subscription())["cancel_at_period_end"] is True
    await walk.check("will end")
    await walk.buyer.post("subscription/resume")
    await walk.shop.settled()
    assert (await walk.buyer.subscription())["cancel_at_period_end"] is False
    await walk.check("stays after all")


async def ends_with_the_period(walk: Walk) -> None:
    sales = len(walk.sales())
    await walk.buyer.post("subscription/cancel", {"at_period_end": True})
    if walk.shop.name == "razorpay":
        refused = await walk.buyer.http.post("/billing/subscription/resume")
        assert (refused.status_code, refused.json()["code"]) == (409, "billing.provider_unsupported"), refused.text
    await until(walk, back=1800)
    await walk.check("about to end")
    if walk.shop.name == "paypal":  # which knows no end with the period: we end it, shortly before
        await walk.shop.due()
    await walk.shop.later(days=0.1)
    walk.status, walk.plan = "canceled", "free"
    await walk.check("ended")
    assert len(walk.sales()) == sales, "nothing was taken for another period"
    refused = await walk.buyer.http.post("/billing/subscription/cancel", json={"at_period_end": False})
    assert (refused.status_code, refused.json()["code"]) == (409, "billing.no_subscription"), refused.text


async def buys_again(walk: Walk) -> None:
    await walk.buyer.buy("pro")
    walk.sold()
    walk.status, walk.plan = "active", "pro"
    await walk.check("bought again")


async def buys_again_and_ends_at_once(walk: Walk) -> None:
    await buys_again(walk)
    await walk.buyer.post("subscription/cancel", {"at_period_end": False, "reason": "enough"})
    await walk.shop.settled()
    walk.status, walk.plan = "canceled", "free"
    await walk.check("ended at once")


async def is_all_earned(walk: Walk) -> None:
    """When every period is over, nothing is deferred any more, and the provider holds what its own books say."""
    await walk.shop.later(days=32)
    await walk.shop.round()
    await walk.check("later")
    assert "deferred_revenue" not in await walk.buyer.ledger()
    held = walk.books.accounts["provider_clearing"]
    if walk.shop.name == "stripe":
        assert held == sum(row["net"] for row in walk.made("balance_transactions"))
    if walk.shop.name == "razorpay":
        assert held == sum(row["credit"] - row["debit"] for row in walk.shop.simulator.books.rows())  # type: ignore[attr-defined]
    if walk.shop.name == "paypal":
        token = await _paypal_report(walk)
        assert held == token
    if (payout := walk.shop.simulator.payout()) is None:
        return
    assert payout["amount"] == held
    await walk.shop.settled()
    query = "SELECT sum(amount_minor)::bigint AS n FROM ledger_postings WHERE account = $1 AND provider = $2"
    (bank,), (clearing,) = [
        await walk.shop.fetch(query, name, walk.shop.name) for name in ("bank", "provider_clearing")
    ]
    assert (bank["n"], clearing["n"]) == (payout["amount"], 0)


async def _paypal_report(walk: Walk) -> int:
    """What PayPal's report of transactions adds up to, fees taken off."""
    simulator: Any = walk.shop.simulator
    async with httpx.AsyncClient(base_url=simulator.url, trust_env=False) as http:
        auth = (simulator.client_id, simulator.client_secret)
        bearer = (await http.post("/v1/oauth2/token", auth=auth)).json()["access_token"]
        query = {"start_date": "2020-01-01T00:00:00Z", "end_date": "2099-01-01T00:00:00Z"}
        headers = {"Authorization": f"Bearer {bearer}"}
        answer = await http.get("/v1/reporting/transactions", params=query, headers=headers)
    rows = [row["transaction_info"] for row in answer.json()["transaction_details"]]
    return sum(round(float(row[name]["value"]) * 100) for row in rows for name in ("transaction_amount", "fee_amount"))
