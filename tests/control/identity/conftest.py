"""People who belong to one organization."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from portico.control.identity.tables import members, sign_in_sessions
from portico.kit.db import Database
from tests.control.conftest import PASSWORD, Account

Join = Callable[[str], Awaitable[Account]]


@pytest.fixture
def join(owner: Account, register: Any, db: Database, connect: Any) -> Join:
    """A person who is a member of ``owner``'s organization, in a role, and signed in there."""

    async def make(role: str) -> Account:
        made: Account = await register()
        async with db.transaction() as tx:
            where = members.c.user_id == made.user
            await tx.execute(sa.update(members).where(where).values(organization_id=owner.organization, role=role))
            await tx.execute(sa.delete(sign_in_sessions).where(sign_in_sessions.c.user_id == made.user))
        answer = await connect().post("/v1/auth/login", json={"email": made.email, "password": PASSWORD})
        signed_in = answer.json()
        assert signed_in["organization"]["id"] == owner.organization, signed_in
        return replace(
            made,
            organization=owner.organization,
            access=signed_in["access_token"],
            refresh=signed_in["refresh_token"],
            session=signed_in["session"],
            client=connect(signed_in["access_token"]),
        )

    return make
