"""Who may send certificate events: sources, what each may speak about, and the keys that its events are signed with.

    POST /v1/admin/cert-sources  →  {"id": "src_…", "key": {"id": "key_…", "secret": "whsec_…"}}      the secret this once

A source has up to three keys that are good at a time: the newest, and those before it within their grace. Each API process keeps
all sources in memory and reads them anew once a second at most, so that a request from nobody costs no query; what decides is
looked at again in the transaction that stores an event (``version``), so that a source that was disabled stores nothing more.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.domains import event_store as store
from portico.errors import Problem
from portico.kit import networks, pages, signing
from portico.kit.clock import Clock
from portico.kit.db import Database, Reader, Tx
from portico.kit.ids import new_id
from portico.kit.sealing import Sealer
from portico.kit.signed_requests import Key, public_key_of
from portico.settings import ApiSettings

#: Keys of one source that are good at a time.
MAX_KEYS: Final = 3
_PURPOSE: Final = "certificate source keys"
EVERY: Final = "*"


@dataclass(frozen=True, slots=True)
class Source:
    """A source as requests are checked against it."""

    id: str
    environment: str
    clusters: frozenset[str]
    cidrs: tuple[str, ...]
    hostnames: tuple[str, ...]
    keys: tuple[tuple[Key, datetime | None], ...]
    version: int
    active: bool

    def usable(self, now: datetime) -> list[Key]:
        """The keys that are good now."""
        return [key for key, until in self.keys if until is None or until > now]

    def speaks_for(self, hostname: str) -> bool:
        """Whether it may tell of a name: of it itself, or of every name below a parent."""
        return any(
            scope in (EVERY, hostname) or (scope.startswith("*.") and hostname.endswith(scope[1:]))
            for scope in self.hostnames
        )


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a source should be; ``None`` leaves it as it is."""

    name: str | None = None
    environment: str | None = None
    clusters: Sequence[str] | None = None
    cidrs: Sequence[str] | None = None
    hostnames: Sequence[str] | None = None

    def columns(self) -> dict[str, Any]:
        """Checked; raises ``cert.source_invalid``."""
        found: dict[str, Any] = {"name": self.name, "environment": self.environment}
        if self.clusters is not None:
            found["clusters"] = sorted(set(self.clusters))
        if self.cidrs is not None:
            try:
                found["cidrs"] = sorted({networks.canonical(text) for text in self.cidrs})
            except ValueError as err:
                raise Problem("cert.source_invalid", str(err)) from None
        if self.hostnames is not None:
            found["hostnames"] = sorted({text.lower().rstrip(".") for text in self.hostnames})
        return {name: value for name, value in found.items() if value is not None}


