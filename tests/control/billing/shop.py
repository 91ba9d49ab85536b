"""A shop that is whole: the API on a socket, workers, PostgreSQL, and a simulated provider whose webhooks come over HTTP.

    async with open_shop(database_url, StripeSimulator, folder, workers=2) as shop:
        buyer = await shop.register()
        await buyer.buy("pro")
        await shop.later(days=31)

All clocks go together: the provider's, the one it signs by, the API's and the workers'. PostgreSQL's own, by which jobs wait,
cannot be set; what waits in it for a later day is brought forward by :meth:`Shop.due`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from portico import settings as loading
from portico.control.app import create_app
from portico.kit.db import Database, PoolLimits
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, WorkerSettings
from portico.simulators.billing_server import ProviderSimulator
from portico.simulators.billing_world import DAY
from portico.simulators.paypal import PayPalSimulator
from portico.simulators.razorpay import RazorpaySimulator
from portico.simulators.stripe import StripeSimulator
from portico.worker import runner
from portico.worker.jobs import Context
from tests.control.conftest import PASSWORD, MovableClock
from tests.timing import PATIENCE_SECONDS

SIMULATORS: dict[str, type[ProviderSimulator]] = {
    kind.name: kind for kind in (StripeSimulator, RazorpaySimulator, PayPalSimulator)
}
#: What moves a subscription or money; of the rest, schedules come back by themselves.
_QUEUES = ("billing_webhook_events", "billing_calls", "outbox_messages")
_SCHEDULED = ("billing.dunning", "billing.recognize", "billing.sum_up_revenue")
_numbers = itertools.count(1)
#: More than the events of a whole history, and of every plan.
_ENDLESS = 1_000_000
#: One for a run: what a database holds is opened by whoever comes next.
_MASTER_KEY = new_master_key()


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to the test run."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def settings_of(database_url: str, simulator: ProviderSimulator, folder: Path) -> ApiSettings:
    """The settings of an API that sells through ``simulator``, and by nobody else."""
    given: dict[str, Any] = {
        "database_url": database_url, "master_key": _MASTER_KEY, "default_plan": "free",
        "registrations_per_address": _ENDLESS, "rate_write_per_minute": _ENDLESS, "rate_auth_per_minute": _ENDLESS,
        "rate_read_per_minute": _ENDLESS, "rate_unknown_per_minute": _ENDLESS, "sign_in_failures_per_address": _ENDLESS,
        "billing_retry_min_seconds": 0.01, "billing_retry_max_seconds": 0.05, "billing_webhook_activity_seconds": 3600.0,
        "billing_webhook_certificate_refresh_seconds": 0.0,
    }  # fmt: skip
    if isinstance(simulator, PayPalSimulator):
        root = folder / f"root-{next(_numbers)}.pem"
        root.write_text(simulator.root)
        given["paypal_cert_ca_file"] = root
    return loading.load(ApiSettings, environ={}, overrides=given | simulator.settings())


class Shop:
    """See the module. ``url`` is the API's."""

    def __init__(self, app: Any, db: Database, simulator: ProviderSimulator, clock: MovableClock, url: str) -> None:
        self.app, self.db, self.simulator, self.clock, self.url = app, db, simulator, clock, url
        self.buyers: list[Buyer] = []
        self.outbox: Path | None = None

    @property
    def name(self) -> str:
        return self.simulator.name

    async def register(self) -> Buyer:
        """The owner of a new organization."""
        email = f"buyer{next(_numbers)}@example.com"
        http = httpx.AsyncClient(base_url=f"{self.url}/v1", timeout=60, trust_env=False)
        answer = await http.post(
            "/auth/register", json={"email": email, "password": PASSWORD, "organization": "Observatory"}
        )
        assert answer.status_code == 201, answer.text
        made = answer.json()
        http.headers["authorization"] = f"Bearer {made['access_token']}"
        self.buyers.append(Buyer(self, http, email, made["organization"]["id"]))
        return self.buyers[-1]

    async def fetch(self, query: str, *values: Any) -> list[Any]:
        async with self.db.read() as reader:
            return list(await reader.raw.fetch(query, *values))

    async def sql(self, statement: str, *values: Any) -> None:
        async with self.db.transaction() as tx:
            await tx.raw.execute(statement, *values)

    # -- time

    async def later(self, *, days: float = 0.0, to: Any = None) -> None:
        """Let time pass for everybody, a week at a time at most, and everything that is due happen."""
        left = days * DAY if to is None else (to - self.clock.wall()).total_seconds()
        while left > 0:
            step = min(left, 7.0 * DAY)
            left -= step
            self.clock.advance(step)
            self.simulator.faults.stale = -self.clock.shift.total_seconds()
            await self.simulator.advance(step)
            await self.settled()
        for buyer in self.buyers:
            await buyer.sign_in()

    async def due(self) -> None:
        """Calls of providers that wait for a later time have their time now."""
        await self.sql("UPDATE billing_calls SET available_at = now() WHERE queue_state = 'pending'")
        await self.settled()

    async def round(self, *kinds: str) -> None:
        """Have scheduled jobs run once more, from now on: the first end that is seen may be of a run that began before."""
        for kind in (kinds or _SCHEDULED) * 2:
            since = (await self.fetch("SELECT now() AS at"))[0]["at"]
            query = "SELECT 1 FROM queue_jobs WHERE kind = $1 AND finished_at > $2"
            await self.until(
                lambda query=query, kind=kind, since=since: self.fetch(query, kind, since), f"another run of {kind}"
            )

    async def settled(self) -> None:
        """Until everything that the provider told has come to its end, and what followed from that at the provider, too; every
        message is delivered."""
        seen = -1
        while seen != len(self.simulator.courier.attempts):
            seen = len(self.simulator.courier.attempts)
            await self.simulator.settled()
            await self.until(self._still, "the queues to be empty")

    async def _still(self) -> bool:
        parts = [
            f"SELECT count(*) AS n FROM {table} WHERE queue_state = 'pending'"
            " AND (lease_token IS NOT NULL OR available_at < now() + interval '10 s')"
            for table in _QUEUES
        ]
        rows = await self.fetch(f"SELECT sum(n) AS n FROM ({' UNION ALL '.join(parts)}) x")
        return not rows[0]["n"]

    async def until(self, good: Callable[[], Awaitable[Any]], what: str) -> None:
        deadline = time.monotonic() + 2 * PATIENCE_SECONDS
        while not await good():
            assert time.monotonic() < deadline, f"waited in vain for {what}\n{await self._stuck()}"
            await asyncio.sleep(0.02)

    async def _stuck(self) -> str:
        query = (
            "SELECT provider, event_type, status, last_error FROM billing_webhook_events WHERE queue_state <> 'done'"
        )
        return "\n".join(str(dict(row)) for row in await self.fetch(query))

    # -- what must hold whatever happens

    async def balanced(self) -> None:
        """The ledger sums to zero, in every transaction and currency; nothing waits, nothing is dead."""
        query = "SELECT transaction_id, currency FROM ledger_postings GROUP BY 1, 2 HAVING sum(amount_minor) <> 0"
        assert await self.fetch(query) == []
        assert await self.fetch("SELECT kind FROM billing_waiting_events") == []
        for table in _QUEUES:
            assert await self.fetch(f"SELECT * FROM {table} WHERE queue_state = 'dead'") == []


