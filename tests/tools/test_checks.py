"""The checks of `make check` find what they are for."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import check, check_codes, check_locks, check_source, reference

ROOT = Path(__file__).resolve().parents[2]


class TestSourceRules:
    @pytest.mark.parametrize("code", ["await connection.commit()", "self.session.commit()", "tx.commit(now=True)"])
    def test_a_commit_elsewhere(self, code: str) -> None:
        tree = ast.parse(f"async def f(self, tx, connection):\n    {code}")
        assert [line for line, _ in check_source.commits("control/tunnels/service.py", tree)] == [2]
        assert list(check_source.commits("kit/db.py", tree)) == []

    @pytest.mark.parametrize(
        "code",
        ["import os\nos.environ['A']", "import os\nos.getenv('A')", "from os import environ", "from os import getenv"],
    )
    def test_the_environment_elsewhere(self, code: str) -> None:
        assert len(list(check_source.environment("relay/server.py", ast.parse(code)))) == 1
        assert list(check_source.environment("settings/loading.py", ast.parse(code))) == []

    @pytest.mark.parametrize(
        "path", ["/wo" + "rk/x", "/ro" + "ot/.cache", "/tm" + "p/portico/x", "see `/wo" + "rk/main`"]
    )
    def test_a_machine_path(self, path: str) -> None:
        assert check_source.MACHINE_PATHS.search(path)

    @pytest.mark.parametrize(
        "text", ["network/", "https://host/work/x", "under /root, mode 0700", "/tmp/portico-demo-x"]
    )
    def test_what_only_looks_like_one(self, text: str) -> None:
        assert check_source.MACHINE_PATHS.search(text) is None


def test_two_migrations_with_one_number(tmp_path: Path) -> None:
    for name, number, before in (
        ("0001_a", "0001", "None"),
        ("0002_b", "0002", '"0001"'),
        ("0002_c", "0002", '"0001"'),
    ):
        (tmp_path / f"{name}.py").write_text(f'revision = "{number}"\ndown_revision = {before}\n')
    (wrong,) = check_source.migration_findings(tmp_path)
    assert wrong.startswith("0002_c.py:1: a step is 0002 after 0002")
    (tmp_path / "0002_c.py").unlink()
    assert not list(check_source.migration_findings(tmp_path))


def package(name: str, version: str, *wheels: str, **more: Any) -> dict[str, Any]:
    """A package as uv.lock has it; the hash of each wheel is its number."""
    listed = [{"url": f"https://host/{wheel}", "hash": f"sha256:{version}"} for wheel in wheels]
    return {"name": name, "version": version, "wheels": listed, **more}


NATIVE_A = "a-1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
SDIST = {"url": "https://host/b-2.tar.gz", "hash": "sha256:2"}
LOCK = {
    "portico": [package("portico", "0", dependencies=[{"name": "a"}], **{"dev-dependencies": {"build": []}})],
    "a": [package("a", "1", NATIVE_A, dependencies=[{"name": "b", "extra": ["x"]}])],
    "b": [package("b", "2", sdist=SDIST, **{"optional-dependencies": {"x": [{"name": "c"}]}})],
    "c": [package("c", "3", "c-3-py3-none-any.whl")],
}


class TestLocks:
    def test_closure_follows_extras(self) -> None:
        assert check_locks.closure(LOCK, (), ("build",)) == {
            "a": {"1": frozenset({"sha256:1"})},
            "b": {"2": frozenset({"sha256:2"})},
            "c": {"3": frozenset({"sha256:3"})},
        }

    def test_another_version_hash_or_package_is_found(self) -> None:
        digest = "sha256:" + "0" * 64
        present = check_locks.parse_requirements(f"a==1 ; python_version < '4' \\\n    --hash={digest}\nd==1\n")
        assert present == {"a": {"1": frozenset({digest})}, "d": {"1": frozenset()}}
        assert len(list(check_locks.compare("dev", {"a": {"1": frozenset({"sha256:f"})}}, present))) == 2
        assert list(check_locks.compare("dev", present, present)) == []

    def test_a_package_without_a_wheel_is_found(self) -> None:
        found = list(check_locks.unwheeled(LOCK, check_locks.closure(LOCK, (), ("build",))))
        assert found == ["uv.lock: b has no wheel for CPython 3.11 on manylinux x86_64"]

    @pytest.mark.parametrize(
        ("name", "good"),
        [
            ("p-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
            ("p-1-cp39-abi3-manylinux_2_28_x86_64.whl", True),
            ("p-1-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
            ("p-1-py2.py3-none-any.whl", True),
            ("p-1-cp312-cp312-manylinux_2_17_x86_64.whl", False),
            ("p-1-cp312-abi3-manylinux_2_28_x86_64.whl", False),
            ("p-1-cp311-cp311-manylinux_2_39_x86_64.whl", False),
            ("p-1-cp311-cp311-musllinux_1_2_x86_64.whl", False),
            ("p-1-cp311-cp311-manylinux_2_17_aarch64.whl", False),
            ("p-1-cp311-cp311-win_amd64.whl", False),
        ],
    )
    def test_which_wheels_run(self, name: str, good: bool) -> None:
        assert bool(check_locks.PURE.search(name) or check_locks.NATIVE.search(name)) is good

    def test_a_declaration_that_the_lock_does_not_know_is_found(self) -> None:
        pyproject = {
            "project": {"dependencies": ["A_b>=2"], "optional-dependencies": {}},
            "dependency-groups": {"dev": []},
        }
        metadata = {"requires-dist": [{"name": "a-b", "specifier": ">=1"}], "requires-dev": {}}
        assert list(check_locks.undeclared(pyproject, {"metadata": metadata})) == [
            "uv.lock: a-b is declared otherwise in pyproject.toml; run: make lock"
        ]


def test_codes_are_found_where_they_are_raised() -> None:
    tree = ast.parse("raise Problem('a.b' if x else 'a.c', 'text')\nraise errors.Problem(code)\nlog('d.e')")
    assert sorted(constant.value for constant in check_codes.raised(tree)) == ["a.b", "a.c"]


@dataclasses.dataclass(frozen=True)
class Example:
    """Settings to read comments from."""

    # == First section
    # Above, on
    # two lines.
    one: int = 1
    two: int = 2  # beside
    three: int = 3


@dataclasses.dataclass(frozen=True)
class Composed(Example):
    """Settings with a part."""

    # == Second section
    # Its own.
    four: int = 4


def test_comments_of_settings_are_found_beside_and_above() -> None:
    found = reference.field_comments(Example)
    assert (found["one"].text, found["one"].section) == ("Above, on two lines.", "First section")
    assert (found["two"].text, found["two"].section) == ("beside", None)
    assert found["three"].text == ""


def test_comments_of_the_parts_of_settings_are_found_in_the_order_of_the_fields() -> None:
    found = reference.field_comments(Composed)
    assert list(found) == [field.name for field in dataclasses.fields(Composed)] == ["one", "two", "three", "four"]
    assert (found["one"].section, found["four"].section) == ("First section", "Second section")
    assert found["four"].text == "Its own."


def test_the_driver_names_what_failed(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = [sys.executable, "-c", ""], [sys.executable, "-c", "print('why'); raise SystemExit(3)"]
    monkeypatch.setattr(check, "CHECKS", {"one": good, "two": bad})
    assert check.main([]) == 1
    printed = capfd.readouterr().out
    assert "ok   one" in printed
    assert "FAIL two" in printed
    assert "     why" in printed
    assert check.main(["one"]) == 0
    assert check.main(["three"]) == 2


def test_make_lists_every_target_and_only_what_exists() -> None:
    listed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [line.split()[1] for line in listed.splitlines()]
    assert {"setup", "demo", "test", "check", "docs"} <= set(names)
    for name in names:
        planned = subprocess.run(["make", "-n", name], cwd=ROOT, capture_output=True, text=True, check=False)
        assert planned.returncode == 0, planned.stderr
