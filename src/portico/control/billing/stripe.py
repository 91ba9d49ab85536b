"""Stripe by its SDK (https://docs.stripe.com/api): checkout sessions, subscriptions, invoices, refunds.

    POST   /v1/customers, /v1/checkout/sessions          the checkout; the customer first, so that its events find us
    POST   /v1/subscriptions/{id}                        another price at once; an end with the period, and back
    POST   /v1/subscription_schedules[/{id}[/release]]   another price from the next period on
    DELETE /v1/subscriptions/{id}                        an end at once
    POST   /v1/subscriptions/{id}/resume, /v1/refunds, /v1/billing_portal/sessions, /v1/checkout/sessions/{id}/expire
    POST   /v1/invoices/{id}/pay                         a payment that failed, once more
    POST   /v1/invoiceitems, /v1/invoices[/{id}/finalize]    what is charged beside the plan
    GET    /v1/{subscriptions|invoices|payment_intents|charges|refunds|disputes|payouts|checkout/sessions|…}/{id}
    GET    /v1/invoice_payments?payment[type]&payment[payment_intent]     which invoice a payment was for
    GET    /v1/refunds?charge, /v1/events?created[gte]&created[lte], /v1/invoices/{id}/lines,
           /v1/invoiceitems?customer&created[gte]

The SDK makes requests, signs them with our key and reads errors; it sends them through our own :class:`Wire`, which decides about
time, retries and the breaker. Answers come in the shapes of the SDK's own API version; webhooks in that of their endpoint.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from portico.control.billing import provider_errors as errors
from portico.control.billing import refund_words
from portico.control.billing.foreign import part, ref, rows, seconds, word
from portico.control.billing.provider import (
    Ability,
    Change,
    Charge,
    Checkout,
    Collected,
    Fetched,
    Kind,
    Name,
    Order,
    Refund,
    State,
    When,
)
from portico.control.billing.provider_http import Limits, Wire
from portico.control.billing.stripe_units import iso, stripe_integer
from portico.errors import Problem
from portico.kit import money
from portico.kit.clock import utcnow
from portico.settings import ApiSettings

_CAN: Final[frozenset[Ability]] = frozenset(
    {
        "change_now", "change_at_period_end", "cancel_at_period_end", "undo_cancel", "resume", "events", "portal", "retries",
        "close_page", "returns", "collect", "charge", "charge_now",
    }
)  # fmt: skip
_FOLDERS: Final[Mapping[str, str]] = {
    "sub_sched": "subscription_schedules", "sub": "subscriptions", "in": "invoices", "pi": "payment_intents", "ch": "charges",
    "py": "charges", "re": "refunds", "pyr": "refunds", "dp": "disputes", "du": "disputes", "po": "payouts",
    "cs": "checkout/sessions", "cus": "customers", "price": "prices", "evt": "events", "txn": "balance_transactions",
}  # fmt: skip
#: What of a fetched object its id alone would not tell.
_EXPANDED: Final[Mapping[str, list[str]]] = {
    "invoices": ["payments"],
    "payment_intents": ["latest_charge.balance_transaction"],
    "charges": ["balance_transaction"],
}
#: By what Stripe's clock may be behind ours.
_LOOK_BACK: Final = timedelta(hours=1)
_ENDED: Final = frozenset({"canceled", "incomplete_expired"})
#: Refusals that another attempt under the same key mends.
_LATER: Final = frozenset({"lock_timeout", "idempotency_key_in_use"})


class Stripe:
    """The adapter. See ``provider.Provider``."""

    name: Name = "stripe"
    can = _CAN

    def __init__(self, settings: ApiSettings, now: Callable[[], datetime] = utcnow) -> None:
        if settings.stripe_secret_key is None:
            raise errors.unconfigured(self.name)
        self.account, self.livemode = settings.stripe_account, settings.billing_livemode
        self._page_size, self._pages, self._now = min(100, settings.billing_list_page), settings.billing_list_pages, now
        self.wire = Wire(self.name, settings.stripe_api_url, Limits.of(settings), settings.billing_ca_file)
        self._client = _client(settings.stripe_secret_key.reveal(), settings.stripe_api_url.rstrip("/"), self.wire)

    async def close(self) -> None:
        await self.wire.close()

    # -- what is bought

    async def checkout(self, order: Order, *, key: str) -> Checkout:
        ours = {"reference": order.reference}
        customer = order.customer_ref
        if customer is None:
            made = await self._ask(
                "post",
                "/v1/customers",
                _given(email=order.email, name=order.name, metadata=ours),
                key=f"{key}:customer",
            )
            customer = ref(made)
        found = await self._ask(
            "post",
            "/v1/checkout/sessions",
            {
                "mode": "subscription",
                "customer": customer,
                "client_reference_id": order.reference,
                "line_items": [{"price": order.price, "quantity": order.quantity}],
                "success_url": order.success_url,
                "cancel_url": order.cancel_url,
                "metadata": ours,
                "subscription_data": _given(metadata=ours, trial_period_days=order.trial_days or None),
            },
            key=f"{key}:session",
        )
        url, session = found.get("url"), ref(found)
        if session is None or not isinstance(url, str):
            raise errors.unreadable(self.name, "a checkout session without id or page")
        return Checkout(session, url, customer, ref(found.get("subscription")), seconds(found.get("expires_at")))

    async def close_page(self, checkout_ref: str, *, key: str) -> None:
        await self._ask("post", f"/v1/checkout/sessions/{checkout_ref}/expire", {}, key=key, ref=checkout_ref)

    async def change(self, subscription_ref: str, price: str, *, when: When, return_url: str = "", key: str) -> Change:
        current = await self.fetch(subscription_ref)
        item = next(iter(rows(current, "items")), None)
        if item is None:
            raise errors.unreadable(self.name, "a subscription without items")
        if when == "period_end":
            return await self._schedule(current, item, price, key)
        if (schedule := ref(current.get("schedule"))) is not None:  # what was planned is not what is wanted any more
            await self._ask("post", f"/v1/subscription_schedules/{schedule}/release", {}, key=f"{key}:release")
        if ref(item.get("price")) != price:
            await self._ask(
                "post",
                f"/v1/subscriptions/{subscription_ref}",
                {
                    "items": [{"id": ref(item), "price": price, "quantity": item.get("quantity") or 1}],
                    "proration_behavior": "always_invoice",
                    # The plan is the customer's when it is paid; until then the change waits at Stripe.
                    "payment_behavior": "pending_if_incomplete",
                },
                key=key,
            )
        return Change("done")

    async def _schedule(self, current: Mapping[str, Any], item: Mapping[str, Any], price: str, key: str) -> Change:
        quantity = item.get("quantity") or 1
        schedule = ref(current.get("schedule"))
        if schedule is None:
            made = await self._ask(
                "post", "/v1/subscription_schedules", {"from_subscription": ref(current)}, key=f"{key}:schedule"
            )
        else:
            made = dict(await self.fetch(schedule))
        phase = part(made, "current_phase") or next(iter(rows(made, "phases")), {})
        start, end = phase.get("start_date"), phase.get("end_date")
        if ref(made) is None or not isinstance(start, int) or not isinstance(end, int):
            raise errors.unreadable(self.name, "a schedule without a phase")
        now = {"price": ref(item.get("price")), "quantity": quantity}
        await self._ask(
            "post",
            f"/v1/subscription_schedules/{ref(made)}",
            {
                "end_behavior": "release",
                "proration_behavior": "none",
                "phases": [
                    {"items": [now], "start_date": start, "end_date": end},
                    {"items": [{"price": price, "quantity": quantity}], "start_date": end},
                ],
            },
            key=f"{key}:phases",
        )
        return Change("scheduled")

    async def cancel(self, subscription_ref: str, *, at_period_end: bool, reason: str, key: str) -> State:
        current = await self.fetch(subscription_ref)
        if current.get("status") in _ENDED:
            return _state(current)
        if (schedule := ref(current.get("schedule"))) is not None:  # a schedule's subscription has no end of its own
            await self._ask("post", f"/v1/subscription_schedules/{schedule}/release", {}, key=f"{key}:release")
        where, why = f"/v1/subscriptions/{subscription_ref}", {"comment": errors.words(reason)}
        if at_period_end:
            return _state(
                await self._ask("post", where, {"cancel_at_period_end": True, "cancellation_details": why}, key=key)
            )
        try:
            return _state(
                await self._ask("delete", where, {"cancellation_details": why}, key=key, ref=subscription_ref)
            )
        except Problem as problem:
            if problem.code != "billing.provider_object_missing":
                raise
            return _state(await self.fetch(subscription_ref))  # somebody else was faster

    async def resume(self, subscription_ref: str, *, key: str) -> State:
        where = f"/v1/subscriptions/{subscription_ref}"
        current: Mapping[str, Any] = await self.fetch(subscription_ref)
        if current.get("status") in _ENDED:
            raise errors.unsupported(self.name, "resume a subscription that has ended; buy again")
        if current.get("status") == "paused":
            current = await self._ask("post", f"{where}/resume", {"billing_cycle_anchor": "now"}, key=key)
        elif current.get("cancel_at_period_end"):
            current = await self._ask("post", where, {"cancel_at_period_end": False}, key=key)
        return _state(current)

    async def refund(
        self, payment_ref: str, *, amount_minor: int | None, currency: str, reason: str, key: str
    ) -> Refund:
        body: dict[str, Any] = {
            "charge" if payment_ref.startswith(("ch_", "py_")) else "payment_intent": payment_ref,
            "reason": "requested_by_customer",
            "metadata": {"reason": errors.words(reason), "key": key},
        }
        if amount_minor is not None:
            try:
                body["amount"] = stripe_integer(amount_minor, currency)
            except money.MoneyError as err:
                raise Problem("billing.amount_invalid", f"Stripe cannot give that back: {err}") from None
        return self._refund(await self._ask("post", "/v1/refunds", body, key=key))

    async def refund_made(self, payment_ref: str, *, key: str) -> Refund | None:
        kind = "charge" if payment_ref.startswith(("ch_", "py_")) else "payment_intent"
        async for one in self._all("/v1/refunds", {kind: payment_ref}):
            if part(one, "metadata").get("key") == key:
                return self._refund(one)
        return None

    def _refund(self, found: Mapping[str, Any]) -> Refund:
        amount, code = found.get("amount"), word(found.get("currency")).upper()
        made = ref(found)
        if made is None or not isinstance(amount, int) or code not in money.EXPONENTS:
            raise errors.unreadable(self.name, "a refund without an amount")
        status = refund_words.status_of(self.name, refund_words.STRIPE, word(found.get("status")))
        return Refund(made, status, iso(amount, code), code)

    async def collect(
        self, subscription_ref: str, invoice_ref: str | None, *, amount_minor: int, currency: str, key: str
    ) -> Collected:
        if invoice_ref is None or (await self.fetch(invoice_ref)).get("status") != "open":
            return "nothing"
        try:
            await self._ask("post", f"/v1/invoices/{invoice_ref}/pay", {}, key=key)
        except Problem as problem:
            if problem.code != "billing.payment_declined":
                raise
            return "declined"
        return "paid"

    async def charge(self, charge: Charge, *, key: str) -> str:
        found = await self._charged_before(charge)
        if found is not None and not charge.at_once:
            return found
        if charge.customer_ref is None:
            raise errors.unsupported(self.name, "charge a customer that it did not name")
        try:
            amount = stripe_integer(charge.amount_minor, charge.currency)
        except money.MoneyError as err:
            raise Problem("billing.amount_invalid", f"Stripe cannot charge that: {err}") from None
        period = {"start": int(charge.period_start.timestamp()), "end": int(charge.period_end.timestamp())}
        item = {
            "customer": charge.customer_ref, "amount": amount, "currency": charge.currency.lower(), "period": period,
            "description": charge.description, "metadata": {"reference": charge.reference},
        }  # fmt: skip
        if charge.at_once:
            return await self._invoiced(charge, item, key, found)
        item["subscription"] = charge.subscription_ref
        return self._made(await self._ask("post", "/v1/invoiceitems", item, key=f"{key}:item"))

    async def _invoiced(self, charge: Charge, item: Mapping[str, Any], key: str, found: str | None) -> str:
        """An invoice with this alone, paid by Stripe as it pays others. Wherever it was left, it goes on."""
        if found is None:
            draft = {
                "customer": charge.customer_ref, "currency": item["currency"], "auto_advance": False,
                "pending_invoice_items_behavior": "exclude", "metadata": {"reference": charge.reference},
            }  # fmt: skip
            invoice = self._made(await self._ask("post", "/v1/invoices", draft, key=f"{key}:invoice"))
            found = self._made(
                await self._ask("post", "/v1/invoiceitems", {**item, "invoice": invoice}, key=f"{key}:item")
            )
        else:
            invoice = ref((await self._ask("get", f"/v1/invoiceitems/{found}", {}, ref=found)).get("invoice")) or ""
        if invoice and (await self.fetch(invoice)).get("status") == "draft":
            await self._ask("post", f"/v1/invoices/{invoice}/finalize", {"auto_advance": True}, key=f"{key}:finalize")
        return found

    async def _charged_before(self, charge: Charge) -> str | None:
        """The item of a charge: idempotency keys are kept for a day, and a worker may be away for longer."""
        since = {"gte": int((charge.since - _LOOK_BACK).timestamp())}
        async for one in self._all("/v1/invoiceitems", {"customer": charge.customer_ref, "created": since}):
            if part(one, "metadata").get("reference") == charge.reference:
                return ref(one)
        return None

    def _made(self, found: Mapping[str, Any]) -> str:
        if (made := ref(found)) is None:
            raise errors.unreadable(self.name, "an object without an id")
        return made

    async def portal(self, customer_ref: str, return_url: str, *, key: str) -> str:
        found = await self._ask(
            "post", "/v1/billing_portal/sessions", {"customer": customer_ref, "return_url": return_url}, key=key
        )
        url = found.get("url")
        if not isinstance(url, str):
            raise errors.unreadable(self.name, "a portal session without a page")
        return url

    # -- what is there

    async def fetch(self, ref: str, kind: Kind | None = None) -> Mapping[str, Any]:
        folder = _FOLDERS.get(ref.rpartition("_")[0]) or _FOLDERS.get(ref.partition("_")[0])
        if folder is None or not ref.replace("_", "").isalnum():
            raise errors.missing(self.name, ref)
        expand = {"expand": _EXPANDED[folder]} if folder in _EXPANDED else {}
        return await self._ask("get", f"/v1/{folder}/{ref}", expand, ref=ref)

    async def authority(self, body: Mapping[str, Any]) -> Fetched:
        at, objects = self._now(), dict[str, Mapping[str, Any]]()
        kind, told = word(body.get("type")), part(body, "data", "object")
        if kind.startswith("customer.subscription."):
            await self._put(objects, "subscription", told.get("id"))
        elif kind in ("invoice.paid", "invoice.payment_failed", "invoice.payment_action_required"):
            await self._put(objects, "invoice", told.get("id"))
            await self._payment(objects, told)
        elif kind.startswith(("refund.", "charge.refund", "charge.dispute.")):
            if kind.startswith("charge.dispute."):
                await self._put(objects, "dispute", told.get("id"))
            await self._put(objects, "charge", told.get("id") if kind == "charge.refunded" else told.get("charge"))
            if kind == "charge.refunded" and not rows(told, "refunds"):
                objects["refunds"] = {"data": [one async for one in self._all("/v1/refunds", {"charge": ref(told)})]}
            await self._invoice_of(objects, told)
        if kind.startswith("invoice.") and part(told, "lines").get("has_more") is True:
            await self._lines(objects, told)
        return Fetched(at, objects)

    async def _lines(self, objects: dict[str, Mapping[str, Any]], told: Mapping[str, Any]) -> None:
        """All lines of an invoice: an event has ten at most."""
        where = f"/v1/invoices/{ref(told)}/lines"
        objects["lines"] = {"data": [one async for one in self._all(where, {})]}

    async def _payment(self, objects: dict[str, Mapping[str, Any]], told: Mapping[str, Any]) -> None:
        """The payment of an invoice, and what Stripe kept of it."""
        found: Any = None
        for invoice in (objects.get("invoice", {}), told):
            payments = [part(one, "payment") for one in rows(invoice, "payments")]
            paid = [one.get("payment_intent") or one.get("charge") for one in payments]
            found = found or next((one for one in paid if one), None)
            found = found or invoice.get("payment_intent") or invoice.get("charge")
        await self._put(objects, "payment", found)
        payment = objects.get("payment", {})
        charge = part(payment, "latest_charge") or payment
        if balance := part(charge, "balance_transaction"):
            objects["balance_transaction"] = balance

    async def _invoice_of(self, objects: dict[str, Mapping[str, Any]], told: Mapping[str, Any]) -> None:
        intent = ref(told.get("payment_intent")) or ref(objects.get("charge", {}).get("payment_intent"))
        if intent is None:
            return await self._put(objects, "invoice", objects.get("charge", {}).get("invoice"))
        query = {"payment": {"type": "payment_intent", "payment_intent": intent}, "limit": 1}
        found = await self._ask("get", "/v1/invoice_payments", query)
        return await self._put(objects, "invoice", next((one.get("invoice") for one in rows(found, "data")), None))

    async def _put(self, objects: dict[str, Mapping[str, Any]], kind: str, found: Any) -> None:
        if (named := ref(found)) is None:
            return
        try:
            objects[kind] = await self.fetch(named)
        except Problem as problem:
            if problem.code != "billing.provider_object_missing":
                raise

    async def list_events(self, since: datetime, until: datetime | None = None) -> AsyncIterator[Mapping[str, Any]]:
        # Stripe lists the newest first. Whoever applies them does not depend on their order.
        window = {"gte": int(since.timestamp()), "lte": int((until or self._now()).timestamp())}
        async for one in self._all("/v1/events", {"created": window}):
            yield one

    async def _all(self, path: str, query: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
        """Every object of a list, page by page."""
        after: dict[str, Any] = {}
        for _ in range(self._pages):
            page = await self._ask("get", path, {**query, "limit": self._page_size, **after})
            found = rows(page, "data")
            for one in found:
                yield one
            if not found or page.get("has_more") is not True:
                return
            after = {"starting_after": ref(found[-1])}
        raise errors.unreadable(self.name, f"the list {path} has no end (billing_list_pages)")

    # -- requests

    async def _ask(
        self, method: str, path: str, params: Mapping[str, Any], *, key: str = "", ref: str = ""
    ) -> dict[str, Any]:
        options = {"idempotency_key": key} if key else {}
        try:
            answer = await self._client.raw_request_async(method, path, **params, **options)
        except Problem:
            raise
        except _sdk().StripeError as err:
            raise self._refusal(err, ref) from None
        found = answer.data
        if not isinstance(found, dict):
            raise errors.unreadable(self.name, "it is no JSON object")
        return found

    def _refusal(self, err: Any, ref: str) -> Problem:
        sdk, status = _sdk(), err.http_status or 0
        told = part(err.json_body if isinstance(err.json_body, dict) else {}, "error")
        code, message = word(told.get("code")), str(told.get("message") or err.user_message or "")
        if status < 400:
            return errors.unreadable(self.name, message)
        if code in _LATER:
            return errors.busy(self.name, status)
        if isinstance(err, sdk.CardError):
            return errors.declined(self.name, word(told.get("decline_code")) or code, message)
        if isinstance(err, sdk.IdempotencyError):
            return errors.key_reused(self.name)
        if isinstance(err, sdk.AuthenticationError | sdk.PermissionError):
            return errors.credentials(self.name, status)
        if ref and (code == "resource_missing" or status == 404):
            return errors.missing(self.name, ref)
        return errors.refused(self.name, status, code, message)


def _state(found: Mapping[str, Any]) -> State:
    return State(str(found.get("id")), str(found.get("status")), found.get("cancel_at_period_end") is True)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@functools.cache
def _sdk() -> Any:
    # Late: half a second and tens of megabytes that only an installation which uses Stripe spends.
    import stripe

    return stripe


def _client(key: str, url: str, wire: Wire) -> Any:
    """A client of the SDK whose requests go through ``wire``."""
    sdk = _sdk()

    class ByWire(sdk.HTTPClient):  # type: ignore[misc, name-defined]
        name = "portico"

        async def request_with_retries_async(
            self, method: str, url: str, headers: Mapping[str, str], post_data: Any = None, *_: Any, **__: Any
        ) -> tuple[bytes, int, Mapping[str, str]]:
            body = post_data.encode() if isinstance(post_data, str) else post_data
            again = method == "get" or "Idempotency-Key" in headers
            answer = await wire.send(method.upper(), url, headers=headers, body=body, again=again)
            return answer.body, answer.status, answer.headers

    return sdk.StripeClient(key, base_addresses={"api": url}, http_client=ByWire(), max_network_retries=0)
