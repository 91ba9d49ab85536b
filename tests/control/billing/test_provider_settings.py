"""Settings of providers: all of one or none, one mode, and addresses that fit it."""

from __future__ import annotations

from typing import Any

import pytest

from portico import settings as portico_settings
from portico.control.app import create_app
from portico.control.billing import provider, provider_settings
from portico.errors import Problem
from portico.settings import ApiSettings, Secret, WorkerSettings
from portico.worker import runner
from tests.control.billing.providers import COMPLETE, settings

_LIVE: dict[str, Any] = {
    "billing_livemode": True, "stripe_secret_key": Secret("sk_live_1"), "razorpay_key_id": "rzp_live_1",
    "paypal_api_url": "https://api-m.paypal.com",
}  # fmt: skip


def _refusal(**changes: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        provider.configured(settings(**changes))
    assert caught.value.code == "config.invalid"
    return caught.value


def _none() -> dict[str, Any]:
    return {name: type(value)() if isinstance(value, str | tuple) else None for name, value in COMPLETE.items()}


def test_none_is_configured_by_default_and_all_can_be() -> None:
    assert provider.configured(settings(**(_none() | {"paypal_api_url": "https://api-m.paypal.com"}))) == ()
    assert provider.configured(settings()) == ("stripe", "razorpay", "paypal")
    assert provider.configured(settings(**_LIVE)) == ("stripe", "razorpay", "paypal")


@pytest.mark.parametrize("missing", [name for name in COMPLETE if name != "paypal_api_url"])
def test_half_a_provider_is_refused_by_the_name_of_what_is_missing(missing: str) -> None:
    problem = _refusal(**{missing: _none()[missing]})
    assert problem.extra["key"] == missing and f"{missing}: is missing" in problem.detail


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"stripe_secret_key": Secret("sk_live_1")}, "stripe_secret_key"),
        ({"stripe_secret_key": Secret("rk_live_1")}, "stripe_secret_key"),
        ({"stripe_secret_key": Secret("whatever")}, "stripe_secret_key"),
        ({"razorpay_key_id": "rzp_live_1"}, "razorpay_key_id"),
        ({"paypal_api_url": "https://api-m.paypal.com"}, "paypal_api_url"),
        (_LIVE | {"stripe_secret_key": Secret("sk_test_1")}, "stripe_secret_key"),
        (_LIVE | {"razorpay_key_id": "rzp_test_1"}, "razorpay_key_id"),
        (_LIVE | {"paypal_api_url": "https://api-m.sandbox.paypal.com"}, "paypal_api_url"),
        (_LIVE | {"stripe_api_url": "http://127.0.0.1:12111"}, "stripe_api_url"),
        ({"stripe_api_url": "http://stripe.example.com"}, "stripe_api_url"),
        ({"razorpay_api_url": "ftp://127.0.0.1"}, "razorpay_api_url"),
        ({"razorpay_api_url": "https://user@api.razorpay.com"}, "razorpay_api_url"),
        ({"paypal_cert_hosts": ()}, "paypal_cert_hosts"),
        ({"stripe_prices": ("pro",)}, "stripe_prices"),
        ({"stripe_prices": ("pro=price_1", "pro=price_2")}, "stripe_prices"),
        ({"paypal_plans": ("pro=P-1", "team=P-1")}, "paypal_plans"),
        ({"stripe_webhook_secret": Secret("sk_test_123")}, "stripe_webhook_secret"),
        ({"razorpay_webhook_secret": Secret("rzp-secret")}, "razorpay_webhook_secret"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], key: str) -> None:
    problem = _refusal(**changes)
    assert problem.extra["key"] == key
    assert "sk_live_1" not in str(problem) and "rzp-secret" not in str(problem)


def test_a_simulator_on_this_machine_may_speak_plain_http() -> None:
    urls = {f"{name}_api_url": "http://127.0.0.1:12111" for name in provider.NAMES}
    assert provider.configured(settings(**urls)) == provider.NAMES


def test_production_defaults_are_the_providers_own() -> None:
    base = {"database_url": Secret("x"), "master_key": Secret("x")}
    found = ApiSettings(**base)
    assert found.stripe_api_url == "https://api.stripe.com"
    assert found.razorpay_api_url == "https://api.razorpay.com"
    assert found.paypal_api_url == "https://api-m.paypal.com"
    assert found.paypal_cert_hosts == ("api.paypal.com", "api.sandbox.paypal.com")
    assert found.paypal_cert_ca_file is None


def test_secrets_come_from_files_and_print_masked(tmp_path: Any) -> None:
    file = tmp_path / "stripe"
    file.write_text("sk_test_from_file\n")
    file.chmod(0o600)
    environ = {
        "PORTICO_DATABASE_URL": "postgresql:///x", "PORTICO_MASTER_KEY": "k", "PORTICO_STRIPE_SECRET_KEY_FILE": str(file),
        "PORTICO_STRIPE_PRICES": "pro=price_1, team=price_2",
    }  # fmt: skip
    found = portico_settings.load(ApiSettings, environ=environ)
    assert found.stripe_secret_key is not None and found.stripe_secret_key.reveal() == "sk_test_from_file"
    assert provider_settings.prices(found, "stripe_prices") == {"pro": "price_1", "team": "price_2"}
    shown = repr(settings())
    for name, value in COMPLETE.items():
        assert not isinstance(value, Secret) or value.reveal() not in shown, name


async def test_adapters_are_made_once_and_only_when_set_up() -> None:
    providers = provider.Providers(settings(paypal_client_id="", paypal_client_secret=None, paypal_webhook_id="",
                                            paypal_account="", paypal_plans=()))  # fmt: skip
    assert providers.of("razorpay") is providers.of("razorpay")
    with pytest.raises(Problem) as caught:
        providers.of("paypal")
    assert caught.value.code == "billing.provider_unconfigured"
    await providers.close()


async def test_neither_api_nor_worker_starts_on_half_a_provider() -> None:
    half = settings(stripe_webhook_secret=None)
    with pytest.raises(Problem) as caught:
        create_app(half)
    assert caught.value.extra["key"] == "stripe_webhook_secret"
    with pytest.raises(Problem) as caught:
        await runner.serve(WorkerSettings(database_url=half.database_url), half, ("maintenance",))
    assert caught.value.extra["key"] == "stripe_webhook_secret"
