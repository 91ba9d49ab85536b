"""A head that no frame carries costs its own visitor an answer, and nobody else anything."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from portico.relay.server import Relay
from tests.relay.doubles import Client, ScriptedAgent

Visit = Callable[..., Awaitable[Client]]
LINE = b"GET / HTTP/1.1\r\nHost: web.localhost\r\n"


@pytest.mark.parametrize(
    ("head", "statuses"),
    [
        pytest.param(LINE + b"X" * 257 + b": 1\r\n\r\n", {431}, id="a long name"),
        pytest.param(LINE + b"X: 1\r\n" * 300 + b"\r\n", {431}, id="many fields"),
        pytest.param(LINE + b"X: " + b"v" * 60_000 + b"\r\n\r\n", {431}, id="a long value"),
        pytest.param(LINE + b"X: " + b"v" * 48_000 + b"\r\n\r\n", {200}, id="a value that just fits"),
        pytest.param(LINE + b"X: " + (b"v" * 15_000 + b"\r\nX: ") * 3 + b"\r\n\r\n", {200}, id="long values"),
        pytest.param(LINE + b"X: a\x01b\r\n\r\n", {400}, id="a control character in a value"),
        pytest.param(LINE + b"X: a\x7fb\r\n\r\n", {400}, id="DEL in a value"),
        pytest.param(LINE + b"X:   \t a \t \r\n\r\n", {200}, id="white space around a value"),
        pytest.param(LINE + b"X: \xff\xfe\r\n\r\n", {200}, id="octets above ASCII in a value"),
        pytest.param(
            LINE.replace(b"/ ", b"/caf\xc3\xa9 ") + b"\r\n", {200, 400}, id="octets above ASCII in the target"
        ),
        pytest.param(LINE.replace(b"/ ", b"/a\x7fb ") + b"\r\n", {200, 400}, id="DEL in the target"),
        pytest.param(LINE.replace(b"/ ", b"/a\tb ") + b"\r\n", {400}, id="HTAB in the target"),
        pytest.param(LINE.replace(b"/ ", b"/a\x0cb ") + b"\r\n", {400}, id="form feed in the target"),
        pytest.param(LINE.replace(b"/ ", b'/"<>^`{|}\\ ') + b"\r\n", {200, 400}, id="punctuation in the target"),
    ],
)
async def test_the_session_survives(agent: ScriptedAgent, visit: Visit, head: bytes, statuses: set[int]) -> None:
    client = await visit(head)
    assert (await client.response())[0] in statuses
    again = await visit(LINE + b"\r\n")
    assert (await again.response())[0] == 200
    assert not agent.session.closed


async def test_a_fault_of_the_relay_is_named_and_costs_one_request(
    relay: Relay, agent: ScriptedAgent, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(dict[bytes, Any]):
        def get(self, *_: Any) -> Any:
            raise RuntimeError("made for this test")

    with monkeypatch.context() as patch:
        patch.setattr(relay.public, "by_host", Broken())
        client = await visit(LINE + b"\r\n")
        status, fields, _ = await client.response()
        assert (status, fields[b"portico-error"]) == (502, [b"edge.internal"])
    again = await visit(LINE + b"\r\n")
    assert (await again.response())[0] == 200
    assert not agent.session.closed
