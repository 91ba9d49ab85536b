"""Homes that the servers' account can reach, and a way to run code as an ordinary user when the tests run as root."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from portico.embedded.folders import temp_home
from portico.embedded.postgres import EmbeddedPostgres
from portico.embedded.spawn import living_in


@pytest.fixture
def home() -> Iterator[Path]:
    """A new home; at the end no server may live in it."""
    folder = temp_home("portico-test-")
    yield folder
    left = living_in(folder / "pg" / "data") + living_in(folder / "valkey")
    for pid in left:
        os.kill(pid, 9)
    shutil.rmtree(folder, ignore_errors=True)
    assert not left, f"servers left behind: {left}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedPostgres]:
    """One running server for the tests of a module that do not stop it."""
    folder = temp_home("portico-test-")
    server = EmbeddedPostgres(folder, durable=False)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def as_user() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code as an ordinary user: ourselves, or, when we are root, as an account without rights.

    The interpreter may lie where that account cannot read it: everything is imported before the switch.
    """

    def run(code: str, *args: str | Path, account: str = "nobody") -> subprocess.CompletedProcess[str]:
        switch = (
            "import asyncio, asyncpg, os, pathlib, stat, sys; from portico.embedded.postgres import EmbeddedPostgres\n"
        )
        if os.geteuid() == 0:
            entry = pwd.getpwnam(account)
            switch += f"os.setgroups([]); os.setgid({entry.pw_gid}); os.setuid({entry.pw_uid})\n"
        return subprocess.run(
            [sys.executable, "-P", "-c", switch + code, *map(str, args)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd="/",
            env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
        )

    return run
