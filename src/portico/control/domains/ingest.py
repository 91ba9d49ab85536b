"""Certificate events as they come in: checked in a fixed order, stored once, and only then answered.

    size → source → its networks → freshness → signature → (only now is the body parsed) shape → no private key
        → provenance → one row for each event → one for each effect → the queue, in the same transaction → 202

Whoever cannot sign learns nothing: up to the signature every refusal is one answer, after one time; why it was refused is
counted, and goes to the audit log, a row for each second and kind however many there were. Several requests share one
transaction (group insert): while one commits, the next group gathers. An answer of 2xx is sent after the commit.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, Literal

import asyncpg
from pydantic import ValidationError

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.domains import event_store as store
from portico.control.domains import key_material
from portico.control.domains import store as domain_store
from portico.control.domains.event_body import CertEvent, Subject
from portico.control.domains.event_mapping import type_of
from portico.control.domains.incidents import Condition, Incidents
from portico.control.domains.service import covering
from portico.control.domains.sources import Source, Sources
from portico.errors import Problem
from portico.kit import networks, queue, strict_json
from portico.kit.batches import Together
from portico.kit.clock import Clock
from portico.kit.db import Database
from portico.kit.http_signatures import Target
from portico.kit.ids import new_id
from portico.kit.signed_requests import FIELDS, Key, Presented, Unreadable, present
from portico.settings import ApiSettings

#: Why a request is refused before its body is looked at, in the order of the checks.
Reason = Literal[
    "unsupported_content_type", "unreadable", "unknown_source", "source_not_allowed", "stale_timestamp", "bad_signature"
]
REASONS: Final[tuple[str, ...]] = (
    "unsupported_content_type", "unreadable", "unknown_source", "source_not_allowed", "stale_timestamp", "bad_signature",
)  # fmt: skip
#: What becomes of what was signed well.
OUTCOMES: Final = ("accepted", "unmapped", "duplicate", "invalid", "key_material", "mismatch", "conflict")
# Compared with when there is no source: its work is that of a real one, and nobody has it.
_DECOYS: Final = (Key("decoy", "hmac", hashlib.sha256(b"portico decoy").digest()),)
#: Lists of `last_event` and the like are for people; what came from outside is cut.
_SHOWN_CHARS: Final = 128
# Fields that are signed, or say what is: each is there once. A covered field of another name that is there twice is not read.
_ONCE: Final = (*FIELDS, "content-type", "host")
# Somebody else stored the same at the same moment, in another order: once more, a step after the other.
_AGAIN: Final = (asyncpg.ForeignKeyViolationError, asyncpg.DeadlockDetectedError)


class Rejected(Exception):
    """Refused before the body was looked at. ``source``: whose failure it counts as, when it names one that there is."""

    def __init__(self, reason: Reason, source: str | None = None, event: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.source, self.event = reason, source, event


class SourceMoved(Exception):
    """The source changed between the check and the commit: check again."""


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it came: header fields by lower-case name (those that are there twice by ``repeated``)."""

    target: Target
    fields: Mapping[str, str]
    repeated: frozenset[str]
    body: bytes
    address: str | None


@dataclass(frozen=True, slots=True)
class Verified:
    """Whose key signed a request."""

    source: Source
    presented: Presented
    key: Key


@dataclass(frozen=True, slots=True)
class Accepted:
    """What is answered: ``status`` is one of ``OUTCOMES``."""

    event: str
    status: str


class Verifier:
    """The checks before the body is looked at."""

    def __init__(self, settings: ApiSettings, sources: Sources, clock: Clock) -> None:
        self._settings, self._sources, self._clock = settings, sources, clock

    async def verify(self, received: Received, *, anew: bool = False) -> Verified:
        """Who signed it. Raises :class:`Rejected` with the first check that failed; all of them are always carried out."""
        now = self._clock.wall()
        try:
            fields = received.fields
            if received.repeated:
                if not received.repeated.isdisjoint(_ONCE):
                    raise Unreadable("a field is there twice")
                fields = {name: value for name, value in fields.items() if name not in received.repeated}
            presented = present(received.target, fields, received.body)
        except Unreadable:
            raise Rejected(self._first(received, "unreadable"), await self._named(received)) from None
        source = await self._sources.get(presented.source, anew=anew)
        keys = source.usable(now) if source is not None else _DECOYS
        signer = presented.signer(keys or _DECOYS)
        event = presented.message_id[:_SHOWN_CHARS]
        if received.fields.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Rejected("unsupported_content_type", source.id if source is not None else None, event)
        if source is None:
            raise Rejected("unknown_source", None, event)
        if not networks.allows(source.cidrs, received.address):
            raise Rejected("source_not_allowed", source.id, event)
        if not presented.fresh(now.timestamp(), self._settings.cert_event_tolerance_seconds):
            raise Rejected("stale_timestamp", source.id, event)
        if signer is None or not keys:
            raise Rejected("bad_signature", source.id, event)
        return Verified(source, presented, signer)

    def _first(self, received: Received, reason: Reason) -> Reason:
        media = received.fields.get("content-type", "").partition(";")[0].strip().lower()
        return reason if media == "application/json" else "unsupported_content_type"

    async def _named(self, received: Received) -> str | None:
        found = await self._sources.get(received.fields.get("x-cert-source", ""))
        return found.id if found is not None else None


