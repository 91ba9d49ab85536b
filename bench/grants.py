"""How many grants one API process gives out: sessions opened (one tunnel each) and refreshed, per second.

    python -m bench.grants [--json] [--seconds 5] [--connections 16] [--agents 200]

Starts a real PostgreSQL (durable: every commit is on disk), Valkey and `portico api` in a folder of its own, and asks over
keep-alive connections from a process of its own. Prints requests per second, CPU per request of the API process (from
/proc), and latency. The target is 500 per second on one API process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench import proc
from bench.processes import free_port
from portico.control import bootstrap, migrations
from portico.embedded.postgres import EmbeddedPostgres
from portico.embedded.valkey import EmbeddedValkey
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret

TARGET = 500


@dataclass
class Connection:
    """One keep-alive HTTP connection, spoken by hand: the client must not be what is measured."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def post(self, path: str, key: str, body: object) -> dict[str, object]:
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {key}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        self.writer.write(head.encode() + raw)
        top = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status = int(top.split(" ", 2)[1])
        length = next(int(line[15:]) for line in top.split("\r\n") if line.lower().startswith("content-length:"))
        answer = await self.reader.readexactly(length)
        if status not in (200, 201):
            raise SystemExit(f"{path} answered {status}: {answer.decode()[:300]}")
        return dict(json.loads(answer))


@dataclass
class Agents:
    """What the load asks for: agents of one key, each with one named tunnel."""

    key: str
    count: int
    sessions: dict[int, str] = field(default_factory=dict)

    async def open(self, connection: Connection, number: int) -> None:
        n = number % self.count
        tunnel = {"protocol": "http", "name": f"bench-{n}", "target": "http://127.0.0.1:8000"}
        body = {"agent_id": f"agt-bench-{n:06}", "hostname": "bench", "version": "0", "tunnels": [tunnel]}
        self.sessions[n] = str((await connection.post("/v1/agent/sessions", self.key, body))["session"])

    async def refresh(self, connection: Connection, number: int) -> None:
        n = number % self.count
        path = f"/v1/agent/sessions/{self.sessions[n]}/refresh"
        await connection.post(path, self.key, {"agent_id": f"agt-bench-{n:06}"})

    async def open_new(self, connection: Connection, number: int) -> None:
        """A new agent instance each time, on tunnels that exist: what a fleet does after an API outage."""
        tunnel = {"protocol": "http", "name": f"bench-{number % self.count}"}
        body = {"agent_id": f"agt-new-{os.urandom(8).hex()}", "hostname": "bench", "version": "0", "tunnels": [tunnel]}
        await connection.post("/v1/agent/sessions", self.key, body)


async def measure(
    name: str, act: Callable[[Connection, int], object], connections: list[Connection], seconds: float, pid: int
) -> tuple[float, float]:
    """Run ``act`` on every connection for ``seconds``; prints one row; the rate, and µs of CPU of the API for each."""
    times: list[float] = []
    numbers = iter(range(10**9))
    start, cpu = time.perf_counter(), proc.cpu(pid)
    end = start + seconds

    async def loop(connection: Connection) -> None:
        while time.perf_counter() < end:
            began = time.perf_counter()
            await act(connection, next(numbers))  # type: ignore[misc]
            times.append(time.perf_counter() - began)

    await asyncio.gather(*(loop(connection) for connection in connections))
    took, used = time.perf_counter() - start, cpu.until(proc.cpu(pid))
    rate = len(times) / took
    cuts = statistics.quantiles(times, n=100)
    print(
        f"{name:34} {rate:7.0f}/s   API CPU {used / len(times) * 1e6:6.0f} µs   "
        f"p50 {cuts[49] * 1e3:5.1f} ms   p99 {cuts[98] * 1e3:5.1f} ms"
    )
    return rate, used / len(times) * 1e6


async def load(port: int, key: str, relay_key: str, pid: int, args: argparse.Namespace) -> tuple[float, float]:
    """Rate and CPU (as :func:`measure`) of the slowest of the three ways to get a grant."""
    agents = Agents(key, args.agents)
    relay = await Connection.open(port)
    beat = {"relay": "relay-1", "connect_url": "ws://127.0.0.1:7081/v1/connect", "public_url": "http://127.0.0.1:7080"}

    async def beats() -> None:
        while True:
            await relay.post("/v1/edge/heartbeat", relay_key, beat)
            await asyncio.sleep(2)

    heart = asyncio.create_task(beats())
    await asyncio.sleep(0.2)
    first = await Connection.open(port)
    for n in range(args.agents):
        await agents.open(first, n)
    # Only now: the server closes connections that are idle meanwhile.
    connections = [await Connection.open(port) for _ in range(args.connections)]
    opened = await measure("session, one tunnel, reconnect", agents.open, connections, args.seconds, pid)
    fresh = await measure("session, one tunnel, new instance", agents.open_new, connections, args.seconds, pid)
    refreshed = await measure("refresh, one tunnel", agents.refresh, connections, args.seconds, pid)
    heart.cancel()
    return min(opened, fresh, refreshed)


async def prepare(settings: ApiSettings) -> bootstrap.Credentials:
    await migrations.upgrade(settings.database_url.reveal())
    return await bootstrap.ensure_first(settings, relays=("relay-1",))


def wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as probe:
                probe.sendall(b"GET /readyz HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
                if b" 200 " in probe.recv(64):
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise SystemExit("the API was not ready within 30 s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--agents", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print the figure as a JSON line too")
    parser.add_argument("--profile", type=Path, help="write a cProfile of the API process to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pbench-") as folder:
        Path(folder).chmod(0o755)
        with EmbeddedPostgres(Path(folder) / "pg") as postgres, EmbeddedValkey(Path(folder) / "valkey") as valkey:
            port = free_port()
            master = new_master_key()
            settings = ApiSettings(database_url=Secret(postgres.uri), master_key=Secret(master))
            credentials = asyncio.run(prepare(settings))
            env = {
                **os.environ,
                "PORTICO_DATABASE_URL": postgres.uri,
                "PORTICO_REDIS_URL": valkey.url,
                "PORTICO_MASTER_KEY": master,
                "PORTICO_API_PORT": str(port),
                "PORTICO_LOG_LEVEL": "WARNING",
            }
            profiler = ["-m", "cProfile", "-o", str(args.profile)] if args.profile else []
            api = subprocess.Popen([sys.executable, *profiler, "-m", "portico.cli", "api"], env=env)
            try:
                wait_until_ready(port)
                rate, spent = asyncio.run(
                    load(port, credentials.agent_key, credentials.relay_keys["relay-1"], api.pid, args)
                )
            finally:
                api.send_signal(signal.SIGTERM)
                api.wait(20)
    print(f"target {TARGET}/s: {'reached' if rate >= TARGET else 'MISSED'}")
    if args.json:
        print(json.dumps({"per_second": rate, "cpu_us": spent}))
    sys.exit(0 if rate >= TARGET else 1)


if __name__ == "__main__":
    main()