class Buyer:
    """The owner of an organization."""

    def __init__(self, shop: Shop, http: httpx.AsyncClient, email: str, organization: str) -> None:
        self.shop, self.http, self.email, self.organization = shop, http, email, organization

    async def sign_in(self) -> None:
        answer = await self.http.post("/auth/login", json={"email": self.email, "password": PASSWORD})
        assert answer.status_code == 200, answer.text
        self.http.headers["authorization"] = f"Bearer {answer.json()['access_token']}"

    async def get(self, path: str) -> Any:
        answer = await self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def post(self, path: str, body: Any = None, status: int = 200) -> Any:
        answer = await self.http.post(f"/billing/{path}", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    # -- what a customer does

    async def page(self, plan: str = "pro") -> str:
        """The address of a page on which a plan is paid."""
        back = "https://app.example.com/"
        body = {"plan": plan, "provider": self.shop.name, "success_url": back, "cancel_url": back}
        return str((await self.post("checkout-sessions", body, 201))["url"])

    async def buy(self, plan: str = "pro", card: str = "good") -> None:
        """On the provider's page."""
        await self.press(await self.page(plan), card)
        await self.shop.settled()

    async def press(self, url: str, card: str = "good") -> None:
        """Pay on a page of the provider's, as a browser does."""
        async with httpx.AsyncClient(trust_env=False, timeout=30) as browser:
            answer = await browser.post(url, data={"act": "pay", "card": card})
        assert answer.status_code in ((402,) if card == "declines" else (200, 303)), answer.text

    async def ref(self) -> str:
        """The provider's name of the newest subscription."""
        query = "SELECT ref FROM billing_subscriptions WHERE organization_id = $1 ORDER BY id DESC LIMIT 1"
        return str((await self.shop.fetch(query, self.organization))[0]["ref"])

    async def card(self, card: str) -> None:
        """Pay with another card from now on."""
        self.shop.simulator.set_card(await self.ref(), card)  # type: ignore[arg-type]

    # -- what a customer has

    async def subscription(self) -> Any:
        return (await self.get("/billing/subscription"))["subscription"]

    async def plan(self) -> str:
        return str((await self.get("/org/plan"))["plan"]["id"])

    async def invoices(self) -> list[Any]:
        """The oldest first."""
        return list(reversed((await self.get("/billing/invoices?limit=100"))["data"]))

    async def payments(self) -> list[Any]:
        """The oldest first."""
        return list(reversed((await self.get("/billing/payments?limit=100"))["data"]))

    async def ledger(self) -> dict[str, int]:
        """What each account holds of this organization, but for those with nothing."""
        query = (
            "SELECT account, sum(amount_minor)::bigint AS n FROM ledger_postings WHERE organization_id = $1"
            " GROUP BY 1 HAVING sum(amount_minor) <> 0"
        )
        return {row["account"]: row["n"] for row in await self.shop.fetch(query, self.organization)}

    async def notices(self) -> dict[str, int]:
        """Messages about dunning by topic, each of which was delivered."""
        query = (
            "SELECT topic, count(*) AS n FROM outbox_messages WHERE organization_id = $1 AND topic LIKE 'dunning.%'"
            " AND queue_state = 'done' GROUP BY 1"
        )
        return {row["topic"]: row["n"] for row in await self.shop.fetch(query, self.organization)}


@asynccontextmanager
async def open_shop(
    database_url: str, kind: type[ProviderSimulator], folder: Path, *, workers: int = 1, every_seconds: float = 0.5
) -> AsyncIterator[Shop]:
    """A shop with so many workers, which do what the clock brings every so many seconds."""
    async with kind() as simulator, contextlib.AsyncExitStack() as stack:
        simulator.stamp_by_clock = True
        control = settings_of(database_url, simulator, folder)
        clock = MovableClock()
        db = Database(database_url, PoolLimits(size=8))
        stack.push_async_callback(db.close)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        control = replace(control, api_url=url)
        app = create_app(control, clock=clock, db=db)
        await stack.enter_async_context(_serving(app, listener))
        simulator.courier.endpoints.append(simulator.endpoint(f"{url}/v1/billing/webhooks/{simulator.name}"))
        await stack.enter_async_context(_working(control, clock, folder / "outbox", workers, every_seconds))
        shop = Shop(app, db, simulator, clock, url)
        shop.outbox = folder / "outbox"
        yield shop
        for buyer in shop.buyers:
            await buyer.http.aclose()


@asynccontextmanager
async def _serving(app: Any, listener: socket.socket) -> AsyncIterator[None]:
    config = uvicorn.Config(app, lifespan="on", log_config=None, server_header=False, timeout_graceful_shutdown=1)
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not server.started:
                await asyncio.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def _working(
    control: ApiSettings, clock: MovableClock, outbox: Path, count: int, every: float
) -> AsyncIterator[None]:
    """So many workers, each with connections of its own."""
    stopping, tasks = asyncio.Event(), list[asyncio.Task[None]]()
    pools: list[Database] = []
    try:
        for number in range(count):
            settings = WorkerSettings(
                database_url=control.database_url, tick_seconds=0.2 + number / 1000, outbox_dir=outbox,
                dunning_seconds=every, recognize_revenue_seconds=every, sum_up_revenue_seconds=every,
                billing_webhook_retry_seconds=0.05, billing_webhook_retry_max_seconds=0.2, retry_min_seconds=0.05,
                retry_max_seconds=0.2, billing_reconcile_seconds=3600.0, shutdown_seconds=1.0,
            )  # fmt: skip
            pools.append(Database(control.database_url.reveal(), PoolLimits(size=6), application="portico shop worker"))
            context = Context(settings, control, pools[-1], clock)
            jobs = runner.choose(settings, ["billing", "notifications"])
            tasks.append(asyncio.create_task(runner.run(context, jobs, stopping)))
        yield
    finally:
        stopping.set()
        ended: Sequence[Any] = await asyncio.gather(*tasks, return_exceptions=True)
        for pool in pools:
            await pool.close()
    for each in ended:
        if isinstance(each, BaseException):
            raise each