def read(verified: Verified, body: bytes) -> CertEvent:
    """The event in a body that was signed. Raises ``request.invalid`` (422) and ``cert.key_material``."""
    try:
        document = strict_json.loads(body)
    except ValueError:
        if key_material.in_text(body.decode("utf-8", "replace")):
            raise Problem("cert.key_material") from None
        raise Problem("request.invalid", "the body is not valid JSON, or names a member twice") from None
    if key_material.in_document(document):
        raise Problem("cert.key_material")
    try:
        return CertEvent.model_validate(document)
    except ValidationError as err:
        first = err.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:64] for part in first["loc"])
        raise Problem("request.invalid", f"the event does not fit: {where}: {first['msg'][:200]}") from None


def check_provenance(verified: Verified, event: CertEvent) -> None:
    """Whether the body speaks for whom its headers name, about what that may speak about. Raises ``cert.provenance_mismatch``."""
    source, presented = verified.source, verified.presented
    wrong = [
        name
        for name, right in (
            ("eventId", event.event_id == presented.message_id),
            ("sourceId", event.source_id == source.id),
            ("clusterId", event.cluster_id in source.clusters),
            ("clusterId of the header", presented.cluster in (None, event.cluster_id)),
            ("environment", event.environment == source.environment),
            ("hostname", all(source.speaks_for(name) for name in event.names)),
        )
        if not right
    ]
    if wrong:
        raise Problem("cert.provenance_mismatch", f"these are not this source's: {', '.join(wrong)}", members=wrong)


@dataclass(slots=True)
class _Waiting:
    row: dict[str, Any]
    digest: str
    source: str
    version: int


