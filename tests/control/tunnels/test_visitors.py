"""Visitors' passwords: one digest for one password everywhere, made once, by one thread, within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import argon2
import pytest

from portico.control.tunnels.policy import Wanted
from portico.control.tunnels.visitors import VisitorPasswords
from portico.errors import Problem
from portico.kit.sealing import Sealer, new_master_key
from portico.settings import ApiSettings, Secret
from portico.wire import policy

MASTER = Secret(new_master_key())
SETTINGS = ApiSettings(database_url=Secret("postgresql://nowhere"), master_key=MASTER)


def wanted(*users: tuple[str, str]) -> Wanted:
    return Wanted({"basic_auth": {"users": [{"name": name, "password": password} for name, password in users]}})


def digests(found: Wanted | None) -> list[str]:
    assert found is not None
    return [user["digest"] for user in found.document["basic_auth"]["users"]]


@pytest.fixture
def made() -> Iterator[list[VisitorPasswords]]:
    """Two processes with one master key."""
    both = [VisitorPasswords(SETTINGS, Sealer(MASTER)) for _ in "ab"]
    yield both
    for one in both:
        one.close()


async def test_one_password_is_one_digest_on_every_process(made: list[VisitorPasswords]) -> None:
    (first,), (other,) = [await one.digested("org_1", [wanted(("a", "secret"), ("b", "secret"))]) for one in made]
    assert digests(first) == digests(other) and len(set(digests(first))) == 2
    assert argon2.PasswordHasher().verify(digests(first)[0], "secret")
    assert first is not None and policy.parse(first.document).basic_auth is not None
    (elsewhere,) = await made[0].digested("org_2", [wanted(("a", "secret"))])
    assert digests(elsewhere)[0] != digests(first)[0]


async def test_hashed_once_however_many_ask(made: list[VisitorPasswords], monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = made[0]._hash

    def counting(password: str, salt: bytes) -> str:
        hashed.append(password)
        return real(password, salt)

    monkeypatch.setattr(made[0], "_hash", counting)
    await asyncio.gather(*(made[0].digested("org_1", [wanted(("a", "x"))]) for _ in range(20)))
    await made[0].digested("org_1", [wanted(("a", "x")), None, Wanted({}), wanted(("a", "y"))])
    assert hashed == ["x", "y"]


async def test_one_who_leaves_does_not_take_it_from_others(made: list[VisitorPasswords]) -> None:
    leaving = asyncio.create_task(made[0].digested("org_1", [wanted(("a", "x"))]))
    staying = asyncio.create_task(made[0].digested("org_1", [wanted(("a", "x"))]))
    await asyncio.sleep(0)
    leaving.cancel()
    assert digests((await staying)[0])[0].startswith("$argon2id$")


async def test_bounds() -> None:
    settings = replace(SETTINGS, visitor_passwords_per_request=2, visitor_passwords_waiting=1, visitor_password_cache=2)
    one = VisitorPasswords(settings, Sealer(MASTER))
    try:
        with pytest.raises(Problem, match="3 new passwords"):
            await one.digested("org_1", [wanted(("a", "x"), ("b", "x"), ("c", "x"))])
        answers = await asyncio.gather(
            *(one.digested("org_1", [wanted((name, "x"))]) for name in "abc"), return_exceptions=True
        )
        assert [getattr(answer, "code", "made") for answer in answers] == ["made", "auth.throttled", "auth.throttled"]
        for name in "abcd":
            await one.digested("org_1", [wanted((name, "x"))])
        assert len(one._made) == 2
    finally:
        one.close()
