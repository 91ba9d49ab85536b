"""Signed checkpoints: where a chain ended at a certain hour, for keeping elsewhere.

A chain alone cannot show that its tail was cut off, or that everything was hashed anew after a change: whoever can write
to the database can do both. A checkpoint, kept outside, shows both. It is a compact JWS (Ed25519, ``typ`` below) over
``{"chain", "seq", "hash", "at"}``, signed by the platform's current signing key; the public half is kept for good.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from portico.control.audit.chain import Fault
from portico.control.audit.checkpoint_tokens import ANCHOR_TYP, TYP, fault_of, read
from portico.control.audit.store import audit_chains, audit_checkpoint_keys, audit_checkpoints
from portico.kit import jwt
from portico.kit.db import Reader, Tx

Signer = Callable[[Tx], Awaitable[jwt.SigningKey]]
_c = audit_checkpoints.c


async def sign(tx: Tx, signer: Signer, now: datetime, limit: int) -> int:
    """Sign the heads of up to ``limit`` chains that moved since their last checkpoint; returns how many."""
    signed = sa.exists().where(_c.chain == audit_chains.c.chain, _c.seq == audit_chains.c.seq)
    query = sa.select(audit_chains).where(audit_chains.c.seq > 0, ~signed).order_by(audit_chains.c.chain).limit(limit)
    heads = await tx.fetch_all(query)
    if not heads:
        return 0
    key = await signer(tx)
    published = {"kid": key.kid, "public_x": key.public.public_bytes_raw()}
    await tx.execute(insert(audit_checkpoint_keys).values(published).on_conflict_do_nothing())
    rows = [
        {"chain": head.chain, "seq": head.seq, "kid": key.kid, "created_at": now, "token": _token(key, head, now)}
        for head in heads
    ]
    await tx.execute(insert(audit_checkpoints).on_conflict_do_nothing(), rows)
    return len(rows)


def _token(key: jwt.SigningKey, head: Any, now: datetime) -> str:
    return _statement(key, TYP, head.chain, head.seq, head.hash, now)


def _statement(key: jwt.SigningKey, typ: str, chain: str, seq: int, hash_: bytes, now: datetime) -> str:
    return key.sign(typ, {"chain": chain, "seq": seq, "hash": hash_.hex(), "at": int(now.timestamp())})


async def sign_anchor(tx: Tx, signer: Signer, chain: str, seq: int, hash_: bytes, now: datetime) -> None:
    """Sign that the rows of a chain up to ``seq``, whose hash is kept, were deleted by retention and not by somebody else."""
    key = await signer(tx)
    published = {"kid": key.kid, "public_x": key.public.public_bytes_raw()}
    await tx.execute(insert(audit_checkpoint_keys).values(published).on_conflict_do_nothing())
    token = _statement(key, ANCHOR_TYP, chain, seq, hash_, now)
    mine = audit_chains.c.chain == chain
    await tx.execute(sa.update(audit_chains).where(mine).values(anchor_token=token, anchor_kid=key.kid))


async def anchor(reader: Reader, chain: str) -> Any:
    """Number, hash, token and kid of a chain's anchor; ``None`` when nothing of it was ever deleted."""
    a = audit_chains.c
    query = sa.select(a.anchor_seq, a.anchor_hash, a.anchor_token, a.anchor_kid).where(
        a.chain == chain, a.anchor_seq > 0
    )
    return await reader.fetch_one(query)


async def anchor_fault(reader: Reader, chain: str) -> Fault | None:
    """What is wrong with the signed statement on which the oldest row stands."""
    row = await anchor(reader, chain)
    if row is None:
        return None
    if row.anchor_token is None:
        return Fault(
            row.anchor_seq, "anchor", "nobody signed that the rows up to this number were deleted by retention"
        )
    raw = await keys(reader, [row.anchor_kid])
    known = jwt.KeySet.from_jwks({"keys": [jwt.public_jwk(kid, x) for kid, x in raw.items()]})
    try:
        claims = read(row.anchor_token, known, ANCHOR_TYP)
    except jwt.InvalidToken as err:
        return Fault(row.anchor_seq, "anchor", f"the statement of retention does not verify: {err}")
    if (claims["chain"], claims["seq"], claims["hash"]) != (chain, row.anchor_seq, row.anchor_hash.hex()):
        return Fault(row.anchor_seq, "anchor", f"retention signed for number {claims['seq']}, or for another hash")
    return None


async def unstored(reader: Reader, limit: int) -> list[Any]:
    """Checkpoints that were not stored outside yet, oldest first."""
    query = sa.select(audit_checkpoints).where(_c.stored_at.is_(None)).order_by(_c.created_at, _c.chain, _c.seq)
    return list(await reader.fetch_all(query.limit(limit)))


async def note_stored(tx: Tx, rows: Iterable[Any], now: datetime) -> None:
    """Note that these are stored outside."""
    for row in rows:
        mine = sa.and_(_c.chain == row.chain, _c.seq == row.seq)
        await tx.execute(sa.update(audit_checkpoints).where(mine).values(stored_at=now))


async def listing(reader: Reader, chain: str, limit: int, before: int | None) -> list[Any]:
    """Checkpoints of a chain, newest first."""
    query = sa.select(audit_checkpoints).where(_c.chain == chain)
    if before is not None:
        query = query.where(_c.seq < before)
    return list(await reader.fetch_all(query.order_by(_c.seq.desc()).limit(limit)))


async def keys(reader: Reader, kids: Iterable[str]) -> dict[str, bytes]:
    """The public keys of those ``kids``, raw."""
    columns = audit_checkpoint_keys.c
    rows = await reader.fetch_all(sa.select(audit_checkpoint_keys).where(columns.kid.in_(set(kids))))
    return {row.kid: row.public_x for row in rows}


async def stored(reader: Reader, chain: str, first: int, limit: int) -> list[tuple[int, str, jwt.KeySet]]:
    """Number, token and key of the checkpoints in a stretch of ``limit`` numbers from ``first`` on, and of the newest.

    To be read before the rows that they are compared with: then none of them is younger than the head.
    """
    newest = sa.select(sa.func.max(_c.seq)).where(_c.chain == chain).scalar_subquery()
    query = sa.select(audit_checkpoints).where(
        _c.chain == chain, sa.or_(_c.seq.between(first, first + limit - 1), _c.seq == newest)
    )
    rows = await reader.fetch_all(query.order_by(_c.seq))
    raw = await keys(reader, (row.kid for row in rows)) if rows else {}
    known = {kid: jwt.KeySet.from_jwks({"keys": [jwt.public_jwk(kid, x)]}) for kid, x in raw.items()}
    return [(row.seq, row.token, known.get(row.kid, jwt.KeySet({}))) for row in rows]


def compare(
    chain: str, found: Iterable[tuple[int, str, jwt.KeySet]], hashes: Mapping[int, str], head: int
) -> Fault | None:
    """The first fault that checkpoints show, against the rows with these ``hashes`` in a chain that ends at ``head``."""
    for seq, token, key in found:
        try:
            claims = read(token, key)
        except jwt.InvalidToken as err:
            return Fault(seq, "signature", f"a checkpoint does not verify: {err}")
        if (claims["chain"], claims["seq"]) != (chain, seq):
            return Fault(seq, "signature", "a checkpoint was signed for another place")
        if (fault := fault_of(claims, hashes, head)) is not None:
            return fault
    return None
