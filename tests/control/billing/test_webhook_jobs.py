"""Events on their way: every statement at which a worker can die, two workers at once, PayPal's certificate and objects, replays,
objectives, and a provider's own list against ours."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.audit.store import audit_events
from portico.control.billing import objectives, reconcile, reconcile_store, webhook_jobs
from portico.control.billing import webhook_store as store
from portico.control.billing.provider import Fetched
from portico.control.billing.webhook_certificates import Certificates
from portico.control.finance.events import FinanceEvent
from portico.errors import Problem
from portico.kit import queue
from portico.kit.db import Database, PoolLimits, Tx
from portico.kit.queue import Hopeless, LeaseLost, Limits, Retry, Work
from portico.kit.queue_runner import FAILURES
from portico.kit.queue_turns import Turns
from portico.settings import ApiSettings, Secret, WorkerSettings
from tests.control.billing.webhook_sending import (
    Authority,
    CertificateServer,
    Sender,
    body_of,
    certificate_server,
    colliding,
    trust,
    with_providers,
)
from tests.control.conftest import MovableClock
from tests.control.domains.sending import operator_client
from tests.worker.statement_proxy import StatementProxy

PROVIDERS = ("stripe", "razorpay", "paypal")
E = store.events.c
LIMITS = Limits()
WORKER = WorkerSettings(database_url=Secret("unused"))


@pytest.fixture
async def certificates() -> AsyncIterator[CertificateServer]:
    async with certificate_server() as made:
        made.served["CERT-1"] = Authority().issue()
        yield made


@pytest.fixture
def settings(settings: ApiSettings, certificates: CertificateServer, tmp_path: Path) -> ApiSettings:
    return with_providers(
        settings, paypal_cert_hosts=(certificates.origin,), paypal_cert_ca_file=trust(tmp_path, Authority())
    )


class Desk:
    """A provider's own word: its objects by id, and its list of events."""

    def __init__(self) -> None:
        self.objects: dict[str, Mapping[str, Any]] = {}
        self.events: list[Mapping[str, Any]] = []
        self.fails: Exception | None = None
        self.asked = 0

    async def authority(self, body: Mapping[str, Any]) -> Fetched:
        self.asked += 1
        if self.fails is not None:
            raise self.fails
        found = body.get("resource") or body.get("data", {}).get("object") or body["payload"]["subscription"]["entity"]
        known = self.objects.get(found["id"])
        return Fetched(datetime.now(UTC), {"subscription": known} if known is not None else {})

    async def list_events(self, since: datetime, until: datetime | None = None) -> AsyncIterator[Mapping[str, Any]]:
        for each in self.events:
            yield each

    def know(self, document: Mapping[str, Any]) -> None:
        """The object that an event of :func:`body_of` is about is there."""
        for found in (
            document.get("resource"), document.get("data", {}).get("object"),
            document.get("payload", {}).get("subscription", {}).get("entity"),
        ):  # fmt: skip
            if found is not None:
                self.objects[found["id"]] = {**found, "start_time": "2026-01-01T00:00:00Z"}


