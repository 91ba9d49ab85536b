"""Client addresses: whom one stands for where clients are counted, and the networks that a list allows."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Sequence
from typing import Final

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_MAPPED_BITS = 96
#: Characters of an address as proxies write it, at most: what is longer is none, and kept nowhere.
ADDRESS_CHARS: Final = 64


@functools.lru_cache(4096)
def network(address: str | None) -> str:
    """Whom an address stands for: itself, or its /64, of which one IPv6 customer has every address."""
    try:
        found = ipaddress.ip_address(address or "")
    except ValueError:
        return str(address)
    if found.version == 4:
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))


def plain(text: str) -> str:
    """The address alone, as proxies write it: `[2001:db8::1]:443`, `192.0.2.7:443`, `::ffff:192.0.2.7`. Other text as it is."""
    return text if len(text) > ADDRESS_CHARS else _plain(text)


@functools.lru_cache(4096)
def _plain(text: str) -> str:
    host = text
    if text.startswith("["):
        host = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        host = text.partition(":")[0]
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return text
    return str(found.ipv4_mapped or found) if found.version == 6 else str(found)


def canonical(text: str) -> str:
    """A network (or one address) as it is stored: ``192.0.2.7/24`` is ``192.0.2.0/24``, ``::ffff:192.0.2.0/120`` too.

    Raises ``ValueError``; for a zone (``fe80::1%eth0``) as well, which means nothing on another machine.
    """
    text = text.strip()
    if "%" in text:
        raise ValueError(f"{text[:64]!r} names a zone")
    found = ipaddress.ip_network(text, strict=False)
    if found.version == 6 and found.prefixlen >= _MAPPED_BITS:
        mapped = found.network_address.ipv4_mapped
        if mapped is not None:
            return f"{mapped}/{found.prefixlen - _MAPPED_BITS}"
    return str(found)


@functools.lru_cache(4096)
def _parsed(texts: tuple[str, ...]) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


def allows(allowed: Sequence[str], address: str | None) -> bool:
    """Whether ``address`` lies in one of the ``canonical`` networks; an empty list allows everybody, a text that is no
    address (``unknown``) is in none."""
    if not allowed:
        return True
    try:
        found = ipaddress.ip_address(plain(address or ""))
    except ValueError:
        return False
    return any(found in network for network in _parsed(tuple(allowed)))


def covers(outer: Sequence[str], inner: Sequence[str]) -> bool:
    """Whether ``outer`` allows every address that ``inner`` does; an empty list allows all."""
    if not outer:
        return True
    wide = _parsed(tuple(outer))
    return bool(inner) and all(
        any(small.version == big.version and small.subnet_of(big) for big in wide)  # type: ignore[arg-type]
        for small in _parsed(tuple(inner))
    )


def is_loopback(address: str) -> bool:
    """Whether a client is on this machine: a loopback address, or none (a Unix socket)."""
    return address in ("", "::1") or address.startswith("127.")
