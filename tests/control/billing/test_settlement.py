"""Settlement from the signed message to the ledger: once, in any order, and with its history."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import sqlalchemy as sa

from portico.control.audit.store import audit_events
from portico.control.billing import settlement, settlement_store
from portico.kit import queue
from portico.kit.queue import LeaseLost, Limits
from tests.control.billing.bookkeeping import (
    END,
    JANUARY,
    START,
    Sink,
    book,
    finance_event,
    january,
    line,
    make_sink,
    operator_client,
    receipt,
    reconcile_all,
)
from tests.control.conftest import MovableClock

GOLDEN = Path(__file__).parent / "settlements"
HISTORIES = GOLDEN / "histories"


@pytest.fixture
async def operator(app: Any, connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    return await operator_client(app, connect)


@pytest.fixture
async def sink(operator: httpx.AsyncClient, client: httpx.AsyncClient, clock: MovableClock) -> Sink:
    return await make_sink(operator, client, clock)


@pytest.fixture
async def account(app: Any, request: pytest.FixtureRequest) -> str:
    """An account of this test's own, with the books of January."""
    name = f"acct_{abs(hash(request.node.name)) % 10**12}"
    await january(app.state.db, name)
    return name


async def look(operator: httpx.AsyncClient, receipt_id: str) -> dict[str, Any]:
    answer = await operator.get(f"/v1/admin/settlements/{receipt_id}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def taken(app: Any, operator: httpx.AsyncClient, sink: Sink, body: dict[str, Any]) -> dict[str, Any]:
    """What became of a receipt that is accepted and compared."""
    answer = await sink.send(body)
    assert (answer.status_code, answer.json()["status"]) == (202, "accepted"), answer.text
    await reconcile_all(app)
    return await look(operator, answer.json()["receipt"])


async def adjustments(app: Any, account: str) -> list[tuple[str, int]]:
    """What was posted to the account of accepted differences."""
    query = """
        SELECT p.currency, p.amount_minor FROM ledger_postings AS p JOIN ledger_transactions AS t ON t.id = p.transaction_id
        WHERE t.kind = 'settlement.adjusted' AND t.provider_account = $1 AND p.account = 'settlement_adjustment' ORDER BY t.number
    """
    async with app.state.db.read() as reader:
        return [(row["currency"], row["amount_minor"]) for row in await reader.raw.fetch(query, account)]


async def refusals(app: Any, sink: str | None) -> list[dict[str, Any]]:
    async with app.state.db.read() as reader:
        c = audit_events.c
        query = sa.select(audit_events).where(
            c.action == "settlement.receive", c.outcome == "refused", c.target == sink
        )
        return [row.details for row in await reader.fetch_all(query.order_by(c.id))]


# -- what it comes to


async def test_matched(app: Any, operator: httpx.AsyncClient, sink: Sink, account: str) -> None:
    found = await taken(app, operator, sink, receipt(account, JANUARY))
    assert (found["state"], found["findings"], found["runs"]) == ("matched", {}, 1)
    assert found["deltas"] == {"EUR": {"delta_minor": 0, "delta_bps": 0}}
    assert found["report"]["currencies"][0]["ours"]["net"] == 30435


@pytest.mark.parametrize(
    "name", ["one_minor_unit_off", "missing_line", "extra_line", "refund_sign", "fee", "wrong_currency"]
)
async def test_golden_files_from_the_message_to_the_verdict(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str, name: str
) -> None:
    document = json.loads((GOLDEN / f"{name}.json").read_text())
    expected = document["expected"]
    found = await taken(
        app, operator, sink, receipt(account, document["receipt"]["lines"], totals=document["receipt"]["totals"])
    )
    assert (found["state"], found["reason"]) == (expected["verdict"], expected.get("reason"))
    if found["state"] == "delta":
        assert {k: [v["delta_minor"], v["delta_bps"]] for k, v in found["deltas"].items()} == expected["deltas"]
        assert found["report"]["findings"] == expected["findings"]


@pytest.mark.parametrize("name", sorted(path.stem for path in HISTORIES.glob("*.json")))
async def test_golden_histories(app: Any, operator: httpx.AsyncClient, sink: Sink, account: str, name: str) -> None:
    """What a batch comes to that is sent, sent again, changed, and compared again: each answer, and every version at the end."""
    document = json.loads((HISTORIES / f"{name}.json").read_text())
    ids: dict[str, str] = {}
    for step in document["steps"]:
        if "send" in step:
            told = step["send"]
            answer = await sink.send(receipt(account, told["lines"], "b1", told["issued"]), told["message"])
            told_us = answer.json()
            assert [answer.status_code, told_us.get("code", told_us["status"])] == step["answer"], step
            if answer.status_code < 300:
                ids.setdefault(answer.json()["receipt"], f"receipt {len(ids) + 1}")
                assert ids[answer.json()["receipt"]] == step["receipt"]
        elif "compare" in step:
            assert await reconcile_all(app) == step["compare"], step
        else:
            (again,) = [made for made, known in ids.items() if known == step["again"]]
            answer = await operator.post(f"/v1/admin/settlements/{again}/reconcile", json={"reason": "again"})
            assert [answer.status_code, answer.json().get("code")] == step["answer"]
    listed = (await operator.get("/v1/admin/settlements", params={"sink": sink.id})).json()["data"]
    members = ("revision", "state", "resolution", "runs", "findings", "deltas")
    assert {ids[each["id"]]: {member: each[member] for member in members} for each in listed} == document["expected"]
    for made, known in ids.items():
        runs = (await operator.get(f"/v1/admin/settlements/{made}/runs")).json()["data"]
        assert [each["verdict"] for each in reversed(runs)] == document["runs"][known]


async def test_unknown_period(app: Any, operator: httpx.AsyncClient, sink: Sink, account: str) -> None:
    earlier = {"period_start": "2025-11-01T00:00:00Z", "period_end": "2025-12-01T00:00:00Z"}
    found = await taken(app, operator, sink, receipt(account, JANUARY, **earlier))
    assert (found["state"], found["reason"]) == ("failed", "unknown_period")
    future = {"period_end": (app.state.clock.wall() + timedelta(days=40)).isoformat()}
    found = await taken(app, operator, sink, receipt(account, JANUARY, "b2", **future))
    assert (found["state"], found["reason"]) == ("failed", "unknown_period")


async def test_a_report_that_there_is_not(app: Any, operator: httpx.AsyncClient, sink: Sink, account: str) -> None:
    found = await taken(app, operator, sink, receipt(account, JANUARY, export_id="rex_none"))
    assert (found["state"], found["reason"]) == ("failed", "unknown_export")


async def test_another_mode_or_account_is_another_period(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    for change in ({"livemode": False}, {"account": f"{account}x"}):
        body = receipt(account, JANUARY, f"b{len(change)}{next(iter(change))}") | change
        assert (await taken(app, operator, sink, body))["reason"] == "unknown_period"


# -- once


async def test_the_same_again_is_a_duplicate(app: Any, operator: httpx.AsyncClient, sink: Sink, account: str) -> None:
    body = receipt(account, JANUARY)
    first = await sink.send(body, "msg_a")
    again = [await sink.send(body, "msg_a"), await sink.send(body, "msg_b")]
    assert [each.status_code for each in again] == [200, 200]
    assert {each.json()["receipt"] for each in again} == {first.json()["receipt"]}
    assert await reconcile_all(app) == 1
    listed = (await operator.get("/v1/admin/settlements", params={"sink": sink.id})).json()["data"]
    assert [(each["revision"], each["state"]) for each in listed] == [(1, "matched")]


async def test_many_at_once_are_one(app: Any, operator: httpx.AsyncClient, sink: Sink, account: str) -> None:
    body = receipt(account, JANUARY)
    answers = await asyncio.gather(*(sink.send(body, f"msg_{n % 3}") for n in range(9)))
    assert sorted(each.status_code for each in answers) == [200] * 8 + [202]
    assert len({each.json()["receipt"] for each in answers}) == 1


async def test_a_changed_batch_replaces_the_one_before(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    old = await taken(app, operator, sink, receipt(account, JANUARY))
    assert old["state"] == "matched"
    new = await taken(app, operator, sink, receipt(account, JANUARY[:-1], issued=1))
    assert (new["state"], new["revision"], new["findings"]) == ("delta", 2, {"missing": 1})
    old = await look(operator, old["id"])
    assert (old["state"], old["resolution"], old["superseded_by"]) == ("resolved", "superseded", new["id"])
    # What was matched once is not compared, accepted or disputed any more.
    refused = await operator.post(f"/v1/admin/settlements/{old['id']}/reconcile", json={"reason": "again"})
    assert (refused.status_code, refused.json()["code"]) == (409, "settlement.superseded")


async def test_versions_that_come_in_the_wrong_order(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    new = await taken(app, operator, sink, receipt(account, JANUARY, issued=2))
    late = await sink.send(receipt(account, JANUARY[:-1], issued=1))
    assert (late.status_code, late.json()["status"]) == (200, "superseded")
    assert await reconcile_all(app) == 0
    assert (await look(operator, new["id"]))["state"] == "matched"
    assert (await look(operator, late.json()["receipt"]))["superseded_by"] == new["id"]


async def test_contradictions_are_security_events(app: Any, sink: Sink, account: str) -> None:
    assert (await sink.send(receipt(account, JANUARY), "msg_a")).status_code == 202
    message = await sink.send(receipt(account, JANUARY[:-1], issued=1), "msg_a")
    assert (message.status_code, message.json()["code"]) == (409, "settlement.message_conflict")
    batch = await sink.send(receipt(account, JANUARY[:-1]), "msg_b")
    assert (batch.status_code, batch.json()["code"]) == (409, "settlement.batch_conflict")
    assert [each["code"] for each in await refusals(app, sink.id)] == [
        "settlement.message_conflict", "settlement.batch_conflict",
    ]  # fmt: skip


async def test_a_batch_stays_with_its_account(app: Any, operator: httpx.AsyncClient, sink: Sink, account: str) -> None:
    """What was accepted adjusted the clearing of one provider: another account's books know nothing of it."""
    found = await taken(app, operator, sink, receipt(account, JANUARY[:-1]))
    accepted = {"resolution": "accepted", "reason": "known"}
    assert (await operator.post(f"/v1/admin/settlements/{found['id']}/resolve", json=accepted)).status_code == 200
    for change in ({"account": f"{account}x"}, {"provider": "razorpay"}, {"livemode": False}):
        moved = await sink.send(receipt(account, JANUARY, issued=1) | change)
        assert (moved.status_code, moved.json()["code"]) == (409, "settlement.batch_conflict"), change
    assert (await look(operator, found["id"]))["resolution"] == "accepted"
    assert (await refusals(app, sink.id))[-1]["code"] == "settlement.batch_conflict"


async def test_batches_of_two_sinks_are_two(
    app: Any, operator: httpx.AsyncClient, client: httpx.AsyncClient, clock: MovableClock, sink: Sink, account: str
) -> None:
    other = await make_sink(operator, client, clock)
    body = receipt(account, JANUARY)
    first, second = await sink.send(body, "msg_a"), await other.send(body, "msg_a")
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["receipt"] != second.json()["receipt"]


# -- again


async def test_a_re_run_that_comes_to_the_same_adds_nothing(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    first = await taken(app, operator, sink, receipt(account, JANUARY[:-1]))
    for _ in range(3):
        again = await operator.post(f"/v1/admin/settlements/{first['id']}/reconcile", json={"reason": "again"})
        assert again.status_code == 202, again.text
        assert await reconcile_all(app) == 1
    found = await look(operator, first["id"])
    assert (found["state"], found["runs"], found["report"]) == ("delta", 1, first["report"])
    assert found["checked_at"] > first["checked_at"]


async def test_a_late_event_opens_it_again_and_history_is_kept(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    lines = [*JANUARY, line("ch_late", "payment", 700, 20)]
    found = await taken(app, operator, sink, receipt(account, lines))
    assert (found["state"], found["findings"]) == ("delta", {"extra": 1})
    assert await settlement.watch(app.state.db, app.state.settings, END) == 0
    late = finance_event("payment.succeeded", 700, account=account, payment_ref="ch_late", fee_minor=20)
    await book(app.state.db, late)
    # Two workers at once find it; it is opened once.
    both = await asyncio.gather(*(settlement.watch(app.state.db, app.state.settings, END) for _ in range(2)))
    assert sum(both) == 1
    await reconcile_all(app)
    found = await look(operator, found["id"])
    assert (found["state"], found["runs"], found["findings"]) == ("matched", 2, {})
    runs = (await operator.get(f"/v1/admin/settlements/{found['id']}/runs")).json()["data"]
    assert [(each["number"], each["verdict"], each["cause"]) for each in runs] == [
        (2, "matched", "late_event"), (1, "delta", "received"),
    ]  # fmt: skip


async def test_what_failed_is_opened_by_what_it_lacked(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str, clock: MovableClock
) -> None:
    """A receipt may be faster than every webhook of its period, and than the period's end by our clock."""
    state, unheard = app.state, f"{account}_unheard"
    early = await taken(app, operator, sink, receipt(unheard, JANUARY))
    assert (early["state"], early["reason"]) == ("failed", "unknown_period")
    ends = clock.wall() + timedelta(hours=1)
    soon = await taken(app, operator, sink, receipt(account, JANUARY, "b2", period_end=ends.isoformat()))
    assert (soon["state"], soon["reason"]) == ("failed", "unknown_period")
    lost = await taken(app, operator, sink, receipt(account, JANUARY, "b3", export_id="rex_none"))
    assert await settlement.watch(state.db, state.settings, END) == 0, "nothing came"
    await january(state.db, unheard)
    assert await settlement.watch(state.db, state.settings, END) == 1
    await reconcile_all(app)
    assert (await look(operator, early["id"]))["state"] == "matched"
    clock.advance(7200)
    assert await settlement.watch(state.db, state.settings, clock.wall()) == 1
    await reconcile_all(app)
    assert (await look(operator, soon["id"]))["state"] == "matched"
    assert await settlement.watch(state.db, state.settings, clock.wall()) == 0
    assert (await look(operator, lost["id"]))["state"] == "failed"


async def test_a_refund_whose_success_is_told_late_and_of_another_month(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    """It failed in January after it had succeeded in December: January gets its money back."""
    about = {"account": account, "refund_ref": "re_9", "payment_ref": "ch_9", "invoice_ref": None}
    await book(app.state.db, finance_event("refund.failed", 1000, status="failed", **about))
    found = await taken(app, operator, sink, receipt(account, [*JANUARY, line("re_9", "refund", 1000)]))
    assert (found["state"], found["findings"]) == ("delta", {"extra": 1})
    earlier = finance_event(
        "refund.succeeded", 1000, status="succeeded", **about, occurred_at=START - timedelta(days=5)
    )
    await book(app.state.db, earlier)
    assert await settlement.watch(app.state.db, app.state.settings, END) == 1
    await reconcile_all(app)
    assert (await look(operator, found["id"]))["state"] == "matched"
    assert await settlement.watch(app.state.db, app.state.settings, END) == 0


async def test_what_the_ledger_has_once_counts_once(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    for _ in range(2):  # two events of the provider's, and one payment
        await book(app.state.db, finance_event(
            "payment.succeeded", 700, account=account, payment_ref="ch_9", invoice_ref="in_9", fee_minor=20
        ))  # fmt: skip
    found = await taken(app, operator, sink, receipt(account, [*JANUARY, line("ch_9", "payment", 700, 20)]))
    assert (found["state"], found["findings"]) == ("matched", {})
    query = "SELECT count(*) FROM ledger_transactions WHERE provider_account = $1 AND payment_ref = 'ch_9'"
    async with app.state.db.read() as reader:
        assert await reader.raw.fetchval(query, account) == 1


async def test_history_cannot_be_changed(app: Any, operator: httpx.AsyncClient, sink: Sink, account: str) -> None:
    await taken(app, operator, sink, receipt(account, JANUARY))
    for statement in ("UPDATE billing_settlement_runs SET verdict = 'matched'", "DELETE FROM billing_settlement_runs"):
        with pytest.raises(asyncpg.RestrictViolationError):
            async with app.state.db.transaction() as tx:
                await tx.raw.execute(statement)


async def test_a_failed_receipt_is_taken_up_again_when_asked(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    unknown = f"{account}_new"
    found = await taken(app, operator, sink, receipt(unknown, JANUARY))
    assert found["state"] == "failed"
    await january(app.state.db, unknown)
    asked = await operator.post(
        "/v1/admin/settlements/reconcile",
        json={"reason": "the account was connected", "state": "failed", "sink": sink.id},
    )
    assert asked.json() == {"receipts": [found["id"]]}
    await reconcile_all(app)
    assert (await look(operator, found["id"]))["state"] == "matched"


async def test_a_worker_that_lost_its_lease_writes_nothing(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    answer = await sink.send(receipt(account, JANUARY))
    (slow,), _ = await queue.claim(app.state.db, settlement_store.KIND, Limits(lease_seconds=0.0), 1)
    (fast,), _ = await queue.claim(app.state.db, settlement_store.KIND, Limits(), 1, suspect=True)
    state = app.state
    await settlement.reconcile(fast, state.settings, state.sealer, state.clock)
    with pytest.raises(LeaseLost):
        await settlement.reconcile(slow, state.settings, state.sealer, state.clock)
    assert (await look(operator, answer.json()["receipt"]))["runs"] == 1


# -- closing a delta


async def test_accepting_a_delta_adjusts_the_ledger_once(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    found = await taken(app, operator, sink, receipt(account, JANUARY[:-1]))
    path = f"/v1/admin/settlements/{found['id']}"
    body = {"resolution": "accepted", "reason": "the bank has it in February"}
    answers = await asyncio.gather(*(operator.post(f"{path}/resolve", json=body) for _ in range(3)))
    assert sorted(each.status_code for each in answers) == [200, 409, 409]
    assert {each.json()["code"] for each in answers if each.status_code == 409} == {"settlement.state"}
    # They have 65.00 more than we: the dispute is not in it.
    assert await adjustments(app, account) == [("EUR", -6500)]
    closed = await look(operator, found["id"])
    assert (closed["state"], closed["resolution"], closed["adjusted"]) == ("resolved", "accepted", {"EUR": 6500})
    # The same difference again is settled.
    await operator.post(f"{path}/reconcile", json={"reason": "again"})
    await reconcile_all(app)
    assert (await look(operator, found["id"]))["state"] == "matched"
    assert await adjustments(app, account) == [("EUR", -6500)]


async def test_what_was_accepted_is_taken_back_when_both_agree_after_all(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    lines = [*JANUARY, line("ch_late", "payment", 700, 20)]
    found = await taken(app, operator, sink, receipt(account, lines))
    path = f"/v1/admin/settlements/{found['id']}/resolve"
    assert (await operator.post(path, json={"resolution": "accepted", "reason": "seen at the bank"})).status_code == 200
    await book(
        app.state.db, finance_event("payment.succeeded", 700, account=account, payment_ref="ch_late", fee_minor=20)
    )
    assert await settlement.watch(app.state.db, app.state.settings, END) == 1
    await reconcile_all(app)
    again = await look(operator, found["id"])
    assert (again["state"], again["deltas"]["EUR"]["delta_minor"], again["findings"]) == ("delta", -680, {})
    assert (await operator.post(path, json={"resolution": "accepted", "reason": "told late"})).status_code == 200
    assert await adjustments(app, account) == [("EUR", -680), ("EUR", 680)]
    assert (await look(operator, found["id"]))["adjusted"] == {"EUR": 0}


async def test_another_difference_of_the_same_size_is_not_the_accepted_one(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    await book(
        app.state.db, finance_event("payment.succeeded", 5000, account=account, payment_ref="ch_4", fee_minor=175)
    )
    whole = [*JANUARY, line("ch_4", "payment", 5000, 175)]
    without = [each for each in whole if each["ref"] != "ch_3"]
    found = await taken(app, operator, sink, receipt(account, without))
    path = f"/v1/admin/settlements/{found['id']}/resolve"
    assert (await operator.post(path, json={"resolution": "accepted", "reason": "known"})).status_code == 200
    other = [each for each in whole if each["ref"] != "ch_4"]
    new = await taken(app, operator, sink, receipt(account, other, issued=1))
    assert (new["state"], new["findings"]) == ("delta", {"missing": 1})


async def test_a_delta_that_is_accepted_while_its_batch_changes(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    """The new version waits for it, and knows what was adjusted for the batch."""
    found = await taken(app, operator, sink, receipt(account, JANUARY[:-1]))
    state = app.state
    async with state.db.transaction() as tx:
        await state.settlements.resolve(tx, settlement.PLATFORM, found["id"], "accepted", "known")
        sending = asyncio.create_task(
            sink.send(receipt(account, [*JANUARY[:-1], line("ch_9", "payment", 1)], issued=1))
        )
        async with asyncio.timeout(30), state.db.read() as reader:
            while not await reader.raw.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"):
                assert not sending.done(), sending.result().text
                await asyncio.sleep(0.01)
    answer = await sending
    assert (answer.status_code, answer.json()["status"]) == (202, "accepted"), answer.text
    await reconcile_all(app)
    new = await look(operator, answer.json()["receipt"])
    assert (new["state"], new["adjusted"], new["deltas"]["EUR"]["delta_minor"]) == ("delta", {"EUR": 6500}, 1)
    assert (await look(operator, found["id"]))["superseded_by"] == new["id"]


async def test_disputing_a_delta_writes_nothing(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    found = await taken(app, operator, sink, receipt(account, JANUARY[:-1]))
    answer = await operator.post(
        f"/v1/admin/settlements/{found['id']}/resolve", json={"resolution": "disputed", "reason": "asked the sink"}
    )
    assert (answer.json()["state"], answer.json()["resolution"]) == ("resolved", "disputed")
    assert await adjustments(app, account) == []


async def test_a_tolerance_is_of_the_sink_and_audited(
    app: Any, operator: httpx.AsyncClient, sink: Sink, account: str
) -> None:
    off = [{**JANUARY[0], "amount_minor": 11901}, *JANUARY[1:]]
    found = await taken(app, operator, sink, receipt(account, off))
    assert found["state"] == "delta"
    changed = await operator.patch(f"/v1/admin/settlement-sinks/{sink.id}", json={"tolerances": {"EUR": 1}})
    assert changed.json()["tolerances"] == {"EUR": 1}
    await operator.post(f"/v1/admin/settlements/{found['id']}/reconcile", json={"reason": "a cent is nothing"})
    await reconcile_all(app)
    assert (await look(operator, found["id"]))["state"] == "matched"
    async with app.state.db.read() as reader:
        c = audit_events.c
        row = await reader.fetch_one(
            sa.select(c.details).where(c.action == "settlement_sink.change", c.target == sink.id)
        )
    assert row is not None
    assert (row.details["tolerances"], row.details["before"]) == ({"EUR": 1}, {"tolerances": {}})


# -- who may say so


async def test_whoever_cannot_sign_learns_nothing(
    app: Any, client: httpx.AsyncClient, clock: MovableClock, sink: Sink, account: str
) -> None:
    body = receipt(account, JANUARY)
    other = Sink(client, "snk_none", sink.secret, clock)
    stranger = Sink(client, sink.id, "whsec_" + "A" * 44, clock)
    answers = [
        await other.send(body), await stranger.send(body), await sink.send(body, shift=-301), await sink.send(body, shift=301),
        await sink.send(body, webhook_signature="v1,AAAA"), await sink.send(body, webhook_id="msg_other"),
        await sink.send(body, webhook_timestamp="soon"), await sink.send(b"not JSON", webhook_signature=""),
        await client.post("/v1/billing/settlement-receipts", content=b"{}"),
    ]  # fmt: skip
    assert {(each.status_code, each.json()["code"], each.json()["detail"]) for each in answers} == {
        (401, "settlement.signature_invalid", answers[0].json()["detail"])
    }
    assert sum(app.state.settlements.refusals.values()) == len(answers)
    assert [each["reason"] for each in await refusals(app, sink.id)] == ["mismatch", "stale", "malformed", "missing"]
    assert await reconcile_all(app) == 0


async def test_a_body_that_does_not_fit_is_told_to_who_signed_it(sink: Sink, account: str) -> None:
    whole = receipt(account, JANUARY)
    for change in (
        {"surplus": 1}, {"lines": [{**JANUARY[0], "amount_minor": 1.5}]}, {"lines": [{**JANUARY[0], "currency": "eur"}]},
        {"period_end": START.isoformat()}, {"lines": None}, {"provider": "other"}, {"issued_at": "2026-01-01T00:00:00"},
        {"totals": [{"currency": "EUR"}, {"currency": "EUR"}]},
        # Each amount fits, and their sum is no number that could be hashed or posted.
        {"lines": [{**JANUARY[0], "ref": f"ch_{n}", "amount_minor": 9_000_000_000_000} for n in range(501)]},
    ):  # fmt: skip
        answer = await sink.send({**whole, **change})
        assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid"), change
    for raw in (b"[]", b"{", b'{"batch_id":"a","batch_id":"b"}', b'{"x":NaN}', b"[" * 5000):
        answer = await sink.send(raw)
        assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid"), raw[:30]


async def test_rotation_and_the_end_of_a_sink(
    app: Any, operator: httpx.AsyncClient, clock: MovableClock, sink: Sink, account: str
) -> None:
    body = receipt(account, JANUARY)
    rotated = await operator.post(f"/v1/admin/settlement-sinks/{sink.id}/rotate", json={"overlap_seconds": 60})
    assert (await sink.send(body)).status_code == 202, "the secret before is good for a while"
    clock.advance(61)
    assert (await sink.send(body)).status_code == 401
    sink.secret = rotated.json()["secret"]
    assert (await sink.send(body)).status_code == 200
    disabled = await operator.post(f"/v1/admin/settlement-sinks/{sink.id}/disable", json={"reason": "leaked"})
    assert disabled.json()["state"] == "disabled"
    assert (await sink.send(body)).status_code == 401
    assert (
        await operator.post(f"/v1/admin/settlement-sinks/{sink.id}/enable", json={"reason": "x"})
    ).status_code == 200
    assert (await sink.send(body)).status_code == 200


async def test_sinks_are_refused_clearly(operator: httpx.AsyncClient, sink: Sink) -> None:
    listed = (await operator.get("/v1/admin/settlement-sinks", params={"limit": 100})).json()["data"]
    (own,) = [each for each in listed if each["id"] == sink.id]
    assert "secret" not in own
    taken = await operator.post("/v1/admin/settlement-sinks", json={"name": own["name"]})
    assert (taken.status_code, taken.json()["code"]) == (409, "settlement.sink_name_taken")
    inner = await operator.post("/v1/admin/settlement-sinks", json={"name": "inner", "url": "https://169.254.169.254/"})
    assert (inner.status_code, inner.json()["code"]) == (400, "settlement.sink_invalid")
    for path in ("settlement-sinks/snk_none/rotate", "settlements/stl_none/reconcile"):
        gone = await operator.post(f"/v1/admin/{path}", json={"reason": "x"} if "settlements/" in path else {})
        assert (gone.status_code, gone.json()["code"]) == (
            404, "settlement.sink_not_found" if "sinks" in path else "settlement.not_found",
        )  # fmt: skip


async def test_asking_twice_while_it_waits(operator: httpx.AsyncClient, sink: Sink, account: str) -> None:
    answer = await sink.send(receipt(account, JANUARY))
    path = f"/v1/admin/settlements/{answer.json()['receipt']}/reconcile"
    again = await operator.post(path, json={"reason": "hurry"})
    assert (again.status_code, again.json()["code"]) == (409, "settlement.pending")


# -- providers' own lists


async def test_rows_of_a_provider_are_receipts(app: Any, operator: httpx.AsyncClient, account: str) -> None:
    def txn(kind: str, source: Any, amount: int, fee: int, **more: Any) -> dict[str, Any]:
        row = {"id": f"txn_{source}", "type": kind, "source": source, "amount": amount, "fee": fee, "currency": "eur"}
        return row | {"net": amount - fee, "reporting_category": kind, **more}

    rows = [
        txn("charge", "ch_1", 11900, 375), txn("charge", "ch_2", 23800, 715), txn("charge", "ch_3", 5000, 175),
        txn("refund", "re_1", -2500, 0), txn("adjustment", "du_1", -5000, 1500, reporting_category="dispute"),
        txn("payout", "po_1", -30435, 0),
    ]  # fmt: skip
    body = {
        "provider": "stripe", "account": account, "livemode": True, "batch_id": "po_1", "rows": rows,
        "period_start": START.isoformat(), "period_end": END.isoformat(),
    }  # fmt: skip
    first = await operator.post("/v1/admin/settlements/import", json=body)
    assert (first.status_code, first.json()["status"]) == (202, "accepted"), first.text
    again = await operator.post("/v1/admin/settlements/import", json=body)
    assert again.json() == {"receipt": first.json()["receipt"], "status": "duplicate"}
    other = body | {"batch_id": "po_2"}
    both = await asyncio.gather(*(operator.post("/v1/admin/settlements/import", json=other) for _ in range(4)))
    assert sorted(each.json().get("status", each.text) for each in both) == ["accepted", *["duplicate"] * 3], "at once"
    assert len({each.json()["receipt"] for each in both}) == 1
    await reconcile_all(app)
    assert (await look(operator, first.json()["receipt"]))["state"] == "matched"
    changed = await operator.post("/v1/admin/settlements/import", json=body | {"rows": rows[1:]})
    await reconcile_all(app)
    found = await look(operator, changed.json()["receipt"])
    assert (found["revision"], found["state"], found["findings"]) == (2, "delta", {"missing": 1})
    wrong = await operator.post("/v1/admin/settlements/import", json=body | {"rows": [{**rows[0], "net": 1}]})
    assert (wrong.status_code, wrong.json()["code"]) == (400, "settlement.import_invalid")
