"""Events of payment providers on their way into subscriptions and the ledger.

    received → verified → applied | ignored(reason)        failed: tried again; `dead`: given up, until it is replayed

One event is: its signature, where that could not be checked before it was stored; the objects that it is about, fetched from the
provider, because a body may be old and (PayPal) forged; what they mean (normalization); and then one transaction for all of its
effects and its own end. A worker that dies anywhere has done nothing that another does not find or do again.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from portico.control.billing import webhook_store as store
from portico.control.billing.normalize import normalize
from portico.control.billing.provider import Fetched, Name, Origin
from portico.control.billing.webhook_certificates import Certificates, Unreachable
from portico.control.billing.webhooks import PURPOSE, certificate_name
from portico.control.finance.events import FinanceEvent
from portico.errors import Problem
from portico.kit import provider_signatures as signatures
from portico.kit import strict_json
from portico.kit.batches import delete_in_batches, until_done
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
    """The objects that an event is about, as they are now."""
    try:
        async with work.call():
            return await tools.of(work.row["provider"]).authority(document)
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
    return None if held else "duplicate"


def _transmission(stored: Any, origins: Sequence[str]) -> Transmission:
    """The headers that were kept. Raises :class:`Hopeless` when settings do not know them any more."""
    given = json.loads(stored) if isinstance(stored, str) else stored
    try:
        return signatures.transmission(given or {}, origins)
    except Unbelieved as err:
        raise Hopeless(str(err)) from None


async def clear(db: Database, settings: ApiSettings, now: datetime) -> None:
    """Delete bodies and events past their time, and sooner what turned out to be nobody's."""

    async def bodies(tx: Tx) -> int:
        return await store.clear_bodies(tx, now - timedelta(seconds=settings.billing_webhook_body_keep_seconds))

    await until_done(db, bodies)
    disowned = store.old(now - timedelta(seconds=settings.billing_webhook_disowned_keep_seconds))
    await delete_in_batches(db, store.events, disowned & ~store.events.c.proven)
    await delete_in_batches(db, store.events, store.old(now - timedelta(seconds=settings.billing_webhook_keep_seconds)))
