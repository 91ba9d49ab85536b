"""What every drill stands on: `portico up`, an agent that a service manager keeps, a local app, and a look at what they hold.

The ping deadline is 4 s here (10 s by default), so that a frozen process is found in a test's time, and a request waits for a
tunnel as long as a drill may take (3 s by default), so that on a busy machine a slow start of Python is not taken for a lost
request: how long it was is a figure of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from portico.embedded.folders import temp_home
from tests.ports import free_port
from tests.system.memory import MIB, resident
from tests.system.platform import Account, Agent, Up, port_span, signal_all, tree
from tests.system.targets import app, listener, port_of

#: Seconds in which everything that is waited for happens on any machine; nothing is measured by it.
CEILING_SECONDS = 60.0
#: A pong may take 3 s: no pause of a busy machine is taken for a dead peer.
PINGS: dict[str, Any] = {"ping_interval_seconds": 1, "ping_timeout_seconds": 3, "hold_seconds": 45}
#: Seconds between two collections of usage.
USAGE_INTERVAL = 1.0
#: Requests that the tunnel takes at once: more than the load ever has under way.
CONCURRENCY = 400
#: What no process may ever say.
FAULTS = re.compile(
    r"Traceback \(most recent call last\)|exception was never retrieved|Task was destroyed but it is pending"
    r"|was never awaited|fault in the|fault while|a part of the relay ended|request failed"
)
#: Descriptors that a process may hold more than before: idle connections of pools, a log line's moment.
FD_MARGIN = 10
#: MiB that a process may hold more than before. Python keeps some of what a burst needed.
MEMORY_MARGIN = 20.0


@dataclass
class Holdings:
    """What the platform's processes hold at one moment, by the name of the part."""

    processes: Counter[str] = field(default_factory=Counter)
    descriptors: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    listening: set[int] = field(default_factory=set)
    advisory_locks: int = 0
    bindings: int = 0
    open_transactions: int = 0
    standbys: int = 0


#: What must be the same before and after, to the last one.
COUNTED = ("processes", "listening", "advisory_locks", "bindings", "open_transactions")


class KeptAgent:
    """An agent that is started again whenever it ends, as a service manager does."""

    def __init__(self, make: Callable[[], Agent]) -> None:
        self._make = make
        self.agent = make()
        self.all = [self.agent]
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> float:
        """Seconds until it was online."""
        began = time.monotonic()
        await self.agent.is_online(CEILING_SECONDS)
        self._keeper = asyncio.create_task(self._keep())
        return time.monotonic() - began

    async def _keep(self) -> None:
        while True:
            if self.agent.process.poll() is not None:
                await asyncio.sleep(0.1)
                self.agent = self._make()
                self.all.append(self.agent)
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        for agent in self.all:
            await asyncio.to_thread(agent.end)

    @property
    def said(self) -> str:
        return "".join(agent.err for agent in self.all)


