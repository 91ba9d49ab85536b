"""The first start: made once, kept, replaced only when its text is lost."""

from __future__ import annotations

from typing import Any

import httpx
import sqlalchemy as sa

from portico.control import bootstrap
from portico.control.identity.tables import api_keys, organizations
from portico.kit.db import Database
from portico.settings import ApiSettings
from tests.control.test_http import problem


async def test_first_and_later_starts(settings: ApiSettings, app: Any, connect: Any, db: Database) -> None:
    first = await bootstrap.ensure_first(settings, relays=["relay-1", "relay-2"])
    assert first.first_admin is not None
    assert first.first_admin.email == "admin@localhost"
    assert first.first_admin.password not in repr(first)
    assert sorted(first.relay_keys) == ["relay-1", "relay-2"]
    assert all(key.startswith("tnl_rly_") for key in first.relay_keys.values())

    operator = (await connect(first.operator_key).get("/v1/whoami")).json()
    assert (operator["kind"], operator["platform_operator"], operator["organization"]) == ("operator", True, None)
    agent = (await connect(first.agent_key).get("/v1/whoami")).json()
    assert (agent["kind"], agent["organization"]["id"]) == ("agent_key", first.organization_id)

    known = {"operator_key": first.operator_key, "agent_key": first.agent_key}
    second = await bootstrap.ensure_first(settings, known=known)
    assert (second.organization_id, second.operator_key, second.agent_key) == (
        first.organization_id,
        first.operator_key,
        first.agent_key,
    )
    assert second.first_admin is None
    assert bootstrap.document(second)["first_admin"] is None

    lost = await bootstrap.ensure_first(settings, known={"operator_key": "tnl_opr_x", "agent_key": None})
    assert lost.organization_id == first.organization_id
    problem(await connect(first.operator_key).get("/v1/whoami"), 401, "auth.key_revoked")
    for key in (lost.operator_key, lost.agent_key, first.agent_key):
        assert (await connect(key).get("/v1/whoami")).status_code == 200
    async with db.read() as reader:
        live = sa.select(sa.func.count()).where(api_keys.c.kind == "operator", api_keys.c.revoked_at.is_(None))
        assert await reader.scalar(live) == 1
        assert await reader.scalar(sa.select(sa.func.count()).select_from(organizations)) == 1


async def test_the_first_admin_can_sign_in_and_is_operator(
    settings: ApiSettings, client: httpx.AsyncClient, connect: Any, db: Database
) -> None:
    async with db.transaction() as tx:
        await tx.execute(sa.text("TRUNCATE users, organizations CASCADE"))
    made = await bootstrap.ensure_first(settings)
    assert made.first_admin is not None
    body = {"email": made.first_admin.email, "password": made.first_admin.password}
    answer = await client.post("/v1/auth/login", json=body)
    # "admin@localhost" is an address of this installation, not of the internet; it must sign in all the same.
    assert answer.status_code == 200, answer.text
    person = connect(answer.json()["access_token"])
    assert (await person.get("/v1/whoami")).json()["platform_operator"] is True
    acts = {row["action"] for row in (await person.get("/v1/audit")).json()["data"]}
    assert {"user.register", "organization.create", "key.create"} <= acts


async def test_an_operator_key_acts_in_no_organization(settings: ApiSettings, app: Any, connect: Any) -> None:
    made = await bootstrap.ensure_first(settings)
    client = connect(made.operator_key)
    for path in ("/v1/api-keys", "/v1/audit"):
        problem(await client.get(path), 403, "auth.forbidden")


async def test_a_new_start_revokes_the_relay_keys_of_the_last_one(
    settings: ApiSettings, app: Any, connect: Any
) -> None:
    beat = {
        "relay": "relay-9", "region": "local", "connect_url": "ws://127.0.0.1:1/v1/connect", "public_url": "http://127.0.0.1:1",
        "version": 0, "load": {}, "draining": False, "bound": [],
    }  # fmt: skip
    first = await bootstrap.ensure_first(settings, relays=["relay-9", "relay-8"])
    second = await bootstrap.ensure_first(settings, relays=["relay-9"])
    problem(
        await connect(first.relay_keys["relay-9"]).post("/v1/edge/heartbeat", json=beat), 401, "edge.relay_key_revoked"
    )
    assert (await connect(second.relay_keys["relay-9"]).post("/v1/edge/heartbeat", json=beat)).status_code == 200
    other = {**beat, "relay": "relay-8"}
    assert (await connect(first.relay_keys["relay-8"]).post("/v1/edge/heartbeat", json=other)).status_code == 200
