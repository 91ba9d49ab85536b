"""Finance events: what happened to money or to a subscription, in one form for every provider, written once and never changed.

    if await events.record(tx, event):      # False: that effect is already there
        await postings.post(tx, event)

An event is known by its **effect** (``payment.succeeded:stripe:in_1``) within a provider's account and mode: the same effect
told twice, by another delivery, another event or a replay, is recorded once. Events of an organization form a hash chain of
their own, whose head is locked until the transaction ends; so whoever records an event of an organization sees everything
that was recorded of it before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, Final, Literal, get_args

from portico.control.finance import store
from portico.kit import pages
from portico.kit.canonical import MAX_INTEGER
from portico.kit.db import HasConnection, Reader, Tx
from portico.kit.ids import new_id

Provider = Literal["stripe", "razorpay", "paypal", "platform"]
LineKind = Literal["plan", "proration", "overage"]

#: The chain of what belongs to no organization (payouts).
PLATFORM: Final = "platform"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of an invoice. Amounts are minor units of the invoice's currency, negative for credits; a rate is basis points."""

    description: str
    quantity: int
    unit_minor: int
    net_minor: int
    tax_minor: int
    tax_rate_bp: int | None
    period_start: datetime | None
    period_end: datetime | None
    kind: LineKind = "plan"


@dataclass(frozen=True, slots=True)
class FinanceEvent:
    """See the module. Amounts are minor units (ISO 4217), never negative: ``kind`` says which way they went.

    ``status``: of ``subscription.*`` the subscription's own, of refunds and disputes ``succeeded | failed | open | won | lost``.
    ``object_version`` rises with the object that it is about; 0: unknown.
    """

    provider: Provider
    account: str
    livemode: bool
    event_id: str
    event_type: str
    api_version: str | None
    kind: str
    occurred_at: datetime
    received_at: datetime
    raw_sha256: bytes
    effect_key: str
    organization_id: str | None = None
    customer_ref: str | None = None
    subscription_ref: str | None = None
    invoice_ref: str | None = None
    payment_ref: str | None = None
    refund_ref: str | None = None
    dispute_ref: str | None = None
    payout_ref: str | None = None
    checkout_ref: str | None = None
    status: str | None = None
    plan_ref: str | None = None
    cancel_at_period_end: bool | None = None
    amount_minor: int | None = None
    tax_minor: int | None = None
    fee_minor: int | None = None
    net_minor: int | None = None
    currency: str | None = None
    period_start: datetime | None = None
    period_end: datetime | None = None
    attempt: int | None = None
    next_attempt_at: datetime | None = None
    is_final_attempt: bool | None = None
    failure_code: str | None = None
    object_version: int = 0
    invoice_number: str | None = None
    lines: tuple[Line, ...] = ()

    @property
    def source(self) -> str:
        """The account and mode that references are unique in: ``stripe:acct_1:live``."""
        return f"{self.provider}:{self.account}:{'live' if self.livemode else 'test'}"


_AMOUNTS: Final = ("amount_minor", "tax_minor", "fee_minor", "net_minor")
_NAMES: Final = tuple(field.name for field in fields(FinanceEvent))
_REFERENCES: Final = tuple(name for name in _NAMES if name.endswith("_ref") and name != "plan_ref")


def check(event: FinanceEvent) -> None:
    """Raises ``ValueError`` for an event that no ledger may hear of: a naive time, a broken amount or currency, no effect."""
    if event.provider not in get_args(Provider):
        raise ValueError(f"{event.provider!r} is no provider")
    if not (event.effect_key and event.event_id and event.kind):
        raise ValueError("an event has an id, a kind and an effect")
    if len(event.raw_sha256) != 32:
        raise ValueError("raw_sha256 has 32 bytes")
    for name in _NAMES:
        if isinstance(value := getattr(event, name), datetime) and value.tzinfo is None:
            raise ValueError(f"{name} has no zone")
    for name in _AMOUNTS:
        if (value := getattr(event, name)) is not None and not _is_amount(value):
            raise ValueError(f"{name} is not an amount in minor units")
    for line in event.lines:
        if not all(map(_is_amount, (line.unit_minor, line.net_minor, line.tax_minor))):
            raise ValueError(f"a line of {event.kind} is not in minor units")
    if event.currency is not None and not is_currency(event.currency):
        raise ValueError(f"{event.currency!r} is no currency")
    if event.currency is None and any(getattr(event, name) is not None for name in _AMOUNTS):
        raise ValueError("an amount has a currency")


