"""A copy of the edge state in the state folder, so that a relay that restarts while the control plane is out of reach still knows
keys, hosts and ended sessions, and resumes the stream at its version.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from pathlib import Path
from typing import Any

from portico.relay import statefiles
from portico.relay.edge_rows import SnapshotInvalid, canonical, members, parse_json
from portico.relay.snapshot import FrozenState, Snapshot

log = logging.getLogger(__name__)


class SnapshotStore:
    """The copy on disk: loaded at start, written a moment after a change, never in the loop's own time.

    ``source`` names the control plane; a copy of another one is not used, since its versions mean nothing here.
    """

    FILE = "edge-state.json"
    FORMAT = 1
    RETRY_SECONDS = 5.0
    SHARE = 10  # a write that takes t seconds is followed by a pause of at least SHARE × t

    def __init__(self, snapshot: Snapshot, state_dir: Path, *, source: str, delay: float) -> None:
        self._snapshot = snapshot
        self._path = state_dir / self.FILE
        self._source = source
        self._delay = delay
        self._dirty = asyncio.Event()
        self._failing = False
        snapshot.on_applied(self._dirty.set)

    def load(self) -> bool:
        """Applies the copy when there is a sound one of this control plane; a damaged one is reported and left out."""
        try:
            head, _, body = self._path.read_bytes().partition(b"\n")
            if not self._sound(parse_json(head), body):
                return False
            message = parse_json(body)
            self._snapshot.apply(message)
            # Of an earlier version of this program: what the control plane said beyond it was passed over, so ask for all of it.
            self._snapshot.complete &= "certificates" in message["state"]
        except FileNotFoundError:
            return False
        except (OSError, SnapshotInvalid) as err:
            log.warning("the saved edge state cannot be used", extra={"f": {"file": self._path, "why": err}})
            return False
        self._dirty.clear()
        return True

    def _sound(self, head: Any, body: bytes) -> bool:
        head = members(head, "the head")
        if head.get("format") != self.FORMAT or head.get("source") != self._source:
            log.info("the saved edge state is of another control plane", extra={"f": {"file": self._path}})
            return False
        if head.get("sha256") != hashlib.sha256(body).hexdigest():
            raise SnapshotInvalid("its checksum does not match")
        return True

    async def run(self) -> None:
        """Writes until cancelled. A full disk is reported once and tried again; nothing else waits for it."""
        while True:
            await self._dirty.wait()
            await asyncio.sleep(self._delay)
            started = time.monotonic()
            saved = await self.save()
            pause = self.SHARE * (time.monotonic() - started) if saved else self.RETRY_SECONDS
            await asyncio.sleep(pause)

    async def save(self) -> bool:
        """One write of the present state, in a thread; ``False`` when the disk refused it."""
        self._dirty.clear()
        if (frozen := self._snapshot.frozen()) is None:
            return True
        try:
            await statefiles.in_thread(self._write, frozen)
        except OSError as err:
            self._dirty.set()
            if not self._failing:
                log.error("the edge state cannot be saved", extra={"f": {"file": self._path, "why": err}})
            self._failing = True
            return False
        self._failing = False
        return True

    async def close(self) -> None:
        """Writes what is not written yet."""
        if self._dirty.is_set():
            await self.save()

    def _write(self, frozen: FrozenState) -> None:
        body = frozen.encode()
        head = {"format": self.FORMAT, "source": self._source, "sha256": hashlib.sha256(body).hexdigest()}
        statefiles.replace(self._path, canonical(head) + b"\n" + body)
