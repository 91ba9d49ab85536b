"""What only Portico is asked: the first request, idle tunnels, many agents, grants. Each on a fresh platform of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.apps import SMALL_BODY
from bench.candidates import SMALL, Ground, Platform
from bench.figures import Refused, median
from bench.proc import MIB, cpu, resident
from bench.processes import ROOT, Child, environment
from bench.visit import Endpoint, check

TUNNELS = 1000
AGENTS = 1000
#: Agents to a process.
CROWD = 250
#: After the last tunnel is online, before anything is measured: what starting cost is over then.
SETTLE_SECONDS = 5.0
IDLE_SECONDS = 12.0
ONLINE_SECONDS = 180.0
FIRST_REQUEST_SECONDS = 15.0
PROGRAM_SECONDS = 180.0
#: The books of a million events take a while to be filled, and are read three times.
BOOKS_SECONDS = 900.0

Figures = dict[str, Any]


def first_request(ground: Ground, repeats: int) -> Figures:
    """Seconds from the start of the process `portico http` to the first 200 through its URL, ``repeats`` times."""
    with_platform = Platform(ground.run)
    try:
        args = ("http", str(ground.ports[SMALL]), "--name", "first")
        agent, url = with_platform.online(*args)  # the tunnel exists, the API is warm
        endpoint = Endpoint(with_platform.http_port, url.split("//")[1].split(":")[0])
        check(endpoint, SMALL_BODY)
        agent.end()
        return {"seconds": [_first(with_platform, endpoint, args) for _ in range(repeats)]}
    finally:
        with_platform.child.end()


def _first(platform: Platform, endpoint: Endpoint, args: tuple[str, ...]) -> float:
    began = time.perf_counter()
    agent = platform.start_agent(*args)
    try:
        while True:
            try:
                check(endpoint, SMALL_BODY)
            except Refused as why:
                if time.perf_counter() - began > FIRST_REQUEST_SECONDS:
                    raise Refused(f"no first request within {FIRST_REQUEST_SECONDS:g} s: {why}") from None
                time.sleep(0.003)
                continue
            return time.perf_counter() - began
    finally:
        agent.end()


def idle_tunnels(ground: Ground, repeats: int) -> Figures:
    """A thousand tunnels on one session, without traffic."""
    return {"tunnels": TUNNELS} | _crowd(ground, [(1, TUNNELS)])


def agents(ground: Ground, repeats: int) -> Figures:
    """A thousand agents with a tunnel each on one relay, without traffic; then a request through some of them."""
    return {"agents": AGENTS} | _crowd(ground, [(CROWD, 1)] * (AGENTS // CROWD))


def _crowd(ground: Ground, processes: list[tuple[int, int]]) -> Figures:
    """What (agents, tunnels of each) in so many processes add at the relay, and whether their URLs answer."""
    platform = Platform(ground.run)
    try:
        relay = platform.pid("relay-1")
        before = resident(relay)
        began = time.perf_counter()
        fleets = [_fleet(ground, platform, n, *size) for n, size in enumerate(processes)]
        hosts: list[str] = []
        for fleet in fleets:
            hosts += fleet.wait_for(lambda fleet=fleet: _hosts(fleet), ONLINE_SECONDS, "all tunnels online")  # type: ignore[misc]
        online = time.perf_counter() - began
        time.sleep(SETTLE_SECONDS)
        added = (resident(relay) - before) / MIB
        start, reading = time.perf_counter(), cpu(relay)
        time.sleep(IDLE_SECONDS)
        used = reading.until(cpu(relay)) / (time.perf_counter() - start)
        times = [_timed(Endpoint(platform.http_port, host)) for host in hosts[:: max(1, len(hosts) // 50)]]
        found = median(times)
        return {
            "online_seconds": online,
            "relay_mib": added,
            "relay_cpu_percent": used * 100,
            "first_request_ms": found.value * 1e3 if found else 0.0,
        }
    finally:
        platform.child.end()


def _fleet(ground: Ground, platform: Platform, number: int, agents: int, tunnels: int) -> Child:
    given = platform.credentials
    asked = {"server": given["api_url"], "key": given["agent_key"], "prefix": f"fleet-{number}"}
    asked_for = json.dumps({**asked, "agents": agents, "tunnels": tunnels, "port": ground.ports[SMALL]})
    return ground.run.start("fleet", [sys.executable, "-m", "bench.fleet", asked_for], env=environment())


def _hosts(fleet: Child) -> list[str]:
    lines = fleet.out.split("\n")[:-1]
    return list(json.loads(lines[-1])["hosts"]) if lines else []


def _timed(endpoint: Endpoint) -> float:
    began = time.perf_counter()
    check(endpoint, SMALL_BODY)
    return time.perf_counter() - began


def grants(ground: Ground, repeats: int) -> Figures:
    """Sessions with one grant that one API process gives out; see bench/grants.py."""
    return _program("bench.grants")


def queue(ground: Ground, repeats: int) -> Figures:
    """Jobs that do nothing, through one worker process; see bench/queue.py."""
    return _program("bench.queue")


def cert_ingest(ground: Ground, repeats: int) -> Figures:
    """Certificate events that one API process takes in; see bench/cert_ingest.py."""
    return _program("bench.cert_ingest")


def webhook_ingest(ground: Ground, repeats: int) -> Figures:
    """Events of a payment provider that one API process takes in; see bench/webhook_ingest.py."""
    return _program("bench.webhook_ingest")


def reports(ground: Ground, repeats: int) -> Figures:
    """Reports of a million finance events in each format; see bench/exports.py."""
    return _program("bench.exports", BOOKS_SECONDS)


def settlement(ground: Ground, repeats: int) -> Figures:
    """A receipt of 100,000 lines compared with the books; see bench/reconcile.py."""
    return _program("bench.reconcile")


def _program(module: str, seconds: float = PROGRAM_SECONDS) -> Figures:
    """What a benchmark that is a program of its own says in JSON."""
    argv = [sys.executable, "-m", module, "--json"]
    try:
        done = subprocess.run(
            argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"{module} did not end within {seconds:g} s") from None
    lines = done.stdout.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        raise Refused(f"{module} ended with {done.returncode}: {' '.join(done.stderr.split())[-200:]}")
    return dict(json.loads(lines[-1]))


MEASURES: dict[str, Callable[[Ground, int], Figures]] = {
    "first-request": first_request,
    "idle-tunnels": idle_tunnels,
    "agents": agents,
    "grants": grants,
    "queue": queue,
    "cert-ingest": cert_ingest,
    "webhook-ingest": webhook_ingest,
    "reports": reports,
    "settlement": settlement,
}
