"""Dunning: what is done about payments that fail, from the first notice to the write-off; and how it ends.

``settle`` decides from what is there: failed attempts that nothing has paid, the case, the clock. Called after every event that
touches money, by the clock, and after an operator's act; twice, or late, is no harm. A case is over when nothing is owed of what
began it: a payment of the younger of two unpaid invoices does not end it, one of the older begins another for what is left. It
ends with its subscription, too, and by an operator's hand.

Where the provider does not try by itself, stages that are ``retrying`` have it try (``endings.collect``). A dispute about a
payment of the subscription pauses its cases (``disputes``): such a case is ``paused`` without ``paused_at``, which is of an
operator's pauses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.billing import billing_store, checkout_store, disputes, dunning_states, dunning_store, endings
from portico.control.billing.disputes import Dispute
from portico.control.billing.dunning_notices import Notices
from portico.control.billing.dunning_states import Owed, Schedule
from portico.control.billing.subscription_states import TERMINAL
from portico.control.finance import balances
from portico.errors import Problem
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx
from portico.settings import ApiSettings

#: Who an audit row names for what follows from an event or from the clock.
WORKER: Final = Caller("operator", "billing", None)
#: Why a case is paused by itself.
DISPUTED: Final = "a payment is disputed"


async def owed(reader: Reader, subscription: Any) -> list[dict[str, Any]]:
    """What is owed of failed attempts, by currency and invoice. Of an invoice that the ledger knows its receivable decides, with
    what was written off of it; before that, what the provider wanted to take."""
    found = []
    for row in map(dict, await billing_store.debts(reader, subscription.id)):
        known = None
        if row["invoice_ref"]:
            invoice = await balances.of_invoice(reader, subscription.provider, row["invoice_ref"])
            known = invoice.get(row["currency"])
        if known is not None:
            row["amount"] = known.receivable + known.bad_debt
        if row["amount"] > 0:
            found.append(row)
    return found


class Dunning:
    """The verbs on cases. Whoever calls holds the organization, so that nobody else is at its cases."""

    def __init__(self, settings: ApiSettings, clock: Clock, notices: Notices) -> None:
        self._schedule = Schedule.of(settings)
        self._clock = clock
        self._notices = notices

    async def settle(self, tx: Tx, subscription: Any) -> list[Any]:
        """Bring the cases of a subscription to where they belong now; those that were written off by this."""
        rows = await owed(tx, subscription)
        open_ = await dunning_store.open_cases(tx, subscription.id)
        if not rows and not open_:
            return []
        disputed = await disputes.of(tx, subscription)
        written_off = []
        for currency in sorted({row["currency"] for row in rows} | open_.keys()):
            unpaid = [row for row in rows if row["currency"] == currency]
            case = open_.get(currency)
            if not unpaid and case is not None:
                await self._end(tx, subscription, case, "recovered", None)
            elif subscription.status in TERMINAL:
                if case is not None and case.state != "written_off":
                    await self._end(tx, subscription, case, "canceled", f"the subscription is {subscription.status}")
            elif unpaid:
                if case is not None and case.state != "paused" and min(r["since"] for r in unpaid) > case.opened_at:
                    # What began it is paid; what is left is younger, and has days of its own.
                    await self._end(tx, subscription, case, "recovered", "a later payment is owed")
                    case = None
                before = case.state if case is not None else None
                after = await self._advance(tx, subscription, case, currency, unpaid, disputed)
                if after.state == "written_off" != before:
                    written_off.append(after)
        return written_off

    async def _advance(
        self, tx: Tx, subscription: Any, case: Any | None, currency: str, rows: list[Any], disputed: Sequence[Dispute]
    ) -> Any:
        now = self._clock.wall()
        by_hand = case.paused_days if case is not None else 0.0
        debt = Owed.together(rows, by_hand + disputes.days(disputed, min(row["since"] for row in rows), now))
        known = {
            "amount_minor": debt.amount_minor,
            "attempts": debt.attempts,
            "failure_code": debt.failure_code,
            "next_attempt_at": debt.next_attempt_at,
            "due_at": self._schedule.next_at(debt, now),
            "opened_at": debt.since,
        }
        if case is None:
            made = {
                "organization_id": subscription.organization_id,
                "subscription_id": subscription.id,
                "currency": currency,
                "state": "grace",
            }
            case = await dunning_store.add(tx, {**made, **known})
        if (dispute := disputes.open_(disputed)) is not None:
            case = await self.pause_for_dispute(tx, case, dispute.ref)
        else:
            case = await self.resume_after_dispute(tx, case)
        if case.state == "paused":
            return await dunning_store.put(tx, case.id, **{**known, "due_at": None})
        stage = self._schedule.at(debt, now)
        if stage is None or not self._later(case, stage):
            return await dunning_store.put(tx, case.id, **known)
        if stage.state != case.state:
            dunning_states.step(case.state, stage.state)
            await self._record(tx, case, stage.state, {"stage": stage.name})
        case = await dunning_store.put(tx, case.id, state=stage.state, stage=stage.name, **known)
        if stage.state == "retrying" and not self._schedule.waits(debt, now):
            for row in rows:
                await endings.collect(
                    tx, subscription, case.id, f"dunning:{case.id}:{stage.name}:{row['invoice_ref']}", row
                )
        await self._notices.stage(tx, subscription, case)
        return case

    # -- disputes

    async def pause_for_dispute(self, tx: Tx, case: Any, dispute: str) -> Any:
        """Let nothing happen in a case while a payment is disputed; the case. One that is paused or written off stays so."""
        if case.state in ("paused", "written_off"):
            return case
        self._check(case, "paused")
        await checkout_store.withdraw(tx, "collect", case.id)
        await self._record(tx, case, "paused", {"dispute": dispute})
        return await dunning_store.put(tx, case.id, state="paused", due_at=None, reason=f"{DISPUTED} ({dispute})")

    async def resume_after_dispute(self, tx: Tx, case: Any) -> Any:
        """Go on where a dispute, which is decided, had stopped a case; the case. Any other stays as it is."""
        if case.state != "paused" or case.paused_at is not None:
            return case
        before = self._before(case)
        await self._record(tx, case, before, {"dispute": "decided"})
        return await dunning_store.put(tx, case.id, state=before, reason=None)

    def _before(self, case: Any) -> str:
        """The state that a paused case comes back to."""
        return next((each.state for each in self._schedule.stages if each.name == case.stage), "grace")

    def _later(self, case: Any, stage: dunning_states.Stage) -> bool:
        """Whether a case has not been at a stage yet: it goes on, never back."""
        names = [each.name for each in self._schedule.stages]
        return case.stage not in names or names.index(stage.name) > names.index(case.stage)

    async def _end(self, tx: Tx, subscription: Any, case: Any, state: str, reason: str | None) -> None:
        dunning_states.step(case.state, state)
        await checkout_store.withdraw(tx, "collect", case.id)
        ended = await dunning_store.put(
            tx, case.id, state=state, closed_at=self._clock.wall(), due_at=None, paused_at=None, reason=reason
        )
        await self._record(tx, case, state, {"reason": reason} if reason else {})
        if state == "recovered" and reason is None and case.stage is not None:
            await self._notices.recovered(tx, subscription, ended)

    @staticmethod
    async def _record(tx: Tx, case: Any, state: str, facts: dict[str, Any]) -> None:
        details = {"before": case.state, "state": state, "currency": case.currency, **facts}
        await audit.record(tx, WORKER, "dunning.advance", case.id, details=details, organization=case.organization_id)

    # -- by hand

    async def pause(self, tx: Tx, caller: Caller, case: Any, reason: str) -> Any:
        """Let nothing happen in a case, and take back what it took away, until it is resumed. Raises ``dunning.state``."""
        if (
            case.state != "paused" or case.paused_at is not None
        ):  # what a dispute has paused can be paused by hand as well
            self._check(case, "paused")
        await checkout_store.withdraw(tx, "collect", case.id)
        row = await dunning_store.put(
            tx, case.id, state="paused", paused_at=self._clock.wall(), due_at=None, reason=reason
        )
        await self._by_hand(tx, caller, "dunning.pause", case, reason)
        return row

    async def resume(self, tx: Tx, caller: Caller, case: Any, subscription: Any) -> None:
        """Go on where it was: the days of the pause do not count. Whoever calls settles the subscription then.

        Raises ``dunning.state``.
        """
        if case.state != "paused":
            raise Problem("dunning.state", f"the case is {case.state}, not paused", state=case.state)
        if case.paused_at is None:
            raise Problem("dunning.state", "a payment is disputed; the end of that resumes the case", state=case.state)
        now = self._clock.wall()
        # Days on which a payment was disputed stand still already.
        standing = disputes.days(await disputes.of(tx, subscription), case.paused_at, now)
        days = (now - case.paused_at).total_seconds() / 86_400 - standing
        await dunning_store.put(
            tx, case.id, state=self._before(case), paused_at=None, paused_days=case.paused_days + max(0.0, days),
            reason=None,
        )  # fmt: skip
        await self._by_hand(tx, caller, "dunning.resume", case, None)

    async def close(self, tx: Tx, caller: Caller, case: Any, reason: str) -> Any:
        """End a case, and let what is owed open none again. The receivable stays where it is. Raises ``dunning.state``."""
        self._check(case, "canceled")
        await billing_store.waive(tx, case.subscription_id, case.currency)
        await checkout_store.withdraw(tx, "collect", case.id)
        row = await dunning_store.put(
            tx, case.id, state="canceled", closed_at=self._clock.wall(), due_at=None, paused_at=None, reason=reason
        )
        await self._by_hand(tx, caller, "dunning.close", case, reason)
        return row

    @staticmethod
    def _check(case: Any, state: str) -> None:
        try:
            dunning_states.step(case.state, state)
        except dunning_states.IllegalStep as err:
            raise Problem("dunning.state", str(err), state=case.state) from None

    @staticmethod
    async def _by_hand(tx: Tx, caller: Caller, action: str, case: Any, reason: str | None) -> None:
        details = {"before": case.state, "stage": case.stage, "currency": case.currency}
        if reason is not None:
            details["reason"] = reason
        for organization in (case.organization_id, audit.INSTALLATION):
            await audit.record(tx, caller, action, case.id, details=details, organization=organization)
