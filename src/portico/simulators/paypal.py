"""PayPal, as much of it as selling subscriptions needs: its API, its approval page, its webhooks with certificate, its reports.

    async with PayPalSimulator(webhook_url=…) as paypal:
        settings: paypal_api_url=paypal.url, paypal_webhook_id=paypal.webhook_id, paypal_client_id/_secret, paypal_account
                  its certificate comes from paypal.url and leads to paypal.root (PEM)

Paths, parameters, shapes and ids are those of developer.paypal.com/api. Sales of subscriptions are told of as
``/v1/payments/sale`` has them;
``/v2/payments/captures`` knows them too.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import hmac
import json
import time
import uuid
from collections.abc import Callable, Sequence
from decimal import InvalidOperation
from typing import Any, ClassVar, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from portico.simulators import billing_pages as pages
from portico.simulators import paypal_books as books
from portico.simulators import paypal_signing as signing
from portico.simulators.billing_delivery import Endpoint, Manner, Message
from portico.simulators.billing_server import Card, ProviderSimulator, Refused, card_of
from portico.simulators.billing_world import Doc, amount, fixed, iso, public, token

_LOOK: Final = pages.Look("PayPal", "#0059b8", "Agree and subscribe")
_BEARER_SECONDS: Final = 32_400
_UPPER: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: Kind of resource → its version in events.
_VERSIONS: Final = {"subscription": "2.0"}


class PayPalSimulator(ProviderSimulator):
    """One account of PayPal's sandbox."""

    name = "paypal"
    decided = frozenset({"RESOLVED"})
    look = _LOOK
    # 25 times in three days.
    again_seconds: ClassVar[Sequence[float]] = (10, 60, 300, 1800, 7200, *([12_000] * 20))

    def __init__(self, *, client_id: str = "", client_secret: str = "", webhook_id: str = "", **given: Any) -> None:
        self.account = fixed(13, "merchant", alphabet=_UPPER)
        # The "secret" of an endpoint is the id of its registration: it is part of what is signed.
        super().__init__(webhook_secret=webhook_id, **given)
        self.client_id = self.world.kept("client_id", client_id, lambda: "A" + token(79))
        self.client_secret = self.world.kept("client_secret", client_secret, lambda: "E" + token(79))
        self.books = books.PayPalBooks(self.world, self._emit)
        self._bearers: dict[str, float] = {}

    def prepare(self) -> None:
        self.books.url = self.url
        for offer in self.offers.values():
            if self.world.get("plans", books.plan_id(offer)) is None:
                self.world.put("plans", books.plan_of(offer, self.clock.now))
        keys = self.world.get("keys", "keys")
        now = dt.datetime.now(dt.UTC)
        if keys is None or keys["until"] < now.timestamp() + 30 * 86_400:
            self.world.put("keys", signing.new_keys(now))

    def held(self) -> list[pages.Held]:
        return [
            pages.Held(
                sub["id"], self.books.plan(sub)["name"], sub["status"], iso(sub["_next"]) if sub["_next"] else ""
            )
            for sub in self.world.all("subscriptions")
        ]

    def new_webhook_secret(self) -> str:
        return token(17, _UPPER)

    @property
    def webhook_id(self) -> str:
        """The id of the registration, which is part of what is signed."""
        return self.webhook_secret

    def settings(self) -> dict[str, str]:
        return {
            "paypal_client_id": self.client_id,
            "paypal_client_secret": self.client_secret,
            "paypal_webhook_id": self.webhook_id,
            "paypal_account": self.account,
            "paypal_plans": self.prices(),
            "paypal_api_url": self.url,
            "paypal_cert_hosts": self.url,
        }

    def price(self, plan: str) -> str:
        """The id at PayPal of one of the platform's plans."""
        return books.plan_id(self.offers[plan])

    @property
    def root(self) -> str:
        """The root that its certificate leads to, PEM."""
        found: str = self.world.kinds["keys"]["keys"]["root"]
        return found

    @property
    def certificate_url(self) -> str:
        """Where the certificate of its signatures is."""
        serial = fixed(8, self.world.kinds["keys"]["keys"]["certificate"], alphabet="0123456789abcdef")
        return f"{self.url}/v1/notifications/certs/CERT-{fixed(8, 'certificate', alphabet='0123456789abcdef')}-{serial}"

    # -- webhooks ------------------------------------------------------------------------------------------------------

    def endpoint(self, url: str) -> Endpoint:
        return Endpoint(self.webhook_secret, url, self.webhook_secret)

    def sign(self, endpoint: Endpoint, message: Message, at: float, manner: Manner) -> tuple[dict[str, str], bytes]:
        """RSA over transmission, time, webhook id and the CRC-32 of the body. ``tampered``: another amount under
        that signature."""
        keys = self.world.kinds["keys"]["keys"]
        webhook = endpoint.secret if manner != "wrong" else token(17, _UPPER)
        transmission, stamp = str(uuid.uuid4()), iso(at)
        signature = signing.sign(keys["key"], transmission, stamp, webhook, message.body)
        body = message.body
        if manner == "tampered":
            body = signing.forge(message.body, json.dumps(_richer(json.loads(message.body))).encode())
        return {
            "Content-Type": "application/json",
            "User-Agent": "PayPal/AUHD-1.0-1",
            "PAYPAL-TRANSMISSION-ID": transmission,
            "PAYPAL-TRANSMISSION-TIME": stamp,
            "PAYPAL-TRANSMISSION-SIG": base64.b64encode(signature).decode(),
            "PAYPAL-AUTH-VERSION": "v2",
            "PAYPAL-AUTH-ALGO": "SHA256withRSA",
            "PAYPAL-CERT-URL": self.certificate_url,
        }, body

    def _emit(self, kind: str, resource: str, summary: str, doc: Doc) -> None:
        ref = f"WH-{token(17, _UPPER)}-{token(17, _UPPER)}"
        at = f"{self.url}/v1/notifications/webhooks-events/{ref}"
        event = {
            "id": ref, "event_version": "1.0", "create_time": iso(self.stamp), "resource_type": resource,
            **({"resource_version": _VERSIONS[resource]} if resource in _VERSIONS else {}), "event_type": kind,
            "summary": summary,
            "resource": public(doc), "links": [{"href": at, "rel": "self", "method": "GET"}, {"href": f"{at}/resend",
            "rel": "resend", "method": "POST"}],
        }  # fmt: skip
        self.world.put("events", event | {"_at": self.stamp})
        self.courier.send(Message(ref, kind, json.dumps(event, separators=(",", ":")).encode()))

    def message(self, event: str) -> Message | None:
        doc = self.world.get("events", event)
        return (
            None
            if doc is None
            else Message(doc["id"], doc["event_type"], json.dumps(public(doc), separators=(",", ":")).encode())
        )

    # -- what happens on request -----------------------------------------------------------------------------------------

    def next_due(self) -> tuple[float, Callable[[], None]] | None:
        return self.books.next_due()

    def pay(self, checkout: str, card: Card) -> Doc:
        sub = self._known("subscriptions", checkout)
        if sub["status"] != "APPROVAL_PENDING":
            raise ValueError(f"the subscription is {sub['status']}")
        if card == "declines":
            return {"paid": False, "url": sub["links"][0]["href"]}
        self.books.approve(sub, card if card == "good" else "declines")
        return {
            "paid": True,
            "url": _with(sub["_return"], subscription_id=sub["id"], ba_token=sub["_token"], token=sub["_token"][3:]),
        }

    def leave(self, checkout: str) -> Doc:
        sub = self._known("subscriptions", checkout)
        return {"url": _with(sub["_cancel"], subscription_id=sub["id"], ba_token=sub["_token"])}

    def agree(self, subscription: str) -> None:
        """The buyer agrees to a revision."""
        self.books.agree(self._known("subscriptions", subscription))

    def set_card(self, subscription: str, card: Card) -> None:
        self._known("subscriptions", subscription)["_card"] = card

    def dispute(self, payment: str, reason: str) -> Doc:
        words = {"fraudulent": "UNAUTHORISED"}
        found: Doc = public(self.books.dispute(self._known("sales", payment), words.get(reason, reason.upper())))
        return found

    def conclude(self, dispute: Doc, won: bool) -> None:
        self.books.decide(dispute, won)

    def payout(self) -> Doc | None:
        """PayPal keeps the money until it is withdrawn; reports tell of every transaction."""
        return None

    # -- the API -------------------------------------------------------------------------------------------------------

    def idempotency_key(self, request: Request) -> str:
        return request.headers.get("paypal-request-id", "")

    def problem(self, status: int, text: str) -> Doc:
        names = {
            400: "INVALID_REQUEST",
            401: "AUTHENTICATION_FAILURE",
            404: "RESOURCE_NOT_FOUND",
            422: "UNPROCESSABLE_ENTITY",
        }
        name = names.get(status, "INTERNAL_SERVER_ERROR")
        return {"name": name, "message": text, "debug_id": token(13, "0123456789abcdef"), "details": [], "links": []}

    def key_reused(self, key: str) -> Refused:
        return self._no(422, "DUPLICATE_REQUEST_ID", "The value of PayPal-Request-Id header has already been used.")

    def _no(self, status: int, issue: str, text: str) -> Refused:
        body = self.problem(
            status,
            "The requested action could not be performed, semantically incorrect, or failed business validation.",
        )
        return Refused(status, body | {"details": [{"issue": issue, "description": text}]})

    def routes(self) -> list[BaseRoute]:
        verbs: dict[str, tuple[Callable[[Doc, str], Doc | None], int]] = {
            "/v1/billing/subscriptions": (self._create, 201),
            "/v1/billing/subscriptions/{ref}/revise": (self._revise, 200),
            "/v1/billing/subscriptions/{ref}/cancel": (self._turn("CANCELLED", "ACTIVE", "SUSPENDED"), 204),
            "/v1/billing/subscriptions/{ref}/suspend": (self._turn("SUSPENDED", "ACTIVE"), 204),
            "/v1/billing/subscriptions/{ref}/activate": (self._turn("ACTIVE", "SUSPENDED"), 204),
            "/v1/billing/subscriptions/{ref}/capture": (self._capture, 200),
            "/v1/payments/sale/{ref}/refund": (self._refund_sale, 201),
            "/v2/payments/captures/{ref}/refund": (self._refund_capture, 201),
            "/v1/customer/disputes/{ref}/accept-claim": (self._accept, 200),
            "/v1/notifications/webhooks-events/{ref}/resend": (self._resend, 202),
            "/v1/notifications/verify-webhook-signature": (self._verify, 200),
        }
        reads: dict[str, Callable[[str], Doc]] = {
            "/v1/billing/plans/{ref}": lambda ref: self._need("plans", ref),
            "/v1/billing/subscriptions/{ref}": lambda ref: self._need("subscriptions", ref),
            "/v1/payments/sale/{ref}": lambda ref: self._need("sales", ref),
            "/v1/payments/refund/{ref}": lambda ref: self._need("refunds", ref),
            "/v2/payments/captures/{ref}": self._as_capture,
            "/v2/payments/refunds/{ref}": self._as_refund,
            "/v1/customer/disputes/{ref}": lambda ref: self._need("disputes", ref),
            "/v1/notifications/webhooks-events/{ref}": lambda ref: self._need("events", ref),
        }
        made: list[BaseRoute] = [self.api(path, self._write(*verb), "POST") for path, verb in verbs.items()]
        made += [
            self.api("/v1/billing/plans", self._plans, "GET"),
            self.api("/v1/billing/subscriptions/{ref}/transactions", self._transactions, "GET"),
            self.api("/v1/notifications/webhooks-events", self._events, "GET"),
            self.api("/v1/notifications/webhooks", self._webhooks, "GET"),
            self.api("/v1/customer/disputes", self._disputes, "GET"),
            self.api("/v1/reporting/transactions", self._report, "GET"),
        ]
        made += [self.api(path, self._read(call), "GET") for path, call in reads.items()]
        return [
            *made,
            Route("/v1/oauth2/token", self._sign_in, methods=["POST"]),
            Route("/v1/notifications/certs/{name}", self._certificate),
            Route("/webapps/billing/subscriptions", self._page, methods=["GET"]),
            Route("/webapps/billing/subscriptions", self._page_sent, methods=["POST"]),
            Route("/webapps/billing/subscriptions/update", self._update_page, methods=["GET"]),
            Route("/webapps/billing/subscriptions/update", self._update_sent, methods=["POST"]),
        ]

    async def _sign_in(self, request: Request) -> Response:
        if self.faults.api_count and self.faults.take("api_count"):
            status = self.faults.api_status
            return JSONResponse(self.problem(status, "asked for by /_sim/faults"), status_code=status)
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        try:
            given = base64.b64decode(value) if scheme.lower() == "basic" else b""
        except binascii.Error:
            given = b""
        if not hmac.compare_digest(given, f"{self.client_id}:{self.client_secret}".encode()):
            return JSONResponse(
                {"error": "invalid_client", "error_description": "Client Authentication failed"}, status_code=401
            )
        bearer = "A21AA" + token(92)
        self._bearers[bearer] = time.time() + _BEARER_SECONDS  # by everybody's clock: they are told seconds
        return JSONResponse({
            "scope": "https://uri.paypal.com/services/subscriptions", "access_token": bearer, "token_type": "Bearer",
            "app_id": "APP-80W284485P519543T", "expires_in": _BEARER_SECONDS, "nonce": iso(self.clock.now) + token(20),
        })  # fmt: skip

    def forget_bearers(self) -> None:
        """Every sign-in is over before its time."""
        self._bearers.clear()

    def _admit(self, request: Request) -> None:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or self._bearers.get(bearer, 0) < time.time():
            raise Refused(401, {"error": "invalid_token", "error_description": "Token signature verification failed"})

    def _write(self, call: Callable[[Doc, str], Doc | None], status: int) -> Callable[[Request], Any]:
        async def handler(request: Request) -> Response:
            self._admit(request)
            try:
                params = json.loads(await request.body() or b"{}")
                if not isinstance(params, dict):
                    raise TypeError("an object is expected")
                done = call(params, request.path_params.get("ref", ""))
            except (ValueError, KeyError, TypeError, InvalidOperation) as err:
                raise Refused(400, self.problem(400, f"Request is not well-formed or violates schema: {err}")) from None
            return Response(status_code=204) if done is None else JSONResponse(public(done), status_code=status)

        return handler

    def _read(self, call: Callable[[str], Doc]) -> Callable[[Request], Any]:
        async def handler(request: Request) -> Response:
            self._admit(request)
            return JSONResponse(public(call(request.path_params["ref"])))

        return handler

    def _need(self, kind: str, ref: object) -> Doc:
        found = self.world.get(kind, ref)
        if found is None:
            body = self.problem(404, "The specified resource does not exist.")
            raise Refused(
                404,
                body
                | {
                    "details": [{"issue": "INVALID_RESOURCE_ID", "description": "Requested resource ID was not found."}]
                },
            )
        return found

    async def _certificate(self, _: Request) -> Response:
        return PlainTextResponse(self.world.kinds["keys"]["keys"]["certificate"])

    # -- verbs -----------------------------------------------------------------------------------------------------------

    def _create(self, params: Doc, _: str) -> Doc:
        self._need("plans", params.get("plan_id"))
        return self.books.create(params)

    def _turn(self, status: str, *from_states: str) -> Callable[[Doc, str], Doc | None]:
        def turn(params: Doc, ref: str) -> Doc | None:
            sub = self._need("subscriptions", ref)
            if sub["status"] not in from_states:
                text = f"Invalid subscription status for this action; the subscription is {sub['status']}."
                raise self._no(422, "SUBSCRIPTION_STATUS_INVALID", text)
            self.books.turn(sub, status, str(params["reason"]))
            return None

        return turn

    def _revise(self, params: Doc, ref: str) -> Doc:
        sub = self._need("subscriptions", ref)
        if sub["status"] != "ACTIVE":
            raise self._no(422, "SUBSCRIPTION_STATUS_INVALID", f"The subscription is {sub['status']}.")
        context = params.get("application_context") or {}
        sub["_return"] = context.get("return_url") or sub["_return"]
        sub["_cancel"] = context.get("cancel_url") or sub["_cancel"]
        plan = self._need("plans", params.get("plan_id", sub["plan_id"]))
        if plan["_currency"] != self.books.currency(sub):
            raise self._no(422, "CURRENCY_MISMATCH", "The currency code is different from the plan's currency code.")
        return self.books.revise(sub, plan["id"], str(params.get("quantity", sub["quantity"])))

    def _capture(self, params: Doc, ref: str) -> Doc:
        """Collect what is owed."""
        sub = self._need("subscriptions", ref)
        if not sub["_owed"]:
            raise self._no(422, "ZERO_OUTSTANDING_BALANCE", "Current outstanding balance should be greater than zero.")
        if not self.books.charge(sub):
            raise self._no(422, "INSTRUMENT_DECLINED", "The instrument was declined.")
        return {"status": "COMPLETED"}

    def _refund(self, ref: str, wanted: str | None, currency: str | None, reason: str) -> Doc:
        sale = self._need("sales", ref)
        left = sale["_amount"] - sale["_refunded"]
        if currency not in (None, sale["_currency"]):
            raise self._no(422, "CURRENCY_MISMATCH", "The currency of the refund is not that of the payment.")
        amount = left if wanted is None else books.minor_of(wanted, sale["_currency"])
        if sale["state"] == "reversed":
            raise self._no(422, "TRANSACTION_DISPUTED", "Partial or full refund is not allowed on this transaction.")
        if left == 0:
            raise self._no(422, "CAPTURE_FULLY_REFUNDED", "The capture has already been fully refunded.")
        if not 0 < amount <= left:
            raise self._no(
                422, "REFUND_AMOUNT_EXCEEDED", "The refund amount must be less than or equal to what is left."
            )
        return self.books.refund(sale, amount, reason)

    def _refund_sale(self, params: Doc, ref: str) -> Doc:
        amount = params.get("amount") or {}
        return self._refund(ref, amount.get("total"), amount.get("currency"), str(params.get("reason", "")))

    def _refund_capture(self, params: Doc, ref: str) -> Doc:
        amount = params.get("amount") or {}
        made = self._refund(ref, amount.get("value"), amount.get("currency_code"), str(params.get("note_to_payer", "")))
        return self._as_refund(made["id"])

    def _as_capture(self, ref: str) -> Doc:
        sale = self._need("sales", ref)
        states = {
            "completed": "COMPLETED",
            "partially_refunded": "PARTIALLY_REFUNDED",
            "refunded": "REFUNDED",
            "reversed": "REFUNDED",
        }
        fee, currency = sale["_fee"], sale["_currency"]
        breakdown = {
            "gross_amount": books.money(sale["_amount"], currency), "paypal_fee": books.money(fee, currency),
            "net_amount": books.money(sale["_amount"] - fee, currency),
        }  # fmt: skip
        return {
            "id": sale["id"], "status": states[sale["state"]], "amount": books.money(sale["_amount"], currency),
            "final_capture": True,
            "custom_id": sale["custom"], "seller_receivable_breakdown": breakdown, "create_time": sale["create_time"],
            "update_time": sale["update_time"],
            "supplementary_data": {"related_ids": {"billing_agreement_id": sale["billing_agreement_id"]}},
            "links": [],
        }  # fmt: skip

    def _as_refund(self, ref: str) -> Doc:
        found = self._need("refunds", ref)
        at = f"{self.url}/v2/payments/captures/{found['sale_id']}"
        return {
            "id": found["id"], "status": "COMPLETED", "amount": books.money(found["_amount"], found["_currency"]),
            "create_time": found["create_time"], "update_time": found["update_time"],
            "links": [{"href": f"{self.url}/v2/payments/refunds/{ref}", "rel": "self", "method": "GET"}, {"href": at,
            "rel": "up", "method": "GET"}],
        }  # fmt: skip

    def _accept(self, _: Doc, ref: str) -> Doc:
        found = self._need("disputes", ref)
        if found["status"] == "RESOLVED":
            raise self._no(422, "ACTION_NOT_ALLOWED_IN_CURRENT_DISPUTE_STATE", "The dispute is resolved.")
        self.books.decide(found, won=False)
        return {"links": []}

    def _resend(self, _: Doc, ref: str) -> Doc:
        event = self._need("events", ref)
        found = self.message(ref)
        assert found is not None
        self.courier.send(found)
        return event

    def _verify(self, params: Doc, _: str) -> Doc:
        """PayPal's own look at a signature, by the body as it was parsed."""
        event = json.dumps(params["webhook_event"], separators=(",", ":")).encode()
        certificate = x509.load_pem_x509_certificate(self.world.kinds["keys"]["keys"]["certificate"].encode())
        key = certificate.public_key()
        assert isinstance(key, rsa.RSAPublicKey)
        import zlib

        signed = f"{params['transmission_id']}|{params['transmission_time']}|{params['webhook_id']}|{zlib.crc32(event)}"
        try:
            key.verify(base64.b64decode(params["transmission_sig"]), signed.encode(), padding.PKCS1v15(), SHA256())
        except Exception:
            return {"verification_status": "FAILURE"}
        good = params["cert_url"] == self.certificate_url and params["webhook_id"] == self.webhook_id
        return {"verification_status": "SUCCESS" if good else "FAILURE"}

    # -- lists -----------------------------------------------------------------------------------------------------------

    async def _plans(self, request: Request) -> Response:
        self._admit(request)
        return JSONResponse({"plans": public(self.world.all("plans")), "links": []})

    async def _webhooks(self, request: Request) -> Response:
        self._admit(request)
        rows = [
            {"id": found.id, "url": found.url, "event_types": [{"name": "*"}], "links": []}
            for found in self.courier.endpoints
        ]
        return JSONResponse({"webhooks": rows})

    async def _disputes(self, request: Request) -> Response:
        self._admit(request)
        about = request.query_params.get("disputed_transaction_id")
        found = [each for each in self.world.all("disputes") if about in (None, each["_sale"])]
        return JSONResponse({"items": public(list(reversed(found))), "links": []})

    async def _events(self, request: Request) -> Response:
        """Newest first, by pages."""
        self._admit(request)
        wanted = dict(request.query_params)
        first, last = _seconds(wanted.get("start_time"), 0), _seconds(wanted.get("end_time"), 1 << 40)
        rows = [
            doc
            for doc in reversed(self.world.all("events"))
            if first <= doc["_at"] <= last and wanted.get("event_type") in (None, doc["event_type"])
        ]
        size, page = int(wanted.get("page_size", 10)), int(wanted.get("page", 1))
        chosen = rows[(page - 1) * size : page * size]
        links = []
        if page * size < len(rows):
            query = urlencode(wanted | {"page": page + 1})
            links.append(
                {"href": f"{self.url}/v1/notifications/webhooks-events?{query}", "rel": "next", "method": "GET"}
            )
        return JSONResponse({"events": public(chosen), "count": len(chosen), "links": links})

    async def _transactions(self, request: Request) -> Response:
        self._admit(request)
        sub = self._need("subscriptions", request.path_params["ref"])
        email = {"payer_email": sub["subscriber"]["email_address"]}
        rows = [
            {"id": row["id"], "status": self._as_capture(row["id"])["status"], "amount_with_breakdown": {
                name: books.money(amount, row["_currency"]) for name, amount in
                (("gross_amount", row["_amount"]), ("fee_amount", -row["_fee"]), ("net_amount", row["_amount"] - row["_fee"]))},
             "time": row["create_time"], **email}
            for row in self.world.where("sales", billing_agreement_id=sub["id"])
        ]  # fmt: skip
        return JSONResponse({"transactions": rows, "links": []})

    async def _report(self, request: Request) -> Response:
        """Every transaction of a time: T0002 is a payment of a subscription, T1107 a refund, T1201 a chargeback."""
        self._admit(request)
        wanted = dict(request.query_params)
        first, last = _seconds(wanted["start_date"], 0), _seconds(wanted["end_date"], 0)
        rows = [
            _row(row["id"], "T0002", row["_at"], row["_amount"], row["_fee"], row["_currency"])
            for row in self.world.all("sales")
        ]
        rows += [
            _row(row["id"], "T1107", row["_at"], -row["_amount"], 0, row["_currency"])
            for row in self.world.all("refunds")
        ]
        rows += [
            _row(f"{row['id']}", "T1201", row["_reversed_at"], -row["_reversed"], 0, row["_currency"])
            for row in self.world.all("sales")
            if "_reversed" in row
        ]
        chosen = [row for row in rows if first <= row["_at"] <= last]
        return JSONResponse({
            "transaction_details": public(chosen), "account_number": self.account, "start_date": wanted["start_date"],
            "end_date": wanted["end_date"], "last_refreshed_datetime": iso(self.clock.now), "page": 1, "total_items": len(chosen),
            "total_pages": 1,
        })  # fmt: skip

    # -- pages -----------------------------------------------------------------------------------------------------------

    def _by_token(self, request: Request) -> Doc | None:
        given = request.query_params.get("ba_token", "")
        found = (
            doc
            for doc in self.world.all("subscriptions")
            if given in (doc["_token"], (doc["_revision"] or {}).get("token"))
        )
        return next(found, None) if given else None

    def _offer(self, sub: Doc, plan: str, what: str, problem: str = "") -> Response:
        doc = self.world.kinds["plans"][plan]
        cost = amount(doc["_amount"], doc["_currency"])
        return pages.checkout(
            _LOOK, f"{what} {doc['name']}", cost, doc["_interval"], f"for {sub['subscriber']['email_address']}", problem
        )

    async def _page(self, request: Request) -> Response:
        sub = self._by_token(request)
        if sub is None:
            return pages.word(_LOOK, "There is no such agreement", "Go back and start again.", 404)
        if sub["status"] != "APPROVAL_PENDING":
            return pages.word(
                _LOOK, f"This agreement is {sub['status'].lower()}", "Go back to where you came from.", 410
            )
        return self._offer(sub, sub["plan_id"], "Subscribe to")

    async def _page_sent(self, request: Request) -> Response:
        sub = self._by_token(request)
        if sub is None or sub["status"] != "APPROVAL_PENDING":
            return await self._page(request)
        form = dict(parse_qsl((await request.body()).decode()))
        if form.get("act") != "pay":
            return _back(self.leave(sub["id"])["url"], "Nothing was agreed")
        done = self.pay(sub["id"], card_of(form.get("card")))
        if not done["paid"]:
            return self._offer(sub, sub["plan_id"], "Subscribe to", "Your card was declined. Choose another one.")
        return _back(done["url"], "Agreed")

    async def _update_page(self, request: Request) -> Response:
        sub = self._by_token(request)
        if sub is None or sub["_revision"] is None:
            return pages.word(_LOOK, "There is no such change", "Go back and start again.", 404)
        return self._offer(sub, sub["_revision"]["plan_id"], "Change to")

    async def _update_sent(self, request: Request) -> Response:
        sub = self._by_token(request)
        if sub is None or sub["_revision"] is None:
            return await self._update_page(request)
        form = dict(parse_qsl((await request.body()).decode()))
        if form.get("act") != "pay":
            return _back(self.leave(sub["id"])["url"], "Nothing was agreed")
        self.books.agree(sub)
        return _back(_with(sub["_return"], subscription_id=sub["id"]), "Agreed")


