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


def is_loopback(address: str) -> bool:
    """Whether a client is on this machine: a loopback address, or none (a Unix socket)."""
    return address in ("", "::1") or address.startswith("127.")
