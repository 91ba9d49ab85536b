"""Whom a client address stands for, where clients are counted."""

from __future__ import annotations

import functools
import ipaddress


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


def is_loopback(address: str) -> bool:
    """Whether a client is on this machine: a loopback address, or none (a Unix socket)."""
    return address in ("", "::1") or address.startswith("127.")
