"""Incidents over their whole life, driven by events and an injected clock."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.access import Caller
from portico.control.audit.store import audit_events
from portico.control.domains import incident_store, lifecycle
from portico.control.domains import store as domain_store
from portico.control.domains.incidents import RUNBOOK, Condition, Incidents
from portico.control.domains.lifecycle import NewEvent
from portico.control.domains.runbooks import RunbookDriver, check
from portico.control.notifications.channels import Wanted
from portico.errors import Problem
from portico.kit import outbox, queue, signing
from portico.kit.outbound import Answer, OutboundError
from portico.kit.queue import Limits
from portico.settings import ApiSettings, Secret
from tests.control.conftest import Account, MovableClock
from tests.control.domains.sending import Sender, apply_all, domain, hold, make_source, operator_client

_names = (f"in{n}.example.com" for n in itertools.count(1))
DAY = 86_400.0
SECRET = signing.new_secret()


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    return replace(settings, cert_runbook_url="https://ops.example.com/run", cert_runbook_secret=Secret(SECRET))


@pytest.fixture
async def operator(app: Any, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    return await operator_client(app, connect)


class Case:
    """A domain of the owner, whose certificate things happen to."""

    def __init__(self, app: Any, clock: MovableClock, owner: Account) -> None:
        self.app, self.clock, self.owner = app, clock, owner
        self.incidents: Incidents = app.state.cert_incidents
        self.domain = ""
        self.sequence = 0

    async def happens(self, pair: str, revision: int = 1, **more: Any) -> str:
        name, _, action = pair.partition(".")
        self.sequence += 1
        more.setdefault("object", f"object-{self.sequence}")
        event = NewEvent(
            self.domain, name, action, revision, sequence=self.sequence, occurred_at=self.clock.wall(), **more
        )
        async with self.app.state.db.transaction() as tx:
            made = await lifecycle.record(tx, event)
        await self.apply()
        return made

    async def apply(self) -> None:
        await apply_all(self.app.state.db, self.incidents.follow, self.clock.wall())

    async def live(self, revision: int = 1, days: float = 90) -> None:
        now = self.clock.wall()
        facts = {"serial": f"{revision:02x}", "not_before": now, "not_after": now + timedelta(days=days)}
        await self.happens("deployment.succeeded", revision, **facts)

    async def watch(self) -> None:
        await self.incidents.watch(self.app.state.db)
        await self.apply()

    async def all(self) -> list[Any]:
        async with self.app.state.db.read() as reader:
            rows = await incident_store.listing(reader, {"domain": self.domain}, 50, None)
        return list(rows)[::-1]

    async def seen(self) -> list[tuple[str, str, int]]:
        return [(row.incident_class, row.status, row.tier) for row in await self.all()]

    async def told(self) -> list[str]:
        """What the operator's automation was told of this domain's incidents, in order."""
        ids = [row.id for row in await self.all()]
        async with self.app.state.db.read() as reader:
            rows = await reader.fetch_all(
                sa.select(outbox.messages).where(outbox.messages.c.driver == RUNBOOK).order_by(outbox.messages.c.id)
            )
        return [row.topic.rpartition(".")[2] for row in rows if row.idempotency_key.split(":")[1] in ids]


@pytest.fixture
async def case(app: Any, clock: MovableClock, owner: Account) -> Case:
    made = Case(app, clock, owner)
    await apply_all(app.state.db)
    made.domain = await hold(app.state.db, owner.organization, next(_names))
    return made


@pytest.mark.parametrize(
    ("columns", "cause"),
    [({"hostname_status": "blocked"}, "domain.blocked"), ({"frozen": "custom_domains"}, "domain.frozen")],
)
async def test_nobody_is_woken_by_the_age_of_what_serves_nobody(
    case: Case, columns: dict[str, str], cause: str
) -> None:
    """What is open about its age ends, and says why; it is back, worse by then, with the name. Other trouble stays."""
    await case.live()
    case.clock.advance(70 * DAY)
    await case.happens("renewal.failed", 2, error_code="dns")
    await case.happens("revocation.requested", 1)
    await case.watch()
    assert {row[:2] for row in await case.seen()} == {("renewal", "open"), ("expiry", "open"), ("revocation", "open")}

    async def put(**values: str | None) -> None:
        async with case.app.state.db.transaction() as tx:
            await domain_store.update(tx, case.domain, **values)
        await case.watch()

    await put(**columns)
    assert {row[:2] for row in await case.seen()} == {
        ("renewal", "resolved"), ("expiry", "resolved"), ("revocation", "open"),
    }  # fmt: skip
    assert {row.resolved_by for row in await case.all() if row.status == "resolved"} == {cause}
    case.clock.advance(19 * DAY + 3600)
    await case.watch()
    assert ("expiry", "open") not in {row[:2] for row in await case.seen()}
    await put(hostname_status="active", frozen=None)
    assert ("expiry", "open", 1) in await case.seen()


async def test_the_whole_life(case: Case, operator: httpx.AsyncClient) -> None:
    """Opened by a failure, worse by the clock though acknowledged, over by a later success, back within a day, new after it."""
    await case.live()
    assert await case.seen() == []
    case.clock.advance(61 * DAY)
    await case.happens("renewal.failed", 2, error_code="dns", error_detail="no record")
    assert await case.seen() == [("renewal", "open", 3)]
    (first,) = await case.all()
    assert {name: each["code"] for name, each in first.conditions.items()}["state"] == "dns"
    path = f"/v1/admin/cert-incidents/{first.id}"
    acked = await operator.post(f"{path}/ack", json={"note": "looking at the DNS"})
    assert (acked.status_code, acked.json()["status"]) == (200, "acknowledged")
    assert acked.json()["notes"][0]["text"] == "looking at the DNS"

    case.clock.advance(20 * DAY)  # 9 of 90 days left: under a quarter
    await case.watch()
    assert ("renewal", "acknowledged", 2) in await case.seen(), "late by more than a tenth of its life"
    case.clock.advance(6 * DAY)
    await case.watch()
    seen = {(name, status): tier for name, status, tier in await case.seen()}
    assert seen["renewal", "acknowledged"] == 1, "worse, acknowledged or not"
    assert seen["expiry", "open"] == 1
    assert (await case.told()).count("escalated") >= 2

    await case.live(2)
    assert {status for _, status, _ in await case.seen()} == {"resolved"}
    async with case.app.state.db.read() as reader:
        over: Any = await incident_store.one(reader, first.id)
    assert (over.by_hand, over.resolved_by.startswith("cev_")) == (False, True)
    assert "resolved" in await case.told()

    case.clock.advance(3600)
    await case.happens("renewal.failed", 3)
    again = [row for row in await case.all() if row.incident_class == "renewal"]
    assert [(row.id, row.status, row.reopened, row.acknowledged_by) for row in again] == [(first.id, "open", 1, None)]
    await case.live(3)
    case.clock.advance(25 * 3600)
    await case.happens("renewal.failed", 4)
    later = [row for row in await case.all() if row.incident_class == "renewal"]
    assert [(row.id == first.id, row.status) for row in later] == [(True, "resolved"), (False, "open")]


async def test_one_of_a_class_however_many_failures(case: Case) -> None:
    for _ in range(5):
        await case.happens("issuance.failed", error_code="dns")
    assert await case.seen() == [("issuance", "open", 2)]
    await asyncio.gather(*(case.happens("deployment.failed") for _ in range(4)))
    assert sorted(await case.seen()) == [("deployment", "open", 2), ("issuance", "open", 2)]
    assert await case.told() == ["opened", "opened"]


async def test_only_a_later_success_ends_it(case: Case) -> None:
    early = NewEvent(case.domain, "issuance", "succeeded", 1, sequence=1)
    case.sequence = 5
    await case.happens("issuance.failed", 1, error_code="dns")
    async with case.app.state.db.transaction() as tx:
        await lifecycle.record(tx, early)
    await case.apply()
    assert await case.seen() == [("issuance", "open", 2)], "a success of before the failure, that came late"
    await case.happens("issuance.succeeded")
    assert await case.seen() == [("issuance", "resolved", 2)]
    stale = NewEvent(case.domain, "issuance", "failed", 1, sequence=2)
    async with case.app.state.db.transaction() as tx:
        await lifecycle.record(tx, stale)
    await case.apply()
    assert await case.seen() == [("issuance", "resolved", 2)], "a failure of before the success opens nothing"


async def test_by_hand(case: Case, operator: httpx.AsyncClient) -> None:
    """What a person has dealt with does not come back by itself; what is new or worse does."""
    await case.happens("issuance.rate_limited", retry_at=case.clock.wall() + timedelta(hours=1))
    (row,) = await case.all()
    assert (row.tier, row.status) == (3, "open")
    path = f"/v1/admin/cert-incidents/{row.id}"
    assert (await operator.post(f"{path}/resolve", json={"note": "we know; it ends in an hour"})).status_code == 200
    twice = await operator.post(f"{path}/resolve", json={"note": "again"})
    assert (twice.status_code, twice.json()["code"]) == (409, "cert.incident_resolved")
    await case.watch()
    await case.happens("validation.failed")
    assert await case.seen() == [("issuance", "resolved", 3)]
    case.clock.advance(3601)
    await case.happens("validation.failed")
    assert await case.seen() == [("issuance", "open", 2)], "the time is over, and it is worse"
    assert (await operator.post(f"{path}/notes", json={"note": "now what"})).status_code == 201
    shown = (await operator.get(path)).json()
    assert [note["text"] for note in shown["notes"]] == ["we know; it ends in an hour", "now what"]
    assert shown["reopened"] == 1
    none = await operator.get("/v1/admin/cert-incidents/cin_none")
    assert (none.status_code, none.json()["code"]) == (404, "cert.incident_not_found")
    assert (await operator.post("/v1/admin/cert-incidents/cin_none/ack", json={})).status_code == 404
    listed = await operator.get("/v1/admin/cert-incidents", params={"status": "open", "tier": 2, "domain": case.domain})
    assert [each["id"] for each in listed.json()["data"]] == [row.id]
    async with case.app.state.db.read() as reader:
        acts = await reader.fetch_all(
            sa.select(audit_events.c.action).where(audit_events.c.target == row.id, audit_events.c.outcome == "success")
        )
    assert sorted(each.action for each in acts) == ["cert_incident.note", "cert_incident.resolve"]


async def test_cool_down(case: Case) -> None:
    """What comes and goes is told once; what stays is told when the time is over."""
    for _ in range(3):
        await case.happens("issuance.failed")
        await case.happens("issuance.succeeded")
    assert await case.told() == ["opened", "resolved"]
    await case.happens("issuance.failed")
    assert await case.told() == ["opened", "resolved"]
    case.clock.advance(case.app.state.settings.cert_incident_cooldown_seconds + 1)
    await case.watch()
    assert await case.told() == ["opened", "resolved", "opened"]
    await case.watch()
    assert await case.told() == ["opened", "resolved", "opened"]


async def test_who_hears_of_it(case: Case, stranger: Account) -> None:
    channels = case.app.state.channels
    for account in (case.owner, stranger):
        wanted = Wanted(None, "webhook", "hooks", "https://hooks.example.com/", ["certificate_incident.opened"], True)
        async with case.app.state.db.transaction() as tx:
            await channels._create(tx, Caller("person", account.user, account.organization), wanted)
    await case.happens("issuance.failed", error_code="dns", error_detail="no record")
    async with case.app.state.db.read() as reader:
        rows = await reader.fetch_all(sa.select(outbox.messages).where(outbox.messages.c.driver == "webhook"))
    (row,) = [each for each in rows if each.organization_id in (case.owner.organization, stranger.organization)]
    assert row.organization_id == case.owner.organization
    body = json.loads(json.loads(case.app.state.sealer.open("outbox message", row.id, row.sealed_body))["payload"])
    assert (body["type"], body["data"]["class"], body["data"]["code"]) == (
        "certificate_incident.opened",
        "issuance",
        "dns",
    )
    seen = (await case.owner.client.get(f"/v1/domains/{case.domain}/incidents")).json()["data"]
    assert [each["incident_class"] for each in seen] == ["issuance"]
    assert (await stranger.client.get(f"/v1/domains/{case.domain}/incidents")).status_code == 404


async def test_late_renewals(case: Case) -> None:
    await case.live()
    case.clock.advance(64 * DAY)  # due after 60 days; a warning 4.5 days later
    await case.watch()
    assert await case.seen() == []
    case.clock.advance(1 * DAY)
    await case.watch()
    assert await case.seen() == [("renewal", "open", 3)]
    case.clock.advance(4.5 * DAY)
    await case.watch()
    await case.watch()
    assert ("renewal", "open", 2) in await case.seen()
    (row,) = [each for each in await case.all() if each.incident_class == "renewal"]
    assert row.conditions["sla"]["code"] == "sla_breach"
    await case.live(2)
    assert {status for _, status, _ in await case.seen()} == {"resolved"}


async def test_the_end_of_a_certificate_is_said_once(case: Case) -> None:
    await case.live(days=6.6)
    case.clock.advance(7 * DAY)
    for _ in range(3):
        await case.watch()
    row = await domain(case.app.state.db, case.domain)
    assert row.cert_status == "expired"
    assert ("expiry", "open", 1) in await case.seen()
    async with case.app.state.db.read() as reader:
        told = await lifecycle.of_domain(reader, case.domain, 50, None)
    assert [each.event_type for each in told] == ["cert.expired", "cert.deployed"]
    await case.live(2)
    assert (await domain(case.app.state.db, case.domain)).cert_status == "active"
    assert {status for _, status, _ in await case.seen()} == {"resolved"}


async def test_a_name_that_was_lost_alarms_nobody(case: Case) -> None:
    """What was wrong with it is over, and that its certificate ends is nothing to wake anybody for."""
    await case.live(days=90)
    await case.happens("renewal.failed", 2, error_code="dns")
    assert await case.seen() == [("renewal", "open", 3)]
    async with case.app.state.db.transaction() as tx:
        await tx.raw.execute("UPDATE custom_domains SET hostname_status = 'deleted' WHERE id = $1", case.domain)
    case.clock.advance(91 * DAY)
    await case.watch()
    await case.watch()
    assert await case.seen() == [("renewal", "resolved", 3)]
    assert (await domain(case.app.state.db, case.domain)).cert_status == "active", "nobody said that it ended"


async def test_conditions_of_others(case: Case) -> None:
    """What the probe sees is its own: events neither end it nor make another incident of it."""

    async def probe(condition: Condition | None) -> None:
        async with case.app.state.db.transaction() as tx:
            row = await incident_domain(tx)
            await case.incidents.settle(tx, row, "integrity", "probe", condition, "probe")

    async def incident_domain(tx: Any) -> Any:
        from portico.control.domains import store

        return await store.find(tx, case.domain, lock=True)

    wrong = Condition(2, "chain_invalid", "eu: the chain ends nowhere", "eu/1")
    await asyncio.gather(*(probe(wrong) for _ in range(4)))
    await case.live()
    assert await case.seen() == [("integrity", "open", 2)]
    await case.happens("integrity.key_mismatch")
    assert await case.seen() == [("integrity", "open", 1)]
    await probe(None)
    assert await case.seen() == [("integrity", "open", 1)], "events still say so"
    await case.live(2)
    assert await case.seen() == [("integrity", "resolved", 1)]


async def test_a_private_key_that_was_sent(
    case: Case, operator: httpx.AsyncClient, client: httpx.AsyncClient, clock: MovableClock
) -> None:
    sender: Sender = await make_source(operator, client, clock)
    name = (await domain(case.app.state.db, case.domain)).name
    text = "-----BEGIN PRIVATE KEY-----"
    body = sender.body("issuance.failed", name, error={"code": "x", "detail": text})
    assert (await sender.send(body)).json()["code"] == "cert.key_material"
    assert await case.seen() == [("integrity", "open", 1)]
    (row,) = await case.all()
    assert text not in str(row) and row.conditions["key_material"]["code"] == "key_material"
    await case.happens("deployment.succeeded", 1)
    assert await case.seen() == [("integrity", "resolved", 1)]


async def test_runbooks_are_signed(case: Case, settings: ApiSettings) -> None:
    await case.happens("issuance.failed", error_code="dns")
    asked: list[tuple[str, dict[str, str], bytes]] = []

    class Ops:
        async def post(self, url: str, headers: dict[str, str], body: bytes) -> Answer:
            asked.append((url, headers, body))
            if len(asked) == 1:
                raise OutboundError("connect", "no connection")
            return Answer(204)

    driver = RunbookDriver(settings, case.clock, Ops())  # type: ignore[arg-type]
    kind = outbox.kind(RUNBOOK)
    mine = {row.id for row in await case.all()}
    found, _ = await queue.claim(case.app.state.db, kind, Limits(), 100)
    for work in found:
        with pytest.raises(queue.Retry) if not asked else _nothing():
            await outbox.deliver(work, driver, case.app.state.sealer)
    url, headers, body = asked[-1]
    assert url == "https://ops.example.com/run"
    signing.verify([SECRET], headers, body, case.clock.wall().timestamp())
    documents = [json.loads(each) for _, _, each in asked]
    ours = [each for each in documents if each["data"]["incident"] in mine]
    assert [each["runbook"] for each in ours] == ["docs/runbooks/certificate-issuance.md"]
    for wrong in ({"cert_runbook_secret": None}, {"cert_runbook_url": "nonsense"}):
        with pytest.raises(Problem):
            check(replace(settings, **wrong))  # type: ignore[arg-type]


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *given: object) -> None: ...


def test_every_class_has_a_runbook() -> None:
    from pathlib import Path

    folder = Path(__file__).parents[3] / "docs" / "runbooks"
    for name in incident_store.CLASSES:
        assert (folder / f"certificate-{name}.md").is_file(), name
