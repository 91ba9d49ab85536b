"""What a check found (`portico doctor`, `portico diagnose`): one line, a level, and what to do."""

from __future__ import annotations

import email.utils
from collections.abc import Mapping
from dataclasses import asdict, dataclass

#: Tokens tolerate a minute of difference (`token_leeway_seconds`); half of it is time to look at the clock.
CLOCK_WARN_SECONDS, CLOCK_FAIL_SECONDS = 30.0, 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a report. ``level``: ``OK``, ``WARN`` (to look at) or ``FAIL``."""

    check: str
    level: str
    says: str
    advice: str = ""

    def document(self) -> dict[str, str]:
        return asdict(self)


def clock(headers: Mapping[str, str], middle: float) -> Finding:
    """How far this clock is from a server's, by its Date header (whole seconds); ``middle``: our time then, in seconds."""
    try:
        theirs = email.utils.parsedate_to_datetime(headers["date"]).timestamp() + 0.5
    except (KeyError, ValueError):
        return Finding("Clock", "WARN", "the API sends no Date: the difference is not known")
    off = abs(theirs - middle)
    level = "FAIL" if off > CLOCK_FAIL_SECONDS else "WARN" if off > CLOCK_WARN_SECONDS else "OK"
    advice = (
        "Tokens are refused past a minute: set this machine's clock (timedatectl set-ntp true)."
        if level != "OK"
        else ""
    )
    return Finding("Clock", level, f"{off:.0f} s from the API's", advice)
