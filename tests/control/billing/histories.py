"""What a provider tells of one subscription's life, told again: to another organization each time, in any order, by a worker
that dies anywhere.

    history = record("paypal")          # bodies of webhooks from the simulator, and the objects behind them, then and at the end
    retold = await Retold.begin(app, history)
    await retold.tell(3, late=True, dies_at=17)

What a worker does is what `webhook_jobs.apply_event` does, with the real applier: from the event's row in the queue to its end.
Under its connections lies a driver that counts what PostgreSQL is asked to do, and fails instead at one of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa

from portico import settings as loading
from portico.control.billing import billing_store, checkout_store, normalize, provider, webhook_jobs
from portico.control.billing import webhook_body as bodies
from portico.control.billing import webhook_store as store
from portico.control.billing.apply import Ignored
from portico.control.billing.provider import Fetched, Order, Origin
from portico.control.billing.webhook_certificates import Certificates
from portico.control.billing.webhooks import new_row
from portico.control.finance.events import FinanceEvent
from portico.kit import queue
from portico.kit.db import Database, PoolLimits, Tx
from portico.kit.ids import new_id
from portico.kit.queue import Limits, Work
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings
from portico.simulators.billing_server import ProviderSimulator
from portico.simulators.billing_world import DAY
from portico.simulators.paypal import PayPalSimulator
from tests.conftest import run_apart
from tests.control.billing.shop import SIMULATORS
from tests.control.billing.story import Crash, Story

#: Kinds of objects whose ids the ledger knows by provider alone: each time another one.
_NAMED: Final = ("invoices", "charges", "payment_intents", "payments", "sales", "refunds", "disputes")
_PAYMENTS: Final = {"stripe": "charges", "razorpay": "payments", "paypal": "sales"}
#: Days that a life lasts, so that its end is now and its failed payment a week ago.
_DAYS: Final = 38
_LIMITS: Final = Limits(max_attempts=1_000_000)


@dataclass(frozen=True)
class Told:
    """A webhook, with the objects that it is about: as they were when it was sent, and as they were in the end."""

    id: str
    type: str
    body: str
    early: Fetched
    late: Fetched


@dataclass(frozen=True)
class History:
    """A life. ``settings``: what makes a platform sell through this provider; ``page``: the checkout's names."""

    provider: str
    settings: Mapping[str, str]
    page: Mapping[str, str | None]
    told: tuple[Told, ...]
    names: frozenset[str]
    start: datetime


@functools.cache
def record(name: str) -> History:
    """Bought, moved to another plan, partly refunded, not paid, paid after all, disputed and won, paid out, canceled at once."""
    found: History = run_apart(_record(name))
    return found


async def _record(name: str) -> History:
    async with SIMULATORS[name]() as simulator:
        simulator.stamp_by_clock = True
        simulator.world.clock.offset = -_DAYS * float(DAY)
        given: Any = {"database_url": "postgresql://nobody@localhost/none", "master_key": new_master_key()}
        settings = loading.load(ApiSettings, environ={}, overrides=given | simulator.settings())
        life = _Life(simulator, provider.of(settings, simulator.name))  # type: ignore[arg-type]
        try:
            return await life.live()
        finally:
            await life.adapter.close()


class _Life:
    def __init__(self, simulator: ProviderSimulator, adapter: provider.Provider) -> None:
        self.simulator, self.adapter = simulator, adapter
        self.seen: dict[str, tuple[str, str, Fetched]] = {}

    async def look(self) -> None:
        """Note what was told since the last time, with what is fetched for it now."""
        for event in list(self.simulator.world.kinds.get("events", {})):
            message = self.simulator.message(event)
            if event not in self.seen and message is not None:
                fetched = await self.adapter.authority(json.loads(message.body))
                self.seen[event] = (message.type, message.body.decode(), fetched)

    async def live(self) -> History:
        simulator, adapter, start = self.simulator, self.adapter, datetime.fromtimestamp(self.simulator.clock.now, UTC)
        order = Order(
            "chk_1", simulator.price("pro"), "https://x.example/ok", "https://x.example/no", email="a@x.example"
        )
        page = await adapter.checkout(order, key="chk_1")
        simulator.pay(page.ref, "good")
        await self.look()
        subscription, team = simulator.held()[0].ref, simulator.price("team")
        if "change_now" in adapter.can:
            await adapter.change(subscription, team, when="now", key="team")
        else:
            await adapter.change(subscription, team, when="period_end", return_url="https://x.example/", key="team")
            assert isinstance(simulator, PayPalSimulator)
            simulator.agree(subscription)
        await self.look()
        payment = next(each.payment_ref for each in self.meant() if each.kind == "payment.succeeded")
        assert payment is not None
        currency = simulator.offers["pro"].currency
        await adapter.refund(payment, amount_minor=500, currency=currency, reason="asked", key="back")
        await self.look()
        simulator.set_card(subscription, "declines")
        await self.days(32)
        simulator.set_card(subscription, "good")
        await self.days(5)
        dispute = simulator.dispute(simulator.world.all(_PAYMENTS[simulator.name])[-1]["id"], "fraudulent")
        await self.look()
        simulator.decide(dispute.get("dispute_id") or dispute["id"], won=True)
        simulator.payout()
        await self.look()
        await adapter.cancel(subscription, at_period_end=False, reason="enough", key="end")
        await self.look()
        told = [
            Told(event, kind, body, early, await adapter.authority(json.loads(body)))
            for event, (kind, body, early) in self.seen.items()
            if _normalized(simulator.name, event, body, early, "acct")
        ]
        names = {ref for kind in _NAMED for ref in simulator.world.kinds.get(kind, {})}
        refs = {"ref": page.ref, "customer_ref": page.customer_ref, "subscription_ref": page.subscription_ref}
        return History(simulator.name, simulator.settings(), refs, tuple(told), frozenset(names), start)

    async def days(self, count: int) -> None:
        for _ in range(count):
            await self.simulator.advance(DAY)
            await self.look()

    def meant(self) -> list[FinanceEvent]:
        return [
            each
            for event, (_, body, fetched) in self.seen.items()
            for each in _normalized(self.simulator.name, event, body, fetched, "acct")
        ]


