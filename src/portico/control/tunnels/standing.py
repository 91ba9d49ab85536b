"""What relays hold of an organization: the limits of its plan, and whether its traffic is refused for this month.

    plan, overrides, usage of the month ──settle──► organizations.edge_state ──edge change──► every relay

Grants carry the same limits for tunnels that start; the row changes those that are live, and the higher version wins. Whatever
makes it stale (a move to another plan, the end of an override, a batch of usage that crosses a limit, a month's turn) calls
``settle``, which decides from the database alone: twice, or late, is no harm.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

from portico.control import changes
from portico.control.identity import plans
from portico.control.identity.plans import MONTHLY, Entitlements
from portico.control.identity.quotas import Quotas
from portico.control.tunnels import policy, usage_store
from portico.errors import Problem
from portico.kit.clock import Clock
from portico.kit.db import Database, Reader, Tx
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

#: Shares of a month's quota, in percent, that are worth a notice; each once a month.
NOTICES: Final = (50, 80, 100)
REFUSAL: Final = "edge.quota_exceeded"
#: Days that one question for usage may be about.
MAX_DAYS: Final = {"day": 366, "month": 3660}
#: Organizations whose overrides are taken away in one round.
_EXPIRED: Final = 100

Notify = Callable[[Tx, str, dict[str, Any], str], Awaitable[None]]


def month_of(moment: datetime) -> date:
    """The calendar month (UTC), by its first day."""
    return moment.astimezone(UTC).date().replace(day=1)


def next_month(month: date) -> datetime:
    """The moment at which the month after begins."""
    later = date(month.year + month.month // 12, month.month % 12 + 1, 1)
    return datetime(later.year, later.month, 1, tzinfo=UTC)


def midnight(day: date) -> datetime:
    """The moment at which a day of UTC begins."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def used_of(total: Any) -> dict[str, int]:
    """What counts towards each limit of a month, of a row of totals (``None``: nothing yet)."""
    return {name: sum(total[part] for part in parts) if total is not None else 0 for name, parts in MONTHLY.items()}


async def used(reader: Reader, organization: str, month: date) -> dict[str, int]:
    """What an organization used of each limit of a month."""
    return used_of(await usage_store.month(reader, organization, month))


async def used_from(reader: Reader, organization: str, since: datetime, until: datetime) -> dict[str, int]:
    """The same of the hours that begin from ``since`` on, within one month, and before ``until``."""
    rows = await usage_store.usage(reader, organization, None, "month", since, until)
    return used_of(rows[0] if rows else None)


