"""Sign-in sessions that live in a browser's cookie.

The cookie holds a secret of full entropy, of which the session's row keeps the digest: whoever reads the database signs
nobody in. A session has one secret at a time; signing in, and proving again who one is, makes a new one, so that a secret
that somebody planted or saw before is worth nothing after. It slides: each use puts its end off, until its bound.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from portico.control.access import Caller
from portico.control.identity import store
from portico.errors import Problem
from portico.kit.clock import Clock
from portico.kit.db import Database, Reader, Tx
from portico.kit.ids import check_token, digest, new_token
from portico.settings import ApiSettings

KIND = "bs"


class Browsers:
    """The verbs on browser sessions."""

    def __init__(self, settings: ApiSettings, db: Database, clock: Clock) -> None:
        self._settings = settings
        self._db = db
        self._clock = clock

    def first_end(self, now: datetime) -> datetime:
        """When a session that begins now ends, if it is not used."""
        s = self._settings
        return now + timedelta(seconds=min(s.browser_idle_seconds, s.browser_max_seconds))

    @staticmethod
    def new_secret() -> tuple[str, bytes]:
        """A new cookie and the digest that its session keeps."""
        secret = new_token(KIND)
        return secret, digest(secret)

    async def session(self, reader: Reader, secret: str) -> Any | None:
        """The session of a cookie with its person's standing, live or not; ``None`` when there is none."""
        return await store.session_by_cookie(reader, digest(secret)) if check_token(secret) == KIND else None

    async def keep_alive(self, row: Any) -> None:
        """Put the end of a session off that is in use. Writes at most once in ``browser_touch_seconds``."""
        now, s = self._clock.wall(), self._settings
        if now - row["last_used_at"] < timedelta(seconds=s.browser_touch_seconds):
            return
        ends = min(
            now + timedelta(seconds=s.browser_idle_seconds),
            row["created_at"] + timedelta(seconds=s.browser_max_seconds),
        )
        async with self._db.transaction() as tx:
            await store.touch_session(tx, row["id"], now, ends)

    async def renew(self, tx: Tx, caller: Caller) -> str:
        """A new cookie for the caller's session; the one before ends. Raises ``auth.session_ended``."""
        secret, kept = self.new_secret()
        if not await store.set_cookie(tx, caller.session_id or "", kept, self._clock.wall()):
            raise Problem("auth.session_ended")
        return secret
