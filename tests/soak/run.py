"""`make soak`: every drill in its long form, then a platform left up under requests of all kinds while its parts are restarted.

    python -m tests.soak.run --minutes 30 --drills 5 --report docs/soak.md --json docs/soak.json

Ends by itself, and on SIGINT or SIGTERM at once, with everything that it started; the report is written only after a whole run.
Exit code 1 when something was not as it must be; the report says what.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.drills.drill import Figure
from tests.drills.stage import PINGS, Stage, stage
from tests.soak import report
from tests.soak.samples import Sampler
from tests.soak.traffic import RATES, Kept, Kind, Place, get, once, served
from tests.system.platform import Agent, Child, port_in
from tests.system.targets import listener, port_of

#: What is restarted in turn, and how.
TURNS = [
    ("relay-1", signal.SIGTERM), ("api", signal.SIGKILL), ("agent", signal.SIGKILL), ("postgres", signal.SIGKILL),
    ("valkey", signal.SIGTERM), ("worker", signal.SIGKILL), ("relay-1", signal.SIGKILL), ("api", signal.SIGTERM),
    ("agent", signal.SIGTERM), ("postgres", signal.SIGINT), ("valkey", signal.SIGKILL), ("worker", signal.SIGTERM),
]  # fmt: skip
BETWEEN_SECONDS = 120.0
#: Seconds after a restart in which requests that it cut may end.
WINDOW_SECONDS = 15.0
#: Failures of what was in flight in a part that was killed, as visitors see them. The others may not cause any.
IN_FLIGHT = {
    "502 edge.agent_unreachable", "closed before an answer", "cut in the body", "ConnectionResetError",
    "BrokenPipeError",
}  # fmt: skip
ALLOWED: dict[tuple[str, int], set[str]] = {
    ("relay-1", signal.SIGKILL): IN_FLIGHT | {"ConnectionRefusedError"},  # the ports of TCP tunnels are the relay's own
    ("relay-1", signal.SIGTERM): {"ConnectionRefusedError"},
    ("agent", signal.SIGKILL): IN_FLIGHT | {"ConnectionRefusedError"},
    # Ctrl-C gives the tunnel back: it is offline until the next agent is there.
    # An upload that goes on after its refusal is reset in the end; a WebSocket or TCP connection has a second to end.
    ("agent", signal.SIGTERM): {
        "404 edge.tunnel_offline", "ConnectionRefusedError", "ConnectionResetError", "BrokenPipeError",
        "closed before an answer",
    },
}  # fmt: skip
#: What the agent keeps of requests for its local page: less than by default, so that it is full before growth is looked at.
INSPECT_BYTES = 8_388_608
#: A process grows when it does so by more than these MiB or descriptors a minute, and by more than these in all, over its longest
#: life: the allocator and idle pools do less.
MEMORY_PER_MINUTE, MEMORY_GROWN = 0.5, 4.0
DESCRIPTORS_PER_MINUTE, DESCRIPTORS_GROWN = 0.5, 10.0
#: MiB that a part may hold more at rest in the end than at rest in the beginning.
MEMORY_AT_REST = 40.0


class StartAgent(Agent):
    """``portico start --all``: an HTTP and a TCP tunnel in one process."""

    def __init__(self, made: Stage, tcp_port: int) -> None:
        config = made.folder / "portico.yml"
        config.write_text(
            f"version: 1\ntunnels:\n  {made.name}:\n    addr: {port_of(made.sock)}\n"
            f"  {made.name}-tcp:\n    protocol: tcp\n    addr: {tcp_port}\n",
            encoding="utf-8",
        )
        where = made.account
        own = {"server": where.api_url, "agent_key": where.agent_key, "config_dir": made.folder / "config"}
        args = ["start", "--all", "--config", str(config), "--json"]
        Child.__init__(self, "agent-start", args, made.folder, own | PINGS | {"inspect_max_bytes": INSPECT_BYTES})


def cause(what: str) -> str:
    """Status and code of an unexpected answer; anything else as it is."""
    return " ".join(what.split()[:2]) if what[:1].isdigit() else what.strip()


@dataclass
class Restart:
    """One restart of a part."""

    part: str
    signal: str
    at: float
    number: int
    recovery: float = -1.0
    failed: Counter[str] = field(default_factory=Counter)


class Soak:
    """The state of a run."""

    def __init__(self, made: Stage, place: Place) -> None:
        self.stage, self.place = made, place
        self.done: Counter[str] = Counter()
        self.failed: dict[str, Counter[str]] = defaultdict(Counter)
        self.unexplained: list[tuple[float, str, str]] = []
        self.restarts: list[Restart] = []
        self.began = time.monotonic()
        self._open: set[asyncio.Task[None]] = set()

    async def drive(self, kind: Kind, rate: float) -> None:
        """Requests of one kind at its rate, whatever becomes of each."""
        due = time.monotonic()
        while True:
            task = asyncio.create_task(self._one(kind))
            self._open.add(task)
            task.add_done_callback(self._open.discard)
            due = max(due + 1 / rate, time.monotonic() - 1)
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _one(self, kind: Kind) -> None:
        name, began = kind.__name__, time.monotonic()
        what = await once(kind, self.place)
        self.done[name] += 1
        if not what:
            return
        what = cause(what)
        self.failed[name][what] += 1
        restart = self._to_blame(began, time.monotonic(), what)
        if restart is None:
            self.unexplained.append((round(began - self.began, 1), name, what))
        else:
            restart.failed[what] += 1

    def _to_blame(self, began: float, ended: float, what: str) -> Restart | None:
        """The restart that a failure is of: one within the request's time, or shortly before it, that may cause such."""
        for restart in reversed(self.restarts):
            causes = ALLOWED.get((restart.part, restart.number), set())
            if began - WINDOW_SECONDS <= restart.at <= ended and what in causes:
                return restart
        return None

    async def restart_in_turn(self, between: float, until: float) -> None:
        """One part every ``between`` seconds."""
        number = 0
        while True:
            await asyncio.sleep(between)
            if time.monotonic() + min(between / 2, 30) > until:
                return
            part, signum = TURNS[number % len(TURNS)]
            number += 1
            await self.restart(part, signum)

    async def restart(self, part: str, signum: int) -> None:
        with contextlib.suppress(OSError, IndexError, ValueError):
            pid = self.stage.pids()[part]
            restart = Restart(part, signal.Signals(signum).name, time.monotonic(), signum)
            self.restarts.append(restart)
            os.kill(pid, signum)
            restart.recovery = await self._back(restart.at)
            print(
                f"{restart.at - self.began:7.1f} s  {restart.signal} {part}: back after {restart.recovery:.1f} s",
                flush=True,
            )

    async def _back(self, since: float) -> float:
        """Seconds until three requests in a row that began afterwards were answered well."""
        good = 0
        while time.monotonic() - since < 60:
            began = time.monotonic()
            good = good + 1 if not await once(get, self.place) else 0
            if good == 1:
                first = time.monotonic() - since
            if good == 3:
                return round(first, 2)
            await asyncio.sleep(max(0.0, began + 0.05 - time.monotonic()))
        return -1.0

    async def rest(self) -> None:
        """Wait for the answers to what was sent."""
        if self._open:
            await asyncio.wait(self._open, timeout=40)


