"""Domains that an organization's plan has no room for: kept, looked at, and held against everybody else, but served to nobody.

After a move to a smaller plan the oldest domains stay and the newest are frozen; which ones follows from the rows alone, so
that deciding again gives the same. A larger plan, or a domain less, thaws the next in order, which serves where it led to. No
certificate is ordered or renewed for a frozen one; the one that it has is kept. (As with tunnels: ``tunnels/frozen.py``.)
"""

from __future__ import annotations

import logging
from typing import Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.domains import edge, store
from portico.control.identity import plans
from portico.errors import Problem
from portico.kit.db import Database, Tx

log = logging.getLogger(__name__)

#: The limit for want of which a domain is frozen.
LIMIT: Final = "custom_domains"
_PLANS: Final = Caller("operator", "plans", None)
#: Organizations that one round looks at.
_BATCH: Final = 500


async def settle(tx: Tx, organization: str) -> None:
    """Freeze and thaw what follows from the plan that holds now; relays are told in the same transaction."""
    await store.lock_set(tx, organization)
    held = await plans.entitlements(tx, organization)
    most = held.limit(LIMIT)
    for position, (domain, was) in enumerate(await store.plan_facts(tx, organization)):
        wanted = None if most is None or position < most else LIMIT
        if was == wanted:
            continue
        row = await store.one(tx, organization, domain, lock=True)
        if row is None:
            continue
        after = await store.update(tx, domain, frozen=wanted)
        edge.tell(tx, row, after)
        act = "domain.freeze" if wanted is not None else "domain.thaw"
        facts = {"name": row.name, "plan": held.plan, "for": LIMIT}
        await audit.record(tx, _PLANS, act, domain, details=facts, organization=organization)


async def thaw(db: Database) -> None:
    """See whether there is room for what is frozen: domains were lost meanwhile, or an override of a plan ended."""
    async with db.read() as reader:
        organizations = await store.organizations_with_frozen(reader, _BATCH)
    for organization in organizations:
        async with db.transaction() as tx:
            await settle(tx, organization)


def refusal(name: str) -> Problem:
    """Why a frozen domain is not routed: ``domain.frozen``."""
    detail = f"{name} is frozen: the plan of your organization has no room for it, and older domains come first"
    return Problem("domain.frozen", detail, limit=LIMIT)
