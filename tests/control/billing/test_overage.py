"""What use beyond a plan costs."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

import pytest

from portico.control.billing import overage
from portico.control.billing.overage import Price
from portico.control.identity.plans import GIB, Entitlements
from portico.errors import Problem
from portico.kit.db import Database
from portico.settings import ApiSettings, Secret
from tests.control.conftest import Account

MONTH = date(2030, 2, 1)
PRICE = Price("bytes_per_month", "EUR", 50, GIB)


def held(limit: int | None = 100 * GIB, *, hard_cap: bool = False) -> Entitlements:
    return Entitlements("org_1", "pro", 1, "Pro", hard_cap, {"bytes_per_month": limit}, frozenset(), 1)


@pytest.mark.parametrize(
    ("used", "units"),
    [(0, 0), (100 * GIB, 0), (100 * GIB + 1, 1), (101 * GIB, 1), (101 * GIB + 1, 2), (350 * GIB, 250)],
)
def test_units_that_were_begun(used: int, units: int) -> None:
    found = overage.lines(held(), {"bytes_per_month": used}, [PRICE], MONTH)
    assert [(line.quantity, line.net_minor, line.kind) for line in found] == (
        [(units, units * 50, "overage")] if units else []
    )


def test_the_period_is_the_month() -> None:
    (line,) = overage.lines(held(), {"bytes_per_month": 101 * GIB}, [PRICE], MONTH)
    assert (line.period_start, line.period_end) == (datetime(2030, 2, 1, tzinfo=UTC), datetime(2030, 3, 1, tzinfo=UTC))


def test_where_traffic_stops_or_is_free_there_is_none() -> None:
    used = {"bytes_per_month": 900 * GIB}
    assert overage.lines(held(hard_cap=True), used, [PRICE], MONTH) == []
    assert overage.lines(held(None), used, [PRICE], MONTH) == []
    assert overage.lines(held(), used, [], MONTH) == []


@pytest.mark.parametrize(
    "text",
    [
        "pro", "pro:tunnels=EUR:1:1", "pro:bytes_per_month=XXX:1:1", "pro:bytes_per_month=EUR:1:0",
        "pro:bytes_per_month=EUR:-1:1", "pro:bytes_per_month=EUR:50:1,pro:bytes_per_month=EUR:60:1",
        "pro:bytes_per_month=EUR:50:1,pro:requests_per_month=USD:60:1",
    ],
)  # fmt: skip
def test_prices_that_cannot_be_meant(text: str) -> None:
    settings = ApiSettings(
        database_url=Secret("postgresql://x"), master_key=Secret("x"), overage_prices=tuple(text.split(","))
    )
    with pytest.raises(Problem) as refused:
        overage.prices(settings)
    assert refused.value.code == "config.invalid"


async def test_over_http(owner: Account, app: Any, db: Database) -> None:
    shown = (await owner.client.get("/v1/billing/overage", params={"month": "2030-02"})).json()
    assert (shown["month"], shown["lines"], shown["total_minor"], shown["currency"]) == ("2030-02", [], 0, None)
    wrong = await owner.client.get("/v1/billing/overage", params={"month": "2030-13"})
    assert wrong.status_code == 422
    far = await owner.client.get("/v1/billing/overage", params={"month": "0000-01"})
    assert (far.status_code, far.json()["code"]) == (400, "usage.range_invalid")
