"""`portico admin regions` as an operator types it, against a real database."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from portico.kit import keyfiles

_SCRIPT = """
import sys
from portico.cli.main import main
for line in sys.argv[1:]:
    try:
        main(["admin", "regions", *line.split("|")] if line else ["admin", "regions"])
    except SystemExit as end:
        print(f"== {end.code}", flush=True)
"""


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


def test_a_key_from_file_to_removal(database_url: str, tmp_path: Path) -> None:
    region, worker = tmp_path / "region.key", tmp_path / "worker.key"
    made, again, keys = run(
        database_url, f"new-key|{region}|--json", f"new-key|{region}", f"new-worker-key|{worker}|--json"
    )
    assert made[0] == 0 and again[0] != 0 and "is there already" in again[1]
    public = json.loads(made[1])
    assert region.stat().st_mode & 0o777 == worker.stat().st_mode & 0o777 == 0o600
    assert keyfiles.region_keys("x", (region,)).ids == [public["key_id"]]
    assert keyfiles.worker_keys("x", worker).public == json.loads(keys[1])["signer"]
    assert "PRIVATE" not in made[1] + keys[1]

    added, listed, wrong, name, removed, gone, empty = run(
        database_url, f"add|eu|{public['public_key']}", "--json", "add|eu|nonsense", f"add|E U|{public['public_key']}",
        f"rm|eu|{public['key_id']}", f"rm|eu|{public['key_id']}", "",
    )  # fmt: skip
    assert added[0] == 0 and public["key_id"] in added[1]
    rows = json.loads(listed[1])
    assert [(row["region"], [key["key_id"] for key in row["keys"]]) for row in rows] == [("eu", [public["key_id"]])]
    assert wrong[0] != 0 and "X25519" in wrong[1]
    assert name[0] != 0 and "lower-case" in name[1]
    assert removed[0] == 0
    assert gone[0] != 0 and "no such key" in gone[1]
    assert "There are none" in empty[1]


def test_a_public_key_that_looks_like_an_option(database_url: str) -> None:
    texts = [base64.urlsafe_b64encode(bytes((0xFA, first)) + bytes(30)).decode().rstrip("=") for first in (0x10, 0x50)]
    assert [text[:2] for text in texts] == ["-h", "-l"]
    added = run(database_url, *(f"add|{text[1]}|{text}" for text in texts), "--json")
    assert [code for code, _ in added] == [0, 0, 0], added
    assert [row["region"] for row in json.loads(added[2][1])] == ["h", "l"]
