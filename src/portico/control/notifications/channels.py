"""An organization's channels: where it wants to hear of what happens, and the telling.

    await channels.notify(tx, sealer, organization, "usage.threshold", {"percent": 80, …}, f"usage:{period}:80")

One event goes to each channel that wants it, once for its key, in the transaction that it happened in. A webhook's secret is made
here, shown once, and sealed; while it is replaced, messages are signed with both. An address gets nothing but a code before its
reader has said yes to it, so that nobody can have us write to a stranger.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.notifications import mail, store
from portico.control.notifications.events import CODE, DISABLED, EVENTS, EVERYTHING, TEST
from portico.control.notifications.mail import Mail
from portico.control.notifications.reach import limits_of
from portico.errors import Problem
from portico.kit import outbound, outbox, signing
from portico.kit.clock import Clock, utcnow
from portico.kit.db import Database, Reader, Tx
from portico.kit.ids import new_id
from portico.kit.outbox import Draft
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

_TARGET, _SECRETS, _CODE = "notification target", "notification secrets", "channel code"
#: Secrets that a webhook's messages are signed with at most, while they are replaced.
MAX_SECRETS: Final = 3
#: What a code is made of: digits, typed by a person.
_CODE_DIGITS: Final = 8


@dataclass(frozen=True, slots=True)
class Wanted:
    """A channel as its organization wants it to be. Without an ``id`` it is a new one; ``target`` None: as it is."""

    id: str | None
    kind: str
    name: str
    target: str | None
    events: Sequence[str]
    enabled: bool


# -- telling -------------------------------------------------------------------------------------------------------------


async def notify(
    tx: Tx, sealer: Sealer, organization: str, event: str, facts: Mapping[str, Any], key: str
) -> list[str]:
    """Tell the channels that want ``event``, once ``tx`` has committed; the ids of the messages that are new.

    ``facts`` are JSON and no secret; ``key`` is unique in the organization. Raises ``ValueError`` for an event that
    ``events.EVENTS`` does not have: a fault of the caller.
    """
    if event not in EVENTS:
        raise ValueError(f"there is no event {event}")
    made = [
        await tell(tx, sealer, channel, event, facts, key) for channel in await store.wanting(tx, organization, event)
    ]
    return [each for each in made if each is not None]


async def tell(tx: Tx, sealer: Sealer, channel: Any, event: str, facts: Mapping[str, Any], key: str) -> str | None:
    """One channel; the message's id, ``None`` when it was told under this key."""
    said = EVENTS[event].said(facts)
    recipient = channel.id
    if channel.kind == "webhook":
        # As it is signed, so that every attempt sends the same bytes.
        document = {
            "type": event,
            "timestamp": utcnow().isoformat(),
            "organization": channel.organization_id,
            "data": facts,
        }
        body: dict[str, Any] = {"payload": json.dumps(document, separators=(",", ":"), ensure_ascii=False, default=str)}
    elif channel.kind == "slack":
        body = {"payload": json.dumps({"text": slack_text(said)})}
    else:
        recipient = target_of(sealer, channel)
        rows = [(name.replace("_", " "), value) for name, value in facts.items()]
        made = mail.render("channel.event", {"event": event, "said": said, "rows": rows, "name": channel.name})
        body = {"subject": made.subject, "text": made.text, "html": made.html}
    draft = Draft(
        mail.DRIVER if channel.kind == "email" else channel.kind, _key(channel.id, key), recipient, event, body,
        channel.organization_id, destination=channel.id, keep_body=True,
    )  # fmt: skip
    return await outbox.append(tx, sealer, draft)


def _key(channel: str, key: str) -> str:
    whole = f"{channel}:{key}"
    return whole if len(whole) <= outbox.KEY_CHARS else f"{channel}:{hashlib.sha256(key.encode()).hexdigest()}"


def slack_text(text: str) -> str:
    """``text`` as Slack's own markup has it: nothing in it is a mention, a link or a format of somebody else's making."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")[:3000]


def target_of(sealer: Sealer, channel: Any) -> str:
    """Where a channel leads."""
    return sealer.open(_TARGET, channel.id, channel.sealed_target).decode()


def secrets_of(sealer: Sealer, channel: Any, now: datetime) -> list[str]:
    """The secrets that a webhook's messages are signed with now, the newest first."""
    if channel.sealed_secrets is None:
        return []
    kept = json.loads(sealer.open(_SECRETS, channel.id, channel.sealed_secrets))
    return [each["secret"] for each in kept if each["until"] is None or datetime.fromisoformat(each["until"]) > now]


