"""The lock says one thing: requirements/*.txt are what uv.lock exports, and every package comes as a wheel.

Works without uv, so that `make check` needs nothing but .venv: the closure of each set is walked through uv.lock and
compared, package by package and hash by hash, with the committed file. Markers are not evaluated: a package that some
platform needs belongs to the file, with its marker.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "portico"

# requirements file → (extras, dependency groups) of the project that it locks.
SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "agent": ((), ("build",)),
    "server": (("server",), ("build",)),
    "dev": (("server",), ("dev",)),
}
# A wheel of this name runs on CPython 3.11 on x86-64 Linux with glibc of Debian 12 (2.36) or older.
PURE = re.compile(r"-(?:py3|py2\.py3|py311|cp311)-none-any\.whl$")
NATIVE = re.compile(
    r"-(?:cp311-cp311|cp3(?:[2-9]|10|11)(?:\.cp3\d+)*-abi3(?:\.abi3t)?|py3-none|py2\.py3-none)"
    r"-[^-]*manylinux(?:1|2010|2014|_2_(?:[0-9]|[12]\d|3[0-6]))_x86_64[^-]*\.whl$"
)

Package = dict[str, Any]
Locked = dict[str, dict[str, frozenset[str]]]


def hashes(package: Package) -> frozenset[str]:
    files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else ())]
    return frozenset(file["hash"] for file in files)


def closure(packages: dict[str, list[Package]], extras: Iterable[str], groups: Iterable[str]) -> Locked:
    """Every package (name → version → hashes) that the project needs with these extras and groups."""
    (project,) = packages[PROJECT]
    todo: list[Package] = list(project["dependencies"])
    for extra in extras:
        todo += project["optional-dependencies"][extra]
    for group in groups:
        todo += project["dev-dependencies"][group]
    seen: set[tuple[str, str, tuple[str, ...]]] = set()
    found: Locked = {}
    while todo:
        wanted = todo.pop()
        for package in packages[wanted["name"]]:
            if wanted.get("version", package["version"]) != package["version"]:
                continue
            key = (package["name"], package["version"], tuple(wanted.get("extra", ())))
            if key in seen:
                continue
            seen.add(key)
            found.setdefault(package["name"], {})[package["version"]] = hashes(package)
            todo += package.get("dependencies", ())
            for extra in wanted.get("extra", ()):
                todo += package.get("optional-dependencies", {}).get(extra, ())
    return found


def parse_requirements(text: str) -> Locked:
    """A requirements file with hashes, as `name → version → hashes`."""
    found: Locked = {}
    for entry in text.replace("\\\n", " ").splitlines():
        if match := re.match(r"([a-z0-9._-]+)==(\S+)", entry):
            found.setdefault(match[1], {})[match[2]] = frozenset(re.findall(r"--hash=(sha256:[0-9a-f]{64})", entry))
    return found


def compare(name: str, wanted: Locked, present: Locked) -> Iterator[str]:
    """How the committed file differs from the lock, one line a package."""
    for package in sorted(wanted.keys() | present.keys()):
        if wanted.get(package) != present.get(package):
            versions = ", ".join(present.get(package, {"nothing": 0})), ", ".join(wanted.get(package, {"nothing": 0}))
            yield f"requirements/{name}.txt: {package} is {versions[0]}, uv.lock has {versions[1]}; run: make lock"


def declared(pyproject: dict[str, Any]) -> set[tuple[str, str]]:
    """Every direct requirement of pyproject.toml as (normalised name, version specifier)."""
    texts = list(pyproject["project"]["dependencies"])
    for listed in (*pyproject["project"]["optional-dependencies"].values(), *pyproject["dependency-groups"].values()):
        texts += [item for item in listed if isinstance(item, str)]
    requirements = [Requirement(text) for text in texts]
    return {(canonicalize_name(item.name), str(item.specifier)) for item in requirements}


def undeclared(pyproject: dict[str, Any], project: Package) -> Iterator[str]:
    """Requirements that pyproject.toml and uv.lock do not agree on: the lock is older than the declaration."""
    metadata = project["metadata"]
    rows = [*metadata["requires-dist"], *(row for group in metadata["requires-dev"].values() for row in group)]
    locked = {(row["name"], str(SpecifierSet(row.get("specifier", "")))) for row in rows}
    for name in sorted({name for name, _ in declared(pyproject) ^ locked}):
        yield f"uv.lock: {name} is declared otherwise in pyproject.toml; run: make lock"


def unwheeled(packages: dict[str, list[Package]], locked: Locked) -> Iterator[str]:
    """Packages that would have to be compiled on Python 3.11, x86-64 Linux."""
    for name in sorted(locked):
        for package in packages[name]:
            # A version for other Pythons alone (a fork in the lock) is another version's business.
            files = [wheel["url"] for wheel in package.get("wheels", ())]
            if any(PURE.search(url) or NATIVE.search(url) for url in files):
                break
        else:
            yield f"uv.lock: {name} has no wheel for CPython 3.11 on manylinux x86_64"


def main() -> int:
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages: dict[str, list[Package]] = {}
    for package in lock["package"]:
        packages.setdefault(package["name"], []).append(package)
    findings = list(undeclared(pyproject, packages[PROJECT][0]))
    everything: Locked = {}
    for name, (extras, groups) in SETS.items():
        wanted = closure(packages, extras, groups)
        everything |= wanted
        findings += compare(
            name, wanted, parse_requirements((ROOT / f"requirements/{name}.txt").read_text(encoding="utf-8"))
        )
    findings += unwheeled(packages, everything)
    print("\n".join(findings))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
