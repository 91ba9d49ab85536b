"""`portico start` and `config check` as processes, against a real small API and relay."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.agent.api_server import KEY, TestApi, problem
from tests.agent.harness import Relay, answering, target_server
from tests.agent.proxies import proxy
from tests.cli.commands import OK, Cli, only_line

HEAD = "version: 1\ntunnels:\n"


def response(text: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)


class Started:
    """A running `portico start --json`, its events and its log."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []
        self.log = ""
        self._news = asyncio.Event()
        self._readers = [asyncio.create_task(self._read_events()), asyncio.create_task(self._read_log())]

    async def _read_events(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.events.append(json.loads(line))
            self._news.set()

    async def _read_log(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.log += line.decode()
            self._news.set()

    async def until(self, what: Callable[[], Any], limit: float = 30.0) -> None:
        async with asyncio.timeout(limit):
            while not what():
                assert self.process.returncode is None, (self.events, self.log)
                self._news.clear()
                try:
                    await asyncio.wait_for(self._news.wait(), 0.1)
                except TimeoutError:
                    pass

    def of(self, name: str) -> list[str]:
        """The events of one tunnel."""
        return [event["event"] for event in self.events if event.get("name") == name]

    async def online(self, *names: str) -> Started:
        await self.until(lambda: all("online" in self.of(name) for name in names))
        return self

    async def end(self, signum: int | None = signal.SIGTERM) -> int:
        if signum is not None and self.process.returncode is None:
            self.process.send_signal(signum)
        code = await asyncio.wait_for(self.process.wait(), 30)
        await asyncio.gather(*self._readers)
        return code


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "portico.yml"


@pytest.fixture
async def start(cli: Cli, relay: Relay, file: Path) -> AsyncIterator[Callable[..., Any]]:
    """Start with these arguments (`--all --json`), after a sign-in."""
    await cli.login()
    running: list[Started] = []

    async def run(*args: str, **env: str) -> Started:
        started = Started(await cli.start("start", "--config", str(file), *(args or ("--all", "--json")), **env))
        running.append(started)
        return started

    yield run
    for started in running:
        await started.end(signal.SIGKILL)


async def ask(relay: Relay, bind: int) -> bytes:
    visit = await relay.connections[-1].request([b"GET", b"/", b"Host", b"x"], bind=bind).over()
    return bytes(visit.body)


class TestStart:
    async def test_all_in_one_session(self, start: Any, file: Path, relay: Relay, api: TestApi) -> None:
        async with target_server(answering(response(b"one"))) as one, target_server(answering(response(b"two"))) as two:
            file.write_text(f"{HEAD}  web: {{addr: {one}}}\n  api: {{addr: {two}, subdomain: shop}}\n")
            running = await (await start()).online("web", "api")
            assert [event["event"] for event in running.events] == ["online", "online"]
            assert [await ask(relay, 1), await ask(relay, 2)] == [b"one", b"two"]
            assert len(relay.connections) == 1 and api.count("POST /v1/agent/sessions") == 1
            opened = next(body for _, path, body, _ in api.calls if path == "/v1/agent/sessions")
            assert [(s["name"], s.get("subdomain")) for s in opened["tunnels"]] == [("web", None), ("api", "shop")]
            assert await running.end() == 0

    async def test_some_by_name(self, start: Any, file: Path, relay: Relay) -> None:
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n  b: {{addr: 2}}\n  c: {{addr: 3}}\n")
        running = await (await start("c", "a", "--json")).online("a", "c")
        assert running.of("b") == [] and [grant.split(":")[0] for _, grant in relay.connections[0].grants] == ["c", "a"]

    async def test_the_file_here_or_in_the_config_folder(
        self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        cli.folder.mkdir()
        done = await cli.run("start", "--all")
        assert done.code == 2 and "there is no portico.yml here" in only_line(done.err)
        (cli.folder / "portico.yml").write_text(f"{HEAD}  folder: {{addr: 1}}\n")
        assert "Tunnels: folder" in (await cli.run("config", "check")).out
        (tmp_path / "portico.yaml").write_text(f"{HEAD}  here: {{addr: 1}}\n")
        assert "Tunnels: here" in (await cli.run("config", "check")).out

    @pytest.mark.parametrize(
        ("args", "says"),
        [
            ((), "say which tunnels to start. Give --all, or names; the file has: a, b."),
            (("--all", "a"), "give names or --all, not both"),
            (("nope",), "the file has no tunnel 'nope'. It has: a, b."),
        ],
    )
    async def test_which_tunnels(self, cli: Cli, file: Path, args: tuple[str, ...], says: str) -> None:
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n  b: {{addr: 2}}\n")
        done = await cli.run("start", "--config", str(file), *args)
        assert done.code == 2 and says in only_line(done.err)

    async def test_a_file_with_faults(self, cli: Cli, file: Path) -> None:
        file.write_text(f"{HEAD}  a: {{addr: 99999}}\n")
        done = await cli.run("start", "--config", str(file), "--all")
        assert done.code == 2 and f"{file}:3:13: addr:" in done.err and done.err.endswith("(config.invalid)\n")

    async def test_a_refused_tunnel_does_not_end_the_others(self, start: Any, file: Path, api: TestApi) -> None:
        api.refuse_names["b"] = problem(409, "tunnel.subdomain_taken", "taken")
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n  b: {{addr: 2}}\n")
        running = await (await start()).online("a")
        await running.until(lambda: running.of("b") == ["error"])
        assert next(e for e in running.events if e["name"] == "b")["code"] == "tunnel.subdomain_taken"

    async def test_it_ends_when_all_were_refused(self, start: Any, file: Path, api: TestApi) -> None:
        for name in ("a", "b"):
            api.refuse_names[name] = problem(409, "tunnel.subdomain_taken", "taken")
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n  b: {{addr: 2}}\n")
        running = await start()
        assert await running.end(None) == 5 and "(tunnel.subdomain_taken)" in running.log

    async def test_the_key_that_the_file_refers_to(self, cli: Cli, file: Path, relay: Relay, api: TestApi) -> None:
        file.write_text(f"server: {api.url}\nagent_key_env: MY_KEY\n{HEAD}  a: {{addr: 1}}\n")
        done = await cli.run("start", "--config", str(file), "--all")
        assert done.code == 2 and "the environment variable MY_KEY is not set" in only_line(done.err)
        running = Started(await cli.start("start", "--config", str(file), "--all", "--json", MY_KEY=KEY))
        await running.online("a")
        assert await running.end() == 0
        file.write_text(f"server: {api.url}\nagent_key_file: key.txt\n{HEAD}  a: {{addr: 1}}\n")
        done = await cli.run("start", "--config", str(file), "--all")
        assert done.code == 2 and "agent_key_file" in only_line(done.err)
        key = file.parent / "key.txt"
        key.write_text(KEY + "\n")
        key.chmod(0o644)
        done = await cli.run("start", "--config", str(file), "--all")
        assert done.code == 2 and "can be read by every user" in only_line(done.err) and "chmod 600" in done.err
        key.chmod(0o600)
        running = Started(await cli.start("start", "--config", str(file), "--all", "--json"))
        await running.online("a")
        assert await running.end() == 0 and api.calls[-1][3] == f"Bearer {KEY}"

    async def test_the_environment_goes_before_the_file(self, cli: Cli, file: Path, relay: Relay, api: TestApi) -> None:
        file.write_text(f"server: http://127.0.0.1:1\nregion: eu\n{HEAD}  a: {{addr: 1}}\n")
        env = {"PORTICO_SERVER": api.url, "PORTICO_AGENT_KEY": KEY}
        running = Started(await cli.start("start", "--config", str(file), "--all", "--json", **env))
        await running.online("a")
        assert await running.end() == 0
        assert next(body for _, path, body, _ in api.calls if path == "/v1/agent/sessions")["region"] == "eu"

    async def test_the_way_to_the_platform_that_the_file_names(
        self, cli: Cli, file: Path, relay: Relay, api: TestApi
    ) -> None:
        await cli.login()
        async with proxy() as way:
            file.write_text(f"proxy_url: {way.url}\n{HEAD}  a: {{addr: 1}}\n")
            running = Started(await cli.start("start", "--config", str(file), "--all", "--json"))
            await running.online("a")
            assert {port for _, port in way.asked} == {relay.port, api.port}
            assert await running.end() == 0


class TestFileChanges:
    async def test_tunnels_come_go_and_move(self, start: Any, file: Path, relay: Relay, api: TestApi) -> None:
        async with target_server(answering(response(b"one"))) as one, target_server(answering(response(b"two"))) as two:
            file.write_text(f"{HEAD}  stays: {{addr: {one}}}\n  moves: {{addr: {one}}}\n  goes: {{addr: {one}}}\n")
            running = await (await start()).online("stays", "moves", "goes")
            file.write_text(f"{HEAD}  stays: {{addr: {one}}}\n  moves: {{addr: {two}}}\n  comes: {{addr: {two}}}\n")
            await running.online("comes")
            await running.until(lambda: running.of("goes")[-1:] == ["removed"])
            assert [await ask(relay, bind) for bind in (1, 2, 4)] == [b"one", b"two", b"two"]
            (connection,) = relay.connections
            assert connection.unbinds == [3] and running.of("stays") == ["online"]
            assert running.of("moves") == ["online", "online"]
            await running.until(lambda: ("DELETE", "tun_goes") in [(c[0], c[1].rsplit("/", 1)[1]) for c in api.calls])
            assert "portico.yml: changed moves, removed goes, added comes" in running.log
            assert await running.end() == 0

    async def test_policies_change_and_go(self, start: Any, file: Path, api: TestApi, relay: Relay) -> None:
        """A changed policy is told to the API, and so is that there is none any more; nothing is unbound for it."""
        named = file.with_name("named.yml")
        named.write_text("concurrency: 5\n")
        file.write_text(f"{HEAD}  a: {{addr: 1, allow_cidr: 10.0.0.0/8}}\n  b: {{addr: 1, policy_file: named.yml}}\n")
        running = await (await start()).online("a", "b")

        def told(name: str) -> Any:
            bodies = [body for _, path, body, _ in api.calls if path.endswith("/tunnels")]
            return [body.get("policy") for body in bodies if body.get("name") == name][-1:]

        named.write_text("concurrency: 6\n")
        await running.until(lambda: told("b") == [{"concurrency": 6}])
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n  b: {{addr: 1, policy_file: named.yml}}\n")
        await running.until(lambda: told("a") == [{}])
        named.write_text("concurrency: 0\n")
        await running.until(lambda: "concurrency: must be a whole number" in running.log)
        assert told("b") == [{"concurrency": 6}] and relay.connections[0].unbinds == []

    async def test_an_editor_that_renames(self, start: Any, file: Path) -> None:
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n")
        running = await (await start()).online("a")
        for name in ("b", "c"):
            new = file.with_suffix(".new")
            new.write_text(f"{HEAD}  a: {{addr: 1}}\n  {name}: {{addr: 2}}\n")
            new.rename(file)
            await running.online(name)
        assert running.of("b") == ["online", "removed"]

    async def test_a_broken_file_changes_nothing(self, start: Any, file: Path, relay: Relay) -> None:
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n")
        running = await (await start()).online("a")
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n  b: {{adr: 2, ttl: 1}}\n")
        await running.until(lambda: "the tunnels stay as they were" in running.log)
        assert f"{file}:4:7: unknown key 'adr'; did you mean 'addr'? (and 1 more: portico config check)" in running.log
        file.unlink()
        await running.until(lambda: f"{file}: does not exist; the tunnels stay" in running.log)
        file.write_text(f"{HEAD}  b: {{addr: 2}}\n")
        await running.online("b")
        assert running.of("a") == ["online", "removed"]

    async def test_a_refused_tunnel_is_tried_again_once_its_entry_changes(
        self, start: Any, file: Path, api: TestApi
    ) -> None:
        api.refuse_names["b"] = problem(409, "tunnel.subdomain_taken", "taken")
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n  b: {{addr: 2, subdomain: x}}\n")
        running = await (await start()).online("a")
        api.refuse_names.clear()
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n  b: {{addr: 2, subdomain: y}}\n")
        await running.online("b")

    async def test_settings_need_a_restart(self, start: Any, file: Path) -> None:
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n")
        running = await (await start()).online("a")
        file.write_text(f"region: eu\n{HEAD}  a: {{addr: 1}}\n")
        await running.until(lambda: "region changed in the file: that needs a restart" in running.log)

    async def test_hang_up_reads_the_file(self, start: Any, file: Path) -> None:
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n")
        running = await (await start(PORTICO_CONFIG_POLL_SECONDS="3600")).online("a")
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n  b: {{addr: 2}}\n")
        running.process.send_signal(signal.SIGHUP)
        await running.online("b")
        running.process.send_signal(signal.SIGHUP)
        await running.until(lambda: "portico.yml: read again, nothing changed" in running.log)

    async def test_a_terminal_that_closes_ends_it(self, start: Any, file: Path, cli: Cli) -> None:
        """The same signal, but nobody is there any more to watch the tunnels."""
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n")
        pid, terminal = pty.fork()
        if pid == 0:
            argv = [sys.executable, "-m", "portico.cli", "start", "--all", "--config", str(file)]
            os.execve(sys.executable, argv, cli.env)
        try:
            await asyncio.to_thread(read_until, terminal, b"a.localhost")
        finally:
            os.close(terminal)
        async with asyncio.timeout(30):
            while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
                await asyncio.sleep(0.05)
        assert os.waitstatus_to_exitcode(ended[1]) == 0


def read_until(terminal: int, text: bytes) -> None:
    seen = b""
    while text not in seen:
        seen += os.read(terminal, 65_536)


class TestTtl:
    async def test_the_tunnel_ends_itself_and_the_agent_with_the_last(
        self, start: Any, file: Path, relay: Relay
    ) -> None:
        file.write_text(f"{HEAD}  a: {{addr: 1, ttl: 1s}}\n  b: {{addr: 2, ttl: 2s}}\n")
        running = await (await start()).online("a", "b")
        await running.until(lambda: running.of("a") == ["online", "ended"])
        assert running.of("b") == ["online"] and relay.connections[0].unbinds == [1]
        assert await running.end(None) == 0
        assert running.events[-1] | {"url": "", "tunnel": ""} == {
            "event": "ended", "name": "b", "target": "http://localhost:2", "reason": "ttl", "url": "", "tunnel": "",
        }  # fmt: skip

    async def test_the_file_can_give_it_longer(self, start: Any, file: Path) -> None:
        file.write_text(f"{HEAD}  a: {{addr: 1, ttl: 2s}}\n")
        running = await (await start()).online("a")
        file.write_text(f"{HEAD}  a: {{addr: 1, ttl: 1h}}\n")
        await running.until(lambda: "changed a" in running.log)
        await asyncio.sleep(2.5)
        assert running.of("a") == ["online"]


class TestConfigCheck:
    async def test_a_good_file(self, cli: Cli, file: Path) -> None:
        file.write_text(f"{HEAD}  a: {{addr: 1}}\n")
        done = await cli.run("config", "check", "--config", str(file))
        assert (done.code, done.out) == (0, f"{file}: no faults. Tunnels: a\n")
        told = json.loads((await cli.run("config", "check", "--config", str(file), "--json")).out)
        assert told == {"valid": True, "files": [str(file)], "tunnels": ["a"], "faults": []}

    async def test_every_fault_at_once(self, cli: Cli, file: Path) -> None:
        file.write_text(f"{HEAD}  a: {{addr: 99999}}\n  b: {{adr: 1}}\n")
        done = await cli.run("config", "check", "--config", str(file))
        assert done.code == 2 and done.out == ""
        assert done.err.splitlines() == [
            f"{file}:3:13: addr: '99999': the port must be 1 to 65535",
            "    3 |   a: {addr: 99999}",
            "      |             ^^^^^",
            f"{file}:4:7: unknown key 'adr'; did you mean 'addr'?",
            "    4 |   b: {adr: 1}",
            "      |       ^^^",
            "portico: the file has 2 faults. Correct what is marked above. (config.invalid)",
        ]
        done = await cli.run("config", "check", "--config", str(file), "--json")
        told = json.loads(done.out)
        assert done.code == 2 and told["valid"] is False
        assert told["faults"][1] == {
            "file": str(file), "line": 4, "column": 7, "message": "unknown key 'adr'; did you mean 'addr'?",
        }  # fmt: skip

    async def test_ngroks_way_to_store_a_key(self, cli: Cli) -> None:
        done = await cli.run("config", "add-authtoken", KEY)
        assert done.code == 2 and "portico login --token" in only_line(done.err) and KEY not in done.err


async def test_a_request_through_a_started_tunnel_is_an_event(start: Any, file: Path, relay: Relay) -> None:
    async with target_server(answering(OK)) as port:
        file.write_text(f"{HEAD}  a: {{addr: {port}}}\n")
        running = await (await start()).online("a")
        assert await ask(relay, 1) == b"ok"
        await running.until(lambda: any(e["event"] == "request" for e in running.events))
