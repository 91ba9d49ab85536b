"""The log of what was sent to channels, and sending again."""

from __future__ import annotations

from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.notifications import mail, store
from portico.errors import Problem
from portico.kit import outbox, pages
from portico.kit.db import Reader, Tx
from portico.settings import ApiSettings

#: How the queue's states are called where people see them.
_STATES: Final = {"pending": "waiting", "done": "delivered", "dead": "failed"}
_QUEUE: Final = {shown: state for state, shown in _STATES.items()}


async def listing(
    reader: Reader, caller: Caller, page: pages.PageRequest, channel: str | None, state: str | None
) -> dict[str, Any]:
    """A page of the caller's organization's deliveries, newest first."""
    before = page.after[0] if page.after else None
    asked = None if state is None else _QUEUE[state]
    rows = await store.deliveries(reader, caller.org, page.limit + 1, before, channel, asked)
    document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.id,), _render)
    return document


def _render(row: Any) -> dict[str, Any]:
    pending = row.queue_state == "pending"
    return {
        "id": row.id,
        "channel": row.lane.partition("/")[2],
        "kind": "email" if row.driver == mail.DRIVER else row.driver,
        "event": row.topic,
        "state": _STATES[row.queue_state],
        "attempts": row.attempts,
        "status": row.status,
        "detail": row.receipt if row.queue_state == "done" else row.last_error,
        "created_at": row.queued_at,
        "attempted_at": row.attempted_at,
        "next_attempt_at": row.available_at if pending and row.lease_token is None else None,
        "finished_at": row.finished_at,
        "can_resend": row.kept and not pending,
    }


async def resend(tx: Tx, caller: Caller, message: str, settings: ApiSettings) -> dict[str, Any]:
    """Deliver it again, with all its attempts and under its key.

    Raises ``notification.delivery_not_found``, ``notification.delivery_pending``, ``notification.delivery_gone``,
    ``notification.channel_not_found``, ``notification.channel_inactive`` and ``notification.throttled``.
    """
    await store.take_turns(tx, caller.org)
    window = settings.channel_test_window_seconds
    if await audit.count_lately(tx, caller.org, "delivery.resend", window) >= settings.channel_resends_per_organization:
        raise Problem("notification.throttled", headers={"Retry-After": str(int(window))})
    found = await store.delivery(tx, caller.org, message)
    if found is None:
        raise Problem("notification.delivery_not_found")
    channel = await store.one(tx, caller.org, found.lane.partition("/")[2])
    if channel is None:
        raise Problem("notification.channel_not_found", "its channel was removed")
    if channel.state != "active":
        raise Problem("notification.channel_inactive", f"its channel is {channel.state}")
    if not await outbox.resend(tx, message):
        raise Problem(
            "notification.delivery_pending" if found.queue_state == "pending" else "notification.delivery_gone"
        )
    await audit.record(tx, caller, "delivery.resend", message, details={"channel": channel.id, "event": found.topic})
    return {"delivery": message}
