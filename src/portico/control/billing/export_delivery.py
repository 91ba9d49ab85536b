"""Reports on their way out: from the outbox, to a webhook or an object store, the same bytes every time.

A webhook is Standard Webhooks of type ``report_export.ready`` with what the report is (hash, rows, totals, cut-off), the token
that acknowledges it, a link to its content, and the content itself where that is small. The message is made of the row alone, so
every attempt and every re-delivery sends the same. In an object store there are two objects, the file and, once that is there,
a manifest beside it with the same facts.

Before a file is given out its hash is computed again: one that changed on the disk is never sent.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.billing import export_formats as formats
from portico.control.billing import export_store as store
from portico.control.billing import settlement_store
from portico.control.billing.settlement_sinks import Sinks
from portico.control.notifications import channels
from portico.control.notifications import store as channel_store
from portico.control.notifications.outgoing import read_answer
from portico.errors import Problem
from portico.kit import outbox, signing
from portico.kit.clock import Clock
from portico.kit.db import Database, Tx
from portico.kit.outbound import Client, OutboundError
from portico.kit.outbox import Draft, Message, Outcome
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

DRIVER: Final = "report"
READY: Final = "report_export.ready"
_ACK: Final = "report ack token"
_LINK: Final = "report link"
_AGENT: Final = "Portico-Reports/1"
_CHANGED: Final = "the file is gone, or is not the one that was made"
_TYPES: Final[Mapping[str, Any]] = {
    name: {"Content-Type": media} for name, media in {**formats.MEDIA, "json": "application/json"}.items()
}
#: Who an audit row names for what the platform does by itself.
PLATFORM: Final = Caller("operator", "installation", None)


class Gone(Exception):
    """Its time is over."""


class Changed(Exception):
    """The file is not the one that was made, or is not there although its time is not over."""


async def begin(tx: Tx, sealer: Sealer, row: Any) -> str | None:
    """Put a report on its way, in the transaction that says so; the message's id, ``None`` when it is in no state to go."""
    number = row.delivery + 1
    moved = await store.move(tx, row.id, "delivering", delivery=number, error=None)
    if moved is None:
        return None
    to = row.destination
    recipient = to.get("channel") or to.get("sink") or to["kind"]
    draft = Draft(
        DRIVER, f"{READY}:{row.id}:{number}", recipient, READY, {"export": row.id, "number": number}, row.organization_id,
        destination=recipient,
    )  # fmt: skip
    message = await outbox.append(tx, sealer, draft)
    await store.update(tx, row.id, message_id=message)
    return message


def link_token(sealer: Sealer, row: Any) -> str:
    """What opens a report's content to who has the link."""
    return sealer.mac(_LINK, f"{row.id}:{row.sha256.hex()}")


async def checked_file(settings: ApiSettings, row: Any, now: datetime) -> Path:
    """The file of a report, whose hash is right now. Raises :class:`Gone`, :class:`Changed`, ``report.unavailable``."""
    if row.file is None or (row.expires_at is not None and row.expires_at <= now):
        raise Gone
    if settings.objects_dir is None:
        raise Problem("report.unavailable")
    path: Path = settings.objects_dir / "reports" / row.file
    try:
        digest = await asyncio.to_thread(_digest, path)
    except FileNotFoundError:
        raise Changed from None
    if digest != bytes(row.sha256):
        raise Changed
    return path


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


async def remove(settings: ApiSettings, row: Any) -> None:
    """Delete a report's file."""
    if settings.objects_dir is not None and row.file is not None:
        with contextlib.suppress(OSError):
            await asyncio.to_thread((settings.objects_dir / "reports" / row.file).unlink, True)


