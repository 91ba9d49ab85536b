"""What each finance event means in the ledger.

    if await events.record(tx, event):
        await postings.post(tx, event)

Order does not matter: whichever way a history of events is permuted, every account ends with the same balance. Two rules do that.
Each event adds its own amounts, whatever is missing yet (a payment before its invoice leaves the receivable below zero for as
long). And what depends on two events, a void of an invoice, a refund or payout that failed after all, the tax in a refund, is
settled by whichever of them comes second; both hold the end of their organization's chain of events, so one does.

| event | debit | credit |
|---|---|---|
| invoice.issued | receivable: gross | deferred revenue: net; tax payable: tax |
| invoice.credited (an invoice below zero) | deferred revenue: net; tax payable: tax | customer credit: gross |
| credit.applied (to a later invoice) | customer credit | receivable |
| payment.succeeded | clearing: gross less fee; fees | receivable: gross |
| refund.succeeded | refunds: net; tax payable: its share of the tax | clearing: gross |
| dispute.opened | dispute hold | clearing |
| dispute.lost | dispute loss | dispute hold |
| dispute.won | clearing | dispute hold |
| payout.paid | bank | clearing |
| payout.debit_paid (a balance below zero is collected) | clearing | bank |
| invoice.voided, refund.failed, payout.failed, payout.debit_failed | the reversal of the first row | |
| invoice.uncollectible | bad debt | receivable: what is open; a payment afterwards takes it back |

A fee of a dispute, or one that is told later (``fee.charged``), is fees against clearing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Final

from portico.control.finance import accounts, balances, events, ledger, recognition
from portico.control.finance.events import FinanceEvent
from portico.control.finance.ledger import Entry, Posting, nonzero
from portico.control.finance.recognition import Schedule
from portico.errors import Problem
from portico.kit.db import Tx

_Handler = Callable[[Tx, FinanceEvent], Awaitable[list[str | None]]]

#: Statuses of a refund or dispute that say the same as a kind of its own.
_BY_STATUS: Final[Mapping[str, Mapping[str, str]]] = {
    "refund": {"succeeded": "refund.succeeded", "failed": "refund.failed"},
    "dispute": {"open": "dispute.opened", "won": "dispute.won", "lost": "dispute.lost"},
}


def kind_of(event: FinanceEvent) -> str:
    """What the event is to the ledger: refunds and disputes are known by their status, whatever their kind is called."""
    return kind_by(event.kind, event.status)


def kind_by(kind: str, status: str | None) -> str:
    """The same, of a kind and a status."""
    return _BY_STATUS.get(kind.partition(".")[0], {}).get(status or "", kind)


async def post(tx: Tx, event: FinanceEvent) -> list[str]:
    """Post what ``event``, which ``tx`` has recorded, means; the new transactions, none for one without money in it.

    Raises ``ledger.event_incomplete`` for an event of money that lacks an amount, a currency or a reference.
    """
    handler = _HANDLERS.get(kind_of(event))
    if handler is None:
        return []
    return [made for made in await handler(tx, event) if made is not None]


def key(event: FinanceEvent, what: str, reference: str) -> str:
    """The key of a transaction about an object of the event's provider, account and mode."""
    return f"{what}:{event.source}:{reference}"


def _need(event: FinanceEvent, *names: str) -> None:
    missing = [name for name in names if getattr(event, name) is None]
    if missing:
        raise Problem("ledger.event_incomplete", f"{event.kind} without {', '.join(missing)}", kind=event.kind)
    # An invoice may be a credit: a smaller plan in the middle of a period.
    credit = kind_of(event) == "invoice.issued"
    if event.amount_minor is not None and event.amount_minor < 0 and not credit:
        raise Problem("ledger.event_incomplete", f"{event.kind} with a negative amount", kind=event.kind)


def _debit(event: FinanceEvent, account: str, amount: int, invoice: str | None = None) -> Posting:
    return Posting(account, event.currency or "", amount, event.provider, invoice)


def _credit(event: FinanceEvent, account: str, amount: int, invoice: str | None = None) -> Posting:
    return Posting(account, event.currency or "", -amount, event.provider, invoice)