class Standing:
    """The verbs on what relays hold of organizations. ``notify`` is called for each share of a quota that was passed."""

    def __init__(self, settings: ApiSettings, clock: Clock, quotas: Quotas) -> None:
        self._settings = settings
        self._clock = clock
        self._quotas = quotas
        self.notify: list[Notify] = []

    async def moved(self, tx: Tx, organization: str) -> None:
        """Identity's callback: what holds for the organization changed. Relays are told, whatever they knew: grants are out."""
        await self.settle(tx, organization, always=True)

    async def settle(self, tx: Tx, organization: str, *, always: bool = False) -> None:
        """Decide what relays hold of an organization and tell them of a difference; note the shares that were passed."""
        found = await plans.hold(tx, organization)
        if found is None:
            return
        held, before = found
        month = month_of(self._clock.wall())
        used = used_of(await usage_store.month(tx, organization, month))
        state: dict[str, Any] = {"limits": policy.organization_limits(self._settings, held)}
        if held.hard_cap and any(_full(held, name, used[name]) for name in MONTHLY):
            state["refuse"] = {"code": REFUSAL, "until": int(next_month(month).timestamp())}
        nothing = before is None and "refuse" not in state
        if (state != before and not nothing) or always:
            version = await plans.tell(tx, organization, state)
            changes.append(tx, changes.organization({"id": organization, "version": version, **state}))
        await self._notices(tx, held, month, used)

    async def _notices(self, tx: Tx, held: Entitlements, month: date, used: dict[str, int]) -> None:
        for name, count in used.items():
            allowed = held.limit(name)
            passed = _passed(held, name, count)
            fresh = await usage_store.add_notices(tx, held.organization, month, name, passed) if passed else []
            if not fresh:
                continue
            facts = {
                "limit": name,
                "percent": max(fresh),  # of several passed at once the highest says it all
                "used": count,
                "allowed": allowed,
                "month": month.isoformat()[:7],
                "plan": held.plan,
                "hard_cap": held.hard_cap,
            }
            key = f"usage {held.organization} {month} {name} {max(fresh)}"
            for tell in self.notify:
                await tell(tx, held.organization, facts, key)

    async def usage(
        self,
        reader: Reader,
        organization: str,
        *,
        since: date | None,
        until: date | None,
        by: str,
        tunnel: str | None,
    ) -> dict[str, Any]:
        """Totals of whole days or months (UTC) from ``since`` to ``until``, both inclusive, and the month against the plan.

        Raises ``usage.range_invalid``, and ``tunnel.not_found`` for a tunnel that never was the organization's.
        """
        now = self._clock.wall()
        today = now.astimezone(UTC).date()
        first, last = since or min(month_of(now), until or today), until or today
        if first > last:
            raise Problem("usage.range_invalid", f"{first} is after {last}")
        if (last - first).days >= MAX_DAYS[by]:
            raise Problem("usage.range_invalid", f"by {by}, at most {MAX_DAYS[by]} days can be asked for at once")
        if last.year >= date.max.year:
            raise Problem("usage.range_invalid", f"{last} is too far away")
        if tunnel is not None and not await usage_store.had_tunnel(reader, organization, tunnel):
            raise Problem("tunnel.not_found")
        start, end = midnight(first), midnight(last + timedelta(days=1))
        if by == "month":
            start, end = midnight(first.replace(day=1)), next_month(last.replace(day=1))
        rows = await usage_store.usage(reader, organization, tunnel, by, start, end)
        return {
            "from": start.date(),
            "to": end.date() - timedelta(days=1),
            "by": by,
            "tunnel": tunnel,
            "data": [{**row, "period": row["period"].date().isoformat()[: 10 if by == "day" else 7]} for row in rows],
            "month": await self._month(reader, organization, now),
        }

    async def _month(self, reader: Reader, organization: str, now: datetime) -> dict[str, Any]:
        held = await plans.entitlements(reader, organization)
        month = month_of(now)
        used = used_of(await usage_store.month(reader, organization, month))
        limits = []
        for name, count in used.items():
            most = held.limit(name)
            percent = None if most is None else count * 100 // most if most else 100
            limits.append({"name": name, "used": count, "allowed": most, "percent": percent})
        return {
            "month": month.isoformat()[:7],
            "resets_at": next_month(month),
            "hard_cap": held.hard_cap,
            "refused": held.hard_cap and any(_full(held, name, used[name]) for name in MONTHLY),
            "limits": limits,
        }

    async def look(self, db: Database, organizations: Iterable[str]) -> None:
        """Settle those of the organizations, which have just used something, whose usage passed a limit or a share of one.

        What is due follows from the totals, so that whatever goes wrong here is made good by the next batch.
        """
        try:
            async with db.read() as reader:
                due = await self._due(reader, sorted(organizations))
            for organization in due:
                async with db.transaction() as tx:
                    await self.settle(tx, organization)
        except Exception as err:
            log.warning("usage was not compared", extra={"f": {"error": f"{type(err).__name__}: {err}"[:200]}})

    async def _due(self, reader: Reader, organizations: list[str]) -> list[str]:
        found = await plans.metered(reader, organizations, self._clock.wall().timestamp())
        if not found:
            return []
        month, ids = month_of(self._clock.wall()), [held.organization for held, _ in found]
        totals = await usage_store.months(reader, ids, month)
        noted = await usage_store.notices(reader, ids, month)
        due = []
        for held, refused in found:
            used = used_of(totals.get(held.organization))
            capped = held.hard_cap and any(_full(held, name, used[name]) for name in MONTHLY)
            passed = {
                (held.organization, name, percent) for name in MONTHLY for percent in _passed(held, name, used[name])
            }
            if passed - noted or (capped and not refused):
                due.append(held.organization)
        return due

    async def round(self, db: Database) -> None:
        """Take away overrides that are over, and what was refused for a month that is over. Safe in several processes."""
        async with db.read() as reader:
            ended = await plans.expired_overrides(reader, _EXPIRED)
        for organization in ended:
            # The organization first, as whoever moves it to a plan does: the other way round each would wait for the other.
            async with db.transaction() as tx:
                if await plans.hold(tx, organization) and await plans.expire_overrides(tx, organization):
                    await self._quotas.changed(tx, organization)
        now = self._clock.wall()
        async with db.read() as reader:
            over = await plans.refused_until(reader, now.timestamp())
        for organization in over:
            async with db.transaction() as tx:
                await self.settle(tx, organization)


def _full(held: Entitlements, name: str, count: int) -> bool:
    most = held.limit(name)
    return most is not None and count >= most


def _passed(held: Entitlements, name: str, count: int) -> list[int]:
    """The shares of a limit that ``count`` has reached, in percent."""
    most = held.limit(name)
    return [percent for percent in NOTICES if count * 100 >= most * percent] if most else []
