"""The key files of certificate distribution in a data folder, made at the first start: nobody has to know of them.

    HOME/keys/region-REGION.key    the region's private key, for the relays
    HOME/keys/worker.key           the certificate worker's keys

Both 0600. A file that was removed is made anew: a new region key is registered and wrapped for, and certificates that were sealed
with a lost worker's file go on until their renewal.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass
from pathlib import Path

from portico.embedded.folders import own_folder
from portico.embedded.secretfiles import write_private
from portico.errors import Problem
from portico.kit import keyfiles


@dataclass(frozen=True, slots=True)
class CertificateKeys:
    """Where the files are, and what is public of them: ``region_key`` and ``signer`` in base64url, ``key_id`` of the region's."""

    region_file: str
    worker_file: str
    region_key: str
    key_id: str
    signer: str

    document = asdict


def ensure(home: Path, region: str) -> CertificateKeys:
    """The key files, made where there are none. Raises ``config.invalid`` for those that are no good."""
    folder = own_folder(home / "keys", 0o700)
    region_file, worker_file = folder / f"region-{region}.key", folder / "worker.key"
    try:
        if not region_file.exists():
            write_private(region_file, keyfiles.new_region_key())
        if not worker_file.exists():
            write_private(worker_file, keyfiles.new_worker_keys())
    except OSError as err:
        raise Problem("up.data_unusable", f"cannot write below {folder}: {err.strerror}") from None
    found = keyfiles.region_keys("region_key_files", (region_file,))
    worker = keyfiles.worker_keys("certificate_key_file", worker_file)
    key_id, public = found.newest
    return CertificateKeys(
        str(region_file),
        str(worker_file),
        base64.urlsafe_b64encode(public.public_bytes_raw()).rstrip(b"=").decode(),
        key_id,
        worker.public,
    )
