"""The work: each case puts the same on every candidate and turns what it saw into one sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.candidates import BULK, SMALL, Candidate
from bench.load import BROWSER_FIELDS, Fields, Work, drive
from bench.proc import MIB, Watch, idle_memory
from bench.visit import download, upload

#: CPU and memory by role, requests or bytes, latencies: what one repeat measured. Becomes JSON as it is.
Sample = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """``unit`` is what the case is about: ``request`` (µs of CPU each) or ``byte`` (CPU seconds per GiB)."""

    name: str
    title: str
    app: str
    unit: str
    run: Callable[[Candidate, float, int], Sample]


def _get(connections: int, fields: Fields = ()) -> Callable[[Candidate, float, int], Sample]:
    def run(candidate: Candidate, seconds: float, mebibytes: int) -> Sample:
        roles = candidate.roles.get(SMALL, {})
        with Watch(roles) as watch:
            seen = drive(candidate.endpoints[SMALL], Work(connections, seconds, fields))
        return {
            "count": seen.requests,
            "seconds": seen.seconds,
            "p50_us": seen.p50_us,
            "p99_us": seen.p99_us,
            "cpu": watch.cpu,
            "peak_mib": _mib(watch.peak),
        }

    return run


def _bulk(move: Callable[..., float]) -> Callable[[Candidate, float, int], Sample]:
    def run(candidate: Candidate, seconds: float, mebibytes: int) -> Sample:
        roles = candidate.roles.get(BULK, {})
        idle = idle_memory(roles)
        with Watch(roles) as watch:
            took = move(candidate.endpoints[BULK], mebibytes)
        above = {role: watch.peak[role] - idle[role] for role in roles}
        return {
            "count": mebibytes * MIB,
            "seconds": took,
            "cpu": watch.cpu,
            "peak_mib": _mib(watch.peak),
            "above_idle_mib": _mib(above),
        }

    return run


def _mib(values: dict[str, int]) -> dict[str, float]:
    return {role: round(value / MIB, 2) for role, value in values.items()}


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("small-get", "small GET, 64 keep-alive connections", SMALL, "request", _get(64)),
        Case("small-get-4", "small GET, 4 keep-alive connections", SMALL, "request", _get(4)),
        Case("small-get-1", "small GET, 1 keep-alive connection", SMALL, "request", _get(1)),
        Case(
            "browser-head",
            "a browser's head (16 fields more), 64 connections",
            SMALL,
            "request",
            _get(64, BROWSER_FIELDS),
        ),
        Case(
            "close",
            "a new connection for each request, 64 at once",
            SMALL,
            "request",
            _get(64, [("Connection", "close")]),
        ),
        Case("download", "download, one stream", BULK, "byte", _bulk(download)),
        Case("upload", "upload, one stream", BULK, "byte", _bulk(upload)),
    )
}
