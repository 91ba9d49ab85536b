"""What providers refuse, in our codes; and what is refused before they are asked. Answers as their documentation has them."""

from __future__ import annotations

from typing import Any

import pytest

from portico.control.billing import provider
from portico.control.billing.provider import Name, Provider
from portico.errors import Problem
from portico.settings import Secret
from tests.control.billing.providers import Told, script, serving, settings

_RAZORPAY: dict[str, Any] = {"source": "business", "step": "payment_initiation", "reason": "input_validation_failed"}


def _stripe(kind: str, code: str | None = None, **more: Any) -> dict[str, Any]:
    return {"error": {"type": kind, "code": code, "message": "Because\tof\nthis.", "param": None, **more}}


def _razorpay(description: str, **more: Any) -> dict[str, Any]:
    return {"error": {"code": "BAD_REQUEST_ERROR", "description": description, **_RAZORPAY, **more}}


def _paypal(name: str, issue: str = "") -> dict[str, Any]:
    details = [{"issue": issue, "description": "Because of this."}] if issue else []
    return {
        "name": name,
        "message": "The requested action could not be performed.",
        "debug_id": "d1",
        "details": details,
    }


_TOKEN = Told(200, {"access_token": "A21", "expires_in": 30_000})


async def _refund(name: Name, told: Told, *, amount: int | None = 500, currency: str = "EUR") -> tuple[Problem, int]:
    """What a refund raises when this is answered, and how often was asked."""
    answers = (_TOKEN, told) if name == "paypal" else (told,)
    async with serving(script(*answers)) as server:
        adapter = provider.of(settings(**{f"{name}_api_url": server.url}, billing_retries=0), name)
        try:
            with pytest.raises(Problem) as caught:
                ref = {"stripe": "pi_1", "razorpay": "pay_1", "paypal": "SALE1"}[name]
                await adapter.refund(ref, amount_minor=amount, currency=currency, reason="r", key="rfd_000000001")
        finally:
            await adapter.close()
        return caught.value, len(server.asked)


@pytest.mark.parametrize(
    ("name", "status", "body", "code"),
    [
        (
            "stripe",
            402,
            _stripe("card_error", "card_declined", decline_code="insufficient_funds"),
            "billing.payment_declined",
        ),
        ("stripe", 401, _stripe("invalid_request_error"), "billing.provider_credentials"),
        ("stripe", 403, _stripe("invalid_request_error"), "billing.provider_credentials"),
        ("stripe", 400, _stripe("idempotency_error"), "billing.provider_key_reused"),
        ("stripe", 400, _stripe("invalid_request_error", "charge_already_refunded"), "billing.provider_refused"),
        ("stripe", 409, _stripe("invalid_request_error", "lock_timeout"), "billing.provider_busy"),
        ("stripe", 409, _stripe("idempotency_error", "idempotency_key_in_use"), "billing.provider_busy"),
        ("stripe", 429, _stripe("rate_limit_error", "rate_limit"), "billing.provider_busy"),
        ("stripe", 500, _stripe("api_error"), "billing.provider_busy"),
        ("stripe", 200, b"<html>a proxy's page</html>", "billing.provider_unreadable"),
        ("stripe", 200, {"id": "re_1", "object": "refund"}, "billing.provider_unreadable"),
        ("razorpay", 400, _razorpay("The payment has been fully refunded already"), "billing.provider_refused"),
        (
            "razorpay",
            400,
            _razorpay("Card declined by the bank", source="bank", reason="payment_failed"),
            "billing.payment_declined",
        ),
        ("razorpay", 401, _razorpay("Authentication failed"), "billing.provider_credentials"),
        (
            "razorpay",
            400,
            _razorpay("Different request with the same idempotency key has already been processed."),
            "billing.provider_key_reused",
        ),
        ("razorpay", 409, _razorpay("A request is being processed"), "billing.provider_busy"),
        ("razorpay", 502, b"bad gateway", "billing.provider_busy"),
        ("razorpay", 400, b"not json", "billing.provider_unreadable"),
        ("razorpay", 200, {"id": "rfnd_1"}, "billing.provider_unreadable"),
        ("paypal", 422, _paypal("UNPROCESSABLE_ENTITY", "CAPTURE_FULLY_REFUNDED"), "billing.provider_refused"),
        ("paypal", 422, _paypal("UNPROCESSABLE_ENTITY", "INSTRUMENT_DECLINED"), "billing.payment_declined"),
        ("paypal", 422, _paypal("UNPROCESSABLE_ENTITY", "DUPLICATE_REQUEST_ID"), "billing.provider_key_reused"),
        ("paypal", 403, _paypal("NOT_AUTHORIZED", "PERMISSION_DENIED"), "billing.provider_credentials"),
        ("paypal", 404, _paypal("RESOURCE_NOT_FOUND", "INVALID_RESOURCE_ID"), "billing.provider_object_missing"),
        ("paypal", 409, _paypal("RESOURCE_CONFLICT"), "billing.provider_busy"),
        ("paypal", 429, _paypal("RATE_LIMIT_REACHED"), "billing.provider_busy"),
        ("paypal", 201, {"id": "REF1", "state": "completed"}, "billing.provider_unreadable"),
    ],
)
async def test_refusals_have_codes_and_are_fit_for_people(name: Name, status: int, body: Any, code: str) -> None:
    problem, asked = await _refund(name, Told(status, body))
    assert problem.code == code
    assert asked <= 2 + (name == "paypal")
    shown = str(problem.document())
    assert problem.detail.isprintable() and len(problem.detail) < 500
    for secret in ("sk_test_123", "rzp-secret", "pp-secret", "A21", "rfd_000000001"):
        assert secret not in shown


