"""Incidents: what is wrong with a domain's certificate, from the first sign to the success that ends it.

    open → acknowledged → resolved     (→ open again within a day: the same incident)

Of a domain and class there is one that is not resolved. It has conditions, by who saw them: ``state`` (events, and the time
that a certificate has left), ``sla`` (a renewal is late), ``probe`` (what the edge serves is wrong), ``key_material``
(somebody sent a private key). Its tier is the worst that it ever had; a worse one is told to people although somebody has
acknowledged the incident. It ends by itself when no condition is left, which takes a later success; who ends it by hand is
not contradicted by what they knew.

People hear of it by the organization's notification channels and, where the operator has set one, by a signed webhook that
starts a runbook; not more often than the cool-down says, unless it became worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.domains import incident_store as store
from portico.control.domains import lifecycle
from portico.control.domains import store as domain_store
from portico.control.domains.certificate_state import Event, Registers, Trouble, derive, sla, trouble
from portico.control.domains.lifecycle import NewEvent
from portico.control.notifications import channels
from portico.errors import Problem
from portico.kit import outbox
from portico.kit.clock import Clock
from portico.kit.db import Database, Tx
from portico.kit.ids import new_id
from portico.kit.outbox import Draft
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

#: The way out to the operator's automation.
RUNBOOK: Final = "runbook"
OPENED, ESCALATED, RESOLVED = (
    "certificate_incident.opened",
    "certificate_incident.escalated",
    "certificate_incident.resolved",
)
LATE: Final = "certificate.renewal_late"
Origin = Literal["state", "sla", "probe", "key_material"]
_SLA_TIERS: Final = {"warning": 3, "breach": 2}
_BATCH: Final = 500


#: Classes that tell of a certificate's age.
_OF_AGE: Final = ("expiry", "renewal")


def closed_by(domain: Any) -> str | None:
    """What keeps a name that is somebody's from being served; ``None``: nothing does."""
    if domain.hostname_status == "blocked":
        return "domain.blocked"
    return "domain.frozen" if domain.frozen is not None else None


@dataclass(frozen=True, slots=True)
class Condition:
    """Something wrong. ``mark``: the same as long as it is the same failure that is told of."""

    tier: int
    code: str
    detail: str | None
    mark: str

    def document(self) -> dict[str, Any]:
        return {"tier": self.tier, "code": self.code, "detail": self.detail, "mark": self.mark}


