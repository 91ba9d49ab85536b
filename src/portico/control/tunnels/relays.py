"""Relays as the control plane knows them: their keys, their heartbeats, and which of them an agent should use.

PostgreSQL holds the registry, so that grants are given out while Redis is down; a relay is live while its last
heartbeat is younger than the lease.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity.leaks import Match
from portico.control.tunnels import history, presence, relay_store
from portico.control.tunnels.presence import Bound
from portico.errors import Problem
from portico.kit import ids, pages
from portico.kit.db import HasConnection, Reader, Tx
from portico.kit.redis import Redis
from portico.settings import ApiSettings

log = logging.getLogger(__name__)


# -- keys ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RelayKey:
    """An authenticated relay credential; ``relay`` is the only name that it may act for, if it is bound to one."""

    id: str
    relay: str | None


async def create_key(tx: Tx, caller: Caller, name: str, *, relay: str | None = None) -> tuple[str, str]:
    """A new relay key: its id, and the token, which is stored as a digest only. ``relay`` binds it to one name."""
    token = ids.new_token("rly")
    key_id = ids.new_id("key")
    await relay_store.insert_relay_key(
        tx,
        {
            "id": key_id,
            "name": name,
            "relay": relay,
            "digest": ids.digest(token),
            "prefix": ids.display_prefix(token),
        },
    )
    await audit.record(tx, caller, "relay_key.create", key_id, details={"name": name, "relay": relay})
    return key_id, token


async def revoke_key(tx: Tx, caller: Caller, key_id: str) -> bool:
    """Refuse the key from now on, also on open streams (within a heartbeat). False when it was not live."""
    revoked = await relay_store.revoke_relay_key(tx, key_id)
    if revoked:
        await audit.record(tx, caller, "relay_key.revoke", key_id)
    return revoked


async def end_leaked(tx: Tx, caller: Caller, digest: bytes, match: Match) -> bool:
    """``leaks.End`` for relay keys; whether there ever was one."""
    row = await relay_store.relay_key(tx, digest)
    if row is None:
        return False
    if await relay_store.revoke_relay_key(tx, row["id"]):
        await audit.record(tx, caller, "relay_key.revoke", row["id"], details=match.told)
    return True


async def replace_key(tx: Tx, caller: Caller, relay: str) -> str:
    """A new key bound to ``relay`` (the token); the keys that were bound to it before are revoked."""
    for key_id in await relay_store.relay_keys_of(tx, relay):
        await revoke_key(tx, caller, key_id)
    _, token = await create_key(tx, caller, relay, relay=relay)
    return token


async def authenticate(reader: Reader, token: str) -> RelayKey:
    """The relay key behind ``token``. Raises ``edge.relay_key_invalid`` (any other credential too) or ``…_revoked``."""
    if ids.check_token(token) != "rly":
        raise Problem("edge.relay_key_invalid", "this credential is not a relay key")
    row = await relay_store.relay_key(reader, ids.digest(token))
    if row is None:
        raise Problem("edge.relay_key_invalid")
    if row["revoked_at"] is not None:
        raise Problem("edge.relay_key_revoked")
    return RelayKey(row["id"], row["relay"])


async def live_keys(reader: HasConnection, key_ids: list[str]) -> set[str]:
    """Those of the keys that are not revoked."""
    return await relay_store.live_relay_keys(reader, key_ids)


def check_name(key: RelayKey, relay: str) -> None:
    """Raises ``auth.forbidden`` when the key is bound to another relay."""
    if key.relay is not None and key.relay != relay:
        raise Problem("auth.forbidden", f"this key belongs to the relay {key.relay}", permission="edge")


# -- heartbeats ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a relay says of itself."""

    relay: str
    region: str
    connect_url: str
    public_url: str
    version: int
    load: dict[str, float]
    draining: bool
    bound: Sequence[Bound]
    left: Mapping[str, str] = field(default_factory=dict)


def _bound_digest(bound: Sequence[Bound]) -> bytes:
    lines = sorted(f"{b.tunnel} {b.session} {b.generation}" for b in bound)
    return hashlib.sha256("\n".join(lines).encode()).digest()


async def heartbeat(tx: Tx, key: RelayKey, beat: Heartbeat, *, lease: float) -> tuple[bool, list[str]]:
    """Register or renew the relay with what it has bound; whether it is new, and the tunnels that it newly has.

    What came or went is an event of the tunnel.

    Raises ``auth.forbidden`` for another relay's key.
    """
    check_name(key, beat.relay)
    row = await relay_store.heartbeat(
        tx,
        (beat.relay, key.id, beat.region, beat.connect_url, beat.public_url, beat.version, json.dumps(beat.load),
         beat.draining),
    )  # fmt: skip
    if row["registered"]:
        log.info("relay registered", extra={"f": {"relay": beat.relay, "connect_url": beat.connect_url}})
    digest = _bound_digest(beat.bound)
    fresh: list[str] = []
    if row["bound_digest"] != digest:
        latest = {b.tunnel: b for b in beat.bound}
        before = await relay_store.bindings_of(tx, beat.relay)
        await relay_store.replace_bindings(
            tx,
            beat.relay,
            digest,
            list(latest),
            [b.session for b in latest.values()],
            [b.generation for b in latest.values()],
        )
        now = {tunnel: b.session for tunnel, b in latest.items()}
        await history.presence_changed(tx, beat.relay, before, now, beat.left, lease=lease)
        fresh = [tunnel for tunnel, session in now.items() if before.get(tunnel) != session]
    return bool(row["registered"]), fresh


