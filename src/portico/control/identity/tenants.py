"""What operators see of organizations: who they are, how they stand, how many people they have. Nothing of what is in them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from portico.control.identity.tables import members, organizations
from portico.errors import Problem
from portico.kit import pages
from portico.kit.db import Reader

_o = organizations.c


async def listing(
    reader: Reader, page: pages.PageRequest, search: str | None, suspended: bool | None
) -> dict[str, Any]:
    """A page of organizations in the order in which they were made; ``search``: a part of the name, or an id."""
    query = _facts()
    if search is not None:
        named = sa.func.strpos(sa.func.lower(_o.name), search.lower()) > 0
        query = query.where(sa.or_(named, _o.id == search))
    if suspended is not None:
        query = query.where(_o.suspended_at.is_not(None) if suspended else _o.suspended_at.is_(None))
    if page.after is not None:
        query = query.where(_o.id > page.after[0])
    rows = await reader.fetch_all(query.order_by(_o.id).limit(page.limit + 1))
    document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.id,), lambda row: row._asdict())
    return document


async def get(reader: Reader, organization: str) -> dict[str, Any]:
    """One organization. Raises ``request.not_found``."""
    row = await reader.fetch_one(_facts().where(_o.id == organization))
    if row is None:
        raise Problem("request.not_found", "there is no such organization")
    return row._asdict()


def _facts() -> sa.Select[Any]:
    people = sa.select(sa.func.count()).where(members.c.organization_id == _o.id)
    return sa.select(
        _o.id,
        _o.name,
        _o.plan,
        _o.created_at,
        _o.suspended_at,
        _o.suspended_reason,
        _o.delete_after,
        people.scalar_subquery().label("members"),
    )
