"""Run the coverage-guided fuzzers: `python -m tests.fuzz.run [--seconds N] [--keep] [TARGET…]` (atheris, CPython 3.11, Linux).

Each target starts from its committed corpus. New inputs are thrown away unless `--keep` makes the committed corpus anew from
the smallest inputs that reach everything reached so far. A failing input is saved in the corpus as `crash-…`: commit it with
the fix.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
MAX_INPUT = 4096


def fuzz(target: str, folder: Path, options: list[str]) -> int:
    """One fuzzer process; its exit status."""
    command = [sys.executable, "-m", "tests.fuzz.child", target, str(folder / "replay")]
    replay = folder / "replay"
    replay.write_text(f'#!/bin/sh\ncd {shlex.quote(str(ROOT))} && exec {shlex.join(command)} "$@"\n')
    replay.chmod(0o700)
    return subprocess.run([*command, *options], cwd=ROOT, check=False).returncode


def run(target: str, seconds: int, keep: bool) -> int:
    """Fuzz one target; with `keep`, minimise its corpus afterwards."""
    committed = CORPUS / target
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found, smallest = folder / "found", folder / "smallest"
        found.mkdir()
        smallest.mkdir()
        common = [f"-max_len={MAX_INPUT}", f"-artifact_prefix={committed}/"]
        limits = [f"-max_total_time={seconds}", "-print_final_stats=1", "-verbosity=0"]
        if status := fuzz(target, folder, [*common, *limits, str(found), str(committed)]):
            return status
        if not keep:
            return 0
        if status := fuzz(target, folder, [*common, "-merge=1", str(smallest), str(committed), str(found)]):
            return status
        for path in committed.iterdir():
            if not path.name.startswith("crash-"):
                path.unlink()
        for path in smallest.iterdir():
            shutil.copy(path, committed / path.name[:16])
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all when none is named")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--keep", action="store_true", help="make the committed corpus anew from what was reached")
    options = parser.parse_args()
    if find_spec("atheris") is None:
        print("portico: the fuzzers need atheris, which is locked for CPython 3.11 on Linux alone", file=sys.stderr)
        return 1
    for target in options.targets or TARGETS:
        if status := run(target, options.seconds, options.keep):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
