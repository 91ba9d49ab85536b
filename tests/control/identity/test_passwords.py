"""Hashing: off the loop, a few at a time, the same work for nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from portico.control.identity import passwords as module
from portico.control.identity.passwords import Passwords
from portico.errors import Problem
from portico.settings import ApiSettings
from tests.control.conftest import REAL_COST


@pytest.fixture
def passwords(settings: ApiSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Passwords]:
    monkeypatch.setattr(module, "MEMORY_KIB", REAL_COST[0])
    monkeypatch.setattr(module, "PASSES", REAL_COST[1])
    made = Passwords(replace(settings, password_hash_concurrency=2, password_hash_waiting=5))
    yield made
    made.close()


async def test_round_trip(passwords: Passwords) -> None:
    stored = await passwords.hash("tall-Giraffe-42")
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert await passwords.verify("tall-Giraffe-42", stored) == (True, None)
    assert (await passwords.verify("tall-Giraffe-43", stored))[0] is False


async def test_nobody_is_never_right_and_costs_the_same_call(passwords: Passwords) -> None:
    called: list[str] = []
    real = passwords._hasher.verify_and_update

    def spy(password: str, stored: str) -> tuple[bool, str | None]:
        called.append(stored)
        assert threading.current_thread().name.startswith("argon2")
        return real(password, stored)

    passwords._hasher.verify_and_update = spy  # type: ignore[method-assign, assignment]
    assert await passwords.verify("anything at all", None) == (False, None)
    assert called[0].startswith("$argon2id$v=19$m=19456,t=2,p=1$")


async def test_a_flood_is_refused_and_the_loop_stays_free(passwords: Passwords) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticker = asyncio.create_task(tick())
    results = await asyncio.gather(*(passwords.hash(f"password-{n}") for n in range(9)), return_exceptions=True)
    ticker.cancel()
    refused = [r for r in results if isinstance(r, Problem)]
    assert [p.code for p in refused] == ["auth.throttled"] * 4
    assert ticks > 5
