"""What follows from a certificate and from a failure: suggested and ordinary renewals, revocation, staging, other authorities."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from portico.control import changes
from portico.control.domains import acme_ari, acme_schedule, acme_store
from portico.control.domains.acme_accounts import Accounts
from portico.control.domains.acme_client import Window
from portico.settings import ApiSettings, Secret
from tests.control.domains.certificates import rows
from tests.control.domains.issuing import LIMITS, Desk

SETTINGS = ApiSettings(database_url=Secret("unused"), master_key=Secret("unused"))
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def suggestion(start: datetime, end: datetime) -> str:
    return f'{{"suggestedWindow": {{"start": "{start.isoformat()}", "end": "{end.isoformat()}"}}}}'


async def answers(at: Desk, wanted: bool) -> None:
    """Wait until the relay answers some challenge, or none."""
    async with asyncio.timeout(30):
        while bool(at.edge.relay.snapshot.challenges) is not wanted:
            await asyncio.sleep(0.02)


async def ask(at: Desk, domain: Any) -> Any:
    """The CA is asked about its renewal now."""
    await at.sql("UPDATE certificate_schedules SET ari_next_at = now() WHERE domain_id = $1", domain["id"])
    await acme_ari.round_(at.db, at.control, Accounts(at.control, at.db))
    return await at.schedule(domain)


class TestSuggestions:
    async def test_a_renewal_within_the_window_replaces_and_costs_nothing(self, at: Desk) -> None:
        domain = await at.domain()
        await at.issue()
        (version,) = await at.chain(domain)
        now = datetime.now(UTC).replace(microsecond=0)
        start, end = now - timedelta(hours=1), now + timedelta(hours=1)
        at.ca.suggest(version["chain_pem"], suggestion(start, end))
        schedule = await ask(at, domain)
        assert (schedule["ari_start"], schedule["ari_end"]) == (start, end)
        assert now - timedelta(minutes=1) < schedule["next_at"] <= end
        assert timedelta(hours=3) < schedule["ari_next_at"] - now < timedelta(hours=12)
        again = await ask(at, domain)
        assert again["next_at"] == schedule["next_at"]
        before = await rows(at.db, "SELECT * FROM acme_budget")
        order = await at.again(domain)
        assert (order["state"], order["replaces"]) == ("issued", schedule["certificate"])
        assert {row["bucket"] for row in before} == {"orders", "domain", "names"}
        assert await rows(at.db, "SELECT * FROM acme_budget") == before
        events = (await at.events(domain))[4:]
        proved = [event for event in events if event.startswith("validation.")]
        assert proved in (["validation.started", "validation.succeeded"], []), "Pebble may take the proof of before"
        assert [event for event in events if event not in proved] == [
            "renewal.ari_window_changed", "renewal.started", "renewal.succeeded",
        ]  # fmt: skip
        # What was replaced already is ordered like anything else, at its price.
        await at.sql(
            "UPDATE certificate_schedules SET certificate = $2, ari_start = $3, ari_end = $4 WHERE domain_id = $1",
            domain["id"], schedule["certificate"], start, end,
        )  # fmt: skip
        order = await at.again(domain)
        assert (order["state"], order["replaces"], order["asked"]) == ("issued", None, 1)
        assert await rows(at.db, "SELECT * FROM acme_budget") != before

    @pytest.mark.parametrize("wrong", ["", "{", "null", '{"suggestedWindow": {"start": 1}}'])
    async def test_an_answer_that_is_none_changes_nothing(self, at: Desk, wrong: str) -> None:
        domain = await at.domain()
        await at.issue()
        before = await at.schedule(domain)
        at.ca.suggest((await at.chain(domain))[0]["chain_pem"], wrong or "x")
        after = await ask(at, domain)
        assert after["next_at"] == before["next_at"] and after["ari_next_at"] > datetime.now(UTC) + timedelta(
            minutes=30
        )
        assert "renewal.ari_window_changed" not in await at.events(domain)

    async def test_a_ca_that_cannot_be_asked_changes_nothing(self, at: Desk) -> None:
        domain = await at.domain()
        await at.issue()
        await at.sql("UPDATE acme_accounts SET directory = 'https://127.0.0.1:1/dir'")
        await at.sql("UPDATE certificate_schedules SET directory = 'https://127.0.0.1:1/dir'")
        before = await at.schedule(domain)
        assert (await ask(at, domain))["next_at"] == before["next_at"]

    async def test_a_revoked_certificate_is_replaced_at_once(self, at: Desk) -> None:
        domain = await at.domain()
        await at.issue()
        (version,) = await at.chain(domain)
        leaf = x509.load_pem_x509_certificate(version["chain_pem"].encode())
        async with Accounts(at.control, at.db).client(at.ca.directory) as client:
            await client.revoke(leaf.public_bytes(serialization.Encoding.DER), 1)
        schedule = await ask(at, domain)
        assert schedule["next_at"] <= datetime.now(UTC)
        await at.issue()
        assert [each["version"] for each in await at.chain(domain)] == [1, 2]

    async def test_a_revocation_that_somebody_reports_is_answered_too(self, at: Desk) -> None:
        domain = await at.domain()
        await at.issue()
        assert await at.sweep() == 0
        fingerprint = (await at.schedule(domain))["fingerprint"]
        await at.sql(
            "UPDATE custom_domains SET cert_status = 'revoked', cert_fingerprint = $2 WHERE id = $1",
            domain["id"],
            fingerprint,
        )
        assert await at.sweep() == 1
        await at.run()
        assert await at.sweep() == 0 and len(await at.chain(domain)) == 2


class TestTimes:
    @pytest.mark.parametrize(("days", "left"), [(90, 30), (45, 15), (6.67, 3.33), (9.9, 4.95), (10, 3.33)])
    def test_a_third_is_left_or_half_of_a_short_life(self, days: float, left: float) -> None:
        end = NOW + timedelta(days=days)
        for _ in range(200):
            remaining = (end - acme_schedule.by_lifetime(SETTINGS, NOW, end)) / timedelta(days=1)
            assert left * 0.99 <= remaining <= left * 1.06

    def test_a_window_is_drawn_from_and_never_waited_for_too_long(self) -> None:
        end = NOW + timedelta(days=90)
        window = Window(NOW + timedelta(days=50), NOW + timedelta(days=52), None, None)
        drawn = [acme_schedule.by_window(window, NOW, NOW, end) for _ in range(500)]
        assert all(window.start <= each <= window.end for each in drawn)
        assert max(drawn) - min(drawn) > timedelta(days=1)
        over = NOW + timedelta(days=60)
        assert acme_schedule.by_window(window, over, NOW, end) == over
        late = Window(NOW + timedelta(days=200), NOW + timedelta(days=300), None, None)
        assert acme_schedule.by_window(late, NOW, NOW, end) == end - timedelta(days=4.5)


class TestFailures:
    async def test_pauses_grow_and_retry_now_goes_before_them(self, at: Desk) -> None:
        domain = await at.domain("blocked-domain.example")
        waits = []
        for _ in range(4):
            await at.again(domain) if waits else await at.issue()
            schedule = await at.schedule(domain)
            waits.append((schedule["next_at"] - datetime.now(UTC)).total_seconds())
        for wait, rung in zip(waits, (60, 600, 6000, 86_400), strict=True):
            assert rung * 0.85 < wait < rung * 1.15

    async def test_a_name_that_failed_is_tried_at_the_staging_first(self, at: Desk) -> None:
        """The same Pebble by another name is its staging: nothing that comes from there is served."""
        staging = at.ca.directory.replace("127.0.0.1", "localhost")
        domain = await at.domain()
        await at.issue(acme_staging_directory=staging)
        await at.sql("UPDATE certificate_schedules SET staging_first = true")
        order = await at.again(domain, acme_staging_directory=staging)
        assert (order["state"], order["directory"], order["staging"]) == ("issued", staging, True)
        assert len(await at.chain(domain)) == 1
        schedule = await at.schedule(domain)
        assert schedule["next_at"] <= datetime.now(UTC) and not schedule["staging_first"]
        await at.issue(acme_staging_directory=staging)
        assert [(each["staging"], each["state"]) for each in await at.orders(domain)] == [
            (False, "issued"), (True, "issued"), (False, "issued"),
        ]  # fmt: skip
        assert (await at.events(domain)).count("renewal.succeeded") == 1

    async def test_another_ca_is_asked_when_the_first_cannot_be(self, at: Desk) -> None:
        other = at.ca.directory.replace("127.0.0.1", "localhost")
        settings: dict[str, Any] = {"acme_directory": "https://127.0.0.1:1/dir", "acme_fallback_directories": (other,)}
        once = dataclasses.replace(LIMITS, max_attempts=1)
        domain = await at.domain()
        await at.sweep(**settings)
        await at.run(limits=once, **settings)
        assert (await at.schedule(domain))["ca"] == 0
        order = await at.again(domain, limits=once, **settings)
        assert (order["state"], order["error_code"]) == ("failed", "ca_unreachable")
        schedule = await at.schedule(domain)
        assert schedule["ca"] == 1 and schedule["next_at"] < datetime.now(UTC) + timedelta(minutes=1)
        order = await at.again(domain, **settings)
        assert (order["state"], order["directory"]) == ("issued", other)
        assert (await at.schedule(domain))["ca"] == 0  # the first is preferred again

    async def test_an_order_that_took_its_workers_with_it_is_over(self, at: Desk) -> None:
        domain = await at.domain()
        await at.sweep()
        (order,) = await at.orders(domain)
        await at.sql("UPDATE certificate_orders SET queue_state = 'dead', attempts = 12")
        challenge = {
            "id": "chl_1", "order_id": order["id"], "type": "http-01", "host": domain["name"], "token": "t",
            "key_authorization": "a", "until": datetime.now(UTC) + timedelta(hours=1),
        }  # fmt: skip
        async with at.db.transaction() as tx:
            await acme_store.add_challenges(tx, [challenge])
            changes.append(tx, changes.challenge(acme_store.edge_row(challenge)))
        await answers(at, True)
        assert await at.sweep() == 0
        (order,) = await at.orders(domain)
        assert (order["state"], order["error_code"]) == ("failed", "abandoned")
        # It is told of, and relays answer its challenges no more.
        assert await at.events(domain) == ["issuance.failed"]
        assert not await rows(at.db, "SELECT 1 FROM acme_challenges")
        await answers(at, False)
        assert (await at.again(domain))["state"] == "issued"


class TestFairness:
    async def test_organizations_take_turns_and_few_orders_are_open(self, at: Desk) -> None:
        many = [await at.domain(organization=None) for _ in range(1)]
        organization = many[0]["organization_id"]
        many += [await at.domain(organization=organization) for _ in range(9)]
        other = await at.domain()
        await at.sweep(acme_open_orders=0)
        await at.sql(
            "UPDATE certificate_schedules SET next_at = now() - interval '1 hour' WHERE organization_id = $1",
            organization,
        )
        assert await at.sweep(acme_open_orders=2) == 2
        opened = await rows(at.db, "SELECT organization_id FROM certificate_orders")
        assert {row["organization_id"] for row in opened} == {organization, other["organization_id"]}
        # A fleet that starts again and again finds these two, and no more.
        assert [await at.sweep(acme_open_orders=2) for _ in range(3)] == [0, 0, 0]

    async def test_what_is_held_waits_for_somebody_to_ask(self, at: Desk) -> None:
        domain = await at.domain(cert_held_at=datetime.now(UTC))
        assert await at.sweep() == 0
        await at.sql("UPDATE certificate_schedules SET forced = true")
        assert await at.sweep() == 1
        await at.run()
        assert not (await at.schedule(domain))["forced"]
