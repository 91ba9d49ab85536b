"""The agent's httpx leaves out what it does not use, and nothing that it does."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from portico.kit.lean import httpcore, httpx
print(sorted(name for name in ("rich", "pygments", "h2", "hpack") if name in sys.modules))
import h2.connection, rich.console  # they are installed, and others may still have them
print(httpx.Client().get, httpcore.AsyncConnectionPool)
"""

AGENT = """
import sys
import portico.agent.app
print(sorted(name for name in ("rich", "pygments", "h2", "fastapi", "sqlalchemy") if name in sys.modules))
"""


def _run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[0]


def test_the_command_line_of_httpx_and_http2_are_left_out() -> None:
    assert _run(PROGRAM) == "[]"


def test_an_agent_starts_without_them() -> None:
    assert _run(AGENT) == "[]"
