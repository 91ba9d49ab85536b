"""The Stripe adapter against Stripe's own stripe-mock, which checks every path and parameter by the API's description."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from portico.control.billing import provider
from portico.control.billing.normalize import normalize
from portico.control.billing.provider import Charge, Order, Provider
from portico.control.finance.events import check
from portico.kit import money
from tests.control.billing import stripe_shapes as shapes
from tests.control.billing.providers import origin, settings
from tests.gotools import built
from tests.ports import free_port

_START_SECONDS = 60.0


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program, port = built("github.com/stripe/stripe-mock", "v0.203.0", "1.24"), free_port()
    log: Path = tmp_path_factory.mktemp("stripe-mock") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen([str(program), "-http-port", str(port), "-https-port", "-1"], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, f"stripe-mock ended: {log.read_text(encoding='utf-8')}"
                assert time.monotonic() < deadline, "stripe-mock does not listen"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
async def stripe(url: str) -> AsyncIterator[Provider]:
    adapter = provider.of(settings(stripe_api_url=url), "stripe")
    yield adapter
    await adapter.close()


async def test_everything_that_is_asked_of_stripe_is_asked_as_it_is_described(stripe: Provider) -> None:
    """stripe-mock answers 400 for a parameter, and 404 for a path, that the API does not have."""
    order = Order("chk_1", "price_1", "https://app.example.com/ok", "https://app.example.com/no", email="a@example.com")
    for each, key in ((order, "chk_1"), (replace(order, customer_ref="cus_1", trial_days=7), "chk_2")):
        bought = await stripe.checkout(each, key=key)
        assert bought.ref.startswith("cs_") and bought.url.startswith("https://") and bought.customer_ref
    assert (await stripe.change("sub_1", "price_other", when="now", key="cha_1")).status == "done"
    assert (await stripe.change("sub_1", "price_other", when="period_end", key="cha_2")).status == "scheduled"
    for at_end in (True, False):
        assert (await stripe.cancel("sub_1", at_period_end=at_end, reason="no more", key=f"can_{at_end}")).ref
    assert (await stripe.resume("sub_1", key="res_1")).ref
    for payment in ("pi_1", "ch_1"):
        for amount in (None, 100):
            made = await stripe.refund(
                payment, amount_minor=amount, currency="USD", reason="r", key=f"{payment}_{amount}"
            )
            assert made.ref.startswith("re_") and made.currency in money.EXPONENTS
    assert (await stripe.portal("cus_1", "https://app.example.com", key="por_1")).startswith("https://")
    now = datetime.now(UTC)
    for alone in (False, True):
        made_of = Charge(
            f"ovc_{alone}", "sub_1", "cus_1", "12 × 1 GiB", 600, "USD", now - timedelta(days=30), now, now, alone
        )
        assert await stripe.charge(made_of, key=f"cll_{alone}")
    assert await stripe.collect("sub_1", "in_1", amount_minor=1, currency="USD", key="col_1") in ("paid", "nothing")


@pytest.mark.parametrize(
    ("ref", "kind"),
    [
        ("sub_1", "subscription"), ("in_1", "invoice"), ("pi_1", "payment_intent"), ("ch_1", "charge"), ("re_1", "refund"),
        ("dp_1", "dispute"), ("po_1", "payout"), ("cs_test_1", "checkout.session"), ("cus_1", "customer"), ("price_1", "price"),
        ("evt_1", "event"), ("txn_1", "balance_transaction"), ("sub_sched_1", "subscription_schedule"),
    ],
)  # fmt: skip
async def test_objects_are_known_by_their_ids(stripe: Provider, ref: str, kind: str) -> None:
    assert (await stripe.fetch(ref))["object"] == kind


@pytest.mark.parametrize(
    ("kind", "told", "objects"),
    [
        ("customer.subscription.updated", shapes.subscription("old"), {"subscription"}),
        ("customer.subscription.updated", shapes.subscription("new"), {"subscription"}),
        ("invoice.paid", shapes.paid_invoice("old"), {"invoice", "payment", "balance_transaction"}),
        ("invoice.payment_failed", shapes.invoice("old"), {"invoice", "payment", "balance_transaction"}),
        ("invoice.finalized", shapes.invoice("new"), set()),
        ("refund.created", shapes.refund(), {"charge"}),
        ("charge.refunded", shapes.charge("new"), {"charge", "refunds"}),
        ("charge.refunded", shapes.charge("old"), {"charge"}),
        ("charge.dispute.created", shapes.dispute(), {"charge", "dispute"}),
        ("payout.paid", shapes.payout(), set()),
    ],
)
async def test_what_an_event_needs_is_fetched(
    stripe: Provider, kind: str, told: dict[str, Any], objects: set[str]
) -> None:
    """Which invoice a payment was for is asked, too; stripe-mock's has no id that could be one."""
    before = datetime.now(UTC)
    body = shapes.event(kind, told)
    fetched = await stripe.authority(body)
    assert set(fetched.objects) == objects
    assert before <= fetched.at <= datetime.now(UTC)
    for each in normalize("stripe", body, fetched, origin=origin()):
        check(each)


async def test_events_are_listed_by_when_they_were_made(stripe: Provider) -> None:
    now = datetime.now(UTC)
    found = [body async for body in stripe.list_events(now - timedelta(days=1), now)]
    assert found and all(body["object"] == "event" and body["id"].startswith("evt_") for body in found)
