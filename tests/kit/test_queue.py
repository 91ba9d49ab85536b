"""Queues on a real database, statement by statement: leases, tokens, attempts, death and replay."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.kit import queue
from portico.kit.db import Database
from portico.kit.queue import Kind, LeaseLost, Limits, Work

LIMITS = Limits(lease_seconds=30, max_attempts=3, backoff_seconds=1, backoff_max_seconds=8)


@pytest.fixture
async def kind(db: Database, request: pytest.FixtureRequest) -> Kind:
    """A kind of this test's own with one job."""
    made = queue.plain(request.node.name[:60].replace("[", ".").replace("]", ""))
    await put(db, made, "one")
    return made


async def put(db: Database, kind: Kind, *keys: str) -> None:
    async with db.transaction() as tx:
        for key in keys:
            await queue.enqueue(tx, kind, key)


async def take(db: Database, kind: Kind, *, suspect: bool = False, limits: Limits = LIMITS) -> Work:
    (work,), dead = await queue.claim(db, kind, limits, 1, suspect=suspect)
    assert not dead
    return work


async def row(db: Database, kind: Kind, key: str = "one") -> Any:
    async with db.read() as reader:
        return await reader.raw.fetchrow("SELECT * FROM queue_jobs WHERE kind = $1 AND key = $2", kind.name, key)


async def sql(db: Database, text: str, *values: Any) -> None:
    async with db.transaction() as tx:
        await tx.raw.execute(text, *values)


async def expire(db: Database, kind: Kind) -> None:
    await sql(db, "UPDATE queue_jobs SET available_at = now() - interval '1 s' WHERE kind = $1", kind.name)


async def test_a_job_is_claimed_once_and_finished_with_its_token(db: Database, kind: Kind) -> None:
    work = await take(db, kind)
    assert (work.attempt, work.row["key"]) == (1, "one")
    assert await queue.claim(db, kind, LIMITS, 9) == ([], [])
    async with work.done() as tx:
        await tx.raw.execute("SELECT 1")
    found = await row(db, kind)
    assert (found["queue_state"], found["lease_token"]) == ("done", None) and found["finished_at"] is not None
    assert work.finished


async def test_claims_at_once_share_the_jobs(db: Database, kind: Kind) -> None:
    await put(db, kind, *(str(n) for n in range(40)))
    claims = await asyncio.gather(*(queue.claim(db, kind, LIMITS, 10) for _ in range(8)))
    ids = [work.id for live, _ in claims for work in live]
    assert len(ids) == len(set(ids)) and len(ids) >= 20


async def _step(work: Work) -> None:
    async with work.step():
        pass


async def _done(work: Work) -> None:
    async with work.done() as tx:
        await tx.raw.execute("UPDATE queue_jobs SET last_error = 'written by an expired worker' WHERE id = $1", work.id)


@pytest.mark.parametrize("end", [_step, _done])
async def test_an_expired_worker_changes_nothing(
    db: Database, kind: Kind, end: Callable[[Work], Awaitable[None]]
) -> None:
    late = await take(db, kind)
    await expire(db, kind)
    heir = await take(db, kind, suspect=True)
    assert heir.attempt == 2
    with pytest.raises(LeaseLost):
        await end(late)
    assert await queue.finish(db, kind, [late]) == set()
    assert not await queue.fail(late, "late", 0, dead=True)
    await queue.give_back(db, kind, [late])
    assert await queue.renew(db, kind, LIMITS, [late, heir]) == {late.id}
    found = await row(db, kind)
    assert (found["queue_state"], found["lease_token"], found["last_error"]) == ("pending", heir.token, None)
    assert await queue.finish(db, kind, [late, heir]) == {heir.id}


async def test_a_lease_that_ran_out_unnoticed_is_still_good_to_finish(db: Database, kind: Kind) -> None:
    work = await take(db, kind)
    await expire(db, kind)
    async with work.step():
        pass
    assert (await row(db, kind))["available_at"] > (await row(db, kind))["queued_at"]
    assert await queue.claim(db, kind, LIMITS, 1, suspect=True) == ([], []), "a step prolongs the lease"
    assert await queue.finish(db, kind, [work]) == {work.id}


