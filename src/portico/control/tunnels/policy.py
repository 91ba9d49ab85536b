"""A tunnel's policy: one validated JSON document. What it cannot enforce yet it does not accept.

An unknown key is refused with its path: a policy that silently protects nothing is worse than an error. New keys are
added here, to the relay's decision chain and to ``contracts/`` together; ``version`` changes only when the meaning of an
existing key would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from portico.errors import Problem

VERSION: Final = 1
MAX_CONCURRENCY: Final = 100_000


def _refuse(path: str, what: str) -> Problem:
    return Problem("tunnel.policy_invalid", f"policy.{path}: {what}", path=path)


def check(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document in its canonical form (defaults left out); raises ``tunnel.policy_invalid`` naming the path."""
    clean: dict[str, Any] = {}
    for key, value in document.items():
        if key == "version":
            if type(value) is not int or value != VERSION:
                raise _refuse("version", f"only version {VERSION} is known")
        elif key == "concurrency":
            if type(value) is not int or not 1 <= value <= MAX_CONCURRENCY:
                raise _refuse("concurrency", f"must be a whole number from 1 to {MAX_CONCURRENCY}")
            clean["concurrency"] = value
        else:
            raise _refuse(key[:80], "unknown key; known keys: concurrency, version")
    return clean


def digest(document: Mapping[str, Any]) -> str:
    """The ``policy_hash`` of a checked document: equal documents, equal hashes."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def limits(document: Mapping[str, Any], *, concurrency: int) -> dict[str, int]:
    """The limits that a grant carries: the plan's, lowered by the policy and never raised."""
    return {"concurrency": min(concurrency, document.get("concurrency", concurrency))}
