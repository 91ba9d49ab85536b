"""Looks before an order is spent: does the name lead here, may the authority issue, can a challenge be reached?

A failed validation takes from limits that CAs give back slowly; a look of our own costs nothing. It goes to every address that
the DNS has for the name, as a CA's would, and asks for a token that only this platform's relays know.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import ssl
from collections.abc import Awaitable, Sequence
from typing import Final

from cryptography import x509

from portico.control.domains import caa
from portico.control.domains.acme_cas import HTTP, TLS_ALPN
from portico.control.domains.acme_errors import AcmeError
from portico.control.domains.dns import Looks, common
from portico.kit.outbound import is_public
from portico.settings import ApiSettings

#: Our own codes: the name has no address, leads elsewhere, or its CAA records name other authorities.
NO_ADDRESS: Final = "no_address"
NOT_REACHED: Final = "not_reached"
CAA_FORBIDS: Final = "caa_forbids"
#: What was found before a CA was asked for anything.
UNREADY: Final = frozenset({NO_ADDRESS, NOT_REACHED, CAA_FORBIDS, "not_delegated", "relays_behind", "no_challenge"})
_ADDRESSES: Final = 8
_ANSWER_BYTES: Final = 8192
_IDENTIFIER: Final = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")
_PATH: Final = "/.well-known/acme-challenge/"


class Preflight:
    """Looks of one worker process."""

    def __init__(self, settings: ApiSettings, looks: Looks) -> None:
        self._settings = settings
        self.looks = looks
        self._allow = tuple(ipaddress.ip_network(text, strict=False) for text in settings.outbound_allow)

    async def permits(self, name: str, identities: Sequence[str], *, wildcard: bool) -> bool:
        """Whether the CAA records of a name let an authority issue that calls itself so (RFC 8659)."""
        found = await caa.policy(self.looks, name)
        return found.permits(identities, wildcard=wildcard)

    async def addresses(self, name: str) -> list[str]:
        """Where visitors of a name go. Raises ``no_address``; an address that nobody but us can reach is none."""
        four, six = await asyncio.gather(self.looks.ask(name, "A"), self.looks.ask(name, "AAAA"))
        found = sorted({value for answers in (four, six) for answer in answers for value in answer.values})
        usable = [text for text in found if self._usable(text)]
        if not usable or len(usable) < len(found):
            why = f"it leads to {', '.join(found[:4])}" if found else common(four).why or common(four).status
            raise AcmeError(NO_ADDRESS, f"{name} has no address that the internet can reach: {why}")
        return usable[:_ADDRESSES]

    def _usable(self, text: str) -> bool:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return False
        return is_public(address) or any(address in network for network in self._allow)

    async def reached(self, kind: str, name: str, token: str, authorization: str) -> None:
        """Ask for a challenge at every address of ``name``. Raises ``no_address``, ``not_reached``."""
        addresses = await self.addresses(name)
        ask = self._by_http if kind == HTTP else self._by_tls
        assert kind in (HTTP, TLS_ALPN)
        whys = await asyncio.gather(*(self._asked(ask(address, name, token, authorization)) for address in addresses))
        wrong = [f"{address}: {why}" for address, why in zip(addresses, whys, strict=True) if why]
        if wrong:
            raise AcmeError(NOT_REACHED, f"{name} does not lead here: {'; '.join(wrong)[:300]}")

    async def _asked(self, look: Awaitable[str | None]) -> str | None:
        """Why it is not our answer; ``None`` when it is."""
        try:
            async with asyncio.timeout(self._settings.acme_reach_seconds):
                return await look
        except TimeoutError:
            return "no answer in time"
        except ssl.SSLError as err:
            return f"no handshake ({err.reason or 'TLS'})"
        except OSError as err:
            return err.strerror or type(err).__name__

    async def _by_http(self, address: str, name: str, token: str, authorization: str) -> str | None:
        reader, writer = await asyncio.open_connection(address, self._settings.acme_http_port, limit=_ANSWER_BYTES)
        try:
            head = f"GET {_PATH}{token} HTTP/1.1\r\nHost: {name}\r\nUser-Agent: portico\r\nConnection: close\r\n\r\n"
            writer.write(head.encode("ascii"))
            answer = b""
            while len(answer) < _ANSWER_BYTES and (part := await reader.read(_ANSWER_BYTES)):
                answer += part
        finally:
            writer.transport.abort()
        first, _, body = answer.partition(b"\r\n\r\n")
        status = first.split(b" ", 2)[1:2]
        if status != [b"200"]:
            return f"it answered {status[0].decode('ascii', 'replace')[:3] if status else 'nothing'}"
        return None if body.strip() == authorization.encode() else "another server answered"

    async def _by_tls(self, address: str, name: str, token: str, authorization: str) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["acme-tls/1"])
        _, writer = await asyncio.open_connection(
            address, self._settings.acme_tls_port, ssl=context, server_hostname=name
        )
        try:
            spoken = writer.get_extra_info("ssl_object")
            shown = spoken.getpeercert(True)
            if spoken.selected_alpn_protocol() != "acme-tls/1" or shown is None:
                return "another server answered"
        finally:
            writer.transport.abort()
        with contextlib.suppress(ValueError, x509.ExtensionNotFound):
            found = x509.load_der_x509_certificate(shown).extensions.get_extension_for_oid(_IDENTIFIER).value
            wanted = b"\x04\x20" + hashlib.sha256(authorization.encode()).digest()
            if isinstance(found, x509.UnrecognizedExtension) and found.value == wanted:
                return None
        return "another server answered"
