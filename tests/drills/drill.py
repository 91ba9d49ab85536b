"""One drill: steady load, something breaks, and afterwards everything is as it was. What it measured goes into the record.

1 s of load ─► act ─► back within the limit? ─► 2 s of load ─► failures explained? usage counted? nothing left over?

Recovery is the longest time after the act in which no request was answered.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portico.embedded.units import portico_argv
from tests.drills.load import Load, Visit
from tests.drills.stage import Stage

#: How often each drill is done: once in `make test`, five times in `make soak`.
REPEATS = int(os.environ.get("PORTICO_DRILL_REPEATS", "1"))
#: File that a line of JSON is added to for every drill; none when empty.
RECORD = os.environ.get("PORTICO_DRILL_RECORD", "")
RATE = 200.0
STEADY_SECONDS = 1.0
AFTER_SECONDS = 1.5
#: Seconds for `portico --version` to start and end on a machine with nothing else to do, generously.
START_SECONDS = 0.3
#: Recovery that is promised: by itself within 3 s.
BACK_SECONDS = 3.0
#: Usage that a relay's death may lose: one interval, the moment until it is on disk, and what this machine adds.
USAGE_INTERVAL = 1.0

#: Failures of requests that were in flight in what was killed, as the visitor sees them.
IN_FLIGHT = frozenset(("edge.agent_unreachable", "closed before an answer", "cut in the body", "ConnectionResetError"))


@dataclass
class Allowed:
    """Failures that a drill explains: these causes, of requests that began no later than ``until`` after the act."""

    causes: frozenset[str] = frozenset()
    until: float = 0.0
    most: int = 0
    why: str = "nothing may fail"

    def strange(self, failed: list[Visit], at: float) -> list[tuple[float, str]]:
        """Failures that it does not explain: seconds after the act, and cause."""
        out = [
            (round(v.began - at, 2), v.what) for v in failed if v.what not in self.causes or v.began - at > self.until
        ]
        return out if out or len(failed) <= self.most else [(0.0, f"{len(failed)} failed, {self.most} allowed")]


@dataclass
class Result:
    """One run of a drill."""

    drill: str
    recovery: float
    requests: int
    failed: dict[str, int]
    slowest: float
    repeats: int
    counted: int
    notes: dict[str, Any] = field(default_factory=dict)

    def record(self) -> None:
        print(self)
        if RECORD:
            with Path(RECORD).open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.__dict__) + "\n")


Act = Callable[[Stage, Load], Awaitable[float | None]] | Callable[[Stage, Load], Awaitable[None]]


async def run(
    name: str,
    stage: Stage,
    act: Act,
    allowed: Allowed | None = None,
    *,
    back: float = 0.0,
    usage_lost: float = 0.0,
) -> Result:
    """The whole of a drill, once. ``act`` returns the moment from which recovery counts (now, when it returns none);
    ``usage_lost`` is the share of a usage interval's requests that may be lost (a kill of the relay). ``back`` is the limit in
    seconds: 3 when nothing is given. Recovery is mostly the start of a process, so on a machine that is busy now the limit is
    that of one on which nothing else runs, times how much longer a process takes to start."""
    allowed = allowed or Allowed()
    slow = await slowness()
    before = await stage.holdings()
    used_before = await stage.used_at_rest(0, 3.0) if not usage_lost else await stage.used()
    load = Load(stage.ports["http"], stage.host, RATE)
    async with load:
        await asyncio.sleep(STEADY_SECONDS)
        assert not load.failed(), f"not steady before the drill: {load.causes()}"
        at = time.monotonic()
        counts_from = await act(stage, load) or at
        await load.until_good(counts_from, 60)
        await asyncio.sleep(AFTER_SECONDS)
    recovery = load.silence(counts_from)
    good = sum(visit.good for visit in load.visits)
    counted = await stage.used_at_rest(used_before + good) - used_before
    result = Result(
        name,
        round(recovery, 2),
        len(load.visits),
        dict(load.causes()),
        round(max(visit.ended - visit.began for visit in load.visits), 2),
        load.repeats,
        counted,
    )
    leaks = await stage.leaks(before)
    result.record()
    back = (back or BACK_SECONDS) * max(slow, await slowness())
    assert recovery <= back, f"back after {recovery:.1f} s, {back:.1f} allowed"
    strange = allowed.strange(load.failed(), at)
    assert not strange, f"failures that nothing explains (allowed: {allowed.why}): {strange[:10]}; {load.causes()}"
    assert not load.overrun, "the visitors could not keep the rate: too many requests waited at once"
    lost = usage_lost * USAGE_INTERVAL * RATE
    assert good - lost <= counted <= len(load.visits) + load.repeats, (
        f"{good} requests were answered, {counted} were counted ({lost:.0f} may be lost)"
    )
    assert not leaks, leaks
    faults = stage.faults()
    assert not faults, "\n".join(faults)
    return result


async def slowness() -> float:
    """How many times longer than on a free machine the start of a process takes at this moment; 1 at least."""
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(*portico_argv("--version"), stdout=asyncio.subprocess.DEVNULL)
    await process.wait()
    return max(1.0, (time.monotonic() - began) / START_SECONDS)
