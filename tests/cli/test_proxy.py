"""Proxies on the command line: what is said, and never a password."""

from __future__ import annotations

import asyncio
import json
import signal

from tests.agent.api_server import KEY
from tests.agent.harness import Relay, answering, target_server
from tests.agent.proxies import proxy
from tests.cli.commands import OK, Cli, only_line


class TestProxyOption:
    async def test_a_tunnel_through_a_proxy(self, cli: Cli, relay: Relay) -> None:
        cli.signed_in()
        async with target_server(answering(OK)) as port, proxy() as way:
            way.users = {"me": "s3cret"}
            process = await cli.start(
                "http", str(port), "--name", "web", "--json", "--proxy", way.url_for("me", "s3cret")
            )
            assert process.stdout is not None
            first = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
            assert first["event"] == "online"
            visit = await (await relay.bound()).get().over()
            assert visit.status == 200 and visit.body == b"ok"
            assert {port for _, port in way.asked} == {relay.port, cli.api.port}
            process.send_signal(signal.SIGTERM)
            _, err = await process.communicate()
            assert b"s3cret" not in err and b"the platform is reached through http://***@127.0.0.1" in err

    async def test_a_proxy_that_is_not_there_is_named_with_exit_code_4(self, cli: Cli) -> None:
        cli.signed_in()
        done = await cli.run("whoami", PORTICO_PROXY_URL="socks5h://me:s3cret@127.0.0.1:1")
        assert done.code == 4 and not done.out
        line = only_line(done.err)
        assert "the proxy at 127.0.0.1:1 cannot be reached: Connection refused" in line
        assert "(proxy.unreachable)" in line and "s3cret" not in line

    async def test_a_mistyped_one_is_refused_without_being_shown(self, cli: Cli) -> None:
        cli.signed_in()
        done = await cli.run("ls", PORTICO_PROXY_URL="htp://me:s3cret@proxy:1")
        assert done.code == 2 and "s3cret" not in done.err
        assert "setting proxy_url: htp:// is no kind of proxy" in only_line(done.err)

    async def test_sign_in_through_a_proxy(self, cli: Cli) -> None:
        async with proxy("socks5") as way:
            done = await cli.run("login", "--server", cli.api.url, "--token", "-", "--proxy", way.url, stdin=KEY)
            assert done.code == 0, done.err
            assert way.opened == 1
