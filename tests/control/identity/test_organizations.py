"""Several organizations of one person, and how an organization stands."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control import changes
from portico.control.access import Caller
from portico.control.identity.tables import members, organizations, users
from portico.kit import outbox
from portico.kit.db import Database
from portico.settings import ApiSettings
from tests.control.conftest import PASSWORD, Account
from tests.control.identity.conftest import Join
from tests.control.identity.test_members import audited, give
from tests.control.test_http import problem

OPERATOR = Caller("operator", "installation", None, platform_operator=True)


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    object.__setattr__(settings, "organizations_per_person", 3)
    return settings


async def make(account: Account, name: str) -> str:
    answer = await account.client.post("/v1/organizations", json={"name": name})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def switch(account: Account, organization: str, connect: Any) -> httpx.AsyncClient:
    answer = await account.client.post("/v1/auth/switch", json={"organization": organization})
    assert answer.status_code == 200, answer.text
    assert answer.json()["session"] == account.session
    client: httpx.AsyncClient = connect(answer.json()["access_token"])
    return client


async def here(client: httpx.AsyncClient) -> str:
    return str((await client.get("/v1/whoami")).json()["organization"]["id"])


class TestSeveral:
    async def test_are_listed_with_the_role_there(self, owner: Account, connect: Any) -> None:
        second = await make(owner, "Second")
        rows = (await owner.client.get("/v1/organizations")).json()["data"]
        assert [(r["id"], r["name"], r["role"], r["current"]) for r in rows] == [
            (owner.organization, "Acme", "owner", True),
            (second, "Second", "owner", False),
        ]
        other = await switch(owner, second, connect)
        assert [r["current"] for r in (await other.get("/v1/organizations")).json()["data"]] == [False, True]
        page = (await owner.client.get("/v1/organizations", params={"limit": 1})).json()
        rest = (await owner.client.get("/v1/organizations", params={"cursor": page["next_cursor"]})).json()
        assert [r["id"] for r in (*page["data"], *rest["data"])] == [owner.organization, second]

    async def test_are_limited_for_each_person_under_races(self, owner: Account) -> None:
        answers = await asyncio.gather(
            *(owner.client.post("/v1/organizations", json={"name": f"n{i}"}) for i in range(6))
        )
        assert sorted(a.status_code for a in answers) == [201, 201, 409, 409, 409, 409]
        problem(next(a for a in answers if a.status_code == 409), 409, "organization.limit_reached")
        assert len((await owner.client.get("/v1/organizations")).json()["data"]) == 3

    async def test_hold_nothing_in_common(self, owner: Account, connect: Any) -> None:
        """A session that acts in one organization finds nothing of the other, and each token keeps to its own."""
        second = await make(owner, "Second")
        tunnel = (await owner.client.post("/v1/tunnels", json={"name": "web"})).json()["id"]
        other = await switch(owner, second, connect)
        assert await here(other) == second
        problem(await other.get(f"/v1/tunnels/{tunnel}"), 404, "tunnel.not_found")
        assert (await other.get("/v1/tunnels")).json()["data"] == []
        assert await here(owner.client) == owner.organization
        row = (await other.get("/v1/audit", params={"action": "session.switch"})).json()["data"][0]
        assert (row["target"], row["details"]) == (second, {"session": owner.session})

    async def test_an_answer_of_one_is_never_repeated_in_another(self, owner: Account, connect: Any) -> None:
        other = await switch(owner, await make(owner, "Second"), connect)
        body, key = {"kind": "agent", "name": "machine"}, {"Idempotency-Key": "the-same"}
        first = await owner.client.post("/v1/api-keys", json=body, headers=key)
        second = await other.post("/v1/api-keys", json=body, headers=key)
        assert (first.status_code, second.status_code) == (201, 201)
        assert "idempotency-replayed" not in second.headers
        assert first.json()["key"] != second.json()["key"]
        assert [k["id"] for k in (await other.get("/v1/api-keys")).json()["data"]] == [second.json()["id"]]
        assert (await other.post("/v1/api-keys", json=body, headers=key)).json() == second.json()

    async def test_only_those_of_the_person_can_be_switched_to(
        self, owner: Account, stranger: Account, connect: Any
    ) -> None:
        for organization in (stranger.organization, "org_nothing"):
            answer = await owner.client.post("/v1/auth/switch", json={"organization": organization})
            problem(answer, 404, "request.not_found")
        key = connect((await owner.key("api"))["key"])
        problem(await key.post("/v1/auth/switch", json={"organization": owner.organization}), 403, "auth.forbidden")
        problem(await key.get("/v1/organizations"), 403, "auth.forbidden")

    async def test_a_token_follows_membership_at_once(self, owner: Account, join: Join, connect: Any) -> None:
        member = await join("developer")
        own = await make(member, "Their own")
        away = await switch(member, own, connect)
        assert (await owner.client.delete(f"/v1/org/members/{member.user}")).status_code == 204
        problem(await member.client.get("/v1/tunnels"), 401, "auth.session_ended")
        assert await here(away) == own
        problem(await away.post("/v1/auth/switch", json={"organization": owner.organization}), 404, "request.not_found")

    async def test_refresh_goes_on_where_the_session_is(self, owner: Account, connect: Any, client: Any) -> None:
        second = await make(owner, "Second")
        await switch(owner, second, connect)
        tokens = (await client.post("/v1/auth/refresh", json={"refresh_token": owner.refresh})).json()
        assert tokens["organization"] == {"id": second, "name": "Second"}
        assert await here(connect(tokens["access_token"])) == second

    async def test_sign_in_begins_in_the_one_used_last(self, owner: Account, connect: Any, client: Any) -> None:
        body = {"email": owner.email, "password": PASSWORD}

        async def begins() -> str:
            return str((await client.post("/v1/auth/login", json=body)).json()["organization"]["id"])

        second = await make(owner, "Second")
        assert await begins() == owner.organization
        other = await switch(owner, second, connect)
        assert await begins() == second
        await other.post("/v1/auth/switch", json={"organization": owner.organization})
        assert [await begins(), await begins()] == [owner.organization] * 2

    async def test_are_renamed_by_who_may(self, owner: Account, join: Join) -> None:
        viewer, admin = await join("viewer"), await join("admin")
        problem(await viewer.client.patch("/v1/org", json={"name": "Mine"}), 403, "auth.forbidden")
        assert (await admin.client.patch("/v1/org", json={"name": "Better"})).json()["name"] == "Better"
        assert (await owner.client.get("/v1/org")).json()["name"] == "Better"
        row = (await audited(owner, "organization.change"))[-1]
        assert row["details"] == {"code": "auth.forbidden", "permission": "organization:write"}


class TestNone:
    async def test_a_person_without_an_organization_signs_in_and_makes_one(
        self, owner: Account, join: Join, connect: Any, client: Any
    ) -> None:
        member = await join("viewer")
        assert (await member.client.delete("/v1/org/members/me")).status_code == 204
        signed_in = (await client.post("/v1/auth/login", json={"email": member.email, "password": PASSWORD})).json()
        assert signed_in["organization"] is None
        alone = connect(signed_in["access_token"])
        who = (await alone.get("/v1/whoami")).json()
        assert (who["organization"], who["permissions"], who["user"]["id"]) == (None, [], member.user)
        assert (await alone.get("/v1/organizations")).json()["data"] == []
        assert len((await alone.get("/v1/auth/sessions")).json()["data"]) == 1
        for method, path in (("GET", "/v1/tunnels"), ("GET", "/v1/org"), ("DELETE", "/v1/org/members/me")):
            problem(await alone.request(method, path), 403, "auth.forbidden")
        made = (await alone.post("/v1/organizations", json={"name": "New"})).json()["id"]
        there = await alone.post("/v1/auth/switch", json={"organization": made})
        assert await here(connect(there.json()["access_token"])) == made
        again = await client.post("/v1/auth/refresh", json={"refresh_token": signed_in["refresh_token"]})
        assert again.json()["organization"]["id"] == made


class TestLeaving:
    async def test_ends_sessions_and_keys_there(self, owner: Account, join: Join, connect: Any) -> None:
        member = await join("developer")
        key = connect((await member.key())["key"])
        assert (await member.client.delete("/v1/org/members/me")).status_code == 204
        problem(await member.client.get("/v1/whoami"), 401, "auth.session_ended")
        problem(await key.get("/v1/whoami"), 401, "auth.key_revoked")
        row = (await audited(owner, "member.leave"))[0]
        assert row["actor"]["id"] == row["target"] == member.user
        assert row["details"] == {"role": "developer", "keys": 1, "sessions": 1, "invitations": 0}

    async def test_the_last_owner_stays(self, owner: Account, join: Join) -> None:
        await join("admin")
        problem(await owner.client.delete("/v1/org/members/me"), 409, "member.last_owner")
        await join("owner")
        assert (await owner.client.delete("/v1/org/members/me")).status_code == 204

    async def test_of_two_owners_who_leave_at_once_one_stays(self, owner: Account, join: Join, db: Database) -> None:
        other = await join("owner")
        answers = await asyncio.gather(*(a.client.delete("/v1/org/members/me") for a in (owner, other)))
        assert sorted(a.status_code for a in answers) == [204, 409]
        async with db.read() as reader:
            query = sa.select(sa.func.count()).where(members.c.organization_id == owner.organization)
            assert await reader.scalar(query) == 1


class TestDisabledOwners:
    async def test_do_not_count_and_can_go(self, owner: Account, join: Join, db: Database) -> None:
        """One able owner is enough for a disabled one to be removed, and a disabled one keeps nobody from being the last."""
        gone = await join("owner")
        async with db.transaction() as tx:
            await tx.execute(sa.update(users).where(users.c.id == gone.user).values(disabled_at=sa.func.now()))
        problem(await owner.client.delete("/v1/org/members/me"), 409, "member.last_owner")
        problem(await give(owner, owner, "admin"), 409, "member.last_owner")
        assert (await give(owner, gone, "viewer")).status_code == 200
        assert (await give(owner, gone, "owner")).status_code == 200
        assert (await owner.client.delete(f"/v1/org/members/{gone.user}")).status_code == 204


class TestTransfer:
    async def test_swaps_two_members(self, owner: Account, join: Join) -> None:
        heir = await join("developer")
        answer = await owner.client.post("/v1/org/transfer", json={"user": heir.user})
        assert (answer.status_code, answer.json()["role"]) == (200, "owner")
        roles = {m["user"]["id"]: m["role"] for m in (await owner.client.get("/v1/org/members")).json()["data"]}
        assert roles == {owner.user: "admin", heir.user: "owner"}
        row = (await audited(heir, "organization.transfer"))[0]
        assert row["details"] == {"owner": heir.user, "before": owner.user, "role": "admin"}
        problem(await owner.client.post("/v1/org/transfer", json={"user": owner.user}), 403, "auth.forbidden")

    async def test_asks_for_a_recent_sign_in(self, owner: Account, join: Join, clock: Any) -> None:
        heir = await join("viewer")
        clock.advance(930)  # past step_up_seconds, within the leeway of tokens
        problem(await owner.client.post("/v1/org/transfer", json={"user": heir.user}), 403, "auth.step_up_required")

    async def test_is_refused(self, owner: Account, stranger: Account, join: Join, connect: Any, db: Database) -> None:
        admin, heir = await join("admin"), await join("viewer")
        problem(await admin.client.post("/v1/org/transfer", json={"user": heir.user}), 403, "auth.forbidden")
        key = connect((await owner.key("api"))["key"])
        problem(await key.post("/v1/org/transfer", json={"user": heir.user}), 403, "auth.forbidden")
        for body in ({"user": stranger.user}, {"user": heir.user, "role": "owner"}, {"user": heir.user, "role": "x"}):
            problem(await owner.client.post("/v1/org/transfer", json=body), 404, "request.not_found")
        problem(await owner.client.post("/v1/org/transfer", json={"user": owner.user}), 409, "member.unable")
        async with db.transaction() as tx:
            await tx.execute(sa.update(users).where(users.c.id == heir.user).values(disabled_at=sa.func.now()))
        problem(await owner.client.post("/v1/org/transfer", json={"user": heir.user}), 409, "member.unable")

    async def test_nobody_comes_to_own_more_than_one_may(
        self, owner: Account, join: Join, settings: ApiSettings, client: httpx.AsyncClient, app: Any, db: Database
    ) -> None:
        heir = await join("viewer")
        for number in range(settings.organizations_per_person):
            answer = await heir.client.post("/v1/organizations", json={"name": f"Mine {number}"})
            assert answer.status_code == 201, answer.text
        for answer in (
            await owner.client.post("/v1/org/transfer", json={"user": heir.user}),
            await give(owner, heir, "owner"),
        ):
            problem(answer, 409, "organization.limit_reached")
        roles = {m["user"]["id"]: m["role"] for m in (await owner.client.get("/v1/org/members")).json()["data"]}
        assert roles == {owner.user: "owner", heir.user: "viewer"}

    async def test_two_at_once_leave_one_owner(self, owner: Account, join: Join, db: Database) -> None:
        heirs = [await join("viewer"), await join("viewer")]
        answers = await asyncio.gather(
            *(owner.client.post("/v1/org/transfer", json={"user": heir.user}) for heir in heirs)
        )
        assert sorted(a.status_code for a in answers) == [200, 403]
        async with db.read() as reader:
            where = sa.and_(members.c.organization_id == owner.organization, members.c.role == "owner")
            assert await reader.scalar(sa.select(sa.func.count()).where(where)) == 1


class TestSuspension:
    async def _set(self, app: Any, organization: str, *, suspended: bool) -> None:
        async with app.state.db.transaction() as tx:
            verb = app.state.identity.organizations.suspend if suspended else app.state.identity.organizations.resume
            assert await verb(tx, OPERATOR, organization, "unpaid")
            assert not await verb(tx, OPERATOR, organization, "unpaid")

    async def test_stops_what_is_live_and_ends_with_the_reason(
        self, app: Any, owner: Account, agent: httpx.AsyncClient, db: Database
    ) -> None:
        body = {"agent_id": "agt-0123456789", "tunnels": [{"name": "web", "protocol": "http"}]}
        opened = (await agent.post("/v1/agent/sessions", json=body)).json()
        async with db.read() as reader:
            version = await changes.newest(reader)
        await self._set(app, owner.organization, suspended=True)
        async with db.read() as reader:
            told = "".join(entry.changes for entry in await changes.after(reader, version, 10) or [])
        assert opened["session"] in told and "organization.suspended" in told
        assert '"state": "suspended"' in told
        state = {row["id"]: row["state"] for row in (await app.state.edge_states.read()).tunnels}
        assert state[opened["grants"][0]["tunnel"]] == "suspended"
        problem(await agent.post("/v1/agent/sessions", json=body), 403, "organization.suspended")
        refresh = await agent.post(
            f"/v1/agent/sessions/{opened['session']}/refresh", json={"agent_id": body["agent_id"]}
        )
        problem(refresh, 403, "organization.suspended")
        for path, sent in (("/v1/tunnels", {"name": "x"}), ("/v1/api-keys", {"kind": "agent", "name": "x"})):
            problem(await owner.client.post(path, json=sent), 403, "organization.suspended")
        seen = (await owner.client.get("/v1/tunnels")).json()["data"]
        assert [(t["name"], t["state"]) for t in seen] == [("web", "suspended")]
        assert (await owner.client.get("/v1/org")).json()["standing"] == "suspended"
        await self._set(app, owner.organization, suspended=False)
        state = {row["id"]: row["state"] for row in (await app.state.edge_states.read()).tunnels}
        assert state[opened["grants"][0]["tunnel"]] == "active"
        assert (await agent.post("/v1/agent/sessions", json=body)).status_code == 201
        acts = [row["action"] for row in (await owner.client.get("/v1/audit")).json()["data"]]
        assert {"organization.suspend", "organization.resume"} <= set(acts)


BODY = {"agent_id": "agt-0123456789", "tunnels": [{"name": "web", "protocol": "http"}]}


async def delete(account: Account, name: str = "Acme") -> httpx.Response:
    return await account.client.post("/v1/org/deletion", json={"name": name})


class TestDeletion:
    async def test_stops_everything_at_once_and_can_be_taken_back(
        self, app: Any, owner: Account, agent: httpx.AsyncClient, connect: Any
    ) -> None:
        opened = (await agent.post("/v1/agent/sessions", json=BODY)).json()
        answer = await delete(owner)
        assert (answer.status_code, answer.json()["standing"]) == (202, "deleting")
        state = await app.state.edge_states.read()
        assert [row["state"] for row in state.tunnels if row["organization"] == owner.organization] == ["stopped"]
        assert {row["session"]: row["code"] for row in state.ended}[opened["session"]] == "organization.deleting"
        problem(await agent.post("/v1/agent/sessions", json=BODY), 403, "organization.deleting")
        for path, sent in (
            ("/v1/tunnels", {"name": "x"}), ("/v1/api-keys", {"kind": "agent", "name": "x"}),
            ("/v1/org/roles", {"name": "x", "permissions": []}),
        ):  # fmt: skip
            problem(await owner.client.post(path, json=sent), 403, "organization.deleting")
        problem(await owner.client.patch("/v1/org", json={"name": "x"}), 403, "organization.deleting")
        login = {"email": owner.email, "password": PASSWORD}
        again = connect((await connect().post("/v1/auth/login", json=login)).json()["access_token"])
        assert [t["state"] for t in (await again.get("/v1/tunnels")).json()["data"]] == ["stopped"]
        assert (await delete(owner)).json() == answer.json()  # twice is once
        back = await again.delete("/v1/org/deletion")
        assert (back.status_code, back.json()["standing"], back.json()["delete_after"]) == (200, "active", None)
        assert (await agent.post("/v1/agent/sessions", json=BODY)).status_code == 201
        problem(await again.delete("/v1/org/deletion"), 409, "organization.not_deleting")
        acts = [
            row["action"] for row in (await owner.client.get("/v1/audit")).json()["data"] if row["outcome"] == "success"
        ]
        assert acts.count("organization.delete_request") == acts.count("organization.delete_cancel") == 1

    async def test_is_told_to_every_owner_by_mail(self, owner: Account, join: Join, db: Database) -> None:
        other = await join("owner")
        await join("admin")
        await delete(owner)
        await delete(other)  # asked for already
        async with db.read() as reader:
            t = outbox.messages.c
            mine = sa.and_(t.organization_id == owner.organization, t.topic == "organization.deletion")
            rows = await reader.fetch_all(sa.select(t.recipient).where(mine))
        assert sorted(row.recipient for row in rows) == sorted([owner.email, other.email])

    async def test_asks_for_the_name_a_recent_sign_in_and_an_owner(
        self, owner: Account, join: Join, connect: Any, clock: Any
    ) -> None:
        admin = await join("admin")
        problem(await delete(admin), 403, "auth.forbidden")
        problem(await delete(owner, "acme"), 400, "organization.name_mismatch")
        key = connect((await owner.key("api"))["key"])
        problem(await key.post("/v1/org/deletion", json={"name": "Acme"}), 403, "auth.forbidden")
        clock.advance(930)  # past step_up_seconds, within the leeway of tokens
        problem(await delete(owner), 403, "auth.step_up_required")
        assert (await owner.client.get("/v1/org")).json()["standing"] == "active"

    async def test_cannot_be_taken_back_when_its_time_has_come(self, owner: Account, db: Database) -> None:
        await delete(owner)
        async with db.transaction() as tx:
            where = organizations.c.id == owner.organization
            await tx.execute(sa.update(organizations).where(where).values(delete_after=sa.func.now()))
        problem(await owner.client.delete("/v1/org/deletion"), 409, "organization.not_deleting")

    async def test_leaves_nothing_live_that_was_made_at_the_same_moment(
        self, app: Any, owner: Account, agent: httpx.AsyncClient
    ) -> None:
        """Creations race with the deletion: what got in before it is held by it, what came after is refused."""
        await owner.client.get("/v1/tunnels")
        answers = await asyncio.gather(
            *(owner.client.post("/v1/tunnels", json={"name": f"t{i}"}) for i in range(4)),
            *(agent.post("/v1/agent/sessions", json={**BODY, "agent_id": f"agt-01234567{i:02}"}) for i in range(4)),
            delete(owner),
            *(owner.client.post("/v1/tunnels", json={"name": f"u{i}"}) for i in range(4)),
        )
        assert {a.status_code for a in answers} <= {201, 202, 403}
        assert answers[8].status_code == 202
        state = await app.state.edge_states.read()
        mine = [row["state"] for row in state.tunnels if row["organization"] == owner.organization]
        assert set(mine) <= {"stopped"}
        async with app.state.db.read() as reader:
            live = sa.text("SELECT count(*) FROM agent_sessions WHERE organization_id = :o AND ended_at IS NULL")
            assert await reader.scalar(live, {"o": owner.organization}) == 0
