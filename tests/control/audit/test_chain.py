"""The hash chain: its format, and every way to change a stored row being found."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from portico.control import changes, migrations
from portico.control.access import Caller
from portico.control.audit import chain, checkpoint_files, checkpoints, export, service, store
from portico.errors import Problem
from portico.kit import ids, jwt
from portico.kit.db import Database, PoolLimits
from portico.kit.ids import new_id
from tests.control.conftest import Account
from tests.control.test_http import problem

KEY = jwt.SigningKey.generate()


def someone(organization: str | None, address: str | None = "192.0.2.1") -> Caller:
    return Caller("person", "usr_1", organization, request_id="req_1", address=address)


async def write(db: Database, organization: str, count: int = 5) -> None:
    """``count`` acts, each in its transaction."""
    for n in range(count):
        async with db.transaction() as tx:
            await service.record(tx, someone(organization), "thing.change", f"thing_{n}", details={"n": n})


async def verified(db: Database, name: str, first: int | None = None, limit: int = 100) -> dict[str, Any]:
    async with db.read() as reader:
        return await service.verify(reader, name, first, limit)


async def fault(db: Database, name: str) -> tuple[int, str] | None:
    found = (await verified(db, name))["fault"]
    return (found["seq"], found["kind"]) if found else None


async def entries(db: Database, name: str) -> list[chain.Entry]:
    async with db.read() as reader:
        return (await store.stretch(reader, name, 1, 10_000))[1]


async def signer(_: Any) -> jwt.SigningKey:
    return KEY


async def sign(db: Database) -> int:
    async with db.transaction() as tx:
        return await checkpoints.sign(tx, signer, datetime.now(UTC), 1000)


async def tamper(db: Database, *statements: str) -> None:
    """Change rows as somebody does who owns the database: with the triggers off."""
    async with db.transaction() as tx:
        await tx.raw.execute("SET LOCAL session_replication_role = replica")
        for statement in statements:
            await tx.raw.execute(statement)


@pytest.fixture
def name() -> str:
    return new_id("org")


# -- the format


def test_the_known_answers() -> None:
    record = {
        "seq": 1,
        "tenant": "t1",
        "ts": "2026-01-01T00:00:00.000Z",
        "actor": "usr_1",
        "action": "domain.create",
        "target": "dom_1",
        "outcome": "success",
    }
    first = chain.link(chain.ZERO, record)
    assert first.hex() == "3b2a874bb9a9c156b2f873917d5d6bbf892aae7358e8d9f93dc0db1f792e07ac"
    more = {"seq": 2, "ts": "2026-01-01T00:00:01.000Z", "action": "apikey.revoke", "target": "key_1"}
    second = chain.link(first, {**record, **more})
    assert second.hex() == "4d6bd6f50a90dba91940b0ffd79c47a03a8e613773fb92dfea05fc8e702a2cf7"


def test_the_worked_example_of_the_documentation() -> None:
    text = Path("docs/reference/audit-log.md").read_text()
    lines, hashed = re.findall(r"```json\n(.*?)```", text, re.DOTALL)[:2]
    example = [json.loads(line) for line in lines.splitlines()]
    walk = chain.Walk("org_example", 0, chain.ZERO)
    walk.feed(example)
    assert walk.fault is None
    assert walk.checked == 2
    assert json.loads(hashed) == chain.record_of(example[0])


# -- writing


async def test_rows_carry_what_they_commit_to(db: Database, name: str) -> None:
    async with db.transaction() as tx:
        facts = {"email": "a@b.example", "n": 1.5, "big": 2**60, "list": [1, None, True]}
        await service.record(tx, someone(name), "thing.change", "thing_1", details=facts)
    (row,) = await entries(db, name)
    assert row["details"] == {"n": 1.5, "big": str(2**60), "list": [1, None, True]}
    assert row["personal"] == {"actor.address": "192.0.2.1", "details.email": "a@b.example"}
    assert "192.0.2.1" not in json.dumps(chain.record_of(row))
    assert "a@b.example" not in json.dumps(chain.record_of(row))
    assert (await verified(db, name))["valid"]


async def test_no_secret_enters(db: Database, name: str) -> None:
    token = ids.new_token("agt")
    async with db.transaction() as tx:
        await service.record(tx, someone(name), "thing.change", token, details={"email": token, "deep": [{"x": token}]})
    assert token not in json.dumps(await entries(db, name))


async def test_many_writers_leave_one_gapless_chain_and_no_deadlock(database_url: str, name: str) -> None:
    """100 writers, each over two chains and the edge change table, in whatever order they ask for them."""
    wide = Database(database_url, PoolLimits(size=20, lock_timeout_seconds=20))
    other = new_id("org")

    async def act(n: int) -> None:
        async with wide.transaction() as tx:
            steps: list[Callable[[], Awaitable[None]]] = [
                lambda: service.record(tx, someone(name), "thing.change", f"thing_{n}"),
                lambda: service.record(tx, someone(other), "thing.change", f"thing_{n}"),
            ]
            if n % 3 == 0:
                changes.append(tx, changes.tunnel_removed("tun_1", "tunnel.deleted"))
            for step in steps if n % 2 else reversed(steps):
                await step()
            if n % 3 == 1:
                changes.append(tx, changes.tunnel_removed("tun_1", "tunnel.deleted"))
            if n % 10 == 9:
                raise KeyError  # rolled back: no number is lost

    outcomes = await asyncio.gather(*(act(n) for n in range(100)), return_exceptions=True)
    assert [repr(o) for o in outcomes if o is not None] == ["KeyError()"] * 10
    for one in (name, other):
        assert [row["seq"] for row in await entries(wide, one)] == list(range(1, 91))
        assert (await verified(wide, one))["valid"]
    await wide.close()


_CRASH = """
import asyncio, os, signal, sys
from portico.control.access import Caller
from portico.control.audit import service
from portico.kit.db import Database

