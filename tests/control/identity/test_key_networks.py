"""Keys that may be used from some networks alone, changes of keys, and what is said about their state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.access import PERMISSION_TABLE
from portico.control.app import create_app
from portico.control.identity import jobs, posture
from portico.control.identity.tables import api_keys
from portico.kit.db import Database
from portico.settings import ApiSettings
from tests.control.conftest import Account, MovableClock
from tests.control.identity.conftest import Join
from tests.control.test_http import problem

Connect = Callable[..., httpx.AsyncClient]
INSIDE, OUTSIDE = "198.51.100.7", "203.0.113.9"
NETWORKS = ["198.51.100.0/24", "2001:db8:1::/48"]
AGENT = {"agent_id": "agt-0123456789", "tunnels": [{"name": "web"}]}


async def change(account: Account, key: str, **wanted: Any) -> httpx.Response:
    return await account.client.patch(f"/v1/api-keys/{key}", json=wanted)


async def refusals(account: Account, action: str = "key.use") -> list[dict[str, Any]]:
    rows = (await account.client.get("/v1/audit", params={"action": action})).json()["data"]
    return [row for row in rows if row["outcome"] == "refused"]


class TestWhere:
    async def test_only_from_its_networks(self, owner: Account, connect: Connect) -> None:
        made = await owner.key("api", allowed_cidrs=NETWORKS)
        for address in (INSIDE, f"::ffff:{INSIDE}", "2001:db8:1::5"):
            assert (await connect(made["key"], address=address).get("/v1/whoami")).status_code == 200, address
        for address in (OUTSIDE, "198.51.101.7", "2001:db8:2::5", "::198.51.100.7", ""):
            problem(await connect(made["key"], address=address).get("/v1/whoami"), 403, "auth.address_denied")

    async def test_networks_are_shown_as_they_are_meant(self, owner: Account) -> None:
        asked = ["198.51.100.7/24", "::ffff:192.0.2.0/120", "2001:DB8:1::", "198.51.100.9/24", " 192.0.2.1 "]
        made = await owner.key("api", allowed_cidrs=asked)
        assert made["allowed_cidrs"] == ["192.0.2.0/24", "192.0.2.1/32", "198.51.100.0/24", "2001:db8:1::/128"]

    async def test_what_is_no_network(self, owner: Account) -> None:
        for bad in [["anywhere"], ["198.51.100.0/33"], ["198.51.100.010"], ["fe80::1%eth0"], [""], ["1.2.3.4/-1"]]:
            body = {"kind": "api", "name": "x", "allowed_cidrs": bad}
            problem(await owner.client.post("/v1/api-keys", json=body), 400, "key.cidr_invalid")

    async def test_at_most_so_many(self, owner: Account, settings: ApiSettings) -> None:
        many = [f"10.0.{n}.0/24" for n in range(settings.key_max_cidrs + 1)]
        body = {"kind": "api", "name": "x", "allowed_cidrs": many}
        problem(await owner.client.post("/v1/api-keys", json=body), 400, "key.cidr_invalid")

    async def test_a_forged_forwarded_address_changes_nothing(self, owner: Account, connect: Connect) -> None:
        """Only trusted proxies say who the client is, and nobody is one here."""
        made = await owner.key("api", allowed_cidrs=NETWORKS)
        client = connect(made["key"], address=OUTSIDE)
        for headers in (
            {"x-forwarded-for": INSIDE},
            {"forwarded": f"for={INSIDE}"},
            {"x-real-ip": INSIDE},
            {"x-forwarded-for": f"{INSIDE}, {INSIDE}"},
        ):
            problem(await client.get("/v1/whoami", headers=headers), 403, "auth.address_denied")

    async def test_behind_a_trusted_proxy_the_client_is_who_it_saw(
        self, settings: ApiSettings, db: Database, owner: Account
    ) -> None:
        """What stands left of the proxy's own entry was written by the client, and is passed over."""
        made = await owner.key("api", allowed_cidrs=NETWORKS)
        app = create_app(replace(settings, trusted_proxies=("192.0.2.1",)), db=db)
        transport = httpx.ASGITransport(app, client=("192.0.2.1", 4711))
        headers = {"Authorization": f"Bearer {made['key']}"}
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://api.test", headers=headers) as client,
        ):

            async def status(forwarded: str | None) -> int:
                more = {} if forwarded is None else {"x-forwarded-for": forwarded}
                return (await client.get("/v1/whoami", headers=more)).status_code

            assert await status(INSIDE) == 200
            assert await status(f"{OUTSIDE}, {INSIDE}") == 200
            assert await status(f"{INSIDE}, {OUTSIDE}") == 403
            assert await status(f"{INSIDE}, junk") == 403
            assert await status(None) == 403

    async def test_a_refused_use_is_recorded_once_for_a_network(
        self, owner: Account, connect: Connect, app: Any
    ) -> None:
        made = await owner.key("api", allowed_cidrs=NETWORKS)
        for address in (OUTSIDE, OUTSIDE, "203.0.113.10"):
            await connect(made["key"], address=address).get("/v1/whoami")
            await app.state.identity.elsewhere.close()
        found = await refusals(owner)
        assert [(row["target"], row["actor"]["address"]) for row in found] == [
            (made["id"], "203.0.113.10"),
            (made["id"], OUTSIDE),
        ]

    async def test_last_use_says_from_where(self, owner: Account, connect: Connect, app: Any) -> None:
        made = await owner.key("api", allowed_cidrs=NETWORKS)
        await connect(made["key"], address=INSIDE).get("/v1/whoami")
        await connect(made["key"], address=OUTSIDE).get("/v1/whoami")
        await jobs.housekeeping(app.state.identity)
        shown = (await owner.client.get(f"/v1/api-keys/{made['id']}")).json()
        assert shown["last_used_address"] == INSIDE and shown["last_used_at"] is not None


