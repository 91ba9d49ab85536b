"""The audit log as JSON Lines: entries as they are hashed, or events of the Open Cybersecurity Schema Framework."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any, Final, Literal

from portico.control.audit import chain as chains
from portico.control.audit import store
from portico.kit.db import Database, Reader

Format = Literal["jsonl", "ocsf"]

#: The version of https://schema.ocsf.io that events follow: class API Activity (6003), profile none.
OCSF: Final = "1.4.0"
# activity_id of API Activity: Create, Read, Update, Delete, Other.
_ACTIVITIES: Final = {
    "create": 1, "register": 1, "open": 1, "grant": 1, "begin": 1, "consent": 1, "invite": 1, "add": 1,
    "read": 2, "export": 2, "request": 2,
    "update": 3, "change": 3, "rotate": 3, "approve": 3, "deny": 3, "refresh": 3, "start": 3, "stop": 3, "suspend": 3,
    "resume": 3, "enable": 3, "disable": 3, "confirm": 3, "switch": 3, "verify": 3, "accept": 3, "replayed": 3,
    "delete": 4, "revoke": 4, "end": 4, "end_all": 4, "erase": 4, "remove": 4, "withdraw": 4, "mfa_reset": 4,
}  # fmt: skip


async def lines(db: Database, chain: str, first: int, form: Format, batch: int) -> AsyncIterator[bytes]:
    """Every entry from number ``first`` to the head at the time of the first read, ``batch`` rows a read."""
    last: int | None = None
    while last is None or first <= last:
        async with db.read() as reader:
            head, entries = await _page(reader, chain, first, batch)
        if not entries:
            return
        last = head["head_seq"] if last is None else last
        yield _text([entry for entry in entries if entry["seq"] <= last], form)
        first = entries[-1]["seq"] + 1


async def lines_of(reader: Reader, chain: str, form: Format, batch: int) -> AsyncIterator[bytes]:
    """The same of the whole chain from one reader, which has a snapshot."""
    first = 1
    while entries := (await _page(reader, chain, first, batch))[1]:
        yield _text(entries, form)
        first = entries[-1]["seq"] + 1


async def _page(reader: Reader, chain: str, first: int, batch: int) -> tuple[Any, list[chains.Entry]]:
    """The head, and up to ``batch`` entries from number ``first`` on."""
    # One row more in front: the hash that the first one stands on.
    head, entries = await store.stretch(reader, chain, first - 1, batch + 1)
    before = head["anchor_hash"].hex() if head is not None and first <= head["anchor_seq"] + 1 else None
    if entries and entries[0]["seq"] < first:
        before = entries.pop(0)["hash"]
    return head, _linked(entries, before)


def _text(entries: Sequence[chains.Entry], form: Format) -> bytes:
    found = [entry if form == "jsonl" else ocsf(entry) for entry in entries]
    return b"".join(json.dumps(one, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for one in found)


def _linked(entries: list[chains.Entry], before: str | None) -> list[chains.Entry]:
    """The entries, each with the hash of the one before it as ``prev``; the first without, where that is not known."""
    linked = []
    for entry in entries:
        linked.append(entry if before is None else {**entry, "prev": before})
        before = entry["hash"]
    return linked


def ocsf(entry: chains.Entry) -> dict[str, Any]:
    """An entry as an event of API Activity; the chain's members are in ``unmapped``."""
    activity = _ACTIVITIES.get(entry["action"].rpartition(".")[2], 99)
    success = entry["outcome"] == "success"
    address = entry["personal"].get("actor.address")
    event: dict[str, Any] = {
        "activity_id": activity,
        "category_uid": 6,
        "class_uid": 6003,
        "type_uid": 6003 * 100 + activity,
        "time": int(datetime.fromisoformat(entry["ts"]).timestamp() * 1000),
        "severity_id": 1 if success else 3,
        "status_id": 1 if success else 2,
        "actor": {"user": {"uid": entry["actor"]["id"], "type": entry["actor"]["kind"], "type_id": 99}},
        "api": {"operation": entry["action"], "request": {"uid": entry["request_id"] or entry["id"]}},
        "src_endpoint": {"ip": address} if address else {"uid": "unknown"},
        "metadata": {
            "version": OCSF,
            "uid": entry["id"],
            "sequence": entry["seq"],
            "tenant_uid": entry["chain"],
            "product": {"name": "Portico", "vendor_name": "Portico"},
        },
        "unmapped": {"details": entry["details"], "personal": entry["personal"], "hash": entry["hash"]},
    }
    if entry["target"] is not None:
        event["resources"] = [{"uid": entry["target"]}]
    return event
