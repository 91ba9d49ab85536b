"""Which tunnels are bound at which relay right now.

Heartbeats keep the answer in two places: PostgreSQL (``relay_bindings`` of relays seen within the lease) and Redis, one
hash per relay that expires with the lease, so that lists of tunnels do not load the database. Redis may be missing or
empty at any time: it answers only for relays that reported to it, and PostgreSQL answers for the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio.client import Pipeline

from portico.control.tunnels import relay_store
from portico.kit.db import Reader
from portico.kit.redis import Redis

log = logging.getLogger(__name__)

_BOUND: Final = "portico:bound:"
# Fields of one HSET; a relay with more tunnels gets several in the same transaction.
_CHUNK: Final = 2000


@dataclass(frozen=True, slots=True)
class Bound:
    """A tunnel as a live relay reported it."""

    tunnel: str
    session: str
    generation: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tunnel is served: the relay and the session that holds it."""

    relay: str
    session: str


async def report(redis: Redis | None, relay: str, bound: Sequence[Bound], *, lease: int, timeout: float) -> bool:
    """Replace what ``relay`` has bound, for ``lease`` seconds, in one round trip. False when Redis was not reached."""
    if redis is None:
        return False

    def fill(commands: Pipeline) -> None:
        key = _BOUND + relay
        commands.delete(key)
        commands.hset(key, "", "")  # a relay with nothing bound is known all the same
        for start in range(0, len(bound), _CHUNK):
            commands.hset(key, mapping={b.tunnel: b.session for b in bound[start : start + _CHUNK]})
        commands.expire(key, lease)

    return await redis.pipeline(fill, atomic=True, timeout_seconds=timeout) is not None


async def places(
    reader: Reader, redis: Redis | None, relays: Sequence[str], tunnel_ids: list[str], *, lease: float
) -> dict[str, Place]:
    """Where each of the tunnels is served; one that is missing is offline. ``relays`` are those that are live."""
    if not tunnel_ids or not relays:
        return {}
    found = await _from_redis(redis, relays, tunnel_ids)
    if found is not None:
        return found
    rows = await relay_store.live_bindings(reader, tunnel_ids, lease)
    return {row["tunnel_id"]: Place(row["relay"], row["session_id"]) for row in rows}


async def _from_redis(redis: Redis | None, relays: Sequence[str], tunnel_ids: list[str]) -> dict[str, Place] | None:
    """The answer of Redis, or ``None`` when it cannot speak for every live relay."""
    if redis is None:
        return None

    def fill(commands: Pipeline) -> None:
        for relay in relays:
            commands.hmget(_BOUND + relay, ["", *tunnel_ids])

    answers = await redis.pipeline(fill)
    if answers is None:
        return None
    found: dict[str, Place] = {}
    for relay, values in zip(relays, answers, strict=True):
        known, *sessions = _texts(values)
        if known is None:
            return None  # Redis lost its data, or this relay's last heartbeat did not reach it
        found.update((t, Place(relay, s)) for t, s in zip(tunnel_ids, sessions, strict=True) if s is not None)
    return found


def _texts(values: Any) -> list[str | None]:
    return list(values)
