"""Who gets a subdomain: of several at once one, after a deletion its last organization first, and who reserved it always."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from portico.control.identity.tables import organizations
from portico.control.tunnels import claim_store, jobs
from portico.kit.db import Database
from portico.settings import ApiSettings
from tests.control.conftest import Account
from tests.control.test_http import problem

COOLDOWN = 3600


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    return replace(settings, name_cooldown_seconds=COOLDOWN, reserved_names_per_organization=6)


async def make(account: Account, subdomain: str, **more: Any) -> Any:
    body = {"name": f"t-{subdomain}", "subdomain": subdomain, **more}
    return await account.client.post("/v1/tunnels", json=body)


async def reserve(account: Account, name: str) -> Any:
    return await account.client.post("/v1/reserved-names", json={"name": name})


async def delete(account: Account, tunnel: Any) -> None:
    assert (await account.client.delete(f"/v1/tunnels/{tunnel.json()['id']}")).status_code == 204


async def age(db: Database, seconds: float) -> None:
    """Let time pass for every name that cools down."""
    async with db.transaction() as tx:
        await tx.raw.execute("UPDATE subdomain_claims SET freed_at = freed_at - make_interval(secs => $1)", seconds)


class TestCoolDown:
    async def test_after_a_deletion(self, owner: Account, stranger: Account, db: Database) -> None:
        await delete(owner, await make(owner, "cooling"))
        problem(await make(stranger, "cooling"), 409, "tunnel.subdomain_taken")
        problem(await reserve(stranger, "cooling"), 409, "tunnel.subdomain_taken")
        again = await make(owner, "cooling")
        assert again.status_code == 201, again.text
        await delete(owner, again)
        await age(db, COOLDOWN - 5)
        problem(await make(stranger, "cooling"), 409, "tunnel.subdomain_taken")
        await age(db, 10)
        assert (await make(stranger, "cooling")).status_code == 201
        problem(await make(owner, "cooling"), 409, "tunnel.subdomain_taken")

    async def test_nobody_keeps_any_number_of_names_from_others_by_making_and_deleting(
        self, owner: Account, stranger: Account, db: Database, settings: ApiSettings
    ) -> None:
        await delete(stranger, await make(stranger, "hoard-of-another"))
        for name in ("hoard-1", "hoard-2", "hoard-3", "hoard-4"):
            await delete(owner, await make(owner, name))
        held = await make(owner, "hoard-0")
        await jobs.housekeeping(db, replace(settings, cooling_names_per_organization=2))
        for name in ("hoard-1", "hoard-2"):
            assert (await make(stranger, name)).status_code == 201
        for name in ("hoard-0", "hoard-3", "hoard-4"):
            problem(await make(stranger, name), 409, "tunnel.subdomain_taken")
        problem(await make(owner, "hoard-of-another"), 409, "tunnel.subdomain_taken")
        assert held.status_code == 201

    async def test_after_another_name_was_taken(self, owner: Account, stranger: Account) -> None:
        made = (await make(owner, "before")).json()
        answer = await owner.client.patch(f"/v1/tunnels/{made['id']}", json={"subdomain": "after"})
        assert answer.status_code == 200
        for name in ("before", "after"):
            problem(await make(stranger, name), 409, "tunnel.subdomain_taken")
        theirs = (await make(stranger, "elsewhere")).json()
        answer = await stranger.client.patch(f"/v1/tunnels/{theirs['id']}", json={"subdomain": "before"})
        problem(answer, 409, "tunnel.subdomain_taken")
        assert (await stranger.client.get(f"/v1/tunnels/{theirs['id']}")).json()["subdomain"] == "elsewhere"
        answer = await owner.client.patch(f"/v1/tunnels/{made['id']}", json={"subdomain": "before"})
        assert answer.status_code == 200

    async def test_a_refused_tunnel_claims_nothing(self, owner: Account, stranger: Account) -> None:
        await make(owner, "mine")
        answer = await owner.client.post("/v1/tunnels", json={"name": "t-mine", "subdomain": "untouched"})
        problem(answer, 409, "tunnel.name_taken")
        assert (await make(stranger, "untouched")).status_code == 201

    async def test_an_unnamed_try_goes_on_to_a_free_name(self, owner: Account, stranger: Account) -> None:
        await delete(owner, await make(owner, "popular"))
        made = await stranger.client.post("/v1/tunnels", json={"name": "popular"})
        assert made.status_code == 201 and made.json()["subdomain"].startswith("popular-")

    async def test_after_its_organization(
        self, owner: Account, stranger: Account, db: Database, settings: ApiSettings
    ) -> None:
        """Held until housekeeping has seen that nobody is left, then cooling."""
        await make(owner, "orphan")
        assert (await reserve(owner, "kept-orphan")).status_code == 201
        async with db.transaction() as tx:
            await tx.execute(sa.delete(organizations).where(organizations.c.id == owner.organization))
        for _ in range(2):
            for name in ("orphan", "kept-orphan"):
                problem(await make(stranger, name), 409, "tunnel.subdomain_taken")
            await jobs.housekeeping(db, settings)
        await age(db, COOLDOWN + 1)
        for name in ("orphan", "kept-orphan"):
            assert (await make(stranger, name)).status_code == 201

    async def test_housekeeping_forgets_what_has_cooled_down_alone(
        self, owner: Account, db: Database, settings: ApiSettings
    ) -> None:
        await make(owner, "stays")
        await delete(owner, await make(owner, "goes"))
        await reserve(owner, "keeps")
        names = "SELECT subdomain FROM subdomain_claims WHERE organization_id = $1 ORDER BY subdomain"
        await jobs.housekeeping(db, settings)
        async with db.read() as reader:
            found = [row["subdomain"] for row in await reader.raw.fetch(names, owner.organization)]
        assert found == ["goes", "keeps", "stays"]
        await age(db, COOLDOWN + 1)
        await jobs.housekeeping(db, settings)
        async with db.read() as reader:
            found = [row["subdomain"] for row in await reader.raw.fetch(names, owner.organization)]
        assert found == ["keeps", "stays"]

    async def test_a_tunnel_of_older_code_has_its_name(self, owner: Account, stranger: Account, db: Database) -> None:
        made = await make(owner, "older")
        async with db.transaction() as tx:
            await tx.raw.execute("DELETE FROM subdomain_claims WHERE subdomain = 'older'")
        problem(await make(stranger, "older"), 409, "tunnel.subdomain_taken")
        problem(await reserve(stranger, "older"), 409, "tunnel.subdomain_taken")
        await delete(owner, made)
        problem(await make(stranger, "older"), 409, "tunnel.subdomain_taken")


class TestAtOnce:
    async def test_two_organizations_and_one_name(self, owner: Account, stranger: Account, db: Database) -> None:
        for n in range(5):
            name = f"contested-{n}"
            tries = [make(owner, name), make(stranger, name), reserve(owner, name), reserve(stranger, name)]
            answers = await asyncio.gather(*tries)
            winners = [index % 2 for index, answer in enumerate(answers) if answer.status_code == 201]
            assert winners and len(set(winners)) == 1, [answer.text for answer in answers]
            for index, answer in enumerate(answers):
                if index % 2 != winners[0]:
                    problem(answer, 409, "tunnel.subdomain_taken")

    async def test_a_name_that_has_just_cooled_down(
        self, owner: Account, stranger: Account, register: Any, db: Database
    ) -> None:
        await delete(owner, await make(owner, "freed"))
        await age(db, COOLDOWN + 1)
        others = [stranger, await register(), await register()]
        answers = await asyncio.gather(*(make(account, "freed") for account in others))
        assert sorted(answer.status_code for answer in answers) == [201, 409, 409]

    async def test_claims_are_decided_by_the_row(self, db: Database) -> None:
        """Twenty transactions that all claim before any commits: one row, one winner."""

        async def one(number: int) -> bool:
            async with db.transaction() as tx:
                return await claim_store.claim(tx, f"org_{number}", "raced", COOLDOWN)

        assert sum(await asyncio.gather(*(one(n) for n in range(20)))) == 1


class TestReserved:
    async def test_is_kept_without_a_tunnel(self, owner: Account, stranger: Account, db: Database) -> None:
        made = await reserve(owner, "brand-new")
        assert made.status_code == 201, made.text
        assert made.json()["tunnel"] is None and "//brand-new." in made.json()["url"]
        problem(await make(stranger, "brand-new"), 409, "tunnel.subdomain_taken")
        tunnel = await make(owner, "brand-new")
        assert tunnel.status_code == 201
        listed = (await owner.client.get("/v1/reserved-names")).json()["data"]
        assert [(row["name"], row["tunnel"]) for row in listed] == [("brand-new", tunnel.json()["id"])]
        await delete(owner, tunnel)
        await age(db, COOLDOWN + 1)
        problem(await make(stranger, "brand-new"), 409, "tunnel.subdomain_taken")

    async def test_again_is_no_error_and_no_second_one(self, owner: Account) -> None:
        first, again = await reserve(owner, "twice"), await reserve(owner, "twice")
        assert first.json() == again.json() and again.status_code == 201
        rows = (await owner.client.get("/v1/audit", params={"action": "name.reserve"})).json()["data"]
        assert [row["target"] for row in rows] == ["twice"]

    async def test_release(self, owner: Account, stranger: Account, db: Database) -> None:
        tunnel = await make(owner, "let-go")
        await reserve(owner, "let-go")
        problem(await stranger.client.delete("/v1/reserved-names/let-go"), 404, "request.not_found")
        assert (await owner.client.delete("/v1/reserved-names/let-go")).status_code == 204
        problem(await owner.client.delete("/v1/reserved-names/let-go"), 404, "request.not_found")
        await age(db, COOLDOWN + 1)
        problem(await make(stranger, "let-go"), 409, "tunnel.subdomain_taken")  # the tunnel still has it
        await delete(owner, tunnel)
        await age(db, COOLDOWN + 1)
        assert (await make(stranger, "let-go")).status_code == 201

    async def test_released_without_a_tunnel_it_cools_down(
        self, owner: Account, stranger: Account, db: Database
    ) -> None:
        await reserve(owner, "unused-name")
        await owner.client.delete("/v1/reserved-names/unused-name")
        problem(await make(stranger, "unused-name"), 409, "tunnel.subdomain_taken")
        await age(db, COOLDOWN + 1)
        assert (await make(stranger, "unused-name")).status_code == 201

    async def test_the_limit_holds_at_once(self, owner: Account) -> None:
        answers = await asyncio.gather(*(reserve(owner, f"many-{n}") for n in range(9)))
        assert sorted(answer.status_code for answer in answers) == [201] * 6 + [403] * 3
        refused = next(answer for answer in answers if answer.status_code == 403)
        assert problem(refused, 403, "name.limit_reached")["limit"] == 6

    async def test_pages_and_other_organizations(self, owner: Account, stranger: Account) -> None:
        for name in ("page-c", "page-a", "page-b"):
            await reserve(owner, name)
        page = (await owner.client.get("/v1/reserved-names?limit=2")).json()
        rest = (await owner.client.get(f"/v1/reserved-names?limit=2&cursor={page['next_cursor']}")).json()
        assert [row["name"] for row in page["data"] + rest["data"]] == ["page-a", "page-b", "page-c"]
        assert (await stranger.client.get("/v1/reserved-names")).json()["data"] == []

    async def test_names_that_cannot_be(self, owner: Account) -> None:
        problem(await reserve(owner, "www"), 403, "tunnel.name_reserved")
        problem(await reserve(owner, "paypa1"), 403, "tunnel.name_reserved")
        problem(await reserve(owner, "a_b"), 400, "tunnel.name_invalid")
        problem(await reserve(owner, "x" * 64), 422, "request.invalid")


async def test_a_tunnel_keeps_a_name_that_became_reserved(owner: Account, app: Any) -> None:
    made = (await make(owner, "oldbrand")).json()
    rules = app.state.tunnels.rules
    rules._blocked |= {"oldbrand"}
    rules._answers.clear()
    path = f"/v1/tunnels/{made['id']}"
    answer = await owner.client.patch(path, json={"subdomain": "oldbrand", "target": "127.0.0.1:1"})
    assert answer.status_code == 200 and answer.json()["subdomain"] == "oldbrand"
    assert (await owner.client.patch(path, json={"subdomain": "another"})).status_code == 200
    problem(await owner.client.patch(path, json={"subdomain": "oldbrand"}), 403, "tunnel.name_reserved")