@dataclasses.dataclass
class Place:
    """Where events are taken in and applied; what is applied leaves a row for each time."""

    app: Any
    sender: Sender
    desk: Desk

    async def send(self, provider: str, *, known: bool = True, **how: Any) -> str:
        document = body_of(provider, self.sender.clock.wall())
        if known:
            self.desk.know(document)
        answer = await self.sender.send(provider, document, **how)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["event"])

    def tools(self, db: Database) -> webhook_jobs.Tools:
        state = self.app.state
        made = Certificates(state.settings, db, state.clock)
        return webhook_jobs.Tools(state.settings, state.sealer, made, lambda name: self.desk, self.apply)

    async def apply(self, tx: Tx, event: FinanceEvent) -> str | None:
        known = await tx.raw.fetchval("SELECT count(*) FROM webhook_effects WHERE effect = $1", event.effect_key)
        if known:
            return "duplicate_effect"
        await tx.raw.execute("INSERT INTO webhook_effects VALUES ($1, $2)", event.effect_key, event.event_id)
        return None

    async def work(self, *, limits: Limits = LIMITS, db: Database | None = None, limit: int = 100) -> list[str]:
        """Take on what is due, as a worker does; how each ended."""
        db = db or self.app.state.db
        return [await self.run(work) for work in await self.claim(db, limits, limit)]

    async def claim(self, db: Database, limits: Limits, limit: int = 100) -> list[Work]:
        """Due events, those whose worker died among them."""
        found, _ = await queue.claim(db, store.KIND, limits, limit)
        suspects, _ = await queue.claim(db, store.KIND, limits, limit, suspect=True)
        return found + suspects

    async def run(self, work: Work) -> str:
        try:
            await webhook_jobs.apply_event(work, self.tools(work.db))
        except LeaseLost:
            return "lost"
        except Exception as err:
            dead = isinstance(err, Hopeless) or work.attempt >= work.limits.max_attempts
            await queue.fail(work, str(err), err.seconds if isinstance(err, Retry) else 0.0, dead=dead)
            return "dead" if dead else "failed"
        return "done"

    async def rows(self, *where: Any) -> list[Any]:
        async with self.app.state.db.read() as reader:
            return list(await reader.fetch_all(sa.select(store.events).where(*where).order_by(E.id)))

    async def row(self, event: str) -> Any:
        (found,) = await self.rows(E.id == event)
        return found

    async def effects(self) -> int:
        async with self.app.state.db.read() as reader:
            return int(await reader.raw.fetchval("SELECT count(*) FROM webhook_effects"))

    async def now(self, event: str, **values: Any) -> None:
        async with self.app.state.db.transaction() as tx:
            await tx.execute(sa.update(store.events).where(E.id == event).values(**values))


@pytest.fixture
async def place(
    app: Any, client: httpx.AsyncClient, clock: MovableClock, certificates: CertificateServer
) -> AsyncIterator[Place]:
    async with app.state.db.transaction() as tx:
        await tx.raw.execute("CREATE TABLE IF NOT EXISTS webhook_effects (effect text, event text)")
        await tx.raw.execute("TRUNCATE webhook_effects")
    for table in (store.events, store.certificates, store.health, reconcile_store.runs):
        async with app.state.db.transaction() as tx:
            await tx.execute(sa.delete(table))
    yield Place(app, Sender(client, clock, certificates), Desk())
    async with app.state.db.transaction() as tx:
        await tx.raw.execute("DROP TABLE webhook_effects")


# -- applying


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_an_event_is_applied(place: Place, provider: str) -> None:
    event = await place.send(provider)
    assert await place.work() == ["done"]
    row = await place.row(event)
    assert (row.status, row.queue_state, row.reason, row.proven, row.transmission) == (
        "applied",
        "done",
        None,
        True,
        None,
    )
    assert row.effects == await place.effects() >= 1
    assert await place.work() == []


async def test_what_means_nothing_is_ignored(place: Place) -> None:
    document = body_of("stripe", place.sender.clock.wall(), type="product.updated")
    event = (await place.sender.send("stripe", document)).json()["event"]
    assert await place.work() == ["done"]
    row = await place.row(event)
    assert (row.status, row.reason, row.effects) == ("ignored", "no_effect", 0)


async def test_a_provider_that_is_away_delays_and_loses_nothing(place: Place) -> None:
    event = await place.send("stripe")
    place.desk.fails = Problem("billing.provider_circuit_open", "away", headers={"Retry-After": "0"})
    attempts = [await place.work(limits=Limits(max_attempts=8)) for _ in range(8)]
    assert attempts == [["failed"]] * 7 + [["dead"]]
    row = await place.row(event)
    assert (row.queue_state, row.status, row.attempts) == ("dead", "verified", 8)
    assert "away" in row.last_error
    assert await place.effects() == 0


async def test_a_provider_that_is_gone_is_told_at_once(place: Place) -> None:
    event = await place.send("stripe")
    place.desk.fails = Problem("billing.provider_unconfigured", "not set up")
    assert await place.work() == ["dead"]
    assert "not set up" in (await place.row(event)).last_error