def _normalized(name: str, event: str, body: str, fetched: Fetched, account: str) -> list[FinanceEvent]:
    digest = hashlib.sha256(body.encode()).digest()
    origin = Origin(account, False, datetime.now(UTC), digest, event)
    return normalize.normalize(name, json.loads(body), fetched, origin=origin)  # type: ignore[arg-type]


# -- a driver that fails -------------------------------------------------------------------------------------------------


class Mortal(Database):
    """A pool whose worker dies at one of the things that PostgreSQL is asked to do. Counted are executions, each way that asyncpg
    has (``COMMIT`` and savepoints, too): what is added to the path of an event is counted by itself."""

    def __init__(self, url: str) -> None:
        super().__init__(url, PoolLimits(size=2))
        self.live()

    def live(self, dies_at: int | None = None) -> None:
        """Begin to count anew."""
        self.count, self.dies_at, self.died = 0, dies_at, False

    def tick(self) -> None:
        if self.died:  # what is left of it is ROLLBACK
            return
        if self.count == self.dies_at:
            self.died = True
            raise Crash
        self.count += 1

    async def _open(self, options: dict[str, Any] | None) -> Any:
        connection, raw = await super()._open(options)
        if not isinstance(raw._protocol, _Protocol):
            raw._protocol = _Protocol(raw._protocol, self)
        return connection, raw


class _Protocol:
    """asyncpg's protocol, which all statements of a connection go through, SQLAlchemy's too."""

    _EXECUTIONS = frozenset({"query", "bind_execute", "bind_execute_many", "bind", "execute", "copy_in", "copy_out"})

    def __init__(self, real: Any, owner: Mortal) -> None:
        self._real, self._owner = real, owner

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        return functools.partial(self._run, real) if name in self._EXECUTIONS else real

    def _run(self, real: Any, *given: Any, **more: Any) -> Any:
        if not (given and isinstance(given[0], str) and given[0].startswith("BEGIN")):  # before it there is nothing
            try:
                self._owner.tick()
            except Crash:
                self._real.abort()
                raise
        return real(*given, **more)


