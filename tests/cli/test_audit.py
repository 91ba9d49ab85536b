"""`portico audit verify` over exports, and `portico admin erase-audit` on a database."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from portico.cli import audit
from portico.control.access import Caller
from portico.control.audit import chain, checkpoint_tokens, service
from portico.control.identity.tables import users
from portico.errors import Problem
from portico.kit import jwt
from portico.kit.db import Database
from portico.kit.sealing import new_master_key

KEY = jwt.SigningKey.generate()


def entries(count: int) -> list[chain.Entry]:
    made: list[chain.Entry] = []
    previous = chain.ZERO
    for seq in range(1, count + 1):
        entry: chain.Entry = {
            "chain": "org_1", "seq": seq, "id": f"aud_{seq}", "ts": "2026-01-01T00:00:00.000Z",
            "actor": {"kind": "person", "id": "usr_1"}, "action": "thing.change", "target": None, "outcome": "success",
            "details": {"n": seq}, "request_id": None, "personal": {}, "salt": None, "commitments": {},
        }  # fmt: skip
        previous = chain.link(previous, chain.record_of(entry))
        made.append({**entry, "hash": previous.hex()})
    return made


def checkpoint(seq: int, hash_: str, key: jwt.SigningKey = KEY) -> dict[str, Any]:
    claims = {"chain": "org_1", "seq": seq, "hash": hash_, "at": 1}
    token = key.sign(checkpoint_tokens.TYP, claims)
    return {"data": [{"token": token}], "keys": [KEY.public_jwk()]}


class Files:
    def __init__(self, folder: Path) -> None:
        self.export, self.kept = folder / "export.jsonl", folder / "checkpoints.json"

    def verify(self, rows: list[chain.Entry], signed: dict[str, Any] | None = None) -> None:
        self.write(rows, signed)
        audit.verify(self.export, [self.kept] if signed is not None else None, as_json=True)

    def write(self, rows: list[chain.Entry], signed: dict[str, Any] | None) -> None:
        self.export.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if signed is not None:
            self.kept.write_text(json.dumps(signed))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_what_was_written_is_valid(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    rows = entries(5)
    files.verify(rows, checkpoint(4, rows[3]["hash"]))
    found = json.loads(capsys.readouterr().out)
    assert (found["valid"], found["checked"], found["checkpoints"], found["from"]) == (True, 5, 1, 1)
    files.verify(rows[2:], checkpoint(4, rows[3]["hash"]))
    found = json.loads(capsys.readouterr().out)
    assert (found["valid"], found["checked"], found["from"]) == (True, 2, 3)


def test_what_was_changed_is_broken(files: Files) -> None:
    rows = entries(5)
    signed = checkpoint(5, rows[4]["hash"])
    edited = [dict(row) for row in rows]
    edited[1]["action"] = "thing.other"
    for changed, kept, kind in (
        (edited, None, "number 2: hash"),
        (rows[:1] + rows[2:], None, "number 2: missing"),
        (rows[:3], signed, "number 4: truncated"),
        (rows, checkpoint(5, "00" * 32), "number 5: checkpoint"),
        (rows, checkpoint(5, rows[4]["hash"], jwt.SigningKey(bytes(32), KEY.kid)), "does not verify"),
        ([], signed, "number 1: truncated"),
        ([{"seq": 1}], None, "number 1: unreadable"),
    ):
        with pytest.raises(Problem, match=kind) as refused:
            files.verify(changed, kept)
        assert refused.value.code == "audit.broken"


def test_only_pinned_keys_are_believed(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who hashes everything anew can sign it anew, with a key of their own beside it; not with the one that was kept."""
    rows = entries(5)
    pin = tmp_path / "keys.json"
    pin.write_text(json.dumps({"keys": [KEY.public_jwk()]}))
    files.write(rows, checkpoint(4, rows[3]["hash"]))
    audit.verify(files.export, [files.kept], pin, as_json=True)
    assert json.loads(capsys.readouterr().out)["checkpoints"] == 1
    theirs = jwt.SigningKey.generate()
    forged = checkpoint(4, rows[3]["hash"], theirs)
    files.write(rows, {**forged, "keys": [theirs.public_jwk()]})
    audit.verify(files.export, [files.kept], as_json=True)  # without pin it is believed
    with pytest.raises(Problem, match="by a key of --keys") as refused:
        audit.verify(files.export, [files.kept], pin, as_json=True)
    assert refused.value.code == "audit.broken"
    for text in ("{", "[]", '{"keys": [{"kty": "RSA"}]}'):
        pin.write_text(text)
        with pytest.raises(Problem, match="--keys"):
            audit.verify(files.export, [files.kept], pin, as_json=True)


