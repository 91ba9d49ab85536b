"""go-httpbin, an independent HTTP server (of Go's net/http): built once into a cache folder, run on a free port."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.gotools import built

#: The newest that Go 1.24 builds.
VERSION = "v2.20.0"
MODULE = "github.com/mccutchen/go-httpbin/v2/cmd/go-httpbin"
START_SECONDS = 15.0


def program() -> Path:
    """The built program."""
    return built(MODULE, VERSION, "1.24")


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