class TestNoLadder:
    async def test_a_limited_key_makes_keys_with_its_limits(self, owner: Account, connect: Connect) -> None:
        parent = await owner.key("api", allowed_cidrs=["198.51.100.0/24"])
        client = connect(parent["key"], address=INSIDE)

        async def make(**more: Any) -> httpx.Response:
            return await client.post("/v1/api-keys", json={"kind": "api", "name": "x", "scopes": [], **more})

        assert (await make()).json()["allowed_cidrs"] == ["198.51.100.0/24"]
        assert (await make(allowed_cidrs=["198.51.100.64/26"])).status_code == 201
        for wider in ([], ["0.0.0.0/0"], ["198.51.0.0/16"], ["198.51.100.0/24", OUTSIDE], ["::/0"]):
            problem(await make(allowed_cidrs=wider), 403, "auth.forbidden")

    async def test_nor_does_it_get_out_by_a_change_or_a_rotation(self, owner: Account, connect: Connect) -> None:
        parent, free = await owner.key("api", allowed_cidrs=[INSIDE]), await owner.key("api")
        client = connect(parent["key"], address=INSIDE)
        for key in (parent["id"], free["id"]):
            answer = await client.patch(f"/v1/api-keys/{key}", json={"allowed_cidrs": [OUTSIDE]})
            problem(answer, 403, "auth.forbidden")
        problem(await client.post(f"/v1/api-keys/{free['id']}/rotate"), 403, "auth.forbidden")
        rotated = await client.post(f"/v1/api-keys/{parent['id']}/rotate")
        assert rotated.json()["allowed_cidrs"] == [f"{INSIDE}/32"]
        problem(await connect(rotated.json()["key"], address=OUTSIDE).get("/v1/whoami"), 403, "auth.address_denied")


