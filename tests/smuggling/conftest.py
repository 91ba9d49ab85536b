"""A tunnel to a target that records what reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.differential.echo import ThreadedServer
from tests.differential.exact import Way
from tests.differential.places import Tunnels
from tests.smuggling.target import Recorder
from tests.system.conftest import show_ends
from tests.system.platform import Account, Up

pytest_runtest_makereport = show_ends(__file__)


@dataclass(frozen=True)
class Ground:
    """The recording target, and the ways to it."""

    recorder: Recorder
    host: bytes
    http: Way
    https: Way


@pytest.fixture(scope="package")
def ground(up: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("smuggling")
    with ExitStack() as stack:
        account = Account(up.api_url)
        stack.callback(account.close)
        recorder = Recorder()
        target = ThreadedServer(recorder)
        stack.callback(target.stop)
        agent = Tunnels(account, folder, {"smuggling": f"127.0.0.1:{target.port}"})
        stack.callback(agent.end)
        host = f"smuggling.localhost:{up.http_port}".encode()
        https = Way("https", up.https_port, "smuggling.localhost")
        yield Ground(recorder, host, Way("http", up.http_port), https)
