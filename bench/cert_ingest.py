"""How many certificate events one API process takes in: verified, stored and committed, per second.

    python -m bench.cert_ingest [--json] [--seconds 5] [--connections 64] [--codec standard] [--profile FILE]

Starts a real PostgreSQL (durable: fsync and synchronous_commit are on, and looked at) and `portico api` in a folder of its
own, makes a source, signs all requests before the clock runs, and sends them over keep-alive connections. Every answer must
be 202, and the events are counted in the table afterwards. Prints events per second, CPU per event of the API process (from
/proc), and latency. The target is 1,000 per second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import asyncpg

from bench import proc
from bench.grants import Connection, prepare, wait_until_ready
from bench.processes import free_port
from portico.embedded.postgres import EmbeddedPostgres
from portico.kit.http_signatures import Target
from portico.kit.sealing import new_master_key
from portico.kit.signed_requests import SigningKey, headers
from portico.settings import ApiSettings, Secret

TARGET = 1000
PATH = "/v1/domains/cert-events"
#: Requests that are signed for each second that is measured: more than can be sent.
AHEAD = 4000


@dataclass(frozen=True)
class Source:
    """A source and its key."""

    id: str
    key: SigningKey


def request(source: Source, number: int, codec: str) -> bytes:
    """One event as it goes over the wire."""
    event = f"evt_{number}"
    body = json.dumps({
        "specVersion": "1", "eventId": event, "sourceId": source.id, "clusterId": "eu-1", "environment": "bench",
        "sequence": number, "occurredAt": datetime.now(UTC).isoformat(), "callbackClass": "renewal",
        "callbackAction": "succeeded", "subject": {"hostname": f"www{number % 5000}.example.com"},
        "certificate": {
            "serial": f"{number:032x}", "fingerprintSha256": f"{number:064x}", "issuer": "CN=R11,O=Bench",
            "notBefore": "2026-01-01T00:00:00Z", "notAfter": "2026-04-01T00:00:00Z",
        },
        "provenance": {"producer": "bench", "objectKind": "Certificate", "objectUid": f"uid-{number}", "revision": 7},
    }).encode()  # fmt: skip
    fields = headers(codec, source.key, source.id, "eu-1", event, int(time.time()), Target("POST", "bench", PATH), body)  # type: ignore[arg-type]
    head = f"POST {PATH} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n"
    return (head + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n").encode() + body


async def make_source(port: int, operator_key: str) -> Source:
    connection = await Connection.open(port)
    wanted = {"name": "bench", "environment": "bench", "clusters": ["eu-1"], "hostnames": ["*.example.com"]}
    made = await connection.post("/v1/admin/cert-sources", operator_key, wanted)
    key = made["key"]
    assert isinstance(key, dict)
    return Source(str(made["id"]), SigningKey.of(key["id"], key["secret"]))


async def exchange(connection: Connection, raw: bytes) -> int:
    """The status of the answer."""
    connection.writer.write(raw)
    top = await connection.reader.readuntil(b"\r\n\r\n")
    at = top.lower().index(b"content-length:")
    await connection.reader.readexactly(int(top[at + 15 : top.index(b"\r\n", at)]))
    return int(top[9:12])


async def load(port: int, pid: int, args: argparse.Namespace, make: Callable[[int], bytes]) -> dict[str, float]:
    """Send requests, made by their numbers before the clock runs, for so many seconds; the figures. Each must be answered 202."""
    waiting = iter([make(n) for n in range(int(AHEAD * args.seconds))])
    connections = [await Connection.open(port) for _ in range(args.connections)]
    times: list[float] = []
    began, spent = time.perf_counter(), proc.cpu(pid)
    end = began + args.seconds

    async def send(connection: Connection) -> None:
        for raw in waiting:
            start = time.perf_counter()
            if start >= end:
                return
            status = await exchange(connection, raw)
            if status != 202:
                raise SystemExit(f"an event was answered {status}")
            times.append(time.perf_counter() - start)

    await asyncio.gather(*(send(connection) for connection in connections))
    took, used = time.perf_counter() - began, spent.until(proc.cpu(pid))
    cuts = statistics.quantiles(times, n=100)
    return {
        "events": len(times),
        "per_second": len(times) / took,
        "cpu_ms": used / len(times) * 1e3,
        "p50_ms": cuts[49] * 1e3,
        "p99_ms": cuts[98] * 1e3,
    }


async def durable(uri: str) -> None:
    """Raises when a commit would not be on disk."""
    connection = await asyncpg.connect(uri)
    for name in ("fsync", "synchronous_commit"):
        if (found := await connection.fetchval(f"SHOW {name}")) != "on":
            raise SystemExit(f"{name} is {found}: this would measure something else")
    await connection.close()


async def stored(uri: str) -> int:
    connection = await asyncpg.connect(uri)
    found = await connection.fetchval("SELECT count(*) FROM certificate_lifecycle_events WHERE queue_state = 'pending'")
    await connection.close()
    return int(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--codec", choices=("standard", "compact", "http"), default="standard")
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON line")
    parser.add_argument("--profile", type=Path, help="write a cProfile of the API process to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pbench-") as folder:
        Path(folder).chmod(0o755)
        with EmbeddedPostgres(Path(folder) / "pg") as postgres:
            port, master = free_port(), new_master_key()
            settings = ApiSettings(database_url=Secret(postgres.uri), master_key=Secret(master))
            credentials = asyncio.run(prepare(settings))
            asyncio.run(durable(postgres.uri))
            env = {
                **os.environ,
                "PORTICO_DATABASE_URL": postgres.uri,
                "PORTICO_MASTER_KEY": master,
                "PORTICO_API_PORT": str(port),
                "PORTICO_LOG_LEVEL": "WARNING",
            }
            profiler = ["-m", "cProfile", "-o", str(args.profile)] if args.profile else []
            api = subprocess.Popen([sys.executable, *profiler, "-m", "portico.cli", "api"], env=env)
            try:
                wait_until_ready(port)
                source = asyncio.run(make_source(port, credentials.operator_key))
                figures = asyncio.run(load(port, api.pid, args, lambda n: request(source, n, args.codec)))
            finally:
                api.send_signal(signal.SIGTERM)
                api.wait(20)
            kept = asyncio.run(stored(postgres.uri))
    if kept != figures["events"]:
        raise SystemExit(f"{figures['events']:.0f} events were taken and {kept} are stored")
    print(
        f"{figures['per_second']:,.0f} events/s   API CPU {figures['cpu_ms']:.2f} ms   p50 {figures['p50_ms']:.1f} ms   "
        f"p99 {figures['p99_ms']:.1f} ms   (target {TARGET:,})"
    )
    if args.json:
        print(json.dumps(figures))
    sys.exit(0 if figures["per_second"] >= TARGET else 1)


if __name__ == "__main__":
    main()
