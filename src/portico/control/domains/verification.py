"""Looking at the DNS of a domain and drawing the consequence, for its owner's ``verify`` and for the worker.

Looks are made with no transaction open, consequences drawn under the lock of every claim of the name: of any number of
organizations that prove it at once one holds it, and another one's hold ends only when a fresh look shows the new record and not
the old one, at more than half of the resolvers. A look that is older than a minute, or of a claim that was made anew since, is
worth nothing.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.domains import acme_schedule, caa, edge, judging, names, records, store, vault
from portico.control.domains.dns import Looks
from portico.control.domains.judging import Judged, Looked
from portico.control.domains.names import NameRules
from portico.control.notifications import channels
from portico.kit.clock import Clock
from portico.kit.db import Database, Tx
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

#: Who an audit row names for what follows from a look of the worker.
WORKER: Final = Caller("operator", "certificates", None)
#: Seconds for which a look may be acted on.
FRESH_SECONDS: Final = 60.0
#: Characters of the label that is asked about to see where a wildcard leads.
_PROBE_CHARS: Final = 16

_TOPICS: Final = {"moved": "domain.moved", "deleted": "domain.lost"}


class Verification:
    """The verbs. One per process, in the API and in workers."""

    def __init__(self, settings: ApiSettings, clock: Clock, sealer: Sealer) -> None:
        self._settings = settings
        self._clock = clock
        self._sealer = sealer
        self._rules = NameRules(settings)
        self._looks = Looks(settings)
        self._target = names.target(settings)

    async def look(self, row: Any) -> Looked:
        """Ask about everything that a domain needs. Bounded: some questions at once, each with its time limit."""
        at, name = self._clock.wall(), self._rules.known(row.name)
        ask = self._looks.ask
        host = f"{row.verification_token[:_PROBE_CHARS]}.{name.base}" if name.wildcard else name.base
        delegation = records.delegation(self._settings, row, name)
        ownership, four, six, own, delegated, policy = await asyncio.gather(
            ask(records.ownership(row, name).name, "TXT"),
            ask(host, "A"),
            ask(host, "AAAA"),
            self._own(),
            ask(delegation.name, "CNAME") if delegation is not None else _nothing(),
            caa.policy(self._looks, row.name),
        )
        return Looked(at, ownership, list(zip(four, six, strict=True)), own, delegated, policy)

    async def _own(self) -> frozenset[str]:
        """The addresses of the edge: those of the settings, else those that its name has at any resolver."""
        if self._settings.domain_addresses:
            return frozenset(self._settings.domain_addresses)
        answers = await asyncio.gather(self._looks.ask(self._target, "A"), self._looks.ask(self._target, "AAAA"))
        return frozenset(value for each in answers for answer in each for value in answer.values)

    async def apply(self, tx: Tx, caller: Caller, seen: Any, looked: Looked, *, manual: bool) -> Any:
        """Draw the consequence of a look at the row ``seen``; the row after it, or ``None`` when it is gone."""
        claims = {row.id: row for row in await store.lock_claims(tx, seen.name)}
        row = claims.get(seen.id)
        now = self._clock.wall()
        if row is None or row.hostname_status in ("blocked", "deleted"):
            return row
        if row.verification_token != seen.verification_token or now - looked.at > timedelta(seconds=FRESH_SECONDS):
            return row
        judged = self._judge(row, looked)
        holder = next((each for each in claims.values() if each.id != row.id and _holds(each)), None)
        proved = row.hostname_status == "pending" and judged.owner == "yes"
        if proved and holder is not None and not await self._take_over(tx, caller, row, holder, looked):
            judged = judging.claimed(judged)
        return await self._write(tx, caller, row, judging.settle(self._settings, row, judged, now, manual=manual))

    def _judge(self, row: Any, looked: Looked) -> Judged:
        wanted = records.wanted(self._settings, row, self._rules.known(row.name))
        return judging.judge(looked, row.verification_token, wanted, self._target)

    async def _take_over(self, tx: Tx, caller: Caller, row: Any, holder: Any, looked: Looked) -> bool:
        """End another organization's hold of a name whose new owner proved it, if the old proof is gone for sure."""
        if holder.hostname_status == "blocked" or judging.proves(looked.ownership, holder.verification_token) != "no":
            return False
        values = {"hostname_status": "deleted", "tunnel_id": None, "next_check_at": None, "dns_error": "taken_over"}
        await self._write(tx, WORKER, holder, values)
        await audit.record(
            tx, caller, "domain.take_over", row.id, details={"name": row.name}, organization=row.organization_id
        )
        return True

    async def _write(self, tx: Tx, caller: Caller, row: Any, values: dict[str, Any]) -> Any:
        """The row with new columns; who watches is told of what it means."""
        after = await store.update(tx, row.id, **values)
        edge.tell(tx, row, after)
        if after.hostname_status != row.hostname_status:
            if after.hostname_status == "deleted":
                await vault.remove(tx, row.id)
            facts = {"name": row.name, "from": row.hostname_status, "to": after.hostname_status, "why": after.dns_error}
            await audit.record(tx, caller, "domain.status", row.id, details=facts, organization=row.organization_id)
        if _provable(after) - _provable(row):
            await acme_schedule.ready(tx, row.id)
        await self._notify(tx, row, after)
        return after

    async def _notify(self, tx: Tx, before: Any, after: Any) -> None:
        """One message for each turn that a domain takes, to the channels that want it."""
        status = after.hostname_status
        topic = _TOPICS.get(status) if status != before.hostname_status else None
        if before.hostname_status == "pending" and status in ("verified", "active"):
            topic = "domain.verified"
        elif topic is None and status == before.hostname_status and status in ("verified", "active"):
            topic = "domain.failing" if after.failing_since is not None and before.failing_since is None else None
        if topic is None:
            return
        facts = {
            "domain": after.id,
            "name": after.name,
            "hostname_status": status,
            "error": after.dns_error,
            "tunnel": before.tunnel_id,
        }
        key = f"{topic}:{after.id}:{after.checked_at or after.updated_at}"
        await channels.notify(tx, self._sealer, after.organization_id, topic, facts, key)

    async def check(self, db: Database, row: Any, caller: Caller = WORKER, *, manual: bool = False) -> Any:
        """Look, then draw the consequence in a transaction of its own; the row after it, ``None`` when it is gone."""
        looked = await self.look(row)
        async with db.transaction() as tx:
            return await self.apply(tx, caller, row, looked, manual=manual)


def _provable(row: Any) -> set[str]:
    """What makes it possible to prove the name to an authority: that it leads here, and that it delegates."""
    delegation = (row.dns_findings or {}).get("delegation", {})
    ways = {"address": row.hostname_status == "active", "delegation": delegation.get("state") == "ok"}
    return {way for way, open_ in ways.items() if open_}


def _holds(row: Any) -> bool:
    return row.hostname_status in store.HELD


async def _nothing() -> list[Any]:
    return []
