"""How long a settlement receipt of 100,000 lines takes to be compared with the books.

    python -m bench.reconcile [--json] [--lines 100000]

Starts a real PostgreSQL (durable) in a folder of its own, fills the books, takes the receipt in (as an import, without its
signature), and compares it by the worker's own job: from the claim to the recorded verdict. One line in a thousand is off by one
minor unit, and all of them must be found. The target is 10 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import shutil
import time
from typing import Any

from bench.exports import END, START, fill
from portico.control import migrations
from portico.control.billing import settlement, settlement_store
from portico.control.billing.settlement import Settlements
from portico.embedded.folders import temp_home
from portico.embedded.postgres import EmbeddedPostgres
from portico.kit import loop, queue
from portico.kit.clock import SystemClock
from portico.kit.db import Database, PoolLimits
from portico.kit.queue import Limits
from portico.kit.sealing import Sealer, new_master_key
from portico.settings import ApiSettings, Secret

TARGET = 10.0
#: Of so many lines one is off.
EVERY = 1000


def rows(lines: int) -> list[dict[str, Any]]:
    """Balance transactions of what ``fill`` writes."""
    found = []
    for n in range(1, lines + 1):
        amount = 1000 + n % 900 + (n % EVERY == 0)
        currency = ("eur", "usd", "inr")[n % 3]
        row = {"id": f"txn_{n}", "type": "charge", "source": f"pi_{n}", "amount": amount, "fee": 59, "net": amount - 59}
        found.append(row | {"currency": currency, "exchange_rate": None, "reporting_category": "charge"})
    return found


async def measure(uri: str, lines: int) -> dict[str, Any]:
    """Seconds to take it in, and to compare it."""
    settings = ApiSettings(database_url=Secret(uri), master_key=Secret(new_master_key()))
    sealer, clock, db = Sealer(settings.master_key), SystemClock(), Database(uri, PoolLimits(size=4))
    service = Settlements(settings, db, clock, sealer)
    began = time.perf_counter()
    taken = await service.imported(
        settlement.PLATFORM, "stripe", rows(lines), batch_id="bench", account="acct_bench", livemode=True,
        period_start=START, period_end=END,
    )  # fmt: skip
    took_in = time.perf_counter() - began
    began = time.perf_counter()
    (work,), _ = await queue.claim(db, settlement_store.KIND, Limits(lease_seconds=600), 1)
    await settlement.reconcile(work, settings, sealer, clock)
    compared = time.perf_counter() - began
    async with db.read() as reader:
        found = await settlement.document(reader, taken.receipt)
    await db.close()
    if (found["state"], found["findings"]) != ("delta", {"amount": lines // EVERY}):
        raise SystemExit(f"the receipt is {found['state']} {found['reason']} {found['findings']}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"lines": lines, "take_in_seconds": took_in, "compare_seconds": compared, "peak_mb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--lines", type=int, default=100_000)
    args = parser.parse_args()
    home = temp_home("portico-bench-")
    server = EmbeddedPostgres(home)
    try:
        server.start()
        asyncio.run(migrations.upgrade(server.uri))
        asyncio.run(fill(server.uri, "finance_events", args.lines))
        found = loop.run(measure(server.uri, args.lines))
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)
    if args.json:
        print(json.dumps(found))
    else:
        print(
            f"{found['lines']:,} lines compared in {found['compare_seconds']:.1f} s (target {TARGET:g}), taken in in "
            f"{found['take_in_seconds']:.1f} s, peak {found['peak_mb']:.0f} MB"
        )


if __name__ == "__main__":
    main()
