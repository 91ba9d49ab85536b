"""What tunnels used: plain counters for the hot path, numbered batches for the control plane.

The hot path increments fields of ``Counters`` and nothing else. Every ``usage_interval_seconds`` the differences become a
batch in the spool, durable before it is sent; the control plane counts each (relay, boot, number) once, so sending again is
always safe. Neither a dead control plane nor a full disk stops traffic: batches wait on disk, or in memory, and are merged
when they take too much room, so that totals are kept.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx

from portico.relay.control_link import MAX_REASONS, Backoff, LinkLost, LinkRefused, post, why
from portico.relay.edge_rows import SnapshotInvalid, parse_json
from portico.relay.spool import FIELDS, SUFFIX, Batch, Spool, batch, merged_rows
from portico.relay.statefiles import in_thread
from portico.settings import RelaySettings

log = logging.getLogger(__name__)

BATCH_MAX_ROWS = 2000  # so that no batch comes near the size of a report
ADOPT_SECONDS = 20.0  # between two looks for what a predecessor, which drained beside this process, left unsent


class Counters:
    """Totals of one tunnel since this process started; only ever incremented, by the loop's thread."""

    __slots__ = (
        "bytes_in", "bytes_out", "connections", "errors", "organization", "quiet_since", "refusals", "refused",
        "reported", "requests", "retained", "tunnel",
    )  # fmt: skip

    def __init__(self, tunnel: str, organization: str) -> None:
        self.tunnel = tunnel
        self.organization = organization
        self.requests = 0
        self.connections = 0
        self.bytes_in = 0  # from visitors
        self.bytes_out = 0  # to visitors
        self.errors = 0  # refusals and failures after the tunnel was known
        self.refusals = 0  # of visitors, at the edge; and by code, for the agent's screen (not usage)
        self.refused: dict[str, int] | None = None
        self.reported = (0, 0, 0, 0, 0)
        self.retained = 0
        self.quiet_since = 0.0

    def refuse(self, code: str, count: int = 1) -> None:
        """A visitor was refused before the agent heard of it."""
        self.refusals += count
        if self.refused is None:
            self.refused = {}
        self.refused[code] = self.refused.get(code, 0) + count

    def take(self) -> dict[str, Any] | None:
        """The row since the last call, or ``None`` when nothing happened."""
        now = (self.requests, self.connections, self.bytes_in, self.bytes_out, self.errors)
        if now == self.reported:
            return None
        row: dict[str, Any] = {"tunnel": self.tunnel, "organization": self.organization}
        row.update((field, new - old) for field, new, old in zip(FIELDS, now, self.reported, strict=True))
        self.reported = now
        return row


