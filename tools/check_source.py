"""Rules about the source that no linter knows. Each line it prints is `file:line: what is wrong`.

commit      A transaction is committed in kit/db.py and nowhere else: one request or one job is one transaction, and a
            second `commit` splits it into halves of which one can be lost.
environ     Only settings/ reads the environment, so that every setting has a name, a type and a row in the
            reference. Child processes get an environment built for them: the named exceptions do that.
paths       Committed text names no folder of the machine it was written on.
migrations  Each follows another one, alone: two with one number would be two histories, and none is applied.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "portico"

MIGRATIONS = SOURCE / "control" / "migrations" / "versions"

COMMIT_HOME = {"kit/db.py"}
ENVIRON_HOME = "settings/"
# Files that build the environment of child processes they start.
ENVIRON_FOR_CHILDREN = {"embedded/postgres.py", "embedded/valkey.py", "embedded/platform.py"}

# Spelt in pieces so that this file does not find itself.
FOLDERS = ("wo" + "rk/", "tm" + r"p/portico(?![\w-])", "ro" + "ot/")
MACHINE_PATHS = re.compile(rf"(?<![\w.-])/(?:{'|'.join(FOLDERS)})")
BINARY = {".png", ".ico", ".woff2", ".bin"}


def commits(relative: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls of any `.commit(…)` outside the one transaction helper."""
    if relative in COMMIT_HOME:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "commit":
            yield node.lineno, "commit() belongs to kit/db.py alone; use `async with db.transaction() as tx`"


def environment(relative: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Uses of os.environ, os.environb, os.getenv and os.putenv outside settings/."""
    if relative.startswith(ENVIRON_HOME) or relative in ENVIRON_FOR_CHILDREN:
        return
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    for node in ast.walk(tree):
        hit = isinstance(node, ast.Attribute) and node.attr in names and isinstance(node.value, ast.Name)
        hit = hit and node.value.id == "os"  # type: ignore[attr-defined]
        hit = hit or (
            isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name in names for a in node.names)
        )
        if hit:
            yield node.lineno, "the environment is read in settings/ alone"  # type: ignore[attr-defined]


def source_findings() -> Iterator[str]:
    for path in sorted(SOURCE.rglob("*.py")):
        relative = path.relative_to(SOURCE).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for rule in (commits, environment):
            for line, message in rule(relative, tree):
                yield f"{path.relative_to(ROOT)}:{line}: {message}"


def committed_files() -> list[Path]:
    """What git tracks; outside a git checkout (an unpacked archive) there is nothing to hold back."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def path_findings() -> Iterator[str]:
    for path in committed_files():
        if path.suffix in BINARY or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if found := MACHINE_PATHS.search(line):
                yield f"{path.relative_to(ROOT)}:{number}: names a folder of one machine: {found[0]}"


def migration_findings(folder: Path = MIGRATIONS) -> Iterator[str]:
    """Steps whose number another one has, or that do not follow the one before them."""
    before: str | None = None
    for path in sorted(folder.glob("[0-9]*.py")):
        said = dict(
            re.findall(r'^(revision|down_revision) = "?(\w+)"?$', path.read_text(encoding="utf-8"), re.MULTILINE)
        )
        number = path.name.partition("_")[0]
        if said != {"revision": number, "down_revision": before or "None"}:
            yield f"{path.name}:1: a step is {number} after {before}, this one says {said}"
        before = number


def main() -> int:
    findings = [*source_findings(), *path_findings(), *migration_findings()]
    print("\n".join(findings))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
