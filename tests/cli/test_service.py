"""`portico service` as it is typed. No systemd runs where tests run, so what is checked is what it would write and say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agent.api_server import KEY
from tests.cli.commands import Cli, only_line
from tests.units import parse, values

FILE = "version: 1\ntunnels:\n  web: {addr: 8000}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "portico.yml"
    path.write_text(FILE)
    return path


async def test_print_changes_nothing(cli: Cli, file: Path) -> None:
    cli.signed_in()
    before = sorted(file.parent.rglob("*"))
    done = await cli.run(
        "service", "install", "--user", "--print", "--config", str(file), "--name", "web", "--json", NO_PROXY=""
    )
    assert done.code == 0, done.err
    unit = parse(done.out)
    assert values(unit, "Service", "ExecStart")[0].endswith(f"start --all --config {file} --json")
    assert values(unit, "Service", "SyslogIdentifier") == ["portico-agent-web"]
    assert f"PORTICO_CONFIG_DIR={cli.folder}" in values(unit, "Service", "Environment")
    assert sorted(file.parent.rglob("*")) == before


async def test_the_key_stays_out_of_the_unit(cli: Cli, file: Path) -> None:
    env = {"PORTICO_AGENT_KEY": KEY, "PORTICO_SERVER": "https://portico.example.com"}
    done = await cli.run("service", "install", "--system", "--print", "--config", str(file), **env)
    assert done.code == 0 and KEY not in done.out
    unit = parse(done.out)
    assert values(unit, "Service", "LoadCredential") == ["agent_key:/etc/portico/portico-agent.key"]
    assert "PORTICO_SERVER=https://portico.example.com" in values(unit, "Service", "Environment")


async def test_where_no_systemd_runs_it_says_what_to_run(cli: Cli, file: Path) -> None:
    if Path("/run/systemd/system").is_dir():
        pytest.skip("systemd runs here, and a test must not touch the services of a machine")
    cli.signed_in()
    done = await cli.run("service", "install", "--user", "--config", str(file))
    line = only_line(done.err)
    assert done.code == 1 and "(background.no_manager)" in line
    assert f"start --all --config {file}" in line
    done = await cli.run("service", "status", "--user")
    assert done.code == 1 and "(background.no_manager)" in only_line(done.err)


async def test_what_would_end_at_once_is_refused_now(cli: Cli, file: Path) -> None:
    done = await cli.run("service", "install", "--user", "--print", "--config", str(file))
    assert done.code == 3 and "(auth.not_logged_in)" in only_line(done.err)
    file.write_text("version: 1\nagent_key_env: A\ntunnels:\n  web: {addr: 8000}\n")
    done = await cli.run("service", "install", "--user", "--print", "--config", str(file))
    assert done.code == 2 and "agent_key_env" in only_line(done.err)
    file.write_text("version: 1\ntunnels:\n  web: {adr: 8000}\n")
    done = await cli.run("service", "install", "--user", "--print", "--config", str(file))
    assert done.code == 2 and "adr" in done.err
    done = await cli.run("service", "install", "--user", "--print", "--config", str(file), "--name", "A b")
    assert done.code == 2
