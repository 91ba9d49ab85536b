"""Schemathesis over the whole API: no input is a 500, and every answer is one that the OpenAPI document declares.

The API listens on a real socket; Schemathesis is a process of its own that reads `/openapi.json` and walks every operation with
legal and illegal input, once with each credential. What ends the credential in use (signing out, deleting oneself) runs in a
walk of its own, so that the other walks do not spend themselves on 401s.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from portico.control.access import Caller
from portico.control.identity.keys import issue
from portico.control.tunnels import relays
from tests.control.conftest import PASSWORD, heartbeat_body
from tests.control.edge.live import Api, api_settings

#: Of each operation beside those that cover every parameter; `make soak` makes more.
_EXAMPLES = int(os.environ.get("API_EXAMPLES", "1"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 * _EXAMPLES)]
_CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,unsupported_method,allow_header_conformance"
)
#: Streams do not end by themselves.
_ENDLESS = "^/v1/edge/stream$"
#: Ends the credential that calls it.
_LAST = "^/v1/auth/(logout|sessions)"
_EDGE, _ADMIN, _AGENT, _AUTH = "^/v1/edge/[^s]", "^/v1/admin/", "^/v1/agent/", "^/v1/auth/"


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[Api]:
    settings = api_settings(database_url, sign_in_failures_per_address=100_000, device_codes_per_address=100_000)
    async with Api(settings).running() as running:
        yield running


async def _post(api: Api, path: str, credential: str | None, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {credential}"} if credential else {}
    async with httpx.AsyncClient(base_url=api.url, trust_env=False, headers=headers) as client:
        answer = await client.post(path, json=body)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())


async def _owner(api: Api) -> str:
    """The access token of a new account."""
    body = {"email": f"{secrets.token_hex(8)}@example.com", "password": PASSWORD, "organization": "Acme"}
    return str((await _post(api, "/v1/auth/register", None, body))["access_token"])


async def _installation_keys(api: Api) -> tuple[str, str]:
    """The key of an operator and of a relay."""
    async with api.app.state.db.transaction() as tx:
        operator = await issue(tx, api.app.state.clock.wall(), None, None, "operator", "walk", [])
        _, relay = await relays.create_key(tx, Caller("operator", "installation", None), "walk")
    return operator.key, relay


async def _heartbeats(api: Api, relay_key: str) -> None:
    async with httpx.AsyncClient(
        base_url=api.url, trust_env=False, headers={"Authorization": f"Bearer {relay_key}"}
    ) as client:
        while True:
            (await client.post("/v1/edge/heartbeat", json=heartbeat_body("walk"))).raise_for_status()
            await asyncio.sleep(0.5)


async def _walk(api: Api, credential: str | None, folder: Path, *selection: str) -> str:
    """Run Schemathesis to its end; returns what it printed."""
    command = [
        str(Path(sys.executable).with_name("st")), "run", f"{api.url}/openapi.json", "--checks", _CHECKS,
        "--max-examples", str(_EXAMPLES), "--phases", "examples,coverage,fuzzing", "--seed", "1", "--no-color",
        "--suppress-health-check", "all", "--request-timeout", "20", "--continue-on-failure", "--warnings", "off", *selection,
    ]  # fmt: skip
    if credential is not None:
        command += ["-H", f"Authorization: Bearer {credential}"]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    text = output.decode()
    assert process.returncode == 0, text[-20_000:]
    return text


async def test_a_person(api: Api, tmp_path: Path) -> None:
    others = f"{_ENDLESS}|{_LAST}|{_EDGE}|{_ADMIN}|{_AGENT}"
    said = await _walk(api, await _owner(api), tmp_path, "--exclude-path-regex", others)
    assert "generated" in said
    await _walk(api, await _owner(api), tmp_path, "--include-path-regex", _LAST)


async def test_machines_and_nobody(api: Api, tmp_path: Path) -> None:
    agent = await _post(api, "/v1/api-keys", await _owner(api), {"kind": "agent", "name": "walk"})
    operator, relay = await _installation_keys(api)
    beat = asyncio.create_task(_heartbeats(api, relay))  # agent sessions need a relay that is there
    walks = [(agent["key"], _AGENT), (operator, _ADMIN), (relay, _EDGE), (None, _AUTH)]
    async with httpx.AsyncClient(base_url=api.url, trust_env=False) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    for number, (credential, pattern) in enumerate(walks):
        if any(re.match(pattern, path) for path in paths):
            folder = tmp_path / str(number)
            folder.mkdir()
            said = await _walk(api, credential, folder, "--include-path-regex", pattern)
            assert "generated" in said, pattern
    assert not beat.done(), beat
    beat.cancel()
