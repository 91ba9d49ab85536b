"""PayPal's certificates: fetched once from where PayPal says and nowhere else, found good, and kept for every process.

A certificate is had by the worker, before the event that named it; from then on API processes check signatures at once, and what
does not fit is refused instead of stored.
"""

from __future__ import annotations

import ssl
import warnings
from collections.abc import Sequence
from datetime import datetime
from typing import Final

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.verification import Store

from portico.control.billing import webhook_store as store
from portico.errors import Problem
from portico.kit import provider_signatures as signatures
from portico.kit.clock import Clock
from portico.kit.db import Database, Tx
from portico.kit.provider_signatures import CERT_BYTES, Unbelieved
from portico.settings import ApiSettings

#: Hosts that serve certificates of one mode alone.
_LIVE_HOST: Final = "api.paypal.com"
_TEST_HOST: Final = "api.sandbox.paypal.com"
#: Whom a certificate is for.
_LIVE_NAMES: Final = ("*.paypal.com",)
_TEST_NAMES: Final = ("*.paypal.com", "*.sandbox.paypal.com")


class Unreachable(Exception):
    """The certificate could not be had now."""


def origins(settings: ApiSettings) -> tuple[str, ...]:
    """Where certificates may be had from, as ``https://host``. A host without a scheme is asked by https."""
    other = _TEST_HOST if settings.billing_livemode else _LIVE_HOST
    hosts = [host for host in settings.paypal_cert_hosts if host != other]
    return tuple(host.rstrip("/") if "://" in host else f"https://{host}" for host in hosts)


def trusted(settings: ApiSettings) -> Store:
    """Roots that vouch for PayPal's certificates. Raises ``config.invalid``."""
    path = settings.paypal_cert_ca_file
    try:
        if path is not None:
            return signatures.roots(path.read_bytes())
        return Store(_of_the_system())
    except (OSError, ValueError) as err:
        detail = f"setting paypal_cert_ca_file: {path} cannot be read ({type(err).__name__})"
        raise Problem("config.invalid", detail, key="paypal_cert_ca_file") from None


def _of_the_system() -> list[x509.Certificate]:
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        for raw in httpx.create_ssl_context().get_ca_certs(binary_form=True):
            try:
                found.append(x509.load_der_x509_certificate(raw))
            except ValueError:
                continue  # a root that is older than the rules
    return found


class Certificates:
    """What one process knows of them."""

    def __init__(self, settings: ApiSettings, db: Database, clock: Clock) -> None:
        self._settings, self._db, self._clock = settings, db, clock
        self._keys: dict[str, tuple[RSAPublicKey, datetime]] = {}
        self._trusted: Store | None = None
        self._read_at: float | None = None

    @property
    def origins(self) -> Sequence[str]:
        """Where certificates may be had from."""
        return origins(self._settings)

    async def known(self, url: str) -> RSAPublicKey | None:
        """The key of a certificate that was fetched, by whichever process, and is still good."""
        if url not in self._keys and self._due():
            self._read_at = self._clock.monotonic()
            async with self._db.read() as reader:
                rows = await store.known_certificates(reader)
            for row in rows:
                try:
                    self._keys[row.url] = self.check(row.pem.encode())
                except Unbelieved:
                    continue  # of before a change of settings, or past its end
        key, until = self._keys.get(url, (None, self._clock.wall()))
        return key if until > self._clock.wall() else None

    def _due(self) -> bool:
        pause = self._settings.billing_webhook_certificate_refresh_seconds
        return self._read_at is None or self._clock.monotonic() >= self._read_at + pause

    def check(self, pem: bytes) -> tuple[RSAPublicKey, datetime]:
        """The key in a certificate, and when that ends. Raises :class:`Unbelieved`."""
        self._trusted = self._trusted or trusted(self._settings)
        names = _LIVE_NAMES if self._settings.billing_livemode else _TEST_NAMES
        return signatures.certificate_key(pem, self._trusted, names, self._clock.wall())

    async def fetch(self, url: str) -> tuple[str, RSAPublicKey, datetime]:
        """Get a certificate from PayPal: its text, its key, its end. Raises :class:`Unbelieved` and :class:`Unreachable`."""
        signatures.check_cert_url(url, self.origins)
        pem = await self._get(url)
        key, until = self.check(pem)
        return pem.decode("ascii", "replace"), key, until

    async def keep(self, tx: Tx, url: str, pem: str, until: datetime) -> None:
        """Let every process know a certificate that was found good."""
        await store.keep_certificate(tx, url, pem, until)

    async def _get(self, url: str) -> bytes:
        settings = self._settings
        verify: ssl.SSLContext = httpx.create_ssl_context()
        if settings.billing_ca_file is not None:
            verify = ssl.create_default_context(cafile=str(settings.billing_ca_file))
        timeout = httpx.Timeout(settings.billing_timeout_seconds, connect=settings.billing_connect_seconds)
        found = bytearray()
        try:
            # No redirect is followed: where it leads is nobody's that was looked at.
            async with (
                httpx.AsyncClient(verify=verify, timeout=timeout, trust_env=False, follow_redirects=False) as client,
                client.stream("GET", url, headers={"Accept": "*/*", "Accept-Encoding": "identity"}) as answer,
            ):
                if 400 <= answer.status_code < 500 and answer.status_code not in (408, 429):
                    raise Unbelieved("certificate", "PayPal has no such certificate")
                if answer.status_code != 200:
                    raise Unreachable(f"PayPal answered {answer.status_code} for its certificate")
                async for part in answer.aiter_raw():
                    found += part
                    if len(found) > CERT_BYTES:
                        raise Unbelieved("certificate", f"a certificate has at most {CERT_BYTES} bytes")
        except httpx.HTTPError as err:
            raise Unreachable(f"PayPal's certificate cannot be had: {type(err).__name__}") from None
        return bytes(found)
