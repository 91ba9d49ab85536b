"""Paying, on the whole platform: what is bought reaches live tunnels; workers are killed in the middle, several are at work at
once, and providers send twice, late, in another order, badly signed or not at all: nothing is lost, and nothing happens twice.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from portico.embedded.folders import temp_home
from portico.embedded.postgres import EmbeddedPostgres
from tests.system.billing_world import PATIENCE, PROVIDERS, Buyer, World
from tests.system.platform import Agent
from tests.system.targets import Request, app, port_of
from tests.system.visitor import Poller, connected, request

pytestmark = pytest.mark.system

#: Requests that one tunnel of the plan `free` takes at once.
FREE = 20
#: Of every kind; counts are used up, the rest lasts.
FAULTS: dict[str, float] = {
    "duplicates": 2, "reorder": 2, "delay": 0.02, "wrong_signature": 3, "api_count": 2, "api_lost": 1
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = temp_home("portico-billing-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        yield World(home, tmp_path_factory.mktemp("billing"), stack)


async def held(request: Request) -> None:
    """A request that lasts."""
    await request.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: here\n\n")
    await request.reader.read()


async def answers(poller: Poller, what: str, since: float, why: str) -> float:
    """Seconds until visitors get this."""
    async with asyncio.timeout(PATIENCE):
        while not any(visit.what == what for visit in poller.since(since)):
            await asyncio.sleep(0.02)
    found = min(visit.ended for visit in poller.since(since) if visit.what == what) - since
    print(f"{why}: {found * 1000:.0f} ms")
    return found


def by_all_means(world: World, provider: str) -> None:
    """What was held, what was refused and what was never sent arrives after all."""
    world.sim(provider, "flush")
    world.sim(provider, "clock", {"advance": 120})  # refused ones are tried again after ten seconds and after a minute
    world.faults(provider)
    world.reconcile(provider)


async def test_what_is_bought_reaches_a_live_tunnel(
    world: World, target: socket.socket, folder: Path, started: ExitStack
) -> None:
    """Two workers, every webhook twice more and in another order, the first two signed by somebody else, the provider's API
    stumbling: the tunnel takes more while its visitors stand there; and less again when it is over."""
    world.work(2)
    buyer = await asyncio.to_thread(Buyer, world, "stripe")
    agent = Agent(buyer.account, folder, port_of(target), "paying")
    started.callback(agent.end)
    async with app(target, events=held), AsyncExitStack() as streams:
        await agent.is_online()
        for _ in range(FREE):
            stream = await streams.enter_async_context(connected(world.up.http_port))
            await stream.send(request("paying.localhost", "/events"))
            assert (await stream.answer_head()).status == 200
        async with Poller(world.up.http_port, "paying.localhost", rate=10) as poller:
            await answers(poller, "edge.concurrency_exceeded", time.monotonic(), "refused on the plan free")
            world.faults("stripe", **FAULTS)
            paid = time.monotonic()
            await asyncio.to_thread(buyer.order)
            await asyncio.to_thread(by_all_means, world, "stripe")
            await answers(poller, "hello", paid, "from the payment to the tunnel, under faults")
            await asyncio.to_thread(world.settle)
            at = time.monotonic()
            await answers(poller, "hello", at, "still there")
            assert {visit.what for visit in poller.since(at)} == {"hello"}
            at = time.monotonic()
            await asyncio.to_thread(buyer.cancel)
            await answers(poller, "edge.concurrency_exceeded", at, "from the cancellation to the tunnel")
    assert agent.process.poll() is None, "it was one session all the time"
    await asyncio.to_thread(world.settle)
    await asyncio.to_thread(world.check_books)


# -- kills ---------------------------------------------------------------------------------------------------------------

#: Who writes one of these waits inside of that transaction for as long as a drill holds its lock.
_POINTS = {
    "event": "INSERT ON billing_finance_events",
    "posting": "INSERT ON ledger_postings",
    "note": "UPDATE ON billing_credit_notes",
    "applied": "UPDATE ON billing_webhook_events|NEW.status = 'applied'",
    "notice": "INSERT ON outbox_messages|NEW.topic LIKE 'dunning.%'",
    "delivered": "UPDATE ON outbox_messages|NEW.topic LIKE 'dunning.%' AND NEW.queue_state = 'done'",
    "report": "UPDATE ON billing_report_exports|NEW.state = 'ready' AND OLD.state <> 'ready'",
    "call": "UPDATE ON billing_calls|NEW.act = 'cancel' AND NEW.queue_state = 'done'",
}
_FUNCTION = """
CREATE OR REPLACE FUNCTION drill_billing() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_advisory_xact_lock_shared(816, hashtext(TG_ARGV[0]));
    RETURN NULL;
