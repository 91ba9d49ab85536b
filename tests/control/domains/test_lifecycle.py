"""Events on their way into the state of domains: whose they are, in any order, by any number of workers, and again."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.audit.store import audit_events
from portico.control.domains import event_store, lifecycle, replay, service
from portico.control.domains.lifecycle import NewEvent
from portico.kit import queue
from portico.kit.queue import LeaseLost, Limits
from portico.settings import Secret, WorkerSettings
from tests.control.conftest import Account, MovableClock
from tests.control.domains.sending import Sender, apply_all, domain, hold, make_source, operator_client

_names = (f"host{n}.example.com" for n in itertools.count(1))
DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
async def clean(app: Any) -> None:
    """Nothing waits, and nothing is dead: tests share a database."""
    await apply_all(app.state.db)
    async with app.state.db.transaction() as tx:
        await tx.raw.execute("UPDATE certificate_lifecycle_events SET queue_state = 'done' WHERE queue_state = 'dead'")


@pytest.fixture
async def operator(app: Any, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    return await operator_client(app, connect)


@pytest.fixture
async def sender(operator: httpx.AsyncClient, client: httpx.AsyncClient, clock: MovableClock) -> Sender:
    return await make_source(operator, client, clock)


async def record(app: Any, *events: NewEvent) -> list[str]:
    async with app.state.db.transaction() as tx:
        return [await lifecycle.record(tx, event) for event in events]


async def state(app: Any, event: str) -> str:
    async with app.state.db.read() as reader:
        return str((await event_store.one(reader, event)).status)  # type: ignore[union-attr]


async def kill(app: Any, *events: str) -> None:
    """As after the last attempt."""
    async with app.state.db.transaction() as tx:
        await tx.raw.execute(
            "UPDATE certificate_lifecycle_events SET queue_state = 'dead', finished_at = now(), last_error = 'x'"
            " WHERE id = ANY($1)",
            list(events),
        )


async def test_what_we_do_ourselves(app: Any, owner: Account) -> None:
    held = await hold(app.state.db, owner.organization, name := next(_names))
    now = datetime.now(UTC)
    live = NewEvent(
        held, "deployment", "succeeded", 1, serial="0a", not_before=now, not_after=now + 90 * DAY, regions_active=2,
        regions_total=2,
    )  # fmt: skip
    steps = ("validation", "started"), ("validation", "succeeded"), ("issuance", "succeeded")
    await record(app, *(NewEvent(held, *step, 1) for step in steps), live)
    assert await apply_all(app.state.db) == 4
    row = await domain(app.state.db, held)
    assert (row.cert_status, row.cert_serial, row.cert_source) == ("active", "0a", "platform")
    assert (row.cert_not_after, row.cert_regions_active) == (now + 90 * DAY, 2)
    shown = (await owner.client.get(f"/v1/domains/{held}/events")).json()["data"]
    assert [each["type"] for each in shown] == ["cert.deployed", "cert.issued", "cert.validated", "cert.validating"]
    assert [each["sequence"] for each in shown] == sorted((each["sequence"] for each in shown), reverse=True)
    assert {each["hostname"] for each in shown} == {name}


async def test_one_key_is_one_event(app: Any, owner: Account) -> None:
    held = await hold(app.state.db, owner.organization, next(_names))
    event = NewEvent(held, "validation", "failed", 1, key="order-1/failed", object="order-1", error_code="dns")
    first, again = await record(app, event, event)
    assert first == again == (await record(app, event))[0]
    for wrong in (NewEvent(held, "validation", "exploded", 1), NewEvent("dom_none", "validation", "failed", 1)):
        with pytest.raises(ValueError, match=r"not in the table|no domain"):
            await record(app, wrong)


async def test_an_event_that_was_rolled_back_is_none(app: Any, owner: Account) -> None:
    held = await hold(app.state.db, owner.organization, next(_names))
    with pytest.raises(ZeroDivisionError):
        async with app.state.db.transaction() as tx:
            await lifecycle.record(tx, NewEvent(held, "validation", "started", 1))
            raise ZeroDivisionError
    assert await apply_all(app.state.db) == 0


async def test_whose_an_event_is(app: Any, sender: Sender, owner: Account, stranger: Account) -> None:
    """The domain that holds the name, a wildcard where there is none; nobody's claim, and no domain of another name."""
    name = next(_names)
    claimed = await hold(app.state.db, stranger.organization, name, hostname_status="pending")
    event = await sender.tell("validation.failed", name)
    await apply_all(app.state.db)
    assert await state(app, event) == "unmatched"
    held = await hold(app.state.db, owner.organization, name)
    wild = await hold(app.state.db, owner.organization, f"*.{name}")
    other = await hold(app.state.db, owner.organization, next(_names))
    told = {
        await sender.tell("validation.failed", name): (held, "applied"),
        await sender.tell("validation.failed", f"www.{name}"): (wild, "applied"),
        await sender.tell("validation.failed", f"a.b.{name}"): (None, "unmatched"),
        await sender.tell("validation.failed", name, subject={"hostname": name, "domainId": other}): (
            None,
            "unmatched",
        ),
        await sender.tell("validation.failed", name, subject={"hostname": name, "domainId": claimed}): (
            None,
            "unmatched",
        ),
        await sender.tell("validation.failed", name, subject={"hostname": name, "domainId": held}): (held, "applied"),
    }
    await apply_all(app.state.db)
    for event, (of, status) in told.items():
        async with app.state.db.read() as reader:
            row: Any = await event_store.one(reader, event)
        assert (row.status, row.domain_id if status == "applied" else None) == (status, of)
    assert [(await domain(app.state.db, each)).cert_failures for each in (held, wild, claimed, other)] == [2, 1, 0, 0]
    assert (await stranger.client.get(f"/v1/domains/{held}/events")).status_code == 404


