"""Certificates for development: leaves of a CA of one's own, made when they are asked for and kept in memory alone.

The CA belongs to the machine of `portico up` (`portico dev-ca`), which has its key encrypted on disk. A relay without any
certificate makes itself a CA that nobody trusts. OpenSSL's clients do not match ``*.localhost``, since a wildcard needs two
labels behind it: below a base domain of one label every name gets a certificate of its own.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from portico.kit.authority import LOOPBACK_ADDRESSES, RENEW_BEFORE, Authority, AuthorityInvalid
from portico.relay.certificates import Certificate, CertificateStore, build
from portico.settings import Secret

log = logging.getLogger("portico.relay.development")

CERTIFICATE_FILE: Final = "ca.pem"
KEY_FILE: Final = "ca.key"
#: Certificates made on demand that are kept.
LEAVES_MAX: Final = 1024
#: Certificates a minute for names that are nobody's: whoever mistypes one reads the page that says so, and who invents them
#: by the thousand costs little. Further ones get the wildcard.
STRANGERS_PER_MINUTE: Final = 60


def authority(folder: Path | None, passphrase: Secret | None, base_domain: str) -> Authority:
    """The CA of ``folder``, or one of this process's own when there is none that serves. Reads files."""
    now = dt.datetime.now(dt.UTC)
    if folder is None:
        log.warning("HTTPS is served with a certificate that nobody trusts; set tls_certificates")
        return Authority.make(base_domain, now)
    try:
        certificate, key = ((folder / name).read_bytes() for name in (CERTIFICATE_FILE, KEY_FILE))
        found = Authority.read(certificate, key, passphrase.reveal().encode() if passphrase is not None else b"")
        if found.fits(base_domain, now):
            return found
        why = "it is for another base domain, or its end is near"
    except (OSError, AuthorityInvalid) as err:
        why = str(err)
    log.error("the development CA does not serve; HTTPS goes on with one that nobody trusts", extra={"f": {"why": why}})
    return Authority.make(base_domain, now)


class Development:
    """A source of certificates. ``known`` says whether a name below the base domain is anybody's."""

    name = "development"

    def __init__(self, issuer: Authority, base_domain: str, known: Callable[[bytes], bool]) -> None:
        self.issuer = issuer
        self._base = base_domain
        self._known = known
        self._parent = base_domain.encode()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._leaves: dict[bytes, Certificate] = {}
        self._own: Certificate | None = None
        self._strangers, self._minute = 0, 0.0

    def fill(self, store: CertificateStore) -> None:
        self.renew(store)
        if "." not in self._base:
            store.on_demand = self.on_demand

    def renew(self, store: CertificateStore) -> None:
        """Make the platform's own, if there is none or its end is near."""
        if self._own is not None and not _ends(self._own):
            return
        hosts = (x509.DNSName(self._base), x509.DNSName(f"*.{self._base}"))
        self._own = self._issue([*hosts, *(x509.IPAddress(address) for address in LOOPBACK_ADDRESSES)])
        store.replace(self.name, [self._own])

    def on_demand(self, name: bytes) -> Certificate | None:
        """The certificate of one name directly below the base domain; some tenths of a millisecond the first time."""
        _, _, parent = name.partition(b".")
        if parent != self._parent:
            return None
        found = self._leaves.get(name)
        if found is not None and not _ends(found):
            return found
        if not self._known(name) and not self._stranger():
            return None
        if len(self._leaves) >= LEAVES_MAX:
            self._leaves.clear()
        found = self._leaves[name] = self._issue([x509.DNSName(name.decode("ascii"))])
        return found

    def _stranger(self) -> bool:
        """Whether another name of nobody's may have a certificate now."""
        now = time.monotonic()
        if now - self._minute > 60:
            self._strangers, self._minute = 0, now
        self._strangers += 1
        return self._strangers <= STRANGERS_PER_MINUTE

    def _issue(self, names: list[x509.GeneralName]) -> Certificate:
        return build([self.issuer.issue(names, self._key.public_key(), dt.datetime.now(dt.UTC))], self._key)


def _ends(certificate: Certificate) -> bool:
    return certificate.not_after - dt.datetime.now(dt.UTC) < RENEW_BEFORE
