"""All that a relay serves TLS with: the public port's store and what fills it, and the certificate of the agents' port.

    files (tls_certificates) ──► CertificateStore ◄── development CA (where no file is for the base domain)
    vault (custom domains) ─────────┘
    control_tls_cert_file    ──► context of the agents' port

Files are looked at every ``tls_poll_seconds`` and on SIGHUP, in a thread; what is new serves the next connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Callable
from typing import Final

from portico.errors import Problem
from portico.kit.tlsfiles import certificate_files
from portico.relay import development, statefiles
from portico.relay.certificate_files import CertificateFiles
from portico.relay.certificates import VAULT, CertificateStore
from portico.settings import RelaySettings

log = logging.getLogger("portico.relay.certificates")

#: Seconds between two looks at whether a certificate of our own making is about to end.
RENEW_SECONDS: Final = 3600.0


class Certificates:
    """``known``: whether a host belongs to a tunnel. Raises ``config.invalid`` for control files that are no good."""

    def __init__(self, settings: RelaySettings, known: Callable[[bytes], bool]) -> None:
        self.settings = settings
        self.store = CertificateStore(
            settings.base_domain,
            contexts_max=settings.tls_contexts_max,
            context_seconds=settings.tls_context_seconds,
            clock=time.monotonic,
        )
        self._known = known
        self._files = CertificateFiles(settings.tls_certificates, settings.tls_key_passphrase)
        self._development: development.Development | None = None
        self._control = certificate_files("control_tls", settings.control_tls_cert_file, settings.control_tls_key_file)
        self._control_fault = ""
        self._wake = asyncio.Event()

    @property
    def control_context(self) -> ssl.SSLContext | None:
        """For the agents' port; the same object for good, with the certificate that is good now."""
        return self._control.context if self._control is not None else None

    def fill(self) -> None:
        """Before the port opens. Raises ``config.invalid`` for a named file that is no good."""
        for name in (self._files.name, VAULT):
            self.store.register(name)
        self._files.fill(self.store)
        self._develop()

    def _develop(self) -> None:
        """The development CA, while no file is for the base domain and the names below it."""
        base = self.settings.base_domain.encode()
        served = (self.store.find(base), self.store.find(b"any." + base))
        if self._development is None and None in served and (self.settings.dev_ca_dir or not len(self.store)):
            issuer = development.authority(
                self.settings.dev_ca_dir, self.settings.dev_ca_passphrase, self.settings.base_domain
            )
            self._development = development.Development(issuer, self.settings.base_domain, self._known)
            self._development.fill(self.store)

    def reload(self) -> None:
        """Look at the files now."""
        self._wake.set()

    async def run(self) -> None:
        """Look at the files until cancelled."""
        renewed = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.tls_poll_seconds):
                    await self._wake.wait()
            self._wake.clear()
            self._files.take(await statefiles.in_thread(self._files.look), self.store)
            await statefiles.in_thread(self._look_at_control)
            if self._development is not None and time.monotonic() - renewed > RENEW_SECONDS:
                renewed = time.monotonic()
                self._development.renew(self.store)

    def _look_at_control(self) -> None:
        if self._control is None:
            return
        try:
            if not self._control.changed():
                return
            self._control.reload()
        except (Problem, OSError) as err:
            fault = err.detail if isinstance(err, Problem) else str(err)
            if fault != self._control_fault:
                log.error("the agents' port goes on with the certificate that it has", extra={"f": {"why": fault}})
            self._control_fault = fault
        else:
            self._control_fault = ""
            log.info("the agents' port has a new certificate")
