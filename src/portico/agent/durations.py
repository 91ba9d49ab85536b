"""Durations as people write them: `90s`, `15m`, `1h30m`."""

from __future__ import annotations

import re

_DURATION = re.compile(r"(?:(\d{1,5})d)?(?:(\d{1,6})h)?(?:(\d{1,7})m)?(?:(\d{1,8})s)?")
_UNITS = (86_400, 3_600, 60, 1)


def parse_duration(text: str) -> float:
    """`15m`, `1h30m`, `45s`, `2d` in seconds; raises ``ValueError`` with a sentence."""
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        raise ValueError(f"{text!r} is not a duration; write it with units, such as 90s, 15m or 1h30m")
    seconds = sum(int(part or 0) * unit for part, unit in zip(match.groups(), _UNITS, strict=True))
    if not seconds:
        raise ValueError("the duration must be longer than nothing")
    return float(seconds)


def shown_duration(seconds: float) -> str:
    """`1h30m` for 5400: the two largest units that are not zero."""
    left, parts = max(0, round(seconds)), []
    for unit, letter in zip(_UNITS, "dhms", strict=True):
        count, left = divmod(left, unit)
        if count:
            parts.append(f"{count}{letter}")
    return "".join(parts[:2]) or "0s"
