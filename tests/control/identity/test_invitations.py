"""Invitations: whom one may invite, what the mailed token is good for, and for how long."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.identity import jobs
from portico.control.identity.tables import invitations, users
from portico.kit import outbox
from portico.kit.db import Database
from portico.kit.ids import new_token
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings
from tests.control.conftest import PASSWORD, Account, MovableClock
from tests.control.identity.conftest import Join
from tests.control.identity.test_members import audited, give, make_role
from tests.control.test_http import problem

NEW = "new.person@example.com"


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    object.__setattr__(settings, "max_open_invitations_per_organization", 6)
    return settings


async def invite(by: Account, email: str = NEW, role: str = "developer") -> httpx.Response:
    return await by.client.post("/v1/org/invitations", json={"email": email, "role": role})


async def invited(by: Account, email: str = NEW, role: str = "developer") -> str:
    answer = await invite(by, email, role)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def tokens(app: Any, email: str) -> list[str]:
    """The tokens mailed to an address, in order."""
    sealer: Sealer = app.state.sealer
    async with app.state.db.read() as reader:
        mine = outbox.messages.c.recipient == email
        rows = await reader.fetch_all(sa.select(outbox.messages).where(mine).order_by(outbox.messages.c.id))
    bodies = [sealer.open("outbox message", row.id, row.sealed_body).decode() for row in rows]
    return [found[0] for body in bodies if (found := re.search(r"tnl_inv_\w+", body))]


async def accept(by: Account, token: str) -> httpx.Response:
    return await by.client.post("/v1/auth/invitations/accept", json={"token": token})


async def join_new(client: httpx.AsyncClient, token: str) -> httpx.Response:
    return await client.post("/v1/auth/invitations/register", json={"token": token, "password": PASSWORD})


async def roles(account: Account) -> dict[str, str]:
    rows = (await account.client.get("/v1/org/members")).json()["data"]
    return {row["user"]["email"]: row["role"] for row in rows}


class TestNewPeople:
    async def test_register_with_the_mailed_token(
        self, app: Any, owner: Account, client: httpx.AsyncClient, connect: Any, db: Database
    ) -> None:
        address = "first@example.com"
        await invited(owner, address)
        (token,) = await tokens(app, address)
        seen = (await client.post("/v1/auth/invitations/look", json={"token": token})).json()
        assert (seen["organization"], seen["email"]) == ({"id": owner.organization, "name": "Acme"}, address)
        assert (seen["role_name"], seen["invited_by"]) == ("developer", owner.email)
        answer = await join_new(client, token)
        assert (answer.status_code, answer.json()["organization"]["id"]) == (201, owner.organization)
        person = connect(answer.json()["access_token"])
        assert len((await person.get("/v1/organizations")).json()["data"]) == 1
        assert await roles(owner) == {owner.email: "owner", address: "developer"}
        async with db.read() as reader:
            verified = sa.select(users.c.email_verified_at.is_not(None)).where(users.c.email == address)
            assert await reader.scalar(verified) is True
        for again in (
            await join_new(client, token),
            await person.post("/v1/auth/invitations/accept", json={"token": token}),
        ):
            problem(again, 404, "invitation.invalid")
        row = (await audited(owner, "invitation.accept"))[0]
        assert row["details"]["role"] == "developer" and row["details"]["invited_by"] == owner.user
        assert token not in (await owner.client.get("/v1/audit")).text

    async def test_an_account_that_is_there_is_told_so_only_by_the_token(
        self, app: Any, owner: Account, stranger: Account, client: httpx.AsyncClient
    ) -> None:
        known, unknown = await invite(owner, stranger.email), await invite(owner, "nobody.here@example.com")
        assert known.json().keys() == unknown.json().keys() and known.status_code == unknown.status_code == 201
        (token,) = await tokens(app, stranger.email)
        problem(await join_new(client, token), 409, "auth.email_taken")
        assert (await accept(stranger, token)).status_code == 200

    async def test_a_weak_password_uses_nothing_up(self, app: Any, owner: Account, client: httpx.AsyncClient) -> None:
        await invited(owner, "weak@example.com")
        (token,) = await tokens(app, "weak@example.com")
        body = {"token": token, "password": "1234567890"}
        problem(await client.post("/v1/auth/invitations/register", json=body), 400, "auth.password_weak")
        assert (await join_new(client, token)).status_code == 201

    async def test_two_at_once_make_one_account(self, app: Any, owner: Account, client: httpx.AsyncClient) -> None:
        await invited(owner, "twice@example.com")
        (token,) = await tokens(app, "twice@example.com")
        answers = await asyncio.gather(*(join_new(client, token) for _ in range(3)))
        assert sorted(a.status_code for a in answers)[0] == 201
        assert sum(a.status_code == 201 for a in answers) == 1
        assert {a.json()["code"] for a in answers if a.status_code != 201} <= {"invitation.invalid", "auth.email_taken"}


class TestAccept:
    async def test_as_the_person_it_was_sent_to(
        self, app: Any, owner: Account, stranger: Account, register: Any, connect: Any
    ) -> None:
        third = await register()
        await invited(owner, stranger.email.upper())
        (token,) = await tokens(app, stranger.email)
        problem(await accept(third, token), 403, "invitation.other_address")
        assert owner.email not in (await accept(third, token)).text
        assert (await accept(stranger, token)).json() == {"id": owner.organization, "name": "Acme"}
        problem(await accept(stranger, token), 404, "invitation.invalid")
        problem(await invite(owner, stranger.email), 409, "invitation.member")
        there = await stranger.client.post("/v1/auth/switch", json={"organization": owner.organization})
        who = (await connect(there.json()["access_token"]).get("/v1/whoami")).json()
        assert (who["organization"]["id"], "tunnels:write" in who["permissions"]) == (owner.organization, True)

    async def test_two_at_once_are_one(self, app: Any, owner: Account, stranger: Account) -> None:
        await invited(owner, stranger.email)
        (token,) = await tokens(app, stranger.email)
        answers = await asyncio.gather(*(accept(stranger, token) for _ in range(4)))
        assert sorted(a.status_code for a in answers)[:2] == [200, 404]
        assert len(await audited(owner, "invitation.accept")) == 1

    async def test_noise_and_other_tokens(self, owner: Account, stranger: Account, client: httpx.AsyncClient) -> None:
        for token in ("x", new_token("inv"), new_token("rt"), stranger.refresh):
            problem(await accept(stranger, token), 404, "invitation.invalid")
            problem(await join_new(client, token), 404, "invitation.invalid")
            problem(await client.post("/v1/auth/invitations/look", json={"token": token}), 404, "invitation.invalid")

    async def test_after_it_has_expired(
        self, app: Any, owner: Account, stranger: Account, clock: MovableClock, connect: Any, db: Database
    ) -> None:
        first = await invited(owner, stranger.email)
        (token,) = await tokens(app, stranger.email)
        async with db.transaction() as tx:
            gone = sa.update(invitations).where(invitations.c.id == first).values(expires_at=clock.wall())
            await tx.execute(gone)
        problem(await accept(stranger, token), 404, "invitation.invalid")
        assert (await owner.client.get("/v1/org/invitations")).json()["data"][0]["expired"] is True
        second = await invited(owner, stranger.email)
        assert [row["id"] for row in (await owner.client.get("/v1/org/invitations")).json()["data"]] == [second]

    async def test_a_member_by_another_way(self, app: Any, owner: Account, stranger: Account, db: Database) -> None:
        await invited(owner, stranger.email)
        (token,) = await tokens(app, stranger.email)
        async with db.transaction() as tx:
            add = "INSERT INTO members (organization_id, user_id, role) VALUES (:o, :u, 'viewer')"
            await tx.execute(sa.text(add), {"o": owner.organization, "u": stranger.user})
        problem(await accept(stranger, token), 409, "invitation.member")

    async def test_not_beyond_what_the_plan_has_room_for(
        self, app: Any, owner: Account, stranger: Account, db: Database
    ) -> None:
        await invited(owner, stranger.email)
        (token,) = await tokens(app, stranger.email)
        async with db.transaction() as tx:
            full = "INSERT INTO plan_overrides (organization_id, name, value) VALUES (:o, 'members', '1')"
            await tx.execute(sa.text(full), {"o": owner.organization})
        problem(await accept(stranger, token), 403, "quota.exceeded")
        async with db.transaction() as tx:
            await tx.execute(
                sa.text("DELETE FROM plan_overrides WHERE organization_id = :o"), {"o": owner.organization}
            )
        assert (await accept(stranger, token)).status_code == 200

    async def test_not_while_the_organization_is_about_to_be_deleted(
        self, app: Any, owner: Account, stranger: Account
    ) -> None:
        await invited(owner, stranger.email)
        (token,) = await tokens(app, stranger.email)
        await owner.client.post("/v1/org/deletion", json={"name": "Acme"})
        problem(await accept(stranger, token), 403, "organization.deleting")
        problem(await invite(owner, "late@example.com"), 403, "organization.deleting")


class TestWhoInvites:
    async def test_nobody_gives_more_than_he_has(self, owner: Account, stranger: Account, join: Join) -> None:
        admin, viewer = await join("admin"), await join("viewer")
        problem(await invite(admin, role="owner"), 403, "auth.forbidden")
        problem(await invite(viewer, role="viewer"), 403, "auth.forbidden")
        theirs = await make_role(stranger, "tunnels:read")
        problem(await invite(owner, role=theirs), 404, "request.not_found")
        assert (await invite(owner, role="owner")).status_code == 201
        refused = [row for row in await audited(owner, "invitation.create") if row["outcome"] == "refused"]
        assert {row["details"]["permission"] for row in refused if "permission" in row["details"]} == {
            "owners:write", "members:write",
        }  # fmt: skip

    @pytest.mark.parametrize("change", ["removed", "demoted", "disabled"])
    async def test_an_invitation_falls_with_whoever_made_it(
        self, app: Any, owner: Account, stranger: Account, join: Join, db: Database, change: str
    ) -> None:
        admin = await join("admin")
        await invited(admin, stranger.email, "admin")
        (token,) = await tokens(app, stranger.email)
        if change == "removed":
            await owner.client.delete(f"/v1/org/members/{admin.user}")
            assert (await owner.client.get("/v1/org/invitations")).json()["data"] == []
        elif change == "demoted":
            await give(owner, admin, "developer")
        else:
            async with db.transaction() as tx:
                await tx.execute(sa.update(users).where(users.c.id == admin.user).values(disabled_at=sa.func.now()))
        problem(await accept(stranger, token), 404, "invitation.invalid")
        assert stranger.email not in await roles(owner)

    async def test_a_role_that_is_deleted_takes_its_invitations_with_it(
        self, app: Any, owner: Account, stranger: Account
    ) -> None:
        role = await make_role(owner, "tunnels:read")
        await invited(owner, stranger.email, role)
        (token,) = await tokens(app, stranger.email)
        assert (await owner.client.delete(f"/v1/org/roles/{role}")).status_code == 204
        problem(await accept(stranger, token), 404, "invitation.invalid")
        assert (await audited(owner, "role.delete"))[0]["details"]["invitations"] == 1

    async def test_once_for_each_address_and_few_at_once(self, owner: Account) -> None:
        answers = await asyncio.gather(*(invite(owner, "same@example.com") for _ in range(3)))
        assert sorted(a.status_code for a in answers) == [201, 409, 409]
        assert {a.json()["code"] for a in answers if a.status_code == 409} == {"invitation.exists"}
        more = await asyncio.gather(*(invite(owner, f"p{i}@example.com") for i in range(7)))
        assert sorted(a.status_code for a in more) == [201] * 5 + [409] * 2
        problem(next(a for a in more if a.status_code == 409), 409, "invitation.limit_reached")
        problem(await invite(owner, "ä@example.com"), 400, "invitation.address_invalid")


class TestOpenOnes:
    async def test_are_listed_sent_again_and_revoked(
        self, app: Any, owner: Account, stranger: Account, client: httpx.AsyncClient
    ) -> None:
        address = "again@example.com"
        first = await invited(owner, address)
        path = f"/v1/org/invitations/{first}"
        sent = await owner.client.post(f"{path}/resend")
        assert (sent.status_code, sent.json()["id"]) == (200, first)
        old, new = await tokens(app, address)
        problem(await join_new(client, old), 404, "invitation.invalid")
        for _ in range(3):
            assert (await owner.client.post(f"{path}/resend")).status_code == 200
        limited = await owner.client.post(f"{path}/resend")
        problem(limited, 429, "auth.throttled")
        newest = (await tokens(app, address))[-1]
        assert newest != new and int(limited.headers["retry-after"]) > 0
        assert (await owner.client.delete(path)).status_code == 204
        problem(await join_new(client, newest), 404, "invitation.invalid")
        for method, where in (("DELETE", path), ("POST", f"{path}/resend")):
            problem(await owner.client.request(method, where), 404, "request.not_found")

    async def test_of_another_organization_are_not_there(self, owner: Account, stranger: Account) -> None:
        mine = await invited(owner)
        for method, path in (("DELETE", mine), ("POST", f"{mine}/resend")):
            answer = await stranger.client.request(method, f"/v1/org/invitations/{path}")
            problem(answer, 404, "request.not_found")
        assert (await stranger.client.get("/v1/org/invitations")).json()["data"] == []
        assert [row["id"] for row in (await owner.client.get("/v1/org/invitations")).json()["data"]] == [mine]

    async def test_an_admin_does_not_undo_what_an_owner_offered(self, owner: Account, join: Join) -> None:
        admin = await join("admin")
        offered = await invited(owner, role="owner")
        problem(await admin.client.delete(f"/v1/org/invitations/{offered}"), 403, "auth.forbidden")
        problem(await admin.client.post(f"/v1/org/invitations/{offered}/resend"), 403, "auth.forbidden")

    async def test_are_forgotten_in_the_end(
        self, app: Any, owner: Account, clock: MovableClock, settings: ApiSettings, db: Database
    ) -> None:
        made = await invited(owner)
        for days, left in ((settings.invitation_days + 1, 1), (settings.invitation_keep_days, 0)):
            clock.advance(days * 86_400)
            await jobs.housekeeping(app.state.identity)
            async with db.read() as reader:
                count = sa.select(sa.func.count()).where(invitations.c.id == made)
                assert await reader.scalar(count) == left
