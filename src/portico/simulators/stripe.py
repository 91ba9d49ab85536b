"""Stripe, as much of it as selling subscriptions needs: its API, its hosted checkout and portal, its webhooks, its payouts.

    async with StripeSimulator(webhook_url=…, webhook_secret="whsec_…") as stripe:
        client = StripeClient(stripe.secret_key, base_addresses={"api": stripe.url})

Paths, parameters, shapes and ids are those of docs.stripe.com/api; what it does not have is answered 404 as an
unknown URL. A caller gets the
shape of its ``Stripe-Version``, a webhook that of the simulator's ``api_version`` (before and after 2025-03-31).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from portico.simulators import billing_pages as pages
from portico.simulators import stripe_objects as shapes
from portico.simulators.billing_delivery import Endpoint, Manner, Message
from portico.simulators.billing_server import Card, ProviderSimulator, Refused, card_of
from portico.simulators.billing_world import Doc, amount, fixed, iso, public, token
from portico.simulators.stripe_books import CHECKOUT_SECONDS, StripeBooks
from portico.simulators.stripe_forms import flag, nested

_LOOK: Final = pages.Look("Stripe", "#4b44d6")
_INVALID: Final = "invalid_request_error"
_MAX_PAGE: Final = 100
#: Path → kind, for what can be read and listed and nothing more.
_READABLE: Final = {
    "charges": "charges", "payment_intents": "payment_intents", "refunds": "refunds", "disputes": "disputes",
    "payouts": "payouts", "balance_transactions": "balance_transactions", "prices": "prices", "products": "products",
    "customers": "customers", "subscriptions": "subscriptions", "invoices": "invoices", "events": "events",
    "invoice_payments": "invoice_payments",
    "invoiceitems": "invoiceitems", "checkout/sessions": "sessions", "subscription_schedules": "schedules",
}  # fmt: skip
#: Names of filters that are another field, or a field of the simulator's own.
_FILTERS: Final[Mapping[str, Mapping[str, str]]] = {
    "balance_transactions": {"payout": "_payout"},
    "invoices": {"subscription": "_subscription"},
    "charges": {"invoice": "_invoice"},
}
_FILTERABLE: Final = frozenset(
    [
        "customer",
        "subscription",
        "status",
        "price",
        "payment_intent",
        "charge",
        "payout",
        "source",
        "type",
        "invoice",
        "email",
        "active",
        "currency",
        "product",
    ]
)


class StripeSimulator(ProviderSimulator):
    """One account of Stripe in test mode."""

    name = "stripe"
    look = _LOOK
    again_seconds: ClassVar = (10, 60, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)

    def __init__(self, *, secret_key: str = "", api_version: str = shapes.CURRENT, **given: Any) -> None:
        self.account = "acct_1" + fixed(16, "account")
        self.api_version = api_version
        super().__init__(**given)
        self.secret_key = self.world.kept("secret_key", secret_key, lambda: "sk_test_51" + token(97))
        self.books = StripeBooks(self.world, self._emit)
        #: The idempotency key of the request in hand; ``None``: nobody asked, it happens by itself.
        self._request_key: str | None = None

    def prepare(self) -> None:
        for offer in self.offers.values():
            if self.world.get("prices", shapes.price_id(offer)) is None:
                self.world.put("products", shapes.product_of(offer, self.clock.now))
                self.world.put("prices", shapes.price_of(offer, self.clock.now))

    def held(self) -> list[pages.Held]:
        return [
            pages.Held(sub["id"], item["price"]["nickname"], sub["status"], iso(item["current_period_end"]))
            for sub in self.world.all("subscriptions")
            for item in sub["items"]["data"]
        ]

    def new_webhook_secret(self) -> str:
        return "whsec_" + token(32)

    def settings(self) -> dict[str, str]:
        return {
            "stripe_secret_key": self.secret_key,
            "stripe_webhook_secret": self.webhook_secret,
            "stripe_account": self.account,
            "stripe_prices": self.prices(),
            "stripe_api_url": self.url,
        }

    def price(self, plan: str) -> str:
        """The id of the price of one of the platform's plans."""
        return shapes.price_id(self.offers[plan])

    # -- webhooks ------------------------------------------------------------------------------------------------------

    def endpoint(self, url: str) -> Endpoint:
        return Endpoint("we_1" + fixed(23, url), url, self.webhook_secret)

    def sign(self, endpoint: Endpoint, message: Message, at: float, manner: Manner) -> tuple[dict[str, str], bytes]:
        """``t=…,v1=…`` over ``t.body`` by the secret's text as it is."""
        secret = endpoint.secret if manner == "right" else "whsec_" + token(32)
        return {
            "Content-Type": "application/json; charset=utf-8",
            "User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
            "Stripe-Signature": signature(secret, int(at), message.body),
        }, message.body

    def _emit(self, kind: str, doc: Doc, before: Doc | None) -> None:
        data: Doc = {"object": shapes.shaped(doc, self.api_version)}
        if before is not None:
            data["previous_attributes"] = shapes.shaped(before, self.api_version)
        made: Doc = {
            "id": shapes.new_id("events"), "object": "event", "api_version": self.api_version, "created": self.stamp,
            "data": data, "livemode": False, "pending_webhooks": len(self.courier.endpoints),
            "request": {
                "id": shapes.new_id("requests") if self._request_key is not None else None,
                "idempotency_key": self._request_key or None,
            },
            "type": kind,
        }  # fmt: skip
        self.world.put("events", made)
        found = self.message(made["id"])
        assert found is not None
        self.courier.send(found)

    def message(self, event: str) -> Message | None:
        doc = self.world.get("events", event)
        return None if doc is None else Message(doc["id"], doc["type"], json.dumps(public(doc), indent=2).encode())

    # -- what happens on request -----------------------------------------------------------------------------------------

    def next_due(self) -> tuple[float, Callable[[], None]] | None:
        return self.books.next_due()

    def pay(self, checkout: str, card: Card) -> Doc:
        session = self._known("sessions", checkout)
        if session["status"] != "open":
            raise ValueError(f"the checkout is {session['status']}")
        customer = self.world.get("customers", session["customer"])
        if card == "declines":
            return {"paid": False, "url": session["url"]}
        if customer is None:
            customer = self.books.customer({"email": session["customer_email"] or "buyer@example.com", "name": "Buyer"})
        customer["_card"] = card
        line = session["_line"]
        price = self._known("prices", line["price"])
        sub = self.books.subscribe(customer, price, line["quantity"], session["_metadata"], session["_trial_days"])
        invoice = self.world.kinds["invoices"][sub["latest_invoice"]]
        details = {
            "email": customer["email"],
            "name": customer["name"],
            "address": None,
            "phone": None,
            "tax_exempt": "none",
            "tax_ids": [],
        }
        session |= {
            "status": "complete", "payment_status": "paid" if invoice["amount_due"] else "no_payment_required", "url": None,
            "customer": customer["id"], "customer_details": details, "subscription": sub["id"], "invoice": invoice["id"],
        }  # fmt: skip
        self._emit("checkout.session.completed", session, None)
        return {"paid": True, "url": session["success_url"].replace("{CHECKOUT_SESSION_ID}", session["id"])}

    def leave(self, checkout: str) -> Doc:
        session = self._known("sessions", checkout)
        return {"url": session["cancel_url"] or session["success_url"]}

    def set_card(self, subscription: str, card: Card) -> None:
        self.world.kinds["customers"][self._known("subscriptions", subscription)["customer"]]["_card"] = card

    def dispute(self, payment: str, reason: str) -> Doc:
        found: Doc = public(self.books.dispute(self._charge_of(payment), reason))
        return found

    def conclude(self, dispute: Doc, won: bool) -> None:
        self.books.decide(dispute, won)

    def payout(self) -> Doc | None:
        found: Doc | None = public(self.books.payout())
        return found

    def _charge_of(self, ref: str) -> Doc:
        """A charge by its id, or by those of its payment intent or invoice."""
        intent = self.world.get("payment_intents", ref)
        invoice = self.world.get("invoices", ref)
        found = (intent or {}).get("latest_charge") or (invoice or {}).get("_charge") or ref
        return self._known("charges", found)

    # -- the API -------------------------------------------------------------------------------------------------------

    def problem(self, status: int, text: str) -> Doc:
        return shapes.error(_INVALID if status < 500 else "api_error", text)

    def key_reused(self, key: str) -> Refused:
        text = (
            f"Keys for idempotent requests can only be used with the same parameters they were first used with. ({key})"
        )
        return Refused(400, shapes.error("idempotency_error", text))

    def routes(self) -> list[BaseRoute]:
        writes: dict[str, Callable[[Doc, str], Doc]] = {
            "customers": self._create_customer, "customers/{ref}": self._update_customer,
            "checkout/sessions": self._create_session, "checkout/sessions/{ref}/expire": self._expire_session,
            "subscriptions": self._create_subscription, "subscriptions/{ref}": self._update_subscription,
            "subscriptions/{ref}/resume": self._resume_subscription, "subscription_schedules": self._create_schedule,
            "subscription_schedules/{ref}": self._update_schedule,
            "subscription_schedules/{ref}/release": self._release_schedule, "refunds": self._create_refund,
            "invoices/create_preview": self._preview, "invoices/{ref}/pay": self._pay_invoice,
            "invoices/{ref}/void": self._void_invoice, "invoices": self._create_invoice,
            "invoices/{ref}/finalize": self._finalize_invoice, "invoiceitems": self._create_item,
            "billing_portal/sessions": self._create_portal, "disputes/{ref}/close": self._close_dispute,
        }  # fmt: skip
        made: list[BaseRoute] = [self.api(f"/v1/{path}", self._write(call), "POST") for path, call in writes.items()]
        made += [self.api(f"/v1/{path}", self._list(path, kind), "GET") for path, kind in _READABLE.items()]
        made += [
            self.api("/v1/account", self._account, "GET"),
            self.api("/v1/balance", self._balance, "GET"),
            self.api("/v1/invoices/{ref}/lines", self._lines, "GET"),
            self.api("/v1/subscriptions/{ref}", self._write(self._cancel_subscription), "DELETE"),
            Route("/c/pay/{ref}", self._page, methods=["GET"]),
            Route("/c/pay/{ref}", self._page_sent, methods=["POST"]),
            Route("/p/session/{ref}", self._portal_page, methods=["GET"]),
            Route("/p/session/{ref}", self._portal_sent, methods=["POST"]),
        ]
        return made + [self.api(f"/v1/{path}/{{ref}}", self._read(kind), "GET") for path, kind in _READABLE.items()]

    def _admit(self, request: Request) -> str:
        """Who does not have the key is refused; the version of the answer."""
        given = request.headers.get("authorization", "")
        scheme, _, value = given.partition(" ")
        if scheme.lower() == "basic":
            try:
                value = base64.b64decode(value).decode().partition(":")[0]
            except (binascii.Error, UnicodeDecodeError):
                value = ""
        if not hmac.compare_digest(value.encode(), self.secret_key.encode()):
            text = f"Invalid API Key provided: {value[:8]}***" if value else "You did not provide an API key."
            raise Refused(401, shapes.error(_INVALID, text))
        return request.headers.get("stripe-version", self.api_version)

    def _write(self, call: Callable[[Doc, str], Doc]) -> Callable[[Request], Any]:
        async def handler(request: Request) -> Response:
            version = self._admit(request)
            try:
                text = (await request.body()).decode() or request.url.query
                params = nested(parse_qsl(text, keep_blank_values=True))
                self._request_key = self.idempotency_key(request)
                doc = call(params, request.path_params.get("ref", ""))
            except (ValueError, KeyError, TypeError, AttributeError) as err:
                raise Refused(400, shapes.error(_INVALID, f"invalid parameters: {err}", "parameter_invalid")) from None
            finally:
                self._request_key = None
            return self._answer(doc, version, params)

        return handler

    def _answer(self, doc: Doc, version: str, params: Doc) -> Response:
        made = shapes.shaped(doc, version)
        wanted = params.get("expand") or []
        for path in wanted if isinstance(wanted, list) else []:
            self._expand(made, str(path).split("."), version)
        return JSONResponse(made, headers={"Request-Id": shapes.new_id("requests"), "Stripe-Version": version})

    def _expand(self, at: Any, path: list[str], version: str) -> None:
        if isinstance(at, list):
            for inner in at:
                self._expand(inner, path, version)
            return
        if not isinstance(at, dict) or not path:
            return
        name, rest = path[0], path[1:]
        if at.get("object") == "invoice" and name == "payments" and name not in at and version[:10] >= shapes.BASIL:
            rows = [shapes.shaped(row, version) for row in self.world.where("invoice_payments", invoice=at["id"])]
            at["payments"] = shapes.listed(f"/v1/invoice_payments?invoice={at['id']}", rows)
        found = at.get(name)
        if isinstance(found, str) and (doc := self.world.any_kind(found)) is not None:
            at[name] = shapes.shaped(doc, version)
        elif name not in at:
            raise Refused(400, shapes.error(_INVALID, f"This property cannot be expanded ({name}).", param="expand"))
        self._expand(at[name], rest, version)

    def _need(self, kind: str, ref: object, param: str = "id") -> Doc:
        found = self.world.get(kind, ref)
        if found is None:
            text = f"No such {kind.removesuffix('s').replace('_', ' ')}: '{ref}'"
            raise Refused(404 if param == "id" else 400, shapes.error(_INVALID, text, "resource_missing", param))
        return found

    def _read(self, kind: str) -> Callable[[Request], Any]:
        async def handler(request: Request) -> Response:
            version = self._admit(request)
            doc = self._need(kind, request.path_params["ref"])
            params = nested(request.query_params.multi_items())
            # An event keeps the shape in which it was made.
            return self._answer(doc, shapes.CURRENT if kind == "events" else version, params)

        return handler

    def _list(self, path: str, kind: str) -> Callable[[Request], Any]:
        async def handler(request: Request) -> Response:
            version = self._admit(request)
            params = nested(request.query_params.multi_items())
            rows = [doc for doc in reversed(self.world.all(kind)) if self._fits(kind, doc, params)]
            chosen, more = _page(rows, _limit(params), params)
            shape = shapes.CURRENT if kind == "events" else version
            return self._answer(shapes.listed(f"/v1/{path}", chosen, more), shape, params)

        return handler

    def _fits(self, kind: str, doc: Doc, params: Doc) -> bool:
        names = _FILTERS.get(kind, {})
        for name, wanted in params.items():
            if name == "created":
                if not _in_range(doc["date"] if kind == "invoiceitems" else doc["created"], wanted):
                    return False
            elif name == "types":
                if doc["type"] not in wanted:
                    return False
            elif name == "payment":
                if doc["payment"].get("payment_intent") != wanted.get("payment_intent"):
                    return False
            elif name == "status" and kind == "subscriptions" and wanted in ("all", "ended"):
                if wanted == "ended" and doc["status"] != "canceled":
                    return False
            elif name in _FILTERABLE:
                found = doc.get(names.get(name, name))
                if (str(found).lower() if isinstance(found, bool) else found) != wanted:
                    return False
        # Stripe lists canceled subscriptions only when it is asked for them.
        return kind != "subscriptions" or "status" in params or doc["status"] != "canceled"

    async def _account(self, request: Request) -> Response:
        self._admit(request)
        return JSONResponse({
            "id": self.account, "object": "account", "charges_enabled": True, "country": "US", "default_currency": "usd",
            "details_submitted": True, "email": "billing@example.com", "payouts_enabled": True, "type": "standard",
        })  # fmt: skip

    async def _balance(self, request: Request) -> Response:
        self._admit(request)
        sums: dict[str, int] = {}
        for row in self.world.all("balance_transactions"):
            if row["_payout"] is None:
                sums[row["currency"]] = sums.get(row["currency"], 0) + row["net"]
        rows = [{"amount": amount, "currency": currency} for currency, amount in sums.items()]
        return JSONResponse({"object": "balance", "available": [], "livemode": False, "pending": rows})

    async def _lines(self, request: Request) -> Response:
        version, params = self._admit(request), nested(request.query_params.multi_items())
        lines = self._need("invoices", request.path_params["ref"])["lines"]
        chosen, more = _page(lines["data"], _limit(params), params)
        return self._answer(shapes.listed(lines["url"], chosen, more), version, params)

    # -- verbs -----------------------------------------------------------------------------------------------------------

    def _create_customer(self, params: Doc, _: str) -> Doc:
        return self.books.customer(params)

    def _update_customer(self, params: Doc, ref: str) -> Doc:
        made = self._need("customers", ref)
        before: Doc = {name: made[name] for name in ("email", "name", "description") if name in params}
        made |= {name: params[name] for name in before}
        made["metadata"] = _merged(made["metadata"], params.get("metadata") or {})
        self._emit("customer.updated", made, before)
        return made

    def _create_session(self, params: Doc, _: str) -> Doc:
        if params.get("mode") != "subscription":
            raise ValueError("the simulator sells subscriptions: mode=subscription")
        lines = params.get("line_items") or []
        if len(lines) != 1:
            raise ValueError("line_items has one line")
        price = self._need("prices", lines[0].get("price"), "line_items[0][price]")
        if params.get("customer"):
            self._need("customers", params["customer"], "customer")
        if not params.get("success_url"):
            raise ValueError("success_url is needed")
        ref = shapes.new_id("sessions")
        quantity = int(lines[0].get("quantity", 1))
        data = params.get("subscription_data") or {}
        total = price["unit_amount"] * quantity
        made = {
            "id": ref, "object": "checkout.session", "allow_promotion_codes": None, "amount_subtotal": total,
            "amount_total": total,
            "automatic_tax": {"enabled": False, "status": None}, "cancel_url": params.get("cancel_url"),
            "client_reference_id": params.get("client_reference_id"), "client_secret": None, "created": self.clock.now,
            "currency": price["currency"], "customer": params.get("customer"), "customer_creation": "always",
            "customer_details": None, "customer_email": params.get("customer_email"),
            "expires_at": int(params.get("expires_at") or self.clock.now + CHECKOUT_SECONDS), "invoice": None, "livemode": False,
            "locale": None, "metadata": params.get("metadata") or {}, "mode": "subscription", "payment_intent": None,
            "payment_method_types": ["card"], "payment_status": "unpaid", "status": "open", "subscription": None,
            "success_url": params["success_url"], "total_details": {"amount_discount": 0, "amount_shipping": 0, "amount_tax": 0},
            "ui_mode": "hosted", "url": f"{self.url}/c/pay/{ref}",
            "_line": {"price": price["id"], "quantity": quantity}, "_metadata": data.get("metadata") or {},
            "_trial_days": int(data.get("trial_period_days") or 0),
        }  # fmt: skip
        return self.world.put("sessions", made)

    def _expire_session(self, _: Doc, ref: str) -> Doc:
        made = self._need("sessions", ref)
        if made["status"] != "open":
            raise ValueError(f"only open sessions can be expired; this one is {made['status']}")
        self.books.expire(made)
        return made

    def _create_subscription(self, params: Doc, _: str) -> Doc:
        customer = self._need("customers", params.get("customer"), "customer")
        item = (params.get("items") or [{}])[0]
        price = self._need("prices", item.get("price"), "items[0][price]")
        days = int(params.get("trial_period_days") or 0)
        return self.books.subscribe(customer, price, int(item.get("quantity", 1)), params.get("metadata") or {}, days)

    def _live(self, ref: str) -> Doc:
        """A subscription that can still be changed."""
        sub = self._need("subscriptions", ref)
        if sub["status"] == "canceled":
            text = "A canceled subscription can only update its cancellation_details and metadata."
            raise Refused(400, shapes.error(_INVALID, text))
        return sub

    def _update_subscription(self, params: Doc, ref: str) -> Doc:
        sub = self._live(ref)
        if "metadata" in params:
            sub["metadata"] = _merged(sub["metadata"], params["metadata"] or {})
        if "cancel_at_period_end" in params:
            self.books.set_cancel(sub, flag(params["cancel_at_period_end"]))
        for wanted in params.get("items") or []:
            item = sub["items"]["data"][0]
            if wanted.get("id") not in (None, item["id"]):
                raise ValueError(f"no such subscription item: {wanted.get('id')}")
            price = self._need("prices", wanted.get("price", item["price"]["id"]), "items[0][price]")
            if price["currency"] != sub["currency"]:
                raise ValueError("all prices of a subscription have one currency")
            quantity = int(wanted.get("quantity", item["quantity"]))
            wait = params.get("payment_behavior") == "pending_if_incomplete"
            self.books.change(sub, price, quantity, params.get("proration_behavior", "create_prorations"), wait)
        return sub

    def _cancel_subscription(self, _: Doc, ref: str) -> Doc:
        sub = self._need("subscriptions", ref)
        if sub["status"] == "canceled":
            raise Refused(404, shapes.error(_INVALID, f"No such subscription: '{ref}'", "resource_missing", "id"))
        self.books.end(sub, "cancellation_requested")
        return sub

    def _resume_subscription(self, _: Doc, ref: str) -> Doc:
        sub = self._live(ref)
        if sub["status"] != "paused":
            raise ValueError("only paused subscriptions can be resumed")
        sub["status"] = "active"
        self._emit("customer.subscription.resumed", sub, {"status": "paused"})
        return sub

    def _create_schedule(self, params: Doc, _: str) -> Doc:
        sub = self._live(params.get("from_subscription", ""))
        if sub["schedule"]:
            raise ValueError("the subscription has a schedule")
        return self.books.schedule(sub)

    def _update_schedule(self, params: Doc, ref: str) -> Doc:
        made = self._need("schedules", ref)
        if made["status"] != "active":
            raise ValueError(f"the schedule is {made['status']}")
        phases = []
        for phase in params.get("phases") or made["phases"]:
            items = [
                {"price": self._need("prices", item["price"], "price")["id"], "quantity": int(item.get("quantity", 1))}
                for item in phase["items"]
            ]
            end = int(phase["end_date"]) if phase.get("end_date") else None
            phases.append(
                {"items": items, "start_date": int(phase["start_date"]), "end_date": end, "proration_behavior": "none"}
            )
        made |= {"phases": phases, "end_behavior": params.get("end_behavior", made["end_behavior"])}
        self._emit("subscription_schedule.updated", made, None)
        return made

    def _release_schedule(self, _: Doc, ref: str) -> Doc:
        made = self._need("schedules", ref)
        if made["status"] != "active":
            raise ValueError(f"the schedule is {made['status']}")
        self.books.release(made)
        return made

    def _create_refund(self, params: Doc, _: str) -> Doc:
        ref = params.get("charge") or params.get("payment_intent")
        intent = self.world.get("payment_intents", ref)
        charge = self._need(
            "charges", intent["latest_charge"] if intent else ref, "charge" if "charge" in params else "payment_intent"
        )
        left = charge["amount"] - charge["amount_refunded"]
        amount = int(params.get("amount") or left)
        if charge["disputed"]:
            raise Refused(400, shapes.error(_INVALID, "This charge has been charged back.", "charge_disputed"))
        if not charge["paid"] or left == 0:
            raise Refused(
                400,
                shapes.error(_INVALID, f"Charge {charge['id']} has already been refunded.", "charge_already_refunded"),
            )
        if not 0 < amount <= left:
            text = f"Refund amount ({amount}) is greater than unrefunded amount on charge ({left})"
            raise Refused(400, shapes.error(_INVALID, text, param="amount"))
        return self.books.refund(charge, amount, params.get("reason"), params.get("metadata") or {})

    def _preview(self, params: Doc, _: str) -> Doc:
        """What a change would cost, without a trace."""
        import copy

        sub = self._need("subscriptions", params.get("subscription"), "subscription")
        details = params.get("subscription_details") or {}
        wanted = (details.get("items") or [{}])[0]
        price = self._need("prices", wanted.get("price", sub["items"]["data"][0]["price"]["id"]), "price")
        kept, send = copy.deepcopy(self.world.kinds), self.books.emit
        self.books.emit = lambda *_: None
        try:
            self.books.change(self.world.kinds["subscriptions"][sub["id"]], price, 1, "always_invoice")
            latest = self.world.kinds["subscriptions"][sub["id"]]["latest_invoice"]
            preview = copy.deepcopy(self.world.kinds["invoices"][latest])
        finally:
            self.world.kinds, self.books.emit = kept, send
        return preview | {"id": "upcoming_" + shapes.new_id("invoices"), "status": "draft", "number": None}

    def _pay_invoice(self, _: Doc, ref: str) -> Doc:
        invoice = self._need("invoices", ref)
        if invoice["status"] != "open":
            raise Refused(400, shapes.error(_INVALID, "Invoice is already paid", "invoice_already_paid"))
        if not self.books.collect(invoice):
            text = "Your card was declined."
            raise Refused(402, shapes.error("card_error", text, "card_declined", decline_code="generic_decline"))
        return invoice

    def _create_item(self, params: Doc, _: str) -> Doc:
        customer = self._need("customers", params.get("customer"), "customer")
        if params.get("subscription"):
            sub = self._live(params["subscription"])
            if sub["currency"] != str(params["currency"]).lower():
                raise ValueError(f"the subscription is in {sub['currency']}")
        if params.get("invoice") and self._need("invoices", params["invoice"], "invoice")["status"] != "draft":
            raise ValueError("items can be added to drafts alone")
        return self.books.item(customer, params)

    def _create_invoice(self, params: Doc, _: str) -> Doc:
        if params.get("pending_invoice_items_behavior") != "exclude":
            raise ValueError("the simulator makes invoices without pending items")
        return self.books.draft(self._need("customers", params.get("customer"), "customer"), params)

    def _finalize_invoice(self, _: Doc, ref: str) -> Doc:
        draft = self._need("invoices", ref)
        if draft["status"] != "draft":
            raise ValueError(f"the invoice is {draft['status']}")
        return self.books.finalize(draft)

    def _void_invoice(self, _: Doc, ref: str) -> Doc:
        invoice = self._need("invoices", ref)
        if invoice["status"] not in ("open", "uncollectible"):
            raise ValueError("only open and uncollectible invoices can be voided")
        self.books.void(invoice)
        return invoice

    def _close_dispute(self, _: Doc, ref: str) -> Doc:
        found = self._need("disputes", ref)
        if found["status"] in ("won", "lost"):
            raise ValueError("it is closed")
        self.books.decide(found, won=False)
        return found

    def _create_portal(self, params: Doc, _: str) -> Doc:
        customer = self._need("customers", params.get("customer"), "customer")
        ref = shapes.new_id("portals")
        return self.world.put("portals", {
            "id": ref, "object": "billing_portal.session", "configuration": "bpc_1" + fixed(23, "portal"),
            "created": self.clock.now,
            "customer": customer["id"], "flow": None, "livemode": False, "locale": None, "on_behalf_of": None,
            "return_url": params.get("return_url"), "url": f"{self.url}/p/session/{ref}",
        })  # fmt: skip

    # -- pages -----------------------------------------------------------------------------------------------------------

    def _offer(self, session: Doc, problem: str = "") -> HTMLResponse:
        price = self.world.kinds["prices"][session["_line"]["price"]]
        customer = self.world.get("customers", session["customer"])
        who = session["customer_email"] or (customer or {}).get("email") or "a new customer"
        cost = amount(session["amount_total"], session["currency"])
        what = f"Subscribe to {price['nickname']}"
        return pages.checkout(_LOOK, what, cost, price["recurring"]["interval"], f"for {who}", problem)

    async def _page(self, request: Request) -> Response:
        session = self.world.get("sessions", request.path_params["ref"])
        if session is None:
            return pages.word(_LOOK, "There is no such checkout", "Go back and start again.", 404)
        if session["status"] != "open":
            return pages.word(_LOOK, f"This checkout is {session['status']}", "Go back to where you came from.", 410)
        return self._offer(session)

    async def _page_sent(self, request: Request) -> Response:
        session = self.world.get("sessions", request.path_params["ref"])
        if session is None or session["status"] != "open":
            return await self._page(request)
        form = dict(parse_qsl((await request.body()).decode()))
        if form.get("act") != "pay":
            return RedirectResponse(self.leave(session["id"])["url"], 303)
        done = self.pay(session["id"], card_of(form.get("card")))
        if not done["paid"]:
            return self._offer(session, "Your card was declined. Try another one.")
        return RedirectResponse(done["url"], 303)

    async def _portal_page(self, request: Request) -> Response:
        portal = self.world.get("portals", request.path_params["ref"])
        if portal is None:
            return pages.word(_LOOK, "There is no such session", "Go back and start again.", 404)
        customer = self.world.kinds["customers"][portal["customer"]]
        return pages.settings(_LOOK, "How you pay", f"for {customer['email'] or customer['id']}", customer["_card"])

    async def _portal_sent(self, request: Request) -> Response:
        portal = self.world.get("portals", request.path_params["ref"])
        if portal is None:
            return await self._portal_page(request)
        form = dict(parse_qsl((await request.body()).decode()))
        if form.get("act") == "pay":
            self.world.kinds["customers"][portal["customer"]]["_card"] = card_of(form.get("card"))
            for invoice in list(self.world.where("invoices", customer=portal["customer"], status="open")):
                self.books.collect(invoice)
            self.world.touch()
        return RedirectResponse(portal["return_url"] or self.url, 303)


