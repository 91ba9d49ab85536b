"""What an organization takes with it: its export, and its deletion by the worker."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control import changes
from portico.control.billing import departure as billing_departure
from portico.control.identity import departure, exports
from portico.control.identity.tables import organization_exports, organizations
from portico.kit import queue
from portico.kit.clock import SystemClock
from portico.kit.db import Database, metadata
from portico.kit.queue import Hopeless, LeaseLost, Limits, Work
from portico.settings import ApiSettings, WorkerSettings
from portico.worker import departures, maintenance
from portico.worker.jobs import Context
from tests.control.conftest import Account
from tests.control.domains.sending import hold
from tests.control.identity.conftest import Join
from tests.control.identity.test_invitations import invited
from tests.control.identity.test_organizations import BODY, delete
from tests.control.test_http import problem


@pytest.fixture
def settings(settings: ApiSettings, tmp_path: Path) -> ApiSettings:
    object.__setattr__(settings, "objects_dir", tmp_path / "objects")
    object.__setattr__(settings, "exports_per_day", 2)
    return settings


@pytest.fixture
def context(settings: ApiSettings, db: Database) -> Context:
    return Context(WorkerSettings(database_url=settings.database_url), settings, db, SystemClock())


async def ask(account: Account) -> str:
    answer = await account.client.post("/v1/org/exports")
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def job(db: Database, export: str) -> Work:
    """The claimed job of an export."""
    while True:
        (work, *_), _ = await queue.claim(db, exports.EXPORT, Limits(), 1)
        if work.id == export:
            return work


async def content(account: Account, export: str) -> dict[str, list[Any]]:
    answer = await account.client.get(f"/v1/org/exports/{export}/download")
    assert answer.status_code == 200, answer.text
    facts = (await account.client.get(f"/v1/org/exports/{export}")).json()
    assert (facts["state"], facts["bytes"]) == ("ready", len(answer.content))
    assert facts["sha256"] == hashlib.sha256(answer.content).hexdigest()
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        return {
            name.removesuffix(".jsonl"): [json.loads(line) for line in archive.read(name).splitlines()]
            for name in archive.namelist()
        }


class TestExport:
    async def test_has_everything_and_no_secret(
        self, owner: Account, stranger: Account, join: Join, context: Context, db: Database
    ) -> None:
        member = await join("developer")
        policy = {"basic_auth": {"users": [{"name": "ann", "password": "visitor-Secret-1"}]}}
        made = await owner.client.post("/v1/tunnels", json={"name": "web", "policy": policy})
        assert made.status_code == 201, made.text
        await stranger.client.post("/v1/tunnels", json={"name": "theirs"})
        key = await member.key()
        await invited(owner, "guest@example.com")
        export = await ask(owner)
        problem(await owner.client.get(f"/v1/org/exports/{export}/download"), 409, "export.not_ready")
        await maintenance.export_organization(context, await job(db, export))
        found = await content(owner, export)
        others = {"domains", "tunnels", "tunnel_usage", "usage"} | billing_departure.SOURCES.keys()
        assert found.keys() == exports.SOURCES.keys() | others
        assert {m["email"] for m in found["members"]} == {owner.email, member.email}
        assert [t["name"] for t in found["tunnels"]] == ["web"]
        assert [(k["id"], "digest" in k) for k in found["keys"]] == [(key["id"], False)]
        assert [i["email"] for i in found["invitations"]] == ["guest@example.com"]
        assert "organization.export" in {row["action"] for row in found["audit"]}
        assert [row["seq"] for row in found["audit"]] == list(range(1, len(found["audit"]) + 1))
        text = json.dumps(found)
        assert not any(
            secret in text for secret in (key["key"], "visitor-Secret-1", "argon2", "tnl_inv_", stranger.email)
        )
        acts = [row["action"] for row in (await owner.client.get("/v1/audit")).json()["data"]]
        assert "organization.export_download" in acts

    async def test_is_of_one_moment_while_members_come_and_go(
        self, owner: Account, join: Join, context: Context, db: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A member who is removed while the file is written is in none of its parts, or in all."""
        member = await join("developer")
        key = await member.key()
        export = await ask(owner)
        members = exports.SOURCES["members"]

        async def leaves(reader: Any, organization: str) -> Any:
            async for lines in members(reader, organization):
                assert (await owner.client.delete(f"/v1/org/members/{member.user}")).status_code == 204
                yield lines

        monkeypatch.setattr(exports, "SOURCES", {**exports.SOURCES, "members": leaves})
        await maintenance.export_organization(context, await job(db, export))
        found = await content(owner, export)
        assert member.email in {m["email"] for m in found["members"]}
        assert [(k["id"], k["revoked_at"]) for k in found["keys"]] == [(key["id"], None)]
        assert "member.remove" not in {row["action"] for row in found["audit"]}

    async def test_a_worker_that_lost_its_lease_publishes_nothing(
        self, owner: Account, context: Context, db: Database, settings: ApiSettings
    ) -> None:
        export = await ask(owner)
        first = await job(db, export)
        async with db.transaction() as tx:  # the first one hung: its lease is over
            late = organization_exports.c.id == export
            await tx.execute(sa.update(organization_exports).where(late).values(available_at=sa.func.now()))
        (second,), _ = await queue.claim(db, exports.EXPORT, Limits(), 1, suspect=True)
        done = await asyncio.gather(
            maintenance.export_organization(context, first),
            maintenance.export_organization(context, second),
            return_exceptions=True,
        )
        assert isinstance(done[0], LeaseLost) and done[1] is None
        assert settings.objects_dir is not None
        files = [path.name for path in settings.objects_dir.glob("exports/*")]
        assert files == [f"{export}-{second.token.hex}.zip"]
        assert (await content(owner, export))["organization"][0]["id"] == owner.organization

    async def test_too_large_is_hopeless_and_leaves_no_file(
        self, owner: Account, context: Context, db: Database, settings: ApiSettings
    ) -> None:
        object.__setattr__(settings, "export_max_bytes", 100)
        work = await job(db, await ask(owner))
        with pytest.raises(Hopeless):
            await maintenance.export_organization(context, work)
        assert settings.objects_dir is not None and list(settings.objects_dir.glob("exports/*")) == []

    async def test_belongs_to_one_organization_and_to_who_may(
        self, owner: Account, stranger: Account, join: Join, context: Context, db: Database, clock: Any
    ) -> None:
        viewer = await join("viewer")
        problem(await viewer.client.post("/v1/org/exports"), 403, "auth.forbidden")
        export = await ask(owner)
        await maintenance.export_organization(context, await job(db, export))
        for path in (f"/v1/org/exports/{export}", f"/v1/org/exports/{export}/download"):
            problem(await stranger.client.get(path), 404, "request.not_found")
            problem(await viewer.client.get(path), 403, "auth.forbidden")
        assert (await stranger.client.get("/v1/org/exports")).json()["data"] == []
        await ask(owner)
        problem(await owner.client.post("/v1/org/exports"), 409, "export.limit_reached")
        clock.advance(930)
        problem(await owner.client.post("/v1/org/exports"), 403, "auth.step_up_required")

    async def test_is_over_after_some_days(
        self, owner: Account, context: Context, db: Database, settings: ApiSettings
    ) -> None:
        export = await ask(owner)
        await maintenance.export_organization(context, await job(db, export))
        async with db.transaction() as tx:
            mine = organization_exports.c.id == export
            await tx.execute(sa.update(organization_exports).where(mine).values(expires_at=sa.func.now()))
        problem(await owner.client.get(f"/v1/org/exports/{export}/download"), 404, "export.over")
        assert (await owner.client.get(f"/v1/org/exports/{export}")).json()["state"] == "expired"
        assert settings.objects_dir is not None
        stray = settings.objects_dir / "exports" / "exp_0-0.zip"
        stray.write_bytes(b"")
        await maintenance.sweep_exports(context, None)  # type: ignore[arg-type]
        assert list(settings.objects_dir.glob("exports/*")) == [stray]  # a young one may still get its row
        problem(await owner.client.get(f"/v1/org/exports/{export}"), 404, "request.not_found")

    async def test_without_a_folder_there_are_none(self, owner: Account, settings: ApiSettings) -> None:
        object.__setattr__(settings, "objects_dir", None)
        problem(await owner.client.post("/v1/org/exports"), 409, "export.unavailable")