async def test_a_renewal_passes_by_a_step_that_is_open(db: Database, kind: Kind) -> None:
    work = await take(db, kind)
    async with work.step() as tx:
        await tx.raw.execute("SELECT 1 FROM queue_jobs WHERE id = $1 FOR UPDATE", work.id)
        async with asyncio.timeout(30):
            assert await queue.renew(db, kind, LIMITS, [work]) == set()


async def test_attempts_end_in_death_and_replay_gives_them_back(db: Database, kind: Kind) -> None:
    for _ in range(2):
        assert await queue.fail(await take(db, kind), "boom \0", 0, dead=False)
    assert await queue.fail(await take(db, kind), "boom", 0, dead=True)
    async with db.read() as reader:
        assert (await queue.count(reader, kind)).dead == 1
        (found,) = await queue.dead(reader, kind, error="boo")
        assert not await queue.dead(reader, kind, error="other") and not await queue.dead(reader, kind, ids=["none"])
    assert await queue.claim(db, kind, LIMITS, 1) == ([], [])
    async with db.transaction() as tx:
        assert await queue.replay(tx, kind, [found["id"]]) == [found["id"]]
        assert await queue.replay(tx, kind, [found["id"]]) == []
    assert (await take(db, kind)).attempt == 1


async def test_attempts_that_nobody_recorded_count(db: Database, kind: Kind) -> None:
    for number in range(3):
        await take(db, kind, suspect=number > 0)
        await expire(db, kind)
        assert await queue.suspects(db, kind)
    live, (dead,) = await queue.claim(db, kind, LIMITS, 1, suspect=True)
    assert not live and dead["queue_state"] == "dead" and "worker ended" in dead["last_error"]


async def test_a_job_given_back_has_lost_no_attempt(db: Database, kind: Kind) -> None:
    await queue.give_back(db, kind, [await take(db, kind)])
    assert (await take(db, kind)).attempt == 1


async def test_one_key_is_one_job(db: Database, kind: Kind) -> None:
    work = await take(db, kind)
    await put(db, kind, "one", "one")
    assert (await row(db, kind))["lease_token"] == work.token, "a job in hand counts as asked for"
    await queue.finish(db, kind, [work])
    await put(db, kind, "one")
    assert (await take(db, kind)).attempt == 1


async def test_a_job_is_announced_when_it_is_committed(db: Database, kind: Kind) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    listener = await db.connect("test", timeout_seconds=5)
    await listener.add_listener(queue.CHANNEL, lambda *said: heard.put_nowait(str(said[3])))
    with pytest.raises(ZeroDivisionError):
        async with db.transaction() as tx:
            await queue.enqueue(tx, kind, "never")
            raise ZeroDivisionError
    await put(db, kind, "two")
    async with asyncio.timeout(30):
        assert await heard.get() == kind.name and heard.empty()
    await listener.close()


async def test_nothing_calls_out_in_a_transaction(db: Database, kind: Kind) -> None:
    work = await take(db, kind)
    async with work.call() as key:
        assert key == f"{kind.name}:{work.id}"
    for around in (work.step, db.transaction, work.done):
        with pytest.raises(RuntimeError, match="transaction is open"):
            async with around(), work.call():
                pass
    async with work.call():  # and after those, which were rolled back, it may again
        pass
    with pytest.raises(RuntimeError, match="transaction is open"):
        async with db.transaction():
            await asyncio.create_task(work.call().__aenter__())  # a task inherits it


@pytest.mark.parametrize("held", ["leased", "failed", "fresh"])
async def test_a_clock_that_was_set_back_holds_nothing_up(db: Database, kind: Kind, held: str) -> None:
    if held != "fresh":
        work = await take(db, kind)
        if held == "failed":
            await queue.fail(work, "x", 1, dead=False)
    assert await queue.mend(db, kind) == 0
    before = await row(db, kind)
    shift = (
        "UPDATE queue_jobs SET queued_at = queued_at + $2, available_at = available_at + $2, moved_at = moved_at + $2"
        " WHERE kind = $1"
    )
    await sql(db, shift, kind.name, timedelta(minutes=10))
    assert await queue.mend(db, kind) == 1
    after = await row(db, kind)
    assert after["available_at"] - after["moved_at"] == before["available_at"] - before["moved_at"], (
        "as long as was meant"
    )
    assert after["available_at"] - before["available_at"] < timedelta(minutes=1)
    assert await queue.mend(db, kind) == 0


