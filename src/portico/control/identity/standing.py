"""What a caller may do at this moment, for acts whose result outlives the request: keys, approvals, members, deletions.

The caller of a request was identified when it began. Between then and the act their session can end, their key be revoked, they
can lose a role, leave or be disabled. So such an act looks again, under locks that those changes take too: one of the two sees
the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from portico.control.access import Caller
from portico.control.identity import account_store, roster, store
from portico.control.identity.org_standing import check_standing, standing
from portico.control.identity.tables import api_keys, sign_in_sessions, users
from portico.errors import Problem
from portico.kit.db import Tx


async def hold(tx: Tx, caller: Caller, permissions: Sequence[str], *, any_standing: bool = False) -> frozenset[str]:
    """What the caller may do, and goes on to until the transaction ends. ``any_standing``: of the organization, too.

    Raises ``auth.session_ended`` or ``auth.key_revoked`` for a credential that is none any more, ``auth.forbidden`` for one that
    holds none of ``permissions``, and as ``check_standing``. Locks the organization, then the person, then the credential.
    """
    await store.lock_organization(tx, caller.org)
    stands = await standing(tx, caller.org)
    if not any_standing:
        check_standing(stands)
    if not await _stands(tx, caller):
        raise Problem("auth.session_ended" if caller.kind == "person" else "auth.key_revoked")
    role = await roster.role_of(tx, caller.org, caller.user_id or "")
    held = caller.permissions & role.permissions if role is not None else frozenset[str]()
    if held.isdisjoint(permissions):
        raise Problem("auth.forbidden", f"this credential lacks {permissions[-1]}", permission=permissions[-1])
    return held


async def hold_person(tx: Tx, caller: Caller) -> Any:
    """The person of a sign-in session, whole; both are held until the transaction ends. Raises ``auth.session_ended``.

    For what a session changes of its person's ways in: whoever ends the session, so that it may not, comes before or after.
    """
    person = await account_store.lock_user(tx, caller.user_id or "")
    if person is None or await account_store.lock_session(tx, caller.session_id or "") is None:
        raise Problem("auth.session_ended")
    return person


async def _stands(tx: Tx, caller: Caller) -> bool:
    person = sa.select(users.c.id).where(users.c.id == caller.user_id, users.c.disabled_at.is_(None))
    if await tx.fetch_one(person.with_for_update(read=True)) is None:
        return False
    if caller.session_id is not None:
        t = sign_in_sessions
        credential = sa.select(t.c.id).where(t.c.id == caller.session_id, t.c.ended_at.is_(None))
    elif caller.kind in ("agent_key", "api_key"):
        credential = sa.select(api_keys.c.id).where(api_keys.c.id == caller.id, api_keys.c.revoked_at.is_(None))
    else:  # the person behind a device that they approved
        return True
    return await tx.fetch_one(credential.with_for_update(read=True)) is not None
