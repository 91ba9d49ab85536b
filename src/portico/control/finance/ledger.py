"""The ledger: double entry in integer minor units, to which rows are only ever added.

    await ledger.post(tx, Entry(key, "payment.succeeded", "org_…", occurred_at, postings=(
        debit(accounts.CLEARING, "EUR", 1159, provider="stripe"), debit(accounts.FEES, "EUR", 31),
        credit(accounts.RECEIVABLE, "EUR", 1190, invoice_ref="in_1"))))

Guarantees, each by the database: the postings of a transaction sum to zero in every currency (a deferred constraint
trigger), nothing is changed or deleted (triggers, and privileges that nobody has), a key is posted once, a transaction is
reversed once, nothing is added to a sealed period. Transactions of an organization form a hash chain whose head is locked
from the posting to the commit. A mistake is corrected by its reversal, which is one more transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any, Final

import sqlalchemy as sa

from portico.control.finance import store
from portico.control.finance.accounts import CHART
from portico.control.finance.events import PLATFORM, is_currency, plain
from portico.control.finance.store import postings as _postings
from portico.control.finance.store import transactions as _transactions
from portico.errors import Problem
from portico.kit.canonical import MAX_INTEGER
from portico.kit.db import Database, Reader, Tx
from portico.kit.ids import new_id

# Shared by everybody who posts, alone for a moment by whoever needs that nobody does (any number that no other lock uses).
_POSTING_LOCK: Final = 0x706F_7274_6C65_6467
#: Postings of one transaction at most.
MAX_POSTINGS: Final = 1000


@dataclass(frozen=True, slots=True)
class Posting:
    """One side of a transaction: ``amount_minor`` is positive for a debit, negative for a credit."""

    account: str
    currency: str
    amount_minor: int
    provider: str | None = None
    invoice_ref: str | None = None


def debit(account: str, currency: str, amount_minor: int, **more: str | None) -> Posting:
    """A posting on the left."""
    return Posting(account, currency, amount_minor, **more)


def credit(account: str, currency: str, amount_minor: int, **more: str | None) -> Posting:
    """A posting on the right."""
    return Posting(account, currency, -amount_minor, **more)


@dataclass(frozen=True, slots=True)
class Entry:
    """A transaction to be posted. ``key`` says what it is about; the same key is posted once, ever.

    ``booked_on``: the day that it counts for, that of ``occurred_at`` in UTC unless named; one in a sealed period becomes the
    first open day. ``source``: the id of what it follows from.
    """

    key: str
    kind: str
    organization_id: str | None
    occurred_at: datetime
    postings: tuple[Posting, ...]
    booked_on: date | None = None
    provider: str | None = None
    provider_account: str | None = None
    subscription_ref: str | None = None
    invoice_ref: str | None = None
    payment_ref: str | None = None
    plan_ref: str | None = None
    source: str | None = None
    note: str | None = None
    reverses: str | None = None


_FACTS: Final = (
    "key", "kind", "organization_id", "occurred_at", "provider", "provider_account", "subscription_ref", "invoice_ref",
    "payment_ref", "plan_ref", "source", "note", "reverses",
)  # fmt: skip
POSTED: Final = ("account", "currency", "amount_minor", "provider", "invoice_ref")


def check(entry: Entry) -> None:
    """Raises ``ValueError`` for an entry that no ledger takes: unbalanced, an unknown account, no amount, a naive time."""
    if not (entry.key and entry.kind):
        raise ValueError("an entry has a key and a kind")
    if entry.occurred_at.tzinfo is None:
        raise ValueError("occurred_at has no zone")
    if not 2 <= len(entry.postings) <= MAX_POSTINGS:
        raise ValueError(f"an entry has 2 to {MAX_POSTINGS} postings")
    for posting in entry.postings:
        if posting.account not in CHART:
            raise ValueError(f"there is no account {posting.account!r}")
        if not is_currency(posting.currency):
            raise ValueError(f"{posting.currency!r} is no currency")
        amount = posting.amount_minor
        if type(amount) is not int or not 0 < abs(amount) <= MAX_INTEGER:
            raise ValueError(f"{amount!r} is no amount in minor units")
    if off := {currency: total for currency, total in sums(entry.postings).items() if total}:
        raise ValueError(f"postings do not sum to zero: {off}")


def sums(postings: Iterable[Posting]) -> dict[str, int]:
    """The sum of amounts by currency."""
    found: dict[str, int] = {}
    for posting in postings:
        found[posting.currency] = found.get(posting.currency, 0) + posting.amount_minor
    return found


def nonzero(*postings: Posting) -> tuple[Posting, ...]:
    """The postings that have an amount: a payment without a fee has no posting of it."""
    return tuple(posting for posting in postings if posting.amount_minor)


async def post(tx: Tx, entry: Entry) -> str | None:
    """Add a transaction; its id (``ltx_…``), or ``None`` when its key was posted before.

    The end of the organization's chain is locked until ``tx`` ends, so two who post for one organization take turns. Raises
    ``ValueError`` as :func:`check` does.
    """
    check(entry)
    await _enter(tx)
    chain = entry.organization_id or PLATFORM
    head = await store.lock_head(tx, chain, store.LEDGER)
    known, open_on = await _known(tx, entry.key)
    if known is not None:
        return None
    booked_on = entry.booked_on or entry.occurred_at.astimezone(UTC).date()
    row: dict[str, Any] = {
        "id": new_id("ltx"),
        "chain": chain,
        "seq": head.seq + 1,
        "recorded_at": head.at,
        "booked_on": booked_on if open_on is None else max(booked_on, open_on),
        "posting_count": len(entry.postings),
        **{name: getattr(entry, name) for name in _FACTS},
    }
    posted = [{name: getattr(posting, name) for name in POSTED} for posting in entry.postings]
    row["hash"] = store.link(head.hash, content(row, posted))
    await tx.execute(sa.insert(_transactions), row)
    shared = {"transaction_id": row["id"], "organization_id": row["organization_id"], "booked_on": row["booked_on"]}
    await tx.execute(sa.insert(_postings), [{**shared, "position": at, **each} for at, each in enumerate(posted)])
    await store.advance(tx, chain, store.LEDGER, row["seq"], row["hash"])
    return str(row["id"])


async def _enter(tx: Tx) -> None:
    """Be one of those who post until ``tx`` ends. Before the end of a chain is locked: whoever seals waits for both."""
    await tx.raw.execute("SELECT pg_advisory_xact_lock_shared($1)", _POSTING_LOCK)


async def _known(tx: Tx, key: str) -> tuple[str | None, date | None]:
    """The transaction with this key, and the first day that is not sealed (``None``: nothing is)."""
    query = """
        SELECT (SELECT id FROM ledger_transactions WHERE key = $1) AS id, (SELECT max(ends_on) FROM ledger_seals) AS open_on
    """
    row = await tx.raw.fetchrow(query, key)
    return row["id"], row["open_on"]


def content(row: Mapping[str, Any], posted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is hashed of a transaction: all of its row but the hash and the number over all chains, and its postings in order."""
    return {
        **{name: plain(row[name]) for name in ("id", "chain", "seq", "recorded_at", "posting_count", *_FACTS)},
        "booked_on": row["booked_on"].isoformat(),
        "postings": [[each[name] for name in POSTED] for each in posted],
    }


