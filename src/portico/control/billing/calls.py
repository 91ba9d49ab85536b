"""What we ask of payment providers: written down first, then asked, then recorded; never within a transaction.

    intent and call, committed ─► the provider, under the call's id as its key ─► what it answered, committed

Whoever asked holds the call's lease and makes it at once. A process that dies in between leaves a job of the worker `billing`,
which asks again under the same key: the provider does it once, however often it is asked. A call that the provider refuses for
good is over, with its reason; one that got no answer is tried again, except for a checkout, whose asker has gone away.

The answer decides what is shown (a page's address, a refund's name). What an organization has follows from events alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.billing import billing_store, checkout_store, customers, overage_store, waiting
from portico.control.billing.apply import Applier
from portico.control.billing.billing_store import Source
from portico.control.billing.checkout_store import CALL
from portico.control.billing.endings import PLATFORM
from portico.control.billing.provider import Charge, Order, Provider, Providers
from portico.control.billing.subscriptions import WORKER
from portico.control.identity import plans
from portico.errors import Problem
from portico.kit import queue
from portico.kit.clock import Clock
from portico.kit.db import Database, Tx
from portico.kit.ids import new_id
from portico.kit.queue import Limits, Retry, Work
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

#: What can be asked.
ACTS: Final = ("checkout", "close", "cancel", "resume", "change", "refund", "collect", "overage")
#: Seconds for which a provider surely knows a key again (Stripe: a day). What is asked for again after that is looked for first.
_KEY_SECONDS: Final = 72_000.0


def request_key(caller: Caller, given: str | None) -> str:
    """Under what a caller's request is known again; one of its own for a request without ``Idempotency-Key``."""
    if given is None:
        return f"once:{uuid.uuid4().hex}"
    if not 0 < len(given) <= 255 or not (given.isascii() and given.isprintable() and " " not in given):
        raise Problem("idempotency.key_invalid")
    return hashlib.sha256(f"{caller.id} {caller.session_id} {given}".encode()).hexdigest()


