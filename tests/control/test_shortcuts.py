"""A shortcut answers as the route of the same address does, to whoever asks whatever."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from portico.control.domains import ingest_api
from portico.control.shortcuts import Shortcut, Shortcuts
from portico.control.tunnels import api as tunnels_api
from tests.control.conftest import Account

OPEN = "/v1/agent/sessions"
BODY: dict[str, Any] = {
    "agent_id": "agt-0123456789",
    "hostname": "laptop",
    "version": "1",
    "tunnels": [{"protocol": "http", "name": "web"}],
}
JSON = {"Content-Type": "application/json"}

#: Path, headers, body; each is asked through the shortcut and past it.
ASKED: list[tuple[str, dict[str, str], bytes]] = [
    (OPEN, JSON, json.dumps(BODY).encode()),
    (OPEN, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(BODY).encode()),
    (OPEN, {}, json.dumps(BODY).encode()),
    (OPEN, {"Content-Type": "text/plain"}, json.dumps(BODY).encode()),
    (OPEN, JSON | {"Idempotency-Key": "one"}, json.dumps(BODY).encode()),
    (OPEN, JSON | {"Idempotency-Key": "no key \x7f"}, json.dumps(BODY).encode()),
    (OPEN, JSON, b""),
    (OPEN, JSON, b"{"),
    (OPEN, JSON, b"[]"),
    (OPEN, JSON, b"null"),
    (OPEN, JSON, b"\xff\xfe"),
    (OPEN, JSON, b"[" * 100_000),
    (OPEN, JSON, json.dumps(BODY | {"agent_id": "short"}).encode()),
    (OPEN, JSON, json.dumps(BODY | {"hostname": "a\0b"}).encode()),
    (OPEN, JSON, json.dumps(BODY | {"tunnels": [{"protocol": "gopher"}]}).encode()),
    (OPEN, JSON, json.dumps(BODY | {"tunnels": [{"protocol": "tcp", "subdomain": "web"}]}).encode()),
    (f"{OPEN}/ses_unknown/refresh", JSON, b'{"agent_id":"agt-0123456789"}'),
    (f"{OPEN}/ses_unknown/refresh", JSON, b'{"agent_id":1}'),
    (f"{OPEN}/{'a' * 65}/refresh", JSON, b'{"agent_id":"agt-0123456789"}'),
    (f"{OPEN}/a%20b/refresh", JSON, b'{"agent_id":"agt-0123456789"}'),
    (f"{OPEN}/", JSON, json.dumps(BODY).encode()),
    ("/v1/domains/cert-events", JSON, b"{}"),
]


def told(answer: httpx.Response) -> tuple[Any, ...]:
    """What must not differ: status, headers less what counts and names requests, and the problem."""
    loose = {"x-request-id", "ratelimit", "content-length"}
    headers = {name: value for name, value in answer.headers.items() if name not in loose}
    document = answer.json()
    if answer.status_code < 300:
        return answer.status_code, headers, sorted(document)
    document.pop("request_id")
    return answer.status_code, headers, document


@pytest.fixture
def past(app: Any) -> Callable[[bool], None]:
    """``past(True)``: from now on every request goes to its route."""
    ours = app.state.shortcuts

    def switch(off: bool) -> None:
        app.state.shortcuts = Shortcuts() if off else ours

    return switch


@pytest.mark.parametrize("number", range(len(ASKED)))
async def test_a_shortcut_and_its_route_answer_alike(
    number: int, owner: Account, relay: Any, past: Callable[[bool], None], connect: Callable[..., httpx.AsyncClient]
) -> None:
    path, headers, content = ASKED[number]
    for credential in ((await owner.key())["key"], (await owner.key("api"))["key"], owner.access, "tnl_no", None):
        client = connect(credential)
        answers = []
        for off in (False, True):
            past(off)
            answers.append(told(await client.post(path, headers=headers, content=content)))
        past(False)
        assert answers[0][0] < 500
        if "Idempotency-Key" in headers and answers[0][0] == 201:
            answers[1][1].pop("idempotency-replayed")
        assert answers[0] == answers[1]


def test_every_address_of_a_shortcut_is_one_of_a_route(app: Any) -> None:
    documented = {path for path, methods in app.openapi()["paths"].items() if "post" in methods}
    for found in (*tunnels_api.SHORTCUTS, *ingest_api.SHORTCUTS):
        plain = found.path.replace("([A-Za-z0-9_-]{1,64})", "{session_id}")
        assert plain in documented


async def test_a_body_that_a_shortcut_read_and_left_is_whole_for_the_route(
    owner: Account, app: Any, relay: Any
) -> None:
    seen: list[bytes] = []

    async def leave(request: Any) -> None:
        seen.append(await request.body())

    app.state.shortcuts = Shortcuts([Shortcut(OPEN, leave)])  # type: ignore[list-item]
    key = (await owner.key())["key"]
    answer = await owner.client.post(OPEN, json=BODY, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 201 and json.loads(seen[0]) == BODY
