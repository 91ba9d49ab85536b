"""What an organization asks for: to buy a plan, to change, end or take up its subscription, to have money back.

Each verb decides under the organization's lock and writes a call down (``calls.py``); the route then has it made.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from urllib.parse import urlsplit

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.billing import billing_store, checkout_store
from portico.control.billing.billing_store import Source
from portico.control.billing.calls import Calls, request_key
from portico.control.billing.doubles import alive
from portico.control.billing.entitlement import Entitlement, prices
from portico.control.billing.provider import Name, Providers
from portico.control.billing.subscription_states import ENTITLED
from portico.control.identity import facts as identity_facts
from portico.control.identity import plans
from portico.errors import Problem
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx
from portico.kit.ids import new_id
from portico.settings import ApiSettings

_LOCAL: Final = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class Purchase:
    """What somebody wants to buy, and where the provider leads them afterwards."""

    plan: str
    provider: Name
    success_url: str
    cancel_url: str


def check_url(url: str, name: str) -> None:
    """Raises ``billing.url_invalid`` unless ``url`` is one of https, or of this machine."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
        parts = urlsplit("")
    fine = parts.scheme == "https" or (parts.scheme == "http" and host in _LOCAL)
    if not host or not fine or parts.username is not None or not url.isascii() or any(c <= " " for c in url):
        raise Problem("billing.url_invalid", f"{name} is no https address", field=name)


