"""Support access: an operator acts in an organization for a while, because an owner of it said so.

    consent    an owner gives it, for minutes and a scope (`read` or `write`), and may withdraw it at any moment
    session    an operator begins it under a live consent, with a reason; it has a token of its own

There is no other way for an operator into an organization, and none at all to act as one of its people. The token
is good for one organization and for what ``access.SUPPORT_PERMISSIONS`` lists, in which there is no key, member, owner or
invoice: nothing that would outlast it. It ends with the consent, with the operator's grant, and with the sign-in session in
which it was begun; each request looks at all of them. Each request is a row in the organization's audit log, under the operator's
id, beside the rows of what it changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final, Literal

import sqlalchemy as sa

from portico.control.access import SUPPORT_PERMISSIONS, Caller, in_standing
from portico.control.audit import service as audit
from portico.control.identity import operators, store
from portico.control.identity.leak_store import people
from portico.control.identity.letters import Letters
from portico.control.identity.org_standing import standing_of
from portico.control.identity.standing import hold
from portico.control.identity.tables import support_consents, support_sessions
from portico.errors import Problem
from portico.kit import pages
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx
from portico.kit.ids import digest, new_id, new_token
from portico.settings import ApiSettings

Scope = Literal["read", "write"]
# Owners who are mailed at most when an operator comes in.
_MAX_MAILS: Final = 20

_c, _s = support_consents.c, support_sessions.c

# Everything that a token stands on, in one look-up.
_BY_DIGEST = """
SELECT s.id, s.organization_id, s.operator_id, s.ended_at, s.expires_at, c.scope, c.withdrawn_at,
       o.suspended_at, o.delete_after, u.disabled_at, g.id AS operator_grant, g.expires_at AS operator_until,
       i.ended_at AS sign_in_ended_at, i.expires_at AS sign_in_until
