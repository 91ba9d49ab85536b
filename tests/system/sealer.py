"""What the certificate worker does once a CA has issued: make a key, have a certificate, seal both.

A process of its own, so that it can be killed, and so that a key is in its memory and must be nowhere else.

    python -m tests.system.sealer DATABASE_URL KEY_FILE CA_FOLDER
    a line of JSON in: {domain, hostname}; one out: what was sealed
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import sys
from pathlib import Path
from typing import Any

from portico.control.domains.vault import Vault
from portico.kit import keyfiles
from portico.kit.authority import Authority
from portico.kit.db import Database, PoolLimits
from tests.control.domains.certificates import issued

#: Keys stay in memory, as they do in a worker that has work in hand.
_HELD: list[bytes] = []


def ca(folder: Path) -> Authority:
    """The same one for every process that was given this folder."""
    paths = folder / "ca.pem", folder / "ca.key"
    if not paths[0].exists():
        made = Authority.make("example.com", dt.datetime.now(dt.UTC))
        paths[1].write_bytes(made.key_pem(b"test"))
        paths[0].write_bytes(made.certificate_pem)
    return Authority.read(paths[0].read_bytes(), paths[1].read_bytes(), b"test")


async def seal(db: Database, vault: Vault, by: Authority, wanted: dict[str, Any]) -> dict[str, Any]:
    chain, key = issued(wanted["hostname"], by=by)
    _HELD.append(key)
    async with db.transaction() as tx:
        version = await vault.store(tx, wanted["domain"], [wanted["hostname"]], chain, key)
    return {
        "id": version.id,
        "version": version.version,
        "fingerprint": version.fingerprint,
        "key": key.decode(),
        "ca": by.certificate_pem.decode(),
    }


async def main(url: str, key_file: Path, folder: Path) -> None:
    db = Database(url, PoolLimits(size=1), application="sealer")
    vault = Vault(keyfiles.worker_keys("certificate_key_file", key_file))
    by = ca(folder)
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            said = await seal(db, vault, by, json.loads(line))
        except Exception as err:
            said = {"error": repr(err)[:300]}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
