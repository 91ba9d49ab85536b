"""Credentials that a secret scanner found in public: ended at once, their people told.

    POST /v1/secret-scanning/github    [{"token", "type", "url", "source"}, …]  →  [{"token_hash", "token_type", "label"}, …]

GitHub's partner protocol (https://docs.github.com, "Secret scanning partner program"). The signature is over the raw body and
checked before anything is parsed. Every match is a transaction of its own, and ending what has ended is nothing: a report
that comes again, or whose answer was lost, changes nothing more. The answer says of each match whether the credential was
ever one of ours, and never whose, or whether it still worked.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity import account_store
from portico.control.identity import leak_store as store
from portico.control.identity.keys import Keys
from portico.control.identity.scanner_keys import ScannerKeys
from portico.control.notifications import channels, mail
from portico.control.notifications.mail import Mail
from portico.errors import Problem
from portico.kit import scrub
from portico.kit.clock import Clock
from portico.kit.db import Database, Tx
from portico.kit.ids import check_token, digest
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

Label = Literal["true_positive", "false_positive"]
# People who are told of one leaked key at most.
_MAX_MAILS: Final = 20
_TYPE_CHARS: Final = 200
_URL_CHARS: Final = 500


@dataclass(frozen=True, slots=True)
class Match:
    """One place where something like a credential was found."""

    token: str
    type: str
    url: str | None
    source: str | None

    @property
    def told(self) -> dict[str, Any]:
        """Where it was found, for an audit row: without anything that looks like a credential."""
        return {"reason": "leaked", "url": self.url, "source": self.source}


#: Ends the credential of a digest, in the transaction; whether there ever was one.
End = Callable[[Tx, Caller, bytes, Match], Awaitable[bool]]


class Leaks:
    """The verb on reports. ``ends`` has what ends a credential of each kind; other domains add theirs."""

    def __init__(
        self, settings: ApiSettings, db: Database, clock: Clock, sealer: Sealer, keys: Keys, scanner: ScannerKeys
    ) -> None:
        self._settings = settings
        self._db = db
        self._clock = clock
        self._sealer = sealer
        self._keys = keys
        self._scanner = scanner
        self.ends: dict[str, End] = {
            "agt": self._end_key,
            "sk": self._end_key,
            "opr": self._end_key,
            "rt": self._end_session,
            "bs": self._end_session,
            "sup": self._end_support,
        }

    async def report(self, caller: Caller, identifier: str, signature: str, body: bytes) -> list[dict[str, str]]:
        """End what was found; a label for each match, in order.

        Raises ``secret_scanning.not_configured``, ``secret_scanning.signature_invalid``, ``request.malformed``,
        ``request.too_large``, ``service.unavailable``.
        """
        if not self._scanner.configured:
            raise Problem("secret_scanning.not_configured")
        await self._scanner.check(identifier, signature, body)
        matches = read(body, self._settings.secret_scanning_max_matches)
        scanner = replace(caller, id="github-secret-scanning")
        known: dict[str, Label] = {}
        for match in matches:
            if match.token not in known:
                known[match.token] = "true_positive" if await self._end(scanner, match) else "false_positive"
        return [
            {
                "token_hash": hashlib.sha256(match.token.encode("utf-8", "surrogatepass")).hexdigest(),
                "token_type": match.type,
                "label": known[match.token],
            }
            for match in matches
        ]

    async def _end(self, caller: Caller, match: Match) -> bool:
        """Noise is known by its form and checksum, before the database is asked."""
        end = self.ends.get(check_token(match.token) or "")
        if end is None:
            return False
        async with self._db.transaction() as tx:
            return await end(tx, caller, digest(match.token), match)

    async def _end_key(self, tx: Tx, caller: Caller, found: bytes, match: Match) -> bool:
        row = await store.lock_key(tx, found)
        if row is None:
            return False
        now = self._clock.wall()
        if row.revoked_at is None and (row.expires_at is None or row.expires_at > now):
            await self._keys.end_all_of(tx, [row.id], "leaked")
            facts = {"kind": row.kind, "name": row.name, **match.told}
            await audit.record(tx, caller, "key.revoke", row.id, details=facts, organization=row.organization_id)
            await self._tell(tx, row, match)
        return True

    async def _end_session(self, tx: Tx, caller: Caller, found: bytes, match: Match) -> bool:
        """A refresh token, or a browser's cookie, ends the whole session that it belongs to."""
        row = await store.lock_session(tx, found)
        if row is None:
            return False
        if row.ended_at is None and row.expires_at > self._clock.wall():
            await account_store.drop_begun(tx, row.user_id)
            await store.end_session(tx, row.id, self._clock.wall())
            await audit.record(tx, caller, "session.end", row.id, details=match.told, organization=row.organization_id)
        return True

    async def _end_support(self, tx: Tx, caller: Caller, found: bytes, match: Match) -> bool:
        row = await store.lock_support(tx, found)
        if row is None:
            return False
        if row.ended_at is None and row.expires_at > self._clock.wall():
            await store.end_support(tx, row.id, self._clock.wall())
            facts = {"operator": row.operator_id, **match.told}
            await audit.record(
                tx, caller, "support_access.end", row.id, details=facts, organization=row.organization_id
            )
        return True

    async def _tell(self, tx: Tx, row: Any, match: Match) -> None:
        """Tell the organization's channels, and by mail its maker and the owners; of an operator key, the operators."""
        if row.organization_id is not None:
            told = {"key": row.id, "name": row.name, "prefix": row.prefix, "kind": row.kind, "url": match.url}
            await channels.notify(tx, self._sealer, row.organization_id, "key.leaked", told, f"key.leaked:{row.id}")
        for person in await store.people(tx, row.organization_id, row.user_id, self._clock.wall(), _MAX_MAILS):
            facts = {
                "name": row.name,
                "prefix": row.prefix,
                "kind": row.kind,
                "organization": person.organization_name,
                "made_at": row.created_at.strftime("%Y-%m-%d %H:%M UTC"),
                "url": match.url,
                "console": self._settings.api_url,
            }
            key = f"key.leaked:{row.id}:{person.id}"
            try:
                await mail.send(tx, self._sealer, Mail(key, person.email, "key.leaked", facts, row.organization_id))
            except ValueError:
                log.warning("an owner's address takes no mail", extra={"f": {"user": person.id}})