def facts(settings: ApiSettings, sealer: Sealer, row: Any) -> dict[str, Any]:
    """What a delivery says of a report; the same whenever it is asked."""
    base = f"{settings.api_url.rstrip('/')}/v1/billing/report-exports/{row.id}"
    token = sealer.open(_ACK, row.id, bytes(row.sealed_ack_token)).decode()
    return {
        "export_id": row.id, "organization": row.organization_id, "dataset": row.dataset, "format": row.format,
        "schema_version": row.schema_version, "period_start": row.period_start.isoformat(),
        "period_end": row.period_end.isoformat(), "ledger_cut_off": row.cut_off, "rows": row.row_count,
        "bytes": row.bytes, "sha256": row.sha256.hex(), "totals": row.totals,
        "generated_at": row.generated_at.isoformat(), "expires_at": row.expires_at.isoformat(),
        "content_url": f"{base}/content?token={link_token(sealer, row)}", "ack_url": f"{base}/ack", "ack_token": token,
    }  # fmt: skip


def payload(settings: ApiSettings, sealer: Sealer, row: Any, content: bytes | None) -> bytes:
    """The body of a webhook."""
    data = facts(settings, sealer, row)
    data["content_base64"] = None if content is None else base64.b64encode(content).decode()
    document = {"type": READY, "timestamp": row.generated_at.isoformat(), "data": data}
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False, sort_keys=True).encode()


class ReportDriver:
    """Delivers reports. Where to, and with which secrets, is looked up in each attempt."""

    def __init__(self, settings: ApiSettings, db: Database, clock: Clock, sealer: Sealer, client: Client) -> None:
        self._settings, self._db, self._clock, self._sealer, self._client = settings, db, clock, sealer, client

    async def deliver(self, message: Message) -> Outcome:
        """One attempt."""
        async with self._db.read() as reader:
            row = await store.one(reader, str(message.body["export"]))
        if row is None or row.state not in ("delivering", "delivered", "acked"):
            return Outcome("refused", "the report is not to be delivered any more")
        if row.state == "acked" and row.delivery == message.body["number"]:
            return Outcome("delivered", "acknowledged before the answer was recorded")
        try:
            path = await checked_file(self._settings, row, self._clock.wall())
        except Gone:
            return Outcome("refused", "the report has expired")
        except Changed:
            return Outcome("refused", _CHANGED)
        except Problem as problem:  # this worker has not the folder that another has
            return Outcome("retry", problem.detail)
        if row.destination["kind"] == "s3":
            return await self._store(row, path)
        return await self._post(row, path, message)

    async def _post(self, row: Any, path: Path, message: Message) -> Outcome:
        found = await self._receiver(row)
        if isinstance(found, Outcome):
            return found
        url, keys = found
        content: bytes | None = None
        if row.bytes <= self._settings.report_inline_max_bytes:
            content = await asyncio.to_thread(path.read_bytes)
            if hashlib.sha256(content).digest() != bytes(row.sha256):  # it was right a moment ago: these bytes are sent
                return Outcome("refused", _CHANGED)
        body = payload(self._settings, self._sealer, row, content)
        headers = {"content-type": "application/json", "user-agent": _AGENT}
        headers |= signing.headers(keys, message.id, int(self._clock.wall().timestamp()), body)
        try:
            answer = await self._client.post(url, headers, body)
        except OutboundError as err:
            return Outcome("refused" if err.fault == "url" else "retry", str(err))
        return read_answer(answer, self._clock)

    async def _receiver(self, row: Any) -> tuple[str, list[str]] | Outcome:
        """Where to and with which secrets; or why not."""
        to, now = row.destination, self._clock.wall()
        async with self._db.read() as reader:
            if row.organization_id is not None:
                channel = await channel_store.one(reader, row.organization_id, to.get("channel", ""))
                if channel is None or channel.state != "active":
                    return Outcome("refused", "the channel is off, or was removed")
                keys = channels.secrets_of(self._sealer, channel, now)
                return channels.target_of(self._sealer, channel), keys
            sink = await settlement_store.sink(reader, to.get("sink", ""))
        keys = Sinks(self._settings, self._clock, self._sealer).secrets(sink, now) if sink is not None else []
        if sink is None or sink.url is None or not keys:
            return Outcome("refused", "the sink is disabled, or has no URL any more")
        return sink.url, keys

    async def _store(self, row: Any, path: Path) -> Outcome:
        """Two objects: the file, then the manifest that says that it is whole."""
        import obstore

        try:
            target, prefix = object_store(self._settings)
        except Problem as err:
            return Outcome("refused", err.detail)
        day = row.generated_at.strftime("%Y-%m-%d")
        key = "/".join(part for part in (prefix, row.dataset, day, f"{row.id}.{row.format}") if part)
        manifest = json.dumps(facts(self._settings, self._sealer, row), indent=2, sort_keys=True).encode()
        plain = urlsplit(self._settings.report_store_url).scheme == "file"  # files have no types
        seconds = self._settings.report_store_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                await obstore.put_async(target, key, path, attributes=None if plain else _TYPES[row.format])
                await obstore.put_async(
                    target, f"{key}.manifest.json", manifest, attributes=None if plain else _TYPES["json"]
                )
        except TimeoutError:
            return Outcome("retry", f"the object store did not take it within {seconds:g} s")
        except Exception as err:  # whatever obstore makes of an answer; its texts name URLs, not keys
            return Outcome("retry", f"the object store did not take it: {type(err).__name__}")
        return Outcome("delivered", key)

    async def record(self, tx: Tx, message: Message, outcome: Outcome) -> None:
        """``outbox.Record``: what follows for the report, in the transaction of the attempt."""
        row = await store.one(tx, str(message.body["export"]), lock=True)
        if row is None or row.delivery != message.body["number"]:
            return
        if outcome.result == "delivered":
            # An acknowledgement may have been faster.
            await store.move(tx, row.id, "delivered", delivered_at=self._clock.wall(), error=None)
            await self._audit(tx, row, "report_export.deliver", "success", {"number": row.delivery})
        elif outcome.result == "refused":
            await store.move(tx, row.id, "failed", error=outcome.detail)
            await self._audit(tx, row, "report_export.deliver", "refused", {"reason": outcome.detail})
        else:
            await store.update(tx, row.id, error=outcome.detail)

    @staticmethod
    async def _audit(tx: Tx, row: Any, act: str, outcome: str, details: Mapping[str, Any]) -> None:
        await audit.record(
            tx, PLATFORM, act, row.id, outcome, {**details, "sha256": row.sha256.hex()},
            organization=row.organization_id or audit.INSTALLATION,
        )  # fmt: skip