END $$
"""
_WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 816 AND NOT granted"


class Drill:
    """Holds a point of the way, and says when somebody stands at it with nothing recorded."""

    def __init__(self, world: World, connection: asyncpg.Connection) -> None:
        self._world, self._connection = world, connection

    @classmethod
    @asynccontextmanager
    async def at(cls, world: World) -> AsyncIterator[Drill]:
        connection = await asyncpg.connect(EmbeddedPostgres(world.up.home).uri)
        try:
            await connection.execute(_FUNCTION)
            for point, where in _POINTS.items():
                table, _, when = where.partition("|")
                when = f" WHEN ({when})" if when else ""
                await connection.execute(
                    f"CREATE TRIGGER drill_{point} AFTER {table} FOR EACH ROW{when} EXECUTE FUNCTION drill_billing('{point}')"
                )
            yield cls(world, connection)
            for point, where in _POINTS.items():
                table = where.partition("|")[0].rpartition(" ")[2]
                await connection.execute(f"DROP TRIGGER drill_{point} ON {table}")
        finally:
            connection.terminate()  # what it held is free

    async def kills(self, point: str, act: Callable[[], Any]) -> None:
        """Every worker, while one of them stands at the point that ``act`` leads to."""
        await self._connection.fetchval("SELECT pg_advisory_lock(816, hashtext($1))", point)
        await asyncio.to_thread(act)
        async with asyncio.timeout(PATIENCE):
            while not await self._connection.fetchval(_WAITING):
                await asyncio.sleep(0.02)
        await asyncio.to_thread(self._world.kill_workers)
        await self._connection.fetchval("SELECT pg_advisory_unlock(816, hashtext($1))", point)
        self._world.work(2)


@pytest.fixture(scope="module")
def payers(world: World) -> dict[str, Buyer]:
    """One with each provider, on a plan that is paid."""
    made = {provider: Buyer(world, provider) for provider in PROVIDERS}
    for buyer in made.values():
        buyer.listen()
        buyer.order()
    for buyer in made.values():
        buyer.has("pro")
    return made


async def test_workers_are_killed_in_the_middle(world: World, payers: dict[str, Buyer]) -> None:
    world.work(2)
    stripe, razorpay, paypal = payers.values()
    async with Drill.at(world) as drill:
        for point, buyer in (("event", stripe), ("posting", razorpay), ("note", paypal), ("applied", stripe)):
            before = await asyncio.to_thread(buyer.refunded)
            await drill.kills(point, lambda buyer=buyer: buyer.refund(100))
            await asyncio.to_thread(
                world.until, lambda b=buyer, n=before: b.refunded() == n + 1, f"the refund after {point}"
            )
        await drill.kills("notice", lambda: fail(stripe))
        await asyncio.to_thread(world.until, lambda: stripe.subscription()["owing"], "a dunning case")
        await asyncio.to_thread(world.settle)
        await drill.kills("delivered", lambda: recover(stripe))
        await asyncio.to_thread(world.until, lambda: not stripe.subscription()["owing"], "its end")
        await drill.kills("report", lambda: stripe.call("POST", "/billing/report-exports", {"dataset": "ledger"}))
        await asyncio.to_thread(world.until, lambda: reports(world) == [("ready", True)], "the report")
        # Of PayPal's, which ends no subscription with its period, we do it: it is asked, and the answer is lost with the worker.
        await asyncio.to_thread(paypal.cancel, at_period_end=True)
        due = "UPDATE billing_calls SET available_at = now() WHERE queue_state = 'pending' RETURNING id"
        await drill.kills("call", lambda: world.sql(due))
        await asyncio.to_thread(paypal.has, "free")
    await asyncio.to_thread(world.settle)
    await asyncio.to_thread(world.check_books)
    await asyncio.to_thread(world.check_messages)
    query = "SELECT topic, driver, count(*) AS n FROM outbox_messages WHERE topic LIKE 'dunning.%' GROUP BY 1, 2 ORDER BY 1, 2"
    told = [tuple(row) for row in await asyncio.to_thread(world.sql, query)]
    assert told == [
        ("dunning.advanced", "mail", 1), ("dunning.advanced", "webhook", 1), ("dunning.recovered", "mail", 1),
        ("dunning.recovered", "webhook", 1),
    ]  # fmt: skip


def fail(buyer: Buyer) -> None:
    """Its next period is not paid."""
    buyer.card("declines")
    buyer.period_is_over()


def recover(buyer: Buyer) -> None:
    """The provider tries again, and it goes well."""
    buyer.card("good")
    buyer.world.sim(buyer.provider, "clock", {"advance": 4 * 86_400})


def reports(world: World) -> list[tuple[str, bool]]:
    rows = world.sql("SELECT state, sha256 IS NOT NULL AS whole FROM billing_report_exports")
    return [(row["state"], row["whole"]) for row in rows]


def delivered(world: World, buyers: list[Buyer]) -> list[tuple[Any, ...]]:
    """Reports of theirs: how they stand, and how often they went on their way."""
    query = "SELECT state, delivery FROM billing_report_exports WHERE organization_id = ANY($1)"
    return [tuple(row) for row in world.sql(query, [buyer.organization for buyer in buyers])]


# -- everybody at once ---------------------------------------------------------------------------------------------------


def test_five_workers_at_once_under_every_fault(world: World, payers: dict[str, Buyer]) -> None:
    """Three providers, two customers each: bought, not paid, paid after all, partly given back, ended."""
    world.work(5)
    more = [Buyer(world, provider) for provider in PROVIDERS for _ in range(2)]
    for buyer in more:
        buyer.listen()
    for provider in PROVIDERS:
        world.faults(provider, **FAULTS, lose=2)
    with ThreadPoolExecutor(len(more)) as pool:

        def everybody(act: Callable[[Buyer], Any], buyers: list[Buyer] = more) -> None:
            list(pool.map(act, buyers))

        everybody(Buyer.order)
        list(pool.map(lambda provider: by_all_means(world, provider), PROVIDERS))
        everybody(lambda buyer: buyer.has("pro"))
        # A page that was paid is completed, also where its webhook was lost and the provider's list does not tell of it.
        pages = (
            "SELECT c.provider, c.state FROM billing_checkouts c JOIN billing_subscriptions s"
            " USING (provider, account, livemode) WHERE s.ref = c.subscription_ref AND s.status = 'active'"
        )
        assert {row["state"] for row in world.sql(pages)} == {"completed"}
        for provider in PROVIDERS:
            world.faults(provider, **FAULTS)
        everybody(lambda buyer: buyer.refund(150))
        world.kill_workers()
        world.work(5)
        everybody(lambda buyer: buyer.card("declines"))
        list(pool.map(Buyer.period_is_over, more[::2]))
        everybody(lambda buyer: buyer.card("good"))
        list(pool.map(lambda provider: world.sim(provider, "clock", {"advance": 6 * 86_400}), PROVIDERS))
        list(pool.map(lambda provider: by_all_means(world, provider), PROVIDERS))
        world.settle()
        everybody(lambda buyer: world.until(lambda: not buyer.subscription()["owing"], "what was owed is paid"))
        # A failure that is told of after its payment opens none.
        cases = "SELECT state FROM billing_dunning_cases WHERE organization_id = ANY($1)"
        found = [row["state"] for row in world.sql(cases, [buyer.organization for buyer in more])]
        assert 0 < len(found) <= len(more) and set(found) == {"recovered"}
        everybody(Buyer.report)
        everybody(Buyer.cancel)
        everybody(lambda buyer: buyer.has("free"))
    world.settle()
    assert world.replay() > 40
    world.settle()
    states = [(buyer.provider, buyer.subscription()["status"], buyer.refunded()) for buyer in more]
    assert states == [(buyer.provider, "canceled", 1) for buyer in more]
    world.check_books()
    world.check_messages()
    assert delivered(world, more) == [("delivered", 1)] * len(more)
