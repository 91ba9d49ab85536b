"""A stand-in for PostgreSQL's socket that counts round trips, and at one of them does something: the fault hook of the drills.

It reads the frontend's messages (protocol 3.0): a round trip is a simple query (``Q``) or a Sync (``S``). At the one with the
number ``at`` it calls ``act``: before the server has seen it, or when the server has answered and the client does not know.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

_numbers = itertools.count(1)


class StatementProxy:
    """``url`` leads to the same database through it."""

    def __init__(self, real: str, folder: Path, *, at: int, after: bool, act: Callable[[], None] | None = None) -> None:
        parts = urlsplit(real)
        self._socket = Path(parse_qs(parts.query)["host"][0]) / ".s.PGSQL.5432"
        self._folder = folder / f"p{next(_numbers)}"
        self.url = f"postgresql://postgres@{parts.path}?host={self._folder}"
        self.at, self.after, self.act = at, after, act or self.cut
        self.seen, self.fired = 0, False
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> StatementProxy:
        self._folder.mkdir()
        self._server = await asyncio.start_unix_server(self._connected, self._folder / ".s.PGSQL.5432")
        return self

    async def close(self) -> None:
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Reset every connection; new ones are taken."""
        for writer in self._open:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        other_reader, other_writer = await asyncio.open_unix_connection(self._socket)
        ends = {writer, other_writer}
        self._open |= ends
        swallow = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._up(reader, other_writer, swallow))
                group.create_task(self._down(other_reader, writer, swallow))
        except* (OSError, EOFError):
            pass
        finally:
            self._open -= ends
            for end in ends:
                end.transport.abort()
            self._tasks.discard(task)

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, swallow: asyncio.Event) -> None:
        head = await reader.readexactly(4)
        writer.write(head + await reader.readexactly(int.from_bytes(head, "big") - 4))
        while True:
            head = await reader.readexactly(5)
            body = await reader.readexactly(int.from_bytes(head[1:], "big") - 4)
            if head[:1] in b"QS":
                self.seen += 1
                if self.seen == self.at and not self.fired:
                    self.fired = True
                    if not self.after:
                        self.act()
                        raise EOFError
                    swallow.set()
            writer.write(head + body)

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, swallow: asyncio.Event) -> None:
        while True:
            head = await reader.readexactly(5)
            body = await reader.readexactly(int.from_bytes(head[1:], "big") - 4)
            if not swallow.is_set():
                writer.write(head + body)
            elif head[:1] == b"Z":
                self.act()
                raise EOFError