async def full(owner: Account, agent: httpx.AsyncClient, context: Context, db: Database) -> str:
    """An organization with something of everything, whose days of grace are over; returns the subdomain of its tunnel."""
    opened = await agent.post("/v1/agent/sessions", json=BODY)
    assert opened.status_code == 201, opened.text
    tunnel = (await owner.client.get("/v1/tunnels")).json()["data"][0]
    await invited(owner, "guest@example.com")
    await owner.client.post("/v1/org/roles", json={"name": "mine", "permissions": []})
    await maintenance.export_organization(context, await job(db, await ask(owner)))
    assert (await delete(owner)).status_code == 202
    async with db.transaction() as tx:
        where = organizations.c.id == owner.organization
        await tx.execute(sa.update(organizations).where(where).values(delete_after=sa.func.now()))
        past = "UPDATE agent_sessions SET refused_until = now() - interval '1 second' WHERE organization_id = :o"
        await tx.execute(sa.text(past), {"o": owner.organization})
    return str(tunnel["subdomain"])


async def left(db: Database, organization: str) -> dict[str, int]:
    """Rows that still name the organization, by table."""
    counts = {}
    async with db.read() as reader:
        for table in metadata.sorted_tables:
            if "organization_id" in table.c:
                mine = sa.select(sa.func.count()).where(table.c.organization_id == organization)
                counts[table.name] = int(await reader.scalar(mine))
        counts["organizations"] = int(
            await reader.scalar(sa.select(sa.func.count()).where(organizations.c.id == organization))
        )
    return {name: count for name, count in counts.items() if count}


