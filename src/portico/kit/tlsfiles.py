"""A server's certificate in two files, as certbot and others write them, and read again when they were renewed.

files = CertificateFiles("api_tls", cert, key)      # raises config.invalid
context = files.context                             # for listeners; stays the same object
files.reload()                                      # new handshakes get the new certificate; a bad pair changes nothing
"""

from __future__ import annotations

import os
import ssl
import stat
from pathlib import Path

from portico import settings
from portico.errors import Problem

# TLS 1.2 with forward secrecy and authenticated encryption only; TLS 1.3 suites are all of that kind.
CIPHERS_TLS12 = "ECDHE+AESGCM:ECDHE+CHACHA20"


class CertificateFiles:
    """See the module. ``name`` is the setting's, without ``_cert_file`` and ``_key_file``."""

    def __init__(self, name: str, cert: Path, key: Path) -> None:
        self._name, self._cert, self._key = name, cert, key
        self.context = _new_context()
        self._mark: tuple[tuple[int, int, int], ...] = ()
        self.reload()

    def reload(self) -> None:
        """Read both files; raises ``config.invalid``, and what was loaded before stays."""
        self._load(_new_context())  # a pair that does not fit would leave half of it in the context
        self._load(self.context)
        self._mark = self._stat()

    def changed(self) -> bool:
        """Whether a file is another than the one that was loaded; raises ``OSError`` when one is away."""
        return self._stat() != self._mark

    def _stat(self) -> tuple[tuple[int, int, int], ...]:
        infos = [path.stat() for path in (self._cert, self._key)]
        return tuple((info.st_mtime_ns, info.st_ino, info.st_size) for info in infos)

    def _load(self, context: ssl.SSLContext) -> None:
        for setting, path in ((f"{self._name}_cert_file", self._cert), (f"{self._name}_key_file", self._key)):
            if not os.access(path, os.R_OK):
                why = "is not there" if not path.exists() else "may not be read by this user"
                raise Problem("config.invalid", f"setting {setting}: {path} {why}", key=setting)
        settings.check_private(f"setting {self._name}_key_file", self._key, stat.S_IMODE(self._key.stat().st_mode))
        try:
            context.load_cert_chain(self._cert, self._key, password=_no_password)
        except ssl.SSLError as err:
            fault = "the key does not belong to the certificate" if "MISMATCH" in (err.reason or "") else "no PEM"
            detail = f"setting {self._name}_cert_file: {self._cert} with {self._key}: {fault}"
            raise Problem("config.invalid", detail, key=f"{self._name}_cert_file") from None


def certificate_files(name: str, cert: Path | None, key: Path | None) -> CertificateFiles | None:
    """The certificate of two settings, ``None`` when neither is given; raises ``config.invalid`` for one without the other."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        missing = f"{name}_{'cert' if cert is None else 'key'}_file"
        raise Problem(
            "config.invalid", f"setting {missing}: the other of the pair is given, this one is not", key=missing
        )
    return CertificateFiles(name, cert, key)


def _no_password() -> str:
    """Without it OpenSSL would ask on the terminal."""
    raise Problem("config.invalid", "a key that is encrypted with a password cannot be used; store it without one")


def _new_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS_TLS12)
    context.set_alpn_protocols(["http/1.1"])
    # Without tickets every handshake is a full one, with the certificate of this moment.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.num_tickets = 0
    return context