def _entry(event: FinanceEvent, what: str, reference: str, *parts: Posting, invoice: str | None = None) -> Entry | None:
    """The entry, or ``None`` when no amount is left."""
    if not (kept := nonzero(*parts)):
        return None
    return Entry(
        key(event, what, reference), what, event.organization_id, event.occurred_at, kept, provider=event.provider,
        provider_account=event.account, subscription_ref=event.subscription_ref,
        invoice_ref=invoice or event.invoice_ref, payment_ref=event.payment_ref, plan_ref=event.plan_ref,
        source=event.effect_key,
    )  # fmt: skip


async def _post(tx: Tx, entry: Entry | None) -> str | None:
    return None if entry is None else await ledger.post(tx, entry)


# -- invoices ------------------------------------------------------------------------------------------------------------


async def _issued(tx: Tx, event: FinanceEvent) -> list[str | None]:
    _need(event, "invoice_ref", "amount_minor", "currency")
    invoice, currency = event.invoice_ref or "", event.currency or ""
    gross, tax = event.amount_minor or 0, event.tax_minor or 0
    # Below zero nobody owes anything: the customer has it to its credit.
    owed = accounts.RECEIVABLE if gross >= 0 else accounts.CUSTOMER_CREDIT
    entry = _entry(
        event, "invoice.issued", invoice,
        _debit(event, owed, gross, invoice),
        _credit(event, accounts.DEFERRED, gross - tax, invoice),
        _credit(event, accounts.TAX, tax, invoice),
        invoice=invoice,
    )  # fmt: skip
    made = [await _post(tx, entry)]
    await recognition.plan(
        tx, event.source, invoice, schedules(event), organization_id=event.organization_id, provider=event.provider,
        currency=currency, subscription_ref=event.subscription_ref, plan_ref=event.plan_ref,
    )  # fmt: skip
    return made + await _void_if_known(tx, event) + await _settle(tx, event, invoice)


async def _credited(tx: Tx, event: FinanceEvent) -> list[str | None]:
    _need(event, "invoice_ref", "amount_minor", "currency")
    return await _issued(tx, as_issued(event))


def as_issued(event: FinanceEvent) -> FinanceEvent:
    """The invoice that ``event`` issues, its amounts with their signs: ``invoice.credited`` tells of one below zero."""
    if event.kind != "invoice.credited":
        return event
    gross, tax = -abs(event.amount_minor or 0), -abs(event.tax_minor or 0)
    return replace(event, kind="invoice.issued", amount_minor=gross, tax_minor=tax)


async def _credit_applied(tx: Tx, event: FinanceEvent) -> list[str | None]:
    """What the customer has to its credit pays an invoice: nothing comes from the provider, and no more is owed."""
    _need(event, "invoice_ref", "amount_minor", "currency")
    invoice, amount = event.invoice_ref or "", event.amount_minor or 0
    entry = _entry(
        event, "credit.applied", invoice,
        _debit(event, accounts.CUSTOMER_CREDIT, amount),
        _credit(event, accounts.RECEIVABLE, amount, invoice),
        invoice=invoice,
    )  # fmt: skip
    return [await _post(tx, entry)] + await _void_if_known(tx, event) + await _settle(tx, event, invoice)


def schedules(event: FinanceEvent) -> list[Schedule]:
    """How the net amount of an invoice is to be recognized: by line where lines have periods, else over the event's period.

    What was used already (overage) and what has no period is recognized at once. What lines and net amount differ by (a discount
    that is no line) is a last schedule over the event's period.
    """
    net = (event.amount_minor or 0) - (event.tax_minor or 0)
    found = []
    for at, line in enumerate(event.lines):
        start = None if line.kind == "overage" else line.period_start
        if start is None:
            found.append(Schedule(at, line.net_minor, event.occurred_at, event.occurred_at))
        else:
            found.append(Schedule(at, line.net_minor, start, line.period_end or start))
    if left := net - sum(each.total_minor for each in found):
        start = event.period_start or event.occurred_at
        found.append(Schedule(len(event.lines), left, start, event.period_end or start))
    return found


async def _voided(tx: Tx, event: FinanceEvent) -> list[str | None]:
    _need(event, "invoice_ref")
    invoice = event.invoice_ref or ""
    return await _void_if_known(tx, event) + await _settle(tx, event, invoice)


async def _void_if_known(tx: Tx, event: FinanceEvent) -> list[str | None]:
    """Reverse the invoice, and give back the credit that it used, when both that and its void are known."""
    invoice = event.invoice_ref or ""
    if not await _known(tx, event, "invoice.voided", invoice_ref=invoice):
        return []
    made = await _reverse(tx, event, "invoice.issued", "invoice.voided", invoice)
    if made is not None:
        await recognition.cancel(tx, event.source, invoice, event.occurred_at)
    return [made, await _reverse(tx, event, "credit.applied", "credit.returned", invoice)]


