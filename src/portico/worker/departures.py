"""Organizations whose days of grace are over: everything that names them goes, some at a time, their own row last.

Each batch is a transaction of its own and finds what is left by looking, so it does not matter where a worker was when it
ended, or that two do it at once. While any row is left the organization's own is there, and with it the reason to go on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import sqlalchemy as sa

from portico.control.billing import endings
from portico.control.billing import exports as reports
from portico.control.domains import departure as domain_departure
from portico.control.domains import vault
from portico.control.identity import departure, exports
from portico.control.tunnels import departure as tunnel_departure
from portico.kit import columns
from portico.kit.batches import some
from portico.kit.db import Tx, metadata
from portico.worker import billing_tools
from portico.worker.jobs import Context

#: Rows that one transaction deletes, and organizations that one job deals with.
ROWS: Final = 500
ORGANIZATIONS: Final = 20
#: Tables with a column ``organization_id`` that keep their rows, and how those end.
KEPT: Final = {
    "audit_events": "the log of an organization outlives it, until its retention is over",
    "billing_credit_notes": "invoices are kept, as the law asks",
    "billing_invoices": "invoices are kept, as the law asks",
    "billing_tax_records": "invoices are kept, as the law asks",
    "billing_finance_events": "books are kept: nothing in them is ever deleted",
    "ledger_postings": "books are kept",
    "ledger_recognition": "what was invoiced is still recognized, day by day",
    "ledger_transactions": "books are kept",
    "mrr_movements": "books are kept",
    "revenue_daily": "sums of the books",
    "billing_calls": "money outlives an organization",
    "billing_checkouts": "money outlives an organization",
    "billing_customers": "a late refund must find whose it was",
    "billing_dunning_cases": "money outlives an organization",
    "billing_overage_charges": "money outlives an organization",
    "billing_overage_closings": "money outlives an organization",
    "billing_payment_failures": "money outlives an organization",
    "billing_payments": "money outlives an organization",
    "billing_refunds": "money outlives an organization",
    "billing_standings": "money outlives an organization",
    "billing_subscriptions": "money outlives an organization",
    "outbox_messages": "deleted by age, once they are sent or dead",
    "subdomain_claims": "names cool down",
    "tcp_ports": "ports cool down",
}

Step = Callable[[Tx], Awaitable[int]]


async def run(context: Context) -> None:
    """Delete what is due."""
    for organization in await departure.due(context.db, ORGANIZATIONS):
        await depart(context, organization)


async def depart(context: Context, organization: str) -> bool:
    """Delete one organization; false while something must stay a little longer (tokens that relays still have to refuse)."""
    for step in steps(context, organization):
        count = ROWS
        while count >= ROWS:
            async with context.db.transaction() as tx:
                if not await departure.still_due(tx, organization):
                    return True
                count = await step(tx)
    async with context.db.transaction() as tx:
        if not await departure.still_due(tx, organization):
            return True
        sessions = metadata.tables["agent_sessions"].c.organization_id == organization
        if await tx.scalar(sa.select(sa.exists().where(sessions))):
            return False
        await departure.finish(tx, organization)
    return True


def steps(context: Context, organization: str) -> Iterator[Step]:
    """In order: what others have to hear of, files, then tables from the leaves to the root."""
    yield lambda tx: billing_tools.billing(context).overage_billing.leave(tx, organization)
    yield lambda tx: endings.leave(tx, organization)
    yield lambda tx: vault.leave(tx, organization, ROWS)
    yield lambda tx: domain_departure.open_up(tx, organization, ROWS)
    yield from _below("tunnels", organization)
    yield lambda tx: tunnel_departure.delete_tunnels(tx, organization, ROWS)
    yield lambda tx: exports.drop_all(tx, context.control, organization, ROWS)
    yield lambda tx: reports.drop_all(tx, context.control, organization, ROWS)
    yield lambda tx: departure.leave_sessions(tx, organization, ROWS)  # they are people's, who may be in others
    for table in tables():
        yield from _below(table.name, organization)
        yield _sweep(table, table.c.organization_id == organization, context)


def tables() -> list[sa.Table]:
    """Every table whose rows name their organization, those that others refer to last."""
    named = [table for table in metadata.sorted_tables if "organization_id" in table.c]
    return [table for table in reversed(named) if table.name not in KEPT]


def _below(name: str, organization: str) -> Iterator[Step]:
    """Rows that would go with those of a table by its foreign keys, any number of them in one statement."""
    parent = metadata.tables[name]
    (key,) = parent.primary_key.columns if len(parent.primary_key.columns) == 1 else (None,)
    for child in metadata.sorted_tables if key is not None else ():
        if "organization_id" in child.c:
            continue
        for reference in child.foreign_keys:
            if reference.column is key and reference.ondelete == "CASCADE":
                mine = sa.select(key).where(parent.c.organization_id == organization)
                yield _plain(child, reference.parent.in_(mine))


def _sweep(table: sa.Table, where: sa.ColumnElement[bool], context: Context) -> Step:
    if table.name == "agent_sessions":  # relays must refuse the tokens of an ended one for as long as any is alive
        grace = columns.seconds(context.control.grant_outage_grace_seconds)
        where &= sa.func.coalesce(table.c.refused_until, table.c.expires_at + grace) < sa.func.now()
    return _plain(table, where)


def _plain(table: sa.Table, where: sa.ColumnElement[bool]) -> Step:
    async def step(tx: Tx) -> int:
        return int((await tx.execute(some(table, where, ROWS))).rowcount)

    return step
