"""Programs of the Go world that tests run against: built once into a cache folder with the `go` on PATH."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

BUILD_SECONDS = 170.0


def cache_folder(name: str) -> Path:
    """Where a built program is kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "portico-tests" / name


def built(module: str, version: str, oldest: str) -> Path:
    """The program of ``module``. Without Go the test is skipped, loudly; where skips are forbidden that is a failure.

    ``oldest``: the version of Go that builds it.
    """
    name = module.rpartition("/")[2]
    kept = cache_folder(f"{name}-{version}") / name
    if kept.exists():
        return kept
    go = shutil.which("go")
    if go is None:
        pytest.skip(f"{name} is built with Go ({oldest} or newer), and there is no `go` on PATH")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with (kept.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers of one run may want it at once
        if kept.exists():
            return kept
        env = os.environ | {"GOBIN": str(kept.parent), "GOTOOLCHAIN": "local", "GOFLAGS": "-buildvcs=false"}
        done = subprocess.run(
            [go, "install", f"{module}@{version}"],
            env=env,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
    assert done.returncode == 0 and kept.exists(), f"`go install {module}@{version}` failed:\n{done.stderr[-2000:]}"
    return kept