def read(body: bytes, most: int) -> list[Match]:
    """The matches of a report. Raises ``request.malformed`` or ``request.too_large``."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise Problem("request.malformed", "the body is not valid JSON") from None
    if not isinstance(document, list):
        raise Problem("request.malformed", "the body is not an array of matches")
    if len(document) > most:
        raise Problem("request.too_large", f"a report has at most {most} matches", limit=most)
    return [_match(item) for item in document]


def _match(item: Any) -> Match:
    token, kind = (item.get("token"), item.get("type")) if isinstance(item, dict) else (None, None)
    if not isinstance(token, str) or not isinstance(kind, str) or len(kind) > _TYPE_CHARS or not token:
        raise Problem("request.malformed", "a match has a token and a type, both text")
    try:
        kind.encode()
    except UnicodeEncodeError:
        raise Problem("request.malformed", "a type is text") from None
    return Match(token, kind, _url(item.get("url")), _source(item.get("source")))


def _url(found: Any) -> str | None:
    """A web address that may be shown, else ``None``."""
    if not isinstance(found, str) or len(found) > _URL_CHARS or not found.isascii() or not found.isprintable():
        return None
    try:
        parts = urlsplit(found)
    except ValueError:
        return None
    return scrub.text(found) if parts.scheme == "https" and parts.hostname and " " not in found else None


def _source(found: Any) -> str | None:
    return found if isinstance(found, str) and len(found) <= 64 and found.replace("_", "").isalnum() else None
