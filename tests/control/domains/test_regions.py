"""Registering and removing the public keys of regions."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from portico.control.access import Caller
from portico.control.domains import regions
from portico.control.domains.vault import Vault
from portico.control.identity.keys import issue
from portico.errors import Problem
from portico.kit import envelope
from portico.kit.db import Database
from tests.control.conftest import MovableClock
from tests.control.domains.certificates import Fleet, domain, rows, store, worker_vault

PATH = "/v1/admin/regions"


@pytest.fixture
async def operator(db: Database, clock: MovableClock, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    """A client with an operator key."""
    async with db.transaction() as tx:
        key = await issue(tx, clock.wall(), None, None, "operator", "operator", [])
    return connect(key.key)


@pytest.fixture
async def fleet(db: Database) -> Fleet:
    async with db.transaction() as tx:
        for table in ("certificate_region_keys", "relays", "certificate_heads", "certificate_versions"):
            await tx.raw.execute(f"DELETE FROM {table}")
    return Fleet(db)


def public(key: X25519PrivateKey | None = None) -> str:
    raw = (key or X25519PrivateKey.generate()).public_key().public_bytes_raw()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


async def add(operator: httpx.AsyncClient, region: str, key: str) -> httpx.Response:
    return await operator.post(PATH, json={"region": region, "public_key": key})


class TestAdd:
    async def test_a_key_is_listed_with_the_relays_that_need_it(
        self, db: Database, fleet: Fleet, operator: httpx.AsyncClient
    ) -> None:
        await fleet.alive("eu-1", "eu")
        await fleet.alive("us-1", "us")
        key = X25519PrivateKey.generate()
        made = await add(operator, "eu", public(key))
        assert made.status_code == 201, made.text
        assert made.json()["key_id"] == envelope.key_id(key.public_key()) and made.json()["missing"] == 0
        again = await add(operator, "eu", public(key))
        assert (again.status_code, again.json()) == (201, made.json())
        listed = (await operator.get(PATH)).json()["data"]
        assert [(one["region"], len(one["keys"]), one["relays"]) for one in listed] == [
            ("eu", 1, ["eu-1"]),
            ("us", 0, ["us-1"]),
        ]
        audited = await rows(db, "SELECT action FROM audit_events WHERE target = $1", made.json()["key_id"])
        assert [row["action"] for row in audited] == ["region.add_key"]  # the second changed nothing

    @pytest.mark.parametrize(
        "bad", ["nonsense", "A" * 42, "A" * 44, base64.urlsafe_b64encode(bytes(32)).decode().rstrip("="), "é" * 43]
    )
    async def test_what_is_no_key(self, fleet: Fleet, operator: httpx.AsyncClient, bad: str) -> None:
        """Also the point of low order, for which every wrap would open to everybody."""
        answer = await add(operator, "eu", bad)
        assert answer.status_code in (400, 422), answer.text
        if answer.status_code == 400:
            assert answer.json()["code"] == "region.key_invalid"

    async def test_a_key_is_one_regions(self, fleet: Fleet, operator: httpx.AsyncClient) -> None:
        key = public()
        assert (await add(operator, "eu", key)).status_code == 201
        answer = await add(operator, "us", key)
        assert (answer.status_code, answer.json()["code"]) == (409, "region.key_taken")

    async def test_too_many(self, fleet: Fleet, operator: httpx.AsyncClient) -> None:
        for _ in range(4):
            assert (await add(operator, "eu", public())).status_code == 201
        answer = await add(operator, "eu", public())
        assert (answer.status_code, answer.json()["code"]) == (409, "region.too_many_keys")


class TestRemove:
    async def test_not_before_its_successor_has_everything(
        self, db: Database, fleet: Fleet, operator: httpx.AsyncClient, tmp_path: Path
    ) -> None:
        sealer: Vault = worker_vault(tmp_path)
        old = await fleet.region("eu", "eu-1")
        await store(db, sealer, await domain(db, "a.example.com"), "a.example.com")
        path = f"{PATH}/eu/keys/{envelope.key_id(old.public_key())}"
        answer = await operator.delete(path)
        assert (answer.status_code, answer.json()["code"]) == (409, "region.key_needed")
        assert "eu-1" in answer.json()["detail"]
        successor = (await add(operator, "eu", public())).json()
        assert successor["missing"] == 1
        answer = await operator.delete(path)
        assert (answer.status_code, answer.json()["code"]) == (409, "region.key_needed")
        await sealer.rewrap(db)
        assert (await operator.delete(path)).status_code == 204
        left = await rows(db, "SELECT key_id FROM certificate_wraps")
        assert [row["key_id"] for row in left] == [successor["key_id"]]
        answer = await operator.delete(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "region.key_not_found")

    async def test_a_region_that_nobody_serves_in_can_leave(
        self, db: Database, fleet: Fleet, operator: httpx.AsyncClient
    ) -> None:
        key = await fleet.region("eu")
        assert (await operator.delete(f"{PATH}/eu/keys/{envelope.key_id(key.public_key())}")).status_code == 204
        assert (await operator.get(PATH)).json()["data"] == []


async def test_one_key_is_not_registered_for_two_regions_at_once(db: Database, fleet: Fleet) -> None:
    """Relays of one could open what is wrapped for the other."""
    who, key = Caller("operator", "key_1", None), public()
    async with db.transaction() as tx:
        await regions.add_key(tx, who, "eu", key)

        async def other() -> None:
            async with db.transaction() as tx:
                await regions.add_key(tx, who, "us", key)

        asked = asyncio.create_task(other())
        await asyncio.wait([asked], timeout=0.3)  # it waits, or is wrong by now
    with pytest.raises(Problem) as refused:
        await asked
    assert refused.value.code == "region.key_taken"
