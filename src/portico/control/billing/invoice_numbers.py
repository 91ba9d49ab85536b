"""Numbers of invoices and credit notes: one series for each legal entity, kind and year, without gaps.

A number is drawn when a document becomes final and under the lock of its series, which holds until the transaction ends: one
that is rolled back takes its number back, and those who finalize at once take turns. A number is never given away again: what is
void keeps its own. The database refuses a series that does not move on by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

from portico.control.billing import invoice_store as store
from portico.kit.db import Tx

Series = Literal["invoice", "credit_note"]
_DIGITS: Final = 6


@dataclass(frozen=True, slots=True)
class Number:
    """A number with its place in its series."""

    entity_id: str
    year: int
    sequence: int
    number: str

    @property
    def columns(self) -> dict[str, Any]:
        return {"entity_id": self.entity_id, "year": self.year, "sequence": self.sequence, "number": self.number}


async def draw(tx: Tx, entity: Any, series: Series, at: datetime) -> Number:
    """The next number of ``entity`` (a row of ``billing_entities``) in the year of ``at``, by UTC."""
    year = at.astimezone(UTC).year
    sequence = await store.next_number(tx, entity.id, series, year)
    prefix = entity.invoice_prefix if series == "invoice" else entity.credit_note_prefix
    return Number(entity.id, year, sequence, written(prefix, year, sequence))


def written(prefix: str, year: int, sequence: int) -> str:
    """``INV-2026-000042``."""
    return f"{prefix}-{year}-{sequence:0{_DIGITS}d}"
