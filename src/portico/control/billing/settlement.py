"""Settlement: receipts of what was settled outside, compared with what we have recorded, until both say the same.

    received → verified → matched | delta | failed            by the worker, from the stored body
    delta → resolved                                          accepted (an adjusting entry in the ledger), or disputed
    matched, delta, resolved → verified → …                   by a late event, or because somebody asks

A receipt is taken in once: the same message, or the same batch with the same content, is a duplicate. A batch that says something
else with a later ``issued_at`` is a new version, and replaces the one before, whatever had become of that; one with an earlier
``issued_at`` came late itself and is kept as replaced. A message id, or an ``issued_at``, under which something else was said
before is a security event.

A comparison that comes to what the last one came to adds nothing to the history, so running it again is harmless.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from pydantic import ValidationError

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.audit.tally import Seldom
from portico.control.billing import export_store, settlement_import, settlement_source
from portico.control.billing import settlement_store as store
from portico.control.billing.settlement_body import ReceiptBody
from portico.control.billing.settlement_match import Report, basis_points, compare, failed
from portico.control.billing.settlement_sinks import Sinks
from portico.control.billing.settlement_source import Scope
from portico.control.finance import accounts, ledger
from portico.errors import Problem
from portico.kit import money, pages, queue, signing
from portico.kit.canonical import encode
from portico.kit.clock import Clock
from portico.kit.db import Database, Reader, Tx
from portico.kit.ids import new_id
from portico.kit.queue import Work
from portico.kit.sealing import Sealer
from portico.kit.signing import SignatureError
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

#: The sink's id; the key id of a message.
KEY_ID: Final = "webhook-key-id"
_BODY: Final = "settlement receipt"
#: Who an audit row names for what the platform does by itself.
PLATFORM: Final = Caller("operator", "installation", None)
REFUSALS: Final = ("unknown_sink", "no_secret", "missing", "malformed", "stale", "mismatch")
OUTCOMES: Final = ("accepted", "duplicate", "superseded", "conflict", "invalid")
# Compared with when there is no sink: whoever has no key learns nothing from the time that it takes.
_DECOY: Final = signing.new_secret()


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a receipt: ``accepted``, ``duplicate``, or ``superseded`` (a later version was here before)."""

    receipt: str
    status: str


@dataclass(frozen=True, slots=True)
class _New:
    """A receipt to be kept."""

    sink: str | None
    origin: str
    message: str
    raw: bytes
    body: ReceiptBody


