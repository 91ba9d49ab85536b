"""Where a certificate's private key goes once it was made: sealed, for relays alone.

    acme (in the worker) ──chain, key──► store ──► sealed key, wraps, signed manifest ──► edge stream, /edge/certificates

The key is sealed before it leaves the process that made it, and no other process of the control plane can open it: regions'
private keys are files at the relays, and the worker's own key file (``certificate_key_file``) is the worker's. The database, the
API and its backups hold ciphertext. The worker can open what it sealed, so that a region's new key needs no new certificates
(decision 0018).

A version's number only rises, per domain, and is never given out twice: relays refuse a lower one than they have served.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from portico.control import changes
from portico.control.domains import vault_store as store
from portico.errors import Problem
from portico.kit import envelope, ids, keyfiles
from portico.kit.db import Database, HasConnection, Tx
from portico.kit.envelope import Binding, Manifest, Wrap
from portico.kit.keyfiles import WorkerKeys
from portico.settings import WorkerSettings

log = logging.getLogger(__name__)

#: Versions that one transaction wraps anew.
_REWRAP_ROWS: Final = 100


class CertificateRefused(ValueError):
    """A chain and key that nobody could serve with; the text says why, without either."""


@dataclass(frozen=True, slots=True)
class Version:
    """A stored certificate. ``version`` is the domain's fencing token; ``fingerprint``: SHA-256 of the leaf, hex."""

    id: str
    domain_id: str
    version: int
    hostname: str
    fingerprint: str
    serial: str
    issuer: str
    not_before: datetime
    not_after: datetime


class Vault:
    """Seals with the worker's keys. One per worker process. ``allowed``: ids of regions' keys that it wraps for; ``None``: all
    that are registered."""

    def __init__(self, keys: WorkerKeys, allowed: Sequence[str] | None = None) -> None:
        self._keys = keys
        self._allowed = None if allowed is None else list(allowed)

    async def _region_keys(self, reader: HasConnection) -> list[Any]:
        rows = await store.region_key_rows(reader)
        return rows if self._allowed is None else [row for row in rows if row["key_id"] in self._allowed]

    async def store(
        self, tx: Tx, domain_id: str, hostnames: Sequence[str], chain_pem: bytes, key_pem: bytes
    ) -> Version:
        """Seal a certificate's key and let relays stage it; the version that serves goes on until all of them have.

        ``hostnames``: what it was ordered for, the domain's own name first; it must be for exactly these. A version that was
        being staged for the domain is superseded. Holds the domain's head until ``tx`` ends. Raises :class:`CertificateRefused`.
        """
        facts = read(chain_pem, key_pem, hostnames)
        head = await store.next_version(tx, domain_id)
        if head is None:
            raise CertificateRefused("the domain is gone")
        found = Version(
            ids.new_id("crt"), domain_id, head["last_version"], hostnames[0], facts.fingerprint, facts.serial, facts.issuer,
            facts.not_before, facts.not_after,
        )  # fmt: skip
        await self._insert(tx, found, sorted(hostnames), chain_pem, key_pem)
        if head["staged_id"] is not None:
            await store.end_version(tx, head["staged_id"], "superseded")
        await store.set_head(tx, domain_id, head["active_id"], found.id)
        await tell(tx, [domain_id])
        log.info(
            "certificate sealed",
            extra={
                "f": {"domain": domain_id, "certificate": found.id, "version": found.version, "until": found.not_after}
            },
        )
        return found

    async def _insert(self, tx: Tx, found: Version, names: Sequence[str], chain_pem: bytes, key_pem: bytes) -> None:
        binding = Binding(found.id, found.version, found.hostname, found.fingerprint)
        sealed = envelope.seal(key_pem, binding)
        own = envelope.wrap(sealed.data_key, binding, envelope.WORKER, self._keys.own.public_key())
        manifest = Manifest(
            domain=found.domain_id,
            certificate=found.id,
            version=found.version,
            hostname=found.hostname,
            fingerprint=found.fingerprint,
            chain=envelope.digest(chain_pem),
            sealed=envelope.digest(sealed.content),
            not_before=store.moment(found.not_before),
            not_after=store.moment(found.not_after),
        )
        row = {name: getattr(found, name) for name in Version.__dataclass_fields__}
        row |= {
            "state": "staging",
            "names": list(names),
            "chain_pem": chain_pem.decode("ascii"),
            "manifest": manifest.sign(self._keys.signer),
            "sealed": sealed.content,
            "worker_key_id": own.key_id,
            "worker_wrap": own.wrapped,
        }
        await store.insert_version(tx, row)
        wraps = _wraps(sealed.data_key, binding, await self._region_keys(tx))
        await store.insert_wraps(tx, [(found.id, each.region, each.key_id, each.wrapped) for each in wraps])

    async def rewrap(self, db: Database) -> int:
        """Wrap data keys for regions' keys that lack them; how many versions. What is sealed stays as it is.

        Harmless beside itself. A data key that this worker's file does not open is left out and said once a call: relays of
        a new key get such a certificate with its next renewal.
        """
        count, after = 0, ""
        while True:
            async with db.read() as reader:
                rows = await store.unwrapped(reader, _REWRAP_ROWS, after, self._allowed)
                keys = await self._region_keys(reader)
            if not rows:
                return count
            after = rows[-1]["id"]
            made = [wrap for row in rows for wrap in self._wrapped_anew(row, keys)]
            async with db.transaction() as tx:
                done = set(await store.insert_wraps(tx, made))
                await tell(tx, await _domains_of(tx, done))
            count += len(done)

    def _wrapped_anew(self, row: Any, keys: Iterable[Any]) -> list[tuple[str, str, str, bytes]]:
        binding = Binding(row["id"], row["version"], row["hostname"], row["fingerprint"])
        own = Wrap(envelope.WORKER, row["worker_key_id"], row["worker_wrap"])
        try:
            data_key = envelope.unwrap([own], binding, envelope.WORKER, self._keys.opener)
        except envelope.EnvelopeInvalid as err:
            log.error("a data key cannot be wrapped anew", extra={"f": {"certificate": row["id"], "why": str(err)}})
            return []
        return [(row["id"], each.region, each.key_id, each.wrapped) for each in _wraps(data_key, binding, keys)]


