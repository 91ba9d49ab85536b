"""How long a report of a million rows takes, and how much memory.

    python -m bench.exports [--json] [--rows 1000000] [--formats csv,jsonl,parquet] [--dataset finance_events]

Starts a real PostgreSQL (durable) in a folder of its own, fills the books, and makes one report in each format by the worker's
own job, each in a process of its own: from the claim to the recorded end, file on the disk, hash computed. Prints seconds, the
process's greatest resident memory, and bytes. The target is 20 s and 200 MB for each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import shutil
import time
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import asyncpg

from portico.control import migrations
from portico.control.billing import export_store, exports
from portico.embedded.folders import temp_home
from portico.embedded.postgres import EmbeddedPostgres
from portico.kit import loop, queue
from portico.kit.clock import SystemClock
from portico.kit.db import Database, PoolLimits
from portico.kit.queue import Limits
from portico.kit.sealing import Sealer, new_master_key
from portico.settings import ApiSettings, Secret

TARGET_SECONDS, TARGET_MB = 20.0, 200.0
START, END = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
_EVENTS = """
INSERT INTO billing_finance_events (id, chain, seq, hash, recorded_at, provider, account, livemode, event_id, event_type, kind,
    occurred_at, received_at, raw_sha256, effect_key, organization_id, customer_ref, subscription_ref, invoice_ref, payment_ref,
    amount_minor, tax_minor, fee_minor, net_minor, currency, period_start, period_end, object_version, lines)
SELECT 'fev_' || lpad(n::text, 26, '0'), 'org_' || n % 500, n, sha256(n::text::bytea), $2, 'stripe', 'acct_bench', true,
    'evt_' || n, 'invoice.paid', 'payment.succeeded', $2::timestamptz + make_interval(secs => n * 2), $2, sha256(n::text::bytea),
    'payment.succeeded:stripe:in_' || n, 'org_' || n % 500, 'cus_' || n % 5000, 'sub_' || n % 5000, 'in_' || n, 'pi_' || n,
    1000 + n % 900, 190, 59, 941, (ARRAY['EUR', 'USD', 'INR'])[1 + n % 3], $2, $2, 1, '[]'
FROM generate_series(1, $1) AS n
"""
_LEDGER = """
INSERT INTO ledger_transactions (id, chain, seq, hash, key, kind, organization_id, booked_on, occurred_at, recorded_at, provider,
    provider_account, payment_ref, source, posting_count)
SELECT 'ltx_' || lpad(n::text, 26, '0'), 'org_' || n % 500, n, sha256(n::text::bytea), 'bench:' || n, 'payment.succeeded',
    'org_' || n % 500, ($2::timestamptz)::date, $2::timestamptz + make_interval(secs => n * 2), $2, 'stripe', 'acct_bench',
    'pi_' || n, 'payment.succeeded:stripe:in_' || n, 2
FROM generate_series(1, $1 / 2) AS n
"""
_POSTINGS = """
INSERT INTO ledger_postings (transaction_id, position, organization_id, account, currency, amount_minor, provider, booked_on)
SELECT 'ltx_' || lpad(n::text, 26, '0'), side, 'org_' || n % 500, CASE side WHEN 0 THEN 'provider_clearing' ELSE
    'accounts_receivable' END, 'EUR', (1000 + n % 900) * (1 - 2 * side), 'stripe', ($2::timestamptz)::date
FROM generate_series(1, $1 / 2) AS n, generate_series(0, 1) AS side
"""


async def fill(uri: str, dataset: str, rows: int) -> None:
    """Rows as the appliers write them; triggers are not what is measured."""
    connection = await asyncpg.connect(uri)
    await connection.execute("SET session_replication_role = replica")
    for statement in (_EVENTS,) if dataset == "finance_events" else (_LEDGER, _POSTINGS):
        await connection.execute(statement, rows, START, timeout=600)
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def make(uri: str, home: str, key: str, dataset: str, format_: str) -> dict[str, Any]:
    """One report; what it took."""
    settings = ApiSettings(database_url=Secret(uri), master_key=Secret(key), objects_dir=Path(home) / "objects")
    sealer, db = Sealer(settings.master_key), Database(uri, PoolLimits(size=4))
    wanted = exports.Wanted(None, dataset, format_, START, END, {"kind": "download"})
    row = exports.new_row(sealer, wanted, "bench", datetime.now(UTC))
    async with db.transaction() as tx:
        await export_store.add(tx, row)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.perf_counter()
    (work,), _ = await queue.claim(db, export_store.KIND, Limits(lease_seconds=600, max_attempts=1), 1)
    await exports.make(work, settings, sealer, SystemClock())
    took = time.perf_counter() - began
    async with db.read() as reader:
        made = await export_store.one(reader, row["id"])
    await db.close()
    if made is None or made.state != "ready":
        raise SystemExit(f"the report is {made and made.state}: {made and made.error}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "format": format_, "rows": made.row_count, "bytes": made.bytes, "seconds": took, "peak_mb": peak, "idle_mb": idle,
        "totals": made.totals,
    }  # fmt: skip


def child(pipe: Connection, *args: str) -> None:
    pipe.send(loop.run(make(*args)))


def measure(uri: str, home: str, dataset: str, formats: list[str]) -> list[dict[str, Any]]:
    """Each format in a fresh process, since what one had in memory is not what the next needs."""
    spawn, key, found = multiprocessing.get_context("spawn"), new_master_key(), []
    for format_ in formats:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=child, args=(theirs, uri, home, key, dataset, format_))
        process.start()
        theirs.close()
        try:
            found.append(ours.recv())
        except EOFError:
            raise SystemExit(f"the process that made {format_} ended") from None
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--formats", default="csv,jsonl,parquet")
    parser.add_argument("--dataset", default="finance_events", choices=["finance_events", "ledger"])
    args = parser.parse_args()
    home = temp_home("portico-bench-")
    server = EmbeddedPostgres(home)
    try:
        server.start()
        asyncio.run(migrations.upgrade(server.uri))
        asyncio.run(fill(server.uri, args.dataset, args.rows))
        found = measure(server.uri, str(home), args.dataset, args.formats.split(","))
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)
    if args.json:
        figures: dict[str, Any] = {f"{each['format']}_seconds": each["seconds"] for each in found}
        figures |= {f"{each['format']}_mb": each["bytes"] / 1e6 for each in found}
        print(json.dumps({"rows": args.rows, "peak_mb": max(each["peak_mb"] for each in found), **figures}))
        return
    for each in found:
        print(
            f"{each['format']:<8} {each['rows']:,} rows  {each['bytes'] / 1e6:,.0f} MB  {each['seconds']:.1f} s (target "
            f"{TARGET_SECONDS:g})  peak {each['peak_mb']:.0f} MB (target {TARGET_MB:g}; {each['idle_mb']:.0f} before)"
        )


if __name__ == "__main__":
    main()
