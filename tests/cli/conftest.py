"""A small real API and relay, and `portico` against them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.agent.api_server import TestApi
from tests.agent.harness import Relay
from tests.cli.commands import WHO, Cli


@pytest.fixture
async def api() -> AsyncIterator[TestApi]:
    api = await TestApi().start()
    api.routes["GET /v1/whoami"] = lambda body: (200, WHO)
    yield api
    await api.stop()


@pytest.fixture
async def relay(api: TestApi) -> AsyncIterator[Relay]:
    relay = await Relay().start()
    api.edges = [relay.url]
    yield relay
    await relay.stop()


@pytest.fixture
def cli(tmp_path: Path, api: TestApi) -> Cli:
    return Cli(tmp_path / "config", api)
