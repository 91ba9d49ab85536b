"""What changed between the start of a request and its act: a member who left, a session that ended, a new password."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.identity.tables import api_keys, device_codes, members, organizations, sign_in_sessions, users
from portico.kit.db import Database
from tests.control.conftest import PASSWORD, Account
from tests.control.identity.conftest import Join
from tests.control.identity.racing import overtaken
from tests.control.test_http import problem

KEY = {"kind": "agent", "name": "late"}


def _leave(account: Account) -> sa.Executable:
    return sa.delete(members).where(members.c.user_id == account.user)


def _disable(account: Account) -> sa.Executable:
    return sa.update(users).where(users.c.id == account.user).values(disabled_at=sa.func.now())


def _end(account: Account) -> sa.Executable:
    return (
        sa.update(sign_in_sessions)
        .where(sign_in_sessions.c.id == account.session)
        .values(ended_at=sa.func.now(), end_reason="test")
    )


async def _count(db: Database, table: sa.Table, **where: Any) -> int:
    async with db.read() as reader:
        query = sa.select(sa.func.count()).select_from(table).where(*(table.c[k] == v for k, v in where.items()))
        return int(await reader.scalar(query))


@pytest.mark.parametrize("change", [_disable, _end])
async def test_no_key_for_who_is_gone_meanwhile(owner: Account, db: Database, change: Any) -> None:
    answer = await overtaken(db, change(owner), act=owner.client.post("/v1/api-keys", json=KEY))
    problem(answer, 401, "auth.session_ended")
    assert await _count(db, api_keys, organization_id=owner.organization) == 0


async def test_no_key_from_a_key_that_is_revoked_meanwhile(owner: Account, db: Database, connect: Any) -> None:
    key = await owner.key("api")
    revoke = sa.update(api_keys).where(api_keys.c.id == key["id"]).values(revoked_at=sa.func.now())
    answer = await overtaken(db, revoke, act=connect(key["key"]).post("/v1/api-keys", json={**KEY, "kind": "api"}))
    problem(answer, 401, "auth.key_revoked")
    assert await _count(db, api_keys, organization_id=owner.organization) == 1


async def test_no_key_for_a_member_who_is_removed_meanwhile(owner: Account, db: Database) -> None:
    """As ``Members.remove`` does it: under the lock of the organization."""
    lock = sa.select(organizations.c.id).where(organizations.c.id == owner.organization).with_for_update(key_share=True)
    answer = await overtaken(db, lock, _leave(owner), act=owner.client.post("/v1/api-keys", json=KEY))
    problem(answer, 403, "auth.forbidden")
    assert await _count(db, api_keys, organization_id=owner.organization) == 0


async def test_no_session_for_who_is_disabled_meanwhile(
    owner: Account, client: httpx.AsyncClient, db: Database
) -> None:
    login = client.post("/v1/auth/login", json={"email": owner.email, "password": PASSWORD})
    problem(await overtaken(db, _disable(owner), act=login), 401, "auth.credentials_invalid")
    assert await _count(db, sign_in_sessions, user_id=owner.user) == 1


async def test_a_session_in_no_organization_for_who_is_removed_meanwhile(
    owner: Account, client: httpx.AsyncClient, db: Database
) -> None:
    login = client.post("/v1/auth/login", json={"email": owner.email, "password": PASSWORD})
    answer = await overtaken(db, _leave(owner), act=login)
    assert (answer.status_code, answer.json()["organization"]) == (200, None)


async def test_a_password_that_is_replaced_meanwhile_opens_nothing(
    owner: Account, client: httpx.AsyncClient, db: Database
) -> None:
    login = client.post("/v1/auth/login", json={"email": owner.email, "password": PASSWORD})
    other = sa.update(users).where(users.c.id == owner.user).values(password_hash="$argon2id$other")
    problem(await overtaken(db, other, act=login), 401, "auth.credentials_invalid")
    assert await _count(db, sign_in_sessions, user_id=owner.user) == 1


class TestDevices:
    async def _start(self, client: httpx.AsyncClient) -> dict[str, Any]:
        return dict((await client.post("/v1/auth/device", json={"hostname": "late"})).json())

    async def test_who_is_gone_meanwhile_approves_nothing(
        self, owner: Account, client: httpx.AsyncClient, db: Database
    ) -> None:
        code = (await self._start(client))["user_code"]
        approve = owner.client.post("/v1/auth/device/approve", json={"user_code": code})
        problem(await overtaken(db, _disable(owner), act=approve), 401, "auth.session_ended")
        assert await _count(db, device_codes, user_id=owner.user) == 0

    async def test_an_approver_who_may_make_no_keys_any_more_gives_none(
        self, owner: Account, client: httpx.AsyncClient, db: Database
    ) -> None:
        """A role of its own that connects agents and makes no keys: what an agent key may do is not above it."""
        role = {
            "name": "runner",
            "permissions": ["agent:connect", "organization:read", "tunnels:read", "tunnels:write"],
        }
        made = (await owner.client.post("/v1/org/roles", json=role)).json()
        started = await self._start(client)
        answer = await owner.client.post("/v1/auth/device/approve", json={"user_code": started["user_code"]})
        assert answer.status_code == 200
        async with db.transaction() as tx:
            await tx.execute(sa.update(members).where(members.c.user_id == owner.user).values(role=made["id"]))
        poll = {"device_code": started["device_code"]}
        problem(await client.post("/v1/auth/device/token", json=poll), 400, "device.denied")
        assert await _count(db, api_keys, organization_id=owner.organization) == 0


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", "members/{member}", {"role": "owner"}),
        ("DELETE", "members/{member}", None),
        ("POST", "transfer", {"user": "{member}"}),
        ("POST", "roles", {"name": "late", "permissions": ["tunnels:read"]}),
        ("PATCH", "", {"name": "Late"}),
        ("POST", "deletion", {"name": "Acme"}),
        ("POST", "support-access", {"minutes": 30}),
    ],
)
async def test_a_session_that_ends_meanwhile_changes_nothing_of_the_organization(
    owner: Account, join: Join, db: Database, method: str, path: str, body: Any
) -> None:
    member = (await join("viewer")).user
    if body is not None and "user" in body:
        body = {"user": member}
    address = f"/v1/org/{path.format(member=member)}".rstrip("/")
    held = sa.update(organizations).where(organizations.c.id == owner.organization).values(name="Acme")
    act = owner.client.request(method, address, json=body)
    problem(await overtaken(db, held, _end(owner), act=act), 401, "auth.session_ended")


async def test_who_is_no_owner_any_more_deletes_no_organization(owner: Account, db: Database) -> None:
    """Given another role between the start of the request and its act."""
    held = sa.update(organizations).where(organizations.c.id == owner.organization).values(name="Acme")
    lesser = sa.update(members).where(members.c.user_id == owner.user).values(role="viewer")
    act = owner.client.post("/v1/org/deletion", json={"name": "Acme"})
    problem(await overtaken(db, held, lesser, act=act), 403, "auth.forbidden")
    assert await _count(db, organizations, id=owner.organization, delete_after=None) == 1