class Sources:
    """The sources of this process, and the verbs of operators."""

    def __init__(self, settings: ApiSettings, db: Database, clock: Clock, sealer: Sealer) -> None:
        self._settings, self._db, self._clock, self._sealer = settings, db, clock, sealer
        self._known: dict[str, Source] = {}
        self._read_at: float | None = None
        self._reading: asyncio.Task[None] | None = None

    # -- what requests ask

    async def get(self, source_id: str, *, anew: bool = False) -> Source | None:
        """A source that is active; read from the database unless that was done a moment ago. Whoever asks meanwhile waits for
        the same read."""
        now = self._clock.monotonic()
        old = self._read_at is None or not 0 <= now - self._read_at < self._settings.cert_source_refresh_seconds
        if self._reading is not None and not self._reading.done() and not anew:
            await asyncio.shield(self._reading)
        elif anew or old:
            self._reading = asyncio.create_task(self._read())
            await asyncio.shield(self._reading)
            self._read_at = now
        found = self._known.get(source_id)
        return found if found is not None and found.active else None

    async def _read(self) -> None:
        async with self._db.read() as reader:
            rows = await store.source_listing(reader, self._settings.cert_sources_max, None)
        known = {row.id: self._known.get(row.id) for row in rows}
        self._known = {
            row.id: old if (old := known[row.id]) is not None and old.version == row.version else self._source(row)
            for row in rows
        }

    def _source(self, row: Any) -> Source:
        keys = tuple(
            (Key(each["id"], each["algorithm"], base64.b64decode(each["material"])), _time(each["until"]))
            for each in self._keys(row)
        )
        return Source(
            row.id, row.environment, frozenset(row.clusters), tuple(row.cidrs), tuple(row.hostnames), keys, row.version,
            row.state == "active",
        )  # fmt: skip

    def _keys(self, row: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self._sealer.open(_PURPOSE, row.id, row.sealed_keys))
        return found

    # -- what operators do

    async def create(self, tx: Tx, caller: Caller, wanted: Wanted, public_key: str | None) -> dict[str, Any]:
        """A new source; its secret is in the answer, unless it brought a public key.

        Raises ``cert.source_limit``, ``cert.source_name_taken`` and ``cert.source_invalid``.
        """
        await store.take_turns(tx)
        rows = await store.source_listing(tx, self._settings.cert_sources_max, None)
        if len(rows) >= self._settings.cert_sources_max:
            raise Problem("cert.source_limit", limit=self._settings.cert_sources_max)
        if any(row.name == wanted.name for row in rows):
            raise Problem("cert.source_name_taken")
        made = new_id("src")
        key, secret = self._new_key(public_key)
        columns = wanted.columns()
        row = {"id": made, "created_by": caller.id, "sealed_keys": self._sealed(made, [key]), **columns}
        await tx.execute(store.sources.insert().values(row))
        await self._record(tx, caller, "cert_source.create", made, {**columns, "key": key["id"]})
        return {**await self.document(tx, made), "key": {"id": key["id"], "secret": secret}}

    async def change(self, tx: Tx, caller: Caller, source_id: str, wanted: Wanted) -> dict[str, Any]:
        """Change what a source may speak about. Raises ``cert.source_not_found`` and as ``create``."""
        row = await self._locked(tx, source_id)
        columns = {name: value for name, value in wanted.columns().items() if value != getattr(row, name)}
        if "name" in columns:
            await store.take_turns(tx)
            others = await store.source_listing(tx, self._settings.cert_sources_max, None)
            if any(each.name == columns["name"] for each in others):
                raise Problem("cert.source_name_taken")
        if columns:
            await store.change(tx, source_id, **columns)
            await self._record(tx, caller, "cert_source.change", source_id, columns)
        return await self.document(tx, source_id)

    async def rotate(
        self, tx: Tx, caller: Caller, source_id: str, overlap_seconds: int | None, public_key: str | None
    ) -> dict[str, Any]:
        """A new key; those before it are good for so long (0: no longer). Raises ``cert.source_not_found``."""
        row = await self._locked(tx, source_id)
        overlap = self._settings.cert_source_grace_seconds if overlap_seconds is None else overlap_seconds
        now = self._clock.wall()
        end = now + timedelta(seconds=overlap)
        kept = []
        for each in self._keys(row):
            until = _time(each["until"])
            if overlap and (until is None or until > now):
                kept.append({**each, "until": (end if until is None else min(until, end)).isoformat()})
        key, secret = self._new_key(public_key)
        await store.change(tx, source_id, sealed_keys=self._sealed(source_id, [key, *kept][:MAX_KEYS]))
        details = {"key": key["id"], "algorithm": key["algorithm"], "overlap_seconds": overlap}
        await self._record(tx, caller, "cert_source.rotate", source_id, details)
        return {**await self.document(tx, source_id), "key": {"id": key["id"], "secret": secret}}

    async def disable(self, tx: Tx, caller: Caller, source_id: str, reason: str) -> dict[str, Any]:
        """Believe nothing from it any more, from this commit on. Raises ``cert.source_not_found``."""
        row = await self._locked(tx, source_id)
        if row.state == "active":
            await store.change(tx, source_id, state="disabled", disabled_reason=reason)
            await self._record(tx, caller, "cert_source.disable", source_id, {"reason": reason})
        return await self.document(tx, source_id)

    async def enable(self, tx: Tx, caller: Caller, source_id: str, reason: str) -> dict[str, Any]:
        """Believe it again. Raises ``cert.source_not_found``."""
        row = await self._locked(tx, source_id)
        if row.state != "active":
            await store.change(tx, source_id, state="active", disabled_reason=None)
            await self._record(tx, caller, "cert_source.enable", source_id, {"reason": reason})
        return await self.document(tx, source_id)

    async def listing(self, reader: Reader, page: pages.PageRequest) -> dict[str, Any]:
        """A page of sources, the oldest first."""
        rows = await store.source_listing(reader, page.limit + 1, page.after[0] if page.after else None)
        counts = await store.counts(reader, [row.id for row in rows])
        document: dict[str, Any] = pages.listing(
            rows, page.limit, lambda row: (row.id,), lambda row: self._render(row, counts)
        )
        return document

    async def document(self, reader: Reader, source_id: str) -> dict[str, Any]:
        """One source with its activity. Raises ``cert.source_not_found``."""
        row = await store.source(reader, source_id)
        if row is None:
            raise Problem("cert.source_not_found")
        return self._render(row, await store.counts(reader, [source_id]))

    def _render(self, row: Any, counts: Sequence[Any]) -> dict[str, Any]:
        own = [each for each in counts if each.source_id == row.id]
        used = {each.outcome.removeprefix("key:"): each.last_at for each in own if each.outcome.startswith("key:")}
        now = self._clock.wall()
        return {
            "id": row.id,
            "name": row.name,
            "environment": row.environment,
            "clusters": row.clusters,
            "cidrs": row.cidrs,
            "hostnames": row.hostnames,
            "state": row.state,
            "disabled_reason": row.disabled_reason,
            "created_by": row.created_by,
            "created_at": row.created_at,
            "updated_at": row.updated_at,
            "keys": [_key(each, used.get(each["id"]), now) for each in self._keys(row)],
            "activity": [
                {"cluster": each.cluster or None, "outcome": each.outcome, "count": each.count, "last_at": each.last_at,
                 "last_event": each.last_event}
                for each in own if not each.outcome.startswith("key:")
            ],
        }  # fmt: skip

    async def _locked(self, tx: Tx, source_id: str) -> Any:
        row = await store.source(tx, source_id, lock=True)
        if row is None:
            raise Problem("cert.source_not_found")
        return row

    def _new_key(self, public_key: str | None) -> tuple[dict[str, Any], str | None]:
        secret = signing.new_secret() if public_key is None else None
        try:
            material = signing.key_of(secret) if secret is not None else public_key_of(public_key or "")
        except ValueError as err:
            raise Problem("cert.source_invalid", str(err)) from None
        return {
            "id": new_id("key"),
            "algorithm": "hmac" if secret is not None else "ed25519",
            "material": base64.b64encode(material).decode(),
            "created_at": self._clock.wall().isoformat(),
            "until": None,
        }, secret

    def _sealed(self, source_id: str, keys: Sequence[dict[str, Any]]) -> bytes:
        return self._sealer.seal(_PURPOSE, source_id, json.dumps(keys).encode())

    async def _record(self, tx: Tx, caller: Caller, act: str, target: str, details: dict[str, Any]) -> None:
        await audit.record(tx, caller, act, target, details=details, organization=audit.INSTALLATION)
        tx.after_commit(self._forget)

    def _forget(self) -> None:
        self._read_at = None


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _key(kept: dict[str, Any], used: datetime | None, now: datetime) -> dict[str, Any]:
    """A key as operators see it: ``pending`` until it was first used, ``grace`` once another has followed it."""
    until = _time(kept["until"])
    state = "pending" if used is None else "active"
    if until is not None:
        state = "grace" if until > now else "revoked"
    return {
        "id": kept["id"],
        "algorithm": kept["algorithm"],
        "state": state,
        "created_at": _time(kept["created_at"]),
        "until": until,
        "last_used_at": used,
    }