@pytest.mark.parametrize("provider", ["stripe", "paypal"])
@pytest.mark.parametrize("after", [False, True], ids=["before-the-server", "after-the-server"])
async def test_a_worker_dies_at_every_statement(place: Place, tmp_path: Path, provider: str, after: bool) -> None:
    """Whatever it had done by then: the next worker ends with one effect, and the row says so."""
    short, at, reached = Limits(lease_seconds=0.05), 0, True
    while reached:
        at += 1
        async with place.app.state.db.transaction() as tx:  # PayPal's certificate has to be fetched each time
            await tx.execute(sa.delete(store.certificates))
        event = await place.send(provider)
        proxy = await StatementProxy(place.app.state.db.url, tmp_path, at=at, after=after).start()
        db = Database(proxy.url, PoolLimits(size=1, acquire_timeout_seconds=3))
        try:
            for work in await place.claim(db, short):
                await webhook_jobs.apply_event(work, place.tools(db))
        except (*FAILURES, LeaseLost):
            pass
        reached = proxy.fired
        await db.close()
        await proxy.close()
        async with asyncio.timeout(60):
            while (row := await place.row(event)).queue_state == "pending":
                await place.work()
                await asyncio.sleep(0.01)
        assert (row.status, row.queue_state, row.proven) == ("applied", "done", True), (at, row.last_error)
        async with place.app.state.db.read() as reader:
            query = "SELECT effect, count(*) AS times FROM webhook_effects WHERE event = $1 GROUP BY effect"
            effects = await reader.raw.fetch(query, row.event_id)
        assert {each["times"] for each in effects} == {1}, at
    assert at > 6, "no statement was reached"


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_two_workers_at_once(place: Place, provider: str) -> None:
    """One loses the lease in the middle; another has it by then. Only what the holder wrote is there."""
    event = await place.send(provider)
    (slow,), _ = await queue.claim(place.app.state.db, store.KIND, Limits(lease_seconds=0.0), 1)
    (fast,), _ = await queue.claim(place.app.state.db, store.KIND, Limits(), 1, suspect=True)
    outcomes = await asyncio.gather(place.run(fast), place.run(slow))
    assert outcomes == ["done", "lost"]
    row = await place.row(event)
    assert (row.status, row.attempts) == ("applied", 2)
    async with place.app.state.db.read() as reader:
        assert await reader.raw.fetchval("SELECT count(*) - count(DISTINCT effect) FROM webhook_effects") == 0


async def test_a_provider_that_does_not_answer_holds_up_itself_alone(place: Place) -> None:
    """Nor do those hold up others whose certificate nobody has."""
    for _ in range(20):
        await place.send("stripe")
        await place.send("paypal")
    event = await place.send("razorpay")
    limits = Limits(concurrency=8, lane_places=4, group_places=4)
    turns = Turns("lane", limits)
    held: list[Work] = []
    for _ in range(3):
        count, turn = turns.next(held, 12 - len(held))
        found, _ = await queue.claim(place.app.state.db, store.KIND, limits, count, turn=turn)
        turns.taken(found, count)
        held += found
    assert event in [work.id for work in held]
    assert max(Counter(work.row["provider"] for work in held).values()) <= 4


# -- PayPal: certificate and object


async def test_a_certificate_is_fetched_once_for_all(place: Place, certificates: CertificateServer) -> None:
    events = [await place.send("paypal") for _ in range(3)]
    assert [row.proven for row in await place.rows()] == [False] * 3
    assert await place.work() == ["done"] * 3
    assert [(await place.row(event)).proof for event in events] == ["CERT-1"] * 3
    await place.send("paypal")
    assert [row.proven for row in await place.rows()][-1] is True, "the API knows it now, and checks at once"


@pytest.mark.parametrize(
    "why",
    ["certificate", "mismatch", "expired", "other root", "another name", "redirect", "too long"],
)
async def test_what_its_certificate_does_not_vouch_for(place: Place, certificates: CertificateServer, why: str) -> None:
    """It is disowned: no effect, no body, no id; the real event under the same id comes through afterwards."""
    served = {
        "certificate": b"", "mismatch": Authority().issue(), "expired": Authority().issue(days=(-9, -1)),
        "other root": Authority(1).issue(), "another name": Authority().issue("paypal.com.evil.example"),
        "redirect": b"", "too long": b"x" * 70_000,
    }[why]  # fmt: skip
    certificates.served["CERT-9"] = served
    certificates.status = 302 if why == "redirect" else None
    document = body_of("paypal", place.sender.clock.wall())
    place.desk.know(document)
    webhook = {"webhook": "SOMEBODYELSES"} if why == "mismatch" else {}
    event = (await place.sender.send("paypal", document, url=certificates.url("CERT-9"), **webhook)).json()["event"]
    outcome = await place.work()
    row = await place.row(event)
    if why == "redirect":  # no refusal of PayPal's: it may answer later
        assert (outcome, row.queue_state, certificates.asked) == (["failed"], "pending", ["CERT-9"])
        return
    assert outcome == ["done"]
    reason = "mismatch" if why == "mismatch" else "certificate"
    assert (row.status, row.reason, row.proven, row.sealed_body) == ("ignored", reason, False, None)
    assert await place.effects() == 0
    assert place.desk.asked == 0, "nobody's objects are fetched for it"
    assert (await place.sender.send("paypal", document)).json()["status"] == "accepted"
    assert await place.work() == ["done"]
    assert await place.effects() >= 1


