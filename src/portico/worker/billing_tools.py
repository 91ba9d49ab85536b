"""What the jobs of the worker `billing` share: made once for a process, since adapters keep connections."""

from __future__ import annotations

import functools

from portico.control.billing import service
from portico.control.billing.apply import Applier
from portico.control.billing.provider import Providers
from portico.control.billing.service import Billing
from portico.worker.jobs import Context


def billing(context: Context) -> Billing:
    """The process's billing."""
    return _of(context)


# A context lives as long as its process; tests have several.
@functools.lru_cache(maxsize=4)
def _of(context: Context) -> Billing:
    return service.of(context.control, context.db, context.clock)


def applier(context: Context) -> Applier:
    """What applies finance events."""
    return billing(context).applier


def providers(context: Context) -> Providers:
    """The adapters of providers."""
    return billing(context).providers
