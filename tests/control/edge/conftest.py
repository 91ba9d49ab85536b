"""API processes on real sockets, over one database."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from portico.control.access import Caller
from portico.control.tunnels import relays
from tests.control.edge.live import Api, api_settings


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[Api]:
    async with Api(api_settings(database_url)).running() as running:
        yield running


@pytest.fixture
async def second_api(database_url: str) -> AsyncIterator[Api]:
    async with Api(api_settings(database_url)).running() as running:
        yield running


@pytest.fixture
async def key(api: Api) -> tuple[str, str]:
    """A relay key: its id and text."""
    async with api.app.state.db.transaction() as tx:
        return await relays.create_key(tx, Caller("operator", "installation", None), "test")


@pytest.fixture
async def edge(api: Api, key: tuple[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """A relay's client of ``api``."""
    async with api.client(key[1]) as client:
        yield client


@pytest.fixture
async def person(api: Api) -> AsyncIterator[httpx.AsyncClient]:
    """The client of a person who owns an organization."""
    from portico.kit.ids import new_id

    body = {"email": f"{new_id('x')}@example.com", "password": "tall-Giraffe-42", "organization": "Acme"}
    async with api.client() as anonymous:
        answer = await anonymous.post("/v1/auth/register", json=body)
    assert answer.status_code == 201, answer.text
    async with api.client(answer.json()["access_token"]) as client:
        yield client
