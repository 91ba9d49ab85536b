"""The outbox: what leaves the system is written down with the change that causes it, and sent when that has happened.

    async with db.transaction() as tx:
        …                                                                   # the change
        await outbox.append(tx, sealer, outbox.Draft("file", "verify:usr_1", "a@example.com", "account.verify", {…}))

Of one idempotency key there is one message, whoever appends it and however often, as long as it is kept. A message is delivered
at least once: a worker can die between the receiver's answer and its record. So every attempt carries the message's key, for the
receiver to know it again. Order is not promised.

A body can hold a link that signs somebody in: it is sealed under the master key, and deleted when the message was delivered
(unless ``keep_body`` says that it may be wanted again), at the latest with the message, dead ones too.

Organizations take turns, and so do the destinations of one: nobody's many messages delay another's one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from portico.kit import columns, queue
from portico.kit.batches import delete_in_batches
from portico.kit.db import Database, Tx, metadata
from portico.kit.ids import new_id
from portico.kit.queue import Hopeless, Kind, Retry, Work
from portico.kit.sealing import Sealer

NO_LANE: Final = "-"
_PURPOSE: Final = "outbox message"
#: Characters of a key; bytes of a body before it is sealed.
KEY_CHARS: Final = 255
BODY_BYTES: Final = 256 * 1024

messages = sa.Table(
    "outbox_messages",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    # Null: about the installation, or about a person outside every organization.
    sa.Column("organization_id", sa.Text),
    sa.Column("driver", sa.Text, nullable=False),
    sa.Column("idempotency_key", sa.Text, nullable=False, unique=True),
    sa.Column("recipient", sa.Text, nullable=False),
    sa.Column("topic", sa.Text, nullable=False),
    sa.Column("sealed_body", sa.LargeBinary),
    # What the receiver called it.
    sa.Column("receipt", sa.Text),
    # Whose turn it is delivered in: ORGANIZATION/DESTINATION, or ``-`` for nobody's. Compared byte by byte, as Python does.
    sa.Column("lane", sa.Text(collation="C"), nullable=False, server_default=NO_LANE),
    # Whether the body stays when it was delivered, so that it can be sent again.
    sa.Column("keep_body", sa.Boolean, nullable=False, server_default=sa.false()),
    # What the receiver answered last (an HTTP status, an SMTP code), and when it was tried last.
    sa.Column("status", sa.Integer),
    columns.time("attempted_at"),
    *queue.columns(),
    *queue.rules("outbox_messages", "driver"),
    queue.turns("outbox_messages", "lane", "driver"),
    sa.Index("outbox_messages_lane_id_ix", "lane", "id"),
    sa.Index(None, "organization_id", "id"),
    sa.Index("outbox_messages_finished_at_ix", "finished_at", postgresql_where=sa.text("queue_state <> 'pending'")),
)


@dataclass(frozen=True, slots=True)
class Draft:
    """A message to be. ``topic`` says what it is about (``noun.verb``), ``body`` is the driver's to lay out.

    ``destination`` tells an organization's receivers apart, where one of them may be slow; ``keep_body``: see the table.
    """

    driver: str
    key: str
    recipient: str
    topic: str
    body: Mapping[str, Any]
    organization: str | None = None
    destination: str | None = None
    keep_body: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """What a driver delivers. ``key`` is the same in every attempt; ``attempt`` counts from 1."""

    id: str
    key: str
    recipient: str
    topic: str
    body: Mapping[str, Any]
    organization: str | None
    attempt: int
    destination: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an attempt: ``delivered``, with what the receiver called it in ``detail``; ``retry``, perhaps not before
    ``after_seconds``; ``refused``: no attempt will help. ``detail`` is shown to people and holds no secret. ``status`` is the
    number in the receiver's answer, if there was one."""

    result: Literal["delivered", "retry", "refused"]
    detail: str = ""
    after_seconds: float | None = None
    status: int | None = None
    # The receiver says that there will never be anybody again.
    gone: bool = False


class Driver(Protocol):
    """One way out. Raising is as good as ``retry``."""

    async def deliver(self, message: Message) -> Outcome: ...


def kind(driver: str) -> Kind:
    """The queue of one driver's messages: a receiver that is away holds up no other driver's."""
    return Kind(f"outbox.{driver}", messages, {"driver": driver}, lane="lane")


def lane(organization: str | None, destination: str | None = None) -> str:
    """The lane of messages of ``organization`` to ``destination``."""
    return (organization or NO_LANE) + (f"/{destination}" if destination else "")