class Calls:
    """The verbs on calls. One for each process."""

    def __init__(
        self, settings: ApiSettings, db: Database, clock: Clock, providers: Providers, applier: Applier
    ) -> None:
        self._settings = settings
        self._db = db
        self._clock = clock
        self._providers = providers
        self._applier = applier

    async def known(self, tx: Tx, caller: Caller, key: str, act: str, arguments: Mapping[str, Any]) -> Any | None:
        """The call that was asked for under ``key`` before. Raises ``idempotency.mismatch`` when it was another one."""
        row = await checkout_store.call_by_request(tx, caller.org, key)
        if row is not None and (row.act != act or row.arguments != dict(arguments)):
            raise Problem("idempotency.mismatch")
        return row

    async def begin(
        self, tx: Tx, caller: Caller, key: str, act: str, subject: str, provider: str, arguments: Mapping[str, Any],
        *, at: datetime | None = None,
    ) -> str:  # fmt: skip
        """Write a call down; its id. It is the asker's to make now, or the worker's ``at`` a later time."""
        made = new_id("cll")
        values: dict[str, Any] = {
            "id": made,
            "organization_id": caller.org,
            "request_key": key,
            "act": act,
            "subject": subject,
            "provider": provider,
            "arguments": dict(arguments),
            "actor": {"kind": caller.kind, "id": caller.id},
        }
        if at is not None:
            values["available_at"] = at
        else:
            # Nobody else takes it before the asker had time to; see ``now``.
            values["available_at"] = sa.func.now() + sa.text("interval '60 seconds'")
        await checkout_store.add_call(tx, values)
        return made

    async def now(self, call_id: str) -> Any:
        """Make a call that this process has written down, unless it was made; its row.

        Raises what the provider refused it with, and ``billing.call_running`` while somebody else makes it.
        """
        lease = self._settings.billing_call_seconds + 30.0
        async with self._db.transaction() as tx:
            taken = await checkout_store.take(tx, call_id, lease)
        if taken is not None:
            work = Work(CALL, Limits(lease_seconds=lease), self._db, taken)
            try:
                await self.carry_out(work)
            except Retry as err:
                await self._given_up(work, taken, err)
        async with self._db.read() as reader:
            row = await checkout_store.call(reader, call_id)
        if row is None or (row.queue_state == "pending" and row.lease_token is not None):
            raise Problem("billing.call_running", headers={"Retry-After": "2"})
        if row.refusal is not None:
            raise Problem(row.refusal["code"], row.refusal["detail"])
        if row.queue_state == "dead":
            raise Problem("billing.provider_unreachable", "there was no answer to this request; ask again as a new one")
        return row

    async def _given_up(self, work: Work, row: Any, err: Retry) -> None:
        """No answer. A checkout is over: nobody waits for its page any more. Everything else is tried again by the worker."""
        dead = row["act"] == "checkout"
        await queue.fail(work, str(err), err.seconds, dead=dead)
        if dead:
            async with self._db.transaction() as tx:
                await checkout_store.ended(tx, row["subject"], "failed", {})
            raise err.__cause__ if isinstance(err.__cause__, Problem) else Problem("billing.provider_unreachable")

    async def carry_out(self, work: Work) -> None:
        """Make a call and record what came of it: the handler of the worker, and of whoever asked. Raises :class:`Retry`."""
        row = work.row
        adapter = self._providers.of(row["provider"])
        arguments = json.loads(row["arguments"]) if isinstance(row["arguments"], str) else row["arguments"]
        try:
            async with work.call():
                answer = await self._ask(adapter, row, arguments)
        except Problem as problem:
            if problem.retryable:
                raise Retry(work.limits.pause(work.attempt), problem.code) from problem
            async with work.done() as tx:
                await self._refused(tx, row, problem)
            return
        async with work.done() as tx:
            await self._record(tx, row, arguments, answer)

    async def _ask(self, adapter: Provider, row: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        act, key = row["act"], row["id"]
        if act == "checkout":
            page = await adapter.checkout(Order(**arguments), key=key)
            return {
                "ref": page.ref, "url": page.url, "customer_ref": page.customer_ref,
                "subscription_ref": page.subscription_ref, "expires_at": page.expires_at,
            }  # fmt: skip
        ref = arguments.get("ref", "")
        if act == "refund":
            old = (self._clock.wall() - row["queued_at"]).total_seconds() > _KEY_SECONDS
            back = await adapter.refund_made(ref, key=key) if old else None
            back = back or await adapter.refund(
                ref, amount_minor=arguments["amount_minor"], currency=arguments["currency"],
                reason=arguments["reason"], key=key,
            )  # fmt: skip
            return {"ref": back.ref, "status": back.status}
        if act == "close":
            await adapter.close_page(ref, key=key)
            return {"status": "done"}
        if act == "change":
            change = await adapter.change(
                ref, arguments["price"], when=arguments["when"], return_url=arguments["return_url"], key=key
            )
            return {"status": change.status, "url": change.url}
        if act == "collect":
            if "collect" not in adapter.can:
                return {"status": "unsupported"}
            came = await adapter.collect(
                ref,
                arguments["invoice"],
                amount_minor=arguments["amount_minor"],
                currency=arguments["currency"],
                key=key,
            )
            return {"status": came}
        if act == "overage":
            times = {name: datetime.fromisoformat(arguments[name]) for name in ("period_start", "period_end", "since")}
            return {"ref": await adapter.charge(Charge(**{**arguments, **times}), key=key)}
        if act == "resume":
            state = await adapter.resume(ref, key=key)
        else:
            # Where the provider cannot wait for the end of the period, we did.
            later = arguments["at_period_end"] and "cancel_at_period_end" in adapter.can
            state = await adapter.cancel(ref, at_period_end=later, reason=arguments["reason"], key=key)
        return {"status": "done", "cancel_at_period_end": state.cancel_at_period_end}

    # -- what came of it

    async def _refused(self, tx: Tx, row: Mapping[str, Any], problem: Problem) -> None:
        await checkout_store.answered(tx, row["id"], None, {"code": problem.code, "detail": problem.detail})
        actor = json.loads(row["actor"]) if isinstance(row["actor"], str) else row["actor"]
        if actor == PLATFORM and row["act"] != "close":  # nobody waits for an answer: whoever runs this has to see it
            facts = {"call": row["id"], "act": row["act"], "subject": row["subject"], "code": problem.code}
            log.error("a provider refuses what we asked for by ourselves", extra={"f": facts})
            await audit.record(
                tx, WORKER, "billing_call.refused", row["subject"], details=facts, organization=audit.INSTALLATION
            )
        if row["act"] == "checkout":
            await checkout_store.ended(tx, row["subject"], "failed", {})
        elif row["act"] == "refund":
            await checkout_store.put_refund(tx, row["subject"], state="failed")
        elif row["act"] == "overage":
            await overage_store.failed(tx, row["subject"], problem.code)

    async def _record(
        self, tx: Tx, row: Mapping[str, Any], arguments: Mapping[str, Any], answer: dict[str, Any]
    ) -> None:
        if row["act"] == "checkout":
            await self._opened(tx, row, answer)
        elif row["act"] == "refund":
            await self._refunded(tx, row["subject"], answer)
        elif row["act"] == "close":
            await checkout_store.ended(tx, row["subject"], "expired", {})
        elif row["act"] == "overage":
            await overage_store.charged(tx, row["subject"], ref=answer["ref"])
        shown = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in answer.items()}
        await checkout_store.answered(tx, row["id"], shown, None)

    async def _opened(self, tx: Tx, row: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """The page is there. From now on events that name it, its customer or its subscription are known to be the
        organization's; those that were faster have waited."""
        page = await checkout_store.checkout(tx, row["subject"])
        if page is None:
            return
        source = Source.of(page)
        refs = {
            "checkout": answer["ref"],
            "customer": answer["customer_ref"],
            "subscription": answer["subscription_ref"],
        }
        keys = [source.key(what, ref) for what, ref in refs.items() if ref is not None]
        await billing_store.lock(tx, keys)
        known = await plans.hold(tx, page.organization_id) is not None
        await checkout_store.opened(tx, page.id, dict(answer))
        if answer["customer_ref"] is not None:
            await customers.belongs(tx, page.organization_id, source, answer["customer_ref"])
        await self._applier.wake(tx, keys)
        bought = None
        if answer["subscription_ref"] is not None:
            bought = await billing_store.subscription(tx, source, answer["subscription_ref"])
        if bought is not None and bought.checkout_plan is None:
            await billing_store.bought(tx, bought.id, page.plan, page.plan_version)
            if known:
                await self._applier.entitlement.settle(tx, page.organization_id, "checkout")
        # Another page may have been paid while this one was being made.
        await self._applier.doubles.settle(tx, page.organization_id)

    @staticmethod
    async def _refunded(tx: Tx, refund_id: str, answer: Mapping[str, Any]) -> None:
        """The provider's name of a refund. Its event may have been faster, and has made a row of its own then."""
        row = await checkout_store.refund(tx, refund_id)
        if row is None:
            return
        source = Source.of(row)
        await billing_store.lock(tx, [source.key(waiting.REFERENCES["refund_ref"], answer["ref"])])
        state = answer["status"]
        if (other := await checkout_store.refund_by_ref(tx, source, answer["ref"])) is not None:
            if other.id == refund_id:
                return
            state = other.state
            await checkout_store.drop_refund(tx, other.id)
        await checkout_store.put_refund(tx, refund_id, ref=answer["ref"], state=state)
