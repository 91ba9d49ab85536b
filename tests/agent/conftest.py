"""The agent runs on uvloop and on plain asyncio (Windows has no uvloop): so do its tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvloop

from portico.errors import Problem
from tests.agent.api_server import TestApi
from tests.agent.harness import Relay
from tests.agent.world import World


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every test of this folder on both loops."""
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.SelectorEventLoop}


@pytest.fixture
async def world() -> AsyncIterator[World]:
    relay = await Relay().start()
    api = await TestApi([relay.url]).start()
    made = World(api, relay)
    yield made
    if hasattr(made, "task") and not made.task.done():
        made.agent.stop()
        with contextlib.suppress(Problem, TimeoutError):
            await asyncio.wait_for(made.task, 30)
    if made.http is not None:
        await made.http.aclose()
    await relay.stop()
    await api.stop()
