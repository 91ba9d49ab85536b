"""How an organization stands: well, suspended by the operator, or about to be deleted."""

from __future__ import annotations

from typing import Any

from portico.control.access import Standing
from portico.errors import Problem
from portico.kit.db import Reader


def standing_of(row: Any) -> Standing | None:
    """How an organization stands, by the columns ``suspended_at`` and ``delete_after`` of its row."""
    if row["suspended_at"] is not None:
        return "suspended"
    return "deleting" if row["delete_after"] is not None else None


async def standing(reader: Reader, organization: str) -> Standing | None:
    """How an organization stands now. Raises ``request.not_found`` when it is gone."""
    row = await reader.raw.fetchrow("SELECT suspended_at, delete_after FROM organizations WHERE id = $1", organization)
    if row is None:
        raise Problem("request.not_found", "there is no such organization")
    return standing_of(row)


def check_standing(standing: Standing | None) -> None:
    """Raises ``organization.suspended`` or ``organization.deleting`` unless the organization stands well."""
    if standing is not None:
        raise Problem(f"organization.{standing}")
