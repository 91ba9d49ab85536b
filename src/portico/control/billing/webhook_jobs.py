"""Events of payment providers on their way into subscriptions and the ledger.

    received → verified → applied | ignored(reason)        failed: tried again; `dead`: given up, until it is replayed

One event is: its signature, where that could not be checked before it was stored; the objects that it is about, fetched from the
provider, because a body may be old and (PayPal) forged; what they mean (normalization); and then one transaction for all of its
effects and its own end. A worker that dies anywhere has done nothing that another does not find or do again.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from portico.control.audit import service as audit
from portico.control.billing import billing_store
from portico.control.billing import webhook_store as store
from portico.control.billing.normalize import normalize
from portico.control.billing.objectives import PLATFORM
from portico.control.billing.provider import Fetched, Name, Origin
from portico.control.billing.webhook_certificates import Certificates, Unreachable
from portico.control.billing.webhooks import PURPOSE, certificate_name, mismatch
from portico.control.finance.events import FinanceEvent
from portico.errors import Problem
from portico.kit import provider_signatures as signatures
from portico.kit import strict_json
from portico.kit.batches import ROWS, delete_in_batches, until_done
from portico.kit.db import Database, Tx
from portico.kit.provider_signatures import Transmission, Unbelieved
from portico.kit.queue import Hopeless, Retry, Work
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

KIND: Final = store.KIND
#: Attempts after which an event that the provider does not know is nobody's: objects may be seen a little later than events.
_CONFIRM_ATTEMPTS: Final = 4


class Source(Protocol):
    """What is asked of a provider."""

    async def authority(self, body: Mapping[str, Any]) -> Fetched: ...


#: Everything that follows from an event, in the transaction that is given: why nothing did, or ``None``.
Apply = Callable[[Tx, FinanceEvent], Awaitable[str | None]]


@dataclass(frozen=True, slots=True)
class Tools:
    """What applying an event takes. ``of`` gives the adapter of a provider, and raises ``billing.provider_unconfigured``."""

    settings: ApiSettings
    sealer: Sealer
    certificates: Certificates
    of: Callable[[Name], Source]
    apply: Apply


async def apply_event(work: Work, tools: Tools) -> None:
    """The handler of the queue."""
    row = work.row
    if row["sealed_body"] is None:
        raise Hopeless("its body was deleted (billing_webhook_body_keep_seconds)")
    # It was ignored for that when it came; a replay makes it no more ours, and payouts belong to no organization.
    if (foreign := mismatch(tools.settings, row["provider"], row["account"], row["livemode"])) is not None:
        async with work.done() as tx:
            await store.settled(tx, work.id, "ignored", foreign)
        return
    body = tools.sealer.open(PURPOSE, work.id, bytes(row["sealed_body"]))
    if not row["proven"]:
        reason = await _prove(work, tools, body)
        if reason is not None:
            async with work.done() as tx:
                await store.disown(tx, work.id, reason)
            return
    document = strict_json.loads(body)
    fetched = await _fetch(work, tools, document)
    try:
        found = normalize(row["provider"], document, fetched, origin=_origin(row))
    except Problem as problem:
        if problem.code != "billing.event_unconfirmed" or work.attempt < _CONFIRM_ATTEMPTS:
            raise
        # Nobody at PayPal knows what it is about: whoever made this body had the signature of another one.
        async with work.done() as tx:
            await store.disown(tx, work.id, "unconfirmed")
        return
    if row["status"] != "verified":
        async with work.step() as tx:
            await store.verified(tx, work.id)
    await _effects(work, tools, found)


def _origin(row: Mapping[str, Any]) -> Origin:
    return Origin(row["account"], row["livemode"], row["received_at"], bytes(row["raw_sha256"]), row["event_id"])


async def _effects(work: Work, tools: Tools, found: Sequence[FinanceEvent]) -> None:
    """All that follows from an event, and its end, in one transaction."""
    async with work.done() as tx:
        reasons = [await tools.apply(tx, event) for event in found]
        effects = reasons.count(None)
        why = None if effects else (reasons or ["no_effect"])[0]
        await store.settled(tx, work.id, "applied" if effects else "ignored", why, effects)


async def _fetch(work: Work, tools: Tools, document: Mapping[str, Any]) -> Fetched:
    """The objects that an event is about, as they are now.

    Looks are ordered by when they were begun, so one clock says when, whichever machine's worker looks: PostgreSQL's.
    """
    async with work.db.read() as reader:
        at = await reader.raw.fetchval("SELECT clock_timestamp()")
    try:
        async with work.call():
            found = await tools.of(work.row["provider"]).authority(document)
            return replace(found, at=at)
    except Problem as problem:
        if problem.code == "billing.provider_unconfigured":
            raise Hopeless(problem.detail) from None
        if (wait := problem.headers.get("Retry-After", "")).isdigit():
            raise Retry(float(wait), problem.detail) from None
        raise


async def _prove(work: Work, tools: Tools, body: bytes) -> str | None:
    """Check the signature of an event whose certificate was not known: why it is not believed, or ``None``."""
    row, settings = work.row, tools.settings
    sent = _transmission(row["transmission"], tools.certificates.origins)
    try:
        async with work.call():
            pem, key, until = await tools.certificates.fetch(sent.cert_url)
        signatures.verify_paypal(key, sent, settings.paypal_webhook_id, body)
    except Unbelieved as err:
        return err.fault
    except Unreachable as err:
        raise Retry(work.limits.pause(work.attempt), str(err)) from None
    async with work.step() as tx:
        await tools.certificates.keep(tx, sent.cert_url, pem, until)
        held = await store.prove(tx, work.id, certificate_name(sent), sent.id)
    return None if held else await _other(work, sent)


async def _other(work: Work, sent: Transmission) -> str:
    """Another event has the id, the body or the delivery of this one: its copy, or another story under one id."""
    row = work.row
    asked = {name: row[name] for name in ("provider", "account", "livemode", "event_id", "raw_sha256")}
    async with work.db.read() as reader:
        found = (await store.rivals(reader, [{**asked, "transmission_id": sent.id}])).get(0, [])
    if not found or any(bytes(digest) == bytes(row["raw_sha256"]) or of == "reconcile" for _, digest, of in found):
        return "duplicate"
    details = {
        "code": "billing.webhook_conflict", "provider": row["provider"], "event": row["event_id"], "type": row["event_type"],
        "sha256": bytes(row["raw_sha256"]).hex(),
    }  # fmt: skip
    await audit.refused(
        work.db, replace(PLATFORM, id=row["provider"]), "billing_webhook.conflict", found[0][0], details,
        organization=audit.INSTALLATION,
    )  # fmt: skip
    return "conflict"


def _transmission(stored: Any, origins: Sequence[str]) -> Transmission:
    """The headers that were kept. Raises :class:`Hopeless` when settings do not know them any more."""
    given = json.loads(stored) if isinstance(stored, str) else stored
    try:
        return signatures.transmission(given or {}, origins)
    except Unbelieved as err:
        raise Hopeless(str(err)) from None


async def wait_no_longer(db: Database, settings: ApiSettings, now: datetime) -> int:
    """Give up events that have waited for their base for too long (``billing_waiting_seconds``); how many. A replay lets one
    wait again."""
    before, count = now - timedelta(seconds=settings.billing_waiting_seconds), 0
    while True:
        async with db.read() as reader:
            found = await billing_store.waiting_since(reader, before, ROWS)
        for each in found:
            async with db.transaction() as tx:
                row = await billing_store.wait_no_longer(tx, each.effect_key)
                if row is not None:  # None: it was applied in this moment, or another worker was here
                    why = f"{each.kind} has waited since {each.created_at:%Y-%m-%d} for any of {', '.join(each.needs)}"
                    await store.given_up(tx, row, why)
                    count += 1
        if len(found) < ROWS:
            return count


async def clear(db: Database, settings: ApiSettings, now: datetime) -> None:
    """Delete bodies and events past their time, and sooner what turned out to be nobody's."""

    async def bodies(tx: Tx) -> int:
        return await store.clear_bodies(tx, now - timedelta(seconds=settings.billing_webhook_body_keep_seconds))

    await until_done(db, bodies)
    disowned = store.old(now - timedelta(seconds=settings.billing_webhook_disowned_keep_seconds))
    await delete_in_batches(db, store.events, disowned & ~store.events.c.proven)
    await delete_in_batches(db, store.events, store.old(now - timedelta(seconds=settings.billing_webhook_keep_seconds)))
