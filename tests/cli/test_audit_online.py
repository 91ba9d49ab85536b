"""`portico audit verify` without a file: against an API, and against one that is not honest."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from portico.cli import audit
from portico.errors import Problem
from tests.cli.test_audit import KEY, checkpoint, entries


class Served:
    """What `GET /v1/audit/…` answers, as the client of the command sees it."""

    server = "https://api.example.com"

    def __init__(self, rows: list[dict[str, Any]], kept: dict[str, Any]) -> None:
        self.rows, self.kept, self.asked = rows, kept, list[str]()
        self.fault: dict[str, Any] | None = None
        self.head = len(rows)

    async def call(self, method: str, path: str) -> dict[str, Any]:
        self.asked.append(path)
        if "/checkpoints" in path:
            return {"next_cursor": None, "anchor": None, **self.kept}
        following = 3 if path.endswith("verify") and self.fault is None else None
        return {"fault": self.fault, "head": {"seq": self.head, "hash": ""}, "next": following}

    async def lines(self, path: str) -> AsyncIterator[bytes]:
        self.asked.append(path)
        for row in self.rows:
            yield json.dumps(row).encode()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    import asyncio

    rows = entries(5)
    made = Served(rows, checkpoint(4, rows[3]["hash"]))
    monkeypatch.setattr(audit, "with_api", lambda server, work: asyncio.run(work(made)))
    return made


def test_everything_agrees(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    audit.verify(None, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["valid"], found["checked"], found["checkpoints"]) == (True, 5, 1)
    assert served.asked == ["audit/verify", "audit/verify?from=3", "audit/checkpoints?limit=100", "audit/export"]
    audit.verify(None, installation=True)
    assert "admin/audit/export" in served.asked
    said = capsys.readouterr()
    assert "1 agree" in said.out and "Without --checkpoints" in said.err  # theirs alone prove little


def test_a_platform_that_says_valid_is_not_believed(served: Served) -> None:
    served.rows[2]["action"] = "thing.other"
    with pytest.raises(Problem, match="number 3: hash"):
        audit.verify(None, as_json=True)


def test_an_export_that_ends_early(served: Served) -> None:
    served.kept = {"data": [], "keys": []}
    del served.rows[3:]
    with pytest.raises(Problem, match="number 4: missing: the platform's log ends at 5, its export at 3"):
        audit.verify(None, as_json=True)


def test_what_the_platform_found_itself(served: Served) -> None:
    served.fault = {"seq": 4, "kind": "anchor", "detail": "x"}
    with pytest.raises(Problem, match="number 4: anchor"):
        audit.verify(None, as_json=True)


def test_checkpoints_by_another_key_than_the_one_kept(served: Served, tmp_path: Any) -> None:
    pin = tmp_path / "keys.json"
    pin.write_text(json.dumps({"keys": [{**KEY.public_jwk(), "kid": "other"}]}))
    with pytest.raises(Problem, match="by a key of --keys"):
        audit.verify(None, None, pin, as_json=True)
