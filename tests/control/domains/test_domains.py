"""Domains at the API: claimed by anybody, held by one, and nobody else's business."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.domains import service, store
from portico.settings import ApiSettings
from tests.control.conftest import Account
from tests.control.identity.test_plans import move, operator
from tests.control.test_http import problem

__all__ = ["operator"]


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    return dataclasses.replace(
        settings, base_domain="portico.test", domains_per_organization=4, domain_addresses=("192.0.2.7", "2001:db8::7"),
        challenge_zone="challenges.portico.test.",
    )  # fmt: skip


async def add(account: Account, name: str, status: int = 201, **more: Any) -> dict[str, Any]:
    answer = await account.client.post("/v1/domains", json={"name": name, **more})
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def fresh(prefix: str = "www.") -> str:
    """A name that no other test has; they share a database, in which a name is held once."""
    return f"{prefix}d{secrets.token_hex(6)}.example.com"


async def set_status(app: Any, domain: str, status: str) -> None:
    async with app.state.db.transaction() as tx:
        await store.update(tx, domain, hostname_status=status)


async def test_a_domain_is_added_with_what_to_set(owner: Account) -> None:
    made = await add(owner, "WWW.Bücher.Example.")
    assert made["name"] == "www.xn--bcher-kva.example"
    assert made["display_name"] == "www.bücher.example"
    assert (made["hostname_status"], made["tls_mode"], made["failure_policy"]) == ("pending", "terminate", "standard")
    assert (made["wildcard"], made["apex"], made["tunnel"]) == (False, False, None)
    assert made["certificate"]["status"] == "none"
    ownership, routing, delegation = made["records"]
    assert (ownership["type"], ownership["name"]) == ("TXT", "_portico-challenge.www.xn--bcher-kva.example")
    assert ownership["value"].startswith("portico-verification=")
    assert len(ownership["value"]) > 50
    assert (routing["type"], routing["name"], routing["value"]) == ("CNAME", made["name"], "edge.portico.test")
    assert delegation["name"] == "_acme-challenge.www.xn--bcher-kva.example"
    assert delegation["value"].endswith(".challenges.portico.test")
    assert [record["required"] for record in made["records"]] == [True, True, False]
    assert {record["state"] for record in made["records"]} == {"unchecked"}
    assert (await owner.client.get(f"/v1/domains/{made['id']}")).json() == made
    listed = (await owner.client.get("/v1/domains")).json()
    assert listed == {"data": [made], "next_cursor": None}


async def test_an_apex_gets_addresses_and_a_wildcard_must_delegate(owner: Account) -> None:
    apex = await add(owner, "example.com")
    assert [(r["type"], r["value"]) for r in apex["records"][1:3]] == [("A", "192.0.2.7"), ("AAAA", "2001:db8::7")]
    wild = await add(owner, "*.example.com")
    assert [r["name"] for r in wild["records"]] == [
        "_portico-challenge.example.com", "*.example.com", "_acme-challenge.example.com",
    ]  # fmt: skip
    assert [r["required"] for r in wild["records"]] == [True, True, True]
    assert wild["records"][0]["value"] != apex["records"][0]["value"]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("no.domain.portico.test", "domain.reserved"),
        ("edge.portico.test", "domain.reserved"),
        ("co.uk", "domain.public_suffix"),
        ("https://x.example.com", "domain.name_invalid"),
    ],
)
async def test_names_that_are_refused(owner: Account, name: str, code: str) -> None:
    problem(await owner.client.post("/v1/domains", json={"name": name}), 400, code)


async def test_one_organization_has_a_name_once(owner: Account, stranger: Account) -> None:
    await add(owner, "www.example.com")
    problem(await owner.client.post("/v1/domains", json={"name": "WWW.example.com"}), 409, "domain.exists")
    theirs = await add(stranger, "www.example.com")  # a claim is no possession
    problem(await owner.client.get(f"/v1/domains/{theirs['id']}"), 404, "domain.not_found")
    problem(await owner.client.delete(f"/v1/domains/{theirs['id']}"), 404, "domain.not_found")


async def test_two_at_once_are_one(owner: Account) -> None:
    answers = await asyncio.gather(
        *(owner.client.post("/v1/domains", json={"name": "www.example.com"}) for _ in range(6))
    )
    assert sorted(answer.status_code for answer in answers) == [201, *[409] * 5]


async def test_there_is_room_for_so_many(owner: Account) -> None:
    answers = await asyncio.gather(
        *(owner.client.post("/v1/domains", json={"name": f"w{n}.example.com"}) for n in range(8))
    )
    assert sorted(answer.status_code for answer in answers) == [201] * 4 + [403] * 4
    problem(await owner.client.post("/v1/domains", json={"name": "more.example.com"}), 403, "domain.limit_reached")
    gone = next(answer.json()["id"] for answer in answers if answer.status_code == 201)
    assert (await owner.client.delete(f"/v1/domains/{gone}")).status_code == 204
    await add(owner, "more.example.com")


async def test_the_plan_says_how_many(owner: Account, operator: httpx.AsyncClient) -> None:
    await move(operator, owner.organization, "free")
    answer = await owner.client.post("/v1/domains", json={"name": "www.example.com"})
    assert problem(answer, 403, "quota.exceeded")["limit"] == "custom_domains"


async def test_others_ask_for_domains(app: Any, owner: Account, stranger: Account) -> None:
    base = fresh("")
    exact, wild = await add(owner, f"www.{base}"), await add(stranger, f"*.{base}")
    async with app.state.db.read() as reader:
        assert (await service.find(reader, exact["id"])).organization_id == owner.organization
        assert await service.find(reader, "dom_none") is None
        assert await service.by_name(reader, f"www.{base}") is None  # claimed, not proved
        assert await service.covering(reader, f"www.{base}") is None
    await set_status(app, exact["id"], "active")
    await set_status(app, wild["id"], "verified")
    async with app.state.db.read() as reader:
        for host, found in (
            (f"www.{base}", exact["id"]),
            (f"api.{base}", wild["id"]),
            (f"a.b.{base}", None),
            (base, None),
            ("com", None),
        ):
            row = await service.covering(reader, host)
            assert (row and row.id) == found, host
        assert (await service.by_name(reader, f"*.{base}")).id == wild["id"]


@pytest.mark.parametrize("status", store.HELD)
async def test_a_name_is_held_once(app: Any, owner: Account, stranger: Account, status: str) -> None:
    name = fresh()
    mine, theirs = await add(owner, name), await add(stranger, name)
    await set_status(app, mine["id"], status)
    for other in store.HELD:
        with pytest.raises(sa.exc.IntegrityError, match="custom_domains_held_ix"):
            await set_status(app, theirs["id"], other)


async def test_a_suspended_organization_adds_none(app: Any, owner: Account) -> None:
    async with app.state.db.transaction() as tx:
        await tx.raw.execute("UPDATE organizations SET suspended_at = now() WHERE id = $1", owner.organization)
    problem(await owner.client.post("/v1/domains", json={"name": "www.example.com"}), 403, "organization.suspended")


async def test_what_is_done_is_in_the_audit_log(owner: Account) -> None:
    made = await add(owner, "www.example.com")
    await owner.client.delete(f"/v1/domains/{made['id']}")
    rows = (await owner.client.get("/v1/audit", params={"target": made["id"]})).json()["data"]
    assert [row["action"] for row in rows] == ["domain.delete", "domain.add"]
    assert "portico-verification" not in str(rows)


async def test_an_agent_key_manages_domains(owner: Account, agent: httpx.AsyncClient) -> None:
    answer = await agent.post("/v1/domains", json={"name": "www.example.com"})
    assert answer.status_code == 201
    assert (await agent.get("/v1/domains")).json()["data"] == [answer.json()]
