"""What Portico must reach, as rows: a figure, its limit, met or missed; or why it was not measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench import results
from bench.figures import Median
from bench.results import Document

#: CPU of nginx as one proxy hop for a small GET, on the machine for which the limits in µs and seconds of CPU were set.
PACE_US = 13.0


def pace(document: Document) -> float | None:
    """How fast this machine was beside that one, by the same proxy on the same work: 0.7 is slower; ``None`` unmeasured."""
    found = results.cpu_median(document, "small-get", "nginx")
    return PACE_US / found.value if found else None


@dataclass(frozen=True, slots=True)
class Target:
    """``measure`` is ``None`` when what it needs was not there. ``least``: the figure must be at least the limit. ``cpu``: it
    is time of a processor, or what that allows, and so depends on how fast the machine is."""

    title: str
    unit: str
    limit: float
    measure: Callable[[Document], Median | None]
    least: bool = False
    cpu: bool = False

    def good(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit

    def paced(self, document: Document) -> float | None:
        """The figure at the pace of the machine for which the limits were set; ``None`` where that says nothing."""
        found, factor = self.measure(document), pace(document)
        if not self.cpu or found is None or factor is None:
            return None
        return found.value / factor if self.least else found.value * factor

    def verdict(self, document: Document) -> str:
        """``met``, ``missed by N %`` as measured, with a word when the pace of the machine decides; or ``not measured``."""
        found, paced = self.measure(document), self.paced(document)
        if found is None:
            return "not measured"
        if self.good(found.value):
            return "met" if paced is None or self.good(paced) else "met here, not at that pace"
        missed = f"missed by {abs(found.value / self.limit - 1):.0%}"
        return missed if paced is None or not self.good(paced) else f"{missed} here, met at that pace"


def _cpu(case: str, candidate: str = "portico") -> Callable[[Document], Median | None]:
    return lambda document: results.cpu_median(document, case, candidate)


def _ratio(case: str, ours: str, theirs: str) -> Callable[[Document], Median | None]:
    return lambda document: results.cpu_ratio(document, case, ours, theirs)


def _above(case: str, role: str) -> Callable[[Document], Median | None]:
    return lambda document: results.above_idle(document, case, "portico", role)


def _platform(name: str, member: str) -> Callable[[Document], Median | None]:
    return lambda document: results.platform(document, name, member)


TARGETS: tuple[Target, ...] = (
    Target("small GET, 64 connections: CPU of relay + agent", "µs", 30, _cpu("small-get"), cpu=True),
    Target("the same against rathole's plain TCP tunnel", "×", 1.25, _ratio("small-get", "portico", "rathole")),
    Target("the same against frp's HTTP mode", "×", 1 / 8, _ratio("small-get", "portico", "frp-http")),
    Target("small GET, 4 connections: CPU", "µs", 50, _cpu("small-get-4"), cpu=True),
    Target("the same against frp's HTTP mode", "×", 1 / 2, _ratio("small-get-4", "portico", "frp-http")),
    Target("small GET, TLS at the edge against plain", "×", 1.4, _ratio("small-get", "portico-tls", "portico")),
    Target(
        "small GET, ten address and header rules against none", "×", 2, _ratio("small-get", "portico-policy", "portico")
    ),
    Target("a new connection for each request: CPU", "µs", 80, _cpu("close"), cpu=True),
    Target("the same against frp's HTTP mode", "×", 1 / 3, _ratio("close", "portico", "frp-http")),
    Target(
        "added latency at 1 connection, p50",
        "µs",
        150,
        lambda document: results.added_latency(document, "small-get-1", "portico"),
    ),
    Target("download: CPU of relay + agent", "s/GiB", 1.4, _cpu("download"), cpu=True),
    Target("upload: CPU of relay + agent", "s/GiB", 1.4, _cpu("upload"), cpu=True),
    Target("download, TLS at the edge: CPU", "s/GiB", 2.2, _cpu("download", "portico-tls"), cpu=True),
    Target("upload, TLS at the edge: CPU", "s/GiB", 2.2, _cpu("upload", "portico-tls"), cpu=True),
    Target("download: memory of the relay above idle", "MiB", 40, _above("download", "relay")),
    Target("download: memory of the agent above idle", "MiB", 40, _above("download", "agent")),
    Target("upload: memory of the relay above idle", "MiB", 40, _above("upload", "relay")),
    Target("upload: memory of the agent above idle", "MiB", 40, _above("upload", "agent")),
    Target("first request after `portico http`", "s", 0.5, _platform("first-request", "seconds"), cpu=True),
    Target("1,000 idle tunnels on one session: memory of the relay", "MiB", 10, _platform("idle-tunnels", "relay_mib")),
    Target(
        "1,000 idle tunnels on one session: CPU of the relay", "%", 1, _platform("idle-tunnels", "relay_cpu_percent")
    ),
    Target("grants on one API process", "/s", 500, _platform("grants", "per_second"), least=True, cpu=True),
    Target("jobs of the queue, one worker process", "/s", 2000, _platform("queue", "per_second"), least=True, cpu=True),
    Target(
        "certificate events on one API process",
        "/s",
        1000,
        _platform("cert-ingest", "per_second"),
        least=True,
        cpu=True,
    ),
    Target(
        "providers' webhooks on one API process",
        "/s",
        1000,
        _platform("webhook-ingest", "per_second"),
        least=True,
        cpu=True,
    ),
    Target("their answers while nothing is applied, p99", "ms", 250, _platform("webhook-ingest", "p99_ms")),
    Target("a report of 1,000,000 finance events as CSV", "s", 20, _platform("reports", "csv_seconds"), cpu=True),
    Target("the same as JSON Lines", "s", 20, _platform("reports", "jsonl_seconds"), cpu=True),
    Target("the same as Parquet", "s", 20, _platform("reports", "parquet_seconds"), cpu=True),
    Target("memory of the worker meanwhile, at most", "MB", 200, _platform("reports", "peak_mb")),
    Target("a settlement of 100,000 lines compared", "s", 10, _platform("settlement", "compare_seconds"), cpu=True),
)