async def test_an_event_about_another_name_is_nobody_elses_to_see(
    app: Any, sender: Sender, owner: Account, stranger: Account
) -> None:
    """A sender may name a domain that is not the name's: neither before nor after it is looked at does its owner hear of it."""
    name, others = next(_names), next(_names)
    await hold(app.state.db, owner.organization, name)
    other = await hold(app.state.db, stranger.organization, others)
    wrong = {"hostname": name, "domainId": other}
    await sender.tell("issuance.failed", name, subject=wrong, error={"code": "x", "detail": "of the owner's alone"})
    right = await sender.tell("issuance.failed", others, subject={"hostname": others, "domainId": other})

    async def seen() -> list[str]:
        return [each["id"] for each in (await stranger.client.get(f"/v1/domains/{other}/events")).json()["data"]]

    assert await seen() == []
    await apply_all(app.state.db)
    assert await seen() == [right]


async def test_order_of_arrival_is_nothing(app: Any, sender: Sender, owner: Account) -> None:
    held = await hold(app.state.db, owner.organization, name := next(_names))
    facts = {"serial": "0b", "notBefore": "2026-01-01T00:00:00Z", "notAfter": "2099-01-01T00:00:00Z"}
    later = {"producer": "t", "objectUid": "u", "revision": 2}
    first = await sender.tell("renewal.failed", name, provenance=later, error={"code": "dns", "retryAfter": 60})
    assert await apply_all(app.state.db) == 1
    assert (await domain(app.state.db, held)).cert_status == "pending_issuance"
    second = await sender.tell("deployment.succeeded", name, certificate=facts)
    old = await sender.tell("validation.started", name, sequence=0)
    older = await sender.tell("validation.started", name, provenance={"producer": "t", "objectUid": "u", "revision": 0})
    await apply_all(app.state.db)
    row = await domain(app.state.db, held)
    assert (row.cert_status, row.cert_serial, row.cert_error_code, row.cert_failures) == ("active", "0b", "dns", 1)
    assert row.cert_retry_at is not None
    assert [await state(app, each) for each in (first, second, old)] == ["applied"] * 3
    assert await state(app, older) == "superseded"


async def test_many_workers_at_one_domain(app: Any, sender: Sender, owner: Account) -> None:
    """Two of them reading the same registers would lose one event."""
    held = await hold(app.state.db, owner.organization, name := next(_names))
    await asyncio.gather(*(sender.tell("validation.failed", name, error={"code": "dns"}) for _ in range(30)))
    assert sum(await asyncio.gather(*(apply_all(app.state.db) for _ in range(4)))) == 30
    assert (await domain(app.state.db, held)).cert_failures == 30


async def test_a_worker_that_lost_its_lease_changes_nothing(app: Any, sender: Sender, owner: Account) -> None:
    held = await hold(app.state.db, owner.organization, name := next(_names))
    await sender.tell("validation.failed", name, error={"code": "dns"})
    (work,), _ = await queue.claim(app.state.db, lifecycle.KIND, Limits(lease_seconds=0), 1)
    (other,), _ = await queue.claim(app.state.db, lifecycle.KIND, Limits(), 1, suspect=True)
    with pytest.raises(LeaseLost):
        await lifecycle.apply(work, datetime.now(UTC))
    assert (await domain(app.state.db, held)).cert_failures == 0
    await lifecycle.apply(other, datetime.now(UTC))
    assert (await domain(app.state.db, held)).cert_failures == 1


