"""Quotas: whether an organization may have one more of something. The one mechanism for all that is counted.

    await quotas.claim(tx, organization, "tunnels")      before the row is inserted, in its transaction

A claim holds what everybody who adds one of the kind holds (the organization's row, or the kind's own lock), then reads what
holds for the organization now, then counts: of any number of simultaneous claims no more pass than there is room for. What
counts is registered by the domain that has it. Below a plan's limit stands the installation's ceiling, a setting.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from portico.control.identity import invitation_store, plans, roster, store
from portico.control.identity.plans import FEATURE_TABLE, LIMIT_TABLE, Entitlements
from portico.errors import Problem
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx
from portico.settings import ApiSettings

Count = Callable[[Reader, str], Awaitable[int]]
Hold = Callable[[Tx, str], Awaitable[None]]
Changed = Callable[[Tx, str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Kind:
    """Something that is counted: how, under which lock, and the installation's ceiling with the code of its refusal."""

    count: Count
    hold: Hold = store.lock_organization
    ceiling: int | None = None
    ceiling_code: str = "quota.exceeded"
    ceiling_detail: str = ""


class Quotas:
    """The verbs on quotas. ``kinds`` is filled by ``app.py``; ``on_changed`` is called, in its transaction, when what holds for
    an organization may have changed."""

    def __init__(self, settings: ApiSettings, clock: Clock) -> None:
        self.kinds: dict[str, Kind] = {}
        self.on_changed: list[Changed] = []

        async def keys(reader: Reader, organization: str) -> int:
            return await store.count_keys(reader, organization, clock.wall())

        most = settings.max_keys_per_organization
        self.kinds["api_keys"] = Kind(
            keys,
            ceiling=most,
            ceiling_code="key.limit_reached",
            ceiling_detail=f"an organization has at most {most} keys",
        )
        most = settings.max_roles_per_organization
        self.kinds["roles"] = Kind(
            roster.count_roles,
            ceiling=most,
            ceiling_code="role.limit_reached",
            ceiling_detail=f"an organization has at most {most} roles of its own",
        )

        async def people(reader: Reader, organization: str) -> int:
            """Members and open invitations: each of those will be one."""
            invited = await invitation_store.count_open(reader, organization, clock.wall())
            return await roster.count_members(reader, organization) + invited

        self.kinds["members"] = Kind(people)

    async def claim(self, tx: Tx, organization: str, name: str, wanted: int = 1) -> Entitlements:
        """Make sure of room for ``wanted`` more; until the transaction ends nobody else may add one.

        Raises ``quota.exceeded``, or the kind's own code at the installation's ceiling.
        """
        kind = self.kinds[name]
        await kind.hold(tx, organization)
        held = await plans.entitlements(tx, organization)
        allowed, ceiling = held.limit(name), kind.ceiling
        if allowed is None and ceiling is None:
            return held
        used = await kind.count(tx, organization)
        if ceiling is not None and used + wanted > ceiling and (allowed is None or ceiling <= allowed):
            if kind.ceiling_code == "quota.exceeded":
                raise await self.exceeded(tx, held, name, used, ceiling, wanted)
            raise Problem(kind.ceiling_code, kind.ceiling_detail, limit=ceiling)
        if allowed is not None and used + wanted > allowed:
            raise await self.exceeded(tx, held, name, used, allowed, wanted)
        return held

    async def exceeded(
        self, reader: Reader, held: Entitlements, name: str, used: int, allowed: int, wanted: int = 1
    ) -> Problem:
        """``quota.exceeded`` for a limit, with the plan that lifts it."""
        lifted_by = None
        if held.limit(name) == allowed:  # else it is the installation's ceiling, which no plan lifts
            lifted_by = plans.lifts(await plans.current(reader), name, used + wanted)
        noun = LIMIT_TABLE[name].noun if name in LIMIT_TABLE else name
        return Problem(
            "quota.exceeded",
            f"the plan {held.name} allows {allowed} {noun}; your organization has {used}",
            hint=_hint(lifted_by, "Remove what is no longer needed"),
            limit=name,
            used=used,
            allowed=allowed,
            plan=held.plan,
            lifted_by=lifted_by,
        )

    async def require(self, reader: Reader, organization: str, feature: str) -> Entitlements:
        """What holds for an organization that has ``feature``. Raises ``quota.feature_missing``."""
        held = await plans.entitlements(reader, organization)
        await self.check_feature(reader, held, feature)
        return held

    async def check_feature(self, reader: Reader, held: Entitlements, feature: str) -> None:
        """Raises ``quota.feature_missing``, with the plan that has it."""
        if feature in held.features:
            return
        lifted_by = plans.brings(await plans.current(reader), feature)
        raise Problem(
            "quota.feature_missing",
            f"the plan {held.name} has no {FEATURE_TABLE[feature]}",
            hint=_hint(lifted_by, "Leave it out"),
            feature=feature,
            plan=held.plan,
            lifted_by=lifted_by,
        )

    async def used(self, reader: Reader, organization: str) -> dict[str, int]:
        """How much the organization has of everything that is counted."""
        counted = {name: kind for name, kind in self.kinds.items() if name in LIMIT_TABLE}
        return {name: await kind.count(reader, organization) for name, kind in counted.items()}

    async def changed(self, tx: Tx, organization: str) -> None:
        """What holds for an organization may have changed: whoever enforces it is told, in ``tx``.

        Its keys are held as well: a session that is being opened under what held before is there by then, and counts.
        """
        await store.lock_organization(tx, organization)
        await roster.lock_keys_of_organization(tx, organization)
        for tell in self.on_changed:
            await tell(tx, organization)


def _hint(lifted_by: str | None, otherwise: str) -> str:
    if lifted_by is None:
        return f"{otherwise}, or ask the operator of this platform for more."
    return f"{otherwise}, or move to the plan {lifted_by}."


def allowed(held: Entitlements, kinds: dict[str, Kind], name: str) -> int | None:
    """What may be had of ``name``: the plan's limit, or the installation's ceiling where that is lower."""
    ceiling = kinds[name].ceiling if name in kinds else None
    found: Any = [most for most in (held.limit(name), ceiling) if most is not None]
    return min(found) if found else None
