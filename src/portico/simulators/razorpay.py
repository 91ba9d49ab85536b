"""Razorpay, as much of it as selling subscriptions needs: its API, its payment page, its webhooks, its settlements.

    async with RazorpaySimulator(webhook_url=…, webhook_secret="…") as razorpay:
        httpx.get(f"{razorpay.url}/v1/plans", auth=(razorpay.key_id, razorpay.key_secret))

Paths, parameters, shapes and ids are those of razorpay.com/docs/api. A webhook's signature covers its body and
nothing else: neither
``x-razorpay-event-id`` nor a time.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from portico.simulators import billing_pages as pages
from portico.simulators import razorpay_books as books
from portico.simulators.billing_delivery import Endpoint, Manner, Message
from portico.simulators.billing_server import Card, ProviderSimulator, Refused, card_of
from portico.simulators.billing_world import Doc, Offer, amount, fixed, iso, public, token

#: What the platform's plans cost here when nobody says otherwise.
OFFERS: Final = (Offer("pro", "Pro", 149_900, "INR"), Offer("team", "Team", 799_900, "INR"))
_LOOK: Final = pages.Look("Razorpay", "#1d5fd1", "Pay")
_MAX_PAGE: Final = 100
_READABLE: Final = (
    "plans",
    "customers",
    "subscriptions",
    "payments",
    "refunds",
    "invoices",
    "settlements",
    "disputes",
    "addons",
)
_CHANGEABLE: Final = ("created", "authenticated", "active", "pending", "halted", "paused")


class RazorpaySimulator(ProviderSimulator):
    """One account of Razorpay in test mode."""

    name = "razorpay"
    look = _LOOK
    # For a day with growing pauses; Razorpay then switches the webhook off.
    again_seconds: ClassVar[Sequence[float]] = (10, 60, 300, 1800, 7200, 18_000, 28_800, 28_800)
    webhook_timeout: ClassVar[float] = 5.0

    def __init__(
        self, *, key_id: str = "", key_secret: str = "", offers: Sequence[Offer] = OFFERS, **given: Any
    ) -> None:
        self.account = "acc_" + fixed(14, "account")
        super().__init__(offers=offers, **given)
        self.key_id = self.world.kept("key_id", key_id, lambda: "rzp_test_" + token(14))
        self.key_secret = self.world.kept("key_secret", key_secret, lambda: token(24))
        self.books = books.RazorpayBooks(self.world, self._emit)

    def prepare(self) -> None:
        for offer in self.offers.values():
            if self.world.get("plans", books.plan_id(offer)) is None:
                self.world.put("plans", books.plan_of(offer, self.clock.now))

    def held(self) -> list[pages.Held]:
        return [
            pages.Held(
                sub["id"],
                self.books.plan(sub)["item"]["name"],
                sub["status"],
                iso(sub["current_end"]) if sub["current_end"] else "",
            )
            for sub in self.world.all("subscriptions")
        ]

    def new_webhook_secret(self) -> str:
        return token(24)

    def settings(self) -> dict[str, str]:
        return {
            "razorpay_key_id": self.key_id,
            "razorpay_key_secret": self.key_secret,
            "razorpay_webhook_secret": self.webhook_secret,
            "razorpay_account": self.account,
            "razorpay_plans": self.prices(),
            "razorpay_api_url": self.url,
        }

    def price(self, plan: str) -> str:
        """The id at Razorpay of one of the platform's plans."""
        return books.plan_id(self.offers[plan])

    # -- webhooks ------------------------------------------------------------------------------------------------------

    def endpoint(self, url: str) -> Endpoint:
        return Endpoint("hook_" + fixed(14, url), url, self.webhook_secret)

    def sign(self, endpoint: Endpoint, message: Message, at: float, manner: Manner) -> tuple[dict[str, str], bytes]:
        """HMAC-SHA256 of the body in hex; no time is signed, so ``at`` is not used."""
        secret = endpoint.secret if manner == "right" else token(24)
        return {
            "Content-Type": "application/json",
            "User-Agent": "Razorpay-Webhook/v1",
            "X-Razorpay-Signature": hmac.new(secret.encode(), message.body, hashlib.sha256).hexdigest(),
            "X-Razorpay-Event-Id": message.id,
        }, message.body

    def _emit(self, kind: str, entities: dict[str, Doc]) -> None:
        body = {
            "entity": "event", "account_id": self.account, "event": kind, "contains": list(entities),
            "payload": {name: {"entity": public(doc)} for name, doc in entities.items()}, "created_at": self.stamp,
        }  # fmt: skip
        made = self.world.put(
            "events", {"id": token(14), "type": kind, "body": json.dumps(body, separators=(",", ":"))}
        )
        self.courier.send(Message(made["id"], kind, made["body"].encode()))

    def message(self, event: str) -> Message | None:
        doc = self.world.get("events", event)
        return None if doc is None else Message(doc["id"], doc["type"], doc["body"].encode())

    # -- what happens on request -----------------------------------------------------------------------------------------

    def next_due(self) -> tuple[float, Callable[[], None]] | None:
        return self.books.next_due()

    def pay(self, checkout: str, card: Card) -> Doc:
        sub = self._known("subscriptions", checkout)
        if sub["status"] != "created":
            raise ValueError(f"the subscription is {sub['status']}")
        if card == "declines":
            return {"paid": False, "url": sub["short_url"]}
        self.books.authenticate(sub, card)
        return {"paid": True, "url": self._back(sub)}

    def leave(self, checkout: str) -> Doc:
        return {"url": self._known("subscriptions", checkout).get("_cancel_url") or ""}

    def _back(self, sub: Doc) -> str:
        """Where Checkout's ``callback_url`` leads, with its signature of payment and subscription; empty without one."""
        url = sub.get("_callback_url")
        if not url:
            return ""
        payment = next(row for row in self.world.all("payments") if row["_subscription"] == sub["id"])
        signed = f"{payment['id']}|{sub['id']}".encode()
        query = {
            "razorpay_payment_id": payment["id"], "razorpay_subscription_id": sub["id"],
            "razorpay_signature": hmac.new(self.key_secret.encode(), signed, hashlib.sha256).hexdigest(),
        }  # fmt: skip
        return f"{url}{'&' if urlsplit(url).query else '?'}{urlencode(query)}"

    def set_card(self, subscription: str, card: Card) -> None:
        self.books.new_card(self._known("subscriptions", subscription), card)

    def dispute(self, payment: str, reason: str) -> Doc:
        found: Doc = public(self.books.dispute(self._known("payments", payment), reason))
        return found

    def conclude(self, dispute: Doc, won: bool) -> None:
        self.books.decide(dispute, won)

    def payout(self) -> Doc | None:
        found: Doc | None = public(self.books.settle())
        return found

    # -- the API -------------------------------------------------------------------------------------------------------

    def idempotency_key(self, request: Request) -> str:
        """Refunds alone have one."""
        return request.headers.get("x-refund-idempotency", "") if request.url.path.endswith("/refund") else ""

    def problem(self, status: int, text: str) -> Doc:
        code = "BAD_REQUEST_ERROR" if status < 500 else "SERVER_ERROR"
        more = {"source": "NA", "step": "NA", "reason": "NA", "metadata": {}}
        return {"error": {"code": code, "description": text} | more}

    def key_reused(self, key: str) -> Refused:
        return self._no("Different request with the same idempotency key has already been processed.")

    def _no(self, text: str, status: int = 400) -> Refused:
        return Refused(status, self.problem(status, text))

    def routes(self) -> list[BaseRoute]:
        verbs: dict[str, Callable[[Doc, str], Doc]] = {
            "customers": lambda params, _: self.books.customer(params), "subscriptions": self._create,
            "subscriptions/{ref}/cancel": self._cancel, "subscriptions/{ref}/pause": self._pause,
            "subscriptions/{ref}/resume": self._resume, "subscriptions/{ref}/cancel_scheduled_changes": self._unschedule,
            "subscriptions/{ref}/addons": self._add, "payments/{ref}/refund": self._refund, "disputes/{ref}/accept": self._accept,
        }  # fmt: skip
        made: list[BaseRoute] = [self.api(f"/v1/{path}", self._write(call), "POST") for path, call in verbs.items()]
        made += [
            self.api("/v1/subscriptions/{ref}", self._write(self._change), "PATCH"),
            self.api("/v1/settlements/recon/combined", self._recon, "GET"),
            self.api("/v1/payments/{ref}/refunds", self._refunds, "GET"),
            self.api("/v1/subscriptions/{ref}/retrieve_scheduled_changes", self._scheduled, "GET"),
            Route("/i/{code}", self._page, methods=["GET"]),
            Route("/i/{code}", self._page_sent, methods=["POST"]),
        ]
        made += [self.api(f"/v1/{kind}", self._list(kind), "GET") for kind in _READABLE]
        return made + [self.api(f"/v1/{kind}/{{ref}}", self._read(kind), "GET") for kind in _READABLE]

    def _admit(self, request: Request) -> None:
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        try:
            given = base64.b64decode(value) if scheme.lower() == "basic" else b""
        except binascii.Error:
            given = b""
        if not hmac.compare_digest(given, f"{self.key_id}:{self.key_secret}".encode()):
            raise self._no("Authentication failed", 401)

    def _write(self, call: Callable[[Doc, str], Doc]) -> Callable[[Request], Any]:
        async def handler(request: Request) -> Response:
            self._admit(request)
            try:
                params = json.loads(await request.body() or b"{}")
                if not isinstance(params, dict):
                    raise TypeError("an object is expected")
                return JSONResponse(public(call(params, request.path_params.get("ref", ""))))
            except (ValueError, KeyError, TypeError) as err:
                raise self._no(f"invalid request: {err}") from None

        return handler

    def _need(self, kind: str, ref: object) -> Doc:
        found = self.world.get(kind, ref)
        if found is None:
            raise self._no("The id provided does not exist")
        return found

    def _read(self, kind: str) -> Callable[[Request], Any]:
        async def handler(request: Request) -> Response:
            self._admit(request)
            return JSONResponse(public(self._need(kind, request.path_params["ref"])))

        return handler

    def _list(self, kind: str) -> Callable[[Request], Any]:
        async def handler(request: Request) -> Response:
            self._admit(request)
            wanted = dict(request.query_params)
            rows = [
                doc
                for doc in reversed(self.world.all(kind))
                if int(wanted.get("from", 0)) <= doc["created_at"] <= int(wanted.get("to", 1 << 40))
                and all(
                    doc.get(name) == wanted[name]
                    for name in ("subscription_id", "plan_id", "payment_id")
                    if name in wanted
                )
            ]
            return self._collection(rows, wanted)

        return handler

    def _collection(self, rows: list[Doc], wanted: dict[str, str]) -> Response:
        count, skip = int(wanted.get("count", 10)), int(wanted.get("skip", 0))
        if not 1 <= count <= (1000 if "year" in wanted else _MAX_PAGE):
            raise self._no("count is out of range")
        chosen = rows[skip : skip + count]
        return JSONResponse({"entity": "collection", "count": len(chosen), "items": public(chosen)})

    async def _refunds(self, request: Request) -> Response:
        self._admit(request)
        rows = list(self.world.where("refunds", payment_id=self._need("payments", request.path_params["ref"])["id"]))
        return self._collection(rows, dict(request.query_params))

    async def _scheduled(self, request: Request) -> Response:
        self._admit(request)
        sub = self._need("subscriptions", request.path_params["ref"])
        if not sub["_change"]:
            raise self._no("No scheduled changes exist for this subscription")
        return JSONResponse(public(sub | sub["_change"]))

    async def _recon(self, request: Request) -> Response:
        self._admit(request)
        wanted = dict(request.query_params)
        if "year" not in wanted or "month" not in wanted:
            raise self._no("year and month are needed")

        def in_time(row: Doc) -> bool:
            at = time.gmtime(row["settled_at"] or 0)
            return (at.tm_year, at.tm_mon) == (int(wanted["year"]), int(wanted["month"])) and (
                "day" not in wanted or at.tm_mday == int(wanted["day"])
            )

        return self._collection([row for row in self.books.rows() if row["settled"] and in_time(row)], wanted)

    # -- verbs -----------------------------------------------------------------------------------------------------------

    def _create(self, params: Doc, _: str) -> Doc:
        self._need("plans", params.get("plan_id"))
        if params.get("customer_id"):
            self._need("customers", params["customer_id"])
        if not 1 <= int(params["total_count"]) <= 1200:
            raise ValueError("total_count is out of range")
        for name in ("expire_by", "start_at"):
            if params.get(name):
                params[name] = self._time(name, int(params[name]))
        return self.books.create(params, self.url)

    def _time(self, name: str, at: int) -> int:
        """A time that somebody named who lives by the machine's clock, from which ours may have been set forward."""
        if time.time() < at <= self.clock.now:
            at += int(self.clock.offset)
        if at <= self.clock.now:
            raise ValueError(f"{name} lies in the past")
        return at

    def _live(self, ref: str, *states: str) -> Doc:
        sub = self._need("subscriptions", ref)
        if sub["status"] not in (states or _CHANGEABLE):
            raise self._no(f"This operation is not allowed for a subscription in {sub['status']} state")
        return sub

    def _cancel(self, params: Doc, ref: str) -> Doc:
        sub = self._live(ref)
        self.books.cancel(sub, str(params.get("cancel_at_cycle_end", 0)).lower() in ("1", "true"))
        return sub

    def _pause(self, _: Doc, ref: str) -> Doc:
        sub = self._live(ref, "active")
        self.books.pause(sub)
        return sub

    def _resume(self, _: Doc, ref: str) -> Doc:
        sub = self._live(ref, "paused")
        self.books.resume(sub)
        return sub

    def _change(self, params: Doc, ref: str) -> Doc:
        sub = self._live(ref, "authenticated", "active")
        plan = self._need("plans", params.get("plan_id", sub["plan_id"]))
        if plan["item"]["currency"] != self.books.plan(sub)["item"]["currency"]:
            raise ValueError("plans of one subscription have one currency")
        at_end = params.get("schedule_change_at", "now") == "cycle_end"
        self.books.change(sub, plan["id"], int(params.get("quantity") or sub["quantity"]), at_end)
        return sub

    def _add(self, params: Doc, ref: str) -> Doc:
        sub, item = self._live(ref, "authenticated", "active", "pending"), params["item"]
        if item["currency"] != self.books.plan(sub)["item"]["currency"]:
            raise ValueError("an add-on has the currency of the plan")
        return self.books.addon(sub, item, int(params.get("quantity", 1)))

    def _unschedule(self, _: Doc, ref: str) -> Doc:
        sub = self._live(ref)
        if not sub["has_scheduled_changes"]:
            raise self._no("No scheduled changes exist for this subscription")
        self.books.unschedule(sub)
        return sub

    def _refund(self, params: Doc, ref: str) -> Doc:
        payment = self._need("payments", ref)
        left = payment["amount"] - payment["amount_refunded"]
        amount = int(params.get("amount") or left)
        if not payment["captured"] or left == 0:
            raise self._no(
                "The payment has been fully refunded already" if payment["captured"] else "The payment is not captured"
            )
        if not 0 < amount <= left:
            raise self._no("The total refund amount is greater than the refund payment amount")
        return self.books.refund(payment, amount, params)

    def _accept(self, _: Doc, ref: str) -> Doc:
        found = self._need("disputes", ref)
        if found["status"] in ("won", "lost"):
            raise self._no("The dispute is closed")
        self.books.decide(found, won=False)
        return found

    # -- pages -----------------------------------------------------------------------------------------------------------

    def _by_code(self, request: Request) -> Doc | None:
        return next(self.world.where("subscriptions", _code=request.path_params["code"]), None)

    async def _page(self, request: Request) -> Response:
        sub = self._by_code(request)
        if sub is None:
            return pages.word(_LOOK, "There is no such page", "Go back and start again.", 404)
        # As Checkout takes them; the page of the link alone leads nowhere afterwards.
        for name in ("callback_url", "cancel_url"):
            if name in request.query_params:
                sub["_" + name] = request.query_params[name]
        if sub["status"] != "created":
            return pages.word(_LOOK, f"This subscription is {sub['status']}", "You can close this page.", 410)
        return self._offer(sub)

    def _offer(self, sub: Doc, problem: str = "") -> Response:
        item = self.books.plan(sub)["item"]
        cost = amount(self.books.price(sub), item["currency"])
        interval = {"daily": "day", "monthly": "month", "yearly": "year"}[self.books.plan(sub)["period"]]
        return pages.checkout(
            _LOOK, f"Subscribe to {item['name']}", cost, interval, f"for {sub['_email'] or 'a new customer'}", problem
        )

    async def _page_sent(self, request: Request) -> Response:
        sub = self._by_code(request)
        if sub is None or sub["status"] != "created":
            return await self._page(request)
        form = dict(parse_qsl((await request.body()).decode()))
        if form.get("act") != "pay":
            url = self.leave(sub["id"])["url"]
            return (
                RedirectResponse(url, 303) if url else pages.word(_LOOK, "Nothing was paid", "You can close this page.")
            )
        done = self.pay(sub["id"], card_of(form.get("card")))
        if not done["paid"]:
            return self._offer(sub, "Your payment was declined by the bank. Try another card.")
        return (
            RedirectResponse(done["url"], 303) if done["url"] else pages.word(_LOOK, "Paid", "You can close this page.")
        )
