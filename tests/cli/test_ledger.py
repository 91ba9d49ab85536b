"""`portico admin ledger` as an operator types it, against a real database."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from datetime import UTC, date, datetime

from portico.control import migrations
from portico.control.finance import recognition
from portico.kit.db import Database, PoolLimits
from tests.control.finance.making import apply, event

_SCRIPT = """
import sys
from portico.cli.main import main
for line in sys.argv[1:]:
    try:
        main(["admin", "ledger", *line.split("|")] if line else ["admin", "ledger"])
    except SystemExit as end:
        print(f"== {end.code}", flush=True)
"""
AT = datetime(2026, 1, 10, tzinfo=UTC)


def run(url: str, *commands: str) -> list[tuple[int, str]]:
    """Exit code and output of each command, given as ``word|word``."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PORTICO_")}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *commands], env=env | {"PORTICO_DATABASE_URL": url}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.findall(r"(.*?)== (\d+)\n", done.stdout, re.DOTALL)
    assert len(found) == len(commands), done.stdout
    return [(int(code), out) for out, code in found]


def test_from_an_invoice_to_a_fault(empty_database_url: str) -> None:
    url = empty_database_url
    early, none = run(url, "verify", "")
    assert early[0] == none[0] == 4 and "Run: portico migrate" in early[1]

    async def fill() -> None:
        await migrations.upgrade(url)
        db = Database(url, PoolLimits(size=2))
        for currency, gross, tax in (("EUR", 1190, 190), ("JPY", 1100, 100), ("KWD", 1050, 50)):
            facts = {"account": currency, "organization_id": "org_1", "currency": currency, "occurred_at": AT}
            await apply(db, event("invoice.issued", invoice_ref=currency, amount_minor=gross, tax_minor=tax, **facts))
        await recognition.advance(db, date(2026, 2, 1), 10)
        await db.close()

    async def sql(statement: str) -> None:
        db = Database(url, PoolLimits(size=1))
        async with db.transaction() as tx:
            await tx.raw.execute("SET LOCAL session_replication_role = replica")
            await tx.raw.execute(statement)
        await db.close()

    asyncio.run(fill())
    empty, sealed, again, future, wrong, listed, shown = run(
        url, "--json", "seal|2026-02-01|--json", "seal|2026-02-01", "seal|2999-01-01", "seal|yesterday", "--json", "",
    )  # fmt: skip
    assert empty == (0, "[]\n")
    seal = json.loads(sealed[1])
    assert (seal["starts_on"], seal["ends_on"], seal["transactions"], seal["sealed_by"]) == (
        "2026-01-10", "2026-02-01", 6, "installation",
    )  # fmt: skip
    assert again[0] == 1 and "(ledger.period_sealed)" in again[1]
    assert future[0] == 1 and "is not over" in future[1]
    assert wrong[0] == 2 and "is no day" in wrong[1]
    assert json.loads(listed[1]) == [seal]
    assert shown[0] == 0 and seal["hash"] in shown[1]

    good, kept, lost, typo, one, other, as_json = run(
        url, "verify", f"verify|--seal|{seal['hash']}", f"verify|--seal|{'0' * 64}", "verify|--seal|x",
        "verify|--organization|org_1", "verify|--organization|org_2", "verify|--json",
    )  # fmt: skip
    assert good[0] == 0 and "transactions  6" in good[1] and "Without --seal" in good[1]
    assert kept[0] == 0 and "1 of them kept elsewhere" in kept[1] and "Without --seal" not in kept[1]
    assert lost[0] == 1 and "is none of the seals here" in lost[1]
    assert typo[0] == 2 and "64 hexadecimal digits" in typo[1]
    assert one[0] == 0 and "valid         org_1" in one[1] and "seals" not in one[1]
    assert other[0] == 1 and "nothing was ever booked for org_2" in other[1]
    assert json.loads(as_json[1]) == {
        "valid": True, "chains": 2, "events": 3, "transactions": 6, "seals": 1,
        "newest_seal": {"ends_on": "2026-02-01", "hash": seal["hash"]}, "fault": None,
    }  # fmt: skip

    table, plain, nobody, before = run(
        url, "trial-balance", "trial-balance|--json", "trial-balance|--organization|org_2",
        "trial-balance|--until|2026-01-10|--json",
    )  # fmt: skip
    rows = [line.split() for line in table[1].splitlines()]
    assert ["1200", "Accounts", "receivable", "EUR", "11.90", "0.00", "11.90"] in rows
    assert ["2100", "Tax", "payable", "JPY", "0", "100", "-100"] in rows
    assert ["4000", "Revenue", "KWD", "0.000", "1.000", "-1.000"] in rows
    assert ["sum", "EUR", "0.00"] in rows
    assert {row["currency"] for row in json.loads(plain[1])} == {"EUR", "JPY", "KWD"}
    assert nobody[0] == 0 and "Nothing is booked." in nobody[1]
    assert json.loads(before[1]) == []

    asyncio.run(
        sql("UPDATE ledger_postings SET amount_minor = amount_minor + 1 WHERE account = 'revenue' AND currency = 'EUR'")
    )
    broken, off = run(url, "verify", "trial-balance")
    assert broken[0] == 1 and "is not what was written" in broken[1] and "(ledger.broken)" in broken[1]
    assert off[0] == 1 and "do not sum to zero" in off[1]
