"""A desk at which certificates are had for real, for the modules that ask for ``at``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from portico.kit.db import Database
from portico.relay.server import Relay
from tests import pebble
from tests.control.domains.issuing import Desk, desk, relay
from tests.relay.doubles import port


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("orders")


@pytest.fixture
async def edge_relay(folder: Path) -> AsyncIterator[Relay]:
    async with relay(folder) as made:
        yield made


@pytest.fixture
def ca(edge_relay: Relay, tmp_path: Path) -> Iterator[pebble.Pebble]:
    with pebble.running(tmp_path, port(edge_relay, 1), port(edge_relay, 2)) as running:
        yield running


@pytest.fixture
async def at(db: Database, ca: pebble.Pebble, edge_relay: Relay, folder: Path) -> AsyncIterator[Desk]:
    async with desk(db, ca, edge_relay, folder) as made:
        yield made
