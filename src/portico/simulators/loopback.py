"""A server of one's own on 127.0.0.1, for as long as it is entered."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from abc import ABC, abstractmethod
from types import TracebackType
from typing import ClassVar, Self


class Loopback(ABC):
    """Listens on ``port`` (0: a free one, known once it is entered); with a ``context`` by TLS. Connections end with it."""

    #: What a client that leaves or talks nonsense raises in :meth:`serve`: the end of its connection, and of nothing else.
    broken: ClassVar[tuple[type[Exception], ...]] = (asyncio.IncompleteReadError, asyncio.LimitOverrunError)

    def __init__(self, context: ssl.SSLContext | None = None, *, port: int = 0) -> None:
        self._context, self.port = context, port
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @abstractmethod
    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, which is closed afterwards."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError, ssl.SSLError, asyncio.CancelledError, *self.broken):
                await self.serve(reader, writer)
        finally:
            self._connections.discard(task)
            writer.close()
