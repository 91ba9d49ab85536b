"""systemd's unit files, read as systemd reads them (systemd.syntax), and `systemd-analyze verify` where it is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

Unit = dict[str, list[tuple[str, str]]]


def parse(text: str) -> Unit:
    """Sections with their assignments, in order; fails on a line that is none of the three kinds."""
    found: Unit = {}
    section: list[tuple[str, str]] | None = None
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        if line.startswith("[") and line.endswith("]"):
            section = found.setdefault(line[1:-1], [])
            continue
        key, equals, value = line.partition("=")
        assert equals and section is not None and key.isidentifier(), f"no assignment: {line!r}"
        section.append((key, value.strip()))
    return found


def values(unit: Unit, section: str, key: str) -> list[str]:
    return [value for name, value in unit.get(section, []) if name == key]


def verify(*files: Path) -> None:
    """What systemd itself says of unit files."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze: apt-get install systemd")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *map(str, files)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
