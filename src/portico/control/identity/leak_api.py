"""``POST /v1/secret-scanning/github``: reports of leaked credentials, signed by the scanner."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from portico.control.access import Caller, anonymous
from portico.control.identity.leaks import Leaks

router = APIRouter(prefix="/secret-scanning", tags=["keys"])


class Finding(BaseModel):
    """One match as the scanner sends it; further members are passed over."""

    token: str
    type: str
    url: str | None = None
    source: str | None = None


class Verdict(BaseModel):
    """What a match was: a credential of this installation, live or ended, or none. `token_hash` is SHA-256 in hexadecimal."""

    token_hash: str
    token_type: str
    label: Literal["true_positive", "false_positive"]


def _header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": {"type": "string"}}


# The body is signed as it is: it is read here, and nothing parses it before its signature was checked.
_SHAPE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "array", "items": Finding.model_json_schema()}}},
    },
    "parameters": [
        _header("Github-Public-Key-Identifier", "Which of the scanner's keys signed."),
        _header("Github-Public-Key-Signature", "ECDSA P-256 with SHA-256 over the raw body, DER in base64."),
    ],
    "x-callers": ["anonymous"],
}


@router.post("/github", response_model=list[Verdict], openapi_extra=_SHAPE)
async def github(request: Request, who: Annotated[Caller, Depends(anonymous)]) -> Any:
    """What GitHub's secret scanning calls when it finds something that looks like a credential of ours in public. Keys are
    revoked at once, live tunnels end within two seconds, and their people are told by mail. Repeating a report is harmless."""
    leaks: Leaks = request.app.state.leaks
    headers = request.headers
    identifier = headers.get("github-public-key-identifier", "")
    signature = headers.get("github-public-key-signature", "")
    return await leaks.report(who, identifier, signature, await request.body())
