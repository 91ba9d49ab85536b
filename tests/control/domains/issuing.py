"""Certificates had for real: Pebble, its DNS, a relay on real sockets that follows the edge change table, and mortal workers."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portico.control import changes
from portico.control.domains import acme_cas, acme_orders, acme_schedule, acme_store, jobs_acme
from portico.control.domains.acme_client import Client
from portico.kit import keyfiles, queue
from portico.kit.db import Database
from portico.kit.queue import Limits, Work
from portico.kit.queue_runner import KindRunner, Pace, Served
from portico.kit.sealing import new_master_key
from portico.relay.server import Relay
from portico.settings import ApiSettings, RelaySettings, Secret, WorkerSettings
from tests.control.domains.certificates import domain, rows
from tests.pebble import Pebble
from tests.relay.doubles import KEY, port

_names = itertools.count(1)
_MASTER_KEY = new_master_key()
#: Attempts follow each other at once: what is waited for is an event.
LIMITS = Limits(
    concurrency=8, lease_seconds=10.0, max_attempts=12, backoff_seconds=0.05, backoff_max_seconds=1.0, lane_places=8,
    group_places=8,
)  # fmt: skip


@contextlib.asynccontextmanager
async def relay(folder: Path) -> AsyncIterator[Relay]:
    """A relay that knows nothing, on free ports."""
    settings = RelaySettings(
        relay_key=Secret("tnl_rly_unused"), api_url="http://127.0.0.1:9", state_dir=folder / "relay", public_port=0,
        https_port=0, control_port=0, exempt_loopback=True, hold_seconds=0.0,
    )  # fmt: skip
    made = Relay(settings)
    state = {"keys": [KEY.public_jwk()], "tunnels": [], "ended": []}
    made.snapshot.apply({"type": "snapshot", "version": 0, "state": state})
    await made.start()
    yield made
    await made.stop()


@dataclass
class Edge:
    """Brings the relay what the control plane says, and the control plane what the relay has applied."""

    db: Database
    relay: Relay
    name: str = "relay-1"
    #: While it is set the relay hears nothing.
    deaf: bool = False

    async def follow(self) -> None:
        async with self.db.read() as reader:
            self.relay.snapshot.version = await changes.newest(reader)
        while True:
            if not self.deaf:
                await self._catch_up()
            await self._beat()
            await asyncio.sleep(0.02)

    async def _catch_up(self) -> None:
        version = self.relay.snapshot.version
        assert version is not None
        async with self.db.read() as reader:
            for entry in await changes.after(reader, version, 100) or []:
                self.relay.snapshot.apply(
                    {"type": "delta", "version": entry.version, "changes": json.loads(entry.changes)}
                )

    async def _beat(self) -> None:
        async with self.db.transaction() as tx:
            await tx.raw.execute(
                """
                INSERT INTO relays (name, key_id, region, connect_url, public_url, version, load, draining)
                VALUES ($1, 'key', 'eu', 'ws://x', 'http://x', $2, '{}', false)
                ON CONFLICT (name) DO UPDATE SET version = excluded.version, seen_at = now()
                """,
                self.name, self.relay.snapshot.version,
            )  # fmt: skip


class Killed(BaseException):
    """The worker is gone: nothing after this line of it happened."""


@dataclass
class Desk:
    """Everything that orders need, and what tests look at."""

    db: Database
    ca: Pebble
    edge: Edge
    control: ApiSettings
    worker: WorkerSettings
    provider: Any = None

    async def domain(self, name: str | None = None, organization: str | None = None, **columns: Any) -> Any:
        """A name that leads to the relay."""
        name = name or f"n{next(_names)}.example.com"
        if not name.startswith("*."):
            self.ca.say("add-a", host=name, addresses=["127.0.0.1"])
        made = await domain(self.db, name, organization)
        for column, value in columns.items():
            await self.sql(f"UPDATE custom_domains SET {column} = $2 WHERE id = $1", made, value)
        (row,) = await rows(self.db, "SELECT * FROM custom_domains WHERE id = $1", made)
        return row

    async def sql(self, statement: str, *values: Any) -> None:
        async with self.db.transaction() as tx:
            await tx.raw.execute(statement, *values)

    async def sweep(self, **settings: Any) -> int:
        control = dataclasses.replace(self.control, **settings)
        return await acme_schedule.sweep(self.db, control, acme_cas.configured(control))

    async def run(
        self, over: Callable[[], Awaitable[bool]] | None = None, limits: Limits = LIMITS, **settings: Any
    ) -> None:
        """Workers work until no order is open (or ``over``)."""
        control = dataclasses.replace(self.control, **settings)
        stopping = asyncio.Event()

        async def handle(work: Work) -> None:
            await acme_orders.run(self.parts(control), work)

        runner = KindRunner(Served(jobs_acme.ORDER, handle, limits), self.db, stopping, Pace(0.05, 60.0))
        task = asyncio.create_task(runner.run(1.0))
        try:
            async with asyncio.timeout(120):
                while not await (over or self.idle)():
                    assert not task.done() or task.result() is None
                    await asyncio.sleep(0.05)
        finally:
            stopping.set()
            await task

    def parts(self, control: ApiSettings | None = None) -> acme_orders.Parts:
        jobs_acme._parts.clear()
        made = jobs_acme.parts(self.db, self.worker, control or self.control)
        return made if self.provider is None else dataclasses.replace(made, provider=self.provider)

    async def idle(self) -> bool:
        return not await rows(
            self.db, "SELECT 1 FROM certificate_orders WHERE state NOT IN ('issued', 'failed', 'canceled')"
        )

    async def issue(self, **settings: Any) -> None:
        """What is due is had, or its order ends otherwise."""
        await self.sweep(**settings)
        await self.run(**settings)

    async def again(self, domain: Any, limits: Limits = LIMITS, **settings: Any) -> Any:
        """Its next order is due now; how it ended."""
        await self.sql("UPDATE certificate_schedules SET next_at = now() WHERE domain_id = $1", domain["id"])
        assert await self.sweep(**settings) == 1
        await self.run(limits=limits, **settings)
        return (await self.orders(domain))[-1]

    async def orders(self, domain: Any) -> list[Any]:
        return await rows(
            self.db, "SELECT * FROM certificate_orders WHERE domain_id = $1 ORDER BY created_at, id", domain["id"]
        )

    async def schedule(self, domain: Any) -> Any:
        (row,) = await rows(self.db, "SELECT * FROM certificate_schedules WHERE domain_id = $1", domain["id"])
        return row

    async def events(self, domain: Any) -> list[str]:
        found = await rows(
            self.db,
            "SELECT callback_class || '.' || callback_action AS pair FROM certificate_lifecycle_events"
            " WHERE domain_id = $1 ORDER BY sequence",
            domain["id"],
        )
        return [row["pair"] for row in found]

    async def chain(self, domain: Any) -> list[Any]:
        """Its certificates in the vault, oldest first."""
        return await rows(
            self.db, "SELECT * FROM certificate_versions WHERE domain_id = $1 ORDER BY version", domain["id"]
        )

    async def claim(self, limits: Limits = LIMITS, *, suspect: bool = False) -> Work:
        found, _ = await queue.claim(self.db, acme_store.ORDER, limits, 1, suspect=suspect)
        return found[0]

    async def tokens(self, bucket: str) -> float:
        """What was taken from a bucket."""
        found = await rows(self.db, "SELECT sum(tokens) AS left FROM acme_budget WHERE bucket = $1", bucket)
        return float(found[0]["left"] or 0.0)


@contextlib.asynccontextmanager
async def desk(db: Database, ca: Pebble, made: Relay, folder: Path, **settings: Any) -> AsyncIterator[Desk]:
    """See :class:`Desk`; empty tables."""
    async with db.transaction() as tx:
        for table in ("custom_domains", "acme_accounts", "acme_budget", "relays", "certificate_region_keys"):
            await tx.raw.execute(f"DELETE FROM {table}")
    path = folder / "worker.key"
    if not path.exists():
        path.write_text(keyfiles.new_worker_keys())
        path.chmod(0o600)
    control = ApiSettings(
        database_url=Secret(db.url), master_key=Secret(_MASTER_KEY), acme_agree_terms=True, acme_directory=ca.directory,
        acme_ca_file=ca.trust, acme_http_port=port(made, 1), acme_tls_port=port(made, 2), dns_resolvers=(ca.dns,),
        outbound_allow=("127.0.0.0/8",), acme_poll_seconds=0.05, acme_poll_max_seconds=0.2, acme_nonce_retries=40,
        acme_relays_seconds=5.0, dns_timeout_seconds=10.0, acme_profiles=("127.0.0.1=default",),
        acme_reach_again_seconds=(0.1, 0.1), **settings,
    )  # fmt: skip
    worker = WorkerSettings(database_url=Secret(db.url), certificate_key_file=path)
    edge = Edge(db, made)
    follower = asyncio.create_task(edge.follow())
    try:
        yield Desk(db, ca, edge, control, worker)
    finally:
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)


@dataclass
class Mortal:
    """A worker that ends at its ``point``-th commit or call to the CA (before, within or after it), counted from 0."""

    point: int
    seen: list[str] = field(default_factory=list)

    def reached(self, name: str) -> None:
        self.seen.append(name)
        if len(self.seen) - 1 == self.point:
            raise Killed(name)


_mortal: contextvars.ContextVar[Mortal | None] = contextvars.ContextVar("mortal", default=None)


async def work_until(parts: acme_orders.Parts, work: Work, point: int) -> Mortal:
    """Work on an order, to the end or to the death."""
    mortal = Mortal(point)
    _mortal.set(mortal)
    with contextlib.suppress(Killed):
        await acme_orders.run(parts, work)
    return mortal


@contextlib.contextmanager
def mortality() -> Iterator[None]:
    """Within it :func:`work_until` is able to end."""
    post, step, done = Client._post, Work.step, Work.done

    def reached(name: str) -> None:
        if (mortal := _mortal.get()) is not None:
            mortal.reached(name)

    async def watched_post(self: Any, url: str, payload: Any, **more: Any) -> Any:
        if payload is None:
            return await post(self, url, payload, **more)
        what = url.split("/")[3]
        reached(f"before {what}")
        answer = await post(self, url, payload, **more)
        reached(f"after {what}")
        return answer

    def around(original: Any) -> Any:
        @contextlib.asynccontextmanager
        async def watched(self: Any) -> AsyncIterator[Any]:
            reached("before a transaction")
            async with original(self) as tx:
                yield tx
                reached("before a commit")
            reached("after a commit")

        return watched

    Client._post, Work.step, Work.done = watched_post, around(step), around(done)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Client._post, Work.step, Work.done = post, step, done  # type: ignore[method-assign]
