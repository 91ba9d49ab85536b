"""The installation's own credentials: the operator key and the first organization's agent key."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity import store
from portico.control.identity.keys import TOKEN_KIND, issue
from portico.kit.db import Reader, Tx
from portico.kit.ids import check_token, digest


async def first_organization(reader: Reader) -> Any:
    """The first organization with its owner (``id``, ``user_id``, ``email``), or ``None`` before the first start."""
    return await store.first_organization(reader)


async def operator_key(tx: Tx, installer: Caller, now: datetime, known: str | None) -> str:
    """``known`` while it is the live operator key, else a new one that replaces it."""
    if known and await _is_live(tx, known, "operator", None, now):
        return known
    await store.revoke_operator_keys(tx, now)
    made = await issue(tx, now, None, None, "operator", "platform operator", [])
    await audit.record(tx, installer, "operator_key.create", made.id)
    return made.key


async def agent_key(
    tx: Tx, installer: Caller, now: datetime, organization: str, user_id: str, known: str | None
) -> str:
    """``known`` while it is a live agent key of ``organization``, else a new one."""
    if known and await _is_live(tx, known, "agent", organization, now):
        return known
    made = await issue(tx, now, organization, user_id, "agent", "this machine", [])
    facts = {"kind": "agent", "name": made.name, "prefix": made.prefix}
    await audit.record(tx, installer, "key.create", made.id, details=facts, organization=organization)
    return made.key


async def _is_live(tx: Tx, text: str, kind: str, organization: str | None, now: datetime) -> bool:
    if check_token(text) != TOKEN_KIND[kind]:
        return False
    row = await store.key_by_digest(tx, digest(text))
    if row is None or row["kind"] != kind or row["organization_id"] != organization or row["revoked_at"] is not None:
        return False
    return row["expires_at"] is None or row["expires_at"] > now
