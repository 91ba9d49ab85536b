"""Members and roles: who may give what, what a change ends, and who stays the last owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.access import AGENT_KEY_PERMISSIONS, PERMISSIONS, ROLES
from portico.control.app import create_app
from portico.control.identity.tables import members
from portico.kit.db import Database
from portico.settings import ApiSettings
from tests.control.conftest import Account, MovableClock
from tests.control.identity.conftest import Join
from tests.control.test_http import problem


async def make_role(account: Account, *permissions: str, name: str = "Support") -> str:
    answer = await account.client.post("/v1/org/roles", json={"name": name, "permissions": permissions})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def give(by: Account, to: Account, role: str) -> httpx.Response:
    return await by.client.patch(f"/v1/org/members/{to.user}", json={"role": role})


async def held(account: Account) -> set[str]:
    return set((await account.client.get("/v1/whoami")).json()["permissions"])


async def audited(account: Account, action: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (await account.client.get("/v1/audit", params={"action": action})).json()["data"]
    return rows


class TestOrganization:
    async def test_facts(self, owner: Account, join: Join) -> None:
        billing = await join("billing")
        answer = await billing.client.get("/v1/org")
        assert answer.json() == {
            "id": owner.organization, "name": "Acme", "plan": "unlimited", "standing": "active", "delete_after": None,
            "suspended_reason": None, "operator_contact": None,
        }  # fmt: skip

    async def test_members_page_by_page(self, owner: Account, join: Join) -> None:
        people = [owner, await join("viewer"), await join("admin")]
        seen: list[dict[str, Any]] = []
        cursor = None
        for _ in people:
            query = {"limit": "1", **({"cursor": cursor} if cursor else {})}
            page = (await owner.client.get("/v1/org/members", params=query)).json()
            seen += page["data"]
            cursor = page["next_cursor"]
        assert cursor is None
        assert [m["user"] for m in seen] == [{"id": p.user, "email": p.email} for p in people]
        assert [(m["role"], m["role_name"]) for m in seen] == [(r, r) for r in ("owner", "viewer", "admin")]


class TestChangeOfRole:
    async def test_counts_at_the_next_request(self, owner: Account, join: Join) -> None:
        member = await join("viewer")
        assert await held(member) == ROLES["viewer"]
        changed = await give(owner, member, "developer")
        assert changed.status_code == 200
        assert (changed.json()["role"], changed.json()["user"]["id"]) == ("developer", member.user)
        assert await held(member) == ROLES["developer"]
        assert (await member.client.post("/v1/tunnels", json={"name": "mine"})).status_code == 201
        await give(owner, member, "auditor")
        problem(await member.client.get("/v1/tunnels"), 403, "auth.forbidden")
        first = (await audited(owner, "member.change"))[-1]
        assert (first["target"], first["outcome"]) == (member.user, "success")
        assert first["details"] == {"role": "developer", "before": "viewer"}

    async def test_a_role_that_is_gone_allows_nothing(self, owner: Account, join: Join) -> None:
        member = await join("rol_" + "0" * 26)
        assert await held(member) == set()
        problem(await member.client.get("/v1/org"), 403, "auth.forbidden")

    async def test_a_key_ends_with_the_rights_of_whoever_rotated_it(
        self, owner: Account, join: Join, connect: Any
    ) -> None:
        """Not with those of the person who made the key before: the new text is known to another."""
        admin = await join("admin")
        made = await owner.key("api", scopes=["tunnels:write", "keys:write"])
        answer = await admin.client.post(f"/v1/api-keys/{made['id']}/rotate", json={"overlap_seconds": 3600})
        assert answer.status_code == 201, answer.text
        learnt = connect(answer.json()["key"])
        assert (await learnt.post("/v1/tunnels", json={"name": "while-admin"})).status_code == 201
        await give(owner, admin, "viewer")
        problem(await learnt.post("/v1/tunnels", json={"name": "no-more"}), 403, "auth.forbidden")
        assert (await connect(made["key"]).post("/v1/tunnels", json={"name": "owner-goes-on"})).status_code == 201

    async def test_keys_shrink_and_grow_with_their_maker(self, owner: Account, join: Join, connect: Any) -> None:
        member = await join("developer")
        api = connect((await member.key("api", scopes=["tunnels:read", "tunnels:write"]))["key"])
        agent = connect((await member.key())["key"])
        assert (await api.post("/v1/tunnels", json={"name": "one"})).status_code == 201
        await give(owner, member, "viewer")
        problem(await api.post("/v1/tunnels", json={"name": "two"}), 403, "auth.forbidden")
        assert (await api.get("/v1/tunnels")).status_code == 200
        seen = (await agent.get("/v1/whoami")).json()["permissions"]
        assert set(seen) == ROLES["viewer"] & AGENT_KEY_PERMISSIONS
        await give(owner, member, "admin")
        assert (await api.get("/v1/whoami")).json()["permissions"] == ["tunnels:read", "tunnels:write"]

    async def test_only_owners_make_and_unmake_owners(self, owner: Account, join: Join) -> None:
        admin, viewer = await join("admin"), await join("viewer")
        problem(await give(admin, viewer, "owner"), 403, "auth.forbidden")
        problem(await give(admin, owner, "viewer"), 403, "auth.forbidden")
        problem(await admin.client.delete(f"/v1/org/members/{owner.user}"), 403, "auth.forbidden")
        assert (await give(admin, viewer, "admin")).status_code == 200
        assert (await give(owner, viewer, "owner")).status_code == 200
        refusals = [row for row in await audited(owner, "member.change") if row["outcome"] == "refused"]
        assert {row["target"] for row in refusals} == {viewer.user, owner.user}
        assert {row["actor"]["id"] for row in refusals} == {admin.user}
        assert refusals[0]["details"] == {"code": "auth.forbidden", "permission": "owners:write"}

    async def test_power_over_others_is_given_by_a_person_with_a_recent_proof(
        self, owner: Account, join: Join, connect: Any, clock: MovableClock
    ) -> None:
        """A session or a key that was stolen makes no accomplice, neither of a member nor by an invitation."""
        member, custom = await join("viewer"), await make_role(owner, "members:read", "members:write")
        key = replace(owner, client=connect((await owner.key("api"))["key"]))
        old = replace(owner)
        for by, later in ((key, 0), (old, 930)):  # past step_up_seconds, within the leeway of tokens
            clock.advance(later)
            for role in ("owner", "admin", custom):
                problem(await give(by, member, role), 403, "auth.step_up_required")
                asked = {"email": "new@example.com", "role": role}
                problem(await by.client.post("/v1/org/invitations", json=asked), 403, "auth.step_up_required")
            assert (await give(by, member, "developer")).status_code == 200
            assert (await give(by, member, "viewer")).status_code == 200
        rows = await audited(owner, "member.change")
        assert {"code": "auth.step_up_required"} in [row["details"] for row in rows if row["outcome"] == "refused"]

    async def test_nobody_gives_what_he_lacks(self, owner: Account, join: Join) -> None:
        role = await make_role(owner, "members:write", "members:read", "tunnels:read")
        clerk, viewer = await join(role), await join("viewer")
        problem(await give(clerk, clerk, "admin"), 403, "auth.forbidden")
        problem(await give(clerk, viewer, "developer"), 403, "auth.forbidden")
        small = await make_role(owner, "tunnels:read", name="small")
        assert (await give(owner, viewer, small)).status_code == 200
        assert (await give(clerk, viewer, role)).json()["role_name"] == "Support"

    async def test_an_unknown_role_or_person(self, owner: Account, stranger: Account, join: Join) -> None:
        member = await join("viewer")
        theirs = await make_role(stranger, "tunnels:read")
        for role in ("king", theirs):
            problem(await give(owner, member, role), 404, "request.not_found")
        problem(await give(owner, stranger, "viewer"), 404, "request.not_found")
        problem(await give(owner, member, "no role"), 422, "request.invalid")


class TestLastOwner:
    async def test_stays(self, owner: Account, join: Join) -> None:
        await join("admin")
        problem(await give(owner, owner, "admin"), 409, "member.last_owner")
        problem(await owner.client.delete(f"/v1/org/members/{owner.user}"), 409, "member.last_owner")
        assert (await give(owner, owner, "owner")).status_code == 200
        refused = (await audited(owner, "member.remove"))[0]
        assert (refused["outcome"], refused["details"]) == ("refused", {"code": "member.last_owner"})

    @pytest.mark.parametrize("method", ["PATCH", "DELETE"])
    async def test_of_two_who_unmake_each_other_one_succeeds(
        self, owner: Account, join: Join, db: Database, method: str
    ) -> None:
        other = await join("owner")
        for _ in range(5):
            answers = await asyncio.gather(
                *(
                    a.client.request(method, f"/v1/org/members/{b.user}", json={"role": "admin"})
                    for a, b in ((owner, other), (other, owner))
                )
            )
            codes = sorted(answer.status_code for answer in answers)
            assert codes[0] in (200, 204), [a.text for a in answers]
            assert codes[1] in (401, 403), [a.text for a in answers]
            async with db.transaction() as tx:
                where = sa.and_(members.c.organization_id == owner.organization, members.c.role == "owner")
                assert await tx.scalar(sa.select(sa.func.count()).where(where)) == 1
                if method == "DELETE":
                    return
                await tx.execute(sa.update(members).values(role="owner"))


class TestRemoval:
    async def test_ends_sessions_and_keys(self, owner: Account, join: Join, connect: Any) -> None:
        member = await join("developer")
        key = connect((await member.key())["key"])
        await member.client.post("/v1/tunnels", json={"name": "theirs"})
        assert (await owner.client.delete(f"/v1/org/members/{member.user}")).status_code == 204
        problem(await member.client.get("/v1/whoami"), 401, "auth.session_ended")
        problem(await key.get("/v1/whoami"), 401, "auth.key_revoked")
        again = await connect().post("/v1/auth/refresh", json={"refresh_token": member.refresh})
        problem(again, 401, "auth.session_ended")
        assert [t["name"] for t in (await owner.client.get("/v1/tunnels")).json()["data"]] == ["theirs"]
        problem(await owner.client.delete(f"/v1/org/members/{member.user}"), 404, "request.not_found")
        row = (await audited(owner, "member.remove"))[-1]
        assert row["details"] == {"role": "developer", "keys": 1, "sessions": 1, "invitations": 0}

    async def test_a_key_of_a_person_who_left_is_refused_whatever_its_row_says(
        self, owner: Account, join: Join, connect: Any, db: Database
    ) -> None:
        member = await join("developer")
        key = connect((await member.key())["key"])
        async with db.transaction() as tx:
            await tx.execute(sa.delete(members).where(members.c.user_id == member.user))
        problem(await key.get("/v1/whoami"), 401, "auth.key_revoked")


class TestLiveSessions:
    @pytest.fixture
    async def live(
        self, owner: Account, join: Join, relay: httpx.AsyncClient, connect: Any
    ) -> AsyncIterator[tuple[Account, httpx.AsyncClient, str]]:
        """A developer with a live agent session."""
        member = await join("developer")
        agent = connect((await member.key())["key"])
        body = {"agent_id": "agt-0123456789", "tunnels": [{"name": "web", "protocol": "http"}]}
        answer = await agent.post("/v1/agent/sessions", json=body)
        assert answer.status_code == 201, answer.text
        yield member, agent, answer.json()["session"]

    async def _announced(self, db: Database, session: str) -> list[str]:
        async with db.read() as reader:
            rows = await reader.raw.fetch(
                "SELECT payload::text AS text FROM edge_changes WHERE payload::text LIKE $1", f"%{session}%"
            )
        return [row["text"] for row in rows]

    async def test_end_when_the_role_no_longer_connects(self, owner: Account, live: Any, db: Database) -> None:
        member, agent, session = live
        assert (await give(owner, member, "admin")).status_code == 200
        path, body = f"/v1/agent/sessions/{session}/refresh", {"agent_id": "agt-0123456789"}
        assert (await agent.post(path, json=body)).status_code == 200
        assert await self._announced(db, session) == []
        assert (await give(owner, member, "viewer")).status_code == 200
        told = await self._announced(db, session)
        assert len(told) == 1
        assert "session.revoked" in told[0]
        problem(await agent.post(path, json=body), 403, "auth.forbidden")
        await give(owner, member, "developer")
        problem(await agent.post(path, json=body), 403, "session.revoked")

    async def test_end_when_a_custom_role_loses_it(self, owner: Account, live: Any, db: Database) -> None:
        member, agent, session = live
        role = await make_role(owner, *AGENT_KEY_PERMISSIONS, "keys:own")
        assert (await give(owner, member, role)).status_code == 200
        assert await self._announced(db, session) == []
        answer = await owner.client.patch(f"/v1/org/roles/{role}", json={"permissions": ["tunnels:read"]})
        assert answer.status_code == 200
        assert "session.revoked" in (await self._announced(db, session))[0]
        problem(await agent.post("/v1/agent/sessions", json={"agent_id": "agt-0123456789"}), 403, "auth.forbidden")

    async def test_end_with_the_member(self, owner: Account, live: Any, db: Database) -> None:
        member, _, session = live
        await owner.client.delete(f"/v1/org/members/{member.user}")
        assert "session.revoked" in (await self._announced(db, session))[0]

    async def test_none_begins_beside_a_change(self, owner: Account, live: Any, db: Database) -> None:
        """Whichever commits first, nothing is live afterwards that the role does not allow."""
        member, agent, _ = live
        for round_ in range(5):
            await give(owner, member, "developer")
            opened = [
                agent.post("/v1/agent/sessions", json={"agent_id": f"agt-{round_}-{n:08}", "tunnels": []})
                for n in range(4)
            ]
            await asyncio.gather(*opened[:2], give(owner, member, "viewer"), *opened[2:])
            async with db.read() as reader:
                live_rows = await reader.raw.fetchval("SELECT count(*) FROM agent_sessions WHERE ended_at IS NULL")
            assert live_rows == 0


class TestRoles:
    async def test_built_in_ones_first(self, owner: Account, join: Join) -> None:
        role = await make_role(owner, "tunnels:read", "audit:read", "audit:read")
        viewer = await join("viewer")
        listed = (await viewer.client.get("/v1/org/roles")).json()
        assert [r["id"] for r in listed["data"]] == [*ROLES, role]
        assert {r["id"]: set(r["permissions"]) for r in listed["data"][:-1]} == ROLES
        assert listed["data"][-1] == {
            "id": role,
            "name": "Support",
            "built_in": False,
            "about": None,
            "permissions": ["audit:read", "tunnels:read"],
        }

    async def test_used_changed_and_deleted(self, owner: Account, join: Join) -> None:
        role = await make_role(owner, "tunnels:read")
        member = await join("viewer")
        assert (await give(owner, member, role)).json()["role_name"] == "Support"
        assert await held(member) == {"tunnels:read"}
        path = f"/v1/org/roles/{role}"
        answer = await owner.client.patch(path, json={"name": "Helpers", "permissions": ["audit:read"]})
        assert (answer.json()["name"], answer.json()["permissions"]) == ("Helpers", ["audit:read"])
        assert await held(member) == {"audit:read"}
        body = problem(await owner.client.delete(path), 409, "role.in_use")
        assert body["members"] == 1
        await give(owner, member, "viewer")
        assert (await owner.client.delete(path)).status_code == 204
        problem(await owner.client.delete(path), 404, "request.not_found")
        actions = [(row["action"], row["outcome"]) for row in (await owner.client.get("/v1/audit")).json()["data"]]
        for action in ("role.create", "role.change", "role.delete"):
            assert (action, "success") in actions
        assert ("role.delete", "refused") in actions

    async def test_built_in_roles_stay(self, owner: Account) -> None:
        problem(await owner.client.patch("/v1/org/roles/viewer", json={"permissions": []}), 409, "role.built_in")
        problem(await owner.client.delete("/v1/org/roles/owner"), 409, "role.built_in")

    async def test_names_are_unique_in_any_case(self, owner: Account, stranger: Account) -> None:
        role = await make_role(owner, name="Night shift")
        body: dict[str, Any] = {"permissions": []}
        for name in ("night SHIFT", "Owner", " admin "):
            problem(await owner.client.post("/v1/org/roles", json={"name": name, **body}), 409, "role.name_taken")
        assert (await owner.client.patch(f"/v1/org/roles/{role}", json={"name": "Night Shift"})).status_code == 200
        await make_role(stranger, name="Night shift")

    async def test_what_no_role_holds(self, owner: Account) -> None:
        for wrong in ("owners:write", "tunnels:*", ""):
            answer = await owner.client.post("/v1/org/roles", json={"name": "x", "permissions": [wrong]})
            problem(answer, 400, "role.permission_invalid")

    async def test_nobody_makes_or_changes_a_role_above_himself(self, owner: Account, join: Join) -> None:
        mine = await make_role(owner, "roles:write", "tunnels:read", name="role keeper")
        keeper = await join(mine)
        above = await make_role(owner, "audit:read", name="above")
        client = keeper.client
        answer = await client.post("/v1/org/roles", json={"name": "x", "permissions": ["keys:write"]})
        problem(answer, 403, "auth.forbidden")
        problem(
            await client.patch(f"/v1/org/roles/{mine}", json={"permissions": ["audit:read"]}), 403, "auth.forbidden"
        )
        problem(await client.patch(f"/v1/org/roles/{above}", json={"permissions": []}), 403, "auth.forbidden")
        problem(await client.delete(f"/v1/org/roles/{above}"), 403, "auth.forbidden")
        assert (
            await client.post("/v1/org/roles", json={"name": "x", "permissions": ["tunnels:read"]})
        ).status_code == 201

    async def test_there_is_a_limit(self, owner: Account, settings: ApiSettings, db: Database) -> None:
        app = create_app(replace(settings, max_roles_per_organization=2), db=db)
        headers = {"Authorization": f"Bearer {owner.access}"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://api.test", headers=headers) as client:
            bodies = [{"name": f"role {n}", "permissions": []} for n in range(6)]
            answers = await asyncio.gather(*(client.post("/v1/org/roles", json=body) for body in bodies))
        assert sorted(a.status_code for a in answers) == [201, 201, 403, 403, 403, 403]
        assert {a.json()["code"] for a in answers if a.status_code == 403} == {"role.limit_reached"}


class TestOwnKeys:
    async def test_a_developer_has_keys_of_his_own_and_sees_no_others(self, owner: Account, join: Join) -> None:
        developer = await join("developer")
        theirs, mine = await owner.key(), await developer.key()
        assert [k["id"] for k in (await developer.client.get("/v1/api-keys")).json()["data"]] == [mine["id"]]
        assert len((await owner.client.get("/v1/api-keys")).json()["data"]) == 2
        problem(await developer.client.delete(f"/v1/api-keys/{theirs['id']}"), 404, "request.not_found")
        problem(await developer.client.post(f"/v1/api-keys/{theirs['id']}/rotate"), 404, "request.not_found")
        made = await developer.key("api")
        assert set(made["scopes"]) == ROLES["developer"]
        body = {"kind": "api", "name": "x", "scopes": ["audit:read"]}
        problem(await developer.client.post("/v1/api-keys", json=body), 403, "auth.forbidden")
        assert (await developer.client.post(f"/v1/api-keys/{mine['id']}/rotate")).status_code == 201
        assert (await developer.client.delete(f"/v1/api-keys/{made['id']}")).status_code == 204
        refused = [row for row in await audited(owner, "key.create") if row["outcome"] == "refused"]
        assert [row["actor"]["id"] for row in refused] == [developer.user]

    async def test_a_custom_role_that_cannot_connect_makes_no_agent_key(self, owner: Account, join: Join) -> None:
        member = await join(await make_role(owner, "keys:own", "tunnels:read"))
        answer = await member.client.post("/v1/api-keys", json={"kind": "agent", "name": "x"})
        problem(answer, 403, "auth.forbidden")

    async def test_an_owners_default_scopes_are_everything(self, owner: Account) -> None:
        assert set((await owner.key("api"))["scopes"]) == PERMISSIONS
