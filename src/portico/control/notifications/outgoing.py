"""The ways out to channels: signed webhooks and Slack, both through the client that calls public addresses alone.

What an answer means: 2xx is success; 410 says that the receiver is gone, and switches the channel off; everything else, redirects
too, is tried again on the ladder, not before the time that ``Retry-After`` asks for (at most a day).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Final

from portico.control.notifications import channels, store
from portico.control.notifications.events import CODE
from portico.kit import signing
from portico.kit.clock import Clock
from portico.kit.db import Database, Reader, Tx
from portico.kit.outbound import Answer, Client, OutboundError
from portico.kit.outbox import Driver, Message, Outcome
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

#: Seconds that a receiver may ask us to wait at most.
RETRY_AFTER_MAX: Final = 86_400.0
_GONE: Final = 410
_AGENT: Final = "Portico-Webhooks/1"


class ChannelDriver:
    """Delivers to webhooks and Slack: where to, and with which secrets, is looked up in each attempt."""

    def __init__(self, db: Database, clock: Clock, sealer: Sealer, client: Client, slack_hosts: Sequence[str]) -> None:
        self._db, self._clock, self._sealer, self._client, self._slack = db, clock, sealer, client, slack_hosts

    async def deliver(self, message: Message) -> Outcome:
        """One attempt."""
        async with self._db.read() as reader:
            channel = await store.one(reader, message.organization or "", message.recipient)
        if channel is None:
            return Outcome("refused", "the channel was removed")
        if channel.state != "active":
            return Outcome("refused", f"the channel is {channel.state}")
        payload = str(message.body["payload"]).encode()
        headers = {"content-type": "application/json", "user-agent": _AGENT}
        if channel.kind == "webhook":
            now = self._clock.wall()
            keys = channels.secrets_of(self._sealer, channel, now)
            headers |= signing.headers(keys, message.id, int(now.timestamp()), payload)
        try:
            answer = await self._client.post(channels.target_of(self._sealer, channel), headers, payload)
        except OutboundError as err:
            return Outcome("refused" if err.fault == "url" else "retry", str(err))
        return read_slack(answer, self._clock) if channel.kind == "slack" else read_answer(answer, self._clock)


class ChannelMail:
    """Mail by another driver; what is for a channel only while that is on, and leads where it led: its reader may have left."""

    def __init__(self, db: Database, sealer: Sealer, driver: Driver) -> None:
        self._db, self._sealer, self._driver = db, sealer, driver

    async def deliver(self, message: Message) -> Outcome:
        """One attempt."""
        if message.destination is not None:
            async with self._db.read() as reader:
                channel = await store.one(reader, message.organization or "", message.destination)
            if channel is None:
                return Outcome("refused", "the channel was removed")
            if channels.target_of(self._sealer, channel) != message.recipient:
                return Outcome("refused", "the channel has another address now")
            if channel.state != "active" and message.topic != CODE:
                return Outcome("refused", f"the channel is {channel.state}")
        return await self._driver.deliver(message)


def read_answer(answer: Answer, clock: Clock) -> Outcome:
    """What a receiver's answer means."""
    said = f"HTTP {answer.status}"
    if 200 <= answer.status < 300:
        return Outcome("delivered", said, status=answer.status)
    if answer.status == _GONE:
        return Outcome("refused", said, status=answer.status, gone=True)
    return Outcome("retry", said, retry_after(answer, clock), answer.status)


def read_slack(answer: Answer, clock: Clock) -> Outcome:
    """The same of Slack, which says in words why it refuses, and whose refusals are for good."""
    found = read_answer(answer, clock)
    words = answer.body[:60].decode("ascii", "replace")
    detail = f"{found.detail} {words}" if re.fullmatch(r"[a-z_]+", words) else found.detail
    final = 400 <= answer.status < 500 and answer.status not in (408, 429)
    gone = found.gone or (answer.status == 404 and words in ("no_service", "no_team", "channel_not_found"))
    return Outcome("refused" if final else found.result, detail, found.after_seconds, answer.status, gone)


def retry_after(answer: Answer, clock: Clock) -> float | None:
    """Seconds that the receiver asks us to wait (RFC 9110, 10.2.3: seconds or a date), bounded; ``None`` when it does not."""
    text = answer.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,10}", text):
        return min(float(text), RETRY_AFTER_MAX)
    try:
        seconds = (parsedate_to_datetime(text) - clock.wall()).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), RETRY_AFTER_MAX)


Owners = Callable[[Reader, str], Awaitable[Sequence[str]]]


class Health:
    """Keeps how channels fare, in the transaction that records an attempt; switches off what is gone, or fails for days."""

    def __init__(self, settings: ApiSettings, sealer: Sealer, owners: Owners) -> None:
        self._settings, self._sealer, self._owners = settings, sealer, owners

    async def record(self, tx: Tx, message: Message, outcome: Outcome) -> None:
        """``outbox.Record``. What we refused ourselves (a channel that is off) says nothing about the receiver."""
        channel = message.destination
        if channel is None or message.topic == CODE:
            return
        if outcome.result == "delivered":
            await store.delivered(tx, channel)
            return
        if outcome.result == "refused" and outcome.status is None:
            return
        row = await store.failed(tx, channel, outcome.detail, self._settings.channel_patience_seconds)
        if row is None or row.state != "active":
            return
        if reason := self._reason(row, outcome):
            owners = await self._owners(tx, row.organization_id)
            await channels.disable(tx, self._sealer, row, reason, owners, message.id)

    def _reason(self, row: Any, outcome: Outcome) -> str | None:
        if outcome.gone:
            return f"the receiver says that it is gone ({outcome.detail})"
        if row.impatient:
            days = self._settings.channel_patience_seconds / 86_400
            return f"every attempt has failed for {days:g} days; the last: {outcome.detail}"
        return None
