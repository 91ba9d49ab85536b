"""Orders from end to end with the real Pebble: had once, whoever dies on the way; refused, tried again, and stopped in time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509

from portico.control.domains import acme_keys, acme_orders
from portico.control.domains.acme_client import Client
from portico.kit.db import Database
from portico.kit.envelope import EnvelopeInvalid
from portico.kit.queue import LeaseLost, Retry
from portico.relay.server import Relay
from portico.relay.snapshot import Change
from tests import pebble
from tests.control.domains.certificates import rows
from tests.control.domains.issuing import Desk, desk, mortality, work_until
from tests.relay.doubles import port


@pytest.mark.parametrize("kind", ["http-01", "tls-alpn-01"])
async def test_a_name_that_leads_here_gets_a_certificate(at: Desk, kind: str) -> None:
    domain = await at.domain()
    await at.issue(acme_challenges=(kind,))
    (order,) = await at.orders(domain)
    assert (order["state"], order["error_code"], order["challenge"]) == ("issued", None, kind)
    (version,) = await at.chain(domain)
    chain = x509.load_pem_x509_certificates(version["chain_pem"].encode())
    names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [domain["name"]] and len(chain) > 1
    assert await at.events(domain) == [
        "issuance.requested", "validation.started", "validation.succeeded", "issuance.succeeded",
    ]  # fmt: skip
    schedule = await at.schedule(domain)
    third = (version["not_after"] - version["not_before"]) / 3
    assert abs((version["not_after"] - schedule["next_at"]) - third) < third / 5
    assert schedule["fingerprint"] == version["fingerprint"] and schedule["certificate"]
    # Nothing is left of its key on the way, and relays answer nothing any more.
    assert (order["sealed_key"], order["wrapped_key"]) == (None, None)
    await at.idle()
    async with asyncio.timeout(30):
        while at.edge.relay.snapshot.challenges:
            await asyncio.sleep(0.02)
    assert await at.sweep() == 0


async def test_a_worker_may_die_at_any_point_and_there_is_one_order(at: Desk) -> None:
    """At each commit and at each call, before, within and after it: another worker goes on, and the CA saw one order."""
    with mortality():
        for _ in range(2):  # the first makes the account, too
            await at.domain()
            await at.sweep()
            undisturbed = await work_until(at.parts(), await at.claim(), 10_000)
        points = len(undisturbed.seen)
        assert points > 25 and {"before order-plz", "after order-plz"} < set(undisturbed.seen)
        before = at.ca.orders()
        domains = {point: await at.domain() for point in range(points)}
        assert await at.sweep() == points
        works = {work.row["domain_id"]: work for work in [await at.claim() for _ in range(points)]}
        parts = at.parts()
        died = await asyncio.gather(
            *(asyncio.create_task(work_until(parts, works[domains[point]["id"]], point)) for point in range(points))
        )
        assert [len(mortal.seen) for mortal in died] == list(range(1, points + 1))
    # The leases of some run out, as those of workers that are gone do, and each of these runs alone; others are given back.
    late = [domains[point]["id"] for point in range(0, points, points // 3)]
    await at.sql("UPDATE certificate_orders SET available_at = now() WHERE domain_id = ANY($1)", late)
    await at.sql(
        "UPDATE certificate_orders SET available_at = now(), lease_token = NULL WHERE domain_id <> ALL($1)", late
    )
    await at.run()
    for point, domain in domains.items():
        (order,) = await at.orders(domain)
        assert (order["state"], order["error_code"]) == ("issued", None), (undisturbed.seen[point], order["last_error"])
        assert len(await at.chain(domain)) == 1, undisturbed.seen[point]
        assert (await at.events(domain)).count("issuance.succeeded") == 1
    assert at.ca.orders() == before + points
    assert await at.sweep() == 0


async def test_two_workers_at_once_and_only_the_holder_of_the_lease_writes(at: Desk) -> None:
    domain = await at.domain()
    await at.sweep()
    late = await at.claim()
    await at.sql("UPDATE certificate_orders SET available_at = now()")
    current = await at.claim(suspect=True)
    results = await asyncio.gather(
        acme_orders.run(at.parts(), late), acme_orders.run(at.parts(), current), return_exceptions=True
    )
    assert isinstance(results[0], LeaseLost) and results[1] is None
    (order,) = await at.orders(domain)
    assert order["state"] == "issued" and len(await at.chain(domain)) == 1


async def test_a_name_that_is_lost_while_the_ca_is_asked_gets_nothing(
    at: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else proves the name between the last step and its commit: what went with the old hold does not come back."""
    domain, real = await at.domain(), Client.certificate
    await at.sweep()

    async def meanwhile(self: Client, url: str) -> str:
        await at.sql("UPDATE custom_domains SET hostname_status = 'deleted' WHERE id = $1", domain["id"])
        return await real(self, url)

    monkeypatch.setattr(Client, "certificate", meanwhile)
    await at.run()
    (order,) = await at.orders(domain)
    assert (order["state"], order["sealed_key"]) == ("canceled", None)
    assert not await at.chain(domain)
    assert not await rows(at.db, "SELECT 1 FROM certificate_heads WHERE domain_id = $1", domain["id"])
    assert "issuance.succeeded" not in await at.events(domain)


