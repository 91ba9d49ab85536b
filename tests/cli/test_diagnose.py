"""`portico diagnose` as a command: exit codes, JSON, and no colour where none belongs."""

from __future__ import annotations

import json

from tests.agent.harness import Relay
from tests.cli.commands import Cli, only_line


class TestDiagnose:
    async def test_all_is_well(self, cli: Cli, relay: Relay) -> None:
        cli.signed_in()
        done = await cli.run("diagnose")
        assert done.code == 0 and not done.err, done.err
        assert done.out.endswith("11 fine, 0 to look at, 0 broken\n") and "\x1b" not in done.out, done.out

    async def test_a_trouble_is_exit_code_1_with_a_fix(self, cli: Cli) -> None:
        done = await cli.run("diagnose", "--server", "http://127.0.0.1:1")
        assert done.code == 1 and not done.err
        assert "FAIL  Credentials" in done.out and "portico login" in done.out
        assert "FAIL  API connection" in done.out and "connection refused" in done.out
        assert "OK    Configuration" in done.out and "server=http://127.0.0.1:1 (command line)" in done.out

    async def test_json_and_where_settings_came_from(self, cli: Cli, relay: Relay) -> None:
        cli.signed_in()
        cli.folder.joinpath("portico.toml").write_text('[agent]\nregion = "eu"\n')
        done = await cli.run("diagnose", "1", "--json", PORTICO_API_TIMEOUT_SECONDS="9")
        assert done.code == 1 and not done.err
        found = {row["check"]: row for row in json.loads(done.out)}
        said = found["Configuration"]["says"]
        assert f"region=eu ({cli.folder}/portico.toml)" in said
        assert "api_timeout_seconds=9.0 (PORTICO_API_TIMEOUT_SECONDS)" in said
        assert found["Local app"]["level"] == "FAIL" and set(found["Local app"]) == {"check", "level", "says", "advice"}

    async def test_colours_where_they_are_forced(self, cli: Cli) -> None:
        done = await cli.run("diagnose", "--server", "http://127.0.0.1:1", NO_COLOR="", FORCE_COLOR="1")
        assert "\x1b[31mFAIL" in done.out
        done = await cli.run("diagnose", "--server", "http://127.0.0.1:1", NO_COLOR="", TERM="xterm-256color")
        assert "\x1b" not in done.out

    async def test_what_cannot_be_looked_at_is_wrong_usage(self, cli: Cli) -> None:
        done = await cli.run("diagnose", "what is this")
        assert done.code == 2 and "(target.invalid)" in only_line(done.err)
        done = await cli.run("diagnose", "--server", "http://[::1")
        assert done.code == 2 and "(config.invalid)" in only_line(done.err)
        cli.folder.mkdir(exist_ok=True)
        cli.folder.joinpath("credentials.json").write_text("{")
        done = await cli.run("diagnose")
        assert done.code == 1 and "is damaged" in done.out and not done.err
