"""One drill: steady load, something breaks, and afterwards everything is as it was. What it measured goes into the record.

1 s of load ─► act ─► back by itself? ─► 1.5 s of load ─► failures explained? usage counted? nothing left over?

Recovery is the longest time after the act in which no request was answered. How long it may take is a target, and a target is
judged where a machine has nothing else to do: every figure is recorded beside its target, and `make soak` fails for one that was
missed. A test fails when the platform is not back within ``CEILING_SECONDS``, by itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from portico.embedded.units import portico_argv
from tests.drills.load import Load
from tests.drills.stage import CEILING_SECONDS, USAGE_INTERVAL, Stage

#: How often each drill is done: once in `make test`, five times in `make soak`.
REPEATS = int(os.environ.get("PORTICO_DRILL_REPEATS", "1"))
#: File that a line of JSON is added to for every drill and every figure; none when empty.
RECORD = os.environ.get("PORTICO_DRILL_RECORD", "")
RATE = 200.0
STEADY_SECONDS = 1.0
AFTER_SECONDS = 1.5
#: Seconds for `portico --version` to start and end on a machine with nothing else to do, generously.
START_SECONDS = 0.3
#: Target: back by itself within 3 s.
BACK_SECONDS = 3.0
#: Seconds after an act is over (its process gone, as the drill saw it) until the others have noticed, on a busy machine, too.
NOTICE_SECONDS = 0.5

#: Failures of requests that were in flight in what was killed, as the visitor sees them.
IN_FLIGHT = frozenset(("edge.agent_unreachable", "closed before an answer", "cut in the body", "ConnectionResetError"))


@dataclass(frozen=True)
class Moments:
    """Of an act (monotonic): when it did what it does, since when recovery counts, and when it was over: what begins later is no
    longer its victim."""

    done: float
    back_from: float
    over: float


@dataclass
class Allowed:
    """Failures that a drill explains: these causes, of requests that began before the act was over.

    ``most``: so many, beside those that were open at the act or came before it was over (how many these are is the machine's
    doing, and they do not count with ``of_those_open=False``); None: any number."""

    causes: frozenset[str] = frozenset()
    most: int | None = 0
    why: str = "nothing may fail"
    of_those_open: bool = True

    def strange(self, load: Load, act: Moments) -> list[tuple[float, str]]:
        """Failures that it does not explain: seconds after the act was over, and cause."""
        failed, until = load.failed(), act.over + NOTICE_SECONDS
        out = [(round(v.began - act.over, 2), v.what) for v in failed if v.what not in self.causes or v.began > until]
        if out or self.most is None:
            return out
        most = self.most
        if self.of_those_open:
            most += sum(visit.began <= act.over and visit.ended >= act.done for visit in load.visits)
        return out if len(failed) <= most else [(0.0, f"{len(failed)} failed, {most} allowed")]


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


@dataclass
class Figure:
    """Something measured, and the most that it may be by its target on this machine as it is now."""

    drill: str
    figure: str
    value: float
    target: float

    @property
    def missed(self) -> bool:
        return self.value > self.target

    def __str__(self) -> str:
        return f"{self.drill}: {self.figure} {self.value:g}, target {self.target:g}{' MISSED' if self.missed else ''}"


#: Of this run; the end of the run shows them (conftest.py).
FIGURES: list[Figure] = []


def figure(drill: str, what: str, value: float, target: float) -> None:
    """Record a figure; nothing fails here."""
    FIGURES.append(Figure(drill, what, round(value, 2), round(target, 2)))
    print(FIGURES[-1])
    record(FIGURES[-1])


def record(what: Result | Figure) -> None:
    if RECORD:
        with Path(RECORD).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(what)) + "\n")


Act = Callable[[Stage, Load], Awaitable[Moments]] | Callable[[Stage, Load], Awaitable[None]]


async def run(
    name: str,
    stage: Stage,
    act: Act,
    allowed: Allowed | None = None,
    *,
    back: float = BACK_SECONDS,
    usage_lost: float = 0.0,
) -> Result:
    """The whole of a drill, once. ``act`` returns its moments, or none when nothing may fail and recovery counts from its
    beginning; ``usage_lost`` is how many usage intervals' requests may be lost (a kill of the relay). ``back`` is the target in
    seconds. Recovery is mostly the start of a process, so on a machine that is busy now targets are those of one on which
    nothing else runs, times how much longer a process takes to start."""
    allowed = allowed or Allowed()
    slow = await slowness()
    before = await stage.holdings_at_rest()
    used_before = await stage.used_at_rest(0, limit=3.0) if not usage_lost else await stage.used()
    load = Load(stage.ports["http"], stage.host, RATE)
    async with load:
        await asyncio.sleep(STEADY_SECONDS)
        assert not load.failed(), f"not steady before the drill: {load.causes()}"
        at = time.monotonic()
        acted = await act(stage, load) or Moments(at, at, time.monotonic())
        await load.until_good(acted.back_from, CEILING_SECONDS)
        await asyncio.sleep(AFTER_SECONDS)
    recovery = load.silence(acted.back_from)
    slow = max(slow, await slowness())
    good = sum(visit.good for visit in load.visits)
    # What a kill may take: what was answered since the last interval was written, which a slow machine does later.
    since = acted.done - usage_lost * USAGE_INTERVAL * slow
    lost = sum(visit.good and since <= visit.ended <= acted.over for visit in load.visits) if usage_lost else 0
    rest = 2.5 * USAGE_INTERVAL if usage_lost else 0.3
    counted = await stage.used_at_rest(used_before + good - lost, rest=rest) - used_before
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
    print(result)
    record(result)
    figure(name, "seconds until back", recovery, back * slow)
    strange = allowed.strange(load, acted)
    assert not strange, f"failures that nothing explains (allowed: {allowed.why}): {strange[:10]}; {load.causes()}"
    assert good - lost <= counted <= len(load.visits) + load.repeats, (
        f"{good} requests were answered, {counted} were counted ({lost} may be lost)"
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
