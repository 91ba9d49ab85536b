"""Record acts, list them, and prove that the log is what was written.

An act and its row share a transaction: no act without its row, no row of an act that was rolled back. A *refused*
dangerous act changes nothing, so its row gets a transaction of its own (``refused``). Rows are written as the last
statements before the commit, at the end of their organization's hash chain (``chain.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from portico.control.access import Caller
from portico.control.audit import chain as chains
from portico.control.audit import checkpoints, store
from portico.errors import Problem
from portico.kit import jwt, pages, scrub
from portico.kit.db import Database, Reader, Tx
from portico.kit.ids import new_id

#: As ``organization``: the log of the installation, for acts outside every organization.
INSTALLATION = chains.INSTALLATION


async def record(
    tx: Tx,
    caller: Caller,
    action: str,
    target: str | None,
    outcome: str = "success",
    details: dict[str, Any] | None = None,
    *,
    organization: str | None = None,
    numbered: bool = True,
) -> None:
    """Add the row of ``action`` (``noun.verb``) on ``target`` (an object id). ``details`` never holds a secret.

    What looks like one is masked all the same. The row belongs to the caller's organization unless ``organization`` names
    another (or ``INSTALLATION``); it is there when ``tx`` commits, not before. ``numbered=False`` is for harmless acts that may
    come by the hundred a second in one organization: they do not wait for each other's commits at the head of the chain; its
    next writer takes the row in, or the worker a few seconds later.
    """
    row = _row(caller, action, target, outcome, details or {}, organization)
    if numbered:
        store.append(tx, row)
    else:
        await store.insert_unnumbered(tx, row)


def _row(
    caller: Caller, action: str, target: str | None, outcome: str, details: dict[str, Any], organization: str | None
) -> dict[str, Any]:
    tenant = organization or caller.organization
    if caller.acting_operator is not None:
        details = {**details, "support_session": caller.id}
    return {
        "id": new_id("aud"),
        "organization_id": None if tenant == INSTALLATION else tenant,
        "actor_kind": caller.kind,
        "actor_id": caller.acting_operator or caller.id,
        "action": action,
        "target": None if target is None else scrub.text(target),
        "outcome": outcome,
        "details": details,
        "request_id": caller.request_id,
        "address": caller.address,
    }


def unnumbered(caller: Caller, action: str, target: str, details: dict[str, Any]) -> tuple[Any, ...]:
    """The values of a row that a statement of another domain writes together with the act (``unnumbered_sql``); as ``record``
    with ``numbered=False``."""
    return store.unnumbered(_row(caller, action, target, "success", details, None))


unnumbered_sql = store.insert_unnumbered_sql


async def refused(
    db: Database,
    caller: Caller,
    action: str,
    target: str | None,
    details: dict[str, Any] | None = None,
    *,
    organization: str | None = None,
) -> None:
    """Add the row of a refused act in its own transaction, since the act's own is rolled back."""
    async with db.transaction() as tx:
        await record(tx, caller, action, target, "refused", details, organization=organization)


async def request_in_support(db: Database, caller: Caller, method: str, path: str) -> None:
    """Record that an operator whom the organization let in asks for something, before it is answered; reads, too."""
    async with db.transaction() as tx:
        await record(tx, caller, "support_access.request", caller.id, details={"method": method, "path": path[:200]})


async def listing(reader: Reader, chain: str, page: pages.PageRequest, **filters: Any) -> dict[str, Any]:
    """A page of the rows of an organization, or of ``INSTALLATION``, newest first; ``filters`` as ``store.listing`` has them."""
    before = page.after[0] if page.after else None
    rows = await store.listing(reader, chain, page.limit + 1, before, filters)
    document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.id,), _render)
    return document


async def count_lately(reader: Reader, organization: str, action: str, seconds: float) -> int:
    """How many acts of this name succeeded in an organization in the last ``seconds``; not those that are about to."""
    return await store.count_lately(reader, organization, action, seconds)


def _render(row: Any) -> dict[str, Any]:
    personal = {name.removeprefix("details."): value for name, value in (row.personal or {}).items()}
    return {
        "id": row.id,
        "seq": row.seq,
        "at": row.at,
        "actor": {"kind": row.actor_kind, "id": row.actor_id, "address": row.address},
        "action": row.action,
        "target": row.target,
        "outcome": row.outcome,
        "details": {**row.details, **personal},
        "request_id": row.request_id,
        "hash": row.hash.hex() if row.hash is not None else None,
        "erased_at": row.erased_at,
    }


async def checkpoint_listing(reader: Reader, chain: str, page: pages.PageRequest) -> dict[str, Any]:
    """A page of the signed checkpoints of a chain, newest first, with the keys that signed them."""
    before = None
    if page.after:
        if not (page.after[0].isascii() and page.after[0].isdigit() and len(page.after[0]) < 16):
            raise Problem("request.cursor_invalid")
        before = int(page.after[0])
    rows = await checkpoints.listing(reader, chain, page.limit + 1, before)
    document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (str(row.seq),), lambda row: row._asdict())
    kept = await checkpoints.anchor(reader, chain)
    signed_by = [row.kid for row in rows] + ([kept.anchor_kid] if kept is not None and kept.anchor_kid else [])
    raw = await checkpoints.keys(reader, signed_by)
    document["anchor"] = None
    if kept is not None and kept.anchor_token is not None:
        document["anchor"] = {"seq": kept.anchor_seq, "kid": kept.anchor_kid, "token": kept.anchor_token}
    return {**document, "keys": [jwt.public_jwk(kid, raw[kid]) for kid in sorted(raw)]}


