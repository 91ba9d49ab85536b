"""The whole platform with simulated payment providers, more workers than its own, and a customer's webhook receiver."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from portico.embedded.postgres import EmbeddedPostgres
from portico.kit.db import Database, PoolLimits
from portico.simulators.webhooks import WebhookReceiver
from tests.ports import free_port
from tests.system.platform import Account, Child, Up, port_span

#: Generous: what is waited for is an event, on a machine that does other things.
PATIENCE = 120.0
PROVIDERS = ("stripe", "razorpay", "paypal")
#: Of the API and of every worker. Providers are asked again soon, and leases are short: workers are killed here.
SETTINGS: dict[str, Any] = {
    "queue_lease_seconds": 3, "tick_seconds": 0.3, "dunning_seconds": 1, "retry_max_seconds": 1,
    "registrations_per_address": 1000,
    "billing_webhook_retry_seconds": 0.2, "billing_webhook_retry_max_seconds": 1, "billing_circuit_seconds": 1,
    "billing_retry_min_seconds": 0.05, "billing_retry_max_seconds": 0.3, "delivery_retry_seconds": "1,1,1,1,1,1,1,1",
    "outbound_http": 1, "outbound_allow": "127.0.0.0/8", "billing_webhook_attempts": 100,
    "rate_read_per_minute": 0, "rate_write_per_minute": 0, "rate_auth_per_minute": 0, "rate_page_per_minute": 0,
}  # fmt: skip
_QUEUES = (
    "billing_webhook_events", "billing_calls", "outbox_messages", "billing_report_exports", "billing_reconcile_runs"
)  # fmt: skip


@contextmanager
def receiving(port: int) -> Iterator[WebhookReceiver]:
    """A webhook receiver in a thread of its own, for as long as the platform lives."""
    made, started, over = WebhookReceiver(host="127.0.0.1", port=port), threading.Event(), threading.Event()

    async def main() -> None:
        async with made:
            started.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="receiver")
    thread.start()
    try:
        assert started.wait(PATIENCE)
        yield made
    finally:
        over.set()
        thread.join()


class World:
    """See the module."""

    def __init__(self, home: Path, folder: Path, stack: ExitStack) -> None:
        port = free_port()
        self.receiver = stack.enter_context(receiving(port))
        given = SETTINGS | {"outbound_ports": port}
        self.up = Up(home, folder, stack, demo_billing=1, simulator_ports="0,0,0", tcp_ports=port_span(2), **given)
        self._home, self._folder, self._stack = home, folder, stack
        found = json.loads((home / "simulators" / "settings.json").read_text())
        self.keys = {name.removeprefix("PORTICO_").lower(): value for name, value in found.items()}
        self.urls = {name: self.keys[f"{name}_api_url"] for name in PROVIDERS}
        self._worker_settings = given | self.keys | {
            "database_url": EmbeddedPostgres(home).uri, "master_key": (home / "master.key").read_text().strip(),
            "api_url": self.up.api_url, "outbox_dir": home / "outbox", "objects_dir": home / "objects", "default_plan": "free",
        }  # fmt: skip
        self.workers: list[Child] = []
        self.buyers: list[Buyer] = []
        # Simulators close what is idle for five seconds; what they are about to close is not used again.
        self._http = httpx.Client(trust_env=False, timeout=300, limits=httpx.Limits(keepalive_expiry=2))
        stack.callback(self._http.close)

    # -- workers

    def work(self, count: int) -> None:
        """Have so many workers, the platform's own among them."""
        self.workers = [child for child in self.workers if child.process.poll() is None]
        while len(self.workers) < count - 1:
            name = f"worker-{len(list(self._folder.glob('*-worker-*.err'))) + 2}"
            child = Child(name, ["worker", "billing", "notifications"], self._folder, self._worker_settings)
            self._stack.callback(child.end)
            self.workers.append(child)
        for child in self.workers:
            child.wait_for(lambda child=child: "worker ready" in child.err, PATIENCE, "ready line")

    def kill_workers(self) -> None:
        """SIGKILL, each and every one; the platform starts its own again."""
        own = self.until(self._own, "the platform's worker")
        os.kill(own, signal.SIGKILL)
        for child in self.workers:
            child.kill()
            child.process.wait()
        self.until(lambda: self._own() not in (own, None), "another worker")

    def _own(self) -> int | None:
        """The platform's worker, unless it has none at this moment."""
        try:
            return self.up.pid("worker")
        except IndexError:
            return None

    # -- looking

    def until(self, what: Callable[[], Any], why: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (found := what()):
            assert self.up.child.process.poll() is None, "the platform ended"
            assert time.monotonic() < deadline, f"{why}: not within {PATIENCE:g} s\n{self.stuck()}"
            time.sleep(0.1)
        return found

    def sql(self, statement: str, *values: Any) -> list[Any]:
        async def act() -> list[Any]:
            db = Database(EmbeddedPostgres(self._home).uri, PoolLimits(size=1))
            try:
                async with db.transaction() as tx:
                    return list(await tx.raw.fetch(statement, *values))
            finally:
                await db.close()

        return asyncio.run(act())

    def stuck(self) -> str:
        query = "SELECT provider, event_type, status, queue_state, attempts, last_error FROM billing_webhook_events"
        return "\n".join(str(dict(row)) for row in self.sql(f"{query} WHERE queue_state <> 'done'")[:20])

    def idle(self) -> bool:
        """Nothing is due in any queue."""
        parts = [
            f"SELECT count(*) AS n FROM {table} WHERE queue_state = 'pending'"
            " AND (lease_token IS NOT NULL OR available_at < now() + interval '5 s')"
            for table in _QUEUES
        ]
        return not self.sql(f"SELECT sum(n) AS n FROM ({' UNION ALL '.join(parts)}) x")[0]["n"]

    def settle(self) -> None:
        """Until everything that was told has come to its end, and what followed from that."""
        for _ in range(2):
            for provider in PROVIDERS:
                self.sim(provider, "flush")
            self.until(self.idle, "the queues to be empty")

    # -- the providers

    def sim(self, provider: str, verb: str, body: Any = None) -> Any:
        answer = self._http.post(f"{self.urls[provider]}/_sim/{verb}", json=body or {})
        assert answer.is_success, answer.text
        return answer.json()

    def faults(self, provider: str, **wanted: float) -> None:
        """What goes wrong from now on; nothing without any."""
        self._http.delete(f"{self.urls[provider]}/_sim/faults")
        if wanted:
            self.sim(provider, "faults", wanted)

    def now(self, provider: str) -> float:
        return float(self._http.get(f"{self.urls[provider]}/_sim/").json()["now"])

    def reconcile(self, provider: str) -> None:
        """Compare with the provider's own list."""
        self._operate("reconcile", {"provider": provider, "reason": "system test", "dry_run": False})

    def replay(self) -> int:
        """Apply everything again; how many events."""
        body = {"filter": {"state": "applied"}, "reason": "system test", "dry_run": False, "limit": 1000}
        return int(self._operate("replay", body)["replayed"])

    def _operate(self, verb: str, body: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.up.credentials['operator_key']}"}
        answer = self._http.post(f"{self.up.api_url}/v1/admin/billing-webhooks/{verb}", json=body, headers=headers)
        assert answer.is_success, answer.text
        return answer.json()

    def taken(self, provider: str) -> tuple[list[int], list[int], int]:
        """The provider's own books: payments, refunds, and what it holds after its fees."""
        keys, http, url = self.keys, self._http, self.urls[provider]
        if provider == "stripe":
            auth = (keys["stripe_secret_key"], "")
            rows = http.get(f"{url}/v1/balance_transactions?limit=100", auth=auth).json()
            assert not rows["has_more"]
            paid = [row["amount"] for row in rows["data"] if row["type"] == "charge"]
            back = [-row["amount"] for row in rows["data"] if row["type"] == "refund"]
            return sorted(paid), sorted(back), sum(row["net"] for row in rows["data"])
        if provider == "razorpay":
            auth = (keys["razorpay_key_id"], keys["razorpay_key_secret"])
            payments, refunds = (
                http.get(f"{url}/v1/{kind}?count=100", auth=auth).json()["items"] for kind in ("payments", "refunds")
            )
            good = [row for row in payments if row["captured"]]
            back = [row["amount"] for row in refunds]
            return (
                sorted(row["amount"] for row in good),
                sorted(back),
                sum(r["amount"] - r["fee"] for r in good) - sum(back),
            )
        auth = (keys["paypal_client_id"], keys["paypal_client_secret"])
        bearer = http.post(f"{url}/v1/oauth2/token", auth=auth).json()["access_token"]
        query = {"start_date": "2020-01-01T00:00:00Z", "end_date": "2099-01-01T00:00:00Z"}
        found = http.get(
            f"{url}/v1/reporting/transactions", params=query, headers={"Authorization": f"Bearer {bearer}"}
        ).json()
        rows = [row["transaction_info"] for row in found["transaction_details"]]

        def minor(row: Any, name: str) -> int:
            return round(float(row[name]["value"]) * 100)

        amounts = [minor(row, "transaction_amount") for row in rows]
        fees = [minor(row, "fee_amount") for row in rows]
        return sorted(a for a in amounts if a > 0), sorted(-a for a in amounts if a < 0), sum(amounts) + sum(fees)

    # -- what must hold in the end

    def check_books(self) -> None:
        """Nothing was counted twice, nothing lost: by each provider's own books, and by ours."""
        for provider in PROVIDERS:
            paid, back, held = self.taken(provider)
            assert self._amounts("billing_payments", provider) == paid
            assert self._amounts("billing_refunds WHERE state = 'succeeded'", provider) == back
            query = "SELECT coalesce(sum(amount_minor), 0)::bigint AS n FROM ledger_postings"
            query += " WHERE account = 'provider_clearing' AND provider = $1"
            assert self.sql(query, provider)[0]["n"] == held, provider
        unbalanced = (
            "SELECT currency FROM ledger_postings GROUP BY transaction_id, currency HAVING sum(amount_minor) <> 0"
        )
        assert self.sql(unbalanced) == []
        trial = "SELECT currency, sum(amount_minor) AS n FROM ledger_postings GROUP BY currency"
        assert {row["n"] for row in self.sql(trial)} == {0}
        # A page whose answer was lost has a subscription that is nobody's, and that nobody pays for.
        assert self.sql("SELECT kind FROM billing_waiting_events WHERE kind NOT LIKE 'subscription.%'") == []
        for table in _QUEUES:
            # Nobody waits any more for a page that no provider answered with.
            more = " AND act <> 'checkout'" if table == "billing_calls" else ""
            assert self.sql(f"SELECT * FROM {table} WHERE queue_state = 'dead'{more}") == [], table
        self._check_numbers("billing_invoices")
        self._check_numbers("billing_credit_notes")

    def _amounts(self, table: str, provider: str) -> list[int]:
        more = "AND" if "WHERE" in table else "WHERE"
        rows = self.sql(f"SELECT amount_minor FROM {table} {more} provider = $1 ORDER BY 1", provider)
        return [row["amount_minor"] for row in rows]

    def _check_numbers(self, table: str) -> None:
        """Without gaps."""
        rows = self.sql(f"SELECT year, sequence FROM {table} WHERE number IS NOT NULL ORDER BY 1, 2")
        years = {row["year"] for row in rows}
        for year in years:
            numbers = [row["sequence"] for row in rows if row["year"] == year]
            assert numbers == [*range(1, len(numbers) + 1)], (table, year)

    def check_messages(self) -> None:
        """Each message is there once, was delivered, and arrived as often as it was sent: once, unless its worker was killed
        before it could say so."""
        query = "SELECT id, driver, idempotency_key, attempts, queue_state FROM outbox_messages WHERE organization_id IS NOT NULL"
        rows = self.sql(query)
        assert {row["queue_state"] for row in rows} == {"done"}
        assert len({row["idempotency_key"] for row in rows}) == len(rows)
        assert self.receiver.refused == []
        arrived = Counter(got.id for got in self.receiver.got)
        sent = {row["id"]: row["attempts"] for row in rows if row["driver"] in ("webhook", "report")}
        assert arrived.keys() == sent.keys() != set()
        again = {name: (count, sent[name]) for name, count in arrived.items() if count > sent[name]}
        assert again == {}, "what arrived again had been sent again"


class Buyer:
    """The owner of an organization, who pays through one provider."""

    def __init__(self, world: World, provider: str) -> None:
        self.world, self.provider = world, provider
        self.account = Account(world.up.api_url)
        self.organization = self.account.call("GET", "/whoami")["organization"]["id"]
        self.channel = ""
        world.buyers.append(self)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        return self.account.call(method, path, body)

    def listen(self) -> None:
        """Hear of everything by webhook."""
        channel = {"kind": "webhook", "name": "receiver", "target": self.world.receiver.url, "events": ["*"]}
        made = self.call("PUT", "/org/notification-channels", {"channels": [channel]})["data"][0]
        self.world.receiver.secrets.append(made["secret"])
        self.channel = made["id"]

    def order(self, plan: str = "pro") -> None:
        """Pay for a plan; what follows from that is another thing."""
        back = f"{self.world.up.api_url}/sign-in"
        body = {"plan": plan, "provider": self.provider, "success_url": back, "cancel_url": back}
        # A provider in trouble is told to who asks, and asked again by them.
        url = self.world.until(lambda: self._page(body), f"a page of {self.provider}")
        with httpx.Client(trust_env=False, timeout=30) as browser:
            answer = browser.post(url, data={"act": "pay", "card": "good"})
        assert answer.status_code in (200, 303), answer.text

    def _page(self, body: Any) -> str | None:
        headers = {"Authorization": f"Bearer {self.account.token}"}
        with httpx.Client(base_url=self.account.api_url, headers=headers, trust_env=False, timeout=60) as http:
            answer = http.post("/v1/billing/checkout-sessions", json=body)
        assert answer.status_code == 201 or answer.json()["retryable"], answer.text
        return str(answer.json()["url"]) if answer.status_code == 201 else None

    def has(self, plan: str) -> None:
        """Wait until it has this plan."""
        why = f"{self.provider}: the plan {plan}"
        self.world.until(lambda: self.call("GET", "/org/plan")["plan"]["id"] == plan, why)

    def report(self) -> None:
        """Have the ledger of yesterday sent."""
        to = {"kind": "webhook", "channel": self.channel}
        self.call("POST", "/billing/report-exports", {"dataset": "ledger", "destination": to})

    def refund(self, amount: int) -> None:
        """Have a part of the last payment given back."""
        paid = self.world.until(lambda: self.call("GET", "/billing/payments")["data"], "a payment")
        payment = paid[0]["id"]
        self.call("POST", "/billing/refunds", {"payment": payment, "amount_minor": amount, "reason": "system test"})

    def cancel(self, *, at_period_end: bool = False) -> None:
        self.call("POST", "/billing/subscription/cancel", {"at_period_end": at_period_end})

    def subscription(self) -> Any:
        return self.call("GET", "/billing/subscription")["subscription"]

    def card(self, card: str) -> None:
        query = "SELECT ref FROM billing_subscriptions WHERE organization_id = $1 ORDER BY id DESC LIMIT 1"
        ref = self.world.sql(query, self.organization)[0]["ref"]
        self.world.sim(self.provider, "card", {"subscription": ref, "card": card})

    def period_is_over(self) -> None:
        """Set the provider's clock an hour behind the end of the period."""
        end = datetime.fromisoformat(self.subscription()["period_end"]).timestamp()
        if end + 3600 > self.world.now(self.provider):
            self.world.sim(self.provider, "clock", {"to": int(end) + 3600})

    def refunded(self) -> int:
        query = "SELECT count(*) AS n FROM billing_refunds WHERE organization_id = $1 AND state = 'succeeded'"
        return int(self.world.sql(query, self.organization)[0]["n"])
