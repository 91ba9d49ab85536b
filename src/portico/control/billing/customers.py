"""Whose an event is: the organization behind a provider's references, by our own records alone.

What a provider lets others write into its objects (metadata, notes, custom ids) is never asked. The records are made when a
checkout is opened, and by events that name something known together with something new.

A customer says whose an event is only where we make customers, one for each organization. Elsewhere the provider makes them of
people: who pays for two organizations is one payer there, and what they pay for one is none of the other's.
"""

from __future__ import annotations

import logging
from typing import Any

from portico.control.billing import billing_store as store
from portico.control.billing import checkout_store
from portico.control.billing.billing_store import Source
from portico.control.finance.events import FinanceEvent
from portico.kit.db import Reader, Tx

log = logging.getLogger(__name__)

#: References by which an organization is found, the narrowest first.
BY = ("subscription_ref", "checkout_ref", "customer_ref", "payment_ref")
#: Providers at which a customer is one organization's: we make it.
OF_ONE = frozenset({"stripe"})


class MappingConflict(Exception):
    """References of one event belong to different organizations."""


async def organization_of(reader: Reader, event: FinanceEvent) -> str | None:
    """The organization that ``event`` is about; ``None``: not known yet. Raises :class:`MappingConflict`."""
    if event.provider == "platform":
        return event.organization_id
    source, found = Source.of(event), list[str]()
    if event.subscription_ref is not None:
        found += _organization(await store.subscription(reader, source, event.subscription_ref))
        found += _organization(await checkout_store.by_subscription(reader, source, event.subscription_ref))
    if event.checkout_ref is not None:
        found += _organization(await checkout_store.by_ref(reader, source, event.checkout_ref))
    if event.customer_ref is not None and event.provider in OF_ONE:
        found += _organization(await store.customer(reader, source, event.customer_ref))
    if event.payment_ref is not None:
        found += _organization(await store.payment(reader, source, event.payment_ref))
    if len(set(found)) > 1:
        log.error("an event belongs to two organizations", extra={"f": {"event": event.event_id, "kind": event.kind}})
        raise MappingConflict(event.event_id)
    return found[0] if found else None


def _organization(row: Any) -> list[str]:
    return [] if row is None else [row.organization_id]


async def learn(tx: Tx, organization: str, event: FinanceEvent) -> None:
    """Remember the customer that an event of a known organization names."""
    if event.customer_ref is not None:
        await belongs(tx, organization, Source.of(event), event.customer_ref)


async def belongs(tx: Tx, organization: str, source: Source, customer_ref: str) -> None:
    """A customer is this organization's, at a provider where it is nobody else's."""
    if source.provider in OF_ONE:
        await store.add_customer(tx, organization, source, customer_ref)
