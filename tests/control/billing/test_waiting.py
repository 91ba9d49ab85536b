"""Events that wait for whose they are: operators see them, they are applied with their base, and are dead after a while."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.billing import webhook_jobs, webhook_store
from portico.control.finance.events import FinanceEvent
from portico.kit.db import Database
from portico.kit.ids import new_id
from portico.worker.billing_figures import OLDEST, WAITING, BillingFigures
from tests.control.billing.story import Story
from tests.control.domains.sending import operator_client

_C = webhook_store.events.c


@pytest.fixture
async def story(app: Any, db: Database) -> Story:
    return await Story(db, app.state.billing.applier).found()


async def parked(story: Story) -> FinanceEvent:
    """An event of nobody's, with the webhook that told of it."""
    event = story.state(1, "active")
    async with story.db.transaction() as tx:
        await tx.execute(sa.insert(webhook_store.events).values(
            id=new_id("bwh"), **story.source.columns, event_id=event.event_id, event_type=event.event_type,
            occurred_at=event.occurred_at, raw_sha256=hashlib.sha256(story.organization.encode()).digest(), proven=True,
            status="ignored", reason="waiting", lane="stripe", queue_state="done", sealed_body=b"sealed",
        ))  # fmt: skip
    assert await story.apply(event) == ["waiting"]
    return event


async def row(story: Story) -> Any:
    async with story.db.read() as reader:
        return await reader.fetch_one(sa.select(webhook_store.events).where(_C.account == story.source.account))


async def test_what_had_waited_is_shown_as_applied(story: Story) -> None:
    await parked(story)
    await story.page()
    found = await row(story)
    assert (found.status, found.reason, found.effects) == ("applied", None, 1)


async def test_operators_see_what_waits_and_for_what(
    app: Any, story: Story, connect: Callable[..., httpx.AsyncClient]
) -> None:
    event, operator = await parked(story), await operator_client(app, connect)
    other = story.state(2, "active", subscription_ref="sub_9", customer_ref=None)
    assert await story.apply(other) == ["waiting"]
    seen, cursor = [], ""
    while cursor is not None:
        answer = await operator.get(f"/v1/admin/billing-webhooks/waiting?limit=1&provider=stripe{cursor}")
        assert answer.status_code == 200, answer.text
        seen += answer.json()["data"]
        cursor = f"&cursor={answer.json()['next_cursor']}" if answer.json()["next_cursor"] else None
    assert [each["waits_since"] for each in seen] == sorted(each["waits_since"] for each in seen)
    mine = [each for each in seen if any(story.source.account in need for need in each["needs"])]
    assert [each["effect"] for each in mine] == [event.effect_key, other.effect_key]
    assert mine[0]["needs"] == [story.source.key("subscription", "sub_1"), story.source.key("customer", "cus_1")]
    assert (mine[0]["event_id"], mine[0]["kind"], mine[0]["provider"]) == (event.event_id, event.kind, "stripe")
    for wrong in ("bm9uc2Vuc2U", "WyJ5ZXN0ZXJkYXkgeCJd"):  # none, and one of no time
        answer = await operator.get(f"/v1/admin/billing-webhooks/waiting?cursor={wrong}")
        assert (answer.status_code, answer.json()["code"]) == (400, "request.cursor_invalid")
    figures = BillingFigures(story.db, 1)
    await figures.count()
    samples = {(metric.name, labels): value for metric, labels, value in figures.read()}
    assert samples[WAITING.name, ("stripe",)] >= 2
    assert samples[OLDEST.name, ("stripe",)] > 0
    assert samples[WAITING.name, ("razorpay",)] == 0


async def test_what_waits_for_too_long_is_dead_and_can_be_replayed(app: Any, story: Story) -> None:
    await parked(story)
    state, age = app.state, timedelta(seconds=app.state.settings.billing_waiting_seconds)
    await webhook_jobs.wait_no_longer(state.db, state.settings, datetime.now(UTC) + age - timedelta(minutes=1))
    assert (await row(story)).queue_state == "done"
    await webhook_jobs.wait_no_longer(state.db, state.settings, datetime.now(UTC) + age + timedelta(minutes=1))
    found = await row(story)
    assert (found.queue_state, found.reason) == ("dead", "waited")
    assert story.source.key("customer", "cus_1") in found.last_error
    assert (await story.end())["waiting"] == []
    async with state.db.read() as reader:  # no fault of ours, so nothing is replayed by itself for it
        before = await webhook_store.measure(reader, "stripe", 3600.0, 300.0)
    async with state.db.transaction() as tx:
        await tx.execute(sa.update(webhook_store.events).where(_C.id == found.id).values(reason=None))
    async with state.db.read() as reader:
        assert (await webhook_store.measure(reader, "stripe", 3600.0, 300.0))["failed"] == before["failed"] + 1
    async with state.db.transaction() as tx:
        assert await webhook_store.replay(tx, [_C.id == found.id], "rpl_1", 1) == [found.id]
        await tx.execute(sa.delete(webhook_store.events).where(_C.id == found.id))
