"""Sign-in sessions: how they begin, and the tokens that they live by.

Whatever proved who somebody is (a password, a code after it, a passkey), the session begins here: under a lock on the person,
who is looked at again. A removal, a disabling or a new password that came in between is seen, or waits and then ends the
session with the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity import account_store, roster, store, tokens
from portico.control.identity.account_store import Person
from portico.control.identity.browsers import Browsers
from portico.control.identity.signing_keys import SigningKeys
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx
from portico.kit.ids import digest, new_id, new_token
from portico.settings import ApiSettings


@dataclass(frozen=True, slots=True)
class SignedIn:
    """What a successful sign-in gives. Without an organization: for a person who belongs to none."""

    user_id: str
    email: str
    organization_id: str | None
    organization_name: str | None
    session_id: str
    access_token: str  # empty for a session that lives in a cookie
    refresh_token: str | None
    expires_in: int
    cookie: str | None = None


@dataclass(frozen=True, slots=True)
class Client:
    """What a sign-in session remembers of the program that opened it."""

    address: str | None
    user_agent: str | None = None


class SignIns:
    """Begins sign-in sessions and renews their tokens."""

    def __init__(self, settings: ApiSettings, clock: Clock, signing_keys: SigningKeys, browsers: Browsers) -> None:
        self._settings = settings
        self._clock = clock
        self._signing_keys = signing_keys
        self._browsers = browsers

    async def hold(self, tx: Tx, user_id: str) -> Person | None:
        """The person, as they are until the transaction ends; ``None`` for who is disabled."""
        return await account_store.hold_person(tx, user_id)

    async def open(
        self,
        tx: Tx,
        person: Person,
        client: Client,
        methods: Sequence[str],
        *,
        caller: Caller | None = None,
        cookie: bool = False,
    ) -> SignedIn:
        """Begin a session of a person who is held. ``caller`` is given when the sign-in is an act of its own, to be audited.

        ``cookie`` sessions live in a browser and have no tokens.
        """
        now = self._clock.wall()
        session = new_id("ses")
        longest = now + timedelta(seconds=self._settings.sign_in_max_seconds)
        expires = self._browsers.first_end(now) if cookie else longest
        secret, kept = self._browsers.new_secret() if cookie else (None, None)
        row = {
            "id": session,
            "user_id": person.id,
            "organization_id": person.organization_id,
            "user_agent": (client.user_agent or "")[:200] or None,
            "address": client.address,
            "authenticated_at": now,
            "methods": list(methods),
            "created_at": now,
            "last_used_at": now,
            "expires_at": expires,
            "cookie_digest": kept,
        }
        await store.insert_session(tx, row)
        if person.organization_id is not None:
            await roster.used(tx, person.organization_id, person.id, now)
        refresh = None if cookie else await self.refresh_token(tx, session, now, expires)
        if caller is not None:
            facts = {"session": session, "methods": list(methods)}
            await audit.record(tx, caller, "user.login", person.id, details=facts, organization=person.organization_id)
        access = "" if cookie else await self.access_token(tx, person.id, session, person.organization_id, now)
        return SignedIn(
            person.id,
            person.email,
            person.organization_id,
            person.organization_name,
            session,
            access,
            refresh,
            self._settings.access_token_seconds,
            secret,
        )

    async def access_token(
        self, reader: Reader, user: str, session: str, organization: str | None, now: datetime
    ) -> str:
        """A new access token of a session."""
        signer = await self._signing_keys.current_signer(reader)
        claims = tokens.AccessClaims(user, session, organization)
        return tokens.issue(signer, claims, now.timestamp(), self._settings.access_token_seconds)

    async def refresh_token(self, tx: Tx, session: str, now: datetime, latest: datetime) -> str:
        """A new refresh token of a session, good once and not after ``latest``."""
        token = new_token("rt")
        expires = min(now + timedelta(seconds=self._settings.refresh_token_seconds), latest)
        row = {"digest": digest(token), "session_id": session, "created_at": now, "expires_at": expires}
        await store.insert_refresh_token(tx, row)
        return token