class Intake:
    """Stores events in groups, one transaction each, and tells of what was refused."""

    def __init__(self, settings: ApiSettings, db: Database, clock: Clock) -> None:
        self._settings, self._db, self._clock = settings, db, clock
        self._together = Together(self._store)
        self._counts: dict[tuple[str, str, str], tuple[int, datetime, str | None]] = {}
        # How often, the first who, and what of the first is worth knowing.
        self._refused: dict[tuple[str | None, str], tuple[int, Caller, dict[str, Any]]] = {}
        self._noted: dict[tuple[str, str], float] = {}
        self._telling: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        #: For the metrics: by reason and by outcome.
        self.refusals: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self.outcomes: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))

    @property
    def groups(self) -> int:
        """Transactions so far."""
        return self._together.groups

    async def take(self, verified: Verified, event: CertEvent, body: bytes) -> Accepted:
        """Store an event that was verified. Raises ``cert.event_id_conflict``, ``service.unavailable`` and
        :class:`SourceMoved`."""
        digest = hashlib.sha256(body).hexdigest()
        waiting = _Waiting(_row(verified, event, digest), digest, verified.source.id, verified.source.version)
        settings = self._settings
        return await self._together.put(waiting, group=settings.cert_event_group, backlog=settings.cert_event_backlog)

    async def _store(self, group: Sequence[_Waiting]) -> list[Accepted | Exception]:
        """In one statement, which is a transaction of its own: it is committed when its answer is here."""
        try:
            async with self._db.direct() as reader:
                left = await store.take(reader, [(each.row, each.version) for each in group])
                old = [each for each in group if left.get(each.row["id"])]
                known = await store.known(reader, _pairs(old)) if old else {}
        except _AGAIN:
            left, known = await self._store_in_steps(group)

        def answer(each: _Waiting) -> Accepted | Exception:
            was_there = left.get(each.row["id"])
            if was_there is None:
                return Accepted(each.row["id"], "unmapped" if each.row["status"] == "unmapped" else "accepted")
            if was_there and (found := known.get((each.source, each.row["event_id"]))) is not None:
                return Accepted(found[0], "duplicate") if found[1] == each.digest else Problem("cert.event_id_conflict")
            return SourceMoved()

        return [answer(each) for each in group]

    async def _store_in_steps(self, group: Sequence[_Waiting]) -> tuple[dict[str, bool], store.Known]:
        """The same, first all events and then all effects: nobody's order stands against that."""
        async with self._db.transaction() as tx:
            versions = await store.versions(tx, sorted({each.source for each in group}))
            good = [each for each in group if versions.get(each.source) == each.version]
            new = await store.insert(tx, [each.row for each in good]) if good else set()
            old = [each for each in good if each.row["id"] not in new]
            known = await store.known(tx, _pairs(old)) if old else {}
            if any(each.row["queue_state"] == "pending" for each in good if each.row["id"] in new):
                await queue.wake(tx, store.KIND)
        fits = {each.row["id"] for each in good}
        left = {each.row["id"]: each.row["id"] in fits for each in group if each.row["id"] not in new}
        return left, known

    # -- telling of it

    def refused(self, caller: Caller, rejected: Rejected) -> None:
        """Count a refusal; it is in the audit log, and in the source's counts, within a second or so."""
        self.refusals[rejected.reason] += 1
        self._count_refusal(caller, rejected.source, rejected.reason, {})
        if rejected.source is not None:
            self.came(rejected.source, "", rejected.reason, rejected.event)

    def denied(self, caller: Caller, source: str, code: str, details: dict[str, Any]) -> bool:
        """Whether something that a source signed and was refused has to be recorded now; what follows within a second or so is
        counted, as refusals are: who has a key of a source must not be able to fill the audit log with it."""
        now, at = self._clock.monotonic(), self._noted.get((source, code))
        if at is None or not 0 <= now - at < self._settings.cert_activity_seconds:
            self._noted[source, code] = now
            return True
        self._count_refusal(caller, source, code, details)
        return False

    def _count_refusal(self, caller: Caller, source: str | None, code: str, details: dict[str, Any]) -> None:
        count, first, of_first = self._refused.get((source, code), (0, caller, details))
        self._refused[source, code] = (count + 1, first, of_first)
        self._tell_soon()

    def came(self, source: str, cluster: str, outcome: str, event: str | None, key: str | None = None) -> None:
        """Count what came of a request of a source."""
        if outcome in self.outcomes:
            self.outcomes[outcome] += 1
        for name in (outcome, *([f"key:{key}"] if key else [])):
            at = (source, cluster, name)
            count, _, last = self._counts.get(at, (0, None, None))
            self._counts[at] = (count + 1, self._clock.wall(), event or last)
        self._tell_soon()

    def _tell_soon(self) -> None:
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell_later())

    async def _tell_later(self) -> None:
        while self._counts or self._refused:
            await asyncio.sleep(self._settings.cert_activity_seconds)
            with suppress(Problem):  # the database is away: what was counted stays
                await self.tell()

    async def tell(self) -> None:
        """Write down what was counted; an audit row for each source and reason, whatever their number."""
        async with self._turn:
            await self._tell()

    async def _tell(self) -> None:
        counts, self._counts = self._counts, {}
        refused, self._refused = self._refused, {}
        try:
            async with self._db.transaction() as tx:
                if counts:
                    rows = [(*at, count, last_at, event) for at, (count, last_at, event) in sorted(counts.items())]
                    await store.add_counts(tx, rows)
                for (source, reason), (count, caller, more) in refused.items():
                    details = {**more, "code": reason, "count": count}
                    await audit.record(
                        tx, caller, "cert_event.ingest", source, "refused", details, organization=audit.INSTALLATION
                    )
        except BaseException:
            for at, (count, last_at, event) in counts.items():
                later, at_last, last_event = self._counts.get(at, (0, last_at, event))
                self._counts[at] = (count + later, at_last, last_event)
            for name, (count, caller, more) in refused.items():
                self._refused[name] = (count + self._refused.get(name, (0, caller, more))[0], caller, more)
            raise

    async def close(self) -> None:
        """Let what is on its way end, and write down what was counted."""
        await self._together.close()
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)
        if self._counts or self._refused:
            with suppress(Problem):
                await self.tell()


def _pairs(group: Sequence[_Waiting]) -> list[tuple[str, str]]:
    return [(each.source, each.row["event_id"]) for each in group]


