"""What a payment provider's simulator remembers, and its clock.

    world = World(path)                     # or World(None): in memory
    world.put("subscriptions", {"id": "sub_1…", …})
    world.clock.now                         # seconds since 1970; the machine's time and what the clock was advanced by

Objects are JSON documents by kind and id, in the order in which they were made. A key that begins with ``_`` is the
simulator's own: it
never leaves by the API (:func:`public`). Everything that is to happen later (a renewal, a retry, the end of a checkout) follows
from the objects, so a simulator that is started again on its file goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Doc = dict[str, Any]
_BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DAY: Final = 86_400
#: Steps of one advance of the clock; a rule that never makes progress ends here instead of never.
MAX_STEPS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Offer:
    """A plan that can be bought. ``plan``: the platform's name of it; ``amount_minor`` a ``interval`` (``day``,
    ``month``, ``year``)."""

    plan: str
    name: str
    amount_minor: int
    currency: str = "USD"
    interval: str = "month"


#: What the platform's plans cost when nobody says otherwise.
OFFERS: Final = (Offer("pro", "Pro", 1900), Offer("team", "Team", 9900))


class Clock:
    """The machine's clock and an offset; pinned while things of a past moment happen."""

    def __init__(self) -> None:
        self.offset = 0.0
        self._pinned: float | None = None

    @property
    def exact(self) -> float:
        return time.time() + self.offset if self._pinned is None else self._pinned

    @property
    def now(self) -> int:
        return int(self.exact)

    def pin(self, at: float) -> None:
        self._pinned = at

    def release(self, at: float | None = None) -> None:
        """Go on from ``at``, or from the machine's time and the offset."""
        if at is not None:
            self.offset = at - time.time()
        self._pinned = None


class World:
    """The objects, the clock and the counters; in a file if there is a ``path``."""

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._dirty = path, False
        self.clock = Clock()
        self.kinds: dict[str, dict[str, Doc]] = {}
        self.counters: dict[str, int] = {}
        if path is not None and path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            self.kinds, self.counters = found["kinds"], found["counters"]
            self.clock.offset = found["offset"]

    def put(self, kind: str, doc: Doc) -> Doc:
        """Keep an object under its ``id``."""
        self.kinds.setdefault(kind, {})[doc["id"]] = doc
        self._dirty = True
        return doc

    def get(self, kind: str, ref: object) -> Doc | None:
        return self.kinds.get(kind, {}).get(str(ref))

    def drop(self, kind: str, ref: str) -> None:
        self.kinds.get(kind, {}).pop(ref, None)
        self._dirty = True

    def all(self, kind: str) -> list[Doc]:
        """In the order in which they were made."""
        return list(self.kinds.get(kind, {}).values())

    def where(self, kind: str, **fields: object) -> Iterator[Doc]:
        """Those whose fields have these values."""
        return (doc for doc in self.all(kind) if all(doc.get(name) == value for name, value in fields.items()))

    def any_kind(self, ref: str) -> Doc | None:
        """The object with this id, whatever it is."""
        return next((docs[ref] for docs in self.kinds.values() if ref in docs), None)

    def count(self, name: str) -> int:
        """1, 2, 3, … a series of each name."""
        self.counters[name] = self.counters.get(name, 0) + 1
        return self.counters[name]

    def save(self) -> None:
        """Write what changed, all of it or nothing."""
        if self._path is None or not self._dirty:
            return
        document = {"kinds": self.kinds, "counters": self.counters, "offset": self.clock.offset}
        partial = self._path.with_suffix(".partial")
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(document), encoding="utf-8")
        partial.replace(self._path)
        self._dirty = False

    def kept(self, name: str, given: str, make: Callable[[], str]) -> str:
        """A key or a secret: the one that is ``given``, else the one of earlier runs, else a new one."""
        known = self.get("kept", name)
        value: str = given or (known["value"] if known else make())
        self.put("kept", {"id": name, "value": value})
        return value

    def touch(self) -> None:
        """An object was changed in place."""
        self._dirty = True


def run_until(clock: Clock, until: float, due: Callable[[], tuple[float, Callable[[], None]] | None]) -> int:
    """Let everything happen that is ``due`` by ``until``, each at its own time, in order of time; how many there were."""
    for step in range(MAX_STEPS):
        found = due()
        if found is None or found[0] > until:
            return step
        clock.pin(max(found[0], 0.0))
        try:
            found[1]()
        finally:
            clock.release()
    raise RuntimeError(f"a rule made no progress in {MAX_STEPS} steps")


def public(value: Any) -> Any:
    """A copy without what is the simulator's own."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items() if not key.startswith("_")}
    if isinstance(value, list):
        return [public(inner) for inner in value]
    return value


def token(length: int, alphabet: str = _BASE62) -> str:
    """Random characters, as providers' ids have them."""
    return "".join(secrets.choice(alphabet) for _ in range(length))


def fixed(length: int, *parts: str, alphabet: str = _BASE62) -> str:
    """Characters that follow from ``parts``: ids of a catalogue are the same in every run."""
    number = int.from_bytes(hashlib.sha512("\0".join(parts).encode()).digest(), "big")
    found = ""
    while len(found) < length:
        number, rest = divmod(number, len(alphabet))
        found += alphabet[rest]
    return found


def after(start: int, interval: str, count: int = 1) -> int:
    """The end of a period of ``count`` intervals. A month from the 31st ends on the last day of a shorter one."""
    if interval in ("day", "week"):
        return start + count * DAY * (7 if interval == "week" else 1)
    at = time.gmtime(start)
    months = at.tm_year * 12 + at.tm_mon - 1 + count * (12 if interval == "year" else 1)
    year, month = divmod(months, 12)
    first = _midnight(year, month + 1)
    days = (_midnight(year + (month + 1) // 12, (month + 1) % 12 + 1) - first) // DAY
    return first + (min(at.tm_mday, days) - 1) * DAY + start % DAY


def _midnight(year: int, month: int) -> int:
    import calendar

    return calendar.timegm((year, month, 1, 0, 0, 0))


def share(amount: int, part: float, whole: float) -> int:
    """``amount × part ÷ whole`` in whole minor units, halves away from zero."""
    exact = amount * part / whole
    return int(math.copysign(math.floor(abs(exact) + 0.5), exact))


def per_mille(amount: int, rate: int, fixed_part: int = 0) -> int:
    """A fee of ``rate`` tenths of a per cent and a fixed part."""
    return (amount * rate + 500) // 1000 + fixed_part


def iso(seconds: float) -> str:
    """``2026-01-31T10:00:00Z``."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def amount(minor: int, currency: str) -> str:
    """``19.00 USD``; by the exponent of the currency."""
    digits = exponent(currency)
    return f"{minor / 10**digits:,.{digits}f} {currency.upper()}"


def exponent(currency: str) -> int:
    """Digits after the point (ISO 4217): JPY 0, KWD 3, most 2."""
    return {**dict.fromkeys(_NONE, 0), **dict.fromkeys(_THREE, 3)}.get(currency.upper(), 2)


_NONE: Final = [
    "BIF",
    "CLP",
    "DJF",
    "GNF",
    "ISK",
    "JPY",
    "KMF",
    "KRW",
    "PYG",
    "RWF",
    "UGX",
    "UYI",
    "VND",
    "VUV",
    "XAF",
    "XOF",
    "XPF",
]
_THREE: Final = ["BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"]
