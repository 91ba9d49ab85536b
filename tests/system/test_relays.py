"""Two relays behind one address: every request finds its tunnel, and the death of either is not noticed for long."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from portico.embedded.folders import temp_home
from tests.system.platform import Account, Agent, Child, Up

pytestmark = [pytest.mark.system, pytest.mark.realtime]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    home = temp_home("portico-relays-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        yield Up(home, tmp_path_factory.mktemp("up"), stack, relays=2)


def ask(up: Up, host: str) -> tuple[int, str]:
    """Status and edge code of one request on a connection of its own, so that either relay may get it."""
    try:
        answer = httpx.get(
            f"http://127.0.0.1:{up.http_port}/app.txt", headers={"Host": host}, timeout=5, trust_env=False
        )
    except httpx.HTTPError as err:
        return 0, type(err).__name__
    return answer.status_code, answer.headers.get("Portico-Error", "")


async def test_either_relay_serves_and_either_may_die(up: Up, folder: Path, started: ExitStack) -> None:
    (folder / "www").mkdir()
    (folder / "www" / "app.txt").write_text("hello")
    account = Account(up.api_url)
    started.callback(account.close)
    agent = FolderAgent(account, folder, folder / "www")
    started.callback(agent.end)
    agent.online()
    host = "pair.localhost"
    assert Counter(ask(up, host) for _ in range(40)) == {(200, ""): 40}
    for name in ("relay-1", "relay-2"):
        old = up.pid(name)
        os.kill(old, signal.SIGKILL)
        killed = time.monotonic()
        late: Counter[tuple[int, str]] = Counter()
        while (since := time.monotonic() - killed) < 3:
            answer = ask(up, host)
            if since > 1:
                late[answer] += 1
        assert set(late) == {(200, "")}, f"after the death of {name}: {late}"
        up.child.wait_for(lambda old=old, name=name: up.pid(name) != old, 30, "restart of the relay")
        time.sleep(1)


class FolderAgent(Agent):
    """``portico http file:///…``: no app of the test's own is needed."""

    def __init__(self, where: Account, folder: Path, served: Path) -> None:
        own = {"server": where.api_url, "agent_key": where.agent_key, "config_dir": folder / "config"}
        Child.__init__(self, "agent-pair", ["http", f"file://{served}", "--name", "pair", "--json"], folder, own)