class TestDeletion:
    async def test_leaves_nothing_but_the_audit_log_and_names_that_cool_down(
        self,
        app: Any,
        owner: Account,
        stranger: Account,
        agent: httpx.AsyncClient,
        context: Context,
        db: Database,
        connect: Any,
    ) -> None:
        blocked = await hold(db, owner.organization, "blocked-and-gone.example.com", hostname_status="blocked")
        subdomain = await full(owner, agent, context, db)
        assert owner.organization in await departure.due(db, 100)
        async with db.read() as reader:
            since = await changes.newest(reader)
        await departures.depart(context, owner.organization)
        async with db.read() as reader:
            told = [
                each for entry in await changes.after(reader, since, 500) or () for each in json.loads(entry.changes)
            ]
        assert {"kind": "domain_removed", "id": blocked} in told
        assert (await left(db, owner.organization)).keys() <= departures.KEPT.keys()
        assert context.control.objects_dir is not None
        assert list(context.control.objects_dir.glob("exports/*")) == []
        problem(await owner.client.get("/v1/whoami"), 401, "auth.session_ended")
        again = await connect().post("/v1/auth/refresh", json={"refresh_token": owner.refresh})
        assert (again.status_code, again.json()["organization"]) == (200, None)  # the account is the person's own
        problem(await agent.get("/v1/whoami"), 401, "auth.key_invalid")
        taken = await stranger.client.post("/v1/tunnels", json={"name": "x", "subdomain": subdomain})
        problem(taken, 409, "tunnel.subdomain_taken")
        states = await app.state.edge_states.read()
        assert owner.organization not in {row["organization"] for row in states.tunnels}
        async with db.read() as reader:
            columns = "SELECT organization_id, seq IS NOT NULL FROM audit_events"
            query = f"{columns} WHERE action = 'organization.delete' AND target = $1"
            rows = await reader.raw.fetch(query, owner.organization)
        assert sorted((row[0] or "", row[1]) for row in rows) == [("", True), (owner.organization, True)]

    async def test_goes_on_wherever_a_worker_ended(
        self, owner: Account, agent: httpx.AsyncClient, context: Context, db: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A worker that dies after each transaction in turn, and its successor begins anew: at the end all is gone, once."""
        await full(owner, agent, context, db)
        monkeypatch.setattr(departures, "ROWS", 1)
        real, allowed, deaths = db.transaction, 0, 0

        class Died(Exception):
            pass

        def counted(**options: Any) -> Any:
            nonlocal left_over
            if left_over == 0:
                raise Died
            left_over -= 1
            return real(**options)

        while True:
            left_over, allowed = allowed, allowed + 7
            with monkeypatch.context() as patch:
                patch.setattr(db, "transaction", counted)
                try:
                    await departures.depart(context, owner.organization)
                except Died:
                    deaths += 1
                    continue
            break
        assert deaths > 3
        assert (await left(db, owner.organization)).keys() <= departures.KEPT.keys()
        await departures.depart(context, owner.organization)
        async with db.read() as reader:
            query = "SELECT count(*) FROM audit_events WHERE action = 'organization.delete' AND organization_id = $1"
            assert await reader.raw.fetchval(query, owner.organization) == 1

    async def test_two_workers_at_once_do_it_once(
        self, owner: Account, agent: httpx.AsyncClient, context: Context, db: Database
    ) -> None:
        await full(owner, agent, context, db)
        done = await asyncio.gather(*(departures.depart(context, owner.organization) for _ in range(3)))
        assert done == [True] * 3
        assert (await left(db, owner.organization)).keys() <= departures.KEPT.keys()

    async def test_waits_for_tokens_that_relays_still_refuse(
        self, owner: Account, agent: httpx.AsyncClient, context: Context, db: Database
    ) -> None:
        await full(owner, agent, context, db)
        later = "UPDATE agent_sessions SET refused_until = now() + interval '1 hour' WHERE organization_id = :o"
        async with db.transaction() as tx:
            await tx.execute(sa.text(later), {"o": owner.organization})
        assert await departures.depart(context, owner.organization) is False
        assert {"agent_sessions", "organizations"} <= (await left(db, owner.organization)).keys()

    async def test_only_of_what_is_due(self, owner: Account, stranger: Account, context: Context, db: Database) -> None:
        await delete(owner)
        await departures.depart(context, owner.organization)
        await departures.depart(context, stranger.organization)
        assert (await owner.client.get("/v1/org")).json()["standing"] == "deleting"
        async with db.transaction() as tx:
            gone = {"delete_after": sa.func.now(), "suspended_at": sa.func.now()}
            await tx.execute(sa.update(organizations).where(organizations.c.id == owner.organization).values(**gone))
        await departures.run(context)
        assert (await owner.client.get("/v1/org")).json()["standing"] == "suspended"

    def test_every_table_that_names_an_organization_is_dealt_with(self) -> None:
        named = {table.name for table in metadata.sorted_tables if "organization_id" in table.c}
        assert named == {table.name for table in departures.tables()} | departures.KEPT.keys()
