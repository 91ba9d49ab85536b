"""The certificate and key with which an agent ends its visitors' TLS: two files, read again when they change.

Files that are renewed are replaced one after the other, so for a moment they may not belong together: until they do, the
context that worked stays. Nothing of the key is ever shown; errors name the files alone.
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn

from portico.errors import Problem

log = logging.getLogger("portico.agent")

# TLS 1.2 with forward secrecy and authenticated encryption only; TLS 1.3 suites are all of that kind.
CIPHERS_TLS12: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"

Mark = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """``certificate``: PEM file with the certificate and its chain. ``key``: PEM file with the private key, not encrypted
    (one file may hold both). ``alpn``: protocols that are offered, best first; none: the extension is left alone."""

    certificate: Path
    key: Path
    alpn: tuple[str, ...] = ()

    def load(self) -> ssl.SSLContext:
        """A server context: TLS 1.2 or newer. Raises ``config.invalid`` with a sentence about the file that is wrong."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(CIPHERS_TLS12)
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.sni_callback = _note_name
        if self.alpn:
            context.set_alpn_protocols(list(self.alpn))
        for path, what in ((self.certificate, "tls_cert"), (self.key, "tls_key")):
            try:
                path.read_bytes()
            except OSError as err:
                raise Problem("config.invalid", f"{what} {path} cannot be read: {err.strerror}") from None
        try:
            context.load_cert_chain(self.certificate, self.key, password=_encrypted)
        except (ssl.SSLError, OSError, ValueError) as err:
            raise Problem("config.invalid", self._why(err)) from None
        return context

    def _why(self, err: Exception) -> str:
        """In words: OpenSSL says `[SSL] PEM lib` to nearly everything."""
        if isinstance(err, _EncryptedError):
            return f"tls_key {self.key} is encrypted; give a file without a passphrase, readable by you alone"
        if getattr(err, "reason", None) == "KEY_VALUES_MISMATCH":
            return f"tls_key {self.key} is not the key of the certificate in tls_cert {self.certificate}"
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(self.certificate)
        except (ssl.SSLError, OSError):
            return f"tls_cert {self.certificate} holds no certificate in PEM form"
        return f"tls_key {self.key} holds no private key in PEM form"

    def mark(self) -> Mark:
        """Something that differs when a file was changed or replaced; raises ``OSError``."""
        infos = [path.stat() for path in (self.certificate, self.key)]
        return tuple((info.st_mtime_ns, info.st_ino, info.st_size) for info in infos)


def alpn_names(text: str) -> tuple[str, ...]:
    """Protocol names separated by commas, best first (RFC 7301); raises ``ValueError`` with a sentence."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if not (name.isascii() and name.isprintable() and " " not in name and 0 < len(name) <= 255):
            raise ValueError(f"{name[:40]!r} is not the name of a protocol; give for example h2 or http/1.1")
    return names


class _EncryptedError(ValueError):
    """A key that needs a passphrase; without a callback, OpenSSL would ask for it on the terminal."""


def _encrypted() -> NoReturn:
    raise _EncryptedError


def _note_name(tls: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
    """The name that a visitor asked for, kept at its connection."""
    tls.asked_for = name  # type: ignore[attr-defined]


def doubts(certificate: Path, name: str | None) -> str:
    """What of a certificate (PEM file, the first in it) makes visitors of ``name`` refuse it, as a clause; empty: nothing that
    can be seen here."""
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError):
        return ""
    try:
        extension = found.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = extension.value.get_values_for_type(x509.DNSName)
    except (x509.ExtensionNotFound, ValueError):
        names = []
    now = datetime.now(UTC)
    if now > found.not_valid_after_utc:
        return f"the certificate expired on {found.not_valid_after_utc:%Y-%m-%d}"
    if now < found.not_valid_before_utc:
        return f"the certificate is valid from {found.not_valid_before_utc:%Y-%m-%d} on"
    if name is None or name in names or f"*.{name.partition('.')[2]}" in names:
        return ""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "no host name"
    return f"the certificate is for {shown}, not for {name}"


class TlsIdentity:
    """The context of some :class:`TlsFiles`, current for each connection that begins."""

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self._context: ssl.SSLContext | None = None
        self._seen: Mark = ()

    def context(self) -> ssl.SSLContext:
        """The context by the files as they are now, or as they were when they last fitted; raises ``config.invalid``.

        The files' times are looked at for each connection; they are read only when those changed.
        """
        try:
            mark = self.files.mark()
        except OSError:
            mark = ()
        if self._context is not None and mark == self._seen:
            return self._context
        before, self._seen = self._context, mark
        try:
            self._context = self.files.load()
        except Problem as problem:
            if before is None:
                raise
            log.warning("%s; the certificate from before stays in use", problem.detail)
            return before
        if before is not None:
            log.info("%s changed: the new certificate is in use", self.files.certificate)
        return self._context