class Checkouts:
    """The verbs. One for each process."""

    def __init__(
        self, settings: ApiSettings, clock: Clock, providers: Providers, calls: Calls, entitlement: Entitlement
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._providers = providers
        self._calls = calls
        self._entitlement = entitlement
        self._prices = prices(settings)

    # -- buying

    async def buy(self, tx: Tx, who: Caller, wanted: Purchase, given_key: str | None) -> tuple[str, str]:
        """Ask for a page on which a plan is paid: ids of the checkout and of the call.

        Raises ``plan.not_found``, ``billing.plan_not_sold``, ``billing.already_subscribed``, ``billing.url_invalid``. Of two
        pages that are open at once the first that is paid counts (``doubles.py``).
        """
        check_url(wanted.success_url, "success_url")
        check_url(wanted.cancel_url, "cancel_url")
        await plans.hold(tx, who.org)
        plan = next((each for each in await plans.current(tx) if each.id == wanted.plan and each.listed), None)
        if plan is None:
            raise Problem("plan.not_found", f"there is no plan {wanted.plan}")
        adapter = self._providers.of(wanted.provider)
        price = self._price(wanted.provider, wanted.plan)
        source = Source(adapter.name, adapter.account, adapter.livemode)
        customer = await billing_store.customer_of(tx, who.org, source)
        payers = await identity_facts.payers(tx, who.org, 1)
        arguments = {
            "price": price,
            "success_url": wanted.success_url,
            "cancel_url": wanted.cancel_url,
            "customer_ref": customer.ref if customer is not None else None,
            "email": payers[0]["email"] if payers and customer is None else None,
        }
        key = request_key(who, given_key)
        if (before := await checkout_store.call_by_request(tx, who.org, key)) is not None:
            same = {name: before.arguments.get(name) for name in ("price", "success_url", "cancel_url")}
            if before.act != "checkout" or same != {name: arguments[name] for name in same}:
                raise Problem("idempotency.mismatch")
            return before.subject, before.id
        if await current(tx, who.org) is not None:
            raise Problem("billing.already_subscribed")
        made = new_id("chk")
        await checkout_store.add_checkout(tx, {
            "id": made, "organization_id": who.org, **source.columns, "plan": plan.id, "plan_version": plan.version,
        })  # fmt: skip
        call = await self._calls.begin(
            tx, who, key, "checkout", made, wanted.provider, {"reference": made, **arguments}
        )
        facts = {"plan": plan.id, "version": plan.version, "provider": wanted.provider}
        await audit.record(tx, who, "checkout.create", made, details=facts)
        return made, call

    def _price(self, provider: str, plan: str) -> str:
        price = self._prices.get(provider, {}).get(plan)
        if price is None:
            raise Problem("billing.plan_not_sold", f"{provider} does not sell the plan {plan}", plan=plan)
        return price

    # -- the subscription that there is

    async def cancel(
        self, tx: Tx, who: Caller, *, at_period_end: bool, reason: str, given_key: str | None
    ) -> str | None:
        """Ask for the end of the subscription; the call to be made now, ``None`` when it is made at the end of the period.

        Where the provider cannot end with the period, we do it then. Raises ``billing.no_subscription``.
        """
        row = await self._held(tx, who)
        arguments = {"ref": row.ref, "at_period_end": at_period_end, "reason": reason}
        key = request_key(who, given_key)
        if (before := await self._calls.known(tx, who, key, "cancel", arguments)) is not None:
            return str(before.id)
        await _one_at_a_time(tx, row)
        adapter, at = self._providers.of(row.provider), None
        if at_period_end and "cancel_at_period_end" not in adapter.can:
            if row.period_end is None or row.period_end <= self._clock.wall():
                raise Problem(
                    "billing.provider_unsupported", "the end of the period is not known; cancel at once instead"
                )
            if await checkout_store.scheduled(tx, row.id) is not None:
                return None
            # A little before, so that the provider does not take the next period's money first.
            at = row.period_end - timedelta(seconds=self._settings.billing_cancel_lead_seconds)
        call = await self._calls.begin(tx, who, key, "cancel", row.id, row.provider, arguments, at=at)
        facts = {"at_period_end": at_period_end, "reason": reason}
        await audit.record(tx, who, "subscription.cancel", row.id, details=facts)
        return None if at is not None else call

    async def resume(self, tx: Tx, who: Caller, given_key: str | None) -> str | None:
        """Ask for the subscription to go on. Raises ``billing.no_subscription``."""
        row = await self._held(tx, who)
        key, arguments = request_key(who, given_key), {"ref": row.ref}
        if (before := await self._calls.known(tx, who, key, "resume", arguments)) is not None:
            return str(before.id)
        await _one_at_a_time(tx, row)
        if await checkout_store.unschedule(tx, row.id):
            await audit.record(tx, who, "subscription.resume", row.id)
            return None
        call = await self._calls.begin(tx, who, key, "resume", row.id, row.provider, arguments)
        await audit.record(tx, who, "subscription.resume", row.id)
        return call

    async def change(
        self, tx: Tx, who: Caller, plan: str, *, when: str | None, return_url: str, given_key: str | None
    ) -> str:
        """Ask for another plan. Raises ``billing.no_subscription``, ``plan.not_found``, ``billing.plan_not_sold``,
        ``billing.same_plan``, ``billing.provider_unsupported``."""
        row = await self._held(tx, who)
        if return_url:
            check_url(return_url, "return_url")
        if not any(each.id == plan and each.listed for each in await plans.current(tx)):
            raise Problem("plan.not_found", f"there is no plan {plan}")
        if when is None:
            when = "now" if "change_now" in self._providers.of(row.provider).can else "period_end"
        arguments = {
            "ref": row.ref, "price": self._price(row.provider, plan), "when": when, "return_url": return_url
        }  # fmt: skip
        key = request_key(who, given_key)
        if (before := await self._calls.known(tx, who, key, "change", arguments)) is not None:
            return str(before.id)
        await _one_at_a_time(tx, row)
        if self._entitlement.plan(row)[0] == plan:
            raise Problem("billing.same_plan", f"the subscription is for {plan} already")
        if row.status not in ENTITLED:
            raise Problem("billing.subscription_state", f"the subscription is {row.status}", status=row.status)
        call = await self._calls.begin(tx, who, key, "change", row.id, row.provider, arguments)
        await audit.record(tx, who, "subscription.plan", row.id, details={"plan": plan, "when": when})
        return call

    async def _held(self, tx: Tx, who: Caller) -> Any:
        await plans.hold(tx, who.org)
        row = await current(tx, who.org)
        if row is None:
            raise Problem("billing.no_subscription")
        return row

    # -- money back

    async def refund(
        self, tx: Tx, who: Caller, payment_id: str, amount_minor: int | None, reason: str, given_key: str | None,
        *, by_operator: bool = False,
    ) -> tuple[str, str]:  # fmt: skip
        """Ask for money back, all that is left when no amount is named: ids of the refund and of the call.

        Members may within ``refund_days`` of the payment, operators at any time. Raises ``billing.payment_not_found``,
        ``billing.refund_late``, ``billing.refund_exceeds``.
        """
        payment = await checkout_store.hold_payment(tx, None if by_operator else who.org, payment_id)
        if payment is None:
            raise Problem("billing.payment_not_found")
        acting = who if who.organization == payment.organization_id else _for(who, payment.organization_id)
        key = request_key(who, given_key)
        asked = {"payment": payment.id, "asked_minor": amount_minor, "reason": reason}
        if (before := await checkout_store.call_by_request(tx, payment.organization_id, key)) is not None:
            if before.act != "refund" or {name: before.arguments.get(name) for name in asked} != asked:
                raise Problem("idempotency.mismatch")
            return before.subject, before.id
        if not by_operator and self._clock.wall() > payment.paid_at + timedelta(days=self._settings.refund_days):
            raise Problem("billing.refund_late", f"a payment can be given back for {self._settings.refund_days:g} days")
        left = payment.amount_minor - await checkout_store.refunded(tx, payment.id)
        amount = left if amount_minor is None else amount_minor
        if amount > left or amount <= 0:
            raise Problem(
                "billing.refund_exceeds", f"{left} of {payment.currency} are left (minor units)", left_minor=left
            )
        made, source = new_id("rfd"), Source.of(payment)
        await checkout_store.add_refund(tx, {
            "id": made, "organization_id": payment.organization_id, "payment_id": payment.id, **source.columns,
            "amount_minor": amount, "currency": payment.currency, "reason": reason,
        })  # fmt: skip
        # Said as an amount even for all of it: what is left at the provider is what is left here, or it refuses.
        arguments = {**asked, "ref": payment.ref, "amount_minor": amount, "currency": payment.currency}
        call = await self._calls.begin(tx, acting, key, "refund", made, payment.provider, arguments)
        facts = {"payment": payment.id, "amount_minor": amount, "currency": payment.currency, "reason": reason}
        await audit.record(tx, who, "refund.create", made, details=facts, organization=payment.organization_id)
        return made, call


async def _one_at_a_time(tx: Tx, row: Any) -> None:
    """Raises ``billing.call_running`` while an earlier request about a subscription, which is held, has no answer: made again
    after a later one, it would undo that."""
    if await checkout_store.unfinished(tx, row.id):
        raise Problem(
            "billing.call_running", "an earlier request about the subscription is not answered yet",
            headers={"Retry-After": "5"},
        )  # fmt: skip


def _for(who: Caller, organization: str) -> Caller:
    return Caller(who.kind, who.id, organization, platform_operator=who.platform_operator)


async def current(reader: Reader, organization: str) -> Any | None:
    """The subscription that an organization has: the newest that is not over; ``None`` when all are."""
    rows = await billing_store.subscriptions_of(reader, organization)
    found = [row for row in rows if alive(row) and row.beside is None]
    return max(found, key=lambda row: (row.status in ENTITLED, row.id), default=None)
