"""Names that are blocked: by an operator, by the command line, and by a source that says so."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from portico.control.domains import ownership, store
from portico.settings import ApiSettings
from tests.control.conftest import Account
from tests.control.domains.sending import Sender, apply_all, make_source, operator_client
from tests.control.domains.test_domains import add, fresh
from tests.control.domains.test_routes import good, now, route, told, tunnel
from tests.control.test_http import problem

WHY = {"reason": "phishing"}
#: Several commands in one process: starting Python is most of what each would cost.
_SCRIPT = """
import sys
from portico.cli.main import main
for line in sys.argv[1:]:
    try:
        main(["admin", "domains", *line.split("|")])
    except SystemExit as end:
        print(f"== {end.code}", flush=True)
"""


def run(url: str, *commands: str) -> list[tuple[int, str]]:
    """Exit code and output of each command of `portico admin domains`, given as ``word|word``."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PORTICO_")}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *commands], env=env | {"PORTICO_DATABASE_URL": url}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.findall(r"(.*?)== (\d+)\n", done.stdout, re.DOTALL)
    assert len(found) == len(commands), done.stdout
    return [(int(code), out) for out, code in found]


@pytest.fixture
async def operator(app: Any, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    return await operator_client(app, connect)


async def right(app: Any, account: Account, **more: Any) -> dict[str, Any]:
    """A domain whose last look found everything as it should be."""
    made = await good(app, account, **more)
    found = {purpose: {"state": "ok", "found": [], "fix": None} for purpose in ("ownership", "routing")}
    async with app.state.db.transaction() as tx:
        await store.update(tx, made["id"], dns_findings=found)
    return made


async def settle(app: Any) -> None:
    await apply_all(app.state.db, app.state.cert_incidents.follow, app.state.clock.wall())


async def status(account: Account, domain: dict[str, Any]) -> tuple[str, str | None]:
    row = (await account.client.get(f"/v1/domains/{domain['id']}")).json()
    return row["hostname_status"], row["dns_error"]


class TestByAnOperator:
    async def test_there_and_back(self, app: Any, owner: Account, operator: httpx.AsyncClient) -> None:
        domain, made = await right(app, owner), await tunnel(owner.client)
        await route(owner, domain, made["id"])
        since = await now(app)
        closed = {"id": domain["id"], "host": domain["name"], "code": "edge.domain_blocked"}
        path = f"/v1/admin/domains/{domain['id']}"
        (found,) = (await operator.get("/v1/admin/domains", params={"name": domain["name"].upper()})).json()["data"]
        assert (found["id"], found["hostname_status"]) == (domain["id"], "active")
        for _ in range(2):  # twice is no error, and no second row in the log
            answer = await operator.post(f"{path}/block", json=WHY)
            assert (answer.status_code, answer.json()["hostname_status"]) == (200, "blocked"), answer.text
        listed = (await operator.get("/v1/admin/domains", params={"status": "blocked"})).json()["data"]
        assert domain["id"] in [row["id"] for row in listed]
        assert closed in (await app.state.edge_states.read()).closed_domains
        await settle(app)
        (incident,) = (await owner.client.get(f"/v1/domains/{domain['id']}/incidents")).json()["data"]
        assert (incident["incident_class"], incident["status"], incident["tier"]) == ("ownership", "open", 2)
        assert incident["conditions"][0]["detail"] == "phishing"
        for _ in range(2):
            answer = await operator.post(f"{path}/unblock", json={"reason": "it was not"})
            assert answer.json()["hostname_status"] == "active"
        row = {"id": domain["id"], "host": domain["name"], "tls": "terminate", "tunnel": made["id"]}
        assert await told(app, since) == [
            {"kind": "domain_removed", "id": domain["id"]}, {"kind": "domain_closed", "domain": closed},
            {"kind": "domain", "domain": row},
        ]  # fmt: skip
        assert closed not in (await app.state.edge_states.read()).closed_domains
        await settle(app)
        (incident,) = (await owner.client.get(f"/v1/domains/{domain['id']}/incidents")).json()["data"]
        assert incident["status"] == "resolved"
        rows = (await owner.client.get("/v1/audit", params={"target": domain["id"]})).json()["data"]
        assert [row["action"] for row in rows][:2] == ["domain.unblock", "domain.block"]
        assert rows[1]["details"] == {"name": domain["name"], "from": "active", "to": "blocked", "reason": "phishing"}

    async def test_its_owner_cannot_get_around_it(self, app: Any, owner: Account, operator: httpx.AsyncClient) -> None:
        domain, made = await right(app, owner), await tunnel(owner.client)
        assert (await operator.post(f"/v1/admin/domains/{domain['id']}/block", json=WHY)).status_code == 200
        own = f"/v1/domains/{domain['id']}"
        problem(await owner.client.delete(own), 403, "domain.blocked")
        problem(await owner.client.patch(own, json={}), 403, "domain.blocked")
        problem(await owner.client.post(f"{own}/verify"), 403, "domain.blocked")
        problem(await route(owner, domain, made["id"]), 403, "domain.blocked")
        problem(await owner.client.post(f"{own}/certificate/retry"), 409, "cert.not_ordered_here")
        problem(await owner.client.post("/v1/domains", json={"name": domain["name"]}), 409, "domain.exists")
        assert await status(owner, domain) == ("blocked", "blocked")

    async def test_what_cannot_be_blocked(self, app: Any, owner: Account, operator: httpx.AsyncClient) -> None:
        claim = await add(owner, fresh())
        problem(await operator.post(f"/v1/admin/domains/{claim['id']}/block", json=WHY), 409, "domain.not_verified")
        problem(await operator.post("/v1/admin/domains/dom_none/block", json=WHY), 404, "domain.not_found")
        problem(await operator.post("/v1/admin/domains/dom_none/unblock", json=WHY), 404, "domain.not_found")
        assert (await operator.post(f"/v1/admin/domains/{claim['id']}/unblock", json=WHY)).json()[
            "hostname_status"
        ] == "pending"
        problem(
            await owner.client.post(f"/v1/admin/domains/{claim['id']}/block", json=WHY), 403, "auth.operator_required"
        )

    async def test_by_the_command_line(self, app: Any, owner: Account, settings: ApiSettings) -> None:
        domain = await right(app, owner)
        commands = (
            f"block|{domain['name'].upper()}|--reason|phishing", "--json",
            f"unblock|{domain['id']}|--reason|it was not|--json", "block|nobody.example.org|--reason|x",
        )  # fmt: skip
        blocked, listed, unblocked, wrong = await asyncio.to_thread(run, settings.database_url.reveal(), *commands)
        assert blocked == (0, f"{domain['name']} is blocked\n")
        assert (domain["name"], "blocked") in [(row["name"], row["dns_error"]) for row in json.loads(listed[1])]
        assert json.loads(unblocked[1])["hostname_status"] == "active"
        assert wrong[0] != 0 and "domain.not_found" in wrong[1]
        (row, *_) = (await owner.client.get("/v1/audit", params={"target": domain["id"]})).json()["data"]
        assert (row["action"], row["actor"]["id"]) == ("domain.unblock", "installation")


class TestByEvents:
    @pytest.fixture
    async def sender(self, app: Any, operator: httpx.AsyncClient, client: httpx.AsyncClient) -> Sender:
        return await make_source(operator, client, app.state.clock)

    async def say(self, app: Any, sender: Sender, domain: dict[str, Any], action: str, sequence: int) -> None:
        answer = await sender.send(sender.body(f"ownership.{action}", domain["name"], sequence=sequence))
        assert answer.status_code == 202, answer.text
        await settle(app)

    async def test_the_newest_counts_in_any_order(self, app: Any, owner: Account, sender: Sender) -> None:
        for order in itertools.permutations([("moved", 1), ("succeeded", 2), ("blocked", 3)]):
            domain = await right(app, owner)
            for action, sequence in order:
                await self.say(app, sender, domain, action, sequence)
            assert await status(owner, domain) == ("blocked", ownership.BLOCKED_UPSTREAM), order
            await self.say(app, sender, domain, "succeeded", 4)
            assert await status(owner, domain) == ("active", None), order

    async def test_a_move_is_looked_at_and_a_failure_changes_nothing(
        self, app: Any, owner: Account, sender: Sender
    ) -> None:
        domain = await right(app, owner)
        await self.say(app, sender, domain, "failed", 1)
        assert await status(owner, domain) == ("active", None)
        await self.say(app, sender, domain, "moved", 2)
        assert await status(owner, domain) == ("moved", ownership.MOVED_UPSTREAM)
        async with app.state.db.read() as reader:
            row = await store.find(reader, domain["id"])
        assert row.next_check_at <= app.state.clock.wall()
        rows = (await owner.client.get("/v1/audit", params={"target": domain["id"]})).json()["data"]
        assert rows[0]["action"] == "domain.status" and rows[0]["details"]["why"] == "ownership.moved"

    async def test_no_event_ends_an_operators_block_or_proves_a_claim(
        self, app: Any, owner: Account, sender: Sender, operator: httpx.AsyncClient
    ) -> None:
        domain = await right(app, owner)
        await self.say(app, sender, domain, "blocked", 1)
        assert (await operator.post(f"/v1/admin/domains/{domain['id']}/block", json=WHY)).status_code == 200
        await settle(app)
        await self.say(app, sender, domain, "succeeded", 9)
        assert await status(owner, domain) == ("blocked", "blocked")
        claim = await add(owner, fresh())
        await self.say(app, sender, claim, "succeeded", 10)
        assert (await status(owner, claim))[0] == "pending"