class TestChange:
    async def test_what_it_says(self, owner: Account) -> None:
        made = await owner.key("api", scopes=["tunnels:read", "audit:read"])
        soon = datetime.now(UTC) + timedelta(hours=1)
        answer = await change(
            owner, made["id"], name="new", scopes=["audit:read"], allowed_cidrs=[INSIDE], expires_at=soon.isoformat()
        )
        assert answer.status_code == 200, answer.text
        shown = answer.json()
        assert (shown["name"], shown["scopes"], shown["permissions"]) == ("new", ["audit:read"], ["audit:read"])
        assert shown["allowed_cidrs"] == [f"{INSIDE}/32"]
        assert datetime.fromisoformat(shown["expires_at"]) == soon
        again = (await owner.client.get(f"/v1/api-keys/{made['id']}")).json()
        assert again == {**shown, "allows": {"audit:read": PERMISSION_TABLE["audit:read"]}}
        row = (await owner.client.get("/v1/audit", params={"action": "key.update"})).json()["data"][0]
        assert row["target"] == made["id"] and row["details"]["scopes"] == ["audit:read"]

    async def test_what_is_so_already_is_no_act(self, owner: Account) -> None:
        made = await owner.key("api", scopes=["audit:read"], allowed_cidrs=[INSIDE])
        answer = await change(owner, made["id"], name="test", scopes=["audit:read"], allowed_cidrs=[f"{INSIDE}/32"])
        assert answer.status_code == 200
        assert (await owner.client.get("/v1/audit", params={"action": "key.update"})).json()["data"] == []

    async def test_never_more(self, owner: Account) -> None:
        soon = datetime.now(UTC) + timedelta(hours=1)
        made = await owner.key("api", scopes=["audit:read"], expires_at=soon.isoformat())
        later = (soon + timedelta(seconds=1)).isoformat()
        problem(await change(owner, made["id"], scopes=["audit:read", "tunnels:read"]), 400, "key.only_less")
        problem(await change(owner, made["id"], expires_at=later), 400, "key.only_less")
        problem(await change(owner, made["id"], expires_at="2020-01-01T00:00:00Z"), 400, "auth.expiry_invalid")
        problem(await change(owner, (await owner.key())["id"], scopes=[]), 400, "auth.scope_invalid")

    async def test_shapes(self, owner: Account) -> None:
        made = await owner.key("api")
        for bad in ({"name": None}, {"scopes": None}, {"expires_at": None}, {"allowed_cidrs": None}, {"kind": "api"}):
            problem(await change(owner, made["id"], **bad), 422, "request.invalid")

    async def test_whoever_may_not_make_it_may_not_widen_it(self, owner: Account, connect: Connect) -> None:
        strong = await owner.key("api", allowed_cidrs=[INSIDE])
        weak = connect((await owner.key("api", scopes=["keys:write"]))["key"])
        answer = await weak.patch(f"/v1/api-keys/{strong['id']}", json={"allowed_cidrs": []})
        problem(answer, 403, "auth.forbidden")
        answer = await weak.patch(f"/v1/api-keys/{strong['id']}", json={"name": "renamed"})
        assert answer.status_code == 200

    async def test_a_change_and_a_revocation_at_once(self, owner: Account) -> None:
        made = await owner.key("api")
        _, gone = await asyncio.gather(
            change(owner, made["id"], name="new"), owner.client.delete(f"/v1/api-keys/{made['id']}")
        )
        assert gone.status_code == 204
        problem(await change(owner, made["id"], name="newer"), 404, "request.not_found")


