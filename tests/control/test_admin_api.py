"""What platform operators see and do: accounts, organizations, the log of the installation, relays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.audit.store import audit_events
from portico.control.identity import operators, tables
from portico.control.identity.account_tables import passkeys, recovery_codes, totp_keys
from portico.control.identity.keys import issue
from portico.kit.db import Database
from portico.settings import ApiSettings
from tests.control.conftest import PASSWORD, Account, MovableClock
from tests.control.test_http import problem

WHY = {"reason": "ticket 17"}


@pytest.fixture
async def operator(register: Callable[[], Awaitable[Account]], db: Database, clock: MovableClock) -> Account:
    """A person with a grant, in an organization of their own."""
    made = await register()
    async with db.transaction() as tx:
        await operators.grant(tx, operators.INSTALLATION, made.user, now=clock.wall())
    return made


@pytest.fixture
async def second(register: Callable[[], Awaitable[Account]], db: Database, clock: MovableClock) -> Account:
    """Another person with a grant."""
    made = await register()
    async with db.transaction() as tx:
        await operators.grant(tx, operators.INSTALLATION, made.user, now=clock.wall())
    return made


@pytest.fixture
async def machine(db: Database, clock: MovableClock, connect: Any) -> httpx.AsyncClient:
    """A client with an operator key."""
    async with db.transaction() as tx:
        key = await issue(tx, clock.wall(), None, None, "operator", "operator", [])
    return connect(key.key)


async def _rows(db: Database, action: str, target: str) -> list[Any]:
    query = sa.select(audit_events).where(audit_events.c.action == action, audit_events.c.target == target)
    async with db.read() as reader:
        return list(await reader.fetch_all(query.order_by(audit_events.c.id)))


class TestReading:
    async def test_people_are_found_by_a_part_of_their_address(self, operator: Account, owner: Account) -> None:
        found = (await operator.client.get("/v1/admin/users", params={"search": owner.email.upper()})).json()["data"]
        assert [(one["id"], one["email"], one["sessions"]) for one in found] == [(owner.user, owner.email, 1)]
        assert found[0]["platform_operator"] is False and found[0]["second_factor"] is False
        (one,) = (await operator.client.get("/v1/admin/users", params={"search": operator.user})).json()["data"]
        assert one["platform_operator"] is True
        document = (await operator.client.get(f"/v1/admin/users/{owner.user}")).json()
        assert document["organizations"] == [{"id": owner.organization, "name": "Acme", "role": "owner"}]
        assert "password" not in json.dumps(document)
        problem(await operator.client.get("/v1/admin/users/usr_none"), 404, "request.not_found")

    async def test_lists_come_in_pages(self, operator: Account, owner: Account, stranger: Account) -> None:
        for path, ids in (
            ("/v1/admin/users", {operator.user, owner.user, stranger.user}),
            ("/v1/admin/organizations", {operator.organization, owner.organization, stranger.organization}),
        ):
            seen: list[str] = []
            params = {"limit": "2"}
            while True:
                page = (await operator.client.get(path, params=params)).json()
                seen += [row["id"] for row in page["data"]]
                if page["next_cursor"] is None:
                    break
                params["cursor"] = page["next_cursor"]
            assert ids <= set(seen) and len(seen) == len(set(seen)) and seen == sorted(seen)

    async def test_organizations_with_their_counts(self, operator: Account, owner: Account) -> None:
        assert (await owner.client.post("/v1/tunnels", json={"name": "counted"})).status_code == 201
        (found,) = (await operator.client.get("/v1/admin/organizations", params={"search": owner.organization})).json()[
            "data"
        ]
        assert (found["name"], found["members"], found["tunnels"], found["suspended_at"]) == ("Acme", 1, 1, None)
        assert (await operator.client.get(f"/v1/admin/organizations/{owner.organization}")).json() == found
        empty = {"search": owner.organization, "suspended": "true"}
        assert (await operator.client.get("/v1/admin/organizations", params=empty)).json()["data"] == []

    async def test_relays(self, operator: Account, relay: httpx.AsyncClient) -> None:
        (found,) = (await operator.client.get("/v1/admin/relays")).json()["data"]
        assert (found["name"], found["live"], found["tunnels"]) == ("relay-1", True, 0)

    async def test_no_filter_is_a_query(self, operator: Account) -> None:
        for search in ("%", "_", "' OR 1=1 --"):
            assert (await operator.client.get("/v1/admin/users", params={"search": search})).json()["data"] == []


class TestDisabling:
    async def test_ends_sessions_and_keys_until_enabled(
        self, operator: Account, owner: Account, client: httpx.AsyncClient, connect: Any, db: Database, agent: Any
    ) -> None:
        session = (await agent.post("/v1/agent/sessions", json={"agent_id": "agt-0123456789"})).json()["session"]
        done = await operator.client.post(f"/v1/admin/users/{owner.user}/disable", json=WHY)
        assert done.status_code == 200 and done.json()["disabled_at"] is not None and done.json()["sessions"] == 0
        problem(await owner.client.get("/v1/whoami"), 401, "auth.session_ended")
        problem(await agent.get("/v1/whoami"), 401, "auth.key_revoked")
        body = {"email": owner.email, "password": PASSWORD}
        problem(await client.post("/v1/auth/login", json=body), 401, "auth.credentials_invalid")
        async with db.read() as reader:
            ended = await reader.scalar(
                sa.text("SELECT ended_code FROM agent_sessions WHERE id = :id").bindparams(id=session)
            )
        assert ended == "session.revoked"
        again = await operator.client.post(f"/v1/admin/users/{owner.user}/disable", json=WHY)
        assert again.json()["disabled_at"] == done.json()["disabled_at"]

        assert (await operator.client.post(f"/v1/admin/users/{owner.user}/enable", json=WHY)).status_code == 200
        assert (await agent.get("/v1/whoami")).status_code == 200
        problem(await owner.client.get("/v1/whoami"), 401, "auth.session_ended")
        assert (await client.post("/v1/auth/login", json=body)).status_code == 200

        rows = await _rows(db, "user.disable", owner.user)
        assert sorted((row.chain, row.actor_kind, row.actor_id, row.details["reason"]) for row in rows) == [
            ("installation", "person", operator.user, "ticket 17"),
            (owner.organization, "operator", operator.user, "ticket 17"),
        ]
        # The organization learns who it was, not from where.
        assert {row.chain: row.address is None for row in rows} == {"installation": False, owner.organization: True}

    async def test_nobody_disables_himself_or_the_last_operator(
        self, operator: Account, machine: httpx.AsyncClient, db: Database
    ) -> None:
        path = f"/v1/admin/users/{operator.user}/disable"
        problem(await operator.client.post(path, json=WHY), 409, "operator.self")
        async with db.transaction() as tx:
            others = tables.operator_grants.c.user_id != operator.user
            await tx.execute(sa.delete(tables.operator_grants).where(others))
        problem(await machine.post(path, json=WHY), 409, "operator.last")
        assert (await operator.client.get("/v1/admin/users")).status_code == 200
        codes = [
            row.details["code"] for row in await _rows(db, "user.disable", operator.user) if row.outcome == "refused"
        ]
        assert codes == ["operator.self", "operator.last"]

    async def test_sessions_alone(self, operator: Account, owner: Account, agent: httpx.AsyncClient) -> None:
        assert (await operator.client.delete(f"/v1/admin/users/{owner.user}/sessions")).status_code == 204
        problem(await owner.client.get("/v1/whoami"), 401, "auth.session_ended")
        assert (await agent.get("/v1/whoami")).status_code == 200

    async def test_asks_for_a_reason(self, operator: Account, owner: Account) -> None:
        for body in ({}, {"reason": " "}, {"reason": "a\u202eb"}, {"reason": "x" * 501}, {**WHY, "force": True}):
            path = f"/v1/admin/users/{owner.user}/disable"
            problem(await operator.client.post(path, json=body), 422, "request.invalid")


class TestSuspension:
    @pytest.fixture
    def settings(self, settings: ApiSettings) -> ApiSettings:
        return dataclasses.replace(settings, operator_contact="trust@example.com")

    async def test_its_people_read_why_and_whom_to_ask(
        self, operator: Account, owner: Account, agent: httpx.AsyncClient, db: Database
    ) -> None:
        path = f"/v1/admin/organizations/{owner.organization}"
        done = await operator.client.post(f"{path}/suspend", json={"reason": "phishing report"})
        assert done.status_code == 200 and done.json()["suspended_reason"] == "phishing report"
        shown = (await owner.client.get("/v1/org")).json()
        assert (shown["suspended_reason"], shown["operator_contact"]) == ("phishing report", "trust@example.com")
        refused = await agent.post("/v1/agent/sessions", json={"agent_id": "agt-0123456789"})
        problem(refused, 403, "organization.suspended")
        assert refused.json()["detail"] == "the organization is suspended: phishing report; ask trust@example.com"
        found = await operator.client.get("/v1/admin/organizations", params={"suspended": "true"})
        assert [one["id"] for one in found.json()["data"]] == [owner.organization]
        for route in ("/v1/audit/export", "/v1/tunnels", "/v1/org/members"):
            assert (await owner.client.get(route)).status_code == 200, route
        # Its owner cannot take it back.
        problem(await owner.client.post(f"{path}/resume", json=WHY), 403, "auth.operator_required")
        assert (await operator.client.post(f"{path}/resume", json=WHY)).json()["suspended_at"] is None
        assert (await owner.client.get("/v1/org")).json()["suspended_reason"] is None
        rows = await _rows(db, "organization.suspend", owner.organization)
        assert sorted((row.chain, row.actor_id) for row in rows) == [
            ("installation", operator.user),
            (owner.organization, operator.user),
        ]
        (tried,) = [
            row for row in await _rows(db, "organization.resume", owner.organization) if row.outcome == "refused"
        ]
        assert (tried.chain, tried.actor_id) == ("installation", owner.user)

    async def test_of_the_operators_own_organization(self, operator: Account) -> None:
        """They lose what they may do there as everybody does, and stay operators: else nobody could take it back."""
        path = f"/v1/admin/organizations/{operator.organization}"
        assert (await operator.client.post(f"{path}/suspend", json=WHY)).status_code == 200
        problem(await operator.client.post("/v1/tunnels", json={"name": "x"}), 403, "organization.suspended")
        assert (await operator.client.post(f"{path}/resume", json=WHY)).status_code == 200


class TestSecondFactors:
    @pytest.fixture
    async def armed(self, owner: Account, db: Database) -> Account:
        """A person with one of each."""
        async with db.transaction() as tx:
            now = sa.func.now()
            await tx.execute(
                sa.insert(totp_keys).values(user_id=owner.user, sealed_secret=b"x", created_at=now, confirmed_at=now)
            )
            await tx.execute(sa.insert(recovery_codes).values(user_id=owner.user, digest=owner.user.encode()))
            credential = {"credential_id": owner.user.encode(), "public_key": b"k", "sign_count": 0, "aaguid": "0"}
            row = {"id": f"pk_{owner.user}", "user_id": owner.user, "name": "k", "backed_up": False}
            await tx.execute(sa.insert(passkeys).values(**row, **credential))
        return owner

    async def _left(self, db: Database, user: str) -> int:
        async with db.read() as reader:
            counts = [
                await reader.scalar(sa.select(sa.func.count()).where(table.c.user_id == user))
                for table in (totp_keys, recovery_codes, passkeys)
            ]
        return sum(counts)

    async def test_are_taken_away_by_two_operators(
        self, armed: Account, operator: Account, second: Account, machine: httpx.AsyncClient, db: Database
    ) -> None:
        path = f"/v1/admin/users/{armed.user}/mfa-reset"
        asked = (await operator.client.post(path, json=WHY)).json()
        assert asked["state"] == "waiting" and await self._left(db, armed.user) == 3
        confirm = f"/v1/admin/mfa-resets/{asked['id']}/confirm"
        problem(await operator.client.post(confirm), 403, "operator.second_required")
        # Whoever asked may hold the operator key.
        problem(await machine.post(confirm), 403, "operator.second_required")
        problem(await machine.post(path, json=WHY), 403, "operator.second_required")
        assert await self._left(db, armed.user) == 3
        done = await second.client.post(confirm)
        assert (done.status_code, done.json()["state"]) == (200, "done"), done.text
        assert await self._left(db, armed.user) == 0
        problem(await armed.client.get("/v1/whoami"), 401, "auth.session_ended")
        problem(await second.client.post(confirm), 409, "operator.request_over")
        row = (await _rows(db, "user.mfa_reset", armed.user))[-1]
        assert row.details["requested_by"] == operator.user

    async def test_a_request_ends_by_time_by_withdrawal_and_by_a_newer_one(
        self,
        armed: Account,
        operator: Account,
        second: Account,
        clock: MovableClock,
        settings: Any,
        db: Any,
        client: httpx.AsyncClient,
        connect: Any,
    ) -> None:
        path = f"/v1/admin/users/{armed.user}/mfa-reset"
        machine = second.client
        first = (await operator.client.post(path, json=WHY)).json()["id"]
        other = (await operator.client.post(path, json=WHY)).json()["id"]
        problem(await machine.post(f"/v1/admin/mfa-resets/{first}/confirm"), 409, "operator.request_over")
        assert (await machine.delete(f"/v1/admin/mfa-resets/{other}")).status_code == 204
        problem(await machine.post(f"/v1/admin/mfa-resets/{other}/confirm"), 409, "operator.request_over")
        third = (await operator.client.post(path, json=WHY)).json()["id"]
        clock.advance(settings.mfa_reset_seconds)
        again = await client.post("/v1/auth/login", json={"email": second.email, "password": PASSWORD})
        machine = connect(again.json()["access_token"])
        problem(await machine.post(f"/v1/admin/mfa-resets/{third}/confirm"), 409, "operator.request_over")
        states = {row["id"]: row["state"] for row in (await machine.get("/v1/admin/mfa-resets")).json()["data"]}
        assert (states[first], states[other], states[third]) == ("withdrawn", "withdrawn", "expired")
        assert await self._left(db, armed.user) == 3

    async def test_of_oneself_are_not_for_oneself_to_take(self, operator: Account, second: Account) -> None:
        path = f"/v1/admin/users/{operator.user}/mfa-reset"
        problem(await operator.client.post(path, json=WHY), 409, "operator.self")
        asked = (await second.client.post(path, json=WHY)).json()["id"]
        problem(await operator.client.post(f"/v1/admin/mfa-resets/{asked}/confirm"), 409, "operator.self")


class TestLogs:
    async def test_the_installations_own_verifies_and_is_nobody_elses(
        self, operator: Account, owner: Account, machine: httpx.AsyncClient
    ) -> None:
        params = {"action": "operator.grant", "target": operator.user}
        (row,) = (await operator.client.get("/v1/admin/audit", params=params)).json()["data"]
        assert row["actor"]["id"] == "installation" and row["seq"] >= 1
        checked = (await operator.client.get("/v1/admin/audit/verify")).json()
        assert (checked["chain"], checked["valid"]) == ("installation", True)
        assert (await operator.client.get("/v1/admin/audit/checkpoints")).status_code == 200
        exported = await machine.get("/v1/admin/audit/export")
        chains = {json.loads(line)["chain"] for line in exported.text.splitlines()}
        assert chains == {"installation"}
        mine = (await owner.client.get("/v1/audit", params={"action": "operator.grant"})).json()["data"]
        assert mine == []

    async def test_reading_an_organizations_is_seen_by_it(self, operator: Account, owner: Account) -> None:
        path = f"/v1/admin/organizations/{owner.organization}/audit"
        answer = await operator.client.get(path, params={"action": "user.register"})
        (row,) = answer.json()["data"]
        assert row["target"] == owner.user
        (seen,) = (await owner.client.get("/v1/audit", params={"action": "audit.read"})).json()["data"]
        assert (seen["actor"]["kind"], seen["actor"]["id"]) == ("operator", operator.user)
        assert seen["details"] == {"action": "user.register"} and seen["actor"]["address"] is None
        problem(await operator.client.get("/v1/admin/organizations/org_none/audit"), 404, "request.not_found")

    async def test_a_stale_operator_does_not_read_it(
        self, operator: Account, owner: Account, db: Database, clock: MovableClock
    ) -> None:
        async with db.transaction() as tx:
            mine = tables.sign_in_sessions.c.id == operator.session
            old = clock.wall() - timedelta(hours=2)
            await tx.execute(sa.update(tables.sign_in_sessions).where(mine).values(authenticated_at=old))
        path = f"/v1/admin/organizations/{owner.organization}/audit"
        problem(await operator.client.get(path), 403, "auth.step_up_required")
        (row,) = await _rows(db, "audit.read", owner.organization)
        assert (row.outcome, row.chain) == ("refused", "installation")  # a read leaves a row, too, when it is refused
        assert (await operator.client.get("/v1/admin/audit")).status_code == 200