class Settlements:
    """The verbs on receipts. One per process."""

    def __init__(self, settings: ApiSettings, db: Database, clock: Clock, sealer: Sealer) -> None:
        self._settings, self._db, self._clock, self._sealer = settings, db, clock, sealer
        self.sinks = Sinks(settings, clock, sealer)
        self.refusals: Counter[str] = Counter(dict.fromkeys(REFUSALS, 0))
        self.outcomes: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self._told = Seldom(clock, settings.settlement_refusal_audit_seconds)

    # -- taking them in

    async def receive(self, caller: Caller, fields: Mapping[str, str], raw: bytes) -> Taken:
        """A message that somebody signed, perhaps. Raises ``settlement.signature_invalid`` (401), ``request.invalid``,
        ``settlement.message_conflict``, ``settlement.batch_conflict``."""
        sink, message = await self._signed(caller, fields, raw)
        try:
            body = await asyncio.to_thread(_parsed, raw)
        except Problem:
            self.outcomes["invalid"] += 1
            raise
        taken = await self._take(caller, _New(sink, f"sink:{sink}", message, raw, body))
        self.outcomes[taken.status] += 1
        return taken

    async def _signed(self, caller: Caller, fields: Mapping[str, str], raw: bytes) -> tuple[str, str]:
        """The sink and the id of a message. One answer, after one time, to everybody who cannot sign."""
        named = fields.get(KEY_ID, "")
        async with self._db.read() as reader:
            row = await store.sink(reader, named) if 0 < len(named) <= 64 and named.isascii() else None
        now = self._clock.wall()
        usable = self.sinks.secrets(row, now) if row is not None else []
        tolerance = self._settings.settlement_tolerance_seconds
        try:
            message, _ = signing.verify(usable or [_DECOY], fields, raw, now.timestamp(), tolerance)
        except SignatureError as err:
            reason = err.fault if usable else ("unknown_sink" if row is None else "no_secret")
            await self._refused(caller, row.id if row is not None else None, reason)
            raise Problem("settlement.signature_invalid") from None
        if row is None or not usable:  # nobody has the decoy
            await self._refused(caller, None, "unknown_sink")
            raise Problem("settlement.signature_invalid")
        return str(row.id), message

    async def _refused(self, caller: Caller, sink: str | None, reason: str) -> None:
        """Count it; and one row in the audit log for each sink and reason in a while, with how many there were."""
        self.refusals[reason] += 1
        if (unrecorded := self._told.due(f"{sink}:{reason}")) is None:
            return
        details = {"reason": reason, "unrecorded": unrecorded}
        await audit.refused(self._db, caller, "settlement.receive", sink, details, organization=audit.INSTALLATION)

    async def _take(self, caller: Caller, new: _New) -> Taken:
        digest = hashlib.sha256(new.raw).digest()
        sealed: bytes | None = None
        receipt = new_id("stl")
        if not await self._known(new.origin, new.message):
            packed = await asyncio.to_thread(zlib.compress, new.raw, 6)
            sealed = self._sealer.seal(_BODY, receipt, packed)
        conflict: str | None = None
        taken: Taken | None = None
        async with self._db.transaction() as tx:
            await store.take_turns(tx, new.origin)
            same = await store.by_message(tx, new.origin, new.message)
            versions = await store.batch(tx, new.origin, new.body.batch_id)
            if same is not None:
                # The id of an import is the digest of its rows: asked for twice at once, it differs in its time alone.
                if new.sink is None or bytes(same.body_digest) == digest:
                    taken = Taken(same.id, "duplicate")
                else:
                    conflict = "settlement.message_conflict"
            elif twin := [each for each in versions if bytes(each.body_digest) == digest]:
                taken = Taken(twin[0].id, "duplicate")
            elif any(_contradicts(each, new.body) for each in versions):
                conflict = "settlement.batch_conflict"
            elif sealed is not None:
                taken = await self._write(tx, caller, new, receipt, digest, sealed, versions)
        if conflict is not None:
            self.outcomes["conflict"] += 1
            log.warning("a receipt contradicts another", extra={"f": {"origin": new.origin, "code": conflict}})
            details = {"code": conflict, "batch": new.body.batch_id, "message": new.message}
            await audit.refused(
                self._db, caller, "settlement.receive", new.sink, details, organization=audit.INSTALLATION
            )
            raise Problem(conflict)
        if taken is None:  # it was known a moment ago, and is not any more: nothing is deleted, so this cannot be
            raise Problem("service.unavailable", headers={"Retry-After": "1"})
        return taken

    async def _known(self, origin: str, message: str) -> bool:
        async with self._db.read() as reader:
            return await store.by_message(reader, origin, message) is not None

    async def _write(
        self, tx: Tx, caller: Caller, new: _New, receipt: str, digest: bytes, sealed: bytes, versions: Sequence[Any]
    ) -> Taken:
        body = new.body
        later = [each for each in versions if each.issued_at > body.issued_at]
        row: dict[str, Any] = {
            "id": receipt, "sink_id": new.sink, "origin": new.origin, "message_id": new.message, "batch_id": body.batch_id,
            "revision": len(versions) + 1, "issued_at": body.issued_at, "body_digest": digest, "sealed_body": sealed,
            "provider": body.provider, "account": body.account, "livemode": body.livemode,
            "period_start": body.period_start, "period_end": body.period_end, "export_id": body.export_id,
            "state": "received",
        }  # fmt: skip
        current = max(versions, key=lambda each: each.issued_at, default=None)
        if later and current is not None:
            row |= {"state": "resolved", "resolution": "superseded", "superseded_by": current.id, "queue_state": "done"}
        elif current is not None and current.resolution != "superseded":
            # What an accepted entry has adjusted was adjusted for the batch, not for one version of it.
            row |= {"adjusted": current.adjusted, "accepted": current.accepted}
            await store.supersede(tx, current, receipt, self._clock.wall())
        await store.add(tx, row)
        details = {
            "batch": body.batch_id, "revision": row["revision"], "provider": body.provider, "sha256": digest.hex(),
            "supersedes": None if later or current is None else current.id,
        }  # fmt: skip
        await audit.record(tx, caller, "settlement.receive", receipt, details=details, organization=audit.INSTALLATION)
        return Taken(receipt, "superseded" if later else "accepted")

    async def imported(
        self, caller: Caller, provider: str, rows: Sequence[Mapping[str, Any]], *, batch_id: str, account: str,
        livemode: bool, period_start: datetime, period_end: datetime,
    ) -> Taken:  # fmt: skip
        """Rows of a provider's own as a receipt. Raises ``settlement.import_invalid``, ``request.invalid``.

        Of the same rows there is one receipt; other rows under the same batch are a new version of it.
        """
        now = self._clock.wall()

        def read() -> tuple[str, bytes, ReceiptBody]:
            made = settlement_import.receipt(
                provider, rows, batch_id=batch_id, account=account, livemode=livemode, period_start=period_start,
                period_end=period_end, issued_at=now,
            )  # fmt: skip
            content = {name: value for name, value in made.items() if name != "issued_at"}
            raw = json.dumps(made, separators=(",", ":")).encode()
            return hashlib.sha256(encode(content)).hexdigest(), raw, _parsed(raw)

        mark, raw, body = await asyncio.to_thread(read)  # of many rows it takes seconds, in which others are answered
        origin = f"import:{provider}:{account}"
        async with self._db.read() as reader:
            known = await store.by_message(reader, origin, f"{batch_id}:{mark}")
        if known is not None and known.resolution != "superseded":
            return Taken(known.id, "duplicate")
        message = f"{batch_id}:{mark}" if known is None else f"{batch_id}:{mark}:{new_id('mark')}"
        return await self._take(caller, _New(None, origin, message, raw, body))

    # -- what operators do

    async def again(self, tx: Tx, caller: Caller, receipt: str, reason: str) -> dict[str, Any]:
        """Compare once more. Raises ``settlement.not_found``, ``settlement.superseded``, ``settlement.pending``."""
        row = await self._locked(tx, receipt)
        if row.queue_state == "pending" and row.last_error is None:
            raise Problem("settlement.pending")
        await requeue(tx, row, "asked")
        await audit.record(
            tx, caller, "settlement.reconcile", receipt, details={"reason": reason, "state": row.state},
            organization=audit.INSTALLATION,
        )  # fmt: skip
        return render(await self._locked(tx, receipt))

    async def again_many(
        self, tx: Tx, caller: Caller, filters: Mapping[str, Any], reason: str, limit: int
    ) -> list[str]:
        """The same of those that fit (``state``, ``sink``, ``provider``, ``batch``), the newest first; their ids."""
        rows = await store.listing(tx, filters, limit, None)
        ids = []
        for row in sorted(rows, key=lambda each: each.id):
            found = await store.one(tx, row.id, lock=True)
            if found is None or found.resolution == "superseded" or found.queue_state == "pending":
                continue
            await requeue(tx, found, "asked")
            ids.append(str(found.id))
        details = {
            "reason": reason,
            "filter": {k: v for k, v in filters.items() if v is not None},
            "receipts": ids[:20],
        }
        await audit.record(
            tx, caller, "settlement.reconcile_many", None, details={**details, "count": len(ids)},
            organization=audit.INSTALLATION,
        )  # fmt: skip
        return ids

    async def resolve(self, tx: Tx, caller: Caller, receipt: str, resolution: str, reason: str) -> dict[str, Any]:
        """Close a delta: ``accepted`` writes what is left of it into the ledger, ``disputed`` changes nothing but its state.

        Raises ``settlement.not_found``, ``settlement.superseded``, ``settlement.state`` for what is no delta.
        """
        row = await self._locked(tx, receipt)
        if row.state != "delta" or row.queue_state == "pending":
            raise Problem("settlement.state", f"the receipt is {row.state}", state=row.state)
        values: dict[str, Any] = {"resolution": resolution}
        entries: list[str] = []
        if resolution == "accepted":
            left = {name: each["delta_minor"] for name, each in row.deltas.items() if each["delta_minor"]}
            entries = await self._adjust(tx, row, left, reason)
            total = {name: row.adjusted.get(name, 0) + left.get(name, 0) for name in {*row.adjusted, *left}}
            values["adjusted"] = total
            values["deltas"] = {name: {"delta_minor": 0, "delta_bps": 0} for name in row.deltas}
            last = await store.last_run(tx, receipt)
            values["accepted"] = None if last is None else _substance(last.report)
        await store.move(tx, receipt, "resolved", **values)
        details = {"resolution": resolution, "reason": reason, "deltas": row.deltas, "entries": entries}
        await audit.record(tx, caller, "settlement.resolve", receipt, details=details, organization=audit.INSTALLATION)
        return render(await self._locked(tx, receipt))

    async def _adjust(self, tx: Tx, row: Any, left: Mapping[str, int], reason: str) -> list[str]:
        """Make clearing what the sink says that it is, against the account of accepted differences."""
        made = []
        for currency, delta in sorted(left.items()):
            clearing = ledger.Posting(accounts.CLEARING, currency, delta, provider=row.provider)
            against = ledger.Posting(accounts.ADJUSTMENT, currency, -delta)
            entry = ledger.Entry(
                f"settlement.adjusted:{row.id}:{row.runs}:{currency}", "settlement.adjusted", None, self._clock.wall(),
                (clearing, against), provider=row.provider, provider_account=row.account, source=row.id, note=reason[:500],
            )  # fmt: skip
            if (posted := await ledger.post(tx, entry)) is not None:
                made.append(posted)
        return made

    async def _locked(self, tx: Tx, receipt: str) -> Any:
        row = await store.one(tx, receipt, lock=True)
        if row is None:
            raise Problem("settlement.not_found")
        if row.resolution == "superseded":
            raise Problem("settlement.superseded", superseded_by=row.superseded_by)
        return row

    # -- reading

    async def listing(self, reader: Reader, filters: Mapping[str, Any], page: pages.PageRequest) -> Any:
        """A page of receipts, the newest first."""
        rows = await store.listing(reader, filters, page.limit + 1, page.after[0] if page.after else None)
        return pages.listing(rows, page.limit, lambda row: (row.id,), render)

    async def history(self, reader: Reader, receipt: str, page: pages.PageRequest) -> Any:
        """A page of what its comparisons came to, the newest first."""
        if await store.one(reader, receipt) is None:
            raise Problem("settlement.not_found")
        before = page.after[0] if page.after else None
        if before is not None and not (before.isascii() and before.isdigit() and len(before) < 10):
            raise Problem("request.cursor_invalid")
        rows = await store.history(reader, receipt, page.limit + 1, None if before is None else int(before))
        return pages.listing(rows, page.limit, lambda row: (str(row.number),), _render_run)


