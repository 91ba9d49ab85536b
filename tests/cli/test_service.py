"""`portico service` as it is typed. No test touches the services of a machine: its systemd is one that writes down."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from portico.agent import credentials, service
from portico.agent.credentials import Credentials
from portico.cli import main
from portico.cli import service as cli_service
from portico.settings import Secret
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


class Machine:
    """A machine with a systemd that takes every command and writes it down; `portico` is run within this process."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._capsys = root, capsys
        self.asked: list[str] = []
        self.active = "active"
        monkeypatch.setattr(service, "manager_for", self._manager)
        monkeypatch.setattr(cli_service, "SYSTEM_FOLDER", root / "etc/portico")
        for name in [name for name in os.environ if name.startswith("PORTICO_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PORTICO_CONFIG_DIR", str(root / "config"))

    def boot(self) -> None:
        (self.root / "run/systemd/system").mkdir(parents=True)

    def _manager(self, system: bool) -> service.Systemd:
        return service.Systemd(system=system, home=self.root / "home", root=self.root, run=self._run)

    def _run(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        self.asked.append(" ".join(argv))
        said = {"--version": "systemd 257 (257)", "is-active": self.active, "status": f"● {argv[-1]}"}
        return subprocess.CompletedProcess(argv, 0, said.get(argv[1] if argv[1] != "--user" else argv[2], ""), "")

    def type(self, *args: str) -> tuple[int, str, str]:
        """Exit code, output and errors of `portico service …`; the commands that systemd got are in ``asked``."""
        self.asked.clear()
        with pytest.raises(SystemExit) as ended:
            main.main(["service", *args])
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Machine:
    return Machine(tmp_path, monkeypatch, capsys)


def test_where_no_systemd_runs_it_says_what_to_run(machine: Machine, file: Path) -> None:
    credentials.write(machine.root / "config", Credentials("https://p.example.com", Secret(KEY), "me"))
    code, _, err = machine.type("install", "--user", "--config", str(file))
    assert code == 1 and "(background.no_manager)" in only_line(err) and f"start --all --config {file}" in err
    assert not (machine.root / "home").exists() and not machine.asked[1:], "nothing was done"
    for verb in ("status", "start", "stop", "restart", "uninstall"):
        code, _, err = machine.type(verb, "--user")
        assert code == 1 and "(background.no_manager)" in only_line(err), verb


def test_a_user_installs_and_removes_it(machine: Machine, file: Path) -> None:
    machine.boot()
    credentials.write(machine.root / "config", Credentials("https://p.example.com", Secret(KEY), "me"))
    code, _, err = machine.type("status", "--user")
    assert code == 1 and "(background.not_installed)" in only_line(err)
    code, out, err = machine.type("install", "--user", "--config", str(file))
    assert code == 0 and "portico-agent: installed and started" in out and "journalctl --user -fu portico-agent" in out
    assert "loginctl enable-linger" in err
    unit = machine.root / "home/.config/systemd/user/portico-agent.service"
    assert "RestartSteps" in unit.read_text() and KEY not in unit.read_text()
    assert "already installed" in machine.type("install", "--user", "--config", str(file))[1]
    assert "systemctl --user restart portico-agent" not in machine.asked
    assert "restarted" in machine.type("restart", "--user")[1]
    assert machine.asked[-1] == "systemctl --user restart portico-agent"
    assert machine.type("status", "--user")[:2] == (0, "● portico-agent\n")
    machine.active = "failed"
    assert machine.type("status", "--user")[0] == 1
    assert "stopped and removed" in machine.type("uninstall", "--user")[1] and not unit.exists()
    assert "was not installed" in machine.type("uninstall", "--user")[1]


def test_a_service_of_the_machine_has_a_key_of_its_own(
    machine: Machine, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.boot()
    monkeypatch.setattr(service, "blocked", lambda path: None)
    monkeypatch.setenv("PORTICO_SERVER", "https://p.example.com")
    monkeypatch.setenv("PORTICO_AGENT_KEY", KEY)
    install = ("install", "--system", "--config", str(file))
    assert machine.type(*install)[0] == 0
    key = machine.root / "etc/portico/portico-agent.key"
    assert key.read_text() == KEY + "\n" and stat.S_IMODE(key.stat().st_mode) == 0o600
    unit = parse((machine.root / "etc/systemd/system/portico-agent.service").read_text())
    assert values(unit, "Service", "LoadCredential") == [f"agent_key:{key}"]
    monkeypatch.setenv("PORTICO_AGENT_KEY", KEY[:-1] + "x")
    assert machine.type(*install)[0] == 0
    assert "systemctl restart portico-agent" in machine.asked, "a new key is taken over"


def test_what_its_account_cannot_read_is_said_before(
    machine: Machine, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.boot()
    monkeypatch.setenv("PORTICO_AGENT_KEY", KEY)
    file.chmod(0o600)
    code, _, err = machine.type("install", "--system", "--config", str(file))
    assert code == 2 and "cannot read" in only_line(err) and "--run-as" in err
    assert not (machine.root / "etc").exists()
    assert machine.type("install", "--system", "--config", str(file), "--run-as", "root")[0] == 0
    assert (
        "is for a service of the machine"
        in machine.type("install", "--user", "--config", str(file), "--run-as", "x")[2]
    )


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
