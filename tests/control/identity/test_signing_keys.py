"""Signing keys: published before they sign, kept until their tokens are over, sealed at rest."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.identity.signing_keys import SigningKeys
from portico.control.identity.tables import signing_keys as table
from portico.errors import Problem
from portico.kit.db import Database, Tx
from portico.kit.sealing import Sealer, new_master_key
from portico.settings import ApiSettings, Secret
from tests.control.conftest import Account, MovableClock
from tests.control.test_http import problem


@pytest.fixture
async def empty(db: Database) -> Database:
    async with db.transaction() as tx:
        await tx.execute(sa.delete(table))
    return db


@pytest.fixture
def keys(settings: ApiSettings, clock: MovableClock) -> SigningKeys:
    return SigningKeys(settings, Sealer(settings.master_key), clock)


async def _states(db: Database) -> dict[str, str]:
    async with db.read() as reader:
        return {row.kid: row.state for row in await reader.fetch_all(sa.select(table))}


async def _rotate(db: Database, keys: SigningKeys, **more: Any) -> bool:
    async with db.transaction() as tx:
        return await keys.rotate(tx, **more)


async def _signer(db: Database, keys: SigningKeys) -> str:
    async with db.read() as reader:
        return (await keys.current_signer(reader)).kid


async def _published(db: Database, keys: SigningKeys) -> set[str]:
    async with db.read() as reader:
        return {key["kid"] for key in await keys.public_jwks(reader)}


class TestLife:
    async def test_first_keys(self, empty: Database, keys: SigningKeys) -> None:
        with pytest.raises(Problem) as refused:
            await _signer(empty, keys)
        assert refused.value.code == "service.unavailable"
        assert await _rotate(empty, keys)
        assert sorted((await _states(empty)).values()) == ["active", "next"]
        assert not await _rotate(empty, keys)

    async def test_a_key_is_published_before_it_signs_and_after(
        self, empty: Database, keys: SigningKeys, settings: ApiSettings, clock: MovableClock
    ) -> None:
        await _rotate(empty, keys)
        first = await _signer(empty, keys)
        (following,) = await _published(empty, keys) - {first}
        clock.advance(settings.signing_key_seconds - 10)
        assert not await _rotate(empty, keys)
        clock.advance(20)
        assert await _rotate(empty, keys)
        assert await _signer(empty, keys) == following
        assert {first, following} < await _published(empty, keys)
        clock.advance(settings.signing_key_retired_seconds - 60)
        await _rotate(empty, keys)
        assert first in await _published(empty, keys)
        clock.advance(120)
        await _rotate(empty, keys)
        assert first not in await _published(empty, keys)

    async def test_a_next_key_published_too_late_waits(
        self, empty: Database, keys: SigningKeys, settings: ApiSettings, clock: MovableClock
    ) -> None:
        await _rotate(empty, keys)
        first = await _signer(empty, keys)
        clock.advance(settings.signing_key_seconds)
        async with empty.transaction() as tx:
            await tx.execute(sa.update(table).where(table.c.state == "next").values(created_at=clock.wall()))
        assert not await _rotate(empty, keys)
        assert await _signer(empty, keys) == first
        assert await _rotate(empty, keys, force=True)  # a leaked key does not wait

    async def test_retired_keys_lose_their_private_half(
        self, empty: Database, keys: SigningKeys, settings: ApiSettings, clock: MovableClock
    ) -> None:
        await _rotate(empty, keys)
        clock.advance(settings.signing_key_seconds + 1)
        await _rotate(empty, keys)
        async with empty.read() as reader:
            rows = await reader.fetch_all(sa.select(table))
        assert {row.state: row.sealed_seed is None for row in rows} == {"active": False, "next": False, "retired": True}

    async def test_concurrent_rotations_make_one_pair(
        self, empty: Database, settings: ApiSettings, clock: MovableClock
    ) -> None:
        sealer = Sealer(settings.master_key)
        several = [SigningKeys(settings, sealer, clock) for _ in range(6)]
        changed = await asyncio.gather(*(_rotate(empty, one) for one in several))
        assert changed.count(True) == 1
        assert sorted((await _states(empty)).values()) == ["active", "next"]
        clock.advance(settings.signing_key_seconds + 1)
        changed = await asyncio.gather(*(_rotate(empty, one) for one in several))
        assert changed.count(True) == 1
        assert sorted((await _states(empty)).values()) == ["active", "next", "retired"]

    async def test_change_is_told_in_the_same_transaction(self, empty: Database, keys: SigningKeys) -> None:
        told: list[Sequence[dict[str, str]]] = []

        async def fails(tx: Tx, jwks: Sequence[dict[str, str]]) -> None:
            told.append(jwks)
            raise RuntimeError("cannot tell")

        keys.on_changed.append(fails)
        with pytest.raises(RuntimeError):
            await _rotate(empty, keys)
        assert [len(jwks) for jwks in told] == [2]
        assert await _states(empty) == {}


class TestAtRest:
    async def test_the_seed_is_sealed(self, empty: Database, keys: SigningKeys) -> None:
        await _rotate(empty, keys)
        async with empty.read() as reader:
            signer = await keys.current_signer(reader)
            sealed = await reader.scalar(sa.select(table.c.sealed_seed).where(table.c.kid == signer.kid))
        assert signer.seed() not in sealed

    async def test_another_master_key_is_named_as_the_fault(
        self, empty: Database, keys: SigningKeys, settings: ApiSettings, clock: MovableClock
    ) -> None:
        await _rotate(empty, keys)
        other = replace(settings, master_key=Secret(new_master_key()))
        with pytest.raises(Problem) as refused:
            await _signer(empty, SigningKeys(other, Sealer(other.master_key), clock))
        assert refused.value.code == "config.invalid"
        assert "master_key" in refused.value.detail


class TestJwks:
    async def test_document(self, client: httpx.AsyncClient, owner: Account) -> None:
        answer = await client.get("/.well-known/jwks.json")
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "public, max-age=300"
        for key in answer.json()["keys"]:
            assert set(key) == {"kty", "crv", "x", "kid", "use", "alg"}

    async def test_tokens_of_a_retired_key_still_work(self, owner: Account, app: Any, db: Database) -> None:
        keys: SigningKeys = app.state.signing_keys
        before = await _signer(db, keys)
        await _rotate(db, keys, force=True)
        assert await _signer(db, keys) != before
        assert (await owner.client.get("/v1/whoami")).status_code == 200

    async def test_without_keys_sign_in_is_unavailable(
        self, client: Any, app: Any, owner: Account, db: Database
    ) -> None:
        async with db.transaction() as tx:
            await tx.execute(sa.delete(table))
        app.state.signing_keys.forget()
        problem(await client.get("/readyz"), 503, "service.unavailable")
        problem(await owner.client.get("/v1/whoami"), 503, "service.unavailable")
        await _rotate(db, app.state.signing_keys)
        assert (await client.get("/readyz")).status_code == 200