async def newest(reader: Reader, filters: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
    """The newest receipts that fit."""
    return [render(row) for row in await store.listing(reader, filters, limit, None)]


async def document(reader: Reader, receipt: str) -> dict[str, Any]:
    """One receipt with its latest report. Raises ``settlement.not_found``."""
    row = await store.one(reader, receipt)
    if row is None:
        raise Problem("settlement.not_found")
    last = await store.last_run(reader, receipt)
    return {**render(row), "report": None if last is None else last.report}


async def requeue(tx: Tx, row: Any, cause: str) -> None:
    """Let a receipt, whose row ``tx`` holds, be compared again; from wherever it is."""
    again = {**store.AGAIN, "cause": cause}
    if row.state == "failed":
        await store.move(tx, row.id, "received", reason=None, **again)
    elif row.state in store.OPEN:
        await store.move(tx, row.id, "verified", resolution=None, **again)
    else:  # received or verified: its job died
        await tx.execute(store.receipts.update().where(store.R.id == row.id).values(**again))
    await queue.wake(tx, store.KIND)


def render(row: Any) -> dict[str, Any]:
    """A receipt as operators see it."""
    return {
        "id": row.id, "sink": row.sink_id, "batch_id": row.batch_id, "revision": row.revision, "state": row.state,
        "reason": row.reason, "resolution": row.resolution, "superseded_by": row.superseded_by, "provider": row.provider,
        "account": row.account, "livemode": row.livemode, "period_start": row.period_start, "period_end": row.period_end,
        "export_id": row.export_id, "issued_at": row.issued_at, "received_at": row.received_at,
        "reconciled_at": row.reconciled_at, "checked_at": row.checked_at, "runs": row.runs,
        "sha256": bytes(row.body_digest).hex(), "deltas": row.deltas, "findings": row.findings, "adjusted": row.adjusted,
        "pending": row.queue_state == "pending", "error": row.last_error,
    }  # fmt: skip


def _render_run(row: Any) -> dict[str, Any]:
    return {
        "number": row.number, "verdict": row.verdict, "cause": row.cause, "recorded": row.recorded, "at": row.at,
        "sha256": bytes(row.digest).hex(), "report": row.report,
    }  # fmt: skip


def _contradicts(version: Any, body: ReceiptBody) -> bool:
    """Whether a batch cannot be both: two things said at one time; or of two accounts, of which only one was adjusted for it."""
    there = (version.provider, version.account, version.livemode)
    return bool(version.issued_at == body.issued_at or there != (body.provider, body.account, body.livemode))


def _parsed(raw: bytes) -> ReceiptBody:
    """The receipt in a body. Raises ``request.invalid`` (422)."""
    try:
        document = json.loads(raw, parse_constant=_no_constant, object_pairs_hook=_once_each)
    except (ValueError, RecursionError):
        raise Problem("request.invalid", "the body is not valid JSON, or names a member twice") from None
    try:
        return ReceiptBody.model_validate(document)
    except ValidationError as err:
        first = err.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:64] for part in first["loc"])
        raise Problem("request.invalid", f"the receipt does not fit: {where}: {first['msg'][:200]}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member is there twice: two programs would believe different ones")
    return found


