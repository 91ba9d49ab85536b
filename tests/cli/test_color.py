"""Colours and screens: on a terminal that can, never in a pipe, never where somebody said no. Every command that prints."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.agent.event_api import EventApi
from tests.agent.harness import Relay
from tests.cli.commands import WHO, Cli

COLOR = re.compile(rb"\x1b\[(?:[0-9;]*;)?(?:3[0-7]|9[0-7])m")
ANSWERED = [["whoami"], ["ls"], ["logs"], ["diagnose"], ["stop", "web"], ["whoami", "--json"], ["ls", "--json"]]
REFUSED = [["http"], ["http", "8000", "--frob"], ["rm", "nobody"], ["frobnicate"], ["logs", "--since", "x"]]
LOCAL = [["--help"], ["--version"], ["logs", "--help"], ["diagnose", "--help"], ["doctor"]]
#: Those that colour what they say, on a terminal.
COLORED = [["logs"], ["diagnose"], ["rm", "nobody"], ["frobnicate"], ["doctor"]]


@pytest.fixture
async def api() -> AsyncIterator[EventApi]:
    api = EventApi()
    api.routes["GET /v1/whoami"] = lambda body: (200, WHO)
    api.routes["POST /v1/tunnels/tun_web/stop"] = lambda body: (200, {"name": "web"})
    api.add("web", "online", 1, relay="relay-1")
    await api.start()
    yield api
    await api.stop()


@pytest.fixture
def cli(tmp_path: Path, api: EventApi, relay: Relay) -> Cli:
    made = Cli(tmp_path / "config", api)
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "CLICOLOR"):
        made.env.pop(name, None)
    made.env |= {"TERM": "xterm-256color", "PORTICO_DATA_DIR": str(tmp_path / "data")}
    made.signed_in()
    return made


async def on_terminal(cli: Cli, *args: str, until: bytes = b"", **env: str) -> bytes:
    """What a terminal receives from a command; with ``until`` it is ended by Ctrl-C once that was seen."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-m", "portico.cli", *args], cli.env | env)
    seen = b""
    try:
        async with asyncio.timeout(30):
            while True:
                try:
                    part = await asyncio.to_thread(os.read, terminal, 65_536)
                except OSError:  # EIO: the command is gone
                    break
                seen += part
                if until and until in seen:
                    os.kill(pid, signal.SIGINT)
                    until = b""
    finally:
        os.close(terminal)
        await asyncio.to_thread(os.waitpid, pid, 0)
    return seen


@pytest.mark.parametrize("args", [*ANSWERED, *REFUSED, *LOCAL], ids=" ".join)
async def test_a_pipe_gets_plain_text(cli: Cli, args: list[str]) -> None:
    done = await cli.run(*args)
    assert done.out or done.err
    assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize("args", COLORED, ids=" ".join)
async def test_a_terminal_gets_colours_unless_somebody_said_no(cli: Cli, args: list[str]) -> None:
    plain, dumb, colored = await asyncio.gather(
        on_terminal(cli, *args, NO_COLOR="1"), on_terminal(cli, *args, TERM="dumb"), on_terminal(cli, *args)
    )
    assert COLOR.search(colored), colored
    assert b"\x1b" not in plain and b"\x1b" not in dumb


@pytest.mark.parametrize("name", ["FORCE_COLOR", "CLICOLOR_FORCE"])
async def test_a_pipe_gets_colours_where_they_are_forced(cli: Cli, name: str) -> None:
    done = await cli.run("diagnose", **{name: "1"})
    assert COLOR.search(done.out.encode())
    done = await cli.run("rm", "nobody", **{name: "1"})
    assert COLOR.search(done.err.encode())


class TestRunningAgent:
    async def test_a_screen_with_colours(self, cli: Cli) -> None:
        seen = await on_terminal(cli, "http", "1", "--name", "web", until=b"web.localhost")
        assert b"\x1b[?1049h" in seen and b"\x1b[?1049l" in seen, "the terminal is left as it was"
        assert COLOR.search(seen)

    async def test_no_colours_on_the_screen_when_somebody_said_no(self, cli: Cli) -> None:
        seen = await on_terminal(cli, "http", "1", "--name", "web", until=b"web.localhost", NO_COLOR="1")
        assert b"\x1b[?1049h" in seen and not COLOR.search(seen)

    async def test_a_dumb_terminal_gets_lines(self, cli: Cli) -> None:
        seen = await on_terminal(cli, "http", "1", "--name", "web", until=b"web.localhost", TERM="dumb")
        assert b"\x1b" not in seen and b"http://web.localhost:7080 -> http://localhost:1" in seen