async def test_sweeps_at_once_make_one_order_of_a_name(at: Desk) -> None:
    domains = [await at.domain() for _ in range(20)]
    made = await asyncio.gather(*(at.sweep() for _ in range(6)))
    assert sum(made) == 20
    for domain in domains:
        assert len(await at.orders(domain)) == 1


async def test_the_key_on_its_way_opens_for_workers_alone(at: Desk) -> None:
    """What the row holds is no key, and another row's place does not open it."""
    await at.domain()
    await at.sweep()
    with mortality():
        work = await at.claim()
        undisturbed = await work_until(at.parts(), work, 10_000)
    columns = acme_keys.make(at.parts().keys, "ord_1", ["a.example.com"])
    assert b"PRIVATE" not in columns["sealed_key"]  # type: ignore[operator]
    row = SimpleNamespace(id="ord_1", name="a.example.com", **columns)
    assert b"BEGIN PRIVATE KEY" in acme_keys.take(at.parts().keys, row)
    for change in ({"id": "ord_2"}, {"name": "b.example.com"}):
        with pytest.raises(EnvelopeInvalid):
            acme_keys.take(at.parts().keys, SimpleNamespace(**{**vars(row), **change}))
    assert undisturbed.seen


async def test_valid_authorizations_are_not_proved_again(
    db: Database, edge_relay: Relay, folder: Path, tmp_path: Path
) -> None:
    always = {"PEBBLE_AUTHZREUSE": "100"}
    with pebble.running(tmp_path, port(edge_relay, 1), port(edge_relay, 2), environment=always) as ca:
        async with desk(db, ca, edge_relay, folder) as at:
            domain = await at.domain()
            await at.issue()
            await at.sql("UPDATE certificate_schedules SET next_at = now()")
            at.ca.say("clear-a", host=domain["name"])
            at.ca.say("add-a", host=domain["name"], addresses=["127.0.0.1"])
            await at.issue()
            first, second = await at.orders(domain)
            assert (first["state"], second["state"], second["proofs"]) == ("issued", "issued", [])
            events = await at.events(domain)
            assert events[4:] == ["renewal.started", "renewal.succeeded"] and len(await at.chain(domain)) == 2


