"""Codes to addresses that somebody named: a stranger gets few of them, whatever is done to the channels."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from portico.kit.db import Database
from portico.settings import ApiSettings
from tests.control.conftest import Account
from tests.control.notifications.test_channels import CHANNELS, put
from tests.control.test_http import problem

MOST = 3


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    return replace(settings, channel_codes_per_organization=MOST)


def address(name: str = "victim") -> dict[str, Any]:
    return {"kind": "email", "name": "Alerts", "target": f"{name}@example.com", "events": ["*"]}


async def mailed(db: Database, organization: str) -> int:
    async with db.read() as reader:
        query = "SELECT count(*) FROM outbox_messages WHERE organization_id = $1 AND topic = 'channel.confirm'"
        return int(await reader.raw.fetchval(query, organization))


class TestStrangers:
    async def test_a_channel_that_is_made_again_and_again_mails_its_address_a_few_times(
        self, owner: Account, db: Database
    ) -> None:
        for _ in range(MOST):
            await put(owner, address())
            await put(owner)
        refused = await owner.client.put(CHANNELS, json={"channels": [address()]})
        problem(refused, 429, "notification.throttled")
        assert int(refused.headers["retry-after"]) > 0
        assert await mailed(db, owner.organization) == MOST
        assert (await owner.client.get(CHANNELS)).json()["data"] == []  # what was refused is undone

    async def test_so_does_one_whose_address_goes_to_and_fro(self, owner: Account, db: Database) -> None:
        (made,) = await put(owner, address("a"))
        for name in ("b", "a"):
            await put(owner, {**address(name), "id": made["id"]})
        changed = {**address("b"), "id": made["id"]}
        problem(await owner.client.put(CHANNELS, json={"channels": [changed]}), 429, "notification.throttled")
        problem(await owner.client.post(f"{CHANNELS}/{made['id']}/test"), 429, "notification.throttled")
        assert await mailed(db, owner.organization) == MOST

    async def test_so_do_many_requests_at_once(self, owner: Account, db: Database) -> None:
        (made,) = await put(owner, address())
        both = ({**address(), "id": made["id"]}, address("other"))
        await asyncio.gather(
            *(owner.client.post(f"{CHANNELS}/{made['id']}/test") for _ in range(4)),
            *(owner.client.put(CHANNELS, json={"channels": list(both)}) for _ in range(4)),
        )
        assert await mailed(db, owner.organization) == MOST
