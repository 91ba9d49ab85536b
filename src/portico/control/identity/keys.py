"""Agent keys and API keys: made, listed, rotated, revoked.

A key is shown once and stored as its SHA-256. Nobody can mint, or obtain by rotation, a key that may do more than the
credential that asks for it, that outlives it, or that works from where it does not. Revocation runs ``on_revoked`` in the
same transaction, so that whoever holds state made with the key (tunnels: agent sessions) ends it together with the key; a
shorter list of networks runs ``on_restricted`` in the same way. A change only ever takes away, but for the list of networks,
which whoever may make such a key may also widen.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from portico.control.access import AGENT_KEY_PERMISSIONS, PERMISSION_TABLE, PERMISSIONS, Caller
from portico.control.audit import service as audit
from portico.control.identity import posture, standing, store
from portico.control.identity.quotas import Quotas
from portico.errors import Problem
from portico.kit import networks, pages
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx
from portico.kit.ids import digest, display_prefix, new_id, new_token
from portico.settings import ApiSettings

KeyRevoked = Callable[[Tx, str], Awaitable[None]]
KeyRestricted = Callable[[Tx, str, Sequence[str]], Awaitable[None]]
KeyKind = Literal["agent", "api"]

_CONNECT = "agent:connect"

# What each kind of key starts with.
TOKEN_KIND = {"agent": "agt", "api": "sk", "operator": "opr"}


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made; ``key`` is the only time that its text exists."""

    id: str
    key: str
    kind: str
    name: str
    prefix: str
    scopes: list[str]
    permissions: list[str]
    allowed_cidrs: list[str]
    created_at: datetime
    expires_at: datetime | None


def permissions(kind: str, scopes: list[str]) -> frozenset[str]:
    """What a key of this kind with these scopes may do."""
    if kind == "agent":
        return AGENT_KEY_PERMISSIONS
    return frozenset(scopes) & PERMISSIONS if kind == "api" else frozenset()