class TestRefused:
    async def test_a_name_that_leads_elsewhere_spends_nothing(self, at: Desk) -> None:
        domain = await at.domain()
        with contextlib.closing(await asyncio.start_server(_nobody, "127.0.0.3", at.control.acme_http_port)):
            at.ca.say("add-a", host=domain["name"], addresses=["127.0.0.1", "127.0.0.3"])
            before = at.ca.orders()
            await at.issue(acme_challenges=("http-01",))
        (order,) = await at.orders(domain)
        assert (order["state"], order["error_code"]) == ("failed", "not_reached") and "127.0.0.3" in order[
            "error_detail"
        ]
        assert at.ca.orders() == before and await rows(at.db, "SELECT * FROM acme_budget") == []
        assert await at.events(domain) == ["validation.failed"]
        schedule = await at.schedule(domain)
        assert schedule["failures"] == 1 and schedule["next_at"] > order["created_at"]
        assert await at.sweep() == 0

    async def test_a_look_that_fails_once_costs_no_order(self, at: Desk) -> None:
        domain = await at.domain()
        asked: list[str] = []

        async def at_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append("once")
            at.ca.say("clear-a", host=domain["name"])
            at.ca.say("add-a", host=domain["name"], addresses=["127.0.0.1"])
            await _nobody(reader, writer)

        with contextlib.closing(await asyncio.start_server(at_first, "127.0.0.3", at.control.acme_http_port)):
            at.ca.say("add-a", host=domain["name"], addresses=["127.0.0.3"])
            await at.issue(acme_challenges=("http-01",))
        assert [order["state"] for order in await at.orders(domain)] == ["issued"] and asked

    async def test_a_name_that_does_not_lead_here_yet_is_not_ordered_in_vain(self, at: Desk) -> None:
        """Only DNS-01 could prove it: where the name delegates, or its zone is written here."""
        await at.domain(hostname_status="verified")
        assert await at.sweep() == 0
        assert await at.sweep(acme_dns="exec", acme_challenges=("http-01", "tls-alpn-01")) == 0
        assert await at.sweep(acme_dns="exec", acme_dns_zones=("xample.com",)) == 0
        assert await at.sweep(acme_dns="exec", acme_dns_zones=("Example.com.",)) == 1
        await at.domain(hostname_status="verified", dns_findings='{"delegation": {"state": "missing"}}')
        assert await at.sweep(acme_dns="exec") == 0
        await at.sql("""UPDATE custom_domains SET dns_findings = '{"delegation": {"state": "ok"}}'""")
        assert await at.sweep(acme_dns="exec") == 1

    async def test_an_address_that_nobody_but_us_can_reach_is_not_called(self, at: Desk) -> None:
        domain = await at.domain()
        at.ca.say("add-a", host=domain["name"], addresses=["10.255.255.1", "127.0.0.1"])
        await at.issue()
        (order,) = await at.orders(domain)
        assert (order["state"], order["error_code"]) == ("failed", "no_address")

    async def test_caa_records_are_asked_first(self, at: Desk) -> None:
        domain, allowed = await at.domain(), await at.domain()
        at.ca.say("add-caa", host=domain["name"], policies=[{"tag": "issue", "value": "other.example"}])
        at.ca.say("add-caa", host=allowed["name"], policies=[{"tag": "issue", "value": "pebble.letsencrypt.org"}])
        await at.issue()
        (order,) = await at.orders(domain)
        assert (order["state"], order["error_code"]) == ("failed", "caa_forbids")
        assert (await at.orders(allowed))[0]["state"] == "issued"

    async def test_a_relay_that_has_not_heard_holds_the_order_back(self, at: Desk) -> None:
        """The CA is told to look only when every healthy relay has the challenge."""
        domain = await at.domain()
        await at.sql(
            "INSERT INTO relays (name, key_id, region, connect_url, public_url, version, load, draining, seen_at)"
            " VALUES ('asleep', 'key', 'us', 'ws://x', 'http://x', 0, '{}', false, now() + interval '1 hour')"
        )
        await at.sweep()
        work = await at.claim()
        with pytest.raises(Retry, match="asleep"):
            await acme_orders.run(at.parts(dataclasses.replace(at.control, acme_relays_seconds=0.3)), work)
        (order,) = await at.orders(domain)
        assert (order["state"], order["asked"]) == ("probing", 0)
        await at.sql("UPDATE relays SET draining = true WHERE name = 'asleep'")
        await at.sql("UPDATE certificate_orders SET available_at = now()")
        await at.run()
        assert (await at.orders(domain))[0]["state"] == "issued"

    async def test_a_name_that_is_not_wanted_any_more_is_let_go(self, at: Desk) -> None:
        domain, gone = await at.domain(), await at.domain()
        await at.sweep()
        await at.sql("UPDATE custom_domains SET hostname_status = 'moved' WHERE id = $1", domain["id"])
        await at.sql("DELETE FROM custom_domains WHERE id = $1", gone["id"])
        await at.run()
        assert [order["state"] for order in await at.orders(domain)] == ["canceled"] and await at.orders(gone) == []
        assert await at.sweep() == 0
        await at.sql("UPDATE custom_domains SET hostname_status = 'active' WHERE id = $1", domain["id"])
        assert await at.sweep() == 1

    async def test_what_the_ca_does_not_issue_for_waits_and_is_asked_elsewhere(self, at: Desk) -> None:
        domain = await at.domain("blocked-domain.example")
        await at.issue()
        (order,) = await at.orders(domain)
        assert (order["state"], order["error_code"]) == ("failed", "rejected_identifier")
        assert await at.events(domain) == ["issuance.denied"]
        assert (await at.schedule(domain))["error_code"] == "rejected_identifier"