class Meter:
    """Owns the counters, the spool and both loops: collecting and sending."""

    FOLDER = "usage"

    def __init__(
        self,
        settings: RelaySettings,
        *,
        http: httpx.AsyncClient,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._http = http
        self._wall, self._monotonic = wall, monotonic
        self._folder = settings.state_dir / self.FOLDER
        self.boot = secrets.token_hex(8)
        self._counters: dict[tuple[str, str], Counters] = {}
        self._own = Spool(self._folder / (self.boot + SUFFIX))
        self._fresh: list[Batch] = []  # collected, not yet in the spool
        self._left: list[Spool] = []
        self._seq = 0
        self._since = int(wall())
        self._forgotten = dict.fromkeys(FIELDS, 0)  # of tunnels that are no longer in memory: totals never go back
        self._merged_bytes = 0  # what the last merge left, so that merging is not repeated for nothing
        self._lock = asyncio.Lock()  # over every change of a spool; disk work happens under it, in a thread
        self._wake = asyncio.Event()
        self._said: dict[str, set[str]] = {}

    # -- counters

    def counters(self, tunnel: str, organization: str) -> Counters:
        """The counters of ``tunnel``, kept until ``release`` was called as often and they were quiet for a long time."""
        found = self._counters.get((tunnel, organization))
        if found is None:
            found = self._counters[tunnel, organization] = Counters(tunnel, organization)
            found.quiet_since = self._monotonic()
        found.retained += 1
        return found

    def release(self, counters: Counters) -> None:
        """Its tunnel is no longer bound here. Streams still under way may go on counting."""
        counters.retained = max(0, counters.retained - 1)

    def totals(self) -> dict[str, int]:
        """Sums over all tunnels since this process started, for metrics."""
        counters = self._counters.values()
        return {field: self._forgotten[field] + sum(getattr(c, field) for c in counters) for field in FIELDS}

    def waiting(self) -> tuple[int, int]:
        """Batches that the control plane has not acknowledged, and their bytes."""
        spools = [*self._left, self._own]
        return sum(len(spool.live) for spool in spools), sum(spool.size() for spool in spools)

    # -- running

    async def run(self) -> None:
        """Adopts what earlier processes left, then collects and sends until cancelled."""
        self._left = await in_thread(Spool.adopt_all, self._folder)
        if self._left:
            waiting = sum(len(spool.live) for spool in self._left)
            log.info("sending usage that an earlier process left", extra={"f": {"batches": waiting}})
            self._wake.set()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._collect_loop())
            group.create_task(self._send_loop())
            group.create_task(self._adopt_loop())

    async def close(self, timeout: float = 2.0) -> None:
        """After ``run`` was cancelled: the last interval is stored, and sent when that is quick; the rest waits on disk."""
        await self.collect()
        with suppress(LinkLost, httpx.HTTPError, OSError, TimeoutError):
            async with asyncio.timeout(timeout):
                while await self.send_one():
                    pass
        async with self._lock:
            for spool in [*self._left, self._own]:
                spool.close() if spool.live else spool.discard()
            self._left = []

    async def _adopt_loop(self) -> None:
        while True:
            await asyncio.sleep(ADOPT_SECONDS)
            async with self._lock:
                found = await in_thread(Spool.adopt_all, self._folder)
                self._left += found
            if found:
                log.info("sending usage that an earlier process left", extra={"f": {"spools": len(found)}})
                self._wake.set()

    async def _collect_loop(self) -> None:
        while True:
            await asyncio.sleep(self._settings.usage_interval_seconds)
            try:
                await self.collect()
            except Exception:
                log.exception("fault while collecting usage; it is kept for the next interval")

    async def _send_loop(self) -> None:
        limits = self._settings
        backoff = Backoff(limits.edge_backoff_min_seconds, limits.usage_backoff_max_seconds)
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while await self.send_one():
                    backoff.reset()
                    self._said.pop("send", None)
                continue
            except LinkRefused as err:
                self._say("send", "the control plane refuses this relay's usage reports", why(err))
                await asyncio.sleep(limits.edge_refused_seconds)
            except (LinkLost, httpx.HTTPError, OSError, TimeoutError) as err:
                self._say("send", "usage cannot be reported; it waits on disk", why(err))
                await asyncio.sleep(backoff.next())
            except Exception as err:
                log.exception("fault while sending usage")
                self._say("send", "usage cannot be reported; it waits on disk", repr(err))
                await asyncio.sleep(limits.usage_backoff_max_seconds)
            self._wake.set()

    # -- collecting

    async def collect(self) -> None:
        """One interval: differences become batches, batches become durable (or wait in memory while the disk is full)."""
        now = int(self._wall())
        rows = self._take(self._monotonic())
        for start in range(0, len(rows), BATCH_MAX_ROWS):
            self._fresh.append(self._number(self._since, now, rows[start : start + BATCH_MAX_ROWS]))
        self._since = now
        if self._fresh or any(not item.saved for item in self._own.live):
            await self._store()
            self._wake.set()

    def _take(self, now: float) -> list[dict[str, Any]]:
        rows, forgotten = [], []
        for key, counters in self._counters.items():
            row = counters.take()
            if row is not None:
                rows.append(row)
                counters.quiet_since = now
            elif not counters.retained and now - counters.quiet_since > self._settings.usage_forget_seconds:
                forgotten.append(key)
        for key in forgotten:
            gone = self._counters.pop(key)
            for field in FIELDS:
                self._forgotten[field] += getattr(gone, field)
        return rows

    def _number(self, since: int, until: int, rows: list[dict[str, Any]]) -> Batch:
        self._seq += 1
        return batch(self._seq, since, until, rows)

    async def _store(self) -> None:
        async with self._lock:
            self._own.live += self._fresh
            self._fresh = []
            try:
                if self._too_large(self._own.mergeable()):
                    await self._merge()
                else:
                    await in_thread(self._own.append_unsaved)
                self._said.pop("disk", None)
            except OSError as err:
                self._say("disk", "usage cannot be saved; it waits in memory", why(err))
                self._merge_in_memory()

    def _too_large(self, batches: list[Batch]) -> bool:
        size = sum(len(item.payload) for item in batches)
        return size > max(self._settings.usage_spool_max_bytes, 2 * self._merged_bytes)

    async def _merge(self) -> None:
        """Batches never sent become as few as possible, in the file and then in memory."""
        fewer = self._merged(self._own.mergeable())
        await in_thread(self._own.rewrite, [item for item in self._own.live if item.exposed] + fewer)
        log.warning("unsent usage was merged to make room", extra={"f": {"bytes": self._own.size()}})

    def _merge_in_memory(self) -> None:
        """While the disk refuses: only batches that are not in the file may be merged, or a crash could double them."""
        loose = [item for item in self._own.mergeable() if not item.saved]
        if self._too_large(loose):
            gone = {item.seq for item in loose}
            self._own.live = [item for item in self._own.live if item.seq not in gone] + self._merged(loose)

    def _merged(self, batches: list[Batch]) -> list[Batch]:
        since, until, rows = merged_rows(batches)
        chunks = range(0, len(rows), BATCH_MAX_ROWS)
        fewer = [self._number(since, until, rows[start : start + BATCH_MAX_ROWS]) for start in chunks]
        self._merged_bytes = sum(len(item.payload) for item in fewer)
        return fewer

    # -- sending

    async def send_one(self) -> bool:
        """One report, acknowledged; ``False`` when there is nothing to send. Raises when the control plane did not."""
        async with self._lock:
            spool, group = self._next_group()
        if spool is None:
            return False
        head = f'{{"relay":{_quote(self._settings.relay_name)},"boot":{_quote(spool.boot)},"batches":['
        request = self._http.build_request(
            "POST",
            "/usage",
            content=head.encode() + b",".join(item.payload for item in group) + b"]}",
            headers={"Content-Type": "application/json"},
        )
        answer = await post(self._http, request, self._settings.usage_post_timeout_seconds)
        await self._acknowledge(spool, group, answer)
        return True

    def _next_group(self) -> tuple[Spool | None, list[Batch]]:
        for spool in [*self._left, self._own]:
            group = spool.group(self._settings.usage_post_max_batches, self._settings.usage_post_max_bytes)
            if group:
                return spool, group
        return None, []

    async def _acknowledge(self, spool: Spool, group: list[Batch], answer: bytes) -> None:
        try:
            message = parse_json(answer)
        except SnapshotInvalid as err:
            raise LinkLost(f"the answer to a usage report is {err}") from None
        seq = message.get("acknowledged") if isinstance(message, dict) else None
        if type(seq) is not int or seq < group[0].seq:
            raise LinkLost("a usage report was answered without an acknowledgement")
        async with self._lock:
            spool.acknowledge(min(seq, group[-1].seq))
            try:
                if spool is self._own:
                    await in_thread(spool.tidy, self._settings.usage_spool_max_bytes)
                elif not spool.live:
                    self._left.remove(spool)
                    await in_thread(spool.discard)
            except OSError as err:  # the lines stay; sent again after a restart, they are counted already
                self._say("disk", "acknowledged usage cannot be removed from disk", why(err))

    def _say(self, what: str, text: str, reason: str) -> None:
        """Once per reason, so that an outage is one line."""
        said = self._said.setdefault(what, set())
        if reason not in said and len(said) < MAX_REASONS:
            said.add(reason)
            log.warning(text, extra={"f": {"why": reason}})


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