async def test_a_certificate_host_that_is_away(place: Place, certificates: CertificateServer) -> None:
    certificates.status = 503
    event = await place.send("paypal")
    assert await place.work() == ["failed"]
    certificates.status = None
    await place.now(event, available_at=sa.func.now())
    assert await place.work() == ["done"]
    assert (await place.row(event)).status == "applied"


async def test_a_body_with_the_checksum_of_another_moves_nothing(place: Place) -> None:
    """The signature is right, and PayPal knows nothing of what the body says. The real one comes through afterwards."""
    genuine = body_of("paypal", place.sender.clock.wall())
    raw = json.dumps(genuine).encode()
    fields = place.sender.fields("paypal", raw)
    forged = colliding(raw, genuine | {"resource": {"id": "I-NOBODYS", "status": "ACTIVE", "plan_id": "P-1"}})
    path = "/v1/billing/webhooks/paypal"
    event = (await place.sender.client.post(path, content=forged, headers=fields)).json()["event"]
    attempts = [await place.work() for _ in range(4) if not await place.now(event, available_at=sa.func.now())]
    assert attempts == [["failed"]] * 3 + [["done"]], "PayPal may know an object a little later than its event"
    row = await place.row(event)
    assert (row.status, row.reason, row.proven, row.sealed_body) == ("ignored", "unconfirmed", False, None)
    assert await place.effects() == 0
    place.desk.know(genuine)
    assert (await place.sender.client.post(path, content=raw, headers=fields)).json()["status"] == "accepted"
    assert await place.work() == ["done"]
    assert await place.effects() >= 1


async def test_a_body_with_the_checksum_of_another_says_nothing_of_what_is_there(place: Place) -> None:
    """It names somebody's real subscription, canceled, and says that it is active: PayPal's own word counts."""
    genuine = body_of("paypal", place.sender.clock.wall())
    raw = json.dumps(genuine).encode()
    fields = place.sender.fields("paypal", raw)
    place.desk.objects["I-REAL"] = {
        "id": "I-REAL",
        "status": "CANCELLED",
        "plan_id": "P-1",
        "start_time": "2026-01-01T00:00:00Z",
    }
    forged = colliding(raw, genuine | {"resource": {"id": "I-REAL", "status": "ACTIVE", "plan_id": "P-9"}})
    seen: list[FinanceEvent] = []
    real = place.apply

    async def spy(tx: Tx, event: FinanceEvent) -> str | None:
        seen.append(event)
        return await real(tx, event)

    place.apply = spy  # type: ignore[method-assign]
    await place.sender.client.post("/v1/billing/webhooks/paypal", content=forged, headers=fields)
    assert await place.work() == ["done"]
    said = {(event.subscription_ref, event.status, event.plan_ref) for event in seen if event.status is not None}
    assert said == {("I-REAL", "canceled", "P-1")}


async def test_a_copy_that_waited_for_the_certificate(place: Place) -> None:
    """The same event twice before anything vouched for it: one of them holds the id, the other one is its copy."""
    document = body_of("paypal", place.sender.clock.wall())
    place.desk.know(document)
    for _ in range(2):
        assert (await place.sender.send("paypal", document)).status_code == 202
    assert await place.work() == ["done", "done"]
    assert sorted((row.status, row.reason, row.proven) for row in await place.rows()) == [
        ("applied", None, True), ("ignored", "duplicate", False),
    ]  # fmt: skip


async def test_two_stories_under_one_id_that_waited_for_the_certificate(place: Place) -> None:
    """One of them holds the id; that there was another is a security event, as it is when the certificate is known."""
    document = body_of("paypal", place.sender.clock.wall())
    place.desk.know(document)
    for each in (document, document | {"summary": "another one"}):
        assert (await place.sender.send("paypal", each)).status_code == 202
    assert await place.work() == ["done", "done"]
    held, other = sorted(await place.rows(), key=lambda row: not row.proven)
    assert (held.status, other.status, other.reason, other.proven) == ("applied", "ignored", "conflict", False)
    c = audit_events.c
    async with place.app.state.db.read() as reader:
        query = sa.select(c.details).where(c.action == "billing_webhook.conflict", c.target == held.id)
        (details,) = [row.details for row in await reader.fetch_all(query)]
    assert (details["event"], details["sha256"]) == (document["id"], other.raw_sha256.hex())