class Incidents:
    """Settles incidents of domains whose row the transaction holds. One per process; the clock is the one of tests, too."""

    def __init__(self, settings: ApiSettings, sealer: Sealer, clock: Clock) -> None:
        self._settings, self._sealer, self._clock = settings, sealer, clock

    # -- from the state

    async def follow(self, tx: Tx, domain: Any, registers: Registers, event: Event) -> None:
        """``lifecycle.Follow``: what an event means for incidents."""
        await self.assess(tx, domain, registers, event.event)
        if event.pair == "deployment.succeeded":
            known = (await store.of_domain(tx, domain.id)).get("integrity")
            if known is not None and known.opened_at.isoformat() < event.occurred_at:
                await self.settle(tx, domain, "integrity", "key_material", None, event.event)

    async def assess(self, tx: Tx, domain: Any, registers: Registers, cause: str) -> None:
        """Make incidents of the origins ``state`` and ``sla`` what the registers and the clock say."""
        wanted = self.wanted(domain, registers)
        known = await store.of_domain(tx, domain.id)
        for name, origin in {**dict.fromkeys(wanted), **dict.fromkeys(_held(known))}:
            row = await self._settle(tx, domain, known.get(name), name, origin, wanted.get((name, origin)), cause)
            known[name] = row

    def wanted(self, domain: Any, registers: Registers) -> dict[tuple[str, Origin], Condition]:
        """The conditions that there should be, by class and origin: none of a name that was lost. Of one that is served to nobody
        it is nobody's concern that its certificate grows old: none is ordered."""
        if domain.hostname_status == "deleted":
            return {}
        now, closed = self._clock.wall(), closed_by(domain) is not None
        found: dict[tuple[str, Origin], Condition] = {
            (name, "state"): _condition(registers, name, each)
            for name, each in trouble(registers, now).items()
            if not (closed and name in _OF_AGE)
        }
        if closed:
            return found
        state = derive(registers)
        late = sla(state, now, self._settings.cert_sla_warning_share, self._settings.cert_sla_breach_share)
        if late is not None and registers.live is not None:
            detail = (
                f"the renewal was due at {state.renews_at.isoformat() if state.renews_at else 'a third of its life'}"
            )
            found["renewal", "sla"] = Condition(_SLA_TIERS[late], f"sla_{late}", detail, f"{state.serial}/{late}")
        return found

    # -- one condition

    async def settle(
        self, tx: Tx, domain: Any, name: str, origin: Origin, condition: Condition | None, cause: str
    ) -> None:
        """Say that a condition is there, or (``None``) that it is not any more. For other origins than the state: the probe."""
        known = (await store.of_domain(tx, domain.id)).get(name)
        await self._settle(tx, domain, known, name, origin, condition, cause)

    async def _settle(
        self, tx: Tx, domain: Any, known: Any, name: str, origin: Origin, condition: Condition | None, cause: str
    ) -> Any:
        """The latest incident of the class after that."""
        now = self._clock.wall()
        lives = known is not None and known.status != "resolved"
        if condition is None:
            if lives and origin in known.conditions:
                return await self._without(tx, known, origin, cause, now)
            return known
        if lives:
            return await self._with(tx, known, origin, condition, now)
        if known is not None and _is_known(known, origin, condition):
            return known  # a person has dealt with just that
        document = {origin: condition.document()}
        again = known is not None and now - known.resolved_at <= timedelta(
            seconds=self._settings.cert_incident_reopen_seconds
        )
        if again:
            row = await store.change(
                tx, known.id, status="open", tier=condition.tier, conditions=document, changed_at=now, opened_at=now,
                reopened=known.reopened + 1, acknowledged_at=None, acknowledged_by=None, resolved_at=None, resolved_by=None,
                by_hand=False, escalated_at=None, told=False,
            )  # fmt: skip
        else:
            row = await store.add(tx, {
                "id": new_id("cin"), "domain_id": domain.id, "organization_id": domain.organization_id,
                "hostname": domain.name, "incident_class": name, "tier": condition.tier, "status": "open",
                "conditions": document, "opened_at": now, "changed_at": now,
            })  # fmt: skip
        return await self._tell(tx, row, OPENED, now)

    async def _with(self, tx: Tx, known: Any, origin: Origin, condition: Condition, now: datetime) -> Any:
        conditions = {**known.conditions, origin: condition.document()}
        tier = min(known.tier, condition.tier)
        worse = tier < known.tier
        if conditions == known.conditions and not worse:
            return known if known.told else await self._tell(tx, known, OPENED, now)
        values: dict[str, Any] = {"conditions": conditions, "tier": tier, "changed_at": now}
        if worse:
            values["escalated_at"] = now
        row = await store.change(tx, known.id, **values)
        return await self._tell(tx, row, ESCALATED, now) if worse else row

    async def _without(self, tx: Tx, known: Any, origin: Origin, cause: str, now: datetime) -> Any:
        left = {name: each for name, each in known.conditions.items() if name != origin}
        if left:
            return await store.change(tx, known.id, conditions=left, changed_at=now)
        row = await store.change(
            tx, known.id, status="resolved", resolved_at=now, resolved_by=cause, by_hand=False, changed_at=now
        )
        return await self._tell(tx, row, RESOLVED, now) if known.told else row

    # -- telling people

    async def _tell(self, tx: Tx, row: Any, event: str, now: datetime) -> Any:
        """Tell of it, unless that was done a moment ago and it is no worse now; the row after that."""
        cool = timedelta(seconds=self._settings.cert_incident_cooldown_seconds)
        recent = row.told_at is not None and now - row.told_at < cool
        if event == OPENED and recent and row.tier >= (row.told_tier or 4):
            return row  # the watch tells of it when the time is over
        number = row.notices + 1
        changed: dict[str, Any] = {"notices": number}
        if event != RESOLVED:
            changed |= {"told_at": now, "told_tier": row.tier, "told": True}
        row = await store.change(tx, row.id, **changed)
        code, detail = _worst(row.conditions)
        facts = {
            "incident": row.id, "domain": row.domain_id, "hostname": row.hostname, "class": row.incident_class,
            "tier": row.tier, "status": row.status, "code": code, "detail": detail, "reopened": row.reopened,
        }  # fmt: skip
        key = f"{row.id}:{number}"
        await channels.notify(tx, self._sealer, row.organization_id, event, facts, key)
        await self._run_book(tx, row.organization_id, event, facts, key)
        return row

    async def _run_book(self, tx: Tx, organization: str, event: str, facts: Mapping[str, Any], key: str) -> None:
        if self._settings.cert_runbook_url is None:
            return
        runbook = f"docs/runbooks/certificate-{facts['class']}.md"
        body = {"type": event, "timestamp": self._clock.wall().isoformat(), "organization": organization, "data": facts}
        draft = Draft(RUNBOOK, f"{RUNBOOK}:{key}", RUNBOOK, event, body | {"runbook": runbook})
        await outbox.append(tx, self._sealer, draft)

    # -- by time alone

    async def watch(self, db: Database) -> int:
        """Open, escalate and end what only the clock changes, and tell what waited; how many domains it concerned.

        Domains are looked at without a lock, many at once; only where something is to change, one is locked and judged again.
        """
        after, changed = "", 0
        while True:
            async with db.read() as reader:
                rows = await store.watched(reader, self._clock.wall(), after, _BATCH)
                known = await store.unresolved(reader, [row.id for row in rows])
            for row in rows:
                if self._differs(row, known.get(row.id, {})):
                    changed += await self._again(db, row.id)
            if len(rows) < _BATCH:
                return changed
            after = rows[-1].id

    def _differs(self, row: Any, known: Mapping[str, Any]) -> bool:
        registers = Registers.read(row.cert_applied)
        wanted = {at: condition.document() for at, condition in self.wanted(row, registers).items()}
        have = {at: known[at[0]].conditions[at[1]] for at in _held(known)}
        silent = any(not each.told for each in known.values())
        return wanted != have or silent or self._is_over(row, registers)

    def _is_over(self, row: Any, registers: Registers) -> bool:
        """Whether the time of a certificate has ended and nobody has said so."""
        held = row.hostname_status != "deleted" and row.cert_status in ("active", "renewing")
        return bool(held and row.cert_not_after <= self._clock.wall())

    async def _again(self, db: Database, domain_id: str) -> int:
        async with db.transaction() as tx:
            row = await domain_store.find(tx, domain_id, lock=True)
            if row is None:
                return 0
            registers = Registers.read(row.cert_applied)
            await self.assess(tx, row, registers, closed_by(row) or "clock")
            live = registers.live
            if self._is_over(row, registers) and live is not None:
                key = f"expiry:{row.id}:{row.cert_serial or live.event}"
                await lifecycle.record(
                    tx, NewEvent(row.id, "expiry", "reached", live.revision, serial=row.cert_serial, key=key)
                )
            late = self.wanted(row, registers).get(("renewal", "sla"))
            if late is not None:
                await self._say_late(tx, row, late)
        return 1

    async def _say_late(self, tx: Tx, row: Any, late: Condition) -> None:
        """Once for each certificate and level; further times the key is known."""
        facts = {
            "domain": row.id, "hostname": row.name, "level": late.code.removeprefix("sla_"), "due_at": row.cert_renews_at,
            "not_after": row.cert_not_after,
        }  # fmt: skip
        shown = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in facts.items()}
        await channels.notify(tx, self._sealer, row.organization_id, LATE, shown, f"{LATE}:{row.id}:{late.mark}")

    # -- by people

    async def acknowledge(self, tx: Tx, caller: Caller, incident: str, note: str | None) -> Any:
        """Say that somebody is at it. Raises ``cert.incident_not_found`` and ``cert.incident_resolved``."""
        row = await self._live(tx, incident)
        if row.status == "open":
            now = self._clock.wall()
            row = await store.change(
                tx, incident, status="acknowledged", acknowledged_at=now, acknowledged_by=caller.id, changed_at=now
            )
            await self._record(tx, caller, "cert_incident.acknowledge", row, note)
        if note is not None:
            await self._note(tx, caller, incident, note)
        return row

    async def resolve(self, tx: Tx, caller: Caller, incident: str, note: str) -> Any:
        """End it by hand: the same failure does not open it again, a new or a worse one does.

        Raises ``cert.incident_not_found`` and ``cert.incident_resolved``.
        """
        await self._live(tx, incident)
        now = self._clock.wall()
        row = await store.change(
            tx, incident, status="resolved", resolved_at=now, resolved_by=caller.id, by_hand=True, changed_at=now
        )
        await self._note(tx, caller, incident, note)
        await self._record(tx, caller, "cert_incident.resolve", row, note)
        if row.told:
            await self._tell(tx, row, RESOLVED, now)
        return row

    async def note(self, tx: Tx, caller: Caller, incident: str, text: str) -> Any:
        """Add a note. Raises ``cert.incident_not_found``."""
        row = await store.one(tx, incident)
        if row is None:
            raise Problem("cert.incident_not_found")
        await self._note(tx, caller, incident, text)
        await self._record(tx, caller, "cert_incident.note", row, None)
        return row

    async def _live(self, tx: Tx, incident: str) -> Any:
        """The row, with that of its domain locked first, as everybody does who changes incidents."""
        row = await store.one(tx, incident)
        if row is None or await domain_store.find(tx, row.domain_id, lock=True) is None:
            raise Problem("cert.incident_not_found")
        row = await store.one(tx, incident)
        if row is None or row.status == "resolved":
            raise Problem("cert.incident_resolved")
        return row

    async def _note(self, tx: Tx, caller: Caller, incident: str, text: str) -> None:
        await store.add_note(tx, {
            "id": new_id("not"), "incident_id": incident, "author": caller.id, "text": text,
            "created_at": self._clock.wall(),
        })  # fmt: skip

    async def _record(self, tx: Tx, caller: Caller, act: str, row: Any, note: str | None) -> None:
        details = {"domain": row.domain_id, "class": row.incident_class, "tier": row.tier}
        if note is not None:
            details["note"] = note
        await audit.record(tx, caller, act, row.id, details=details, organization=audit.INSTALLATION)


def _held(known: Mapping[str, Any]) -> list[tuple[str, Origin]]:
    """The conditions of the origins that the state decides, of incidents that are not resolved."""
    origins: tuple[Origin, ...] = ("state", "sla")
    return [
        (name, origin)
        for name, row in known.items()
        if row.status != "resolved"
        for origin in origins
        if origin in row.conditions
    ]


def _condition(registers: Registers, name: str, each: Trouble) -> Condition:
    """The mark is the failure's place; of a certificate that ends, which one it is."""
    failure = registers.failure(name)
    live = registers.live
    mark = "/".join(map(str, failure.place)) if failure is not None else f"{live.place if live else ''}"
    return Condition(each.tier, each.code, each.detail, mark)


def _is_known(row: Any, origin: Origin, condition: Condition) -> bool:
    """Whether a person resolved an incident in the knowledge of this very condition."""
    before = row.conditions.get(origin)
    return bool(row.by_hand and before and before["mark"] == condition.mark and before["tier"] <= condition.tier)


def _worst(conditions: Mapping[str, Any]) -> tuple[str, str | None]:
    worst = min(conditions.values(), key=lambda each: each["tier"])
    return worst["code"], worst["detail"]