def _row(verified: Verified, event: CertEvent, digest: str) -> dict[str, Any]:
    """The row of ``certificate_lifecycle_events``."""
    event_type = type_of(event.callback_class, event.callback_action)
    return {
        "id": new_id("cev"),
        "source_id": verified.source.id,
        "event_id": event.event_id,
        "cluster_id": event.cluster_id,
        "environment": event.environment,
        "domain_id": event.subject.domain_id,
        "hostname": event.subject.hostname,
        "callback_class": event.callback_class,
        "callback_action": event.callback_action,
        "event_type": event_type,
        "revision": event.provenance.revision,
        "sequence": event.sequence,
        "occurred_at": event.occurred_at.isoformat(),
        "effect_key": f"{verified.source.id}/{event.effect}",
        "facts": event.facts(),
        "provenance": event.provenance.model_dump(by_alias=True, exclude_none=True, mode="json"),
        "key_id": verified.key.id,
        "status": "queued" if event_type else "unmapped",
        "queue_state": "pending" if event_type else "done",
        "body_digest": digest,
    }


class Ingest:
    """The whole of ``POST /v1/domains/cert-events``."""

    def __init__(
        self, settings: ApiSettings, db: Database, clock: Clock, sources: Sources, incidents: Incidents
    ) -> None:
        self._settings, self._db, self._incidents = settings, db, incidents
        self.verifier = Verifier(settings, sources, clock)
        self.intake = Intake(settings, db, clock)

    async def receive(self, caller: Caller, received: Received) -> Accepted:
        """Take a request in.

        Raises ``request.too_large``, ``cert.event_rejected``, ``request.invalid``, ``cert.key_material``,
        ``cert.provenance_mismatch``, ``cert.event_id_conflict`` and ``service.unavailable``.
        """
        limit = self._settings.cert_event_max_bytes
        if len(received.body) > limit:
            raise Problem("request.too_large", f"an event has at most {limit} bytes", limit=limit)
        began = asyncio.get_running_loop().time()
        for anew in (False, True):
            try:
                verified = await self.verifier.verify(received, anew=anew)
            except Rejected as rejected:
                self.intake.refused(replace(caller, id=rejected.source or caller.id), rejected)
                # All of them at one time, whichever check it was.
                floor = self._settings.cert_refusal_seconds
                await asyncio.sleep(max(0.0, began + floor - asyncio.get_running_loop().time()))
                raise Problem("cert.event_rejected") from None
            try:
                return await self._take(caller, verified, received.body)
            except SourceMoved:
                continue
        raise Problem("service.unavailable", "the source is being changed", headers={"Retry-After": "1"})

    async def _take(self, caller: Caller, verified: Verified, body: bytes) -> Accepted:
        source, key = verified.source.id, verified.key.id
        shown = verified.presented.message_id
        try:
            event = read(verified, body)
            check_provenance(verified, event)
            found = await self.intake.take(verified, event, body)
        except Problem as problem:
            outcome = _OUTCOME_OF.get(problem.code)
            if outcome is not None:
                self.intake.came(source, "", outcome, shown, key)
                await self._note(caller, source, shown, problem)
            if problem.code == "cert.key_material":
                await self._alarm(verified, body, problem)
            raise
        self.intake.came(source, event.cluster_id, found.status, shown, key)
        return found

    async def _note(self, caller: Caller, source: str, event: str, problem: Problem) -> None:
        """What a signed request was refused for is worth knowing: somebody with a key does what they should not."""
        if problem.code == "request.invalid":
            return
        details = {"code": problem.code, "event": event, "members": problem.extra.get("members", [])}
        who = replace(caller, id=source)
        if not self.intake.denied(who, source, problem.code, details):
            return
        await audit.refused(self._db, who, "cert_event.ingest", source, details, organization=audit.INSTALLATION)

    async def _alarm(self, verified: Verified, body: bytes, problem: Problem) -> None:
        """A key that was sent is known to others: an incident of the domain that it was sent about, if that can be told."""
        name = hostname_in(body)
        if name is None or not verified.source.speaks_for(name):
            return
        async with self._db.transaction() as tx:
            domain = await covering(tx, name)
            domain = await domain_store.find(tx, domain.id, lock=True) if domain is not None else None
            if domain is not None:
                detail = f"{verified.source.id} sent a private key with an event; replace it"
                mark = hashlib.sha256(body).hexdigest()
                condition = Condition(1, "key_material", detail, mark)
                await self._incidents.settle(tx, domain, "integrity", "key_material", condition, verified.source.id)


def hostname_in(body: bytes) -> str | None:
    """The name that a body is about, whatever else is in it."""
    try:
        return Subject.model_validate(json.loads(body)["subject"]).hostname
    except (ValueError, RecursionError, KeyError, TypeError):
        return None


_OUTCOME_OF: Final = {
    "request.invalid": "invalid",
    "cert.key_material": "key_material",
    "cert.provenance_mismatch": "mismatch",
    "cert.event_id_conflict": "conflict",
}