@pytest.mark.parametrize("hours", [-1, 1])
async def test_looks_are_ordered_by_one_clock(place: Place, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """A worker whose clock is wrong looks neither in the past nor in the future."""
    real, seen = place.desk.authority, list[FinanceEvent]()

    async def authority(body: Mapping[str, Any]) -> Fetched:
        found = await real(body)
        return dataclasses.replace(found, at=found.at + timedelta(hours=hours))

    async def apply(tx: Tx, event: FinanceEvent) -> str | None:
        seen.append(event)
        return None

    monkeypatch.setattr(place.desk, "authority", authority)
    monkeypatch.setattr(place, "apply", apply)
    async with place.app.state.db.read() as reader:
        before = await reader.raw.fetchval("SELECT clock_timestamp()")
    await place.send("stripe")
    assert await place.work() == ["done"]
    async with place.app.state.db.read() as reader:
        after = await reader.raw.fetchval("SELECT clock_timestamp()")
    versions = [event.object_version for event in seen]
    assert versions and all(
        before.timestamp() * 1e6 <= version + 1 and version <= after.timestamp() * 1e6 for version in versions
    )


# -- again


async def test_replay_of_one(place: Place, connect: Callable[..., httpx.AsyncClient]) -> None:
    operator = await operator_client(place.app, connect)
    event = await place.send("stripe")
    path = f"/v1/admin/billing-webhooks/{event}/replay"
    pending = await operator.post(path, json={"reason": "too soon"})
    assert (pending.status_code, pending.json()["code"]) == (409, "billing.webhook_pending")
    await place.work()
    answer = await operator.post(path, json={"reason": "to be sure"})
    assert (answer.status_code, answer.json()["replayed"]) == (200, 1)
    assert await place.work() == ["done"]
    row = await place.row(event)
    assert (row.status, row.reason, row.replays, await place.effects()) == ("ignored", "duplicate_effect", 1, 1)
    await place.now(event, sealed_body=None)
    gone = await operator.post(path, json={"reason": "too late"})
    assert (gone.status_code, gone.json()["code"]) == (409, "billing.webhook_gone")
    (told,) = await audited(place.app, "billing_webhook.replay", event)
    assert (told.details["reason"], told.organization_id) == ("to be sure", None)
    none = await operator.post("/v1/admin/billing-webhooks/bwh_none/replay", json={"reason": "x"})
    assert none.json()["code"] == "billing.webhook_not_found"


@pytest.mark.parametrize(
    ("document", "reason"), [({"livemode": True}, "other_mode"), ({"account": "acct_theirs"}, "other_account")]
)
async def test_a_replay_makes_nothing_ours(
    place: Place, connect: Callable[..., httpx.AsyncClient], document: dict[str, Any], reason: str
) -> None:
    """A payout of the mode for tests, or of another account, which asks for no organization, would be booked."""
    operator = await operator_client(place.app, connect)
    payout = {"id": "po_1", "object": "payout", "amount": 100, "currency": "eur"}
    body = body_of("stripe", place.sender.clock.wall(), type="payout.paid", data={"object": payout}, **document)
    answer = await place.sender.send("stripe", body)
    assert answer.json()["status"] == "ignored"
    event = answer.json()["event"]
    assert (await operator.post(f"/v1/admin/billing-webhooks/{event}/replay", json={"reason": "x"})).status_code == 200
    assert await place.work() == ["done"]
    row = await place.row(event)
    assert (row.status, row.reason, row.effects, await place.effects()) == ("ignored", reason, 0, 0)


async def audited(app: Any, action: str, target: str | None = None) -> list[Any]:
    c = audit_events.c
    async with app.state.db.read() as reader:
        query = sa.select(audit_events).where(c.action == action, c.outcome == "success")
        if target is not None:
            query = query.where(c.target == target)
        return list(await reader.fetch_all(query.order_by(c.id)))


async def test_replay_by_filter(place: Place, connect: Callable[..., httpx.AsyncClient]) -> None:
    operator = await operator_client(place.app, connect)
    place.desk.fails = Problem("billing.provider_unconfigured", "not set up")
    events = [await place.send(provider) for provider in ("stripe", "stripe", "razorpay")]
    assert await place.work() == ["dead"] * 3
    place.desk.fails = None
    wanted: dict[str, Any] = {
        "filter": {"provider": "stripe", "type": "customer.*", "error": "not set"},
        "reason": "set up",
    }
    dry = (await operator.post("/v1/admin/billing-webhooks/replay", json=wanted)).json()
    assert (dry["dry_run"], dry["matched"], dry["replayed"], dry["events"]) == (True, 2, 0, events[:2])
    assert await place.work() == []
    real = (
        await operator.post("/v1/admin/billing-webhooks/replay", json=wanted | {"dry_run": False, "limit": 1})
    ).json()
    assert (real["matched"], real["replayed"], real["events"]) == (2, 1, events[:1])
    assert await place.work() == ["done"]
    assert [(await place.row(event)).queue_state for event in events] == ["done", "dead", "dead"]
    told = await audited(place.app, "billing_webhook.replay_many")
    assert [(row.details["dry_run"], row.details["replayed"]) for row in told[-2:]] == [(True, 0), (False, 1)]


async def test_a_replay_that_races_itself(place: Place, connect: Callable[..., httpx.AsyncClient]) -> None:
    operator = await operator_client(place.app, connect)
    event = await place.send("stripe")
    await place.work()
    answers = await asyncio.gather(
        *(operator.post(f"/v1/admin/billing-webhooks/{event}/replay", json={"reason": "x"}) for _ in range(5))
    )
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409, 409]
    assert await place.work() == ["done"]
    assert await place.effects() == 1


