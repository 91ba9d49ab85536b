"""Taking events of a source out of the state again: what they hid is back, others' stays, and nothing brings them back."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from portico.control.audit.store import audit_events
from portico.control.domains import event_store, forgetting, lifecycle
from portico.control.domains.certificate_state import Event, Registers, fold
from portico.control.domains.forgetting import Which
from portico.control.domains.lifecycle import NewEvent
from portico.embedded.units import portico_argv
from portico.kit import queue
from portico.kit.queue import LeaseLost, Limits
from portico.settings import ApiSettings
from tests.control.conftest import Account, MovableClock
from tests.control.domains.sending import Sender, apply_all, domain, hold, make_source, operator_client
from tests.control.test_http import problem

_names = (f"forget{n}.example.com" for n in itertools.count(1))
HUGE = 2**53 - 1
PATH = "/v1/admin/cert-events/forget"


@pytest.fixture(autouse=True)
async def clean(app: Any) -> None:
    await apply_all(app.state.db)


@pytest.fixture
async def operator(app: Any, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    return await operator_client(app, connect)


@pytest.fixture
async def sender(operator: httpx.AsyncClient, client: httpx.AsyncClient, clock: MovableClock) -> Sender:
    return await make_source(operator, client, clock)


def at(revision: int) -> dict[str, Any]:
    return {"provenance": {"producer": "test", "objectUid": f"uid-{revision}", "revision": revision}}


async def ours(app: Any, held: str, revision: int) -> None:
    """A certificate of this installation is live."""
    now = datetime.now(UTC)
    facts = {"serial": f"{revision:02x}", "not_before": now, "not_after": now + timedelta(days=90 + revision)}
    async with app.state.db.transaction() as tx:
        await lifecycle.record(tx, NewEvent(held, "deployment", "succeeded", revision, **facts))  # type: ignore[arg-type]
    await settle(app)


async def settle(app: Any) -> None:
    await apply_all(app.state.db, app.state.cert_incidents.follow, app.state.clock.wall())


async def forget(operator: httpx.AsyncClient, source: str, **more: Any) -> dict[str, Any]:
    answer = await operator.post(PATH, json={"source": source, "reason": "it counted in nanoseconds", **more})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_what_a_huge_revision_hid_is_back(
    app: Any, sender: Sender, operator: httpx.AsyncClient, owner: Account
) -> None:
    held = await hold(app.state.db, owner.organization, name := next(_names))
    await ours(app, held, 1)
    event = await sender.tell("revocation.succeeded", name, **at(HUGE))
    await settle(app)
    await ours(app, held, 2)
    assert (await domain(app.state.db, held)).cert_status == "revoked", "what came later is hidden"
    (incident,) = (await owner.client.get(f"/v1/domains/{held}/incidents")).json()["data"]
    assert (incident["incident_class"], incident["status"]) == ("revocation", "open")

    changed = {
        "id": held,
        "name": name,
        "status": "revoked",
        "revision": HUGE,
        "status_after": "active",
        "revision_after": 2,
    }
    dry = await forget(operator, sender.source, from_revision=1000)
    assert dry == {"events": 1, "domains": 1, "changed": [changed], "dry_run": True}
    await settle(app)
    assert (await domain(app.state.db, held)).cert_status == "revoked", "only told of"
    done = await forget(operator, sender.source, from_revision=1000, dry_run=False)
    assert done == dry | {"dry_run": False}
    row = await domain(app.state.db, held)
    assert (row.cert_status, row.cert_serial, row.cert_source) == ("active", "02", "platform")
    await settle(app)
    (incident,) = (await owner.client.get(f"/v1/domains/{held}/incidents")).json()["data"]
    assert incident["status"] == "resolved"

    # Nothing brings it back: not a replay of it or of everything, not the same event again.
    problem(
        await operator.post(f"/v1/admin/cert-events/{event}/replay", json={"reason": "x"}), 409, "cert.event_forgotten"
    )
    everything = {"filter": {"source": sender.source, "state": None}, "reason": "x", "dry_run": False}
    assert (await operator.post("/v1/admin/cert-events/replay", json=everything)).json()["replayed"] == 0
    shown = (await operator.get(f"/v1/admin/cert-events/{event}")).json()
    assert shown["state"] == "forgotten"
    assert (await forget(operator, sender.source, dry_run=False))["events"] == 0
    # It is told to its owner and to operators.
    (row, *_) = (await owner.client.get("/v1/audit", params={"target": held})).json()["data"]
    assert (row["action"], row["details"]["source"]) == ("certificate.rebuild", sender.source)
    async with app.state.db.read() as reader:
        rows = await reader.fetch_all(
            sa.select(audit_events).where(
                audit_events.c.action == "cert_event.forget", audit_events.c.target == sender.source
            )
        )
    assert [(row.details["dry_run"], row.details["events"]) for row in rows] == [(True, 1), (False, 1), (False, 0)]
    assert {row.details["reason"] for row in rows} == {"it counted in nanoseconds"}
    # What the source tells from now on counts again.
    await sender.tell("revocation.succeeded", name, **at(3))
    await settle(app)
    assert (await domain(app.state.db, held)).cert_status == "revoked"


async def test_one_domain_of_one_source_alone(
    app: Any,
    sender: Sender,
    operator: httpx.AsyncClient,
    client: httpx.AsyncClient,
    clock: MovableClock,
    owner: Account,
) -> None:
    other = await make_source(operator, client, clock)
    names = [next(_names) for _ in range(2)]
    first, second = [await hold(app.state.db, owner.organization, name) for name in names]
    for name in names:
        await sender.tell("validation.failed", name, **at(HUGE))
        await other.tell("validation.failed", name, **at(5))
    await settle(app)
    waits = await sender.tell("issuance.failed", names[0], **at(HUGE))
    done = await forget(operator, sender.source, domain=first, dry_run=False)
    assert (done["events"], done["domains"]) == (2, 1)
    await settle(app)
    async with app.state.db.read() as reader:
        assert (await event_store.one(reader, waits)).status == "forgotten"  # type: ignore[union-attr]
    rows = [await domain(app.state.db, each) for each in (first, second)]
    assert [row.cert_failures for row in rows] == [1, 2]
    assert Registers.read(rows[0].cert_applied).newest.keys() == {"validation.failed"}


async def test_a_block_that_only_it_told_of_is_over(
    app: Any, sender: Sender, operator: httpx.AsyncClient, owner: Account
) -> None:
    held = await hold(app.state.db, owner.organization, name := next(_names))
    await sender.tell("ownership.blocked", name, **at(HUGE))
    await settle(app)
    assert (await domain(app.state.db, held)).hostname_status == "blocked"
    await forget(operator, sender.source, dry_run=False)
    row = await domain(app.state.db, held)
    assert (row.hostname_status, row.dns_error) == ("verified", None) and row.next_check_at is not None


async def test_a_worker_that_has_one_in_hand_applies_nothing(
    app: Any, sender: Sender, operator: httpx.AsyncClient, owner: Account
) -> None:
    held = await hold(app.state.db, owner.organization, name := next(_names))
    await sender.tell("validation.failed", name, **at(HUGE))
    (work,), _ = await queue.claim(app.state.db, lifecycle.KIND, Limits(), 1)
    assert (await forget(operator, sender.source, dry_run=False))["events"] == 1
    with pytest.raises(LeaseLost):
        await lifecycle.apply(work, app.state.clock.wall())
    assert (await domain(app.state.db, held)).cert_applied == {}


async def test_what_is_refused(app: Any, operator: httpx.AsyncClient, sender: Sender, owner: Account) -> None:
    reason = {"reason": "x"}
    problem(await operator.post(PATH, json={"source": "platform", **reason}), 409, "cert.forget_refused")
    problem(await operator.post(PATH, json={"source": "src_none", **reason}), 404, "cert.source_not_found")
    gone = {"source": sender.source, "domain": "dom_none", **reason}
    problem(await operator.post(PATH, json=gone), 404, "domain.not_found")
    problem(await owner.client.post(PATH, json={"source": sender.source, **reason}), 403, "auth.operator_required")
    names = [next(_names) for _ in range(2)]
    for name in names:
        await hold(app.state.db, owner.organization, name)
        await sender.tell("validation.failed", name)
    await settle(app)
    whole = {"source": sender.source, "dry_run": False, **reason}
    most, forgetting.MOST = forgetting.MOST, 1
    try:
        problem(await operator.post(PATH, json=whole), 409, "cert.forget_refused")
    finally:
        forgetting.MOST = most


async def test_by_the_command_line(
    app: Any, sender: Sender, operator: httpx.AsyncClient, owner: Account, settings: ApiSettings
) -> None:
    held = await hold(app.state.db, owner.organization, name := next(_names))
    await sender.tell("validation.failed", name, **at(HUGE))
    await settle(app)

    def run(*args: str) -> str:
        env = {key: value for key, value in os.environ.items() if not key.startswith("PORTICO_")}
        argv = portico_argv(
            "admin", "cert-events", "forget", sender.source, "--domain", name, "--reason", "a bug", *args
        )
        env |= {"PORTICO_DATABASE_URL": settings.database_url.reveal()}
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = await asyncio.to_thread(run)
    assert name in shown and str(HUGE) in shown and "would be forgotten" in shown and "--yes" in shown
    assert (await domain(app.state.db, held)).cert_failures == 1
    done = json.loads(await asyncio.to_thread(run, "--yes", "--json"))
    assert (done["events"], done["domains"], done["dry_run"]) == (1, 1, False)
    assert (await domain(app.state.db, held)).cert_failures == 0


PAIRS = ("deployment.succeeded", "renewal.failed", "validation.failed", "revocation.succeeded", "issuance.succeeded")


@given(
    st.lists(st.tuples(st.sampled_from(["src_a", "src_b"]), st.sampled_from(PAIRS), st.integers(0, 4)), max_size=12),
    st.integers(0, 4), st.randoms(use_true_random=False),
)  # fmt: skip
def test_what_is_left_is_the_state_of_the_others(
    history: list[tuple[str, str, int]], from_revision: int, shuffled: random.Random
) -> None:
    """Whatever came in whatever order: without a source's events the state is that of a domain that never heard of them."""
    events = [
        Event(
            source, f"evt_{number}", pair.partition(".")[0], pair.partition(".")[2], revision, number, f"2026-01-{number + 1:02}",
            effect=f"{source}/{number}", serial=f"{revision}", not_after=f"2027-0{revision + 1}",
        )
        for number, (source, pair, revision) in enumerate(history)
    ]  # fmt: skip
    which = Which("src_a", None, from_revision)
    others = [event for event in events if not which.fits(event.source, event.revision)]
    shuffled.shuffle(events)
    assert fold(others, forgetting.without(fold(events), which)).written() == fold(others).written()
