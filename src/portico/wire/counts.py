"""COUNTS: what happened on one bound tunnel since the last frame of its bind (``contracts/wire.md``, 3.10). Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from portico.wire import frames as f
from portico.wire.frames import WireError

#: Error codes that one frame may name, and their form.
MAX_CODES = 64
_CODE = re.compile(r"[a-z][a-z0-9_]{0,31}\.[a-z][a-z0-9_]{0,63}\Z")
_SUMS = ("requests", "connections", "bytes_in", "bytes_out", "errors")
_MOST = 2**63 - 1


@dataclass(slots=True)
class Counts:
    """What was added, but for ``open``: requests and connections under way now. ``refused`` is by error code."""

    requests: int = 0
    connections: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    errors: int = 0
    open: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def add(self, more: Counts) -> None:
        """Take a later frame's counts in."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(more, name))
        self.open = more.open
        for code, count in more.refused.items():
            if code in self.refused or len(self.refused) < MAX_CODES:
                self.refused[code] = self.refused.get(code, 0) + count

    def body(self) -> dict[str, Any]:
        """The JSON payload; what is 0 is left out, but for ``open``."""
        sums = {name: value for name in _SUMS if (value := getattr(self, name))}
        return sums | {"open": self.open} | ({"refused": self.refused} if self.refused else {})


def decode(body: Mapping[str, Any]) -> Counts:
    """From a JSON payload; unknown members are ignored. Raises :class:`WireError`."""
    given = {name: _whole(body.get(name, 0), name) for name in (*_SUMS, "open")}
    refused = body.get("refused", {})
    if not isinstance(refused, dict) or len(refused) > MAX_CODES or not all(map(_CODE.match, refused)):
        raise WireError(f"{f.NAMES[f.COUNTS]} names no error codes in refused")
    return Counts(**given, refused={code: _whole(count, "refused") for code, count in refused.items()})


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value <= _MOST:
        raise WireError(f"{f.NAMES[f.COUNTS]} has no whole number in {name}")
    return value
