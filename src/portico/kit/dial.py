"""Outgoing TCP connections to a name with several addresses, as RFC 8305 has it ("happy eyeballs").

A dead first address costs a fraction of a second, not the whole time to connect: the next one is tried as soon as the one
before fails, or after :data:`ATTEMPT_DELAY` while it is silent, and the first that answers is taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from typing import Any

#: Seconds that an address may be silent before the next one is tried as well; RFC 8305 advises 250 ms.
ATTEMPT_DELAY = 0.25

#: One entry of ``getaddrinfo``: family, type, protocol, canonical name, socket address.
Address = tuple[int, int, int, str, tuple[Any, ...]]


def bracketed(host: str) -> str:
    """``host`` as URLs and Host headers write it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def authority(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"{bracketed(host)}:{port}"


def is_address(host: str) -> bool:
    """Whether ``host`` is an IPv4 or IPv6 address (no brackets) and so needs no name server."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether ``host`` (brackets allowed) is this machine by its very name: an address of it, or ``*.localhost``."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def reason(err: OSError) -> str:
    """What went wrong in the system's words ("Connection refused"), without the addresses that some loops put there."""
    if isinstance(err, socket.gaierror) or not err.errno or err.errno < 0:
        return err.strerror or str(err) or type(err).__name__
    # A failure of several addresses was put into words by :func:`race` already.
    return err.strerror if isinstance(err, NoAddressAnswered) and err.strerror else os.strerror(err.errno)


class NoAddressAnswered(OSError):
    """None of several addresses took the connection; ``strerror`` says what each did."""


async def resolve(host: str, port: int) -> list[Address]:
    """Every TCP address of ``host``, families in turn, in the system's order of preference; raises ``socket.gaierror``.

    `localhost` and the names below it are this machine, whatever its hosts file says (RFC 6761, 6.3).
    """
    if host == "localhost" or host.endswith(".localhost"):
        return [_loopback(socket.AF_INET, "127.0.0.1", port), _loopback(socket.AF_INET6, "::1", port)]
    try:
        found = await _look_up(host, port)
    except UnicodeError:  # a host that looks like a name and is none, such as one with an empty label
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from None
    return interleaved(found)


async def _look_up(host: str, port: int) -> list[Any]:
    """``getaddrinfo`` in a thread of its own: one that hangs (a dead name server) does not keep the process from ending."""
    if is_address(host):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[Any]] = loop.create_future()

    def tell(result: list[Any] | BaseException) -> None:
        if answer.done():  # given up
            return
        if isinstance(result, BaseException):
            answer.set_exception(result)
        else:
            answer.set_result(result)

    def ask() -> None:
        try:
            result: list[Any] | BaseException = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as err:
            result = err
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, result)

    threading.Thread(target=ask, name="getaddrinfo", daemon=True).start()
    return await answer


def _loopback(family: int, address: str, port: int) -> Address:
    return family, socket.SOCK_STREAM, 0, "", (address, port)


def interleaved(addresses: Iterable[Address]) -> list[Address]:
    """IPv6 and IPv4 in turn, beginning with the family that comes first; each address once."""
    families: dict[int, list[Address]] = {}
    for address in dict.fromkeys(addresses):
        families.setdefault(address[0], []).append(address)
    return [entry for entry in chain.from_iterable(zip_longest(*families.values())) if entry is not None]


async def connect_tcp(host: str, port: int, *, delay: float = ATTEMPT_DELAY) -> socket.socket:
    """A connected, non-blocking socket to the first address of ``host`` that answers.

    Raises ``OSError`` (``socket.gaierror`` when there is no address); :func:`reason` puts it into words. The time to connect is
    the caller's to limit.
    """
    return await race(await resolve(host, port), delay=delay)


async def race(addresses: Sequence[Address], *, delay: float = ATTEMPT_DELAY) -> socket.socket:
    """The first of ``addresses`` that connects; see :func:`connect_tcp`."""
    waiting = deque(addresses)
    attempts: set[asyncio.Task[socket.socket]] = set()
    failures: list[tuple[Address, OSError]] = []
    winner: asyncio.Task[socket.socket] | None = None
    tried: dict[asyncio.Task[socket.socket], Address] = {}
    try:
        while waiting or attempts:
            if waiting:
                address = waiting.popleft()
                attempt = asyncio.create_task(_attempt(address))
                attempts.add(attempt)
                tried[attempt] = address
            done, attempts = await asyncio.wait(
                attempts, timeout=delay if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for attempt in done:
                err = attempt.exception()
                if err is None:
                    winner = attempt
                    return attempt.result()
                if not isinstance(err, OSError):
                    raise err
                failures.append((tried[attempt], err))
    finally:
        await _give_up([attempt for attempt in tried if attempt is not winner])
    raise _failure(failures)


async def _attempt(address: Address) -> socket.socket:
    family, kind, proto, _, where = address
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock


async def _give_up(attempts: list[asyncio.Task[socket.socket]]) -> None:
    """End the attempts that were too slow; one that connected in the same moment is closed."""
    for attempt in attempts:
        attempt.cancel()
    for late in await asyncio.gather(*attempts, return_exceptions=True):
        if isinstance(late, socket.socket):
            with contextlib.suppress(OSError):
                late.close()


def _failure(failures: list[tuple[Address, OSError]]) -> OSError:
    """One error for all addresses: the reason alone when it is the same everywhere, else each with its reason."""
    if not failures:
        return socket.gaierror(socket.EAI_NONAME, "no address")
    if len(failures) == 1:
        return failures[0][1]
    number = failures[-1][1].errno or 0
    reasons = [reason(err) for _, err in failures]
    places = [bracketed(str(address[4][0])) for address, _ in failures]
    if len(set(reasons)) == 1:
        return NoAddressAnswered(number, f"{reasons[0]} (tried {', '.join(places)})")
    each = "; ".join(f"{place}: {why}" for place, why in zip(places, reasons, strict=True))
    return NoAddressAnswered(number, each)
