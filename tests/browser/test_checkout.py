"""A plan is bought on the whole platform, in a browser, at each simulated payment provider; and what becomes of it later."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from portico.embedded.folders import temp_home
from tests.browser.chromium import Page, browser
from tests.system.platform import Up, port_span
from tests.timing import PATIENCE_SECONDS

PASSWORD = "tall-Giraffe-42"
DAY = 86_400


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """`portico up --demo-billing`, the simulators on free ports."""
    home = temp_home("portico-shop-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        yield Up(
            home,
            tmp_path_factory.mktemp("shop"),
            stack,
            demo_billing=1,
            simulator_ports="0,0,0",
            tcp_ports=port_span(2),
        )


class Buyer:
    """The owner of a new organization, by the API."""

    def __init__(self, up: Up) -> None:
        self.up = up
        self.http = httpx.AsyncClient(base_url=f"{up.api_url}/v1", timeout=30)
        settings = json.loads((up.home / "simulators" / "settings.json").read_text())
        self.simulators = {
            name: settings[f"PORTICO_{name.upper()}_API_URL"] for name in ("stripe", "razorpay", "paypal")
        }

    async def register(self) -> None:
        email = f"buyer-{os.urandom(4).hex()}@example.com"
        body = {"email": email, "password": PASSWORD, "organization": "Observatory"}
        answer = await self.http.post("/auth/register", json=body)
        assert answer.is_success, answer.text
        self.http.headers["authorization"] = f"Bearer {answer.json()['access_token']}"

    async def checkout(self, provider: str, plan: str = "pro") -> str:
        """The address of a page on which the plan is paid."""
        back = f"{self.up.api_url}/sign-in"
        body = {"plan": plan, "provider": provider, "success_url": back, "cancel_url": back}
        answer = await self.http.post("/billing/checkout-sessions", json=body)
        assert answer.is_success, answer.text
        return str(answer.json()["url"])

    async def get(self, path: str) -> Any:
        answer = await self.http.get(path)
        assert answer.is_success, answer.text
        return answer.json()

    async def until(self, path: str, good: Callable[[Any], bool]) -> Any:
        """What is at a path, once it is so."""
        found = None
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not good(found := await self.get(path)):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"{path} is {found}") from None
        return found

    async def sim(self, provider: str, verb: str, body: Any) -> Any:
        async with httpx.AsyncClient(timeout=60) as http:
            answer = await http.post(f"{self.simulators[provider]}/_sim/{verb}", json=body)
        assert answer.is_success, answer.text
        return answer.json()


VERBS = {"stripe": "Subscribe", "razorpay": "Pay", "paypal": "Agree and subscribe"}


@pytest.mark.parametrize("provider", VERBS)
async def test_a_plan_is_bought_in_a_browser(shop: Up, provider: str) -> None:
    buyer = Buyer(shop)
    await buyer.register()
    assert (await buyer.get("/org/plan"))["plan"]["id"] == "free"
    async with browser() as page:
        await page.open(await buyer.checkout(provider), width=420, height=800, dark=provider == "stripe")
        assert "no money moves" in await page.text("main")
        await choose(page, "declines")
        await page.press(VERBS[provider])
        assert "declined" in await page.text("[role=alert]")
        page.errors.clear()  # that the answer was a 402
        assert (await buyer.get("/org/plan"))["plan"]["id"] == "free"
        await choose(page, "good")
        await page.press(VERBS[provider])
        assert page.errors == []
    await buyer.until("/org/plan", lambda found: found["plan"]["id"] == "pro")
    held = (await buyer.until("/billing/subscription", is_active))["subscription"]
    assert held["provider"] == provider and held["plan"] == "pro"
    await buyer.http.aclose()


def is_active(found: Any) -> bool:
    return bool(found["subscription"] and found["subscription"]["status"] == "active")


async def choose(page: Page, card: str) -> None:
    await page.js(f"document.querySelector('input[value={card}]').click()")


async def test_the_board_shows_what_there_is_and_moves_time(shop: Up) -> None:
    buyer = Buyer(shop)
    await buyer.register()
    await buy(buyer, "stripe")
    async with browser() as page:
        await page.open(buyer.simulators["stripe"], width=1000, height=800)
        before = await page.text(".now")
        assert "sub_1" in await page.text("table") and "invoice.paid" in await page.text("h2 ~ .scroll:last-child")
        await page.press("One day on")
        assert await page.text(".now") > before and page.errors == []
        await page.open(buyer.simulators["stripe"], width=380, height=800)
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert await page.js(wide) == 0, "tables scroll, the page does not"
    await buyer.http.aclose()


async def buy(buyer: Buyer, provider: str) -> None:
    """As the page does it."""
    url = await buyer.checkout(provider)
    async with httpx.AsyncClient(timeout=30) as http:
        answer = await http.post(url, data={"act": "pay", "card": "good"})
    assert answer.status_code in (200, 303), answer.text
    await buyer.until("/billing/subscription", is_active)
