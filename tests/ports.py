"""Ports for programs that a test starts, or starts again, and that must therefore know their port before they bind it."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Final

#: Above what the platform and common services use by default; where the kernel's range for outgoing connections begins,
#: this one ends: between a test's look and its program's bind, no connection of anybody can be given the port.
_FIRST: Final = 12_000
_given: set[int] = set()
#: Of its own: Hypothesis gives the common one the same seed in every process.
_chance = random.SystemRandom()


def _last() -> int:
    try:
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        low = 32_768
    return low - 1 if low - _FIRST > 1_000 else 65_000


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens; this process is given it once."""
    while True:
        port = _chance.randint(_FIRST, _last())
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return port