def _back(url: str, title: str) -> Response:
    return RedirectResponse(url, 303) if url else pages.word(_LOOK, title, "You can close this page.")


def _with(url: str, **query: str) -> str:
    return f"{url}{'&' if urlsplit(url).query else '?'}{urlencode(query)}" if url else ""


def _seconds(text: str | None, otherwise: float) -> float:
    return dt.datetime.fromisoformat(text).timestamp() if text else otherwise


def _row(ref: str, code: str, at: int, amount: int, fee: int, currency: str) -> Doc:
    info = {
        "transaction_id": ref, "transaction_event_code": code, "transaction_initiation_date": iso(at),
        "transaction_updated_date": iso(at),
        "transaction_amount": books.money(amount, currency), "fee_amount": books.money(-fee, currency), "transaction_status": "S",
    }  # fmt: skip
    return {"transaction_info": info, "_at": at}


def _richer(event: Doc) -> Doc:
    """The event with ten times the money in it."""

    def raised(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: raised(inner, key) for key, inner in value.items()}
        if isinstance(value, list):
            return [raised(inner) for inner in value]
        if name in ("total", "value", "subtotal") and isinstance(value, str):
            return value[:-1] + "9" if "." not in value else value.replace(".", "0.", 1)
        return value

    found: Doc = raised(event)
    return found
