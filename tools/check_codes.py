"""Every error code is in contracts/errors.toml, is raised by something, is seen by a test, and has a title and a hint.

A code is found where it is written: the first argument of `Problem(…)`. `Problem` refuses an unlisted code when it is
raised; this finds it before. A listed code that no source file names is a promise nobody keeps, and one that no test
names could be any other code.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def catalogue() -> dict[str, dict[str, object]]:
    tables = tomllib.loads((ROOT / "contracts/errors.toml").read_text(encoding="utf-8"))
    return {f"{area}.{name}": row for area, rows in tables.items() for name, row in rows.items()}


def texts(node: ast.AST) -> Iterator[ast.Constant]:
    """String constants in an expression, but not those inside an f-string or a nested call."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from texts(value)


def raised(tree: ast.AST) -> Iterator[ast.Constant]:
    """Constants that stand where a code must stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == "Problem" and node.args:
                yield from texts(node.args[0])


def constants(tree: ast.AST) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def findings() -> Iterator[str]:
    known = catalogue()
    named: set[str] = set()
    for path in sorted((ROOT / "src/portico").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        named |= constants(tree)
        for constant in raised(tree):
            if constant.value not in known:
                where = f"{path.relative_to(ROOT)}:{constant.lineno}"
                yield f"{where}: code {constant.value!r} is not in contracts/errors.toml"
    tested = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py")))
    for code, row in known.items():
        if not {"status", "retryable", "title", "hint"} <= row.keys():
            yield f"contracts/errors.toml: {code} lacks one of status, retryable, title, hint"
        if code not in named:
            yield f"contracts/errors.toml: nothing raises {code}"
        elif code not in tested:
            yield f"contracts/errors.toml: no test sees {code}"


def main() -> int:
    found = list(findings())
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
