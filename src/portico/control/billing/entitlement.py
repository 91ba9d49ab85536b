"""What an organization has for what it pays: its plan follows from its subscriptions and their dunning cases.

    trialing, active, past_due      the plan
      … while a case is restricted  the plan, at a slow pace and without more tunnels
      … while one is suspended      nothing
    every other status              nothing, so the installation's default plan

Of several subscriptions the best one decides. Billing moves an organization when what it pays for changes, and not otherwise:
what an operator gave it since stays.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from portico.control.billing import billing_store, dunning_store, provider_settings
from portico.control.billing.dunning import WORKER
from portico.control.billing.dunning_states import RESTRICTS, SUSPENDS
from portico.control.billing.subscription_states import ENTITLED
from portico.control.identity import plans
from portico.control.identity.plan_service import Paid, Plans
from portico.errors import Problem
from portico.kit.db import Reader, Tx
from portico.settings import ApiSettings

log = logging.getLogger(__name__)


#: The settings that name each provider's prices.
PRICES: Final[Mapping[str, str]] = {"stripe": "stripe_prices", "razorpay": "razorpay_plans", "paypal": "paypal_plans"}


def prices(settings: ApiSettings) -> Mapping[str, Mapping[str, str]]:
    """By provider: what it calls the price of each of our plans."""
    return {provider: provider_settings.prices(settings, name) for provider, name in PRICES.items()}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an organization is to have. ``subscription``: the one that it has it by."""

    plan: str
    version: int | None
    subscription: str | None
    restricted: bool


class Entitlement:
    """The verbs on what organizations have for what they pay."""

    def __init__(self, settings: ApiSettings, service: Plans) -> None:
        self._settings = settings
        self._plans = service
        sold = prices(settings)
        self._plan_of = {(name, ref): plan for name, each in sold.items() for plan, ref in each.items()}

    def plan(self, subscription: Any) -> tuple[str | None, int | None]:
        """Plan and version that a subscription is for: by the provider's price, else by what was chosen at the checkout."""
        return self.plan_by(subscription, subscription.plan_ref)

    def plan_by(self, subscription: Any, ref: str | None) -> tuple[str | None, int | None]:
        """The same, were its price ``ref``."""
        chosen, version = subscription.checkout_plan, subscription.checkout_plan_version
        known = self._plan_of.get((subscription.provider, ref)) if ref is not None else None
        if known is None or known == chosen:
            return chosen, version
        return known, None

    async def settle(self, tx: Tx, organization: str, reason: str) -> bool:
        """Give the organization, which the caller holds, what it pays for now; whether that changed something."""
        before = await billing_store.standing(tx, organization)
        rows = await billing_store.subscriptions_of(tx, organization)
        rows = [row for row in rows if row.beside is None]  # what was bought twice gives nothing
        if before is None and not any(row.status in ENTITLED for row in rows):
            return False
        wanted = await self._wanted(tx, organization, rows)
        now = (wanted.plan, wanted.version, wanted.restricted)
        if before is not None and now == (before.plan, before.plan_version, before.restricted):
            return False
        slow = self._settings.dunning_requests_per_second if wanted.restricted else None
        try:
            await self._plans.assign(tx, WORKER, organization, Paid(wanted.plan, wanted.version, slow, reason))
        except Problem as problem:  # a plan that is sold and not there: the old one stays, loudly
            if problem.code != "plan.not_found":
                raise
            log.error("a plan that is paid for does not exist", extra={"f": {"plan": wanted.plan}})
            return False
        await billing_store.put_standing(
            tx, organization, wanted.plan, wanted.version, wanted.subscription, wanted.restricted
        )
        return True

    async def _wanted(self, reader: Reader, organization: str, rows: Sequence[Any]) -> Wanted:
        cases: dict[str, set[str]] = {}
        for subscription, state in await dunning_store.open_states(reader, organization):
            cases.setdefault(subscription, set()).add(state)
        positions = {plan.id: plan.position for plan in await plans.current(reader)}
        found = [each for row in rows if (each := self._of(row, cases.get(row.id, set()), positions)) is not None]
        if not found:
            return Wanted(self._settings.default_plan, None, None, False)
        # The dearest first, one without restriction before one with; the provider's reference decides what is left.
        return min(found, key=lambda pair: pair[0])[1]

    def _of(self, row: Any, cases: set[str], positions: Mapping[str, int]) -> tuple[Any, Wanted] | None:
        plan, version = self.plan(row)
        if row.status not in ENTITLED or plan is None or cases & SUSPENDS:
            return None
        restricted = bool(cases & RESTRICTS)
        return (-positions.get(plan, 0), restricted, row.ref), Wanted(plan, version, row.id, restricted)
