"""The whole platform as real child processes, driven through the real command line, and what tests read off it.

Every child is in ``CHILDREN`` while it lives: a failed test shows the ends of their logs (conftest.py), and whatever
happens, fixtures end each one by its pid. A child also ends with the test run (its death signal).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from portico.embedded.spawn import spawn
from portico.embedded.units import portico_argv
from tests.timing import allowed

POLL_SECONDS = 0.02
CHILDREN: list[Child] = []
#: Those that ended within the present test.
ENDED: list[Child] = []


def clean_environment(more: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Our environment without Portico's own settings, and ``more`` as ``PORTICO_…``."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PORTICO_")}
    env["PYTHONUNBUFFERED"] = "1"
    return env | {f"PORTICO_{key.upper()}": str(value) for key, value in (more or {}).items()}


class Child:
    """``portico ARGS…`` as a process; its output in two files of ``folder``."""

    def __init__(
        self,
        name: str,
        args: Sequence[str],
        folder: Path,
        settings: Mapping[str, Any],
        argv: Sequence[str] | None = None,
        cwd: str | Path = "/",
    ) -> None:
        self.name = name
        serial = len(list(folder.glob("*.err")))
        self.out_path = folder / f"{serial:03}-{name}.out"
        self.err_path = folder / f"{serial:03}-{name}.err"
        with self.out_path.open("wb") as out, self.err_path.open("wb") as err:
            self.process: subprocess.Popen[bytes] = spawn(
                argv or portico_argv(*args),
                env=clean_environment(settings),
                output=err.fileno(),
                stdout=out.fileno(),
                cwd=cwd,
            )
        CHILDREN.append(self)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        return self.out_path.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self.err_path.read_text(encoding="utf-8", errors="replace")

    def tail(self, lines: int = 40) -> str:
        """The end of what it said, for a failed test."""
        out = [line for line in self.out.splitlines() if '"event": "request"' not in line]
        said = [f"out: {line}" for line in out[-lines:]] + self.err.splitlines()[-lines:]
        state = "runs" if self.process.poll() is None else f"ended with {self.process.returncode}"
        return f"{self.name} (pid {self.pid}) {state}\n" + "\n".join(said)

    def wait_for(self, what: Callable[[], Any], limit: float, why: str) -> Any:
        """Until ``what()`` is true (returned); fails when the process ends or the time is up."""
        began = time.monotonic()
        while not (found := what()):
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode} before {why}"
            assert time.monotonic() < began + allowed(limit, began), f"{self.name}: no {why} in {limit:g} s"
            time.sleep(POLL_SECONDS)
        return found

    async def exit(self, limit: float) -> int:
        """Its exit code, within ``limit`` seconds."""
        began = time.monotonic()
        while (code := self.process.poll()) is None:
            assert time.monotonic() < began + allowed(limit, began), f"{self.name} still runs after {limit:g} s"
            await asyncio.sleep(POLL_SECONDS)
        return code

    def kill(self, signum: int = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signum)

    def end(self, limit: float = 30.0) -> None:
        """Ask it to end, then make it; also when it was stopped."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGCONT)
                self.process.terminate()
                try:
                    self.process.wait(limit)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()
        finally:
            if self in CHILDREN:
                CHILDREN.remove(self)
                ENDED.append(self)


class Agent(Child):
    """``portico http PORT --name NAME --json``."""

    def __init__(
        self, where: Account, folder: Path, port: int, name: str, key: str | None = None, **settings: Any
    ) -> None:
        own = {"server": where.api_url, "agent_key": key or where.agent_key, "config_dir": folder / "config"}
        super().__init__(f"agent-{name}", ["http", str(port), "--name", name, "--json"], folder, own | settings)

    def events(self) -> list[dict[str, Any]]:
        """The lines that are complete by now."""
        lines = self.out.split("\n")[:-1]
        return [json.loads(line) for line in lines if line.strip()]

    def online(self, limit: float = 30.0) -> Agent:
        """Wait for its first `online` line."""
        self.wait_for(lambda: any(e.get("event") == "online" for e in self.events()), limit, "online event")
        return self

    async def is_online(self, limit: float = 30.0) -> Agent:
        """The same without holding up the loop."""
        deadline = time.monotonic() + limit
        while not any(e.get("event") == "online" for e in self.events()):
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}"
            assert time.monotonic() < deadline, f"{self.name} is not online after {limit:g} s"
            await asyncio.sleep(POLL_SECONDS)
        return self

    @property
    def said(self) -> str:
        return self.out + self.err


