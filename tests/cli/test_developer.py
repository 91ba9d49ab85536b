"""The developer's commands as processes, against a real small API and relay."""

from __future__ import annotations

import asyncio
import json
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.agent.api_server import KEY, TestApi, problem
from tests.agent.harness import Relay, answering, target_server
from tests.cli.commands import OK, WHO, Cli, only_line


class TestLogin:
    async def test_the_key_is_verified_and_kept_closed(self, cli: Cli, api: TestApi) -> None:
        done = await cli.run("login", "--server", api.url, "--token", "-", stdin=KEY + "\n")
        assert done.code == 0 and "a@b.c" in done.out and KEY not in done.out
        assert api.calls[-1] == ("GET", "/v1/whoami", {}, f"Bearer {KEY}")
        path = cli.folder / "credentials.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(cli.folder.stat().st_mode) == 0o700
        stored = json.loads(path.read_text())
        assert (stored["server"], stored["agent_key"]) == (api.url, KEY)
        done = await cli.run("whoami", "--json")
        assert json.loads(done.out) == {"server": api.url, **WHO}

    async def test_a_wrong_key_is_not_stored(self, cli: Cli, api: TestApi) -> None:
        api.refuse = problem(401, "auth.key_invalid", "this key is not known")
        done = await cli.run("login", "--server", api.url, "--token", KEY)
        assert done.code == 3 and "(auth.key_invalid)" in only_line(done.err)
        assert not (cli.folder / "credentials.json").exists()

    async def test_half_a_key_is_noticed_here(self, cli: Cli, api: TestApi) -> None:
        done = await cli.run("login", "--server", api.url, "--token", KEY[:-1])
        assert done.code == 3 and "not a whole agent key" in only_line(done.err)
        assert not api.calls

    async def test_by_device(self, cli: Cli, api: TestApi) -> None:
        polls: list[dict[str, Any]] = []
        started = {
            "device_code": "dc", "user_code": "ABCD-EFGH", "verification_uri": "http://x/device", "interval": 1,
            "expires_in": 600,             "verification_uri_complete": "http://x/device?code=ABCD-EFGH",
        }  # fmt: skip

        def token(body: dict[str, Any]) -> Any:
            polls.append(body)
            if len(polls) == 1:
                return problem(400, "device.authorization_pending")
            return 200, {"agent_key": KEY}

        api.routes["POST /v1/auth/device"] = lambda body: (201, started)
        api.routes["POST /v1/auth/device/token"] = token
        done = await cli.run("login", "--server", api.url)
        assert done.code == 0 and "http://x/device?code=ABCD-EFGH" in done.out and "ABCD-EFGH" in done.out
        assert polls == [{"device_code": "dc"}] * 2

    @pytest.mark.parametrize("code", ["device.denied", "device.expired"])
    async def test_by_device_in_vain(self, cli: Cli, api: TestApi, code: str) -> None:
        started = {"device_code": "dc", "user_code": "A", "verification_uri": "http://x", "interval": 1}
        api.routes["POST /v1/auth/device"] = lambda body: (201, started)
        api.routes["POST /v1/auth/device/token"] = lambda body: problem(400, code)
        done = await cli.run("login", "--server", api.url)
        assert done.code == 3 and f"({code})" in only_line(done.err)

    async def test_a_dead_api(self, cli: Cli, api: TestApi) -> None:
        await api.stop()
        done = await cli.run("login", "--server", api.url, "--token", KEY)
        assert done.code == 4 and "(api.unreachable)" in only_line(done.err)

    async def test_something_else_answers(self, cli: Cli, api: TestApi) -> None:
        api.refuse = (404, {})
        done = await cli.run("login", "--server", api.url, "--token", KEY)
        assert done.code == 1 and "(api.unexpected)" in only_line(done.err)

    async def test_logout(self, cli: Cli) -> None:
        await cli.login()
        assert (await cli.run("logout")).code == 0
        assert not (cli.folder / "credentials.json").exists()
        assert (await cli.run("logout")).code == 0
        done = await cli.run("whoami")
        assert done.code == 3 and "(auth.not_logged_in)" in only_line(done.err)

    async def test_the_environment_stands_in(self, cli: Cli, api: TestApi) -> None:
        done = await cli.run("whoami", PORTICO_SERVER=api.url, PORTICO_AGENT_KEY=KEY)
        assert done.code == 0 and "a@b.c" in done.out and not cli.folder.exists()

    async def test_a_stored_key_is_not_sent_elsewhere(self, cli: Cli, api: TestApi) -> None:
        await cli.login()
        calls = len(api.calls)
        done = await cli.run("whoami", "--server", "http://127.0.0.1:1")
        assert done.code == 3 and "is signed in to" in only_line(done.err) and len(api.calls) == calls