async def _nobody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(100)
    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    writer.close()


class TestBudget:
    async def test_an_empty_bucket_delays_and_the_ca_hears_nothing(self, at: Desk) -> None:
        domain, other = await at.domain(), await at.domain()
        before = at.ca.orders()
        await at.issue(acme_budget_orders=1)
        orders = [(await at.orders(each))[0] for each in (domain, other)]
        assert sorted(order["state"] for order in orders) == ["failed", "issued"]
        assert at.ca.orders() == before + 1
        late = next(order for order in orders if order["state"] == "failed")
        assert late["error_code"] == "budget_spent"
        (schedule,) = await rows(
            at.db,
            "SELECT *, next_at - now() AS wait FROM certificate_schedules WHERE domain_id = $1",
            late["domain_id"],
        )
        assert 10_000 < schedule["wait"].total_seconds() < 12_500 and schedule["failures"] == 0

    async def test_failed_validations_stop_before_the_cas_limit(self, at: Desk) -> None:
        """A name whose validation fails is tried as often as the budget has failures, and no more."""
        domain = await at.domain()
        at.ca.say("add-caa", host=domain["name"], policies=[{"tag": "issue", "value": "pebble.letsencrypt.org"}])
        before = at.ca.orders()
        for _ in range(5):
            await at.sql("UPDATE certificate_schedules SET next_at = now()")
            await at.sweep()
            work = await at.claim()
            await _answer_wrongly(at, work)
        failed = [order for order in await at.orders(domain) if order["error_code"] == "unauthorized"]
        assert len(failed) == 2 and at.ca.orders() == before + 2
        last = (await at.orders(domain))[-1]
        assert last["error_code"] == "budget_spent"


async def _answer_wrongly(at: Desk, work: Any) -> None:
    """Relays answer the CA with something else than what it asked for: their answer is exchanged once they have it."""
    control = dataclasses.replace(at.control, acme_budget_failures=2, acme_challenges=("http-01",))
    parts = at.parts(control)
    running = asyncio.create_task(acme_orders.run(parts, work))
    while not running.done():
        async with at.db.read() as reader:
            state = await reader.raw.fetchval("SELECT state FROM certificate_orders WHERE id = $1", work.id)
        if state in ("publishing", "validating"):
            held = at.edge.relay.snapshot.challenges
            for key, row in list(held.items()):
                held[key] = dataclasses.replace(row, authorization="wrong")
            at.edge.relay.public.challenges._changed(Change("challenge", "x"))
        await asyncio.sleep(0)
    await running
