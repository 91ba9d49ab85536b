"""Medians, spreads and ratios. A figure that was measured while something was wrong is not a figure: :class:`Refused`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class Refused(Exception):
    """A sample that may not be believed; the text says why."""


@dataclass(frozen=True, slots=True)
class Median:
    """The median of repeats, with the smallest and the largest."""

    value: float
    low: float
    high: float
    count: int

    @property
    def spread(self) -> float:
        """Half the distance of the extremes, as a share of the median."""
        return (self.high - self.low) / 2 / self.value if self.value else 0.0


def median(values: Sequence[float]) -> Median | None:
    """``None`` without values."""
    return Median(statistics.median(values), min(values), max(values), len(values)) if values else None


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Median | None:
    """The median of the ratios within each round (values by round): what a busy machine does to both cancels out."""
    return median([ours[number] / theirs[number] for number in ours if theirs.get(number)])


def check_load(requests: int, errors: Mapping[str, int], read_bytes: int, answer_bytes: int, connections: int) -> None:
    """Raise :class:`Refused` unless a load run was flawless.

    ``errors`` counts by kind; ``answer_bytes`` is the size of one answer that was checked byte by byte: the bytes that
    the load generator read must be that many for each request, save what was in flight at the end.
    """
    if wrong := {kind: count for kind, count in errors.items() if count}:
        raise Refused("the load generator saw errors: " + ", ".join(f"{n} {kind}" for kind, n in wrong.items()))
    if not requests:
        raise Refused("no request was answered")
    expected = requests * answer_bytes
    # Heads differ by a digit (a date, a count); a wrong body differs by more.
    slack = expected * 0.01 + connections * answer_bytes
    if abs(read_bytes - expected) > slack:
        raise Refused(f"read {read_bytes} bytes in {requests} answers, {answer_bytes} in each expected")
