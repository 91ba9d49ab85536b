"""Closed-loop load on one endpoint: wrk where it is installed, our own client elsewhere (slower, it checks every body).

Either way one answer is checked byte by byte before and after, and the bytes of all others must add up to that one.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from bench.apps import SMALL_BODY
from bench.figures import Refused, check_load
from bench.visit import Endpoint, check, head_of

SCRIPT = Path(__file__).with_name("report.lua")
Fields = Sequence[tuple[str, str]]

#: What a browser sends with every request.
BROWSER_FIELDS: Fields = (
    (
        "User-Agent",
        "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36",
    ),
    ("Accept", "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"),
    ("Accept-Encoding", "gzip, deflate, br, zstd"),
    ("Accept-Language", "en-GB,en;q=0.9,de;q=0.6"),
    ("Cache-Control", "no-cache"),
    ("Cookie", "session=5f2b9c0e7a614d0fb1f6a1c3d8e7f904; theme=dark; consent=necessary; _seen=1763970000"),
    ("DNT", "1"),
    ("Pragma", "no-cache"),
    ("Referer", "https://bench.example/dashboard?tab=overview"),
    ("sec-ch-ua", '"Chromium";v="140", "Not=A?Brand";v="24"'),
    ("sec-ch-ua-mobile", "?0"),
    ("sec-ch-ua-platform", '"Linux"'),
    ("Sec-Fetch-Dest", "document"),
    ("Sec-Fetch-Mode", "navigate"),
    ("Sec-Fetch-Site", "same-origin"),
    ("Upgrade-Insecure-Requests", "1"),
)


@dataclass(frozen=True, slots=True)
class Work:
    """What the load generator does."""

    connections: int
    seconds: float
    fields: Fields = ()


@dataclass(frozen=True, slots=True)
class Load:
    """What a load generator saw. Latencies are those of single requests, in microseconds."""

    requests: int
    seconds: float
    read_bytes: int
    errors: Mapping[str, int]
    p50_us: float
    p99_us: float


def generator() -> str:
    """``wrk``, or ``own`` where it is not installed."""
    return "wrk" if shutil.which("wrk") else "own"


def drive(endpoint: Endpoint, work: Work) -> Load:
    """Put the work on ``endpoint``; raises :class:`Refused` unless every answer was right."""
    answer_bytes = check(endpoint, SMALL_BODY, work.fields)
    seen = _wrk(endpoint, work) if generator() == "wrk" else _own(endpoint, work)
    check(endpoint, SMALL_BODY, work.fields)
    check_load(seen.requests, seen.errors, seen.read_bytes, answer_bytes, work.connections)
    return seen


def _wrk(endpoint: Endpoint, work: Work) -> Load:
    # wrk takes whole seconds.
    argv = ["wrk", "-t1", f"-c{work.connections}", f"-d{max(1, round(work.seconds))}s", "-s", str(SCRIPT)]
    for name, value in (("Host", endpoint.host), *work.fields):
        argv += ["-H", f"{name}: {value}"]
    return parse_wrk(_run([*argv, endpoint.url], work.seconds + 30))


def _run(argv: Sequence[str], limit: float) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise Refused(f"{argv[0]} did not end within {limit:g} s") from None
    if done.returncode != 0:
        raise Refused(f"{argv[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[:200]}")
    return done.stdout


def parse_wrk(text: str) -> Load:
    """The JSON line of ``report.lua`` in wrk's output; raises :class:`Refused` when it is missing."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            found = json.loads(line)
            return Load(
                found["requests"],
                found["duration_us"] / 1e6,
                found["bytes"],
                found["errors"],
                found["p50_us"],
                found["p99_us"],
            )
    raise Refused(f"wrk printed no figures: {text.strip()[-200:]}")


# ── our own client ────────────────────────────────────────────────────────────────────────────────────────────────────


def _own(endpoint: Endpoint, work: Work) -> Load:
    request = json.dumps({"endpoint": asdict(endpoint), "work": asdict(work)})
    return Load(**json.loads(_run([sys.executable, "-m", "bench.load", request], work.seconds + 30)))


@dataclass
class _Tally:
    request: bytes
    times: list[float] = field(default_factory=list)
    read_bytes: int = 0
    errors: dict[str, int] = field(default_factory=lambda: {"connect": 0, "read": 0, "status": 0, "body": 0})
    over: bool = False


class _Visitor(asyncio.Protocol):
    """One keep-alive connection: the next request when the answer is complete."""

    def __init__(self, tally: _Tally) -> None:
        self._tally = tally
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._data = b""
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def _next(self) -> None:
        self._data, self._began = b"", time.perf_counter()
        self._transport.write(self._tally.request)

    def data_received(self, data: bytes) -> None:
        tally = self._tally
        tally.read_bytes += len(data)
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        if found and f"\r\ncontent-length: {len(SMALL_BODY)}".encode() not in head.lower():
            tally.errors["body"] += 1
            self._transport.abort()
        if not found or len(body) < len(SMALL_BODY):
            return
        tally.times.append(time.perf_counter() - self._began)
        tally.errors["status"] += not head.startswith(b"HTTP/1.1 200")
        tally.errors["body"] += body != SMALL_BODY
        if tally.over or b"\r\nconnection: close" in head.lower():
            self._data = b""
            self._transport.close()
        else:
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        self._tally.errors["read"] += bool(self._data) and not self._tally.over
        if not self.closed.done():
            self.closed.set_result(None)


async def _visit(endpoint: Endpoint, work: Work) -> Load:
    tally = _Tally(head_of(endpoint, "GET", "/", work.fields))
    context = None
    if endpoint.tls:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    loop = asyncio.get_running_loop()
    name = endpoint.host if endpoint.tls else None

    async def one() -> None:
        while not tally.over:
            try:
                _, visitor = await loop.create_connection(
                    lambda: _Visitor(tally), "127.0.0.1", endpoint.port, ssl=context, server_hostname=name
                )
            except OSError:
                tally.errors["connect"] += 1
                return
            await visitor.closed

    began = time.perf_counter()
    visitors = [asyncio.create_task(one()) for _ in range(work.connections)]
    await asyncio.wait(visitors, timeout=work.seconds)
    tally.over = True
    await asyncio.wait(visitors, timeout=10)
    took = time.perf_counter() - began
    cuts = statistics.quantiles(tally.times, n=100) if len(tally.times) > 1 else [0.0] * 99
    return Load(len(tally.times), took, tally.read_bytes, tally.errors, cuts[49] * 1e6, cuts[98] * 1e6)


def main(request: str) -> None:
    """The client's own process: the work as JSON in, a :class:`Load` as JSON out."""
    import uvloop

    asked: dict[str, Any] = json.loads(request)
    endpoint, work = Endpoint(**asked["endpoint"]), Work(**asked["work"])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(asdict(runner.run(_visit(endpoint, work)))))


if __name__ == "__main__":
    main(sys.argv[1])
