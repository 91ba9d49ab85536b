"""The results of a run as one JSON document, and what is read off it: figures by case and candidate.

{"about": {…}, "skipped": {candidate: why}, "candidates": {name: {"title", "version", "idle_mib"}},
 "cases": {case: {candidate: [sample or {"refused": why}, … by round]}}, "platform": {name: {…}}}
"""

from __future__ import annotations

from typing import Any

from bench.figures import Median, median, ratio

Document = dict[str, Any]
GIB = 1024**3


def samples(document: Document, case: str, candidate: str) -> dict[int, dict[str, Any]]:
    """The samples that may be believed, by round."""
    rows = document["cases"].get(case, {}).get(candidate, [])
    return {number: row for number, row in enumerate(rows) if row and "refused" not in row}


def refusals(document: Document, case: str, candidate: str) -> list[str]:
    """Why samples were refused."""
    rows = document["cases"].get(case, {}).get(candidate, [])
    return [row["refused"] for row in rows if row and "refused" in row]


def cpu(document: Document, case: str, candidate: str, role: str | None = None) -> dict[int, float]:
    """CPU by round, of all roles or one: µs per request, or seconds per GiB. Empty where nothing forwards (direct)."""
    found = {}
    for number, row in samples(document, case, candidate).items():
        if row["cpu"]:
            spent = sum(row["cpu"].values()) if role is None else row["cpu"].get(role, 0.0)
            found[number] = spent / row["count"] * (GIB if is_bulk(case) else 1e6)
    return found


def is_bulk(case: str) -> bool:
    return case in ("download", "upload")


def cpu_median(document: Document, case: str, candidate: str, role: str | None = None) -> Median | None:
    return median(list(cpu(document, case, candidate, role).values()))


def cpu_ratio(document: Document, case: str, ours: str, theirs: str) -> Median | None:
    return ratio(cpu(document, case, ours), cpu(document, case, theirs))


def rate(document: Document, case: str, candidate: str) -> Median | None:
    """Requests, or MiB, per second."""
    unit = 1024**2 if is_bulk(case) else 1
    return median([row["count"] / unit / row["seconds"] for row in samples(document, case, candidate).values()])


def value(document: Document, case: str, candidate: str, name: str) -> Median | None:
    """One plain member of the samples (``p50_us``)."""
    return median([row[name] for row in samples(document, case, candidate).values() if name in row])


def added_latency(document: Document, case: str, candidate: str) -> Median | None:
    """p50 above that of the direct request of the same round, in µs."""
    ours, plain = samples(document, case, candidate), samples(document, case, "direct")
    return median([row["p50_us"] - plain[number]["p50_us"] for number, row in ours.items() if number in plain])


def above_idle(document: Document, case: str, candidate: str, role: str) -> Median | None:
    """MiB resident at the peak above what was resident before, in the worst round: the limit is one for every moment."""
    rows = samples(document, case, candidate).values()
    found = [row["above_idle_mib"][role] for row in rows if role in row.get("above_idle_mib", {})]
    return median([max(found)]) if found else None


def peak(document: Document, case: str, candidate: str, role: str) -> Median | None:
    """MiB resident at the peak."""
    rows = samples(document, case, candidate).values()
    return median([row["peak_mib"][role] for row in rows if role in row.get("peak_mib", {})])


def platform(document: Document, name: str, member: str) -> Median | None:
    """A figure of Portico alone, measured once or some times."""
    found = document.get("platform", {}).get(name, {}).get(member)
    if found is None:
        return None
    return median(found if isinstance(found, list) else [found])
