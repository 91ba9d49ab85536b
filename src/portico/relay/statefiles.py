"""Files that must outlive a crash: replaced whole or not at all, and readable by the relay's user alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

PRIVATE = 0o600


def ensure_dir(path: Path) -> None:
    """The state folder, 0700 when this creates it (an operator's own mode is left as it is)."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def open_private(path: Path, flags: int) -> int:
    """A descriptor of ``path``, created 0600 when new, never inherited by children."""
    return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, PRIVATE)


def write_all(fd: int, data: bytes) -> None:
    """``os.write`` until all of it is written; raises ``OSError`` when the disk is full."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def replace(path: Path, data: bytes) -> None:
    """``path`` holds ``data`` after this, also after a power cut; before it, and on ``OSError``, the old content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        fd = open_private(temporary, os.O_WRONLY | os.O_TRUNC)
        try:
            os.fchmod(fd, PRIVATE)  # a leftover of another mode
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename or a new name in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


async def in_thread(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """``asyncio.to_thread`` that, when cancelled, first waits for the thread: two never write one file."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen; the caller is on its way out
        raise