def test_a_log_that_begins_later_stands_on_what_retention_signed(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = entries(5)
    linked = [{**row, "prev": before["hash"]} for before, row in itertools.pairwise(rows)][1:]  # 3, 4, 5
    anchor = KEY.sign(checkpoint_tokens.ANCHOR_TYP, {"chain": "org_1", "seq": 2, "hash": rows[1]["hash"], "at": 1})
    kept = {**checkpoint(4, rows[3]["hash"]), "anchor": {"seq": 2, "kid": KEY.kid, "token": anchor}}
    files.verify(linked, kept)
    found = json.loads(capsys.readouterr().out)
    assert (found["valid"], found["from"], found["checked"], found["anchored"]) == (True, 3, 3, True)
    other = KEY.sign(checkpoint_tokens.ANCHOR_TYP, {"chain": "org_1", "seq": 2, "hash": rows[2]["hash"], "at": 1})
    with pytest.raises(Problem, match="number 2: anchor"):
        files.verify(linked, {**kept, "anchor": {"seq": 2, "kid": KEY.kid, "token": other}})
    # A checkpoint is no statement of retention.
    (row,) = kept["data"]
    with pytest.raises(Problem, match="does not verify"):
        files.verify(linked, {**kept, "anchor": {"seq": 4, "kid": KEY.kid, "token": row["token"]}})


def test_a_folder_of_checkpoints(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = entries(5)
    folder = tmp_path / "kept"
    folder.mkdir()
    for seq in (2, 4):
        (folder / f"{seq}.json").write_text(json.dumps(checkpoint(seq, rows[seq - 1]["hash"])))
    files.write(rows, None)
    audit.verify(files.export, [folder], as_json=True)
    assert json.loads(capsys.readouterr().out)["checkpoints"] == 2


def test_files_that_cannot_be_used_are_named(files: Files, tmp_path: Path) -> None:
    for text in ("{", "[]", "null"):
        files.export.write_text(text)
        with pytest.raises(Problem, match="JSON Lines"):
            audit.verify(files.export, None, as_json=True)
        files.kept.write_text(text)
        with pytest.raises(Problem, match="--checkpoints"):
            audit.verify(files.export, [files.kept], as_json=True)
    with pytest.raises(Problem, match="No such file"):
        audit.verify(tmp_path / "none", None, as_json=True)


async def test_an_operator_erases_a_person(db: Database, database_url: str, tmp_path: Path) -> None:
    async with db.transaction() as tx:
        await tx.execute(sa.insert(users).values(id="usr_7", email="seven@b.example"))
        who = Caller("person", "usr_7", "org_7", address="192.0.2.7")
        await service.record(tx, who, "user.register", "usr_7", details={"email": "seven@b.example"})
    env = {**os.environ, "PORTICO_DATABASE_URL": database_url, "PORTICO_MASTER_KEY": new_master_key()}
    argv = [sys.executable, "-m", "portico.cli", "admin", "erase-audit"]
    done = subprocess.run([*argv, "usr_7"], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "erased in 1 row\n"), done.stderr
    async with db.read() as reader:
        found = await service.verify(reader, "org_7", None, 10)
        left = await reader.scalar(sa.text("SELECT count(*) FROM audit_events WHERE personal IS NOT NULL"))
    assert (found["valid"], left) == (True, 0)
    unknown = subprocess.run([*argv, "usr_8"], env=env, capture_output=True, text=True, timeout=60)
    assert unknown.returncode == 1
    assert "there is no person usr_8" in unknown.stderr
