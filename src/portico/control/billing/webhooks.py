"""Events of payment providers as they come in: believed, stored once, and only then answered.

    size → signature, by the raw bytes → time, both ways → (only now is the body parsed) what it says of itself → account and mode
        → one row for each event, body and delivery → the queue, in the same transaction → 2xx

Stripe and Razorpay are believed before anything is stored; so is PayPal while its certificate is known. An event whose
certificate must be fetched first is `received`, and nothing more: it holds nobody's id, and a network has few of them. What is
refused is counted, not stored; a row of the audit log says each second what was refused why. Several requests share one
transaction (``kit/batches.py``); an answer of 2xx is sent after the commit.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.audit.tally import Refusals
from portico.control.billing import webhook_body as bodies
from portico.control.billing import webhook_store as store
from portico.control.billing.provider import NAMES, Name
from portico.control.billing.webhook_body import Facts, Unreadable
from portico.control.billing.webhook_certificates import Certificates
from portico.errors import Problem
from portico.kit import provider_signatures as signatures
from portico.kit import queue, strict_json
from portico.kit.batches import Together
from portico.kit.clock import Clock
from portico.kit.db import Database, Tx
from portico.kit.ids import new_id
from portico.kit.networks import network
from portico.kit.provider_signatures import PAYPAL_FIELDS, RAZORPAY, STRIPE, Transmission, Unbelieved
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings, Secret

#: What bodies are sealed for; the row's id is the context.
PURPOSE: Final = "billing webhook"
#: Why an event is not ours although its signature is right.
MISMATCHES: Final = ("other_account", "other_mode")
#: Why something is refused, and what becomes of the rest.
REASONS: Final = (*signatures.FAULTS, *MISMATCHES, "full", "conflict")
OUTCOMES: Final = ("accepted", "duplicate", "ignored", "invalid", "conflict")
#: Seconds in which one conflict of a provider's events has a row of its own in the audit log.
_ALARM_SECONDS: Final = 1.0
_LOOKED_AT: Final = frozenset({STRIPE, RAZORPAY, bodies.RAZORPAY_ID, *PAYPAL_FIELDS})


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it came: header fields by lower-case name (those that are there twice by ``repeated``)."""

    provider: Name
    fields: Mapping[str, str]
    repeated: frozenset[str]
    body: bytes
    address: str | None


@dataclass(frozen=True, slots=True)
class Proof:
    """What vouches for an event: a secret, or a certificate. ``name`` is ``None`` while that has to be fetched."""

    name: str | None
    transmission: Transmission | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """What is answered."""

    event: str
    status: Literal["accepted", "duplicate", "ignored"]


def secrets_of(settings: ApiSettings, provider: Name) -> tuple[list[str], tuple[str, ...]]:
    """The secrets in use, the current one first, and what they are called. None where the provider or its secret is not set: an
    old secret alone believes nobody."""
    pairs: dict[str, tuple[Secret | None, Secret | None]] = {
        "stripe": (settings.stripe_webhook_secret, settings.stripe_webhook_secret_old),
        "razorpay": (settings.razorpay_webhook_secret, settings.razorpay_webhook_secret_old),
    }
    current, old = pairs[provider]
    if not current or not account_of(settings, provider):
        return [], ()
    found = [current.reveal()] + ([old.reveal()] if old else [])
    return found, ("current", "old")[: len(found)]


def account_of(settings: ApiSettings, provider: str) -> str:
    """Our account at a provider."""
    return {"stripe": settings.stripe_account, "razorpay": settings.razorpay_account, "paypal": settings.paypal_account}[
        provider
    ]  # fmt: skip