class Stage:
    """See the module; made by :func:`stage`."""

    def __init__(self, name: str, folder: Path, stack: ExitStack, relays: int, settings: dict[str, Any]) -> None:
        self.name, self.folder, self._stack = name, folder, stack
        self.settings = (
            PINGS
            | {
                "standby": True,
                "tcp_ports": port_span(20),
                "tunnel_concurrency": CONCURRENCY,
                "usage_interval_seconds": USAGE_INTERVAL,
            }
            | settings
        )
        self.relays = relays
        self.home = temp_home(f"portico-drill-{name}-")
        stack.callback(shutil.rmtree, self.home, ignore_errors=True)
        self.ports = {kind: free_port() for kind in ("http", "https", "control", "api")}
        self.ups: list[Up] = []
        self.account: Account
        self.agent: KeptAgent
        self.sock: socket.socket
        self.tunnel_id = ""
        self.agent_start = self.up_start = 0.0
        self._read_to: dict[Path, int] = {}

    @property
    def up(self) -> Up:
        return self.ups[-1]

    @property
    def host(self) -> str:
        return f"{self.name}.localhost"

    async def start_up(self) -> None:
        """`portico up` on the same data and the same ports; returns when it is ready."""
        more = {f"{kind}_port": port for kind, port in self.ports.items()}
        up = Up(self.home, self.folder, self._stack, wait=False, **self.settings, **more, relays=self.relays)
        self.ups.append(up)
        began = time.monotonic()
        await asyncio.to_thread(up.wait)
        self.up_start = time.monotonic() - began

    def pids(self) -> dict[str, int]:
        """The processes of every part, by name; PostgreSQL's own children are not counted."""
        names = ["postgres", "valkey", "api", "worker", *(f"relay-{n}" for n in range(1, self.relays + 1))]
        return {"up": self.up.child.pid, "agent": self.agent.agent.pid, **{name: self.up.pid(name) for name in names}}

    # -- usage -------------------------------------------------------------------------------------------------------

    async def database(self) -> asyncpg.Connection:
        """The platform's own PostgreSQL."""
        environ = Path(f"/proc/{self.up.pid('api')}/environ").read_bytes().decode().split("\0")
        url = next(item.partition("=")[2] for item in environ if item.startswith("PORTICO_DATABASE_URL="))
        return await asyncpg.connect(url, timeout=CEILING_SECONDS)

    async def used(self) -> int:
        """Requests of the tunnel that the control plane has counted."""
        connection = await self.database()
        try:
            return int(
                await connection.fetchval(
                    "SELECT coalesce(sum(requests), 0) FROM tunnel_usage WHERE tunnel_id = $1", self.tunnel_id
                )
            )
        finally:
            await connection.close()

    async def used_at_rest(self, least: int, *, rest: float = 0.3, limit: float = CEILING_SECONDS) -> int:
        """The same once it reached ``least`` and stood still for ``rest`` seconds; after ``limit`` seconds as it is."""
        deadline = time.monotonic() + limit
        last, since = -1, time.monotonic()
        while True:
            with contextlib.suppress(OSError, asyncpg.PostgresError, TimeoutError):
                now = await self.used()
                if now != last:
                    last, since = now, time.monotonic()
                if now >= least and time.monotonic() - since > rest:
                    return now
            if time.monotonic() > deadline:
                return last
            await asyncio.sleep(0.1)

    # -- what is held ------------------------------------------------------------------------------------------------

    async def holdings(self) -> Holdings:
        held = Holdings()
        for name, pid in self.pids().items():
            held.descriptors[name] = len(os.listdir(f"/proc/{pid}/fd"))
            held.memory[name] = resident(pid)
        serving = set(self.pids().values())
        for pid in tree(self.up.child.pid):
            with contextlib.suppress(OSError, IndexError):
                argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if argv[1:4] == [b"-P", b"-m", b"portico.cli"]:
                    if pid not in serving and b"PORTICO_STANDBY_FD=" in Path(f"/proc/{pid}/environ").read_bytes():
                        held.standbys += 1  # it comes a while after the one that serves
                    else:
                        held.processes[argv[4].decode()] += 1
                held.listening |= listening(pid)
        connection = await self.database()
        try:
            held.advisory_locks = await connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
            held.bindings = await connection.fetchval(
                "SELECT count(*) FROM relay_bindings WHERE tunnel_id = $1", self.tunnel_id
            )
            held.open_transactions = await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
                " AND now() - state_change > interval '2 seconds'"
            )
        finally:
            await connection.close()
        return held

    async def holdings_at_rest(self) -> Holdings:
        """What is held when nothing comes and goes any more (a lock of a moment, a process that still drains)."""
        deadline = time.monotonic() + CEILING_SECONDS
        held = await self.holdings()
        while time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            before, held = held, await self.holdings()
            if all(getattr(before, what) == getattr(held, what) for what in COUNTED) and not held.open_transactions:
                break
        return held

    async def leaks(self, before: Holdings, limit: float = CEILING_SECONDS, memory: float = MEMORY_MARGIN) -> list[str]:
        """What is held beyond ``before`` and its margins; asked again until nothing is, for ``limit`` seconds."""
        deadline = time.monotonic() + limit
        while True:
            try:
                found = compare(before, await self.holdings(), memory)
            except (OSError, asyncpg.PostgresError, IndexError) as err:
                found = [f"not readable: {err!r}"]
            if not found or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.25)

    # -- what is said ------------------------------------------------------------------------------------------------

    def faults(self) -> list[str]:
        """Lines of the logs, since the last call, that no process may ever write; with what followed each."""
        found: list[str] = []
        for child in [*(up.child for up in self.ups), *self.agent.all]:
            text = child.err_path.read_bytes()[self._read_to.get(child.err_path, 0) :]
            self._read_to[child.err_path] = self._read_to.get(child.err_path, 0) + len(text)
            lines = text.decode("utf-8", "replace").splitlines()
            for number, line in enumerate(lines):
                if FAULTS.search(line):
                    found.append("\n".join([f"{child.name}:", *lines[max(0, number - 2) : number + 25]]))
        return found