class TestHttp:
    async def test_online_request_and_end(self, cli: Cli, relay: Relay) -> None:
        await cli.login()
        async with target_server(answering(OK)) as port:
            process = await cli.start("http", str(port), "--name", "web", "--json")
            assert process.stdout is not None
            line = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
            assert (line["event"], line["name"], line["url"]) == ("online", "web", "http://web.localhost:7080")
            visit = await relay.connections[0].get(b"/hello").over()
            assert bytes(visit.body) == b"ok"
            line = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
            assert (line["event"], line["path"], line["status"]) == ("request", "/hello", 200)
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 30) == 0
        assert cli.api.calls[-1][0] == "DELETE"

    async def test_plain_lines_and_interrupt(self, cli: Cli, relay: Relay, tmp_path: Path) -> None:
        await cli.login()
        (tmp_path / "site").mkdir()
        process = await cli.start("http", f"file://{tmp_path}/site")
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
        assert line == f"http://made-up.localhost:7080 -> file://{tmp_path}/site\n"
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 130 and b"tunnel online name=made-up" in err

    async def test_a_dead_target_is_said_and_does_not_stop_it(self, cli: Cli, relay: Relay) -> None:
        await cli.login()
        process = await cli.start("http", "127.0.0.1:1", "--json")
        assert process.stdout is not None
        await asyncio.wait_for(process.stdout.readline(), 30)
        visit = await relay.connections[0].get().over()
        assert visit.reset is not None and visit.reset[1] == "nothing listens on 127.0.0.1:1"
        process.send_signal(signal.SIGTERM)
        _, err = await asyncio.wait_for(process.communicate(), 30)
        assert b"nothing listens on 127.0.0.1:1 yet; visitors get 502" in err

    async def test_not_logged_in(self, cli: Cli) -> None:
        done = await cli.run("http", "8000")
        assert done.code == 3 and "(auth.not_logged_in)" in only_line(done.err) and "portico login" in done.err

    async def test_a_bad_target(self, cli: Cli) -> None:
        done = await cli.run("http", "http://localhost/path")
        assert done.code == 2 and "(target.invalid)" in only_line(done.err)

    async def test_a_bad_host_header(self, cli: Cli) -> None:
        done = await cli.run("http", "8000", "--host-header", "a b")
        assert done.code == 2 and "--host-header" in only_line(done.err)

    async def test_pools_are_refused_by_name(self, cli: Cli) -> None:
        done = await cli.run("http", "8000", "--pool")
        assert done.code == 5 and "(tunnel.pool_unavailable)" in only_line(done.err)
        assert "--pool" not in (await cli.run("http", "--help")).out

    async def test_a_bad_ttl(self, cli: Cli) -> None:
        done = await cli.run("http", "8000", "--ttl", "15")
        assert done.code == 2 and "--ttl: '15' is not a duration; write it with units" in only_line(done.err)

    async def test_it_ends_itself_after_its_ttl(self, cli: Cli, relay: Relay) -> None:
        await cli.login()
        done = await cli.run("http", "8000", "--name", "web", "--ttl", "1s")
        assert done.code == 0 and done.out == "http://web.localhost:7080 -> http://localhost:8000\n"
        assert "tunnel web ended after its 1s" in done.err
        assert relay.connections[0].unbinds == [1] and cli.api.calls[-1][:2] == ("DELETE", "/v1/agent/sessions/ses_1")

    async def test_a_request_in_flight_outlives_the_ttl(self, cli: Cli, relay: Relay) -> None:
        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(2)
            writer.write(OK)

        await cli.login()
        async with target_server(slow) as port:
            process = await cli.start("http", str(port), "--name", "web", "--ttl", "1s", "--json")
            connection = await relay.bound(limit=15)
            visit = await connection.get().over()
            assert bytes(visit.body) == b"ok" and connection.unbinds == [1]
            out, _ = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0
        assert [json.loads(line)["event"] for line in out.splitlines()] == ["online", "ended", "request"]

    async def test_the_url_as_a_qr_code(self, cli: Cli, relay: Relay) -> None:
        await cli.login()
        done = await cli.run("http", "8000", "--name", "web", "--ttl", "1s", "--qr")
        assert done.out.count("\n") == 1 and sum("██" in line for line in done.err.splitlines()) > 15

    async def test_a_bad_config_key(self, cli: Cli) -> None:
        await cli.login()
        (cli.folder / "portico.toml").write_text("[agent]\nfirst_bite_timeout_seconds = 3\n")
        done = await cli.run("http", "8000")
        assert done.code == 2 and "first_bite_timeout_seconds" in only_line(done.err) and "known keys" in done.err

    async def test_a_dead_api(self, cli: Cli, api: TestApi) -> None:
        await cli.login()
        await api.stop()
        done = await cli.run("http", "8000")
        assert done.code == 4 and "(api.unreachable)" in only_line(done.err)

    async def test_a_wrong_key(self, cli: Cli, api: TestApi) -> None:
        await cli.login()
        api.refuse = problem(401, "auth.key_revoked", "the key was revoked")
        done = await cli.run("http", "8000", "--json")
        assert done.code == 3 and "(auth.key_revoked)" in only_line(done.err)

    @pytest.mark.parametrize("code", ["tunnel.subdomain_taken", "tunnel.name_taken", "tunnel.limit_reached"])
    async def test_a_taken_name(self, cli: Cli, api: TestApi, code: str) -> None:
        await cli.login()
        api.routes["POST /v1/agent/sessions"] = lambda body: problem(409, code, "taken")
        done = await cli.run("http", "8000", "--subdomain", "web")
        assert done.code == 5 and f"({code})" in only_line(done.err)

    async def test_in_use(self, cli: Cli, relay: Relay) -> None:
        await cli.login()
        relay.on_bind = lambda *_: "tunnel.in_use"
        done = await cli.run("http", "8000", "--json")
        assert done.code == 5 and "(tunnel.in_use)" in done.err.splitlines()[-1]
        assert json.loads(done.out)["event"] == "error"

    async def test_stopped_by_the_platform(self, cli: Cli, relay: Relay) -> None:
        await cli.login()
        process = await cli.start("http", "8000", "--json")
        assert process.stdout is not None
        await asyncio.wait_for(process.stdout.readline(), 30)
        relay.connections[0].unbind(1, "tunnel.stopped")
        out, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 5 and b"(tunnel.stopped)" in err
        assert json.loads(out)["code"] == "tunnel.stopped"