# -- the objective


async def test_a_broken_objective_is_mended_by_itself(place: Place, connect: Callable[..., httpx.AsyncClient]) -> None:
    """Dead events are replayed, a few at a time and not before the cool-down, by one of two workers; each run is in the log."""
    app, now = place.app, datetime.now(UTC)
    settings = dataclasses.replace(
        WORKER, billing_webhook_slo_failures=3, billing_webhook_auto_replay_limit=2, billing_webhook_auto_replay_times=1
    )
    for _ in range(3):
        await place.send("stripe")
    assert await objectives.watch(app.state.db, settings, now) == {}
    place.desk.fails = Problem("billing.provider_unconfigured", "away")
    assert await place.work() == ["dead"] * 3
    before = len(await audited(app, "billing_webhook.replay_many"))
    started = await asyncio.gather(*(objectives.watch(app.state.db, settings, now) for _ in range(4)))
    assert sorted(each.get("stripe", 0) for each in started) == [0, 0, 0, 2], "once, whoever looks"
    assert await place.work() == ["dead"] * 2
    assert await objectives.watch(app.state.db, settings, now + timedelta(seconds=299)) == {}, (
        "not before the cool-down"
    )
    assert await objectives.watch(app.state.db, settings, now + timedelta(seconds=301)) == {"stripe": 1}
    place.desk.fails = None
    assert await place.work() == ["done"]
    assert await objectives.watch(app.state.db, settings, now + timedelta(seconds=602)) == {}
    told = (await audited(app, "billing_webhook.replay_many"))[before:]
    assert [(row.details["objective"], row.details["replayed"]) for row in told] == [("failures", 2), ("failures", 1)]
    operator = await operator_client(app, connect)
    health = {each["provider"]: each for each in (await operator.get("/v1/admin/billing-webhooks/health")).json()}
    assert (health["stripe"]["broken_by"], health["stripe"]["failed"], health["stripe"]["replays"]) == (None, 2, 2)
    assert health["paypal"]["broken_by"] is None


async def test_what_breaks_the_objective(place: Place) -> None:
    settings, now, db = WORKER, datetime.now(UTC), place.app.state.db

    async def seen() -> Any:
        await objectives.watch(db, settings, now)
        async with db.read() as reader:
            return await store.health_of(reader, "stripe")

    assert (await seen()).broken_by is None
    event = await place.send("stripe")
    await place.now(event, queued_at=now - timedelta(seconds=301))
    found = await seen()
    assert (found.broken_by, found.stale, found.broken_since) == ("staleness", 1, now)
    await place.now(event, queued_at=now - timedelta(seconds=90))
    assert await place.work() == ["done"]
    found = await seen()
    assert (found.broken_by, found.applied, found.p95_seconds > 60) == ("latency", 1, True)
    await place.now(event, queued_at=now)
    assert ((await seen()).broken_by, (await seen()).broken_since) == (None, None)


