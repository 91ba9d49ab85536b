"""Certificates as a CA issues them, regions with keys, relays with heartbeats: what distribution is tested with."""

from __future__ import annotations

import datetime as dt
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from portico.control.domains import vault_store
from portico.control.domains.vault import Vault, Version
from portico.kit import envelope, keyfiles
from portico.kit.authority import Authority
from portico.kit.db import Database
from portico.kit.ids import new_id

FORM = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()


@functools.cache
def authority() -> Authority:
    return Authority.make("example.com", dt.datetime.now(dt.UTC))


def issued(*names: str, by: Authority | None = None) -> tuple[bytes, bytes]:
    """Chain and key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    made = (by or authority()).issue([x509.DNSName(name) for name in names], key.public_key(), dt.datetime.now(dt.UTC))
    return made.public_bytes(serialization.Encoding.PEM), key.private_bytes(*FORM)


def worker_vault(folder: Path, allowed: list[str] | None = None) -> Vault:
    """A worker's vault, of a key file that stays the same within the folder."""
    path = folder / "worker.key"
    if not path.exists():
        path.write_text(keyfiles.new_worker_keys())
        path.chmod(0o600)
    return Vault(keyfiles.worker_keys("certificate_key_file", path), allowed)


@dataclass
class Fleet:
    """Regions with keys, and relays in them, straight in the tables."""

    db: Database
    keys: dict[str, list[X25519PrivateKey]] = field(default_factory=dict)

    async def region(self, name: str, *relays: str) -> X25519PrivateKey:
        """Another key for a region, and relays that are alive in it."""
        key = X25519PrivateKey.generate()
        self.keys.setdefault(name, []).append(key)
        async with self.db.transaction() as tx:
            public = key.public_key()
            assert await vault_store.insert_region_key(tx, name, envelope.key_id(public), public.public_bytes_raw())
        for relay in relays:
            await self.alive(relay, name)
        return key

    async def alive(self, relay: str, region: str, *, seconds_ago: float = 0, draining: bool = False) -> None:
        """A heartbeat of a relay."""
        query = """
            INSERT INTO relays (name, key_id, region, connect_url, public_url, version, load, draining, seen_at)
            VALUES ($1, 'key', $2, 'ws://x', 'http://x', 0, '{}', $4, now() - make_interval(secs => $3))
            ON CONFLICT (name) DO UPDATE SET seen_at = excluded.seen_at, draining = excluded.draining, region = excluded.region
        """
        async with self.db.transaction() as tx:
            await tx.raw.execute(query, relay, region, float(seconds_ago), draining)


async def domain(db: Database, name: str, organization: str | None = None) -> str:
    """A domain that its organization proved to be its own."""
    made = new_id("dom")
    async with db.transaction() as tx:
        if organization is None:
            organization = new_id("org")
            await tx.raw.execute("INSERT INTO organizations (id, name) VALUES ($1, 'Acme')", organization)
        await tx.raw.execute(
            "INSERT INTO custom_domains (id, organization_id, name, hostname_status, verification_token)"
            " VALUES ($1, $2, $3, 'active', 'x')",
            made, organization, name,
        )  # fmt: skip
    return made


async def store(db: Database, vault: Vault, domain_id: str, *names: str) -> Version:
    chain, key = issued(*names)
    async with db.transaction() as tx:
        return await vault.store(tx, domain_id, list(names), chain, key)


async def rows(db: Database, query: str, *values: Any) -> list[Any]:
    async with db.read() as reader:
        return list(await reader.raw.fetch(query, *values))
