"""PayPal by its REST API (https://developer.paypal.com/api/subscriptions/v1): subscriptions, their sales, refunds, disputes.

    POST /v1/oauth2/token                             client credentials → a bearer for hours
    POST /v1/billing/subscriptions                    the checkout: links `approve`
    POST /v1/billing/subscriptions/{id}/revise        another plan from the next period on: links `approve`
    POST /v1/billing/subscriptions/{id}/cancel        at once; there is no end with the period
    POST /v1/billing/subscriptions/{id}/activate      a suspended one goes on
    POST /v1/billing/subscriptions/{id}/capture       the outstanding balance, once more
    POST /v1/payments/sale/{id}/refund
    GET  /v1/billing/subscriptions/{id}, /v1/payments/sale/{id}, /v1/payments/refund/{id}, /v1/customer/disputes/{id}
    GET  /v1/customer/disputes?disputed_transaction_id
    GET  /v1/notifications/webhooks-events?start_time&end_time&page_size, /v1/notifications/webhooks-events/{id}

Payments of subscriptions are sales there, with links to /v1/payments; so these are followed although /v1/payments is no
longer for new one-time payments. Every POST carries a PayPal-Request-Id, by which PayPal knows a request that comes again.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

from portico.control.billing import provider_errors as errors
from portico.control.billing import refund_words
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
from portico.control.billing.provider_http import Answer, Limits, Wire
from portico.errors import Problem
from portico.kit import money
from portico.kit.clock import utcnow
from portico.settings import ApiSettings

_CAN: Final[frozenset[Ability]] = frozenset(
    {"change_at_period_end", "change_needs_consent", "resume", "events", "retries", "returns", "collect"}
)
_SUBSCRIPTION: Final = "/v1/billing/subscriptions"
#: Currencies that PayPal takes without decimals, whatever ISO 4217 says.
NO_DECIMALS: Final = frozenset({"HUF", "JPY", "TWD"})
#: Characters of a PayPal-Request-Id; longer keys are digested.
_KEY_CHARS: Final = 38
#: Seconds before its end at which a bearer is replaced.
_BEARER_MARGIN: Final = 60.0
_ENDED: Final = frozenset({"CANCELLED", "EXPIRED"})
#: PayPal keeps events so long.
_EVENT_DAYS: Final = 30
_FOLDERS: Final[Mapping[str, str]] = {
    "subscription": f"{_SUBSCRIPTION}/{{}}",
    "payment": "/v1/payments/sale/{}",
    "refund": "/v1/payments/refund/{}",
    "dispute": "/v1/customer/disputes/{}",
    "price": "/v1/billing/plans/{}",
    "event": "/v1/notifications/webhooks-events/{}",
}
_PREFIXES: Final[tuple[tuple[str, Kind], ...]] = (
    ("I-", "subscription"), ("P-", "price"), ("WH-", "event"), ("PP-", "dispute"),
)  # fmt: skip
_DECLINED: Final = frozenset({"INSTRUMENT_DECLINED", "PAYER_CANNOT_PAY", "TRANSACTION_REFUSED", "PAYMENT_DENIED"})


class PayPal:
    """The adapter. See ``provider.Provider``."""

    name: Name = "paypal"
    can = _CAN

    def __init__(self, settings: ApiSettings, now: Callable[[], datetime] = utcnow) -> None:
        if settings.paypal_client_secret is None:
            raise errors.unconfigured(self.name)
        self.account, self.livemode = settings.paypal_account, settings.billing_livemode
        self._brand, self._now = settings.service_name, now
        self._page_size, self._pages = min(300, settings.billing_list_page), settings.billing_list_pages
        pair = f"{settings.paypal_client_id}:{settings.paypal_client_secret.reveal()}".encode()
        self._basic = f"Basic {base64.b64encode(pair).decode()}"
        self._bearer, self._bearer_until, self._signing_in = "", datetime.min.replace(tzinfo=UTC), asyncio.Lock()
        self.wire = Wire(self.name, settings.paypal_api_url, Limits.of(settings), settings.billing_ca_file)

    async def close(self) -> None:
        await self.wire.close()

    # -- what is bought

    async def checkout(self, order: Order, *, key: str) -> Checkout:
        body: dict[str, Any] = {
            "plan_id": order.price,
            "quantity": str(order.quantity),
            "custom_id": order.reference,
            "application_context": {
                "brand_name": self._brand[:127],
                "shipping_preference": "NO_SHIPPING",
                "user_action": "SUBSCRIBE_NOW",
                "return_url": order.success_url,
                "cancel_url": order.cancel_url,
            },
        }
        if order.email:
            body["subscriber"] = {"email_address": order.email}
        found = await self._ask("POST", _SUBSCRIPTION, body, key=key)
        ref, url = found.get("id"), _link(found, "approve")
        if not isinstance(ref, str) or url is None:
            raise errors.unreadable(self.name, "a subscription without id or page")
        return Checkout(ref, url, None, ref, None)

    async def close_page(self, checkout_ref: str, *, key: str) -> None:
        raise errors.unsupported(self.name, "take back a page; it ends what was approved there")

    async def change(self, subscription_ref: str, price: str, *, when: When, return_url: str = "", key: str) -> Change:
        if when == "now":
            raise errors.unsupported(self.name, "change a plan at once; it changes with the next period")
        current = await self.fetch(subscription_ref, "subscription")
        if current.get("plan_id") == price:
            return Change("done")
        body: dict[str, Any] = {"plan_id": price}
        if return_url:
            body["application_context"] = {
                "brand_name": self._brand[:127],
                "shipping_preference": "NO_SHIPPING",
                "return_url": return_url,
                "cancel_url": return_url,
            }
        found = await self._ask("POST", f"{_where(subscription_ref, 'subscription')}/revise", body, key=key)
        url = _link(found, "approve")
        return Change("needs_consent", url) if url else Change("scheduled")

    async def cancel(self, subscription_ref: str, *, at_period_end: bool, reason: str, key: str) -> State:
        if at_period_end:
            raise errors.unsupported(self.name, "end a subscription with its period; it ends at once")
        return await self._turn(subscription_ref, "cancel", reason, _ENDED, key)

    async def resume(self, subscription_ref: str, *, key: str) -> State:
        return await self._turn(subscription_ref, "activate", "Resumed", frozenset({"ACTIVE"}), key)

    async def _turn(self, ref: str, verb: str, reason: str, there: frozenset[str], key: str) -> State:
        """Call a verb of a subscription; being there already is as good."""
        try:
            await self._ask(
                "POST",
                f"{_where(ref, 'subscription')}/{verb}",
                {"reason": errors.words(reason)[:127] or "Requested"},
                key=key,
            )
        except Problem as problem:
            if problem.code != "billing.provider_refused":
                raise
            found = await self.fetch(ref, "subscription")
            if found.get("status") not in there:
                raise problem from None
        else:
            found = await self.fetch(ref, "subscription")
        return State(ref, str(found.get("status")), False)

    async def refund(
        self, payment_ref: str, *, amount_minor: int | None, currency: str, reason: str, key: str
    ) -> Refund:
        body: dict[str, Any] = {"reason": errors.words(reason)[:30]}
        if amount_minor is not None:
            try:
                total = money.decimal_text(amount_minor, currency, 0 if currency in NO_DECIMALS else None)
            except money.MoneyError as err:
                raise Problem("billing.amount_invalid", f"PayPal cannot give that back: {err}") from None
            body["amount"] = {"total": total, "currency": currency}
        found = await self._ask("POST", f"{_where(payment_ref, 'payment')}/refund", body, key=key)
        said = str(found.get("state") or found.get("status")).lower()
        status = refund_words.status_of(self.name, refund_words.PAYPAL, said)
        amount = found.get("amount")
        try:
            value, code = _amount(amount if isinstance(amount, dict) else {})
        except (money.MoneyError, KeyError):
            raise errors.unreadable(self.name, "a refund without an amount") from None
        return Refund(str(found.get("id")), status, abs(value), code)

    async def refund_made(self, payment_ref: str, *, key: str) -> Refund | None:
        return None  # it knows a PayPal-Request-Id for longer than a job is tried

    async def collect(
        self, subscription_ref: str, invoice_ref: str | None, *, amount_minor: int, currency: str, key: str
    ) -> Collected:
        info = (await self.fetch(subscription_ref, "subscription")).get("billing_info")
        balance = info.get("outstanding_balance") if isinstance(info, dict) else None
        try:
            open_minor, code = _amount(balance) if isinstance(balance, dict) else (0, currency)
        except (money.MoneyError, KeyError):
            raise errors.unreadable(self.name, "an outstanding balance without an amount") from None
        if open_minor <= 0 or code != currency:
            return "nothing"
        value = money.decimal_text(open_minor, code, 0 if code in NO_DECIMALS else None)
        body = {
            "note": "A payment that failed", "capture_type": "OUTSTANDING_BALANCE",
            "amount": {"currency_code": code, "value": value},
        }  # fmt: skip
        try:
            await self._ask("POST", f"{_where(subscription_ref, 'subscription')}/capture", body, key=key)
        except Problem as problem:
            if problem.code != "billing.payment_declined":
                raise
            return "declined"
        return "paid"

    async def charge(self, charge: Charge, *, key: str) -> str:
        raise errors.unsupported(self.name, "charge anything beside the plan")

    async def portal(self, customer_ref: str, return_url: str, *, key: str) -> str:
        raise errors.unsupported(self.name, "show a page of ours; customers look after payments in their account")

    # -- what is there

    async def fetch(self, ref: str, kind: Kind | None = None) -> Mapping[str, Any]:
        named: Kind = (
            kind if kind is not None else next((of for prefix, of in _PREFIXES if ref.startswith(prefix)), "payment")
        )
        return await self._ask("GET", _where(ref, named), ref=ref)

    async def authority(self, body: Mapping[str, Any]) -> Fetched:
        at, objects = self._now(), dict[str, Mapping[str, Any]]()
        kind, found = str(body.get("event_type")), body.get("resource")
        resource: Mapping[str, Any] = found if isinstance(found, dict) else {}
        subscription, sale = None, None
        if kind.startswith("BILLING.SUBSCRIPTION."):
            subscription = resource.get("id")
        elif kind == "PAYMENT.SALE.REFUNDED":
            await self._put(objects, "refund", resource.get("id"))
            sale = objects.get("refund", {}).get(
                "sale_id"
            )  # not the body's word: whose money it was is believed of nobody
        elif kind.startswith("PAYMENT.SALE."):
            sale = resource.get("sale_id") or resource.get("id")
            if kind == "PAYMENT.SALE.REVERSED":
                await self._put(objects, "dispute", await self._dispute_of(sale))
        elif kind.startswith("CUSTOMER.DISPUTE."):
            await self._put(objects, "dispute", resource.get("dispute_id"))
            sale = _disputed(objects.get("dispute", resource))
        if sale:
            await self._put(objects, "payment", sale)
            subscription = objects.get("payment", {}).get("billing_agreement_id")
        if subscription:
            await self._put(objects, "subscription", subscription)
        return Fetched(at, objects)

    async def _dispute_of(self, sale: Any) -> str | None:
        """The dispute about a sale: what a reversal takes is what was disputed, and not what a refund had given back before."""
        if not isinstance(sale, str) or not sale:
            return None
        page = await self._ask("GET", f"/v1/customer/disputes?{urlencode({'disputed_transaction_id': sale})}")
        items = page.get("items")
        found = [one.get("dispute_id") for one in items if isinstance(one, dict)] if isinstance(items, list) else []
        # The oldest: the sale has one effect of each kind, whatever is disputed of it again.
        return next((one for one in reversed(found) if isinstance(one, str)), None)

    async def _put(self, objects: dict[str, Mapping[str, Any]], kind: Kind, ref: Any) -> None:
        if not isinstance(ref, str) or not ref:
            return
        try:
            objects[kind] = await self.fetch(ref, kind)
        except Problem as problem:
            if problem.code != "billing.provider_object_missing":
                raise

    async def list_events(self, since: datetime, until: datetime | None = None) -> AsyncIterator[Mapping[str, Any]]:
        end = until or self._now()
        start = max(since, end - timedelta(days=_EVENT_DAYS))
        query = {"start_time": _text(start), "end_time": _text(end), "page_size": self._page_size}
        where = f"/v1/notifications/webhooks-events?{urlencode(query)}"
        for _ in range(self._pages):
            page = await self._ask("GET", where)
            events = page.get("events")
            for one in events if isinstance(events, list) else []:
                if isinstance(one, dict):
                    yield one
            further = self._own(_link(page, "next"))
            if further is None:
                return
            where = further
        raise errors.unreadable(self.name, "the list of events has no end (billing_list_pages)")

    def _own(self, link: str | None) -> str | None:
        """The path of a link to a further page: PayPal names itself by more than one host, and our keys go to the one we know."""
        if link is None:
            return None
        parts = urlsplit(link)
        if not parts.path.startswith("/v1/notifications/webhooks-events"):
            raise errors.unreadable(self.name, "its next page is elsewhere")
        return f"{parts.path}?{parts.query}"

    # -- requests

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, key: str = "", ref: str = ""
    ) -> dict[str, Any]:
        sent = json.dumps(body).encode() if body is not None else None
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Prefer": "return=representation"}
        if key:
            headers["PayPal-Request-Id"] = (
                key if len(key) <= _KEY_CHARS else hashlib.sha256(key.encode()).hexdigest()[:_KEY_CHARS]
            )
        answer = await self._sent(method, path, headers, sent, bool(key))
        if answer.status == 401:  # a bearer may end before its time
            self._bearer = ""
            answer = await self._sent(method, path, headers, sent, bool(key))
        if answer.status >= 400:
            raise self._refusal(answer, ref)
        return answer.document(self.name)

    async def _sent(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, keyed: bool
    ) -> Answer:
        authorization = f"Bearer {await self._sign_in()}"
        return await self.wire.send(
            method, path, headers={**headers, "Authorization": authorization}, body=body, again=keyed or method == "GET"
        )

    async def _sign_in(self) -> str:
        async with self._signing_in:
            if not self._bearer or self._now() >= self._bearer_until:
                answer = await self.wire.send(
                    "POST",
                    "/v1/oauth2/token",
                    headers={"Authorization": self._basic, "Content-Type": "application/x-www-form-urlencoded"},
                    body=b"grant_type=client_credentials",
                    again=True,
                )
                if answer.status >= 400:
                    raise errors.credentials(self.name, answer.status)
                found = answer.document(self.name)
                token, life = found.get("access_token"), found.get("expires_in")
                if not isinstance(token, str) or not token.isascii():
                    raise errors.unreadable(self.name, "a sign-in without a token")
                seconds = float(life) if isinstance(life, int) else 300.0
                self._bearer = token
                self._bearer_until = self._now() + timedelta(seconds=max(1.0, seconds - _BEARER_MARGIN))
            return self._bearer

    def _refusal(self, answer: Answer, ref: str) -> Problem:
        found = answer.document(self.name)
        details = found.get("details")
        first = details[0] if isinstance(details, list) and details and isinstance(details[0], dict) else {}
        code = str(first.get("issue") or found.get("name") or "")
        message = str(first.get("description") or found.get("message") or "")
        if answer.status in (401, 403):
            return errors.credentials(self.name, answer.status)
        if answer.status == 404:
            return errors.missing(self.name, ref or "such object")
        if code in ("DUPLICATE_REQUEST_ID", "PAYPAL_REQUEST_ID_MISMATCH"):
            return errors.key_reused(self.name)
        if answer.status == 409:
            return errors.busy(self.name, 409)
        if code in _DECLINED:
            return errors.declined(self.name, code, message)
        return errors.refused(self.name, answer.status, code, message)


def _where(ref: str, kind: str) -> str:
    template = _FOLDERS.get(kind)
    if template is None:
        raise errors.unsupported("paypal", f"show a {kind}")
    return template.format(quote(ref, safe=""))


def _link(found: Mapping[str, Any], rel: str) -> str | None:
    links = found.get("links")
    for link in links if isinstance(links, list) else []:
        if isinstance(link, dict) and link.get("rel") == rel and isinstance(link.get("href"), str):
            return str(link["href"])
    return None


def _disputed(dispute: Mapping[str, Any]) -> str | None:
    """The sale that a dispute is about."""
    found = dispute.get("disputed_transactions")
    first = found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else {}
    ref = first.get("seller_transaction_id")
    return ref if isinstance(ref, str) else None


def _amount(found: Mapping[str, Any]) -> tuple[int, str]:
    code = money.currency_code(str(found.get("currency") or found["currency_code"]))
    return money.minor(str(found.get("total") or found["value"]), code), code


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
