"""What use beyond a plan costs: priced from the totals that ``tunnels`` keeps, which count each report of a relay once.

    overage_prices = ["pro:bytes_per_month=EUR:50:1073741824"]       50 cents for each GiB begun above what the plan has

A plan without a price for a limit has no overage of it; one whose traffic stops at the limit (``hard_cap``) has none either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Final

from portico.control.finance.events import Line
from portico.control.identity import plans
from portico.control.identity.plans import LIMIT_TABLE, MONTHLY, Entitlements
from portico.control.tunnels import standing
from portico.errors import Problem
from portico.kit import money
from portico.kit.db import Reader
from portico.settings import ApiSettings

_PRICE: Final = re.compile(r"([a-z][a-z0-9-]{0,31}):([a-z_]+)=([A-Z]{3}):([0-9]{1,12}):([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Price:
    """What ``per`` of a limit cost, begun ones whole."""

    limit: str
    currency: str
    amount_minor: int
    per: int


def prices(settings: ApiSettings) -> Mapping[str, Sequence[Price]]:
    """The prices of each plan. Raises ``config.invalid`` for one that cannot be read, or a plan with two currencies."""
    found: dict[str, list[Price]] = {}
    for text in settings.overage_prices:
        match = _PRICE.fullmatch(text)
        if match is None or match[2] not in MONTHLY or match[3] not in money.EXPONENTS or int(match[5]) == 0:
            raise _refused(f"{text!r} is not PLAN:LIMIT=CURRENCY:MINOR:PER with a limit of a month")
        of = found.setdefault(match[1], [])
        if any(price.limit == match[2] or price.currency != match[3] for price in of):
            raise _refused(f"{text!r}: a limit has one price, and a plan one currency")
        of.append(Price(match[2], match[3], int(match[4]), int(match[5])))
    return found


def _refused(what: str) -> Problem:
    return Problem("config.invalid", f"setting overage_prices: {what}", key="overage_prices")


def lines(held: Entitlements, used: Mapping[str, int], of: Sequence[Price], month: date) -> list[Line]:
    """A line for each limit that was passed; none of tax, which is the invoice's to add."""
    start, found = standing.midnight(month), []
    for price in of:
        allowed, count = held.limit(price.limit), used.get(price.limit, 0)
        if held.hard_cap or allowed is None or count <= allowed:
            continue
        units = -((allowed - count) // price.per)
        amount = units * price.amount_minor
        about = f"{LIMIT_TABLE[price.limit].noun.removesuffix(' this month')} beyond the plan {held.name}"
        end = standing.next_month(month)
        found.append(Line(about, units, price.amount_minor, amount, 0, None, start, end, kind="overage"))
    return found


class Overage:
    """The verbs on what use costs. Raises ``config.invalid`` as ``prices`` does when it is made."""

    def __init__(self, settings: ApiSettings) -> None:
        self._prices = prices(settings)

    async def of(self, reader: Reader, organization: str, month: date) -> dict[str, Any]:
        """What an organization's use of a month beyond its plan, as it is now, costs so far."""
        held = await plans.entitlements(reader, organization)
        used = await standing.used(reader, organization, month)
        of = self._prices.get(held.plan, ())
        found = lines(held, used, of, month)
        return {
            "month": month.isoformat()[:7],
            "plan": held.plan,
            "currency": of[0].currency if of else None,
            "lines": [
                {
                    "description": line.description, "quantity": line.quantity, "unit_minor": line.unit_minor,
                    "amount_minor": line.net_minor,
                }
                for line in found
            ],
            "total_minor": sum(line.net_minor for line in found),
        }  # fmt: skip
