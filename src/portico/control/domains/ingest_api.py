"""``POST /v1/domains/cert-events``: what happened to certificates, signed by who saw it."""

from __future__ import annotations

import json
from typing import Any, Final, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from portico.control.access import anonymous
from portico.control.domains.event_body import CertEvent
from portico.control.domains.ingest import Ingest, Received
from portico.control.shortcuts import Shortcut
from portico.errors import Problem
from portico.kit import http_signatures
from portico.kit.http_signatures import Target

router = APIRouter(prefix="/domains", tags=["domains"])


class Taken(BaseModel):
    """What became of the event. `duplicate`: this very event was here before; `unmapped`: its class and action mean nothing
    here, so it changes nothing."""

    event: str
    status: Literal["accepted", "duplicate", "unmapped"]


def _header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": {"type": "string"}}


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its definitions where they are used: what is not a model of FastAPI's has no place among the components."""
    parts = schema.pop("$defs", {})

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(each) for each in value]
        if not isinstance(value, dict):
            return value
        named = parts[value["$ref"].rpartition("/")[2]] if "$ref" in value else {}
        return {name: placed(each) for name, each in {**named, **value}.items() if name != "$ref"}

    found: dict[str, Any] = placed(schema)
    return found


# The body is signed as it is: it is read here, and nothing parses it before its signature was checked.
_SHAPE: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _inline(CertEvent.model_json_schema())}},
    },
    "parameters": [
        _header("X-Cert-Source", "The source, `src_…`; the body's `sourceId` is the same."),
        _header("Webhook-Id", "The event's id, the same in every attempt; the body's `eventId` is the same."),
        _header("Webhook-Timestamp", "Standard Webhooks: seconds since 1970 of this attempt."),
        _header("Webhook-Signature", "Standard Webhooks: `v1,` and base64 HMAC-SHA256, or `v1a,` and base64 Ed25519."),
        _header("X-Cert-Cluster", "The cluster; needed with X-Cert-Signature."),
        _header("X-Cert-Signature", "The compact form, `t=…,v1=…`, instead of Webhook-Signature."),
        _header("Signature-Input", "RFC 9421, instead of both, with Signature and Content-Digest."),
        _header("Signature", "RFC 9421."),
        _header("Content-Digest", "RFC 9530."),
    ],
    "x-callers": ["anonymous"],
}


@router.api_route("/cert-events", methods=["GET", "PUT", "PATCH", "DELETE"], include_in_schema=False)
async def other_methods() -> None:
    """This address is no domain, as the one beside it with a parameter would take it for."""
    raise Problem("request.method_not_allowed", headers={"Allow": "POST"})


# Without the usual ceremony, as this is asked a thousand times a second: nothing is solved, and the answer is not validated.
other_methods.refuses = True  # type: ignore[attr-defined]


@router.post(
    "/cert-events", response_model=Taken, status_code=202, openapi_extra=_SHAPE, responses={200: {"model": Taken}}
)
async def receive(request: Request) -> Response:
    """Take an event in. `202`: it is stored, and applied in a moment; `200`: it was stored before. See
    docs/certificate-lifecycle.md for the body, and for the three ways to sign it."""
    ingest: Ingest = request.app.state.cert_ingest
    who = anonymous(request)
    fields: dict[str, str] = {}
    repeated = set()
    for raw, value in request.scope["headers"]:
        name = raw.decode("latin-1")
        if name in fields:
            repeated.add(name)
        fields[name] = value.decode("latin-1")
    host, path = http_signatures.authority(fields.get("host", "")), request.scope["raw_path"].decode("latin-1")
    received = Received(Target("POST", host, path), fields, frozenset(repeated), await request.body(), who.address)
    taken = await ingest.receive(who, received)
    document = json.dumps({"event": taken.event, "status": taken.status})
    return Response(document, 200 if taken.status == "duplicate" else 202, media_type="application/json")


SHORTCUTS = (Shortcut("/v1/domains/cert-events", receive),)
