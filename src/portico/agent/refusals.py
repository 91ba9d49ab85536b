"""What the edge refused before it came here, in words: relays tell an agent by COUNTS, since it could not know otherwise."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from portico.agent.tunnel import Tunnel
from portico.errors import catalogue

#: Seconds between two log lines about one code of one tunnel: a flood of refused visitors is a line with a count.
QUIET_SECONDS = 5.0
#: Codes that a screen has room for.
CODES_SHOWN = 3


class News(NamedTuple):
    """Refusals of one tunnel with one code since the last time that they were told, and all of them so far."""

    tunnel: Tunnel
    code: str
    more: int
    total: int


class Refusals:
    """What has been told of the refusals of all tunnels."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._told: dict[tuple[int, str], tuple[int, float]] = {}

    def news(self, tunnels: Iterable[Tunnel]) -> Iterator[News]:
        """What is new, of each tunnel and code at most every :data:`QUIET_SECONDS`."""
        now = self._monotonic()
        for tunnel in tunnels:
            for code, total in tunnel.edge.refused.items():
                told, at = self._told.get((tunnel.bind, code), (0, -QUIET_SECONDS))
                if total > told and now - at >= QUIET_SECONDS:
                    self._told[tunnel.bind, code] = (total, now)
                    yield News(tunnel, code, total - told, total)


def summary(tunnels: Iterable[Tunnel]) -> str:
    """``12 (401 edge.auth_required 9, 429 edge.rate_limited 3)``; empty without any."""
    counts: Counter[str] = Counter()
    for tunnel in tunnels:
        counts.update(tunnel.edge.refused)
    if not counts:
        return ""
    parts = [f"{_status(code)}{code} {count}" for code, count in counts.most_common(CODES_SHOWN)]
    more = f", {len(counts) - CODES_SHOWN} more codes" if len(counts) > CODES_SHOWN else ""
    return f"{counts.total()} ({', '.join(parts)}{more})"


def _status(code: str) -> str:
    spec = catalogue().get(code)
    return f"{spec.status} " if spec is not None else ""