# -- corrections ---------------------------------------------------------------------------------------------------------


async def reverse(
    tx: Tx, transaction: str, key: str, kind: str, occurred_at: datetime, note: str | None = None
) -> str | None:
    """Post the opposite of a transaction; the new id, or ``None`` when it is reversed already, or the key was posted.

    Raises ``ledger.transaction_not_found``, and ``ledger.reversal_of_reversal`` for what is a reversal itself: what was right
    is posted again instead.
    """
    row = await transaction_row(tx, transaction)
    if row is None:
        raise Problem("ledger.transaction_not_found")
    if row.reverses is not None:
        raise Problem("ledger.reversal_of_reversal")
    await _enter(tx)
    await store.lock_head(tx, row.chain, store.LEDGER)
    query = sa.select(_transactions.c.id).where(_transactions.c.reverses == transaction)
    if await tx.fetch_one(query) is not None:
        return None
    posted = await postings_of(tx, [transaction])
    opposite = tuple(replace(each, amount_minor=-each.amount_minor) for each in posted[transaction])
    known = {
        name: row._mapping[name] for name in _FACTS if name not in ("key", "kind", "occurred_at", "note", "reverses")
    }
    return await post(
        tx, Entry(key, kind, occurred_at=occurred_at, postings=opposite, note=note, reverses=transaction, **known)
    )


# -- reading -------------------------------------------------------------------------------------------------------------


async def transaction_row(reader: Reader, transaction: str) -> sa.Row[Any] | None:
    """One transaction."""
    return await reader.fetch_one(sa.select(_transactions).where(_transactions.c.id == transaction))


async def by_key(reader: Reader, key: str) -> sa.Row[Any] | None:
    """The transaction with this key."""
    return await reader.fetch_one(sa.select(_transactions).where(_transactions.c.key == key))


async def is_reversed(reader: Reader, transaction: str) -> bool:
    """Whether somebody reversed it."""
    query = sa.select(_transactions.c.id).where(_transactions.c.reverses == transaction)
    return await reader.fetch_one(query) is not None


async def postings_of(reader: Reader, transactions: Sequence[str]) -> dict[str, list[Posting]]:
    """The postings of some transactions, each in order."""
    columns = _postings.c
    query = sa.select(_postings).where(columns.transaction_id.in_(transactions))
    found: dict[str, list[Posting]] = {name: [] for name in transactions}
    for row in await reader.fetch_all(query.order_by(columns.transaction_id, columns.position)):
        found[row.transaction_id].append(Posting(**{name: row._mapping[name] for name in POSTED}))
    return found


async def listing(
    reader: Reader, organization: str | None, limit: int, before: int | None, filters: Mapping[str, Any]
) -> Sequence[sa.Row[Any]]:
    """Transactions of an organization (``None``: of everybody), the newest first.

    ``filters``: ``kind``, ``invoice``, ``source``, any of them ``None``.
    """
    columns = _transactions.c
    query = sa.select(_transactions)
    if organization is not None:
        query = query.where(columns.organization_id == organization)
    for name, column in {"kind": columns.kind, "invoice": columns.invoice_ref, "source": columns.source}.items():
        if (wanted := filters.get(name)) is not None:
            query = query.where(column == wanted)
    if before is not None:
        query = query.where(columns.number < before)
    return await reader.fetch_all(query.order_by(columns.number.desc()).limit(limit))


async def stop_posting(tx: Tx) -> None:
    """Wait for everybody who posts to commit, and keep others from posting until ``tx`` ends. Keep it short."""
    await tx.raw.execute("SELECT pg_advisory_xact_lock($1)", _POSTING_LOCK)


async def cut_off(db: Database) -> int:
    """A number such that every transaction up to it is committed, now and for ever; 0: there is none.

    Numbers are drawn in order, but commits are not: without waiting for those who post, the highest number that is seen
    may have lower ones come in behind it. What is read up to a cut-off is the same whenever it is read.
    """
    async with db.transaction() as tx:
        await stop_posting(tx)
        return int(await tx.raw.fetchval("SELECT coalesce(max(number), 0) FROM ledger_transactions"))