def check(settings: ApiSettings) -> None:
    """Raises ``config.invalid`` for an object store that cannot be."""
    if settings.report_store_url:
        object_store(settings)


@functools.lru_cache(maxsize=4)
def object_store(settings: ApiSettings) -> tuple[Any, str]:
    """The store of the settings, and the prefix of its objects; raises ``config.invalid``."""
    parts = urlsplit(settings.report_store_url)
    prefix = parts.path.strip("/")
    if parts.scheme not in ("s3", "file") or (parts.scheme == "s3" and not parts.hostname):
        raise Problem("config.invalid", "setting report_store_url: s3://BUCKET/PREFIX, please", key="report_store_url")
    from obstore.store import LocalStore, S3Store

    if parts.scheme == "file":
        return LocalStore(parts.path, mkdir=True), ""
    options: dict[str, Any] = {"region": settings.report_store_region}
    if settings.report_store_endpoint:
        options["endpoint"] = settings.report_store_endpoint
    if settings.report_store_key is not None and settings.report_store_secret is not None:
        options["access_key_id"] = settings.report_store_key
        options["secret_access_key"] = settings.report_store_secret.reveal()
    plain = settings.report_store_endpoint.startswith("http://")
    return S3Store(parts.hostname or "", client_options={"allow_http": plain}, **options), prefix
