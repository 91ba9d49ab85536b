"""The completion scripts, run by the shells that are for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from portico.cli.completion import SCRIPTS, Shell

FILE = "version: 1\ntunnels:\n  web: {addr: 1}\n  api: {addr: 2}\n  api-two: {addr: 3}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a portico.yml and, in bin, the `portico` of these sources."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "portico"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m portico.cli "$@"\n')
    program.chmod(0o755)
    (tmp_path / "portico.yml").write_text(FILE)
    return tmp_path


def ran(folder: Path, *argv: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PORTICO_")}
    env |= {"PATH": f"{folder}/bin:{env['PATH']}", "PORTICO_CONFIG_DIR": str(folder / "config")}
    told = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0 and not told.stderr, told.stderr
    return told.stdout


@pytest.mark.parametrize("shell", Shell)
def test_it_prints_the_script(folder: Path, shell: Shell) -> None:
    assert ran(folder, "portico", "completion", shell) == SCRIPTS[shell] + "\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("portico do", ["domains", "doctor"]),
        ("portico config ", ["check"]),
        ("portico completion ", ["bash", "zsh", "fish"]),
        ("portico http --tt", ["--ttl"]),
        ("portico start ", ["web", "api", "api-two"]),
        ("portico start ap", ["api", "api-two"]),
        ("portico start api w", ["web"]),
        ("portico start --config nowhere.yml ", []),
    ],
)
def test_bash(folder: Path, typed: str, offered: list[str]) -> None:
    words = typed.split(" ")
    script = (
        'eval "$(portico completion bash)"\n'
        f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}\n"
        "complete -p portico >/dev/null || exit 9\n"
        "_portico_completion portico\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    assert ran(folder, "bash", "--norc", "-c", script).split() == offered


@pytest.mark.parametrize(
    ("asks", "offered"),
    [
        ({"_PORTICO_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "portico start a"}, ["api", "api-two"]),
        (
            {
                "_PORTICO_COMPLETE": "complete_fish",
                "_TYPER_COMPLETE_FISH_ACTION": "get-args",
                "_TYPER_COMPLETE_ARGS": "portico start a",
            },
            ["api", "api-two"],
        ),
    ],
)
def test_what_the_scripts_of_the_other_shells_ask(folder: Path, asks: dict[str, str], offered: list[str]) -> None:
    assignments = [f"{name}={value}" for name, value in asks.items()]
    told = ran(folder, "env", *assignments, "portico")
    for name in offered:
        assert name in told
    script = SCRIPTS[Shell(asks["_PORTICO_COMPLETE"].removeprefix("complete_"))]
    assert all(name in script for name in asks)