class TestTunnels:
    ROWS = (
        {"id": "tun_1", "name": "web", "state": "online", "url": "http://web.x", "target": "http://localhost:1",
         "agent": {"hostname": "box", "relay": "r"}},
        {"id": "tun_2", "name": "api\x1b[2J", "state": "offline", "url": "http://api.x", "target": None, "agent": None},
    )  # fmt: skip

    @pytest.fixture(autouse=True)
    async def rows(self, api: TestApi, cli: Cli) -> None:
        api.routes["GET /v1/tunnels?limit=100"] = lambda body: (200, {"data": [self.ROWS[0]], "next_cursor": "c/1"})
        api.routes["GET /v1/tunnels?limit=100&cursor=c%2F1"] = lambda body: (
            200,
            {"data": [self.ROWS[1]], "next_cursor": None},
        )
        await cli.login()

    async def test_ls(self, cli: Cli) -> None:
        done = await cli.run("ls")
        heading, first, second = done.out.splitlines()
        assert heading.split() == ["NAME", "STATE", "URL", "TARGET", "AGENT"]
        assert first.split() == ["web", "online", "http://web.x", "http://localhost:1", "box"]
        assert "\x1b" not in second
        assert json.loads((await cli.run("ls", "--json")).out) == list(self.ROWS)

    async def test_stop_and_rm(self, cli: Cli, api: TestApi) -> None:
        api.routes["POST /v1/tunnels/tun_1/stop"] = lambda body: (
            200,
            {"id": "tun_1", "name": "web", "state": "stopped"},
        )
        api.routes["DELETE /v1/tunnels/tun_1"] = lambda body: (204, {})
        assert (await cli.run("stop", "web")).out == "web stopped\n"
        assert json.loads((await cli.run("rm", "tun_1", "--json")).out) == [
            {"id": "tun_1", "name": "web", "state": "deleted"}
        ]

    @pytest.mark.parametrize("verb", ["stop", "rm"])
    async def test_unknown(self, cli: Cli, verb: str) -> None:
        done = await cli.run(verb, "nope")
        assert done.code == 5 and "(tunnel.not_found)" in only_line(done.err)
