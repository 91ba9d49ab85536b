"""Erase the personal data of one person from every audit log (the operator's verb)."""

from __future__ import annotations

import sqlalchemy as sa

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity.tables import api_keys, users
from portico.errors import Problem
from portico.kit.db import Database, PoolLimits
from portico.settings import ApiSettings


async def erase_from_audit(settings: ApiSettings, user: str) -> int:
    """Erase what audit rows hold of ``user`` (``usr_…``) and of the keys they made; how many rows it were.

    Raises ``request.not_found`` for a person that there is not.
    """
    db = Database(settings.database_url.reveal(), PoolLimits(size=2), application="portico admin")
    try:
        async with db.read() as reader:
            email = await reader.scalar(sa.select(users.c.email).where(users.c.id == user))
            made = await reader.fetch_all(sa.select(api_keys.c.id).where(api_keys.c.user_id == user))
        if email is None:
            raise Problem("request.not_found", f"there is no person {user}")
        operator = Caller("operator", "installation", None)
        return await audit.erase_person(db, operator, user, [row.id for row in made], email)
    finally:
        await db.close()
