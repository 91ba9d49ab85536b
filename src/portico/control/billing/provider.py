"""The seam to payment providers: what every one of them does for us, in our words.

    adapter = provider.of(settings, "stripe")               `config.invalid`: half configured; `billing.provider_unconfigured`
    order   = Order(reference="chk_…", price="price_…", success_url=…, cancel_url=…)
    bought  = await adapter.checkout(order, key=order.reference)        where the customer pays: bought.url

Duties of an adapter:

- **Nothing happens twice.** Every call that changes something takes a ``key``; the same key with the same request is the same
  act at the provider, however often it is sent. Callers record the intent and its key, commit, call, and record the result.
- **Nothing hangs.** A call ends within ``billing_call_seconds``, retries included; a provider that fails again and again is
  left alone for a while (``billing.provider_circuit_open``).
- **Nothing is guessed.** What comes back is the provider's own object; amounts are integers in minor units.
- **No transaction is open during a call**: callers' duty.

An adapter raises ``Problem`` with a code of ``billing.*`` alone (provider_errors.py). One adapter is made for each process and
closed at its end (:class:`Providers`): it keeps connections and knows how the provider fares.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, Protocol

from portico.control.billing import provider_errors, provider_settings
from portico.settings import ApiSettings

Name = Literal["stripe", "razorpay", "paypal"]
NAMES: Final[tuple[Name, ...]] = ("stripe", "razorpay", "paypal")

#: What not every provider can do; an adapter names what its own can (``Provider.can``), and raises
#: ``billing.provider_unsupported`` for the rest.
Ability = Literal[
    "change_now",  # another plan at once, with proration by the provider
    "change_at_period_end",
    "change_needs_consent",  # the customer agrees to a change on the provider's page
    "cancel_at_period_end",
    "undo_cancel",  # resume() takes back a cancellation at the end of the period
    "resume",  # resume() of a paused or suspended subscription
    "events",  # a list of past events, as its webhooks had them; otherwise they are made from its lists of objects
    "portal",  # a page of the provider on which customers change how they pay
    "close_page",  # close_page(): a page that is open can be paid no longer
    "returns",  # its page leads back to success_url or cancel_url
    "retries",  # the provider tries failed payments again by itself
    "collect",  # it tries one when it is asked to
    "charge",  # something beside the plan can be put on the next invoice
    "charge_now",  # … or on an invoice of its own
]

When = Literal["now", "period_end"]
#: What an id can name.
Kind = Literal[
    "subscription", "invoice", "payment", "refund", "dispute", "payout", "checkout", "customer", "price", "event"
]


@dataclass(frozen=True, slots=True)
class Order:
    """What is bought. ``reference``: our checkout (``chk_…``); ``price``: the provider's id of the price or plan."""

    reference: str
    price: str
    success_url: str
    cancel_url: str
    customer_ref: str | None = None  # who bought here before
    email: str | None = None
    name: str | None = None
    quantity: int = 1
    trial_days: int = 0


@dataclass(frozen=True, slots=True)
class Checkout:
    """A page on which to pay. What is known of customer and subscription is to be mapped to the organization before the page
    is shown: their events may come before the checkout's own."""

    ref: str
    url: str
    customer_ref: str | None
    subscription_ref: str | None
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Change:
    """How a change of plan stands. ``url``: where the customer has to agree first, for ``needs_consent``.

    Entitlements follow the provider's event, never this answer.
    """

    status: Literal["done", "scheduled", "needs_consent"]
    url: str | None = None


@dataclass(frozen=True, slots=True)
class State:
    """A subscription after a call: the provider's word for its status, and whether it ends with its period."""

    ref: str
    provider_status: str
    cancel_at_period_end: bool


@dataclass(frozen=True, slots=True)
class Charge:
    """Something to be paid beside the plan. ``reference``: our charge (``ovc_…``), of which there is one at the provider, however
    often it is asked for; ``since``: when it was first asked for. ``at_once``: on an invoice of its own (``charge_now``)."""

    reference: str
    subscription_ref: str
    customer_ref: str | None
    description: str
    amount_minor: int
    currency: str
    period_start: datetime
    period_end: datetime
    since: datetime
    at_once: bool = False


Collected = Literal["paid", "declined", "nothing"]
RefundStatus = Literal["pending", "succeeded", "failed"]