# -- the worker's part ---------------------------------------------------------------------------------------------------


async def reconcile(work: Work, settings: ApiSettings, sealer: Sealer, clock: Clock) -> None:
    """The job: read the receipt again, compare it, and record what that comes to together with the job's end.

    Between the two steps nothing is held but a snapshot. Raises ``queue.LeaseLost`` when somebody else has it.
    """
    row = work.row
    async with work.step() as tx:
        if row["state"] == "received":
            await store.move(tx, work.id, "verified")
    body = await asyncio.to_thread(_opened, sealer, row)
    scope = Scope(row["provider"], row["account"], row["livemode"], row["period_start"], row["period_end"])
    async with work.db.read(snapshot=True) as reader:
        refusal = await _against(reader, row)
        if refusal is None and row["period_end"] > clock.wall():
            refusal = failed("unknown_period", "the period has not ended")
        if refusal is not None:
            report, seen = refusal, await settlement_source.count(reader, scope)
        else:
            ours, seen = await settlement_source.read(reader, scope)
            tolerances = await _tolerances(reader, row["sink_id"])
            report = await asyncio.to_thread(
                compare, ours, body.match_lines(), body.stated(), tolerances, money.EXPONENTS
            )
    async with work.done() as tx:
        await _settle(tx, await store.one(tx, work.id, lock=True), report, seen, clock.wall())


