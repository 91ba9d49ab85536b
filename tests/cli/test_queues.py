"""`portico admin queues` as an operator types it, against a real database."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from portico.kit import outbox
from portico.kit.db import Database
from portico.kit.sealing import Sealer, new_master_key
from portico.settings import Secret

#: Several commands in one process: starting Python is most of what each would cost.
_SCRIPT = """
import sys
from portico.cli.main import main
for line in sys.argv[1:]:
    try:
        main(["admin", "queues", *line.split("|")] if line else ["admin", "queues"])
    except SystemExit as end:
        print(f"== {end.code}", flush=True)
"""


@dataclass
class Said:
    """What one command said, and its exit code."""

    out: str
    code: int


@pytest.fixture
def queues(database_url: str) -> Any:
    """Runs commands, each given as ``word|word``."""

    def run(*commands: str, url: str = database_url) -> list[Said]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("PORTICO_")}
        argv = [sys.executable, "-c", _SCRIPT, *commands]
        done = subprocess.run(
            argv, env=env | {"PORTICO_DATABASE_URL": url}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=60, check=True,
        )  # fmt: skip
        found = re.findall(r"(.*?)== (\d+)\n", done.stdout, re.DOTALL)
        assert len(found) == len(commands), done.stdout
        return [Said(out, int(code)) for out, code in found]

    return run


async def dead_messages(db: Database, *errors: str) -> list[str]:
    sealer, made = Sealer(Secret(new_master_key())), []
    async with db.transaction() as tx:
        for number, error in enumerate(errors):
            draft = outbox.Draft("mail", f"key-{number}", "a@example.com", "account.verify", {})
            made.append(await outbox.append(tx, sealer, draft) or "")
            await tx.raw.execute(
                "UPDATE outbox_messages SET queue_state = 'dead', attempts = 10, last_error = $2, finished_at = now()"
                " WHERE id = $1", made[-1], error
            )  # fmt: skip
    return made


async def test_dead_jobs_are_listed_chosen_and_replayed(db: Database, queues: Any) -> None:
    first, second, third = await dead_messages(db, "no route", "no such \x1b[31mfolder", "no route")
    listed, listed_json, shown, shown_json, tried, one, rest, none = queues(
        "", "--json", "dead|outbox.mail|--error|folder", "dead|outbox.mail|--json",
        "replay|outbox.mail|--error|no route|--dry-run", f"replay|outbox.mail|--id|{second}", "replay|outbox.mail",
        "replay|outbox.mail",
    )  # fmt: skip
    (line,) = (line for line in listed.out.splitlines() if line.startswith("outbox.mail"))
    assert line.split() == ["outbox.mail", "notifications", "0", "0", "0", "3", "-"]
    kinds = {each["kind"]: each for each in json.loads(listed_json.out)}
    assert kinds["outbox.mail"]["dead"] == 3 and kinds["tunnels.clear"]["dead"] == 0
    assert second in shown.out and first not in shown.out and "\x1b" not in shown.out
    assert [job["id"] for job in json.loads(shown_json.out)] == [first, second, third]
    assert tried.out == "2 jobs of outbox.mail would be replayed\n"
    assert one.out == "1 job of outbox.mail will be tried again\n"
    assert rest.out == "2 jobs of outbox.mail will be tried again\n"
    assert none.out == "0 jobs of outbox.mail will be tried again\n"
    assert {said.code for said in (listed, listed_json, shown, shown_json, tried, one, rest, none)} == {0}
    async with db.read() as reader:
        audited = await reader.raw.fetch(
            "SELECT details::text FROM audit_events WHERE action = 'queue.replayed' ORDER BY at"
        )
    assert [json.loads(row["details"])["jobs"] for row in audited] == [[second], [first, third]]


def test_what_cannot_be_is_said(queues: Any, empty_database_url: str) -> None:
    unknown, bare = queues("dead|no.such", "", url=empty_database_url)
    assert unknown.code == 2 and "no kind of jobs is called no.such; there are: " in unknown.out
    assert "tunnels.clear" in unknown.out
    assert bare.code == 4 and "portico migrate" in bare.out and "Traceback" not in bare.out
