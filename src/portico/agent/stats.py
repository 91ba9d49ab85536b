"""Counts of the requests an agent served: plain integers and bounded lists; nothing is formatted here."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from typing import Any, NamedTuple

#: Requests kept: percentiles are taken from them, and a display that is slower than this misses some.
RECORDS = 2048


#: The method of a record of a TCP connection, and that of one of a TLS tunnel.
CONNECTION, TLS_CONNECTION = b"TCP", b"TLS"
#: Characters of an id that are kept.
MAX_ID = 128
CONNECTIONS = frozenset((CONNECTION, TLS_CONNECTION))


class Record(NamedTuple):
    """One request that is over. ``status`` 499: the visitor left first; ``ended`` is wall time in seconds.

    With one of :data:`CONNECTIONS` as its method it is a connection: ``path`` is its visitor's address, and it has no status.
    """

    method: bytes
    path: bytes
    status: int
    seconds: float
    ended: float
    #: The id that visitor, relay and target know it by.
    id: bytes = b""


def request_id(head: list[bytes]) -> bytes:
    """The id that the relay gave a request: it is the last of the fields."""
    return head[-1] if len(head) > 3 and head[-2].lower() == b"x-request-id" else b""


def connection_id(info: dict[str, Any]) -> bytes:
    """The id that the relay gave a connection."""
    return str(info.get("id", ""))[:MAX_ID].encode("utf-8", "replace")


class Stats:
    """What one tunnel, or all of an agent, served."""

    def __init__(self) -> None:
        self.begun = self.total = 0
        self.last_failure = ""
        self.failures = 0
        self.records: deque[tuple[bytes, bytes, int, float, float, bytes]] = deque(maxlen=RECORDS)
        self._without_record = 0  # of the total; below 0: records of what is not over
        self.rate_1 = self.rate_5 = 0.0
        self._sampled_total = 0
        self._sampled_at = time.monotonic()

    @property
    def open(self) -> int:
        """Requests and connections under way."""
        return self.begun - self.total

    @property
    def written(self) -> int:
        """Records that there ever were."""
        return self.total - self._without_record

    def opened(self) -> None:
        """A request or connection began."""
        self.begun += 1

    def closed(self) -> None:
        """A request or connection ended."""
        self.total += 1
        self._without_record += 1

    def done(self, method: bytes, path: bytes, status: int, started: float, ident: bytes = b"") -> None:
        """A request was answered; ``started`` is a :func:`time.perf_counter` value."""
        self.records.append((method, path, status, started, time.perf_counter(), ident))
        self._without_record -= 1

    def answered(
        self, method: bytes, path: bytes, status: int, started: float, ended: float, ident: bytes = b""
    ) -> None:
        """A request was answered and is over: ``done`` and ``closed``."""
        self.total += 1
        self.records.append((method, path, status, started, ended, ident))

    def failed(self, detail: str) -> None:
        """The target could not answer."""
        self.last_failure = detail
        self.failures += 1

    def since(self, seen: int) -> tuple[list[Record], int]:
        """The records after the first ``seen`` ones that are still kept, and how many there were by now."""
        new = min(self.written - seen, len(self.records))
        to_wall = time.time() - time.perf_counter()
        rows = itertools.islice(self.records, len(self.records) - new, None)
        fresh = [Record(m, p, status, ended - began, ended + to_wall, id) for m, p, status, began, ended, id in rows]
        return fresh, self.written

    def percentile(self, share: float) -> float:
        """The duration in seconds below which ``share`` of the kept requests ended; 0 without any."""
        if not self.records:
            return 0.0
        ordered = sorted(row[4] - row[3] for row in self.records)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def sample(self, now: float | None = None) -> None:
        """Bring the rates (requests a second, weighted over one and five minutes) up to date."""
        now = time.monotonic() if now is None else now
        passed = now - self._sampled_at
        if passed < 0.2:
            return
        rate = (self.total - self._sampled_total) / passed
        self.rate_1 += (1 - math.exp(-passed / 60)) * (rate - self.rate_1)
        self.rate_5 += (1 - math.exp(-passed / 300)) * (rate - self.rate_5)
        self._sampled_total = self.total
        self._sampled_at = now