async def verify(reader: Reader, chain: str, first: int | None, limit: int) -> dict[str, Any]:
    """Check up to ``limit`` rows of ``chain`` from number ``first`` on (the oldest kept by default).

    The row before ``first`` is taken as right: a caller that goes from ``next`` to ``next`` has checked it the time before.
    Signed checkpoints of the stretch are compared too. Bounded work; ``next`` is null once the head was reached.
    """
    asked = max(first or 1, 1)
    signed = await checkpoints.stored(reader, chain, asked, limit)
    # One row more in front: the hash that the first one stands on.
    head, entries = await store.stretch(reader, chain, asked - 1, limit + 1)
    if head is None:
        head = {"head_seq": 0, "head_hash": chains.ZERO, "anchor_seq": 0, "anchor_hash": chains.ZERO}
    walk, entries = _start(chain, head, asked, entries, limit)
    begun = walk.seq
    walk.feed(entries)
    complete = len(entries) < limit or walk.seq >= head["head_seq"]
    if complete:
        walk.end_at(head["head_seq"], head["head_hash"].hex())
    if walk.fault is None and begun == head["anchor_seq"]:
        walk.fault = await checkpoints.anchor_fault(reader, chain)
    if walk.fault is None:
        hashes = {entry["seq"]: entry["hash"] for entry in entries}
        walk.fault = checkpoints.compare(chain, signed, hashes, head["head_seq"])
    following = None if complete or walk.fault else walk.seq + 1
    return _outcome(walk, begun + 1, {"seq": head["head_seq"], "hash": head["head_hash"].hex()}, following)


def _start(
    chain: str, head: Any, asked: int, entries: list[chains.Entry], limit: int
) -> tuple[chains.Walk, list[chains.Entry]]:
    """The walk at the row before the first one asked for, and the entries that it has to check."""
    if asked - 1 <= head["anchor_seq"]:
        kept = [entry for entry in entries if entry["seq"] > head["anchor_seq"]]
        return chains.Walk(chain, head["anchor_seq"], head["anchor_hash"]), kept[:limit]
    if entries and entries[0]["seq"] == asked - 1:
        return chains.Walk(chain, asked - 1, bytes.fromhex(entries[0]["hash"])), entries[1:]
    walk = chains.Walk(chain, asked - 2, chains.ZERO)
    if asked - 1 <= head["head_seq"]:
        walk.fault = chains.Fault(asked - 1, "missing", f"number {asked - 1} is missing")
        return walk, []
    return chains.Walk(chain, head["head_seq"], head["head_hash"]), entries[:limit]


def _outcome(walk: chains.Walk, first: int, head: dict[str, Any], following: int | None) -> dict[str, Any]:
    fault = walk.fault
    return {
        "chain": walk.chain,
        "valid": fault is None,
        "from": first,
        "checked": walk.checked,
        "last": {"seq": walk.seq, "hash": walk.last.hex()},
        "head": head,
        "fault": None if fault is None else {"seq": fault.seq, "kind": fault.kind, "detail": fault.detail},
        "next": following,
    }


async def erase_person(db: Database, caller: Caller, user: str, keys: Sequence[str], email: str | None) -> int:
    """Erase the personal data of one person in every chain: of acts by or on them, by their keys, with their address.

    The numbers, acts and hashes stay. Each organization's log gets a row that says so. Returns how many rows it were.
    """
    async with db.transaction() as tx:
        await record(tx, caller, "person.erase", user)
    await catch_up(db)
    erased: dict[str, int] = {}
    while True:
        # A transaction without an act: row locks first and a chain's head after them would be the wrong order.
        async with db.transaction() as tx:
            some = await store.erase(tx, [user, *keys], email, _BATCH)
        for chain, count in some.items():
            erased[chain] = erased.get(chain, 0) + count
        if sum(some.values()) < _BATCH:
            break
    async with db.transaction() as tx:
        for chain, count in erased.items():
            organization = None if chain == chains.INSTALLATION else chain
            await record(tx, caller, "audit.erase", user, details={"rows": count}, organization=organization)
    return sum(erased.values())


# Rows that one transaction of a job touches.
_BATCH = 1000


async def catch_up(db: Database) -> int:
    """Take rows of older code that no writer took in yet into their chains; returns how many."""
    total = 0
    async with db.read() as reader:
        behind = await store.behind(reader, _BATCH)
    for chain in behind:
        while True:
            async with db.transaction() as tx:
                count = await store.catch_up(tx, chain, _BATCH)
            total += count
            if count < _BATCH:
                break
    return total


async def trim(
    db: Database,
    before: datetime,
    signer: checkpoints.Signer,
    now: datetime,
    chains: Sequence[str] | None = None,
) -> int:
    """Delete the oldest rows of each chain (or of ``chains``, the ids of organizations), all from before ``before``, some at a
    time; returns how many.

    What is left stands on a signed statement of where retention ended.
    """
    total = 0
    for chain in await store.older(db, before, chains):
        count = _BATCH
        while count == _BATCH:
            async with db.transaction() as tx:
                count, seq, hash_ = await store.trim(tx, chain, before, _BATCH)
                if count:
                    await checkpoints.sign_anchor(tx, signer, chain, seq, hash_, now)
            total += count
    return total