async def test_amounts_that_a_provider_cannot_express_are_not_asked_for() -> None:
    for name, amount, currency in (("paypal", 120_050, "HUF"), ("paypal", 5, "???"), ("stripe", 1550, "MGA")):
        problem, asked = await _refund(name, Told(500), amount=amount, currency=currency)  # type: ignore[arg-type]
        assert (problem.code, asked) == ("billing.amount_invalid", 0)


async def test_amounts_go_out_as_each_provider_counts() -> None:
    sent = []
    for name, amount, currency in (("paypal", 120_000, "HUF"), ("paypal", 1234, "KWD"), ("paypal", 900, "JPY")):
        done = Told(201, {"id": "R", "state": "completed", "amount": {"total": "1", "currency": currency}})
        async with serving(script(_TOKEN, done)) as server:
            adapter = provider.of(settings(paypal_api_url=server.url), name)  # type: ignore[arg-type]
            await adapter.refund("SALE1", amount_minor=amount, currency=currency, reason="r", key="rfd_000000001")
            await adapter.close()
            sent.append(server.asked[-1].json()["amount"]["total"])
    assert sent == ["1200", "1.234", "900"]
    async with serving(
        script(Told(200, {"id": "re_1", "amount": 1500, "currency": "isk", "status": "pending"}))
    ) as server:
        adapter = provider.of(settings(stripe_api_url=server.url), "stripe")
        made = await adapter.refund("ch_1", amount_minor=15, currency="ISK", reason="r", key="rfd_000000001")
        await adapter.close()
        assert b"amount=1500" in server.asked[-1].body and b"charge=ch_1" in server.asked[-1].body
        assert (made.amount_minor, made.currency, made.status) == (15, "ISK", "pending")


# -- PayPal's bearer


async def _paypal_adapter(url: str) -> Provider:
    return provider.of(settings(paypal_api_url=url), "paypal")


async def test_a_bearer_is_asked_for_once_and_anew_when_it_has_ended() -> None:
    answers = script(
        _TOKEN, Told(200, {"id": "I-1"}), Told(200, {"id": "I-1"}), Told(401), _TOKEN, Told(200, {"id": "I-1"})
    )
    async with serving(answers) as server:
        adapter = await _paypal_adapter(server.url)
        for _ in range(3):
            assert await adapter.fetch("I-1") == {"id": "I-1"}
        await adapter.close()
        assert [one.path for one in server.asked].count("/v1/oauth2/token") == 2
        assert server.asked[1].headers["authorization"] == "Bearer A21"


async def test_a_bearer_that_is_never_good_is_not_asked_for_without_end() -> None:
    def answer(asked: Any) -> Told:
        return _TOKEN if asked.path.endswith("/token") else Told(401)

    async with serving(answer) as server:
        adapter = await _paypal_adapter(server.url)
        with pytest.raises(Problem) as caught:
            await adapter.fetch("I-1")
        await adapter.close()
        assert caught.value.code == "billing.provider_credentials"
        assert len(server.asked) == 4


async def test_a_next_page_elsewhere_is_not_followed() -> None:
    for href in ("https://evil.example.com/v1/other", "/v1/payments/payouts"):
        page = Told(200, {"events": [], "links": [{"rel": "next", "href": href}]})
        async with serving(script(_TOKEN, page)) as server:
            adapter = await _paypal_adapter(server.url)
            with pytest.raises(Problem) as caught:
                from datetime import UTC, datetime

                _ = [one async for one in adapter.list_events(datetime.now(UTC))]
            await adapter.close()
            assert caught.value.code == "billing.provider_unreadable"
            assert len(server.asked) == 2


def test_a_secret_of_a_provider_is_in_no_text_of_its_adapter() -> None:
    secret = Secret("sk_test_hidden")
    adapter = provider.of(settings(stripe_secret_key=secret), "stripe")
    assert "hidden" not in repr(adapter) + str(vars(adapter))


async def test_what_a_provider_cannot_do_is_refused_without_asking() -> None:
    async with serving(script(Told(500))) as server:
        adapters = [provider.of(settings(**{f"{name}_api_url": server.url}), name) for name in provider.NAMES[1:]]
        asked = [
            adapters[0].portal("cust_1", "https://app.example.com", key="k"),
            adapters[1].portal("PAYER1", "https://app.example.com", key="k"),
            adapters[1].change("I-1", "P-TEAM", when="now", key="k"),
            adapters[1].cancel("I-1", at_period_end=True, reason="r", key="k"),
        ]
        for each in asked:
            with pytest.raises(Problem) as caught:
                await each
            assert (caught.value.code, caught.value.retryable) == ("billing.provider_unsupported", False)
        for adapter in adapters:
            await adapter.close()
        assert server.asked == []
