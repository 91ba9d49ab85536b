"""Usage batches on disk until the control plane has counted them.

One file per process, named by its boot id and locked while the process lives: batches are numbered from 1 under that id,
so a number is never used twice, whatever a crash tore off. A new process adopts the files of dead ones, read-only.

    <state_dir>/usage/<boot>.spool        one line per batch: CRC-32 of the JSON in hex, space, JSON

Nothing here touches the event loop; methods that say *disk* block and belong in a thread. The meter serialises all calls.
A batch that was ever *exposed* (part of a report that may have been received) keeps its number and content for good; only
batches never exposed may be merged, or the control plane could count them twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portico.relay import statefiles

log = logging.getLogger(__name__)

SUFFIX = ".spool"
_LINE = re.compile(rb"([0-9a-f]{8}) (\{.*\})\Z", re.DOTALL)
FIELDS = ("requests", "connections", "bytes_in", "bytes_out", "errors")


@dataclass(slots=True, eq=False)
class Batch:
    """``payload`` is the JSON that is stored and sent; ``saved`` means that it is on disk."""

    seq: int
    payload: bytes
    saved: bool = False
    exposed: bool = False

    def line(self) -> bytes:
        return b"%08x %b\n" % (zlib.crc32(self.payload), self.payload)


def batch(seq: int, since: int, until: int, rows: list[dict[str, Any]]) -> Batch:
    body = {"seq": seq, "from": since, "to": until, "rows": rows}
    return Batch(seq, json.dumps(body, separators=(",", ":")).encode())


def merged_rows(batches: Iterable[Batch]) -> tuple[int, int, list[dict[str, Any]]]:
    """The totals of ``batches`` per tunnel and organization, and the time that they span."""
    since, until = 2**62, 0
    totals: dict[tuple[str, str], dict[str, Any]] = {}
    for item in batches:
        body = json.loads(item.payload)
        since, until = min(since, body["from"]), max(until, body["to"])
        for row in body["rows"]:
            total = totals.setdefault((row["tunnel"], row["organization"]), dict.fromkeys(FIELDS, 0))
            for field in FIELDS:
                total[field] += row[field]
    rows = [{"tunnel": tunnel, "organization": org, **total} for (tunnel, org), total in totals.items()]
    return since, until, rows


class Spool:
    """The batches of one boot, in memory and in its file, which is created with the first batch."""

    def __init__(self, path: Path, fd: int = -1, batches: list[Batch] | None = None) -> None:
        self.path = path
        self.boot = path.name.removesuffix(SUFFIX)
        self.live: list[Batch] = batches or []
        self._fd = fd
        self._good = 0  # bytes of whole lines; what stands behind them is a torn write

    @classmethod
    def adopt_all(cls, folder: Path) -> list[Spool]:
        """Disk. What dead processes left; files of living ones are locked and stay theirs."""
        if not folder.is_dir():
            return []
        found = [cls._adopt(path) for path in sorted(folder.glob("*" + SUFFIX), key=_age)]
        return [spool for spool in found if spool is not None]

    @classmethod
    def _adopt(cls, path: Path) -> Spool | None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino != os.fstat(fd).st_ino:  # its owner replaced it in between: this is an old copy
                raise BlockingIOError
            spool = cls(path, fd, _read(path))
        except OSError as err:
            if not isinstance(err, BlockingIOError):
                log.warning("usage left by an earlier process is unreadable", extra={"f": {"file": path, "why": err}})
            os.close(fd)
            return None
        if not spool.live:
            spool.discard()
            return None
        return spool

    def size(self) -> int:
        return sum(len(item.payload) for item in self.live)

    def mergeable(self) -> list[Batch]:
        return [item for item in self.live if not item.exposed]

    def group(self, max_batches: int, max_bytes: int) -> list[Batch]:
        """The next report, oldest first, marked as exposed; one batch at least when there is one."""
        chosen: list[Batch] = []
        size = 0
        for item in self.live[:max_batches]:
            size += len(item.payload)
            if chosen and size > max_bytes:
                break
            item.exposed = True
            chosen.append(item)
        return chosen

    def acknowledge(self, seq: int) -> int:
        """Forgets exposed batches up to ``seq``; their number. The file follows with ``tidy``."""
        before = len(self.live)
        self.live = [item for item in self.live if item.seq > seq or not item.exposed]
        return before - len(self.live)

    def append_unsaved(self) -> None:
        """Disk. Every batch is durable after this; on ``OSError`` the file is as before, and this may be called again."""
        new = [item for item in self.live if not item.saved]
        if not new:
            return
        data = b"".join(item.line() for item in new)
        if self._fd < 0:
            self._create()
        try:
            os.ftruncate(self._fd, self._good)
            os.lseek(self._fd, self._good, os.SEEK_SET)
            statefiles.write_all(self._fd, data)
            os.fdatasync(self._fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._good)
            raise
        self._good += len(data)
        for item in new:
            item.saved = True

    def _create(self) -> None:
        statefiles.ensure_dir(self.path.parent)
        fd = statefiles.open_private(self.path, os.O_RDWR | os.O_EXCL)
        fcntl.flock(fd, fcntl.LOCK_EX)
        self._fd = fd
        statefiles.sync_folder(self.path.parent)

    def rewrite(self, batches: list[Batch]) -> None:
        """Disk. The file, and then ``live``, are exactly ``batches``; on ``OSError`` both are as before.

        The new file is locked before it takes the name, so that no other process can adopt it in between.
        """
        temporary = self.path.with_name(f".{self.path.name}.new")
        data = b"".join(item.line() for item in batches)
        statefiles.ensure_dir(self.path.parent)
        fd = statefiles.open_private(temporary, os.O_RDWR | os.O_TRUNC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            statefiles.write_all(fd, data)
            os.fsync(fd)
            temporary.replace(self.path)
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self.close()
        self._fd, self._good, self.live = fd, len(data), batches
        for item in batches:
            item.saved = True
        with contextlib.suppress(OSError):  # the rename has happened; its durability is a matter of seconds
            statefiles.sync_folder(self.path.parent)

    def tidy(self, max_stale_bytes: int) -> None:
        """Disk. Drops acknowledged lines: all at once when none is left, else when they take more than the limit.

        Not synced: should the old lines come back after a crash, their numbers are already counted.
        """
        if not any(item.saved for item in self.live):
            if self._good:
                os.ftruncate(self._fd, 0)
                self._good = 0
        elif self._good - self.size() > max_stale_bytes:
            self.rewrite(self.live)

    def discard(self) -> None:
        """Disk. Removes the file and lets go of it."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.close()

    def close(self) -> None:
        """Lets go of the file, which another process may then adopt."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read(path: Path) -> list[Batch]:
    """The sound batches of a file, in order. A torn tail is normal after a crash; damage elsewhere is reported."""
    *lines, _torn = path.read_bytes().split(b"\n")
    batches = [item for item in map(_parse, lines) if item is not None]
    if len(batches) < len(lines):
        damaged = len(lines) - len(batches)
        log.error("usage batches on disk are damaged and lost", extra={"f": {"file": path, "lines": damaged}})
    return batches


def _parse(line: bytes) -> Batch | None:
    match = _LINE.match(line)
    if match is None or int(match[1], 16) != zlib.crc32(match[2]):
        return None
    try:
        return Batch(int(json.loads(match[2])["seq"]), match[2], saved=True, exposed=True)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
