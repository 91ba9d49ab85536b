"""When authorities (CAs) want certificates renewed: ACME Renewal Information, RFC 9773.

Each certificate is asked about twice a day and more. Who asks moves the next question on first, so that two workers do not ask
the same and a worker that dies in between costs one question. A CA that cannot be asked, or whose answer is none, changes
nothing: the certificate's own lifetime decides then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from portico.control.domains import acme_schedule, acme_store, lifecycle
from portico.control.domains.acme_accounts import Accounts
from portico.control.domains.acme_client import Client, Window
from portico.control.domains.acme_errors import AcmeError
from portico.control.domains.lifecycle import NewEvent
from portico.kit.db import Database, Tx
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

#: Questions on their way to one CA at once.
_AT_ONCE: Final = 8
#: Seconds between two questions at least and at most, whatever a CA asks for (RFC 9773, 4.3.2 leaves it to us to bound them).
_SHORTEST: Final = 60.0
_LONGEST: Final = 86_400.0
_CLAIM: Final = """
UPDATE certificate_schedules AS s SET ari_next_at = now() + interval '15 minutes'
FROM (SELECT domain_id FROM certificate_schedules WHERE ari_next_at <= now() ORDER BY ari_next_at LIMIT $1
    FOR UPDATE SKIP LOCKED) AS due
WHERE s.domain_id = due.domain_id
RETURNING s.domain_id, s.directory, s.certificate, s.not_before, s.not_after, s.ari_start, s.ari_end
"""

Found = tuple[Any, Window | None, AcmeError | None]


async def round_(db: Database, settings: ApiSettings, accounts: Accounts) -> int:
    """Ask about what is due; how many questions that was."""
    async with db.transaction() as tx:
        rows = await tx.raw.fetch(_CLAIM, settings.acme_ari_names)
    by_ca: dict[str, list[Any]] = {}
    for row in rows:
        if row["directory"] and row["certificate"]:
            by_ca.setdefault(row["directory"], []).append(row)
    await asyncio.gather(*(_ask(db, settings, accounts, directory, each) for directory, each in by_ca.items()))
    return len(rows)


async def _ask(db: Database, settings: ApiSettings, accounts: Accounts, directory: str, rows: Sequence[Any]) -> None:
    async with db.read() as reader:
        wait = await acme_store.paused(reader, directory)
    if wait > 0:
        return  # it is asked again a quarter of an hour later
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(client: Client, row: Any) -> Found:
        async with places:
            try:
                return row, await client.window(row["certificate"]), None
            except AcmeError as err:
                return row, None, err

    async with accounts.anonymous(directory) as client:
        found = await asyncio.gather(*(one(client, row) for row in rows))
    failed = [err for _, _, err in found if err is not None]
    if failed:
        log.warning(
            "renewal windows were not told", extra={"f": {"ca": directory, "count": len(failed), "why": str(failed[0])}}
        )
    async with db.transaction() as tx:
        for row, window, err in sorted(found, key=lambda each: str(each[0]["domain_id"])):
            await _note(tx, settings, row, window, err)


async def _note(tx: Tx, settings: ApiSettings, row: Any, window: Window | None, err: AcmeError | None) -> None:
    now = datetime.now(UTC)
    asked_to_wait = window.wait if window is not None else err.retry_after if err is not None else None
    seconds = min(max(_SHORTEST, asked_to_wait or 0.0), _LONGEST) if asked_to_wait else settings.acme_ari_seconds
    seconds = acme_schedule.spread(min(seconds, settings.acme_ari_seconds) if window is not None else seconds)
    values: dict[str, Any] = {"ari_next_at": acme_schedule.later(now, seconds)}
    if window is None:
        await acme_store.set_schedule(tx, row["domain_id"], **values)
        return
    values["ari_explanation"] = window.explanation
    if (window.start, window.end) != (row["ari_start"], row["ari_end"]):
        at = acme_schedule.by_window(window, now, row["not_before"], row["not_after"])
        values |= {"ari_start": window.start, "ari_end": window.end}
        if not await acme_store.move_renewal(tx, row["domain_id"], row["certificate"], at):
            return  # it was renewed meanwhile
        await acme_store.set_schedule(tx, row["domain_id"], **values)
        if window.explanation is not None:
            log.info("a renewal is asked for", extra={"f": {"domain": row["domain_id"], "why": window.explanation}})
        revision = await acme_store.revision(tx, row["domain_id"])
        event = NewEvent(
            row["domain_id"], "renewal", "ari_window_changed", revision=revision, renews_at=at, ari_id=row["certificate"],
            key=f"ari.{row['domain_id']}.{window.start.isoformat()}.{window.end.isoformat()}",
        )  # fmt: skip
        await lifecycle.record(tx, event)
        return
    await acme_store.set_schedule(tx, row["domain_id"], **values)