class Keys:
    """The verbs on keys of one organization."""

    def __init__(self, settings: ApiSettings, clock: Clock, quotas: Quotas) -> None:
        self._settings = settings
        self._clock = clock
        self._quotas = quotas
        self.on_revoked: list[KeyRevoked] = []
        self.on_restricted: list[KeyRestricted] = []

    async def create(
        self,
        tx: Tx,
        caller: Caller,
        kind: KeyKind,
        name: str,
        scopes: list[str] | None = None,
        expires_at: datetime | None = None,
        cidrs: Sequence[str] | None = None,
        *,
        details: dict[str, Any] | None = None,
    ) -> NewKey:
        """Make a key in the caller's organization; ``cidrs`` None: usable from where the caller is.

        Raises ``auth.scope_invalid``, ``auth.forbidden``, ``auth.expiry_invalid``, ``key.cidr_invalid``,
        ``key.limit_reached``, ``quota.exceeded``.
        """
        caller = await self._hold(tx, caller)
        chosen = self._scopes(caller, kind, scopes)
        now = self._clock.wall()
        expires_at = expires_at or caller.expires_at
        self._not_after(caller, expires_at)
        if expires_at is not None and expires_at <= now:
            raise Problem("auth.expiry_invalid")
        allowed = list(caller.cidrs) if cidrs is None else self._cidrs(caller, cidrs)
        await self._quotas.claim(tx, caller.org, "api_keys")
        made = await issue(tx, now, caller.org, caller.user_id, kind, name, chosen, expires_at, cidrs=allowed)
        facts = {"kind": kind, "name": name, "scopes": chosen, "prefix": made.prefix, **(details or {})}
        if allowed:
            facts["allowed_cidrs"] = allowed
        await audit.record(tx, caller, "key.create", made.id, details=facts)
        return made

    @staticmethod
    async def _hold(tx: Tx, caller: Caller) -> Caller:
        """The caller with what they may do at this moment; until the transaction ends nobody else may add a key."""
        held = await standing.hold(tx, caller, ("keys:own", "keys:write"))
        row = await store.key(tx, caller.id) if caller.kind == "api_key" else None
        if row is None:
            return replace(caller, permissions=held)
        # The credential is a key, and may have been narrowed since the request began.
        held &= permissions(row.kind, row.scopes)
        return replace(caller, permissions=held, cidrs=tuple(row.allowed_cidrs), expires_at=row.expires_at)

    def _scopes(self, caller: Caller, kind: KeyKind, scopes: list[str] | None) -> list[str]:
        if kind == "agent":
            if scopes:
                raise Problem("auth.scope_invalid", "an agent key has fixed permissions; leave scopes out")
            chosen: list[str] = []
        else:
            chosen = sorted(set(scopes)) if scopes is not None else sorted(caller.permissions)
            if unknown := [s for s in chosen if s not in PERMISSIONS]:
                raise Problem("auth.scope_invalid", f"there is no permission {unknown[0]}", scopes=sorted(PERMISSIONS))
        self._not_above(caller, permissions(kind, chosen))
        return chosen

    @staticmethod
    def _not_above(caller: Caller, wanted: frozenset[str]) -> None:
        """A credential cannot obtain a key that may do more than itself."""
        if beyond := sorted(wanted - caller.permissions):
            raise Problem("auth.forbidden", f"this credential lacks {beyond[0]} itself", permission=beyond[0])

    def _cidrs(self, caller: Caller, cidrs: Sequence[str]) -> list[str]:
        """The networks as they are stored, none twice. Raises ``key.cidr_invalid``, ``auth.forbidden``."""
        limit = self._settings.key_max_cidrs
        if len(cidrs) > limit:
            raise Problem("key.cidr_invalid", f"a key has at most {limit} networks", limit=limit)
        try:
            chosen = sorted({networks.canonical(text) for text in cidrs})
        except ValueError as err:
            raise Problem("key.cidr_invalid", str(err)[:200]) from None
        self._not_elsewhere(caller, chosen)
        return chosen

    @staticmethod
    def _not_elsewhere(caller: Caller, cidrs: Sequence[str]) -> None:
        """A key that works from some networks alone cannot obtain one that works from others."""
        if not networks.covers(caller.cidrs, cidrs):
            raise Problem(
                "auth.forbidden",
                "this credential may not be used from all of these networks itself",
                permission="keys:write",
            )

    @staticmethod
    def _not_after(caller: Caller, expires_at: datetime | None) -> None:
        """A key that expires cannot obtain one that lives longer: its end would mean nothing."""
        if caller.expires_at is not None and (expires_at is None or expires_at > caller.expires_at):
            raise Problem(
                "auth.forbidden",
                "this credential expires before the key that it asks for",
                hint="Give an earlier expires_at, or ask with a credential that lives longer.",
                permission="keys:write",
            )

    async def listing(self, reader: Reader, caller: Caller, page: pages.PageRequest) -> dict[str, Any]:
        """A page of the organization's live keys, newest first; of the caller's own, where it may see no others."""
        before = page.after[0] if page.after else None
        maker = _maker_seen(caller)
        rows = await store.keys(reader, caller.org, maker, page.limit + 1, before, self._clock.wall())
        document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.id,), _render)
        return document

    async def get(self, reader: Reader, caller: Caller, key_id: str) -> dict[str, Any]:
        """One live key, with what its permissions allow. Raises ``request.not_found``."""
        row = await store.live_key(reader, caller.org, key_id, self._clock.wall())
        if row is None or not self._visible(caller, row):
            raise Problem("request.not_found", "there is no such key")
        document = _render(row)
        return {**document, "allows": {name: PERMISSION_TABLE[name] for name in document["permissions"]}}

    async def posture(self, reader: Reader, caller: Caller) -> dict[str, Any]:
        """What is wrong with the organization's live keys; of the caller's own, where it may see no others."""
        now, maker = self._clock.wall(), _maker_seen(caller)
        return posture.report(await store.keys_with_makers(reader, caller.org, maker, now), now)

    async def change(self, tx: Tx, caller: Caller, key_id: str, wanted: dict[str, Any]) -> dict[str, Any]:
        """Change ``name``, ``allowed_cidrs``, ``expires_at`` (to an earlier time) or ``scopes`` (to fewer) of a live key.

        Live agent sessions that the key could not open any more, from where they are, end in the same transaction.
        Raises ``request.not_found``, ``key.cidr_invalid``, ``key.only_less``, ``auth.expiry_invalid``, ``auth.forbidden``.
        """
        caller = await self._hold(tx, caller)
        row = await self._lock(tx, caller, key_id)
        values = {name: wanted[name] for name in ("name",) if name in wanted and wanted[name] != row.name}
        if "allowed_cidrs" in wanted:
            chosen = self._cidrs(caller, wanted["allowed_cidrs"])
            if not networks.covers(row.allowed_cidrs, chosen):
                self._not_above(caller, permissions(row.kind, row.scopes))
            values |= {} if chosen == row.allowed_cidrs else {"allowed_cidrs": chosen}
        if "expires_at" in wanted:
            values |= self._earlier(row, wanted["expires_at"])
        if "scopes" in wanted:
            values |= _fewer(row, wanted["scopes"])
        if values:
            await store.update_key(tx, row.id, **values)
            await self._end_lost(tx, row, values)
            facts = {**values, "kind": row.kind}
            if "expires_at" in values:
                facts["expires_at"] = values["expires_at"].isoformat()
            await audit.record(tx, caller, "key.update", row.id, details=facts)
        return _render(_Changed(row, values))

    def _earlier(self, row: Any, expires_at: datetime) -> dict[str, Any]:
        if expires_at <= self._clock.wall():
            raise Problem("auth.expiry_invalid", hint="To end a key now, revoke it.")
        if row.expires_at is not None and expires_at > row.expires_at:
            raise Problem("key.only_less", "a key's expiry can only be brought forward")
        return {} if expires_at == row.expires_at else {"expires_at": expires_at}

    async def _end_lost(self, tx: Tx, row: Any, values: dict[str, Any]) -> None:
        """End what the key may not do any more."""
        lost = permissions(row.kind, row.scopes) - permissions(row.kind, values.get("scopes", row.scopes))
        if _CONNECT in lost:
            await self.end_work(tx, row.id)
        elif values.get("allowed_cidrs"):
            for tell in self.on_restricted:
                await tell(tx, row.id, values["allowed_cidrs"])

    async def revoke(self, tx: Tx, caller: Caller, key_id: str) -> None:
        """End a key and everything that was made with it. Raises ``request.not_found``."""
        row = await self._lock(tx, caller, key_id)
        await self._end(tx, row.id)
        await audit.record(tx, caller, "key.revoke", row.id, details={"kind": row.kind, "name": row.name})

    async def rotate(self, tx: Tx, caller: Caller, key_id: str, overlap_seconds: int = 0) -> NewKey:
        """A new key with the rights and expiry of ``key_id``, which ends now, or after ``overlap_seconds``.

        Raises ``request.not_found``, ``auth.forbidden``, and with an overlap what a claim raises.
        """
        now = self._clock.wall()
        caller = await self._hold(tx, caller)
        if overlap_seconds:
            await self._quotas.claim(tx, caller.org, "api_keys")
        row = await self._lock(tx, caller, key_id)
        self._not_above(caller, permissions(row.kind, row.scopes))
        self._not_after(caller, row.expires_at)
        self._not_elsewhere(caller, row.allowed_cidrs)
        made = await issue(
            tx,
            now,
            row.organization_id,
            caller.user_id or row.user_id,  # whoever learns the key answers for it: it ends with their rights
            row.kind,
            row.name,
            row.scopes,
            row.expires_at,
            cidrs=row.allowed_cidrs,
            rotated_from=row.id,
        )
        if overlap_seconds:
            end = now + timedelta(seconds=overlap_seconds)
            await store.update_key(tx, row.id, expires_at=min(end, row.expires_at or end))
        else:
            await self._end(tx, row.id)
        facts = {"replacement": made.id, "overlap_seconds": overlap_seconds}
        await audit.record(tx, caller, "key.rotate", row.id, details=facts)
        return made

    async def _lock(self, tx: Tx, caller: Caller, key_id: str) -> Any:
        row = await store.lock_live_key(tx, caller.org, key_id, self._clock.wall())
        if row is None or not (self._is_self(caller, row.id) or caller.may("keys:write") or _is_own(caller, row)):
            raise Problem("request.not_found", "there is no such key")
        return row

    def _visible(self, caller: Caller, row: Any) -> bool:
        """Whether a caller may know of a key: with ``keys:own`` alone, of nobody else's."""
        return self._is_self(caller, row.id) or caller.may("keys:read") or _is_own(caller, row)

    @staticmethod
    def _is_self(caller: Caller, key_id: str) -> bool:
        """``portico logout`` ends the key that it calls with, whatever that key may do."""
        return caller.id == key_id

    async def _end(self, tx: Tx, key_id: str, reason: str | None = None) -> None:
        await store.update_key(tx, key_id, revoked_at=self._clock.wall(), revoked_reason=reason)
        await self.end_work(tx, key_id)

    async def end_work(self, tx: Tx, key_id: str) -> None:
        """End what was made with a key (agent sessions, and so live tunnels), which itself may live on."""
        for tell in self.on_revoked:
            await tell(tx, key_id)

    async def end_all_of(self, tx: Tx, key_ids: Sequence[str], reason: str | None = None) -> None:
        """Revoke keys that the caller holds locked, with everything that was made with them."""
        for key_id in key_ids:
            await self._end(tx, key_id, reason)


