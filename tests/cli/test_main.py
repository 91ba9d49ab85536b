"""The command line around the commands: help, versions, exit codes, and how errors look."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from portico.cli import main, output, processes
from portico.errors import Problem

PORTICO = [sys.executable, "-P", "-m", "portico.cli"]
HEAVY = ("sqlalchemy", "fastapi", "asyncpg", "httpx", "rich", "cryptography", "picows", "uvloop", "asyncio")


def run(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PORTICO, *args], capture_output=True, text=True, timeout=60, env=os.environ | (env or {}))


class TestHelp:
    def test_lists_every_command_once_and_hides_the_inner_one(self) -> None:
        told = run("--help")
        assert told.returncode == 0
        lines = [line.split()[0] for line in told.stdout.splitlines() if line.startswith("  ") and line.strip()]
        for name in main.MODULES:
            assert lines.count(name) == (0 if name in main.HIDDEN else 1), name

    def test_imports_nothing_heavy(self) -> None:
        """What keeps `portico --help` under a quarter of a second."""
        code = (
            f"import sys\nfrom portico.cli.main import build\nbuild()\nprint([m for m in {HEAVY} if m in sys.modules])"
        )
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        assert told.stdout.strip() == "[]", told.stdout + told.stderr

    @pytest.mark.parametrize("name", main.MODULES)
    def test_every_command_has_help_and_lives_where_the_table_says(self, name: str) -> None:
        from typer.main import get_command

        group = main.build({main.MODULES[name]})
        command = get_command(group).commands[name]  # type: ignore[attr-defined]
        assert command.help, name
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{name} {parameter.name}"

    def test_no_arguments_show_the_help(self) -> None:
        told = run()
        assert told.returncode == 2 and "For developers" in told.stdout + told.stderr

    def test_a_typing_mistake_gets_a_suggestion(self) -> None:
        told = run("upp")
        assert told.returncode == output.USAGE and "'up'" in told.stderr

    def test_version(self) -> None:
        assert run("--version").stdout == f"portico {metadata.version('portico')}\n"

    def test_completion_offers_commands(self) -> None:
        told = run(env={"_PORTICO_COMPLETE": "complete_bash", "COMP_WORDS": "portico do", "COMP_CWORD": "1"})
        assert told.stdout.split() == ["domains", "doctor"]


class TestErrors:
    @pytest.mark.parametrize(
        ("typed", "says"),
        [
            (["frobnicate"], "no such command 'frobnicate'. See: portico --help"),
            (["--frob"], "no such option: --frob. See: portico --help"),
            (["http", "8000", "--zzz"], "no such option: --zzz. See: portico http --help"),
            (["http"], "missing argument 'TARGET'. See: portico http --help"),
            (["up", "--http-port", "x"], "'x' is not a valid int. See: portico up --help"),
        ],
    )
    def test_wrong_usage_is_one_line(self, typed: list[str], says: str) -> None:
        told = run(*typed)
        assert told.returncode == output.USAGE
        assert told.stderr.startswith("portico: ") and told.stderr.endswith(f"{says}\n"), told.stderr
        assert told.stderr.count("\n") == 1 and told.stdout == ""

    @pytest.mark.parametrize(
        ("code", "expected"),
        [
            ("config.invalid", output.USAGE),
            ("auth.key_invalid", output.REFUSED),
            ("service.unavailable", output.UNREACHABLE),
            ("tunnel.name_taken", output.TUNNEL_REFUSED),
            ("up.port_taken", output.FAILED),
        ],
    )
    def test_exit_codes(self, code: str, expected: int) -> None:
        assert output.exit_code(Problem(code)) == expected

    def test_an_operator_key_is_told_from_a_mistyped_one(self, tmp_path: Path) -> None:
        from portico.kit.ids import new_token

        env = {"PORTICO_CONFIG_DIR": str(tmp_path)}
        told = run("login", "--server", "http://127.0.0.1:1", "--token", new_token("opr"), env=env)
        assert told.returncode == output.REFUSED and "operator key" in told.stderr and "agent_key" in told.stderr

    @pytest.mark.parametrize("address", ["foo bar", "ftp://x", "http://", "http://x:0"])
    def test_what_is_no_address_is_not_asked(self, address: str, tmp_path: Path) -> None:
        env = {"PORTICO_CONFIG_DIR": str(tmp_path)}
        told = run("login", "--server", address, "--token", "x", env=env)
        assert told.returncode == output.USAGE and "is not the address of an API" in told.stderr

    def test_a_reader_that_has_seen_enough_is_no_fault(self, tmp_path: Path) -> None:
        shell = f"{sys.executable} -P -m portico.cli --help | true"
        env = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
        told = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, text=True, timeout=30, env=env)
        assert told.stderr == "" and not (tmp_path / "portico").exists()

    def test_a_refusal_is_one_line(self) -> None:
        told = run("up", "--http-port", "70000", "--data", "/nonexistent")
        assert not Path("/nonexistent").exists(), "a wrong option must not touch the data folder"
        assert told.returncode == output.USAGE
        assert told.stderr.startswith("portico: --http-port: 70000 is not a TCP port") and told.stderr.count("\n") == 1

    def test_an_unknown_key_of_the_settings_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "portico.toml").write_text("[platform]\nhttp_prot = 80\n")
        told = run("up", "--config", str(tmp_path / "portico.toml"))
        assert told.returncode == output.USAGE and "http_prot" in told.stderr and "config.invalid" in told.stderr

    def test_an_unforeseen_error_is_one_line_and_a_file(self, tmp_path: Path) -> None:
        code = (
            "import sys; from portico.cli import main; import portico.cli.platform as p\n"
            "def doctor() -> None:\n    'x'\n    raise ZeroDivisionError('inner trouble')\n"
            "p.doctor = doctor; main.main(['doctor'])"
        )
        env = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, env=env)
        assert told.returncode == output.FAILED
        assert "ZeroDivisionError: inner trouble" in told.stderr and told.stderr.count("\n") == 1
        assert "Traceback" in (tmp_path / "portico" / "faults.log").read_text()
        debug = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, env=env | {"PORTICO_DEBUG": "1"}
        )
        assert "Traceback" in debug.stderr

    def test_a_bare_install_is_told_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import importlib.util

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(Problem) as caught:
            processes.require_server_parts()
        assert caught.value.code == "up.server_parts_missing"
        assert "pip install 'portico[server]'" in caught.value.line()

    def test_a_missing_secret_stops_a_process(self) -> None:
        clean = {key: "" for key in os.environ if key.startswith("PORTICO_")}
        told = run("relay", env=clean)
        assert told.returncode == output.USAGE and "relay_key" in told.stderr and "PORTICO_RELAY_KEY" in told.stderr

    def test_an_unknown_worker_is_refused(self) -> None:
        env = {"PORTICO_DATABASE_URL": "postgresql://x@/x?host=/nonexistent", "PORTICO_MASTER_KEY": "x"}
        told = run("worker", "billing-typo", env=env)
        assert told.returncode == output.FAILED and "maintenance" in told.stderr


class TestTable:
    def test_columns_align_and_controls_are_shown(self, capsys: pytest.CaptureFixture[str]) -> None:
        output.table(["name", "url"], [("web", "http://a"), ("x\x1b[2J", "http://b")])
        assert capsys.readouterr().out == "NAME      URL\nweb       http://a\nx\\x1b[2J  http://b\n"

    def test_nothing_to_list_says_so_on_standard_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        output.table(["name"], [], empty="No tunnels.")
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err == "No tunnels.\n"
