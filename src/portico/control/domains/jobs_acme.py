"""Jobs of the worker ``certificates`` about getting them: orders, what is due, and what authorities suggest."""

from __future__ import annotations

import weakref
from datetime import UTC, datetime, timedelta
from typing import Final

import sqlalchemy as sa

from portico.control.domains import (
    acme_ari,
    acme_budget,
    acme_cas,
    acme_dns01,
    acme_orders,
    acme_schedule,
    acme_store,
    vault,
)
from portico.control.domains.acme_accounts import Accounts
from portico.control.domains.acme_orders import Parts
from portico.control.domains.acme_preflight import Preflight
from portico.control.domains.dns import Looks
from portico.control.domains.names import NameRules
from portico.errors import Problem
from portico.kit import keyfiles, queue
from portico.kit.batches import delete_in_batches
from portico.kit.db import Database
from portico.kit.queue import Work
from portico.settings import ApiSettings, WorkerSettings

ORDER: Final = acme_store.ORDER
SWEEP: Final = queue.plain("certificates.sweep")
SUGGESTIONS: Final = queue.plain("certificates.ari")
TIDY: Final = queue.plain("certificates.tidy")

_parts: weakref.WeakKeyDictionary[Database, Parts] = weakref.WeakKeyDictionary()


def ready(settings: WorkerSettings, control: ApiSettings) -> bool:
    """Whether certificates are had at all: somebody agreed to the terms, and there are keys to seal with.

    Raises ``config.invalid`` for settings that are wrong, and for terms that are agreed to where nothing can be sealed.
    """
    if not acme_cas.configured(control):
        return False
    if settings.certificate_key_file is None:
        detail = "setting certificate_key_file: acme_agree_terms is set, and there are no keys to seal certificates' keys with"
        raise Problem("config.invalid", detail, key="certificate_key_file")
    acme_dns01.provider(control)
    return True


def parts(db: Database, settings: WorkerSettings, control: ApiSettings) -> Parts:
    """What orders are worked on with."""
    found = _parts.get(db)
    if found is None:
        assert settings.certificate_key_file is not None
        found = _parts[db] = Parts(
            settings=control,
            db=db,
            accounts=Accounts(control, db),
            cas=acme_cas.configured(control),
            preflight=Preflight(control, Looks(control)),
            provider=acme_dns01.provider(control),
            vault=vault.of(settings),
            keys=keyfiles.worker_keys("certificate_key_file", settings.certificate_key_file),
            rules=NameRules(control),
        )
    return found


async def order(work: Work, settings: WorkerSettings, control: ApiSettings) -> None:
    """Go on with an order."""
    await acme_orders.run(parts(work.db, settings, control), work)


async def sweep(db: Database, control: ApiSettings) -> None:
    """Make orders of what is due."""
    await acme_schedule.sweep(db, control, acme_cas.configured(control))


async def suggestions(db: Database, control: ApiSettings) -> None:
    """Ask authorities when they want certificates renewed."""
    await acme_ari.round_(db, control, Accounts(control, db))


async def tidy(db: Database, control: ApiSettings) -> None:
    """Delete orders that are over for long, and forget what is full again or over."""
    columns = acme_store.orders.c
    before = datetime.now(UTC) - timedelta(days=control.acme_keep_days)
    await delete_in_batches(db, acme_store.orders, columns.state.in_(acme_store.ENDS) & (columns.created_at < before))
    await delete_in_batches(db, acme_store.challenges, acme_store.challenges.c.until < sa.func.now())
    async with db.transaction() as tx:
        await acme_budget.trim(tx)
