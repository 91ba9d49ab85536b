"""Verification against real name servers: who gets a name, who keeps it, and who is told."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from portico.control.domains import jobs_verification, store
from portico.control.domains.verification import WORKER
from portico.settings import ApiSettings
from tests.control.conftest import Account, MovableClock
from tests.control.domains.test_domains import add, fresh, set_status
from tests.control.test_http import problem
from tests.dnsserver import DnsServer

Three = tuple[DnsServer, DnsServer, DnsServer]


@pytest.fixture
async def three() -> AsyncIterator[Three]:
    async with DnsServer() as first, DnsServer() as second, DnsServer(lazy=True) as third:
        for each in (first, second, third):
            each.put("edge.portico.test", "A", "192.0.2.7")
        yield first, second, third


@pytest.fixture
def settings(settings: ApiSettings, three: Three) -> ApiSettings:
    return dataclasses.replace(
        settings,
        base_domain="portico.test",
        dns_resolvers=tuple(each.address for each in three),
        dns_timeout_seconds=10.0,
        domain_verify_pause_seconds=0.0,
        access_token_seconds=100 * 86_400,
        challenge_zone="challenges.portico.test",
    )


def publish(servers: Any, domain: dict[str, Any], *purposes: str, also: tuple[str, ...] = ()) -> None:
    """Set the records of a domain; ``also``: further values of its TXT record."""
    for record in domain["records"]:
        if purposes and record["purpose"] not in purposes:
            continue
        values = (record["value"], *also) if record["type"] == "TXT" else (f"{record['value']}.",)
        for server in servers:
            if record["type"] == "ALIAS":
                server.put(record["name"], "A", "192.0.2.7")
            else:
                server.put(record["name"], record["type"], *values)


async def verify(account: Account, domain: dict[str, Any], status: int = 200) -> dict[str, Any]:
    answer = await account.client.post(f"/v1/domains/{domain['id']}/verify")
    assert answer.status_code == status, answer.text
    return dict(answer.json())


async def get(account: Account, domain: dict[str, Any]) -> dict[str, Any]:
    return dict((await account.client.get(f"/v1/domains/{domain['id']}")).json())


async def run_worker(app: Any) -> int:
    return await jobs_verification.check(app.state.db, app.state.settings, app.state.clock)


def states(domain: dict[str, Any]) -> dict[str, str]:
    return {record["purpose"]: record["state"] for record in domain["records"]}


class TestItsOwner:
    async def test_step_by_step(self, owner: Account, three: Three) -> None:
        made = await add(owner, fresh())
        seen = await verify(owner, made)
        assert (seen["hostname_status"], seen["dns_error"]) == ("pending", "ownership_missing")
        assert states(seen) == {"ownership": "missing", "routing": "missing", "delegation": "missing"}
        assert made["records"][0]["value"] in seen["records"][0]["fix"]
        publish(three, made, "ownership", also=("v=spf1 -all",))
        seen = await verify(owner, made)
        assert (seen["hostname_status"], seen["dns_error"]) == ("verified", "not_pointing")
        assert seen["verified_at"] is not None
        publish(three, made, "routing", "delegation")
        seen = await verify(owner, made)
        assert (seen["hostname_status"], seen["dns_error"]) == ("active", None)
        assert set(states(seen).values()) == {"ok"}
        assert all(record["fix"] is None for record in seen["records"])

    async def test_a_name_that_leads_here_now_waits_for_no_pause_of_when_it_did_not(
        self, app: Any, owner: Account, three: Three
    ) -> None:
        """Its last order ended before an authority was asked; another reason to wait stays one."""

        async def waits(code: str) -> bool:
            async with app.state.db.transaction() as tx:
                await tx.raw.execute(
                    "INSERT INTO certificate_schedules (domain_id, organization_id) SELECT id, organization_id"
                    " FROM custom_domains WHERE id = $1 ON CONFLICT DO NOTHING",
                    made["id"],
                )
                await tx.raw.execute(
                    "UPDATE certificate_schedules SET next_at = now() + interval '1 hour', error_code = $2 WHERE domain_id = $1",
                    made["id"], code,
                )  # fmt: skip
            await verify(owner, made)
            async with app.state.db.read() as reader:
                query = "SELECT next_at > now() FROM certificate_schedules WHERE domain_id = $1"
                return bool(await reader.raw.fetchval(query, made["id"]))

        made = await add(owner, fresh())
        publish(three, made, "ownership")
        assert await waits("not_delegated")
        publish(three, made, "delegation")
        assert not await waits("not_delegated")
        assert await waits("not_reached"), "nothing has changed since"
        publish(three, made, "routing")
        assert not await waits("not_reached")
        await set_status(app, made["id"], "verified")
        assert await waits("rate_limited")

    async def test_an_apex_by_addresses_and_a_wildcard(self, owner: Account, three: Three) -> None:
        base = fresh("")
        apex, wild = await add(owner, base), await add(owner, f"*.{base}")
        publish(three, apex, also=(wild["records"][0]["value"],))
        publish(three, wild, "routing")
        for domain in (apex, wild):
            assert (await verify(owner, domain))["hostname_status"] == "active", domain

    async def test_one_resolver_that_lies_proves_nothing(self, owner: Account, three: Three) -> None:
        made = await add(owner, fresh())
        publish(three[:1], made)
        assert (await verify(owner, made))["hostname_status"] == "pending"
        publish(three[1:2], made)
        assert (await verify(owner, made))["hostname_status"] == "active"

    async def test_a_record_of_another_claim_proves_nothing(
        self, owner: Account, stranger: Account, three: Three
    ) -> None:
        name = fresh()
        mine, theirs = await add(owner, name), await add(stranger, name)
        publish(three, theirs)
        seen = await verify(owner, mine)
        assert (seen["hostname_status"], states(seen)["ownership"]) == ("pending", "wrong")
        # The claim of old is no proof of the new one.
        await owner.client.delete(f"/v1/domains/{mine['id']}")
        again = await add(owner, name)
        assert again["records"][0]["value"] != mine["records"][0]["value"]

    async def test_a_second_look_at_once_is_the_first(self, app: Any, owner: Account, three: Three) -> None:
        app.state.domains._settings = dataclasses.replace(app.state.settings, domain_verify_pause_seconds=60.0)
        made = await add(owner, fresh())
        await verify(owner, made)
        asked = sum(three[0].asked.values())
        assert (await verify(owner, made))["hostname_status"] == "pending"
        assert sum(three[0].asked.values()) == asked

    async def test_records_that_were_set_right_after_a_look_are_seen_by_the_next_soon(
        self, app: Any, owner: Account, clock: MovableClock, three: Three
    ) -> None:
        """The worker looks at once when a domain is added: whoever sets the records then, and verifies, waits for no minute."""
        app.state.domains._settings = dataclasses.replace(app.state.settings, domain_verify_pause_seconds=5.0)
        made = await add(owner, fresh())
        await run_worker(app)
        publish(three, made)
        assert (await verify(owner, made))["hostname_status"] == "pending", "another look at once would see the same"
        clock.advance(6)
        await run_worker(app)
        seen = await get(owner, made)
        assert seen["hostname_status"] == "active"
        later = (await verify(owner, made))["hostname_status"], await run_worker(app)
        assert later == ("active", 0), "nothing is wrong with it: it is looked at when it would be"

    async def test_nobody_elses(self, stranger: Account, owner: Account) -> None:
        made = await add(owner, fresh())
        problem(await stranger.client.post(f"/v1/domains/{made['id']}/verify"), 404, "domain.not_found")
        problem(await stranger.client.patch(f"/v1/domains/{made['id']}", json={}), 404, "domain.not_found")

    async def test_a_blocked_or_lost_one_is_not_looked_at(self, app: Any, owner: Account, three: Three) -> None:
        made = await add(owner, fresh())
        publish(three, made)
        await set_status(app, made["id"], "blocked")
        problem(await owner.client.post(f"/v1/domains/{made['id']}/verify"), 403, "domain.blocked")
        problem(await owner.client.patch(f"/v1/domains/{made['id']}", json={}), 403, "domain.blocked")
        await set_status(app, made["id"], "deleted")
        problem(await owner.client.post(f"/v1/domains/{made['id']}/verify"), 409, "domain.lost")
        await add(owner, made["name"])  # the row that explains is no claim


class TestTwoOrganizations:
    async def test_of_many_at_once_one_holds_the_name(
        self, app: Any, owner: Account, stranger: Account, three: Three
    ) -> None:
        """All records are there: whoever is first keeps the name while its record stays."""
        name = fresh()
        claims = [(account, await add(account, name)) for account in (owner, stranger)]
        publish(three, claims[0][1], also=(claims[1][1]["records"][0]["value"],))
        await asyncio.gather(*(verify(account, made) for account, made in claims * 3))
        seen = [await get(account, made) for account, made in claims]
        assert sorted(each["hostname_status"] for each in seen) == ["active", "pending"]
        (waiting,) = (each for each in seen if each["hostname_status"] == "pending")
        assert waiting["dns_error"] == "claimed"
        assert "its record is still there" in waiting["records"][0]["fix"]

    async def test_a_takeover_needs_the_new_record_and_the_loss_of_the_old(
        self, app: Any, owner: Account, stranger: Account, three: Three
    ) -> None:
        name = fresh()
        mine, theirs = await add(owner, name), await add(stranger, name)
        publish(three, mine)
        assert (await verify(owner, mine))["hostname_status"] == "active"
        # The new record beside the old one; then only the new one, but so far at one resolver of three.
        publish(three, theirs, "ownership", also=(mine["records"][0]["value"],))
        assert (await verify(stranger, theirs))["dns_error"] == "claimed"
        publish(three[:1], theirs, "ownership")
        assert (await verify(stranger, theirs))["dns_error"] == "claimed"
        # Resolvers that say nothing are no loss of a record.
        three[1].mode = three[2].mode = "servfail"
        assert (await verify(stranger, theirs))["hostname_status"] == "pending"
        three[1].mode = three[2].mode = "good"
        assert (await get(owner, mine))["hostname_status"] == "active"
        publish(three[:2], theirs, "ownership")
        assert (await verify(stranger, theirs))["hostname_status"] == "active"
        lost = await get(owner, mine)
        assert (lost["hostname_status"], lost["dns_error"], lost["tunnel"]) == ("deleted", "taken_over", None)
        rows = (await owner.client.get("/v1/audit", params={"target": mine["id"]})).json()["data"]
        assert rows[0]["details"] == {"name": name, "from": "active", "to": "deleted", "why": "taken_over"}
        assert rows[0]["actor"]["id"] == "certificates"  # not who took it: that is not the loser's business
        rows = (await stranger.client.get("/v1/audit", params={"target": theirs["id"]})).json()["data"]
        assert {row["action"] for row in rows} == {"domain.add", "domain.take_over", "domain.status"}

    async def test_a_blocked_name_is_nobodys(self, app: Any, owner: Account, stranger: Account, three: Three) -> None:
        name = fresh()
        mine, theirs = await add(owner, name), await add(stranger, name)
        publish(three, theirs)
        await set_status(app, mine["id"], "blocked")
        assert (await verify(stranger, theirs))["dns_error"] == "claimed"

    async def test_a_look_of_before_changes_nothing_afterwards(
        self, app: Any, owner: Account, three: Three, clock: MovableClock
    ) -> None:
        """A look that took its time, or was made of a claim that is gone, gives nobody anything."""
        made = await add(owner, fresh())
        publish(three, made)
        verification = app.state.domains.verification
        async with app.state.db.read() as reader:
            row = await store.find(reader, made["id"])
        looked = await verification.look(row)
        clock.advance(61)
        async with app.state.db.transaction() as tx:
            assert (await verification.apply(tx, WORKER, row, looked, manual=True)).hostname_status == "pending"
        looked = await verification.look(row)
        async with app.state.db.transaction() as tx:
            await store.update(tx, row.id, verification_token="another")
            assert (await verification.apply(tx, WORKER, row, looked, manual=True)).hostname_status == "pending"
        await owner.client.delete(f"/v1/domains/{made['id']}")
        async with app.state.db.transaction() as tx:
            assert await verification.apply(tx, WORKER, row, looked, manual=True) is None


class TestTheWorker:
    async def test_it_follows_the_ladder(self, app: Any, owner: Account, three: Three, clock: MovableClock) -> None:
        made = await add(owner, fresh())
        assert await run_worker(app) >= 1
        seen = await get(owner, made)
        assert (seen["hostname_status"], seen["dns_error"]) == ("pending", "ownership_missing")
        checked = seen["checked_at"]
        await run_worker(app)
        assert (await get(owner, made))["checked_at"] == checked  # not due
        publish(three, made)
        clock.advance(61)
        await run_worker(app)
        assert (await get(owner, made))["hostname_status"] == "active"

    async def test_two_workers_share_the_work(self, app: Any, owner: Account, three: Three) -> None:
        made = [await add(owner, fresh()) for _ in range(12)]
        await asyncio.gather(*(run_worker(app) for _ in range(4)))
        names = {record["name"] for each in made for record in each["records"] if record["type"] == "TXT"}
        assert {three[0].asked[(name, "TXT")] for name in names} == {1}

    async def test_a_worker_that_dies_leaves_the_domain_to_others(
        self, app: Any, owner: Account, three: Three, clock: MovableClock
    ) -> None:
        made = await add(owner, fresh())
        publish(three, made)
        now = clock.wall()
        async with app.state.db.transaction() as tx:
            taken = await store.take_due(tx, now, 100, now + timedelta(minutes=5))
        assert made["id"] in {row.id for row in taken}
        await run_worker(app)
        assert (await get(owner, made))["hostname_status"] == "pending"
        clock.advance(301)
        await run_worker(app)
        assert (await get(owner, made))["hostname_status"] == "active"

    async def test_organizations_take_turns(
        self, app: Any, owner: Account, stranger: Account, clock: MovableClock
    ) -> None:
        for _ in range(6):
            await add(owner, fresh())
        late = await add(stranger, fresh())
        now = clock.wall() + timedelta(seconds=1)
        async with app.state.db.transaction() as tx:
            await tx.raw.execute(
                "UPDATE custom_domains SET next_check_at = NULL WHERE organization_id <> ALL($1)",
                [owner.organization, stranger.organization],
            )
            taken = await store.take_due(tx, now, 2, now + timedelta(minutes=5))
        assert late["id"] in {row.id for row in taken}

    async def test_a_domain_moves_away_and_is_lost(
        self, app: Any, owner: Account, three: Three, clock: MovableClock
    ) -> None:
        made = await add(owner, fresh())
        publish(three, made)
        await verify(owner, made)
        for server in three:
            server.put(made["name"], "CNAME", "elsewhere.example.net.")
        seen = []
        for _ in range(17):
            clock.advance(86_400)
            await run_worker(app)
            seen.append((await get(owner, made))["hostname_status"])
        assert seen == ["active"] * 7 + ["moved"] * 7 + ["deleted"] * 3
        assert (await get(owner, made))["dns_error"] == "pointing_elsewhere"
        await add(owner, made["name"])
        clock.advance(31 * 86_400)
        await jobs_verification.purge(app.state.db, app.state.settings, clock)
        problem(await owner.client.get(f"/v1/domains/{made['id']}"), 404, "domain.not_found")

    async def test_an_outage_of_resolvers_takes_nothing_away(
        self, app: Any, owner: Account, three: Three, clock: MovableClock
    ) -> None:
        made = await add(owner, fresh())
        publish(three, made)
        await verify(owner, made)
        for server in three:
            server.mode = "servfail"
        for _ in range(20):
            clock.advance(86_400)
            await run_worker(app)
        seen = await get(owner, made)
        assert (seen["hostname_status"], seen["dns_error"]) == ("active", "resolvers_silent")

    async def test_channels_hear_of_each_turn_once(
        self, app: Any, owner: Account, three: Three, clock: MovableClock
    ) -> None:
        channel = {
            "kind": "webhook",
            "name": "x",
            "target": "https://hooks.example.com/",
            "events": ["*"],
            "enabled": True,
        }
        answer = await owner.client.put("/v1/org/notification-channels", json={"channels": [channel]})
        assert answer.status_code == 200, answer.text
        made = await add(owner, fresh())
        publish(three, made)
        await verify(owner, made)
        publish([three[0]], made)
        for server in three:
            server.put(made["name"], "CNAME")
        for _ in range(17):
            clock.advance(86_400)
            await run_worker(app)
        async with app.state.db.read() as reader:
            rows = await reader.raw.fetch(
                "SELECT topic FROM outbox_messages WHERE organization_id = $1 ORDER BY queued_at, id",
                owner.organization,
            )
        assert [row["topic"] for row in rows] == ["domain.verified", "domain.failing", "domain.moved", "domain.lost"]


class TestChanges:
    async def test_mode_and_policy(self, owner: Account) -> None:
        made = await add(owner, fresh())
        path = f"/v1/domains/{made['id']}"
        changed = (await owner.client.patch(path, json={"failure_policy": "strict", "tls_mode": "passthrough"})).json()
        assert (changed["failure_policy"], changed["tls_mode"]) == ("strict", "passthrough")
        rows = (await owner.client.get("/v1/audit", params={"target": made["id"]})).json()["data"]
        assert rows[0]["details"] == {"name": made["name"], "failure_policy": "strict", "tls_mode": "passthrough"}
        same = await owner.client.patch(path, json={"failure_policy": "strict"})
        assert same.json()["updated_at"] == changed["updated_at"]

    async def test_another_policy_lets_go_of_what_is_held(self, app: Any, owner: Account) -> None:
        made = await add(owner, fresh(), failure_policy="hold")
        async with app.state.db.transaction() as tx:
            await store.update(tx, made["id"], cert_held_at=app.state.clock.wall(), cert_failures=2)
        assert (await get(owner, made))["certificate"]["held_at"] is not None
        changed = await owner.client.patch(f"/v1/domains/{made['id']}", json={"failure_policy": "standard"})
        assert changed.json()["certificate"]["held_at"] is None

    async def test_who_ends_tls_stays_while_it_is_in_use(self, app: Any, owner: Account) -> None:
        made, tunnel = await add(owner, fresh()), await owner.client.post("/v1/tunnels", json={})
        async with app.state.db.transaction() as tx:
            await store.update(tx, made["id"], tunnel_id=tunnel.json()["id"])
        path = f"/v1/domains/{made['id']}"
        problem(await owner.client.patch(path, json={"tls_mode": "passthrough"}), 409, "domain.routed")
        assert (await owner.client.patch(path, json={"failure_policy": "strict"})).status_code == 200