async def test_failed_events_are_tried_now(place: Place) -> None:
    event = await place.send("stripe")
    await place.now(event, last_error="x", available_at=sa.text("now() + interval '1 hour'"))
    settings = dataclasses.replace(WORKER, billing_webhook_slo_failures=1)
    assert await objectives.watch(place.app.state.db, settings, datetime.now(UTC)) == {"stripe": 1}
    assert await place.work() == ["done"]


# -- the provider's own list


async def reconciled(place: Place) -> None:
    found, _ = await queue.claim(place.app.state.db, reconcile_store.KIND, LIMITS, 10)
    state = place.app.state
    for work in found:
        await reconcile.run(work, reconcile.Tools(state.settings, state.sealer, state.clock, lambda name: place.desk))


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_what_nobody_told_us_of(place: Place, connect: Callable[..., httpx.AsyncClient], provider: str) -> None:
    operator, now = await operator_client(place.app, connect), place.sender.clock.wall()
    told, untold = (body_of(provider, now) | ({"id": f"list:{n}"} if provider == "razorpay" else {}) for n in range(2))
    for each in (told, untold):
        place.desk.know(each)
    assert (
        await place.sender.send(provider, told, **({"event": "list:0"} if provider == "razorpay" else {}))
    ).status_code == 202
    await place.work()
    place.desk.events = [told, untold, body_of(provider, now, id=5), {"nonsense": 1}]
    if provider == "stripe":
        place.desk.events.append(body_of(provider, now, livemode=True))
    body: dict[str, Any] = {"provider": provider, "reason": "an outage"}
    dry = await operator.post("/v1/admin/billing-webhooks/reconcile", json=body)
    assert (dry.status_code, dry.json()["state"], dry.json()["dry_run"]) == (202, "queued", True)
    await reconciled(place)
    assert len(await place.rows()) == 1, "nothing was taken in"
    await operator.post("/v1/admin/billing-webhooks/reconcile", json=body | {"dry_run": False})
    await reconciled(place)
    shown = (await operator.get("/v1/admin/billing-webhooks/reconcile")).json()["data"]
    assert [(each["listed"], each["missing"], each["added"], each["missing_events"]) for each in shown] == [
        (len(place.desk.events), 1, added, [untold["id"]]) for added in (1, 0)
    ]
    assert shown[0]["foreign"] == (provider == "stripe") and shown[0]["unreadable"] == 2
    assert set(await place.work()) == {"done"}
    rows = await place.rows()
    assert [(row.origin, row.status) for row in rows] == [("webhook", "applied"), ("reconcile", "applied")]
    # Its webhook comes after all, in other words.
    late = await place.sender.send(provider, untold, **({"event": "list:1"} if provider == "razorpay" else {}))
    assert (late.status_code, late.json()) == (200, {"event": rows[1].id, "status": "duplicate"})
    assert [row.details["added"] for row in (await audited(place.app, "billing_webhook.reconciled"))[-2:]] == [0, 1]


async def test_runs_come_by_themselves_and_once(place: Place) -> None:
    state, now = place.app.state, datetime.now(UTC)
    made = await asyncio.gather(*(reconcile.schedule(state.db, state.settings, now) for _ in range(3)))
    assert sum(made) == 3, "one of each provider"
    place.desk.events = [body_of("paypal", now)]
    await reconciled(place)
    async with state.db.read() as reader:
        rows = {row.provider: row for row in await reconcile_store.listing(reader, 10, None)}
    assert {row.queue_state for row in rows.values()} == {"done"}
    assert rows["paypal"].since == now - timedelta(days=3)
    assert rows["paypal"].until == now - timedelta(seconds=300)
    assert await reconcile.schedule(state.db, state.settings, now + timedelta(hours=1)) == 3
    async with state.db.read() as reader:
        (row, *_) = [row for row in await reconcile_store.listing(reader, 10, None) if row.provider == "paypal"]
    assert row.since == rows["paypal"].until - timedelta(hours=1), "from where the last one ended, and some time before"


