"""`portico` as a process with a config folder of its own, and the small documents that its tests share."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from portico.agent import credentials
from portico.agent.credentials import Credentials
from portico.settings import Secret
from tests.agent.api_server import KEY, TestApi

WHO = {
    "kind": "agent_key", "user": {"id": "usr_1", "email": "a@b.c"},
    "organization": {"id": "org_1", "name": "Org", "plan": "free"},
    "key": {"id": "key_1", "name": "k", "prefix": "tnl_agt_0123"},
}  # fmt: skip
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str


class Cli:
    """Runs `portico` with a config folder of its own."""

    def __init__(self, folder: Path, api: TestApi) -> None:
        self.folder = folder
        self.api = api
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("PORTICO_")}
        self.env |= {"PORTICO_CONFIG_DIR": str(folder), "NO_COLOR": "1"}

    async def start(self, *args: str, **env: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "portico.cli", *args, env=self.env | env,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    async def run(self, *args: str, stdin: str = "", **env: str) -> Done:
        process = await self.start(*args, **env)
        out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 30)
        return Done(process.returncode or 0, out.decode(), err.decode())

    def signed_in(self) -> None:
        """What `login` leaves behind, without the second that a process takes."""
        credentials.write(self.folder, Credentials(self.api.url, Secret(KEY), "a@b.c · Org"))

    async def login(self) -> None:
        done = await self.run("login", "--server", self.api.url, "--token", KEY)
        assert done.code == 0, done.err


def only_line(text: str) -> str:
    """The one line of an error."""
    assert text.count("\n") == 1 and text.startswith("portico: "), text
    return text