def signature(secret: str, at: int, body: bytes) -> str:
    """The header of a webhook: HMAC-SHA256 over the time, a full stop and the body."""
    mac = hmac.new(secret.encode(), b"%d.%b" % (at, body), hashlib.sha256).hexdigest()
    return f"t={at},v1={mac},v0={token(64, '0123456789abcdef')}"


def _merged(old: Doc, new: Doc) -> Doc:
    """Metadata: what is set to nothing goes."""
    return {name: value for name, value in (old | new).items() if value != ""}


def _in_range(created: int, wanted: Any) -> bool:
    if not isinstance(wanted, dict):
        return created == int(wanted)
    checks = {"gte": created.__ge__, "gt": created.__gt__, "lte": created.__le__, "lt": created.__lt__}
    return all(checks[name](int(value)) for name, value in wanted.items())


def _limit(params: Doc) -> int:
    """How many a caller wants."""
    try:
        limit = int(params.get("limit", 10))
    except ValueError:
        limit = 0
    if not 1 <= limit <= _MAX_PAGE:
        raise Refused(400, shapes.error(_INVALID, f"limit is from 1 to {_MAX_PAGE}", "parameter_invalid", "limit"))
    return limit


def _page(rows: list[Doc], limit: int, params: Doc) -> tuple[list[Doc], bool]:
    """A page of ``rows`` (newest first) and whether there is more that way."""
    ids = [row["id"] for row in rows]
    for name in ("starting_after", "ending_before"):
        if name in params and params[name] not in ids:
            raise Refused(400, shapes.error(_INVALID, f"No such object: '{params[name]}'", "resource_missing", name))
    if "ending_before" in params:
        until = ids.index(params["ending_before"])
        return rows[max(0, until - limit) : until], until > limit
    first = ids.index(params["starting_after"]) + 1 if "starting_after" in params else 0
    return rows[first : first + limit], first + limit < len(rows)
