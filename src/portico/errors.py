"""The one error model: a stable code, and how it looks to programs and to people.

    Problem                     raised anywhere; carries code, detail and optional extra members
    └─ (no subclasses needed)   domains name theirs by code; catching by code is `err.code == "…"`

Every code lives in ``contracts/errors.toml`` with its status, retryability, title and hint; raising an
unlisted code is a programming error and fails at once, so that no code can ship undocumented.
"""

from __future__ import annotations

import functools
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ErrorSpec:
    """One row of ``contracts/errors.toml``."""

    code: str
    status: int
    retryable: bool
    title: str
    hint: str
    hop: str | None = None


def _contract_path() -> Path:
    packed = Path(__file__).parent / "contracts" / "errors.toml"
    return packed if packed.exists() else Path(__file__).parents[2] / "contracts" / "errors.toml"


@functools.cache
def catalogue() -> dict[str, ErrorSpec]:
    """Every error code, by code. Raises ``ValueError`` when the contract is malformed."""
    tables = tomllib.loads(_contract_path().read_text(encoding="utf-8"))
    return {
        f"{area}.{name}": ErrorSpec(code=f"{area}.{name}", **row)
        for area, rows in tables.items()
        for name, row in rows.items()
    }


class Problem(Exception):
    """A refusal or failure with a stable code (RFC 9457 when it leaves by HTTP).

    ``detail`` is one sentence for a person, about this occurrence; ``hint`` overrides the catalogue's advice;
    ``extra`` holds further members of the problem document (never secrets) and ``headers`` response headers.
    """

    def __init__(
        self,
        code: str,
        detail: str | None = None,
        *,
        hint: str | None = None,
        headers: dict[str, str] | None = None,
        **extra: Any,
    ) -> None:
        self.spec = catalogue()[code]
        self.code = code
        self.detail = detail or self.spec.title
        self.hint = hint or self.spec.hint
        self.headers = headers or {}
        self.extra = extra
        super().__init__(f"{code}: {self.detail}")

    @property
    def status(self) -> int:
        return self.spec.status

    @property
    def retryable(self) -> bool:
        return self.spec.retryable

    def document(self, request_id: str | None = None) -> dict[str, Any]:
        """The ``application/problem+json`` members."""
        body: dict[str, Any] = {
            "type": f"urn:portico:error:{self.code}",
            "title": self.spec.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "hint": self.hint,
            "retryable": self.retryable,
            **self.extra,
        }
        if request_id is not None:
            body["request_id"] = request_id
        return body

    def json(self, request_id: str | None = None) -> bytes:
        return json.dumps(self.document(request_id), separators=(",", ":")).encode()

    def line(self) -> str:
        """One line for a terminal: what happened and what to do."""
        return f"{self.detail.rstrip('.')}. {self.hint} ({self.code})"
