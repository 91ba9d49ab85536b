"""What the visitors of a process did, in plain numbers: incremented where it happens, read by ``metrics.py`` when asked."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Final

from portico.kit.metrics import REQUEST_SECONDS, Histogram

#: What a list of :attr:`Tally.requests` counts, by index: requests that ended without an answer, then the status classes.
STATUSES: Final = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")


class Tally:
    """One of a process. Lists by index rather than dictionaries by name: an index costs a request 30 ns."""

    __slots__ = ("accepted", "connections", "head", "requests", "whole", "whole_requests")

    def __init__(self) -> None:
        #: Finished requests: protocol → counts by status class.
        self.requests = {name: [0] * len(STATUSES) for name in (b"http", b"https", b"websocket")}
        #: Ended connections of TCP and TLS tunnels: protocol → those that were served, and those that were refused.
        self.connections = {name: [0, 0] for name in (b"tcp", b"tls")}
        #: Connections that were taken in, by what they came in as.
        self.accepted: Counter[bytes] = Counter()
        #: Seconds to the answer's head, and to the end of the request and its answer, where the two differ.
        self.head, self.whole = Histogram(REQUEST_SECONDS), Histogram(REQUEST_SECONDS)
        #: Seconds of requests whose whole answer came in one piece, so that one observation is both.
        self.whole_requests = Histogram(REQUEST_SECONDS)

    def seconds(self) -> tuple[Histogram, Histogram]:
        """To the head, and whole; of all requests."""
        return _sum(self.head, self.whole_requests), _sum(self.whole, self.whole_requests)

    def ended(self, protocol: bytes, status: int, seconds: float) -> None:
        """A request is over that did not take the short way; ``status`` 0 without an answer."""
        self.requests[protocol][status // 100] += 1
        whole = self.whole
        whole.counts[bisect_left(REQUEST_SECONDS, seconds)] += 1
        whole.sum += seconds


def _sum(one: Histogram, other: Histogram) -> Histogram:
    both = Histogram(one.bounds)
    both.counts = [a + b for a, b in zip(one.counts, other.counts, strict=True)]
    both.sum = one.sum + other.sum
    return both
