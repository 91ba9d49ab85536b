"""What the renewal of 10,000 domains costs the worker: finding what is due, and asking their authority when to renew.

    python -m bench.cert_renewals [--json] [--domains 10000]

Starts a real PostgreSQL (durable) in a folder of its own with so many domains that have a certificate. Measured is the CPU of
this process, as a worker's: one sweep that finds nothing due, sweeps that open an order for each domain, and questions about each
to an authority (ARI, RFC 9773) that another process plays over TLS on loopback: answers that are new, each of which becomes an
event, and the same again. The targets are 5 s for the sweep and 0.4 ms for a question.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import shutil
import ssl
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from portico.control import migrations
from portico.control.domains import acme_ari, acme_cas, acme_schedule
from portico.control.domains.acme_accounts import Accounts
from portico.embedded.folders import temp_home
from portico.embedded.postgres import EmbeddedPostgres
from portico.kit import loop
from portico.kit.authority import LOOPBACK_ADDRESSES, Authority
from portico.kit.db import Database, PoolLimits
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret

TARGET = 5.0
TARGET_ASK_MS = 0.4
_FILL = """
INSERT INTO custom_domains (id, organization_id, name, hostname_status, verification_token)
SELECT 'dom_' || n, 'org_' || n % 100, 'www' || n || '.example.com', 'active', 'x' FROM generate_series(1, $1) AS n
"""
_SCHEDULE = """
INSERT INTO certificate_schedules (domain_id, organization_id, next_at, directory, certificate, fingerprint, not_before,
    not_after, ari_next_at)
SELECT id, organization_id, now() + interval '30 days', $1, 'aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE', 'f',
    now() - interval '60 days', now() + interval '30 days', now() + interval '1 day' FROM custom_domains
"""


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An authority that says the same of every certificate."""
    window = {"start": "2090-01-01T00:00:00Z", "end": "2090-01-03T00:00:00Z"}
    while not reader.at_eof():
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        port = writer.get_extra_info("sockname")[1]
        names = ("newNonce", "newAccount", "newOrder", "revokeCert", "renewalInfo")
        directory = {name: f"https://127.0.0.1:{port}/{name}" for name in names}
        body = json.dumps({"suggestedWindow": window} if b"/renewalInfo/" in head else directory).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )


def authority(told: Any, folder: Path) -> None:
    """Serves until it is ended; tells its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")

    async def serve() -> None:
        server = await asyncio.start_server(_answer, "127.0.0.1", 0, ssl=context)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


def certify(folder: Path) -> Path:
    """A certificate for loopback with its key in ``folder``; whom it is trusted by."""
    now = datetime.now(UTC)
    made, key = Authority.make("bench.example", now), ec.generate_private_key(ec.SECP256R1())
    leaf = made.issue([x509.IPAddress(address) for address in LOOPBACK_ADDRESSES], key.public_key(), now)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "server.pem").write_bytes(key.private_bytes(*form) + leaf.public_bytes(serialization.Encoding.PEM))
    trust = folder / "authority.pem"
    trust.write_bytes(made.certificate_pem)
    return trust


async def measure(uri: str, port: int, trust: Path, domains: int) -> dict[str, float]:
    """CPU seconds of each part."""
    settings = ApiSettings(
        database_url=Secret(uri), master_key=Secret(new_master_key()), acme_agree_terms=True, acme_open_orders=domains,
        acme_ari_names=500, acme_ca_file=trust,
    )  # fmt: skip
    db = Database(uri, PoolLimits(size=4))
    directory = f"https://127.0.0.1:{port}/directory"
    async with db.transaction() as tx:
        await tx.raw.execute(
            "INSERT INTO organizations (id, name) SELECT 'org_' || n, 'Bench' FROM generate_series(0, 99) AS n"
        )
        await tx.raw.execute(_FILL, domains)
        await tx.raw.execute(_SCHEDULE, directory)
    cas = acme_cas.configured(settings)
    found = {}
    began = time.process_time()
    assert await acme_schedule.sweep(db, settings, cas) == 0
    found["nothing_due"] = time.process_time() - began
    for part in ("asked", "asked_again"):
        async with db.transaction() as tx:
            await tx.raw.execute("UPDATE certificate_schedules SET ari_next_at = now() - interval '1 s'")
        began = time.process_time()
        accounts, asked = Accounts(settings, db), 0
        while count := await acme_ari.round_(db, settings, accounts):
            asked += count
        found[part] = time.process_time() - began
        assert asked == domains, asked
    async with db.transaction() as tx:
        await tx.raw.execute("UPDATE certificate_schedules SET next_at = now()")
    began = time.process_time()
    opened = 0
    while count := await acme_schedule.sweep(db, settings, cas):
        opened += count
    found["all_due"] = time.process_time() - began
    assert opened == domains, opened
    await db.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--domains", type=int, default=10_000)
    args = parser.parse_args()
    home = temp_home("portico-bench-renewals-")
    server = EmbeddedPostgres(home)
    here, there = multiprocessing.Pipe()
    keys = temp_home("portico-bench-authority-")
    trust = certify(keys)
    other = multiprocessing.Process(target=authority, args=(there, keys), daemon=True)
    other.start()
    try:
        server.start()
        loop.run(migrations.upgrade(server.uri))
        found = loop.run(measure(server.uri, here.recv(), trust, args.domains))
    finally:
        other.terminate()
        server.stop()
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(keys, ignore_errors=True)
    sweep = found["nothing_due"] + found["all_due"]
    if args.json:
        figures = {"domains": args.domains, "cpu_seconds": found, "sweep": sweep, "target": TARGET}
        print(json.dumps(figures | {"target_ask_ms": TARGET_ASK_MS}))
        return
    each = 1000 / args.domains
    print(f"{args.domains} domains, CPU seconds of the worker (target for the sweep: {TARGET:g})")
    print(f"  a sweep that finds nothing due   {found['nothing_due']:.3f}")
    print(f"  an order opened for each         {found['all_due']:.3f}")
    print(f"  a new window for each (ARI)      {found['asked']:.3f}   {found['asked'] * each:.3f} ms each")
    print(f"  the same window for each (ARI)   {found['asked_again']:.3f}   {found['asked_again'] * each:.3f} ms each")
    print(f"  (target for one question: {TARGET_ASK_MS:g} ms)")


if __name__ == "__main__":
    main()
