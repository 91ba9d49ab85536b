"""The whole state that a relay holds, at one version, and its hash.

Read in one REPEATABLE READ transaction: version and state belong together, because every change of the state is committed
together with its row in the change table. A snapshot of 100,000 tunnels is megabytes, so building and hashing yield to the
event loop as they go.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from portico.control import changes
from portico.control.domains import acme_store, vault
from portico.control.domains.edge import closed_rows
from portico.control.domains.edge import rows as domain_rows
from portico.control.identity import plans
from portico.control.identity.signing_keys import SigningKeys
from portico.control.tunnels.service import Tunnels
from portico.control.tunnels.sessions import ended_sessions
from portico.kit.db import Database

_CHUNK: Final = 1000  # rows between two yields to the loop: about a millisecond


@dataclass(frozen=True, slots=True)
class EdgeState:
    """Everything a relay knows, at one version and time."""

    version: int
    time: float
    keys: list[dict[str, str]]
    tunnels: list[dict[str, Any]]
    ended: list[dict[str, Any]]
    organizations: list[dict[str, Any]] = field(default_factory=list)
    challenges: list[dict[str, Any]] = field(default_factory=list)
    certificates: list[dict[str, Any]] = field(default_factory=list)
    domains: list[dict[str, Any]] = field(default_factory=list)
    closed_domains: list[dict[str, Any]] = field(default_factory=list)

    async def digest(self) -> str:
        """The hash of ``contracts/edge-stream.schema.json``: SHA-256 of the canonical JSON of what is compared."""
        found = hashlib.sha256()
        sessions = sorted(row["session"] for row in self.ended)
        kids = sorted(key["kid"] for key in self.keys)
        found.update(b'{"ended":%b,"keys":%b,"tunnels":{' % (_canonical(sessions), _canonical(kids)))
        rows = sorted(self.tunnels, key=lambda row: row["id"])
        async for part in _joined(b"%b:%b" % (_canonical(row["id"]), _canonical(row)) for row in rows):
            found.update(part)
        found.update(b"}}")
        return found.hexdigest()

    def organizations_digest(self) -> str:
        """The hash of what was told of organizations that have tunnels: of the others nothing depends on it, and nobody tells
        relays that one was deleted."""
        served = {row["organization"] for row in self.tunnels}
        told = {row["id"]: row["version"] for row in self.organizations if row["id"] in served}
        return hashlib.sha256(_canonical({"organizations": told})).hexdigest()

    async def line(self) -> bytes:
        """The ``snapshot`` line of the stream."""
        parts = [
            b'{"type":"snapshot","version":%d,"time":%b,"hash":"%b","organizations_hash":"%b","state":{"keys":%b,"ended":%b,'
            b'"organizations":%b,"challenges":%b,"domains":%b,"closed_domains":%b,"certificates":['
            % (
                self.version,
                _canonical(self.time),
                (await self.digest()).encode(),
                self.organizations_digest().encode(),
                _canonical(self.keys),
                _canonical(self.ended),
                _canonical(self.organizations),
                _canonical(self.challenges),
                _canonical(self.domains),
                _canonical(self.closed_domains),
            )
        ]
        parts.extend([part async for part in _joined(_canonical(row) for row in self.certificates)])
        parts.append(b'],"tunnels":[')
        parts.extend([part async for part in _joined(_canonical(row) for row in self.tunnels)])
        parts.append(b"]}}\n")
        return b"".join(parts)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


async def _joined(items: Iterable[bytes]) -> AsyncIterator[bytes]:
    """The items joined by commas, in chunks, with a yield to the event loop after each."""
    chunk: list[bytes] = []
    first = True
    for item in items:
        chunk.append(item)
        if len(chunk) == _CHUNK:
            yield (b"" if first else b",") + b",".join(chunk)
            chunk, first = [], False
            await asyncio.sleep(0)
    if chunk:
        yield (b"" if first else b",") + b",".join(chunk)


class StateReader:
    """Reads the state; several relays that connect at once share one reading."""

    def __init__(
        self, db: Database, tunnels: Tunnels, keys: SigningKeys, *, wall: Callable[[], float] = time.time
    ) -> None:
        self._db, self._tunnels, self._keys, self._wall = db, tunnels, keys, wall
        self._line: asyncio.Task[tuple[int, bytes]] | None = None

    async def read(self) -> EdgeState:
        """The state now."""
        async with self._db.read(snapshot=True) as reader:
            version = await changes.newest(reader)
            now = self._wall()
            return EdgeState(
                version=version,
                time=now,
                keys=await self._keys.published(reader),
                tunnels=await self._tunnels.edge_rows(reader),
                ended=await ended_sessions(reader, now),
                organizations=await plans.told(reader),
                challenges=await acme_store.open_challenges(reader),
                certificates=await vault.edge_rows(reader),
                domains=await domain_rows(reader),
                closed_domains=await closed_rows(reader),
            )

    async def line(self) -> tuple[int, bytes]:
        """A snapshot line begun no earlier than this call's start could share, and its version."""
        if self._line is None:
            self._line = asyncio.create_task(self._build())
            self._line.add_done_callback(self._built)
        return await asyncio.shield(self._line)

    def _built(self, task: asyncio.Task[tuple[int, bytes]]) -> None:
        self._line = None
        if not task.cancelled():
            task.exception()  # every waiter has it; a task without waiters must not warn

    async def _build(self) -> tuple[int, bytes]:
        state = await self.read()
        return state.version, await state.line()
