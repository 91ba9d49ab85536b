"""One platform, one agent with a tunnel to each target."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.differential import echo, httpbin
from tests.differential.places import Place, Tunnels
from tests.differential.verdicts import Library, Scripted, Verdicts
from tests.ports import free_port
from tests.system.conftest import show_ends
from tests.system.platform import Account, Up

pytest_runtest_makereport = show_ends(__file__)


@pytest.fixture(scope="package")
def place(up: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The targets of the differential tests, each behind a tunnel of its own name."""
    folder = tmp_path_factory.mktemp("differential")
    httpbin.program()
    with ExitStack() as stack:
        account = Account(up.api_url)
        stack.callback(account.close)
        ports = {"httpbin": free_port()}
        stack.enter_context(httpbin.running(ports["httpbin"], folder / "httpbin.log"))
        target = echo.ThreadedServer(echo.serve)
        stack.callback(target.stop)
        ports["echo"] = target.port
        verdicts = Verdicts()
        library = Library(verdicts)
        stack.callback(library.stop)
        scripted = echo.ThreadedServer(Scripted(verdicts))
        stack.callback(scripted.stop)
        ports |= {"library": library.port, "scripted": scripted.port}
        agent = Tunnels(account, folder, {name: f"127.0.0.1:{port}" for name, port in ports.items()})
        stack.callback(agent.end)
        yield Place(up, ports, verdicts)
