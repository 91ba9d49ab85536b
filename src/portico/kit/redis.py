"""Redis or Valkey as something that may be missing: short deadlines, and a pause after a failure.

    found = await redis.pipeline(lambda p: p.hmget(key, fields))      # None: not reachable just now

What it holds can be rebuilt, so no caller waits for it: a server that hangs costs one call ``timeout_seconds``; for the
next ``pause_seconds`` every call is skipped; then a single call tries again while the others still skip.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from typing import Any

import redis.asyncio as client
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as LostError
from redis.exceptions import RedisError

from portico.errors import Problem

log = logging.getLogger(__name__)


def _words(err: BaseException) -> str:
    """What to log of a failure; a refused certificate has its own words, under redis-py's and asyncio's."""
    cause: BaseException | None = err
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return f"its certificate is refused: {cause.verify_message}"
    return f"{type(err).__name__}: {err}"[:200]


class Redis:
    """One pool per process. ``close()`` at the end. Raises ``config.invalid`` for a URL that is none of Redis."""

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 0.05,
        pause_seconds: float = 1.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout, self._pause, self._monotonic = timeout_seconds, pause_seconds, monotonic
        self._skip_until = 0.0
        self._failing = False
        # One retry, on a lost connection only: a pooled connection to a server that was restarted costs nothing.
        try:
            self._client: client.Redis = client.Redis.from_url(
                url,
                decode_responses=True,
                socket_connect_timeout=timeout_seconds,
                retry=Retry(NoBackoff(), 1, supported_errors=(LostError,)),
                max_connections=64,
            )
        except ValueError:  # its text may have a part of the URL, and that may have the password
            form = "redis://[:password@]host:port/0, rediss://… or unix:///path"
            raise Problem("config.invalid", f"setting redis_url: expected {form}", key="redis_url") from None

    @property
    def available(self) -> bool:
        """Whether the last call succeeded (or none was made yet)."""
        return not self._failing

    async def pipeline(
        self, fill: Callable[[Pipeline], Any], *, atomic: bool = False, timeout_seconds: float | None = None
    ) -> list[Any] | None:
        """The answers to the commands that ``fill`` queues, sent together (``atomic``: as one transaction).

        ``None`` when the server is not reachable in time, or was not a moment ago.
        """
        now = self._monotonic()
        if self._failing:
            if now < self._skip_until:
                return None
            self._skip_until = now + self._pause  # this call probes; the others go on skipping
        try:
            async with asyncio.timeout(timeout_seconds or self._timeout):
                async with self._client.pipeline(transaction=atomic) as commands:
                    fill(commands)
                    answers: list[Any] = await commands.execute()
        except (RedisError, OSError, TimeoutError) as err:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # the client made a failure of it
                raise asyncio.CancelledError from err
            self._failed(err)
            return None
        if self._failing:
            log.info("redis is back")
        self._failing = False
        return answers

    def _failed(self, err: BaseException) -> None:
        if not self._failing:
            log.warning("redis is not reachable, going on without", extra={"f": {"error": _words(err)}})
        self._failing = True
        self._skip_until = self._monotonic() + self._pause

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()