def _opened(sealer: Sealer, row: Mapping[str, Any]) -> ReceiptBody:
    raw = zlib.decompress(sealer.open(_BODY, row["id"], row["sealed_body"]))
    if hashlib.sha256(raw).digest() != bytes(row["body_digest"]):
        raise ValueError("the stored body is not the one that was signed")
    return _parsed(raw)


async def _tolerances(reader: Reader, sink: str | None) -> Mapping[str, int]:
    row = await store.sink(reader, sink) if sink is not None else None
    return {} if row is None else dict(row.tolerances)


async def _against(reader: Reader, row: Mapping[str, Any]) -> Report | None:
    """Why a receipt about a report cannot be compared: there is no such report, or it is of another period."""
    if row["export_id"] is None:
        return None
    export = await export_store.one(reader, row["export_id"])
    if export is None:
        return failed("unknown_export", "there is no such report")
    if (export.period_start, export.period_end) != (row["period_start"], row["period_end"]):
        return failed("unknown_period", "the report is of another period")
    return None


async def _settle(tx: Tx, row: Any, report: Report, seen: int, now: datetime) -> None:
    """Write the verdict, and a run when it is another than the last one."""
    if row.resolution == "superseded":
        return  # meanwhile; the lease went with it
    deltas = _left(report, row.adjusted)
    verdict = report.verdict
    if verdict == "delta" and row.accepted is not None and bytes(row.accepted) == _substance(report.document()):
        verdict = "matched"  # what is off is what somebody has accepted, line by line
    if verdict == "matched" and any(
        abs(each.delta_minor - row.adjusted.get(each.currency, 0)) > each.tolerance_minor for each in report.currencies
    ):
        verdict = "delta"  # both sides agree now: what was accepted must be taken back
    document = report.document() | {"verdict": verdict, "adjusted": row.adjusted}
    digest = hashlib.sha256(encode(document)).digest()
    last = await store.last_run(tx, row.id)
    number = row.runs
    if last is None or bytes(last.digest) != digest:
        number += 1
        run = {
            "receipt_id": row.id, "number": number, "verdict": verdict, "cause": row.cause, "recorded": seen,
            "digest": digest, "report": document, "at": now,
        }  # fmt: skip
        await store.add_run(tx, run)
        details = {"verdict": verdict, "cause": row.cause, "reason": report.reason, "deltas": deltas, "run": number}
        await audit.record(
            tx, PLATFORM, "settlement.reconciled", row.id, details=details, organization=audit.INSTALLATION
        )
        if verdict != "matched":
            facts = {"receipt": row.id, "verdict": verdict, "reason": report.reason, "deltas": deltas}
            tx.after_commit(lambda: log.error("a settlement does not match", extra={"f": facts}))
    await store.move(
        tx, row.id, verdict, reason=report.reason, deltas=deltas, recorded=seen, runs=number, reconciled_at=now,
        checked_at=now, findings={name: count for name, count in report.counts.items() if count},
    )  # fmt: skip


