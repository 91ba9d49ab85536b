"""Checkpoints as files in a folder outside the database, so that whoever owns the database cannot take them back.

One file a checkpoint, ``FOLDER/<chain>/<seq>.json``, in the form of ``GET /v1/audit/checkpoints``, so that `portico audit
verify --checkpoints` reads it. A file is written once and never again: the folder can be a mount that takes new files
only. A checkpoint counts as stored when its file is on the disk, so one that could not be written is written later. A file
that is there with other content was not written for this checkpoint: that is said, and nothing is overwritten.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from portico.control.audit import checkpoints
from portico.errors import Problem
from portico.kit import jwt
from portico.kit.db import Database

log = logging.getLogger(__name__)

# Checkpoints that one round writes before it notes that they are stored.
_BATCH: Final = 200


async def store(db: Database, folder: Path, now: datetime) -> int:
    """Write every checkpoint that is not stored yet; how many it were. Raises ``OSError``, ``audit.broken``."""
    total, count = 0, _BATCH
    while count == _BATCH:
        async with db.read() as reader:
            rows = await checkpoints.unstored(reader, _BATCH)
            raw = await checkpoints.keys(reader, (row.kid for row in rows)) if rows else {}
        stored, wrong = await asyncio.to_thread(_write_all, folder, rows, raw)
        async with db.transaction() as tx:
            await checkpoints.note_stored(tx, stored, now)
        if wrong is not None:
            raise wrong
        count = len(rows)
        total += count
    return total


def _write_all(folder: Path, rows: Sequence[Any], raw: dict[str, bytes]) -> tuple[list[Any], Problem | None]:
    """Those that are stored now, and what is wrong with the first that cannot be."""
    stored, wrong = [], None
    for row in rows:
        try:
            _write(folder / row.chain / f"{row.seq:012d}.json", document(row, raw))
            stored.append(row)
        except Problem as problem:
            wrong = wrong or problem
    return stored, wrong


def document(row: Any, raw: dict[str, bytes]) -> bytes:
    """What the file of a checkpoint holds."""
    one = {"seq": row.seq, "created_at": row.created_at.isoformat(), "kid": row.kid, "token": row.token}
    keys = [jwt.public_jwk(row.kid, raw[row.kid])]
    whole = {"data": [one], "next_cursor": None, "anchor": None, "keys": keys}
    return json.dumps(whole, separators=(",", ":")).encode() + b"\n"


def _write(path: Path, content: bytes) -> None:
    """Make the file, whole or not at all, and have it and its name on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(part, path)  # unlike a rename, never over a file that is there
    except FileExistsError:
        if path.read_bytes() != content:
            log.error("a stored checkpoint is not what was signed", extra={"f": {"file": str(path)}})
            raise Problem("audit.broken", f"{path} holds another checkpoint than the one that was signed") from None
    finally:
        part.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