class Verifier:
    """The checks before a body is parsed."""

    def __init__(self, settings: ApiSettings, certificates: Certificates, clock: Clock) -> None:
        self._settings, self._certificates, self._clock = settings, certificates, clock

    async def verify(self, received: Received) -> Proof:
        """What vouches for a request. Raises :class:`Unbelieved`."""
        if not received.repeated.isdisjoint(_LOOKED_AT):
            raise Unbelieved("malformed", "a header is there twice")
        if received.provider == "paypal":
            return await self._paypal(received)
        settings, now = self._settings, self._clock.wall().timestamp()
        secrets, names = secrets_of(settings, received.provider)
        if received.provider == "stripe":
            header, tolerance = received.fields.get(STRIPE, ""), settings.billing_webhook_tolerance_seconds
            place = signatures.verify_stripe(secrets, header, received.body, now, tolerance)
        else:
            place = signatures.verify_razorpay(secrets, received.fields.get(RAZORPAY, ""), received.body)
        return Proof(names[place])

    async def _paypal(self, received: Received) -> Proof:
        settings = self._settings
        if not settings.paypal_webhook_id or not settings.paypal_account:
            raise Unbelieved("no_secret", "no webhook id is set: nothing is believed")
        sent = signatures.transmission(received.fields, self._certificates.origins)
        self._fresh(sent.time.timestamp(), settings.paypal_webhook_age_seconds)
        key = await self._certificates.known(sent.cert_url)
        if key is None:
            return Proof(None, sent)
        signatures.verify_paypal(key, sent, settings.paypal_webhook_id, received.body)
        return Proof(certificate_name(sent), sent)

    def check_time(self, provider: Name, facts: Facts) -> None:
        """The time of a message whose signature has none: that which its body, signed, says. Raises :class:`Unbelieved`."""
        if provider == "razorpay":
            self._fresh(facts.occurred_at.timestamp(), self._settings.razorpay_webhook_age_seconds)

    def _fresh(self, at: float, age_seconds: float) -> None:
        now = self._clock.wall().timestamp()
        signatures.fresh(at, now, age_seconds, self._settings.billing_webhook_tolerance_seconds)


def certificate_name(sent: Transmission) -> str:
    """What a certificate is called: the end of its address."""
    return sent.cert_url.rpartition("/")[2]


def mismatch(settings: ApiSettings, provider: str, account: str | None, livemode: bool | None) -> str | None:
    """Why a believed event is not about our account in our mode; ``None`` when it is. What it does not say is as it should be."""
    if account is not None and account != account_of(settings, provider):
        return "other_account"
    if livemode is not None and livemode != settings.billing_livemode:
        return "other_mode"
    return None


class Intake:
    """Stores events in groups, one transaction each, and tells of what was refused."""

    def __init__(self, settings: ApiSettings, db: Database) -> None:
        self._settings, self._db = settings, db
        self._together = Together(self._store)
        self._refused = Refusals("billing_webhook.ingest")
        self._telling: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        #: For the metrics: by provider and reason, and by provider and outcome.
        self.refusals: Counter[tuple[str, str]] = Counter(dict.fromkeys(itertools.product(NAMES, REASONS), 0))
        self.outcomes: Counter[tuple[str, str]] = Counter(dict.fromkeys(itertools.product(NAMES, OUTCOMES), 0))

    @property
    def groups(self) -> int:
        """Transactions so far."""
        return self._together.groups

    async def take(self, row: dict[str, Any]) -> Taken:
        """Store an event. Raises ``billing.webhook_conflict``, ``billing.webhook_backlog`` and ``service.unavailable``."""
        settings = self._settings
        return await self._together.put(
            row, group=settings.billing_webhook_group, backlog=settings.billing_webhook_backlog
        )

    async def _store(self, rows: Sequence[dict[str, Any]]) -> list[Taken | Exception]:
        async with self._db.transaction() as tx:
            full = await self._without_room(tx, rows)
            asked = [row for row in rows if row["id"] not in full]
            new = await store.insert(tx, asked) if asked else set()
            old = [row for row in asked if row["id"] not in new]
            found = await store.rivals(tx, old) if old else {}
            if any(row["queue_state"] == "pending" for row in asked if row["id"] in new):
                await queue.wake(tx, store.KIND)
        rivals = {row["id"]: found.get(place, []) for place, row in enumerate(old)}

        def answer(row: dict[str, Any]) -> Taken | Exception:
            if row["id"] in full:
                return Problem("billing.webhook_backlog", headers={"Retry-After": "60"})
            if row["id"] in new:
                return Taken(row["id"], "ignored" if row["status"] == "ignored" else "accepted")
            return _once_more(row, rivals[row["id"]])

        return [answer(row) for row in rows]

    async def _without_room(self, tx: Tx, rows: Sequence[dict[str, Any]]) -> set[str]:
        """Ids of events that nothing vouches for yet, and that their network, or all together, have too many of."""
        asking = [row for row in rows if not row["proven"]]
        if not asking:
            return set()
        held, total = await store.unproven(tx, [row["source"] for row in asking])
        settings, full = self._settings, set()
        for row in asking:
            if (
                held[row["source"]] >= settings.billing_webhook_unproven_per_network
                or total >= settings.billing_webhook_unproven
            ):
                full.add(row["id"])
            else:
                held[row["source"]] += 1
                total += 1
        return full

    # -- telling of it

    def refused(self, caller: Caller, provider: str, reason: str) -> None:
        """Count a refusal; it is in the audit log within a second or so."""
        self.refusals[provider, reason] += 1
        self._refused.add(replace(caller, id=provider), provider, reason)
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell_later())

    async def _tell_later(self) -> None:
        while self._refused:
            await asyncio.sleep(self._settings.billing_webhook_activity_seconds)
            with suppress(Problem):  # the database is away: what was counted stays
                await self.tell()

    async def tell(self) -> None:
        """Write down what was refused; an audit row for each provider and reason, whatever their number."""
        async with self._turn:
            taken = self._refused.take()
            try:
                async with self._db.transaction() as tx:
                    await self._refused.write(tx, taken)
            except BaseException:
                self._refused.give_back(taken)
                raise

    async def close(self) -> None:
        """Let what is on its way end, and write down what was counted."""
        await self._together.close()
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)
        if self._refused:
            with suppress(Problem):
                await self.tell()