class TestLiveSessions:
    """What a key opened ends when the key could not open it any more."""

    @pytest.fixture
    async def opened(self, owner: Account, relay: httpx.AsyncClient, connect: Connect) -> Any:
        async def make(address: str = INSIDE, **more: Any) -> tuple[dict[str, Any], httpx.AsyncClient, str]:
            made = await owner.key(**({"kind": "agent"} | more))
            agent = connect(made["key"], address=address)
            answer = await agent.post("/v1/agent/sessions", json=AGENT)
            assert answer.status_code == 201, answer.text
            return made, agent, answer.json()["session"]

        return make

    @staticmethod
    async def refresh(agent: httpx.AsyncClient, session: str) -> httpx.Response:
        return await agent.post(f"/v1/agent/sessions/{session}/refresh", json={"agent_id": AGENT["agent_id"]})

    async def told(self, db: Database, session: str) -> int:
        async with db.read() as reader:
            query = (
                "SELECT count(*) FROM edge_changes WHERE payload::text LIKE '%session.revoked%'"
                " AND payload::text LIKE '%' || $1 || '%'"
            )
            return int(await reader.raw.fetchval(query, session))

    async def test_a_list_that_leaves_its_agent_out_ends_it(
        self, owner: Account, opened: Any, connect: Connect, db: Database
    ) -> None:
        made, agent, session = await opened()
        assert (await change(owner, made["id"], allowed_cidrs=["198.51.100.0/24"])).status_code == 200
        assert (await self.refresh(agent, session)).status_code == 200
        assert (await change(owner, made["id"], allowed_cidrs=[OUTSIDE])).status_code == 200
        assert await self.told(db, session) == 1
        problem(await self.refresh(agent, session), 403, "auth.address_denied")
        problem(await self.refresh(connect(made["key"], address=OUTSIDE), session), 403, "session.revoked")
        problem(await agent.post("/v1/agent/sessions", json=AGENT), 403, "auth.address_denied")

    async def test_an_agent_that_moves_out_gets_no_new_tokens(self, opened: Any, connect: Connect) -> None:
        made, _, session = await opened(allowed_cidrs=NETWORKS)
        moved = connect(made["key"], address=OUTSIDE)
        problem(await self.refresh(moved, session), 403, "auth.address_denied")
        problem(await moved.post("/v1/agent/sessions", json=AGENT), 403, "auth.address_denied")

    async def test_where_it_was_refreshed_last_counts(
        self, owner: Account, opened: Any, connect: Connect, db: Database
    ) -> None:
        made, _, session = await opened()
        assert (await self.refresh(connect(made["key"], address=OUTSIDE), session)).status_code == 200
        await change(owner, made["id"], allowed_cidrs=[INSIDE])
        assert await self.told(db, session) == 1

    async def test_scopes_without_agents_end_it(self, owner: Account, opened: Any, db: Database) -> None:
        scopes = ["agent:connect", "tunnels:read", "tunnels:write"]
        made, agent, session = await opened(kind="api", scopes=scopes)
        await change(owner, made["id"], scopes=scopes[:2])
        assert (await self.refresh(agent, session)).status_code == 200
        await change(owner, made["id"], scopes=["tunnels:read"])
        assert await self.told(db, session) == 1
        problem(await self.refresh(agent, session), 403, "auth.forbidden")

    async def test_no_session_slips_past_a_change(
        self, owner: Account, relay: httpx.AsyncClient, connect: Connect, db: Database
    ) -> None:
        """A session that is opened while the list changes is refused, or ended by the change."""
        for round_ in range(6):
            made = await owner.key()
            agent = connect(made["key"], address=OUTSIDE)
            body = {"agent_id": f"agt-{round_:010}", "tunnels": []}
            opened, changed = await asyncio.gather(
                agent.post("/v1/agent/sessions", json=body), change(owner, made["id"], allowed_cidrs=[INSIDE])
            )
            assert changed.status_code == 200
            if opened.status_code == 201:
                assert await self.told(db, opened.json()["session"]) == 1
            else:
                problem(opened, 403, "auth.address_denied")
            async with db.read() as reader:
                query = "SELECT count(*) FROM agent_sessions WHERE key_id = $1 AND ended_at IS NULL"
                assert await reader.raw.fetchval(query, made["id"]) == 0


