"""What use beyond a plan costs: priced from the totals that ``tunnels`` keeps, which count each report of a relay once.

    overage_prices = ["pro:bytes_per_month=EUR:50:1073741824"]       50 cents for each GiB begun above what the plan has

A plan without a price for a limit has no overage of it; one whose traffic stops at the limit (``hard_cap``) has none either.
What is shown here is charged when the month is over (``overage_billing``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

from portico.control.billing import billing_store, subscription_states
from portico.control.billing.subscription_states import ENTITLED
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
        units = begun(count, allowed, price.per)
        amount = units * price.amount_minor
        about = f"{LIMIT_TABLE[price.limit].noun.removesuffix(' this month')} beyond the plan {held.name}"
        end = standing.next_month(month)
        found.append(Line(about, units, price.amount_minor, amount, 0, None, start, end, kind="overage"))
    return found


def begun(used: int, allowed: int, per: int) -> int:
    """Units of ``per`` beyond what is allowed, begun ones whole."""
    return max(0, -((allowed - used) // per))


async def counted(reader: Reader, organization: str, month: date) -> dict[str, int]:
    """What was used of a month from when on the organization paid for a plan; all of it when it did before, or never has.

    Whoever buys in the middle of a month does not pay for what was used on another plan before: hours that began before do not
    count.
    """
    start, end = standing.midnight(month), standing.next_month(month)
    since: datetime | None = None
    for row in await billing_store.subscriptions_of(reader, organization):
        if row.beside is not None:  # bought twice: it gives nothing
            continue
        said = await billing_store.snapshots(reader, row.id)
        before, _ = subscription_states.derive(each for each in said if each.occurred_at < start)
        began = [each.occurred_at for each in said if each.status in ENTITLED and start <= each.occurred_at < end]
        first = start if before.status in ENTITLED else min(began, default=None)
        if first is not None:
            since = first if since is None else min(since, first)
    if since is None or since <= start:
        return await standing.used(reader, organization, month)
    hour = since.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    return await standing.used_from(reader, organization, hour if hour == since else hour + timedelta(hours=1), end)


class Overage:
    """The verbs on what use costs. Raises ``config.invalid`` as ``prices`` does when it is made."""

    def __init__(self, settings: ApiSettings) -> None:
        self.prices = prices(settings)

    async def of(self, reader: Reader, organization: str, month: date) -> dict[str, Any]:
        """What an organization's use of a month beyond its plan, as it is now, costs so far."""
        held = await plans.entitlements(reader, organization)
        used, paid = await standing.used(reader, organization, month), await counted(reader, organization, month)
        of = self.prices.get(held.plan, ())
        found = lines(held, paid, of, month)
        return {
            "month": month.isoformat()[:7],
            "plan": held.plan,
            "currency": of[0].currency if of else None,
            "use": [
                {
                    "limit": name, "used": count, "allowed": (most := held.limit(name)),
                    "beyond": 0 if most is None else max(0, paid[name] - most),
                }
                for name, count in used.items()
            ],
            "lines": [
                {
                    "description": line.description, "quantity": line.quantity, "unit_minor": line.unit_minor,
                    "amount_minor": line.net_minor,
                }
                for line in found
            ],
            "total_minor": sum(line.net_minor for line in found),
        }  # fmt: skip
