"""One step of a connection at a time, for `portico diagnose`: each address by itself, then TLS with what its certificate says."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509

from portico.kit.dial import Address, bracketed, race, reason

#: OpenSSL's numbers for a chain that ends in nothing we trust, and for a name that the certificate does not have.
_UNTRUSTED, _WRONG_NAME, _WRONG_ADDRESS = frozenset((18, 19, 20, 21)), 62, 64


@dataclass(frozen=True, slots=True)
class Attempt:
    """How one address took a connection: within ``seconds``, or with a ``problem``."""

    place: str
    seconds: float
    problem: str = ""


async def each_address(addresses: Sequence[Address], limit: float) -> list[Attempt]:
    """Every address at once, each with ``limit`` seconds."""
    return list(await asyncio.gather(*(_attempt(address, limit) for address in addresses)))


async def _attempt(address: Address, limit: float) -> Attempt:
    place, began = bracketed(str(address[4][0])), time.monotonic()
    try:
        async with asyncio.timeout(limit):
            (await race([address])).close()
    except TimeoutError:
        return Attempt(place, limit, f"no answer within {limit:g} s")
    except OSError as err:
        return Attempt(place, time.monotonic() - began, reason(err).lower())
    return Attempt(place, time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a server's certificate says. ``fault``: why it is not accepted, ``kind`` of it: name, time, trust or other."""

    names: tuple[str, ...]
    issuer: str
    days_left: float
    until: datetime
    fault: str = ""
    kind: str = ""


async def certificate(
    sock: socket.socket, host: str, context: ssl.SSLContext
) -> Certificate | ssl.SSLCertVerificationError:
    """The certificate that answers on ``sock``, accepted; or the refusal. Raises ``OSError`` when there is no TLS at all."""
    try:
        return _read(await _peer(sock, host, context))
    except ssl.SSLCertVerificationError as err:
        return err


async def refused(sock: socket.socket, host: str, why: ssl.SSLCertVerificationError) -> Certificate:
    """What the certificate says that was refused with ``why``, on another connection to the same place."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    found = _read(await _peer(sock, host, context))
    if why.verify_code in (_WRONG_NAME, _WRONG_ADDRESS):
        fault, kind = f"it is for {', '.join(found.names[:5]) or 'no name'}, not for {host}", "name"
    elif found.days_left < 0:
        fault, kind = f"it expired {-found.days_left:.0f} days ago, on {found.until:%Y-%m-%d}", "time"
    elif why.verify_code in _UNTRUSTED:
        fault, kind = f"nobody that this machine trusts signed it (issuer: {found.issuer})", "trust"
    else:
        fault, kind = why.verify_message, "other"
    return Certificate(found.names, found.issuer, found.days_left, found.until, fault, kind)


async def _peer(sock: socket.socket, host: str, context: ssl.SSLContext) -> bytes:
    """The certificate (DER) of a handshake on ``sock``, which is closed in any case."""
    try:
        _, writer = await asyncio.open_connection(sock=sock, ssl=context, server_hostname=host)
    except BaseException:
        sock.close()
        raise
    der: bytes = writer.get_extra_info("ssl_object").getpeercert(True) or b""
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return der


def _read(der: bytes) -> Certificate:
    found = x509.load_der_x509_certificate(der)
    try:
        alternatives = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [*alternatives.get_values_for_type(x509.DNSName)]
        names += [str(address) for address in alternatives.get_values_for_type(x509.IPAddress)]
    except x509.ExtensionNotFound:
        names = []
    until = found.not_valid_after_utc
    issuer = _shown(found.issuer)
    return Certificate(tuple(names), issuer, (until - datetime.now(UTC)).total_seconds() / 86_400, until)


def _shown(name: x509.Name) -> str:
    """The name that people know a CA by."""
    for kind in (x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATION_NAME):
        for attribute in name.get_attributes_for_oid(kind):
            return str(attribute.value)
    return name.rfc4514_string() or "no name"
