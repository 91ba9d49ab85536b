"""The one HTTP client for addresses that customers name: webhooks, Slack, whatever comes.

    answer = await client.post("https://hooks.example.com/x", {"content-type": "application/json"}, body)

Who may name an address that our own machine then calls can reach what only our machine can (server-side request forgery):
metadata services, neighbours, PostgreSQL. So:

- https alone (http by a setting, for development), ports from a list, no credentials in the URL, no proxy, no redirect followed;
- names are resolved here, **every** address of the answer must be a public one, and the connection goes to an address that was
  checked: a name that changes between look and connect (DNS rebinding) is never asked twice;
- the certificate must fit the name; time, head and body are bounded, and nothing is decompressed.

One connection for each request: receivers are many, and one that behaves badly shares nothing with the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import SplitResult, urlsplit

import h11

from portico.kit import dial
from portico.kit.dial import Address

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]

#: What no customer may have us call although Python may think it public: Azure's agent of each machine, and what IANA's
#: registries of special addresses have beyond its tables (RFC 6890, 7526, 9637, 9602).
_SPECIAL: Final = tuple(
    ipaddress.ip_network(text)
    for text in ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "5f00::/16")
)
#: IPv6 with an IPv4 address inside, which a gateway would take out: compatible (RFC 4291), NAT64 (RFC 6052, 8215), Teredo, 6to4.
_CARRIES_V4: Final = tuple(
    ipaddress.ip_network(text) for text in ("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")
)
_READ_BYTES: Final = 16_384
#: Addresses of a name that are tried; all of them are checked.
_ADDRESSES: Final = 6
_PORTS: Final = {"https": 443, "http": 80}
#: Characters of a URL.
URL_CHARS: Final = 2048

Fault = Literal["url", "address", "name", "connect", "tls", "time", "answer"]


class OutboundError(Exception):
    """No answer was had. ``fault`` says where it ended; the text is for people and names no address that only we can see.

    ``url``: it will never work. ``address``: the name leads where it may not. ``name``: it leads nowhere.
    """

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(detail)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may take. ``allow`` are networks that may be called although they are not public."""

    timeout_seconds: float = 15.0
    # Of these, for the body once the head is there: it is read for its words alone.
    body_seconds: float = 2.0
    head_bytes: int = 16_384
    body_bytes: int = 65_536
    ports: tuple[int, ...] = (443,)
    http: bool = False
    allow: tuple[IpNetwork, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. ``body`` is cut at the limit; header names are lower-case."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


def is_public(address: IpAddress) -> bool:
    """Whether anybody on the internet could call ``address``: not private, not this machine, not link-local, not special."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.is_site_local or any(address in network for network in _CARRIES_V4):
            return False
    if address.is_multicast or address.is_reserved or address.is_unspecified or not address.is_global:
        return False
    return not any(address in network for network in _SPECIAL)


def check_url(url: str, limits: Limits) -> SplitResult:
    """``url`` in its parts, when it may be called as far as its text says; raises :class:`OutboundError` (``url``)."""
    if len(url) > URL_CHARS or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise OutboundError("url", f"a URL has at most {URL_CHARS} characters, all of them printable ASCII")
    try:
        parts = urlsplit(url)
        port = _PORTS.get(parts.scheme, 0) if parts.port is None else parts.port
    except ValueError:
        raise OutboundError("url", "that is no URL") from None
    if parts.scheme != "https" and not (limits.http and parts.scheme == "http"):
        raise OutboundError("url", "only https:// is called")
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise OutboundError("url", "a URL names a host, and no user or password")
    if port not in limits.ports:
        raise OutboundError("url", f"port {port} is not called; those that are: {', '.join(map(str, limits.ports))}")
    if dial.is_address(parts.hostname):
        _check_address(ipaddress.ip_address(parts.hostname.partition("%")[0]), limits)
    return parts


def _check_address(address: IpAddress, limits: Limits) -> None:
    # As it will be called: an address in another's clothes is what it is.
    real = address.ipv4_mapped or address if isinstance(address, ipaddress.IPv6Address) else address
    if not is_public(real) and not any(real in network for network in limits.allow):
        raise OutboundError("address", "that address is not a public one")


class Client:
    """Makes requests within ``limits``. ``context`` decides which certificates are trusted (the system's by default)."""

    def __init__(
        self, limits: Limits, *, context: ssl.SSLContext | None = None, resolve: Resolve = dial.resolve
    ) -> None:
        self.limits, self._resolve = limits, resolve
        self._context = context or ssl.create_default_context()
        self._context.set_alpn_protocols(["http/1.1"])

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """One POST; any answer is an answer. Raises :class:`OutboundError`."""
        limits = self.limits
        parts = check_url(url, limits)
        try:
            async with asyncio.timeout(limits.timeout_seconds):
                reader, writer = await self._connect(parts)
                try:
                    return await self._exchange(parts, headers, body, reader, writer)
                finally:
                    writer.transport.abort()  # bytes that wait for a receiver who does not read are nobody's
        except TimeoutError:
            raise OutboundError("time", f"no whole answer within {limits.timeout_seconds:g} s") from None

    async def _connect(self, parts: SplitResult) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        try:
            found = await self._resolve(host, port)
        except OSError as err:
            raise OutboundError("name", f"its name has no address: {dial.reason(err)}") from None
        if not found:
            raise OutboundError("name", "its name has no address")
        for *_, where in found:
            _check_address(ipaddress.ip_address(str(where[0]).partition("%")[0]), self.limits)
        try:
            sock = await dial.race(found[:_ADDRESSES])
        except OSError as err:
            raise OutboundError("connect", dial.reason(err)) from None
        tls = self._context if parts.scheme == "https" else None
        try:
            return await asyncio.open_connection(
                sock=sock, ssl=tls, server_hostname=host if tls else None, limit=_READ_BYTES
            )
        except ssl.SSLCertVerificationError as err:
            raise OutboundError("tls", f"its certificate is refused: {err.verify_message}") from None
        except (OSError, ssl.SSLError) as err:
            sock.close()
            raise OutboundError("tls" if tls else "connect", f"no connection: {type(err).__name__}") from None
        except BaseException:
            sock.close()
            raise

    async def _exchange(
        self, parts: SplitResult, headers: Mapping[str, str], body: bytes,
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
    ) -> Answer:  # fmt: skip
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=self.limits.head_bytes)
        default = parts.port is None or parts.port == _PORTS[parts.scheme]
        host = dial.bracketed(parts.hostname or "")
        own = {
            "host": host if default else f"{host}:{parts.port}",
            "content-length": str(len(body)),
            "accept-encoding": "identity",
            "connection": "close",
        }
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        request = h11.Request(method="POST", target=target, headers=[*own.items(), *headers.items()])
        sent = (
            connection.send(request) or b"",
            connection.send(h11.Data(body)) or b"",
            connection.send(h11.EndOfMessage()),
        )
        try:
            writer.write(b"".join(part or b"" for part in sent))
            return await self._answer(connection, reader)
        except h11.RemoteProtocolError as err:
            raise OutboundError("answer", f"what came back is not HTTP: {str(err)[:100]}") from None
        except (OSError, ssl.SSLError) as err:
            raise OutboundError("answer", f"the connection broke before an answer: {type(err).__name__}") from None

    async def _answer(self, connection: h11.Connection, reader: asyncio.StreamReader) -> Answer:
        """The head, and as much of the body as comes in time. What is read in all, interim answers included, is bounded."""
        budget = [2 * self.limits.head_bytes + self.limits.body_bytes]
        event = await self._event(connection, reader, budget)
        while not isinstance(event, h11.Response):
            if isinstance(event, h11.ConnectionClosed):
                raise OutboundError("answer", "the connection ended before an answer")
            event = await self._event(connection, reader, budget)
        body = bytearray()
        # The receiver has said how it fared; what becomes of its words does not change that.
        with contextlib.suppress(TimeoutError, OSError, ssl.SSLError, h11.RemoteProtocolError, OutboundError):
            async with asyncio.timeout(self.limits.body_seconds):
                while len(body) < self.limits.body_bytes and isinstance(
                    more := await self._event(connection, reader, budget), h11.Data
                ):
                    body += more.data
        fields = {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}
        return Answer(event.status_code, fields, bytes(body[: self.limits.body_bytes]))

    async def _event(self, connection: h11.Connection, reader: asyncio.StreamReader, budget: list[int]) -> h11.Event:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Event):
                return event
            if budget[0] <= 0:
                raise OutboundError("answer", "its answer has no end")
            data = await reader.read(min(_READ_BYTES, budget[0]))
            budget[0] -= len(data)
            connection.receive_data(data)
