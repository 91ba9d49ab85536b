"""Idempotency keys: a repeated write is carried out once, also when the repeats race."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control import requests
from portico.kit.db import Database, Tx
from tests.control.conftest import Account
from tests.control.test_http import problem

BODY = {"kind": "agent", "name": "laptop"}


async def _post(account: Account, key: str, body: Any = None, path: str = "/v1/api-keys") -> httpx.Response:
    return await account.client.post(path, json=body or BODY, headers={"Idempotency-Key": key})


async def _count(account: Account) -> int:
    return len((await account.client.get("/v1/api-keys")).json()["data"])


class TestReplay:
    async def test_the_repeat_gets_the_first_answer_and_changes_nothing(self, owner: Account) -> None:
        first, second = await _post(owner, "k1"), await _post(owner, "k1")
        assert first.status_code == second.status_code == 201
        assert first.content == second.content
        assert second.headers["idempotency-replayed"] == "true"
        assert "idempotency-replayed" not in first.headers
        assert await _count(owner) == 1

    async def test_empty_answers_repeat_too(self, owner: Account) -> None:
        key = await owner.key()
        for _ in range(2):
            answer = await owner.client.delete(f"/v1/api-keys/{key['id']}", headers={"Idempotency-Key": "gone"})
            assert answer.status_code == 204
            assert answer.content == b""

    async def test_a_stored_secret_is_not_readable_in_the_database(self, owner: Account, db: Database) -> None:
        answer = await _post(owner, "k1")
        async with db.read() as reader:
            rows = await reader.fetch_all(sa.select(requests.idempotency_keys.c.body))
        assert rows
        assert all(answer.json()["key"].encode() not in row.body for row in rows)

    async def test_another_body_or_route_under_the_key_is_a_mismatch(self, owner: Account) -> None:
        await _post(owner, "k1")
        problem(await _post(owner, "k1", {"kind": "agent", "name": "other"}), 422, "idempotency.mismatch")
        answer = await owner.client.post("/v1/auth/logout", headers={"Idempotency-Key": "k1"})
        problem(answer, 422, "idempotency.mismatch")
        assert (await owner.client.get("/v1/whoami")).status_code == 200

    async def test_keys_of_two_callers_do_not_meet(self, owner: Account, stranger: Account) -> None:
        first, second = await _post(owner, "same"), await _post(stranger, "same")
        assert first.json()["id"] != second.json()["id"]

    async def test_a_refusal_is_not_kept(self, owner: Account) -> None:
        body = {"kind": "api", "name": "x", "scopes": ["nope:nope"]}
        problem(await _post(owner, "k2", body), 400, "auth.scope_invalid")
        assert (await _post(owner, "k2", BODY)).status_code == 201

    @pytest.mark.parametrize("key", [" ", "a b", "x" * 256, "tab\t"])
    async def test_bad_keys(self, owner: Account, key: str) -> None:
        problem(await _post(owner, key), 400, "idempotency.key_invalid")

    async def test_without_a_credential_nothing_is_kept(self, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/api-keys", json=BODY, headers={"Idempotency-Key": "k"})
        problem(answer, 401, "auth.required")

    async def test_keys_expire(self, owner: Account, db: Database) -> None:
        first = await _post(owner, "old")
        async with db.transaction() as tx:
            day = sa.text(
                "UPDATE idempotency_keys SET created_at = now() - interval '24 hours 1 second' WHERE key = 'old'"
            )
            await tx.execute(day)
        second = await _post(owner, "old")
        assert first.json()["id"] != second.json()["id"]
        assert (await _post(owner, "old")).json() == second.json()

    async def test_housekeeping_deletes_expired_ones(self, owner: Account, db: Database, clock: Any) -> None:
        await _post(owner, "swept")
        assert await requests.expire(db, clock.wall(), 86_400) == 0
        clock.advance(86_401)
        assert await requests.expire(db, clock.wall(), 86_400) >= 1


class TestRaces:
    async def test_concurrent_duplicates_act_once(self, owner: Account) -> None:
        answers = await asyncio.gather(*(_post(owner, "race") for _ in range(7)))
        assert {a.status_code for a in answers} == {201}
        assert len({a.content for a in answers}) == 1
        assert await _count(owner) == 1

    async def test_a_duplicate_of_a_slow_request_is_told_to_wait(self, owner: Account, app: Any, db: Database) -> None:
        """The first request holds its key in an open transaction; the lock timeout bounds the wait of the second."""
        async with db.transaction() as tx:
            await tx.execute(sa.text("SET LOCAL lock_timeout = '5s'"))
            who = f"{owner.user} {owner.organization} {owner.session}"
            row = {"caller": who, "key": "slow", "fingerprint": b"x"}
            await tx.execute(sa.insert(requests.idempotency_keys).values(**row))
            waiting = asyncio.create_task(_post(owner, "slow"))
            answer = await waiting
        problem(answer, 409, "idempotency.in_progress")

    async def test_when_the_first_fails_the_second_acts(self, owner: Account, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = 0
        real = requests._remember

        async def fails_once(tx: Tx, *arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                await asyncio.sleep(0.05)
                raise RuntimeError("crash before the commit")
            await real(tx, *arguments)

        monkeypatch.setattr(requests, "_remember", fails_once)
        answers = await asyncio.gather(_post(owner, "crash"), _post(owner, "crash"))
        assert sorted(a.status_code for a in answers) == [201, 500]
        assert await _count(owner) == 1