async def soak(minutes: float, folder: Path) -> dict[str, Any]:
    """The whole of it; what was measured, with ``faults`` that must be empty."""
    with listener() as tcp:

        def serve(http: socket.socket) -> AbstractAsyncContextManager[None]:
            return served(http, tcp)

        def make(made: Stage) -> Agent:
            return StartAgent(made, port_of(tcp))

        async with stage("soak", folder, serve=serve, make=make, hold_seconds=3) as made:
            return await _soak(made, minutes)


async def _soak(made: Stage, minutes: float) -> dict[str, Any]:
    seconds = minutes * 60
    place = Place(made.ports["http"], made.host, await _tcp_port(made))
    state = Soak(made, place)
    # At rest in the beginning: after a first round of everything, so that imports and caches are in place.
    await asyncio.gather(*(once(kind, place) for kind in RATES))
    await asyncio.sleep(3)
    before = await made.holdings()
    state.began = time.monotonic()
    until = state.began + seconds
    kept, sampler = Kept(place), Sampler(made)
    tasks = [asyncio.create_task(state.drive(kind, rate)) for kind, rate in RATES.items()]
    tasks += [asyncio.create_task(kept.run()), asyncio.create_task(sampler.run())]
    restarting = asyncio.create_task(state.restart_in_turn(min(BETWEEN_SECONDS, seconds / (len(TURNS) + 1)), until))
    try:
        while time.monotonic() < until:
            await asyncio.sleep(min(5.0, max(0.1, until - time.monotonic())))
            for task in [*tasks, restarting]:
                if task.done() and not task.cancelled():
                    task.result()
    finally:
        for task in [*tasks, restarting]:
            task.cancel()
        await asyncio.gather(*tasks, restarting, return_exceptions=True)
    await state.rest()
    leaks = await made.leaks(before, 30, MEMORY_AT_REST)
    said = made.faults()
    return _judged(state, kept, sampler, seconds, leaks, said)


