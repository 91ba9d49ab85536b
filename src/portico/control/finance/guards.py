"""What the database itself keeps right, and whether it still does: triggers, their functions, privileges.

Whoever owns the tables can switch a trigger off, put another function behind it, or give privileges back. No code of Portico's
does; so a guard that is not what the migrations made is a fault, though nothing may have been written past it yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from portico.kit.db import HasConnection

#: Tables whose rows are written once.
WRITTEN_ONCE: Final = (
    "billing_finance_events", "billing_tax_records", "ledger_postings", "ledger_seals", "ledger_transactions",
    "mrr_movements",
)  # fmt: skip
# When a trigger fires, as pg_trigger.tgtype has it: row 1, before 2, insert 4, delete 8, update 16, truncate 32.
_BEFORE_CHANGE, _BEFORE_ALL, _BEFORE_INSERT, _BEFORE_TRUNCATE, _AFTER_INSERT, _AFTER_PUT = 27, 31, 7, 34, 5, 21
#: Triggers by table and name: their function, and when they fire.
TRIGGERS: Final[Mapping[tuple[str, str], tuple[str, int]]] = {
    **{(table, "written_once"): ("finance_written_once", _BEFORE_CHANGE) for table in WRITTEN_ONCE},
    **{
        (table, "written_once_truncate"): ("finance_written_once", _BEFORE_TRUNCATE)
        for table in (*WRITTEN_ONCE, "billing_credit_notes", "billing_invoices", "billing_number_series")
    },
    **{
        (table, name): (name, when)
        for table in ("billing_credit_notes", "billing_invoices")
        for name, when in (("billing_numbered_guard", _BEFORE_CHANGE), ("billing_number_drawn", _AFTER_PUT))
    },
    **{
        (table, name): (name, when)
        for table in ("billing_finance_events", "ledger_transactions")
        for name, when in (("ledger_follows", _BEFORE_INSERT), ("ledger_linked", _AFTER_INSERT))
    },
    **{
        (table, name): (name, when)
        for table in ("ledger_postings", "ledger_transactions")
        for name, when in (("ledger_balanced", _AFTER_INSERT), ("ledger_open", _BEFORE_INSERT))
    },
    ("billing_number_series", "billing_number_series_guard"): ("billing_number_series_guard", _BEFORE_ALL),
    ("billing_number_series", "billing_number_used"): ("billing_number_used", _AFTER_PUT),
    ("ledger_chains", "ledger_chains_guard"): ("ledger_chains_guard", _BEFORE_ALL),
    ("ledger_chains", "ledger_chains_guard_truncate"): ("finance_written_once", _BEFORE_TRUNCATE),
    ("ledger_recognition", "ledger_recognition_guard"): ("ledger_recognition_guard", _BEFORE_CHANGE),
    ("ledger_recognition", "ledger_recognition_guard_truncate"): ("finance_written_once", _BEFORE_TRUNCATE),
    ("ledger_seals", "ledger_seals_guard"): ("ledger_seals_guard", _BEFORE_INSERT),
}
#: SHA-256 of the body of each function, as the last migration made it.
FUNCTIONS: Final[Mapping[str, str]] = {
    "billing_number_drawn": "92573f239d66df0e199795577d9e851e7cf11f4da3d971de237f3ed7f107ca5d",
    "billing_number_series_guard": "1ce9e71e376245817cf5038f86c61c9c29426b0a2a9c821dad2127636dc0a9f1",
    "billing_number_used": "70edc13e3b0f3e8dfde5dfe30619dc88db6637c0c65fa5e26d372a8e1705ec8d",
    "billing_numbered_guard": "a084f8662fc919b796566cd78a331ea81427a18ddd03a88291e5da3ba81fdd09",
    "finance_written_once": "ffbf0f188359d9f7ef44099ee009ad9c27894ecb4729826b2ac45c279a91bec1",
    "ledger_balanced": "1b9b3c151cc475cd7cf39080ee030a41249f7be471f5ffc53ae5387f0f69a27b",
    "ledger_chains_guard": "4a05ea1674d55f392d90f649c53710d5d7262ef82d0108d23e0e2bf570468efd",
    "ledger_follows": "2b02a1b340c04c7f0e2b1fafa35763cd1b510485cac3e00bfa2d7cf0864245cd",
    "ledger_linked": "1cb8d73c7a61075bc8f98e759c2725ac92fd663283a5edc6e5701d16f4ce9eb7",
    "ledger_open": "796664e371e7c0e27b2c8a5b3761e2c2fa45c4a403b1cbabbba4b162adcd0026",
    "ledger_recognition_guard": "210a8d7fd2c87c12fbdb261597ca49ca449b03bec121e9f628384eb5e8219732",
    "ledger_seals_guard": "3d776ac46285e0248dfd3aaa2f6c251c1e333c22fb12927ba736117dd4395b22",
}
_TRIGGERS: Final = """
SELECT c.relname, g.tgname, p.proname, g.tgtype FROM pg_trigger g
JOIN pg_class c ON c.oid = g.tgrelid JOIN pg_proc p ON p.oid = g.tgfoid
WHERE NOT g.tgisinternal AND g.tgenabled IN ('O', 'A') AND g.tgqual IS NULL
    AND c.relnamespace = current_schema()::text::regnamespace
"""
_FUNCTIONS: Final = """
SELECT proname, encode(sha256(convert_to(prosrc, 'UTF8')), 'hex') AS body FROM pg_proc
WHERE proname = ANY($1) AND pronamespace = current_schema()::text::regnamespace
"""
_MAY: Final = """
SELECT name FROM unnest($1::text[]) AS name
WHERE has_table_privilege(current_user, name, 'UPDATE, DELETE, TRUNCATE')
    AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
"""


async def fault(reader: HasConnection) -> tuple[str, str] | None:
    """The first guard that is not as it was made: where, and what; ``None``: they all are."""
    rows: list[Any] = await reader.raw.fetch(_TRIGGERS)
    there = {(row["relname"], row["tgname"]): (row["proname"], row["tgtype"]) for row in rows}
    for (table, name), made in TRIGGERS.items():
        if there.get((table, name)) != made:
            return table, f"its trigger {name} is switched off, gone, or another one"
    bodies = {row["proname"]: row["body"] for row in await reader.raw.fetch(_FUNCTIONS, list(FUNCTIONS))}
    for name, body in FUNCTIONS.items():
        if bodies.get(name) != body:
            return f"function {name}", "is not the one that this version of Portico made"
    if row := await reader.raw.fetchrow(_MAY, list(WRITTEN_ONCE)):
        return str(row["name"]), "the platform's role has the privilege to change what is written once"
    return None
