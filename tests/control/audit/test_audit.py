"""The audit log: with the act or not at all, and for its own organization alone."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from portico.control.access import Caller
from portico.control.audit import service
from portico.control.audit.store import audit_events
from portico.kit.db import Database
from tests.control.conftest import Account
from tests.control.test_http import problem


async def _rows(db: Database, target: str) -> list[Any]:
    async with db.read() as reader:
        return list(await reader.fetch_all(sa.select(audit_events).where(audit_events.c.target == target)))


async def test_a_rolled_back_act_leaves_no_row(db: Database) -> None:
    with pytest.raises(KeyError):
        async with db.transaction() as tx:
            await service.record(tx, Caller("person", "usr_1", "org_1"), "thing.change", "thing_1")
            raise KeyError
    assert await _rows(db, "thing_1") == []


async def test_a_refused_act_keeps_its_row_though_the_act_is_rolled_back(db: Database) -> None:
    who = Caller("person", "usr_1", "org_1", request_id="req_1", address="192.0.2.1")
    with pytest.raises(KeyError):
        async with db.transaction():
            await service.refused(db, who, "thing.delete", "thing_2", {"why": "not yours"})
            raise KeyError
    (row,) = await _rows(db, "thing_2")
    assert (row.outcome, row.actor_id, row.request_id, row.address) == ("refused", "usr_1", "req_1", "192.0.2.1")
    assert row.details == {"why": "not yours"}


async def test_every_write_has_a_row_with_its_request(owner: Account) -> None:
    answer = await owner.client.post("/v1/api-keys", json={"kind": "agent", "name": "x"})
    (row,) = (await owner.client.get("/v1/audit", params={"action": "key.create"})).json()["data"]
    assert row["request_id"] == answer.headers["x-request-id"]
    assert row["actor"] == {"kind": "person", "id": owner.user, "address": "127.0.0.1"}
    assert row["target"] == answer.json()["id"]
    assert row["outcome"] == "success"


async def test_pages_newest_first(owner: Account) -> None:
    for n in range(5):
        await owner.key(name=f"k{n}")
    seen: list[str] = []
    params = {"limit": "2", "action": "key.create"}
    while True:
        page = (await owner.client.get("/v1/audit", params=params)).json()
        seen += [row["details"]["name"] for row in page["data"]]
        if page["next_cursor"] is None:
            break
        params["cursor"] = page["next_cursor"]
    assert seen == ["k4", "k3", "k2", "k1", "k0"]


async def test_needs_its_permission_and_a_sane_filter(owner: Account, connect: Any) -> None:
    agent = connect((await owner.key())["key"])
    problem(await agent.get("/v1/audit"), 403, "auth.forbidden")
    problem(await owner.client.get("/v1/audit", params={"action": "x' OR 1=1"}), 422, "request.invalid")