async def test_a_run_that_was_asked_for_leaves_no_gap(place: Place, connect: Callable[..., httpx.AsyncClient]) -> None:
    """Runs that come by themselves go on where the last of them ended, whatever part of the list somebody looked at meanwhile."""
    state, now = place.app.state, datetime.now(UTC)
    await reconcile.schedule(state.db, state.settings, now - timedelta(days=2))
    await reconciled(place)
    operator = await operator_client(place.app, connect)
    body = {
        "provider": "stripe",
        "reason": "one hour",
        "since": (now - timedelta(hours=1)).isoformat(),
        "dry_run": False,
    }
    assert (await operator.post("/v1/admin/billing-webhooks/reconcile", json=body)).status_code == 202
    await reconciled(place)
    assert await reconcile.schedule(state.db, state.settings, now) == 3
    async with state.db.read() as reader:
        (row, *_) = [row for row in await reconcile_store.listing(reader, 10, None) if row.provider == "stripe"]
    assert row.since == now - timedelta(days=2, seconds=300, hours=1)


async def test_a_list_that_ends_in_the_middle(place: Place) -> None:
    """What came was taken in; the next attempt takes in the rest."""
    state, now = place.app.state, datetime.now(UTC)
    await reconcile.schedule(state.db, state.settings, now)
    events = [body_of("stripe", now) for _ in range(150)]

    class Breaks(Desk):
        async def list_events(self, since: datetime, until: datetime | None = None) -> AsyncIterator[Mapping[str, Any]]:
            for each in events[:120]:
                yield each
            raise Problem("billing.provider_unreachable", "gone")

    found, _ = await queue.claim(state.db, reconcile_store.KIND, Limits(lease_seconds=0.0), 10)
    (work,) = [each for each in found if each.row["provider"] == "stripe"]
    for each in found:
        await queue.fail(each, "x", 0.0, dead=False) if each is not work else None
    with pytest.raises(Problem):
        await reconcile.run(work, reconcile.Tools(state.settings, state.sealer, state.clock, lambda name: Breaks()))
    assert len(await place.rows()) == 100
    await queue.fail(work, "gone", 0.0, dead=False)
    place.desk.events = events
    found, _ = await queue.claim(state.db, reconcile_store.KIND, Limits(), 10)
    (work,) = [each for each in found if each.row["provider"] == "stripe"]
    await reconcile.run(work, reconcile.Tools(state.settings, state.sealer, state.clock, lambda name: place.desk))
    assert len(await place.rows()) == 150


async def test_a_provider_that_is_not_set_up(place: Place, connect: Callable[..., httpx.AsyncClient]) -> None:
    operator = await operator_client(place.app, connect)
    place.app.state.settings = dataclasses.replace(
        place.app.state.settings, razorpay_key_id="", razorpay_key_secret=None, razorpay_webhook_secret=None,
        razorpay_account="", razorpay_plans=(),
    )  # fmt: skip
    answer = await operator.post("/v1/admin/billing-webhooks/reconcile", json={"provider": "razorpay", "reason": "x"})
    assert answer.json()["code"] == "billing.provider_unconfigured"


# -- the end


async def test_what_is_past_its_time(place: Place) -> None:
    state, now = place.app.state, datetime.now(UTC)
    old, bodiless, disowned, waiting = [await place.send("stripe") for _ in range(4)]
    for event, days, more in (
        (old, 401, {"queue_state": "done"}), (bodiless, 91, {"queue_state": "dead"}),
        (disowned, 2, {"queue_state": "done", "proven": False}), (waiting, 500, {}),
    ):  # fmt: skip
        await place.now(event, received_at=now - timedelta(days=days), **more)
    fresh = await place.send("stripe")
    await webhook_jobs.clear(state.db, state.settings, now)
    assert [(row.id, row.sealed_body is None) for row in await place.rows()] == [
        (bodiless, True), (waiting, False), (fresh, False),
    ]  # fmt: skip


async def test_two_api_processes_know_a_certificate(place: Place) -> None:
    await place.send("paypal")
    await place.work()
    other = Certificates(place.app.state.settings, place.app.state.db, place.app.state.clock)
    assert await other.known(place.sender.certificates.url()) is not None  # type: ignore[union-attr]
    strict = dataclasses.replace(place.app.state.settings, paypal_cert_ca_file=None)
    assert (
        await Certificates(strict, place.app.state.db, place.app.state.clock).known(place.sender.certificates.url())
        is None
    ), (  # type: ignore[union-attr]
        "a root that is trusted no longer vouches for nothing that was kept"
    )
