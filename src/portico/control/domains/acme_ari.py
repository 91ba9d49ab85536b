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
from portico.control.domains.acme_errors import BUSY, UNREACHABLE, AcmeError
from portico.control.domains.lifecycle import NewEvent
from portico.kit.db import Database, Tx
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

#: Questions on their way to one CA at once, each over a connection that is kept.
_AT_ONCE: Final = 8
#: Seconds until a CA is asked again that could not answer, and did not say when it can.
_AFTER_TROUBLE: Final = 3600.0
_PASSING: Final = (UNREACHABLE, BUSY, "server_internal")
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

_NEXT: Final = """
UPDATE certificate_schedules AS s SET ari_next_at = now() + make_interval(secs => n.seconds)
FROM unnest($1::text[], $2::float8[]) AS n(domain_id, seconds) WHERE s.domain_id = n.domain_id AND s.ari_next_at IS NOT NULL
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
    left, found = iter(rows), list[Found]()
    busy: list[AcmeError] = []

    async def some(client: Client) -> None:
        for row in left:
            try:
                found.append((row, await client.window(row["certificate"]), None))
            except AcmeError as err:
                found.append((row, None, err))
                if err.status in (429, 503):
                    busy.append(err)
            if busy:
                return

    async with accounts.anonymous(directory) as client:
        try:
            await client.directory()  # once, for all of them
        except AcmeError as err:
            busy.append(err)
        else:
            await asyncio.gather(*(some(client) for _ in range(_AT_ONCE)))
    found += [(row, None, busy[0]) for row in left]  # a CA that cannot answer now is asked nothing more
    failed = [err for _, _, err in found if err is not None]
    if failed:
        log.warning(
            "renewal windows were not told", extra={"f": {"ca": directory, "count": len(failed), "why": str(failed[0])}}
        )
    now = datetime.now(UTC)
    answers = sorted(found, key=lambda each: str(each[0]["domain_id"]))
    async with db.transaction() as tx:
        pauses = [_pause(settings, window, err) for _, window, err in answers]
        await tx.raw.execute(_NEXT, [row["domain_id"] for row, _, _ in answers], pauses)
        await _moved(tx, answers, now)


def _pause(settings: ApiSettings, window: Window | None, err: AcmeError | None) -> float:
    """Seconds until the next question: what the CA asks for, within bounds; never longer than ours after an answer."""
    wanted = window.wait if window is not None else None
    if err is not None:
        wanted = err.retry_after or (_AFTER_TROUBLE if err.code in _PASSING else None)
    seconds = min(max(_SHORTEST, wanted), _LONGEST) if wanted else settings.acme_ari_seconds
    return acme_schedule.spread(min(seconds, settings.acme_ari_seconds) if window is not None else seconds)


async def _moved(tx: Tx, answers: Sequence[Found], now: datetime) -> None:
    """Take note of windows that the CA has not suggested before."""
    moves = [
        (row["domain_id"], row["certificate"], _moment(row, window, now), window)
        for row, window, _ in answers
        if window is not None and (window.start, window.end) != (row["ari_start"], row["ari_end"])
    ]
    revisions = await acme_store.move_renewals(tx, moves)
    moved = [move for move in moves if move[0] in revisions]  # others were renewed meanwhile
    for domain, _, _, window in moved:
        if window.explanation is not None:
            log.info("a renewal is asked for", extra={"f": {"domain": domain, "why": window.explanation}})
    events = [
        NewEvent(
            domain, "renewal", "ari_window_changed", revision=revisions[domain], renews_at=at, ari_id=certificate,
            key=f"ari.{domain}.{window.start.isoformat()}.{window.end.isoformat()}",
        )
        for domain, certificate, at, window in moved
    ]  # fmt: skip
    if events:
        await lifecycle.record_all(tx, events)


def _moment(row: Any, window: Window, now: datetime) -> datetime:
    return acme_schedule.by_window(window, now, row["not_before"], row["not_after"])
