"""An independent look at what the public edge really serves: as a visitor of each region, by TLS.

    targets (region=host:port) ──ClientHello with the domain's name──► chain, name, expiry, fingerprint ──► certificate_probes
                                                                               └─ wrong twice in a row ─► incident `integrity`

What relays say of themselves is not asked: a relay that serves something else than it acknowledges, a proxy in front of it, or a
name server that leads elsewhere is seen here. It is never an event: what the probe sees changes no certificate's state. It is
bounded in connections, time and domains at once. The addresses are the operator's; of a domain only the name is used, in the
ClientHello.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from portico.control.domains import probe_store as store
from portico.control.domains import store as domain_store
from portico.control.domains.incidents import Condition, Incidents
from portico.errors import Problem
from portico.kit.db import Database, Tx
from portico.settings import WorkerSettings

log = logging.getLogger(__name__)

#: Looks in a row that must find a certificate wrong before somebody is told: a switch takes a moment.
LOOKS: Final = 2
#: The label below a wildcard that is asked for.
LABEL: Final = "portico-probe"
# OpenSSL's X509_V_ERR_…: certificate has expired, is not yet valid, is for another host.
_EXPIRED: Final = (10, 9)
_WRONG_NAME: Final = 62


@dataclass(frozen=True, slots=True)
class Target:
    """Where visitors of a region arrive."""

    region: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look found."""

    outcome: str
    fingerprint: str | None = None
    detail: str | None = None


#: Tells of a domain's fault, or that it has none any more: (tx, domain id, the fault or ``None``).
Tell = Callable[[Tx, str, Any | None], Awaitable[None]]
#: Tiers of what is found: visitors are turned away, or are served with something else than they should be.
_TIERS: Final = {"wrong_certificate": 2}


def telling(incidents: Incidents) -> Tell:
    """Faults become conditions of the domain's incident of the class ``integrity``, and end with a good look."""

    async def tell(tx: Tx, domain_id: str, fault: Any | None) -> None:
        domain = await domain_store.find(tx, domain_id, lock=True)
        if domain is None:
            return
        condition = None
        if fault is not None:
            mark = f"{fault['region']}/{fault['outcome']}/{fault['fingerprint']}"
            detail = f"visitors of the region {fault['region']}: {fault['detail'] or fault['outcome']}"
            condition = Condition(_TIERS.get(fault["outcome"], 1), f"probe_{fault['outcome']}", detail, mark)
        await incidents.settle(tx, domain, "integrity", "probe", condition, "probe")

    return tell


def targets(values: Sequence[str]) -> list[Target]:
    """Of the setting ``certificate_probe_targets``. Raises ``config.invalid``."""
    found = []
    for value in values:
        region, _, address = value.partition("=")
        host, _, port = address.rpartition(":")
        if not region or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            text = f"setting certificate_probe_targets: {value!r} is not REGION=HOST:PORT"
            raise Problem("config.invalid", text, key="certificate_probe_targets")
        found.append(Target(region, host.strip("[]"), int(port)))
    return found


def trusted(ca_file: Path | None) -> ssl.SSLContext:
    """What visitors trust: the system's authorities, or those of a file. Raises ``config.invalid``."""
    try:
        return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    except (OSError, ssl.SSLError) as err:
        text = f"setting certificate_probe_ca_file: {ca_file} holds no certificates ({err})"
        raise Problem("config.invalid", text, key="certificate_probe_ca_file") from None


async def look(target: Target, name: str, expected: str, context: ssl.SSLContext, timeout: float) -> Seen:
    """Shake hands as a visitor of ``name`` (``*.…`` for any below) and judge what is shown. Never raises."""
    host = f"{LABEL}{name[1:]}" if name.startswith("*.") else name
    try:
        async with asyncio.timeout(timeout):
            fingerprint = await _shown(target, host, context)
    except ssl.SSLCertVerificationError as err:
        return await _unverified(target, host, err, timeout)
    except ssl.SSLError as err:
        return Seen("no_certificate", None, (err.reason or "the handshake was refused").lower())
    except (OSError, TimeoutError) as err:
        return Seen("unreachable", None, (str(err) or "no answer in time")[:200])
    if fingerprint != expected:
        return Seen("wrong_certificate", fingerprint, f"served with {fingerprint[:16]}…, not with {expected[:16]}…")
    return Seen("good", fingerprint)


async def _unverified(target: Target, host: str, err: ssl.SSLCertVerificationError, timeout: float) -> Seen:
    """Why a visitor would turn away, and from what."""
    outcome = (
        "expired" if err.verify_code in _EXPIRED else "wrong_name" if err.verify_code == _WRONG_NAME else "untrusted"
    )
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only to name what is there
    fingerprint = None
    try:
        async with asyncio.timeout(timeout):
            fingerprint = await _shown(target, host, context)
    except (OSError, TimeoutError):
        pass
    return Seen(outcome, fingerprint, err.verify_message[:200])


async def _shown(target: Target, host: str, context: ssl.SSLContext) -> str:
    """The fingerprint of the leaf that a handshake shows."""
    _, writer = await asyncio.open_connection(target.host, target.port, ssl=context, server_hostname=host)
    try:
        leaf = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return hashlib.sha256(leaf or b"").hexdigest()
    finally:
        writer.transport.abort()


async def run(db: Database, settings: WorkerSettings, tell: Tell) -> dict[str, int]:
    """Look at every domain that serves, in every region; how many looks had which outcome. No transaction is open meanwhile."""
    where, context = targets(settings.certificate_probe_targets), trusted(settings.certificate_probe_ca_file)
    room = asyncio.Semaphore(settings.certificate_probe_concurrency)
    counts: dict[str, int] = {}

    async def one(target: Target, row: Any) -> tuple[str, str, str, str | None, str | None]:
        async with room:
            timeout = settings.certificate_probe_timeout_seconds
            seen = await look(target, row["name"], row["fingerprint"], context, timeout)
        counts[seen.outcome] = counts.get(seen.outcome, 0) + 1
        return row["id"], target.region, seen.outcome, seen.fingerprint, seen.detail

    after = ""
    while where:
        async with db.read() as reader:
            due = await store.due(
                reader, after, settings.certificate_probe_batch, settings.certificate_probe_settled_seconds
            )
        if not due:
            break
        after = due[-1]["id"]
        found = await asyncio.gather(*(one(target, row) for row in due for target in where))
        await _record(db, found, [row["id"] for row in due], tell)
    return counts


async def _record(db: Database, found: Sequence[Any], domains: Sequence[str], tell: Tell) -> None:
    """Keep what was found and tell of what it means, in one transaction: a worker that dies has done both or neither."""
    outcomes: dict[str, list[Any]] = {}
    for row in found:
        outcomes.setdefault(row[0], []).append(row)
    async with db.transaction() as tx:
        before = await store.failures(tx, domains)
        for domain_id in domains:
            looks = outcomes[domain_id]
            wrong = [row for row in looks if row[2] not in ("good", "unreachable")]
            fault = next((row for row in wrong if before.get((domain_id, row[1]), 0) + 1 >= LOOKS), None)
            was_wrong = any(before.get((domain_id, row[1]), 0) >= LOOKS for row in looks)
            if fault is not None:
                document = dict(zip(("domain", "region", "outcome", "fingerprint", "detail"), fault, strict=True))
                log.warning("the public edge serves a wrong certificate", extra={"f": document})
                await tell(tx, domain_id, document)
            elif was_wrong and all(row[2] == "good" for row in looks):
                await tell(tx, domain_id, None)
        await store.put(tx, found)
