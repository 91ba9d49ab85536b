"""Invoices as CSV (RFC 4180), one row each, amounts in minor units; safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from portico.control.billing import invoice_store as store
from portico.kit import cells
from portico.kit.db import Database

COLUMNS: Final = (
    "number", "status", "issued_at", "currency", "net_minor", "tax_minor", "gross_minor", "paid_minor", "credited_minor",
    "period_start", "period_end", "paid_at", "voided_at", "customer", "customer_country", "customer_tax_id", "treatment",
    "provider", "provider_ref", "provider_number", "id",
)  # fmt: skip
_BATCH: Final = 500


async def stream(db: Database, organization: str, filters: Mapping[str, Any]) -> AsyncIterator[bytes]:
    """The head, then every invoice that fits, the newest first, some at a time."""
    yield _text([COLUMNS])
    before: str | None = None
    while True:
        async with db.read() as reader:
            rows = await store.listing(reader, organization, filters, _BATCH, before)
            treatments = await store.treatments_of(reader, [row.id for row in rows])
        if rows:
            yield _text([_cells(row, treatments.get(row.id, [])) for row in rows])
        if len(rows) < _BATCH:
            return
        before = rows[-1].id


def _cells(row: Any, treatments: list[str]) -> list[Any]:
    known = {
        **row._mapping, **{name: store.at(row._mapping[name]) for name in ("issued_at", "paid_at", "voided_at")},
        "period_start": store.at(row.period_start), "period_end": store.at(row.period_end),
        "customer": row.customer["name"], "customer_country": row.customer["country"],
        "customer_tax_id": " ".join(row.customer["tax_ids"]), "treatment": " ".join(treatments),
    }  # fmt: skip
    return [known[name] for name in COLUMNS]


def _text(rows: Any) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\r\n").writerows(cells.row(each) for each in rows)
    return file.getvalue().encode()
