"""go-httpbin, an independent HTTP server (of Go's net/http): built once into a cache folder, run on a free port."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

#: The newest that Go 1.24 builds.
VERSION = "v2.20.0"
MODULE = "github.com/mccutchen/go-httpbin/v2/cmd/go-httpbin"
BUILD_SECONDS = 170.0
START_SECONDS = 15.0


def cache_folder() -> Path:
    """Where built programs are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "portico-tests" / f"go-httpbin-{VERSION}"


def program() -> Path:
    """The built program. Without Go the test is skipped, loudly; where skips are forbidden that is a failure."""
    kept = cache_folder() / "go-httpbin"
    if kept.exists():
        return kept
    go = shutil.which("go")
    if go is None:
        pytest.skip("go-httpbin is built with Go (1.24 or newer), and there is no `go` on PATH")
    kept.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"GOBIN": str(kept.parent), "GOTOOLCHAIN": "local", "GOFLAGS": "-buildvcs=false"}
    done = subprocess.run(
        [go, "install", f"{MODULE}@{VERSION}"],
        env=env,
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    assert done.returncode == 0 and kept.exists(), f"`go install {MODULE}@{VERSION}` failed:\n{done.stderr[-2000:]}"
    return kept


@contextmanager
def running(port: int, log: Path) -> Iterator[None]:
    """go-httpbin on ``port`` of 127.0.0.1."""
    argv = [str(program()), "-host", "127.0.0.1", "-port", str(port)]
    # Its own limits are lower than ours by default, and it would answer before a slow case is over.
    argv += ["-max-body-size", "16777216", "-srv-max-header-bytes", "1048576", "-srv-read-header-timeout", "20s"]
    argv += ["-srv-read-timeout", "30s", "-max-duration", "20s"]
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out)
    try:
        _wait_for(port, process, log)
        yield
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None, f"go-httpbin ended: {log.read_text()}"
            assert time.monotonic() < deadline, "go-httpbin does not listen"
            time.sleep(0.02)
