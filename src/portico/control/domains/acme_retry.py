"""Try again now: an order that a person asks for, before its time, within what authorities (CAs) allow.

It goes before the pauses after failures and before the policy `hold`; not before the budget: a request that the CA would refuse
is refused here, with the time after which it would not be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.domains import acme_budget, acme_cas, acme_schedule, acme_store, jobs_acme
from portico.control.domains.names import NameRules
from portico.errors import Problem
from portico.kit import queue
from portico.kit.db import Tx
from portico.settings import ApiSettings

_WANTED = ("verified", "active")


async def retry(tx: Tx, settings: ApiSettings, rules: NameRules, caller: Caller, domain: Any) -> dict[str, Any]:
    """Let a domain's certificate be ordered now; ``domain`` is its locked row.

    Raises ``cert.not_ordered_here``, ``cert.not_wanted``, ``cert.order_open``, ``cert.retry_throttled``.
    """
    cas = acme_cas.configured(settings)
    if not cas:
        raise Problem("cert.not_ordered_here")
    if domain.hostname_status not in _WANTED or domain.tls_mode != "terminate":
        why = "its TLS is passed through" if domain.tls_mode != "terminate" else f"it is {domain.hostname_status}"
        raise Problem("cert.not_wanted", f"no certificate is ordered for {domain.name}: {why}")
    if domain.frozen is not None:
        raise Problem(
            "cert.not_wanted", f"no certificate is ordered for {domain.name}: the plan has no room for the domain"
        )
    if await acme_store.open_order(tx, domain.id) is not None:
        raise Problem("cert.order_open")
    await acme_schedule.ensure(tx, domain)
    row = await acme_store.schedule(tx, domain.id, lock=True)
    assert row is not None
    await _within_limits(tx, settings, rules, cas, domain, row)
    now = datetime.now(UTC)
    await acme_store.set_schedule(tx, domain.id, next_at=now, forced=True)
    await audit.record(tx, caller, "certificate.retry", domain.id, details={"name": domain.name})
    await queue.enqueue(tx, jobs_acme.SWEEP)
    return {"domain": domain.id, "due_at": now}


async def _within_limits(
    tx: Tx, settings: ApiSettings, rules: NameRules, cas: Sequence[acme_cas.Ca], domain: Any, row: Any
) -> None:
    pauses = await acme_store.pauses(tx)
    at = acme_schedule.place(settings, cas, row.ca, pauses, staging_first=row.staging_first)
    directory, staging = at.directory, at.staging
    claims = acme_budget.of_order(settings, [domain.name], rules.known(domain.name).registrable, staging=staging)
    claims.append(acme_budget.of_failure(settings, domain.name, staging=staging))
    seconds = await acme_budget.wait(tx, directory, claims)
    if seconds > 0:
        raise _throttled(seconds, "the authority's limits would be exceeded")
    if (seconds := pauses.get(directory, 0.0)) > 0:
        raise _throttled(seconds, "the authority wants to be left alone")
    if row.ordered_at is not None:
        seconds = settings.acme_retry_pause_seconds - (datetime.now(UTC) - row.ordered_at).total_seconds()
        if seconds > 0:
            raise _throttled(seconds, "it was tried a moment ago")


def _throttled(seconds: float, why: str) -> Problem:
    whole = max(1, math.ceil(seconds))
    return Problem("cert.retry_throttled", f"not now: {why}", headers={"Retry-After": str(whole)})