@dataclass(frozen=True, slots=True)
class Refund:
    """A refund as the provider took it. ``pending`` ones are settled by an event."""

    ref: str
    status: RefundStatus
    amount_minor: int
    currency: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """Objects as the provider had them at or after ``at`` (before the first request for them was sent), by what they are:
    subscription, invoice, payment, charge, balance_transaction, refund, dispute, payout, checkout."""

    at: datetime
    objects: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a verified body came from: our account there, its mode, when it came, and the SHA-256 of its bytes.

    ``event_id``: the event's id where the body has none (Razorpay's is a header).
    """

    account: str
    livemode: bool
    received_at: datetime
    raw_sha256: bytes
    event_id: str = ""


class Provider(Protocol):
    """One payment provider. See the module for what holds of every method."""

    name: Name
    account: str
    livemode: bool
    can: frozenset[Ability]

    async def checkout(self, order: Order, *, key: str) -> Checkout:
        """Make a page on which ``order`` is paid."""

    async def close_page(self, checkout_ref: str, *, key: str) -> None:
        """Let a page of :meth:`checkout` be paid no longer. One that was paid, or is over, is refused."""

    async def change(self, subscription_ref: str, price: str, *, when: When, return_url: str = "", key: str) -> Change:
        """Put a subscription on another price, prorated at once or from its next period on.

        ``return_url``: where the customer comes back to who has to agree (``change_needs_consent``).
        """

    async def cancel(self, subscription_ref: str, *, at_period_end: bool, reason: str, key: str) -> State:
        """End a subscription, now or with its period. One that has ended already is no error."""

    async def resume(self, subscription_ref: str, *, key: str) -> State:
        """Take back a cancellation at the end of the period, or go on with a paused or suspended subscription."""

    async def refund(
        self, payment_ref: str, *, amount_minor: int | None, currency: str, reason: str, key: str
    ) -> Refund:
        """Give a payment back, all that is left of it when ``amount_minor`` is ``None``."""

    async def refund_made(self, payment_ref: str, *, key: str) -> Refund | None:
        """The refund that :meth:`refund` made under ``key``, when that is so long ago that the provider may have forgotten the
        key; ``None``: there is none, or the provider never forgets."""

    async def collect(
        self, subscription_ref: str, invoice_ref: str | None, *, amount_minor: int, currency: str, key: str
    ) -> Collected:
        """Try to be paid what is open of an invoice, or of the subscription; ``nothing``: nothing is."""

    async def charge(self, charge: Charge, *, key: str) -> str:
        """Have something paid beside the plan; what the provider calls it."""

    async def fetch(self, ref: str, kind: Kind | None = None) -> Mapping[str, Any]:
        """One object by its id. ``kind`` is needed where ids do not tell what they name (PayPal's sales and refunds).

        ``billing.provider_object_missing``: there is none.
        """

    async def authority(self, body: Mapping[str, Any]) -> Fetched:
        """The objects that the event ``body`` is about, as they are now: what normalization decides by instead of the body.

        An object that is gone is left out.
        """

    def list_events(self, since: datetime, until: datetime | None = None) -> AsyncIterator[Mapping[str, Any]]:
        """Bodies of events since (oldest first where the provider can), in the shape of its webhooks.

        Where the provider lists none (no ``events`` in ``can``), they are made from its lists of subscriptions, payments and
        refunds, under ids that begin with ``list:`` and stay the same; their effects are those of the real ones.
        """

    async def portal(self, customer_ref: str, return_url: str, *, key: str) -> str:
        """The address of a page on which the customer looks after how they pay."""

    async def close(self) -> None:
        """Let go of connections."""


def of(settings: ApiSettings, name: Name) -> Provider:
    """A new adapter. Raises ``billing.provider_unconfigured``, or ``config.invalid`` for half a configuration."""
    if name not in configured(settings):
        raise provider_errors.unconfigured(name)
    # Late: each brings a library that only an installation which uses it needs, and knows this module.
    if name == "stripe":
        from portico.control.billing.stripe import Stripe

        return Stripe(settings)
    if name == "razorpay":
        from portico.control.billing.razorpay import Razorpay

        return Razorpay(settings)
    from portico.control.billing.paypal import PayPal

    return PayPal(settings)


def configured(settings: ApiSettings) -> tuple[Name, ...]:
    """The providers that are set up. Raises ``config.invalid`` for one that is half set up, or set up wrongly."""
    found = provider_settings.configured(settings)
    return tuple(name for name in NAMES if name in found)


class Providers:
    """The adapters of a process, each made when it is first asked for. Raises ``config.invalid`` for settings that do not fit."""

    def __init__(self, settings: ApiSettings) -> None:
        configured(settings)
        self._settings = settings
        self._made: dict[Name, Provider] = {}

    def of(self, name: Name) -> Provider:
        """Raises ``billing.provider_unconfigured``."""
        if name not in self._made:
            self._made[name] = of(self._settings, name)
        return self._made[name]

    async def close(self) -> None:
        """Let go of all connections."""
        made, self._made = list(self._made.values()), {}
        for adapter in made:
            await adapter.close()