def _once_more(row: dict[str, Any], rivals: Sequence[tuple[str, bytes, str]]) -> Taken | Exception:
    """What an event is told that another has the place of: the same one, or one that says something else."""
    if not rivals:  # it was deleted in this moment
        return Problem("service.unavailable", headers={"Retry-After": "1"})
    for event, digest, origin in rivals:
        # The provider's list has an event in other words than its webhook.
        if digest == row["raw_sha256"] or origin == "reconcile":
            return Taken(event, "duplicate")
    return Problem("billing.webhook_conflict", event=rivals[0][0])


class Webhooks:
    """The whole of ``POST /v1/billing/webhooks/…``."""

    def __init__(self, settings: ApiSettings, db: Database, clock: Clock, sealer: Sealer) -> None:
        self._settings, self._db, self._clock, self._sealer = settings, db, clock, sealer
        self.certificates = Certificates(settings, db, clock)
        self.verifier = Verifier(settings, self.certificates, clock)
        self.intake = Intake(settings, db)
        self._alarmed: dict[str, float] = {}

    async def receive(self, caller: Caller, received: Received) -> Taken:
        """Take a request in.

        Raises ``request.too_large``, ``billing.webhook_rejected``, ``request.invalid``, ``billing.webhook_conflict``,
        ``billing.webhook_backlog`` and ``service.unavailable``.
        """
        provider, limit = received.provider, self._settings.billing_webhook_max_bytes
        if len(received.body) > limit:
            raise Problem("request.too_large", f"an event has at most {limit} bytes", limit=limit)
        try:
            proof = await self.verifier.verify(received)
            facts, _ = bodies.read(provider, received.fields, received.body)
            self.verifier.check_time(provider, facts)
        except Unbelieved as err:
            self.intake.refused(caller, provider, err.fault)
            raise Problem("billing.webhook_rejected") from None
        except Unreadable as err:
            self.intake.outcomes[provider, "invalid"] += 1
            raise Problem("request.invalid", f"the event does not fit: {err}") from None
        row = self._row(received, proof, facts)
        if row["reason"] in MISMATCHES:
            self.intake.refused(caller, provider, row["reason"])
        return await self._take(caller, row)

    async def _take(self, caller: Caller, row: dict[str, Any]) -> Taken:
        provider, outcomes = row["provider"], self.intake.outcomes
        try:
            taken = await self.intake.take(row)
        except Problem as problem:
            if problem.code == "billing.webhook_backlog":
                self.intake.refused(caller, provider, "full")
            if problem.code == "billing.webhook_conflict" and await self._recounted(row, problem):
                outcomes[provider, "duplicate"] += 1
                return Taken(str(problem.extra["event"]), "duplicate")
            if problem.code == "billing.webhook_conflict":
                outcomes[provider, "conflict"] += 1
                await self._alarm(caller, row, problem)
            raise
        outcomes[provider, taken.status] += 1
        return taken

    async def _recounted(self, row: Mapping[str, Any], problem: Problem) -> bool:
        """Whether what is stored under the same id differs in nothing but how many endpoints had not answered yet
        (``pending_webhooks``): Stripe counts that anew for each delivery."""
        if row["provider"] != "stripe":
            return False
        async with self._db.read() as reader:
            stored = await store.sealed(reader, str(problem.extra["event"]))
        if stored is None:
            return False
        bodies_ = (self._sealer.open(PURPOSE, str(problem.extra["event"]), stored), self._body(row))
        first, second = (strict_json.loads(body) for body in bodies_)
        return bool(first | {"pending_webhooks": 0} == second | {"pending_webhooks": 0})

    def _body(self, row: Mapping[str, Any]) -> bytes:
        return self._sealer.open(PURPOSE, row["id"], row["sealed_body"])

    async def _alarm(self, caller: Caller, row: dict[str, Any], problem: Problem) -> None:
        """Somebody who can sign told two stories of one event: whoever runs this wants to know. What follows within a second or
        so is counted, as refusals are: nobody fills the audit log with it."""
        now, provider = self._clock.monotonic(), row["provider"]
        if (at := self._alarmed.get(provider)) is not None and 0 <= now - at < _ALARM_SECONDS:
            self.intake.refused(caller, provider, "conflict")
            return
        self._alarmed[provider] = now
        details = {
            "code": problem.code, "provider": row["provider"], "event": row["event_id"], "type": row["event_type"],
            "sha256": row["raw_sha256"].hex(),
        }  # fmt: skip
        who, stored = replace(caller, id=row["provider"]), str(problem.extra["event"])
        await audit.refused(self._db, who, "billing_webhook.conflict", stored, details, organization=audit.INSTALLATION)

    def _row(self, received: Received, proof: Proof, facts: Facts) -> dict[str, Any]:
        """The row of ``billing_webhook_events``."""
        settings, provider, sent = self._settings, received.provider, proof.transmission
        wrong = mismatch(settings, provider, facts.account, facts.livemode)
        proven = proof.name is not None
        row = new_row(provider, facts, received.body, self._sealer)
        row |= {
            "account": facts.account or account_of(settings, provider),
            "livemode": settings.billing_livemode if facts.livemode is None else facts.livemode,
            "received_at": self._clock.wall(),
            "proven": proven,
            "proof": proof.name,
            # PayPal's objects are fetched before it is believed; of the others, a signature covers every byte.
            "status": "ignored" if wrong else "received" if provider == "paypal" else "verified",
            "reason": wrong,
            "queue_state": "done" if wrong else "pending",
        }
        if sent is not None:
            row["transmission_id"] = sent.id if proven else None
            row["transmission"] = json.dumps({name: received.fields[name] for name in PAYPAL_FIELDS})
            row["source"] = None if proven else network(received.address or "unknown")
            row["lane"] = provider if proven else f"{provider}/unproven"
        return row


def new_row(provider: str, facts: Facts, body: bytes, sealer: Sealer) -> dict[str, Any]:
    """A row of ``billing_webhook_events``, as far as a body says what is in it."""
    made = new_id("bwh")
    return {
        "id": made,
        "provider": provider,
        "event_id": facts.event_id,
        "event_type": facts.event_type,
        "api_version": facts.api_version,
        "occurred_at": facts.occurred_at,
        "origin": "webhook",
        "raw_sha256": hashlib.sha256(body).digest(),
        "sealed_body": sealer.seal(PURPOSE, made, body),
        "transmission_id": None,
        "transmission": None,
        "source": None,
        "lane": provider,
    }