async def acknowledge(tx: Tx, key: RelayKey, relay: str, version: int) -> None:
    """Note the version that a registered relay has applied; a lower one than known is late and means nothing."""
    check_name(key, relay)
    await relay_store.acknowledge(tx, relay, version)


# -- choice -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LiveRelay:
    """A relay that may take agents. ``until``: the moment (monotonic) at which its last heartbeat is too old."""

    name: str
    region: str
    connect_url: str
    load: float
    until: float


def _load(report: dict[str, Any]) -> float:
    """One number for how busy a relay is: a hundred sessions or requests in flight weigh as much as one core."""
    in_flight = float(report.get("sessions", 0)) + float(report.get("streams", 0))
    return float(report.get("cpu", 0.0)) + in_flight / 100


def order(
    relays: Sequence[LiveRelay], region: str | None, draw: Callable[[], float] = random.random
) -> list[LiveRelay]:
    """Relays of the region first, then the rest; inside each, busier ones later, at random by weight.

    Weighted random (Efraimidis and Spirakis: the largest draw to the power of 1/weight is first), because the least
    loaded relay as everybody's first choice is the most loaded one by the next heartbeat.
    """

    def rank(relay: LiveRelay) -> tuple[bool, float]:
        return region is not None and relay.region != region, -(draw() ** (1.0 + relay.load))

    return sorted(relays, key=rank)


class RelayDirectory:
    """The live relays, read at most once per ``relay_cache_seconds`` whatever the number of sessions.

    Reads go over the caller's connection: a request that waited here for a second one could starve the pool.
    """

    def __init__(self, settings: ApiSettings, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._monotonic = settings, monotonic
        self._relays: list[LiveRelay] = []
        self._names: tuple[str, ...] = ()
        self._fresh_until = 0.0
        self._reading = asyncio.Lock()

    async def edges(self, reader: Reader, region: str | None) -> list[str]:
        """The connect URLs of an edge assignment, best first. Raises ``edge.no_relay`` when no relay is live."""
        live = await self._live(reader)
        if not live:
            self.forget()  # one may register any moment
            live = await self._live(reader)
        if not live:
            raise Problem("edge.no_relay", headers={"Retry-After": "1"})
        return [relay.connect_url for relay in order(live, region)[: self._settings.edge_assignment_size]]

    async def live_names(self, reader: Reader) -> tuple[str, ...]:
        """Relays whose heartbeat is within the lease, draining ones too: those that can have tunnels bound."""
        await self._live(reader)
        return self._names

    async def listing(self, reader: Reader, page: pages.PageRequest) -> dict[str, Any]:
        """A page of every relay that was registered, by name, live or not."""
        after = page.after[0] if page.after else None
        rows = await relay_store.list_relays(reader, self._settings.relay_lease_seconds, page.limit + 1, after)
        document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.name,), lambda row: row._asdict())
        return document

    def forget(self) -> None:
        """Read anew at the next question: this process just heard of a relay."""
        self._fresh_until = 0.0

    async def _live(self, reader: Reader) -> list[LiveRelay]:
        if self._monotonic() >= self._fresh_until:
            async with self._reading:
                if self._monotonic() >= self._fresh_until:
                    await self._read(reader)
        now = self._monotonic()
        return [relay for relay in self._relays if relay.until > now]

    async def _read(self, reader: Reader) -> None:
        lease = self._settings.relay_lease_seconds
        rows = await relay_store.live_relays(reader, lease)
        now = self._monotonic()
        self._names = tuple(row["name"] for row in rows)
        self._relays = [
            LiveRelay(
                row["name"], row["region"], row["connect_url"], _load(json.loads(row["load"])), now + lease - row["age"]
            )
            for row in rows
            if not row["draining"]
        ]
        self._fresh_until = now + self._settings.relay_cache_seconds


async def report_presence(redis: Redis | None, settings: ApiSettings, beat: Heartbeat) -> bool:
    """Tell Redis what the relay has bound. Called after the commit: no transaction is open during a network call."""
    return await presence.report(
        redis,
        beat.relay,
        beat.bound,
        lease=int(settings.relay_lease_seconds),
        timeout=settings.redis_heartbeat_timeout_seconds,
    )
