"""The certificate authorities (CAs) of the settings: in which order they are asked, and how each is spoken to."""

from __future__ import annotations

import functools
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric import ec

from portico.control.domains.acme_client import Client, Limits
from portico.errors import Problem
from portico.settings import ApiSettings

#: Let's Encrypt's directories of production and of staging.
LETS_ENCRYPT: Final = "https://acme-v02.api.letsencrypt.org/directory"
LETS_ENCRYPT_STAGING: Final = "https://acme-staging-v02.api.letsencrypt.org/directory"
HTTP, TLS_ALPN, DNS = "http-01", "tls-alpn-01", "dns-01"
_KINDS: Final = (HTTP, TLS_ALPN, DNS)


@dataclass(frozen=True, slots=True)
class Ca:
    """One CA. ``staging``: where it can be tried what is not to be spent; ``binding``: key id and key of an account elsewhere."""

    directory: str
    staging: str | None
    profile: str | None
    binding: tuple[str, str] | None

    @property
    def host(self) -> str:
        return _host(self.directory)


def configured(settings: ApiSettings) -> tuple[Ca, ...]:
    """The CAs in order; none while nobody agreed to their terms. Raises ``config.invalid``."""
    if not settings.acme_agree_terms:
        return ()
    profiles = dict(_pair("acme_profiles", text) for text in settings.acme_profiles)
    accounts = settings.acme_external_accounts
    texts = [part.strip() for part in accounts.reveal().split(",")] if accounts is not None else []
    bindings = {
        host: _binding(value) for host, value in (_pair("acme_external_accounts", text) for text in texts if text)
    }
    found: list[Ca] = []
    for directory in (settings.acme_directory, *settings.acme_fallback_directories):
        host = _checked(directory)
        staging = settings.acme_staging_directory if not found else ""
        if not staging and directory == LETS_ENCRYPT:
            staging = LETS_ENCRYPT_STAGING
        found.append(Ca(directory, staging or None, profiles.get(host), bindings.get(host)))
    if unknown := set(settings.acme_challenges) - set(_KINDS):
        raise _refused("acme_challenges", f"{', '.join(sorted(unknown))}: there are {', '.join(_KINDS)}")
    _context(settings.acme_ca_file)
    return tuple(found)


def client(settings: ApiSettings, directory: str, key: ec.EllipticCurvePrivateKey, account: str | None) -> Client:
    """A client of a CA as its account. The caller closes it."""
    limits = Limits(settings.acme_timeout_seconds, settings.acme_answer_max_bytes, settings.acme_nonce_retries)
    return Client(directory, key, account=account, context=_context(settings.acme_ca_file), limits=limits)


@functools.lru_cache(maxsize=4)
def _context(path: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as err:
        raise _refused("acme_ca_file", str(err)) from None


def _checked(directory: str) -> str:
    host = _host(directory)
    if urlsplit(directory).scheme != "https" or not host:
        raise _refused("acme_directory", f"{directory!r} is not an https:// address")
    return host


def _host(directory: str) -> str:
    return urlsplit(directory).hostname or ""


def _pair(setting: str, text: str) -> tuple[str, str]:
    host, found, value = text.partition("=")
    if not found or not host.strip() or not value.strip():
        raise _refused(setting, "each part is HOST=VALUE")
    return host.strip().lower(), value.strip()


def _binding(value: str) -> tuple[str, str]:
    kid, found, key = value.rpartition(":")
    if not found or not kid or not key:
        raise _refused("acme_external_accounts", "each part is HOST=KEY_ID:HMAC_KEY")
    return kid, key


def _refused(setting: str, why: str) -> Problem:
    return Problem("config.invalid", f"setting {setting}: {why}", key=setting)
