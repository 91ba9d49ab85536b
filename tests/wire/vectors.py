"""Reads contracts/wire-vectors.json and brings a session into the states that its vectors start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from portico.wire import frames as f
from portico.wire.session import Session
from tests.wire.recorder import Recorder

DOCUMENT: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "contracts" / "wire-vectors.json").read_text(encoding="utf-8")
)
AGENT_HELLO = f.json_frame(f.HELLO, 0, {"versions": [1], "agent": "portico/0.1.0", "connect": 1})
RELAY_HELLO = f.json_frame(
    f.HELLO, 0, {"version": 1, "relay": "r", "session": "s", "ping_interval_ms": 5000, "ping_timeout_ms": 5000}
)


def octets(text: str) -> bytes:
    """The bytes of a vector: hex with white space, `XX*N` for repetition."""
    parts = (token.partition("*") for token in text.split())
    return b"".join(bytes.fromhex(unit) * int(count or "1") for unit, _, count in parts)


def session_in(state: str, to: str, **limits: int) -> tuple[Session, Recorder]:
    """A session of side `to` in a state that the vectors name, with what it called so far cleared."""
    recorder = Recorder()
    session = Session(recorder, relay=to == "relay", **limits)
    if state == "new":
        return session, recorder
    session.receive(AGENT_HELLO if to == "relay" else RELAY_HELLO)
    if to == "relay" and state in ("request", "answered"):
        recorder.streams[1] = session.open_request(1, [b"POST", b"/", b"Host", b"a"], 0, recorder.sink(1))
    elif to == "relay" and state == "tcp":
        recorder.streams[1] = session.open_tcp(1, {"peer": "p", "local": "l"}, recorder.sink(1))
    elif state in ("request", "answered"):
        session.receive(f.frame(f.REQUEST, 1, f.encode_request(1, [b"POST", b"/", b"Host", b"a"])))
    if state == "answered":
        session.receive(f.frame(f.RESPONSE, 1, f.encode_response(200, [b"OK"])))
    session.take()
    recorder.events.clear()
    return session, recorder
