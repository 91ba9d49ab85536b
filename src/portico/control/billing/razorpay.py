"""Razorpay by its REST API (https://razorpay.com/docs/api/): subscriptions, their payments, refunds, settlements.

    POST  /v1/subscriptions                       the checkout: a subscription with a page (`short_url`)
    GET   /v1/subscriptions?plan_id&from&count    one that was made before under the same key (`notes.key`)
    PATCH /v1/subscriptions/{id}                  another plan: `schedule_change_at` now | cycle_end
    GET   /v1/subscriptions/{id}/retrieve_scheduled_changes
    POST  /v1/subscriptions/{id}/cancel           `cancel_at_cycle_end` 0 | 1
    POST  /v1/subscriptions/{id}/resume           `resume_at` now
    POST  /v1/subscriptions/{id}/addons           what is charged beside the plan, with the next period
    GET   /v1/addons?from&count&skip              one that was made before (its description ends with our reference)
    POST  /v1/payments/{id}/refund                with X-Refund-Idempotency
    GET   /v1/{subscriptions|payments|invoices|refunds|disputes|settlements|customers|plans}/{id}
    GET   /v1/{subscriptions|payments|refunds|settlements}?from&to&count&skip

Only refunds have idempotency keys there. So a checkout and a charge look for what was made before, and changes look at the
subscription first: what is so already is not asked for again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import quote, urlencode

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
from portico.kit.clock import utcnow
from portico.settings import ApiSettings

_CAN: Final[frozenset[Ability]] = frozenset(
    {"change_now", "change_at_period_end", "cancel_at_period_end", "resume", "retries", "close_page", "charge"}
)
_FOLDERS: Final = {
    "sub": "subscriptions", "pay": "payments", "inv": "invoices", "rfnd": "refunds", "disp": "disputes",
    "setl": "settlements", "cust": "customers", "plan": "plans", "order": "orders",
}  # fmt: skip
_ENDED: Final = frozenset({"cancelled", "completed", "expired"})
#: What X-Refund-Idempotency may hold.
_KEY: Final = re.compile(r"[A-Za-z0-9_-]{10,64}")
#: Characters of an item's name.
_ITEM_CHARS: Final = 80
#: Seconds that a checkout is looked for which the same key may have made.
_LOOK_BACK: Final = timedelta(days=2)


class Razorpay:
    """The adapter. See ``provider.Provider``."""

    name: Name = "razorpay"
    can = _CAN

    def __init__(self, settings: ApiSettings, now: Callable[[], datetime] = utcnow) -> None:
        if settings.razorpay_key_secret is None:
            raise errors.unconfigured(self.name)
        self.account, self.livemode = settings.razorpay_account, settings.billing_livemode
        self._periods, self._page_size = settings.razorpay_periods, min(100, settings.billing_list_page)
        self._pages, self._checkout_life = settings.billing_list_pages, settings.razorpay_checkout_seconds
        self._now = now
        pair = f"{settings.razorpay_key_id}:{settings.razorpay_key_secret.reveal()}".encode()
        self._headers = {
            "Authorization": f"Basic {base64.b64encode(pair).decode()}",
            "Content-Type": "application/json",
            "Accept": "application/json",
        }
        self.wire = Wire(self.name, settings.razorpay_api_url, Limits.of(settings), settings.billing_ca_file)

    async def close(self) -> None:
        await self.wire.close()

    # -- what is bought

    async def checkout(self, order: Order, *, key: str) -> Checkout:
        found = await self._made_before(order, key)
        if found is None:
            until = int(self._now().timestamp()) + self._checkout_life
            body: dict[str, Any] = {
                "plan_id": order.price,
                "total_count": self._periods,
                "quantity": order.quantity,
                "customer_notify": 1,
                "expire_by": until,
                "notes": {"reference": order.reference, "key": key},
            }
            if order.trial_days:
                body["start_at"] = until + order.trial_days * 86_400
            if order.email:
                body["notify_info"] = {"notify_email": order.email}
            found = await self._ask("POST", "/v1/subscriptions", body)
        ref, url = _text(found, "id"), _text(found, "short_url")
        if not ref or not url:
            raise errors.unreadable(self.name, "a subscription without id or page")
        return Checkout(ref, url, found.get("customer_id"), ref, _moment(found.get("expire_by")))

    async def _made_before(self, order: Order, key: str) -> Mapping[str, Any] | None:
        since = int((self._now() - _LOOK_BACK).timestamp())
        async for one in self._list("subscriptions", {"plan_id": order.price, "from": since}):
            notes = one.get("notes")
            if isinstance(notes, dict) and notes.get("key") == key:
                return one
        return None

    async def close_page(self, checkout_ref: str, *, key: str) -> None:
        # The page is the subscription's, which nobody has paid for yet.
        found = await self.fetch(checkout_ref)
        if found.get("status") != "created":
            raise errors.unsupported(self.name, f"close the page of a subscription that is {found.get('status')}")
        await self.cancel(checkout_ref, at_period_end=False, reason="", key=key)

    async def change(self, subscription_ref: str, price: str, *, when: When, return_url: str = "", key: str) -> Change:
        current = await self.fetch(subscription_ref)
        if when == "now":
            if current.get("plan_id") != price:
                await self._update(subscription_ref, price, "now")
            return Change("done")
        if current.get("has_scheduled_changes"):
            planned = await self._ask("GET", f"{_path(subscription_ref)}/retrieve_scheduled_changes")
            if planned.get("plan_id") == price:
                return Change("scheduled")
        await self._update(subscription_ref, price, "cycle_end")
        return Change("scheduled")

    async def _update(self, ref: str, price: str, when: str) -> None:
        await self._ask("PATCH", _path(ref), {"plan_id": price, "schedule_change_at": when, "customer_notify": 1})

    async def cancel(self, subscription_ref: str, *, at_period_end: bool, reason: str, key: str) -> State:
        found: Mapping[str, Any]
        try:
            found = await self._ask(
                "POST", f"{_path(subscription_ref)}/cancel", {"cancel_at_cycle_end": int(at_period_end)}
            )
        except Problem as problem:
            if problem.code not in ("billing.provider_refused", "billing.provider_unreachable"):
                raise
            found = await self.fetch(subscription_ref)
            if found.get("status") not in _ENDED:
                raise problem from None
        status = str(found.get("status"))
        return State(subscription_ref, status, at_period_end and status not in _ENDED)

    async def resume(self, subscription_ref: str, *, key: str) -> State:
        current: Mapping[str, Any] = await self.fetch(subscription_ref)
        if current.get("status") == "paused":
            current = await self._ask("POST", f"{_path(subscription_ref)}/resume", {"resume_at": "now"})
        elif current.get("status") != "active":
            raise errors.unsupported(self.name, f"resume a subscription that is {current.get('status')}")
        # An active one may be about to end with its period. Razorpay neither says so nor takes it back.
        elif not current.get("paused_at"):
            raise errors.unsupported(self.name, "take back a cancellation; buy again when the period has ended")
        return State(subscription_ref, str(current.get("status")), False)

    async def refund(
        self, payment_ref: str, *, amount_minor: int | None, currency: str, reason: str, key: str
    ) -> Refund:
        body: dict[str, Any] = {"speed": "normal", "notes": {"reason": errors.words(reason), "key": key}}
        if amount_minor is not None:
            body["amount"] = amount_minor
        safe = key if _KEY.fullmatch(key) else hashlib.sha256(key.encode()).hexdigest()
        found = await self._ask(
            "POST", f"{_path(payment_ref)}/refund", body, headers={"X-Refund-Idempotency": safe}, again=True
        )
        return self._refund(found)

    async def refund_made(self, payment_ref: str, *, key: str) -> Refund | None:
        async for one in self._list(f"payments/{quote(payment_ref, safe='')}/refunds", {}):
            notes = one.get("notes")
            if isinstance(notes, dict) and notes.get("key") == key:
                return self._refund(one)
        return None

    def _refund(self, found: Mapping[str, Any]) -> Refund:
        status = refund_words.status_of(self.name, refund_words.RAZORPAY, str(found.get("status")))
        amount, code = found.get("amount"), found.get("currency")
        if not isinstance(amount, int) or not isinstance(code, str):
            raise errors.unreadable(self.name, "a refund without an amount")
        return Refund(_text(found, "id"), status, amount, code.upper())

    async def collect(
        self, subscription_ref: str, invoice_ref: str | None, *, amount_minor: int, currency: str, key: str
    ) -> Collected:
        raise errors.unsupported(self.name, "try a payment again when it is asked to; it does so by itself")

    async def charge(self, charge: Charge, *, key: str) -> str:
        if charge.at_once:
            raise errors.unsupported(self.name, "make an invoice beside those of a subscription")
        async for one in self._list("addons", {"from": int((charge.since - _LOOK_BACK).timestamp())}):
            item = one.get("item")
            about = _text(item, "description") if isinstance(item, dict) else ""
            if one.get("subscription_id") == charge.subscription_ref and about.endswith(f"({charge.reference})"):
                return _text(one, "id")
        item = {
            "name": charge.description[:_ITEM_CHARS], "amount": charge.amount_minor, "currency": charge.currency,
            "description": f"{charge.description} ({charge.reference})",
        }  # fmt: skip
        made = _text(
            await self._ask("POST", f"{_path(charge.subscription_ref)}/addons", {"item": item, "quantity": 1}), "id"
        )
        if not made:
            raise errors.unreadable(self.name, "an add-on without an id")
        return made

    async def portal(self, customer_ref: str, return_url: str, *, key: str) -> str:
        raise errors.unsupported(self.name, "show a page on which customers look after how they pay")

    # -- what is there

    async def fetch(self, ref: str, kind: Kind | None = None) -> Mapping[str, Any]:
        return await self._ask("GET", _path(ref), ref=ref)

    async def authority(self, body: Mapping[str, Any]) -> Fetched:
        at, objects = self._now(), dict[str, Mapping[str, Any]]()
        payload = body.get("payload")
        payload = payload if isinstance(payload, dict) else {}
        refs: dict[str, Any] = {kind: _entity_id(payload, kind) for kind in ("subscription", "payment", "refund")}
        refs["dispute"], refs["payout"] = _entity_id(payload, "payment.dispute"), _entity_id(payload, "settlement")
        refs["dispute"] = refs["dispute"] or _entity_id(payload, "dispute")
        refs["invoice"] = _entity_id(payload, "invoice")
        for kind in ("refund", "dispute"):
            if refs[kind] and (found := await self._maybe(refs[kind])) is not None:
                objects[kind] = found
                refs["payment"] = refs["payment"] or found.get("payment_id")
        if refs["payment"] and (found := await self._maybe(refs["payment"])) is not None:
            objects["payment"] = found
            refs["invoice"] = found.get("invoice_id") or refs["invoice"]
        if refs["invoice"] and (found := await self._maybe(refs["invoice"])) is not None:
            objects["invoice"] = found
            refs["subscription"] = found.get("subscription_id") or refs["subscription"]
        for kind in ("subscription", "payout"):
            if refs[kind] and (found := await self._maybe(refs[kind])) is not None:
                objects[kind] = found
        return Fetched(at, objects)

    async def _maybe(self, ref: Any) -> Mapping[str, Any] | None:
        if not isinstance(ref, str):
            return None
        try:
            return await self.fetch(ref)
        except Problem as problem:
            if problem.code == "billing.provider_object_missing":
                return None
            raise

    async def list_events(self, since: datetime, until: datetime | None = None) -> AsyncIterator[Mapping[str, Any]]:
        window = {"from": int(since.timestamp()), "to": int((until or self._now()).timestamp())}
        # A list of subscriptions is one by the time they were made, and what became of an old one is news too.
        async for one in self._list("subscriptions", {}):
            yield self._event(f"subscription.{_WORDS.get(str(one.get('status')), 'updated')}", "subscription", one)
        async for one in self._list("payments", window):
            if one.get("invoice_id") and one.get("status") in ("captured", "refunded", "failed"):
                word = "failed" if one.get("status") == "failed" else "captured"
                yield self._event(f"payment.{word}", "payment", one)
        async for one in self._list("refunds", window):
            word = {"processed": "processed", "failed": "failed"}.get(str(one.get("status")), "created")
            yield self._event(f"refund.{word}", "refund", one)
        async for one in self._list("settlements", window):
            if one.get("status") == "processed":
                yield self._event("settlement.processed", "settlement", one)

    def _event(self, name: str, kind: str, entity: Mapping[str, Any]) -> Mapping[str, Any]:
        """An object of a list as a webhook would have told of it; ``id`` stands for the header with the event's id."""
        told = json.dumps(entity, sort_keys=True, separators=(",", ":")).encode()
        return {
            "id": f"list:{entity.get('id')}:{hashlib.sha256(told).hexdigest()[:24]}",
            "entity": "event",
            "account_id": self.account,
            "event": name,
            "contains": [kind],
            "payload": {kind: {"entity": entity}},
            "created_at": entity.get("created_at"),
        }

    async def _list(self, folder: str, query: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
        for page in range(self._pages):
            asked = urlencode({**query, "count": self._page_size, "skip": page * self._page_size})
            found = (await self._ask("GET", f"/v1/{folder}?{asked}")).get("items")
            if not isinstance(found, list):
                raise errors.unreadable(self.name, f"a list of {folder} without items")
            for one in found:
                if isinstance(one, dict):
                    yield one
            if len(found) < self._page_size:
                return
        raise errors.unreadable(self.name, f"the list of {folder} has no end (billing_list_pages)")

    # -- requests

    async def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        ref: str = "",
        again: bool = False,
    ) -> dict[str, Any]:
        sent = json.dumps(body).encode() if body is not None else None
        answer = await self.wire.send(
            method, path, headers={**self._headers, **(headers or {})}, body=sent, again=again or method == "GET"
        )
        if answer.status >= 400:
            raise self._refusal(answer, ref)
        return answer.document(self.name)

    def _refusal(self, answer: Answer, ref: str) -> Problem:
        found = answer.document(self.name).get("error")
        error = found if isinstance(found, dict) else {}
        code, description = str(error.get("code") or ""), str(error.get("description") or "")
        if answer.status in (401, 403):
            return errors.credentials(self.name, answer.status)
        # It answers 400, not 404, for an id that it does not know.
        if ref and (answer.status == 404 or "does not exist" in description or "not a valid id" in description):
            return errors.missing(self.name, ref)
        if "idempotency key" in description:
            return errors.key_reused(self.name)
        if answer.status == 409:
            return errors.busy(self.name, 409)
        if error.get("source") in ("customer", "bank", "issuer") or code == "GATEWAY_ERROR":
            return errors.declined(self.name, str(error.get("reason") or code), description)
        return errors.refused(self.name, answer.status, str(error.get("reason") or code), description)


_WORDS: Final = {
    "created": "updated",
    "authenticated": "authenticated",
    "active": "activated",
    "pending": "pending",
    "halted": "halted",
    "cancelled": "cancelled",
    "completed": "completed",
    "paused": "paused",
}


def _path(ref: str) -> str:
    folder = _FOLDERS.get(ref.partition("_")[0])
    if folder is None:
        raise errors.missing("razorpay", ref)
    return f"/v1/{folder}/{quote(ref, safe='')}"


def _entity_id(payload: Mapping[str, Any], kind: str) -> Any:
    part = payload.get(kind)
    entity = part.get("entity") if isinstance(part, dict) else None
    return entity.get("id") if isinstance(entity, dict) else None


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    return value if isinstance(value, str) else ""


def _moment(value: Any) -> datetime | None:
    return datetime.fromtimestamp(value, UTC) if isinstance(value, int) and value > 0 else None
