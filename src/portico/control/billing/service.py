"""Billing as one thing: what the API and the workers make of their settings and keep for as long as they live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from portico.control.billing import dunning_store
from portico.control.billing.apply import Applier
from portico.control.billing.calls import Calls
from portico.control.billing.checkout import Checkouts
from portico.control.billing.overage import Overage
from portico.control.billing.overage_billing import OverageBilling
from portico.control.billing.provider import Providers
from portico.control.identity.plan_service import Plans
from portico.control.identity.quotas import Quotas
from portico.control.tunnels import quotas as tunnel_quotas
from portico.control.tunnels.addresses import Addresses
from portico.control.tunnels.frozen import Frozen
from portico.control.tunnels.standing import Standing
from portico.control.tunnels.usage_notices import UsageNotices
from portico.kit.clock import Clock
from portico.kit.db import Database, Reader
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings


class Billing:
    """Everything of billing that has verbs. ``service``: those on plans, which tell live tunnels of a change."""

    def __init__(
        self, settings: ApiSettings, db: Database, clock: Clock, sealer: Sealer, service: Plans, providers: Providers
    ) -> None:
        self.clock = clock
        self.overage = Overage(settings)
        self.providers = providers
        self.applier = Applier(settings, clock, sealer, service)
        self.calls = Calls(settings, db, clock, providers, self.applier)
        self.checkouts = Checkouts(settings, clock, providers, self.calls, self.applier.entitlement)
        self.overage_billing = OverageBilling(settings, clock, self.overage, self.applier.entitlement, providers)

    @staticmethod
    async def dunning_cases(reader: Reader, subscription_id: str) -> Sequence[Any]:
        """The cases of a subscription that are not over."""
        return list((await dunning_store.open_cases(reader, subscription_id)).values())

    async def close(self) -> None:
        """Let go of the providers' connections."""
        await self.providers.close()


def plans_of(settings: ApiSettings, clock: Clock, sealer: Sealer) -> Plans:
    """The verbs on plans for a process that is no API: a change reaches live tunnels all the same."""
    quotas = Quotas(settings, clock)
    quotas.kinds.update(tunnel_quotas.kinds(settings))
    standing = Standing(settings, clock, quotas)
    standing.notify.append(UsageNotices(settings, sealer))
    quotas.on_changed += [Frozen(settings, Addresses(settings)).settle, standing.moved]
    return Plans(quotas)


def of(settings: ApiSettings, db: Database, clock: Clock) -> Billing:
    """Billing of a worker."""
    sealer = Sealer(settings.master_key)
    return Billing(settings, db, clock, sealer, plans_of(settings, clock, sealer), Providers(settings))
