"""Support access: by an owner's consent, for a while, seen in the audit log, and never more than was consented to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.access import PERMISSIONS, SUPPORT_PERMISSIONS
from portico.control.audit.store import audit_events
from portico.control.identity import operators, tables
from portico.control.identity.keys import issue
from portico.kit.db import Database
from tests.control.conftest import Account, MovableClock
from tests.control.test_http import problem

WHY = {"reason": "ticket 17"}


@pytest.fixture
async def operator(register: Callable[[], Awaitable[Account]], db: Database, clock: MovableClock) -> Account:
    made = await register()
    async with db.transaction() as tx:
        await operators.grant(tx, operators.INSTALLATION, made.user, now=clock.wall())
    return made


@dataclass
class Access:
    """An organization, an operator, and what goes between them."""

    owner: Account
    operator: Account
    connect: Callable[..., httpx.AsyncClient]

    async def consent(self, minutes: int = 30, scope: str = "read") -> str:
        body = {"minutes": minutes, "scope": scope, "reason": "please look"}
        answer = await self.owner.client.post("/v1/org/support-access", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    async def ask(self, organization: str | None = None) -> httpx.Response:
        path = f"/v1/admin/organizations/{organization or self.owner.organization}/impersonate"
        return await self.operator.client.post(path, json=WHY)

    async def begin(self) -> httpx.AsyncClient:
        answer = await self.ask()
        assert answer.status_code == 201, answer.text
        return self.connect(answer.json()["token"])

    async def withdraw(self, consent: str) -> httpx.Response:
        return await self.owner.client.delete(f"/v1/org/support-access/{consent}")


@pytest.fixture
def access(owner: Account, operator: Account, connect: Any) -> Access:
    return Access(owner, operator, connect)


class TestBeginning:
    async def test_needs_a_consent_of_that_organization(self, access: Access, stranger: Account, db: Database) -> None:
        problem(await access.ask(), 403, "support.not_consented")
        await access.consent()
        problem(await access.ask(stranger.organization), 403, "support.not_consented")
        problem(await access.ask("org_none"), 404, "request.not_found")
        async with db.read() as reader:
            query = sa.select(audit_events).where(
                audit_events.c.action == "support_access.begin", audit_events.c.target == access.owner.organization
            )
            (row,) = await reader.fetch_all(query)
        assert (row.outcome, row.chain, row.details["code"]) == ("refused", "installation", "support.not_consented")

    async def test_is_for_people(self, access: Access, db: Database, clock: MovableClock) -> None:
        await access.consent()
        async with db.transaction() as tx:
            key = await issue(tx, clock.wall(), None, None, "operator", "operator", [])
        path = f"/v1/admin/organizations/{access.owner.organization}/impersonate"
        problem(await access.connect(key.key).post(path, json=WHY), 403, "operator.person_required")

    async def test_gives_a_token_no_longer_than_the_consent(self, access: Access, clock: MovableClock) -> None:
        await access.consent(minutes=5)
        begun = (await access.ask()).json()
        (consent,) = (await access.owner.client.get("/v1/org/support-access")).json()["data"]
        assert begun["expires_at"] == consent["expires_at"]
        assert begun["token"].startswith("tnl_sup_") and "token" not in consent["sessions"][0]
        assert consent["sessions"][0]["operator_id"] == access.operator.user
        assert consent["sessions"][0]["reason"] == WHY["reason"]

    async def test_is_told_to_the_owners(self, access: Access, db: Database) -> None:
        await access.consent()
        begun = (await access.ask()).json()
        async with db.read() as reader:
            rows = await reader.raw.fetch(
                "SELECT recipient, idempotency_key FROM outbox_messages WHERE topic = 'support.begun'"
            )
        told = [(row["recipient"], row["idempotency_key"]) for row in rows if begun["id"] in row["idempotency_key"]]
        assert told == [(access.owner.email, f"support.begun:{begun['id']}:{access.owner.user}")]

    async def test_takes_the_widest_live_consent(self, access: Access) -> None:
        await access.consent(scope="read")
        wide = await access.consent(scope="write")
        assert (await access.ask()).json()["scope"] == "write"
        await access.withdraw(wide)
        assert (await access.ask()).json()["scope"] == "read"


class TestConsent:
    async def test_asks_for_a_recent_proof(self, access: Access, db: Database, clock: MovableClock) -> None:
        """A session that somebody took opens no door to others."""
        async with db.transaction() as tx:
            mine = tables.sign_in_sessions.c.id == access.owner.session
            old = clock.wall() - timedelta(hours=2)
            await tx.execute(sa.update(tables.sign_in_sessions).where(mine).values(authenticated_at=old))
        answer = await access.owner.client.post("/v1/org/support-access", json={"minutes": 5})
        problem(answer, 403, "auth.step_up_required")
        (row,) = (await access.owner.client.get("/v1/audit", params={"action": "support_access.consent"})).json()[
            "data"
        ]
        assert (row["outcome"], row["details"]["code"]) == ("refused", "auth.step_up_required")

    async def test_is_the_owners_alone_and_in_person(self, access: Access, db: Database) -> None:
        key = await access.owner.key("api", scopes=sorted(PERMISSIONS))
        body = {"minutes": 5}
        with_key = access.connect(key["key"])
        problem(await with_key.post("/v1/org/support-access", json=body), 403, "auth.forbidden")
        async with db.transaction() as tx:
            mine = tables.members.c.user_id == access.owner.user
            await tx.execute(sa.update(tables.members).where(mine).values(role="admin"))
        problem(await access.owner.client.post("/v1/org/support-access", json=body), 403, "auth.forbidden")
        assert (await access.owner.client.get("/v1/org/support-access")).status_code == 200
        problem(await access.ask(), 403, "support.not_consented")

    async def test_has_limits(self, access: Access, settings: Any) -> None:
        url = "/v1/org/support-access"
        over = {"minutes": settings.support_access_max_minutes + 1}
        problem(await access.owner.client.post(url, json=over), 400, "support.minutes_invalid")
        problem(await access.owner.client.post(url, json={"minutes": 0}), 422, "request.invalid")
        for _ in range(settings.support_consents_per_organization):
            await access.consent()
        problem(await access.owner.client.post(url, json={"minutes": 5}), 409, "support.limit_reached")

    async def test_of_another_organization_is_not_found(self, access: Access, stranger: Account) -> None:
        consent = await access.consent()
        client = await access.begin()
        path = f"/v1/org/support-access/{consent}"
        problem(await stranger.client.delete(path), 404, "request.not_found")
        assert (await stranger.client.get("/v1/org/support-access")).json()["data"] == []
        assert (await client.get("/v1/whoami")).status_code == 200


class TestWhatItMay:
    async def test_look_and_no_more(self, access: Access) -> None:
        await access.consent(scope="read")
        client = await access.begin()
        me = (await client.get("/v1/whoami")).json()
        assert (me["kind"], me["user"], me["organization"]["id"]) == ("support", None, access.owner.organization)
        assert set(me["permissions"]) == SUPPORT_PERMISSIONS["read"] and me["platform_operator"] is False
        assert (await client.get("/v1/tunnels")).status_code == 200
        problem(await client.post("/v1/tunnels", json={"name": "x"}), 403, "auth.forbidden")

    async def test_change_tunnels_where_that_was_consented_to(self, access: Access) -> None:
        await access.consent(scope="write")
        client = await access.begin()
        made = await client.post("/v1/tunnels", json={"name": "by-support"})
        assert made.status_code == 201
        params = {"action": "tunnel.create", "target": made.json()["id"]}
        (row,) = (await access.owner.client.get("/v1/audit", params=params)).json()["data"]
        assert (row["actor"]["kind"], row["actor"]["id"]) == ("support", access.operator.user)
        (consent,) = (await access.owner.client.get("/v1/org/support-access")).json()["data"]
        assert row["details"]["support_session"] == consent["sessions"][0]["id"]

    async def test_leave_nothing_that_outlasts_it(self, access: Access) -> None:
        """No key, session, member, role or consent; nothing of the operator's own rights either."""
        await access.consent(scope="write")
        client = await access.begin()
        user = access.owner.user
        for method, path, body in (
            ("POST", "/v1/api-keys", {"kind": "api", "name": "x", "scopes": ["tunnels:read"]}),
            ("POST", "/v1/api-keys", {"kind": "agent", "name": "x"}),
            ("GET", "/v1/api-keys", None),
            ("POST", "/v1/auth/device/approve", {"user_code": "BCDF-GHJK"}),
            ("GET", "/v1/auth/sessions", None),
            ("POST", "/v1/auth/logout", None),
            ("PATCH", f"/v1/org/members/{user}", {"role": "viewer"}),
            ("POST", "/v1/org/roles", {"name": "r", "permissions": []}),
            ("POST", "/v1/org/support-access", {"minutes": 5}),
            ("GET", "/v1/audit", None),
            ("GET", "/v1/admin/users", None),
            ("POST", f"/v1/admin/organizations/{access.owner.organization}/impersonate", WHY),
        ):
            answer = await client.request(method, path, json=body)
            assert answer.status_code == 403, (method, path, answer.text)
        for scope in SUPPORT_PERMISSIONS.values():
            assert not [p for p in scope if p.partition(":")[0] in ("keys", "owners", "billing", "audit", "agent")]
            assert not {"members:write", "roles:write", "organization:write", "organization:delete"} & scope

    async def test_every_request_is_in_the_organizations_log(self, access: Access) -> None:
        await access.consent()
        client = await access.begin()
        await client.get("/v1/tunnels", params={"limit": 1})
        await client.post("/v1/api-keys", json={"kind": "agent", "name": "x"})
        log = (await access.owner.client.get("/v1/audit", params={"action": "support_access.request"})).json()["data"]
        told = [(row["details"]["method"], row["details"]["path"], row["actor"]["id"]) for row in log]
        assert told == [
            ("POST", "/v1/api-keys", access.operator.user),
            ("GET", "/v1/tunnels", access.operator.user),
        ]
        actions = {row["action"] for row in (await access.owner.client.get("/v1/audit")).json()["data"]}
        assert {"support_access.consent", "support_access.begin"} <= actions


