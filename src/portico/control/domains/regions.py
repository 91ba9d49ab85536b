"""Regions and their public keys: for whom private keys of certificates are wrapped.

A region takes part in distribution once it has a key. Rotation: register the new key beside the old one; the certificate
worker wraps every data key for it too, and nothing else is sealed anew; give the relays of the region the new file; remove the
old key. The private halves are files at the relays and never come here.

Whoever can register a key can have private keys wrapped for it. So operators do it with a recent proof of who they are, it is in
the audit log, and a worker can be told in its own settings which keys it wraps for (``certificate_region_keys``), whatever is
registered.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from portico.control import fleet
from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.domains import vault_store as store
from portico.errors import Problem
from portico.kit import envelope
from portico.kit.db import Reader, Tx

#: Keys that a region has at once: one, and its successor; more only while something went wrong.
KEYS_PER_REGION: Final = 4


async def listing(reader: Reader, lease_seconds: float) -> list[dict[str, Any]]:
    """Every region with a key, or with a healthy relay."""
    relays: dict[str, list[str]] = {}
    for relay in await fleet.healthy(reader, lease_seconds):
        relays.setdefault(relay.region, []).append(relay.name)
    keys: dict[str, list[dict[str, Any]]] = {}
    for row in await store.region_key_rows(reader):
        missing = await store.missing_wraps(reader, row["region"], row["key_id"])
        keys.setdefault(row["region"], []).append(_render(row, missing))
    return [
        {"region": name, "keys": keys.get(name, []), "relays": relays.get(name, [])}
        for name in sorted(keys.keys() | relays.keys())
    ]


def _render(row: Any, missing: int) -> dict[str, Any]:
    return {
        "key_id": row["key_id"],
        "public_key": base64.urlsafe_b64encode(row["public_key"]).rstrip(b"=").decode(),
        "created_at": row["created_at"],
        "missing": missing,
    }


async def add_key(tx: Tx, caller: Caller, region: str, public_key: str) -> dict[str, Any]:
    """Register a public key (X25519, base64url); the worker wraps for it within seconds. Registering it again changes nothing.

    Raises ``region.key_invalid``, ``region.key_taken`` (another region has it) or ``region.too_many_keys``.
    """
    public = _public(public_key)
    name = envelope.key_id(public)
    await store.take_turns(tx)
    rows = await store.region_key_rows(tx, lock="FOR UPDATE")
    if any(row["key_id"] == name and row["region"] != region for row in rows):
        raise Problem("region.key_taken", "another region has this key; each region has keys of its own")
    mine = [row["key_id"] for row in rows if row["region"] == region]
    if name not in mine and len(mine) >= KEYS_PER_REGION:
        raise Problem(
            "region.too_many_keys", f"{region} has {len(mine)} keys; remove those that no relay uses any more"
        )
    if await store.insert_region_key(tx, region, name, public.public_bytes_raw()):
        await audit.record(tx, caller, "region.add_key", name, details={"region": region})
    found = next(row for row in await store.region_key_rows(tx, region) if row["key_id"] == name)
    return _render(found, await store.missing_wraps(tx, region, name))


async def ensure_key(tx: Tx, caller: Caller, region: str, public_key: str) -> None:
    """As :func:`add_key`, for a key of our own making at every start: where a region has many, the oldest goes."""
    rows = await store.region_key_rows(tx, region, lock="FOR UPDATE")
    public = _public(public_key)
    if envelope.key_id(public) not in [row["key_id"] for row in rows] and len(rows) >= KEYS_PER_REGION:
        await store.delete_region_key(tx, region, rows[0]["key_id"])
    await add_key(tx, caller, region, public_key)


async def remove_key(tx: Tx, caller: Caller, region: str, name: str, lease_seconds: float) -> None:
    """Wrap for this key no more and forget its wraps. What relays hold they keep until they start anew.

    Raises ``region.key_not_found``, or ``region.key_needed``: the region's other keys do not have every certificate yet, or it
    is the only one and relays of the region serve.
    """
    rows = await store.region_key_rows(tx, region, lock="FOR UPDATE")
    if name not in [row["key_id"] for row in rows]:
        raise Problem("region.key_not_found")
    others = [row["key_id"] for row in rows if row["key_id"] != name]
    serving = [relay.name for relay in await fleet.healthy(tx, lease_seconds) if relay.region == region]
    if not others and serving:
        detail = f"it is the only key of {region}, whose relays serve: {', '.join(serving[:5])}"
        raise Problem("region.key_needed", detail)
    lacking = [await store.missing_wraps(tx, region, other) for other in others]
    if fewest := min(lacking, default=0):
        detail = f"{fewest} certificates are not wrapped for another key of {region} yet"
        raise Problem("region.key_needed", detail)
    await store.delete_region_key(tx, region, name)
    await audit.record(tx, caller, "region.remove_key", name, details={"region": region})


def _public(text: str) -> X25519PublicKey:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        public = X25519PublicKey.from_public_bytes(raw)
        X25519PrivateKey.generate().exchange(public)  # refuses points of low order, which would make every secret known
    except (ValueError, binascii.Error):
        raise Problem("region.key_invalid", "not an X25519 public key of 32 bytes in base64url") from None
    return public
