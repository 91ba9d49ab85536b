"""Every exit code of docs/reference/exit-codes.md, from a process that really ends with it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable

import pytest

from portico.cli import output
from portico.errors import Problem, catalogue
from tests.agent.api_server import problem
from tests.agent.harness import Relay
from tests.cli.commands import Cli

Way = Callable[[Cli, Relay], Awaitable[int]]


async def done(cli: Cli, relay: Relay) -> int:
    return (await cli.run("whoami")).code


async def failed(cli: Cli, relay: Relay) -> int:
    cli.api.refuse = (200, {"hello": "world"})
    return (await cli.run("http", "8000")).code


async def wrong_usage(cli: Cli, relay: Relay) -> int:
    return (await cli.run("http", "8000", "--frob")).code


async def credential_refused(cli: Cli, relay: Relay) -> int:
    cli.api.refuse = problem(401, "auth.key_revoked")
    return (await cli.run("http", "8000")).code


async def not_reachable(cli: Cli, relay: Relay) -> int:
    await cli.api.stop()
    return (await cli.run("http", "8000")).code


async def tunnel_refused(cli: Cli, relay: Relay) -> int:
    relay.on_bind = lambda *_: "tunnel.in_use"
    return (await cli.run("http", "8000")).code


async def interrupted(cli: Cli, relay: Relay) -> int:
    process = await cli.start("http", "8000")
    await relay.bound(limit=15)
    assert process.stdout is not None
    await process.stdout.readline()
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    return process.returncode


WAYS: dict[int, Way] = {
    output.OK: done,
    output.FAILED: failed,
    output.USAGE: wrong_usage,
    output.REFUSED: credential_refused,
    output.UNREACHABLE: not_reachable,
    output.TUNNEL_REFUSED: tunnel_refused,
    output.INTERRUPTED: interrupted,
}


def test_each_has_a_way_here() -> None:
    assert WAYS.keys() == output.EXIT_CODES.keys()


@pytest.mark.parametrize(("code", "way"), WAYS.items(), ids=[way.__name__ for way in WAYS.values()])
async def test_it_is_what_a_script_sees(code: int, way: Way, cli: Cli, relay: Relay) -> None:
    await cli.login()
    assert await way(cli, relay) == code


def test_every_error_code_has_one() -> None:
    assert {output.exit_code(Problem(code)) for code in catalogue()} == set(output.EXIT_CODES) - {
        output.OK, output.INTERRUPTED,
    }  # fmt: skip
    assert output.EXIT_BY_CODE.keys() <= catalogue().keys()
    assert output.EXIT_BY_AREA.keys() <= {code.split(".")[0] for code in catalogue()}


async def test_the_help_names_them(cli: Cli) -> None:
    told = " ".join((await cli.run("--help")).out.split())
    for code, (word, _) in output.EXIT_CODES.items():
        assert f"{code} {word}" in told