async def test_another_lease_setting_is_no_clock_that_was_set_back(db: Database, kind: Kind) -> None:
    """Beside a process with a shorter lease, and shorter pauses, another's job stays its own."""
    await take(db, kind, limits=Limits(lease_seconds=3600))
    assert await queue.mend(db, kind) == 0
    assert await queue.claim(db, kind, LIMITS, 1, suspect=True) == ([], [])


async def test_a_time_that_was_asked_for_is_kept(db: Database, kind: Kind) -> None:
    await sql(db, "UPDATE queue_jobs SET available_at = now() + interval '1 day' WHERE kind = $1", kind.name)
    assert await queue.mend(db, kind) == 0
    async with db.read() as reader:
        assert (await queue.count(reader, kind)).later == 1


async def ends_well(db: Database, work: Work) -> None:
    async with work.done():
        pass


async def ends_with_others(db: Database, work: Work) -> None:
    assert await queue.finish(db, work.kind, [work]) == {work.id}


async def dies(db: Database, work: Work) -> None:
    assert await queue.fail(work, "x", 60, dead=True)


@pytest.mark.parametrize("end", [ends_well, ends_with_others, dies])
async def test_what_is_asked_for_while_it_is_at_work_is_done_once_more(
    db: Database, kind: Kind, end: Callable[[Database, Work], Awaitable[None]]
) -> None:
    work = await take(db, kind)
    await put(db, kind, "one", "one")
    assert await queue.claim(db, kind, LIMITS, 1) == ([], []), "not beside itself"
    await end(db, work)
    again = await take(db, kind)
    assert (again.id, again.attempt) == (work.id, 1)
    await end(db, again)
    assert await queue.claim(db, kind, LIMITS, 1) == ([], []), "once"
    assert (await row(db, kind))["queue_state"] == ("dead" if end is dies else "done")


async def test_what_will_run_anyway_is_not_run_twice_for_being_asked_for(db: Database, kind: Kind) -> None:
    await put(db, kind, "one")  # it waits
    work = await take(db, kind)
    await put(db, kind, "one")
    assert await queue.fail(work, "x", 0, dead=False)
    work = await take(db, kind)
    assert work.attempt == 2, "the next attempt is the one that was asked for"
    await put(db, kind, "one")
    await queue.give_back(db, kind, [work])
    await ends_well(db, await take(db, kind))
    assert await queue.claim(db, kind, LIMITS, 1) == ([], [])


async def test_a_request_and_a_worker_take_their_locks_in_one_order(db: Database, kind: Kind) -> None:
    """Both record an act in one chain and touch one job: neither waits for the other while it is waited for."""
    work = await take(db, kind)
    who = Caller("operator", "installation", None, platform_operator=True)
    enqueued = asyncio.Event()

    async def request() -> None:
        async with db.transaction() as tx:
            await audit.record(tx, who, "test.act", "one")
            await queue.enqueue(tx, kind, "one")  # the job's row is locked from here on
            enqueued.set()
            await asyncio.sleep(0.3)  # the worker is at its last statements by now

    async def job() -> None:
        await enqueued.wait()
        async with work.done() as tx:
            await audit.record(tx, who, "test.act", "two")

    async with asyncio.timeout(30):
        await asyncio.gather(request(), job())
    assert (await take(db, kind)).attempt == 1


def test_pauses_double_to_a_bound_and_are_spread() -> None:
    for attempt, bound in ((1, 1), (2, 2), (3, 4), (4, 8), (9, 8), (4000, 8)):
        drawn = [LIMITS.pause(attempt) for _ in range(200)]
        assert 0 <= min(drawn) < bound / 4 and bound / 2 < max(drawn) <= bound


def test_a_ladder_has_its_rungs_and_a_little_more() -> None:
    limits = Limits(ladder=(5, 300, 1800))
    for attempt, rung in ((1, 5), (2, 300), (3, 1800), (9, 1800)):
        drawn = [limits.pause(attempt) for _ in range(100)]
        assert rung <= min(drawn) < max(drawn) <= rung * 1.1 <= limits.longest


def test_what_tells_kinds_apart_is_a_word() -> None:
    with pytest.raises(ValueError, match="tell kinds apart"):
        _ = queue.plain("x' OR true --").sql
