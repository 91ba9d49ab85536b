"""The Stripe adapter against Stripe's own stripe-mock, which checks every path and parameter by the API's description."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from portico.control.billing import provider
from portico.control.billing.provider import Order, Provider
from tests.control.billing.providers import settings
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


async def test_the_checkout_and_what_is_read_of_it(stripe: Provider) -> None:
    page = await stripe.portal("cus_1", "https://app.example.com", key="k-portal")
    assert page.startswith("https://")
    order = Order(
        "chk_1",
        "price_1",
        "https://app.example.com/ok",
        "https://app.example.com/no",
        email="a@example.com",
        trial_days=7,
    )
    bought = await stripe.checkout(order, key="chk_1")
    assert bought.ref.startswith("cs_") and bought.customer_ref
