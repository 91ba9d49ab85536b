"""A small result document, as a run writes it."""

from __future__ import annotations

from typing import Any

MIB = 1024 * 1024


def get(relay_us: float, agent_us: float, p50: float = 500.0, count: int = 1_000_000) -> dict[str, Any]:
    """A sample of small requests that cost so much each."""
    cpu = {"relay": relay_us * count / 1e6, "agent": agent_us * count / 1e6}
    peak = {"relay": 70.0, "agent": 50.0}
    return {"count": count, "seconds": 4.0, "p50_us": p50, "p99_us": 2 * p50, "cpu": cpu, "peak_mib": peak}


def plain(p50: float) -> dict[str, Any]:
    """A sample of the direct app: nothing forwards."""
    return {"count": 10, "seconds": 4.0, "p50_us": p50, "p99_us": p50, "cpu": {}, "peak_mib": {}}


def bulk(relay: float, agent: float) -> dict[str, Any]:
    """256 MiB at so many CPU seconds per GiB."""
    cpu = {"relay": relay / 4, "agent": agent / 4}
    above = {"relay": 12.0, "agent": 41.0}
    return {"count": 256 * MIB, "seconds": 0.5, "cpu": cpu, "peak_mib": above, "above_idle_mib": above}


def document(**cases: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    titles = {
        "direct": "direct to the app",
        "nginx": "nginx, one hop",
        "portico": "Portico <http>",
        "rathole": "rathole",
    }
    machine = {"cores": 2, "cpu": "Some CPU", "memory_gib": 24.0, "kernel": "6.1.0", "python": "3.11.2"}
    about = {
        "date": "2026-01-02",
        "commit": "abc",
        "machine": machine,
        "load": 0.1,
        "repeats": 3,
        "seconds": 4.0,
        "mebibytes": 256,
    }
    return {
        "about": about | {"generator": "wrk", "app": "nginx 1.22"},
        "skipped": {"frp-http": "frps and frpc are not on PATH"},
        "candidates": {
            name: {"title": title, "version": "1", "idle_mib": {} if name == "direct" else {"relay": 60.0}}
            for name, title in titles.items()
        },
        "cases": {name.replace("_", "-"): rows for name, rows in cases.items()},
        "platform": {},
    }
