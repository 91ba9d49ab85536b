"""How many events of a payment provider one API process takes in: verified, sealed, stored and committed, per second.

    python -m bench.webhook_ingest [--json] [--seconds 5] [--connections 64] [--provider stripe] [--bytes 2000]

Starts a real PostgreSQL (durable: fsync and synchronous_commit are on, and looked at) and `portico api` in a folder of its
own, signs all requests before the clock runs, and sends them over keep-alive connections. No worker runs: what is taken in
waits in the queue, as it does while the applier is down. Every answer must be 202, and the events are counted in the table
afterwards. Prints events per second, CPU per event of the API process (from /proc), and latency. The targets are 1,000 per
second, and 250 ms for 99 in 100 answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import asyncpg

from bench.cert_ingest import durable, load
from bench.grants import prepare, wait_until_ready
from bench.processes import free_port
from portico.embedded.postgres import EmbeddedPostgres
from portico.kit import provider_signatures as signatures
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret

TARGET, P99_MS = 1000, 250
SECRET = secrets.token_hex(24)


def stripe(number: int, size: int) -> tuple[dict[str, str], bytes]:
    """Headers and body of one event."""
    now = int(time.time())
    body = json.dumps({
        "id": f"evt_{number:024d}", "object": "event", "api_version": "2025-09-30.clover", "created": now,
        "livemode": False, "type": "invoice.paid", "pending_webhooks": 1, "request": {"id": None, "idempotency_key": None},
        "data": {"object": {"id": f"in_{number}", "object": "invoice", "currency": "eur", "amount_paid": 4900,
                            "description": "x" * max(0, size - 330)}},
    }).encode()  # fmt: skip
    return {"Stripe-Signature": signatures.stripe_header([SECRET], now, body)}, body


def razorpay(number: int, size: int) -> tuple[dict[str, str], bytes]:
    """The same of Razorpay."""
    body = json.dumps({
        "entity": "event", "account_id": "acc_bench", "event": "subscription.charged", "contains": ["payment"],
        "payload": {"payment": {"entity": {"id": f"pay_{number}", "amount": 49900, "currency": "INR",
                                           "description": "x" * max(0, size - 230)}}},
        "created_at": int(time.time()),
    }).encode()  # fmt: skip
    signature = signatures.razorpay_header(SECRET, body)
    return {"X-Razorpay-Signature": signature, "X-Razorpay-Event-Id": f"ev{number}"}, body


PROVIDERS: dict[str, Callable[[int, int], tuple[dict[str, str], bytes]]] = {"stripe": stripe, "razorpay": razorpay}


def request(provider: str, number: int, size: int) -> bytes:
    """One event as it goes over the wire."""
    fields, body = PROVIDERS[provider](number, size)
    fields |= {"Host": "bench", "Content-Type": "application/json", "Content-Length": str(len(body))}
    head = f"POST /v1/billing/webhooks/{provider} HTTP/1.1\r\n"
    return (head + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n").encode() + body


async def stored(uri: str) -> int:
    connection = await asyncpg.connect(uri)
    found = await connection.fetchval("SELECT count(*) FROM billing_webhook_events WHERE queue_state = 'pending'")
    await connection.close()
    return int(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--provider", choices=tuple(PROVIDERS), default="stripe")
    parser.add_argument("--bytes", type=int, default=2000, help="of a body, about")
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pbench-") as folder:
        Path(folder).chmod(0o755)
        with EmbeddedPostgres(Path(folder) / "pg") as postgres:
            port, master = free_port(), new_master_key()
            asyncio.run(prepare(ApiSettings(database_url=Secret(postgres.uri), master_key=Secret(master))))
            asyncio.run(durable(postgres.uri))
            env = {
                **os.environ,
                "PORTICO_DATABASE_URL": postgres.uri,
                "PORTICO_MASTER_KEY": master,
                "PORTICO_API_PORT": str(port),
                "PORTICO_LOG_LEVEL": "WARNING",
                "PORTICO_STRIPE_SECRET_KEY": "sk_test_bench",
                "PORTICO_STRIPE_WEBHOOK_SECRET": SECRET,
                "PORTICO_STRIPE_ACCOUNT": "acct_bench",
                "PORTICO_STRIPE_PRICES": "pro=price_bench",
                "PORTICO_RAZORPAY_KEY_ID": "rzp_test_bench",
                "PORTICO_RAZORPAY_KEY_SECRET": "bench",
                "PORTICO_RAZORPAY_WEBHOOK_SECRET": SECRET,
                "PORTICO_RAZORPAY_ACCOUNT": "acc_bench",
                "PORTICO_RAZORPAY_PLANS": "pro=plan_bench",
            }
            api = subprocess.Popen([sys.executable, "-m", "portico.cli", "api"], env=env)
            try:
                wait_until_ready(port)
                figures = asyncio.run(load(port, api.pid, args, lambda n: request(args.provider, n, args.bytes)))
            finally:
                api.send_signal(signal.SIGTERM)
                api.wait(20)
            kept = asyncio.run(stored(postgres.uri))
    if kept != figures["events"]:
        raise SystemExit(f"{figures['events']:.0f} events were taken and {kept} are stored")
    print(
        f"{figures['per_second']:,.0f} events/s   API CPU {figures['cpu_ms']:.2f} ms   p50 {figures['p50_ms']:.1f} ms   "
        f"p99 {figures['p99_ms']:.1f} ms   (targets {TARGET:,}/s and {P99_MS} ms)"
    )
    if args.json:
        print(json.dumps(figures))
    sys.exit(0 if figures["per_second"] >= TARGET and figures["p99_ms"] <= P99_MS else 1)


if __name__ == "__main__":
    main()