def _maker_seen(caller: Caller) -> str | None:
    """Whose keys a caller may list: everybody's (``None``), or one person's; nobody's without a person behind it."""
    return None if caller.may("keys:read") else caller.user_id or ""


def _is_own(caller: Caller, row: Any) -> bool:
    """Whether the person behind the caller made the key; one whose maker is gone is nobody's own."""
    return caller.user_id is not None and row.user_id == caller.user_id


def _fewer(row: Any, scopes: Sequence[str]) -> dict[str, Any]:
    if row.kind != "api":
        raise Problem("auth.scope_invalid", "an agent key has fixed permissions; leave scopes out")
    if beyond := sorted(set(scopes) - set(row.scopes)):
        raise Problem("key.only_less", f"the key has no {beyond[0][:64]}; a change can only take scopes away")
    chosen = sorted(set(scopes))
    return {} if chosen == sorted(row.scopes) else {"scopes": chosen}


class _Changed:
    """A row with some columns replaced."""

    def __init__(self, row: Any, values: dict[str, Any]) -> None:
        self._row, self._values = row, values

    def __getattr__(self, name: str) -> Any:
        return self._values[name] if name in self._values else getattr(self._row, name)


async def issue(
    tx: Tx,
    now: datetime,
    organization: str | None,
    user_id: str | None,
    kind: str,
    name: str,
    scopes: list[str],
    expires_at: datetime | None = None,
    *,
    cidrs: Sequence[str] = (),
    rotated_from: str | None = None,
) -> NewKey:
    """Insert a key row and return its text. No checks: callers are ``Keys`` and the installation's first start."""
    text = new_token(TOKEN_KIND[kind])
    made = NewKey(
        new_id("key"),
        text,
        kind,
        name,
        display_prefix(text),
        list(scopes),
        sorted(permissions(kind, scopes)),
        list(cidrs),
        now,
        expires_at,
    )
    row = {
        "id": made.id,
        "organization_id": organization,
        "user_id": user_id,
        "kind": kind,
        "name": name,
        "digest": digest(text),
        "prefix": made.prefix,
        "scopes": made.scopes,
        "created_at": now,
        "expires_at": expires_at,
        "rotated_from": rotated_from,
        "allowed_cidrs": made.allowed_cidrs,
    }
    await store.insert_key(tx, row)
    return made


def _render(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "kind": row.kind,
        "name": row.name,
        "prefix": row.prefix,
        "scopes": row.scopes,
        "permissions": sorted(permissions(row.kind, row.scopes)),
        "allowed_cidrs": row.allowed_cidrs,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "last_used_at": row.last_used_at,
        "last_used_address": row.last_used_address,
    }
