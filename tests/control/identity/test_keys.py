"""Keys: shown once, scoped, never a ladder to more rights, dead at once when revoked."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.access import AGENT_KEY_PERMISSIONS, PERMISSIONS
from portico.control.app import create_app
from portico.control.identity import jobs
from portico.control.identity.tables import api_keys
from portico.kit.db import Database, Tx
from portico.kit.ids import check_token, digest
from portico.settings import ApiSettings
from tests.control.conftest import Account, MovableClock
from tests.control.test_http import problem


async def _actions(account: Account) -> list[tuple[str, str]]:
    rows = (await account.client.get("/v1/audit")).json()["data"]
    return [(row["action"], row["target"]) for row in rows]


class TestCreate:
    async def test_agent_key(self, owner: Account, connect: Any, db: Database) -> None:
        made = await owner.key("agent", name="laptop")
        assert check_token(made["key"]) == "agt"
        assert made["key"].startswith(made["prefix"])
        me = (await connect(made["key"]).get("/v1/whoami")).json()
        assert me["kind"] == "agent_key"
        assert me["key"] == {"id": made["id"], "name": "laptop", "prefix": made["prefix"]}
        assert me["user"]["id"] == owner.user
        assert me["permissions"] == sorted(AGENT_KEY_PERMISSIONS)
        async with db.read() as reader:
            row = await reader.fetch_one(sa.select(api_keys).where(api_keys.c.id == made["id"]))
        assert row is not None
        assert row.digest == digest(made["key"])
        assert made["key"] not in str(dict(row._mapping))
        assert ("key.create", made["id"]) in await _actions(owner)

    async def test_the_text_is_never_shown_again(self, owner: Account) -> None:
        made = await owner.key()
        for path in ("/v1/api-keys", "/v1/audit"):
            assert made["key"] not in (await owner.client.get(path)).text

    async def test_api_key_has_its_scopes_and_no_more(self, owner: Account, connect: Any) -> None:
        made = await owner.key("api", scopes=["audit:read", "audit:read"])
        assert made["scopes"] == ["audit:read"]
        client = connect(made["key"])
        assert (await client.get("/v1/audit")).status_code == 200
        body = problem(await client.get("/v1/api-keys"), 403, "auth.forbidden")
        assert body["permission"] == "keys:read"

    async def test_scopes_default_to_the_callers(self, owner: Account) -> None:
        assert (await owner.key("api"))["scopes"] == sorted(PERMISSIONS)
        assert (await owner.key("api", scopes=[]))["scopes"] == []

    async def test_a_key_cannot_make_a_stronger_one(self, owner: Account, connect: Any) -> None:
        weak = connect((await owner.key("api", scopes=["keys:write", "keys:read"]))["key"])
        for body in (
            {"kind": "api", "name": "x", "scopes": ["audit:read"]},
            {"kind": "agent", "name": "x"},
        ):
            problem(await weak.post("/v1/api-keys", json=body), 403, "auth.forbidden")
        answer = await weak.post("/v1/api-keys", json={"kind": "api", "name": "x"})
        assert answer.json()["scopes"] == ["keys:read", "keys:write"]
        agent = connect((await owner.key())["key"])
        problem(await agent.post("/v1/api-keys", json={"kind": "agent", "name": "x"}), 403, "auth.forbidden")

    async def test_bad_scopes(self, owner: Account) -> None:
        for body in (
            {"kind": "api", "name": "x", "scopes": ["tunnels:*"]},
            {"kind": "agent", "name": "x", "scopes": ["tunnels:read"]},
        ):
            problem(await owner.client.post("/v1/api-keys", json=body), 400, "auth.scope_invalid")

    async def test_operator_keys_cannot_be_asked_for(self, owner: Account) -> None:
        answer = await owner.client.post("/v1/api-keys", json={"kind": "operator", "name": "x"})
        problem(answer, 422, "request.invalid")

    @pytest.mark.parametrize("name", ["a\x9bb", "a\u202eb", "a\u2028b", "", " ", "x" * 101, "a\nb"])
    async def test_bad_names(self, owner: Account, name: str) -> None:
        answer = await owner.client.post("/v1/api-keys", json={"kind": "agent", "name": name})
        problem(answer, 422, "request.invalid")

    async def test_the_limit_holds_under_concurrency(self, settings: ApiSettings, db: Database, owner: Account) -> None:
        app = create_app(replace(settings, max_keys_per_organization=3), db=db)
        transport = httpx.ASGITransport(app)
        headers = {"Authorization": f"Bearer {owner.access}"}
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://api.test", headers=headers) as client,
        ):
            body = {"kind": "agent", "name": "x"}
            answers = await asyncio.gather(*(client.post("/v1/api-keys", json=body) for _ in range(7)))
        assert sorted(a.status_code for a in answers) == [201, 201, 201, 403, 403, 403, 403]
        problem(next(a for a in answers if a.status_code == 403), 403, "key.limit_reached")


class TestExpiry:
    async def test_expired_keys_are_invalid_and_unlisted(
        self, owner: Account, connect: Any, clock: MovableClock
    ) -> None:
        soon = (datetime.now(UTC) + timedelta(seconds=60)).isoformat()
        made = await owner.key("api", expires_at=soon)
        client = connect(made["key"])
        assert (await client.get("/v1/whoami")).status_code == 200
        clock.advance(61)
        problem(await client.get("/v1/whoami"), 401, "auth.key_invalid")
        assert (await owner.client.get("/v1/api-keys")).json()["data"] == []

    async def test_the_past_is_refused(self, owner: Account) -> None:
        body = {"kind": "agent", "name": "x", "expires_at": "2020-01-01T00:00:00Z"}
        problem(await owner.client.post("/v1/api-keys", json=body), 400, "auth.expiry_invalid")

    @pytest.mark.parametrize("when", ["2030-01-01T00:00:00", "soon", "9" * 400, "99999-01-01T00:00:00Z"])
    async def test_nonsense_is_refused(self, owner: Account, when: str) -> None:
        body = {"kind": "agent", "name": "x", "expires_at": when}
        problem(await owner.client.post("/v1/api-keys", json=body), 422, "request.invalid")


class TestExpiringCallers:
    """The end of a key would mean nothing if it could make one that goes on."""

    async def test_make_keys_that_end_with_them(self, owner: Account, connect: Any) -> None:
        soon = datetime.now(UTC) + timedelta(hours=1)
        parent = await owner.key("api", expires_at=soon.isoformat())
        client = connect(parent["key"])
        made = (await client.post("/v1/api-keys", json={"kind": "agent", "name": "child"})).json()
        assert made["expires_at"] == parent["expires_at"]
        later = {"kind": "agent", "name": "child", "expires_at": (soon + timedelta(seconds=1)).isoformat()}
        problem(await client.post("/v1/api-keys", json=later), 403, "auth.forbidden")
        earlier = {"kind": "agent", "name": "child", "expires_at": (soon - timedelta(seconds=1)).isoformat()}
        assert (await client.post("/v1/api-keys", json=earlier)).status_code == 201

    async def test_rotate_only_what_ends_no_later(self, owner: Account, connect: Any) -> None:
        soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        parent, lasting = await owner.key("api", expires_at=soon), await owner.key()
        client = connect(parent["key"])
        problem(await client.post(f"/v1/api-keys/{lasting['id']}/rotate"), 403, "auth.forbidden")
        assert (await client.post(f"/v1/api-keys/{parent['id']}/rotate")).status_code == 201


class TestRevoke:
    async def test_is_dead_at_once(self, owner: Account, connect: Any) -> None:
        made = await owner.key()
        assert (await owner.client.delete(f"/v1/api-keys/{made['id']}")).status_code == 204
        problem(await connect(made["key"]).get("/v1/whoami"), 401, "auth.key_revoked")
        problem(await owner.client.delete(f"/v1/api-keys/{made['id']}"), 404, "request.not_found")
        assert ("key.revoke", made["id"]) in await _actions(owner)

    async def test_callbacks_run_in_the_same_transaction(self, owner: Account, app: Any, connect: Any) -> None:
        """If what hangs on a key cannot be ended, the key is not revoked either, and no audit row says it was."""
        made = await owner.key()
        told: list[str] = []

        async def fails(tx: Tx, key: str) -> None:
            told.append(key)
            raise RuntimeError("cannot end sessions")

        app.state.identity.keys.on_revoked.append(fails)
        answer = await owner.client.delete(f"/v1/api-keys/{made['id']}")
        problem(answer, 500, "internal.error")
        assert told == [made["id"]]
        assert (await connect(made["key"]).get("/v1/whoami")).status_code == 200
        assert ("key.revoke", made["id"]) not in await _actions(owner)

    async def test_concurrent_revocations_tell_once(self, owner: Account, app: Any) -> None:
        made = await owner.key()
        told: list[str] = []

        async def note(tx: Tx, key: str) -> None:
            told.append(key)

        app.state.identity.keys.on_revoked.append(note)
        answers = await asyncio.gather(*(owner.client.delete(f"/v1/api-keys/{made['id']}") for _ in range(5)))
        assert sorted(a.status_code for a in answers) == [204, 404, 404, 404, 404]
        assert told == [made["id"]]


class TestRotate:
    async def test_replaces_the_key_and_keeps_its_rights(self, owner: Account, connect: Any, app: Any) -> None:
        told: list[str] = []

        async def note(tx: Tx, key: str) -> None:
            told.append(key)

        app.state.identity.keys.on_revoked.append(note)
        made = await owner.key("api", scopes=["audit:read"])
        answer = await owner.client.post(f"/v1/api-keys/{made['id']}/rotate")
        assert answer.status_code == 201
        new = answer.json()
        assert (new["scopes"], new["name"], new["kind"]) == (["audit:read"], "test", "api")
        assert new["id"] != made["id"]
        assert (await connect(new["key"]).get("/v1/audit")).status_code == 200
        problem(await connect(made["key"]).get("/v1/whoami"), 401, "auth.key_revoked")
        assert told == [made["id"]]
        assert ("key.rotate", made["id"]) in await _actions(owner)

    async def test_with_overlap_both_work_for_a_while(self, owner: Account, connect: Any, clock: MovableClock) -> None:
        made = await owner.key()
        answer = await owner.client.post(f"/v1/api-keys/{made['id']}/rotate", json={"overlap_seconds": 120})
        new = answer.json()
        for key in (made["key"], new["key"]):
            assert (await connect(key).get("/v1/whoami")).status_code == 200
        clock.advance(121)
        problem(await connect(made["key"]).get("/v1/whoami"), 401, "auth.key_invalid")
        assert (await connect(new["key"]).get("/v1/whoami")).status_code == 200

    async def test_overlap_never_extends_and_expiry_is_kept(
        self, owner: Account, connect: Any, clock: MovableClock
    ) -> None:
        made = await owner.key(expires_at=(datetime.now(UTC) + timedelta(seconds=60)).isoformat())
        new = (await owner.client.post(f"/v1/api-keys/{made['id']}/rotate", json={"overlap_seconds": 600})).json()
        clock.advance(61)
        for key in (made["key"], new["key"]):
            problem(await connect(key).get("/v1/whoami"), 401, "auth.key_invalid")

    async def test_is_no_ladder(self, owner: Account, connect: Any) -> None:
        strong = await owner.key("api")
        weak = connect((await owner.key("api", scopes=["keys:write"]))["key"])
        problem(await weak.post(f"/v1/api-keys/{strong['id']}/rotate"), 403, "auth.forbidden")

    async def test_a_revoked_key_has_no_successor(self, owner: Account) -> None:
        made = await owner.key()
        await owner.client.delete(f"/v1/api-keys/{made['id']}")
        problem(await owner.client.post(f"/v1/api-keys/{made['id']}/rotate"), 404, "request.not_found")

    async def test_an_overlap_does_not_pass_the_limit(
        self, settings: ApiSettings, db: Database, owner: Account
    ) -> None:
        app = create_app(replace(settings, max_keys_per_organization=2), db=db)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {owner.access}"}
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://api.test", headers=headers) as client,
        ):
            key = (await client.post("/v1/api-keys", json={"kind": "agent", "name": "one"})).json()
            rotate = f"/v1/api-keys/{key['id']}/rotate"
            answers = await asyncio.gather(*(client.post(rotate, json={"overlap_seconds": 60}) for _ in range(5)))
            assert sorted(a.status_code for a in answers) == [201, 403, 403, 403, 403]
            assert {a.json().get("code") for a in answers} == {None, "key.limit_reached"}
            assert (await client.post(rotate)).status_code == 201  # one for one


class TestLastUsed:
    async def test_is_written_lazily(self, owner: Account, connect: Any, app: Any) -> None:
        made = await owner.key()
        client = connect(made["key"])

        async def shown() -> str | None:
            rows = (await owner.client.get("/v1/api-keys")).json()["data"]
            return next(row["last_used_at"] for row in rows if row["id"] == made["id"])  # type: ignore[no-any-return]

        for _ in range(3):
            await client.get("/v1/whoami")
        assert await shown() is None
        await jobs.housekeeping(app.state.identity)
        first = await shown()
        assert first is not None
        await jobs.housekeeping(app.state.identity)
        assert await shown() == first