async def _tcp_port(made: Stage) -> int:
    name = f"{made.name}-tcp"
    deadline = time.monotonic() + 20
    while True:
        for event in made.agent.agent.events():
            if event["event"] == "online" and event["name"] == name:
                return port_in(event["url"])
        assert time.monotonic() < deadline, "the TCP tunnel is not online"
        await asyncio.sleep(0.05)


def _judged(
    state: Soak, kept: Kept, sampler: Sampler, seconds: float, leaks: list[str], said: list[str]
) -> dict[str, Any]:
    table = sampler.table(seconds)
    faults = [f"at {at:.0f} s {name}: {what}" for at, name, what in state.unexplained[:20]]
    faults += [f"not back: {r.signal} of {r.part}" for r in state.restarts if r.recovery < 0]
    faults += [f"left over at the end: {leak}" for leak in leaks]
    faults += [f"said in a log: {lines[:2000]}" for lines in said[:5]]
    cuts = [(round(at - state.began, 1), what) for at, what in kept.cuts if not _explained(at, state.restarts)]
    faults += [f"a {what} connection that was kept open was cut at {at:.0f} s" for at, what in cuts]
    if seconds >= 600:  # over less time a slope says nothing
        faults += [
            f"{row['part']} grows: {row['memory_per_minute']} MiB and {row['descriptors_per_minute']} descriptors a minute"
            for row in table
            if (float(row["memory_per_minute"]) > MEMORY_PER_MINUTE and float(row["memory_grown"]) > MEMORY_GROWN)
            or (
                float(row["descriptors_per_minute"]) > DESCRIPTORS_PER_MINUTE
                and float(row["descriptors_grown"]) > DESCRIPTORS_GROWN
            )
        ]
    return {
        "seconds": round(seconds),
        "requests": sum(state.done.values()),
        "kinds": {name: {"made": count, "failed": dict(state.failed[name])} for name, count in sorted(state.done.items())},
        "restarts": [
            {
                "at": round(r.at - state.began), "part": r.part.split("-")[0], "signal": r.signal, "recovery": r.recovery,
                "failed": dict(r.failed),
            }
            for r in state.restarts
        ],
        "kept": {"messages": kept.messages, "cuts": [[round(at - state.began, 1), what] for at, what in kept.cuts]},
        "processes": table,
        "faults": faults,
    }  # fmt: skip


def _explained(at: float, restarts: list[Restart]) -> bool:
    """Whether a restart of the agent or of a relay (at its drain limit at the latest) cut a connection then."""
    return any(r.part in ("agent", "relay-1") and 0 <= at - r.at <= WINDOW_SECONDS for r in restarts)


def drills(repeats: int) -> dict[str, Any]:
    """Every drill, ``repeats`` times; the table of the runs, and what failed."""
    with tempfile.NamedTemporaryFile(prefix="portico-drills-", suffix=".jsonl") as record:
        env = os.environ | {"PORTICO_DRILL_REPEATS": str(repeats), "PORTICO_DRILL_RECORD": record.name}
        argv = [sys.executable, "-m", "pytest", "tests/drills", "-q", "--durations=0", "-p", "no:cacheprovider"]
        began = time.monotonic()
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in Path(record.name).read_text(encoding="utf-8").splitlines()]
    rows = [line for line in lines if "figure" not in line]
    figures = [Figure(**line) for line in lines if "figure" in line]
    summary = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "")
    faults = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if done.returncode and not faults:
        faults = [f"pytest ended with {done.returncode}: {summary}"]
    print(done.stdout[-20_000:] if faults else summary, flush=True)
    faults += [f"target missed: {figure}" for figure in figures if figure.missed]
    return {"repeats": repeats, "seconds": round(time.monotonic() - began), "rows": rows, "faults": faults}


def machine() -> dict[str, Any]:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cores": os.cpu_count(),
        "cpu": model,
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--drills", type=int, default=5, help="repeats of each drill; 0 leaves them out")
    parser.add_argument("--report", type=Path, help="Markdown to write")
    parser.add_argument("--json", type=Path, help="figures to write")
    options = parser.parse_args()
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine()}
    # Ended by SIGTERM, too, it ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with tempfile.TemporaryDirectory(prefix="portico-soak-") as folder:
        try:
            if options.drills:
                result["drills"] = drills(options.drills)
            if options.minutes:
                result["soak"] = asyncio.run(soak(options.minutes, Path(folder)))
        except KeyboardInterrupt:
            print("ended before its time; no report", file=sys.stderr)
            return 130
    text = report.markdown(result)
    print(text)
    if options.report:
        options.report.write_text(text, encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if report.faults(result) else 0


if __name__ == "__main__":
    sys.exit(main())