class TestOthersKeys:
    """With ``keys:own`` nobody learns of keys that others made."""

    async def test_are_not_there(self, owner: Account, join: Join) -> None:
        theirs = await owner.key("agent", name="the owner's")
        developer = await join("developer")
        mine = await developer.key("agent", name="mine")
        seen = (await developer.client.get("/v1/api-keys")).json()["data"]
        assert [row["id"] for row in seen] == [mine["id"]]
        report = (await developer.client.get("/v1/api-keys/posture")).json()
        assert report["keys"] == 1 and [row["id"] for row in report["data"]] == [mine["id"]]
        for method, path, body in (
            ("GET", "", None),
            ("PATCH", "", {"name": "x"}),
            ("POST", "/rotate", None),
            ("DELETE", "", None),
        ):
            for key in (theirs["id"], "key_00000000000000000000000000"):
                answer = await developer.client.request(method, f"/v1/api-keys/{key}{path}", json=body)
                told = problem(answer, 404, "request.not_found")
                assert told["detail"] == "there is no such key"
        assert (await owner.client.get(f"/v1/api-keys/{theirs['id']}")).json()["name"] == "the owner's"

    async def test_of_another_organization(self, owner: Account, stranger: Account) -> None:
        made = await owner.key()
        problem(await change(stranger, made["id"], name="x"), 404, "request.not_found")
        problem(await stranger.client.get(f"/v1/api-keys/{made['id']}"), 404, "request.not_found")
        assert (await stranger.client.get("/v1/api-keys/posture")).json()["keys"] == 0


class TestPosture:
    async def test_findings(self, owner: Account, join: Join, db: Database) -> None:
        leaver = await join("developer")
        gone = await leaver.key()
        assert (await owner.client.delete(f"/v1/org/members/{leaver.user}")).status_code == 204
        fine = await owner.key(
            "api",
            scopes=["tunnels:read"],
            allowed_cidrs=[INSIDE],
            expires_at=(datetime.now(UTC) + timedelta(days=30)).isoformat(),
        )
        made = {name: (await owner.key("api", scopes=scopes))["id"] for name, scopes in (
            ("strong", ["keys:write"]), ("old", []), ("ancient", []), ("idle", []), ("virgin", []),
        )}  # fmt: skip
        now = datetime.now(UTC)

        async def age(key: str, days: int, used: int | None) -> None:
            values = {"created_at": now - timedelta(days=days), "last_used_at": used and now - timedelta(days=used)}
            async with db.transaction() as tx:
                await tx.execute(sa.update(api_keys).where(api_keys.c.id == key).values(**values))

        await age(made["old"], 181, 1)
        await age(made["ancient"], 366, 1)
        await age(made["idle"], 120, 91)
        await age(made["virgin"], 8, None)
        report = (await owner.client.get("/v1/api-keys/posture")).json()
        found = {row["id"]: [finding["code"] for finding in row["findings"]] for row in report["data"]}
        plain = ["no_expiry", "no_cidrs"]
        assert found == {
            made["strong"]: ["broad_scopes", *plain],
            made["old"]: ["old", *plain],
            made["ancient"]: ["very_old", *plain],
            made["idle"]: ["unused", *plain],
            made["virgin"]: ["never_used", *plain],
        }
        assert gone["id"] not in found, "keys end with their maker's membership"
        assert report["keys"] == 6 and fine["id"] not in found
        assert report["findings"] == {"high": 2, "medium": 3, "low": 10}
        assert [row["severity"] for row in report["data"]] == ["high", "high", "medium", "medium", "medium"]
        assert report["data"][0]["findings"][0]["advice"].endswith(".")

    def test_a_key_whose_maker_is_gone(self, clock: MovableClock) -> None:
        """Kept by older versions, and by accounts that were disabled."""

        class Row:
            id, kind, name, prefix, scopes, allowed_cidrs = "key_1", "agent", "x", "tnl_agt_0000", [], ["10.0.0.0/8"]
            created_at = last_used_at = clock.wall()
            expires_at = clock.wall() + timedelta(days=1)
            email, role, disabled_at = None, None, None

        report = posture.report([Row], clock.wall())
        assert [finding["code"] for finding in report["data"][0]["findings"]] == ["maker_gone"]
