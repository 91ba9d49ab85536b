"""The PayPal simulator, by HTTP, delivering to a real receiver that checks the certificate too."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import given, settings
from hypothesis import strategies as st

from portico.simulators import paypal_signing
from portico.simulators.billing_world import DAY, Offer
from portico.simulators.paypal import PayPalSimulator
from portico.simulators.webhooks import Got
from tests.simulators.receiver import Received

MONTH = 32 * DAY


class Shop:
    """A simulator, a client that signed in, and the receiver of its webhooks."""

    def __init__(self, simulator: PayPalSimulator, receiver: Received) -> None:
        self.paypal, self.receiver = simulator, receiver
        self.http = httpx.AsyncClient(base_url=simulator.url)

    async def sign_in(self) -> None:
        pair = (self.paypal.client_id, self.paypal.client_secret)
        answer = await self.http.post("/v1/oauth2/token", data={"grant_type": "client_credentials"}, auth=pair)
        self.http.headers["authorization"] = f"Bearer {answer.raise_for_status().json()['access_token']}"

    async def post(self, path: str, body: Any = None, status: int = 200, **headers: str) -> Any:
        answer = await self.http.post(path, json=body or {}, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    async def get(self, path: str) -> Any:
        return (await self.http.get(path)).raise_for_status().json()

    async def created(self, plan: str = "pro") -> Any:
        context = {"return_url": "http://shop.test/ok", "cancel_url": "http://shop.test/no"}
        body = {"plan_id": self.paypal.price(plan), "custom_id": "chk_1", "application_context": context}
        return await self.post("/v1/billing/subscriptions", body, 201)

    async def subscribed(self, plan: str = "pro", card: str = "good") -> Any:
        made = await self.created(plan)
        self.paypal.pay(made["id"], card)  # type: ignore[arg-type]
        await self.paypal.settled()
        return await self.get(f"/v1/billing/subscriptions/{made['id']}")

    async def sale(self, subscription: Any) -> Any:
        """Its newest payment."""
        rows = (await self.get(f"/v1/billing/subscriptions/{subscription['id']}/transactions"))["transactions"]
        return await self.get(f"/v1/payments/sale/{rows[-1]['id']}")

    async def verify(self, got: Got) -> None:
        """As a receiver would: the certificate from where it says, its chain to the root, its name, the signature."""
        headers = got.headers
        assert headers["paypal-cert-url"].startswith(f"{self.paypal.url}/v1/notifications/certs/")
        leaf, *_ = x509.load_pem_x509_certificates((await self.http.get(headers["paypal-cert-url"])).content)
        trusted = Store(x509.load_pem_x509_certificates(self.paypal.root.encode()))
        name = x509.DNSName(paypal_signing.CERTIFICATE_NAME)
        PolicyBuilder().store(trusted).build_server_verifier(name).verify(leaf, [])
        key = leaf.public_key()
        assert isinstance(key, rsa.RSAPublicKey) and headers["paypal-auth-algo"] == "SHA256withRSA"
        fields = (
            headers["paypal-transmission-id"],
            headers["paypal-transmission-time"],
            self.paypal.webhook_id,
            zlib.crc32(got.body),
        )
        signed = "|".join(str(field) for field in fields).encode()
        key.verify(base64.b64decode(headers["paypal-transmission-sig"]), signed, padding.PKCS1v15(), SHA256())

    async def events(self) -> list[str]:
        """Types of what came since the last look, each verified."""
        await self.paypal.settled()
        for got in self.receiver.got:
            await self.verify(got)
        found = [event["event_type"] for event in self.receiver.documents]
        self.receiver.clear()
        return found


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    async with Received() as receiver, PayPalSimulator(webhook_url=receiver.address) as simulator:
        made = Shop(simulator, receiver)
        await made.sign_in()
        yield made
        await made.http.aclose()


async def test_an_approval_ends_in_an_active_subscription_and_a_sale(shop: Shop) -> None:
    made = await shop.created()
    page = next(link["href"] for link in made["links"] if link["rel"] == "approve")
    assert made["status"] == "APPROVAL_PENDING" and "19.00 USD" in (await shop.http.get(page)).text
    assert (await shop.http.post(page, data={"act": "pay", "card": "declines"})).status_code == 402
    away = await shop.http.post(page, data={"act": "cancel"})
    assert away.headers["location"].startswith("http://shop.test/no?subscription_id=I-")
    back = await shop.http.post(page, data={"act": "pay", "card": "good"})
    assert back.status_code == 303 and httpx.URL(back.headers["location"]).params["subscription_id"] == made["id"]
    await shop.paypal.settled()
    created, activated, sale = shop.receiver.documents
    assert await shop.events() == [
        "BILLING.SUBSCRIPTION.CREATED",
        "BILLING.SUBSCRIPTION.ACTIVATED",
        "PAYMENT.SALE.COMPLETED",
    ]
    assert created["resource"]["status"] == "APPROVAL_PENDING" and created["resource_version"] == "2.0"
    assert activated["resource"]["billing_info"]["last_payment"]["amount"] == {"currency_code": "USD", "value": "19.00"}
    assert sale["resource"]["billing_agreement_id"] == made["id"] and sale["resource"]["custom"] == "chk_1"
    assert sale["resource"]["amount"]["total"] == "19.00" and sale["resource"]["transaction_fee"] == {
        "currency": "USD",
        "value": "1.16",
    }
    assert (await shop.get(f"/v1/payments/sale/{sale['resource']['id']}"))["state"] == "completed"
    assert (await shop.http.get(page)).status_code == 410


async def test_failed_payments_suspend_and_a_captured_debt_recovers(shop: Shop) -> None:
    sub = await shop.subscribed(card="fails_later")
    await shop.events()
    await shop.paypal.advance(MONTH)
    assert await shop.events() == ["BILLING.SUBSCRIPTION.PAYMENT.FAILED"]
    info = (await shop.get(f"/v1/billing/subscriptions/{sub['id']}"))["billing_info"]
    assert info["failed_payments_count"] == 1 and info["outstanding_balance"]["value"] == "19.00"
    assert "next_payment_retry_time" in info["last_failed_payment"]
    await shop.post(f"/v1/billing/subscriptions/{sub['id']}/capture", {"note": "x"}, 422)
    await shop.events()
    shop.paypal.set_card(sub["id"], "good")
    await shop.post(f"/v1/billing/subscriptions/{sub['id']}/capture", {"note": "x"})
    assert await shop.events() == ["PAYMENT.SALE.COMPLETED"]
    shop.paypal.set_card(sub["id"], "declines")
    await shop.paypal.advance(MONTH + 11 * DAY)
    assert await shop.events() == ["BILLING.SUBSCRIPTION.PAYMENT.FAILED"] * 3 + ["BILLING.SUBSCRIPTION.SUSPENDED"]
    info = (await shop.get(f"/v1/billing/subscriptions/{sub['id']}"))["billing_info"]
    assert info["failed_payments_count"] == 3 and "next_payment_retry_time" not in info["last_failed_payment"]
    shop.paypal.set_card(sub["id"], "good")
    await shop.post(f"/v1/billing/subscriptions/{sub['id']}/activate", {"reason": "again"}, 204)
    assert (await shop.get(f"/v1/billing/subscriptions/{sub['id']}"))["status"] == "ACTIVE"


async def test_revision_needs_consent_and_is_paid_with_the_next_cycle(shop: Shop) -> None:
    sub = await shop.subscribed()
    await shop.events()
    revised = await shop.post(f"/v1/billing/subscriptions/{sub['id']}/revise", {"plan_id": shop.paypal.price("team")})
    page = next(link["href"] for link in revised["links"] if link["rel"] == "approve")
    assert (await shop.get(f"/v1/billing/subscriptions/{sub['id']}"))["plan_id"] == shop.paypal.price("pro")
    assert "99.00 USD" in (await shop.http.get(page)).text
    assert (await shop.http.post(page, data={"act": "pay"})).status_code == 303
    assert await shop.events() == ["BILLING.SUBSCRIPTION.UPDATED"]
    await shop.paypal.advance(MONTH)
    assert (await shop.sale(sub))["amount"]["total"] == "99.00"


async def test_cancel_suspend_and_what_is_not_allowed(shop: Shop) -> None:
    sub = await shop.subscribed()
    at = f"/v1/billing/subscriptions/{sub['id']}"
    await shop.post(f"{at}/suspend", {"reason": "a"}, 204)
    await shop.post(f"{at}/suspend", {"reason": "a"}, 422)
    await shop.post(f"{at}/activate", {"reason": "b"}, 204)
    await shop.post(f"{at}/cancel", {"reason": "c"}, 204)
    refused = await shop.post(f"{at}/cancel", {"reason": "c"}, 422)
    assert refused["details"][0]["issue"] == "SUBSCRIPTION_STATUS_INVALID"
    assert (await shop.events())[-3:] == [
        f"BILLING.SUBSCRIPTION.{word}" for word in ("SUSPENDED", "RE-ACTIVATED", "CANCELLED")
    ]
    await shop.paypal.advance(3 * MONTH)
    assert await shop.events() == []


async def test_refunds_by_both_apis_once_per_key(shop: Shop) -> None:
    sale = await shop.sale(await shop.subscribed())
    key = {"PayPal-Request-Id": "ours-1"}
    part = {"amount": {"total": "5.00", "currency": "USD"}}
    first = await shop.post(f"/v1/payments/sale/{sale['id']}/refund", part, 201, **key)
    assert await shop.post(f"/v1/payments/sale/{sale['id']}/refund", part, 201, **key) == first
    await shop.post(f"/v1/payments/sale/{sale['id']}/refund", {}, 422, **key)
    too_much = {"amount": {"value": "14.01", "currency_code": "USD"}}
    await shop.post(f"/v2/payments/captures/{sale['id']}/refund", too_much, 422)
    rest = await shop.post(f"/v2/payments/captures/{sale['id']}/refund", {}, 201)
    assert rest["amount"] == {"currency_code": "USD", "value": "14.00"} and rest["status"] == "COMPLETED"
    await shop.paypal.settled()
    told = [event["resource"] for event in shop.receiver.documents if event["event_type"] == "PAYMENT.SALE.REFUNDED"]
    assert [row["amount"]["total"] for row in told] == ["-5.00", "-14.00"] and told[0]["sale_id"] == sale["id"]
    assert (await shop.get(f"/v1/payments/refund/{told[0]['id']}"))["amount"]["total"] == "5.00"
    assert (await shop.get(f"/v2/payments/captures/{sale['id']}"))["status"] == "REFUNDED"


async def test_disputes_reports_and_events_listed(shop: Shop) -> None:
    sub, other = await shop.subscribed(), await shop.subscribed("team")
    won = shop.paypal.dispute((await shop.sale(sub))["id"], "fraudulent")
    shop.paypal.decide(won["dispute_id"], won=True)
    lost = shop.paypal.dispute((await shop.sale(other))["id"], "fraudulent")
    await shop.post(f"/v1/customer/disputes/{lost['dispute_id']}/accept-claim", {"note": "x"})
    kinds = await shop.events()
    assert kinds[-5:] == [
        "CUSTOMER.DISPUTE.CREATED", "CUSTOMER.DISPUTE.RESOLVED", "CUSTOMER.DISPUTE.CREATED", "PAYMENT.SALE.REVERSED",
        "CUSTOMER.DISPUTE.RESOLVED",
    ]  # fmt: skip
    found = await shop.get(f"/v1/customer/disputes/{lost['dispute_id']}")
    assert found["dispute_outcome"]["outcome_code"] == "RESOLVED_BUYER_FAVOUR"
    report = await shop.get("/v1/reporting/transactions?start_date=2020-01-01T00:00:00Z&end_date=2100-01-01T00:00:00Z")
    rows = [row["transaction_info"] for row in report["transaction_details"]]
    assert [row["transaction_event_code"] for row in rows] == ["T0002", "T0002", "T1201"]
    assert sum(Decimal(row["transaction_amount"]["value"]) for row in rows) == Decimal("19.00")
    listed, where = [], "/v1/notifications/webhooks-events?page_size=4"
    while where:
        page = await shop.get(where)
        listed += [event["event_type"] for event in page["events"]]
        where = next((link["href"] for link in page["links"] if link["rel"] == "next"), "")
    assert listed == kinds[::-1]


async def test_a_body_is_forged_under_a_genuine_signature(shop: Shop) -> None:
    await shop.created()
    await shop.paypal.settled()
    shop.receiver.clear()
    shop.paypal.faults.tamper = -1
    await shop.subscribed()
    forged = next(got for got in shop.receiver.got if b"PAYMENT.SALE.COMPLETED" in got.body)
    await shop.verify(forged)
    body = json.loads(forged.body)
    assert body["resource"]["amount"]["total"] == "190.00", "and yet it verifies"
    assert (await shop.get(f"/v1/payments/sale/{body['resource']['id']}"))["amount"]["total"] == "19.00"
    event = await shop.get(f"/v1/notifications/webhooks-events/{body['id']}")
    assert event["resource"]["amount"]["total"] == "19.00"


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.text(max_size=30), min_size=1), st.integers())
def test_any_body_can_be_given_the_crc_of_another(genuine: dict[str, str], number: int) -> None:
    one, other = json.dumps(genuine).encode(), json.dumps({"wanted": number}).encode()
    forged = paypal_signing.forge(one, other)
    assert zlib.crc32(forged) == zlib.crc32(one) and json.loads(forged)["wanted"] == number


async def test_a_wrong_signature_and_a_stale_time(shop: Shop) -> None:
    shop.paypal.faults.change({"wrong_signature": 1, "stale": 3600})
    await shop.created()
    await shop.paypal.settled()
    (got,) = shop.receiver.got
    with pytest.raises(InvalidSignature):
        await shop.verify(got)
    posted = {
        name.replace("-", "_"): got.headers[f"paypal-{name}"]
        for name in ("transmission-id", "transmission-time", "transmission-sig", "cert-url", "auth-algo")
    }
    asked = posted | {"webhook_id": shop.paypal.webhook_id, "webhook_event": json.loads(got.body)}
    assert (await shop.post("/v1/notifications/verify-webhook-signature", asked))["verification_status"] == "FAILURE"
    event = json.loads(got.body)["id"]
    await shop.post(f"/v1/notifications/webhooks-events/{event}/resend", status=202)
    await shop.paypal.settled()
    await shop.verify(shop.receiver.got[1])


async def test_bearers_end_and_strangers_have_none(shop: Shop) -> None:
    wrong = await shop.http.post("/v1/oauth2/token", data={"grant_type": "client_credentials"}, auth=("a", "b"))
    assert wrong.status_code == 401
    shop.paypal.forget_bearers()
    assert (await shop.http.get("/v1/billing/plans")).status_code == 401
    await shop.sign_in()
    plans = (await shop.get("/v1/billing/plans"))["plans"]
    assert [plan["name"] for plan in plans] == ["Pro", "Team"]
    assert (await shop.http.get("/v1/billing/subscriptions/I-NOTHING")).status_code == 404


async def test_yen_have_no_decimals() -> None:
    offers = [Offer("pro", "Pro", 1900, "JPY")]
    async with Received() as receiver, PayPalSimulator(webhook_url=receiver.address, offers=offers) as simulator:
        shop = Shop(simulator, receiver)
        await shop.sign_in()
        sale = await shop.sale(await shop.subscribed())
        assert sale["amount"]["total"] == "1900"
        bad = {"amount": {"total": "1.5", "currency": "JPY"}}
        await shop.post(f"/v1/payments/sale/{sale['id']}/refund", bad, 400)
