"""The PROXY protocol's header, versions 1 and 2: how the target of a TCP tunnel learns who the visitor is.

https://www.haproxy.org/download/1.8/doc/proxy-protocol.txt
"""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

from portico.kit.proxy_protocol import ADDRESSES_4, ADDRESSES_6, HEAD, LOCAL, PROXY, SIGNATURE, TCP4, TCP6

Address = IPv4Address | IPv6Address


def header(version: int, peer: str, local: str) -> bytes:
    """What goes before the visitor's bytes. ``peer`` and ``local`` are ``host:port`` as OPEN carries them.

    Where one of them is not an address and port (a visitor on a Unix socket), the header says so: ``UNKNOWN`` in version 1,
    the command LOCAL in version 2; the target then takes the connection as it is.
    """
    source, target = _place(peer), _place(local)
    if source is None or target is None:
        return b"PROXY UNKNOWN\r\n" if version == 1 else HEAD.pack(SIGNATURE, LOCAL, 0, 0)
    (host, port), (to_host, to_port) = source, target
    if host.version != to_host.version:  # both in one family: the older one has a place in the newer
        host, to_host = _v6(host), _v6(to_host)
    if version == 1:
        return f"PROXY TCP{host.version} {_text(host)} {_text(to_host)} {port} {to_port}\r\n".encode("ascii")
    form, family = (ADDRESSES_4, TCP4) if host.version == 4 else (ADDRESSES_6, TCP6)
    return HEAD.pack(SIGNATURE, PROXY, family, form.size) + form.pack(host.packed, to_host.packed, port, to_port)


def _place(text: str) -> tuple[Address, int] | None:
    host, _, port = text.rpartition(":")
    try:
        number = int(port)
        return (ip_address(host.removeprefix("[").removesuffix("]")), number) if 0 <= number < 65_536 else None
    except ValueError:
        return None


def _v6(address: Address) -> IPv6Address:
    return IPv6Address(b"\0" * 10 + b"\xff\xff" + address.packed) if address.version == 4 else IPv6Address(address)


def _text(address: Address) -> str:
    """As the system writes it: ``::ffff:1.2.3.4``, which Python spells differently from version to version."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    return socket.inet_ntop(family, address.packed)
