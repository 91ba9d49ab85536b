"""Whether the settings of payment providers fit together: all of a provider's or none, one mode, addresses that fit it.

Half a configuration would take money without hearing of it, or hear of it without being able to check. So a process that has
one refuses to start and says what is missing.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from portico.errors import Problem
from portico.settings import ApiSettings

#: What each provider cannot do without; the first says that it is wanted.
_NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "stripe": ("stripe_secret_key", "stripe_webhook_secret", "stripe_account", "stripe_prices"),
    "razorpay": ("razorpay_key_id", "razorpay_key_secret", "razorpay_webhook_secret", "razorpay_account", "razorpay_plans"),
    "paypal": ("paypal_client_id", "paypal_client_secret", "paypal_webhook_id", "paypal_account", "paypal_plans"),
}  # fmt: skip
#: What Stripe's and Razorpay's keys begin with, live and for tests.
_LIVE: Final = ("sk_live_", "rk_live_", "rzp_live_")
_TEST: Final = ("sk_test_", "rk_test_", "rzp_test_")
#: PayPal's mode is its address.
_PAYPAL: Final = {True: "api-m.paypal.com", False: "api-m.sandbox.paypal.com"}
_PAIRS: Final = ("stripe_prices", "razorpay_plans", "paypal_plans")


def configured(settings: ApiSettings) -> frozenset[str]:
    """The providers that are set up; see the module. Raises ``config.invalid``."""
    found = {name for name, needed in _NEEDED.items() if _whole(settings, needed)}
    if "stripe" in found and settings.stripe_secret_key is not None:
        _mode(settings, "stripe_secret_key", settings.stripe_secret_key.reveal())
    if "razorpay" in found:
        _mode(settings, "razorpay_key_id", settings.razorpay_key_id)
    for name in sorted(found):
        _address(settings, f"{name}_api_url")
    if "paypal" in found:
        _paypal(settings)
    for name in _PAIRS:
        prices(settings, name)
    _apart(settings)
    return frozenset(found)


def prices(settings: ApiSettings, name: str) -> dict[str, str]:
    """The provider's id of each plan's price, of the setting ``name``. Raises ``config.invalid``."""
    found: dict[str, str] = {}
    for pair in getattr(settings, name):
        plan, _, price = (part.strip() for part in pair.partition("="))
        if not plan or not price:
            raise _refused(name, f"{pair!r} is not PLAN=ID")
        if plan in found or price in found.values():
            raise _refused(name, f"{pair!r}: a plan has one price, and a price one plan")
        found[plan] = price
    return found


def _whole(settings: ApiSettings, needed: tuple[str, ...]) -> bool:
    missing = [name for name in needed if not getattr(settings, name)]
    if missing and len(missing) < len(needed):
        given = next(name for name in needed if name not in missing)
        raise _refused(missing[0], f"is missing, and {given} is set: set all of {', '.join(needed)}, or none")
    return not missing


def _mode(settings: ApiSettings, name: str, key: str) -> None:
    live = settings.billing_livemode
    if key.startswith(_TEST if live else _LIVE):
        kind = "for tests" if live else "live"
        raise _refused(name, f"is a key {kind}, and billing_livemode is {str(live).lower()}")
    if not key.startswith((*_LIVE, *_TEST)):
        raise _refused(name, f"does not begin with one of {', '.join((*_LIVE, *_TEST))}")


def _address(settings: ApiSettings, name: str) -> None:
    parts = urlsplit(getattr(settings, name))
    if not parts.hostname or parts.username is not None or parts.query or parts.fragment:
        raise _refused(name, "is not an address without user and query")
    if parts.scheme == "https" or (
        parts.scheme == "http" and not settings.billing_livemode and _loopback(parts.hostname)
    ):
        return
    raise _refused(name, "begins with https:// (http:// only on this machine, and without billing_livemode)")


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _paypal(settings: ApiSettings) -> None:
    host = urlsplit(settings.paypal_api_url).hostname
    other = _PAYPAL[not settings.billing_livemode]
    if host == other:
        kind = "live" if not settings.billing_livemode else "for tests"
        raise _refused(
            "paypal_api_url", f"is PayPal {kind}, and billing_livemode is {str(settings.billing_livemode).lower()}"
        )
    if not settings.paypal_cert_hosts:
        raise _refused("paypal_cert_hosts", "is empty: no signature of PayPal's could be checked")


def _apart(settings: ApiSettings) -> None:
    """A secret that signs to us is known where webhooks come in, and no key to an account is to be."""
    for hook, key in (
        ("stripe_webhook_secret", "stripe_secret_key"),
        ("razorpay_webhook_secret", "razorpay_key_secret"),
    ):
        if getattr(settings, hook) is not None and getattr(settings, hook) == getattr(settings, key):
            raise _refused(hook, f"is the same as {key}")


def _refused(key: str, what: str) -> Problem:
    return Problem("config.invalid", f"setting {key}: {what}", key=key)
