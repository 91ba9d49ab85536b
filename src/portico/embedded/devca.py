"""The development CA of a data folder: one for each base domain, its key encrypted under the platform's master key.

    HOME/dev-ca/BASE-DOMAIN/ca.pem    the certificate, to be trusted by who likes
    HOME/dev-ca/BASE-DOMAIN/ca.key    its key, 0600 and encrypted

It can vouch for the base domain, names below it and loopback addresses, and for nothing else (`kit/authority.py`).
"""

from __future__ import annotations

import datetime as dt
import hmac
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from portico.embedded import secretfiles
from portico.embedded.folders import own_folder
from portico.errors import Problem

CERTIFICATE_FILE, KEY_FILE = "ca.pem", "ca.key"
_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")


@dataclass(frozen=True, slots=True)
class DevelopmentCa:
    """Where it is, and what it is known by (SHA-256, hex)."""

    certificate: Path
    fingerprint: str
    until: dt.date
    made: bool


def folder(home: Path, base_domain: str) -> Path:
    """Where the CA of a base domain is. Raises ``config.invalid`` for a domain that is none."""
    if not _DOMAIN.fullmatch(base_domain) or len(base_domain) > 253:
        raise Problem("config.invalid", f"setting base_domain: {base_domain!r} is no host name", key="base_domain")
    return home / "dev-ca" / base_domain


def passphrase(home: Path) -> str:
    """What opens its key."""
    return hmac.digest(secretfiles.master_key(home).encode(), b"portico/dev-ca", "sha256").hex()


def ensure(home: Path, base_domain: str) -> DevelopmentCa:
    """The CA, made when there is none that serves. Raises ``up.data_unusable`` when it cannot be written."""
    from portico.kit.authority import Authority, AuthorityInvalid

    place, secret, now = folder(home, base_domain), passphrase(home).encode(), dt.datetime.now(dt.UTC)
    certificate, key = place / CERTIFICATE_FILE, place / KEY_FILE
    made = False
    try:
        found: Authority | None = Authority.read(certificate.read_bytes(), key.read_bytes(), secret)
    except (OSError, AuthorityInvalid):
        found = None
    if found is None or not found.fits(base_domain, now):
        found, made = Authority.make(base_domain, now), True
        try:
            for part in (place.parent, place):
                own_folder(part, 0o755)
            secretfiles.write_private(key, found.key_pem(secret).decode())
            secretfiles.write_private(certificate, found.certificate_pem.decode())
            certificate.chmod(0o644)
        except OSError as err:
            raise Problem("up.data_unusable", f"cannot write to {place}: {err.strerror}") from None
    return DevelopmentCa(certificate, found.fingerprint, found.certificate.not_valid_after_utc.date(), made)


def existing(home: Path, base_domain: str) -> DevelopmentCa:
    """The CA of another user's data folder, as far as everybody may see it. Raises ``up.data_unusable`` when there is none."""
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256

    path = folder(home, base_domain) / CERTIFICATE_FILE
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        raise Problem("up.data_unusable", f"there is no development CA for {base_domain} in {home}") from None
    return DevelopmentCa(path, found.fingerprint(SHA256()).hex(), found.not_valid_after_utc.date(), made=False)


# ── the machine's own list of authorities ─────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class SystemStore:
    """Where a Linux system takes further authorities from, and the command that takes them in."""

    folder: Path
    command: tuple[str, ...]

    def file(self, base_domain: str) -> Path:
        return self.folder / f"portico-dev-ca-{base_domain}.crt"


STORES = (
    SystemStore(Path("/usr/local/share/ca-certificates"), ("update-ca-certificates",)),  # Debian, Ubuntu, Alpine, SUSE
    SystemStore(Path("/etc/pki/ca-trust/source/anchors"), ("update-ca-trust", "extract")),  # Fedora, RHEL
    SystemStore(Path("/etc/ca-certificates/trust-source/anchors"), ("update-ca-trust",)),  # Arch
)


def system_store() -> SystemStore | None:
    """The one of this system."""
    return next((store for store in STORES if store.folder.is_dir() and shutil.which(store.command[0])), None)


def trust(store: SystemStore, ca: DevelopmentCa, base_domain: str) -> Path:
    """Let every program of this machine that asks the system trust it. Raises ``up.data_unusable``."""
    path = store.file(base_domain)
    try:
        path.write_bytes(ca.certificate.read_bytes())
        path.chmod(0o644)
    except OSError as err:
        raise Problem("up.data_unusable", f"cannot write {path}: {err.strerror}") from None
    _update(store)
    return path


def distrust(store: SystemStore, base_domain: str) -> bool:
    """Take it back; whether it was there."""
    path = store.file(base_domain)
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as err:
        raise Problem("up.data_unusable", f"cannot remove {path}: {err.strerror}") from None
    _update(store)
    return True


def _update(store: SystemStore) -> None:
    done = subprocess.run(store.command, capture_output=True, text=True, check=False)  # noqa: S603 - one of ours
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no reason given"]
        raise Problem("up.data_unusable", f"{' '.join(store.command)} failed: {last[0]}")
