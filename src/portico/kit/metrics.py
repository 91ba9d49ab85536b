"""Metrics: what a process declares, the plain numbers behind it, and the listener that shows them to Prometheus.

    hot path ──increments──► ints on objects of ours          scrape ──► read() ──► families ──► text

Nothing of this runs between two scrapes: a process counts in integers where things happen, and :class:`Exporter` reads them when
it is asked. The listener is one of its own (``metrics_host``, ``metrics_port``), never a public one: figures of all tenants
are the operator's. It also says how the process is (``/healthz``, ``/readyz``).

Names and units follow Prometheus's conventions: base units, ``_total`` on counters. No label holds a tenant, a host, a path or
an address; every label has a handful of values.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import socket
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from time import monotonic
from typing import TYPE_CHECKING, Final, Literal, Protocol

from portico.errors import Problem
from portico.kit.sockets import bind_tcp

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

log = logging.getLogger("portico.metrics")

#: Upper bounds in seconds: of requests, which take from half a millisecond to minutes, and of a loop that should never lag.
REQUEST_SECONDS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
    *(0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)
LAG_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
#: Seconds between two looks at how late the loop is.
LAG_INTERVAL: Final = 0.1
#: Of the listener: connections at once, bytes of a request head, seconds for one request and its answer.
MAX_CONNECTIONS, MAX_HEAD, MAX_SECONDS = 64, 8192, 10.0


@dataclass(frozen=True, slots=True)
class Metric:
    """One family as it is declared, and as docs/reference/metrics.md shows it. A counter's ``name`` ends in ``_total``."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


class Histogram:
    """Counts in buckets; ``counts`` has one more than ``bounds``. A hot path may increment it without a call."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> Iterator[tuple[str, float]]:
        """Upper bound and cumulative count, as Prometheus has them."""
        total = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            yield bound, total


Sample = tuple[Metric, tuple[str, ...], "float | Histogram"]
#: A metric, the values of its labels in their order, and its value.

#: What every process has, beside what `prometheus_client` says of process and collector.
BUILD = Metric("portico_build_info", "gauge", "What runs here; always 1.", ("version", "python"))
LAG = Metric("portico_loop_lag_seconds", "histogram", "How late a timer of the event loop was, ten times a second.")
COMMON = (BUILD, LAG)


class Place(Protocol):
    """The settings that say where."""

    @property
    def metrics_host(self) -> str: ...
    @property
    def metrics_port(self) -> int | None: ...


class Exporter:
    """Writes what ``read`` yields in Prometheus's formats; of a declared metric without a sample, the declaration."""

    def __init__(self, declared: Sequence[Metric], read: Callable[[], Iterable[Sample]]) -> None:
        from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector

        self._declared = (*COMMON, *declared)
        self._read = read
        self.lag = LoopLag()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def describe(self) -> list[Family]:
        """For the registry, which would collect once to learn names."""
        return []

    def collect(self) -> Iterator[Family]:
        """The families in the order of their declaration."""
        families = {metric: _family(metric) for metric in self._declared}
        _add(families[BUILD], BUILD, (version("portico"), platform.python_version()), 1)
        _add(families[LAG], LAG, (), self.lag.seconds)
        for metric, labels, value in self._read():
            _add(families[metric], metric, labels, value)
        yield from families.values()

    def text(self, accept: str) -> tuple[str, bytes]:
        """Content type and document, in the format that the ``Accept`` field prefers."""
        from prometheus_client.exposition import choose_encoder

        encode, content_type = choose_encoder(accept)
        return content_type, encode(self._registry)


def _family(metric: Metric) -> Family:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    kinds: dict[str, Callable[..., Family]] = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    return kinds[metric.kind](metric.name, metric.help, labels=metric.labels)


def _add(family: Family, metric: Metric, labels: tuple[str, ...], value: float | Histogram) -> None:
    assert len(labels) == len(metric.labels), metric.name
    if isinstance(value, Histogram):
        family.add_metric(labels, list(value.buckets()), value.sum)  # type: ignore[attr-defined]
    else:
        family.add_metric(labels, value)  # type: ignore[attr-defined]


class LoopLag:
    """How late the event loop is: the delay of a timer, ten times a second."""

    def __init__(self) -> None:
        self.seconds = Histogram(LAG_SECONDS)
        self._loop = asyncio.get_running_loop()
        self._wait()

    def _wait(self) -> None:
        self._due = monotonic() + LAG_INTERVAL  # the clock of uvloop itself counts whole milliseconds
        self._timer = self._loop.call_later(LAG_INTERVAL, self._tick)

    def _tick(self) -> None:
        self.seconds.observe(max(0.0, monotonic() - self._due))
        self._wait()

    def close(self) -> None:
        self._timer.cancel()


async def serve(
    declared: Sequence[Metric],
    read: Callable[[], Iterable[Sample]],
    ready: Callable[[], bool],
    place: Place,
    given: socket.socket | None,
) -> Listener | None:
    """The listener of a process, on the socket that it was given or as its settings say; ``None`` when they name no port.

    Raises ``up.port_taken`` and its kin, and ``up.server_parts_missing``.
    """
    if given is None and place.metrics_port is None:
        return None
    if find_spec("prometheus_client") is None:
        raise Problem("up.server_parts_missing", "metrics_port needs the server parts of Portico (prometheus_client)")
    sock = given or bind_tcp(place.metrics_host, place.metrics_port or 0, what="metrics", option="metrics_port")
    listener = Listener(Exporter(declared, read), ready)
    await listener.start(sock)
    return listener


class Listener:
    """Answers ``/metrics``, ``/healthz`` and ``/readyz`` on a socket of its own, one request a connection."""

    def __init__(self, exporter: Exporter, ready: Callable[[], bool]) -> None:
        self._exporter, self._ready = exporter, ready
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self, sock: socket.socket) -> None:
        self._server = await asyncio.start_server(self._connected, sock=sock, limit=MAX_HEAD)

    @property
    def port(self) -> int:
        """Where it listens, once started."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._exporter.lag.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._open) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._open.add(task)
        try:
            async with asyncio.timeout(MAX_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            pass
        except Exception:
            log.exception("metrics could not be read")
        finally:
            self._open.discard(task)
            writer.transport.abort()

    def _answer(self, head: bytes) -> bytes:
        lines = head.decode("latin-1").split("\r\n")
        method, _, rest = lines[0].partition(" ")
        path = rest.split(" ")[0].partition("?")[0]
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", "text/plain", b"GET or HEAD\n", method)
        if path == "/metrics":
            accept = next((line[7:].strip() for line in lines[1:] if line.lower().startswith("accept:")), "")
            return _response("200 OK", *self._exporter.text(accept), method)
        if path == "/healthz":
            return _response("200 OK", "text/plain", b"ok\n", method)
        if path == "/readyz":
            ready = self._ready()
            status = "200 OK" if ready else "503 Service Unavailable"
            return _response(status, "text/plain", b"ready\n" if ready else b"not ready\n", method)
        return _response("404 Not Found", "text/plain", b"/metrics, /healthz or /readyz\n", method)


def _response(status: str, content_type: str, body: bytes, method: str) -> bytes:
    allow = "Allow: GET, HEAD\r\n" if status.startswith("405") else ""
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"{allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if method == "HEAD" else body)
