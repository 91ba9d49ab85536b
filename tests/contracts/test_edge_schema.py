"""contracts/edge-stream.schema.json is a sound schema, and what both sides send fits it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from portico.control import changes
from portico.control.edge.hub import delta_line, heartbeat_line
from portico.control.edge.state import EdgeState
from portico.kit.jwt import SigningKey
from tests.control.conftest import heartbeat_body

SCHEMA = json.loads((Path(__file__).parents[2] / "contracts" / "edge-stream.schema.json").read_text())
KEY = SigningKey.generate().public_jwk()
CHALLENGE = {
    "id": "chl_1", "type": "http-01", "host": "www.example.com", "token": "abc", "authorization": "abc.def", "until": 5,
}  # fmt: skip
TUNNEL = {"id": "tun_1", "organization": "org_1", "hosts": ["a.localhost"], "state": "active", "generation": 1}


def check(value: Any, part: str = "line") -> None:
    jsonschema.Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{part}"}).validate(value)


def test_the_schema_is_sound() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


async def test_every_kind_of_line() -> None:
    ended = [{"session": "ses_1", "code": "session.revoked", "until": 2_000_000_000}]
    state = EdgeState(3, 1.5, [KEY], [TUNNEL], ended, challenges=[CHALLENGE])
    check(json.loads(await state.line()))
    check(json.loads(heartbeat_line(3, 1.5).text))
    check(json.loads(heartbeat_line(3, 1.5, await state.digest()).text))
    every = [
        changes.tunnel(TUNNEL),
        changes.tunnel_removed("tun_1", "tunnel.deleted"),
        changes.session_ended("ses_1", "session.ended", 5),
        changes.keys([KEY]),
        changes.challenge(CHALLENGE),
        changes.challenge_removed("chl_1"),
    ]
    check(json.loads(delta_line(changes.Entry(4, json.dumps(every))).text))


@pytest.mark.parametrize(
    "bad",
    [
        {"type": "delta", "version": 1, "changes": []},
        {"type": "delta", "version": -1, "changes": [changes.keys([])]},
        {"type": "delta", "version": 1, "changes": [{"kind": "tunnel", "tunnel": {**TUNNEL, "state": "gone"}}]},
        {"type": "delta", "version": 1, "changes": [changes.keys([{**KEY, "crv": "P-256"}])]},
        {"type": "heartbeat", "version": 1},
        {"type": "snapshot", "version": 1, "time": 1, "hash": "x", "state": {"keys": [], "tunnels": [], "ended": []}},
    ],
)
def test_what_is_not_a_line(bad: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(bad)


def test_what_relays_send() -> None:
    bound = [{"tunnel": "tun_1", "session": "ses_1", "generation": 1}]
    check(heartbeat_body(bound=bound), "heartbeat")
    rows = [{"tunnel": "tun_1", "organization": "org_1", "requests": 1}]
    check({"relay": "r", "boot": "b", "batches": [{"seq": 1, "from": 1, "to": 2.5, "rows": rows}]}, "usage")
