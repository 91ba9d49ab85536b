"""A look at all of the books: the ledger's own proof, then whether documents say the same."""

from __future__ import annotations

from collections.abc import Sequence

from portico.control.billing import documents
from portico.control.finance import verification
from portico.control.finance.seals import Fault
from portico.control.finance.verification import Outcome
from portico.kit.db import Database


async def look(db: Database, organization: str | None = None, kept: Sequence[str] = ()) -> Outcome:
    """As ``verification.everything``; invoices and credit notes after it, unless it is about one organization."""
    found = await verification.everything(db, organization, kept)
    if organization is None and found.fault is None:
        async with db.read(snapshot=True) as reader:
            await verification.take_your_time(reader)
            if (fault := await documents.fault(reader)) is not None:
                found.fault = Fault(*fault)
    return found
