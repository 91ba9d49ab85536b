"""`portico logs` as a command: what is said, followed, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.agent.event_api import EventApi
from tests.cli.commands import WHO, Cli, only_line

UTC = {"TZ": "UTC"}


@pytest.fixture
async def api() -> AsyncIterator[EventApi]:
    api = EventApi()
    api.routes["GET /v1/whoami"] = lambda body: (200, WHO)
    api.add("web", "created", 0, subdomain="web")
    api.add("web", "online", 1, relay="relay-1", session="ses_1", agent="laptop")
    api.add("api-server", "changed", 2, target="http://localhost:9000", policy={"concurrency": 3})
    api.add(
        "web", "offline", 3, relay="relay-1", session="ses_1", agent="laptop", reason="the agent is \x1b[31mstopping"
    )
    api.add("web", "stopped", 4, state="stopped")
    await api.start()
    yield api
    await api.stop()


@pytest.fixture
def cli(tmp_path: Path, api: EventApi) -> Cli:
    made = Cli(tmp_path / "config", api)
    made.signed_in()
    return made


class TestLogs:
    async def test_everything_in_order(self, cli: Cli) -> None:
        done = await cli.run("logs", **UTC)
        assert done.code == 0 and not done.err
        assert done.out.splitlines() == [
            "2026-05-01 12:00:00  web  created   subdomain web",
            "2026-05-01 12:00:01  web  online    at relay-1 from laptop",
            '2026-05-01 12:00:02  api-server  changed   target=http://localhost:9000, policy={"concurrency": 3}',
            "2026-05-01 12:00:03  web         offline   the agent is \\x1b[31mstopping (at relay-1 from laptop)",
            "2026-05-01 12:00:04  web         stopped   by its owner",
        ]

    async def test_one_tunnel_some_lines_some_time(self, cli: Cli, api: EventApi) -> None:
        done = await cli.run("logs", "api-server", **UTC)
        assert done.code == 0 and len(done.out.splitlines()) == 1
        done = await cli.run("logs", "web", "-n", "2", **UTC)
        assert [line.split()[3] for line in done.out.splitlines()] == ["offline", "stopped"]
        done = await cli.run("logs", "--since", "2026-05-01T12:00:03Z", **UTC)
        assert len(done.out.splitlines()) == 2
        done = await cli.run("logs", "--since", "1h30m")
        assert done.code == 0 and not done.out and done.err == "Nothing happened.\n"
        assert "limit" in api.asked[-1] and "since" in api.asked[-1]

    async def test_json_is_an_object_a_line(self, cli: Cli) -> None:
        done = await cli.run("logs", "--json", "-n", "1")
        assert json.loads(only(done.out)) == {
            "id": "evt_0004", "at": "2026-05-01T12:00:04Z", "tunnel": "tun_web", "name": "web", "kind": "stopped",
            "details": {"state": "stopped"},
        }  # fmt: skip

    async def test_wrong_questions(self, cli: Cli) -> None:
        done = await cli.run("logs", "nobody")
        assert done.code == 5 and "(tunnel.not_found)" in only_line(done.err)
        done = await cli.run("logs", "--since", "yesterday")
        assert done.code == 2 and "--since 'yesterday' is no time" in only_line(done.err)

    async def test_colours_are_forced_and_forbidden(self, cli: Cli) -> None:
        done = await cli.run("logs", NO_COLOR="", CLICOLOR_FORCE="1")
        assert "\x1b[32monline" in done.out and "\x1b[31mstopping" not in done.out
        done = await cli.run("logs", NO_COLOR="1", CLICOLOR_FORCE="1")
        assert "\x1b" not in done.out


def only(text: str) -> str:
    assert text.count("\n") == 1, text
    return text


async def line_of(stream: asyncio.StreamReader | None, limit: float = 30.0) -> str:
    assert stream is not None
    return (await asyncio.wait_for(stream.readline(), limit)).decode()


FAST = {"PORTICO_LOGS_POLL_SECONDS": "0.05", "PORTICO_LOGS_RETRY_MAX_SECONDS": "0.2"}


class TestFollow:
    async def test_news_over_an_outage_until_ctrl_c(self, cli: Cli, api: EventApi) -> None:
        process = await cli.start("logs", "-f", "web", "-n", "1", **FAST, **UTC)
        assert "stopped" in await line_of(process.stdout)
        api.add("web", "started", 10)
        assert (await line_of(process.stdout)).strip() == "2026-05-01 12:00:10  web  started"
        port = api.port
        await api.stop()
        assert "trying again" in await line_of(process.stderr)
        api.add("web", "online", 11, relay="relay-2")
        await api.start(port)
        assert await line_of(process.stderr) == "portico: the API is back\n"
        assert "online    at relay-2" in await line_of(process.stdout)
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 130 and not out and not err

    async def test_it_ends_when_nobody_reads_any_more(self, cli: Cli, api: EventApi) -> None:
        read, write = os.pipe()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "portico.cli",
            "logs",
            "-f",
            "-n",
            "1",
            env=cli.env | FAST,
            stdout=write,
            stderr=asyncio.subprocess.PIPE,
        )
        os.close(write)
        loop = asyncio.get_running_loop()
        assert b"stopped" in await loop.run_in_executor(None, os.read, read, 4096)
        os.close(read)
        _, err = await asyncio.wait_for(process.communicate(), 30)
        assert not err and process.returncode == 1

    async def test_a_deleted_tunnel_ends_it(self, cli: Cli, api: EventApi) -> None:
        process = await cli.start("logs", "-f", "web", "-n", "1", **FAST)
        await line_of(process.stdout)
        api.events = [event for event in api.events if event["name"] != "web"]
        _, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 5 and "(tunnel.not_found)" in only_line(err.decode())