def _substance(document: Mapping[str, Any]) -> bytes:
    """What a report says, whatever became of it."""
    return hashlib.sha256(encode({name: document[name] for name in ("currencies", "counts", "findings")})).digest()


def _left(report: Report, adjusted: Mapping[str, int]) -> dict[str, dict[str, int | None]]:
    """By currency, how far the sink is off when what was accepted is counted in."""
    found: dict[str, dict[str, int | None]] = {}
    for each in report.currencies:
        left = each.delta_minor - adjusted.get(each.currency, 0)
        found[each.currency] = {"delta_minor": left, "delta_bps": basis_points(left, each.ours["net"])}
    return found


async def watch(db: Database, settings: ApiSettings, now: datetime, batch: int = 200) -> int:
    """Let receipts be compared again for which events came late, or whose period had not ended; how many."""
    since, after, found = now - timedelta(days=settings.settlement_watch_days), "", 0
    while True:
        async with db.read() as reader:
            rows = await store.watched(reader, since, batch, after)
            late = []
            for row in rows:
                scope = Scope(row.provider, row.account, row.livemode, row.period_start, row.period_end)
                early = row.checked_at is not None and row.checked_at < row.period_end <= now
                if early or await settlement_source.count(reader, scope) != (row.recorded or 0):
                    late.append(row.id)
        for receipt in late:
            async with db.transaction() as tx:
                held = await store.one(tx, receipt, lock=True)
                if held is None or held.queue_state != "done" or held.resolution == "superseded":
                    continue
                await requeue(tx, held, "late_event")
                details = {"cause": "late_event", "state": held.state}
                await audit.record(
                    tx, PLATFORM, "settlement.reopen", receipt, details=details, organization=audit.INSTALLATION
                )
                found += 1
        if len(rows) < batch:
            return found
        after = rows[-1].id
