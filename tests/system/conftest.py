"""Fixtures of the system tests: an account and a folder for the logs of each module (`up` is the run's own, see above)."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.system.platform import CHILDREN, ENDED, Account, Agent, Up
from tests.system.targets import listener, port_of


def show_ends(conftest: str) -> Callable[[pytest.Item, pytest.CallInfo[Any]], Iterator[Any]]:
    """A hook for the folder of ``conftest``: a failed test shows what the processes said last."""
    folder = Path(conftest).parent

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[Any]:
        report = yield
        if report.failed and folder in item.path.parents:
            for child in [*ENDED, *CHILDREN]:
                report.sections.append((f"end of {child.name}'s output", child.tail()))
        if call.when == "teardown":
            ENDED.clear()
        return report

    return pytest_runtest_makereport


pytest_runtest_makereport = show_ends(__file__)


@pytest.fixture(scope="module")
def account(up: Up) -> Iterator[Account]:
    """An organization for this module."""
    made = Account(up.api_url)
    yield made
    made.close()


@pytest.fixture(scope="module")
def target() -> Iterator[socket.socket]:
    """The listening socket of this module's local app."""
    with listener() as sock:
        yield sock


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of this module write."""
    return tmp_path_factory.mktemp("agents")


@pytest.fixture(scope="module")
def agent(
    up: Up, account: Account, target: socket.socket, folder: Path, request: pytest.FixtureRequest
) -> Iterator[Agent]:
    """An agent in front of ``target``, for the whole module; its URL's host is :func:`host`."""
    with ExitStack() as stack:
        name = request.module.__name__.rsplit("_", 1)[1]
        child = Agent(account, folder, port_of(target), name)
        stack.callback(child.end)
        yield child.online()


@pytest.fixture(scope="module")
def host(agent: Agent) -> str:
    """The public host name of the module's tunnel."""
    url = next(event["url"] for event in agent.events() if event["event"] == "online")
    return str(url.split("//")[1].split(":")[0])


@pytest.fixture
def started() -> Iterator[ExitStack]:
    """What a test starts and must be ended: ``started.callback(child.end)``."""
    with ExitStack() as stack:
        yield stack
