"""Canonical JSON (RFC 8785): one byte string for one value, so that a hash of it means something.

Only what JSON can hold and a double can carry: strings without lone surrogates, integers of at most 53 bits, finite
floats, booleans, null, lists, objects with string keys. Anything else is a ``ValueError``, never a guess.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

#: Largest integer that every JSON implementation reads back as written (RFC 7493, 2.2).
MAX_INTEGER: Final = 2**53 - 1


# The same text for what is plain, several times as fast: hash chains are made of it.
_PLAIN: Final = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def encode(value: Any) -> bytes:
    """The canonical form of ``value`` in UTF-8. Raises ``ValueError`` for what has none."""
    text = _PLAIN.encode(value) if _is_plain(value) else _text(value)
    return text.encode("utf-8")  # a lone surrogate is a UnicodeEncodeError, which is a ValueError


def _is_plain(value: Any) -> bool:
    """Whether there is nothing in ``value`` that JSON in general writes otherwise: floats, long integers, members whose names are
    not ASCII (and so might be sorted otherwise), or what is no JSON."""
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return True
    if kind is int:
        return bool(-MAX_INTEGER <= value <= MAX_INTEGER)
    if kind is dict:
        return all(type(key) is str and key.isascii() for key in value) and all(map(_is_plain, value.values()))
    return kind is list and all(map(_is_plain, value))


def _text(value: Any) -> str:
    match value:
        case None | True | False:
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            return json.dumps(value, ensure_ascii=False)
        case int():
            if abs(value) > MAX_INTEGER:
                raise ValueError("an integer of more than 53 bits")
            return str(value)
        case float():
            return number(value)
        case list() | tuple():
            return "[" + ",".join(map(_text, value)) + "]"
        case dict():
            return "{" + ",".join(f"{_text(key)}:{_text(value[key])}" for key in sorted(value, key=_order)) + "}"
    raise ValueError(f"{type(value).__name__} is not JSON")


def _order(key: Any) -> bytes:
    """Members are sorted by the UTF-16 code units of their names (3.2.3)."""
    if not isinstance(key, str):
        raise ValueError("a member's name is not a string")
    return key.encode("utf-16-be")


def number(value: float) -> str:
    """A float as ECMAScript's Number::toString spells it (3.2.2.3); ``repr`` has the same shortest digits."""
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    if value == 0:
        return "0"
    mantissa, _, exponent = repr(abs(value)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    point = len(whole) + int(exponent or 0) - (len(whole + fraction) - len(digits))  # digits before the point
    digits = digits.rstrip("0")
    sign = "-" if value < 0 else ""
    count = len(digits)
    if count <= point <= 21:
        return sign + digits + "0" * (point - count)
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    rest = "." + digits[1:] if count > 1 else ""
    return f"{sign}{digits[0]}{rest}e{point - 1:+d}"