def _wraps(data_key: bytes, binding: Binding, keys: Iterable[Any]) -> list[Wrap]:
    publics = [(row["region"], X25519PublicKey.from_public_bytes(row["public_key"])) for row in keys]
    return [envelope.wrap(data_key, binding, region, public) for region, public in publics]


async def _domains_of(reader: HasConnection, certificates: Iterable[str]) -> list[str]:
    return sorted({row["domain_id"] for row in (await store.version_rows(reader, list(certificates))).values()})


@functools.lru_cache(maxsize=4)
def _keys(path: Path) -> WorkerKeys:
    return keyfiles.worker_keys("certificate_key_file", path)


def of(settings: WorkerSettings) -> Vault:
    """The vault of a worker process. Raises ``config.invalid`` when it has no key file, or one that is no good."""
    if settings.certificate_key_file is None:
        text = "setting certificate_key_file: certificates are sealed with keys in a file of the worker's own"
        raise Problem("config.invalid", text, key="certificate_key_file")
    return Vault(_keys(settings.certificate_key_file), settings.certificate_region_keys or None)


# -- what relays hear --------------------------------------------------------------------------------------------------


async def tell(tx: Tx, domain_ids: Sequence[str]) -> None:
    """Tell relays how the domains stand now. Hold their heads, so that what is told is what is committed."""
    rows = await store.edge_rows(tx, domain_ids) if domain_ids else []
    changes.append(tx, *(changes.certificate(edge_row(row)) for row in rows))


def edge_row(row: Any) -> dict[str, Any]:
    """A domain's certificates as relays hear of them (``contracts/edge-stream.schema.json``); contents they ask for."""
    found: dict[str, Any] = {"domain": row["domain_id"], "hostname": row["hostname"]}
    for state in ("active", "staged"):
        if row[f"{state}_id"] is not None:
            parts = ("id", "version", "fingerprint")
            found[state] = {name: row[f"{state}_{name}"] for name in parts}
    return found


async def edge_rows(reader: HasConnection) -> list[dict[str, Any]]:
    """Those of every domain, for a snapshot."""
    return [edge_row(row) for row in await store.edge_rows(reader)]


async def bundles(reader: HasConnection, certificates: Sequence[str], region: str) -> list[dict[str, Any]]:
    """What relays of ``region`` need of each of these that has a key: ciphertext for them, a manifest, the chain."""
    return [_bundle(row) for row in await store.bundles(reader, certificates, region)]


def _bundle(row: Any) -> dict[str, Any]:
    wraps = zip(row["key_ids"], row["wraps"], strict=True)
    return {
        "certificate": row["id"],
        "domain": row["domain_id"],
        "version": row["version"],
        "manifest": row["manifest"],
        "chain": row["chain_pem"],
        "sealed": base64.b64encode(row["sealed"]).decode(),
        "wraps": [{"key_id": name, "wrapped": base64.b64encode(wrapped).decode()} for name, wrapped in wraps],
    }


async def remove(tx: Tx, domain_id: str) -> None:
    """The domain is gone: relays forget its certificates, and its keys with them."""
    await store.hold_heads(tx, [domain_id])
    if await store.delete_head(tx, domain_id):
        changes.append(tx, changes.certificate_removed(domain_id))


async def leave(tx: Tx, organization: str, limit: int) -> int:
    """Up to ``limit`` domains of an organization that is being deleted, as :func:`remove`; how many."""
    domains = await store.domains_of(tx, organization, limit)
    for domain_id in domains:
        await remove(tx, domain_id)
    return len(domains)


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Facts:
    """What a leaf says."""

    fingerprint: str
    serial: str
    issuer: str
    not_before: datetime
    not_after: datetime


def read(chain_pem: bytes, key_pem: bytes, hostnames: Sequence[str]) -> Facts:
    """Check that the key is the leaf's, that the leaf is for exactly ``hostnames`` and that each certificate was issued by the
    next. Raises :class:`CertificateRefused`."""
    try:
        chain_pem.decode("ascii")
        chain = x509.load_pem_x509_certificates(chain_pem)
        leaf = chain[0]
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key = serialization.load_pem_private_key(key_pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound):
        raise CertificateRefused("the certificate chain or the key cannot be read") from None
    if _spki(leaf.public_key()) != _spki(key.public_key()):
        raise CertificateRefused("the key is not that of the certificate")
    found = {name.lower() for name in names.get_values_for_type(x509.DNSName)}
    if found != set(hostnames) or len(list(names)) != len(found):
        raise CertificateRefused("the certificate is for other names than it was ordered for")
    for issued, issuer in itertools.pairwise(chain):
        try:
            issued.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            raise CertificateRefused("a certificate of the chain was not issued by the one that follows it") from None
    return Facts(
        leaf.fingerprint(hashes.SHA256()).hex(),
        f"{leaf.serial_number:x}",
        leaf.issuer.rfc4514_string(),
        leaf.not_valid_before_utc,
        leaf.not_valid_after_utc,
    )


def _spki(key: Any) -> bytes:
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(*form)).digest()
