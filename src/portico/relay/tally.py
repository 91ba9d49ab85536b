"""What the visitors of a process did, in plain numbers: incremented where it happens, read by ``metrics.py`` when asked."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Final

from portico.kit.metrics import REQUEST_SECONDS, Histogram

#: What lists by class of status count, by index: requests that ended without an answer, then the classes.
STATUSES: Final = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")
PROTOCOLS: Final = (b"http", b"https", b"websocket")


class Tally:
    """One of a process.

    A request that took the short way is counted by one increment: :attr:`quick` has the buckets of a histogram for each
    protocol and class, whose sum is the number of requests. Its head and its end are one moment.
    """

    __slots__ = ("accepted", "connections", "head", "quick", "refused", "requests", "short_faults", "whole")

    def __init__(self) -> None:
        buckets = len(REQUEST_SECONDS) + 1
        #: Requests of the short way: protocol → class → buckets of seconds. Their sum is ``PublicServer.seconds``.
        self.quick = {name: [[0] * buckets for _ in STATUSES] for name in PROTOCOLS[:2]}
        #: Other finished requests: protocol → counts by class.
        self.requests = {name: [0] * len(STATUSES) for name in PROTOCOLS}
        #: Faults of ours on the short way, which left the request to the ordinary one.
        self.short_faults = 0
        #: Refusals before there was a request, in the same way.
        self.refused = {name: [0] * len(STATUSES) for name in PROTOCOLS[:2]}
        #: Seconds of other requests to the answer's head, and to the end of request and answer.
        self.head, self.whole = Histogram(REQUEST_SECONDS), Histogram(REQUEST_SECONDS)
        #: Ended connections of TCP and TLS tunnels: protocol → those that were served, and those that were refused.
        self.connections = {name: [0, 0] for name in (b"tcp", b"tls")}
        #: Connections that were taken in, by what they came in as.
        self.accepted: Counter[bytes] = Counter()

    def ended(self, protocol: bytes, status: int, seconds: float) -> None:
        """A request is over that did not take the short way; ``status`` 0 without an answer."""
        self.requests[protocol][status // 100] += 1
        if status == 101:
            return  # its duration is that of a conversation
        self.whole.counts[bisect_left(REQUEST_SECONDS, seconds)] += 1
        self.whole.sum += seconds

    def counts(self) -> dict[tuple[bytes, str], int]:
        """All requests, by protocol and class."""
        found: Counter[tuple[bytes, str]] = Counter()
        for table in (self.requests, self.refused):
            for protocol, counts in table.items():
                for status, count in zip(STATUSES, counts, strict=True):
                    found[protocol, status] += count
        for protocol, classes in self.quick.items():
            for status, buckets in zip(STATUSES, classes, strict=True):
                found[protocol, status] += sum(buckets)
        return found

    def seconds(self, quick: float) -> tuple[Histogram, Histogram]:
        """To the head, and whole, of all requests; ``quick``: the seconds of all that took the short way."""
        counts = [
            sum(column) for column in zip(*(row for classes in self.quick.values() for row in classes), strict=True)
        ]
        return _plus(self.head, counts, quick), _plus(self.whole, counts, quick)


def _plus(one: Histogram, counts: list[int], seconds: float) -> Histogram:
    both = Histogram(one.bounds)
    both.counts = [a + b for a, b in zip(one.counts, counts, strict=True)]
    both.sum = one.sum + seconds
    return both