# -- keeping them --------------------------------------------------------------------------------------------------------


class Channels:
    """The verbs of the API."""

    def __init__(self, settings: ApiSettings, db: Database, clock: Clock, sealer: Sealer) -> None:
        self._settings, self._db, self._clock, self._sealer = settings, db, clock, sealer
        self._limits = limits_of(settings)

    async def listing(self, reader: Reader, caller: Caller) -> dict[str, Any]:
        """Every channel of the caller's organization."""
        return {"data": [render(row) for row in await store.listing(reader, caller.org)], "next_cursor": None}

    async def replace(self, tx: Tx, caller: Caller, wanted: Sequence[Wanted]) -> dict[str, Any]:
        """Make the channels what ``wanted`` says: others are deleted. Secrets of new webhooks are in the answer, once.

        Raises ``notification.channel_limit``, ``notification.channel_not_found``, ``notification.channel_invalid`` and
        ``notification.throttled``.
        """
        if len(wanted) > self._settings.channels_per_organization:
            raise Problem("notification.channel_limit", limit=self._settings.channels_per_organization)
        await store.take_turns(tx, caller.org)
        known = {row.id: row for row in await store.listing(tx, caller.org)}
        named = [each.id for each in wanted if each.id is not None]
        if missing := [each for each in named if each not in known]:
            raise Problem("notification.channel_not_found", f"there is no channel {missing[0]}")
        if len(set(named)) != len(named):
            raise _invalid("a channel is named twice")
        for gone in known.keys() - set(named):
            await tx.execute(store.channels.delete().where(store.channels.c.id == gone))
            await audit.record(tx, caller, "channel.delete", gone)
        shown: dict[str, str] = {}
        for each in wanted:
            if each.id is None:
                made, secret = await self._create(tx, caller, each)
                if secret is not None:
                    shown[made] = secret
            else:
                await self._change(tx, caller, known[each.id], each)
        rows = await store.listing(tx, caller.org)
        return {"data": [render(row, shown.get(row.id)) for row in rows], "next_cursor": None}

    async def _create(self, tx: Tx, caller: Caller, wanted: Wanted) -> tuple[str, str | None]:
        if wanted.target is None:
            raise _invalid("a new channel needs a target")
        made = new_id("chn")
        target, shown = self._target(wanted.kind, wanted.target)
        secret = signing.new_secret() if wanted.kind == "webhook" else None
        row = {
            "id": made,
            "organization_id": caller.org,
            "kind": wanted.kind,
            "name": wanted.name,
            "sealed_target": self._sealer.seal(_TARGET, made, target.encode()),
            "shown_target": shown,
            "events": _events(wanted.events),
            "state": _state(wanted, "unconfirmed" if wanted.kind == "email" else "active"),
            "sealed_secrets": None if secret is None else self._sealed(made, [{"secret": secret, "until": None}]),
        }
        await tx.execute(store.channels.insert().values(row))
        details = {"kind": wanted.kind, "name": wanted.name, "target": shown, "events": row["events"]}
        await audit.record(tx, caller, "channel.create", made, details=details)
        if wanted.kind == "email":
            await self._send_code(tx, made, caller.org, target)
        return made, secret

    async def _change(self, tx: Tx, caller: Caller, row: Any, wanted: Wanted) -> None:
        if wanted.kind != row.kind:
            raise _invalid(f"{row.id} is of the kind {row.kind}; another kind is another channel")
        values: dict[str, Any] = {"name": wanted.name, "events": _events(wanted.events)}
        state = row.state
        if wanted.target is not None and wanted.target != row.shown_target:
            target, shown = self._target(row.kind, wanted.target)
            if target != target_of(self._sealer, row):
                values["sealed_target"] = self._sealer.seal(_TARGET, row.id, target.encode())
                values["shown_target"] = shown
                values |= {"failing_since": None, "last_error": None}
                state = "unconfirmed" if row.kind == "email" else "active"
        if state == "disabled" and wanted.enabled:
            values |= {"failing_since": None, "last_error": None}
        values["state"] = _state(wanted, state)
        values["reason"] = row.reason if values["state"] == "disabled" else None
        changed = {name for name, value in values.items() if value != getattr(row, name)}
        if not changed:
            return
        await store.update(tx, row.id, **values)
        shown_values = {
            name: values[name] for name in sorted(changed - {"sealed_target", "failing_since", "last_error"})
        }
        await audit.record(tx, caller, "channel.change", row.id, details=shown_values)
        if "sealed_target" in values and row.kind == "email":
            await self._send_code(tx, row.id, row.organization_id, target_of_new(wanted))

    def _target(self, kind: str, text: str) -> tuple[str, str]:
        """The target, checked as far as its text says, and how it is shown."""
        if kind == "email":
            try:
                return (found := mail.address(text)), found
            except ValueError as err:
                raise _invalid(str(err)) from None
        try:
            parts = outbound.check_url(text, self._limits)
        except outbound.OutboundError as err:
            raise _invalid(str(err)) from None
        if kind == "slack":
            if parts.hostname not in self._settings.slack_hosts:
                raise _invalid(f"an incoming webhook of Slack begins with https://{self._settings.slack_hosts[0]}/")
            return text, f"{parts.scheme}://{parts.netloc}/…{hashlib.sha256(text.encode()).hexdigest()[:6]}"
        return text, f"{parts.scheme}://{parts.netloc}{parts.path}" + ("?…" if parts.query else "")

    # -- acts on one

    async def test(self, tx: Tx, caller: Caller, channel: str) -> dict[str, Any]:
        """Send a test to a channel; to an address that nobody has confirmed yet, a new code.

        Raises ``notification.throttled``, ``notification.channel_inactive`` and ``notification.channel_not_found``.
        """
        await store.take_turns(tx, caller.org)
        row = await self._one(tx, caller, channel)
        window, s = self._settings.channel_test_window_seconds, self._settings
        here, everywhere = await store.tests_since(tx, caller.org, channel, window)
        # A channel that is made anew begins at nothing; its organization does not.
        if here >= s.channel_tests_per_window or everywhere >= s.channel_tests_per_organization:
            raise Problem("notification.throttled", headers={"Retry-After": str(int(window))})
        await audit.record(tx, caller, "channel.test", channel)
        if row.state == "unconfirmed":
            return {"delivery": await self._send_code(tx, channel, caller.org, target_of(self._sealer, row))}
        if row.state != "active":
            raise Problem("notification.channel_inactive", f"the channel is {row.state}")
        facts = {"channel": channel, "name": row.name}
        return {"delivery": await tell(tx, self._sealer, row, TEST, facts, f"test:{new_id('tst')}")}

    async def rotate(self, tx: Tx, caller: Caller, channel: str, overlap_seconds: int | None) -> dict[str, Any]:
        """A new secret for a webhook; the ones before are good for so long. Raises ``notification.channel_invalid``."""
        row = await self._one(tx, caller, channel)
        if row.kind != "webhook":
            raise _invalid("only webhooks are signed")
        overlap = self._settings.webhook_secret_overlap_seconds if overlap_seconds is None else overlap_seconds
        now = self._clock.wall()
        until = (now + timedelta(seconds=overlap)).isoformat()
        new = signing.new_secret()
        old = [{"secret": each, "until": until} for each in secrets_of(self._sealer, row, now)] if overlap else []
        kept: list[dict[str, Any]] = [{"secret": new, "until": None}, *old]
        await store.update(tx, channel, sealed_secrets=self._sealed(channel, kept[:MAX_SECRETS]))
        await audit.record(tx, caller, "channel.rotate_secret", channel, details={"overlap_seconds": overlap})
        return {"id": channel, "secret": new, "previous_until": until if old else None}

    async def confirm(self, tx: Tx, caller: Caller, channel: str, code: str) -> dict[str, Any]:
        """Say that the reader of an address wants what is sent there. Raises ``notification.code_invalid``.

        The try counts although the refusal undoes the request.
        """
        if await store.one(tx, caller.org, channel) is None:
            raise Problem("notification.channel_not_found")
        async with self._db.transaction() as own:
            row = await store.try_code(own, caller.org, channel, self._settings.channel_code_tries)
        given = self._sealer.mac(_CODE, f"{channel}:{code.strip()}")
        if row is None or not hmac.compare_digest(row.code_digest or "", given):
            raise Problem("notification.code_invalid")
        # Once: of two at a time, and of a code that was replaced meanwhile, one changes something.
        live = (store.channels.c.id == channel) & (store.channels.c.code_digest == given)
        values = {"state": "active", "code_digest": None, "code_expires_at": None, "updated_at": self._clock.wall()}
        confirmed = await tx.execute(store.channels.update().where(live).values(values).returning(store.channels))
        if (found := confirmed.first()) is None:
            raise Problem("notification.code_invalid")
        await audit.record(tx, caller, "channel.confirm", channel)
        return render(found)

    async def _one(self, tx: Tx, caller: Caller, channel: str) -> Any:
        row = await store.one(tx, caller.org, channel, lock=True)
        if row is None:
            raise Problem("notification.channel_not_found")
        return row

    async def _send_code(self, tx: Tx, channel: str, organization: str, to: str) -> str | None:
        # Channels come and go with one request: what is mailed is counted for the organization, whose turn the caller has.
        window = self._settings.channel_code_seconds
        if await store.codes_since(tx, organization, window) >= self._settings.channel_codes_per_organization:
            raise Problem("notification.throttled", headers={"Retry-After": str(window)})
        code = f"{secrets.randbelow(10**_CODE_DIGITS):0{_CODE_DIGITS}}"
        expires = self._clock.wall() + timedelta(seconds=self._settings.channel_code_seconds)
        digest = self._sealer.mac(_CODE, f"{channel}:{code}")
        await store.update(tx, channel, code_digest=digest, code_expires_at=expires, code_tries=0)
        hours = max(1, self._settings.channel_code_seconds // 3600)
        letter = Mail(f"{channel}:code:{new_id('cod')}", to, CODE, {"code": code, "hours": hours}, organization)
        return await mail.send(tx, self._sealer, letter, destination=channel)

    def _sealed(self, channel: str, kept: list[dict[str, Any]]) -> bytes:
        return self._sealer.seal(_SECRETS, channel, json.dumps(kept).encode())


def target_of_new(wanted: Wanted) -> str:
    """The address of a channel that was changed."""
    return mail.address(wanted.target or "")


def _state(wanted: Wanted, state: str) -> str:
    """Off when it is wanted so; an address stays unconfirmed until its reader says yes."""
    if state == "unconfirmed":
        return state
    return "active" if wanted.enabled else "off"


def _events(names: Iterable[str]) -> list[str]:
    chosen = sorted(set(names))
    if unknown := [name for name in chosen if name not in EVENTS and name != EVERYTHING]:
        raise _invalid(f"there is no event {unknown[0][:64]}; there are: {EVERYTHING}, {', '.join(sorted(EVENTS))}")
    return [EVERYTHING] if EVERYTHING in chosen else chosen


def _invalid(detail: str) -> Problem:
    return Problem("notification.channel_invalid", detail)


def render(row: Any, secret: str | None = None) -> dict[str, Any]:
    """A channel as the API shows it."""
    return {
        "id": row.id,
        "kind": row.kind,
        "name": row.name,
        "target": row.shown_target,
        "events": row.events,
        "enabled": row.state in ("active", "unconfirmed"),
        "state": row.state,
        "reason": row.reason,
        "created_at": row.created_at,
        "failing_since": row.failing_since,
        "delivered_at": row.delivered_at,
        "last_error": row.last_error,
        "secret": secret,
    }


# -- switching them off --------------------------------------------------------------------------------------------------

#: Who an audit row names for what the platform does by itself.
PLATFORM: Final = Caller("operator", "installation", None)


async def disable(tx: Tx, sealer: Sealer, row: Any, reason: str, owners: Sequence[str], key: str) -> None:
    """Switch a channel off that is ``active``, tell the organization's other channels, and its owners by mail."""
    live = (store.channels.c.id == row.id) & (store.channels.c.state == "active")
    switched = await tx.execute(store.channels.update().where(live).values(state="disabled", reason=reason))
    if switched.rowcount != 1:
        return
    facts = {"channel": row.id, "kind": row.kind, "name": row.name, "target": row.shown_target, "reason": reason}
    await audit.record(
        tx, PLATFORM, "channel.disable", row.id, details={"reason": reason}, organization=row.organization_id
    )
    await notify(tx, sealer, row.organization_id, DISABLED, facts, f"{DISABLED}:{key}")
    for owner in owners:
        await mail.send(tx, sealer, Mail(f"{DISABLED}:{key}:{owner}", owner, DISABLED, facts, row.organization_id))
