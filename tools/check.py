"""Everything that must hold before a change lands, except the tests: `make check`.

One line per check with its time; the output of a failing check follows its line. `tools/check.py NAME…` runs some.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PYTHON = sys.executable

# Cheapest first, so that a slip shows at once.
CHECKS: dict[str, list[str]] = {
    "format": [str(BIN / "ruff"), "format", "--check", "--quiet", "."],
    "lint": [str(BIN / "ruff"), "check", "--quiet", "."],
    "source rules": [PYTHON, "tools/check_source.py"],
    "error codes": [PYTHON, "tools/check_codes.py"],
    "locks": [PYTHON, "tools/check_locks.py"],
    "reference pages": [PYTHON, "tools/reference.py", "--check"],
    "openapi": [PYTHON, "tools/openapi.py", "--check"],
    "layers": [str(BIN / "lint-imports"), "--no-cache"],
    "types": [str(BIN / "mypy"), "--strict", "src/portico", "tools", "bench"],
    "docs build": [str(BIN / "mkdocs"), "build", "--strict", "--quiet", "--site-dir", "build/site-check"],
}


def run(name: str, command: list[str]) -> bool:
    """Run one check and print its line; True when it passed."""
    started = time.monotonic()
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    took = time.monotonic() - started
    print(f"{'ok  ' if result.returncode == 0 else 'FAIL'} {name:<16} {took:5.1f} s", flush=True)
    if result.returncode != 0:
        print("".join(f"     {line}\n" for line in result.stdout.splitlines()), flush=True)
    return result.returncode == 0


def main(names: list[str]) -> int:
    """Run the named checks, or all; 0 when every one passed."""
    if unknown := [name for name in names if name not in CHECKS]:
        print(f"no check named {', '.join(unknown)}; there are: {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    failed = [name for name in names or CHECKS if not run(name, CHECKS[name])]
    print(
        f"{len(failed)} of {len(names or CHECKS)} checks failed: {', '.join(failed)}" if failed else "all checks passed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
