"""DNS-01: who writes the TXT records that prove a name (RFC 8555, 8.4).

    rfc2136   dynamic updates to the zone's own server, signed (RFC 2136, RFC 8945)
    exec      a program of the operator's:  PROGRAM present|cleanup NAME VALUE

Where a record goes is decided by us, never by what a customer's alias says: into ``challenge_zone`` under the label of the
domain, which the customer's `_acme-challenge` CNAME must lead to, or into a zone that the operator named as our own.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import signal
from pathlib import Path
from typing import Any, Final, Protocol

import dns.asyncquery
import dns.exception
import dns.name
import dns.rcode
import dns.rdatatype
import dns.tsig
import dns.update

from portico.control.domains import records
from portico.control.domains.acme_errors import AcmeError
from portico.errors import Problem
from portico.settings import ApiSettings

#: Our own code for a record that could not be written.
DNS_FAILED: Final = "dns_provider"
_MESSAGE_CHARS: Final = 300


class Provider(Protocol):
    """Writes TXT records. ``name`` is absolute without the last dot. Raises :class:`AcmeError` (``dns_provider``)."""

    async def present(self, zone: str, name: str, value: str) -> None:
        """Let ``value`` be one of the TXT records at ``name``."""

    async def cleanup(self, zone: str, name: str, value: str) -> None:
        """Take it away; one that is not there is no error."""


class Rfc2136:
    """Updates by RFC 2136 over TCP, signed by TSIG."""

    def __init__(self, settings: ApiSettings) -> None:
        host, port = settings.acme_dns_server, 53
        if host.count(":") == 1:
            host, _, text = host.partition(":")
            port = int(text) if text.isdigit() else 0
        if not host or not 0 < port < 65_536:
            raise _refused("acme_dns_server", "is not ADDRESS or ADDRESS:PORT")
        self._host, self._port = host, port
        self._ttl, self._seconds = settings.acme_dns_ttl, settings.acme_dns_seconds
        self._key: dns.tsig.Key | None = None
        if settings.acme_dns_key is not None:
            algorithm = dns.name.from_text(settings.acme_dns_key_algorithm)
            if algorithm not in dns.tsig.HMACTSig._hashes:
                raise _refused("acme_dns_key_algorithm", "is not one of TSIG's, such as hmac-sha256")
            try:
                secret = base64.b64decode(settings.acme_dns_key.reveal(), validate=True)
            except ValueError:
                raise _refused("acme_dns_key", "is not base64") from None
            self._key = dns.tsig.Key(settings.acme_dns_key_name, secret, algorithm)

    async def present(self, zone: str, name: str, value: str) -> None:
        update = self._update(zone)
        update.add(dns.name.from_text(name), self._ttl, "TXT", _quoted(value))
        await self._send(update)

    async def cleanup(self, zone: str, name: str, value: str) -> None:
        update = self._update(zone)
        update.delete(dns.name.from_text(name), "TXT", _quoted(value))
        await self._send(update)

    def _update(self, zone: str) -> Any:
        return dns.update.UpdateMessage(zone, keyring=self._key)

    async def _send(self, update: Any) -> None:
        try:
            answer = await dns.asyncquery.tcp(update, self._host, self._seconds, self._port)
        except (dns.exception.DNSException, OSError, EOFError) as err:
            raise AcmeError(
                DNS_FAILED, f"the update was not taken: {type(err).__name__}: {err}"[:_MESSAGE_CHARS]
            ) from None
        if answer.rcode() != dns.rcode.NOERROR:
            raise AcmeError(DNS_FAILED, f"the update was refused: {dns.rcode.to_text(answer.rcode())}")


class Exec:
    """Runs a program, with arguments and never through a shell; its environment has nothing of ours."""

    def __init__(self, settings: ApiSettings) -> None:
        if settings.acme_dns_program is None or not settings.acme_dns_program.is_absolute():
            raise _refused("acme_dns_program", "is not the absolute path of a program")
        self._program: Path = settings.acme_dns_program
        self._seconds = settings.acme_dns_seconds

    async def present(self, zone: str, name: str, value: str) -> None:
        await self._run("present", name, value)

    async def cleanup(self, zone: str, name: str, value: str) -> None:
        await self._run("cleanup", name, value)

    async def _run(self, verb: str, name: str, value: str) -> None:
        try:
            process = await asyncio.create_subprocess_exec(
                str(self._program), verb, name, value, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE, env={"PATH": "/usr/local/bin:/usr/bin:/bin"}, start_new_session=True,
            )  # fmt: skip
        except OSError as err:
            raise AcmeError(DNS_FAILED, f"acme_dns_program cannot be run: {err.strerror}") from None
        try:
            async with asyncio.timeout(self._seconds):
                _, said = await process.communicate()
        except TimeoutError:
            raise AcmeError(DNS_FAILED, f"acme_dns_program took longer than {self._seconds:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):  # and all that it started: they hold its pipes
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if process.returncode != 0:
            text = "".join(c if c.isprintable() else " " for c in said[:_MESSAGE_CHARS].decode("utf-8", "replace"))
            raise AcmeError(DNS_FAILED, f"acme_dns_program ended with {process.returncode}: {text}"[:_MESSAGE_CHARS])


def provider(settings: ApiSettings) -> Provider | None:
    """Who writes records; ``None`` when nobody does. Raises ``config.invalid``."""
    match settings.acme_dns:
        case "":
            return None
        case "rfc2136":
            return Rfc2136(settings)
        case "exec":
            return Exec(settings)
        case other:
            raise _refused("acme_dns", f"{other!r}: there are rfc2136 and exec")


def value_of(authorization: str) -> str:
    """What the TXT record says: the digest of the key authorization in base64url."""
    return base64.urlsafe_b64encode(hashlib.sha256(authorization.encode()).digest()).rstrip(b"=").decode("ascii")


def place(settings: ApiSettings, domain: Any, chain: tuple[str, ...]) -> tuple[str, str] | None:
    """Zone and name of a domain's record; ``None`` when nothing of ours is asked. ``chain``: where `_acme-challenge` leads."""
    base = domain.name.removeprefix("*.")
    own = f"{records.ACME_LABEL}.{base}"
    zone = settings.challenge_zone.lower().strip(".")
    if zone and domain.challenge_delegation and f"{domain.challenge_delegation}.{zone}" in chain:
        return zone, f"{domain.challenge_delegation}.{zone}"
    if chain:
        return None
    for text in settings.acme_dns_zones:
        named = text.lower().strip(".")
        if base == named or base.endswith(f".{named}"):
            return named, own
    return None


def _quoted(value: str) -> str:
    return f'"{value}"'


def _refused(setting: str, why: str) -> Problem:
    return Problem("config.invalid", f"setting {setting}: {why}", key=setting)
