"""Listening sockets: bound here, or inherited from the supervisor that owns them.

A supervisor binds first and passes the sockets to children as ``PORTICO_LISTEN_FDS="public=5,https=6"``: connections
that arrive while a child restarts wait in the queue instead of being refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Mapping

from portico.errors import Problem

BACKLOG = 4096
#: Seconds of silence after which the kernel asks whether the other side still exists, seconds between such questions, and how
#: many stay unanswered until the connection ends. A visitor whose machine vanished would hold an idle stream for ever.
KEEPALIVE = (60, 15, 4)


def inherited(value: str) -> dict[str, socket.socket]:
    """The sockets that ``name=fd,name=fd`` names (the setting ``listen_fds``), each exactly once; empty for "".

    Raises ``config.invalid`` when the text is malformed or a descriptor is not an open socket.
    """
    found: dict[str, socket.socket] = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        name, _, number = part.partition("=")
        if not name or not number.isdigit() or name in found:
            raise Problem("config.invalid", f"setting listen_fds: {part!r} is not name=descriptor", key="listen_fds")
        try:
            sock = socket.socket(fileno=int(number))
        except OSError as err:
            raise Problem("config.invalid", f"setting listen_fds: {part!r}: {err.strerror}", key="listen_fds") from None
        sock.setblocking(False)
        sock.set_inheritable(False)  # for us alone: what we start must not keep the port open
        found[name] = sock
    return found


def describe(sockets: Mapping[str, socket.socket]) -> str:
    """The value of ``PORTICO_LISTEN_FDS`` for these sockets; the child needs their descriptors in ``pass_fds``."""
    return ",".join(f"{name}={sock.fileno()}" for name, sock in sockets.items())


def reset_transport(transport: asyncio.Transport) -> None:
    """Close with RST instead of FIN, so that the peer sees an abort (SO_LINGER 0). What was not sent yet is lost."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def end_output(transport: asyncio.Transport) -> None:
    """Half-close (FIN). A peer that has reset the connection meanwhile is no fault of the caller's, who hears of it as of any
    other loss; asyncio, unlike uvloop, would raise it here."""
    with contextlib.suppress(OSError):
        transport.write_eof()


def check_port(port: int, name: str) -> None:
    """Raises ``config.invalid`` for a number that is no TCP port."""
    if not 0 <= port <= 65535:
        raise Problem("config.invalid", f"{name}: {port} is not a TCP port (0 to 65535)")


def port_range(text: str, name: str) -> range:
    """The ports of ``first-last`` (the setting ``name``). Raises ``config.invalid``."""
    first, _, last = text.partition("-")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last) < 65_536):
        raise Problem("config.invalid", f"setting {name}: {text!r} is not a range such as 7100-7199", key=name)
    return range(int(first), int(last) + 1)


def bind_tcp(host: str, port: int, *, what: str = "", option: str = "", backlog: int = BACKLOG) -> socket.socket:
    """A listening, non-blocking TCP socket; port 0 takes a free one.

    Connections queue from now on. ``what`` and ``option`` make the refusal useful: "port 7080 (public HTTP) is taken …
    choose another with --http-port". Raises ``up.port_taken``, ``up.port_denied`` or ``up.address_unavailable``.
    """
    check_port(port, option or what or "port")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )[0]
        sock = socket.socket(family, kind, proto)
    except OSError as err:
        raise Problem("up.address_unavailable", f"cannot listen on {host}: {err.strerror}") from None
    try:
        # A restart must not wait for the last run's connections to leave TIME_WAIT. On Linux this never lets two
        # listeners share a port.
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and host in ("", "::"):
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # all addresses are those of IPv4 too
        keep_alive(sock)
        sock.bind(address)
        sock.listen(backlog)
    except OSError as err:
        sock.close()
        raise _refusal(err, host, port, what, option) from None
    sock.setblocking(False)
    return sock


def keep_alive(sock: socket.socket) -> None:
    """Let the kernel find out that a peer is gone. Connections inherit it from a listening socket: no call for each."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), KEEPALIVE, strict=True):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _refusal(err: OSError, host: str, port: int, what: str, option: str) -> Problem:
    label = f"port {port}" + (f" ({what})" if what else "")
    advice = f"choose another with {option}" if option else "choose another port"
    if err.errno == errno.EADDRINUSE:
        return Problem(
            "up.port_taken", f"{label} is taken", hint=f"End the program that uses it, or {advice}.", port=port
        )
    if err.errno == errno.EACCES:
        hint = f"Ports below 1024 need a privilege; {advice}, or grant CAP_NET_BIND_SERVICE."
        return Problem("up.port_denied", f"{label} may not be opened by this user", hint=hint, port=port)
    return Problem("up.address_unavailable", f"cannot listen on {host}, {label}: {err.strerror}", port=port)


def port_of(sock: socket.socket) -> int:
    """The port a socket is bound to."""
    return int(sock.getsockname()[1])
