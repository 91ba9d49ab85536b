"""How long the trial balance, a seal, lists and the proof of the books take, and how much memory.

    python -m bench.ledger [--json] [--transactions 100000] [--explain]

Starts a real PostgreSQL (durable) in a folder of its own and fills a year of books: chains of 500 organizations with the hashes
that the ledger would have made, so that the proof is a real one. Each figure is of one call as routes, commands and workers make
it; the greatest resident memory is of the whole process, filling left out. ``--explain`` prints the plans of the queries behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import asyncpg

from portico.control import migrations
from portico.control.finance import accounts, balances, events, ledger, seals, store, verification
from portico.embedded.folders import temp_home
from portico.embedded.postgres import EmbeddedPostgres
from portico.kit import loop
from portico.kit.db import Database, PoolLimits
from portico.kit.ids import new_id
from portico.kit.pages import PageRequest

ORGANIZATIONS, MONTHS = 500, 12
START = datetime(2025, 1, 1, tzinfo=UTC)
END = datetime(2026, 1, 1, tzinfo=UTC)
_KINDS = ("invoice.issued", "payment.succeeded", *("recognition",) * 8)
_SIDES = {
    "invoice.issued": ((accounts.RECEIVABLE, 1190), (accounts.DEFERRED, -1000), (accounts.TAX, -190)),
    "payment.succeeded": ((accounts.CLEARING, 1159), (accounts.FEES, 31), (accounts.RECEIVABLE, -1190)),
    "recognition": ((accounts.DEFERRED, 100), (accounts.REVENUE, -100)),
}
_POSTING = ("transaction_id", "position", "organization_id", "booked_on", *ledger.POSTED)
_EXPLAINED = {
    "trial balance": "SELECT account, currency, sum(amount_minor), sum(amount_minor) FILTER (WHERE amount_minor > 0)"
    " FROM ledger_postings GROUP BY account, currency",
    "trial balance of an organization": "SELECT account, currency, sum(amount_minor) FROM ledger_postings"
    " WHERE organization_id = 'org_7' GROUP BY account, currency",
    "trial balance of a month": "SELECT account, currency, sum(amount_minor) FROM ledger_postings"
    " WHERE booked_on >= '2025-06-01' AND booked_on < '2025-07-01' GROUP BY account, currency",
    "hashes of a month": "SELECT hash FROM ledger_transactions WHERE booked_on >= '2025-06-01' AND booked_on < '2025-07-01'"
    ' ORDER BY chain COLLATE "C", seq',
    "transactions of a kind": "SELECT * FROM ledger_transactions WHERE kind = 'refund.succeeded' ORDER BY number DESC LIMIT 51",
    "transactions of an organization": "SELECT * FROM ledger_transactions WHERE organization_id = 'org_7'"
    " ORDER BY number DESC LIMIT 51",
    "a stretch of a chain": "SELECT * FROM ledger_transactions WHERE chain = 'org_7' AND seq > 100 ORDER BY seq LIMIT 500",
    "events of a kind": "SELECT * FROM billing_finance_events WHERE kind = 'refund.succeeded' ORDER BY id DESC LIMIT 51",
    "events of an account in a period": "SELECT count(*) FROM billing_finance_events WHERE provider = 'stripe'"
    " AND account = 'acct_bench' AND livemode AND occurred_at >= '2025-06-01' AND occurred_at < '2025-06-02'",
}


async def fill(uri: str, count: int) -> None:
    """A year of transactions, and an event for each; triggers are not what is measured."""
    heads: dict[tuple[str, str], tuple[int, bytes]] = {}
    transactions, postings, told = [], [], []
    for n in range(count):
        org, kind = f"org_{n % ORGANIZATIONS}", _KINDS[(n // ORGANIZATIONS) % len(_KINDS)]
        at = START + timedelta(seconds=int(n * (END - START).total_seconds()) // count)
        seq, previous = heads.get((org, store.LEDGER), (0, store.ZERO))
        row: dict[str, Any] = dict.fromkeys(column.name for column in store.transactions.columns)
        row |= {
            "id": new_id("ltx"), "chain": org, "seq": seq + 1, "key": f"bench:{n}", "kind": kind, "organization_id": org,
            "booked_on": at.date(), "occurred_at": at, "recorded_at": at, "provider": "stripe", "invoice_ref": f"in_{n}",
            "posting_count": len(_SIDES[kind]), "number": n + 1,
        }  # fmt: skip
        posted = [
            {
                "account": account,
                "currency": "EUR",
                "amount_minor": amount,
                "provider": "stripe",
                "invoice_ref": f"in_{n}",
            }
            for account, amount in _SIDES[kind]
        ]
        row["hash"] = store.link(previous, ledger.content(row, posted))
        heads[org, store.LEDGER] = seq + 1, row["hash"]
        transactions.append(tuple(row.values()))
        postings += [(row["id"], at_, org, row["booked_on"], *each.values()) for at_, each in enumerate(posted)]
        seq, previous = heads.get((org, store.EVENTS), (0, store.ZERO))
        event: dict[str, Any] = dict.fromkeys(column.name for column in store.events.columns)
        event |= {
            "id": new_id("fev"), "chain": org, "seq": seq + 1, "recorded_at": at, "provider": "stripe", "account": "acct_bench",
            "livemode": True, "event_id": f"evt_{n}", "event_type": "bench", "kind": "payment.succeeded", "occurred_at": at,
            "received_at": at, "raw_sha256": bytes(32), "effect_key": f"bench:{n}", "organization_id": org,
            "amount_minor": 1190, "currency": "EUR", "object_version": 0, "lines": [], "invoice_ref": f"in_{n}",
        }  # fmt: skip
        event["hash"] = store.link(previous, events.content(event))
        heads[org, store.EVENTS] = seq + 1, event["hash"]
        told.append(tuple(event.values()))
    connection = await asyncpg.connect(uri)
    await connection.set_type_codec(
        "jsonb",
        encoder=lambda value: b"\x01" + json.dumps(value).encode(),
        decoder=bytes,
        schema="pg_catalog",
        format="binary",
    )
    await connection.execute("SET session_replication_role = replica")
    copied = (
        ("ledger_transactions", [c.name for c in store.transactions.columns], transactions),
        ("ledger_postings", list(_POSTING), postings),
        ("billing_finance_events", [c.name for c in store.events.columns], told),
        ("ledger_chains", ["chain", "log", "seq", "hash"], [(*at, *end) for at, end in heads.items()]),
    )
    for table, columns, records in copied:
        await connection.copy_records_to_table(table, columns=columns, records=records, timeout=600)
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def measured(name: str, act: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
    began, cpu = time.perf_counter(), time.process_time()
    await act()
    return {"what": name, "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}


async def measure(uri: str) -> list[dict[str, Any]]:
    """Each call once, after the books were read once by nobody."""
    db = Database(uri, PoolLimits(size=2))

    async def trial(**limits: Any) -> None:
        async with db.read() as reader:
            found = await balances.trial(reader, **limits)
            assert sum(each.balance_minor for each in found) == 0

    async def seal(month: int) -> None:
        async with db.transaction() as tx:
            ends_on = date(2025, month + 1, 1) if month < MONTHS else END.date()
            await seals.seal(tx, ends_on, "bench", datetime.now(UTC))

    async def verify() -> None:
        outcome = await verification.everything(db)
        assert outcome.fault is None, outcome.fault

    async def verify_seals() -> None:
        async with db.read(snapshot=True) as reader:
            assert await seals.verify_seals(reader) is None

    async def lists() -> None:
        async with db.read() as reader:
            await ledger.listing(reader, None, 51, None, {"kind": "refund.succeeded"})
            await events.listing(reader, None, PageRequest(50), {"kind": "refund.succeeded"})

    found = [
        await measured("trial balance", trial),
        await measured("trial balance of an organization", lambda: trial(organization="org_7")),
        await measured("trial balance of a month", lambda: trial(since=date(2025, 6, 1), until=date(2025, 7, 1))),
        await measured("lists by a kind that is rare", lists),
        await measured("seal of a month", lambda: seal(1)),
        await measured("seals of the other eleven", lambda: _each(seal, range(2, MONTHS + 1))),
        await measured("proof of twelve seals", verify_seals),
        await measured("proof of all of the books", verify),
    ]
    await db.close()
    return found


async def _each(act: Callable[[int], Awaitable[None]], numbers: range) -> None:
    for number in numbers:
        await act(number)


def child(pipe: Connection, uri: str) -> None:
    found = loop.run(measure(uri))
    # Of this process alone: getrusage has that of the one that started it, too.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    pipe.send((found, int(peak.split()[1]) / 1024))


async def explain(uri: str) -> None:
    connection = await asyncpg.connect(uri)
    for name, query in _EXPLAINED.items():
        rows = await connection.fetch(f"EXPLAIN (ANALYZE, COSTS off, TIMING off) {query}")
        print(f"-- {name}", *(f"   {row[0]}" for row in rows), sep="\n")
    await connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--transactions", type=int, default=100_000)
    parser.add_argument("--explain", action="store_true")
    args = parser.parse_args()
    home = temp_home("portico-bench-")
    server = EmbeddedPostgres(home)
    try:
        server.start()
        asyncio.run(migrations.upgrade(server.uri))
        asyncio.run(fill(server.uri, args.transactions))
        if args.explain:
            asyncio.run(explain(server.uri))
        ours, theirs = get_context("spawn").Pipe()
        process = get_context("spawn").Process(target=child, args=(theirs, server.uri))
        process.start()
        theirs.close()
        try:
            found, peak = ours.recv()
        except EOFError:
            raise SystemExit("the process that measured ended") from None
        process.join()
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)
    if args.json:
        print(json.dumps({"transactions": args.transactions, "peak_mb": peak, "calls": found}))
        return
    print(f"{args.transactions:,} transactions, peak {peak:.0f} MB")
    for each in found:
        print(f"{each['what']:<34} {each['seconds']:8.3f} s, {each['cpu_seconds']:.3f} s of this process")


if __name__ == "__main__":
    main()