def listening(pid: int) -> set[int]:
    """TCP ports that a process listens on."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(fd.readlink())
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                cells = line.split()
                if cells[3] == "0A" and cells[9] in inodes:
                    found.add(int(cells[1].rsplit(":", 1)[1], 16))
    return found


def compare(before: Holdings, after: Holdings, memory: float) -> list[str]:
    """What ``after`` holds beyond ``before``, and what it lacks."""
    found = []
    for what in COUNTED:
        one, other = getattr(before, what), getattr(after, what)
        if one != other:
            found.append(f"{what}: {one} before, {other} after")
    if after.standbys > 1:
        found.append(f"{after.standbys} processes wait to take over")
    for name, count in after.descriptors.items():
        if count > before.descriptors[name] + FD_MARGIN:
            found.append(f"descriptors of {name}: {before.descriptors[name]} before, {count} after")
    for name, size in after.memory.items():
        grown = (size - before.memory[name]) / MIB
        if grown > memory:
            found.append(f"memory of {name}: {grown:.0f} MiB more than before")
    return found


def plain_agent(made: Stage) -> Agent:
    """`portico http` in front of the stage's local app."""
    return Agent(made.account, made.folder, port_of(made.sock), made.name, **PINGS)


@asynccontextmanager
async def stage(
    name: str,
    folder: Path,
    *,
    relays: int = 1,
    serve: Callable[[socket.socket], AbstractAsyncContextManager[None]] = app,
    make: Callable[[Stage], Agent] = plain_agent,
    **settings: Any,
) -> AsyncIterator[Stage]:
    """A platform with an agent online and a local app behind it; everything ends with it."""
    with ExitStack() as stack:
        made = Stage(name, folder, stack, relays, settings)
        made.sock = stack.enter_context(listener())
        await made.start_up()
        made.account = await asyncio.to_thread(Account, made.up.api_url)
        stack.callback(made.account.close)
        async with serve(made.sock):
            made.agent = KeptAgent(lambda: make(made))
            try:
                made.agent_start = await made.agent.start()
                print(f"started: portico up {made.up_start:.1f} s, agent {made.agent_start:.1f} s")
                made.tunnel_id = (await asyncio.to_thread(made.account.tunnels))[name]["id"]
                yield made
            finally:
                await made.agent.stop()
                pids = [pid for up in made.ups for pid in tree(up.child.pid)]
                await asyncio.to_thread(made.up.child.end)
                signal_all([pid for pid in pids if ours(pid)], signal.SIGKILL)


def ours(pid: int) -> bool:
    """Whether the process still lives and is a Portico process (its id may be somebody else's by now)."""
    try:
        return b"portico.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
