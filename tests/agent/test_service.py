"""The service managers: which commands they give, and what stays when a step is repeated.

No systemd and no launchd runs where tests run: a recorder stands in for their programs, files are real.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from portico.agent.service import Launchd, Systemd, blocked, manager_for, program, run_command, write_if_changed
from portico.agent.service_files import Service
from portico.errors import Problem

SERVICE = Service("portico-agent", ("/usr/bin/portico", "start"), Path("/etc/portico/portico.yml"), system=True)


class Recorder:
    """Programs that say what they are told to say: by the words of a command, its exit code and output."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, tuple[int, str]] = {}

    def __call__(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        command = " ".join(argv)
        self.asked.append(command)
        code, said = self.answers.get(command, (0, ""))
        return subprocess.CompletedProcess(argv, code, said, said)

    def since(self) -> list[str]:
        found, self.asked = self.asked, []
        return found


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


class TestSystemd:
    @pytest.fixture
    def manager(self, tmp_path: Path, recorder: Recorder) -> Systemd:
        (tmp_path / "run/systemd/system").mkdir(parents=True)
        recorder.answers["systemctl --version"] = (0, "systemd 252 (252.38-1~deb12u1)\n+PAM")
        return Systemd(system=True, home=tmp_path / "home", root=tmp_path, run=recorder)

    def test_install_change_and_remove(self, manager: Systemd, recorder: Recorder, tmp_path: Path) -> None:
        manager.check()
        assert manager.install(SERVICE) is True
        unit = tmp_path / "etc/systemd/system/portico-agent.service"
        assert unit.read_text().startswith("# Written by")
        assert recorder.since()[1:] == [
            "systemctl daemon-reload",
            "systemctl enable portico-agent",
            "systemctl restart portico-agent",
        ]
        assert manager.install(SERVICE) is False
        assert recorder.since()[1:] == ["systemctl enable portico-agent", "systemctl start portico-agent"]
        unit.write_text("of an older version")
        assert manager.install(SERVICE) is True
        recorder.since()
        manager.act("stop", "portico-agent")
        assert manager.uninstall("portico-agent") is True
        assert recorder.since() == [
            "systemctl stop portico-agent", "systemctl disable --now portico-agent", "systemctl daemon-reload",
        ]  # fmt: skip
        assert not unit.exists() and manager.uninstall("portico-agent") is False and recorder.since() == []

    def test_status(self, manager: Systemd, recorder: Recorder) -> None:
        with pytest.raises(Problem) as refused:
            manager.status("portico-agent")
        assert refused.value.code == "background.not_installed"
        manager.install(SERVICE)
        recorder.answers["systemctl is-active portico-agent"] = (3, "failed\n")
        recorder.answers["systemctl status --no-pager --lines=10 portico-agent"] = (3, "× portico-agent\n")
        assert manager.status("portico-agent") == ("failed", "× portico-agent\n")

    def test_a_refusal_is_told_in_its_words(self, manager: Systemd, recorder: Recorder) -> None:
        recorder.answers["systemctl daemon-reload"] = (1, "Access denied\n")
        with pytest.raises(Problem, match="systemctl daemon-reload: Access denied") as refused:
            manager.install(SERVICE)
        assert refused.value.code == "background.failed"

    def test_where_it_does_not_run(self, tmp_path: Path, recorder: Recorder) -> None:
        with pytest.raises(Problem, match="systemd does not run") as refused:
            Systemd(system=True, home=tmp_path, root=tmp_path, run=recorder).check()
        assert refused.value.code == "background.no_manager"

    def test_that_of_a_user(self, tmp_path: Path, recorder: Recorder) -> None:
        (tmp_path / "run/systemd/system").mkdir(parents=True)
        manager = Systemd(system=False, home=tmp_path, root=tmp_path, run=recorder)
        manager.check()
        manager.install(SERVICE)
        assert (tmp_path / ".config/systemd/user/portico-agent.service").exists()
        assert "systemctl --user enable portico-agent" in recorder.since()
        recorder.answers["systemctl --user show-environment"] = (1, "Failed to connect to bus")
        with pytest.raises(Problem, match="takes no commands for this user"):
            manager.check()


class TestLaunchd:
    def test_install_change_and_remove(self, tmp_path: Path, recorder: Recorder) -> None:
        manager = Launchd(system=False, home=tmp_path, run=recorder)
        target = manager._target("portico-agent")
        manager.check()
        recorder.answers[f"launchctl print {target}"] = (113, "Could not find service")
        assert manager.install(SERVICE) is True
        plist = tmp_path / "Library/LaunchAgents/portico-agent.plist"
        assert f"launchctl bootstrap {manager._domain} {plist}" in recorder.since()
        recorder.answers[f"launchctl print {target}"] = (0, "state = running")
        assert manager.install(SERVICE) is False and manager.status("portico-agent")[0] == "active"
        recorder.since()
        manager.act("restart", "portico-agent")
        manager.act("stop", "portico-agent")
        assert [line for line in recorder.since() if "print" not in line] == [
            f"launchctl kickstart -k {target}", f"launchctl bootout {target}",
        ]  # fmt: skip
        assert manager.uninstall("portico-agent") is True and not plist.exists()


def test_other_systems() -> None:
    assert isinstance(manager_for(True, "linux"), Systemd) and isinstance(manager_for(False, "darwin"), Launchd)
    with pytest.raises(Problem, match="not supported on win32") as refused:
        manager_for(False, "win32")
    assert refused.value.code == "background.unsupported" and "Task Scheduler" in refused.value.hint


def test_a_program_that_is_missing_is_a_failure() -> None:
    done = run_command(["/nonexistent/systemctl"])
    assert done.returncode == 127 and "No such file" in done.stderr


def test_a_key_is_its_owners_alone(tmp_path: Path) -> None:
    key = tmp_path / "portico/agent.key"
    assert write_if_changed(key, b"tnl_agt_1\n", 0o600) is True and key.stat().st_mode & 0o777 == 0o600
    key.chmod(0o644)
    assert write_if_changed(key, b"tnl_agt_1\n", 0o600) is False and key.stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").touch()
    with pytest.raises(Problem, match="cannot be written") as refused:
        write_if_changed(tmp_path / "file/agent.key", b"")
    assert refused.value.code == "background.failed"


def test_this_installation_is_what_runs() -> None:
    assert run_command([*program(), "--version"]).stdout.startswith("portico ")


def test_what_an_account_of_its_own_can_reach(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "a").mkdir(0o700)
    (tmp_path / "a/portico.yml").touch(0o644)
    open_way = [place for place in (tmp_path, *tmp_path.parents) if place.stat().st_mode & 0o001]
    if len(open_way) == len(tmp_path.parents) + 1:
        assert blocked(tmp_path / "a/portico.yml") == tmp_path / "a"
        (tmp_path / "a").chmod(0o711)
        assert blocked(tmp_path / "a/portico.yml") is None
        (tmp_path / "a/portico.yml").chmod(0o640)
        assert blocked(tmp_path / "a/portico.yml") == tmp_path / "a/portico.yml"
    else:
        assert blocked(tmp_path / "a/portico.yml") not in open_way
