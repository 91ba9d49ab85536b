"""Units and property lists of `portico service install`."""

from __future__ import annotations

import plistlib
import sys
from dataclasses import replace
from pathlib import Path

from portico.agent.service_files import FINAL_EXITS, Service, launchd_plist, systemd_unit
from portico.cli import output
from tests.units import parse, values, verify

#: What needs quoting: spaces, quotes, and what systemd would expand.
ODD = Path('/srv/a "b" 100% $HOME \\ é/portico.yml')
SERVICE = Service(
    "portico-agent",
    (sys.executable, "-m", "portico.cli", "start", "--all", "--config", str(ODD)),
    ODD,
    system=True,
    environment={"PORTICO_SERVER": "https://p.example.com", "PORTICO_CA_FILE": str(ODD)},
    key_file=Path("/etc/portico/portico-agent.key"),
)
USER = replace(SERVICE, system=False, key_file=Path("/home/u/.config/portico/portico-agent.key"))


def service(text: str, key: str) -> list[str]:
    return values(parse(text), "Service", key)


class TestSystemd:
    def test_systemd_takes_them(self, tmp_path: Path) -> None:
        """Those without the pauses that only newer ones know."""
        for number, one in enumerate((SERVICE, replace(SERVICE, account="root", key_file=None), USER)):
            unit = tmp_path / f"portico-agent-{number}.service"
            unit.write_text(systemd_unit(one, 252))
            verify(unit)

    def test_words_are_quoted(self) -> None:
        text = systemd_unit(SERVICE)
        assert service(text, "ExecStart")[0].endswith(r'--config "/srv/a \"b\" 100%% $$HOME \\ é/portico.yml"')
        assert r'"PORTICO_CA_FILE=/srv/a \"b\" 100%% $HOME \\ é/portico.yml"' in service(text, "Environment")

    def test_it_comes_back_ever_more_slowly(self) -> None:
        text = systemd_unit(SERVICE)
        assert service(text, "Restart") == ["always"] and values(parse(text), "Unit", "StartLimitIntervalSec") == ["0"]
        assert service(text, "RestartSteps") == ["8"] and service(text, "RestartMaxDelaySec") == ["60"]
        assert service(systemd_unit(SERVICE, 252), "RestartSec") == ["5"] and not service(
            systemd_unit(SERVICE, 252), "RestartSteps"
        )
        assert service(systemd_unit(SERVICE, 254), "RestartSteps") == ["8"]

    def test_but_not_after_what_another_start_cannot_mend(self) -> None:
        assert FINAL_EXITS == (output.USAGE, output.REFUSED)
        assert service(systemd_unit(SERVICE), "RestartPreventExitStatus") == ["2 3"]

    def test_the_key_of_the_machine_is_a_credential(self) -> None:
        text = systemd_unit(SERVICE)
        assert service(text, "LoadCredential") == ["agent_key:/etc/portico/portico-agent.key"]
        assert service(text, "DynamicUser") == ["yes"] and not service(text, "User")
        assert "AGENT_KEY" not in text

    def test_the_key_of_a_user_is_a_file(self) -> None:
        text = systemd_unit(USER)
        assert "PORTICO_AGENT_KEY_FILE=/home/u/.config/portico/portico-agent.key" in service(text, "Environment")
        assert not service(text, "LoadCredential") and not service(text, "DynamicUser")
        assert values(parse(text), "Install", "WantedBy") == ["default.target"]

    def test_an_account_that_is_named(self) -> None:
        text = systemd_unit(replace(SERVICE, account="deploy"))
        assert service(text, "User") == ["deploy"] and not service(text, "DynamicUser")

    def test_it_may_do_little(self) -> None:
        for one in (SERVICE, USER):
            text = systemd_unit(one)
            for key in ("NoNewPrivileges", "MemoryDenyWriteExecute", "RestrictNamespaces", "SystemCallFilter"):
                assert service(text, key), key
        assert service(systemd_unit(SERVICE), "ProtectSystem") == ["strict"]
        assert service(systemd_unit(SERVICE), "CapabilityBoundingSet") == [""]
        assert not service(systemd_unit(USER), "ProtectSystem"), "needs a privilege that a user's systemd may lack"


class TestLaunchd:
    def test_macos_reads_it(self) -> None:
        found = plistlib.loads(launchd_plist(USER, Path("/Users/u/Library/Logs")))
        assert found["Label"] == "portico-agent" and found["ProgramArguments"] == list(USER.argv)
        assert found["KeepAlive"] is True and found["RunAtLoad"] is True
        assert found["EnvironmentVariables"] == {**USER.environment, "PORTICO_AGENT_KEY_FILE": str(USER.key_file)}
        assert found["StandardErrorPath"] == "/Users/u/Library/Logs/portico-agent.log" and found["Umask"] == 0o077
        assert "UserName" not in found

    def test_an_account_of_a_daemon(self) -> None:
        found = plistlib.loads(launchd_plist(replace(SERVICE, account="deploy"), Path("/Library/Logs")))
        assert found["UserName"] == "deploy"
