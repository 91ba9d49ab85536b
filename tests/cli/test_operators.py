"""`portico admin grant|revoke|list` as an operator types them, against a real database."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import sqlalchemy as sa

from portico.cli import operators as commands
from portico.control.audit.store import audit_events
from portico.control.identity.tables import users
from portico.errors import Problem
from portico.kit.db import Database

_SCRIPT = """
import sys
from portico.cli.main import main
for line in sys.argv[1:]:
    try:
        main(["admin", *line.split("|")])
    except SystemExit as end:
        print(f"== {end.code}", flush=True)
"""


def run(url: str, *lines: str) -> list[tuple[str, int]]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PORTICO_")}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *lines], env=env | {"PORTICO_DATABASE_URL": url}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=60, check=True,
    )  # fmt: skip
    found = re.findall(r"(.*?)== (\d+)\n", done.stdout, re.DOTALL)
    assert len(found) == len(lines), done.stdout
    return [(out, int(code)) for out, code in found]


async def test_from_the_first_grant_to_the_last_revocation(database_url: str, db: Database) -> None:
    async with db.transaction() as tx:
        for user, email in (("usr_1", "one@example.com"), ("usr_2", "two@example.com")):
            await tx.execute(sa.insert(users).values(id=user, email=email))
    said: list[Any] = run(
        database_url,
        "list",
        "grant|one@example.com|--reason|first on call",
        "grant|TWO@example.com|--expires|30d",
        "list",
        "list|--json",
        "revoke|one@example.com",
        "revoke|two@example.com|--reason|contract ended",
        "grant|nobody@example.com",
        "grant|one@example.com|--expires|yesterday",
        "grant|one@example.com|--expires|2001-01-01T00:00:00Z",
    )
    (none, _), (granted, zero), (until, _), (table, _), (listed, _) = said[:5]
    assert none == "Nobody is one.\n"
    assert (granted, zero) == ("one@example.com is a platform operator\n", 0)
    assert re.fullmatch(r"TWO@example.com is a platform operator until \d{4}-\d\d-\d\d \d\d:\d\d\n", until)
    assert re.search(r"^one@example.com +live .* first on call$", table, re.MULTILINE)
    one, two = json.loads(listed)
    assert (one["expires_at"], one["state"], one["granted_by"]) == (None, "live", "installation")
    assert two["expires_at"].endswith("+00:00")
    (last, refused), (ended, _), (unknown, _), (no_time, usage), (past, _) = said[5:]
    assert "portico admin grant" in last and refused == 1
    assert ended == "two@example.com is no platform operator any more\n"
    assert "nobody has an account as nobody@example.com" in unknown
    assert "'yesterday' is no time" in no_time and usage == 2
    assert "expir" in past
    async with db.read() as reader:
        rows = await reader.fetch_all(sa.select(audit_events).order_by(audit_events.c.id))
    assert [(row.action, row.target, row.chain) for row in rows] == [
        ("operator.grant", "usr_1", "installation"),
        ("operator.grant", "usr_2", "installation"),
        ("operator.revoke", "usr_2", "installation"),
    ]
    assert rows[0].details["system_user"] and rows[2].details["reason"] == "contract ended"


def test_a_reason_is_one_line() -> None:
    for text in ("a\nb", "x" * 501):
        try:
            commands.revoke("one@example.com", text)
        except Problem as refused:
            assert refused.code == "config.invalid"
        else:
            raise AssertionError(text)
