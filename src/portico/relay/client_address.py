"""Whose request it is that a proxy in front of us passed on: forwarding fields, believed from configured proxies alone.

    visitor ─► proxy ─► proxy ─► relay        X-Forwarded-For: spoofed, visitor, proxy      the relay sees: proxy
                                              ◄── read from the right, as far as proxies are trusted: the visitor ──

The rest of a list is what somebody wrote whom nobody vouches for: it is passed on, and not believed. What cannot be read
counts as untrusted too: the client is then unknown (an empty address, which no address rule lets in), and the way it came in by
is what the relay sees. ``Forwarded`` (RFC 7239) and ``X-Forwarded-*`` are two ways to say one thing; a proxy sets one of them
and may pass the other on from the visitor. So where both are there and differ, neither is believed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final, NamedTuple

from portico.errors import Problem
from portico.kit.networks import plain

#: Proxies in a row that are looked at. More of them are no chain that anybody has.
MAX_HOPS: Final = 32
#: Characters of a list's member that is an address, with an obfuscated port.
MAX_NODE: Final = 128
_KNOWN_MAX: Final = 4096

_ADDRESS: Final = re.compile(
    r"(?:\[([0-9A-Fa-f:.]{2,45})\]|((?:[0-9]{1,3}\.){3}[0-9]{1,3}))(?::(?:[0-9]{1,5}|_[A-Za-z0-9._-]{1,64}))?"
)
_PAIR: Final = re.compile(
    r"""[ \t]*([A-Za-z0-9!#$%&'*+.^_`|~-]+)=(?:([A-Za-z0-9!#$%&'*+.^_`|~-]+)|"((?:[^"\\]|\\.)*)")[ \t]*"""
)
_HOST: Final = re.compile(
    rb"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252}[A-Za-z0-9_.])?(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](?::[0-9]{1,5})?"
)
_IDENT: Final = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:-]{7,127}")
_SCHEMES: Final = (b"http", b"https")

X_FOR, X_PROTO, X_HOST, X_PORT = b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-forwarded-port"
FORWARDED, REQUEST_ID = b"forwarded", b"x-request-id"
#: What a trusted proxy tells us.
TOLD: Final = frozenset((X_FOR, X_PROTO, X_HOST, X_PORT, FORWARDED, REQUEST_ID))


class Networks:
    """A set of networks, asked whether an address (as text, without zone) is in one of them."""

    def __init__(self, texts: Iterable[str], setting: str) -> None:
        """Raises ``config.invalid`` with the name of the setting."""
        self._networks: list[IPv4Network | IPv6Network] = []
        for text in texts:
            try:
                net = ip_network(text)
            except ValueError as err:
                raise Problem("config.invalid", f"setting {setting}: {err}", key=setting) from None
            mapped = net.network_address.ipv4_mapped if isinstance(net, IPv6Network) else None
            if mapped is not None and net.prefixlen >= 96:
                net = IPv4Network((mapped, net.prefixlen - 96))
            self._networks.append(net)
        self._known: dict[str, bool] = {}

    def __bool__(self) -> bool:
        return bool(self._networks)

    def __contains__(self, address: str) -> bool:
        if not self._networks:
            return False
        found = self._known.get(address)
        if found is None:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            try:
                ip = ip_address(address)
                found = any(ip in net for net in self._networks)
            except ValueError:
                found = False
            self._known[address] = found
        return found


class Told(NamedTuple):
    """What is believed of a request, and what is told on.

    ``client``: the address, empty for an unknown one. ``scheme``, ``host``, ``port``: as the client used them, ``None`` where
    nobody said. ``ident``: the request's id of the proxy. ``hops``: trusted proxies between client and the last one, in
    order. ``x_for``, ``forwarded``: the lists as they came, empty if they did not.
    """

    client: str
    scheme: bytes | None = None
    host: bytes | None = None
    port: int | None = None
    ident: bytes | None = None
    hops: tuple[str, ...] = ()
    x_for: bytes = b""
    forwarded: bytes = b""


def address_of(text: str) -> str | None:
    """The address in a list's member, with or without port: IPv4 of a mapped one; ``None`` for anything else."""
    return _address_of(text) if len(text) <= MAX_NODE else None


@functools.lru_cache(_KNOWN_MAX)
def _address_of(text: str) -> str | None:
    if _ADDRESS.fullmatch(text) or (text.count(":") > 1 and "[" not in text and "%" not in text):
        found = plain(text)
        try:
            return str(ip_address(found))
        except ValueError:
            return None
    return None


def read(fields: list[bytes], peer: str, trusted: Networks) -> Told:
    """What a trusted proxy at ``peer`` says in the flat fields of a request's head."""
    told: dict[bytes, list[bytes]] = {}
    for at in range(0, len(fields), 2):
        name = fields[at].lower()
        if name in TOLD:
            told.setdefault(name, []).append(fields[at + 1].strip(b" \t"))
    if not told:
        return Told(peer)
    x_for, forwarded = told.get(X_FOR, []), told.get(FORWARDED, [])
    by_x = _walk(_x_members(x_for), peer, trusted) if x_for else None
    by_forwarded = _walk(_forwarded_members(forwarded), peer, trusted) if forwarded else None
    client, hops, _ = by_x or by_forwarded or (peer, (), {})
    said = by_forwarded[2] if by_forwarded is not None else {}
    if by_x is not None and by_forwarded is not None and by_forwarded[0] != client:
        client, hops = "", ()
    scheme = (_agreed(_one(told, X_PROTO), said.get("proto")) or b"").lower()
    host = _agreed(_one(told, X_HOST), said.get("host"))
    return Told(
        client,
        scheme if scheme in _SCHEMES else None,
        host if host and _HOST.fullmatch(host) else None,
        _port(_one(told, X_PORT)),
        ident if (ident := _one(told, REQUEST_ID)) and _IDENT.fullmatch(ident) else None,
        hops,
        b", ".join(x_for),
        b", ".join(forwarded),
    )


