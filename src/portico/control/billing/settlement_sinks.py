"""Sinks: the finance systems outside that load our reports and say what was settled, each with keys of its own.

A sink's id is the key id of its messages. Of its secrets the newest has no end; those before it are good for the overlap that the
rotation names. What a sink may differ by, without that being a delta, is said per currency and audited; by default nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.billing import settlement_store as store
from portico.control.notifications import reach
from portico.errors import Problem
from portico.kit import outbound, pages, signing
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx, is_unique_violation
from portico.kit.ids import new_id
from portico.kit.outbound import OutboundError
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

_PURPOSE: Final = "settlement sink"
#: Secrets of one sink that are kept.
MAX_SECRETS: Final = 3


class Sinks:
    """The verbs on sinks."""

    def __init__(self, settings: ApiSettings, clock: Clock, sealer: Sealer) -> None:
        self._settings, self._clock, self._sealer = settings, clock, sealer

    async def create(self, tx: Tx, caller: Caller, name: str, url: str | None) -> dict[str, Any]:
        """A new one; its secret is in the answer. Raises ``settlement.sink_invalid``, ``settlement.sink_name_taken``."""
        self._check(url)
        made, secret = new_id("snk"), signing.new_secret()
        row: dict[str, Any] = {"id": made, "name": name, "url": url, "created_by": caller.id}
        row["sealed_secrets"] = self._sealed(made, [{"secret": secret, "until": None}])
        try:
            async with tx.savepoint():
                await tx.execute(store.sinks.insert().values(row))
        except Exception as err:
            if is_unique_violation(err):
                raise Problem("settlement.sink_name_taken") from None
            raise
        await self._record(tx, caller, "settlement_sink.create", made, {"name": name, "url": url})
        return {**self.render(await self._one(tx, made)), "secret": secret}

    async def change(
        self, tx: Tx, caller: Caller, sink: str, *, url: str | None = None, tolerances: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """Where its reports go, what it may differ by. Raises as ``create``, and ``settlement.sink_not_found``."""
        row = await self._one(tx, sink, lock=True)
        self._check(url)
        values: dict[str, Any] = {"url": url} if url is not None else {}
        if tolerances is not None:
            values["tolerances"] = dict(tolerances)
        if values:
            before = {name: getattr(row, name) for name in values}
            row = await store.change_sink(tx, sink, **values)
            await self._record(tx, caller, "settlement_sink.change", sink, {**values, "before": before})
        return self.render(row)

    async def rotate(self, tx: Tx, caller: Caller, sink: str, overlap_seconds: int | None) -> dict[str, Any]:
        """A new secret; the ones before are good for so long."""
        row = await self._one(tx, sink, lock=True)
        overlap = self._settings.webhook_secret_overlap_seconds if overlap_seconds is None else overlap_seconds
        now, secret = self._clock.wall(), signing.new_secret()
        until = (now + timedelta(seconds=overlap)).isoformat()
        old = [{"secret": each, "until": until} for each in self.secrets(row, now)] if overlap else []
        kept: list[dict[str, Any]] = [{"secret": secret, "until": None}, *old]
        row = await store.change_sink(tx, sink, sealed_secrets=self._sealed(sink, kept[:MAX_SECRETS]))
        await self._record(tx, caller, "settlement_sink.rotate", sink, {"overlap_seconds": overlap})
        return {**self.render(row), "secret": secret}

    async def set_state(self, tx: Tx, caller: Caller, sink: str, state: str, reason: str) -> dict[str, Any]:
        """Believe nothing from it any more, or again."""
        await self._one(tx, sink, lock=True)
        row = await store.change_sink(tx, sink, state=state)
        act = "settlement_sink.disable" if state == "disabled" else "settlement_sink.enable"
        await self._record(tx, caller, act, sink, {"reason": reason})
        return self.render(row)

    async def listing(self, reader: Reader, page: pages.PageRequest) -> Any:
        """A page of them, the oldest first."""
        rows = await store.sink_listing(reader, page.limit + 1, page.after[0] if page.after else None)
        return pages.listing(rows, page.limit, lambda row: (row.id,), self.render)

    def secrets(self, row: Any, now: datetime) -> list[str]:
        """The secrets that are good now, the newest first; none of a sink that is disabled."""
        if row.state != "active":
            return []
        kept: Sequence[dict[str, Any]] = json.loads(self._sealer.open(_PURPOSE, row.id, row.sealed_secrets))
        live = [each for each in kept if each["until"] is None or datetime.fromisoformat(each["until"]) > now]
        return [str(each["secret"]) for each in live]

    @staticmethod
    def render(row: Any) -> dict[str, Any]:
        """As operators see it."""
        return {
            "id": row.id, "name": row.name, "url": row.url, "state": row.state, "tolerances": row.tolerances,
            "created_by": row.created_by, "created_at": row.created_at, "updated_at": row.updated_at,
        }  # fmt: skip

    def _check(self, url: str | None) -> None:
        if url is None:
            return
        try:
            outbound.check_url(url, reach.limits_of(self._settings))
        except OutboundError as err:
            raise Problem("settlement.sink_invalid", str(err)) from None

    def _sealed(self, sink: str, kept: list[dict[str, Any]]) -> bytes:
        return self._sealer.seal(_PURPOSE, sink, json.dumps(kept).encode())

    @staticmethod
    async def _one(reader: Reader, sink: str, *, lock: bool = False) -> Any:
        row = await store.sink(reader, sink, lock=lock)
        if row is None:
            raise Problem("settlement.sink_not_found")
        return row

    @staticmethod
    async def _record(tx: Tx, caller: Caller, act: str, target: str, details: dict[str, Any]) -> None:
        await audit.record(tx, caller, act, target, details=details, organization=audit.INSTALLATION)