class Account:
    """An organization of its own: its owner's access token, and agent keys as many as are wanted."""

    def __init__(self, api_url: str, agent_url: str | None = None) -> None:
        self.api_url = agent_url or api_url
        self._http = httpx.Client(base_url=f"{api_url}/v1", trust_env=False, timeout=60)
        email = f"owner-{os.urandom(6).hex()}@example.test"
        body = {"email": email, "password": os.urandom(12).hex(), "organization": "System tests"}
        self.token = self.call("POST", "/auth/register", body, token=None)["access_token"]
        self.key_id, self.agent_key = self.new_key()

    def call(self, method: str, path: str, body: Any = None, token: str | None = "") -> dict[str, Any]:
        headers = {} if token is None else {"Authorization": f"Bearer {token or self.token}"}
        answer = self._http.request(method, path, json=body, headers=headers)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return dict(answer.json()) if answer.content else {}

    def new_key(self) -> tuple[str, str]:
        """Id and text of a new agent key."""
        made = self.call("POST", "/api-keys", {"kind": "agent", "name": "system test"})
        return made["id"], made["key"]

    def revoke(self, key_id: str) -> None:
        self.call("DELETE", f"/api-keys/{key_id}")

    def tunnels(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.call("GET", "/tunnels?limit=100")["data"]}

    def close(self) -> None:
        self._http.close()


class Up:
    """``portico up`` on free ports (or those given as ``http_port=…``), in a home of its own."""

    def __init__(self, home: Path, folder: Path, stack: ExitStack, *, wait: bool = True, **settings: Any) -> None:
        self.home, self.folder = home, folder
        given = {name: settings.pop(f"{name}_port", 0) for name in ("http", "https", "control", "api")}
        ports = [part for name, port in given.items() for part in (f"--{name}-port", str(port))]
        # The second API process that waits costs each of many platforms a second of the processor; who kills an API asks for it.
        self.child = Child("up", ["up", "--data", str(home), *ports], folder, {"standby": False} | settings)
        stack.callback(self.child.end)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it is ready; without ``wait`` this is still due."""
        self.child.wait_for(lambda: "ready" in self.child.out.splitlines(), 90, "`ready` line")
        self.credentials = json.loads((self.home / "credentials.json").read_text())
        self.http_port = port_in(self.credentials["relay_url"])
        self.https_port = port_in(self.credentials["https_url"])
        self.api_url: str = self.credentials["api_url"]

    def pid(self, name: str) -> int:
        """The present process of one part, from the supervisor's own list (one that drains stands before its successor)."""
        rows = json.loads((self.home / "run" / "children").read_text())
        return [int(row["pid"]) for row in rows if row["name"] == name][-1]

    def command(self, account: Account, *args: str) -> subprocess.CompletedProcess[str]:
        """Run a `portico` command to its end."""
        env = clean_environment(
            {"server": account.api_url, "agent_key": account.agent_key, "config_dir": self.folder / "config"}
        )
        return subprocess.run(portico_argv(*args), env=env, capture_output=True, text=True, timeout=60, check=False)


def port_span(count: int) -> str:
    """``first-last``: so many neighbouring ports that nobody has now, below those that the system gives out itself."""
    while True:
        first = random.SystemRandom().randrange(20_000, 32_000)
        opened = []
        try:
            for number in range(first, first + count):
                opened.append(sock := socket.socket())
                sock.bind(("127.0.0.1", number))
            return f"{first}-{first + count - 1}"
        except OSError:
            continue
        finally:
            for sock in opened:
                sock.close()


def port_in(url: str) -> int:
    return int(url.rsplit(":", 1)[1].split("/")[0])


def tree(pid: int) -> list[int]:
    """A process and all below it (PostgreSQL's children sit in sessions of their own)."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(encoding="ascii", errors="replace")
            except OSError:
                continue
            below.setdefault(int(stat[stat.rindex(")") + 2 :].split()[1]), []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += below.get(one, [])
    return found


def signal_all(pids: Iterable[int], signum: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            pass
