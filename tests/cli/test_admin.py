"""`portico admin init` against a real database: made once, kept, replaced when a file is gone."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from portico.kit.sealing import new_master_key


class Admin:
    """Runs `portico admin init` as an operator does, secrets in files."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self.keys = folder / "keys"
        self._folder = folder
        for name, text in (("database", database_url), ("master", new_master_key())):
            (folder / name).touch(0o600)
            (folder / name).write_text(text + "\n")

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("PORTICO_")}
        env |= {
            f"PORTICO_{n}_FILE": str(self._folder / f)
            for n, f in (("DATABASE_URL", "database"), ("MASTER_KEY", "master"))
        }
        argv = [sys.executable, "-m", "portico.cli", "admin", "init", "--keys", str(self.keys), *args]
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)

    def held(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.keys.iterdir()}


@pytest.fixture
def admin(tmp_path: Path, database_url: str) -> Admin:
    return Admin(tmp_path, database_url)


def test_made_once_and_kept(admin: Admin) -> None:
    first = admin.run("--relay", "relay-1")
    assert first.returncode == 0, first.stderr
    held = admin.held()
    assert set(held) == {"operator.key", "agent.key", "relay-1.key"}
    assert {name: text[:8] for name, text in held.items()} == {
        "operator.key": "tnl_opr_",
        "agent.key": "tnl_agt_",
        "relay-1.key": "tnl_rly_",
    }
    assert all(stat.S_IMODE((admin.keys / name).stat().st_mode) == 0o600 for name in held)
    assert stat.S_IMODE(admin.keys.stat().st_mode) == 0o700
    assert "password " in first.stdout and not any(
        text.strip() in first.stdout + first.stderr for text in held.values()
    )

    again = admin.run("--relay", "relay-1", "--relay", "relay-2", "--json")
    document = json.loads(again.stdout)
    assert document["first_admin"] is None and document["files"]["relay-2"] == str(admin.keys / "relay-2.key")
    now = admin.held()
    assert {name: now[name] for name in held} == held and now["relay-2.key"].startswith("tnl_rly_")

    (admin.keys / "relay-1.key").unlink()
    assert "(kept)" in admin.run("--relay", "relay-1").stdout
    assert admin.held()["relay-1.key"] != held["relay-1.key"]


def test_before_the_first_migration(tmp_path: Path, empty_database_url: str) -> None:
    done = Admin(tmp_path, empty_database_url).run()
    assert done.returncode == 4 and "Run: portico migrate" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("name", ["agent", "../x"])
def test_a_name_that_is_no_file(admin: Admin, name: str) -> None:
    done = admin.run("--relay", name)
    assert done.returncode == 2 and "letters, digits, dots and hyphens" in done.stderr
    assert not admin.keys.exists()


def test_a_folder_that_is_a_file(admin: Admin) -> None:
    admin.keys.touch()
    done = admin.run()
    assert done.returncode == 2 and "--keys" in done.stderr and done.stderr.count("\n") == 1


def test_a_key_file_that_others_may_read(admin: Admin) -> None:
    assert admin.run().returncode == 0
    (admin.keys / "operator.key").chmod(0o644)
    done = admin.run()
    assert done.returncode == 2 and "operator.key can be read by every user" in done.stderr
