"""The way by which a visitor came in: what is the same for every request of one connection, and known before the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def covers_all(host: bytes) -> bool:
    """A connection that no certificate was presented on."""
    return True


@dataclass(frozen=True, slots=True)
class Door:
    """One way in.

    ``scheme``: http, https, tcp or tls (passed through). ``port``: the public one. ``sni``: the name that a TLS visitor asked
    for, lower-case and without trailing dot; ``None`` without TLS or without a name. ``covers(host)``: whether the certificate
    that was presented is for that host. ``client_ca``: which authority a client certificate was checked against (its hash in
    ``relay/policy.py``), or ``None`` when none was asked for. ``client``, ``local``: the connection's ends, as a proxy's
    PROXY header named them or as the socket has them; ``None`` where they were not looked at.
    """

    scheme: bytes
    port: int
    sni: bytes | None = None
    covers: Callable[[bytes], bool] = covers_all
    client_ca: str | None = None
    client: tuple[str, int] | None = None
    local: tuple[str, int] | None = None
