"""Turns between lanes, on a real database: whose jobs are claimed when one lane has thousands and another has one."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from portico.kit import outbox, queue
from portico.kit.db import Database
from portico.kit.queue import Kind, Limits, Turn, Work
from portico.kit.queue_runner import KindRunner, Pace, Served
from portico.kit.queue_turns import Turns

LIMITS = Limits(concurrency=8, lane_places=2, group_places=4, lease_seconds=30)


async def fill(db: Database, kind: Kind, lanes: dict[str, int], late: int = 0) -> None:
    async with db.transaction() as tx:
        for lane, count in lanes.items():
            await tx.raw.execute(
                "INSERT INTO outbox_messages (id, driver, idempotency_key, recipient, topic, lane, available_at)"
                " SELECT concat_ws('.', $1::text, $2::text, n), $1, concat_ws('.', $1, $2, n), 'r', 't', $2,"
                " now() + make_interval(secs => $4)"
                " FROM generate_series(1, $3) AS n",
                kind.where["driver"], lane, count, late,
            )  # fmt: skip


def lanes_of(found: list[Work]) -> list[str]:
    return sorted(work.row["lane"] for work in found)


async def test_a_claim_goes_round(db: Database) -> None:
    kind = outbox.kind("round")
    await fill(db, kind, {"org_a/1": 500, "org_b/1": 1, "org_c/1": 3, "-": 2})
    found, _ = await queue.claim(db, kind, LIMITS, 4, turn=Turn())
    assert lanes_of(found) == ["-", "org_a/1", "org_b/1", "org_c/1"]
    found, _ = await queue.claim(db, kind, LIMITS, 4, turn=Turn("org_a/1", 2))
    assert lanes_of(found) == ["org_c/1", "org_c/1"], "from where it was left"
    found, _ = await queue.claim(db, kind, LIMITS, 9, turn=Turn("", 1, ["-"], ["org_a"]))
    assert lanes_of(found) == []


async def test_ten_thousand_of_one_delay_nobody(db: Database) -> None:
    kind = outbox.kind("many")
    await fill(db, kind, {"org_a/1": 10_000})
    await fill(db, kind, {f"org_later/{n}": 20 for n in range(100)}, late=3600)
    await fill(db, kind, {"org_b/1": 1})
    found, _ = await queue.claim(db, kind, LIMITS, 2, turn=Turn())
    assert lanes_of(found) == ["org_a/1", "org_b/1"]
    async with db.transaction() as tx:
        await tx.raw.execute("ANALYZE outbox_messages")
        values = 2, 30.0, 3, False, "", 1, list[str](), list[str]()
        plan = await tx.raw.fetch("EXPLAIN (ANALYZE, FORMAT TEXT) " + kind.sql.claim, *values)
    text = "\n".join(row[0] for row in plan)
    assert "outbox_messages_turns_ix" in text and "Seq Scan" not in text, text


def work(lane: str) -> Work:
    class Held:
        row = {"lane": lane}  # noqa: RUF012

    return Held()  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("held", "count", "each", "lanes", "groups"),
    [
        ([], 4, 2, [], []),
        (["a/1"], 3, 1, [], []),
        (["a/1", "a/1"], 2, 2, ["a/1"], []),
        (["a/1", "a/1", "a/2"], 1, 1, ["a/1"], []),
        (["a/1", "a/1", "a/2", "a/2"], 4, 2, ["a/1", "a/2"], ["a"]),
        (["a/1", "a/1", "a/2", "a/2", "b"], 3, 1, ["a/1", "a/2"], ["a"]),
    ],
)
def test_no_claim_can_exceed_the_places(
    held: list[str], count: int, each: int, lanes: list[str], groups: list[str]
) -> None:
    asked, turn = Turns("lane", LIMITS).next([work(lane) for lane in held], 8)
    assert (asked, turn.each, list(turn.full_lanes), list(turn.full_groups)) == (count, each, lanes, groups)


async def test_a_receiver_that_hangs_holds_its_places_alone(db: Database) -> None:
    kind = outbox.kind("hanging")
    stuck = {f"org_a/{n}": 50 for n in range(10)}
    await fill(db, kind, stuck | {"org_b/1": 5, "org_c/1": 5, "-": 5})
    at_work: Counter[str] = Counter()
    most: Counter[str] = Counter()
    release, done = asyncio.Event(), list[str]()

    async def act(work: Work) -> None:
        lane = work.row["lane"]
        for name in {lane, lane.partition("/")[0]}:
            at_work[name] += 1
            most[name] = max(most[name], at_work[name])
        if lane.startswith("org_a"):
            await release.wait()
        for name in {lane, lane.partition("/")[0]}:
            at_work[name] -= 1
        done.append(lane)

    stopping = asyncio.Event()
    runner = KindRunner(Served(kind, act, LIMITS), db, stopping, Pace(0.5, 60))
    task = asyncio.create_task(runner.run(1.0))
    async with asyncio.timeout(30):
        while Counter(done) != {"org_b/1": 5, "org_c/1": 5, "-": 5}:
            await asyncio.sleep(0.01)
    assert most["org_a"] == 4 and max(most[lane] for lane in stuck) <= 2
    release.set()
    async with asyncio.timeout(30):
        while len(done) < 515:
            await asyncio.sleep(0.01)
    stopping.set()
    await task
    assert len(done) == 515 and most["org_a"] <= 4 and max(most[lane] for lane in stuck) <= 2
