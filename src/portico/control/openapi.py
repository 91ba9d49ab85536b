"""/openapi.json: OpenAPI 3.1 of the API, with the problem document as every operation's error answer.

``x-callers`` says which kinds of callers an operation admits (``anonymous``: everybody), ``x-permission`` one of which
permissions they need; routes take both from their dependencies (``requests.JsonRoute``). ``contracts/openapi.json`` is its
committed copy; ``tools/openapi.py --check`` fails when that is stale or when a change breaks a client.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse

from portico.control.requests import REPEATABLE

_WRITES = frozenset({"post", "put", "patch", "delete"})

PROBLEM_SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "description": "RFC 9457 problem document. `code` is stable (contracts/errors.toml lists all); clients decide by it.",
    "type": "object",
    "required": ["type", "title", "status", "code", "detail", "hint", "retryable", "request_id"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string"},
        "detail": {"type": "string", "description": "One sentence about this occurrence."},
        "hint": {"type": "string", "description": "What to do about it."},
        "retryable": {"type": "boolean"},
        "request_id": {"type": "string"},
        "errors": {
            "type": "array",
            "description": "What does not fit: of `request.invalid` fields, of `tunnel.policy_invalid` keys of the policy.",
            "items": {
                "type": "object",
                "required": ["field", "message", "type"],
                "properties": {name: {"type": "string"} for name in ("field", "message", "type")},
            },
        },
    },
    "additionalProperties": True,
}

_PROBLEM = {
    "description": "Refused or failed; `code` says why.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
}

_IDEMPOTENCY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "1 to 255 printable characters; a repeat within 24 h gets the first answer and changes nothing.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of ``app``."""
    found = get_openapi(
        title=app.title,
        version=app.version,
        openapi_version="3.1.0",
        summary="The API of Portico, a self-hosted tunnel platform.",
        routes=app.routes,
    )
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Problem"] = PROBLEM_SCHEMA
    for operations in found["paths"].values():
        for method, operation in operations.items():
            _finish(method, operation)
    return found


def _finish(method: str, operation: dict[str, Any]) -> None:
    repeatable = operation.pop(REPEATABLE, False)
    responses = operation["responses"]
    if "422" in responses:  # FastAPI's own shape, which this API never sends
        responses["422"] = _PROBLEM
    if operation.get("security"):
        responses.setdefault("401", _PROBLEM)
        responses.setdefault("403", _PROBLEM)
        if repeatable and method in _WRITES:
            operation.setdefault("parameters", []).append(_IDEMPOTENCY)
    responses["default"] = _PROBLEM


def install(app: FastAPI) -> None:
    """Serve the document at /openapi.json."""

    async def serve(request: Request) -> JSONResponse:
        if app.openapi_schema is None:
            app.openapi_schema = document(app)
        return JSONResponse(app.openapi_schema)

    app.add_route("/openapi.json", serve, include_in_schema=False)