async def main():
    db = Database(sys.argv[1])
    async with db.transaction() as tx:
        for n in range(3):
            await service.record(tx, Caller("person", "usr_1", sys.argv[2]), "thing.change", f"crash_{n}")
        async def die():
            os.kill(os.getpid(), signal.SIGKILL)
        tx.before_commit(die)  # after the rows and the head, before the commit

asyncio.run(main())
"""


async def test_a_writer_killed_before_its_commit_leaves_no_gap(db: Database, database_url: str, name: str) -> None:
    await write(db, name, 2)
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", _CRASH, database_url, name)
    assert await killed.wait() == -signal.SIGKILL
    await write(db, name, 1)
    assert [row["seq"] for row in await entries(db, name)] == [1, 2, 3]
    assert (await verified(db, name))["valid"]


_OLD_INSERT = """
INSERT INTO audit_events
    (id, organization_id, actor_kind, actor_id, action, target, outcome, details, request_id, address)
VALUES ($1, $2, 'person', 'usr_1', 'thing.change', 'thing_1', 'success', $3::text::jsonb, 'req_1', '192.0.2.1')
"""


async def test_rows_of_older_code_are_taken_in(db: Database, name: str) -> None:
    """During a rolling upgrade the code before inserts without a number."""
    await write(db, name, 1)
    async with db.transaction() as tx:
        for _ in range(3):
            await tx.raw.execute(_OLD_INSERT, new_id("aud"), name, json.dumps({"email": "a@b.example", "n": 1.0}))
    await write(db, name, 1)
    rows = await entries(db, name)
    assert [row["seq"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[1]["personal"] == {"actor.address": "192.0.2.1", "details.email": "a@b.example"}
    async with db.transaction() as tx:
        await tx.raw.execute(_OLD_INSERT, new_id("aud"), None, "{}")
    assert await service.catch_up(db) == 1
    for one in (name, chain.INSTALLATION):
        assert (await verified(db, one))["valid"]


async def test_a_row_without_a_number_only_gets_one(db: Database, name: str) -> None:
    async with db.transaction() as tx:
        await tx.raw.execute(_OLD_INSERT, new_id("aud"), name, "{}")
    for change in ("outcome = 'refused'", "details = '{}'", "seq = 1, chain = organization_id, actor_id = 'usr_2'"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with db.transaction() as tx:
                await tx.raw.execute(f"UPDATE audit_events SET {change} WHERE organization_id = $1", name)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with db.transaction() as tx:
            await tx.raw.execute("DELETE FROM audit_events WHERE organization_id = $1", name)
    assert await service.catch_up(db) == 1
    assert (await verified(db, name))["valid"]


async def test_rows_of_frequent_acts_get_their_number_later(db: Database, name: str) -> None:
    """They wait for nobody: also while another transaction holds the head of the chain."""
    await write(db, name, 1)
    who = Caller("agent_key", "key_1", name, address="192.0.2.1")
    async with db.transaction() as holding:
        await holding.raw.execute("SELECT FROM audit_chains WHERE chain = $1 FOR UPDATE", name)
        async with asyncio.timeout(30), db.transaction() as tx:
            secret = "tnl_agt_" + "a" * 36
            about = {"hostname": "build-1", "odd": secret}
            await service.record(tx, who, "agent_session.open", "ses_1", details=about, numbered=False)
    async with db.read() as reader:
        row = await reader.raw.fetchrow("SELECT seq, hash, details::text FROM audit_events WHERE target = 'ses_1'")
    assert row is not None
    assert row["seq"] is None
    assert secret not in row["details"], "what looks like a secret is masked before it is anywhere"
    assert await service.catch_up(db) == 1
    rows = await entries(db, name)
    assert [row["seq"] for row in rows] == [1, 2]
    assert rows[1]["personal"] == {"actor.address": "192.0.2.1", "details.hostname": "build-1"}
    assert (await verified(db, name))["valid"]


async def test_rows_that_were_there_before_the_chain_are_taken_in(empty_database_url: str) -> None:
    await migrations.upgrade(empty_database_url, "0006")
    plain = await asyncpg.connect(empty_database_url)
    for n in range(12):
        details = json.dumps({"email": f"{n}@b.example", "ratio": n / 7})
        await plain.execute(_OLD_INSERT, new_id("aud"), ("org_a", "org_b", None)[n % 3], details)
    await plain.close()
    await migrations.upgrade(empty_database_url)
    db = Database(empty_database_url)
    assert await service.catch_up(db) == 12
    for one in ("org_a", "org_b", chain.INSTALLATION):
        rows = await entries(db, one)
        assert [row["seq"] for row in rows] == [1, 2, 3, 4]
        assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
        assert (await verified(db, one))["valid"]
    await write(db, "org_a", 1)
    assert await fault(db, "org_a") is None
    await db.close()


# -- what is changed is found


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        pytest.param("UPDATE audit_events SET action = 'thing.other' WHERE {here} AND seq = 3", (3, "hash"), id="edit"),
        pytest.param(
            "UPDATE audit_events SET at = at - interval '1 s' WHERE {here} AND seq = 3", (3, "hash"), id="time"
        ),
        pytest.param("UPDATE audit_events SET details = '{{}}' WHERE {here} AND seq = 3", (3, "hash"), id="details"),
        pytest.param(
            "UPDATE audit_events SET address = '::1' WHERE {here} AND seq = 3", (3, "personal"), id="personal"
        ),
        pytest.param(
            "UPDATE audit_events SET address = null WHERE {here} AND seq = 3", (3, "personal"), id="taken out"
        ),
        pytest.param(
            "UPDATE audit_events SET organization_id = 'x' WHERE {here} AND seq = 3", (3, "chain"), id="moved"
        ),
        pytest.param("DELETE FROM audit_events WHERE {here} AND seq = 3", (3, "missing"), id="delete"),
        pytest.param("DELETE FROM audit_events WHERE {here} AND seq = 1", (1, "missing"), id="delete the first"),
        pytest.param("DELETE FROM audit_events WHERE {here}", (1, "missing"), id="delete all"),
        pytest.param("DELETE FROM audit_events WHERE {here} AND seq > 3", (4, "missing"), id="truncate"),
        pytest.param(
            "UPDATE audit_events SET seq = -seq WHERE {here} AND seq IN (2, 3);"
            "UPDATE audit_events SET seq = 5 + seq WHERE {here} AND seq < 0",
            (2, "hash"),
            id="swap",
        ),
        pytest.param(
            "UPDATE audit_events SET seq = seq + 100 WHERE {here} AND seq > 2;"
            "UPDATE audit_events SET seq = seq - 99 WHERE {here} AND seq > 100;"
            "INSERT INTO audit_events SELECT 'aud_x' || id, organization_id, at, actor_kind, actor_id, action, target,"
            " outcome, details, request_id, address, chain, 3, hash, commitments, personal, salt"
            " FROM audit_events WHERE {here} AND seq = 2",
            (3, "hash"),
            id="insert",
        ),
        pytest.param("UPDATE audit_chains SET seq = 4 WHERE {here}", (5, "head"), id="head"),
    ],
)
async def test_a_change_is_found_where_it_is(db: Database, name: str, statement: str, found: tuple[int, str]) -> None:
    await write(db, name)
    assert await fault(db, name) is None
    here = f"chain = '{name}'"
    await tamper(db, *statement.format(here=here).split(";"))
    assert await fault(db, name) == found


async def test_a_tail_cut_off_with_its_head_is_found_by_checkpoint(db: Database, name: str) -> None:
    await write(db, name)
    assert await sign(db) >= 1
    await tamper(
        db,
        f"DELETE FROM audit_events WHERE chain = '{name}' AND seq > 3",
        "UPDATE audit_chains c SET seq = 3, hash = e.hash FROM audit_events e"
        f" WHERE c.chain = '{name}' AND e.chain = c.chain AND e.seq = 3",
    )
    assert await fault(db, name) == (4, "truncated")


async def test_rows_hashed_anew_are_found_by_checkpoint(db: Database, name: str) -> None:
    await write(db, name)
    await sign(db)
    previous = chain.ZERO
    statements = []
    for row in await entries(db, name):
        row["action"] = "thing.other"
        previous = chain.link(previous, chain.record_of(row))
        statements.append(
            f"UPDATE audit_events SET action = 'thing.other', hash = '\\x{previous.hex()}'"
            f" WHERE chain = '{name}' AND seq = {row['seq']}"
        )
    await tamper(db, *statements, f"UPDATE audit_chains SET hash = '\\x{previous.hex()}' WHERE chain = '{name}'")
    assert await fault(db, name) == (5, "checkpoint")
    await tamper(db, f"DELETE FROM audit_checkpoints WHERE chain = '{name}'")
    assert await fault(db, name) is None  # why checkpoints are kept elsewhere, too


async def test_a_checkpoint_that_was_not_signed_is_found(db: Database, name: str) -> None:
    await write(db, name)
    await sign(db)
    forged = jwt.SigningKey(bytes(32), KEY.kid).sign(checkpoints.TYP, {"chain": name, "seq": 5, "hash": "00", "at": 1})
    await tamper(db, f"UPDATE audit_checkpoints SET token = '{forged}' WHERE chain = '{name}'")
    assert await fault(db, name) == (5, "signature")


async def test_only_chains_that_grew_are_signed(db: Database, name: str) -> None:
    await write(db, name)
    await sign(db)
    assert await sign(db) == 0
    await write(db, name, 1)
    assert await sign(db) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_events SET action = 'x' WHERE chain = $1",
        "UPDATE audit_events SET hash = salt WHERE chain = $1",
        "UPDATE audit_events SET address = '::1' WHERE chain = $1",
        "UPDATE audit_events SET address = NULL, erased_at = now() WHERE chain = $1",  # not the salt: half an erasure
        "DELETE FROM audit_events WHERE chain = $1",
    ],
)
async def test_the_database_refuses_changes(db: Database, name: str, statement: str) -> None:
    await write(db, name, 1)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with db.transaction() as tx:
            await tx.raw.execute(statement, name)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with db.transaction() as tx:
            await tx.raw.execute("TRUNCATE audit_events")
    assert (await verified(db, name))["checked"] == 1


# -- a piece at a time, erasure, retention


async def test_verification_is_bounded_and_goes_on(db: Database, name: str) -> None:
    await write(db, name, 10)
    await tamper(db, f"UPDATE audit_events SET target = 'x' WHERE chain = '{name}' AND seq = 9")
    seen, following = [], 1
    while following:
        found = await verified(db, name, following, limit=3)
        seen.append((found["from"], found["checked"], found["valid"]))
        following = found["next"]
    assert seen == [(1, 3, True), (4, 3, True), (7, 2, False)]
    assert found["fault"]["seq"] == 9
    assert (await verified(db, name, 50))["checked"] == 0
    assert (await verified(db, new_id("org")))["head"] == {"seq": 0, "hash": "00" * 32}


async def test_erasure_leaves_the_chain_valid(db: Database, name: str) -> None:
    async with db.transaction() as tx:
        await service.record(tx, someone(name), "user.register", "usr_9", details={"email": "nine@b.example", "n": 1})
        await service.record(tx, Caller("agent_key", "key_9", name, address="198.51.100.9"), "thing.change", "thing_1")
        await service.record(tx, someone(name, "203.0.113.7"), "thing.change", "thing_2")
    await sign(db)
    assert await service.erase_person(db, Caller("operator", "op", None), "usr_9", ["key_9"], "nine@b.example") == 2
    rows = await entries(db, name)
    text = json.dumps(rows)
    assert "nine@b.example" not in text
    assert "198.51.100.9" not in text
    assert "203.0.113.7" in text
    assert [row["salt"] is None for row in rows] == [True, True, False, True]
    assert [row["action"] for row in rows][-1] == "audit.erase"
    assert (await verified(db, name))["valid"]
    assert await service.erase_person(db, Caller("operator", "op", None), "usr_9", ["key_9"], None) == 0


async def test_retention_keeps_the_anchor(db: Database, name: str) -> None:
    await write(db, name, 6)
    edge = datetime.now(UTC)
    await asyncio.sleep(0.002)  # times are cut to milliseconds
    await write(db, name, 3)
    await sign(db)
    assert await service.trim(db, edge, signer, datetime.now(UTC)) >= 6
    found = await verified(db, name)
    assert (found["valid"], found["from"], found["checked"]) == (True, 7, 3)
    assert await service.trim(db, edge, signer, datetime.now(UTC)) == 0
    await tamper(db, f"DELETE FROM audit_events WHERE chain = '{name}' AND seq = 7")
    assert await fault(db, name) == (7, "missing")


async def trimmed(db: Database, name: str) -> None:
    """A chain of 8 rows, of which retention deleted 5."""
    await write(db, name, 5)
    await asyncio.sleep(0.002)
    edge = datetime.now(UTC)
    await asyncio.sleep(0.002)
    await write(db, name, 3)
    await service.trim(db, edge, signer, datetime.now(UTC))


async def exported(db: Database, name: str, first: int = 1, batch: int = 2) -> list[chain.Entry]:
    text = b"".join([part async for part in export.lines(db, name, first, "jsonl", batch)])
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_chains SET anchor_token = NULL WHERE chain = '{name}'",
        "UPDATE audit_chains SET anchor_token = 'a.b.c' WHERE chain = '{name}'",
        # Rows deleted as if by retention: the chain fits, and nobody signed for it.
        "UPDATE audit_chains c SET anchor_seq = 6, anchor_hash = e.hash FROM audit_events e"
        " WHERE c.chain = '{name}' AND e.chain = c.chain AND e.seq = 6;"
        "DELETE FROM audit_events WHERE chain = '{name}' AND seq = 6",
    ],
)
async def test_deletion_that_retention_did_not_sign_is_found(db: Database, name: str, statement: str) -> None:
    await trimmed(db, name)
    assert (await verified(db, name))["valid"]
    await tamper(db, *statement.format(name=name).split(";"))
    found = await fault(db, name)
    assert found is not None and found[1] == "anchor"


async def test_the_statement_of_another_chain_does_not_count(db: Database, name: str) -> None:
    other = new_id("org")
    await trimmed(db, name)
    await trimmed(db, other)
    theirs = f"(SELECT anchor_token FROM audit_chains WHERE chain = '{other}')"
    await tamper(db, f"UPDATE audit_chains SET anchor_token = {theirs} WHERE chain = '{name}'")
    found = await fault(db, name)
    assert found is not None and found[1] == "anchor"


async def test_exports_say_what_each_row_stands_on(db: Database, name: str) -> None:
    await write(db, name, 5)
    rows = await exported(db, name)
    assert [row["prev"] for row in rows] == ["00" * 32, *(row["hash"] for row in rows[:-1])]
    piece = await exported(db, name, first=3)
    assert piece == rows[2:]
    walk, unread = chain.begin(piece[0])
    assert unread  # so the first row of a piece is checked, too
    piece[0]["action"] = "thing.other"
    walk.feed(piece)
    assert walk.fault is not None and walk.fault.seq == 3
    rows[3]["prev"] = "11" * 32
    whole = chain.Walk(name, 0, chain.ZERO)
    whole.feed(rows)
    assert whole.fault is not None and (whole.fault.seq, whole.fault.kind) == (4, "hash")
    await trimmed(db, after := new_id("org"))
    kept = await exported(db, after)
    assert kept[0]["seq"] == 6
    async with db.read() as reader:
        anchored = await checkpoints.anchor(reader, after)
    assert kept[0]["prev"] == anchored.anchor_hash.hex()


async def test_an_event_of_the_open_framework_has_what_its_class_requires(db: Database, name: str) -> None:
    """API Activity (6003) of OCSF 1.4: required attributes, and one of those by which an endpoint or a user is known."""
    async with db.transaction() as tx:
        await service.record(tx, someone(name), "organization.suspend", "org_1", details={"reason": "x"})
        await service.record(tx, someone(name, None), "key.create", None, "refused")
    text = b"".join([part async for part in export.lines(db, name, 1, "ocsf", 10)])
    done, refused = [json.loads(line) for line in text.splitlines()]
    required = {
        "activity_id", "actor", "api", "category_uid", "class_uid", "metadata", "severity_id", "src_endpoint", "time",
        "type_uid",
    }  # fmt: skip
    for event in (done, refused):
        assert required <= event.keys()
        assert event["type_uid"] == event["class_uid"] * 100 + event["activity_id"]
        assert {"version", "product"} <= event["metadata"].keys() and event["metadata"]["product"]["vendor_name"]
        assert event["src_endpoint"].keys() & {"ip", "uid", "name", "hostname", "svc_name"}
        assert event["actor"]["user"].keys() & {"uid", "name", "account"} and event["api"]["operation"]
        assert abs(event["time"] / 1000 - datetime.now(UTC).timestamp()) < 60
    assert (done["activity_id"], done["status_id"], done["resources"]) == (3, 1, [{"uid": "org_1"}])
    assert (refused["activity_id"], refused["status_id"], refused["severity_id"]) == (1, 2, 3)


# -- copies outside


async def test_checkpoints_are_written_outside_once(db: Database, name: str, tmp_path: Path) -> None:
    await write(db, name)
    await sign(db)
    now = datetime.now(UTC)
    assert await checkpoint_files.store(db, tmp_path, now) >= 1
    (file,) = (tmp_path / name).iterdir()
    document = json.loads(file.read_bytes())
    claims = checkpoints.read(document["data"][0]["token"], jwt.KeySet.from_jwks({"keys": document["keys"]}))
    assert (claims["chain"], claims["seq"], file.name) == (name, 5, "000000000005.json")
    assert await checkpoint_files.store(db, tmp_path, now) == 0
    await write(db, name, 1)
    await sign(db)
    assert await checkpoint_files.store(db, tmp_path, now) == 1
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["000000000005.json", "000000000006.json"]


async def test_a_checkpoint_whose_file_says_something_else_is_not_overwritten(
    db: Database, name: str, tmp_path: Path
) -> None:
    other = new_id("org")
    await write(db, name)
    await sign(db)
    now = datetime.now(UTC)
    await checkpoint_files.store(db, tmp_path, now)
    (file,) = (tmp_path / name).iterdir()
    kept = file.read_bytes()
    # Signed anew by whoever has the database and the keys, after a change; and one that is in order.
    async with db.transaction() as tx:
        await tx.raw.execute("UPDATE audit_checkpoints SET token = 'x', stored_at = NULL WHERE chain = $1", name)
    await write(db, other)
    await sign(db)
    with pytest.raises(Problem, match="another checkpoint") as broken:
        await checkpoint_files.store(db, tmp_path, now)
    assert broken.value.code == "audit.broken"
    assert file.read_bytes() == kept
    assert (tmp_path / other / "000000000005.json").exists()  # the rest goes on
    async with db.transaction() as tx:
        await tx.raw.execute("UPDATE audit_checkpoints SET stored_at = now()")


async def test_a_checkpoint_that_cannot_be_written_is_written_later(db: Database, name: str, tmp_path: Path) -> None:
    await write(db, name)
    await sign(db)
    blocked = tmp_path / "folder"
    blocked.write_text("a file in the way")
    with pytest.raises(OSError, match="folder"):
        await checkpoint_files.store(db, blocked, datetime.now(UTC))
    blocked.unlink()
    assert await checkpoint_files.store(db, blocked, datetime.now(UTC)) >= 1
    assert (blocked / name / "000000000005.json").exists()


# -- the API


async def test_each_tenant_sees_its_own(owner: Account, stranger: Account, app: Any, connect: Any) -> None:
    await owner.key(name="k1")
    await sign(app.state.db)
    mine = (await owner.client.get("/v1/audit/verify")).json()
    assert mine["valid"] is True
    assert mine["chain"] == owner.organization
    assert mine["next"] is None
    page = (await owner.client.get("/v1/audit/checkpoints")).json()
    known = jwt.KeySet.from_jwks({"keys": page["keys"]})
    claims = checkpoints.read(page["data"][0]["token"], known)
    assert (claims["chain"], claims["seq"], claims["hash"]) == (
        owner.organization,
        mine["head"]["seq"],
        mine["head"]["hash"],
    )
    for path in ("/v1/audit", "/v1/audit/checkpoints", "/v1/audit/export", "/v1/audit/verify"):
        answer = await stranger.client.get(path)
        assert answer.status_code == 200
        assert owner.organization not in answer.text
        assert owner.user not in answer.text
        problem(await connect((await owner.key())["key"]).get(path), 403, "auth.forbidden")
        problem(await connect().get(path), 401, "auth.required")
    problem(
        await owner.client.get("/v1/audit/checkpoints", params={"cursor": "WyJ4Il0"}), 400, "request.cursor_invalid"
    )


async def test_search(owner: Account) -> None:
    made = await owner.key(name="wanted")
    before = datetime.now(UTC) - timedelta(hours=1)

    async def count(**filters: str) -> int:
        return len((await owner.client.get("/v1/audit", params=filters)).json()["data"])

    assert await count(target=made["id"]) == 1
    assert await count(target="key_none") == 0
    assert await count(actor=owner.user, action="key.create") == 1
    assert await count(actor="usr_none") == 0
    assert await count(outcome="refused") == 0
    assert await count(since=before.isoformat()) >= 2
    assert await count(until=before.isoformat()) == 0


async def test_export_is_what_verifies(owner: Account, app: Any) -> None:
    app.state.settings = replace(app.state.settings, audit_export_rows=2)  # several reads
    for n in range(5):
        await owner.key(name=f"k{n}")
    answer = await owner.client.get("/v1/audit/export")
    assert answer.headers["content-type"] == "application/jsonl"
    rows = [json.loads(line) for line in answer.text.splitlines()]
    walk = chain.Walk(owner.organization, 0, chain.ZERO)
    walk.feed(rows)
    assert (walk.fault, walk.checked) == (None, len(rows))
    events = [json.loads(line) for line in (await owner.client.get("/v1/audit/export?format=ocsf")).text.splitlines()]
    assert [event["metadata"]["sequence"] for event in events] == [row["seq"] for row in rows]
    last = events[-1]
    assert (last["class_uid"], last["type_uid"], last["activity_id"]) == (6003, 600301, 1)
    assert last["api"]["operation"] == "key.create"
    assert last["src_endpoint"] == {"ip": "127.0.0.1"}
    assert last["status_id"] == 1
    tail = await owner.client.get("/v1/audit/export", params={"from": rows[-1]["seq"]})
    assert len(tail.text.splitlines()) == 1
