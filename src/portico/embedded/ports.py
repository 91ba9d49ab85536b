"""The listening sockets of the platform, and who holds a port that is taken."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from pathlib import Path

from portico.errors import Problem
from portico.kit.sockets import bind_tcp, port_range

_LISTEN = "0A"


def open_all(host: str, wanted: Iterable[tuple[str, int, str, str]]) -> dict[str, socket.socket]:
    """Bind each (name, port, what it is, option that changes it), all or none; a free port where 0 is asked for.

    Raises what :func:`~portico.kit.sockets.bind_tcp` raises, with the program that holds a taken port when it can be seen.
    """
    opened: dict[str, socket.socket] = {}
    try:
        for name, port, what, option in wanted:
            opened[name] = _open(host, port, what, option)
    except BaseException:
        close_all(opened)
        raise
    return opened


def _open(host: str, port: int, what: str, option: str) -> socket.socket:
    try:
        return bind_tcp(host, port, what=what, option=option)
    except Problem as problem:
        if problem.code == "up.port_taken" and (by := holder(port)):
            raise Problem(problem.code, f"{problem.detail} by {by}", hint=problem.hint, port=port) from None
        raise


def close_all(opened: dict[str, socket.socket]) -> None:
    for sock in opened.values():
        sock.close()
    opened.clear()


def holder(port: int) -> str | None:
    """``nginx (pid 123)``: who listens on a TCP port, as far as we may look; ``None`` when that is not known."""
    inodes = set(_listening_inodes(port))
    if not inodes:
        return None
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                for fd in (entry / "fd").iterdir():
                    if str(fd.readlink()) in inodes:
                        name = (entry / "comm").read_text(encoding="utf-8", errors="replace").strip()
                        return f"{name} (pid {entry.name})"
    return None


def _listening_inodes(port: int) -> Iterable[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rsplit(":", 1)[1], 16) == port:
                    yield f"socket:[{fields[9]}]"


def taken(host: str, span: range) -> list[int]:
    """Those of the ports that cannot be opened now."""
    found = []
    for port in span:
        try:
            bind_tcp(host, port, backlog=0).close()
        except Problem:
            found.append(port)
    return found


def outgoing() -> range | None:
    """The ports from which the system gives outgoing connections theirs; ``None`` where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
        return range(int(first), int(last) + 1)
    return None


def check_range(text: str, others: set[int]) -> range:
    """The ports of ``first-last`` (the setting ``tcp_ports``).

    Raises ``config.invalid``, also when one of ``others`` is among them.
    """
    chosen = port_range(text, "tcp_ports")
    taken = sorted(port for port in others if port in chosen)
    if taken:
        raise Problem("config.invalid", f"setting tcp_ports: port {taken[0]} is another listener's", key="tcp_ports")
    return chosen
