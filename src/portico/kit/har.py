"""HTTP Archive 1.2 of recorded requests, from the documents that the inspector shows.

People send archives to others, so credentials are masked unless they are asked for.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qsl, urlsplit

#: Fields whose values are credentials.
SECRET_FIELDS = frozenset(
    ("authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key", "x-auth-token", "x-csrf-token")
)
MASK = "(masked)"
CLOSING = b"]}}"


def opening(version: str) -> bytes:
    """What stands before the entries; :data:`CLOSING` ends it, commas are between them."""
    creator = json.dumps({"name": "Portico", "version": version})
    return b'{"log":{"version":"1.2","creator":' + creator.encode() + b',"pages":[],"entries":['


def entry(document: dict[str, Any], base: str, masked: bool) -> dict[str, Any]:
    """One entry from the detail document of a request; ``base`` is the URL of its tunnel, without path."""
    timing = document["timing"]
    total = timing["total_ms"]
    wait = timing["wait_ms"] if timing["wait_ms"] is not None else total
    made = {
        "startedDateTime": document["started_at"],
        "time": total,
        "request": _request(document, base, masked),
        "response": _response(document, masked),
        "cache": {},
        "timings": {"send": 0, "wait": wait, "receive": timing["receive_ms"] or 0},
        "_id": document["id"],
        "_tunnel": document["tunnel"],
    }
    if "failure" in document:
        made["_error"] = document["failure"]
    if document["remote_addr"]:
        made["_clientAddress"] = document["remote_addr"]
    return made


def _request(document: dict[str, Any], base: str, masked: bool) -> dict[str, Any]:
    request = document["request"]
    url = base.rstrip("/") + document["path"]
    body = request["body"]
    made: dict[str, Any] = {
        "method": document["method"],
        "url": url,
        "httpVersion": "HTTP/1.1",
        "cookies": [],
        "headers": _headers(request["headers"], masked),
        "queryString": [{"name": n, "value": v} for n, v in parse_qsl(_query(url), keep_blank_values=True)],
        "headersSize": -1,
        "bodySize": body["bytes"],
    }
    if body["kept"]:
        made["postData"] = {"mimeType": body["type"], **_content(body)}
    return made


def _query(url: str) -> str:
    try:
        return urlsplit(url).query
    except ValueError:
        return ""


def _response(document: dict[str, Any], masked: bool) -> dict[str, Any]:
    response = document["response"]
    made: dict[str, Any] = {
        "status": document["status"],
        "statusText": "",
        "httpVersion": "HTTP/1.1",
        "cookies": [],
        "headers": [],
        "content": {"size": 0, "mimeType": ""},
        "redirectURL": "",
        "headersSize": -1,
        "bodySize": 0,
    }
    if response is None:
        return made
    body = response["body"]
    made["statusText"] = response["reason"]
    made["headers"] = _headers(response["headers"], masked)
    made["content"] = {"size": body["bytes"], "mimeType": body["type"], **_content(body)}
    made["redirectURL"] = next((value for name, value in response["headers"] if name.lower() == "location"), "")
    made["bodySize"] = body["bytes"]
    return made


def _content(body: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if "text" in body:
        made["text"] = body["text"]
    elif "base64" in body:
        made |= {"text": body["base64"], "encoding": "base64"}
    if body["truncated"]:
        made["comment"] = f"the first {body['kept']} of {body['bytes']} bytes"
    return made


def _headers(fields: list[tuple[str, str]], masked: bool) -> list[dict[str, str]]:
    return [
        {"name": name, "value": MASK if masked and name.lower() in SECRET_FIELDS else value} for name, value in fields
    ]
