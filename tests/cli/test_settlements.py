"""`portico admin settlements` as an operator types it, against a real database."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from portico.kit.sealing import new_master_key

_SCRIPT = """
import sys
from portico.cli.main import main
for line in sys.argv[1:]:
    try:
        main(["admin", "settlements", *line.split("|")] if line else ["admin", "settlements"])
    except SystemExit as end:
        print(f"== {end.code}", flush=True)
"""


def run(url: str, *commands: str) -> list[tuple[int, str]]:
    """Exit code and output of each command, given as ``word|word``."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PORTICO_")}
    env |= {"PORTICO_DATABASE_URL": url, "PORTICO_MASTER_KEY": new_master_key()}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *commands], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    found = re.findall(r"(.*?)== (\d+)\n", done.stdout, re.DOTALL)
    assert len(found) == len(commands), done.stdout
    return [(int(code), out) for out, code in found]


def test_from_a_providers_rows_to_the_list(database_url: str, tmp_path: Path) -> None:
    rows = [
        {"id": "txn_1", "type": "charge", "source": "ch_1", "amount": 1000, "fee": 59, "net": 941, "currency": "eur"}
    ]
    good, bad, none = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "none.json"
    good.write_text(json.dumps({"object": "list", "data": rows}))
    bad.write_text(json.dumps([rows[0] | {"net": 1}]))
    options = "--provider|stripe|--account|acct_1|--batch|po_1|--from|2026-01-01|--until|2026-02-01"
    taken, again, wrong, missing, listed, shown = run(
        database_url, f"import|{good}|{options}|--json", f"import|{good}|{options}", f"import|{bad}|{options}",
        f"import|{none}|{options}", "--json", "",
    )  # fmt: skip
    assert taken[0] == 0
    receipt = json.loads(taken[1])["receipt"]
    assert again == (0, f"{receipt} duplicate\n")
    assert wrong[0] != 0 and "row 1: net is 1" in wrong[1]
    assert missing[0] != 0 and "No such file" in missing[1]
    assert [(each["id"], each["state"], each["batch_id"]) for each in json.loads(listed[1])] == [
        (receipt, "received", "po_1")
    ]
    assert receipt in shown[1] and "2026-01-01..2026-02-01" in shown[1]

    detail, waits, refused, state, gone, many = run(
        database_url, f"show|{receipt}", f"reconcile|{receipt}|--reason|now", f"resolve|{receipt}|accepted|--reason|x",
        "reconcile|--reason|x|--state|open", "show|stl_none", "reconcile|--reason|all of them|--json",
    )  # fmt: skip
    assert detail[0] == 0 and "received" in detail[1]
    assert waits[0] != 0 and "Being compared already" in waits[1]
    assert refused[0] != 0 and "is received" in refused[1]
    assert state[0] != 0 and "one of received" in state[1]
    assert gone[0] != 0 and "not found" in gone[1].lower()
    assert many == (0, '{"receipts": []}\n') or json.loads(many[1]) == {"receipts": []}
