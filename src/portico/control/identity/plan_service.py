"""Plans as their verbs: who is on which, what that means now, moving an organization, and other versions of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity import plans, store
from portico.control.identity.plans import FEATURE_TABLE, LIMIT_TABLE, MONTHLY, Entitlements, Plan
from portico.control.identity.quotas import Quotas, allowed
from portico.errors import Problem
from portico.kit.db import Reader, Tx

HARD_CAP: Final = "hard_cap"


@dataclass(frozen=True, slots=True)
class Override:
    """What an organization has differently from its plan: a limit (``None``: none), or a feature or the hard cap as a truth."""

    name: str
    value: int | None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """Where an organization goes. ``version`` None: the one that it is on, or else the newest."""

    plan: str
    version: int | None
    overrides: Sequence[Override]
    reason: str


@dataclass(frozen=True, slots=True)
class Paid:
    """What an organization pays for. ``version`` None: as of :class:`Move`. ``requests_per_second``: set while it is restricted
    because it does not pay."""

    plan: str
    version: int | None
    requests_per_second: int | None
    reason: str


class Plans:
    """The verbs on plans."""

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas

    async def offered(self, reader: Reader) -> dict[str, Any]:
        """The plans that anybody may have, cheapest first; few enough for one page."""
        found = [plan for plan in await plans.current(reader) if plan.listed]
        return {"data": [_render(plan) for plan in found], "next_cursor": None}

    async def all(self, reader: Reader) -> dict[str, Any]:
        """Every version of every plan, with how many organizations are on it."""
        rows = [
            {
                **_render(plan),
                "listed": plan.listed,
                "position": plan.position,
                "created_at": made,
                "organizations": count,
            }
            for plan, made, count in await plans.versions(reader)
        ]
        return {"data": rows, "next_cursor": None}

    async def of(self, reader: Reader, organization: str) -> dict[str, Any]:
        """What an organization may have and has. Raises ``request.not_found``."""
        held = await plans.entitlements(reader, organization)
        used = await self._quotas.used(reader, organization)
        changed = await plans.overrides(reader, organization)
        return {
            "plan": {"id": held.plan, "version": held.version, "name": held.name},
            "hard_cap": held.hard_cap,
            "limits": [self._limit(held, name, used) for name in LIMIT_TABLE],
            "features": [
                {"name": name, "about": FEATURE_TABLE[name], "has": name in held.features} for name in FEATURE_TABLE
            ],
            "overrides": [_told(row) for row in changed],
        }

    def _limit(self, held: Entitlements, name: str, used: Mapping[str, int]) -> dict[str, Any]:
        return {
            "name": name,
            "about": LIMIT_TABLE[name].about,
            "allowed": allowed(held, self._quotas.kinds, name),
            "used": used.get(name),
            "monthly": name in MONTHLY,
        }

    async def move(self, tx: Tx, caller: Caller, organization: str, wanted: Move) -> dict[str, Any]:
        """Put an organization on a plan with these overrides and no others; in force at once, for live tunnels within 2 s.

        Raises ``request.not_found``, ``plan.not_found``, ``plan.override_invalid``.
        """
        await store.lock_organization(tx, organization)
        before = await plans.entitlements(tx, organization)
        overrides = [_checked(each) for each in wanted.overrides]
        if len({each.name for each in overrides}) < len(overrides):
            raise Problem("plan.override_invalid", "an override is there twice")
        version = wanted.version or (before.version if wanted.plan == before.plan else None)
        if not await plans.put(tx, organization, wanted.plan, version):
            which = f" in version {version}" if version else ""
            raise Problem("plan.not_found", f"there is no plan {wanted.plan}{which}")
        await plans.replace_overrides(tx, organization, [(o.name, o.value, o.expires_at) for o in overrides])
        await self._quotas.changed(tx, organization)
        now = await plans.entitlements(tx, organization)
        facts = {
            "plan": now.plan,
            "version": now.version,
            "before": {"plan": before.plan, "version": before.version},
            "overrides": [_told((o.name, o.value, o.expires_at)) for o in overrides],
            "reason": wanted.reason,
        }
        await audit.record(tx, caller, "organization.plan", organization, details=facts, organization=organization)
        return await self.of(tx, organization)

    async def assign(self, tx: Tx, caller: Caller, organization: str, paid: Paid) -> bool:
        """Put an organization on what it pays for, and restrict it if it does not; an operator's overrides stay. Whether that
        changed something; in force at once, for live tunnels within 2 s.

        Raises ``request.not_found``, ``plan.not_found``.
        """
        await store.lock_organization(tx, organization)
        before = await plans.entitlements(tx, organization)
        version = paid.version or (before.version if paid.plan == before.plan else None)
        moved = (paid.plan, version) != (before.plan, before.version)
        if moved and not await plans.put(tx, organization, paid.plan, version):
            raise Problem("plan.not_found", f"there is no plan {paid.plan}")
        limits = await self._restrictions(tx, organization, paid.requests_per_second)
        restricted = await plans.restrict(tx, organization, limits)
        if not moved and not restricted:
            return False
        await self._quotas.changed(tx, organization)
        now = await plans.entitlements(tx, organization)
        facts = {
            "plan": now.plan,
            "version": now.version,
            "before": {"plan": before.plan, "version": before.version},
            "restricted": limits,
            "reason": paid.reason,
        }
        await audit.record(tx, caller, "organization.plan", organization, details=facts, organization=organization)
        return True

    async def _restrictions(self, tx: Tx, organization: str, requests_per_second: int | None) -> dict[str, int]:
        """What an organization is restricted to: the tunnels that it has, and a slow pace; never more than it had. What is
        restricted already stays as it is: its tunnels are not counted again."""
        if requests_per_second is None:
            return {}
        if known := await plans.restrictions(tx, organization):
            return known
        held = await plans.entitlements(tx, organization)
        wanted = {"requests_per_second": requests_per_second}
        if (tunnels := self._quotas.kinds.get("tunnels")) is not None:
            wanted["tunnels"] = await tunnels.count(tx, organization)
        return {
            name: value if (most := held.limit(name)) is None else min(value, most) for name, value in wanted.items()
        }

    async def write(
        self,
        tx: Tx,
        caller: Caller,
        plan_id: str,
        *,
        name: str | None,
        limits: Mapping[str, int | None],
        features: Sequence[str] | None,
        hard_cap: bool | None,
        listed: bool | None,
        position: int | None,
    ) -> dict[str, Any]:
        """Another version of a plan, or a new plan. What is left out is as in the version before, of a new plan as in ``free``.

        Nobody is moved: organizations keep the version that they are on. Raises ``plan.limit_invalid``.
        """
        for unknown in [key for key in limits if key not in LIMIT_TABLE]:
            raise Problem("plan.limit_invalid", f"there is no limit {unknown}", limits=list(LIMIT_TABLE))
        for unknown in [key for key in features or () if key not in FEATURE_TABLE]:
            raise Problem("plan.limit_invalid", f"there is no feature {unknown}", features=list(FEATURE_TABLE))
        await plans.lock(tx)
        known = {plan.id: plan for plan in await plans.current(tx)}
        base = known.get(plan_id)
        like = base or known["free"]
        made = Plan(
            plan_id,
            base.version + 1 if base is not None else 1,
            name or (base.name if base is not None else plan_id),
            position if position is not None else like.position,
            listed if listed is not None else base is not None and base.listed,
            hard_cap if hard_cap is not None else like.hard_cap,
            {**like.limits, **limits},
            frozenset(features) if features is not None else like.features,
        )
        await plans.add_version(tx, made)
        facts = {**_render(made), "listed": made.listed}
        await audit.record(tx, caller, "plan.write", plan_id, details=facts)
        return facts | {"position": made.position}


def _checked(override: Override) -> Override:
    name, value = override.name, override.value
    truth = name in FEATURE_TABLE or name == HARD_CAP
    if name not in LIMIT_TABLE and not truth:
        raise Problem("plan.override_invalid", f"there is no limit or feature {name}")
    if truth and value not in (0, 1):
        raise Problem("plan.override_invalid", f"{name} is had (1) or not (0)")
    return override


def _told(row: Any) -> dict[str, Any]:
    name, value, expires = row
    return {"name": name, "value": value, "expires_at": expires.isoformat() if isinstance(expires, datetime) else None}


def _render(plan: Plan) -> dict[str, Any]:
    return {
        "id": plan.id,
        "version": plan.version,
        "name": plan.name,
        "hard_cap": plan.hard_cap,
        "limits": {name: plan.limits.get(name) for name in LIMIT_TABLE},
        "features": sorted(plan.features),
    }