async def _uncollectible(tx: Tx, event: FinanceEvent) -> list[str | None]:
    _need(event, "invoice_ref")
    return await _settle(tx, event, event.invoice_ref or "")


async def _settle(tx: Tx, event: FinanceEvent, invoice: str) -> list[str | None]:
    """Bring what follows from all that is known of an invoice to what it should be: the tax in its refunds, and its bad debt."""
    made: list[str | None] = []
    lost = await _known(tx, event, "invoice.uncollectible", invoice_ref=invoice)
    for currency, facts in sorted((await balances.of_invoice(tx, event.provider, invoice, event.account)).items()):
        # Worked out from totals, so that many small refunds take back as much tax as one, in whatever order they come.
        due = share(facts.refunded, facts.tax, facts.gross) - facts.tax_refunded
        made.append(await _post(tx, _entry(
            event, "refund.tax", f"{invoice}:{currency}:{facts.steps + 1}",
            Posting(accounts.TAX, currency, due, event.provider, invoice),
            Posting(accounts.CONTRA_REVENUE, currency, -due, event.provider, invoice),
            invoice=invoice,
        )))  # fmt: skip
        open_minor = facts.receivable + facts.bad_debt
        due = (max(0, open_minor) if lost else 0) - facts.bad_debt
        made.append(await _post(tx, _entry(
            event, "invoice.uncollectible", f"{invoice}:{currency}:{facts.steps + 1}",
            Posting(accounts.BAD_DEBT, currency, due, event.provider, invoice),
            Posting(accounts.RECEIVABLE, currency, -due, event.provider, invoice),
            invoice=invoice,
        )))  # fmt: skip
    return made