FROM support_sessions s
JOIN support_consents c ON c.id = s.consent_id
JOIN organizations o ON o.id = s.organization_id
LEFT JOIN users u ON u.id = s.operator_id
LEFT JOIN operator_grants g ON g.user_id = s.operator_id AND g.revoked_at IS NULL
LEFT JOIN sign_in_sessions i ON i.id = s.sign_in_session
WHERE s.digest = $1
"""


async def authenticate(reader: Reader, token: str, now: datetime) -> Caller:
    """The caller behind a support token. Raises ``auth.key_invalid`` for none, ``auth.support_ended`` for one that is over."""
    row = await reader.raw.fetchrow(_BY_DIGEST, digest(token))
    if row is None:
        raise Problem("auth.key_invalid")
    over = row["ended_at"] or row["withdrawn_at"] or row["disabled_at"] or row["sign_in_ended_at"]
    if over is not None or row["expires_at"] <= now or row["sign_in_until"] is None or row["sign_in_until"] <= now:
        raise Problem("auth.support_ended")
    if not operators.holds(row["operator_grant"], row["operator_until"], now):
        raise Problem("auth.support_ended", "the operator's grant has ended")
    standing = standing_of(row)
    return Caller(
        "support",
        row["id"],
        row["organization_id"],
        in_standing(SUPPORT_PERMISSIONS[row["scope"]], standing),
        standing=standing,
        acting_operator=row["operator_id"],
        expires_at=row["expires_at"],
    )


class Support:
    """The verbs on support access."""

    def __init__(self, settings: ApiSettings, clock: Clock, letters: Letters) -> None:
        self._settings = settings
        self._letters = letters
        self._clock = clock

    # -- for the organization

    async def consent(self, tx: Tx, caller: Caller, minutes: int, scope: Scope, reason: str | None) -> dict[str, Any]:
        """Let operators in for ``minutes``. Raises ``support.minutes_invalid``, ``support.limit_reached``."""
        limit = self._settings.support_access_max_minutes
        if minutes > limit:
            raise Problem("support.minutes_invalid", f"support access lasts at most {limit} minutes", limit=limit)
        now = self._clock.wall()
        await hold(tx, caller, ("owners:write",))
        live = sa.select(sa.func.count()).where(_c.organization_id == caller.org, _live(now))
        most = self._settings.support_consents_per_organization
        if await tx.scalar(live) >= most:
            raise Problem("support.limit_reached", f"an organization has at most {most} live consents", limit=most)
        row = {
            "id": new_id("sac"),
            "organization_id": caller.org,
            "scope": scope,
            "reason": reason,
            "given_by": caller.id,
            "created_at": now,
            "expires_at": now + timedelta(minutes=minutes),
        }
        await tx.execute(sa.insert(support_consents).values(**row))
        facts = {"scope": scope, "minutes": minutes, "reason": reason}
        await audit.record(tx, caller, "support_access.consent", str(row["id"]), details=facts)
        return _render(await self._consent(tx, caller.org, str(row["id"])), [], now)

    async def listing(self, reader: Reader, caller: Caller, page: pages.PageRequest) -> dict[str, Any]:
        """A page of the organization's consents, newest first, each with the sessions that operators began under it."""
        before = page.after[0] if page.after else None
        query = sa.select(support_consents).where(_c.organization_id == caller.org)
        if before is not None:
            query = query.where(_c.id < before)
        rows = await reader.fetch_all(query.order_by(_c.id.desc()).limit(page.limit + 1))
        begun = await self._sessions(reader, [row.id for row in rows])
        now = self._clock.wall()
        document: dict[str, Any] = pages.listing(
            rows, page.limit, lambda row: (row.id,), lambda row: _render(row, begun.get(row.id, []), now)
        )
        return document

    async def withdraw(self, tx: Tx, caller: Caller, consent: str) -> None:
        """End a consent and what was begun under it, at once; twice is no error. Raises ``request.not_found``."""
        row = await self._consent(tx, caller.org, consent, lock=True)
        if row.withdrawn_at is not None:
            return
        now = self._clock.wall()
        values = {"withdrawn_at": now, "withdrawn_by": caller.id}
        await tx.execute(sa.update(support_consents).where(_c.id == consent).values(**values))
        ended = await _end(tx, _s.consent_id == consent, now)
        await audit.record(tx, caller, "support_access.withdraw", consent, details={"sessions": ended})

    # -- for operators

    async def begin(self, tx: Tx, caller: Caller, organization: str, reason: str) -> dict[str, Any]:
        """A session in ``organization`` under the consent of it that lasts longest, the wider scope first; with its token, once.

        Raises ``request.not_found``, ``operator.person_required``, ``support.not_consented``.
        """
        if await store.organization(tx, organization) is None:
            raise Problem("request.not_found", "there is no such organization")
        if caller.kind != "person":
            raise Problem("operator.person_required")
        now = self._clock.wall()
        best = (
            sa.select(support_consents)
            .where(_c.organization_id == organization, _live(now))
            .order_by(_c.scope.desc(), _c.expires_at.desc())
            .limit(1)
            .with_for_update()  # a withdrawal is before or after
        )
        consent = await tx.fetch_one(best)
        if consent is None:
            raise Problem("support.not_consented")
        text, longest = new_token("sup"), timedelta(seconds=self._settings.support_session_seconds)
        row = {
            "id": new_id("sup"),
            "consent_id": consent.id,
            "organization_id": organization,
            "operator_id": caller.id,
            "sign_in_session": caller.session_id,
            "digest": digest(text),
            "reason": reason,
            "created_at": now,
            "expires_at": min(now + longest, consent.expires_at),
        }
        await tx.execute(sa.insert(support_sessions).values(**row))
        facts = {"consent": consent.id, "scope": consent.scope, "reason": reason}
        await operators.record(tx, caller, "support_access.begin", str(row["id"]), facts, organization)
        await self._tell(tx, row, consent.scope)
        return {**_shown(row), "organization": organization, "scope": consent.scope, "token": text}

    async def _tell(self, tx: Tx, session: dict[str, Any], scope: str) -> None:
        """Mail the owners."""
        organization = session["organization_id"]
        for owner in await people(tx, organization, None, self._clock.wall(), _MAX_MAILS):
            key = f"support.begun:{session['id']}:{owner.id}"
            await self._letters.support_begun(tx, owner.email, session, owner.organization_name, scope, key)

    async def end(self, tx: Tx, caller: Caller, session: str) -> None:
        """End a session that this operator began, or any by the operator key. Raises ``request.not_found``."""
        mine = _s.id == session if caller.kind == "operator" else sa.and_(_s.id == session, _s.operator_id == caller.id)
        row = await tx.fetch_one(sa.select(support_sessions).where(mine))
        if row is None:
            raise Problem("request.not_found", "there is no such support session")
        if await _end(tx, _s.id == session, self._clock.wall()):
            await operators.record(tx, caller, "support_access.end", session, {}, row.organization_id)

    @staticmethod
    async def _consent(reader: Reader, organization: str, consent: str, *, lock: bool = False) -> Any:
        query = sa.select(support_consents).where(_c.organization_id == organization, _c.id == consent)
        row = await reader.fetch_one(query.with_for_update() if lock else query)
        if row is None:
            raise Problem("request.not_found", "there is no such consent")
        return row

    @staticmethod
    async def _sessions(reader: Reader, consents: Sequence[str]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        query = sa.select(support_sessions).where(_s.consent_id.in_(consents)).order_by(_s.id)
        for row in await reader.fetch_all(query):
            found.setdefault(row.consent_id, []).append(row._mapping)
        return found


def _live(now: datetime) -> sa.ColumnElement[bool]:
    return sa.and_(_c.withdrawn_at.is_(None), _c.expires_at > now)


async def _end(tx: Tx, which: sa.ColumnElement[bool], now: datetime) -> int:
    statement = sa.update(support_sessions).where(which, _s.ended_at.is_(None), _s.expires_at > now)
    return int((await tx.execute(statement.values(ended_at=now))).rowcount)


def _shown(row: Any) -> dict[str, Any]:
    names = ("id", "operator_id", "reason", "created_at", "expires_at", "ended_at")
    return {name: row.get(name) for name in names}


def _render(row: Any, begun: Sequence[Any], now: datetime) -> dict[str, Any]:
    over = "withdrawn" if row.withdrawn_at is not None else "expired" if row.expires_at <= now else "live"
    names = ("id", "scope", "reason", "given_by", "created_at", "expires_at", "withdrawn_at")
    return {**{name: getattr(row, name) for name in names}, "state": over, "sessions": [_shown(one) for one in begun]}