def _is_amount(value: Any) -> bool:
    return type(value) is int and abs(value) <= MAX_INTEGER


def is_currency(text: str) -> bool:
    """Whether it is spelled like a code of ISO 4217."""
    return len(text) == 3 and text.isascii() and text.isalpha() and text.isupper()


async def record(tx: Tx, event: FinanceEvent) -> bool:
    """Write ``event`` at the end of its organization's chain; False when its effect is already there.

    Whoever records the same effect at the same time waits for this transaction and is then told False. Raises
    ``ValueError`` as :func:`check` does.
    """
    return await record_id(tx, event) is not None


async def record_id(tx: Tx, event: FinanceEvent) -> str | None:
    """The same; the new event's id (``fev_…``), or ``None``."""
    check(event)
    chain = event.organization_id or PLATFORM
    identity = (event.provider, event.account, event.livemode, event.effect_key)
    head = await store.lock_head(tx, chain, store.EVENTS)
    if await store.event_id(tx, *identity) is not None:
        return None
    row = {"id": new_id("fev"), "chain": chain, "seq": head.seq + 1, "recorded_at": head.at, **values(event)}
    row["hash"] = store.link(head.hash, content(row))
    await store.insert_event(tx, row)
    await store.advance(tx, chain, store.EVENTS, row["seq"], row["hash"])
    return str(row["id"])


def values(event: FinanceEvent) -> dict[str, Any]:
    """The columns that ``event`` fills; its lines as a list of objects that JSON can hold."""
    row = {name: getattr(event, name) for name in _NAMES}
    row["lines"] = [{name: plain(value) for name, value in asdict(line).items()} for line in event.lines]
    return row


def content(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is hashed of a row: everything in it but the hash."""
    return {name: plain(row[name]) for name in ("id", "chain", "seq", "recorded_at", *_NAMES)}


def plain(value: Any) -> Any:
    """A value as the hashed form has it: times in UTC with microseconds, bytes in hex."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return value.hex() if isinstance(value, bytes) else value


def of_row(row: Any) -> FinanceEvent:
    """The event of a stored row."""
    known = {name: row[name] for name in _NAMES}
    known["lines"] = tuple(_line(line) for line in row["lines"])
    known["raw_sha256"] = bytes(row["raw_sha256"])
    return FinanceEvent(**known)


def _line(stored: Mapping[str, Any]) -> Line:
    times = {name: _time(stored[name]) for name in ("period_start", "period_end")}
    return Line(**{**stored, **times})


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


async def kinds(reader: Reader, event: FinanceEvent, **references: str) -> list[tuple[str, str | None]]:
    """Kind and status of every event with these references in the account and mode of ``event``."""
    if unknown := references.keys() - set(_REFERENCES):
        raise ValueError(f"{unknown} are no references")
    return await store.event_kinds(reader, event.provider, event.account, event.livemode, references)


async def invoiced(
    reader: HasConnection, provider: str, account: str, livemode: bool, subscription: str
) -> list[tuple[str, list[Line]]]:
    """Currency and lines of the newest invoices of a subscription that are not void, the oldest of them first.

    Providers tell times in seconds: of two in one second, the one that is about an earlier time comes first.
    """
    rows = await store.event_lines(reader, provider, account, livemode, subscription)
    found = [(row["occurred_at"], row["currency"], [_line(line) for line in json.loads(row["lines"])]) for row in rows]
    found.reverse()
    found.sort(key=lambda each: (each[0], max((line.period_start or each[0] for line in each[2]), default=each[0])))
    return [(currency, lines) for _, currency, lines in found]


async def disputes(reader: Reader, subscription: Any) -> Sequence[Any]:
    """``kind``, ``status``, ``dispute_ref`` and ``occurred_at`` of every event about a dispute of a subscription's payments."""
    return await store.dispute_events(reader, subscription)


async def listing(
    reader: Reader, organization: str | None, page: pages.PageRequest, filters: Mapping[str, Any]
) -> tuple[Sequence[dict[str, Any]], str | None]:
    """Events of an organization (``None``: of everybody), the newest first, and the cursor of the next page.

    ``filters``: ``kind``, ``provider``, ``organization``, ``since``, ``until`` (of ``occurred_at``), any of them ``None``.
    """
    before = page.after[0] if page.after else None
    rows = await store.events_listing(reader, organization, filters, page.limit + 1, before)
    kept, cursor = pages.page(rows, page.limit, lambda row: (row.id,))
    return [row._asdict() for row in kept], cursor
