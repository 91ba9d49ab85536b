"""Tunnels: names and their races, changes, stop, delete, events, and other tenants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from portico.control import requests
from portico.kit.db import Database
from portico.wire import policy
from tests.control.conftest import Account
from tests.control.tunnels.test_sessions import actions, code, payloads


async def made(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post("/v1/tunnels", json=body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


class TestCreate:
    async def test_says_what_was_made(self, owner: Account, db: Database) -> None:
        got = await made(
            owner.client,
            name="shop",
            subdomain="shop-create",
            target="http://127.0.0.1:3000",
            policy={"concurrency": 3},
        )
        assert got["id"].startswith("tun_") and got["url"] == "http://shop-create.localhost:7080"
        assert (got["name"], got["protocol"], got["state"], got["agent"]) == ("shop", "http", "offline", None)
        assert got["policy"] == {"concurrency": 3} and got["created_at"].endswith("Z")
        assert (await owner.client.get(f"/v1/tunnels/{got['id']}")).json() == got
        change = (await payloads(db))[-1]
        assert change == {
            "kind": "tunnel",
            "tunnel": {
                "id": got["id"], "organization": owner.organization, "protocol": "http", "hosts": ["shop-create.localhost"],
                "state": "active", "generation": 1, "policy": {"concurrency": 3},
                "policy_hash": policy.digest({"concurrency": 3}), "policy_version": 1,
            },
        }  # fmt: skip
        assert "tunnel.create" in await actions(db, owner.organization)

    async def test_names_follow_from_each_other(self, owner: Account, stranger: Account) -> None:
        assert (await made(owner.client, name="free-name"))["subdomain"] == "free-name"
        assert (await made(owner.client, subdomain="free-sub"))["name"] == "free-sub"
        short = await made(owner.client, name="ab")  # no subdomain has two letters
        assert short["subdomain"].startswith("ab-") and len(short["subdomain"]) == 7
        assert (await made(owner.client, name="www"))["subdomain"].startswith("www-")
        assert (await made(stranger.client, name="free-name"))["subdomain"].startswith("free-name-")
        random = await made(owner.client)
        assert random["name"] == random["subdomain"] and len(random["name"].split("-")) == 3

    async def test_taken(self, owner: Account, stranger: Account) -> None:
        await made(owner.client, name="only", subdomain="only-one")
        assert code(await owner.client.post("/v1/tunnels", json={"name": "only"}), 409) == "tunnel.name_taken"
        for client in (owner.client, stranger.client):
            answer = await client.post("/v1/tunnels", json={"name": "other", "subdomain": "only-one"})
            assert code(answer, 409) == "tunnel.subdomain_taken"

    async def test_fifty_at_once_leave_one(self, owner: Account, stranger: Account, db: Database) -> None:
        clients = (owner.client, stranger.client)
        answers = await asyncio.gather(
            *(clients[n % 2].post("/v1/tunnels", json={"name": f"n{n}", "subdomain": "fought-over"}) for n in range(50))
        )
        assert sorted(a.status_code for a in answers) == [201] + [409] * 49
        assert {a.json()["code"] for a in answers if a.status_code == 409} == {"tunnel.subdomain_taken"}
        async with db.read() as reader:
            assert await reader.raw.fetchval("SELECT count(*) FROM tunnels WHERE subdomain = 'fought-over'") == 1
        ids = {
            c["tunnel"]["id"]
            for c in await payloads(db)
            if c["kind"] == "tunnel" and c["tunnel"]["hosts"] == ["fought-over.localhost"]
        }
        assert len(ids) == 1, "the refused ones told nobody"

    @pytest.mark.parametrize(
        ("bad", "status", "expected"),
        [
            ({"name": "has space"}, 400, "tunnel.name_invalid"),
            ({"name": "a_b"}, 400, "tunnel.name_invalid"),
            ({"name": "trailing-"}, 400, "tunnel.name_invalid"),
            ({"name": "é"}, 400, "tunnel.name_invalid"),
            ({"name": "a\n"}, 400, "tunnel.name_invalid"),
            ({"subdomain": "a.b"}, 400, "tunnel.name_invalid"),
            ({"subdomain": "Shop"}, 400, "tunnel.name_invalid"),
            ({"subdomain": "xn--80ak6aa92e"}, 403, "tunnel.name_reserved"),
            ({"subdomain": "api"}, 403, "tunnel.name_reserved"),
            ({"policy": {"cocurrency": 3}}, 400, "tunnel.policy_invalid"),
            ({"protocol": "tls", "remote_port": 7100}, 400, "tunnel.port_invalid"),
            ({"domain": "app.example.com"}, 400, "tunnel.domain_unavailable"),
            ({"protocol": "udp"}, 422, "request.invalid"),
            ({"nmae": "typo"}, 422, "request.invalid"),
            ({"name": 5}, 422, "request.invalid"),
            ({"name": "x" * 64}, 422, "request.invalid"),
            ({"target": "bell\u0007"}, 422, "request.invalid"),
        ],
    )
    async def test_refused(self, owner: Account, bad: dict[str, Any], status: int, expected: str) -> None:
        answer = await owner.client.post("/v1/tunnels", json=bad)
        assert code(answer, status) == expected
        if expected == "tunnel.policy_invalid":
            assert answer.json()["path"] == "cocurrency"

    async def test_idempotency_key(self, owner: Account) -> None:
        headers = {"Idempotency-Key": "make-it-once"}
        answers = [await owner.client.post("/v1/tunnels", json={"name": "once"}, headers=headers) for _ in range(2)]
        assert [a.status_code for a in answers] == [201, 201] and answers[0].json() == answers[1].json()


class TestList:
    async def test_pages(self, owner: Account, stranger: Account) -> None:
        ids = [(await made(owner.client))["id"] for _ in range(5)]
        await made(stranger.client)
        first = (await owner.client.get("/v1/tunnels", params={"limit": 3})).json()
        rest = (await owner.client.get("/v1/tunnels", params={"limit": 3, "cursor": first["next_cursor"]})).json()
        assert [t["id"] for t in first["data"] + rest["data"]] == ids and rest["next_cursor"] is None


class TestChange:
    async def test_a_new_subdomain_fences_a_new_policy_does_not_and_both_tell(
        self, owner: Account, db: Database
    ) -> None:
        tunnel = await made(owner.client, name="change", subdomain="change-1")
        path = f"/v1/tunnels/{tunnel['id']}"
        got = (await owner.client.patch(path, json={"subdomain": "change-2"})).json()
        assert got["url"] == "http://change-2.localhost:7080"
        assert (await payloads(db))[-1]["tunnel"] | {"generation": 2} == (await payloads(db))[-1]["tunnel"]
        await owner.client.patch(path, json={"policy": {"concurrency": 1}})
        told = (await payloads(db))[-1]["tunnel"]
        assert (told["generation"], told["policy_version"], told["policy"]) == (2, 2, {"concurrency": 1})
        before = len(await payloads(db))
        got = (await owner.client.patch(path, json={"name": "renamed", "target": None})).json()
        assert got["name"] == "renamed" and len(await payloads(db)) == before, "relays need not know its name"
        again = await owner.client.patch(path, json={"policy": {"concurrency": 1}, "name": "renamed"})
        assert again.json()["updated_at"] == got["updated_at"] and len(await payloads(db)) == before

    async def test_taken_and_wrong(self, owner: Account) -> None:
        await made(owner.client, name="held", subdomain="held-sub")
        tunnel = await made(owner.client, name="mine")
        for body, status, expected in (
            ({"name": "held"}, 409, "tunnel.name_taken"),
            ({"subdomain": "held-sub"}, 409, "tunnel.subdomain_taken"),
            ({"subdomain": "login"}, 403, "tunnel.name_reserved"),
            ({"name": None}, 400, "tunnel.name_invalid"),
            ({"policy": {"x": 1}}, 400, "tunnel.policy_invalid"),
            ({"state": "active"}, 422, "request.invalid"),
        ):
            assert code(await owner.client.patch(f"/v1/tunnels/{tunnel['id']}", json=body), status) == expected
        assert (await owner.client.get(f"/v1/tunnels/{tunnel['id']}")).json() == tunnel


class TestPolicy:
    async def test_written_as_text_shown_without_digests(self, owner: Account, db: Database) -> None:
        text = "basic_auth:\n  users:\n    - {name: alice, password: open sesame}\n"
        tunnel = await made(owner.client, name="texts", policy=text)
        assert tunnel["policy"] == {"basic_auth": {"users": [{"name": "alice"}]}} and tunnel["policy_version"] == 1
        path = f"/v1/tunnels/{tunnel['id']}"
        more = {**tunnel["policy"], "addresses": {"rules": [{"allow": "10.0.0.0/8"}]}}
        got = (await owner.client.patch(path, json={"policy": more, "policy_version": 1})).json()
        assert got["policy"] == more and got["policy_version"] == 2
        first, last = [c["tunnel"]["policy"]["basic_auth"] for c in (await payloads(db))[-2:]]
        assert first == last and last["users"][0]["digest"].startswith("$argon2id$"), "the password is kept"
        history = (await owner.client.get(f"{path}/events")).text
        assert '"policy_version":2' in history and "argon2id" not in history

    async def test_values_of_header_rules_stay_out_of_logs(self, owner: Account, db: Database) -> None:
        """They may be credentials of the target; the logs are kept for long, and read by others."""
        add = [{"name": "Authorization", "value": "Basic c2VjcmV0LXZhbHVl"}]
        rules = {"headers": {"host": "app.internal", "request": {"add": add, "remove": ["x-debug"]}}}
        tunnel = await made(owner.client, name="headers")
        path = f"/v1/tunnels/{tunnel['id']}"
        assert (await owner.client.patch(path, json={"policy": rules})).json()["policy"] == rules
        for log in (f"{path}/events", "/v1/audit", "/v1/events"):
            text = (await owner.client.get(log)).text
            assert "c2VjcmV0LXZhbHVl" not in text
            assert "Authorization" in text, "which field it is may be told"

    async def test_the_answer_of_a_repeated_write(self, owner: Account, db: Database) -> None:
        body = {"name": "repeated", "policy": {"basic_auth": {"users": [{"name": "a", "password": "b"}]}}}
        answers = [
            await owner.client.post("/v1/tunnels", json=body, headers={"Idempotency-Key": "policy-1"}) for _ in "ab"
        ]
        assert [answer.status_code for answer in answers] == [201, 201] and answers[0].json() == answers[1].json()
        assert answers[1].headers["idempotency-replayed"] == "true"
        async with db.read() as reader:
            mark = await reader.raw.fetchval("SELECT fingerprint FROM idempotency_keys WHERE key = 'policy-1'")
        assert mark != requests.fingerprint("POST", "/v1/tunnels", "", answers[0].request.content), (
            "a password could be tried"
        )

    async def test_a_policy_that_is_not_valid_changes_nothing(self, owner: Account, db: Database) -> None:
        tunnel = await made(owner.client, name="invalid-policy", policy={"concurrency": 3})
        before = len(await payloads(db))
        text = "concurrency: 0\naddresses:\n  rules:\n    - allow: 10.0.0.1/8\n"
        answer = await owner.client.patch(f"/v1/tunnels/{tunnel['id']}", json={"policy": text, "name": "renamed-too"})
        assert code(answer, 400) == "tunnel.policy_invalid"
        assert [(e["path"], e["line"], e["column"]) for e in answer.json()["errors"]] == [
            ("concurrency", 1, 1), ("addresses.rules[0].allow", 4, 7),
        ]  # fmt: skip
        assert (await owner.client.get(f"/v1/tunnels/{tunnel['id']}")).json() == tunnel
        assert len(await payloads(db)) == before

    async def test_two_who_change_it_at_once(self, owner: Account) -> None:
        tunnel = await made(owner.client, name="contended")
        path = f"/v1/tunnels/{tunnel['id']}"
        answers = await asyncio.gather(
            *(owner.client.patch(path, json={"policy": {"concurrency": n + 1}, "policy_version": 1}) for n in range(5))
        )
        assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409, 409]
        refused = next(answer for answer in answers if answer.status_code == 409)
        assert code(refused, 409) == "tunnel.policy_conflict" and refused.json()["policy_version"] == 2

    async def test_one_organization_does_not_fill_the_relays(self, owner: Account, app: Any) -> None:
        object.__setattr__(app.state.settings, "policy_bytes_per_organization", 5000)
        large = {"headers": {"response": {"add": [{"name": "X-Long", "value": "x" * 1000}] * 3}}}
        first = await made(owner.client, name="large-policy", policy=large)
        answer = await owner.client.post("/v1/tunnels", json={"name": "large-too", "policy": large})
        assert code(answer, 403) == "tunnel.limit_reached" and answer.json()["limit"] == 5000
        small = await made(owner.client, name="small-policy", policy={"concurrency": 5})
        path = f"/v1/tunnels/{small['id']}"
        assert code(await owner.client.patch(path, json={"policy": large}), 403) == "tunnel.limit_reached"
        longer = {**large, "concurrency": 5}  # a change of what is there already counts once
        assert (await owner.client.patch(f"/v1/tunnels/{first['id']}", json={"policy": longer})).status_code == 200

    async def test_what_a_protocol_cannot_enforce(self, owner: Account) -> None:
        tls = await made(owner.client, name="through", protocol="tls", policy={"concurrency": 5})
        answer = await owner.client.patch(f"/v1/tunnels/{tls['id']}", json={"policy": {"plain_http": "refuse"}})
        assert code(answer, 400) == "tunnel.policy_invalid" and answer.json()["errors"][0]["path"] == "plain_http"


class TestStopAndDelete:
    async def test_stop_twice_is_one_stop(self, owner: Account, db: Database) -> None:
        tunnel = await made(owner.client, name="stopping")
        for _ in range(2):
            answer = await owner.client.post(f"/v1/tunnels/{tunnel['id']}/stop")
            assert answer.status_code == 200 and answer.json()["state"] == "stopped"
        told = [c for c in await payloads(db) if c["kind"] == "tunnel" and c["tunnel"]["id"] == tunnel["id"]]
        assert [(c["tunnel"]["state"], c["tunnel"]["generation"]) for c in told] == [("active", 1), ("stopped", 2)]
        assert (await actions(db, owner.organization)).count("tunnel.stop") == 1

    async def test_delete_frees_both_names(self, owner: Account, db: Database) -> None:
        tunnel = await made(owner.client, name="gone", subdomain="gone-sub")
        assert (await owner.client.delete(f"/v1/tunnels/{tunnel['id']}")).status_code == 204
        assert (await payloads(db))[-1] == {"kind": "tunnel_removed", "id": tunnel["id"], "code": "tunnel.deleted"}
        assert code(await owner.client.delete(f"/v1/tunnels/{tunnel['id']}"), 404) == "tunnel.not_found"
        await made(owner.client, name="gone")
        await made(owner.client, subdomain="gone-sub")  # for others: test_claims.py
        assert "tunnel.delete" in await actions(db, owner.organization)

    async def test_a_suspended_tunnel_serves_nobody(
        self, owner: Account, agent: httpx.AsyncClient, db: Database
    ) -> None:
        tunnel = await made(owner.client, name="held-back")
        async with db.transaction() as tx:
            await tx.raw.execute("UPDATE tunnels SET state = 'suspended' WHERE id = $1", tunnel["id"])
        body = {"agent_id": "agt-0123456789", "tunnels": [{"name": "held-back"}]}
        assert code(await agent.post("/v1/agent/sessions", json=body), 403) == "tunnel.suspended"
        answer = await owner.client.post(f"/v1/tunnels/{tunnel['id']}/stop")
        assert answer.json()["state"] == "suspended", "stopping does not lift it"


class TestEvents:
    async def test_history_newest_first(self, owner: Account, agent: httpx.AsyncClient) -> None:
        tunnel = await made(owner.client, name="history")
        await agent.post("/v1/agent/sessions", json={"agent_id": "agt-0123456789", "tunnels": [{"name": "history"}]})
        await owner.client.post(f"/v1/tunnels/{tunnel['id']}/stop")
        await agent.post("/v1/agent/sessions", json={"agent_id": "agt-0123456789", "tunnels": [{"name": "history"}]})
        path = f"/v1/tunnels/{tunnel['id']}/events"
        events = (await owner.client.get(path)).json()["data"]
        assert [e["kind"] for e in events] == ["started", "stopped", "session", "created"]
        page = (await owner.client.get(path, params={"limit": 1})).json()
        rest = (await owner.client.get(path, params={"cursor": page["next_cursor"]})).json()
        assert page["data"] + rest["data"] == events


class TestTenants:
    async def test_another_organizations_tunnel_does_not_exist(
        self, owner: Account, stranger: Account, connect: Callable[..., httpx.AsyncClient]
    ) -> None:
        tunnel = await made(owner.client, name="private")
        path = f"/v1/tunnels/{tunnel['id']}"
        their_key = connect((await stranger.key())["key"])
        for client in (stranger.client, their_key):
            assert code(await client.get(path), 404) == "tunnel.not_found"
            assert code(await client.patch(path, json={"name": "stolen"}), 404) == "tunnel.not_found"
            assert code(await client.post(f"{path}/stop"), 404) == "tunnel.not_found"
            assert code(await client.get(f"{path}/events"), 404) == "tunnel.not_found"
            assert code(await client.delete(path), 404) == "tunnel.not_found"
            assert (await client.get("/v1/tunnels")).json()["data"] == []
        assert (await owner.client.get(path)).json() == tunnel

    async def test_scopes(self, owner: Account, connect: Callable[..., httpx.AsyncClient]) -> None:
        tunnel = await made(owner.client)
        reader = connect((await owner.key("api", scopes=["tunnels:read"]))["key"])
        path = f"/v1/tunnels/{tunnel['id']}"
        assert (await reader.get(path)).status_code == 200
        for answer in (
            await reader.post("/v1/tunnels", json={}),
            await reader.patch(path, json={"name": "x"}),
            await reader.post(f"{path}/stop"),
            await reader.delete(path),
        ):
            assert code(answer, 403) == "auth.forbidden"
        nothing = connect((await owner.key("api", scopes=["audit:read"]))["key"])
        assert code(await nothing.get(path), 403) == "auth.forbidden"
        assert code(await connect().get(path), 401) == "auth.required"