# -- told again ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look(Fetched):
    """A look that was made when the history was recorded, whenever it is taken for made."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", self.objects["at"])


class _Desk:
    """Answers with what was fetched when the history was recorded."""

    def __init__(self) -> None:
        self.fetched = Fetched(datetime.now(UTC))

    async def authority(self, body: Mapping[str, Any]) -> Fetched:
        return self.fetched


class Retold:
    """A history about another organization, at another account of the provider's."""

    def __init__(self, app: Any, mortal: Mortal, history: History) -> None:
        self.app, self.mortal, self.history, self.desk = app, mortal, history, _Desk()
        state = app.state
        self.story = Story(state.db, state.billing.applier, history.provider)
        self.story.start = history.start
        self.rows: dict[int, str] = {}
        self.digests: dict[str, str] = {}
        ours: Any = {f"{history.provider}_account": self.story.source.account}
        self.tools = webhook_jobs.Tools(
            replace(state.settings, **ours),
            state.sealer,
            Certificates(state.settings, state.db, state.clock),
            lambda _: self.desk,
            self._apply,
        )

    @classmethod
    async def begin(cls, app: Any, mortal: Mortal, history: History) -> Retold:
        """With an organization that has opened no page yet."""
        made = cls(app, mortal, history)
        await made.story.found()
        return made

    async def _apply(self, tx: Tx, event: FinanceEvent) -> str | None:
        outcome = await self.story.applier.apply(tx, event)
        return outcome.reason if isinstance(outcome, Ignored) else None

    async def page(self) -> None:
        """The checkout is open; whoever waited for it is woken."""
        story, made, refs = self.story, new_id("chk"), dict(self.history.page)
        names = {"ref": "checkout", "customer_ref": "customer", "subscription_ref": "subscription"}
        keys = [story.source.key(names[name], ref) for name, ref in refs.items() if ref is not None]
        async with story.db.transaction() as tx:
            await billing_store.lock(tx, keys)
            values = {"id": made, "organization_id": story.organization, **story.source.columns, "plan": "pro"}
            await checkout_store.add_checkout(tx, {**values, "plan_version": 1})
            await checkout_store.opened(tx, made, {**refs, "url": "https://x.example"})
            if refs["customer_ref"] is not None:
                await billing_store.add_customer(tx, story.organization, story.source, refs["customer_ref"])
            await story.applier.wake(tx, keys)

    def _own(self, text: str) -> str:
        """With this telling's names of what the ledger knows."""
        for name in self.history.names:
            text = text.replace(f'"{name}"', f'"{name}_{self.story.tag}"')
        return text

    async def put(self, at: int) -> None:
        """The row of an event, as its webhook leaves it; told before, it is replayed."""
        told, db = self.history.told[at], self.story.db
        if at in self.rows:
            async with db.transaction() as tx:
                await store.replay(tx, [store.events.c.id == self.rows[at]], new_id("rpl"), 1)
            return
        # Of each body there is one, and not all of them name what is named anew.
        body = f'{self._own(told.body).rstrip()[:-1]}, "telling": "{self.story.tag}"}}'.encode()
        facts = bodies.facts_of(self.history.provider, json.loads(body), told.id, body)
        row = new_row(self.history.provider, facts, body, self.app.state.sealer) | {
            "account": self.story.source.account, "livemode": False, "received_at": datetime.now(UTC), "proven": True,
            "proof": "current", "status": "verified", "reason": None, "queue_state": "pending",
        }  # fmt: skip
        self.digests[row["raw_sha256"].hex()[:32]] = told.id
        async with db.transaction() as tx:
            assert await store.insert(tx, [row]) == {row["id"]}
        self.rows[at] = row["id"]

    async def tell(self, at: int, *, late: bool = False, dies_at: Sequence[int] = ()) -> None:
        """An event, by workers of whom the first ones die at these statements, and the last one lives."""
        await self.put(at)
        for place in (*dies_at, None):
            if await self.attempt(at, late=late, dies_at=place):
                return

    async def attempt(self, at: int, *, late: bool = False, dies_at: int | None = None) -> bool:
        """One worker's attempt at an event that was put; false if it died. After it the ledger sums to zero."""
        told = self.history.told[at]
        fetched = told.late if late else told.early
        self.desk.fetched = _Look(fetched.at, {**json.loads(self._own(json.dumps(fetched.objects))), "at": fetched.at})
        self.mortal.live(dies_at)
        lived = await self._work(self.rows[at])
        assert lived is not self.mortal.died
        await self.story.balanced()
        return lived

    async def _work(self, event: str) -> bool:
        """One attempt; false if the worker died."""
        (work,), _ = await queue.claim(self.story.db, store.KIND, _LIMITS, 10)
        assert work.id == event
        try:
            await webhook_jobs.apply_event(Work(store.KIND, _LIMITS, self.mortal, work.row), self.tools)  # type: ignore[arg-type]
        except Exception:
            if not self.mortal.died:
                raise
            await queue.fail(work, "died", 0.0, dead=False)
            return False
        return True

    # -- what it led to

    async def end(self) -> dict[str, Any]:
        """Everything, without names of this telling."""

        def plain(value: Any) -> Any:
            if isinstance(value, str):
                for digest, event in self.digests.items():
                    value = value.replace(digest, event)
            return value

        found = await self.story.end()
        return {name: sorted(tuple(map(plain, row)) for row in rows) if name in ("said", "events") else rows
                for name, rows in found.items()}  # fmt: skip

    async def traces(self) -> Any:
        """How much is written of this organization."""
        counts = [
            f"(SELECT count(*) FROM {table} WHERE organization_id = $1)"
            for table in (
                "billing_finance_events", "ledger_transactions", "ledger_postings", "billing_subscriptions", "billing_payments",
                "billing_refunds", "billing_invoices", "billing_credit_notes", "billing_dunning_cases", "outbox_messages",
                "audit_events", "billing_calls",
            )
        ]  # fmt: skip
        waiting = "(SELECT count(*) FROM billing_waiting_events)"
        async with self.story.db.read() as reader:
            return tuple(await reader.raw.fetchrow(f"SELECT {', '.join([*counts, waiting])}", self.story.organization))


#: What does not depend on when objects were looked at. Times of a state, the end of a period that is over and the names of what
#: was seen in between do.
def matters(end: Mapping[str, Any]) -> dict[str, Any]:
    """The plan, the subscription's state and all money."""
    names = ("plan", "ledger", "payments", "refunds", "invoices", "checkout", "dunning", "waiting")
    subscription = [(row[0], row[1], row[2], row[5]) for row in end["subscription"]]
    return {"subscription": subscription} | {name: end[name] for name in names}


async def wipe(db: Database) -> None:
    """No event of others is in the queue."""
    async with db.transaction() as tx:
        await tx.execute(sa.delete(store.events))