def share(part: int, of: int, whole: int) -> int:
    """``part × of / whole``, halves away from zero; all amounts not negative. More than the whole is the whole."""
    if whole <= 0:
        return 0
    return min(of, (2 * part * of + whole) // (2 * whole))


async def _known(tx: Tx, event: FinanceEvent, what: str, **references: str) -> bool:
    """Whether an event that is ``what`` to the ledger was recorded about these references."""
    pairs = await events.kinds(tx, event, **references)
    return any(kind_by(kind, status) == what for kind, status in pairs)


async def _reverse(tx: Tx, event: FinanceEvent, what: str, why: str, reference: str) -> str | None:
    """Reverse the transaction about ``reference``, once; ``None`` when there is none yet, or it is reversed."""
    row = await ledger.by_key(tx, key(event, what, reference))
    if row is None:
        return None
    return await ledger.reverse(tx, row.id, key(event, why, reference), why, event.occurred_at)


# -- payments and refunds ------------------------------------------------------------------------------------------------


async def _paid(tx: Tx, event: FinanceEvent) -> list[str | None]:
    _need(event, "amount_minor", "currency")
    gross, fee = event.amount_minor or 0, _fee(event)
    reference = event.payment_ref or event.invoice_ref
    if reference is None:
        raise Problem("ledger.event_incomplete", f"{event.kind} without payment_ref", kind=event.kind)
    invoice = event.invoice_ref or reference
    entry = _entry(
        event, "payment.succeeded", reference,
        _debit(event, accounts.CLEARING, gross - fee),
        _debit(event, accounts.FEES, fee),
        _credit(event, accounts.RECEIVABLE, gross, invoice),
        invoice=invoice,
    )  # fmt: skip
    return [await _post(tx, entry)] + await _settle(tx, event, invoice)


def _fee(event: FinanceEvent) -> int:
    """What the provider kept: as told, or what is between gross and net; 0 when it was not told (yet)."""
    if event.fee_minor is not None:
        return event.fee_minor
    if event.net_minor is not None and event.amount_minor is not None:
        return event.amount_minor - event.net_minor
    return 0


async def _fee_charged(tx: Tx, event: FinanceEvent) -> list[str | None]:
    _need(event, "currency")
    amount = event.fee_minor if event.fee_minor is not None else event.amount_minor
    return [await _post(tx, _fee_entry(event, "fee.charged", event.payment_ref or event.event_id, amount or 0))]


def _fee_entry(event: FinanceEvent, what: str, reference: str, fee: int) -> Entry | None:
    return _entry(event, what, reference, _debit(event, accounts.FEES, fee), _credit(event, accounts.CLEARING, fee))


async def _refunded(tx: Tx, event: FinanceEvent) -> list[str | None]:
    _need(event, "refund_ref", "amount_minor", "currency")
    refund, gross = event.refund_ref or "", event.amount_minor or 0
    entry = _entry(
        event, "refund.succeeded", refund,
        _debit(event, accounts.CONTRA_REVENUE, gross, event.invoice_ref),
        _credit(event, accounts.CLEARING, gross),
    )  # fmt: skip
    made = [await _post(tx, entry)] + await _fail_refund_if_known(tx, event)
    return made + await _settle_refund(tx, event)


async def _refund_failed(tx: Tx, event: FinanceEvent) -> list[str | None]:
    _need(event, "refund_ref")
    return await _fail_refund_if_known(tx, event) + await _settle_refund(tx, event)


async def _fail_refund_if_known(tx: Tx, event: FinanceEvent) -> list[str | None]:
    refund = event.refund_ref or ""
    if not await _known(tx, event, "refund.failed", refund_ref=refund):
        return []
    return [await _reverse(tx, event, "refund.succeeded", "refund.failed", refund)]


async def _settle_refund(tx: Tx, event: FinanceEvent) -> list[str | None]:
    """The tax in the refund; nothing as long as nobody knows which invoice was paid back: its payment settles it then."""
    invoice = event.invoice_ref
    if invoice is None and event.payment_ref is not None:
        invoice = await balances.invoice_of_payment(tx, event.provider, event.account, event.payment_ref)
    return [] if invoice is None else await _settle(tx, event, invoice)


# -- disputes and payouts ------------------------------------------------------------------------------------------------


def _dispute(what: str, left: str, right: str) -> _Handler:
    async def handle(tx: Tx, event: FinanceEvent) -> list[str | None]:
        _need(event, "dispute_ref", "amount_minor", "currency")
        dispute, amount = event.dispute_ref or "", event.amount_minor or 0
        made = [
            await _post(tx, _entry(
                event, what, dispute,
                _debit(event, left, amount),
                _credit(event, right, amount),
            ))
        ]  # fmt: skip
        if event.fee_minor:
            made.append(await _post(tx, _fee_entry(event, "dispute.fee", dispute, event.fee_minor)))
        return made

    return handle


def _payout(what: str, left: str, right: str) -> tuple[_Handler, _Handler]:
    """What is posted when a payout is paid, and when it failed after all, whichever is heard of first."""

    async def failed(tx: Tx, event: FinanceEvent) -> list[str | None]:
        _need(event, "payout_ref")
        payout = event.payout_ref or ""
        if not await _known(tx, event, f"{what}failed", payout_ref=payout):
            return []
        return [await _reverse(tx, event, f"{what}paid", f"{what}failed", payout)]

    async def paid(tx: Tx, event: FinanceEvent) -> list[str | None]:
        _need(event, "payout_ref", "amount_minor", "currency")
        payout, amount = event.payout_ref or "", event.amount_minor or 0
        entry = _entry(event, f"{what}paid", payout, _debit(event, left, amount), _credit(event, right, amount))
        return [await _post(tx, entry), *await failed(tx, event)]

    return paid, failed


_paid_out, _payout_failed = _payout("payout.", accounts.BANK, accounts.CLEARING)
# A balance below zero is collected from the bank.
_collected, _collection_failed = _payout("payout.debit_", accounts.CLEARING, accounts.BANK)

_HANDLERS: Final[Mapping[str, _Handler]] = {
    "invoice.issued": _issued,
    "invoice.credited": _credited,
    "credit.applied": _credit_applied,
    "invoice.voided": _voided,
    "invoice.uncollectible": _uncollectible,
    "payment.succeeded": _paid,
    "fee.charged": _fee_charged,
    "refund.succeeded": _refunded,
    "refund.failed": _refund_failed,
    "dispute.opened": _dispute("dispute.opened", accounts.DISPUTE_HOLD, accounts.CLEARING),
    "dispute.lost": _dispute("dispute.lost", accounts.DISPUTE_LOSS, accounts.DISPUTE_HOLD),
    "dispute.won": _dispute("dispute.won", accounts.CLEARING, accounts.DISPUTE_HOLD),
    "payout.paid": _paid_out,
    "payout.failed": _payout_failed,
    "payout.debit_paid": _collected,
    "payout.debit_failed": _collection_failed,
}
