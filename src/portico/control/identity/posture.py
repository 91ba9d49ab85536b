"""What is wrong with an organization's keys, and what to do about it: ``GET /v1/api-keys/posture``.

One pass over the live keys (bounded by ``max_keys_per_organization``). Each finding is a rule of ``RULES`` that says its
severity and advice; docs/how-to/keys.md shows the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from portico.control.access import PERMISSIONS

Severity = Literal["high", "medium", "low"]
SEVERITIES: Final[tuple[Severity, ...]] = ("high", "medium", "low")

# A key that may do one of these can make itself or others more powerful, or take the organization.
STRONG: Final = frozenset({"keys:write", "members:write", "owners:write", "roles:write"})
_NEW: Final = timedelta(days=7)
_UNUSED: Final = timedelta(days=90)
_OLD: Final = timedelta(days=180)
_VERY_OLD: Final = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that can be wrong with a key."""

    code: str
    severity: Severity
    advice: str
    applies: Callable[[Any, datetime], bool]


def _age(row: Any, now: datetime) -> timedelta:
    age: timedelta = now - row.created_at
    return age


def _maker_gone(row: Any, now: datetime) -> bool:
    return row.role is None or row.disabled_at is not None


def _broad(row: Any, now: datetime) -> bool:
    scopes = set(row.scopes) & PERMISSIONS
    return row.kind == "api" and bool(scopes & STRONG)


RULES: Final = (
    Rule(
        "maker_gone",
        "high",
        "Its maker is no active member any more, so it is refused wherever it is still used. Revoke it.",
        _maker_gone,
    ),
    Rule(
        "broad_scopes",
        "high",
        "It may make keys, roles or members that can do more. Narrow its scopes to what its program calls.",
        _broad,
    ),
    Rule(
        "very_old",
        "high",
        "It is older than a year. Rotate it, with an overlap if its program cannot change at once.",
        lambda row, now: _age(row, now) > _VERY_OLD,
    ),
    Rule(
        "unused",
        "medium",
        "Nobody used it for 90 days. Revoke it; a key that nobody misses is one that nobody watches.",
        lambda row, now: row.last_used_at is not None and now - row.last_used_at > _UNUSED,
    ),
    Rule(
        "never_used",
        "medium",
        "It was never used. Revoke it, unless the program that it is for is still to come.",
        lambda row, now: row.last_used_at is None and _age(row, now) > _NEW,
    ),
    Rule(
        "old",
        "medium",
        "It is older than 180 days. Rotate it.",
        lambda row, now: _OLD < _age(row, now) <= _VERY_OLD,
    ),
    Rule(
        "no_expiry",
        "low",
        "It never expires. Give it an expiry, and rotate it before then.",
        lambda row, now: row.expires_at is None,
    ),
    Rule(
        "no_cidrs",
        "low",
        "It can be used from anywhere. Allow only the networks that its program calls from.",
        lambda row, now: not row.allowed_cidrs,
    ),
)
_ORDER: Final = {severity: index for index, severity in enumerate(SEVERITIES)}


def report(rows: Iterable[Any], now: datetime) -> dict[str, Any]:
    """The findings of every key that has some, the worst first; ``rows`` are of ``store.keys_with_makers``."""
    summary: dict[str, int] = dict.fromkeys(SEVERITIES, 0)
    data, keys = [], 0
    for row in rows:
        keys += 1
        found = [
            {"code": rule.code, "severity": rule.severity, "advice": rule.advice}
            for rule in RULES
            if rule.applies(row, now)
        ]
        for finding in found:
            summary[finding["severity"]] += 1
        if found:
            data.append(_entry(row, now, found))
    data.sort(key=lambda entry: (_ORDER[entry["severity"]], -len(entry["findings"]), entry["id"]))
    return {"generated_at": now, "keys": keys, "findings": summary, "data": data}


def _entry(row: Any, now: datetime, found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": row.id,
        "kind": row.kind,
        "name": row.name,
        "prefix": row.prefix,
        "maker": row.email,
        "age_days": max(0, _age(row, now).days),
        "last_used_at": row.last_used_at,
        "expires_at": row.expires_at,
        "severity": found[0]["severity"],  # RULES are in this order
        "findings": found,
    }