async def test_an_error_in_what_follows_undoes_all(app: Any, sender: Sender, owner: Account) -> None:
    held = await hold(app.state.db, owner.organization, name := next(_names))
    event = await sender.tell("validation.failed", name, error={"code": "dns"})

    async def fails(*given: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await apply_all(app.state.db, fails)
    assert ((await domain(app.state.db, held)).cert_applied, await state(app, event)) == ({}, "queued")


# -- again


async def test_replay_of_one(app: Any, sender: Sender, owner: Account, operator: httpx.AsyncClient) -> None:
    event = await sender.tell("validation.failed", name := next(_names))
    path = f"/v1/admin/cert-events/{event}"
    pending = await operator.post(f"{path}/replay", json={"reason": "now"})
    assert (pending.status_code, pending.json()["code"]) == (409, "cert.event_pending")
    await apply_all(app.state.db)
    assert (await operator.get(path)).json()["state"] == "unmatched"
    held = await hold(app.state.db, owner.organization, name)
    answer = await operator.post(f"{path}/replay", json={"reason": "the domain is here now"})
    assert (answer.status_code, answer.json()["events"]) == (200, [event])
    await apply_all(app.state.db)
    shown = (await operator.get(path)).json()
    assert (shown["state"], shown["domain"], shown["replays"]) == ("applied", held, 1)
    before = await domain(app.state.db, held)
    assert (await operator.post(f"{path}/replay", json={"reason": "again"})).status_code == 200
    await apply_all(app.state.db)
    after = await domain(app.state.db, held)
    assert (after.cert_applied, after.cert_failures) == (before.cert_applied, before.cert_failures), "harmless"
    async with app.state.db.read() as reader:
        rows = await reader.fetch_all(
            sa.select(audit_events).where(audit_events.c.target == event, audit_events.c.outcome == "success")
        )
    assert sorted(row.details["reason"] for row in rows) == ["again", "the domain is here now"]
    none = await operator.post("/v1/admin/cert-events/cev_none/replay", json={"reason": "x"})
    assert (none.status_code, none.json()["code"]) == (404, "cert.event_not_found")
    assert (await operator.get("/v1/admin/cert-events/cev_none")).status_code == 404
    assert (await operator.post(f"{path}/replay", json={})).status_code == 422, "a reason is needed"


async def test_replay_by_filter(app: Any, sender: Sender, operator: httpx.AsyncClient) -> None:
    events = [await sender.tell("validation.failed", next(_names)) for _ in range(5)]
    live = await sender.tell("validation.failed", next(_names))
    await kill(app, *events)
    wanted = {"filter": {"source": sender.source, "callback_class": "validation"}, "reason": "mended", "limit": 3}
    dry = (await operator.post("/v1/admin/cert-events/replay", json=wanted)).json()
    assert dry == {"replay": None, "matched": 5, "replayed": 0, "events": events[:3], "dry_run": True}
    listed = await operator.get("/v1/admin/cert-events", params={"state": "dead", "source": sender.source})
    assert [each["id"] for each in listed.json()["data"]] == events[::-1], "nothing has changed"
    real = (await operator.post("/v1/admin/cert-events/replay", json=wanted | {"dry_run": False})).json()
    assert (real["matched"], real["replayed"], real["events"]) == (5, 3, events[:3])
    none = {"filter": {"source": sender.source, "hostname": "none.example"}, "reason": "x", "dry_run": False}
    assert (await operator.post("/v1/admin/cert-events/replay", json=none)).json()["replayed"] == 0
    since = {"filter": {"source": sender.source, "since": "2099-01-01T00:00:00Z"}, "reason": "x"}
    assert (await operator.post("/v1/admin/cert-events/replay", json=since)).json()["matched"] == 0
    assert await apply_all(app.state.db) == 4
    assert await state(app, live) == "unmatched"
    async with app.state.db.read() as reader:
        rows = await reader.fetch_all(
            sa.select(audit_events).where(audit_events.c.action == "cert_event.replay_many").order_by(audit_events.c.id)
        )
    assert [(row.details["dry_run"], row.details["replayed"]) for row in rows][:2] == [(True, 0), (False, 3)]
    assert rows[0].details["reason"] == "mended"


async def test_replay_by_itself(app: Any, sender: Sender) -> None:
    settings = WorkerSettings(
        database_url=Secret("unused"), cert_auto_replay_limit=2, cert_auto_replay_cooldown_seconds=900,
        cert_auto_replay_times=1,
    )  # fmt: skip
    events = [await sender.tell("validation.failed", next(_names)) for _ in range(3)]
    await kill(app, *events)
    db, now = app.state.db, datetime.now(UTC)
    assert await replay.automatically(db, settings, now) == 0, "not yet"
    assert await replay.automatically(db, settings, now + timedelta(seconds=1000)) == 2, "a few at a time"
    assert await apply_all(db) == 2
    assert await replay.automatically(db, settings, now + timedelta(seconds=1000)) == 1
    await kill(app, *events)
    assert await replay.automatically(db, settings, now + timedelta(seconds=2000)) == 0, "so many times"
    async with db.transaction() as tx:
        await tx.raw.execute("UPDATE certificate_lifecycle_events SET automatic_replays = 0")
    assert await replay.automatically(db, settings, now + timedelta(days=8)) == 0, "too old"


async def test_covering_is_what_events_are_matched_by(app: Any, owner: Account) -> None:
    held = await hold(app.state.db, owner.organization, f"*.{(name := next(_names))}")
    async with app.state.db.read() as reader:
        assert (await service.covering(reader, f"www.{name}")).id == held  # type: ignore[union-attr]