def told_on(told: Told, peer: str, scheme: bytes, host: bytes, port: int) -> list[bytes]:
    """The flat forwarding fields for the target, up to the request's id: lists with ``peer`` added, the rest as believed.

    ``scheme``, ``host``, ``port`` are how ``peer`` came to us, and how the client came where nobody said otherwise.
    """
    at = told.scheme or scheme
    named = told.host or host
    if told.port is not None:
        port = told.port
    elif told.scheme is not None:
        port = 443 if at == b"https" else 80
    chain = [told.client or "unknown", *told.hops]
    if told.client != peer or told.x_for or told.forwarded:
        chain.append(peer)
    x_for = told.x_for + b", " + peer.encode() if told.x_for else ", ".join(chain).encode()
    if told.forwarded:
        forwarded = told.forwarded + b", for=" + _node(peer) + b";host=" + _quoted(host) + b";proto=" + scheme
    else:
        first = b"for=" + _node(chain[0]) + b";host=" + _quoted(named) + b";proto=" + at
        forwarded = b", ".join((first, *(b"for=" + _node(hop) for hop in chain[1:])))
    return [
        b"X-Forwarded-For", x_for, b"X-Forwarded-Proto", at, b"X-Forwarded-Host", named,
        b"X-Forwarded-Port", b"%d" % port, b"Forwarded", forwarded,
    ]  # fmt: skip


Said = dict[str, str]


def _walk(members: Iterable[tuple[str, Said]], peer: str, trusted: Networks) -> tuple[str, tuple[str, ...], Said]:
    """From the right: the first address that is no trusted proxy's, the proxies passed, and what the one before it said."""
    chain: list[str] = []
    said: Said = {}
    for text, pairs in members:
        address = address_of(text)
        if address is None or len(chain) >= MAX_HOPS:
            return "", (), {}
        chain.append(address)
        said = pairs
        if address not in trusted:
            break
    return (chain[-1] if chain else peer), tuple(reversed(chain[:-1])), said


def _x_members(lines: list[bytes]) -> Iterator[tuple[str, Said]]:
    for line in reversed(lines):
        for member in reversed(line.decode("latin-1").split(",")):
            if text := member.strip(" \t"):
                yield text, {}


def _forwarded_members(lines: list[bytes]) -> Iterator[tuple[str, Said]]:
    """Each line is read on its own: what a visitor left open in quotes does not swallow what a proxy wrote behind it."""
    for line in reversed(lines):
        elements = _elements(line.decode("latin-1"))
        if elements is None:
            yield "", {}
            return
        for pairs in reversed(elements):
            yield pairs.get("for", ""), pairs


def _elements(text: str) -> list[Said] | None:
    """The elements of a ``Forwarded`` value, names in lower case; ``None`` when it is not well-formed (RFC 7239, 4)."""
    elements: list[Said] = []
    pairs: Said = {}
    at = 0
    while True:
        match = _PAIR.match(text, at)
        if match is not None:
            name = match[1].lower()
            if name in pairs:
                return None
            pairs[name] = match[2] if match[2] is not None else re.sub(r"\\(.)", r"\1", match[3])
            at = match.end()
        elif pairs or text[at : at + 1] not in ("", ",", " ", "\t"):
            return None
        else:
            at = len(text) - len(text[at:].lstrip(" \t"))
        ending = text[at : at + 1]
        if ending == ";" and match is not None:
            at += 1
            continue
        if pairs:
            elements.append(pairs)
            pairs = {}
        if ending == "":
            return elements
        if ending != ",":
            return None
        at += 1


def _one(told: dict[bytes, list[bytes]], name: bytes) -> bytes | None:
    """The value of a field that is there once; of two, one is not the proxy's."""
    values = told.get(name, [])
    return values[0] if len(values) == 1 else (b"" if values else None)


def _agreed(by_x: bytes | None, by_forwarded: str | None) -> bytes | None:
    """What both families say, or the one that speaks; ``None`` when they differ."""
    second = by_forwarded.encode("latin-1") if by_forwarded is not None else None
    if by_x is None or second is None:
        return by_x if second is None else second
    return by_x if by_x.lower() == second.lower() else None


def _port(value: bytes | None) -> int | None:
    number = int(value) if value and value.isdigit() and len(value) <= 5 else 0
    return number if 0 < number < 65_536 else None


def _node(address: str) -> bytes:
    return b'"[%b]"' % address.encode() if ":" in address else address.encode() or b"unknown"


def _quoted(host: bytes) -> bytes:
    return b'"%b"' % host if b":" in host else host
