"""The outbox, from an append to a file that lies there: once for each key, sealed, and gone when it is delivered."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from portico.kit import outbox, queue
from portico.kit.batches import delete_in_batches
from portico.kit.db import Database, Tx
from portico.kit.outbox import Draft, FileDriver, Message, Outcome, messages
from portico.kit.queue import Hopeless, Limits, Retry, Work
from portico.kit.sealing import Sealer, new_master_key
from portico.settings import Secret

SEALER = Sealer(Secret(new_master_key()))
LIMITS = Limits(max_attempts=3)


def draft(driver: str, key: str = "verify:1") -> Draft:
    link = {"link": "https://example.com/verify?token=s3cret"}
    return Draft(driver, f"{driver}:{key}", "a@example.com", "account.verify", link, "org_1")


async def append(db: Database, message: Draft) -> str | None:
    async with db.transaction() as tx:
        return await outbox.append(tx, SEALER, message)


async def take(db: Database, driver: str) -> Work:
    (work,), _ = await queue.claim(db, outbox.kind(driver), LIMITS, 1)
    return work


async def row(db: Database, made: str | None) -> Any:
    async with db.read() as reader:
        return await reader.raw.fetchrow("SELECT * FROM outbox_messages WHERE id = $1", made)


async def test_of_one_key_there_is_one_message(db: Database) -> None:
    made = await asyncio.gather(*(append(db, draft("many")) for _ in range(6)))
    assert len([each for each in made if each]) == 1
    assert b"s3cret" not in (await row(db, next(filter(None, made))))["sealed_body"]


async def test_without_the_change_there_is_no_message(db: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        async with db.transaction() as tx:
            made = await outbox.append(tx, SEALER, draft("undone"))
            raise ZeroDivisionError
    assert made is not None and await row(db, made) is None


async def test_a_message_becomes_a_file_and_is_forgotten(db: Database, tmp_path: Path) -> None:
    made = await append(db, draft("file"))
    await outbox.deliver(await take(db, "file"), FileDriver(tmp_path / "box"), SEALER)
    (path,) = (tmp_path / "box").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.name.startswith("account.verify-")
    document = json.loads(path.read_text())
    assert document["body"]["link"].endswith("s3cret") and document["recipient"] == "a@example.com"
    found = await row(db, made)
    assert (found["queue_state"], found["sealed_body"], found["receipt"]) == ("done", None, path.name)
    assert await append(db, draft("file")) is None, "its key is known as long as it is kept"
    assert await outbox.clear(db, 3600) == 0
    assert await outbox.clear(db, -1) == 1


async def test_a_delivery_that_was_not_recorded_is_made_again_under_its_key(db: Database, tmp_path: Path) -> None:
    await append(db, draft("again"))
    first = await take(db, "again")
    async with db.transaction() as tx:
        await tx.raw.execute("UPDATE outbox_messages SET available_at = now() WHERE driver = 'again'")
    with pytest.raises(queue.LeaseLost):
        (second,), _ = await queue.claim(db, outbox.kind("again"), LIMITS, 1, suspect=True)
        await outbox.deliver(first, FileDriver(tmp_path), SEALER)
    await outbox.deliver(second, FileDriver(tmp_path), SEALER)
    assert len(list(tmp_path.iterdir())) == 1, "the receiver knows it by its key"


class Says:
    """A receiver that answers as it is told."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome, self.got = outcome, list[Message]()

    async def deliver(self, message: Message) -> Outcome:
        self.got.append(message)
        return self.outcome


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (Outcome("refused", "no such user", status=550), Hopeless),
        (Outcome("retry", "busy", 7), Retry),
        (Outcome("retry", "busy"), Retry),
    ],
)
async def test_what_a_receiver_says_is_done(db: Database, outcome: Outcome, error: type[Exception]) -> None:
    driver = f"says-{outcome.result}-{outcome.after_seconds}"
    made = await append(db, draft(driver))
    receiver = Says(outcome)
    with pytest.raises(error) as raised:
        await outbox.deliver(await take(db, driver), receiver, SEALER)
    assert outcome.detail in str(raised.value) and receiver.got[0].key == f"{driver}:verify:1"
    if outcome.after_seconds:
        assert isinstance(raised.value, Retry) and raised.value.seconds == 7
    found = await row(db, made)
    assert found["sealed_body"] is not None and found["status"] == outcome.status and found["attempted_at"] is not None


async def test_a_receiver_may_ask_for_more_time_than_the_ladder_has_and_not_for_less(db: Database) -> None:
    limits = Limits(ladder=(5.0,))
    for driver, asked, expected in (("patient", 60.0, 60.0), ("hasty", 1.0, 5.0)):
        await append(db, draft(driver))
        (work,), _ = await queue.claim(db, outbox.kind(driver), limits, 1)
        with pytest.raises(Retry) as raised:
            await outbox.deliver(work, Says(Outcome("retry", "busy", asked)), SEALER)
        assert expected <= raised.value.seconds <= expected * 1.1


async def test_a_body_that_is_kept_can_be_sent_again(db: Database, tmp_path: Path) -> None:
    made = await append(db, dataclasses.replace(draft("kept"), keep_body=True))
    for _ in range(2):
        await outbox.deliver(await take(db, "kept"), FileDriver(tmp_path), SEALER)
        assert (await row(db, made))["queue_state"] == "done"
        async with db.transaction() as tx:
            await tx.raw.execute(
                "UPDATE outbox_messages SET queue_state = 'pending', available_at = now() WHERE id = $1", made
            )
    async with db.transaction() as tx:
        await tx.raw.execute("UPDATE outbox_messages SET sealed_body = NULL WHERE id = $1", made)
    with pytest.raises(Hopeless, match="not kept"):
        await outbox.deliver(await take(db, "kept"), FileDriver(tmp_path), SEALER)


async def test_dead_messages_are_forgotten_too_many_at_a_time(db: Database) -> None:
    for number in range(25):
        await append(db, draft("dying", f"k{number}"))
    async with db.transaction() as tx:
        await tx.raw.execute(
            "UPDATE outbox_messages SET queue_state = 'dead', finished_at = now() - interval '1 day' WHERE driver = 'dying'"
        )
    before = messages.c.driver == "dying"
    assert await delete_in_batches(db, messages, before & (messages.c.idempotency_key == "dying:k1"), 10) == 1
    assert await delete_in_batches(db, messages, before, 10) == 24


async def test_what_records_an_answer_shares_its_transaction(db: Database) -> None:
    await append(db, draft("hooked"))
    seen: list[Outcome] = []

    async def fail(tx: Tx, message: Message, outcome: Outcome) -> None:
        seen.append(outcome)
        raise ZeroDivisionError

    work = await take(db, "hooked")
    with pytest.raises(ZeroDivisionError):
        await outbox.deliver(work, Says(Outcome("delivered", "ok", status=200)), SEALER, fail)
    assert seen and (await row(db, work.id))["queue_state"] == "pending", "not recorded: it will be sent again"


async def test_files_need_a_folder() -> None:
    message = Message("msg_1", "k", "r", "t", {}, None, 1)
    assert (await FileDriver(None).deliver(message)).result == "refused"


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_keys_have_a_length(db: Database, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        async with db.transaction() as tx:
            await outbox.append(tx, SEALER, Draft("file", key, "r", "t", {}))