class TestItsEnd:
    async def test_at_once_with_the_consent(self, access: Access) -> None:
        consent = await access.consent()
        client, other = await access.begin(), await access.begin()
        assert (await access.withdraw(consent)).status_code == 204
        for one in (client, other):
            problem(await one.get("/v1/tunnels"), 401, "auth.support_ended")
        problem(await access.ask(), 403, "support.not_consented")
        assert (await access.withdraw(consent)).status_code == 204
        (shown,) = (await access.owner.client.get("/v1/org/support-access")).json()["data"]
        assert shown["state"] == "withdrawn" and all(one["ended_at"] for one in shown["sessions"])
        await access.consent()  # a new consent does not bring an old token back
        problem(await client.get("/v1/tunnels"), 401, "auth.support_ended")

    async def test_with_its_time(self, access: Access, clock: MovableClock) -> None:
        await access.consent(minutes=5)
        client = await access.begin()
        clock.advance(299)
        assert (await client.get("/v1/tunnels")).status_code == 200
        clock.advance(2)
        problem(await client.get("/v1/tunnels"), 401, "auth.support_ended")
        problem(await access.ask(), 403, "support.not_consented")
        (shown,) = (await access.owner.client.get("/v1/org/support-access")).json()["data"]
        assert shown["state"] == "expired"

    async def test_with_the_operators_grant(self, access: Access, stranger: Account, db: Database, clock: Any) -> None:
        await access.consent()
        client = await access.begin()
        async with db.transaction() as tx:
            await operators.grant(tx, operators.INSTALLATION, stranger.user, now=clock.wall())
            await operators.revoke(tx, operators.INSTALLATION, access.operator.user, now=clock.wall())
        problem(await client.get("/v1/tunnels"), 401, "auth.support_ended")

    async def test_with_the_operators_sign_in(self, access: Access) -> None:
        await access.consent()
        client = await access.begin()
        assert (await access.operator.client.post("/v1/auth/logout")).status_code == 204
        problem(await client.get("/v1/tunnels"), 401, "auth.support_ended")

    async def test_by_the_operator_who_began_it(
        self, access: Access, register: Callable[[], Awaitable[Account]], db: Database, clock: MovableClock
    ) -> None:
        await access.consent()
        begun = (await access.ask()).json()
        path = f"/v1/admin/support-sessions/{begun['id']}"
        colleague = await register()
        async with db.transaction() as tx:
            await operators.grant(tx, operators.INSTALLATION, colleague.user, now=clock.wall())
        problem(await colleague.client.delete(path), 404, "request.not_found")
        assert (await access.operator.client.delete(path)).status_code == 204
        problem(await access.connect(begun["token"]).get("/v1/tunnels"), 401, "auth.support_ended")

    async def test_a_token_that_was_never_given(self, access: Access) -> None:
        from portico.kit.ids import new_token

        problem(await access.connect(new_token("sup")).get("/v1/tunnels"), 401, "auth.key_invalid")


async def test_answers_of_one_organization_are_not_replayed_in_another(
    access: Access, stranger: Account, connect: Any
) -> None:
    """The same operator, key and request, let in by two organizations: two sessions, so two answers."""
    await access.consent(scope="write")
    body = {"minutes": 30, "scope": "write"}
    assert (await stranger.client.post("/v1/org/support-access", json=body)).status_code == 201
    made = []
    for organization in (access.owner.organization, stranger.organization):
        client = connect((await access.ask(organization)).json()["token"])
        answer = await client.post("/v1/tunnels", json={"name": "same"}, headers={"Idempotency-Key": "k-1"})
        assert answer.status_code == 201, answer.text
        made.append(answer.json()["id"])
    assert made[0] != made[1]