async def append(tx: Tx, sealer: Sealer, draft: Draft) -> str | None:
    """Write a message that is sent once ``tx`` has committed; its id, or ``None`` when its key is known already."""
    body = json.dumps(draft.body, separators=(",", ":")).encode()
    if not 0 < len(draft.key) <= KEY_CHARS or len(body) > BODY_BYTES:
        raise ValueError(f"a message has a key of 1 to {KEY_CHARS} characters and a body of at most {BODY_BYTES} bytes")
    made = new_id("msg")
    row = {
        "id": made,
        "organization_id": draft.organization,
        "driver": draft.driver,
        "idempotency_key": draft.key,
        "recipient": draft.recipient,
        "topic": draft.topic,
        "sealed_body": sealer.seal(_PURPOSE, made, body),
        "lane": lane(draft.organization, draft.destination),
        "keep_body": draft.keep_body,
    }
    statement = insert(messages).values(row).on_conflict_do_nothing(index_elements=["idempotency_key"])
    if (await tx.execute(statement.returning(messages.c.id))).first() is None:
        return None
    await queue.wake(tx, kind(draft.driver))
    return made


Record = Callable[[Tx, Message, Outcome], Awaitable[None]]


async def deliver(work: Work, driver: Driver, sealer: Sealer, record: Record | None = None) -> None:
    """The handler: call the driver, record its answer. The intent was recorded by the claim, which counted the attempt.

    ``record`` writes what else follows from the answer, in the same transaction.
    """
    row = work.row
    if row["sealed_body"] is None:
        raise Hopeless("its text is not kept any more")
    message = Message(
        id=row["id"],
        key=row["idempotency_key"],
        recipient=row["recipient"],
        topic=row["topic"],
        body=json.loads(sealer.open(_PURPOSE, row["id"], row["sealed_body"])),
        organization=row["organization_id"],
        attempt=work.attempt,
        destination=row["lane"].partition("/")[2] or None,
    )
    async with work.call():
        outcome = await driver.deliver(message)
    delivered = outcome.result == "delivered"
    async with work.done() if delivered else work.step() as tx:
        values: dict[str, Any] = {"status": outcome.status, "attempted_at": sa.func.clock_timestamp()}
        if delivered:
            values["receipt"] = outcome.detail or None
            values["sealed_body"] = sa.case((messages.c.keep_body, messages.c.sealed_body))
        await tx.execute(sa.update(messages).where(messages.c.id == message.id).values(values))
        if record is not None:
            await record(tx, message, outcome)
    if outcome.result == "refused":
        raise Hopeless(outcome.detail)
    if not delivered:
        pause = work.limits.pause(work.attempt)
        raise Retry(max(pause, outcome.after_seconds or 0.0), outcome.detail)


async def resend(tx: Tx, message: str) -> bool:
    """Send a message again that was delivered or is dead, under its key, with all its attempts; false when it is neither, or its
    body is not kept any more."""
    over = (messages.c.queue_state != "pending") & messages.c.sealed_body.is_not(None)
    values = {
        "queue_state": "pending",
        "attempts": 0,
        "available_at": sa.func.now(),
        "moved_at": sa.func.now(),
        "finished_at": None,
    }
    statement = sa.update(messages).where(messages.c.id == message, over).values(values).returning(messages.c.driver)
    driver = (await tx.execute(statement)).scalar()
    if driver is not None:
        await queue.wake(tx, kind(driver))
    return driver is not None


async def clear(db: Database, keep_seconds: float) -> int:
    """Delete messages that were delivered, or died, longer ago than this; returns how many. Their keys go with them."""
    old = columns.ago(keep_seconds)
    return await delete_in_batches(db, messages, (messages.c.queue_state != "pending") & (messages.c.finished_at < old))


# -- development's driver ------------------------------------------------------------------------------------------------


class FileDriver:
    """Delivers a message as a file of JSON in a folder: to see in development what would have been sent.

    The name is made of topic and key, so that a message which is delivered again replaces itself. Without a folder it refuses.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    async def deliver(self, message: Message) -> Outcome:
        """Write it; whole or not at all, mode 0600."""
        if self._folder is None:
            return Outcome("refused", "there is no folder for messages: set outbox_dir of the worker")
        path = self._folder / file_name(message)
        await asyncio.to_thread(_write, path, message)
        return Outcome("delivered", path.name)


def file_name(message: Message) -> str:
    """``topic-<digest of the key>.json``."""
    digest = hashlib.sha256(message.key.encode()).hexdigest()[:16]
    return f"{re.sub(r'[^a-z0-9._]', '_', message.topic.lower())[:80]}-{digest}.json"


def _write(path: Path, message: Message) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    document = {
        "id": message.id,
        "idempotency_key": message.key,
        "organization": message.organization,
        "recipient": message.recipient,
        "topic": message.topic,
        "body": message.body,
    }
    partial = path.with_suffix(f".{os.getpid()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - the descriptor has its mode already
        json.dump(document, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
